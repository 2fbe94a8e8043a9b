"""
From a dataclass to a command line: every field is an option, its comment is the option's help.

    @dataclass
    class Config:
        n_layer: int = 3  # Transformer blocks

understands --n_layer=4, --n_layer 4 and --help. A mistake is one line on stderr and exit status 2.
"""

import argparse
import dataclasses
import difflib
import functools
import inspect
import os
import re
import sys
import typing


def fail(message, alone: bool = False) -> typing.NoReturn:
    """
    Ends the program over a mistake of its user's: one line that says what to do, and exit status 2. Of many
    processes, which make the same mistake, one a machine says it; `alone`: it is of this one only.
    """
    if alone or os.environ.get("LOCAL_RANK", "0") == "0":
        print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        fail(re.sub(r"^argument (--\w+): ", r"\1: ", message))


def _boolean(text: str) -> bool:
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text!r} must be true or false")
    return text.lower() == "true"


def _option(kind, name: str) -> dict:
    """What argparse wants to know of a field of the type `kind`."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if kind is bool:
        return dict(type=_boolean, nargs="?", const=True, metavar="BOOL")
    if origin is typing.Literal:
        return dict(choices=arguments)
    if origin is tuple:
        return dict(nargs="*", metavar=name.upper())  # strings as yet: see `parse`
    return dict(type=kind, metavar=kind.__name__.upper())


def first_word(argv: list[str] | None, words, doc: str, what: str) -> tuple[str, list[str]]:
    """(the command line's first word, the rest), where the word is one of `words`; --help prints `doc`."""
    argv = sys.argv[1:] if argv is None else argv
    if argv[:1] in (["-h"], ["--help"]):
        print(doc.strip())
        raise SystemExit
    if not argv or argv[0] not in words:
        fail(f"name {what}: python {sys.argv[0]} {'|'.join(words)} [options]")
    return argv[0], argv[1:]


def parse(cls, argv: list[str] | None = None, presets: dict[str, dict] | None = None, description: str = ""):
    """
    The command line's options as fields of the dataclass `cls`: (of the preset, given one by one), two dicts.

    presets: {name: {field: value}}; --preset=NAME chooses one, the first where none is named.
    Types: int, float, str, bool, Literal, tuple[int, ...] (--name=1,2 or --name 1 2) and tuple[str, ...].
    """
    argv = sys.argv[1:] if argv is None else argv
    parser = _Parser(usage="%(prog)s [--name=value ...]", description=description, allow_abbrev=False,
                     argument_default=argparse.SUPPRESS,
                     formatter_class=functools.partial(argparse.RawDescriptionHelpFormatter,
                                                       max_help_position=34, width=120))
    preset = {}
    if presets:
        first = _Parser(add_help=False, allow_abbrev=False)
        for p in (first, parser):
            p.add_argument("--preset", choices=presets, default=next(iter(presets)),
                           help="a set of defaults; those below are its own (default: %(default)s)")
        preset = presets[first.parse_known_args(argv)[0].preset]
    defaults = {field.name: field.default for field in dataclasses.fields(cls)} | preset
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments |= dict(re.findall(r"^    (\w+):.*?  # (.*)$", inspect.getsource(base), re.MULTILINE))
    kinds = typing.get_type_hints(cls)
    for name, kind in kinds.items():
        default = defaults[name]
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{comments[name]} (default: {default if default != '' else 'none'})"
        parser.add_argument(f"--{name}", help=text.replace("%", "%%"), **_option(kind, name))

    given, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        options = [f"--{known}" for known in (*kinds, "preset", "help")]
        close = difflib.get_close_matches(name, options, n=1)
        fail(f"unknown option {name}: " + (f"did you mean {close[0]}?" if close else "--help lists them all"))
    given = vars(given)
    given.pop("preset", None)
    for name, value in given.items():
        if isinstance(value, list):
            element = typing.get_args(kinds[name])[0]
            items = value if element is str else [item for text in value for item in text.split(",") if item]
            try:
                given[name] = tuple(element(item) for item in items)
            except ValueError:
                fail(f"--{name}: {','.join(value)!r} must be {element.__name__}s with commas between them")
    return preset, given


def at_least(low: float, config, *names: str) -> None:
    """For a dataclass's __post_init__: its fields of these names must be `low` or more; nan is not."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name}={getattr(config, name)} must "
                             + (f"be at least {low}" if low else "not be negative"))


def build(cls, values: dict):
    """cls(**values), where a value that the class refuses is the user's mistake."""
    try:
        return cls(**values)
    except ValueError as error:
        fail(f"--{error}")
