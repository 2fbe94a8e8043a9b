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

import numpy as np
import regex
import tiktoken

from runtime.cli import fail

END = "<|endoftext|>"  # stands between documents
# A text is first cut into pieces, and no token is longer than a piece. This is GPT-2's pattern with two
# changes: a piece has a greatest length, and accents (\p{M}) stay with their letters, as many scripts need
SPLIT = (r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,24}| ?\p{N}{1,24}| ?[^\s\p{L}\p{M}\p{N}]{1,24}"
         r"|\s{1,24}(?!\S)|\s{1,24}")
BLOCK = 2**16  # characters that are read and encoded at a time


def make_encoding(tokens: Iterable[bytes], pattern: str = SPLIT) -> tiktoken.Encoding:
    """An encoding of the 256 bytes, then these tokens, and END."""
    ranks = {bytes([byte]): byte for byte in range(256)}
    for token in tokens:
        ranks.setdefault(token, len(ranks))
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
    blocks = islice(cut_blocks(texts, SPLIT), 0, None, every)
    bpe.train_from_iterator((block.removesuffix(END) for block in blocks), vocab_size - 1, buffer_size=64,
                            pattern=SPLIT)
    return make_encoding(bytes(token) for token, _ in bpe.get_mergeable_ranks())


def word_encoding(fragments: list[str], counts: Iterable[int], vocab_size: int,
                  pattern: str = SPLIT) -> tiktoken.Encoding:
    """
    Each word of the fragments is one token, the most frequent first. counts: uses of each fragment. pattern:
    what a word is.
    """
    words = Counter()
    for fragment, count in zip(fragments, counts, strict=True):
        if fragment != END:
            words.update({word: n * count for word, n in Counter(regex.findall(pattern, fragment)).items()})
    by_count = sorted((-count, word) for word, count in words.items() if count)  # ties: by the alphabet
    tokens = make_encoding(word.encode() for _, word in by_count)._mergeable_ranks
    return make_encoding(list(tokens)[:vocab_size - 1], pattern)


def named_encoding(name: str) -> tiktoken.Encoding:
    try:
        return tiktoken.get_encoding(name)
    except (OSError, ValueError):
        fail(f"--tokenizer={name}: tiktoken could not get it, it downloads "
             f"{', '.join(tiktoken.list_encoding_names())}; without --tokenizer one is built from the corpus")


# --- files --------------------------------------------------------------------------------------------------

def encoding_to_json(encoding: tiktoken.Encoding) -> dict:
    """Everything that `encoding_from_json` needs. Tokens are base64, in order of their ids."""
    ranks = encoding._mergeable_ranks
    return {"name": encoding.name, "pat_str": encoding._pat_str, "special_tokens": encoding._special_tokens,
            "tokens": {base64.b64encode(token).decode(): rank for token, rank in ranks.items()}}


def encoding_from_json(stored: dict) -> tiktoken.Encoding:
    ranks = {base64.b64decode(token): rank for token, rank in stored["tokens"].items()}
    return tiktoken.Encoding(stored["name"], pat_str=stored["pat_str"], mergeable_ranks=ranks,
                             special_tokens=stored["special_tokens"])


# --- text into tokens ---------------------------------------------------------------------------------------

# Every pattern cuts between a letter or digit and one of these characters, whatever else the text has
CUT = re.compile(r".*[^\W_](?=[\s.,:;!?()\[\]{}<>=/+*。，、！？；：])", re.DOTALL)


def find_cut(text: str, pattern: str) -> int:
    """The last place in `text` where `pattern` surely cuts, however the text goes on. 0: there is none."""
    if match := CUT.match(text):
        return match.end()
    # a piece is final if it ends well before the end of the text. Patterns look ahead only for spaces
    ends = [piece.end() for piece in regex.finditer(pattern, text)
            if piece.end() < len(text) - 32 and not piece[0][-1].isspace()]
    return ends[-1] if ends else 0


def cut_blocks(texts: Iterable[str], pattern: str) -> Iterator[str]:
    """
    Joins the texts up to each END, and cuts them into blocks where `pattern` cuts, too. So the tokens of a
    long text do not depend on how it was cut into `texts`.
    """
    rest, enough = "", BLOCK
    for text in texts:
        rest += text
        if text.endswith(END):
            yield rest
            rest, enough = "", BLOCK
        elif len(rest) >= enough:
            cut = find_cut(rest, pattern)
            if cut:
                yield rest[:cut]
            rest, enough = rest[cut:], BLOCK if cut else 2 * len(rest)
    if rest:
        yield rest


def encode_texts(encoding: tiktoken.Encoding, texts: Iterable[str]) -> Iterator[np.ndarray]:
    """The tokens of the texts, at most 32 blocks at a time. tiktoken encodes these in several threads."""
    blocks = cut_blocks(texts, encoding._pat_str)
    while batch := list(islice(blocks, 32)):
        try:
            encoded = encoding.encode_ordinary_batch([block.removesuffix(END) for block in batch])
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of Rust
                raise
            fail(f"the tokenizer {encoding.name} cannot encode this text: has it a very long run of spaces?")
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


def token_sizes(encoding: tiktoken.Encoding) -> np.ndarray:
    """(2, n_vocab): the bytes of each token, and the characters that start in it. END has none."""
    sizes = np.zeros((2, encoding.n_vocab), np.int64)
    for token, rank in encoding._mergeable_ranks.items():
        sizes[:, rank] = len(token), sum(byte & 0xC0 != 0x80 for byte in token)
    return sizes
