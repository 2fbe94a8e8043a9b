"""
Makes a corpus for train.py. It writes train.bin and val.bin (token ids), meta.json and, if the corpus has
questions, qa.jsonl to the folder data/NAME.

    python data/prepare.py facts --people=400         generated people and their attributes, with questions
    python data/prepare.py stdlib                     source of the Python standard library on this machine
    python data/prepare.py code                       Python source of all installed packages
    python data/prepare.py mqar                       pairs of words, to be recalled from the context
    python data/prepare.py text --input FILE ...      any UTF-8 text; --name=NAME chooses the folder data/NAME
    python data/prepare.py facts --help               the options of a corpus
"""

import base64
import hashlib
import json
import sys
import sysconfig
import tokenize
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from itertools import islice, repeat
from pathlib import Path

import numpy as np
import regex
import tiktoken
from tqdm import tqdm

DATA = Path(__file__).resolve().parent
sys.path.insert(0, str(DATA.parent))  # to find runtime/ also when this file is run as a script
from runtime.cli import at_least, build, command, fail, first_word, parse  # noqa: E402

END = "<|endoftext|>"  # stands between documents
GPT2_SPLIT = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"  # text into pieces


# --- tokenizers ---------------------------------------------------------------------------------------------

def build_encoding(texts: Iterable[str], vocab_size: int, counts: Iterable[int] = repeat(1)):
    """
    A tiktoken encoding of at most `vocab_size` tokens: the 256 bytes, the most frequent pieces of the texts,
    and END. counts: how often each text stands in the corpus.

    A piece in the vocabulary is one token, so no merges need to be learnt. Any other piece becomes several
    tokens: single bytes, or longer ones where the vocabulary has them. So every text can be encoded and
    decoded without loss.
    """
    pieces = Counter()
    for text, count in zip(texts, counts, strict=False):
        if count:
            found = Counter(regex.findall(GPT2_SPLIT, text))
            pieces.update({piece: n * count for piece, n in found.items()})
    ranks = {bytes([byte]): byte for byte in range(256)}
    for piece, _ in sorted(pieces.items(), key=lambda item: (-item[1], item[0])):  # ties: by the alphabet
        if len(ranks) + 1 >= vocab_size:
            break
        ranks.setdefault(piece.encode(), len(ranks))
    return tiktoken.Encoding("corpus", pat_str=GPT2_SPLIT, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


def named_encoding(name: str) -> tiktoken.Encoding:
    if name not in tiktoken.list_encoding_names():
        fail(f"--tokenizer={name}: tiktoken has {', '.join(tiktoken.list_encoding_names())}; "
             "without --tokenizer one is built from the corpus")
    try:
        return tiktoken.get_encoding(name)
    except OSError:
        fail(f"--tokenizer={name}: tiktoken could not download it; "
             "without --tokenizer one is built from the corpus")


def encoding_to_json(encoding: tiktoken.Encoding) -> dict:
    """Everything that `encoding_from_json` needs. Tokens are base64, in order of their ids."""
    ranks = encoding._mergeable_ranks
    return {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens,
            "tokens": {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}}


def encoding_from_json(stored: dict) -> tiktoken.Encoding:
    ranks = {base64.b64decode(token): rank for token, rank in stored["tokens"].items()}
    return tiktoken.Encoding(stored["name"], pat_str=stored["pat_str"], mergeable_ranks=ranks,
                             special_tokens=stored["special_tokens"])


# --- the folder of a corpus ---------------------------------------------------------------------------------

@dataclass
class Corpus:
    tokenizer: str = ""  # a tiktoken encoding to download, such as gpt2; none: build one from the corpus
    vocab_size: int = 4096  # largest vocabulary of a tokenizer that is built from the corpus

    def __post_init__(self):
        if self.vocab_size < 257:
            raise ValueError(f"vocab_size={self.vocab_size} must be at least 257 (256 bytes and {END})")


def encode_texts(encoding: tiktoken.Encoding, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of each text. tiktoken encodes 64 texts at a time, in several threads."""
    texts = iter(texts)
    while batch := list(islice(texts, 64)):
        encoded = encoding.encode_ordinary_batch([text.removesuffix(END) for text in batch])
        for text, tokens in zip(batch, encoded, strict=True):
            yield np.array(tokens + [encoding.eot_token] * text.endswith(END))


def encode_fragments(encoding: tiktoken.Encoding, fragments: list[str],
                     texts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The tokens of texts that consist of few different fragments. Each fragment is encoded only once."""
    parts = [encoding.encode_ordinary(fragment) for fragment in fragments]
    lengths, tokens = np.array([len(part) for part in parts]), np.concatenate(parts).astype(np.int64)
    starts = lengths.cumsum() - lengths  # of each fragment in `tokens`
    for ids in texts:
        n = lengths[ids]
        shift = starts[ids] - (n.cumsum() - n)  # from a place in the result to a place in `tokens`
        yield tokens[np.arange(n.sum()) + shift.repeat(n)]


def write_corpus(name: str, config: Corpus, texts: Callable[[str], Iterable],
                 questions: list[dict] | None = None, note: str = "", fragments: list[str] | None = None,
                 sample: int | None = None, limit: int | None = None) -> None:
    """
    texts('train') and texts('val') return new iterators. The last text of a document ends with END. note: a
    sentence that training prints at the end.

    fragments: a text is not a string, but an array of indices into these strings. Each of them must start a
    new piece of GPT2_SPLIT wherever it stands. sample: the tokenizer is built from the first texts only, from
    so many. limit: most tokens in train.bin. None: all.
    """
    if Path(name).name != name or name in ("", ".."):
        fail(f"--name={name} must be a plain name: data/NAME is where the corpus goes")
    folder = DATA / name
    folder.mkdir(parents=True, exist_ok=True)
    if config.tokenizer:
        encoding = named_encoding(config.tokenizer)
    else:
        print(f"{name}: building a tokenizer from the corpus")
        if fragments:
            counts = sum(np.bincount(ids, minlength=len(fragments)) for ids in texts("train"))
            encoding = build_encoding(fragments, config.vocab_size, counts.tolist())
        else:
            encoding = build_encoding((text.removesuffix(END) for text in islice(texts("train"), sample)),
                                      config.vocab_size)
    dtype = np.uint16 if encoding.n_vocab <= 2**16 else np.uint32
    meta = {"vocab_size": encoding.n_vocab, "dtype": np.dtype(dtype).name}
    for split in ("train", "val"):
        count = 0
        with open(folder / f"{split}.tmp", "wb") as f:
            title = f"{name}: encoding {split}"
            encoded = (encode_fragments(encoding, fragments, texts(split)) if fragments else
                       encode_texts(encoding, texts(split)))
            for tokens in tqdm(encoded, title, unit=" texts", leave=False, disable=None):
                if limit and split == "train":
                    tokens = tokens[:limit - count]
                f.write(tokens.astype(dtype).tobytes())
                count += len(tokens)
                if count == limit and split == "train":
                    break
        if count < 2:
            fail(f"{name}: the text is too short, {split}.bin would be empty")
        meta[f"{split}_tokens"] = count
    # meta.json is written last, so a folder with meta.json is complete. Open files keep their old contents
    for old in ("meta.json", *(["qa.jsonl"] if questions else [])):
        (folder / old).unlink(missing_ok=True)
    for split in ("train", "val"):
        (folder / f"{split}.tmp").replace(folder / f"{split}.bin")
    if (folder / "qa.jsonl").exists():
        print(f"{name}: the questions in {folder / 'qa.jsonl'} stay")
    if questions:
        lines = "".join(json.dumps(question) + "\n" for question in questions)
        (folder / "qa.jsonl").write_text(lines, encoding="utf-8")
    meta |= {"options": asdict(config), "note": note, "encoding": encoding_to_json(encoding)}
    (folder / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
    print(f"{name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
          f"vocabulary of {encoding.n_vocab:,}" + (f", {len(questions):,} questions" if questions else "")
          + f", in {folder}")


# --- facts --------------------------------------------------------------------------------------------------

CITIES = """Accra Algiers Amman Athens Baku Bangkok Beirut Belgrade Berlin Bogota Bergen Cairo
Caracas Chicago Dakar Damascus Delhi Dublin Geneva Glasgow Hanoi Havana Helsinki Istanbul Jakarta
Kabul Kyoto Lagos Lima Lisbon London Madrid Manila Melbourne Milan Montreal Nairobi Oslo Paris
Prague Quito Riga Rome Seoul Sofia Tallinn Tunis Vienna Warsaw Zagreb""".split()
JOBS = """actor architect baker banker barber biologist butcher carpenter chemist clerk composer
cook dancer dentist designer diver doctor driver editor electrician engineer farmer firefighter
fisher gardener jeweller journalist judge lawyer librarian mechanic miner nurse painter pharmacist
photographer pilot plumber poet porter potter printer sailor sculptor singer surgeon tailor teacher
translator weaver""".split()
SUBJECTS = """acoustics agronomy algebra anatomy anthropology archaeology astronomy botany
cartography chemistry criminology dance dentistry design ecology economics ethics finance forestry
genetics geography geology geometry history journalism law linguistics literature logic marketing
medicine meteorology music mythology navigation nutrition oceanography optics painting pedagogy
philosophy physics poetry politics psychology rhetoric sociology statistics theology zoology""".split()
MONTHS = "January February March April May June July August September October November December".split()

# attribute: (values, statements, questions). The person comes before the value: a GPT predicts left to right
ATTRIBUTES = {
    "birthplace": (CITIES,
                   ["The birthplace of {} is {}.", "The city where {} was born is {}.",
                    "The records say that {} comes from {}."],
                   ["Where was {} born?", "In which city was {} born?"]),
    "job": (JOBS,
            ["The job of {} is that of a {}.", "For a living {} works as a {}.",
             "The tax form of {} says {}."],
            ["What is the job of {}?", "What does {} do for a living?"]),
    "birthday": ([f"{month} {day}" for month in MONTHS for day in range(1, 29)],
                 ["The birthday of {} is {}.", "Every year {} celebrates on {}.",
                  "The passport of {} gives the date {}."],
                 ["When is the birthday of {}?", "On which day was {} born?"]),
    "subject": (SUBJECTS,
                ["The subject that {} studied is {}.", "At university {} took {}.",
                 "The degree of {} is in {}."],
                ["What did {} study?", "In which subject does {} have a degree?"]),
}


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
        if not 1 <= self.exposures < np.inf:
            raise ValueError(f"exposures={self.exposures} must be at least 1")
        at_least(0, self, "zipf", "questions", "seed")
        if self.zipf == np.inf:
            raise ValueError("zipf=inf must be finite")
        for name in ("ask", "held_out"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must be between 0 and 1")


def make_names(rng, count: int, syllables: int) -> list[str]:
    """`count` different pronounceable words with a capital."""
    names = {}  # a dict keeps the order
    while len(names) < count:
        parts = [rng.choice(list("bdfghjklmnprstvwz")) + rng.choice(list("aeiou")) for _ in range(syllables)]
        names["".join(parts).capitalize() + rng.choice(["", *"lmnrst"])] = None
    return list(names)


def facts(config: FactsConfig) -> None:
    """Facts about people who do not exist. A model can learn these facts only from this corpus."""
    rng = np.random.default_rng(config.seed)
    # four times as many possible names as people, so one part of a name does not identify a person
    parts = int(np.ceil(2 * config.people**0.5))
    first, last = make_names(rng, parts, 2), make_names(rng, parts, 3)
    pairs = rng.choice(parts**2, config.people, replace=False)
    law = np.arange(1, config.people + 1) ** -config.zipf
    exposures = np.maximum(1, np.round(law / law.mean() * config.exposures)).astype(int)
    held_out = rng.permutation(config.people) < config.held_out * config.people

    # A line is four fragments: up to the name, first name, last name, and the rest with the value. The number
    # of its rest, in `rests`, says which attribute, statement or question, and value it has
    fragments = [f" {name}" for name in first + last]
    rests, beginnings, offsets = [], [], []  # the fragments of each rest, and of the beginning before it
    for values, statements, questions in ATTRIBUTES.values():
        offsets.append(len(rests))
        for form in (*statements, *(f"Question: {question} Answer: {{}}" for question in questions)):
            beginning, rest = form.split(" {}", 1)
            beginnings += [len(fragments)] * len(values)
            rests += range(len(fragments) + 1, len(fragments) + 1 + len(values))
            fragments += [beginning, *(rest.format(value) + "\n" for value in values)]
    rests, beginnings = np.array(rests), np.array(beginnings)

    told, val, asked = [], [], []  # lines, as person * len(rests) + number of the rest
    for person in range(config.people):
        for offset, (values, statements, questions) in zip(offsets, ATTRIBUTES.values(), strict=True):
            value = rng.integers(len(values))
            asks = (rng.random(exposures[person]) < config.ask) & ~held_out[person]
            asks = np.append(asks, (False, True))  # the last two: a statement for val.bin, and qa.jsonl
            forms = rng.integers(np.where(asks, len(questions), len(statements))) + asks * len(statements)
            lines = person * len(rests) + offset + forms * len(values) + value
            told.append(lines[:-2])
            val.append(lines[-2])
            asked.append(lines[-1])
    told, val, asked = np.concatenate(told), np.array(val), np.array(asked)
    rng.shuffle(told)
    rng.shuffle(val)

    def split_lines(lines):  # (lines, 4): the fragments
        person, rest = np.divmod(lines, len(rests))
        pair = pairs[person]
        return np.stack((beginnings[rest], pair // parts, parts + pair % parts, rests[rest]), axis=1)

    def texts(split):
        lines = told if split == "train" else val
        return (split_lines(lines[i:i + 2**16]).ravel() for i in range(0, len(lines), 2**16))

    if config.questions:  # some of each exposure bin, which double in width (evaluate.py), and of held_out
        bins = np.where(held_out, 0, np.frexp(exposures)[1])[asked // len(rests)]
        order = rng.permutation(len(asked))
        asked = asked[np.sort(np.concatenate([order[bins[order] == number][:config.questions]
                                              for number in np.unique(bins)]))]
    questions = []
    for person, ids in zip(asked // len(rests), split_lines(asked), strict=True):
        prompt, answer = "".join(fragments[i] for i in ids).removesuffix("\n").split(" Answer: ")
        questions.append({"prompt": f"{prompt} Answer:", "answer": answer,
                          "exposures": int(exposures[person]), "held_out": bool(held_out[person])})
    note = ("The validation text tells each fact once, but the training text tells some facts more often "
            "than others. So the validation loss is above the training loss.")
    write_corpus(config.name, config, texts, questions, note if config.zipf else "", fragments)


# --- mqar ---------------------------------------------------------------------------------------------------

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
    Multi-query associative recall (Arora et al. 2023, "Zoology", arXiv 2312.04927). A document is one line:
    first all pairs of words, then some of these pairs again. A colon marks the last pair, the question. Each
    document has new pairs, so the answer is always in the context, and there is nothing to remember.
    """
    rng = np.random.default_rng(config.seed)
    words = make_names(rng, config.keys + config.values, 3)

    def draw():  # the line up to the last key, and its value
        keys = rng.choice(config.keys, config.pairs, replace=False)
        values = config.keys + rng.choice(config.values, config.pairs, replace=False)
        pairs = [f" {words[key]} {words[value]}" for key, value in zip(keys, values, strict=True)]
        *asked, last = (pairs[i] for i in rng.integers(config.pairs, size=config.asks))
        _, key, value = last.split(" ")
        return "".join(pairs + asked) + f" : {key}", value

    few = -(-config.documents // 50)
    lines = {split: [draw() for _ in range(count)]
             for split, count in (("train", config.documents), ("val", few), ("questions", few))}
    questions = [{"prompt": prompt, "answer": answer} for prompt, answer in lines["questions"]]
    write_corpus("mqar", config, lambda split: (f"{p} {a}\n{END}" for p, a in lines[split]), questions)


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
                yield f.read() + END
        except (SyntaxError, UnicodeDecodeError):
            pass  # lib2to3 has files that are broken on purpose


@dataclass
class CodeConfig(SplitConfig):
    input: tuple[str, ...] = ()  # folders with Python source; none: the packages installed for this Python
    vocab_size: int = 8192  # most tokens that the tokenizer may have; it is built from 4,000 files
    val_share: float = 0.02  # share of the files that is kept for validation
    tokens: int = 0  # most tokens in train.bin; 0: no limit

    def __post_init__(self):
        super().__post_init__()
        at_least(0, self, "tokens")


def code(config: CodeConfig) -> None:
    """The Python source of all installed packages. The order of the files depends on their names only."""
    packages = [name for name in sys.path if Path(name).name in ("site-packages", "dist-packages")]
    files = []
    for folder in map(Path, config.input or packages):
        if not folder.is_dir():
            fail(f"--input {folder}: no such folder")
        names = (path.relative_to(folder) for path in folder.rglob("*.py") if path.is_file())
        files += [(name_number(name), name, folder) for name in names]
    splits, seen = {"train": [], "val": []}, set()
    for number, name, folder in sorted(files):
        content = hashlib.sha256((folder / name).read_bytes()).digest()
        if content not in seen:  # many packages bring the same file: the first one counts
            seen.add(content)
            splits["val" if number < config.val_share else "train"].append(folder / name)
    write_corpus("code", config, lambda split: read_sources(splits[split]), sample=4000,
                 limit=config.tokens or None)


@dataclass
class TextConfig(SplitConfig):
    input: tuple[str, ...] = ()  # files of UTF-8 text, each a document
    name: str = "text"  # the folder under data/
    val_share: float = 0.1  # share of each file, at its end, that is kept for validation


def text(config: TextConfig) -> None:
    """Any text. Files are read in blocks, so that they may be larger than the memory."""
    if not config.input:
        fail("name the files: --input FILE ...")
    for name in config.input:
        try:
            with open(name, encoding="utf-8") as f:
                while f.read(2**20):
                    pass
        except OSError as error:
            fail(f"--input {name}: {error.strerror}")
        except UnicodeDecodeError as error:
            fail(f"--input {name}: not UTF-8 ({error.reason} near byte {error.start}); convert it first")

    def texts(split: str) -> Iterator[str]:
        for name in config.input:
            size = Path(name).stat().st_size
            block = max(1, min(2**16, int(size * config.val_share / 16)))  # characters, of 4 bytes at most
            read = 0
            with open(name, encoding="utf-8", newline="") as f:
                while piece := f.read(block) + f.readline(block):
                    in_val = read >= size * (1 - config.val_share)
                    read += len(piece.encode())
                    if in_val == (split == "val"):
                        yield piece
            yield END

    write_corpus(config.name, config, texts)


CORPORA = {"facts": (facts, FactsConfig), "stdlib": (stdlib, SplitConfig), "code": (code, CodeConfig),
           "mqar": (mqar, MqarConfig), "text": (text, TextConfig)}

# corpora that training makes when it needs them, by the name of their folder under data/
READY_MADE = {
    "facts": (facts, FactsConfig()),
    "facts-2000": (facts, FactsConfig(name="facts-2000", people=2000, exposures=30.0, zipf=1.0)),
    "facts-4000": (facts, FactsConfig(name="facts-4000", people=4000, exposures=30.0, zipf=1.0)),
    # most people are told once or twice
    "facts-large": (facts, FactsConfig(name="facts-large", people=200_000, exposures=8.0, zipf=1.0,
                                       questions=256)),
    "stdlib": (stdlib, SplitConfig()),
    "code": (code, CodeConfig()),
    "mqar": (mqar, MqarConfig()),
}


@command
def main(argv: list[str] | None = None) -> None:
    name, arguments = first_word(argv, CORPORA, __doc__, "a corpus")
    make, config_class = CORPORA[name]
    _, options = parse(config_class, arguments, description=f"{name}: {make.__doc__}")
    make(build(config_class, options))


if __name__ == "__main__":
    main()
