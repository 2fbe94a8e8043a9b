"""
Erasing and teaching facts, measured: `python -m experiments.compare erase` and `teach`. docs/editing.md
explains the methods of teach, and has the results.

erase: empties growing numbers of slots of 40 people, one person at a time, and asks about the person, in the
words of the corpus and in other words, and about others. "one fact": only the slots of one answer; then the
person's other answers count apart.

teach: tells a trained model three statements of each of four facts about 100 new people. Then it asks new
questions about all of them, and old questions. Seed 1 has runs with all learning rates. The other seeds have
runs with the one that was best then.
"""

import contextlib
import itertools
import random
import re
import subprocess
import time
from collections import defaultdict
from pathlib import Path
from statistics import mean

import torch
import torch.nn as nn

import edit
from data.corpus import QUESTION, load_dataset
from data.facts import ATTRIBUTES
from evaluate import answered, exposure_bin, validation_loss
from experiments import results
from experiments.models import EDITED, choose_models, train_command
from experiments.results import ROOT, group_by, mean_and_deviation, read_edited
from runtime.checkpoint import load
from train import TrainConfig

PEOPLE = {"erase": 40, "teach": 100}
SIZES = (4, 16, 64, 128, 256)  # numbers of slots to empty
LRS = {"sparse": (30.0, 100.0, 300.0, 1000.0), "all read": (10.0, 30.0, 100.0),
       "full": (3e-5, 1e-4, 3e-4, 1e-3), "lora": (1e-4, 3e-4, 1e-3, 3e-3),
       "full, shuffled": (1e-5, 3e-5, 1e-4, 3e-4, 1e-3), "lora, shuffled": (3e-4, 1e-3, 3e-3, 1e-2)}
ASKED = 400  # old questions, drawn at random
STEPS, SLOTS = 20, 128  # of teach, for each person


def trained_model(base: str, seed: int, out: Path):
    """Trains the model, unless it is there, and loads it: model, encoding, its TrainConfig, corpus."""
    config = TrainConfig(**EDITED[base], seed=seed, out_dir=str(out / f"{base}_{seed}"))
    if not (Path(config.out_dir) / f"step_{config.max_steps:06d}").exists():
        subprocess.run(train_command(config), cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    model, encoding, _ = load(config.out_dir)
    return model, encoding, config, load_dataset(config.dataset)


def share_right(model, encoding, questions: list[dict]) -> float:
    return len(answered(model, encoding, questions)) / len(questions)


def name_in(question: dict) -> str:
    return re.search(r"[A-Z]\w* [A-Z]\w*", question["prompt"]).group()


def by_person(questions: list[dict]) -> dict[str, list[dict]]:
    """{name: the questions about this person}"""
    people = defaultdict(list)
    for question in questions:
        people[name_in(question)].append(question)
    return people


def in_other_words(question: dict) -> list[dict]:
    """The same question in the other words that the corpus has for it."""
    prompts = [[QUESTION.format(form.format(name_in(question))) for form in forms]
               for _, _, forms in ATTRIBUTES.values()]
    return [question | {"prompt": prompt} for group in prompts if question["prompt"] in group
            for prompt in group if prompt != question["prompt"]]


# --- erase --------------------------------------------------------------------------------------------------

def people_in(questions: list[dict], count: int, rng) -> list[list[dict]]:
    """The questions about each of `count` people, as many of each exposure bin up to "128": 128 or more."""
    bins = defaultdict(list)
    for about in by_person(questions).values():
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
            about_these = edit.about_batches(model, encoding, erased, lines)
            slots = edit.choose_slots(model, *about_these, idf, count=max(SIZES))
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


def add_low_rank(layers: list[nn.Linear], rank: int, scale: float = 1.0) -> list[nn.Parameter]:
    """Adds scale * up @ down, at first 0, to the weights of Linear layers. Returns all up and down."""
    for layer in layers:
        layer.up = nn.Parameter(torch.zeros(layer.out_features, rank))
        layer.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        layer.register_forward_hook(lambda layer, args, y: y + scale * args[0] @ layer.down.T @ layer.up.T)
    return [p for layer in layers for p in (layer.up, layer.down)]


def shuffled(told: list[list[str]], rng):
    """STEPS passes over the statements about all people, mixed; as many per step as there are per person."""
    for _ in range(STEPS):
        texts = rng.sample(all_texts := sum(told, []), len(all_texts))
        for i in range(0, len(texts), len(told[0])):
            yield texts[i:i + len(told[0])]


def learn(model, encoding, told: list[list[str]], method: str, lr: float, idf, config, rng) -> None:
    """Teaches the statements about each person. config: how the model was trained."""
    values = model.pool.values
    if method in ("sparse", "all read"):
        for statements in told:
            slots = SLOTS if method == "sparse" else len(values)
            edit.teach(model, *edit.text_batch(encoding, statements), idf, slots, STEPS, lr)
        return
    if method.startswith("lora"):
        layers = [module for module in model.modules() if isinstance(module, nn.Linear)]
        rank = -(-SLOTS * values.size(1) // sum(sum(layer.weight.shape) for layer in layers))
        optimizers = [torch.optim.AdamW(add_low_rank(layers, rank), lr=lr, weight_decay=0)]
    else:
        optimizers = model.optimizers(lr, lr * config.value_lr / config.lr, weight_decay=0, betas=(0.9, 0.99))
    dense = [p for group in optimizers[0].param_groups for p in group["params"]]
    one_by_one = (statements for statements in told for _ in range(STEPS))
    for statements in shuffled(told, rng) if method.endswith("shuffled") else one_by_one:
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
        loss = validation_loss(model, data.val, config.eval_batches, config.batch_size)
        return shares | {"loss": loss}

    before = measured()
    idf = edit.inverse_document_frequency(model, data.train)
    learn(model, encoding, [told for told, _ in people], run["method"], run["lr"], idf, config, rng)
    return {"before": before, "after": measured()}


# --- all runs -----------------------------------------------------------------------------------------------

def runs_of(word: str, models: list[str], seeds: int, path: Path):
    """Yields what identifies each run. path: the finished runs, which choose the later learning rates."""
    for seed, base in itertools.product(range(1, seeds + 1), models):
        run = dict(model=base, seed=seed, people=PEOPLE[word])
        if word == "erase":
            yield run | dict(sizes=list(SIZES))
            continue
        for method, lrs in LRS.items():
            run |= dict(method=method, steps=STEPS, slots=SLOTS)
            if seed > 1:
                first = [row for row in read_edited(path)
                         if row["run"] == run | dict(seed=1, lr=row["run"]["lr"])]
                lrs = [best_lr(first)]
            for lr in lrs:
                yield run | dict(lr=lr)


def run_all(word: str, names: tuple[str, ...], seeds: int, folder: str, out: str) -> None:
    """Does all runs of erase or teach that have no line yet, and prints the table."""
    path, measure = results.rows_path(word, folder), run_erase if word == "erase" else run_teach
    for run in runs_of(word, choose_models(names, EDITED), seeds, path):
        if all(row["run"] != run for row in read_edited(path)):
            print(time.strftime("%H:%M"), *(f"{name}={value}" for name, value in run.items()), flush=True)
            with contextlib.redirect_stdout(None):
                row = measure(run, *trained_model(run["model"], run["seed"], ROOT / out / "editing"))
            results.append_row(path, {"run": run} | row)
    print_table(word, folder)


# --- tables -------------------------------------------------------------------------------------------------

def forgotten(row: dict) -> float:
    """How much the recall of old facts has fallen."""
    return row["before"]["old"] - row["after"]["old"]


def best_lr(rows: list[dict]) -> float:
    """In runs with seed 1: the learning rate that forgets least, of those that teach 0.9, or else most."""
    rows = [row for row in rows if row["run"]["seed"] == 1]
    most = max(row["after"]["new"] for row in rows)
    return min((row for row in rows if row["after"]["new"] >= min(0.9, most)), key=forgotten)["run"]["lr"]


def erase_lines(base: str, rows: list[dict]) -> list[dict]:
    """The table of one kind of model: recall without 0, 4, 16 ... slots."""
    lines = []
    for mode in ("person", "one fact"):
        line = {"slots chosen by": base, "erased": mode, "seeds": str(len(rows))}
        for label in ("these", "other words", "person's others", "others"):
            has_label = (mode, label) != ("person", "person's others")
            shares = zip(*results.erase_shares(rows, mode, label), strict=True) if has_label else ()
            line[label] = " / ".join(f"{mean(share):.2f}" for share in shares)
        lines.append(line)
    return lines


def teach_lines(base: str, rows: list[dict]) -> list[dict]:
    """The table of one kind of model: each method at its best learning rate."""
    lines = []
    for method, runs in group_by(rows, "method").items():
        runs = [row for row in runs if row["run"]["lr"] == best_lr(runs)]
        before, after = (mean(row[when]["loss"] for row in runs) for when in ("before", "after"))
        lines.append({"slots chosen by": base, "method": method, "seeds": str(len(runs)),
                      "learning rate": f"{runs[0]['run']['lr']:g}",
                      "recall of new facts": mean_and_deviation([row["after"]["new"] for row in runs], ".2f"),
                      "fall of the recall of old facts": mean_and_deviation([*map(forgotten, runs)]),
                      "validation loss": f"{before:.3f} -> {after:.3f}"})
    return lines


def print_table(word: str, folder: str) -> None:
    rows = read_edited(results.rows_path(word, folder))
    if not rows:
        return print(f"{word}: no finished runs. Start: python -m experiments.compare {word}")
    lines_of = {"erase": erase_lines, "teach": teach_lines}[word]
    headings = {"erase": f"recall without 0, {', '.join(map(str, SIZES))} slots",
                "teach": "each method at the best learning rate of those tried"}
    print(f"\n{word}, {headings[word]}:\n")
    by_model = group_by(rows, "model")
    results.print_markdown([line for base in by_model for line in lines_of(base, by_model[base])])
