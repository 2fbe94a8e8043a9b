"""data/tokenizer.py: any text comes back, and its tokens do not depend on how it was cut, nor on threads."""

import json
import os
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import regex
import tiktoken
from tiktoken_ext.openai_public import r50k_pat_str

from data import tokenizer
from data.tokenizer import END, SPLIT, encode_texts, train_bpe

# the patterns of named encodings, from tiktoken's source
PATTERNS = {
    "corpus": SPLIT,
    "gpt2": r50k_pat_str,
    "cl100k": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+|"
              r"\s++$|\s*[\r\n]|\s+(?!\S)|\s",
    "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
             r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
             r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
}
ALPHABETS = ["ab ", "a", " ", "\n", "a\r\n", "don't 'll we've ", "1a. ", "你好世界。，", "é e\u0301\u0301 ",
             "日本 \u3000", "\u00a0\u2028\x1c\x85 a", "x=[1];\n\n    ", "\U0001f642\u200d\u2764\ufe0f ",
             "कि हिन्दी ", "A-Za__/\n ", ".'\u2019\" s"]


def random_text(rng: random.Random) -> str:
    """Runs of characters of one alphabet each, some of them long."""
    return "".join(rng.choice(alphabet) for alphabet in rng.choices(ALPHABETS, k=rng.randint(1, 12))
                   for _ in range(rng.choice([1, 5, 40, 200])))


def random_cuts(text: str, rng: random.Random):
    while text:
        n = rng.choice([1, 3, 10, 30])
        yield text[:n]
        text = text[n:]


@pytest.mark.parametrize("name", PATTERNS)
def test_the_tokens_do_not_depend_on_how_a_text_was_cut(name, monkeypatch):
    monkeypatch.setattr(tokenizer, "BLOCK", 50)
    ranks = {bytes([byte]): byte for byte in range(256)}
    for pair in np.ndindex(256, 256):  # most pairs of bytes are tokens: a wrong cut shows nearly everywhere
        ranks[bytes(pair)] = len(ranks)
    encoding = tiktoken.Encoding("pairs", pat_str=PATTERNS[name], mergeable_ranks=ranks,
                                 special_tokens={END: len(ranks)})
    rng, cuts = random.Random(1), 0
    for _ in range(300):
        text = random_text(rng)
        blocks = list(tokenizer.cut_blocks(random_cuts(text, rng)))
        assert "".join(blocks) == text
        tokens = np.concatenate([*encode_texts(encoding, random_cuts(text, rng)), []]).tolist()
        assert tokens == encoding.encode_ordinary(text), repr(text)
        cuts += len(blocks) - 1
    assert cuts > 1000, "texts are cut"


def test_the_end_of_a_document_is_one_token_and_its_name_in_a_text_is_text():
    encoding = train_bpe(["a b " * 100], 300)
    tokens = np.concatenate(list(encode_texts(encoding, ["a", " b", END, "a" + END, f"x {END} y"])))
    assert tokens.tolist() == [*encoding.encode("a b"), encoding.eot_token, *encoding.encode("a"),
                               encoding.eot_token, *encoding.encode_ordinary(f"x {END} y")]


def sources() -> str:
    paths = sorted(Path(json.__file__).parent.glob("*.py"))
    return "".join(path.read_text(encoding="utf-8") for path in paths)


def test_the_merges_are_those_of_the_textbook():
    text = sources()[:8000]
    words = [[bytes([byte]) for byte in piece.encode()] for piece in regex.findall(SPLIT, text)]
    ids = {bytes([byte]): byte for byte in range(256)}
    for _ in range(150):
        counts = Counter(pair for word in words for pair in zip(word, word[1:], strict=False))
        pair = max(counts, key=lambda pair: (counts[pair], -ids[pair[0]], -ids[pair[1]]))
        for word in words:
            for i in range(len(word) - 1):
                if tuple(word[i:i + 2]) == pair:
                    word[i:i + 2] = [b"".join(pair)]
        ids.setdefault(b"".join(pair), len(ids))
    assert train_bpe([text], 257 + 150)._mergeable_ranks == ids


def test_the_same_text_gives_the_same_tokenizer_with_any_number_of_threads(tmp_path):
    (tmp_path / "text").write_text(sources(), encoding="utf-8")
    program = ("import json, sys; from data.tokenizer import *;"
               "lines = open(sys.argv[1], encoding='utf-8').readlines();"
               "print(json.dumps(encoding_to_json(train_bpe(lines, 2000))))")
    printed = {subprocess.run([sys.executable, "-c", program, str(tmp_path / "text")], check=True, text=True,
                              capture_output=True, env=os.environ | {"RAYON_NUM_THREADS": threads},
                              cwd=Path(tokenizer.__file__).parents[1]).stdout for threads in "14"}
    assert len(printed) == 1


def test_words_are_one_token_each_the_most_frequent_first():
    encoding = tokenizer.word_encoding([" the cat", " saw", "never", END], [2, 3, 0, 9], 256 + 1 + 3)
    assert list(encoding._mergeable_ranks)[256:] == [b" saw", b" cat", b" the"] and encoding.n_vocab == 260
    assert tokenizer.word_encoding([" the cat", " saw"], [2, 3], 258).n_vocab == 258
