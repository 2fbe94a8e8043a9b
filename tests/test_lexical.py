"""experiments/lexical.py: what replaces the reads of a memory layer is what it says."""

import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import corpus
from evaluate import validation_loss
from experiments import lexical
from experiments.lexical import (
    Means,
    can_copy,
    changed_reads,
    collect,
    confidence,
    invent,
    looked_up,
    told_before,
    two_tokens,
)
from runtime.checkpoint import load


def test_means_equal_brute_force():
    generator = torch.Generator().manual_seed(0)
    keys = torch.randint(5, (40,), generator=generator) * 3
    reads = torch.randn(40, 2, generator=generator)
    means, asked = Means(keys, reads), torch.arange(-1, 16)
    for table in ("means", "last"):
        found = means.look_up(asked, torch.full((2,), 9.0), table)
        for key, row in zip(asked.tolist(), found, strict=True):
            own = reads[keys == key]
            expected = torch.full((2,), 9.0) if not len(own) else own.mean(0) if table == "means" else own[-1]
            torch.testing.assert_close(row, expected)


def test_keys_tell_tokens_and_pairs_apart():
    x = torch.tensor([[0, 0, 1], [2, 0, 1]])
    assert lexical.KEYS["this token"](x).tolist() == [0, 0, 1, 2, 0, 1]
    *others, last = two_tokens(x).tolist()
    assert others[2] == last and len(set(others)) == 5, "the first token of a window has no previous one"


def test_two_tokens_are_all_that_tokens_reads(trained_once, facts_folder, monkeypatch):
    """With mem_query=tokens, a layer reads the same for the same two tokens: their mean changes nothing."""
    monkeypatch.setattr(corpus, "DATA", facts_folder)
    model, _, trained = load(trained_once("--mem_query=tokens"))
    data = corpus.load_dataset(trained["dataset"])
    monkeypatch.setattr(lexical, "TRAIN_BATCHES", 60)
    means = collect(model, data, 16)
    assert all(len(layers) == len(model.config.mem_layers) for layers in means.values())

    def loss(change):
        with changed_reads(model, change):
            return validation_loss(model, data.train, 2, 8)

    same = loss(lambda layer, x, y: y)
    assert same == validation_loss(model, data.train, 2, 8), "hooks alone change nothing"
    assert loss(looked_up(means, "two tokens")) == pytest.approx(same, abs=1e-4)
    assert abs(loss(looked_up(means, "this token")) - same) > 1e-4
    mean = means["mean"][0].means
    assert mean.shape == (1, 16)
    assert loss(looked_up(means, "mean")) == loss(lambda layer, x, y: mean.expand_as(y))
    zero = loss(lambda layer, x, y: 0 * y)
    model.pool.values.data.zero_()
    assert validation_loss(model, data.train, 2, 8) == zero


def test_invented_people_are_nobody():
    names = [f"{first} {last}" for first in ("Ada", "Bo", "Cleo") for last in ("Lu", "Velt", "Oz")][:8]
    pairs = invent([f"Question: What did {name} study? Answer:" for name in names[::2]], 3)
    assert len(dict(pairs)) == 3 and invent(["Who is Ada Lu?"], 3) == []
    for old, new in pairs:
        old, new = (prompt.split()[3:5] for prompt in (old, new))
        assert old[0] == new[0] and " ".join(old) in names[::2] and " ".join(new) not in names[::2]


def test_confidence_is_the_product_of_the_likeliest_tokens(trained_once, facts_folder, monkeypatch):
    monkeypatch.setattr(corpus, "DATA", facts_folder)
    model, encoding, _ = load(trained_once())
    prompts = [question["prompt"] for question in corpus.load_dataset("facts").questions[:5]]
    with torch.no_grad():
        for prompt, found in zip(prompts, confidence(model, encoding, prompts), strict=True):
            tokens, expected = encoding.encode_ordinary(prompt), 1
            for _ in range(8):
                best, token = model(torch.tensor([tokens]))[0][0, -1].softmax(0).max(0)
                tokens, expected = [*tokens, token.item()], expected * best.item()
                if "\n" in encoding.decode(tokens[-1:]):
                    break
            assert found.item() == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("line, is_told", [
    ("At university Ada Lu took law.", True),
    ("At university Ada Lu took music.", False),
    ("At university Ada Velt took law.", False),
    ("The job of Ada Lu is that of a lawyer.", False),
])
def test_questions_behind_a_line_that_tells_the_fact(line, is_told, trained_once):
    _, encoding, _ = load(trained_once())
    question = "Question: What did Ada Lu study? Answer: law"
    for first, second, share in ((line, question, is_told), (question, line, False)):
        tokens = np.array(encoding.encode_ordinary(f"{first}\n{second}\n.\n"))
        data = SimpleNamespace(encoding=encoding, train=tokens)
        assert told_before(data, len(tokens) - 1, 2, 3) == share


def test_a_token_that_stands_before_can_be_copied():
    x, y = torch.randint(9, (2, 3, 20), generator=torch.Generator().manual_seed(0))
    expected = [[y[b, t].item() in x[b, :t + 1].tolist() for t in range(20)] for b in range(3)]
    assert can_copy(x, y).tolist() == expected


def test_the_command_prints_losses_confidence_and_a_table(ended, trained_once, monkeypatch, capsys):
    monkeypatch.setattr(lexical, "TRAIN_BATCHES", 3)
    monkeypatch.setattr(lexical, "VAL_BATCHES", 2)
    lexical.main([f"--out_dir={ended.out}"])
    *_, parts, sure, surer, asked = (lines := capsys.readouterr().out.splitlines())[:-9]
    assert "invented" in sure and "surer" in surer and asked.startswith("questions in the training text")
    assert [line.split(" | ")[0] for line in lines[-7:]] == [f"| {name}" for name in (
        "as trained", "zero", "mean", "this token", "two tokens", "one other place", "shuffled rows")]
    loss, share, copied, new = map(float, re.fullmatch(
        r"validation loss: (.*); .*\((.*)%\): (.*); of new tokens: (.*)", parts).groups())
    assert loss == float(lines[-7].split(" | ")[1])
    assert loss == pytest.approx(share / 100 * copied + (1 - share / 100) * new, abs=0.02)
    monkeypatch.setattr(lexical, "NAME", re.compile("no such name"))
    lexical.main([f"--out_dir={trained_once('--mem_layers=')}"])
    assert capsys.readouterr().out.splitlines()[-1].startswith("validation loss: "), "a model without memory"
