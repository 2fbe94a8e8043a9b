"""
kernel.py, in PyTorch and in Triton, against autograd on a one-line reference in float64 and against
torch.optim. Triton runs on a GPU if there is one, otherwise in its interpreter (conftest.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel
import memory
from kernel import gather_dot, gather_sum, resolve_kernel, row_gradients, scatter_update, sort_reads, top_k
from memory import MemoryLayer, best_slots, fast_search, half_score_gradients, product_key_search
from pool import ValuePool

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = ["torch", "triton"] if kernel.triton is not None else ["torch"]
KINDS = ["rowwise", "adam", "sgd"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(values, indices, weights):
    """What a memory reads, as one would write it without thinking of memory."""
    return (weights.unsqueeze(-1) * values[indices]).sum(1)


def make_read(N, bag, V, num_values, how="random", seed=0, dtype=torch.float32, device=DEVICE):
    """values (dtype), indices, weights and dy (float64 if the values are, otherwise float32)."""
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(num_values, V, generator=g, dtype=torch.float64).to(dtype)
    indices = torch.randint(num_values, (N, bag), generator=g)
    if how == "repeated":
        indices %= 3
    elif how == "one row":
        indices[:] = num_values - 1
    others = torch.float64 if dtype == torch.float64 else torch.float32
    weights = torch.rand(N, bag, generator=g, dtype=others)
    dy = torch.randn(N, V, generator=g, dtype=others)
    return [tensor.to(device) for tensor in (values, indices, weights, dy)]


def assert_close(ours, exact, tolerance):
    """exact: float64. A failure prints the largest and the mean difference."""
    difference = (ours.double() - exact).abs()
    allowed = tolerance * (1 + exact.abs().max() if exact.numel() else 1)
    assert ours.shape == exact.shape
    if difference.numel():
        assert difference.max() <= allowed, f"max {difference.max():.2e}, mean {difference.mean():.2e}"


def new_state(kind, num_values, V, blocks=8, dtype=torch.float32):
    """What PoolOptimizer keeps for one pool."""
    shapes = {"rowwise": {"v": (num_values, blocks)}, "sgd": {},
              "adam": {"exp_avg": (num_values, V), "exp_avg_sq": (num_values, V)}}[kind]
    moments = {name: torch.zeros(shape, dtype=dtype, device=DEVICE) for name, shape in shapes.items()}
    return moments | {"step": torch.zeros((), dtype=torch.int64, device=DEVICE)}


def update(values, reads, state, lr=0.1, betas=(0.9, 0.99), eps=1e-8, **options):
    """One step of the optimiser, counted as PoolOptimizer counts it."""
    state["step"] += 1
    scatter_update(values, reads, state, lr, betas, eps, **options)


SHAPES = [
    (0, 5, 7, 11, "random"),
    (1, 1, 1, 1, "random"),
    (17, 1, 7, 9, "random"),
    (13, 5, 96, 400, "random"),
    (3, 70, 257, 50, "random"),  # more rows than one program of gather_dot has
    (2, 3, 1500, 9, "random"),  # more columns than one program has
    (29, 6, 16, 64, "repeated"),
]
# float32 has all shapes, and each other dtype those with 5 slots per token. Triton has no float64
GATHERS = [(side, dtype, shape) for side in SIDES for dtype in TOLERANCE for shape in SHAPES
           if dtype == torch.float32 or shape[1] == 5 and (side, dtype) != ("triton", torch.float64)]


@pytest.mark.parametrize("side, dtype, shape", GATHERS)
def test_gathers_equal_autograd_in_float64(side, dtype, shape):
    values, indices, weights, dy = make_read(*shape, dtype=dtype)
    exact_values, exact_weights = values.double(), weights.double().requires_grad_()
    y = reference(exact_values, indices, exact_weights)
    y.backward(dy.double())
    # Triton adds in float32 for every dtype of the values
    tolerance = TOLERANCE[torch.float32 if side == "triton" else dtype]
    for kind in (torch.int64, torch.int32):
        ours = gather_sum(values, indices.to(kind), weights, side)
        assert ours.dtype == weights.dtype
        assert_close(ours, y.detach(), tolerance)
        ours = gather_dot(values, indices.to(kind), dy, side)
        assert ours.dtype == dy.dtype
        assert_close(ours, exact_weights.grad, tolerance)


@pytest.mark.parametrize("chunk", [1, 16, 48, 10**9])
@pytest.mark.parametrize("sizes", [[(1, 1)], [(50, 4)], [(7, 3), (1, 9), (5, 4)]])
def test_row_gradients_equal_autograd(monkeypatch, sizes, chunk):
    """
    Several reads are those of several layers and micro-batches: their tokens must have different numbers. A
    chunk must not end in the middle of a row, and the last chunk must not be lost.
    """
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    values, *_ = make_read(1, 1, 8, 20, dtype=torch.float64)
    values.requires_grad_()
    reads = [tuple(make_read(*size, 8, 20, seed=n, dtype=torch.float64)[1:]) for n, size in enumerate(sizes)]
    for indices, weights, dy in reads:
        reference(values, indices, weights).backward(dy)
    chunks = list(row_gradients(*sort_reads(reads)))
    assert all(len(rows) <= max(1, chunk // 8) for rows, _ in chunks)
    rows, g = (torch.cat(parts) for parts in zip(*chunks, strict=True))
    assert torch.equal(rows, torch.cat([read[0].flatten() for read in reads]).unique()), "each row once"
    torch.testing.assert_close(torch.zeros_like(values).index_copy(0, rows, g), values.grad)


# --- the update against formulas and torch.optim ------------------------------------------------------------

def rowwise_reference(values, gradient, v, read, lr, beta2, eps, blocks):
    """One step of `rowwise` with the dense gradient, from the formula, one row and one block at a time."""
    values, v = values.clone(), v.clone()
    size = values.size(1) // blocks
    for r in read:
        for c in range(blocks):
            columns = slice(c * size, (c + 1) * size)
            m = (gradient[r, columns] ** 2).mean()
            v[r, c] = m if v[r, c] == 0 else beta2 * v[r, c] + (1 - beta2) * m
            values[r, columns] -= lr * gradient[r, columns] / (v[r, c].sqrt() + eps)
    return values, v


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("V, blocks", [(16, 2), (96, 8), (7, 1)])
def test_rowwise_equals_its_formula(V, blocks, side):
    values, *_ = make_read(1, 1, V, 30)
    expected, v = values.double(), torch.zeros(30, blocks, dtype=torch.float64, device=DEVICE)
    state = new_state("rowwise", 30, V, blocks)
    for step in range(3):
        _, indices, weights, dy = make_read(9, 4, V, 30, seed=step)
        p = expected.clone().requires_grad_()
        reference(p, indices, weights.double()).backward(dy.double())
        read = set(indices.flatten().tolist())
        expected, v = rowwise_reference(expected, p.grad, v, read, 0.1, 0.9, 1e-8, blocks)
        update(values, [(indices, weights, dy)], state, betas=(0.5, 0.9), kernel=side)
        assert_close(values, expected, 1e-5)
        assert_close(state["v"], v, 1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_adam_equals_sparse_adam(side):
    """Over steps that read different rows: SparseAdam counts the optimiser's steps, not the row's."""
    values, *_ = make_read(1, 1, 16, 30)
    p = values.clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([p], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    state = new_state("adam", 30, 16)
    for step in range(4):
        _, indices, weights, dy = make_read(6, 4, 16, 30, seed=step)
        dense = values.clone().requires_grad_()
        reference(dense, indices, weights).backward(dy)
        read = indices.unique()
        p.grad = torch.sparse_coo_tensor(read[None], dense.grad[read], values.shape, check_invariants=True)
        optimizer.step()
        update(values, [(indices, weights, dy)], state, lr=0.02, kernel=side)
        torch.testing.assert_close(values, p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side, dtype",
                         [("torch", torch.float64), *((side, torch.float32) for side in SIDES)])
@pytest.mark.parametrize("kind", KINDS)
def test_an_update_of_all_rows_equals_torch_optim(kind, side, dtype):
    """In float64, neither the chunks, nor the sparse additions, nor the state may pass through float32."""
    V = 7
    values, *_ = make_read(1, 1, V, 30, dtype=dtype)
    state, exact = new_state(kind, 30, V, V, dtype), values.double().clone().requires_grad_()
    eps = 1e-30 if kind == "adam" else 1e-8  # Adam adds eps after the bias correction, SparseAdam before it
    optimizer = {"rowwise": lambda p: torch.optim.RMSprop(p, lr=0.1, alpha=0.99, eps=eps),
                 "adam": lambda p: torch.optim.Adam(p, lr=0.1, betas=(0.9, 0.99), eps=eps),
                 "sgd": lambda p: torch.optim.SGD(p, lr=0.1)}[kind]([exact])
    for step in range(3):
        _, _, weights, dy = make_read(4, 30, V, 30, seed=step, dtype=dtype)
        indices = torch.arange(30, device=DEVICE).repeat(4, 1)
        optimizer.zero_grad()
        reference(exact, indices, weights.double()).backward(dy.double())
        if step == 0 and kind == "rowwise":  # v starts with the first square, not with zero
            optimizer.state[exact] = {"step": torch.tensor(0.0), "square_avg": exact.grad.square()}
        optimizer.step()
        update(values, [(indices, weights, dy)], state, eps=eps, kernel=side)
        assert_close(values, exact.detach(), TOLERANCE[dtype])


# --- the update: what holds for every optimiser -------------------------------------------------------------

@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["random", "one row"])
def test_an_update_is_deterministic_and_leaves_unread_rows_alone(kind, side, how):
    """Also where all tokens read one row, which Triton cuts into pieces: 3 of 64 places, and a rest."""

    def run():
        values, indices, weights, dy = make_read(50, 5, 16, 100, how)
        indices = indices.clamp(max=60)
        before, state = values.clone(), new_state(kind, 100, 16)
        update(values, [(indices, weights, dy)], state, kernel=side)
        return before, values, state

    before, values, state = run()
    _, values_again, state_again = run()
    assert torch.equal(values[61:], before[61:]) and not torch.equal(values[60], before[60])
    assert torch.equal(values, values_again)
    assert all(torch.equal(state[name], state_again[name]) for name in state)
    assert all(not moment[61:].any() for name, moment in state.items() if name != "step")


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("N, bag, V, num_values, how", [
    (0, 5, 16, 3, "random"), (1, 1, 1, 1, "random"), (5, 8, 257, 50, "repeated"), (40, 5, 16, 3, "one row")])
def test_the_update_in_triton_equals_the_one_in_pytorch(N, bag, V, num_values, how, kind):
    results = []
    for side in SIDES:
        values, *_ = make_read(1, 1, V, num_values)
        state = new_state(kind, num_values, V, 8 if V % 8 == 0 else 1)
        for seed in (1, 2):
            # indices with 32 bits, as in training
            reads = [(indices.int(), *others) for s in (seed, seed + 10)
                     for _, indices, *others in [make_read(N, bag, V, num_values, how, seed=s)]]
            torch.set_default_dtype(torch.bfloat16)  # the kernels compute in float32 all the same
            try:
                update(values, reads, state, kernel=side)
            finally:
                torch.set_default_dtype(torch.float32)
        results.append({"values": values} | state)
    for name, ours in results[1].items():
        assert_close(ours, results[0][name].double(), 1e-5)


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
@pytest.mark.parametrize("lengths", [[4, 5, 1, 8], [3, 13, 5, 5, 12], [1, 4, 40, 6], [16]])
def test_rows_that_are_summed_in_pieces(monkeypatch, lengths):
    """Pieces of 4 places, and rows that end before, at and after a piece, side by side."""
    monkeypatch.setattr(kernel, "PIECE", 4)
    results = []
    for side in SIDES:
        values, _, weights, dy = make_read(sum(lengths), 1, 8, 2 * len(lengths))
        row = torch.arange(len(lengths), device=DEVICE) * 2 + 1  # odd rows only
        indices = row.repeat_interleave(torch.tensor(lengths, device=DEVICE))
        indices = indices[torch.randperm(len(indices), generator=torch.Generator().manual_seed(0)).to(DEVICE)]
        update(values, [(indices.view(-1, 1), weights, dy)], new_state("sgd", len(values), 8), kernel=side)
        results.append(values)
    assert_close(results[1], results[0].double(), 1e-6)


# --- 16-bit values ------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype, last_place", [(torch.bfloat16, 2**-7), (torch.float16, 2**-10)])
def test_a_16_bit_pool_keeps_its_moments_in_float32_and_rounds_once(dtype, last_place, kind, side):
    values, indices, weights, dy = make_read(20, 4, 16, 30, dtype=dtype)
    exact, state, exact_state = values.float(), new_state(kind, 30, 16), new_state(kind, 30, 16)
    update(values, [(indices, weights, dy)], state, kernel=side)
    update(exact, [(indices, weights, dy)], exact_state, kernel=side)
    assert ((values.float() - exact).abs() <= exact.abs() * last_place + 1e-6).all()
    assert all(torch.equal(state[name], exact_state[name]) for name in state)


def test_stochastic_rounding_keeps_small_steps_on_average_and_both_sides_draw_alike():
    """64 steps of 1/20 of a last place: rounding to nearest loses all of them, stochastic rounding none."""
    V, lr = 16, 2**-7 / 20

    def run(seed, steps, side="torch", first_step=0, num_values=50):
        indices = torch.arange(num_values, device=DEVICE).view(num_values, 1)
        weights, dy = torch.ones(num_values, 1, device=DEVICE), torch.ones(num_values, V, device=DEVICE)
        values = torch.full((num_values, V), 1.5, dtype=torch.bfloat16, device=DEVICE)
        state = new_state("rowwise", num_values, V)
        state["step"] += first_step
        for _ in range(steps):
            update(values, [(indices, weights, dy)], state, lr, seed=seed, kernel=side)
        return values

    assert (run(None, 64) == 1.5).all()
    moved = 1.5 - run(1000, 64, num_values=400).double()
    # a coin of 1/20, 64 times, over 6,400 values: the mean is within four of its standard deviations
    deviation = 2**-7 * (64 * (1 / 20) * (19 / 20) / moved.numel()) ** 0.5
    assert abs(moved.mean() - 64 * lr) < 4 * deviation and moved.std() > 0
    assert torch.equal(run(1000, 2), run(1000, 2))
    for side in SIDES:
        assert torch.equal(run(1000, 2, side), run(1000, 2))
    # another seed and another step draw other numbers
    draws = [run(1000, 1), run(7, 1), run(1000, 1, first_step=1)]
    assert all(not torch.equal(draws[a], draws[b]) for a, b in ((0, 1), (0, 2), (1, 2)))


# --- mistakes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("operation", [
    lambda values, indices, weights, dy, side: gather_sum(values, indices, weights, side),
    lambda values, indices, weights, dy, side: gather_dot(values, indices, dy, side),
    lambda values, *read: update(values, [read[:3]], new_state("rowwise", 30, 8), kernel=read[3]) or values])
def test_values_with_gaps_are_read_right_or_refused(operation, side):
    values, *read = make_read(4, 3, 8, 30)
    with_gaps = values.mT.contiguous().mT
    if side == "torch":
        assert_close(operation(with_gaps, *read, side), operation(values, *read, side).double(), 1e-5)
    else:
        with pytest.raises(ValueError, match="contiguous"):
            operation(with_gaps, *read, side)


def test_where_triton_cannot_run_an_error_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_kernel("auto", "cpu") == resolve_kernel("torch", "cpu") == "torch"
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve_kernel("triton", "cpu")
    monkeypatch.setattr(kernel, "triton", None)
    assert resolve_kernel("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="not installed"):
        resolve_kernel("triton", "cuda")
    with pytest.raises(ValueError, match="kernel='cuda' must be 'auto', 'triton' or 'torch'"):
        resolve_kernel("cuda", "cpu")


# --- top-k --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("S, k", [(1, 1), (50, 16), (65, 64), (128, 16), (132, 33), (132, 40), (256, 64),
                                  (1024, 32), (1024, 255)])
def test_top_k_equals_torch_s(S, k, dtype):
    """Both signs and zeros, neighbouring numbers, denormals, ties: none may come in another order."""
    generator = torch.Generator().manual_seed(S)
    magnitude = 10.0 ** torch.randint(-44, 8, (3, 2, S), generator=generator)
    x = torch.randn(3, 2, S, generator=generator) * magnitude
    x[0] = x[0].sign() * 0.0
    x[1] = torch.nextafter(torch.ones(2, S), torch.tensor(2.0)).where(x[1] > 0, torch.ones(2, S))
    x = x.to(dtype)
    values, indices = top_k(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(values, x.gather(-1, indices))
    assert all(len(row.unique()) == k for row in indices.flatten(0, 1))


@pytest.mark.parametrize("S", [40, 200])
def test_top_k_of_no_rows_and_of_strided_rows(S):
    assert top_k(torch.empty(0, 2, S), 7)[1].shape == (0, 2, 7)
    x = torch.randn(S, 3, generator=torch.Generator().manual_seed(0)).t()  # not contiguous
    before = x.clone()
    values, indices = top_k(x, 7)
    assert torch.equal(values, x.topk(7).values) and torch.equal(values, x.gather(-1, indices))
    assert torch.equal(x, before), "the input does not change"


@pytest.mark.parametrize("S", [40, 200])
def test_top_k_of_equal_numbers_has_different_columns_without_denormals(S):
    try:
        torch.set_flush_denormal(True)
        for x in (torch.zeros(2, S), torch.randn(2, S).round()):
            values, indices = top_k(x, 30)
            assert torch.equal(values, x.topk(30).values) and torch.equal(values, x.gather(-1, indices))
            assert all(len(row.unique()) == 30 for row in indices)
    finally:
        torch.set_flush_denormal(False)


# --- the search in Triton -----------------------------------------------------------------------------------

needs_triton = pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")


def all_sums(half_scores):
    """The scores of all S*S slots: (H, N, S*S)."""
    return (half_scores[:, 0].unsqueeze(-1) + half_scores[:, 1].unsqueeze(-2)).flatten(2)


def assert_different_slots(scores, chosen, half_scores):
    """The slots are in range, no slot came twice, and they have these scores."""
    S, (left, right) = half_scores.size(-1), chosen.unbind(1)
    assert chosen.dtype == torch.int64 and chosen.min() >= 0 and chosen.max() < S
    slots = left * S + right
    assert all(len(row.unique()) == len(row) for row in slots.flatten(0, 1))
    found = all_sums(half_scores).gather(-1, slots)
    torch.testing.assert_close(found, scores, rtol=0, atol=0, equal_nan=True)


@needs_triton
@pytest.mark.parametrize("H, N, S, K", [
    (1, 1, 1, 1), (2, 3, 5, 5), (2, 2, 37, 1), (1, 2, 33, 32), (1, 2, 100, 12), (1, 1, 64, 64),
    (1, 1, 2048, 64), (2, 0, 16, 4)])
def test_the_best_slots_equal_brute_force(H, N, S, K):
    """Exactly. The first token of each head has integers as scores, and so many ties."""
    half_scores = torch.randn(H, 2, N, S, generator=torch.Generator().manual_seed(S)).to(DEVICE)
    half_scores[:, :, :1] = half_scores[:, :, :1].round()
    scores, chosen = best_slots(half_scores, K, "triton")
    assert scores.shape == (H, N, K) and chosen.shape == (H, 2, N, K)
    assert torch.equal(scores, all_sums(half_scores).topk(K).values)
    assert torch.equal(scores, best_slots(half_scores, K, "torch")[0])
    if N:
        assert_different_slots(scores, chosen, half_scores)


@needs_triton
@pytest.mark.parametrize("number", [0.0, -torch.inf, torch.inf, torch.nan, -torch.nan])
def test_scores_that_are_not_finite_choose_slots_that_exist(number):
    """All scores of the first token are `number`, and some of the second."""
    half_scores = torch.randn(1, 2, 2, 11, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    half_scores[:, :, 0] = half_scores[:, :, 1, 3:9] = number
    scores, chosen = best_slots(half_scores, 6, "triton")
    assert_different_slots(scores, chosen, half_scores)
    torch.testing.assert_close(scores, all_sums(half_scores).topk(6).values, rtol=0, atol=0, equal_nan=True)


@needs_triton
def test_the_search_and_its_gradients_equal_autograd_in_float64():
    generator = torch.Generator().manual_seed(0)
    queries, half_keys = (torch.randn(*shape, generator=generator).to(DEVICE).requires_grad_()
                          for shape in ((5, 2, 2, 3), (2, 2, 20, 3)))  # (N, H, 2, D/2), (H, 2, S, D/2)
    d_scores = torch.randn(5, 2, 4, generator=generator).to(DEVICE)
    scores, slots = fast_search(queries, half_keys, 4, "triton")
    exact, exact_slots = product_key_search(queries.double(), half_keys.double(), 4)
    assert torch.equal(slots, exact_slots)
    assert_close(scores, exact, 1e-5)
    ours, theirs = (torch.autograd.grad(x, (queries, half_keys), d.to(x))
                    for x, d in ((scores, d_scores), (exact, d_scores)))
    for our, their in zip(ours, theirs, strict=True):
        assert_close(our, their.double(), 1e-5)


@needs_triton
@pytest.mark.parametrize("H, N, S, K", [(1, 1, 1, 1), (2, 3, 37, 5), (1, 2, 2048, 64), (2, 0, 16, 4)])
def test_gradients_of_half_scores_equal_autograd_in_float64(H, N, S, K):
    """A few half-keys are in many slots of a token, others in none."""
    generator = torch.Generator().manual_seed(S)
    chosen = torch.randint(0, max(1, S // 3), (H, 2, N, K), generator=generator).to(DEVICE)
    d_scores = torch.randn(H, N, K, generator=generator).to(DEVICE)
    half_scores = torch.zeros(H, 2, N, S, device=DEVICE, dtype=torch.float64, requires_grad=True)
    half_scores.gather(-1, chosen).sum(1).backward(d_scores.double())
    for side in ("triton", "torch"):
        for part in (chosen, chosen.mT.contiguous().mT):  # also with other strides
            assert_close(half_score_gradients(d_scores, part, S, side), half_scores.grad, 1e-5)


@needs_triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_pool_says_which_search_a_layer_uses(dtype, monkeypatch):
    """All give the same output, also compiled. A 16-bit layer's scores, and so the weights, are float32."""
    torch.manual_seed(0)
    layer = MemoryLayer(8, num_keys=6, heads=2, knn=3, key_dim=4, value_dim=8).to(DEVICE, dtype)
    pool, x = ValuePool(36, 8, kernel="torch", device=DEVICE), torch.randn(2, 8, device=DEVICE, dtype=dtype)
    calls, search = [], kernel.best_slots_triton
    monkeypatch.setattr(memory, "best_slots_triton", lambda *args: calls.append(args) or search(*args))
    outputs = [layer(x, pool)]
    assert not calls
    pool.kernel = "triton"
    outputs.append(layer(x, pool))
    assert len(calls) == 1 and calls[0][0].dtype == torch.float32
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(torch.compile(layer, backend="eager")(x, pool), outputs[0])
    assert len(calls) == 2
    weights, _ = layer.search(x, None, None, "triton")
    assert weights.dtype == torch.float32


@needs_triton
@pytest.mark.parametrize("S, knn, dtype", [(8193, 2, torch.float32), (65, 65, torch.float32),
                                           (8, 2, torch.float64), (8, 2, torch.bfloat16)])
def test_a_search_that_triton_does_not_do_is_done_in_pytorch(S, knn, dtype, monkeypatch):
    monkeypatch.setattr(memory, "best_slots_triton", None)
    half_scores = torch.randn(1, 2, 1, S, device=DEVICE, dtype=dtype)
    scores = best_slots(half_scores, knn, "triton")[0]
    assert scores.dtype == dtype
    if S < 100:
        assert torch.equal(scores, all_sums(half_scores).topk(knn).values)


# --- Triton, compiled ---------------------------------------------------------------------------------------

@needs_triton
@pytest.mark.parametrize("target", ["sm_90", *(pytest.param(target, marks=pytest.mark.slow)
                                               for target in ("sm_80", "sm_100", "gfx942"))])
def test_kernels_compile_ahead_of_time_spill_nothing_and_load_16_bytes(target):
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    few = ["--few"] if target == "sm_90" else []
    printed = subprocess.run([sys.executable, "-m", "tests.compile_kernels", *few, target], check=True,
                             cwd=Path(__file__).parents[1], env=environment, stdout=subprocess.PIPE).stdout
    rows = [json.loads(line) for line in printed.splitlines()]
    names = ["gather_sum", "gather_dot", "sum_pieces", "rowwise", "adam", "sgd"]
    searches = ["best_slots", "half_score_gradients"] * (1 if few else 15)
    assert sorted(row["kernel"] for row in rows) == sorted(4 * names + searches)
    for row in rows:
        assert row["spilled_bytes"] == 0 and row["registers"] <= (144 if row.get("S") == 8192 else 128), row
        # an AMD warp has 64 threads, so each has only 8 bytes of a row of 16-bit numbers, or of a search
        assert (row["wide_loads"] > 0 or row["kernel"] == "half_score_gradients"  # which loads few numbers
                or target == "gfx942" and row.get("dtype") != "fp32"), row


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
def test_nothing_that_changes_with_the_batch_or_the_pool_is_compiled_in():
    sizes = {"V", "ROWS", "COLUMNS", "TILES", "PIECE", "BLOCKS", "BLOCKS_PADDED", "WIDTH_PADDED",
             "S", "K", "GROUPS", "MEMBERS", "K_PADDED", "PAIRS", "S_PADDED"}
    for name in ("gather_sum", "gather_dot", "sum_pieces", "update", "best_slots", "half_score_gradients"):
        function = getattr(kernel, f"{name}_kernel").fn
        annotations = function.__annotations__.items()
        constants = {argument for argument, kind in annotations if "constexpr" in str(kind)}
        others = set(function.__code__.co_varnames[: function.__code__.co_argcount]) - constants
        assert constants <= sizes | {"STOCHASTIC"}
        # Triton compiles again for some values of an integer, except of `places`: so the bag is the only one
        numbers = {argument for argument in others if not argument.endswith("_ptr")}
        assert numbers <= {"bag", "places", "beta1", "beta2", "eps"}
