"""Properties that hold for all sizes, numbers and texts. hypothesis looks for a case where they do not."""

import contextlib
import math

from runtime.cli import UserError, build, parse

import torch
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from attach import find_subject
from data.tokenizer import cut_blocks
from memory import fast_search, product_key_search
from pool import PoolOptimizer, ValuePool
from train import PRESETS, TrainConfig

settings.register_profile("same every time", deadline=None, database=None, derandomize=True, max_examples=60)
settings.load_profile("same every time")
few = st.integers(1, 5)


# --- the search ---------------------------------------------------------------------------------------------

@given(N=st.integers(0, 4), H=few, S=st.integers(1, 40), D=few, knn=st.integers(1, 40),
       of=st.sampled_from((1, 3, 99)), seed=st.integers(0, 99))
def test_no_slot_is_better_than_those_that_the_search_finds(N, H, S, D, knn, of, seed):
    """of: how many different numbers there are. With few of them, many scores are equal."""
    assume(knn <= S)
    g = torch.Generator().manual_seed(seed)
    queries = torch.randint(-of, of + 1, (N, H, 2, D), generator=g).double()
    half_keys = torch.randint(-of, of + 1, (H, 2, S, D), generator=g).double()
    left, right = torch.einsum("nhpd,hpsd->pnhs", queries, half_keys)
    all_scores = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(2)
    for search in (product_key_search, fast_search):
        scores, slots = search(queries, half_keys, knn)
        assert torch.equal(scores, all_scores.topk(knn).values)
        assert torch.equal(all_scores.gather(-1, slots), scores)
        assert all(len(set(row)) == knn for row in slots.flatten(0, 1).tolist())


# --- the pool -----------------------------------------------------------------------------------------------

@given(rows=st.integers(1, 20), V=few, steps=few, seed=st.integers(0, 99),
       reads=st.lists(st.tuples(st.integers(0, 5), few), min_size=1, max_size=3))
@example(rows=1, V=3, steps=1, seed=0, reads=[(1, 1), (0, 1)])
def test_a_pool_learns_as_a_dense_table_does(rows, V, steps, seed, reads):
    """Any number of reads per step, of any rows, some of them often: as F.embedding_bag with torch's SGD."""
    g = torch.Generator().manual_seed(seed)
    pool = ValuePool(rows, V).double()
    table = pool.values.detach().clone().requires_grad_()
    ours, theirs = PoolOptimizer([pool.values], 0.1, "sgd"), torch.optim.SGD([table], 0.1)
    for _ in range(steps):
        for N, bag in reads:
            indices = torch.randint(rows, (N, bag), generator=g)
            weights = torch.randn(N, bag, generator=g, dtype=torch.float64, requires_grad=True)
            same = weights.detach().clone().requires_grad_()
            dy = torch.randn(N, V, generator=g, dtype=torch.float64)
            y = pool(indices, weights)
            expected = F.embedding_bag(indices, table, per_sample_weights=same, mode="sum")
            torch.testing.assert_close(y, expected)
            y.backward(dy)
            expected.backward(dy)
            torch.testing.assert_close(weights.grad, same.grad)
        for optimizer in (ours, theirs):
            optimizer.step()
            optimizer.zero_grad()
        torch.testing.assert_close(pool.values.detach(), table.detach())


# --- texts --------------------------------------------------------------------------------------------------

@given(st.text())
@example("[]")
@example("The [blue zorble] eats grass.")
@example("Ada [")
def test_a_subject_stands_where_it_is_said_to_stand(line):
    text, (start, end) = find_subject(line)
    assert 0 <= start <= end <= len(text)
    if "[" not in line:
        assert text == line and text[start:end].strip() == text[start:end]


@given(st.lists(st.text(), max_size=9))
def test_no_letter_is_lost_where_a_text_is_cut(texts):
    assert "".join(cut_blocks(texts)) == "".join(texts)


# --- the command line ---------------------------------------------------------------------------------------

names = [f"--{name}" for name in (*TrainConfig.__dataclass_fields__, "preset", "help", "nothing", "")]
values = st.one_of(st.text(max_size=9), st.integers().map(str), st.floats().map(str), st.just("true"))
words = st.lists(st.one_of(st.sampled_from(names), values,
                           st.builds("{}={}".format, st.sampled_from(names), values)), max_size=4)


@given(words)
@example(["--mem_layers=1,1"])
@example(["--mem_layers=9"])
@example(["--n_embd=-1"])
@example(["--lr=1e999"])
@example(["\n"])  # found by hypothesis
@settings(max_examples=300)
def test_any_words_are_options_or_a_mistake_in_one_line(argv):
    with contextlib.suppress(SystemExit):  # --help, and argparse's own messages
        try:
            options = parse(TrainConfig, argv, PRESETS)
            config = build(TrainConfig, options[0] | options[1])
        except UserError as error:
            assert str(error).strip() and "\n" not in str(error)
        else:
            assert math.isfinite(config.lr) and config.n_embd > 0
