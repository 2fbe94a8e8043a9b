"""
experiments/: a small experiment from the plan to the table, the tables and figures of made-up runs, and what
is measured of edited models.
"""

import itertools
import json
import math
import os
import re
import shutil
import signal
import subprocess
import threading
from dataclasses import replace

from runtime.cli import build, parse

import pytest
import torch
from conftest import SMALL, assert_fails
from torch import nn

import edit
from data import corpus, prepare
from experiments import compare, facts_edited, models, plots, results
from experiments.compare import next_runs, recall_between, tokens_to
from experiments.models import EDITED, EXPERIMENTS, MODELS, SUMMARY, Experiment, costs, train_command
from experiments.results import best_lr, best_runs, read_json_lines, read_rows
from runtime.checkpoint import load
from train import PRESETS, TrainConfig

RESULTS = results.ROOT / "experiments" / "results"
TINY = dict(dataset="facts-tiny", block_size=32, n_head=2, n_embd=16, mem_num_keys=8, mem_heads=2, mem_knn=4,
            mem_key_dim=8, batch_size=4, max_steps=4, eval_interval=2, eval_batches=1, eval_questions=9,
            log_interval=1)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A copy of the project whose experiment `facts` has two tiny models and tiny data -> its lines' path."""
    for pattern in ("*.py", "data/*.py", "runtime/*.py", "experiments/*.py"):
        for path in results.ROOT.glob(pattern):
            copy = tmp_path / path.relative_to(results.ROOT)
            copy.parent.mkdir(exist_ok=True)
            shutil.copy(path, copy)
    for module in (compare, results):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    for module in (corpus, prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data", raising=False)
    config = replace(models.CORPORA["facts"], name="facts-tiny", people=20)
    monkeypatch.setitem(models.CORPORA, "facts-tiny", config)
    pair = {"dense": dict(mem_layers=()), "memory+": dict(mem_layers=(1, 2))}
    monkeypatch.setitem(EXPERIMENTS, "facts", Experiment(dict(TINY), pair))
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path / "experiments/results/facts.jsonl"
    signal.signal(signal.SIGTERM, before)


def read_tiny(path):
    return read_rows(path, EXPERIMENTS["facts"])


def write_rows(path, *rows):
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def made_up(model="dense", lr=1e-3, seed=1, recall=0.5, often=0.5, experiment="facts", **changes):
    """A line. often: the final recall of the facts told 8 to 15 times."""
    def point(tokens, share, often):
        by_exposure = {"4": 0.1, "8": often, "16": 2 * often}
        return dict(step=tokens // 100, tokens=tokens, val_loss=6.0 - 4 * share,
                    recall={"all": share * recall, "held_out": 0.25, "by_exposure": by_exposure})

    return dict(model=model, lr=lr, seed=seed, macs=7, tokens_per_second=10.0,
                curve=[point(0, 0, 0.01), point(600, 0.6, often**2), point(1000, 1, often)],
                asked={"4": 50, "8": 30, "16": 10, "held_out": 10}, parameters=dict(dense=100, memory=100),
                **EXPERIMENTS[experiment].identity(model)) | changes


# --- runs ---------------------------------------------------------------------------------------------------

@pytest.mark.slow
def test_an_experiment_from_its_plan_to_its_table(tiny, tmp_path, capsys, monkeypatch):
    """The command is stopped once. A run continues (dense); one that had ended is not run again (memory+)."""
    start, evaluated = compare.start, {}

    def stopping(experiment, run, folder, jobs):
        with monkeypatch.context() as patch:  # the folder of the run has the name for all of its steps
            patch.setattr(compare, "train_command", lambda config: train_command(
                replace(config, max_steps=2 if run[0] == "dense" else 4)))
            process, out_dir = start(experiment, run, folder, jobs)
        process.wait()
        evaluated[run[0]] = [line for line in read_json_lines(out_dir / "log.jsonl") if "val_loss" in line]
        if len(evaluated) == 2:
            raise KeyboardInterrupt
        return process, out_dir

    monkeypatch.setattr(compare, "start", stopping)
    with pytest.raises(SystemExit) as stop:
        compare.main(["facts", "--lrs=6e-3", "--seeds=2"])
    assert stop.value.code == 130 and not tiny.exists()
    monkeypatch.setattr(compare, "start", start)
    compare.main(["facts", "--lrs=6e-3", "--seeds=2"])
    rows = read_json_lines(tiny)
    runs = {(row["model"], row["seed"]): row for row in rows}
    assert len(rows) == 4 and runs.keys() == set(itertools.product(("dense", "memory+"), (1, 2)))
    for row in rows:
        assert [point["step"] for point in row["curve"]] == [0, 2, 4]
        assert [point["tokens"] for point in row["curve"]] == [0, 256, 512]
        assert row["lr"] == 6e-3 and row["tokens_per_second"] > 0
        assert sum(row["asked"].values()) == 80 and row["asked"]["held_out"] == 8
        assert row["parameters"]["memory"] == (64 * 16 if row["model"] == "memory+" else 0)
        assert ("slots_used" in row["curve"][-1]) == (row["model"] == "memory+")
    for model, steps in (("dense", [0, 2]), ("memory+", [0, 2, 4])):
        assert [line["step"] for line in evaluated[model]] == steps
        for line, point in zip(evaluated[model], runs[model, 1]["curve"], strict=False):
            assert line["seconds"] == point["seconds"], "the run was repeated"
    first, second = (runs["dense", seed]["curve"][-1]["val_loss"] for seed in (1, 2))
    assert first != second
    assert list((tmp_path / "out/compare/facts").iterdir()) == [], "finished runs leave no checkpoints"
    printed = capsys.readouterr().out
    assert "0 runs done; now dense" in printed and "| memory+ |" in printed and " ± " in printed

    # a finished run is not run again, whatever the command, unless the options of its model have changed
    monkeypatch.setattr(compare, "start", None)
    compare.main(["facts", "--lrs=6e-3", "--seeds=2"])
    compare.main(["table"])
    assert read_json_lines(tiny) == rows and capsys.readouterr().out.count("| memory+ |") == 2
    EXPERIMENTS["facts"].models["dense"]["n_embd"] = 32
    assert {row["model"] for row in read_tiny(tiny)} == {"memory+"}
    monkeypatch.setitem(models.CORPORA, "facts-tiny", replace(models.CORPORA["facts-tiny"], seed=2))
    assert read_tiny(tiny) == [], "another corpus, though the runs have the same seeds"


def test_sigterm_ends_the_runs_and_a_run_that_fails_is_named(tiny, tmp_path, capsys, monkeypatch):
    """With programs that do not train."""
    program, started = ["sleep", "100"], []

    def start(experiment, run, folder, jobs):
        assert experiment.options["max_steps"] == 1000 and experiment.options["eval_interval"] == 100
        (tmp_path / "printed.txt").touch()
        started.append(subprocess.Popen(program))
        if len(started) == 2:
            threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
        return started[-1], tmp_path

    monkeypatch.setattr(compare, "start", start)
    with pytest.raises(SystemExit) as stop:
        compare.main(["facts", "--max_steps=1000"])
    assert stop.value.code == 143 and [process.returncode for process in started] == [-signal.SIGTERM] * 2
    program[:] = ["false"]
    assert_fails(lambda: compare.main(["facts", "--max_steps=1000"]), "the run of dense stopped: see", capsys)


@pytest.mark.slow
def test_a_run_that_diverges_is_a_result_and_the_plan_continues(tiny, capsys):
    """Also: a line that was cut short does not damage the next line."""
    EXPERIMENTS["facts"].options |= dict(grad_clip=0.0, warmup_steps=0)
    tiny.parent.mkdir(exist_ok=True)
    tiny.write_text('{"model": "dense", "lr"')
    compare.main(["facts", "--models=dense", "--lrs=1e30,3e-3", "--seeds=1", "--jobs=1"])
    rows = read_tiny(tiny)
    assert [(row["lr"], len(row["curve"])) for row in rows] == [(1e30, 0), (3e-3, 3), (1.5e-3, 3)]
    assert capsys.readouterr().out.count("| dense |") == 1
    assert best_runs(rows)["dense"][0]["lr"] in (3e-3, 1.5e-3) and best_runs(rows[:1]) == {}


def test_a_line_older_than_an_option_counts_if_the_option_has_its_default(tiny):
    rows = [made_up() for _ in range(5)]
    rows[4]["options"]["max_steps"] = 2  # a shorter run
    for row, part, name in zip(rows, ("options", "corpus", "options", "corpus"),
                               ("mem_mode", "zipf", "n_embd", "people"), strict=False):
        del row[part][name]
    write_rows(tiny, *rows)
    # n_embd and people are not at their defaults, so their lines do not count; the others are the same run
    assert read_tiny(tiny) == [rows[1]]


def test_runs_of_another_corpus_are_not_mixed_with_ours(tiny, tmp_path, capsys):
    """Made with other options, or of another text: code differs between machines."""
    models.CORPORA["facts-tiny"].make()
    path = tmp_path / "data/facts-tiny/meta.json"
    meta = json.loads(path.read_text())
    del meta["options"]["zipf"]  # a corpus that is older than this option
    path.write_text(json.dumps(meta))
    compare.prepare_corpus(EXPERIMENTS["facts"], [])
    write_rows(tiny, made_up(train_tokens=7))
    assert_fails(lambda: compare.main(["facts"]), "is another corpus than", capsys)
    tiny.unlink()
    meta["options"]["people"] = 7
    path.write_text(json.dumps(meta))
    assert_fails(lambda: compare.main(["facts"]), "is another corpus than", capsys)


def test_the_best_learning_rate_is_chosen_after_all_are_tried():
    def following(rows, models=("dense",), lrs=(1e-3, 3e-3), seeds=3):
        return next_runs(rows, models, lrs, seeds)

    assert following([]) == [("dense", 1e-3, 1), ("dense", 3e-3, 1)]
    rows = [made_up(lr=3e-3, recall=0.6)]
    assert following(rows, ("dense", "moe")) == [("dense", 1e-3, 1), ("moe", 1e-3, 1), ("moe", 3e-3, 1)]
    # the best is the highest: is there a better one beyond? There is not
    rows.append(made_up(lr=1e-3, recall=0.5))
    assert following(rows) == [("dense", 6e-3, 1)]
    assert following([*rows, made_up(lr=0.5e-3, recall=0.7)]) == [("dense", 0.25e-3, 1)]
    rows.append(made_up(lr=6e-3, recall=0.55))
    assert following(rows) == [("dense", 3e-3, 2), ("dense", 3e-3, 3)]
    assert following(rows[:1], lrs=(3e-3,), seeds=1) == []
    assert following(rows, lrs=(6e-3,), seeds=2) == [("dense", 6e-3, 2)]
    # if recalls are equal, the validation loss decides
    same = [made_up(lr=lr, recall=1.0) for lr in (1e-3, 3e-3)]
    same[1]["curve"][-1]["val_loss"] = 1.9
    assert best_lr(same, "dense") == best_lr(same[::-1], "dense") == 3e-3
    # another seed that does worse changes no choice
    rows.append(made_up(lr=3e-3, seed=2, recall=0.1))
    assert following(rows) == [("dense", 3e-3, 3)]
    assert best_runs(rows) == {"dense": [rows[0], rows[3]]}
    # without questions, the validation loss decides
    for row in rows:
        del row["curve"][-1]["recall"]
    rows[1]["curve"][-1]["val_loss"] = 1.0
    assert following(rows) == [("dense", 0.5e-3, 1)], "the best is the lowest now"
    # if all runs diverged, lower learning rates are tried, whichever run ended first
    rows = [made_up(lr=lr, curve=[]) for lr in (3e-3, 1e-3)]
    assert following(rows) == [("dense", 0.5e-3, 1)]


# --- models -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_model_is_what_its_line_says(experiment):
    """
    The options with which a model is trained are those of its line, whatever the presets and defaults of
    train.py are. All lines count: a change of an option's name or default would make them worthless.
    """
    plan = EXPERIMENTS[experiment]
    for name, options in plan.models.items():
        assert {"mem_query", "mem_layers", "scale_embeddings"} <= (plan.options | options).keys()
        config = plan.config(name, out_dir="x")
        preset, given = parse(TrainConfig, train_command(config)[2:], PRESETS)
        assert build(TrainConfig, preset | given) == config
    path = RESULTS / f"{experiment}.jsonl"
    rows = read_json_lines(path)
    assert len(read_rows(path, EXPERIMENTS[experiment])) == len(rows)
    # PEER's query once came from the state whatever mem_query said
    assert all(row["options"]["mem_query"] == "state" for row in rows if row["model"] == "peer")


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_models_that_are_compared_cost_the_same(experiment):
    """
    Multiply-adds to 5% (facts, facts-large, code, code-small, reference-facts: 1%), except dense-2x and
    hash-narrow; and parameters, among the models of one size.
    """
    both = {model: costs(EXPERIMENTS[experiment].config(model, vocab_size=600))
            for model in EXPERIMENTS[experiment].models}
    macs = {model: macs for model, (macs, _) in both.items()}
    if "dense-2x" in macs:
        assert math.isclose(macs.pop("dense-2x"), 2 * macs["dense"], rel_tol=0.05)
        assert macs.pop("hash-narrow") < macs["hash"]
    exact = experiment in ("facts", "facts-large", "code", "code-small", "reference-facts")
    assert max(macs.values()) <= (1.01 if exact else 1.05) * min(macs.values())
    parameters = [counts["dense"] + counts["memory"] for model, (_, counts) in both.items()
                  if not model.startswith("dense") and not re.search(r"\d[xkM]\b", model)]
    assert len(parameters) > 1 and max(parameters) <= 1.05 * min(parameters)


# --- tables and figures -------------------------------------------------------------------------------------

def test_measures_are_as_defined():
    row = made_up()
    assert recall_between(row, 8, 32) == (0.5 * 30 + 1.0 * 10) / 40
    assert recall_between(row, 4, 8) == 0.1
    assert math.isnan(recall_between(row, 1, 4))
    assert results.mean_and_deviation([0.5, math.nan]) == "-"
    assert tokens_to(0.25, row["curve"]) == 500 and math.isnan(tokens_to(0.51, row["curve"]))


def test_the_tables_of_the_finished_runs(tmp_path, capsys):
    """Guards a fault: nothing was printed of erase and teach."""
    compare.main(["table"])
    printed = capsys.readouterr().out
    assert "diverged" not in printed and "\nerase, " in printed and "\nteach, " in printed
    page = (RESULTS.parent / "README.md").read_text(encoding="utf-8")
    for name, table in re.findall(r"<!-- ([\w-]+) table -->\n(.*?)<!-- end -->", page, re.DOTALL):
        assert table in printed, f"the command prints another table of {name} than experiments/README.md has"
    page = (RESULTS.parents[1] / "docs/editing.md").read_text(encoding="utf-8")
    assert page.split("<!-- teach table -->\n")[1].split("<!-- end -->")[0] in printed
    rows = made_up(seed=1, recall=0.1), made_up(seed=2, recall=0.2), made_up(seed=3, curve=[])
    write_rows(tmp_path / "facts.jsonl", *rows)
    compare.main(["table", f"--results={tmp_path}"])
    printed = capsys.readouterr().out
    assert "| dense | 7 | 200 | 2, 1 diverged |" in printed and "erase: no finished runs" in printed
    compare.main(["summary", f"--results={tmp_path}"])
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == "| dense GPT | 0.0 M | 0.15 ± 0.07 | - |" and lines[3].endswith("| - | - | - |")


def test_the_figure_of_facts(tmp_path):
    path = tmp_path / "facts.jsonl"
    write_rows(path, *(made_up(model, seed=seed, often=0.1 * seed)
                       for model, seed in itertools.product(MODELS, (1, 2, 3))))  # all models are alike
    plots.main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 20_000
    (axis,) = plots.draw_facts(path).axes
    assert len(axis.containers) == len(SUMMARY)
    for container in axis.containers:
        assert list(container.lines[0].get_ydata()) == pytest.approx([0.1, 0.2, 0.4]), "means of the seeds"


@pytest.mark.parametrize("program, argv, message", [
    (plots, [], "name a file of results"),
    (plots, ["none/facts.jsonl"], "name a file of results"),
    (compare, ["fact"], "name an experiment"),
    (compare, ["facts", "--seeds=0"], "--seeds=0 must be at least 1"),
    (compare, ["facts", "--models=dense,moa"], "--models=moa must be one of dense, "),
    (compare, ["summary", "--seeds=5"], "unknown option --seeds"),
    (compare, ["teach", "--models=none"], "must be one of tokens, hash"),
])
def test_a_mistake_is_one_line_and_status_2(program, argv, message, capsys):
    assert_fails(lambda: program.main(argv), message, capsys)


# --- erase and teach ----------------------------------------------------------------------------------------

def test_erase_and_teach_measure_and_resume(trained, capsys, tmp_path, monkeypatch):
    """One line per finished run; the same command adds nothing. The figures can be drawn from the lines."""
    config, data = TrainConfig(**parse(TrainConfig, SMALL)[1]), corpus.load_dataset("facts")
    out = trained("--max_steps=1")
    monkeypatch.setattr(facts_edited, "trained_model", lambda *_: (*load(out)[:2], config, data))
    monkeypatch.setattr(facts_edited, "SIZES", (4, 16))
    monkeypatch.setattr(facts_edited, "LRS", {"sparse": (30.0,), "lora": (1e-3,), "full, shuffled": (1e-4,)})
    monkeypatch.setattr(facts_edited, "PEOPLE", {"erase": 1, "teach": 1})
    monkeypatch.setattr(facts_edited, "STEPS", 1)
    monkeypatch.setattr(facts_edited, "ASKED", 20)
    lines = {}
    for word, seeds, count in (("erase", 1, 1), ("teach", 2, 6)):
        path = tmp_path / f"{word}.jsonl"
        for _ in range(2):
            compare.main([word, "--models=tokens", f"--seeds={seeds}", f"--results={tmp_path}"])
            lines[word] = read_json_lines(path)
            assert len(lines[word]) == count
        assert "| tokens |" in capsys.readouterr().out
        plots.main([str(path)])
        assert path.with_suffix(".png").stat().st_size > 10_000
    for row in lines["erase"]:
        assert {point["slots"] for point in row["points"]} == {0, 4, 16} and row["points"][0]["people"] >= 1
    for row in lines["teach"]:
        assert row["before"]["loss"] != row["after"]["loss"], row["run"]


def test_the_model_of_erase_and_teach_is_that_of_make_train():
    ours, theirs = TrainConfig(**EDITED["tokens"]), TrainConfig(**PRESETS["facts"])
    assert replace(ours, eval_interval=theirs.eval_interval, keep=theirs.keep, resume=False) == theirs


def test_the_other_seeds_use_the_best_learning_rate_of_the_first():
    def row(seed, lr, new, old):
        return {"run": {"seed": seed, "lr": lr}, "before": {"old": 0.9}, "after": {"new": new, "old": old}}
    best = facts_edited.best_lr
    assert best([row(1, 3, 0.8, 0.9), row(1, 10, 0.7, 0.9), row(2, 10, 1.0, 0.9)]) == 3
    assert best([row(1, 3, 0.9, 0.8), row(1, 10, 1.0, 0.7), row(1, 30, 0.5, 0.9)]) == 3


def test_low_rank_changes_start_at_nothing(trained):
    model, encoding, _ = load(trained("--max_steps=1"))
    x, y = edit.question_batch(model, encoding, corpus.load_dataset("facts").questions[0])
    before, count = edit.log_probability(model, x, y), sum(p.numel() for p in model.parameters())
    added = facts_edited.add_low_rank([part for part in model.modules() if isinstance(part, nn.Linear)], 2)
    torch.testing.assert_close(edit.log_probability(model, x, y), before)
    size = sum(p.numel() for p in added)
    assert size == sum(p.numel() for p in model.parameters()) - count
