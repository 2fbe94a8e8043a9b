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

from dataclasses import replace
from functools import partial

if not __package__:
    raise SystemExit("error: start this in the folder of nanoPKM as a module: python -m data.prepare")

from runtime.cli import build, command, first_word, parse

from data.corpora import CORPORA


@command
def main(argv: list[str] | None = None) -> None:
    name, arguments = first_word(argv, CORPORA, __doc__, "a corpus")
    config = CORPORA[name]
    _, options = parse(config, arguments, None, f"{name}: {config.__doc__}", name)
    build(partial(replace, config), options).make()


if __name__ == "__main__":
    main()
