"""
Does memory help, where, and at what cost? Trains models of equal cost and prints how well they do.

    python -m experiments.compare facts         questions about facts learnt in training: all models of MODELS
    python -m experiments.compare ablation      the model "shifted", with one thing changed at a time
    python -m experiments.compare code-short --lrs=8e-3    the loss on source code of installed packages
    python -m experiments.compare code-small --lrs=8e-3    the same with five times as many tokens, 30 M
    python -m experiments.compare reference-facts --lrs=8e-3 --seeds=2    real facts; see docs/data.md
    python -m experiments.compare mqar          answers that stand in the context: memory should not help here
    python -m experiments.compare facts-large --lrs=2e-3   200,000 people, larger models: needs a GPU
    python -m experiments.compare code --lrs=2e-3          installed Python packages: needs a GPU
    python -m experiments.compare erase         empties the slots of facts: what is lost, and what stays
    python -m experiments.compare teach         teaches new facts in several ways: what is forgotten
    python -m experiments.compare table         tables of all finished runs, without training
    python -m experiments.compare summary       the table in README.md
    python -m experiments.compare facts --help  the options: which models, how many seeds and runs at a time

With the same seed, all models see the same tokens in the same order. All models are tuned in the same way.
First, each learning rate in --lrs is tried in one run with seed 1. If the highest is the best, then twice
this learning rate is tried too. If the lowest is the best, then half of it is tried. Runs with other seeds
use the learning rate with the best recall. The pool's learning rate is not tuned.

A finished run becomes one line of experiments/results/NAME.jsonl, and is not run again. If you stop the
command and repeat it, the runs continue from their last checkpoints. Two of these commands may run at the
same time if their --models differ. A line records the options of its run, and the commit of the code. If you
change the code so that other numbers come out, choose another folder: --results=FOLDER. The models are in
experiments/models.py, and erase and teach in experiments/facts_edited.py.
"""

import json
import math
import os
import shutil
import subprocess
import time
import zlib
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean, median

from runtime.cli import at_least, build, command, fail, first_word, parse

import torch

from data import corpus
from data.corpora import make_missing
from data.write import options_of, with_defaults
from evaluate import exposure_bin
from experiments import facts_edited, results
from experiments.models import EXPERIMENTS, SUMMARY, Experiment, choose_models, costs, train_command
from experiments.results import ROOT, commit, mean_and_deviation, read_rows


@dataclass
class TableConfig:
    results: str = "experiments/results"  # folder for the lines of finished runs, relative to the repository


@dataclass
class RunsConfig(TableConfig):
    models: tuple[str, ...] = ()  # which models, the most urgent first; empty: all models of the experiment
    seeds: int = 3  # runs of each model at its best learning rate
    out: str = "out/compare"  # folder for the runs in progress, relative to the repository

    def __post_init__(self):
        at_least(1, self, "seeds")


@dataclass
class CompareConfig(RunsConfig):
    lrs: tuple[float, ...] = (4e-3, 8e-3)  # learning rates to try; with only one there is no tuning
    jobs: int = 2  # runs at the same time, which share the CPU cores
    max_steps: int = 0  # steps of each run; 0: the steps of the experiment. Lengths have separate results

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "jobs")
        at_least(0, self, "max_steps")


# --- runs ---------------------------------------------------------------------------------------------------

def prepare_corpus(experiment: Experiment, rows: list[dict]) -> None:
    """Makes the corpus if it does not exist. Fails if the runs in `rows` had another corpus."""
    config, folder = experiment.corpus, corpus.DATA / experiment.options["dataset"]
    make_missing(folder.name)
    meta = json.loads((folder / "meta.json").read_text())
    options = with_defaults(config, meta["options"])
    # the same options can give another corpus: code depends on the installed packages
    if options != options_of(config) or any(row["train_tokens"] != meta["train_tokens"] for row in rows):
        fail(f"{folder} is another corpus than that of this experiment or its finished runs: move it away, "
             "or choose another folder with --results")


def next_runs(rows: list[dict], models, lrs, seeds: int) -> list[tuple]:
    """(model, lr, seed) of the next runs. First all learning rates of a model, then the other seeds."""
    done = {(row["model"], row["lr"], row["seed"]) for row in rows}
    runs = []
    for model in models:
        model_runs = [(model, lr, 1) for lr in lrs]
        if done.issuperset(model_runs):
            tried = {lr for name, lr, _ in done if name == model}
            best = results.best_lr(rows, model) if len(lrs) > 1 else lrs[0]
            model_runs = [(model, best, seed) for seed in range(2, seeds + 1)]
            if len(lrs) > 1 and best in (min(tried), max(tried)):  # is the next one better?
                model_runs = [(model, 2 * best if best == max(tried) else best / 2, 1)]
        runs += [run for run in model_runs if run not in done]
    return runs


def start(experiment: Experiment, run: tuple, folder: Path, jobs: int) -> tuple[subprocess.Popen, Path]:
    """Starts or continues a run. Its folder's name has a checksum: other options get another folder."""
    model, lr, seed = run
    checksum = zlib.crc32(json.dumps(experiment.identity(model)).encode())
    out_dir = folder / f"{model}_{lr:g}_{seed}_{checksum:x}"
    out_dir.mkdir(parents=True, exist_ok=True)
    config = experiment.config(model, lr=lr, seed=seed, out_dir=str(out_dir), resume=True, keep=1)
    threads = str(max(1, torch.get_num_threads() // jobs))
    with open(out_dir / "printed.txt", "a") as printed:
        return subprocess.Popen(train_command(config), cwd=ROOT, stdout=printed, stderr=printed,
                                env=os.environ | {"OMP_NUM_THREADS": threads}), out_dir


def make_row(experiment: Experiment, run: tuple, out_dir: Path, code: str) -> dict:
    """The line of a finished run. code: its commit. If the run diverged, its curve is empty."""
    model, lr, seed = run
    folder = corpus.DATA / experiment.options["dataset"]
    meta = json.loads((folder / "meta.json").read_text())
    row = {"model": model, "lr": lr, "seed": seed, **experiment.identity(model),
           "train_tokens": meta["train_tokens"], "commit": code, "curve": []}
    if "training has diverged" in (out_dir / "printed.txt").read_text():
        return row
    config = experiment.config(model, vocab_size=meta["vocab_size"])
    if not (out_dir / f"step_{config.max_steps:06d}").exists():
        fail(f"the run of {model} stopped: see {out_dir / 'printed.txt'}")
    macs, parameters = costs(config)
    log = results.read_json_lines(out_dir / "log.jsonl")
    curve = [line | {"tokens": line["step"] * config.batch_size * config.block_size}
             for line in log if "val_loss" in line]
    asked = Counter("held_out" if question.get("held_out") else exposure_bin(question)
                    for question in corpus.read_questions(folder / "qa.jsonl"))
    speed = median(line["tokens_per_second"] for line in log if "loss" in line)  # without evaluation
    return row | {"macs": macs, "parameters": parameters, "asked": asked, "tokens_per_second": speed,
                  "curve": curve}


def run_all(name: str, experiment: Experiment, config: CompareConfig) -> None:
    models, path = choose_models(config.models, experiment.models), results.rows_path(name, config.results)
    prepare_corpus(experiment, read_rows(path, experiment))
    running, code = {}, commit()  # running: {run: (process, folder)}
    try:
        while True:
            rows = read_rows(path, experiment)
            waiting = [run for run in next_runs(rows, models, config.lrs, config.seeds) if run not in running]
            for run in waiting[:config.jobs - len(running)]:
                print(f"{time.strftime('%H:%M')}  {len(rows)} runs done; now {run[0]}, learning rate "
                      f"{run[1]:g}, seed {run[2]}", flush=True)
                running[run] = start(experiment, run, ROOT / config.out / name, config.jobs)
            if not running:
                return
            time.sleep(0.5)
            for run, (process, out_dir) in list(running.items()):
                if process.poll() is not None:
                    results.append_row(path, make_row(experiment, run, out_dir, code))
                    shutil.rmtree(out_dir)
                    del running[run]
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()  # it saves a checkpoint first


# --- tables -------------------------------------------------------------------------------------------------

def recall_between(row: dict, low: int, high: int) -> float:
    """The final recall of facts that training told low ... high - 1 times. Both must be powers of two."""
    shares = row["curve"][-1]["recall"]["by_exposure"]
    asked = {key: row["asked"][key] for key in shares if low <= int(key) < high}
    return sum(shares[key] * asked[key] for key in asked) / sum(asked.values()) if asked else math.nan


def tokens_to(recall: float, curve: list[dict]) -> float:
    """The number of tokens at which the curve (lines between its points) reaches this recall, or nan."""
    points = [(point["tokens"], point["recall"]["all"]) for point in curve]
    for (x0, y0), (x1, y1) in zip(points, points[1:], strict=False):
        if y1 >= recall:
            return x0 + (x1 - x0) * (recall - y0) / (y1 - y0) if y1 > y0 else x0
    return math.nan


def difference(rows: list[dict], others: list[dict]) -> str:
    """The validation loss minus that of others, at every second evaluation. Means over the seeds."""
    ours, theirs = ([mean(point["val_loss"] for point in points) for points in zip(*curves, strict=True)]
                    for curves in ([row["curve"][:0:-2][::-1] for row in part] for part in (rows, others)))
    return " / ".join(f"{a - b:+.2f}" for a, b in zip(ours, theirs, strict=True))


def print_table(name: str, experiment: Experiment, folder: str) -> None:
    """Mean ± standard deviation over the seeds, at the best learning rate of each model."""
    rows = read_rows(results.rows_path(name, folder), experiment)
    runs, lrs_tried = results.best_runs(rows), Counter(row["model"] for row in rows if row["seed"] == 1)
    if not runs:
        return print(f"{name}: no finished runs. Start: python -m experiments.compare {name}")
    lines = []
    for model, model_runs in runs.items():
        final, first = [row["curve"][-1] for row in model_runs], model_runs[0]
        failed = sum((row["model"], row["lr"], row["curve"]) == (model, first["lr"], []) for row in rows)
        line = {
            "model": model,
            "multiply-adds per token": f"{first['macs']:,}",
            "parameters": f"{first['parameters']['dense'] + first['parameters']['memory']:,}",
            "seeds": f"{len(model_runs)}" + (f", {failed} diverged" if failed else ""),
            "learning rate (tried)": f"{first['lr']:g} ({lrs_tried[model]})",
            "validation loss": mean_and_deviation([point["val_loss"] for point in final]),
        }
        if "recall" in final[0]:
            line["recall"] = mean_and_deviation([point["recall"]["all"] for point in final])
        elif "dense" in runs:
            is_dense = model == "dense"
            line["minus dense's, in training"] = "-" if is_dense else difference(model_runs, runs["dense"])
        if name == "facts":
            line["recall, told 8 to 31 times"] = mean_and_deviation(
                [recall_between(row, 8, 32) for row in model_runs])
        if name in ("facts", "reference-facts"):
            line["recall, held out"] = mean_and_deviation([point["recall"]["held_out"] for point in final])
        if name == "facts" and "dense" in runs:
            goal = mean(row["curve"][-1]["recall"]["all"] for row in runs["dense"])
            line["M tokens to dense's recall"] = mean_and_deviation(
                [tokens_to(goal, row["curve"]) / 1e6 for row in model_runs], ".2f")
        lines.append(line)
    print(f"\n{name}, each model at the best learning rate of those tried:\n")
    results.print_markdown(lines)


def print_summary(folder: str) -> None:
    """The table in README.md: facts and code-short, each model at its best learning rate."""
    paths = {name: results.rows_path(name, folder) for name in ("facts", "code-short")}
    facts, code = (results.best_runs(read_rows(path, EXPERIMENTS[name])) for name, path in paths.items())
    lines = []
    for model, name in SUMMARY.items():
        on_facts, on_text = facts.get(model, []), code.get(model, [])
        recalls = [row["curve"][-1]["recall"]["all"] for row in on_facts]
        losses = [row["curve"][-1]["val_loss"] for row in on_text]
        sizes = [sum(row["parameters"][part] for part in ("dense", "memory")) for row in on_facts]
        lines.append({"model": name, "parameters": f"{sizes[0] / 1e6:.1f} M" if sizes else "-",
                      "recall of facts": mean_and_deviation(recalls, ".2f"),
                      "loss on source code": mean_and_deviation(losses, ".2f")})
    results.print_markdown(lines)


@command
def main(argv: list[str] | None = None) -> None:
    edited = ("erase", "teach")
    word, rest = first_word(argv, (*EXPERIMENTS, *edited, "table", "summary"), __doc__, "an experiment")
    kind = CompareConfig if word in EXPERIMENTS else RunsConfig if word in edited else TableConfig
    config = build(kind, parse(kind, rest, None, __doc__, word)[1])
    if word == "summary":
        print_summary(config.results)
    elif word == "table":
        for name in EXPERIMENTS:
            print_table(name, EXPERIMENTS[name], config.results)
        for name in edited:
            facts_edited.print_table(name, config.results)
    elif word in edited:
        facts_edited.run_all(word, config.models, config.seeds, config.results, config.out)
    else:
        experiment = EXPERIMENTS[word]
        if steps := config.max_steps:  # results of another length are then ignored
            length = dict(max_steps=steps, eval_interval=max(50, steps // 10))
            experiment = replace(experiment, options=experiment.options | length)
        run_all(word, experiment, config)
        print_table(word, experiment, config.results)


if __name__ == "__main__":
    main()
