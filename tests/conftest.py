import json
import os
import shutil
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # the models are tiny: a second thread would only wait
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # a model that does not exist is an error at once
import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernel.py imports Triton

import train  # noqa: E402
from data import corpus, prepare  # noqa: E402

SMALL = [
    "--block_size=32",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--mem_layers=1",
    "--mem_num_keys=8",
    "--mem_heads=2",
    "--mem_knn=4",
    "--mem_key_dim=8",
    "--batch_size=4",
    "--max_steps=6",
    "--eval_interval=3",
    "--eval_batches=2",
    "--eval_questions=20",
    "--log_interval=1",
    "--warmup_steps=2",
    "--device=cpu",
]


@pytest.fixture(scope="session")
def facts_folder(tmp_path_factory):
    """A small corpus of facts, made once."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(corpus, "DATA", folder)
        prepare.main(["facts", "--people=16", "--exposures=30", "--held_out=0.2"])
    return folder


@pytest.fixture
def run(facts_folder, tmp_path, monkeypatch):
    """run(options) trains a small model on a small corpus, in the folder run.out."""
    monkeypatch.setattr(corpus, "DATA", facts_folder)

    def run(*options, out=tmp_path / "out"):
        train.main([*SMALL, f"--out_dir={out}", *options])

    run.out = tmp_path / "out"
    return run


@pytest.fixture(scope="session")
def trained_once(facts_folder, tmp_path_factory):
    """trained_once(options) trains a small model, once per session and options. Do not change the folder."""
    folders = {}

    def trained_once(*options):
        if options not in folders:
            folders[options] = tmp_path_factory.mktemp("run") / "out"
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(corpus, "DATA", facts_folder)
                train.main([*SMALL, f"--out_dir={folders[options]}", *options])
        return folders[options]
    return trained_once


@pytest.fixture
def trained(run, trained_once):
    """trained(options) copies a run that has ended, 6 steps with checkpoints at 3 and 6, to run.out."""
    return lambda *options, out=run.out: shutil.copytree(trained_once(*options), out)


@pytest.fixture
def unchanged(trained_once):
    """The folder of the run that `ended` copies. Do not change it."""
    return trained_once()


@pytest.fixture
def ended(run, trained):
    """As run, and run.out is a copy of the run that has ended."""
    trained()
    return run


@pytest.fixture
def half(ended):
    """As run, and run.out is the run as it was after step 3."""
    shutil.rmtree(ended.out / "step_000006")
    return ended


def log(out: Path) -> list[dict]:
    """The lines of a log, without times. A GPU adds up the use of slots in any order, so it is rounded."""
    lines = [json.loads(line) for line in open(out / "log.jsonl")]
    return [
        {key: round(value, 6) if key == "kl_from_uniform" else value for key, value in line.items()
         if key not in ("seconds", "tokens_per_second")}
        for line in lines
    ]


def tensors(folder: Path) -> dict:
    """Every tensor and number of a checkpoint, by its path."""
    found = {}

    def walk(at, name):
        if isinstance(at, dict):
            for key, value in at.items():
                walk(value, f"{name}/{key}")
        elif isinstance(at, (list, tuple)):
            for i, value in enumerate(at):
                walk(value, f"{name}/{i}")
        else:
            found[name] = at

    for path in sorted(folder.glob("*.pt")):
        walk(torch.load(path, weights_only=True), path.name)
    return found


def assert_same_checkpoint(a: Path, b: Path):
    one, two = tensors(a), tensors(b)
    assert one.keys() == two.keys() and len(one) > 20
    for name, value in one.items():
        assert torch.equal(value, two[name]) if torch.is_tensor(value) else value == two[name], name


def assert_fails(command, message, capsys, also=""):
    """Running the command is a user's mistake: one line on stderr, and exit status 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        command()
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err
    assert message in err and also in err, err
