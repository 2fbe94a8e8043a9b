"""
Erasing and teaching facts, measured. Run as `python -m experiments.compare erase` or `teach`: see there.

erase: empties the slots of 40 people, one at a time, in a trained model. Measured for growing numbers of
slots: the person's answers in the words of the corpus's questions and in the other words, and other people's
answers. "one fact": only the slots of one answer; then the person's other answers count apart.

teach: tells a trained model three statements of each of four facts about 100 new people, one person after the
other, a few steps each. At the end the model answers questions about all of them that it has never seen, and
old questions. The methods:

    sparse    sparse memory finetuning: editing.teach, for each person
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
import json
import random
import subprocess
import sys
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from statistics import mean

import torch
import torch.nn as nn
from torch.nn.utils import parametrize

import edit as editing
from data.corpus import decode_answer, load_dataset
from data.facts import ATTRIBUTES
from data.questions import QUESTION, is_right
from edit import NAME
from evaluate import answer, exposure_bin, validation_loss
from experiments.compare import ROOT, append_row, mean_and_deviation, print_markdown
from runtime.checkpoint import checkpoints
from runtime.cli import at_least, build, parse
from train import load

BASES = {"tokens": dict(mem_query="tokens"), "hash": dict(mem_kind="hash"),  # the preset of train.py, with
         "shifted": dict(mem_query="shifted"), "state": dict(mem_query="state")}  # one option changed
SIZES = (4, 16, 64, 128, 256)  # numbers of slots to empty
LRS = {"sparse": (30.0, 100.0, 300.0, 1000.0), "all read": (10.0, 30.0, 100.0),
       "full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (1e-4, 3e-4, 1e-3, 3e-3),
       "full, shuffled": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "lora, shuffled": (3e-4, 1e-3, 3e-3, 1e-2)}
ASKED = 400  # old questions, drawn at random
STEPS, SLOTS = 20, 128  # of teach, for each person


@dataclass
class EditingConfig:
    models: tuple[str, ...] = ("tokens", "hash", "shifted", "state")  # how slots are chosen
    people: int = 0  # people to erase, or new people to teach; 0: 40 to erase, 100 to teach
    seeds: int = 3  # trained models of each kind
    results: str = "experiments/results"  # folder for the lines of finished runs, relative to the repository
    out: str = "out/compare/editing"  # folder for the trained models, relative to the repository

    def __post_init__(self):
        at_least(1, self, "seeds")
        at_least(0, self, "people")
        self.models = tuple(name for names in self.models for name in names.split(","))
        if unknown := set(self.models) - BASES.keys():
            raise ValueError(f"models={','.join(unknown)} must be one of {', '.join(BASES)}")


def trained_model(model: str, seed: int, config: EditingConfig):
    """Trains the model, unless it is there, and loads it: model, encoding, its TrainConfig, corpus."""
    folder = ROOT / config.out / f"{model}_{seed}"
    options = BASES[model] | dict(seed=seed, eval_interval=700, keep=1, out_dir=folder, resume=True)
    if not any(path.name == "step_000700" for path in checkpoints(folder)):
        words = [f"--{name}={value}" for name, value in options.items()]
        subprocess.run([sys.executable, "train.py", *words], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    loaded = load(folder)
    return *loaded, load_dataset(loaded[2].dataset)


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


def run_erase(base: str, seed: int, config: EditingConfig) -> dict:
    model, encoding, _, data = trained_model(base, seed, config)
    rng, values, rows = random.Random(seed), model.pool.values, []
    idf = editing.inverse_document_frequency(model, data.train)
    for about in people_in(data.questions, config.people, rng):
        told = min(int(exposure_bin(about[0])), 128)
        others = rng.sample([question for question in data.questions if question not in about], 50)
        lines = editing.lines_with(name_in(about[0]), data)
        lines = rng.sample(lines, min(len(lines), 200))
        for mode, erased in (("person", about), ("one fact", about[:1])):
            groups = {"these": erased, "other words": [q for one in erased for q in in_other_words(one)],
                      "person's others": [q for one in about if one not in erased
                                          for q in (one, *in_other_words(one))], "others": others}
            groups = {label: group for label, group in groups.items() if group}
            slots = editing.choose_slots(model, encoding, erased, lines, idf, count=max(SIZES))
            for size in (0, *SIZES):
                kept = values[slots[:size]].clone()
                editing.erase(model, slots[:size])
                shares = {label: share_right(model, encoding, group) for label, group in groups.items()}
                with torch.no_grad():
                    values[slots[:size]] = kept
                rows.append({"mode": mode, "slots": size, "told": told} | shares)
    return {"points": mean_points(rows)}


def mean_points(rows: list[dict]) -> list[dict]:
    """The mean over people, for each mode, number of slots and exposure bin."""
    groups = defaultdict(list)
    for row in rows:
        groups[row["mode"], row["slots"], row["told"]].append(row)
    return [dict(mode=mode, slots=slots, told=told, people=len(group)) |
            {label: sum(row[label] for row in group) / len(group) for label in list(group[0])[3:]}
            for (mode, slots, told), group in groups.items()]


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


def learn(model, encoding, people: list, method: str, lr: float, idf, train_config, rng) -> None:
    values, told = model.pool.values, [statements for statements, _ in people]
    if method in ("sparse", "all read"):
        for statements in told:
            slots = SLOTS if method == "sparse" else len(values)
            editing.teach(model, encoding, statements, idf, slots, STEPS, lr)
        return
    if method.startswith("lora"):
        optimizers = [torch.optim.AdamW(add_low_rank(model, SLOTS * values.size(1)), lr=lr, weight_decay=0)]
    else:
        value_lr = lr * train_config.value_lr / train_config.lr
        optimizers = model.optimizers(lr, value_lr, weight_decay=0, betas=(0.9, 0.99))
    for statements in shuffled(told, rng) if method.endswith("shuffled") else in_turn(told):
        model(*editing.text_batch(encoding, statements))[1].backward()
        for optimizer in optimizers:
            params = [p for group in optimizer.param_groups for p in group["params"] if p is not values]
            if params:
                nn.utils.clip_grad_norm_(params, train_config.grad_clip)
            optimizer.step()
        model.zero_grad()


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


def run_teach(base: str, seed: int, method: str, lr: float, config: EditingConfig) -> dict:
    model, encoding, train_config, data = trained_model(base, seed, config)
    torch.manual_seed(seed)
    rng = random.Random(seed)
    people = new_people(data.questions, config.people, rng)
    groups = {"new": [question for _, asked in people for question in asked],
              "old": rng.sample(data.questions, min(ASKED, len(data.questions)))}

    def measured():
        loss = validation_loss(model, data.val, train_config, "cpu")
        shares = {label: share_right(model, encoding, group) for label, group in groups.items()}
        return shares | {"loss": loss}

    before = measured()
    idf = editing.inverse_document_frequency(model, data.train)
    learn(model, encoding, people, method, lr, idf, train_config, rng)
    return {"before": before, "after": measured()}


# --- all runs -----------------------------------------------------------------------------------------------

def runs_of(experiment: str, config: EditingConfig) -> list[dict]:
    """What identifies each run, the most informative first. lr None: the best learning rate of seed 1."""
    runs = []
    for seed in range(1, config.seeds + 1):
        for base in config.models:
            run = dict(model=base, seed=seed, people=config.people)
            if experiment == "erase":
                runs.append(run | dict(sizes=list(SIZES)))
            else:
                runs += [run | dict(method=method, lr=lr, steps=STEPS, slots=SLOTS)
                         for method in LRS for lr in (LRS[method] if seed == 1 else [None])]
    return runs


def read_lines(path: Path) -> list[dict]:
    rows = []
    for line in open(path, encoding="utf-8") if path.exists() else ():
        with contextlib.suppress(ValueError):  # ignores an incomplete line
            rows.append(json.loads(line))
    return rows


def weighted(points: list[dict], label: str) -> float:
    """The mean over people."""
    points = [point for point in points if label in point]
    return sum(point["people"] * point[label] for point in points) / sum(point["people"] for point in points)


def erase_shares(rows: list[dict], mode: str, label: str, told: int | None = None) -> list[list[float]]:
    """For each trained model a list: the share of right answers without 0, 4, 16 ... slots."""
    return [[weighted([point for point in row["points"] if (point["mode"], point["slots"]) == (mode, size)
                       and told in (None, point["told"])], label) for size in (0, *row["run"]["sizes"])]
            for row in rows]


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


def erase_lines(rows: list[dict]) -> list[dict]:
    """The table of one kind of model: recall without 0, 4, 16 ... slots."""
    lines = []
    for mode, labels in (("person", ("these", "other words", "others")),
                         ("one fact", ("these", "other words", "person's others", "others"))):
        line = {"slots chosen by": rows[0]["run"]["model"], "erased": mode, "seeds": str(len(rows))}
        for label in ("these", "other words", "person's others", "others"):
            shares = zip(*erase_shares(rows, mode, label), strict=True) if label in labels else ()
            line[label] = " / ".join(f"{mean(share):.2f}" for share in shares)
        lines.append(line)
    return lines


def teach_lines(rows: list[dict]) -> list[dict]:
    """The table of one kind of model: each method at its best learning rate."""
    lines, base = [], rows[0]["run"]["model"]
    for method in LRS:
        runs = [row for row in rows if row["run"]["method"] == method]
        if runs:
            runs = [row for row in runs if row["run"]["lr"] == best_lr(runs)]
            before, after = (mean(row[when]["loss"] for row in runs) for when in ("before", "after"))
            new, lost = [row["after"]["new"] for row in runs], [forgotten(row) for row in runs]
            lines.append({"slots chosen by": base, "method": method, "seeds": str(len(runs)),
                          "learning rate": f"{runs[0]['run']['lr']:g}",
                          "recall of new facts": mean_and_deviation(new, ".2f"),
                          "fall of the recall of old facts": mean_and_deviation(lost),
                          "validation loss": f"{before:.3f} -> {after:.3f}"})
    return lines


def print_table(experiment: str, rows: list[dict]) -> None:
    of_models = [[row for row in rows if row["run"]["model"] == base] for base in BASES]
    make_lines = erase_lines if experiment == "erase" else teach_lines
    print_markdown([line for of_model in of_models if of_model for line in make_lines(of_model)])


def main(experiment: str, argv: list[str]) -> None:
    config = build(EditingConfig, parse(EditingConfig, argv, description=__doc__)[1])
    config.people = config.people or {"erase": 40, "teach": 100}[experiment]
    path = ROOT / config.results / f"{experiment}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = runs_of(experiment, config)
    for number, run in enumerate(runs, 1):
        rows = read_lines(path)
        if run.get("lr", 0) is None:
            same = [row for row in rows if row["run"] | dict(lr=None) == run | dict(seed=1)]
            run["lr"] = best_lr(same)
        if any(row["run"] == run for row in rows):
            continue
        print(f"{time.strftime('%H:%M')}  run {number} of {len(runs)}: "
              + ", ".join(f"{name} {value}" for name, value in run.items()), flush=True)
        with contextlib.redirect_stdout(None):
            if experiment == "erase":
                row = run_erase(run["model"], run["seed"], config)
            else:
                row = run_teach(run["model"], run["seed"], run["method"], run["lr"], config)
        append_row(path, {"run": run} | row)
    print_table(experiment, read_lines(path))
