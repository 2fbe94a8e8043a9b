"""
Writes the folder of a corpus, data/NAME: train.bin and val.bin (token ids), meta.json and, if the corpus has
questions, qa.jsonl.
"""

import contextlib
import json
import sys
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from data import corpus, tokenizer
from runtime.cli import fail

# a tokenizer is learnt from about so many characters per token. A shorter text gets fewer tokens, so that
# each occurs often enough for a model to learn it. Of a longer text, a sample is enough
CHARACTERS = 2048


def between(low: float, high: float, options, *names: str) -> None:
    """For __post_init__ of a dataclass: a ValueError if one of these fields is not from `low` to `high`."""
    for name in names:
        if not low <= getattr(options, name) <= high:  # as for nan
            raise ValueError(f"{name}={getattr(options, name)} must be between {low:,} and {high:,}")


@dataclass
class Corpus:
    """The options of all corpora."""

    tokenizer: str = ""  # a tiktoken encoding to download, such as gpt2; none: build one from the corpus
    vocab_size: int = 4096  # most tokens of a tokenizer that is built from the corpus
    overwrite: bool = False  # replace a corpus of the same name that was made with other options

    def __post_init__(self):
        between(257, 2**20, self, "vocab_size")  # 256 bytes and END


def options_of(options: Corpus) -> dict:
    """The options that decide what a corpus contains, as meta.json has them."""
    values = asdict(options)
    del values["overwrite"]
    return json.loads(json.dumps(values))


def corpus_folder(name: str, options: Corpus) -> Path:
    """The folder for a corpus. Fails if another corpus is there, which must not get lost."""
    if Path(name).name != name or name in ("", ".."):
        fail(f"--name={name} must be a plain name: data/NAME is where the corpus goes")
    folder = corpus.DATA / name
    if (folder / "train.bin").exists() and not options.overwrite:
        try:
            made_with = json.loads((folder / "meta.json").read_text(encoding="utf-8"))["options"]
            # an older corpus lacks newer options
            is_same = options_of(type(options)()) | made_with == options_of(options)
        except (OSError, ValueError, KeyError, TypeError):
            is_same = False
        if not is_same:
            fail(f"{folder} has a corpus that was made with other options: choose another --name, "
                 "or add --overwrite to replace it")
    return folder


def make_tokenizer(name, options, texts, fragments, size, pattern):
    """The encoding of a corpus. The arguments are those of write_corpus."""
    if options.tokenizer:
        return tokenizer.named_encoding(options.tokenizer)
    if fragments:
        counts = sum(np.bincount(ids, minlength=len(fragments)) for ids in texts("train"))
        return tokenizer.word_encoding(fragments, counts.tolist(), options.vocab_size, pattern)
    print(f"{name}: building a tokenizer from the corpus")
    vocab_size = min(options.vocab_size, 257 + size // CHARACTERS)
    return tokenizer.train_bpe(texts("train"), vocab_size, every=1 + size // (vocab_size * CHARACTERS))


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


def write_corpus(name: str, options: Corpus, texts: Callable[[str], Iterable],
                 questions: list[dict] | None = None, note: str = "", fragments: list[str] | None = None,
                 size: int = 0, limit: int | None = None, pattern: str = tokenizer.SPLIT) -> None:
    """
    texts('train') and texts('val') return new iterators. The last text of a document ends with END. note: a
    sentence that training prints at the end. size: about the characters of both splits. limit: most tokens in
    train.bin. None: all.

    fragments: a text is not a string, but an array of indices into these strings. The tokenizer then has one
    token per word: per piece of `pattern`. Each fragment must start a new piece wherever it stands.
    """
    folder = corpus_folder(name, options)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        # on the same disk as the old corpus, which stays until the new files need only be moved
        with tempfile.TemporaryDirectory(prefix=".new-", dir=folder) as temporary:
            encoding = make_tokenizer(name, options, texts, fragments, size, pattern)
            sizes = tokenizer.token_sizes(encoding)
            meta = {"vocab_size": encoding.n_vocab,
                    "dtype": "uint16" if encoding.n_vocab <= 2**16 else "uint32",
                    "options": options_of(options), "note": note,
                    "encoding": tokenizer.encoding_to_json(encoding)}
            with tqdm(desc=f"{name}: encoding", total=size or None, unit=" characters", unit_scale=True,
                      leave=False, disable=None) as bar:
                for split in ("train", "val"):
                    tokens = (tokenizer.encode_fragments(encoding, fragments, texts(split)) if fragments else
                              tokenizer.encode_texts(encoding, texts(split)))
                    most = limit if limit and split == "train" else sys.maxsize
                    meta |= write_tokens(Path(temporary, f"{split}.bin"), tokens, sizes, most, bar)
            if questions:
                lines = "".join(json.dumps(question) + "\n" for question in questions)
                Path(temporary, "qa.jsonl").write_text(lines, encoding="utf-8")
            Path(temporary, "meta.json").write_text(json.dumps(meta), encoding="utf-8")
            # a folder with meta.json is complete, so meta.json goes first and comes last. Open files keep
            # their contents
            (folder / "meta.json").unlink(missing_ok=True)
            for file in sorted(Path(temporary).iterdir(), key=lambda file: file.name == "meta.json"):
                file.replace(folder / file.name)
    finally:
        with contextlib.suppress(OSError):
            folder.rmdir()  # if it is empty: nothing half-written stays
    if not questions and (folder / "qa.jsonl").exists():
        print(f"{name}: the questions in {folder / 'qa.jsonl'} stay")
    print(f"{name}: {meta['train_tokens']:,} tokens to train on, {meta['val_tokens']:,} to validate, "
          f"{meta['train_characters'] / meta['train_tokens']:.2f} characters per token, "
          f"vocabulary of {meta['vocab_size']:,}"
          + (f", {len(questions):,} questions" if questions else "") + f", in {folder}")
    if meta["train_characters"] < 0.6 * meta["train_tokens"]:
        print(f"{name}: most characters are cut into single bytes, because each is rare. Use more text, or "
              "a --tokenizer that knows them")
