"""
Evaluates a model: validation loss and recall. Recall is the share of questions that the model answers with
exactly the right words. Each process works on its share of the batches and of the questions.
"""

import contextlib
import random
from collections import Counter
from itertools import groupby

import torch

from data.corpus import Dataset, accepted_answers, decode_answer, draw_batch, is_right, line_ends
from model import GPT, eval_mode
from runtime.distributed import RANK, WORLD_SIZE, all_reduce_sum, gather_objects

SPARE = 16  # tokens that an answer may have more than the right one, such as a full stop, before it is cut


def evaluate(model: GPT, compiled, data: Dataset, batches: int, batch_size: int, parts: int = 1,
             count: int | None = None) -> dict:
    """
    Measures loss, recall, and which share of the slots training has used since the last call. compiled: the
    model, or torch.compile(model), for the loss. count: how many questions to ask; None: all.
    """
    measured = {"val_loss": validation_loss(compiled, data.val, batches, batch_size, parts)}
    if questions := data.questions:
        if count is not None and count < len(questions):
            questions = random.Random(0).sample(questions, count)
        measured["recall"] = recall(model, data.encoding, questions)
    if model.pool is not None:
        measured["slots_used"], measured["kl_from_uniform"] = model.pool.usage.summary()
        model.pool.usage.reset()
    return measured


@torch.no_grad()
def validation_loss(model: GPT, tokens, batches: int, batch_size: int, parts: int = 1) -> float:
    """
    The mean loss over batches of `tokens`, which are the same in every run. model: a GPT, compiled or not.
    batch_size: in all processes together. parts: compute each batch in so many parts, one after the other.
    """
    losses, device = [], model.wte.weight.device
    with eval_mode(model):
        for i in range(batches):
            x, y = draw_batch(tokens, batch_size, model.config.block_size, 0, 1, i)  # 1: evaluation
            for part_x, part_y in zip(x.chunk(parts), y.chunk(parts), strict=True):
                losses.append(model(part_x.to(device), part_y.to(device))[1])
    losses = torch.stack(losses).tolist()  # waits for the device only here
    return all_reduce_sum(torch.tensor(sum(losses) / len(losses), device=device)).item() / WORLD_SIZE


def answer(model: GPT, encoding, questions: list[dict], max_new_tokens: int | None = None,
           batch_size: int = 64) -> list[list[int]]:
    """
    The tokens of the model's greedy answer to each question, up to the token with the end of the line. Each
    process answers its share of the questions, and returns all answers. max_new_tokens: longer answers are
    cut; None: those that are longer than the right answer by SPARE tokens.
    """
    device, ends = model.wte.weight.device, line_ends(encoding)
    prompts = [encoding.encode(question["prompt"], disallowed_special=()) for question in questions]
    limits = []  # of each question: another question in the same file changes nothing
    for question, prompt in zip(questions, prompts, strict=True):
        room = limit = max(1, model.config.block_size + 1 - len(prompt))  # 1: nothing reads the last token
        if max_new_tokens is not None:
            limit = max_new_tokens
        elif answers := accepted_answers(question):
            limit = max(len(encoding.encode_ordinary(f" {text}")) for text in answers) + SPARE
        limits.append(min(limit, room))
    # Processes that share a pool must read it equally often, with batches of the same size. So each group is
    # padded with its last question, and no process stops generating early.
    stop = ends if WORLD_SIZE == 1 else None
    own_answers = {}
    in_order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), limits[i]))
    with eval_mode(model):
        for length, group in groupby(in_order, key=lambda i: len(prompts[i])):
            group = list(group)  # prompts with the same number of tokens, so that a batch needs no padding
            group += group[-1:] * (-len(group) % WORLD_SIZE)
            for start in range(0, len(group), batch_size * WORLD_SIZE):
                batches = group[start:start + batch_size * WORLD_SIZE]  # one for each process
                batch, longest = batches[RANK::WORLD_SIZE], max(limits[i] for i in batches)
                idx = torch.tensor([prompts[i] for i in batch], device=device)
                idx = model.generate(idx, longest, temperature=0, stop=stop)
                for i, tokens in zip(batch, idx[:, length:].tolist(), strict=True):
                    end = next((n for n, token in enumerate(tokens, 1) if token in ends), len(tokens))
                    own_answers[i] = tokens[:min(end, limits[i])]
    all_answers = {i: tokens for part in gather_objects(own_answers) for i, tokens in part.items()}
    return [all_answers[i] for i in range(len(prompts))]


@contextlib.contextmanager
def record_reads(pool):
    """
    Lists what is read from a pool in a `with` block: (indices (N, bag), weights (N, bag)), once for each time
    that a layer reads the pool.

        with record_reads(model.pool) as reads:
            model(idx)
        indices, weights = reads[0]  # what the N = B*T tokens of idx read in the first memory layer
    """
    reads = []
    with pool.register_forward_pre_hook(lambda pool, read: reads.append(tuple(x.detach() for x in read))):
        yield reads


def exposure_bin(question: dict) -> str:
    """The bin of a question: "0" means none, "8" 8 to 15 exposures, "16" 16 to 31. JSON keys are strings."""
    return str(1 << max(0, question.get("exposures", 1)).bit_length() >> 1)


def recall(model: GPT, encoding, questions: list[dict]) -> dict:
    """The share of questions that the model answers with exactly the right words, as `shares` returns it."""
    answers = [decode_answer(encoding, tokens) for tokens in answer(model, encoding, questions)]
    return shares(questions, answers)


def answered(model: GPT, encoding, questions: list[dict]) -> list[dict]:
    """The questions that the model answers rightly."""
    return [question for question, tokens in zip(questions, answer(model, encoding, questions), strict=True)
            if is_right(question, decode_answer(encoding, tokens))]


def shares(questions: list[dict], answers: list[str]) -> dict:
    """
    The share of right answers: {"all": 0.5, "held_out": 0.2, "by_exposure": {"8": 0.4}}. held_out: questions
    that the training text answers but never asks. all: the others. by_exposure: these in bins.
    """
    right, by_exposure = {"all": [], "held_out": []}, {}
    for question, text in zip(questions, answers, strict=True):
        right["held_out" if question.get("held_out") else "all"].append(is_right(question, text))
        if "exposures" in question and not question.get("held_out"):
            by_exposure.setdefault(exposure_bin(question), []).append(is_right(question, text))
    result = {name: sum(r) / len(r) for name, r in right.items() if r}
    return result | {"by_exposure": {name: sum(by_exposure[name]) / len(by_exposure[name])
                                     for name in sorted(by_exposure, key=int)}}


def commonest_answers(questions: list[dict]) -> list[str]:
    """
    A guess for each question: the answer that most questions of the same "kind" have. What guesses get right,
    a model can get right without knowing any fact.
    """
    counts = {}
    for question in questions:
        counts.setdefault(question.get("kind"), Counter()).update(accepted_answers(question))
    return [counts[question.get("kind")].most_common(1)[0][0] for question in questions]
