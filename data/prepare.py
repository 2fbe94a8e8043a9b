"""
Makes a corpus for train.py. It writes train.bin and val.bin (token ids), meta.json and, if the corpus has
questions, qa.jsonl to the folder data/NAME. docs/data.md has more.

    python data/prepare.py facts --people=400         generated people and their attributes, with questions
    python data/prepare.py airports                   codes and cities of real airports, with questions
    python data/prepare.py stdlib                     source of the Python standard library on this machine
    python data/prepare.py code                       Python source of all installed packages
    python data/prepare.py mqar                       pairs of words, to be recalled from the context
    python data/prepare.py text --input FILE ...      any text; --name=NAME chooses the folder data/NAME
    python data/prepare.py shakespeare --input FILE   the plays that nanoGPT trains on
    python data/prepare.py facts --help               the options of a corpus
"""

import codecs
import glob
import gzip
import hashlib
import json
import re
import sys
import sysconfig
import tempfile
import tokenize
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # to find runtime/ also when this file is run as a script
if __name__ == "__main__":  # before the imports that take time
    from runtime.cli import exit_on_ctrl_c
    exit_on_ctrl_c()

from data.airports import SPLITS, airport_text  # noqa: E402
from data.facts import facts_text, mqar_text  # noqa: E402
from data.tokenizer import (  # noqa: E402
    BLOCK,
    END,
    SPLIT,
    encode_fragments,
    encode_texts,
    encoding_to_json,
    named_encoding,
    token_sizes,
    train_bpe,
    word_encoding,
)
from runtime.cli import at_least, build, command, fail, first_word, parse  # noqa: E402

SAMPLE = 2048  # a tokenizer is learnt from at most so many characters per token


# --- the folder of a corpus ---------------------------------------------------------------------------------

@dataclass
class Corpus:
    tokenizer: str = ""  # a tiktoken encoding to download, such as gpt2; none: build one from the corpus
    vocab_size: int = 4096  # most tokens of a tokenizer that is built from the corpus
    overwrite: bool = False  # replace a corpus of the same name that was made with other options

    def __post_init__(self):
        if not 257 <= self.vocab_size <= 2**20:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 257 (256 bytes and {END}) "
                             f"and at most {2**20}")


def options_of(config: Corpus) -> dict:
    """The options that decide what a corpus contains, as meta.json has them."""
    options = asdict(config)
    del options["overwrite"]
    return json.loads(json.dumps(options))


def corpus_folder(name: str, config: Corpus) -> Path:
    """The folder for a corpus. Fails if another corpus is there, which must not get lost."""
    if Path(name).name != name or name in ("", ".."):
        fail(f"--name={name} must be a plain name: data/NAME is where the corpus goes")
    folder = DATA / name
    if (folder / "train.bin").exists() and not config.overwrite:
        try:
            made_with = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["options"]
            # an older corpus lacks newer options
            is_same = options_of(type(config)()) | made_with == options_of(config)
        except (OSError, ValueError, KeyError, TypeError):
            is_same = False
        if not is_same:
            fail(f"{folder} has a corpus that was made with other options: choose another --name, "
                 "or add --overwrite to replace it")
    return folder


def make_tokenizer(name, config, texts, fragments, size, pattern):
    """The encoding of a corpus. The arguments are those of write_corpus."""
    if config.tokenizer:
        return named_encoding(config.tokenizer)
    if fragments:
        counts = sum(np.bincount(ids, minlength=len(fragments)) for ids in texts("train"))
        return word_encoding(fragments, counts.tolist(), config.vocab_size, pattern)
    print(f"{name}: building a tokenizer from the corpus")
    every = 1 + size // (SAMPLE * config.vocab_size)
    return train_bpe(lambda: texts("train"), config.vocab_size, every)


def write_tokens(path: Path, tokens: Iterable[np.ndarray], sizes: np.ndarray, limit: int, bar) -> dict:
    """Writes the file of a split. Returns the numbers of its tokens, bytes and characters."""
    vocab_size = sizes.shape[1]
    counts = np.zeros(vocab_size, np.int64)
    with open(path, "wb") as f:
        for ids in tokens:
            ids = ids[:limit - counts.sum()]
            f.write(ids.astype(np.uint16 if vocab_size <= 2**16 else np.uint32).tobytes())
            counts += np.bincount(ids, minlength=vocab_size)
            bar.update(int(sizes[1, ids].sum()))
            if counts.sum() == limit:
                break
    if counts.sum() < 2:
        fail(f"the text is too short, {path.name} would be empty")
    number_of_bytes, characters = sizes @ counts
    return {f"{path.stem}_tokens": int(counts.sum()), f"{path.stem}_bytes": int(number_of_bytes),
            f"{path.stem}_characters": int(characters)}


def write_corpus(name: str, config: Corpus, texts: Callable[[str], Iterable],
                 questions: list[dict] | None = None, note: str = "", fragments: list[str] | None = None,
                 size: int = 0, limit: int | None = None, pattern: str = SPLIT) -> None:
    """
    texts('train') and texts('val') return new iterators. The last text of a document ends with END. note: a
    sentence that training prints at the end.

    fragments: a text is not a string, but an array of indices into these strings. The tokenizer then has one
    token per word: per piece of `pattern`. Each fragment must start a new piece wherever it stands. size:
    characters of both splits, if known. limit: most tokens in train.bin. None: all.
    """
    folder = corpus_folder(name, config)
    try:
        DATA.mkdir(parents=True, exist_ok=True)
        # whatever stops the making of a corpus, nothing half-written stays, and an old corpus does
        with tempfile.TemporaryDirectory(prefix=f".{name}-", dir=DATA) as temporary:
            encoding = make_tokenizer(name, config, texts, fragments, size, pattern)
            sizes = token_sizes(encoding)
            meta = {"vocab_size": encoding.n_vocab,
                    "dtype": "uint16" if encoding.n_vocab <= 2**16 else "uint32",
                    "options": options_of(config), "note": note, "encoding": encoding_to_json(encoding)}
            with tqdm(desc=f"{name}: encoding", total=size or None, unit=" characters", unit_scale=True,
                      leave=False, disable=None) as bar:
                for split in ("train", "val"):
                    tokens = (encode_fragments(encoding, fragments, texts(split)) if fragments else
                              encode_texts(encoding, texts(split)))
                    most = limit if limit and split == "train" else sys.maxsize
                    meta |= write_tokens(Path(temporary, f"{split}.bin"), tokens, sizes, most, bar)
            if questions:
                lines = "".join(json.dumps(question) + "\n" for question in questions)
                Path(temporary, "qa.jsonl").write_text(lines, encoding="utf-8")
            Path(temporary, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            folder.mkdir(exist_ok=True)
            # meta.json is moved last, so a folder with meta.json is complete. Open files keep their contents
            (folder / "meta.json").unlink(missing_ok=True)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "meta.json"):
                file.replace(folder / file.name)
    except OSError as error:
        fail(f"{error.filename or folder}: {error.strerror or error}")
    if not questions and (folder / "qa.jsonl").exists():
        print(f"{name}: the questions in {folder / 'qa.jsonl'} stay")
    print(f"{name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
          f"{meta['train_characters'] / meta['train_tokens']:.2f} characters per token, "
          f"vocabulary of {meta['vocab_size']:,}"
          + (f", {len(questions):,} questions" if questions else "") + f", in {folder}")
    if meta["train_characters"] < 0.6 * meta["train_tokens"]:
        print(f"{name}: most characters are cut into single bytes, because each is rare. Use more text, or "
              "a --tokenizer that knows them")


# --- corpora with questions, made of few different words ----------------------------------------------------

ZIPF_NOTE = ("The validation text tells each fact once, but the training text tells some facts more often "
             "than others. So the validation loss is above the training loss.")


def check_telling(config) -> None:
    """Checks the options that say how often a corpus tells its facts, and how many of them it asks."""
    at_least(1, config, "exposures")
    at_least(0, config, "zipf", "seed")
    for name in ("exposures", "zipf"):
        if getattr(config, name) == np.inf:
            raise ValueError(f"{name}=inf must be finite")
    for name in ("ask", "held_out"):
        if not 0 <= getattr(config, name) <= 1:
            raise ValueError(f"{name}={getattr(config, name)} must be between 0 and 1")


@dataclass
class FactsConfig(Corpus):
    name: str = "facts"  # the folder under data/
    people: int = 400  # people in the corpus, each with a name of two parts and four attributes
    exposures: float = 60.0  # how often train.bin tells each attribute, on average over people
    zipf: float = 0.75  # the r-th most exposed person gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of people about whom train.bin has statements, but no questions
    questions: int = 0  # most questions per exposure bin, and about held-out people; 0: all
    seed: int = 1  # seed of all random draws

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.people <= 1_000_000:
            raise ValueError(f"people={self.people} must be between 1 and 1,000,000")
        at_least(0, self, "questions")
        check_telling(self)


def facts(config: FactsConfig) -> None:
    """Facts about people who do not exist, with questions."""
    texts, questions, fragments = facts_text(config)
    write_corpus(config.name, config, texts, questions, ZIPF_NOTE if config.zipf else "", fragments)


@dataclass
class AirportsConfig(Corpus):
    name: str = "airports"  # the folder under data/
    vocab_size: int = 16_384  # most tokens of the tokenizer; rarer words are several tokens
    airports: int = 2000  # airports in the corpus, the best known ones first; 0: all
    exposures: float = 10.0  # how often train.bin tells each fact, on average over airports
    zipf: float = 1.0  # the r-th airport gets exposures in proportion to r**-zipf; 0: all alike
    ask: float = 0.25  # share of exposures that are a question and its answer; the others are statements
    held_out: float = 0.1  # share of cities whose airports train.bin has statements about, but no questions
    code_tokens: int = 2  # tokens per airport code: 1, 2 or 3; a --tokenizer splits codes in its own way
    seed: int = 1  # seed of all random draws

    def __post_init__(self):
        super().__post_init__()
        at_least(0, self, "airports")
        check_telling(self)
        if self.code_tokens not in SPLITS:
            raise ValueError(f"code_tokens={self.code_tokens} must be 1, 2 or 3")


def airports(config: AirportsConfig) -> None:
    """Real airports: code, city, country and time zone. The best known ones are told most often."""
    texts, questions, fragments = airport_text(config)
    write_corpus(config.name, config, texts, questions, ZIPF_NOTE if config.zipf else "", fragments,
                 pattern=SPLITS[config.code_tokens] + SPLIT)


@dataclass
class MqarConfig(Corpus):
    documents: int = 20_000  # documents in train.bin; val.bin and the questions have a fiftieth each
    pairs: int = 4  # pairs of a key and a value per document
    asks: int = 16  # pairs that are repeated after all have been told; the last is the question
    keys: int = 16  # different keys
    values: int = 16  # different values
    seed: int = 1  # seed of all random draws

    def __post_init__(self):
        super().__post_init__()
        at_least(1, self, "documents", "pairs", "asks")
        at_least(0, self, "seed")
        for name in ("keys", "values"):
            if getattr(self, name) < self.pairs:
                raise ValueError(f"{name}={getattr(self, name)} must be at least pairs={self.pairs}")


def mqar(config: MqarConfig) -> None:
    """
    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927). Each document has new
    pairs, so the answer is always in the context, and there is nothing to remember.
    """
    texts, questions, fragments = mqar_text(config)
    write_corpus("mqar", config, texts, questions, fragments=fragments)


# --- text ---------------------------------------------------------------------------------------------------

@dataclass
class SplitConfig(Corpus):
    val_share: float = 0.05  # share of the files that is kept for validation

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.val_share < 1:
            raise ValueError(f"val_share={self.val_share} must be between 0 and 1")


def stdlib(config: SplitConfig) -> None:
    """The standard library's source, without its tests: 10 MB of Python, on every machine with Python."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skip = {"site-packages", "dist-packages", "test", "tests", "idle_test"}
    files = {"train": [], "val": []}
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not skip & set(name.parts):
            # the name of a file decides its split, so the split is the same on every machine
            files["val" if name_number(name) < config.val_share else "train"].append(path)
    write_corpus("stdlib", config, lambda split: read_sources(files[split]))


def name_number(name: Path) -> float:
    """A number from 0 to 1 that looks random but depends on the name only."""
    return int.from_bytes(hashlib.sha256(name.as_posix().encode()).digest()[:8], "big") / 2**64


def read_sources(paths: Iterable[Path]) -> Iterator[str]:
    for path in paths:
        try:
            with tokenize.open(path) as f:  # in the encoding that the file declares
                text = f.read()
            text.encode()  # a strange encoding can give what is no text
        except (SyntaxError, UnicodeError):
            continue  # lib2to3 has files that are broken on purpose
        yield text + END


@dataclass
class CodeConfig(SplitConfig):
    input: tuple[str, ...] = ()  # folders with Python source; none: the packages installed for this Python
    vocab_size: int = 8192  # most tokens that the tokenizer may have
    val_share: float = 0.02  # share of the files that is kept for validation
    tokens: int = 0  # most tokens in train.bin; 0: no limit

    def __post_init__(self):
        super().__post_init__()
        at_least(0, self, "tokens")


def code(config: CodeConfig) -> None:
    """The Python source of all installed packages. The order of the files depends on their names only."""
    packages = [name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")]
    files = []
    for folder in (Path(name).expanduser() for name in config.input or packages):
        if not folder.is_dir():
            fail(f"--input {folder}: no such folder")
        names = (path.relative_to(folder) for path in folder.rglob("*.py") if path.is_file())
        files += [(name_number(name), name, folder) for name in names]
    splits, seen, size = {"train": [], "val": []}, set(), 0
    for number, name, folder in sorted(files):
        content = (folder / name).read_bytes()
        checksum = hashlib.sha256(content).digest()
        if checksum not in seen:  # many packages bring the same file: the first one counts
            seen.add(checksum)
            splits["val" if number < config.val_share else "train"].append(folder / name)
            size += len(content)
    write_corpus("code", config, lambda split: read_sources(splits[split]), size=size,
                 limit=config.tokens or None)


@dataclass
class TextConfig(SplitConfig):
    input: tuple[str, ...] = ()  # text files (UTF-8 or UTF-16, also .gz), or folders with .txt files
    name: str = "text"  # the folder under data/
    val_share: float = 0.1  # share of each file, at its end, that is kept for validation


def text(config: TextConfig) -> None:
    """Any text. Each file is a document, or many that end with <|endoftext|>. Files may be very large."""
    if not config.input:
        fail("name the files: --input FILE ...")
    paths = list(dict.fromkeys(path.resolve() for name in config.input for path in find_files(name)))
    lengths = {path: sum(map(len, split_documents(read_checked(path)))) for path in paths}

    def texts(split: str) -> Iterator[str]:
        for path, length in lengths.items():
            border = int(length * (1 - config.val_share))
            yield from cut_at_border(split_documents(read_blocks(path)), border, split)

    config = replace(config, input=tuple(map(str, paths)))
    write_corpus(config.name, config, texts, size=sum(lengths.values()))


def find_files(name: str) -> list[Path]:
    """The files that a user means by a path, a folder or a pattern such as texts/*.txt."""
    path = Path(name).expanduser()
    if path.is_dir():
        return sorted(path.rglob("*.txt")) or fail(f"--input {name}: the folder has no .txt files")
    if path.exists() and not path.is_file():
        fail(f"--input {name}: a stream can be read only once; save it to a file")
    paths = [path] if path.exists() else sorted(map(Path, glob.glob(str(path), recursive=True)))
    return paths or fail(f"--input {name}: No such file" + " (save a stream to a file)" * (name == "-"))


def read_blocks(path: Path) -> Iterator[str]:
    open_file = gzip.open if path.suffix == ".gz" else open
    with open_file(path, "rb") as f:
        is_utf16 = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    with open_file(path, "rt", encoding="utf-16" if is_utf16 else "utf-8-sig", newline="") as f:
        while block := f.read(BLOCK):
            yield block


def read_checked(path: Path) -> Iterator[str]:
    """The same, for the first time: finds what is wrong with a file before anything is written."""
    try:
        for block in read_blocks(path):
            if "\0" in block:
                fail(f"--input {path}: not a text file (it has zero bytes)")
            yield block
    except UnicodeDecodeError as error:
        fail(f"--input {path}: not UTF-8 ({error.reason}); convert it first: iconv -f LATIN1 -t UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"--input {path}: {getattr(error, 'strerror', None) or error}")


SEPARATOR = re.compile(re.escape(END) + r"[\r\n]*(?=[^\r\n])")


def split_documents(blocks: Iterable[str]) -> Iterator[str]:
    """
    Cuts a text at each END in it. The line breaks after END go. The last text of a document ends with END. An
    empty text has no document.
    """
    held = None
    for block in blocks:
        *documents, held = SEPARATOR.split((held or "") + block)
        yield from (document + END for document in documents)
        # what is held back may be the beginning of END, or END with the first of its line breaks
        ready = held.find(END) if END in held else max(0, len(held) - len(END))
        if ready:
            yield held[:ready]
        held = held[ready:]
    if held is not None:
        yield held.partition(END)[0] + END


def cut_at_border(texts: Iterable[str], border: int, split: str) -> Iterator[str]:
    """The first `border` characters for training, or all others for validation."""
    for text in texts:
        cut, border = border, border - len(text)
        if cut > 0 >= border:  # the border is in this text; it moves to the next end of a line, or of a word
            content = text.removesuffix(END)
            near = content[cut:cut + min(200, (len(content) - cut) // 2)]
            match = re.search(r"\n", near) or re.search(r"(?=\s)", near)
            cut += match.end() if match else 0
            if split == "train":
                yield content[:cut] + END
            elif cut < len(content):
                yield text[cut:]
        elif (cut > 0) == (split == "train"):
            yield text


@dataclass
class ShakespeareConfig(TextConfig):
    name: str = "shakespeare"  # the folder under data/


def shakespeare(config: ShakespeareConfig) -> None:
    """
    The same as text, with the name shakespeare. nanoGPT's file of 1.1 MB is
    https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt
    """
    if not config.input:
        fail(f"save {shakespeare.__doc__.split()[-1]} and name the file: --input input.txt")
    text(config)


CORPORA = {"facts": (facts, FactsConfig), "stdlib": (stdlib, SplitConfig), "code": (code, CodeConfig),
           "mqar": (mqar, MqarConfig), "text": (text, TextConfig),
           "shakespeare": (shakespeare, ShakespeareConfig), "airports": (airports, AirportsConfig)}

# corpora that training makes when it needs them, by the name of their folder under data/
READY_MADE = {
    "facts": (facts, FactsConfig()),
    "facts-2000": (facts, FactsConfig(name="facts-2000", people=2000, exposures=30.0, zipf=1.0)),
    "facts-4000": (facts, FactsConfig(name="facts-4000", people=4000, exposures=30.0, zipf=1.0)),
    # most people are told once or twice
    "facts-large": (facts, FactsConfig(name="facts-large", people=200_000, exposures=8.0, zipf=1.0,
                                       questions=256)),
    "airports": (airports, AirportsConfig()),
    "stdlib": (stdlib, SplitConfig()),
    "code": (code, CodeConfig()),
    "mqar": (mqar, MqarConfig()),
}


@command
def main(argv: list[str] | None = None) -> None:
    name, arguments = first_word(argv, CORPORA, __doc__, "a corpus")
    make, config_class = CORPORA[name]
    hints = {"site_packages": "without --input, code takes all installed packages"}
    _, options = parse(config_class, arguments, description=f"{name}: {make.__doc__}", hints=hints)
    make(build(config_class, options))


if __name__ == "__main__":
    main()
