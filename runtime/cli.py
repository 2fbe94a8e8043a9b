"""
From a dataclass to a command line: every field is an option, and its comment is the option's help.

    @dataclass
    class Config:
        # --- model
        n_layer: int = 3  # Transformer blocks

    @command
    def main(argv=None):
        preset, options = parse(Config, argv)
        config = build(Config, preset | options)

This main understands --n_layer=4, --n_layer 4 and --help. Help shows the option under the heading "model".

A user's mistake is a UserError, which is a ValueError. `command` turns it into one line on stderr and exit
status 2, as it does with what the machine lacks (see one_line). Others are bugs, with a traceback.
"""

import argparse
import contextlib
import dataclasses
import difflib
import functools
import inspect
import json
import math
import os
import re
import signal
import sys
import threading
import typing
from pathlib import Path

if sys.platform == "win32":  # memory.py, pool.py and kernel.py do not import this file, and run there
    sys.exit("error: nanoPKM needs Linux or a Mac: on Windows, use WSL")


class UserError(ValueError):
    """A mistake of the user. The message is one line that says what to do, also if it quotes two lines."""

    def __init__(self, message):
        super().__init__(str(message).replace("\n", "\\n"))


def fail(message) -> typing.NoReturn:
    raise UserError(message) from None


# What PyTorch and Triton say in a RuntimeError, and what to do
OF_TORCH = {"can't allocate memory|out of memory|CUBLAS_STATUS_ALLOC_FAILED": "out of memory: {}",
            "Failed to find C compiler": "Triton needs a C compiler, as in the package gcc: {}",
            "no kernel image is available": "this GPU needs another PyTorch, or --device=cpu: {}"}


def one_line(error: BaseException) -> str | None:
    """What the machine lacks as one line, such as "notes.txt: Permission denied". Other errors: None."""
    text = " ".join(str(error).split("\n")[0].split())  # torch adds advice
    if isinstance(error, OSError):
        text = error.strerror or text
        return f"{error.filename}: {text}" if error.filename else text
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".removesuffix(": ")
    lines = [line for pattern, line in OF_TORCH.items() if re.search(pattern, text)]
    return lines[0].format(text) if lines and isinstance(error, RuntimeError) else None


@contextlib.contextmanager
def handle_signals(handler, *numbers: int):
    """
    In the `with` block, handler(number, frame) handles these signals. An ignored SIGHUP stays ignored: nohup
    says so. Python handles signals only in its main thread, so in other threads nothing changes.
    """
    is_main = threading.current_thread() is threading.main_thread()
    old_handlers = {number: signal.getsignal(number) for number in numbers if is_main}
    for number, old in old_handlers.items():
        if old is not signal.SIG_IGN or number == signal.SIGINT:  # a shell's background jobs ignore SIGINT
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, old in old_handlers.items():
            signal.signal(number, old)


def printable(text: str) -> str:
    """Shows the characters that command a terminal as signs: ESC as ␛. Line ends and tabs stay."""
    return text.translate({i: 0x2400 + i for i in range(32) if chr(i) not in "\t\n"}
                          | {ord("\r"): None, 127: 0x2421} | dict.fromkeys(range(128, 160), 0xFFFD))


def print_text(text: str, end: str = "\n") -> None:
    """For text of a corpus, a model or a user, which may have characters that command a terminal."""
    print(printable(text), end=end, flush=True)


def end_quietly(kind, error, traceback, other_errors=sys.excepthook) -> None:
    """Ctrl-C while a program imports PyTorch, which takes seconds: `command`, which knows it, comes later."""
    if not issubclass(kind, KeyboardInterrupt):
        return other_errors(kind, error, traceback)
    print("\ninterrupted" if os.environ.get("LOCAL_RANK") in (None, "", "0") else "", file=sys.stderr)
    raise SystemExit(130)


sys.excepthook = end_quietly


def drop_output() -> None:
    """Nobody can read the output any more. Drops it, also what waits in Python's buffer."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def command(main):
    """
    Decorates the main function of a program. A mistake becomes one line on stderr and exit status 2. If all
    processes make the same mistake, one process per machine prints it. Ctrl-C: one line, and status 130.
    SIGTERM and SIGHUP end the program as an exception does: what it has half written goes.
    """
    def end(number, frame):
        raise SystemExit(128 + number)

    @functools.wraps(main)
    def run(*arguments, **options):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # prints "?" for what the terminal cannot show
        is_first = os.environ.get("LOCAL_RANK") in (None, "", "0")
        try:
            try:
                with handle_signals(end, signal.SIGTERM, signal.SIGHUP):
                    return main(*arguments, **options)
            finally:
                sys.stdout.flush()  # here, because an error at exit would be a traceback
        except KeyboardInterrupt:
            line, status = "\ninterrupted" if is_first else "", 130
        except UserError as error:
            line, status = f"error: {error}" if is_first else "", 2
        except BrokenPipeError:  # as in `python sample.py | head`: nobody reads the output
            line, status = "", 141
        except Exception as error:
            if not (problem := one_line(error)):
                raise
            line, status = f"error: {problem}", 2
        try:
            sys.stdout.flush()
        except OSError:
            drop_output()  # otherwise Python would try again at exit
        if line:
            print(printable(line), file=sys.stderr)
        raise SystemExit(status)
    return run


def read_lines(path: Path | str) -> list[str]:
    """The lines of a text file, which must be UTF-8, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 ({error.reason} near byte {error.start}): convert it first")


def read_json_lines(path: Path | str) -> list[dict]:
    """
    The JSON objects in a file, one per line; [] if there is no file. Lines that are no JSON objects are left
    out: a killed program may have cut one short.
    """
    objects = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(ValueError, RecursionError):  # not JSON, or not UTF-8
            objects.append(json.loads(line))
    return [x for x in objects if isinstance(x, dict)]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(message)


def _option(kind) -> dict:
    """The arguments of argparse's add_argument for a field of the type `kind`."""
    def boolean(text):  # in its error, argparse shows the name of this function, and of the next
        return bool(("false", "true").index(text.lower()))

    def list_with_commas(text):
        return tuple(typing.get_args(kind)[0](item) for item in text.split(",") if item)

    if kind is bool:
        return dict(type=boolean, nargs="?", const=True, metavar="BOOL")
    if typing.get_origin(kind) is typing.Literal:
        return dict(choices=typing.get_args(kind))
    if kind == tuple[str, ...]:  # also --input=a --input=b
        return dict(nargs="*", metavar="TEXT", action="extend")
    if typing.get_origin(kind) is tuple:
        return dict(type=list_with_commas, metavar="LIST")
    return dict(type=kind, metavar=kind.__name__.upper())


def first_word(argv: list[str] | None, words, doc: str, kind: str) -> tuple[str, list[str]]:
    """Returns the command line's first word, which must be in `words`, and the rest. --help prints `doc`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(doc.strip())
        raise SystemExit
    if not argv or argv[0] not in words:
        wrong = f"{argv[0]} is not {kind}: " if argv and not argv[0].startswith("-") else ""
        fail(f"{wrong}name {kind}, then its options: {'|'.join(words)}; --help explains them")
    return argv[0], argv[1:]


def _help_of(cls) -> dict[str, tuple[str, str]]:
    """
    {field: (its group, its comment or "")}, from the source of a dataclass and of those it extends. A field
    that is defined again keeps its comment if it has no new one.
    """
    fields: dict[str, tuple[str, str]] = {}
    line = r"^    (?:# --- (.+)|(\w+):.*?(?:  # (.*))?)$"
    for base in reversed(cls.__mro__[:-1]):
        group = "options"
        for heading, name, comment in re.findall(line, inspect.getsource(base), re.MULTILINE):
            group = heading or group
            fields[name] = group, comment or fields.get(name, ("", ""))[1]
    return fields


def parse(cls, argv: list[str] | None = None, presets: dict[str, dict] | None = None, description: str = "",
          word: str = ""):
    """
    Reads the command line's options, which are the fields of the dataclass `cls`. It may also be an object
    with the defaults. Returns two dicts: the values of the preset, and the values that the user gave.

    presets: {name: {field: value}}. --preset=NAME chooses one; the default is the first.
    Types: int, float, str, bool, Literal, tuple[int, ...] (--name=1,2) and tuple[str, ...] (--name a b).
    word: what stands before the options, see first_word.
    """
    argv = sys.argv[1:] if argv is None else argv
    first, preset = _Parser(add_help=False, allow_abbrev=False), {}
    if presets:  # the preset comes first: --help shows its values as defaults
        first.add_argument("--preset", choices=presets, default=next(iter(presets)),
                           help="a set of defaults, shown below (default: %(default)s)")
        preset = presets[first.parse_known_args(argv)[0].preset]
    layout = functools.partial(argparse.RawDescriptionHelpFormatter, max_help_position=34, width=120)
    usage = " ".join(filter(None, ("%(prog)s", word, "[--name=value ...]")))
    parser = _Parser(usage=usage, description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS, formatter_class=layout, parents=[first])
    defaults = {field.name: getattr(cls, field.name) for field in dataclasses.fields(cls)} | preset
    cls = cls if isinstance(cls, type) else type(cls)
    kinds, helps = typing.get_type_hints(cls), _help_of(cls)
    groups: dict[str, typing.Any] = {"options": parser}
    for name, kind in kinds.items():
        (group, comment), default = helps[name], defaults[name]
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{comment} (default: {default if default != '' else f'empty, as in --{name}='})".lstrip()
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name}", help=text.replace("%", "%%"), **_option(kind))

    # --files=a b is --files a b. What begins with - would then be an option
    lists = tuple(f"--{name}=" for name, kind in kinds.items() if kind == tuple[str, ...])
    argv = [part for text in argv
            for part in (text.split("=", 1) if text.startswith(lists) and "=-" not in text else [text])]
    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            fail(f"{name} is not an option: every option has the form --name=value, and a "
                 "value of several words is in quotes")
        similar = difflib.get_close_matches(name, [f"--{field}" for field in (*kinds, "preset", "help")], n=1)
        fail(f"unknown option {name}: " + (f"did you mean {similar[0]}?" if similar else "see --help"))
    return preset, {name: tuple(filter(None, value)) if isinstance(value, list) else value
                    for name, value in vars(options).items() if name != "preset"}


def at_least(low: float, config, *names: str) -> None:
    """For __post_init__ of a dataclass: a ValueError if a field is below `low`, nan or infinite."""
    for name in names:
        value = getattr(config, name)
        if not low <= value < math.inf:
            rule = "be finite" if value == math.inf else f"be at least {low}" if low else "not be negative"
            raise ValueError(f"{name}={value} must {rule}")


def check_choices(config) -> None:
    """For __post_init__ of a dataclass: a ValueError if a Literal field has a value that it does not list."""
    for name, kind in typing.get_type_hints(type(config)).items():
        if typing.get_origin(kind) is typing.Literal and getattr(config, name) not in typing.get_args(kind):
            choices = ", ".join(map(str, typing.get_args(kind)))
            raise ValueError(f"{name}={getattr(config, name)} must be one of {choices}")


def build(function, values: dict):
    """function(**values). A ValueError becomes a UserError; its message must start with an option's name."""
    try:
        return function(**values)
    except ValueError as error:
        fail(f"--{error}")
