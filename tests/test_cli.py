"""runtime/cli.py: options arrive as they were typed, and each mistake is one line and exit status 2."""

import math
import os
import re
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from runtime.cli import UserError, at_least, build, check_choices, command, fail, parse

import pytest
from conftest import assert_fails

from runtime import cli


@dataclass
class Base:
    n_layer: int = 3  # Transformer blocks


@dataclass
class Config(Base):
    # --- other
    lr: float = 1e-3  # of everything: 100% of it
    name: str = ""  # a word
    fast: bool = False  # or slow
    kind: Literal["a", "b"] = "a"  # of two
    layers: tuple[int, ...] = (1, 2)  # counted from 0
    files: tuple[str, ...] = ()  # to read
    bare: int = 7

    def __post_init__(self):
        if self.n_layer < 1:
            raise ValueError(f"n_layer={self.n_layer} must be at least 1")


PRESETS = {"small": {}, "large": dict(n_layer=24, name="big")}


@pytest.mark.parametrize("argv, expected", [
    ([], {}),
    (["--n_layer=4", "--lr", "2e-4"], dict(n_layer=4, lr=2e-4)),
    (["--fast"], dict(fast=True)), (["--fast=false"], dict(fast=False)),
    (["--fast", "true"], dict(fast=True)),
    (["--layers=0,3"], dict(layers=(0, 3))), (["--layers="], dict(layers=())),
    (["--files", "a,b.txt", "c.txt", "--kind=b"], dict(files=("a,b.txt", "c.txt"), kind="b")),
    (["--files=a", "--lr=1", "--files", "b", "c", "--lr=2"], dict(files=("a", "b", "c"), lr=2.0)),
    (["--files=a", "b=c", "--files=-d", "--files=e=f", "g"], dict(files=("a", "b=c", "-d", "e=f", "g"))),
    (["--files=", "--name="], dict(files=(), name=""))])
def test_options(argv, expected):
    assert parse(Config, argv) == ({}, expected)
    assert build(Config, expected) == Config(**expected)


def test_presets():
    assert parse(Config, [], PRESETS) == ({}, {})
    preset, given = parse(Config, ["--preset=large", "--n_layer=2", "--bare=8"], PRESETS)
    assert build(Config, preset | given) == Config(n_layer=2, name="big", bare=8)


@pytest.mark.parametrize("argv, message", [
    (["--n_layers=4"], "unknown option --n_layers: did you mean --n_layer?"),
    (["--wholly_wrong=4"], "unknown option --wholly_wrong: see --help"),
    (["4"], "4 is not an option"), (["--name=two", "words"], "several words is in quotes"),
    (["--n_layer=four"], "--n_layer: invalid int value: 'four'"),
    (["--fast=maybe"], "--fast: invalid boolean value: 'maybe'"),
    (["--layers=1,x"], "--layers: invalid list_with_commas value: '1,x'"),
    (["--n_layer"], "--n_layer: expected one argument"),
    (["--preset=huge"], "--preset: invalid choice: 'huge'"),
    (["--n_layer=0"], "--n_layer=0 must be at least 1")])
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    """As a command; called from Python, it is a ValueError."""
    def read_options():
        preset, given = parse(Config, argv, PRESETS)
        build(Config, preset | given)

    assert_fails(command(read_options), message, capsys)
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


@pytest.mark.parametrize("rank, printed", [("0", True), ("1", False), ("", True)])
def test_a_mistake_of_all_processes_is_printed_once(monkeypatch, capsys, rank, printed):
    monkeypatch.setenv("LOCAL_RANK", rank)
    with pytest.raises(SystemExit, match="2"):
        command(fail)("no such file")
    assert capsys.readouterr().err == ("error: no such file\n" if printed else "")


def test_rules_of_numbers_and_of_choices_are_checked_from_python_too():
    check_choices(Config(kind="b"))
    with pytest.raises(ValueError, match="^kind=c must be one of a, b$"):
        check_choices(Config(kind="c"))
    for lr, rule in ((-1.0, "not be negative"), (math.nan, "not be negative"), (math.inf, "be finite")):
        with pytest.raises(ValueError, match=f"^lr={lr} must {rule}$"):
            at_least(0, Config(lr=lr), "lr")


def test_help_has_every_option_with_its_default_and_its_comment(capsys):
    """Guards an option without a comment, which somebody adds first: it was a KeyError."""
    with pytest.raises(SystemExit, match="0"):
        parse(Config, ["--preset=large", "--help"], PRESETS, "What it does.", "learn")
    text = " ".join(capsys.readouterr().out.split())
    assert text.count("options:") == 1 and " learn [--name=value ...] " in text
    for part in ("What it does.", "Transformer blocks (default: 24)", "other: --lr",
                 "of everything: 100% of it (default: 0.001)", "counted from 0 (default: 1,2)",
                 "--kind {a,b}", "--bare INT (default: 7)", "to read (default: empty, as in --files=)"):
        assert part in text


# --- files, and errors in one line --------------------------------------------------------------------------

@pytest.mark.parametrize("error, line", [
    (OSError(5, "Input/output error"), "Input/output error"), (OSError("no number"), "no number"),
    (FileNotFoundError(2, "No such file", "a.txt"), "a.txt: No such file"), (MemoryError(), "out of memory"),
    (RuntimeError("can't allocate memory: you\n\nadvice"), "out of memory: can't allocate memory: you"),
    (RuntimeError("CUDA error: no kernel image is available\nadvice"),
     "this GPU needs another PyTorch, or --device=cpu: CUDA error: no kernel image is available"),
    (RuntimeError("Failed to find C compiler."),
     "Triton needs a C compiler, as in the package gcc: Failed to find C compiler."),
    (RuntimeError("shapes differ"), None), (ValueError("out of memory"), None)])
def test_errors_in_one_line(error, line):
    assert cli.one_line(error) == line


def test_characters_that_command_a_terminal_become_signs():
    assert cli.printable("\x1b[2Ja\x00\x07\x7f\x9b1mb\r\n\té 東\u2028") == "␛[2Ja␀␇␡\ufffd1mb\n\té 東\u2028"


def test_files_of_lines(tmp_path):
    path = tmp_path / "lines"
    assert cli.read_json_lines(path) == []
    path.write_bytes('\ufeff\u00e9 a\u2028b\r\n\n{"n": 1}\n'.encode())
    assert cli.read_lines(path) == ["\u00e9 a\u2028b", "", '{"n": 1}', ""]
    path.write_bytes(b'{"n": 1}\n[2]\n\xff\n\n{"n": 2}\n' + b"[" * 100_000 + b'\n{"n": 3')
    assert cli.read_json_lines(path) == [{"n": 1}, {"n": 2}]
    with pytest.raises(UserError, match=f"^{re.escape(str(path))} is not UTF-8"):
        cli.read_lines(path)


# --- as a program -------------------------------------------------------------------------------------------

SCRIPT = """
import os, sys, time
from runtime.cli import command
phase = sys.argv[1]
if phase == "import":
    os.write(1, b"ready")
    time.sleep(60)
@command
def main():
    if phase == "wait":
        os.write(1, b"ready")
        time.sleep(60)
    for i in range(20_000 if phase == "print" else 0):
        print("\\u00e9 \\u4e2d")
    if phase == "help":
        print("help")
        sys.exit(0)
    if phase == "open":
        open("no such file")
main()
"""


@pytest.fixture
def script():
    """script(phase): starts SCRIPT."""
    def start(phase, **options):
        return subprocess.Popen([sys.executable, "-c", SCRIPT, phase], stderr=subprocess.PIPE,
                                cwd=Path(__file__).parents[1], **dict(stdout=subprocess.PIPE) | options)

    return start


@pytest.mark.parametrize("phase", ["import", "wait"])
def test_ctrl_c_is_one_line(script, phase):
    # the tests may run in a job that ignores Ctrl-C
    process = script(phase, preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))
    assert process.stdout.read(5) == b"ready"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=30)[1] == b"\ninterrupted\n" and process.returncode == 130


def test_nohup_is_left_alone():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with cli.handle_signals(lambda *arguments: pytest.fail("SIGHUP was ignored"), signal.SIGHUP,
                                signal.SIGTERM):
            assert signal.getsignal(signal.SIGTERM) != signal.SIG_DFL
            signal.raise_signal(signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_what_a_terminal_cannot_show_is_replaced(script):
    process = script("print", env=os.environ | {"PYTHONIOENCODING": "ascii"})
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0 and err == b"" and out.startswith(b"? ?\n")


@pytest.mark.parametrize("phase", ["print", "help"])
def test_output_that_nobody_reads_ends_a_program_quietly(script, phase):
    """As in `python sample.py | head -1`, also if all of the output waits in Python's buffer."""
    read, write = os.pipe()
    os.close(read)
    process = script(phase, stdout=write)
    os.close(write)
    assert process.communicate(timeout=30)[1] == b"" and process.returncode == 141


@pytest.mark.parametrize("phase, message", [
    ("print", b"error: No space left on device\n"), ("help", b"error: No space left on device\n"),
    ("open", b"error: no such file: No such file or directory\n")])
def test_an_error_of_the_system_is_one_line(script, phase, message):
    with open("/dev/full", "w") as full:
        process = script(phase, stdout=full)
        assert process.communicate(timeout=30)[1] == message and process.returncode == 2
