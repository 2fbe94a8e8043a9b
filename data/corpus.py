"""
Reads a corpus that data/prepare.py made: tokens, batches and questions. Turns tokens back into text.
"""

import json
import re

import numpy as np
import torch

from data.prepare import DATA, END, READY_MADE
from data.questions import *  # noqa: F403
from data.questions import read_questions
from data.tokenizer import encoding_from_json, encoding_to_json
from runtime.cli import fail
from runtime.distributed import LOCAL_RANK, RANK, WORLD_SIZE, gather_objects


class Dataset:
    """
    The corpus in data/NAME: token ids `train` and `val` (memory-mapped files), `val_bytes` (of the validation
    text as UTF-8; 0: unknown), `encoding`, `questions` and `note`, a sentence about the corpus or "". If
    data/NAME is missing, a corpus in READY_MADE is made.
    """

    def __init__(self, name: str):
        folder = DATA / name
        if not (folder / "meta.json").exists():
            if name not in READY_MADE:
                fail(f"no data in {folder}; make it: python data/prepare.py text --name={name} --input ...")
            make, config = READY_MADE[name]
            make(config)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
            self.encoding_json, self.encoding = meta["encoding"], encoding_from_json(meta["encoding"])
            self.note, self.val_bytes = meta.get("note", ""), meta.get("val_bytes", 0)
            self.train = np.memmap(folder / "train.bin", meta["dtype"], "r")
            self.val = np.memmap(folder / "val.bin", meta["dtype"], "r")
            for split, tokens in (("train", self.train), ("val", self.val)):
                if len(tokens) != meta[f"{split}_tokens"]:
                    raise ValueError(f"{split}.bin has {len(tokens)} tokens, not {meta[f'{split}_tokens']}")
        except (OSError, ValueError, KeyError, TypeError) as error:
            fail(f"the data in {folder} is damaged ({error}): make it again with data/prepare.py")
        self.questions = read_questions(folder / "qa.jsonl")


def load_dataset(name: str) -> Dataset:
    """
    Loads the same corpus in all processes. If the corpus must be made, the first process makes it. Machines
    that do not share its disk then make their own copy.
    """
    data = None
    for has_turn in (RANK == 0, LOCAL_RANK == 0, True):
        data = data or (Dataset(name) if has_turn else None)
        gather_objects(None)  # waits for all processes
    sizes = gather_objects((data.encoding_json, len(data.train), len(data.val), len(data.questions)))
    if any(size != sizes[0] for size in sizes):
        fail(f"{name} differs between machines: copy data/{name} from one to the others")
    return data


def load_dataset_of(name: str, encoding) -> Dataset:
    """The corpus of a trained model. Fails if it was made again, with other tokens than `encoding`."""
    data = load_dataset(name)
    if encoding_to_json(encoding) != data.encoding_json:
        fail(f"data/{name} and this model have different tokenizers: make the corpus again as it was, or "
             "choose another --out_dir")
    return data


def draw_batch(tokens: np.ndarray, count: int, block_size: int, *key: int):
    """
    Draws `count` windows of `tokens`, and returns this process's share of them. The random numbers depend
    only on `key`.

    Returns x, y (count / processes, block_size), int64. y has the next token for each token of x.
    """
    starts = np.random.default_rng(key).integers(len(tokens) - block_size, size=count)[RANK::WORLD_SIZE]
    windows = torch.from_numpy(np.stack([tokens[s:s + block_size + 1] for s in starts]).astype(np.int64))
    return windows[:, :-1], windows[:, 1:]


def token_bytes(encoding, token: int) -> bytes:
    """b"" for an id that the encoding does not use: an untrained model may produce it."""
    try:
        return encoding.decode_single_token_bytes(token)
    except KeyError:
        return b""


def decode(encoding, tokens: list[int]) -> str:
    return b"".join(token_bytes(encoding, token) for token in tokens).decode(errors="replace")


def decode_answer(encoding, tokens: list[int]) -> str:
    """tokens -> text, up to the end of the line or document. An answer that was cut ends with "…"."""
    text = decode(encoding, tokens)
    answer = re.split(f"\n|{re.escape(END)}", text)[0]
    return answer.strip() + "…" * (answer == text)
