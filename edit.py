"""
Finds, erases and teaches facts in the memory of a trained model.

    python edit.py find --question='What did Mule Tujuton study?'      which slots carry this answer
    python edit.py erase --ask='Mule Tujuton'                          empties the slots of a person
    python edit.py erase --question='What did Mule Tujuton study?'     empties the slots of one fact
    python edit.py teach --statement 'The job of Mule Zuhugom is that of a baker.' ...
    python edit.py teach --file=FILE                                   learns the sentences of a file
    python edit.py erase --help                                        the options of a command

find changes nothing. erase and teach write a checkpoint to a new folder, for sample.py and train.py. The old
checkpoint and the training text still have what was erased. docs/editing.md explains the method.
"""

import functools
import itertools
import math
import random
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.cli import at_least, build, command, fail, first_word, parse, print_text, read_lines

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import corpus
from data.corpus import Dataset, accepted_answers, decode, decode_answer, draw_batch, is_right, lines_with
from evaluate import answer, answered, record_reads, validation_loss
from model import GPT, eval_mode
from pool import PoolOptimizer
from runtime.checkpoint import Checkpoint, find_trained, is_checkpoint, load, newest_run, save_checkpoint
from runtime.distributed import columns_group

PIECE = 16  # tokens in a piece of the training text, about a sentence
CANDIDATES = 256  # slots among which choose_slots chooses
GONE = 0.1  # an answer is erased once one of its tokens is less than so many times as likely as another


# --- what is read, and by whom: for any model with model.pool, a ValuePool that its memory layers read ------

def all_logits(model, x):
    """x (B, T) -> logits (B, T, vocab_size), of our GPT or another model, such as one of transformers."""
    output = model(x, x)[0] if isinstance(model, GPT) else model(x)
    return getattr(output, "logits", output)


def make_batch(encoding, prompts: list[str], answers: list[str]):
    """x, y (B, T) for the model. y has the tokens of each answer, and -1 elsewhere."""
    x, y = [], []
    for prompt, text in zip(*map(encoding.encode_ordinary_batch, (prompts, answers)), strict=True):
        x.append(torch.tensor(prompt + text[:-1]))
        y.append(torch.tensor(([-1] * (len(prompt) - 1) + text)[-len(x[-1]):]))
    return pad_sequence(x, batch_first=True), pad_sequence(y, batch_first=True, padding_value=-1)


def text_batch(encoding, texts: list[str], longest: int | None = None):
    """x, y (B, T): whole texts, each with a newline at its end, cut after `longest` tokens."""
    if isinstance(texts, str):  # its letters would be the texts
        raise ValueError("there must be a list of texts")
    batch = make_batch(encoding, [""] * len(texts), [f"{text}\n" for text in texts])
    return [part[:, :longest] for part in batch]


def question_batch(model: GPT, encoding, question: dict):
    """A question with its right answer: in the model's own words if these are right."""
    own = decode_answer(encoding, answer(model, encoding, [question])[0])
    right = own if is_right(question, own) else accepted_answers(question)[0]
    return make_batch(encoding, [question["prompt"]], [f" {right}"])


def about_batches(model: GPT, encoding, questions: list[dict], texts: list[str]):
    """For choose_slots: the answers to questions about a person, and the texts about this person."""
    texts = texts + [f"{question['prompt']} {accepted_answers(question)[0]}" for question in questions]
    answers = [question_batch(model, encoding, question) for question in questions]
    return answers, text_batch(encoding, texts, model.config.block_size)


@torch.no_grad()
def read_slots(model, x):
    """x (B, T) -> (B, T, layers, bag): the slots that each token reads in each memory layer."""
    with eval_mode(model), record_reads(model.pool) as reads:
        model(x.to(model.pool.values.device))
    return torch.stack([indices.view(*x.shape, -1) for indices, _ in reads], 2).long().cpu()


def leave_out(model, slots: list):
    """with leave_out(model, slots): row b of a batch does without the slots in slots[b]."""
    def without(pool, read):
        indices, weights = read
        rows = indices.view(len(slots), -1)
        out = [torch.isin(row, part.to(row)) for row, part in zip(rows, slots, strict=True)]
        return indices, weights.masked_fill(torch.stack(out).view_as(indices), 0)
    return model.pool.register_forward_pre_hook(without)


@torch.no_grad()
def predict(model, x, y):
    """Log-probabilities (B, T) of the tokens in y, and of the likeliest tokens there. 0 where y is -1."""
    x, y = (part.to(next(model.parameters()).device) for part in (x, y))
    with eval_mode(model):
        scores = all_logits(model, x).log_softmax(-1)  # (B, T, vocab_size)
    known = scores.gather(-1, y.clamp(min=0).unsqueeze(-1)).squeeze(-1)
    return (part.masked_fill(y < 0, 0).cpu() for part in (known, scores.amax(-1)))


def log_probability(model, x, y):
    """(B,): the logarithm of the probability that the model gives to the answers in y."""
    return next(predict(model, x, y)).sum(1)


def losses_without(model, x, y, parts: list):
    """For each set of slots: how much the log-probability of the answer in y (1, T) falls without them."""
    without = []
    for i in range(0, len(parts), 64):
        group = parts[i:i + 64]
        with leave_out(model, group):
            without.append(log_probability(model, x.expand(len(group), -1), y.expand(len(group), -1)))
    return log_probability(model, x, y) - torch.cat(without)


def inverse_document_frequency(model, tokens, count: int = 1000):
    """
    (num_values,): log((count + 1) / (df + 1)). df of `count` pieces of other text read the slot. tokens: this
    text, a numpy array of token ids.
    """
    length = min(PIECE, model.config.block_size) if isinstance(model, GPT) else PIECE
    df = torch.zeros(model.pool.num_values, dtype=torch.int64)
    for i, rows in enumerate(torch.arange(count).split(64)):
        x, _ = draw_batch(tokens, len(rows), length, 0, 2, i)  # 2: neither training (0) nor evaluation (1)
        reads = read_slots(model, x).flatten(1)
        df += torch.zeros(len(x), len(df), dtype=torch.int64).scatter_(1, reads, 1).sum(0)
    return ((count + 1) / (df + 1)).log()


def tf_idf(model, x, at, idf):
    """
    (num_values,): high for slots that these texts read often, and other texts rarely (Lin et al. 2025, arXiv
    2510.15103). x (B, T). at (B, T): which tokens count. idf: the result of inverse_document_frequency.
    """
    counts = torch.zeros(model.pool.num_values, dtype=torch.int64)  # how often these texts read each slot
    for part_x, part_at in zip(x.split(64), at.split(64), strict=True):
        counts += read_slots(model, part_x)[part_at].flatten().bincount(minlength=len(counts))
    return counts / counts.sum() * idf


def top_slots(scores, count: int):
    """The slots with the highest scores, without those that the texts do not read at all."""
    return scores.topk(min(count, int((scores > 0).sum()))).indices


# --- find, erase, teach -------------------------------------------------------------------------------------

def find(model, x, y) -> dict:
    """
    Measures, by leaving slots out, which slots carry the answer in y (1, T). The result has the slots that
    the text reads, those first whose absence costs most, and falls of log-probability: "top" {n: without the
    first n slots}, "places" (tokens, layers): without all slots that one token reads in one layer.
    """
    reads = read_slots(model, x)[0]  # (T, layers, bag)
    slots = reads.unique()
    slots = slots[losses_without(model, x, y, slots.split(1)).argsort(descending=True)]
    sizes = [n for n in (4, 16, 64, 256) if n < len(slots)] + [len(slots)]
    top = losses_without(model, x, y, [slots[:n] for n in sizes]).tolist()
    places = losses_without(model, x, y, list(reads.flatten(0, 1))).view(reads.shape[:2])
    return {"slots": slots, "top": dict(zip(sizes, top, strict=True)), "places": places,
            "tokens": x[0].tolist()}


def is_gone(model, x, y) -> bool:
    """Is a token of the answer in y (1, T) far less likely than the likeliest token there?"""
    known, likeliest = predict(model, x, y)
    return (known - likeliest).exp().min().item() < GONE


def choose_slots(model, answers: list, texts, idf, count: int = 0):
    """
    The slots to erase, so that the model forgets `answers`: one batch x, y (1, T) for each, see make_batch.

    Candidates are the slots with the highest TF-IDF for `texts`, a batch x, y of texts about the same person
    or thing. Of these, take the 4 slots whose absence costs the answers most. Measure again without them, and
    take 4 more, 8 more, 16 more ... until all answers are gone, or, if `count` is given, until there are so
    many.
    """
    x, y = texts
    rest = top_slots(tf_idf(model, x, y >= 0, idf), max(count, CANDIDATES))
    chosen = rest[:0]
    while len(rest) and (not count or len(chosen) < count):
        parts = [torch.cat((chosen, slot)) for slot in rest.split(1)]
        losses = sum(losses_without(model, *batch, parts)
                     for batch in tqdm(answers, "measuring slots", leave=False, disable=None))
        rest = rest[losses.argsort(descending=True)]
        more = min(max(4, len(chosen)), count - len(chosen) if count else len(rest))
        chosen, rest = torch.cat((chosen, rest[:more])), rest[more:]
        with leave_out(model, [chosen]):
            if not count and all(is_gone(model, *batch) for batch in answers):
                break
    return chosen


@torch.no_grad()
def erase(model, slots):
    """Empties slots: their rows become 0. slots: a tensor of numbers. Returns them."""
    model.pool.values[slots.to(model.pool.values.device)] = 0
    return slots


def keep_reads(gradient, slots, at) -> None:
    """Drops reads from a pool's gradient: of other slots, and of tokens that at (B, T) leaves out."""
    for i, (indices, weights, dy) in enumerate(gradient.reads):
        token, place = (torch.isin(indices, slots) & at.view(-1, 1)).nonzero(as_tuple=True)
        gradient.reads[i] = indices[token, place, None], weights[token, place, None], dy[token]


def shuffled(count: int, size: int):
    """Yields indices of `size` of `count` texts, without end; each text once per round. size=0: all."""
    generator = torch.Generator().manual_seed(0)
    while True:
        yield from reversed(torch.randperm(count, generator=generator).split(size or count))


def teach(model, x, y, idf, slots: int = 128, steps: int = 60, lr: float = 30.0, kind: str = "sgd",
          batch_size: int = 0, at=None, is_done=lambda: False):
    """
    Sparse memory finetuning (Lin et al. 2025): learns the texts in x, y (see text_batch) by gradient descent
    on the rows of the `slots` slots with the highest TF-IDF for them. Nothing else changes. Returns these
    slots.

    kind: of the PoolOptimizer. batch_size: texts per step, drawn without replacement; 0: all. at (B, T): the
    tokens that may change what they read, such as those of a name; None: all. is_done: called after every 10
    steps; learning ends once it returns True.
    """
    values = model.pool.values
    at = y >= 0 if at is None else at
    chosen = top_slots(tf_idf(model, x, at, idf), slots).to(values.device)
    optimizer = PoolOptimizer([values], lr, kind, stochastic_rounding=values.dtype == torch.bfloat16)
    x, y, at = (part.to(values.device) for part in (x, y, at))
    with eval_mode(model), torch.enable_grad():
        bar = tqdm(range(1, steps + 1), "learning", leave=False, disable=None)
        for step, part in zip(bar, shuffled(len(x), batch_size), strict=False):
            optimizer.zero_grad()  # also of what was left from before
            logits = all_logits(model, x[part])  # (B, T, vocab_size)
            loss = F.cross_entropy(logits.flatten(0, 1), y[part].flatten(), ignore_index=-1)
            loss.backward(inputs=[values])
            keep_reads(values.grad, chosen, at[part])
            optimizer.step()
            if step % 10 == 0 and is_done():
                break
    optimizer.zero_grad()
    return chosen.cpu()


# --- the commands -------------------------------------------------------------------------------------------

OTHERS = 200  # questions about others that are asked before and after


@dataclass
class FindConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used
    device: Literal["auto", "cpu", "cuda"] = "auto"  # auto: cuda where there is one
    question: str = ""  # the question whose answer is taken apart


@dataclass
class ChangeConfig(FindConfig):
    save_to: str = ""  # new folder for the checkpoint; none: the run's folder with -erase or -teach
    dry_run: bool = False  # only report, and write no checkpoint


@dataclass
class EraseConfig(ChangeConfig):
    ask: tuple[str, ...] = ()  # erase the answers to all questions of the corpus that contain these names
    question: str = ""  # erase only the answer to this question; --ask says whom it is about, if need be
    slots: int = 0  # slots to empty, for each name; 0: as few of 4, 8, 16 ... 256 as are enough

    def __post_init__(self):
        at_least(0, self, "slots")


@dataclass
class TeachConfig(ChangeConfig):
    statement: tuple[str, ...] = ()  # sentences to learn
    file: str = ""  # a file of sentences to learn, one per line
    question: tuple[str, ...] = ()  # questions to ask before and after
    slots: int = 128  # slots that may change
    steps: int = 60  # training steps, each with all sentences
    lr: float = 30.0  # learning rate; high, because each slot has a small part in what a token reads

    def __post_init__(self):
        at_least(1, self, "slots", "steps")
        at_least(0, self, "lr")


def reply(model: GPT, encoding, question: dict) -> str:
    """The model's answer, as long as the context allows."""
    room = model.config.block_size - len(encoding.encode_ordinary(question["prompt"]))
    return decode_answer(encoding, answer(model, encoding, [question], max(1, room - 1))[0])


def read_question(model: GPT, encoding, text: str, data: Dataset) -> dict:
    """The question of the corpus, or the user's own question with the model's answer as the right one."""
    question = corpus.find_question(text, data.questions)
    if not accepted_answers(question):
        for name in corpus.unknown_names(question["prompt"], data):
            print_text(f"the training text does not have the name {name}")
        question["answers"] = [reply(model, encoding, question).removesuffix("…")]
    corpus.check_length([question], encoding, model.config.block_size)
    return question


def first_few(slots) -> str:
    return "  ".join(f"{slot:,}" for slot in slots[:6].tolist()) + " ..." * (len(slots) > 6)


def print_found(model: GPT, encoding, question: dict) -> None:
    own = reply(model, encoding, question).removesuffix("…")
    if not any(accepted_answers(question)):
        fail("the model's answer is empty, so no slots carry it: ask something that the model knows")
    right, found = is_right(question, own), find(model, *question_batch(model, encoding, question))
    mark = "" if right else f"   [wrong: {accepted_answers(question)[0]}]"
    print_text(f"{question['prompt']} {own or '(nothing)'}{mark}")
    print(f"How much the log-probability of the {'' if right else 'right '}answer falls without")
    layers = "".join(f"   layer {layer}" for layer in model.config.mem_layers)
    print(f"    all slots that one token reads in{layers}")
    for token, losses in zip(found["tokens"], found["places"].tolist(), strict=True):
        print(f"    {decode(encoding, [token])!r:33}" + "".join(f"{loss:10.2f}" for loss in losses))
    print("    the slots with most effect, of all tokens and layers   probability left   slots")
    for n, loss in found["top"].items():
        slots = found["slots"]
        print(f"    {n:5,} of {len(slots):5,} {loss:28.2f}{math.exp(-loss):>28.0%}   {first_few(slots[:n])}")


def report(model: GPT, encoding, data: Dataset, shown: list[dict], groups: dict, erased: list[dict],
           measure_loss, change) -> dict:
    """
    Calls change(), and prints what is different: the validation loss, the answers to `shown`, the right
    answers about others, those that were erased before, and `groups`, {label: questions}. Returns pairs of
    numbers, before and after: {"loss": losses, label: right answers}.
    """
    prompts = {question["prompt"] for part in (*groups.values(), erased) for question in part}
    others = [question for question in data.questions if question["prompt"] not in prompts]
    names = ", ".join(dict.fromkeys(question["name"] for question in erased))
    groups = {"answers about others": random.Random(0).sample(others, min(OTHERS, len(others))),
              f"answers erased before, about {names}": erased} | groups

    def measure():
        right = {label: len(answered(model, encoding, part)) for label, part in groups.items() if part}
        return [reply(model, encoding, question) for question in shown], right, measure_loss()

    old_texts, right, old_loss = measure()
    slots = change()
    new_texts, new_right, new_loss = measure()
    if not math.isfinite(new_loss):
        fail("the model has broken, and is not saved: choose a lower --lr")
    print(f"changed {len(slots):,} of {model.pool.num_values:,} slots: {first_few(slots)}")
    print(f"validation loss: {old_loss:.3f} before, {new_loss:.3f} after")
    for question, before, after in zip(shown, old_texts, new_texts, strict=True):
        print_text(f"{question['prompt']} {before} -> {after}")
    for label, before in right.items():
        print_text(f"{label}: {before} of {len(groups[label])} right before, {new_right[label]} after")
    return {"loss": (old_loss, new_loss)} | {label: (right[label], new_right[label]) for label in right}


def erase_answers(model: GPT, encoding, data: Dataset, measure_loss, erased: list[dict],
                  names: tuple[str, ...], text: str, count: int) -> dict:
    """
    text: a question about the first name; if it is empty, all questions about these names. erased: the
    questions whose answers were erased before, each with its name. What comes back is erased again.
    """
    hint = "" if names else ". Whom is it about? Add --ask=NAME"
    if len(names) > 1 and any(corpus.name_pattern(" ".join(names)).search(part["prompt"])
                              for part in data.questions):
        fail(f"this is one name, so it needs quotes: --ask={shlex.quote(' '.join(names))}")
    if text:
        question = read_question(model, encoding, text, data)
        if len(names) > 1:
            fail(f"--question={text} goes with one --ask, which says whom it is about")
        if not names:
            known = corpus.known_names(question["prompt"], data.questions)
            name = corpus.find_name(question, data.questions) or (known[0] if len(known) == 1 else None)
            names = [name or fail(f"--question={text}: whom is it about? Add --ask=NAME")]
    asked, same, lines = [], [], functools.cache(lambda name: lines_with(name, data))
    for name in names or [""]:
        questions = [question] if text else corpus.questions_about(name, data.questions)
        if text and not corpus.name_pattern(name).search(question["prompt"]):
            fail(f"--question={text} does not have the name {name}, which --ask says it is about")
        questions = corpus.about_whole_name(name, questions)
        people = {corpus.find_name(part, data.questions) for part in (questions[0], questions[-1])}
        if len(people) > 1 and None not in people and name.lower() not in map(str.lower, people):
            fail(f"--ask={name} is in {len(questions)} questions, about {', '.join(sorted(people))} and "
                 "others: ask for a whole name")
        if not lines(name):
            fail(f"the training text does not contain the name {name}{hint}")
        print_text(f"erasing what is known about {name} (questions: {len(questions)})")
        asked += [{"name": name, "prompt": question["prompt"], "answers": accepted_answers(question)}
                  for question in questions]
        same += [question for question in data.questions if question not in questions
                 and corpus.name_pattern(name).search(question["prompt"])]
    erased[:] = [old for old in erased if old["prompt"] not in {question["prompt"] for question in asked}]
    groups = {"other answers with this name": same, "these answers": asked}
    batches = [question_batch(model, encoding, question) for question in asked]

    def change():
        idf, slots, now = inverse_document_frequency(model, data.train), {}, asked
        for _ in range(4):  # to erase one answer can bring back another
            parts = itertools.groupby(now, lambda question: question["name"])
            by_name = [(name, list(part)) for name, part in parts]
            for name, part in tqdm(by_name, "erasing", leave=False, disable=None):
                rest = idf * model.pool.values.any(1).cpu()  # without empty slots
                about = about_batches(model, encoding, part, lines(name))
                chosen = choose_slots(model, *about, rest, count)
                slots |= dict.fromkeys(erase(model, chosen).tolist())
                right = answered(model, encoding, part)
                erased.extend(question for question in part if question not in right + erased)
            if not (now := answered(model, encoding, erased)):
                break
            names = ", ".join(dict.fromkeys(part["name"] for part in now))
            print_text(f"came back, and is erased again: {names}")
        return torch.tensor(list(slots))

    result = report(model, encoding, data, asked, groups, erased.copy(), measure_loss, change)
    before, after = result["these answers"]
    if 0 < before <= after:
        fail("nothing was forgotten, so nothing is saved: as many answers are right as before, because other "
             "parts of the model know them, too; the end of docs/editing.md has more")
    if left := sum(not is_gone(model, *batch) for batch in batches):
        print(f"in {left} of {len(asked)} the right word is still more than a tenth as likely as the "
              "likeliest")
    return result


def teach_statements(model: GPT, encoding, data: Dataset, measure_loss, erased: list[dict],
                     statements: list[str], asked: tuple[str, ...], **options) -> dict:
    """asked: the texts of questions. erased: as for erase_answers. options: those of `teach`."""
    statements = [corpus.restore_names(text.strip(), data.questions) for text in statements if text.strip()]
    if not statements:
        fail("there is no statement to learn: write --statement 'The job of ... is that of a ...'")
    questions = [corpus.find_question(text, data.questions) for text in asked]
    ends = [dict(prompt=text.rpartition(" ")[0], answer=text.rpartition(" ")[2]) for text in statements]
    corpus.check_length(questions + ends, encoding, model.config.block_size)
    corpus.warn_of_new_words(statements, data)
    known = {question["prompt"]: question
             for name in corpus.known_names("\n".join(statements), data.questions)
             for question in corpus.questions_about(name, data.questions)}
    last = "last words of the statements"
    groups = {"old answers with the same names": list(known.values()),
              last: [end for end in ends if end["prompt"]]}
    idf = inverse_document_frequency(model, data.train)
    result = report(model, encoding, data, questions, groups, erased, measure_loss,
                    lambda: teach(model, *text_batch(encoding, statements), idf, **options))
    before, after = result.get(last, (0, 1))
    if after <= before < len(groups[last]):
        fail("nothing was learnt, so nothing is saved: try more --steps, a higher --lr or more --slots")
    return result


def save_values(model: GPT, checkpoint: Checkpoint, save_to: Path, loss: float, erased: list) -> None:
    """Copies a checkpoint to another folder, with the values of this model's pool, and what was erased."""
    parts = {name: checkpoint.load_part(name) for name in ("model.pt", "optimizer.pt")}
    state = checkpoint.pool_columns(columns_group(model.pool))
    parts["pool_0of1.pt"] = state | {"values": model.pool.values.detach()}
    options = checkpoint.options | {"out_dir": str(save_to)}
    meta = checkpoint.meta | {"config": options, "val_loss": loss, "erased": erased}
    save_checkpoint(save_to, checkpoint.step, parts, meta, keep=1)


@command
def main(argv: list[str] | None = None) -> None:
    kinds = {"find": FindConfig, "erase": EraseConfig, "teach": TeachConfig}
    word, rest = first_word(argv, kinds, __doc__, "what to do")
    config = build(kinds[word], parse(kinds[word], rest, None, __doc__, word)[1])
    run = newest_run(Path(config.out_dir).expanduser())
    if word != "find":
        save_to = Path(config.save_to or f"{run.parent if is_checkpoint(run) else run}-{word}").expanduser()
        if not config.dry_run and save_to.exists():
            fail(f"{save_to} must be a new folder: choose another with --save_to")
    checkpoint = find_trained(run)
    model, encoding, trained = load(checkpoint, config.device)
    if model.pool is None:
        fail(f"the model in {run} has no memory layers")
    if word == "erase" and config.slots > model.pool.num_values:
        fail(f"--slots={config.slots} is too many: this model has {model.pool.num_values:,}")
    data = corpus.load_dataset(trained["dataset"])
    checkpoint.check_corpus(data)
    if word == "find":
        return print_found(model, encoding, read_question(model, encoding, config.question, data))

    options = (trained[name] for name in ("eval_batches", "batch_size"))
    measure_loss = functools.partial(validation_loss, model, data.val, *options)
    given = model, encoding, data, measure_loss, (erased := checkpoint.meta.get("erased", []))
    if word == "erase":
        result = erase_answers(*given, config.ask, config.question, config.slots)
    else:
        lines = read_lines(Path(config.file).expanduser()) if config.file else []
        result = teach_statements(*given, [*config.statement, *lines], config.question,
                                slots=config.slots, steps=config.steps, lr=config.lr)
    old_loss, loss = result["loss"]
    if loss > old_loss + 0.1:
        print(f"this harmed the rest of the model: its validation loss rose by {loss - old_loss:.2f}. Choose "
              f"{'a lower --lr' if word == 'teach' else 'fewer --slots'}")
    if config.dry_run:
        print("nothing is saved: this was a --dry_run")
    else:
        save_values(model, checkpoint, save_to, loss, erased)
        print_text(f"saved. Ask it: python sample.py --out_dir={shlex.quote(str(save_to))} --question=TEXT")


if __name__ == "__main__":
    main()
