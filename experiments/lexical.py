"""
How much of what a memory layer reads depends on more than a word or two? Replaces what all memory layers of a
trained model read, and measures the loss on validation text. Nothing is trained.

    python -m experiments.lexical --out_dir=out/NAME

    as trained       nothing is replaced
    zero             the layers read nothing
    mean             the mean of everything that is read in the training text
    this token       the mean of what this token reads in the training text
    two tokens       the mean of what this token reads there after the same previous token
    one other place  what this token reads at one place of the training text
    shuffled rows    the rows of the pool have changed places

For any model, it first measures the loss of tokens that the window has already, which a model can copy, apart
from that of new tokens. If the corpus is "facts" or one like it, then it also measures
- how sure the model is of its answers about people, and about invented people, who have the first name of one
  person and the last name of another;
- which share of the questions in the training text stand behind a line that tells the same fact, in one
  window. There, the model need not know the fact.
"""

import random
import re
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from runtime.cli import build, command, parse

import torch
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from data import corpus
from data.corpus import Dataset, decode, draw_batch
from edit import log_probability
from evaluate import answer, validation_loss
from experiments import results
from model import eval_mode, shift
from runtime.checkpoint import find_trained, load, newest_run

TRAIN_BATCHES, VAL_BATCHES = 200, 50  # of training text, whose reads are averaged, and of validation text


@dataclass
class LexicalConfig:
    out_dir: str = "out"  # the folder of a run, or of many runs; then the newest run is used


# --- copied and new tokens ----------------------------------------------------------------------------------

def can_copy(x, y):
    """x, y (B, T) -> (B, T): is the token y[b, t] one of x[b, 0] ... x[b, t]?"""
    return (y.unsqueeze(2) == x.unsqueeze(1)).tril().any(2)


@torch.no_grad()
def print_parts_of_loss(model, data: Dataset, batch_size: int) -> None:
    losses, copied = [], []
    with eval_mode(model):
        for i in range(VAL_BATCHES):
            x, y = (part.to(model.wte.weight.device)
                    for part in draw_batch(data.val, batch_size, model.config.block_size, 0, 1, i))
            losses.append(F.cross_entropy(model(x, y)[0].flatten(0, 1), y.flatten(), reduction="none"))
            copied.append(can_copy(x, y).flatten())
    losses, copied = torch.cat(losses), torch.cat(copied)
    print(f"validation loss: {losses.mean():.3f}; of tokens that stand in the window before "
          f"({copied.float().mean():.0%}): {losses[copied].mean():.3f}; of new tokens: "
          f"{losses[~copied].mean():.3f}")


# --- other reads --------------------------------------------------------------------------------------------

@contextmanager
def changed_reads(model, change):
    """In a `with` block, a layer that has read y (N, V) for x (B, T) gets change(layer, x, y)."""
    x = layer = None

    def start(_, args):
        nonlocal x, layer
        x, layer = args[0], -1

    def replace(pool, args, y):
        nonlocal layer
        layer += 1
        return change(layer, x, y)

    with model.register_forward_pre_hook(start), model.pool.register_forward_hook(replace):
        yield


def two_tokens(x):
    previous = shift(x, torch.full_like(x[:, :1], -1))  # -1: the first token has none
    return ((previous + 1) * 2**32 + x).flatten()


# the reads of tokens with the same key are averaged. If the training text lacks two tokens, the mean of this
# token counts; if it lacks this token, that of all
KEYS = {"mean": lambda x: 0 * x.flatten(), "this token": torch.flatten, "two tokens": two_tokens}


class Means:
    """For tokens with the same key: the mean of what they read in a layer, and what the last one reads."""

    def __init__(self, keys: torch.Tensor, reads: torch.Tensor):
        self.keys, group = keys.unique(return_inverse=True)
        count = group.bincount().unsqueeze(1)
        self.means = reads.new_zeros(len(self.keys), reads.size(1)).index_add_(0, group, reads) / count
        places = torch.arange(len(keys), device=keys.device)
        self.last = reads[torch.zeros_like(self.keys).scatter_reduce_(0, group, places, "amax")]

    def look_up(self, keys, otherwise, table: str = "means"):
        place = torch.searchsorted(self.keys, keys).clamp(max=len(self.keys) - 1)
        return torch.where((self.keys[place] == keys).unsqueeze(1), getattr(self, table)[place], otherwise)


@torch.no_grad()
def collect(model, data, batch_size: int) -> dict:
    """{name in KEYS: [Means of each layer]}, of what is read in the training text."""
    keys, reads = {key: [] for key in KEYS}, [[] for _ in model.config.mem_layers]

    def keep(layer, x, y):
        reads[layer].append(y)
        if layer == 0:
            for name, parts in keys.items():
                parts.append(KEYS[name](x))

    with eval_mode(model), changed_reads(model, keep):
        for i in range(TRAIN_BATCHES):
            x, _ = draw_batch(data.train, batch_size, model.config.block_size, 0, 2, i)
            model(x.to(model.wte.weight.device))
    reads = [torch.cat(parts) for parts in reads]
    return {name: [Means(torch.cat(parts), read) for read in reads] for name, parts in keys.items()}


def looked_up(means: dict, name: str, table: str = "means"):
    """For changed_reads: what tokens with the same key read."""
    def change(layer, x, y):
        for each, key in KEYS.items():
            y = means[each][layer].look_up(key(x), y, table)
            if each == name:
                return y
    return change


def print_losses(model, data: Dataset, batch_size: int) -> None:
    """The table of losses, with other reads. Afterwards, the rows of the model's pool have changed places."""
    means, losses = collect(model, data, batch_size), {}

    def measure(name, change):
        with changed_reads(model, change):
            losses[name] = validation_loss(model, data.val, VAL_BATCHES, batch_size)

    measure("as trained", lambda layer, x, y: y)
    measure("zero", lambda layer, x, y: torch.zeros_like(y))
    for name in KEYS:
        measure(name, looked_up(means, name))
    measure("one other place", looked_up(means, "this token", "last"))
    torch.manual_seed(0)
    model.pool.values.data = model.pool.values.data[torch.randperm(model.pool.num_values)]
    measure("shuffled rows", lambda layer, x, y: y)
    results.print_markdown([{"what is read": name, "validation loss": f"{loss:.3f}",
                             "rise": f"{loss - losses['as trained']:.3f}"} for name, loss in losses.items()])


# --- invented people ----------------------------------------------------------------------------------------

NAME = re.compile("[A-Z][a-z]+ [A-Z][a-z]+")  # of people in the corpus "facts"


def invent(prompts: list[str], count: int) -> list[tuple[str, str]]:
    """`count` of the prompts about people, each with the same prompt about nobody, with another last name."""
    rng, names = random.Random(0), {NAME.search(prompt)[0] for prompt in prompts}
    last_names = sorted({name.split()[1] for name in names})
    pairs = []
    for prompt in rng.sample(prompts, min(count, len(prompts))):
        name = NAME.search(prompt)[0]
        if others := [new for last in last_names if (new := f"{name.split()[0]} {last}") not in names]:
            pairs.append((prompt, prompt.replace(name, rng.choice(others))))
    return pairs


def confidence(model, encoding, prompts: list[str]) -> torch.Tensor:
    """(N,): the probability of the model's own answer to each prompt, up to the end of its line."""
    answers = answer(model, encoding, [{"prompt": prompt} for prompt in prompts], max_new_tokens=8)
    prompts = [encoding.encode_ordinary(prompt) for prompt in prompts]
    x = [torch.tensor(prompt + own[:-1]) for prompt, own in zip(prompts, answers, strict=True)]
    y = [torch.tensor([-1] * (len(prompt) - 1) + own) for prompt, own in zip(prompts, answers, strict=True)]
    return log_probability(model, pad_sequence(x, True), pad_sequence(y, True, -1)).exp()


def told_before(data: Dataset, block_size: int, batches: int, batch_size: int) -> float:
    """Of the questions in windows of the training text, the share behind a line that tells the same fact."""
    told = []
    for i in range(batches):
        for window in draw_batch(data.train, batch_size, block_size, 0, 2, i)[0].tolist():
            *lines, _ = decode(data.encoding, window).split("\n")  # the last line is incomplete
            for row, line in enumerate(lines):
                question, _, value = line.partition(" Answer: ")
                if value and (name := NAME.search(question)):
                    told.append(any(name[0] in before and before.rstrip(".").endswith(f" {value}")
                                    for before in lines[:row]))
    return sum(told) / max(1, len(told))


def print_confidence(model, data: Dataset, batch_size: int) -> None:
    pairs = invent([question["prompt"] for question in data.questions], 400)
    if not pairs:
        return
    real, invented = (confidence(model, data.encoding, prompts) for prompts in zip(*pairs, strict=True))
    surer = (real.unsqueeze(1) > invented).float().mean()
    print(f"probability of the model's own answer, mean over {len(real)} questions: {real.mean():.2f} about "
          f"people, {invented.mean():.2f} about invented people\nof pairs of both, the model is surer about "
          f"the real person in {surer:.1%}")
    share = told_before(data, model.config.block_size, TRAIN_BATCHES, batch_size)
    print(f"questions in the training text behind a line with the same fact, in one window: {share:.1%}")


@command
def main(argv: list[str] | None = None) -> None:
    config = build(LexicalConfig, parse(LexicalConfig, argv, description=__doc__)[1])
    checkpoint = find_trained(newest_run(Path(config.out_dir).expanduser()))
    model, _, trained = load(checkpoint, "auto")
    data, batch_size = corpus.load_dataset(trained["dataset"]), trained["batch_size"]
    checkpoint.check_corpus(data)
    print_parts_of_loss(model, data, batch_size)
    if data.questions and all(NAME.search(question["prompt"]) for question in data.questions):
        print_confidence(model, data, batch_size)
    if model.pool is not None:
        print_losses(model, data, batch_size)


if __name__ == "__main__":
    main()
