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
status 2. An OSError (a full disk, a missing file), too little memory and Ctrl-C are one line, too. All other
exceptions are bugs and keep their traceback.
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
import sys
import typing
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user. The message is one line that says what to do."""

    def __init__(self, message, alone: bool = False):
        super().__init__(message)
        self.alone = alone  # True: only this process made the mistake. False: all did


def fail(message, alone: bool = False) -> typing.NoReturn:
    raise UserError(message, alone) from None


def one_line(error: BaseException) -> str | None:
    """An OSError or a lack of memory as one line, such as "notes.txt: Permission denied". Else None."""
    text = " ".join(str(error).split("\n\n")[0].split())  # torch adds advice after an empty line
    if isinstance(error, OSError):
        what = error.strerror or text
        return f"{error.filename}: {what}" if error.filename else what
    if isinstance(error, MemoryError):
        return f"out of memory: {text}".removesuffix(": ")
    # torch says so in a RuntimeError: "CUDA out of memory", "DefaultCPUAllocator: can't allocate memory"
    if isinstance(error, RuntimeError) and re.search("can't allocate memory|out of memory", text):
        return f"out of memory: {text}"
    return None


def command(main):
    """
    Decorates the main function of a script. A mistake becomes one line on stderr and exit status 2. If all
    processes make the same mistake, one process per machine prints it. Ctrl-C: one line, and status 130.
    """
    @functools.wraps(main)
    def run(*arguments, **options):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # prints "?" for what the terminal cannot show
        is_first = os.environ.get("LOCAL_RANK", "0") in ("", "0") or not os.environ.get("MASTER_ADDR")
        try:
            try:
                return main(*arguments, **options)
            finally:
                if sys.stdout:
                    sys.stdout.flush()  # here, because an error at exit would be a traceback
        except KeyboardInterrupt:
            line, status, is_printed = "\ninterrupted", 130, is_first
        except UserError as error:
            line, status, is_printed = f"error: {error}", 2, is_first or error.alone
        except BrokenPipeError:  # as in `python sample.py | head`: nobody reads the output
            line, status, is_printed = "", 141, False
        except Exception as error:
            if not (problem := one_line(error)):
                raise
            line, status, is_printed = f"error: {problem}", 2, True
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:  # what cannot be printed is dropped, so that Python does not try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_printed:
            print(line, file=sys.stderr)
        raise SystemExit(status)
    return run


def python_command() -> str:
    """What to type for this Python: a path if it is in the current folder, such as .venv/bin/python."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else path


def read_lines(path: Path | str) -> list[str]:
    """The lines of a text file, which must be UTF-8, with or without a byte order mark."""
    try:
        return Path(path).read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        fail(f"{path} is not UTF-8 ({error.reason} near byte {error.start}): convert it first")


def read_json_lines(path: Path | str) -> list[dict]:
    """
    The JSON objects in a file, one per line; [] if there is no file. A killed program may have cut a line
    short: a line that is no JSON object is left out.
    """
    objects = []
    for line in Path(path).read_bytes().splitlines() if Path(path).exists() else []:
        with contextlib.suppress(ValueError):  # not JSON, or not UTF-8
            objects.append(json.loads(line))
    return [x for x in objects if isinstance(x, dict)]


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(re.sub(r"^argument (--\w+): ", r"\1: ", message))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def _option(kind, name: str) -> dict:
    """The arguments of argparse's add_argument for a field `name` of the type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return dict(type=_boolean, nargs="?", const=True, metavar="BOOL")
    if origin is typing.Literal:
        return dict(choices=arguments)
    if origin is tuple:
        # _as_tuple converts the items. --input=a --input=b: both
        return dict(nargs="*", metavar=name.upper(), action="extend" if arguments[0] is str else "store")
    return dict(type=kind, metavar=kind.__name__.upper())


def _as_tuple(name: str, texts: list[str], element) -> tuple:
    """For tuple[int, ...]: ["0,3"] and ["0", "3"] -> (0, 3). For tuple[str, ...], commas mean nothing."""
    texts = texts if element is str else ",".join(texts).split(",")
    try:
        return tuple(element(text) for text in texts if text)
    except ValueError:
        fail(f"--{name}: {','.join(texts)!r} must be {element.__name__}s with commas between them; none at "
             f"all: --{name}=")


def first_word(argv: list[str] | None, words, doc: str, kind: str) -> tuple[str, list[str]]:
    """Returns the command line's first word, which must be in `words`, and the rest. --help prints `doc`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(doc.strip())
        raise SystemExit
    if not argv or argv[0] not in words:
        fail(f"name {kind}, then its options: {'|'.join(words)}; --help explains them")
    return argv[0], argv[1:]


def _help_of(cls) -> dict[str, tuple[str, str]]:
    """{field: (its group, its comment or "")}, from the source of a dataclass and of those it extends."""
    fields = {}
    for base in reversed(cls.__mro__[:-1]):
        group = "options"
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    # --- (.+)", line):
                group = match[1]
            elif match := re.match(r"    (\w+):.*?(?:  # (.*))?$", line):
                name, comment = match.groups(default="")
                fields[name] = fields.get(name, (group,))[0], comment
    return fields


def parse(cls, argv: list[str] | None = None, presets: dict[str, dict] | None = None, description: str = "",
          hints: dict[str, str] | None = None):
    """
    Reads the command line's options, which are the fields of the dataclass `cls`. Returns two dicts: the
    values of the preset, and the values that the user gave.

    presets: {name: {field: value}}. --preset=NAME chooses one; the default is the first.
    hints: {name: what to do instead}, for options of other programs.
    Types: int, float, str, bool, Literal, tuple[int, ...] (--name=1,2 or --name 1 2) and tuple[str, ...].
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(usage="%(prog)s [--name=value ...]", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter,
                                                       max_help_position=34, width=120))
    preset = {}
    if presets:  # the preset comes first: --help shows its values as defaults
        preset_parser = _Parser(add_help=False, allow_abbrev=False)
        for p in (preset_parser, parser):
            p.add_argument("--preset", choices=presets, default=next(iter(presets)),
                           help="a set of defaults, shown below (default: %(default)s)")
        preset = presets[preset_parser.parse_known_args(argv)[0].preset]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)} | preset
    kinds, helps, groups = typing.get_type_hints(cls), _help_of(cls), {}
    for name, kind in kinds.items():
        (group, comment), default = helps[name], defaults[name]
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{comment} (default: {default if default != '' else f'empty, as in --{name}='})".lstrip()
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name}", help=text.replace("%", "%%"), **_option(kind, name))

    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            fail(f"{name} is not an option: every option has the form --name=value")
        similar = difflib.get_close_matches(name, [f"--{field}" for field in (*kinds, "preset", "help")], n=1)
        hint = f"did you mean {similar[0]}?" if similar else "--help lists all options"
        fail(f"unknown option {name}: {(hints or {}).get(name.removeprefix('--'), hint)}")
    options = vars(options)
    options.pop("preset", None)
    return preset, {name: _as_tuple(name, value, typing.get_args(kinds[name])[0])
                    if isinstance(value, list) else value for name, value in options.items()}


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
