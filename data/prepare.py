"""
Makes a corpus for train.py. It writes train.bin and val.bin (token ids), meta.json and, if the corpus has
questions, qa.jsonl to the folder data/NAME. docs/data.md has more.

    python -m data.prepare facts --people=400         generated people and their attributes, with questions
    python -m data.prepare facts-2000                 more of them; also facts-4000, facts-large
    python -m data.prepare airports                   codes and cities of real airports, with questions
    python -m data.prepare reference                  the World Factbook and WordNet, with questions
    python -m data.prepare stdlib                     source of the Python standard library on this machine
    python -m data.prepare code                       Python source of all installed packages
    python -m data.prepare mqar                       pairs of words, to be recalled from the context
    python -m data.prepare text --input FILE ...      any text; --name=NAME chooses the folder data/NAME
    python -m data.prepare facts --help               the options of a corpus
"""

from dataclasses import asdict, replace
from functools import partial

from runtime.cli import build, command, first_word, parse

from data.corpora import CORPORA


@command
def main(argv: list[str] | None = None) -> None:
    name, arguments = first_word(argv, CORPORA, __doc__, "a corpus")
    make, config = CORPORA[name]
    changes = asdict(config).items() - asdict(type(config)()).items()  # as of facts-2000 from facts
    by_default = "".join(f"\n--{key}={value} by default" for key, value in sorted(changes))
    _, options = parse(type(config), arguments, None, f"{name}: {make.__doc__}{by_default}", name)
    make(build(partial(replace, config), options))


if __name__ == "__main__":
    main()
