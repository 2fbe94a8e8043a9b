"""runtime/cli.py: options arrive as they were typed, and each mistake is one line and exit status 2."""

from dataclasses import dataclass
from typing import Literal

import pytest

from runtime.cli import UserError, build, check_choices, command, fail, parse


@dataclass
class Base:
    n_layer: int = 3  # Transformer blocks


@dataclass
class Config(Base):
    lr: float = 1e-3  # of everything: 100% of it
    name: str = ""  # a word
    fast: bool = False  # or slow
    kind: Literal["a", "b"] = "a"  # of two
    layers: tuple[int, ...] = (1, 2)  # counted from 0
    files: tuple[str, ...] = ()  # to read

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer={self.n_layer} must be at least 1")


PRESETS = {"small": {}, "large": dict(n_layer=24, name="big")}


@pytest.mark.parametrize(
    "argv, expected",
    [
        ([], {}),
        (["--n_layer=4", "--lr", "2e-4"], dict(n_layer=4, lr=2e-4)),
        (["--fast"], dict(fast=True)),
        (["--fast=false"], dict(fast=False)),
        (["--fast", "true"], dict(fast=True)),
        (["--layers=0,3"], dict(layers=(0, 3))),
        (["--layers", "0", "3"], dict(layers=(0, 3))),
        (["--layers="], dict(layers=())),
        (["--layers"], dict(layers=())),
        (["--files", "a,b.txt", "c.txt", "--kind=b"], dict(files=("a,b.txt", "c.txt"), kind="b")),
    ],
)
def test_options(argv, expected):
    assert parse(Config, argv) == ({}, expected)
    assert build(Config, expected) == Config(**expected)


def test_presets():
    assert parse(Config, [], PRESETS) == ({}, {})
    preset, given = parse(Config, ["--preset=large", "--n_layer=2"], PRESETS)
    assert build(Config, preset | given) == Config(n_layer=2, name="big")


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--n_layers=4"], "unknown option --n_layers: did you mean --n_layer?"),
        (["--wholly_wrong=4"], "unknown option --wholly_wrong: --help lists all options"),
        (["4"], "4 is not an option"),
        (["--n_layer=four"], "--n_layer: invalid int value: 'four'"),
        (["--n_layer=1.5"], "--n_layer: invalid int value: '1.5'"),
        (["--lr=high"], "--lr: invalid float value: 'high'"),
        (["--fast=maybe"], "'maybe' must be true or false"),
        (["--kind=c"], "--kind: invalid choice: 'c'"),
        (["--layers=1,x"], "--layers: '1,x' must be ints"),
        (["--n_layer"], "--n_layer: expected one argument"),
        (["--preset=huge"], "--preset: invalid choice: 'huge'"),
        (["--n_layer=0"], "--n_layer=0 must be at least 1"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    """As a command; called from Python, it is a ValueError."""
    def read_options():
        preset, given = parse(Config, argv, PRESETS)
        build(Config, preset | given)

    with pytest.raises(SystemExit) as stop:
        command(read_options)()
    printed = capsys.readouterr()
    assert stop.value.code == 2 and printed.out == ""
    assert printed.err.startswith("error: ") and printed.err.count("\n") == 1 and message in printed.err
    with pytest.raises(ValueError, match="^"):
        read_options()
    assert capsys.readouterr().err == ""


def test_a_bug_keeps_its_traceback():
    """Guards against hiding a bug behind one line, just because it is a ValueError too."""
    @command
    def main():
        raise ValueError("not a mistake of the user")

    with pytest.raises(ValueError, match="not a mistake") as error:
        main()
    assert not isinstance(error.value, UserError)


@pytest.mark.parametrize("rank, alone, printed", [("0", False, True), ("1", False, False), ("1", True, True)])
def test_a_mistake_of_all_processes_is_printed_once(monkeypatch, capsys, rank, alone, printed):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit) as stop:
        command(fail)("no such file", alone)
    assert stop.value.code == 2
    assert capsys.readouterr().err == ("error: no such file\n" if printed else "")


def test_choices_are_checked_from_python_too():
    check_choices(Config(kind="b"))
    with pytest.raises(ValueError, match="^kind=c must be one of a, b$"):
        check_choices(Config(kind="c"))


def test_help_has_every_option_with_its_default_and_its_comment(capsys):
    with pytest.raises(SystemExit) as stop:
        parse(Config, ["--preset=large", "--help"], PRESETS, description="What it does.")
    assert stop.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for part in (
        "What it does.",
        "Transformer blocks (default: 24)",
        "of everything: 100% of it (default: 0.001)",
        "a word (default: big)",
        "counted from 0 (default: 1,2)",
        "to read (default: none)",
        "--kind {a,b}",
    ):
        assert part in text


@pytest.mark.parametrize(
    "module, config",
    [
        ("train", "TrainConfig"),
        ("sample", "SampleConfig"),
        ("data.prepare", "FactsConfig"),
        ("data.prepare", "SplitConfig"),
        ("data.prepare", "MqarConfig"),
        ("experiments.compare", "CompareConfig"),
        ("experiments.speed", "StepConfig"),
        ("experiments.plan", "PlanConfig"),
        ("data.prepare", "TextConfig"),
    ],
)
def test_every_field_of_the_project_has_its_line_of_help(module, config, capsys):
    import importlib

    with pytest.raises(SystemExit):
        parse(getattr(importlib.import_module(module), config), ["--help"])
    assert "(default: " in capsys.readouterr().out
