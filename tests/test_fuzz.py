"""Files that were damaged at random: a program works, or says in one line what is wrong. No traceback."""

import random
import shutil

import pytest

import edit
import sample
from data import corpus


def damage(whole: bytes, rng: random.Random) -> bytes:
    """Flips bits, cuts, repeats, or puts something else in the place of a number, a word or a line."""
    how, place = rng.randrange(6), rng.randrange(len(whole) + 1)
    if how == 0:
        return whole[:place]
    if how == 1:
        return whole[:place] + whole[max(0, place - 9):]
    if how == 2:
        return b"".join(bytes([byte ^ (1 << rng.randrange(8))]) if rng.random() < 3 / len(whole) else
                        bytes([byte]) for byte in whole)
    other = rng.choice([b"-1", b"1e999", b"null", b'"', b"{}", b"[[[", b"\xff", b"\0", b"9" * 30, b"\n", b""])
    end = min(len(whole), place + rng.randrange(1, 20))
    if how == 3:
        place, end = (whole.find(b":", place) + 1, whole.find(b",", place))
    return whole[:place] + other + whole[end:]


@pytest.fixture
def folders(ended, facts_folder, tmp_path, monkeypatch):
    """A run and its corpus, which may be damaged."""
    data = shutil.copytree(facts_folder, tmp_path / "data")
    monkeypatch.setattr(corpus, "DATA", data)
    shutil.rmtree(ended.out / "step_000003")
    return ended.out, data / "facts"


def works_or_says_why(command, capsys) -> None:
    capsys.readouterr()
    try:
        command()
    except SystemExit as stop:
        err = capsys.readouterr().err
        assert stop.code == 2 and err.startswith("error: ") and err.count("\n") == 1, err


@pytest.mark.parametrize("name", ["data/meta.json", "data/qa.jsonl", "data/val.bin", "out/meta.json",
                                  "out/model.pt", "out/pool_0of1.pt"])
@pytest.mark.parametrize("count", [6, pytest.param(100, marks=pytest.mark.slow)])
def test_asking_a_damaged_run(name, count, folders, capsys):
    out, data = folders
    kind, _, file = name.partition("/")
    path = (data if kind == "data" else out / "step_000006") / file
    whole, rng = path.read_bytes(), random.Random(name)
    for i in range(count):
        path.write_bytes(damage(whole, rng))
        command = (lambda: sample.main([f"--out_dir={out}", "--questions=2"]),
                   lambda: edit.main(["find", f"--out_dir={out}", "--question=What did Ada study?"]))[i % 2]
        works_or_says_why(command, capsys)


@pytest.mark.parametrize("count", [6, pytest.param(50, marks=pytest.mark.slow)])
def test_training_again_with_a_damaged_log_or_corpus(count, ended, folders, capsys):
    out, data = folders
    paths = [out / "log.jsonl", data / "train.bin", data / "meta.json"]
    files, rng = {path: path.read_bytes() for path in paths}, random.Random(0)
    for i in range(count):
        path = paths[i % len(paths)]
        path.write_bytes(damage(files[path], rng))
        works_or_says_why(lambda: ended("--resume", "--max_steps=6"), capsys)
        path.write_bytes(files[path])
