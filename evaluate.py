"""
What a model is trained on and asked: a corpus that data/prepare.py made, batches of it, validation loss, and
recall, the share of questions that are answered by exactly the right words. Of many processes, each has its
share of a batch and of the questions.
"""

import contextlib
import json
from itertools import groupby
from pathlib import Path

import numpy as np
import torch

from config import fail
from data.prepare import CORPORA, DATA, END, encoding_from_json
from distributed import RANK, WORLD_SIZE, all_reduce_sum, gather_objects
from model import GPT


def read_questions(path: Path) -> list[dict]:
    """{"prompt", "answer", and for facts "exposures" and "held_out"} a line; [] where there is no file."""
    questions = []
    for number, line in enumerate(open(path, "rb") if path.exists() else (), 1):
        try:
            if line.strip():
                question = json.loads(line)
                for text in (question["prompt"], question["answer"]):
                    if not isinstance(text, str) or not text:
                        raise ValueError
                questions.append(question)
        except (ValueError, KeyError, TypeError):
            fail(f'line {number} of {path} must be {{"prompt": "...", "answer": "..."}}')
    return questions


def decode(encoding, tokens: list[int]) -> str:
    """Ids that the encoding does not use, and a model that has not learnt so may say, are left out."""
    parts = []
    for token in tokens:
        with contextlib.suppress(KeyError):
            parts.append(encoding.decode_single_token_bytes(token))
    return b"".join(parts).decode(errors="replace")


def decode_answer(encoding, tokens: list[int]) -> str:
    """Up to the end of the line, or of the document."""
    return decode(encoding, tokens).split("\n")[0].split(END)[0].strip()


class Dataset:
    """A folder that data/prepare.py made: token ids to train on and validate, the encoding, the questions."""

    def __init__(self, name: str):
        folder = DATA / name
        if not (folder / "meta.json").exists():
            if name not in CORPORA or name == "text":
                fail(f"no data in {folder}; make it: python data/prepare.py text --name={name} --input ...")
            prepare, config_class = CORPORA[name]
            prepare(config_class())  # needs no download
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.encoding_json, self.encoding = meta["encoding"], encoding_from_json(meta["encoding"])
            self.train = np.memmap(folder / "train.bin", meta["dtype"], "r")
            self.val = np.memmap(folder / "val.bin", meta["dtype"], "r")
            self.questions = read_questions(folder / "qa.jsonl")
            for split, tokens in (("train", self.train), ("val", self.val)):
                if len(tokens) != meta[f"{split}_tokens"]:
                    raise ValueError(f"{split}.bin has {len(tokens)} tokens, not {meta[f'{split}_tokens']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"the data in {folder} is damaged ({error}): make it again with data/prepare.py")


def draw_batch(tokens: np.ndarray, count: int, block_size: int, *key: int):
    """
    x, y (count / processes, block_size), int64, y one ahead: windows of `tokens`. The key alone says which
    `count` are drawn; each process has its share of them.
    """
    starts = np.random.default_rng(key).integers(len(tokens) - block_size, size=count)[RANK::WORLD_SIZE]
    windows = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


# --- evaluation ---------------------------------------------------------------------------------------------

def answer(model: GPT, encoding, questions: list[dict], batch_size: int = 64) -> list[list[int]]:
    """
    The tokens of the model's greedy answer to each question, up to the end of the line. The processes share
    the questions; all get all answers.
    """
    device, newline = model.wte.weight.device, encoding.encode("\n")[0]
    prompts = [encoding.encode(question["prompt"], disallowed_special=()) for question in questions]
    answers = [encoding.encode(" " + question["answer"], disallowed_special=()) for question in questions]
    longest = max(len(tokens) for tokens in answers)
    own = {}
    # prompts of one length make a batch without padding
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for length, group in groupby(by_length, key=lambda i: len(prompts[i])):
        group = list(group)
        group += group[-1:] * (-len(group) % WORLD_SIZE)
        group = group[RANK::WORLD_SIZE]
        for batch in (group[i:i + batch_size] for i in range(0, len(group), batch_size)):
            idx = torch.tensor([prompts[i] for i in batch], device=device)
            # processes that share a pool read it together: none may stop before the others
            stop = newline if WORLD_SIZE == 1 else None
            new = model.generate(idx, longest + 1, temperature=0, stop=stop)[:, length:].tolist()
            for i, tokens in zip(batch, new, strict=True):
                own[i] = tokens[:tokens.index(newline)] if newline in tokens else tokens
    every = {i: tokens for part in gather_objects(own) for i, tokens in part.items()}
    return [every[i] for i in range(len(prompts))]


def exposure_bin(question: dict) -> str:
    """'8' stands for 8 to 15 exposures."""
    return str(1 << max(1, question.get("exposures", 1)).bit_length() - 1)


def recall(model: GPT, encoding, questions: list[dict]) -> dict:
    """
    Share of the questions answered by exactly the right words: {"all": ..., "held_out": ..., "by_exposure":
    {"8": ...}}.

    "all" is over the people who were asked about in training, "held_out" over those who were not. The keys
    of "by_exposure": see exposure_bin.
    """
    right = {"all": [], "held_out": []}
    by_exposure = {}
    for question, tokens in zip(questions, answer(model, encoding, questions), strict=True):
        is_right = decode_answer(encoding, tokens) == question["answer"]
        right["held_out" if question.get("held_out") else "all"].append(is_right)
        if "exposures" in question and not question.get("held_out"):
            by_exposure.setdefault(exposure_bin(question), []).append(is_right)
    result = {name: sum(r) / len(r) for name, r in right.items() if r}
    return result | {"by_exposure": {n: sum(by_exposure[n]) / len(by_exposure[n])
                                     for n in sorted(by_exposure, key=int)}}


@torch.no_grad()
def validation_loss(model, tokens, config, device) -> float:
    """config: train.TrainConfig."""
    model.eval()
    losses = []
    for i in range(config.eval_batches):
        x, y = draw_batch(tokens, config.batch_size, config.block_size, config.seed, 1, i)
        for part_x, part_y in zip(x.chunk(config.accum_steps), y.chunk(config.accum_steps), strict=True):
            losses.append(model(part_x.to(device), part_y.to(device))[1].item())
    model.train()
    return all_reduce_sum(torch.tensor(sum(losses) / len(losses), device=device)).item() / WORLD_SIZE
