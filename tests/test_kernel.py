"""
The three operations of kernel.py, in PyTorch and in Triton, against autograd on a three-line reference in
float64 and against torch.optim. Triton runs on a GPU if there is one, else in its interpreter (conftest.py).
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import kernel
from kernel import gather_dot, gather_sum, resolve_kernel, row_gradients, scatter_update, sort_reads

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
SIDES = ["torch", "triton"] if kernel.triton is not None else ["torch"]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 3e-3}


def reference(values, indices, weights):
    """What a memory reads, as one would write it without thinking of memory."""
    return (weights.unsqueeze(-1) * values[indices]).sum(1)


def make_read(N, bag, V, num_values, how="random", seed=0, dtype=torch.float32, device=DEVICE):
    """values (of dtype), indices, and weights and dy (float32, or float64 with values of that)."""
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
    """Against float64; says how far apart they are at most, and in the mean."""
    difference = (ours.double() - exact).abs()
    allowed = tolerance * (1 + exact.abs().max() if exact.numel() else 1)
    assert ours.shape == exact.shape
    assert not difference.numel() or difference.max() <= allowed, (
        f"max {difference.max():.2e}, mean {difference.mean():.2e}"
    )


def new_state(kind, num_values, V, blocks, dtype=torch.float32):
    if kind == "rowwise":
        return {"v": torch.zeros(num_values, blocks, dtype=dtype, device=DEVICE)}
    return {
        name: torch.zeros(num_values, V, dtype=dtype, device=DEVICE) for name in ("exp_avg", "exp_avg_sq")
    }


SHAPES = [
    (0, 5, 7, 11, "random"),
    (1, 1, 1, 1, "random"),
    (1, 5, 64, 100, "random"),
    (17, 1, 7, 9, "random"),
    (13, 5, 96, 400, "random"),
    (3, 128, 257, 50, "random"),
    (2, 5, 1024, 30, "random"),
    (2, 3, 1500, 9, "random"),
    (29, 6, 16, 64, "repeated"),
    (40, 16, 8, 30, "one row"),
]
DTYPES = [
    (side, dtype) for side in SIDES for dtype in TOLERANCE if (side, dtype) != ("triton", torch.float64)
]


@pytest.mark.parametrize("side, dtype", DTYPES)
@pytest.mark.parametrize("N, bag, V, num_values, how", SHAPES)
def test_gathers_equal_autograd_in_float64(N, bag, V, num_values, how, side, dtype):
    values, indices, weights, dy = make_read(N, bag, V, num_values, how, dtype=dtype)
    exact_values, exact_weights = values.double(), weights.double().requires_grad_()
    y = reference(exact_values, indices, exact_weights)
    y.backward(dy.double())
    # Triton adds in float32 whatever the values are of, and these are exact in their dtype
    tolerance = TOLERANCE[torch.float32 if side == "triton" else dtype]
    for kind in (torch.int64, torch.int32):
        ours = gather_sum(values, indices.to(kind), weights, side)
        assert ours.dtype == weights.dtype
        assert_close(ours, y.detach(), tolerance)
        ours = gather_dot(values, indices.to(kind), dy, side)
        assert ours.dtype == dy.dtype
        assert_close(ours, exact_weights.grad, tolerance)


@pytest.mark.parametrize("N, bag, V, num_values, how", SHAPES[1:])
def test_row_gradients_equal_autograd(N, bag, V, num_values, how):
    values, indices, weights, dy = make_read(N, bag, V, num_values, how, dtype=torch.float64)
    values.requires_grad_()
    reference(values, indices, weights).backward(dy)
    dense = torch.zeros_like(values)
    seen = []
    for rows, g in row_gradients(*sort_reads([(indices, weights, dy)])):
        dense[rows] = g
        seen += rows.tolist()
    torch.testing.assert_close(dense, values.grad)
    assert seen == sorted(set(indices.flatten().tolist())), "each row that was read comes once, and no other"


@pytest.mark.parametrize("chunk", [1, 16, 48, 10**9])
def test_row_gradients_do_not_depend_on_the_chunk(monkeypatch, chunk):
    """Guards the edges of chunks: a row's places must not be cut, nor the last chunk lost."""
    values, indices, weights, dy = make_read(50, 4, 16, 30)
    sorted_reads = sort_reads([(indices, weights, dy)])
    expected = [torch.cat(parts) for parts in zip(*row_gradients(*sorted_reads), strict=True)]
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    chunks = list(row_gradients(*sorted_reads))
    assert all(len(rows) <= max(1, chunk // 16) for rows, _ in chunks)
    for part, whole in zip(zip(*chunks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(part), whole)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["rowwise", "adam"])
def test_indices_of_32_bits_update_as_those_of_64(kind, side):
    results = []
    for dtype in (torch.int64, torch.int32):
        values, indices, weights, dy = make_read(9, 4, 16, 30)
        state = new_state(kind, 30, 16, 8) | {"step": 1}
        scatter_update(values, state, [(indices.to(dtype), weights, dy)], 0.1, (0.9, 0.99), 1e-8, kernel=side)
        results.append(values)
    assert torch.equal(*results)


def test_several_reads_with_bags_of_different_sizes_add_up():
    """Layers that share a pool, and micro-batches: guards the numbering of tokens over reads."""
    values, *first = make_read(7, 3, 8, 20, seed=1, dtype=torch.float64)
    reads = [tuple(first)] + [
        tuple(make_read(n, bag, 8, 20, seed=n, dtype=torch.float64)[1:]) for n, bag in ((1, 9), (5, 4))
    ]
    values.requires_grad_()
    for indices, weights, dy in reads:
        reference(values, indices, weights).backward(dy)
    dense = torch.zeros_like(values)
    for rows, g in row_gradients(*sort_reads(reads)):
        dense[rows] = g
    torch.testing.assert_close(dense, values.grad)


@pytest.mark.parametrize("side", SIDES)
def test_gather_sum_and_gather_dot_are_adjoint(side):
    """<gather_sum(w), dy> = <w, gather_dot(dy)> for any w and dy."""
    values, indices, weights, dy = make_read(23, 7, 31, 90)
    torch.testing.assert_close(
        (gather_sum(values, indices, weights, side) * dy).sum(),
        (weights * gather_dot(values, indices, dy, side)).sum(),
        rtol=1e-4,
        atol=1e-4,
    )


def rowwise_reference(values, gradient, v, read, lr, beta2, eps, blocks):
    """One step of `rowwise` with the dense gradient, from the formula, a row and a block at a time."""
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
@pytest.mark.parametrize("V, blocks", [(16, 1), (16, 2), (96, 8), (7, 1), (12, 3)])
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
        scatter_update(
            values, state, [(indices, weights, dy)], lr=0.1, betas=(0.5, 0.9), eps=1e-8, kernel=side
        )
        assert_close(values, expected, 1e-5)
        assert_close(state["v"], v, 1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_rowwise_with_a_block_a_column_is_rmsprop(side):
    """But for the start of v, which is given here."""
    V, rows = 6, 5
    values, *_ = make_read(1, 1, V, rows)
    v = torch.rand(rows, V, device=DEVICE) + 0.1
    p = values.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([p], lr=0.03, alpha=0.95, eps=1e-8)
    state = {"v": v.clone()}
    optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": v.clone()}
    for step in range(3):
        _, _, weights, dy = make_read(4, rows, V, rows, seed=step)
        indices = torch.arange(rows, device=DEVICE).repeat(4, 1)
        optimizer.zero_grad()
        reference(p, indices, weights).backward(dy)
        optimizer.step()
        scatter_update(
            values, state, [(indices, weights, dy)], lr=0.03, betas=(0.0, 0.95), eps=1e-8, kernel=side
        )
        torch.testing.assert_close(values, p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
def test_adam_equals_sparse_adam(side):
    """Over steps that touch different rows: SparseAdam counts the optimiser's steps, not the row's."""
    values, *_ = make_read(1, 1, 16, 30)
    p = values.clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([p], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    state = new_state("adam", 30, 16, 1)
    for step in range(4):
        _, indices, weights, dy = make_read(6, 4, 16, 30, seed=step)
        dense = values.clone().requires_grad_()
        reference(dense, indices, weights).backward(dy)
        read = indices.unique()
        p.grad = torch.sparse_coo_tensor(read[None], dense.grad[read], values.shape, check_invariants=True)
        optimizer.step()
        state["step"] = step + 1
        scatter_update(
            values, state, [(indices, weights, dy)], lr=0.02, betas=(0.9, 0.99), eps=1e-8, kernel=side
        )
        torch.testing.assert_close(values, p.detach(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("kind", ["rowwise", "adam"])
@pytest.mark.parametrize("how", ["random", "one row"])
def test_update_is_deterministic_and_leaves_unread_rows_alone(kind, side, how):
    """Also where one row is read by all tokens, which Triton cuts into pieces: 3 of 64 places, and a rest."""

    def run():
        values, indices, weights, dy = make_read(50, 5, 16, 100, how)
        indices = indices.clamp(max=60)
        before, state = values.clone(), new_state(kind, 100, 16, 8) | {"step": 1}
        scatter_update(
            values, state, [(indices, weights, dy)], lr=0.1, betas=(0.9, 0.99), eps=1e-8, kernel=side
        )
        return before, values, state

    before, values, state = run()
    _, again, state_again = run()
    assert torch.equal(values[61:], before[61:]) and not torch.equal(values[60], before[60])
    assert torch.equal(values, again)
    assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(state_again[k])) for k in state)


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
@pytest.mark.parametrize("kind", ["rowwise", "adam"])
@pytest.mark.parametrize(
    "N, bag, V, num_values, how", [*SHAPES[1:8], (30, 20, 8, 40, "repeated"), (90, 9, 16, 3, "one row")]
)
def test_triton_s_update_equals_pytorch_s(N, bag, V, num_values, how, kind):
    results = []
    for side in SIDES:
        values, *_ = make_read(1, 1, V, num_values)
        state = new_state(kind, num_values, V, 8 if V % 8 == 0 else 1)
        for step in (1, 2):
            state["step"] = step
            reads = [
                tuple(make_read(N, bag, V, num_values, how, seed=step + 10 * layer)[1:]) for layer in range(2)
            ]
            scatter_update(values, state, reads, lr=0.1, betas=(0.9, 0.99), eps=1e-8, kernel=side)
        results.append((values, state))
    (ours, state), (theirs, their_state) = results
    assert_close(ours, theirs.double(), 1e-5)
    for name in state:
        if name != "step":
            assert_close(state[name], their_state[name].double(), 1e-5)


def test_a_bfloat16_pool_keeps_its_state_in_float32_and_rounds_once():
    values, indices, weights, dy = make_read(20, 4, 16, 30, dtype=torch.bfloat16)
    exact, state, exact_state = (
        values.float(),
        new_state("rowwise", 30, 16, 8),
        new_state("rowwise", 30, 16, 8),
    )
    for side in SIDES:
        ours = values.clone()
        scatter_update(
            ours,
            new_state("rowwise", 30, 16, 8),
            [(indices, weights, dy)],
            0.1,
            (0.9, 0.99),
            1e-8,
            kernel=side,
        )
        wanted = exact.clone()
        scatter_update(
            wanted,
            new_state("rowwise", 30, 16, 8),
            [(indices, weights, dy)],
            0.1,
            (0.9, 0.99),
            1e-8,
            kernel="torch",
        )
        assert ((ours.float() - wanted).abs() <= wanted.abs() * 2**-7 + 1e-9).all(), (
            "off by more than a last place"
        )
    scatter_update(values, state, [(indices, weights, dy)], 0.1, (0.9, 0.99), 1e-8, kernel="torch")
    scatter_update(exact, exact_state, [(indices, weights, dy)], 0.1, (0.9, 0.99), 1e-8, kernel="torch")
    assert torch.equal(state["v"], exact_state["v"])


def test_stochastic_rounding_keeps_small_steps_on_average_and_both_sides_draw_alike():
    """64 steps of 1/20 of a last place: nearest rounding loses all, stochastic rounding none on average."""
    num_values, V = 400, 16
    indices = torch.arange(num_values, device=DEVICE).view(num_values, 1)
    weights, dy = torch.ones(num_values, 1, device=DEVICE), torch.ones(num_values, V, device=DEVICE)

    def run(stochastic, steps, side="torch"):
        values = torch.full((num_values, V), 1.5, dtype=torch.bfloat16, device=DEVICE)
        state = new_state("rowwise", num_values, V, 8)
        for step in range(steps):
            seed = 1000 + step if stochastic else None
            scatter_update(values, state, [(indices, weights, dy)], 2**-7 / 20, (0.9, 0.99), 1e-8, seed, side)
        return values

    assert (run(False, 64) == 1.5).all()
    moved = 1.5 - run(True, 64).double()
    expected = 64 * 2**-7 / 20
    # a coin of 1/20, 64 times, over 6,400 values: the mean is within four of its standard deviations
    deviation = 2**-7 * (64 * (1 / 20) * (19 / 20) / moved.numel()) ** 0.5
    assert abs(moved.mean() - expected) < 4 * deviation and moved.std() > 0
    assert torch.equal(run(True, 2), run(True, 2))
    for side in SIDES:
        assert torch.equal(run(True, 2, side), run(True, 2))
    with pytest.raises(ValueError, match="for bfloat16"):
        scatter_update(
            dy, new_state("rowwise", num_values, V, 8), [(indices, weights, dy)], 1.0, (0.9, 0.99), 1e-8, 3
        )


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("wrong", [-1, 30])
def test_indices_out_of_range_are_caught_before_a_launch(monkeypatch, wrong, side):
    monkeypatch.setattr(kernel, "CHECK_INDICES", True)
    values, indices, weights, dy = make_read(4, 3, 8, 30)
    state, reads = new_state("rowwise", 30, 8, 8), [(indices, weights, dy)]
    operations = [
        lambda: gather_sum(values, indices, weights, side),
        lambda: gather_dot(values, indices, dy, side),
        lambda: scatter_update(values, state, reads, 0.1, (0.9, 0.99), 1e-8, kernel=side),
    ]
    for operation in operations:
        operation()
    indices[2, 1] = wrong
    for operation in operations:
        with pytest.raises(IndexError, match="in a pool of 30 rows"):
            operation()


def test_where_triton_cannot_run_it_says_why(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    assert resolve_kernel("auto", "cpu") == resolve_kernel("torch", "cpu") == "torch"
    with pytest.raises(ValueError, match="needs a GPU"):
        resolve_kernel("triton", "cpu")
    monkeypatch.setattr(kernel, "triton", None)
    assert resolve_kernel("auto", "cuda") == "torch"
    with pytest.raises(ValueError, match="not installed"):
        resolve_kernel("triton", "cuda")


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What `bench.py kernels` finds in all kernels, compiled for GPUs that are not here."""
    path = tmp_path_factory.mktemp("kernels") / "kernels.json"
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = Path(__file__).resolve().parents[1]
    subprocess.run(
        [sys.executable, "bench.py", "kernels", f"--json={path}"], cwd=root, env=environment, check=True
    )
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
def test_kernels_compile_ahead_of_time_spill_nothing_and_load_16_bytes(compiled):
    targets = {row["target"] for row in compiled}
    assert targets == {"sm_80", "sm_90", "sm_100", "gfx942"}
    kernels = {(row["kernel"], row["dtype"], row["V"]) for row in compiled}
    assert {name for name, _, _ in kernels} == {"gather_sum", "gather_dot", "rowwise", "adam"}
    assert len(compiled) == len(targets) * len(kernels)
    for row in compiled:
        assert row["spilled_bytes"] == 0, row
        assert row["wide_loads"] > 0, row
        assert row["registers"] <= 128, row


@pytest.mark.skipif(len(SIDES) < 2, reason="no Triton here")
def test_nothing_that_changes_with_the_batch_or_the_pool_is_compiled_in():
    for name in ("gather_sum_kernel", "gather_dot_kernel", "update_kernel"):
        function = getattr(kernel, name).fn
        constants = {
            argument for argument, kind in function.__annotations__.items() if "constexpr" in str(kind)
        }
        others = set(function.__code__.co_varnames[: function.__code__.co_argcount]) - constants
        assert constants <= {"V", "ROWS", "COLUMNS", "BLOCKS", "BLOCKS_PADDED", "WIDTH_PADDED", "STOCHASTIC"}
        assert {argument for argument in others if not argument.endswith("_ptr")} <= {
            "bag",
            "lr",
            "beta1",
            "beta2",
            "eps",
            "seed",
        }, "and of the integers only the bag can be specialised on"
