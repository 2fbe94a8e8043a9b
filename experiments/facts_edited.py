"""
Erasing and teaching facts, measured: `python -m experiments.compare erase` and `teach`.

erase: empties the slots of 40 people, one at a time, in a trained model. Measured for growing numbers of
slots: the person's answers in the words of the corpus's questions and in the other words, and other people's
answers. "one fact": only the slots of one answer; then the person's other answers count apart.

teach: tells a trained model three statements of each of four facts about 100 new people, one person after the
other, a few steps each. At the end the model answers questions about all of them that it has never seen, and
old questions. The methods:

    sparse    sparse memory finetuning: teach of edit.py, for each person
    all read  the same for all slots that the statements read
    lora      AdamW on low-rank changes of all Linear layers (Hu et al. 2021, arXiv 2106.09685). The rank is
              the smallest with which as many numbers may change as in the rows of the sparse method
    full      AdamW and PoolOptimizer on everything, as in training
    lora, shuffled; full, shuffled
              the same with as many steps of as many statements, drawn from those about all people. This is
              easier: no person is long past

Seed 1 has runs with all learning rates. The other seeds have runs with the one that was best then.
"""

import contextlib
import random
import subprocess
import time
from collections import defaultdict
from dataclasses import dataclass
from statistics import mean

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import edit
from data.corpus import QUESTION, decode_answer, is_right, load_dataset
from data.facts import ATTRIBUTES
from edit import NAME
from evaluate import answer, exposure_bin, validation_loss
from experiments.models import EDITED, train_command
from experiments.results import (
    ROOT,
    append_row,
    erase_shares,
    mean_and_deviation,
    print_markdown,
    read_json_lines,
    rows_path,
)
from runtime.checkpoint import load
from runtime.cli import at_least, build, parse
from train import TrainConfig

SIZES = (4, 16, 64, 128, 256)  # numbers of slots to empty
LRS = {"sparse": (30.0, 100.0, 300.0, 1000.0), "all read": (10.0, 30.0, 100.0),
       "full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (1e-4, 3e-4, 1e-3, 3e-3),
       "full, shuffled": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "lora, shuffled": (3e-4, 1e-3, 3e-3, 1e-2)}
ASKED = 400  # old questions, drawn at random
STEPS, SLOTS = 20, 128  # of teach, for each person


@dataclass
class EditedConfig:
    models: tuple[str, ...] = tuple(EDITED)  # how slots are chosen
    people: int = 0  # people to erase, or new people to teach; 0: 40 to erase, 100 to teach
    seeds: int = 3  # trained models of each kind
    results: str = "experiments/results"  # folder for the lines of finished runs, relative to the repository
    out: str = "out/compare/editing"  # folder for the trained models, relative to the repository

    def __post_init__(self):
        at_least(1, self, "seeds")
        at_least(0, self, "people")
        self.models = tuple(name for names in self.models for name in names.split(","))
        if unknown := set(self.models) - EDITED.keys():
            raise ValueError(f"models={','.join(unknown)} must be one of {', '.join(EDITED)}")


def trained_model(base: str, seed: int, out: str):
    """Trains the model, unless it is there, and loads it: model, encoding, its TrainConfig, corpus."""
    folder = ROOT / out / f"{base}_{seed}"
    config = TrainConfig(**EDITED[base], seed=seed, out_dir=str(folder))
    if not (folder / f"step_{config.max_steps:06d}").exists():
        subprocess.run(train_command(config), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    model, encoding, _ = load(folder)
    return model, encoding, config, load_dataset(config.dataset)


def share_right(model, encoding, questions: list[dict]) -> float:
    answers = answer(model, encoding, questions)
    return sum(is_right(question, decode_answer(encoding, tokens))
               for question, tokens in zip(questions, answers, strict=True)) / len(questions)


def name_in(question: dict) -> str:
    return NAME.search(question["prompt"]).group()


def in_other_words(question: dict) -> list[dict]:
    """The same question in the other words that the corpus has for it."""
    prompts = [[QUESTION.format(form.format(name_in(question))) for form in forms]
               for _, _, forms in ATTRIBUTES.values()]
    return [question | {"prompt": prompt} for group in prompts if question["prompt"] in group
            for prompt in group if prompt != question["prompt"]]


# --- erase --------------------------------------------------------------------------------------------------

def people_in(questions: list[dict], count: int, rng) -> list[list[dict]]:
    """The questions about each of `count` people, as many of each exposure bin up to "128": 128 or more."""
    people, bins = defaultdict(list), defaultdict(list)
    for question in questions:
        people[name_in(question)].append(question)
    for about in people.values():
        bins[min(int(exposure_bin(about[0])), 128)].append(about)
    return [about for group in bins.values()
            for about in rng.sample(group, min(-(-count // len(bins)), len(group)))]


def run_erase(run: dict, model, encoding, config: TrainConfig, data) -> dict:
    rng, values, shares = random.Random(run["seed"]), model.pool.values, defaultdict(list)
    idf = edit.inverse_document_frequency(model, data.train)
    for about in people_in(data.questions, run["people"], rng):
        told = min(int(exposure_bin(about[0])), 128)
        others = rng.sample([question for question in data.questions if question not in about], 50)
        lines = edit.lines_with(name_in(about[0]), data)
        lines = rng.sample(lines, min(len(lines), 200))
        for mode, erased in (("person", about), ("one fact", about[:1])):
            rest = [question for question in about if question not in erased]
            groups = {"these": erased, "other words": [q for one in erased for q in in_other_words(one)],
                      "person's others": [q for one in rest for q in (one, *in_other_words(one))],
                      "others": others}
            slots = edit.choose_slots(model, encoding, erased, lines, idf, count=max(SIZES))
            for size in (0, *SIZES):
                kept = values[slots[:size]].clone()
                edit.erase(model, slots[:size])
                shares[mode, size, told].append(
                    {label: share_right(model, encoding, group) for label, group in groups.items() if group})
                with torch.no_grad():
                    values[slots[:size]] = kept
    return {"points": [dict(mode=mode, slots=size, told=told, people=len(group))
                       | {label: mean(share[label] for share in group) for label in group[0]}
                       for (mode, size, told), group in shares.items()]}


# --- teach --------------------------------------------------------------------------------------------------

def new_people(questions: list[dict], count: int, rng) -> list[tuple[list[str], list[dict]]]:
    """(statements, questions) about people with known first and last names, in new pairs."""
    names = {tuple(name_in(question).split()) for question in questions}
    first, last = (sorted(set(part)) for part in zip(*names, strict=True))
    people = []
    while len(people) < count:
        name = rng.choice(first), rng.choice(last)
        if name not in names:
            names.add(name)
            told, asked = [], []
            for values, statements, forms in ATTRIBUTES.values():
                value = rng.choice(values)
                told += [form.format(" ".join(name), value) for form in statements]
                asked += [{"prompt": QUESTION.format(form.format(" ".join(name))), "answer": value}
                          for form in forms]
            people.append((told, asked))
    return people


class LowRank(nn.Module):
    """weight + up @ down, which starts as weight."""

    def __init__(self, weight, rank: int):
        super().__init__()
        self.up = nn.Parameter(torch.zeros(weight.size(0), rank))
        self.down = nn.Parameter(torch.randn(rank, weight.size(1)) * weight.size(1)**-0.5)

    def forward(self, weight):
        return weight + self.up @ self.down


def add_low_rank(model, numbers: int) -> list[nn.Parameter]:
    """Gives all Linear layers low-rank changes of at least so many numbers, and returns their parameters."""
    layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
    rank = -(-numbers // sum(sum(layer.weight.shape) for layer in layers))
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank))
    return [p for name, p in model.named_parameters() if name.endswith((".up", ".down"))]


def in_turn(told: list[list[str]]):
    """The statements of each step: STEPS times those about the first person, then the second, and so on."""
    return [statements for statements in told for _ in range(STEPS)]


def shuffled(told: list[list[str]], rng):
    """STEPS passes over the statements about all people, in an order of chance, as many per step."""
    size, steps = len(told[0]), []
    for _ in range(STEPS):
        texts = rng.sample(all_texts := sum(told, []), len(all_texts))
        steps += [texts[i:i + size] for i in range(0, len(texts), size)]
    return steps


def learn(model, encoding, told: list[list[str]], method: str, lr: float, idf, config, rng) -> None:
    """Teaches the statements about each person. config: the TrainConfig of the model."""
    values = model.pool.values
    if method in ("sparse", "all read"):
        for statements in told:
            slots = SLOTS if method == "sparse" else len(values)
            edit.teach(model, encoding, statements, idf, slots, STEPS, lr)
        return
    if method.startswith("lora"):
        optimizers = [torch.optim.AdamW(add_low_rank(model, SLOTS * values.size(1)), lr=lr, weight_decay=0)]
    else:
        optimizers = model.optimizers(lr, lr * config.value_lr / config.lr, weight_decay=0, betas=(0.9, 0.99))
    dense = [p for group in optimizers[0].param_groups for p in group["params"]]
    for statements in shuffled(told, rng) if method.endswith("shuffled") else in_turn(told):
        model(*edit.text_batch(encoding, statements))[1].backward()
        nn.utils.clip_grad_norm_(dense, config.grad_clip)
        for optimizer in optimizers:
            optimizer.step()
        model.zero_grad()


def run_teach(run: dict, model, encoding, config: TrainConfig, data) -> dict:
    torch.manual_seed(run["seed"])
    rng = random.Random(run["seed"])
    people = new_people(data.questions, run["people"], rng)
    groups = {"new": [question for _, asked in people for question in asked],
              "old": rng.sample(data.questions, min(ASKED, len(data.questions)))}

    def measured():
        shares = {label: share_right(model, encoding, group) for label, group in groups.items()}
        loss = validation_loss(model, data.val, config.seed, config.eval_batches, config.batch_size)
        return shares | {"loss": loss}

    before = measured()
    idf = edit.inverse_document_frequency(model, data.train)
    learn(model, encoding, [told for told, _ in people], run["method"], run["lr"], idf, config, rng)
    return {"before": before, "after": measured()}


# --- all runs -----------------------------------------------------------------------------------------------

def runs_of(word: str, config: EditedConfig) -> list[dict]:
    """What identifies each run, the most informative first. lr None: the best learning rate of seed 1."""
    people, runs = config.people or {"erase": 40, "teach": 100}[word], []
    for seed in range(1, config.seeds + 1):
        for base in config.models:
            run = dict(model=base, seed=seed, people=people)
            if word == "erase":
                runs.append(run | dict(sizes=list(SIZES)))
            else:
                runs += [run | dict(method=method, lr=lr, steps=STEPS, slots=SLOTS)
                         for method in LRS for lr in (LRS[method] if seed == 1 else [None])]
    return runs


def run_all(word: str, argv: list[str]) -> None:
    """Does all runs of erase or teach that have no line yet, and prints the table."""
    config = build(EditedConfig, parse(EditedConfig, argv, description=__doc__)[1])
    path, runs = rows_path(word, config.results), runs_of(word, config)
    for number, run in enumerate(runs, 1):
        rows = read_json_lines(path)
        if run.get("lr", 0) is None:
            run["lr"] = best_lr([row for row in rows if row["run"] | dict(lr=None) == run | dict(seed=1)])
        if any(row["run"] == run for row in rows):
            continue
        print(f"{time.strftime('%H:%M')}  run {number} of {len(runs)}: "
              + ", ".join(f"{name} {value}" for name, value in run.items()), flush=True)
        with contextlib.redirect_stdout(None):
            trained = trained_model(run["model"], run["seed"], config.out)
            row = (run_erase if word == "erase" else run_teach)(run, *trained)
        append_row(path, {"run": run} | row)
    print_table(word, config.results)


# --- tables -------------------------------------------------------------------------------------------------

def forgotten(row: dict) -> float:
    """How much the recall of old facts has fallen."""
    return row["before"]["old"] - row["after"]["old"]


def best_lr(rows: list[dict]) -> float:
    """
    The learning rate that forgets least, of those that teach 0.9; if there is none, that teaches most. Only
    seed 1 decides.
    """
    rows = [row for row in rows if row["run"]["seed"] == 1]
    enough = [row for row in rows if row["after"]["new"] >= 0.9]
    best = min(enough, key=forgotten) if enough else max(rows, key=lambda row: row["after"]["new"])
    return best["run"]["lr"]


def erase_lines(base: str, rows: list[dict]) -> list[dict]:
    """The table of one kind of model: recall without 0, 4, 16 ... slots."""
    lines = []
    for mode in ("person", "one fact"):
        line = {"slots chosen by": base, "erased": mode, "seeds": str(len(rows))}
        for label in ("these", "other words", "person's others", "others"):
            has_label = (mode, label) != ("person", "person's others")
            shares = zip(*erase_shares(rows, mode, label), strict=True) if has_label else ()
            line[label] = " / ".join(f"{mean(share):.2f}" for share in shares)
        lines.append(line)
    return lines


def teach_lines(base: str, rows: list[dict]) -> list[dict]:
    """The table of one kind of model: each method at its best learning rate."""
    lines = []
    for method in LRS:
        runs = [row for row in rows if row["run"]["method"] == method]
        if runs:
            runs = [row for row in runs if row["run"]["lr"] == best_lr(runs)]
            before, after = (mean(row[when]["loss"] for row in runs) for when in ("before", "after"))
            lines.append({"slots chosen by": base, "method": method, "seeds": str(len(runs)),
                          "learning rate": f"{runs[0]['run']['lr']:g}",
                          "recall of new facts": mean_and_deviation(
                              [row["after"]["new"] for row in runs], ".2f"),
                          "fall of the recall of old facts": mean_and_deviation(list(map(forgotten, runs))),
                          "validation loss": f"{before:.3f} -> {after:.3f}"})
    return lines


def print_table(word: str, results: str) -> None:
    rows = read_json_lines(rows_path(word, results))
    if not rows:
        return print(f"{word}: no finished runs. Start: python -m experiments.compare {word}")
    lines_of = erase_lines if word == "erase" else teach_lines
    heading = ("recall without 0, " + ", ".join(map(str, rows[0]["run"]["sizes"])) + " slots"
               if word == "erase" else "each method at the best learning rate of those tried")
    print(f"\n{word}, {heading}:\n")
    of_bases = {base: [row for row in rows if row["run"]["model"] == base] for base in EDITED}
    print_markdown([line for base, group in of_bases.items() if group for line in lines_of(base, group)])
