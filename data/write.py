"""
Writes the folder of a corpus, data/NAME: train.bin and val.bin (token ids), meta.json and, if the corpus has
questions, qa.jsonl.
"""

import contextlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

from runtime.cli import fail, read_json_lines

import numpy as np
from tqdm import tqdm

from data import corpus, tokenizer

# a tokenizer is learnt from about so many characters per token. A shorter text gets fewer tokens, so that
# each occurs often enough for a model to learn it. Of a longer text, a sample is enough
CHARACTERS = 2048

BLOCK_SIZE = 128  # the default of train.py, which imports PyTorch

LIMITS = {  # the smallest and the largest value of an option
    "vocab_size": (257, 2**20),  # 256 bytes and END
    "people": (1, 10**6), "documents": (1, 10**9), "pairs": (1, 10**4), "asks": (1, 10**4),
    "exposures": (1, 10**6), "zipf": (0, 100), "ask": (0, 1), "held_out": (0, 1),
    "val_share": (0.0001, 0.9999), "code_tokens": (1, 3), "seed": (0, 2**32), "longest_fact": (0, 10**6),
}


@dataclass
class Corpus:
    """The options of all corpora."""
    name: str = ""  # the folder under data/
    tokenizer: str = ""  # that of a corpus, or one to download, such as gpt2; none: build one from the corpus
    vocab_size: int = 4096  # most tokens of a tokenizer that is built from the corpus
    overwrite: bool = False  # replace a corpus of the same name that was made with other options

    def __post_init__(self):
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name, low)
            if not low <= value <= high:  # as for nan
                raise ValueError(f"{name}={value} must be between {low} and {high}")


def options_of(options, left_out=("overwrite",)) -> dict:
    """The options that decide what a corpus contains, or what a run is, as JSON has them."""
    values = {name: value for name, value in asdict(options).items() if name not in left_out}
    return json.loads(json.dumps(values))


def with_defaults(options: Corpus, stored: dict) -> dict:
    """The options of a corpus, as stored in a file. It may be older than an option, which had its default."""
    return options_of(type(options)(options.name)) | stored


def corpus_folder(options: Corpus) -> Path:
    """The folder for a corpus. Fails if another corpus is there, which must not get lost."""
    if Path(options.name).name != options.name or options.name in ("", ".."):
        fail(f"--name={options.name} must be a plain name: data/NAME is where the corpus goes")
    folder = corpus.DATA / options.name
    if (folder / "train.bin").exists() and not options.overwrite:
        # meta.json is one line; there is none if the file is damaged
        made_with = [with_defaults(options, meta["options"])
                     for meta in read_json_lines(folder / "meta.json")]
        if made_with != [options_of(options)]:
            fail(f"{folder} has a corpus that was made with other options: choose another --name, "
                 "or replace it with --overwrite")
    return folder


def write_files(folder: Path, options: Corpus, texts, fragments, pattern, size) -> dict:
    """Writes train.bin and val.bin. Returns what meta.json tells about them."""
    if (corpus.DATA / options.tokenizer / "meta.json").exists():
        encoding = corpus.Dataset(options.tokenizer).encoding
    elif options.tokenizer:
        encoding = tokenizer.named_encoding(options.tokenizer)
    elif fragments:
        counts = sum(np.bincount(ids, minlength=len(fragments)) for ids in texts("train"))
        encoding = tokenizer.word_encoding(fragments, counts.tolist(), options.vocab_size, pattern)
    else:
        print(f"{options.name}: building a tokenizer from the corpus")
        vocab_size = min(options.vocab_size, 257 + size // CHARACTERS)
        encoding = tokenizer.train_bpe(texts("train"), vocab_size, 1 + size // (vocab_size * CHARACTERS))
    sizes = np.zeros(encoding.n_vocab, np.int64)  # the bytes of each token; END has none
    for token, rank in encoding._mergeable_ranks.items():
        sizes[rank] = len(token)
    meta = {"vocab_size": encoding.n_vocab, "dtype": "uint16" if encoding.n_vocab <= 2**16 else "uint32",
            "encoding": tokenizer.encoding_to_json(encoding)}
    with tqdm(desc=options.name, total=size or None, unit="B", unit_scale=True, leave=False,
              disable=None) as bar:
        for split in ("train", "val"):
            tokens = (tokenizer.encode_fragments(encoding, fragments, texts(split)) if fragments else
                      tokenizer.encode_texts(encoding, texts(split)))
            number_of_tokens = number_of_bytes = 0
            with open(folder / f"{split}.bin", "wb") as f:
                for ids in tokens:
                    f.write(ids.astype(meta["dtype"]))
                    number_of_tokens += len(ids)
                    number_of_bytes += int(sizes[ids].sum())
                    bar.update(int(sizes[ids].sum()))
            if number_of_tokens < 2:
                fail(f"the text is too short, {split}.bin would be empty")
            meta |= {f"{split}_tokens": number_of_tokens, f"{split}_bytes": number_of_bytes}
    return meta


def write_corpus(options: Corpus, texts: Callable[[str], Iterable], questions: list[dict] | None = None,
                 fragments: list[str] | None = None, pattern: str = tokenizer.SPLIT, size: int = 0,
                 note: str = "") -> None:
    """
    texts('train') and texts('val') return new iterators. The last text of a document ends with END. size:
    about the characters of both splits. note: a sentence that training prints at the end.

    fragments: a text is not a string, but an array of indices into these strings. The tokenizer then has one
    token per word: per piece of `pattern`. Each fragment must start a new piece wherever it stands.
    """
    folder = corpus_folder(options)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # on the same disk as the old corpus, which stays until the new files need only be moved
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
            new = Path(temporary)
            meta = write_files(new, options, texts, fragments, pattern, size)
            meta |= {"options": options_of(options), "note": note}
            meta["sha256"] = [corpus.digest(new / name) for name in ("train.bin", "val.bin")]
            (new / "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            if questions:
                lines = "".join(json.dumps(question) + "\n" for question in questions)
                (new / "qa.jsonl").write_text(lines, encoding="utf-8", newline="\n")
            # meta.json comes last: until then the old one stays, with its tokenizer. After a kill in between,
            # Dataset finds that the texts are not the ones that meta.json describes
            for file in sorted(new.iterdir(), reverse=True):
                file.replace(folder / file.name)
    except OSError as error:
        error.filename = error.filename or os.path.relpath(folder)  # Python does not say which disk is full
        raise
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty: nothing half-written stays
    print(f"{options.name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
          f"{meta['train_bytes'] / meta['train_tokens']:.2f} bytes per token, vocabulary of "
          f"{meta['vocab_size']:,}, {len(questions or []):,} questions, in {os.path.relpath(folder)}")
    if meta["train_bytes"] < 1.5 * meta["train_tokens"]:
        print(f"{options.name}: most characters are cut into single bytes, because the text is short: "
              f"{CHARACTERS:,} characters allow one more token. Use more text, or another --tokenizer")
    if (tokens := min(meta["train_tokens"], meta["val_tokens"])) <= BLOCK_SIZE:
        print(f"{options.name}: too small to train on: one split has {tokens} tokens, and train.py needs "
              f"more than its --block_size, {BLOCK_SIZE} by default")
