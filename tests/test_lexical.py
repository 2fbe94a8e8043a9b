"""experiments/lexical.py: what replaces the reads of a memory layer is what it says."""

import pytest
import torch
from conftest import assert_fails

from data import corpus
from evaluate import validation_loss
from experiments import lexical
from experiments.lexical import (
    LexicalConfig,
    Means,
    all_tokens,
    changed_reads,
    collect,
    looked_up,
    this_token,
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
    assert this_token(x).tolist() == [0, 0, 1, 2, 0, 1]
    *others, last = two_tokens(x).tolist()
    assert others[2] == last and len(set(others)) == 5, "the first token of a window has no previous one"


def test_two_tokens_are_all_that_tokens_reads(trained_once, facts_folder, monkeypatch):
    """With mem_query=tokens, a layer reads the same for the same two tokens: their mean changes nothing."""
    monkeypatch.setattr(corpus, "DATA", facts_folder)
    model, _, trained = load(trained_once("--mem_query=tokens"))
    data = corpus.load_dataset(trained["dataset"])
    means = collect(model, data, LexicalConfig(train_batches=60), 16)
    assert all(len(layers) == len(model.config.mem_layers) for layers in means.values())

    def loss(change):
        with changed_reads(model, change):
            return validation_loss(model, data.train, 2, 8)

    same = loss(lambda layer, x, y: y)
    assert same == validation_loss(model, data.train, 2, 8), "hooks alone change nothing"
    assert loss(looked_up(means, two_tokens)) == pytest.approx(same, abs=1e-4)
    assert abs(loss(looked_up(means, this_token)) - same) > 1e-4
    mean = means[all_tokens][0].means
    assert mean.shape == (1, 16)
    assert loss(looked_up(means, all_tokens)) == loss(lambda layer, x, y: mean.expand_as(y))
    zero = loss(lambda layer, x, y: 0 * y)
    model.pool.values.data.zero_()
    assert validation_loss(model, data.train, 2, 8) == zero


def test_the_command_prints_a_table(ended, trained_once, capsys):
    lexical.main([f"--out_dir={ended.out}", "--train_batches=3", "--val_batches=2"])
    lines = capsys.readouterr().out.splitlines()[-7:]
    assert [line.split(" | ")[0] for line in lines] == [f"| {name}" for name in (
        "as trained", "zero", "mean", "this token", "two tokens", "one other place", "shuffled rows")]
    dense = trained_once("--mem_layers=")
    assert_fails(lambda: lexical.main([f"--out_dir={dense}"]), "no memory layers", capsys)
