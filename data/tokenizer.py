"""
Text into tokens and back. A tokenizer is a tiktoken.Encoding:

    train_bpe         byte pair encoding, learnt from a text
    word_encoding     one token per word, for texts that are made of few words
    named_encoding    downloaded, such as gpt2
"""

import base64
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import islice

from runtime.cli import fail

import numpy as np
import regex
import tiktoken

END = "<|endoftext|>"  # stands between documents
# A text is first cut into pieces, and no token is longer than a piece. This is GPT-2's pattern with two
# changes: a piece has a greatest length, and accents (\p{M}) stay with their letters, as many scripts need
SPLIT = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,24}| ?\p{N}{1,24}| ?[^\s\p{L}\p{M}\p{N}]{1,24}"
         r"|\s{1,24}(?!\S)|\s{1,24}")
BLOCK = 2**16  # characters that are read and encoded at a time


def make_encoding(tokens: Iterable[bytes], vocab_size: int, pattern: str = SPLIT) -> tiktoken.Encoding:
    """An encoding of the 256 bytes, then these tokens, and END: at most `vocab_size` in all."""
    tokens = dict.fromkeys([*(bytes([byte]) for byte in range(256)), *tokens])  # each once
    ranks = {token: rank for rank, token in enumerate(list(tokens)[:vocab_size - 1])}
    return tiktoken.Encoding("corpus", pat_str=pattern, mergeable_ranks=ranks,
                             special_tokens={END: len(ranks)})


# --- three kinds of tokenizers ------------------------------------------------------------------------------

def train_bpe(texts: Iterable[str], vocab_size: int, every: int = 1) -> tiktoken.Encoding:
    """
    Byte pair encoding: the most frequent pair of neighbouring tokens becomes a new token, again and again,
    until there are `vocab_size` tokens. every: 3 learns from every third block, which is enough of a large
    text.
    """
    try:
        import rustbpe
    except ImportError:
        fail("a tokenizer for this text needs the package rustbpe: pip install rustbpe, or --tokenizer=gpt2")
    bpe = rustbpe.Tokenizer()
    blocks = islice(cut_blocks(texts), 0, None, every)
    bpe.train_from_iterator((block.removesuffix(END) for block in blocks), vocab_size - 1, buffer_size=64,
                            pattern=SPLIT)
    return make_encoding((bytes(token) for token, _ in bpe.get_mergeable_ranks()), vocab_size)


def word_encoding(fragments: list[str], counts: Iterable[int], vocab_size: int,
                  pattern: str = SPLIT) -> tiktoken.Encoding:
    """
    Each word of the fragments is one token, the most frequent first. counts: uses of each fragment. pattern:
    what a word is.
    """
    words = Counter()
    for fragment, count in zip(fragments, counts, strict=True):
        for word in regex.findall(pattern, fragment.removesuffix(END)):
            words[word] += count
    used = sorted(filter(words.get, words), key=lambda word: (-words[word], word))
    return make_encoding((word.encode() for word in used), vocab_size, pattern)


def named_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):
        fail(f"--tokenizer={name}: there is no corpus data/{name}, nor could tiktoken get it. It downloads "
             f"{', '.join(tiktoken.list_encoding_names())}. Without --tokenizer, one is built")


# --- files --------------------------------------------------------------------------------------------------

def encoding_to_json(encoding: tiktoken.Encoding) -> dict:
    """Everything that `encoding_from_json` needs. Tokens are base64, in order of their ids."""
    ranks = encoding._mergeable_ranks
    return {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens,
            "tokens": {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}}


def encoding_from_json(stored: dict) -> tiktoken.Encoding:
    ranks = {base64.b64decode(token): rank for token, rank in stored["tokens"].items()}
    ids = [*stored["tokens"].values(), *stored["special_tokens"].values()]
    if (len(set(ids)) < len(ids) or not all(type(i) is int and 0 <= i < 2**31 for i in ids)
            or not all(bytes([byte]) in ranks for byte in range(256))):  # tiktoken would panic, now or later
        raise ValueError("its tokenizer is damaged")
    return tiktoken.Encoding(stored["name"], pat_str=stored["pat_str"], mergeable_ranks=ranks,
                             special_tokens=stored["special_tokens"])


# --- text into tokens ---------------------------------------------------------------------------------------

# Every pattern cuts between a letter or digit and one of these characters, whatever else the text has
CUT = re.compile(r".*[^\W_](?=[\s.,:;!?()\[\]{}<>=/+*。，、！？；：])", re.DOTALL)


def cut_blocks(texts: Iterable[str]) -> Iterator[str]:
    """
    Joins the texts up to each END, and cuts them into blocks where every pattern cuts, too. So the tokens of
    a long text do not depend on how it was cut into `texts`.
    """
    rest = ""
    for text in texts:
        rest += text
        if text.endswith(END):
            yield rest
            rest = ""
        elif len(rest) >= BLOCK and (match := CUT.match(text)):
            cut = len(rest) - len(text) + match.end()
            yield rest[:cut]
            rest = rest[cut:]
    if rest:
        yield rest


def encode_texts(encoding: tiktoken.Encoding, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of the texts, at most 32 blocks at a time. tiktoken encodes these in several threads."""
    blocks = cut_blocks(texts)
    while batch := list(islice(blocks, 32)):
        encoded = encoding.encode_ordinary_batch([block.removesuffix(END) for block in batch])
        for block, tokens in zip(batch, encoded, strict=True):
            tokens += [encoding.eot_token] * block.endswith(END)
        yield np.concatenate(encoded).astype(np.int64)


def encode_fragments(encoding: tiktoken.Encoding, fragments: list[str],
                     texts: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
    """The tokens of texts that consist of few different fragments. Each fragment is encoded only once."""
    parts = [encoding.encode(fragment, allowed_special={END}) for fragment in fragments]
    lengths, tokens = np.array([len(part) for part in parts]), np.concatenate(parts).astype(np.int64)
    starts = lengths.cumsum() - lengths  # of each fragment in `tokens`
    for ids in texts:
        n = lengths[ids]
        shift = starts[ids] - (n.cumsum() - n)  # from a place in the result to a place in `tokens`
        yield tokens[np.arange(n.sum()) + shift.repeat(n)]
