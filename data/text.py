"""
Reads text files and Python files for a corpus, a block at a time, and cuts them into documents and splits.
"""

import codecs
import contextlib
import glob
import gzip
import hashlib
import re
import tokenize
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.cli import fail

from data.tokenizer import BLOCK, END

# --- any text -----------------------------------------------------------------------------------------------

def find_files(name: str) -> list[Path]:
    """The files that a user means by a path, a folder or a pattern such as texts/*.txt."""
    path = Path(name).expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        return sorted(filter(is_text, path.rglob("*"))) or fail(
            f"--input {name}: this folder has no .txt files. Name files, or a pattern in quotes: '{path}/*'")
    paths = map(Path, glob.glob(str(path), recursive=True))
    return sorted(filter(Path.is_file, paths)) or fail(
        f"--input {name}: no such file" + " (save a stream to a file first)" * path.exists())


def is_text(path: Path) -> bool:
    return path.is_file() and path.name.lower().endswith((".txt", ".txt.gz"))


def read_blocks(path: Path) -> Iterator[str]:
    """The text of a file: UTF-8, or UTF-16 as Windows writes it, also .gz."""
    open_file = gzip.open if path.suffix == ".gz" else open
    try:
        with open_file(path, "rb") as f:
            is_utf16 = f.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        with open_file(path, "rt", encoding="utf-16" if is_utf16 else "utf-8-sig", newline="") as f:
            while block := f.read(BLOCK):
                if "\0" in block:
                    fail(f"--input {path}: not a text file (it has zero bytes)")
                yield block
    except UnicodeDecodeError as error:
        fail(f"--input {path}: not UTF-8 ({error.reason}); convert it first: iconv -f LATIN1 -t UTF-8")
    except (OSError, EOFError, zlib.error) as error:
        fail(f"--input {path}: {getattr(error, 'strerror', None) or error}")


def cut_at_border(blocks: Iterable[str], border: int, split: str) -> Iterator[str]:
    """
    The first `border` characters for training, or all others for validation. The border moves to the next end
    of a line or, if that is far away, of a word.
    """
    for block in blocks:
        cut, border = max(0, border), border - len(block)
        if 0 < cut < len(block):
            cut = re.compile(r".*[\r\n]+|\S{0,24}").match(block, cut, (cut + len(block)) // 2).end()
        yield block[:cut] if split == "train" else block[cut:]


SEPARATOR = re.compile(re.escape(END) + r"[\r\n]*(?=[^\r\n])")


def split_documents(blocks: Iterable[str]) -> Iterator[str]:
    """
    Cuts a text at each END in it. The line breaks after END go. The last text of a document ends with END. An
    empty text has no document. ["one<|endoft", "ext|>\\ntwo"] -> "one<|endoftext|>", "two<|endoftext|>"
    """
    held = ""
    for block in blocks:
        *documents, held = SEPARATOR.split(held + block)
        yield from (document + END for document in documents)
        # what is held back may be the beginning of END, or END with the first of its line breaks
        ready = held.find(END) if END in held else max(0, len(held) - len(END))
        yield held[:ready]
        held = held[ready:]
    if held:
        yield held.partition(END)[0] + END


# --- Python -------------------------------------------------------------------------------------------------

def read_source(path: Path) -> str:
    with tokenize.open(path) as f:  # in the encoding that the file declares
        return f.read() + END


def find_sources(folders: Iterable[Path], val_share: float, skip: Iterable[str] = ()):
    """
    Python files, each content once. Returns {"train": paths, "val": paths}, and the bytes of all files.

    The name of a file decides its split and its place. So these are the same on every machine, and the first
    files are a sample of all. skip: names of folders to leave out.
    """
    numbered = []
    for folder in folders:
        for path in folder.rglob("*.py"):
            name = path.relative_to(folder)
            if path.is_file() and not set(skip) & set(name.parts):
                checksum = hashlib.sha256(name.as_posix().encode()).digest()
                numbered.append((int.from_bytes(checksum[:8], "big") / 2**64, path))  # from 0 to 1
    splits, seen, size = {"train": [], "val": []}, set(), 0
    for number, path in sorted(numbered):
        with contextlib.suppress(SyntaxError, UnicodeError):  # lib2to3 has files that are broken on purpose
            content = read_source(path).encode()
            checksum = hashlib.sha256(content).digest()
            if checksum not in seen:  # many packages bring the same file
                seen.add(checksum)
                splits["val" if number < val_share else "train"].append(path)
                size += len(content)
    return splits, size
