"""evidence.py: a small experiment from the plan to the table, and what the table says of made-up runs."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time

import pytest

import evidence
import plot
from data import prepare
from evidence import (
    EXPERIMENTS,
    MODELS,
    EvidenceConfig,
    best_lr,
    bits_a_parameter,
    kept,
    next_runs,
    speed,
    tokens_to,
    told,
)
from model import GPT
from train import TrainConfig

TINY = dict(
    dataset="facts-tiny",
    block_size=32,
    n_head=2,
    n_embd=16,
    mem_num_keys=8,
    mem_heads=2,
    mem_knn=4,
    mem_key_dim=8,
    batch_size=4,
    max_steps=4,
    eval_interval=2,
    eval_batches=1,
    eval_questions=9,
    log_interval=1,
)


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A copy of the project, in which the experiment `facts` has two tiny models and tiny data."""
    for path in [*evidence.ROOT.glob("*.py"), *evidence.ROOT.glob("data/*.py")]:
        copy = tmp_path / path.relative_to(evidence.ROOT)
        copy.parent.mkdir(exist_ok=True)
        shutil.copy(path, copy)
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    for module in (evidence, prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    models = {"dense": dict(mem_layers=()), "memory+": dict(mem_layers=(1, 2))}
    corpus = prepare.facts, prepare.FactsConfig(name="facts-tiny", people=20)
    facts = dict(corpus=corpus, options=TINY, models=models)
    monkeypatch.setattr(evidence, "EXPERIMENTS", {"facts": facts})
    before = signal.getsignal(signal.SIGTERM)
    yield tmp_path
    signal.signal(signal.SIGTERM, before)


def lines(folder):
    return [json.loads(line) for line in open(folder / "results" / "evidence_facts.jsonl")]


def test_an_experiment_from_its_plan_to_its_table(tiny, capsys, monkeypatch):
    evidence.main(["facts", "--lrs=6e-3", "--seeds=2"])
    rows = lines(tiny)
    assert {(row["model"], row["seed"]) for row in rows} == {
        (m, s) for m in ("dense", "memory+") for s in (1, 2)
    }
    for row in rows:
        assert [point["step"] for point in row["curve"]] == [0, 2, 4]
        assert [point["tokens"] for point in row["curve"]] == [0, 256, 512]
        assert row["lr"] == 6e-3 and row["tokens_per_second"] > 0
        assert sum(row["asked"].values()) == 80 and row["asked"]["held_out"] == 8
        config = TrainConfig(**TINY, **evidence.EXPERIMENTS["facts"]["models"][row["model"]], vocab_size=300)
        assert row["parameters"]["memory"] == GPT(config).count_parameters()["memory"]
        assert ("slots_used" in row["curve"][-1]) == (row["model"] == "memory+")
    first, second = (next(r for r in rows if (r["model"], r["seed"]) == ("dense", seed)) for seed in (1, 2))
    assert first["curve"][-1]["val_loss"] != second["curve"][-1]["val_loss"]
    assert list((tiny / "out" / "evidence" / "facts").iterdir()) == [], (
        "no checkpoint of a finished run stays"
    )
    printed = capsys.readouterr().out
    for part in ("0 of 4 runs done", "2 of 4 runs done, about", "| memory+ |", " ± ", "at least 3 times"):
        assert part in printed

    # finished runs are not run again, whatever the command; a model that is not what it was is
    monkeypatch.setattr(evidence, "start", None)
    evidence.main(["facts", "--lrs=6e-3", "--seeds=2"])
    evidence.main(["table"])
    assert lines(tiny) == rows and capsys.readouterr().out.count("| memory+ |") == 2
    evidence.EXPERIMENTS["facts"]["models"]["dense"]["n_embd"] = 32
    path = tiny / "results" / "evidence_facts.jsonl"
    assert {row["model"] for row in evidence.read_rows(path)} == {"memory+"}
    corpus = prepare.FactsConfig(name="facts-tiny", people=20, seed=2)
    evidence.EXPERIMENTS["facts"]["corpus"] = prepare.facts, corpus
    assert evidence.read_rows(path) == [], "the corpus is another, though the runs' seeds are the same"


@pytest.mark.parametrize("steps", [2, 4])
def test_a_run_that_was_stopped_goes_on(tiny, monkeypatch, steps):
    """After its first checkpoint; and one that ended while nobody watched is a result, not run again."""
    start, evaluated = evidence.start, []

    def stopping(experiment, run, out_dir, jobs):
        monkeypatch.setitem(evidence.EXPERIMENTS[experiment]["options"], "max_steps", steps)
        start(experiment, run, out_dir, jobs).wait()
        evaluated.extend(line for line in map(json.loads, open(out_dir / "log.jsonl")) if "val_loss" in line)
        monkeypatch.setitem(evidence.EXPERIMENTS[experiment]["options"], "max_steps", 4)
        raise KeyboardInterrupt

    options = ["facts", "--models=memory+", "--lrs=6e-3", "--seeds=1"]
    monkeypatch.setattr(evidence, "start", stopping)
    with pytest.raises(SystemExit) as stop:
        evidence.main(options)
    assert stop.value.code == 130 and not (tiny / "results" / "evidence_facts.jsonl").exists()
    monkeypatch.setattr(evidence, "start", start)
    evidence.main(options)
    (row,) = lines(tiny)
    assert [point["step"] for point in row["curve"]] == [0, 2, 4]
    for line, point in zip(evaluated, row["curve"], strict=steps == 4):
        assert line["seconds"] == point["seconds"], "it was not run again"


def test_sigterm_ends_the_runs_too_once_they_have_saved(tiny, monkeypatch):
    monkeypatch.setitem(evidence.EXPERIMENTS["facts"]["options"], "max_steps", 1_000_000)
    monkeypatch.setitem(evidence.EXPERIMENTS["facts"]["options"], "eval_interval", 1_000_000)
    start, going = evidence.start, []

    def noting(experiment, run, out_dir, jobs):
        def end_once_it_trains():
            log = out_dir / "log.jsonl"
            while not log.exists() or '"loss"' not in log.read_text():
                time.sleep(0.1)
            os.kill(os.getpid(), signal.SIGTERM)

        threading.Thread(target=end_once_it_trains).start()
        going.append((start(experiment, run, out_dir, jobs), out_dir))
        return going[-1][0]

    monkeypatch.setattr(evidence, "start", noting)
    with pytest.raises(SystemExit) as stop:
        evidence.main(["facts", "--models=memory+", "--lrs=6e-3", "--seeds=1"])
    ((process, out_dir),) = going
    assert stop.value.code == 130 and process.returncode == 0 and list(out_dir.glob("step_*"))


def test_a_run_that_fails_is_named(tiny, monkeypatch, capsys):
    monkeypatch.setitem(evidence.EXPERIMENTS["facts"]["models"]["dense"], "block_size", 10_000)
    with pytest.raises(SystemExit) as stop:
        evidence.main(["facts", "--models=dense"])
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and "the run of dense stopped: see" in err
    printed = next((tiny / "out").glob("**/printed.txt")).read_text()
    assert "--block_size=10000 is too large" in printed


def test_a_run_that_diverges_is_a_result_and_the_plan_goes_on(tiny, monkeypatch, capsys):
    """And a line that was cut short does not take the next with it."""
    monkeypatch.setitem(evidence.EXPERIMENTS["facts"]["options"], "grad_clip", 0.0)
    monkeypatch.setitem(evidence.EXPERIMENTS["facts"]["options"], "warmup_steps", 0)
    (tiny / "results").mkdir()
    (tiny / "results" / "evidence_facts.jsonl").write_text('{"model": "dense", "lr"')
    evidence.main(["facts", "--models=dense", "--lrs=1e30,3e-3", "--seeds=1", "--jobs=1"])
    rows = evidence.read_rows(tiny / "results" / "evidence_facts.jsonl")
    assert [(row["lr"], len(row["curve"])) for row in rows] == [(1e30, 0), (3e-3, 3), (1.5e-3, 3)]
    assert capsys.readouterr().out.count("| dense |") == 1
    assert kept(rows)["dense"][0]["lr"] in (3e-3, 1.5e-3) and kept(rows[:1]) == {}


def test_a_line_from_before_an_option_came_counts_if_the_option_has_its_default(tiny):
    path = tiny / "results" / "evidence_facts.jsonl"
    path.parent.mkdir()
    options = evidence.all_options("facts", "dense")
    path.write_text(
        "".join(
            json.dumps(made_up(options={k: v for k, v in options.items() if k != left_out})) + "\n"
            for left_out in ("mem_mode", "mem_mode", "zipf", "n_embd", "people")
        )
    )
    # the last two, of TINY and of the corpus, are not the default; and the first two are the same run
    (row,) = evidence.read_rows(path)
    assert row["options"].keys() == options.keys() - {"zipf"}


def test_data_made_with_other_options_is_refused(tiny, capsys):
    prepare.main(["facts", "--name=facts-tiny", "--people=7"])
    with pytest.raises(SystemExit):
        evidence.main(["facts"])
    assert "was made with other options" in capsys.readouterr().err


def test_runs_of_another_corpus_are_not_mixed_with_ours(tiny, capsys):
    """Guards stdlib, which is another one with each version of Python."""
    path = tiny / "results" / "evidence_facts.jsonl"
    path.parent.mkdir()
    options = evidence.all_options("facts", "dense")
    path.write_text(json.dumps(made_up(options=options, train_tokens=7)) + "\n")
    with pytest.raises(SystemExit):
        evidence.main(["facts"])
    assert "saw another corpus" in capsys.readouterr().err


def made_up(model="dense", lr=1e-3, seed=1, recall=0.5, often=0.5, **changes):
    def point(tokens, share, often):
        by_exposure = {"4": 0.1, "8": often, "16": 2 * often}
        return dict(step=tokens // 100, tokens=tokens, val_loss=6.0 - 4 * share,
                    recall={"all": share * recall, "held_out": 0.25, "by_exposure": by_exposure})

    curve = [point(0, 0, 0.01), point(600, 0.6, often**2), point(1000, 1, often)]
    return (
        dict(
            model=model,
            lr=lr,
            seed=seed,
            curve=curve,
            macs=7,
            tokens_per_second=10.0,
            asked={"4": 50, "8": 30, "16": 10, "held_out": 10},
            parameters=dict(dense=100, memory=100),
        )
        | changes
    )


def test_figures_are_drawn_from_the_lines_alone(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(plot.plt, "close", figures.append)
    path = tmp_path / "evidence_facts.jsonl"
    with open(path, "w") as f:
        for model, seed in itertools.product(MODELS, (1, 2, 3)):  # by exposures all are alike
            row = made_up(model, seed=seed, recall=0.1 * seed)
            for point in row["curve"]:
                point["kl_from_uniform"] = 0.5
            row["options"] = evidence.all_options("facts", model)
            f.write(json.dumps(row) + "\n")
    plot.plot_facts(path)
    for name in ("evidence_facts.png", "evidence_facts_more.png"):
        assert (tmp_path / name).stat().st_size > 20_000
    # lines with their spread, on each axis: against exposures; tokens, seconds and slots, and slot use
    lines = [[len(axis.containers) for axis in figure.axes] for figure in figures]
    assert lines == [[len(MODELS)], [len(MODELS), len(MODELS), 3, len(MODELS)]]
    for axis, x in zip(figures[1].axes[:2], (0.001, 100.0), strict=True):  # 1,000 tokens, at 10 a second
        for container in axis.containers:
            assert container.lines[0].get_xdata()[-1] == x
            assert math.isclose(container.lines[0].get_ydata()[-1], 0.2), "the mean of 0.1, 0.2 and 0.3"


def test_the_best_learning_rate_is_chosen_once_all_are_tried():
    config = EvidenceConfig(lrs=(1e-3, 3e-3), seeds=3)
    assert next_runs(config, ["dense"], []) == [("dense", 1e-3, 1), ("dense", 3e-3, 1)]
    rows = [made_up(lr=3e-3, recall=0.6)]
    assert next_runs(config, ["dense", "moe"], rows) == [
        ("dense", 1e-3, 1),
        ("moe", 1e-3, 1),
        ("moe", 3e-3, 1),
    ]
    # the best is the highest: is there a better one beyond? There is not
    rows.append(made_up(lr=1e-3, recall=0.5))
    assert next_runs(config, ["dense"], rows) == [("dense", 6e-3, 1)]
    assert next_runs(config, ["dense"], [*rows, made_up(lr=0.5e-3, recall=0.7)]) == [("dense", 0.25e-3, 1)]
    rows.append(made_up(lr=6e-3, recall=0.55))
    assert next_runs(config, ["dense"], rows) == [("dense", 3e-3, 2), ("dense", 3e-3, 3)]
    assert next_runs(EvidenceConfig(lrs=(3e-3,), seeds=1), ["dense"], rows[:1]) == []
    assert next_runs(EvidenceConfig(lrs=(6e-3,), seeds=2), ["dense"], rows) == [("dense", 6e-3, 2)]
    # of equal recalls the validation loss decides
    same = [made_up(lr=lr, recall=1.0) for lr in (1e-3, 3e-3)]
    same[1]["curve"][-1]["val_loss"] = 1.9
    assert best_lr(same, "dense") == best_lr(same[::-1], "dense") == 3e-3
    # another seed that does worse changes no choice
    rows.append(made_up(lr=3e-3, seed=2, recall=0.1))
    assert next_runs(config, ["dense"], rows) == [("dense", 3e-3, 3)]
    assert kept(rows) == {"dense": [rows[0], rows[3]]}
    # without questions the validation loss decides
    for row in rows:
        del row["curve"][-1]["recall"]
    rows[1]["curve"][-1]["val_loss"] = 1.0
    assert next_runs(config, ["dense"], rows) == [("dense", 0.5e-3, 1)], "which is the lowest now"
    # where all diverged, lower rates are tried, whichever ended first
    rows = [made_up(lr=lr, curve=[]) for lr in (3e-3, 1e-3)]
    assert next_runs(config, ["dense"], rows) == [("dense", 0.5e-3, 1)]


def test_measures_are_as_defined():
    row = made_up()
    assert told(row, 8, 32) == (0.5 * 30 + 1.0 * 10) / 40
    assert told(row, 4, 8) == 0.1 and told(row, 8, 32, point=1) == (0.25 * 30 + 0.5 * 10) / 40
    assert math.isnan(told(row, 1, 4)) and evidence.spread([0.5, told(row, 1, 4)]) == "-"
    bits = (3 * math.log2(50) + math.log2(336)) / 4  # three attributes of 50 values, and birthdays
    assert math.isclose(bits_a_parameter(row), (0.5 * 90 + 0.25 * 10) * bits / 200)
    assert tokens_to(0.25, row["curve"]) == 500 and math.isnan(tokens_to(0.51, row["curve"]))
    assert speed([row, made_up(tokens_per_second=20.0)]) == 20


def test_bars_say_what_is_met_and_what_is_not(capsys, monkeypatch):
    def table(often=0.5, speed=10.0, **recall):
        rows = {"dense": [made_up(recall=0.25, often=0.15)]}
        rows |= {
            name: [made_up(name, recall=value, often=often, tokens_per_second=speed)]
            for name, value in recall.items()
        }
        evidence.bars(rows, 0.25)
        return capsys.readouterr().out

    out = table(0.44, **{"memory+": 0.6, "memory+-short": 0.3, "moe": 0.5, "memory+16x": 0.55})
    assert "yes  at least 3 times dense's recall of what was told 8 to 31 times, after 0.0006 M" in out
    assert "8 to 31 times, after 0.001 M tokens: 2.9" in out and "no   at least 3 times" in out
    assert "yes  at least twice" in out and "yes  above moe" in out
    assert "rises with the number of slots: no, 0.600, 0.550" in out
    assert "yes  at most 0.6 of the tokens to dense's recall: 0.417" in out
    assert "no   at least 1.4 times dense's recall in dense's time: 1.20, 100 and 100 s" in out
    assert "after 0.001 M tokens: 3.3, 0.625 and 0.188" in table(**{"memory+": 0.6})
    assert "yes  at least 1.4 times" in table(**{"memory+": 0.6, "memory+-short": 0.4})
    assert "no   at least 1.4 times" in table(speed=9.0, **{"memory+": 0.6, "memory+-short": 0.4})
    assert "no   above dense-2x: 0.600, 0.700" in table(**{"memory+": 0.6, "dense-2x": 0.7})


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_models_that_are_compared_cost_alike(experiment):
    """Multiply-adds of all but dense-2x within 5%, on facts 1%; and parameters of all of one size."""
    configs = {
        model: TrainConfig(**evidence.train_options(experiment, model), vocab_size=600)
        for model in EXPERIMENTS[experiment]["models"]
    }
    macs = {model: config.macs_per_token() for model, config in configs.items()}
    if "dense-2x" in macs:
        assert math.isclose(macs.pop("dense-2x"), 2 * macs["dense"], rel_tol=0.05)
    assert max(macs.values()) <= (1.01 if experiment == "facts" else 1.05) * min(macs.values())
    counts = [GPT(config).count_parameters() for model, config in configs.items()
              if model not in ("dense", "dense-2x", "memory+4x", "memory+16x")]
    parameters = [count["dense"] + count["memory"] for count in counts]
    assert len(parameters) > 1 and max(parameters) <= 1.05 * min(parameters)


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name an experiment"),
        (["fact"], "name an experiment"),
        (["facts", "--seeds=0"], "--seeds=0 must be at least 1"),
        (["facts", "--lrs="], "--lrs needs one learning rate"),
        (["facts", "--models=dense,moa"], "--models=moa must be of dense, "),
        (["facts", "--job=2"], "did you mean --jobs?"),
        (["table", "--seeds=5"], "table has --results only"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        evidence.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
