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
import dataclasses
import difflib
import functools
import inspect
import os
import re
import signal
import sys
import typing


class UserError(ValueError):
    """A mistake of the user. The message is one line that says what to do."""

    def __init__(self, message, alone: bool = False):
        super().__init__(message)
        self.alone = alone  # True: only this process made the mistake. False: all did


def fail(message, alone: bool = False) -> typing.NoReturn:
    raise UserError(message, alone) from None


def command(main):
    """
    Decorates the main function of a script. A mistake becomes one line on stderr and exit status 2. If all
    processes make the same mistake, one process per machine prints it. Ctrl-C: one line, and status 130.
    """
    @functools.wraps(main)
    def run(*arguments, **options):
        if hasattr(sys.stdout, "reconfigure"):
            sys.stdout.reconfigure(errors="replace")  # prints "?" for what the terminal cannot show
        is_script = signal.getsignal(signal.SIGINT) is _exit_at_once
        if is_script:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # main may have to clean up
        is_first = os.environ.get("LOCAL_RANK", "0") in ("", "0") or not os.environ.get("MASTER_ADDR")
        try:
            try:
                return main(*arguments, **options)
            finally:
                if sys.stdout:
                    sys.stdout.flush()  # here, because an error at exit would be a traceback
                if is_script:
                    signal.signal(signal.SIGINT, _exit_at_once)
        except KeyboardInterrupt:
            line, status, is_printed = "\ninterrupted", 130, is_first
        except UserError as error:
            line, status, is_printed = f"error: {error}", 2, is_first or error.alone
        except BrokenPipeError:  # as in `python sample.py | head`: nobody reads the output
            line, status, is_printed = "", 141, False
        except OSError as error:
            where = error.filename or "cannot write"
            line, status, is_printed = f"error: {where}: {error.strerror or error}", 2, True
        except (MemoryError, RuntimeError) as error:
            if not is_out_of_memory(error):
                raise
            line, status, is_printed = f"error: out of memory: {first_part(error)}", 2, True
        try:
            if sys.stdout:
                sys.stdout.flush()
        except OSError:  # what cannot be printed is dropped, so that Python does not try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if is_printed:
            print(line, file=sys.stderr)
        raise SystemExit(status)
    return run


def is_out_of_memory(error: Exception) -> bool:
    return isinstance(error, MemoryError) or any(
        words in str(error) for words in ("can't allocate memory", "out of memory"))


def first_part(error: Exception) -> str:
    """The message in one line. PyTorch adds advice after an empty line."""
    return " ".join(str(error).split("\n\n")[0].split())


def python_command() -> str:
    """What to type for this Python: a path if it is in the current folder, such as .venv/bin/python."""
    path = os.path.relpath(sys.executable)
    return "python" if path.startswith("..") else path


def exit_on_ctrl_c() -> None:
    """
    For the top of a script: before and after its main function, Ctrl-C ends the program with one line.
    Otherwise, Ctrl-C in a slow import such as torch is a traceback, or is lost in an `except` there.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a background job may ignore Ctrl-C
        signal.signal(signal.SIGINT, _exit_at_once)


def _exit_at_once(number, frame):
    os.write(2, b"\ninterrupted\n")
    os._exit(130)


def read_lines(path) -> list[str]:
    """The lines of a text file, in UTF-8 with or without a BOM."""
    try:
        with open(path, encoding="utf-8-sig") as f:
            return f.read().split("\n")
    except OSError as error:
        fail(f"{path}: {error.strerror}")
    except UnicodeDecodeError as error:
        fail(f"{path}: not UTF-8 ({error.reason} near byte {error.start}); convert it first")


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
        # `parse` converts the items. --input=a --input=b: both
        return dict(nargs="*", metavar=name.upper(), action="extend" if arguments[0] is str else "store")
    return dict(type=kind, metavar=kind.__name__.upper())


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
    """{field: (its group, its comment)}, from the source of a dataclass and of the classes it extends."""
    fields = {}
    for base in reversed(cls.__mro__[:-1]):
        group = "options"
        for line in inspect.getsource(base).splitlines():
            if match := re.match(r"    # --- (.+)", line):
                group = match[1]
            elif match := re.match(r"    (\w+):.*?  # (.*)", line):
                name, comment = match.groups()
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
    kinds, groups = typing.get_type_hints(cls), {}
    helps = _help_of(cls)
    for name, kind in kinds.items():
        group, comment = helps[name]
        default = defaults[name]
        default = ",".join(map(str, default)) if isinstance(default, tuple) else default
        text = f"{comment} (default: {default if default != '' else f'empty, as in --{name}='})"
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        groups[group].add_argument(f"--{name}", help=text.replace("%", "%%"), **_option(kind, name))

    options, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            fail(f"{name} is not an option: every option has the form --name=value")
        if instead := (hints or {}).get(name.removeprefix("--")):
            fail(f"unknown option {name}: {instead}")
        known = [f"--{field}" for field in (*kinds, "preset", "help")]
        similar = difflib.get_close_matches(name, known, n=1)
        hint = f"did you mean {similar[0]}?" if similar else "--help lists all options"
        fail(f"unknown option {name}: {hint}")
    options = vars(options)
    options.pop("preset", None)
    for name, value in options.items():
        if isinstance(value, list):
            element = typing.get_args(kinds[name])[0]
            separate = (lambda text: [text]) if element is str else (lambda text: text.split(","))
            items = [item for text in value for item in separate(text) if item]
            try:
                options[name] = tuple(element(item) for item in items)
            except ValueError:
                fail(f"--{name}: {','.join(value)!r} must be {element.__name__}s with commas between them; "
                     f"none at all: --{name}=")
    return preset, options


def at_least(low: float, config, *names: str) -> None:
    """For __post_init__ of a dataclass: a ValueError if one of these fields is less than `low`, or nan."""
    for name in names:
        if not getattr(config, name) >= low:
            raise ValueError(f"{name}={getattr(config, name)} must "
                             + (f"be at least {low}" if low else "not be negative"))


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
