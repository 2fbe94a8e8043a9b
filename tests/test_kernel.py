"""The three operations of kernel.py against autograd on a three-line reference, and against torch.optim."""

import pytest
import torch

import kernel
from kernel import gather_dot, gather_sum, row_gradients, scatter_update


def reference(values, indices, weights):
    """What a memory reads, as one would write it without thinking of memory."""
    return (weights.unsqueeze(-1) * values[indices]).sum(1)


def make_read(N, bag, V, num_values, how="random", seed=0, dtype=torch.float64):
    g = torch.Generator().manual_seed(seed)
    values = torch.randn(num_values, V, generator=g, dtype=dtype)
    indices = torch.randint(num_values, (N, bag), generator=g)
    if how == "repeated":
        indices %= 3
    elif how == "one row":
        indices[:] = num_values - 1
    weights = torch.rand(N, bag, generator=g, dtype=dtype)
    dy = torch.randn(N, V, generator=g, dtype=dtype)
    return values, indices, weights, dy


CASES = [
    (0, 5, 7, 11, "random"),
    (1, 1, 1, 1, "random"),
    (1, 5, 64, 100, "random"),
    (17, 1, 7, 9, "random"),
    (33, 5, 96, 400, "random"),
    (8, 128, 257, 50, "random"),
    (29, 6, 16, 64, "repeated"),
    (40, 16, 8, 30, "one row"),
]


@pytest.mark.parametrize("N, bag, V, num_values, how", CASES)
def test_gathers_and_row_gradients_equal_autograd(N, bag, V, num_values, how):
    values, indices, weights, dy = make_read(N, bag, V, num_values, how)
    v, w = values.clone().requires_grad_(), weights.clone().requires_grad_()
    y = reference(v, indices, w)
    y.backward(dy)
    torch.testing.assert_close(gather_sum(values, indices, weights), y.detach())
    torch.testing.assert_close(gather_dot(values, indices, dy), w.grad)
    dense = torch.zeros_like(values)
    seen = []
    for rows, g in row_gradients([(indices, weights, dy)]):
        dense[rows] = g
        seen += rows.tolist()
    torch.testing.assert_close(dense, v.grad)
    assert seen == sorted(set(indices.flatten().tolist())), "each row that was read comes once, and no other"


@pytest.mark.parametrize("chunk", [1, 16, 48, 10**9])
def test_row_gradients_do_not_depend_on_the_chunk(monkeypatch, chunk):
    """Guards the edges of chunks: a row's places must not be cut, nor the last chunk lost."""
    values, indices, weights, dy = make_read(50, 4, 16, 30)
    expected = [torch.cat(parts) for parts in zip(*row_gradients([(indices, weights, dy)]), strict=True)]
    monkeypatch.setattr(kernel, "CHUNK", chunk)
    chunks = list(row_gradients([(indices, weights, dy)]))
    assert all(len(rows) <= max(1, chunk // 16) for rows, _ in chunks)
    for part, whole in zip(zip(*chunks, strict=True), expected, strict=True):
        torch.testing.assert_close(torch.cat(part), whole)


def test_several_reads_with_bags_of_different_sizes_add_up():
    """Layers that share a pool, and micro-batches: guards the numbering of tokens over reads."""
    values, *first = make_read(7, 3, 8, 20, seed=1)
    _, *second = make_read(1, 9, 8, 20, seed=2)
    _, *third = make_read(5, 4, 8, 20, seed=3)
    v = values.clone().requires_grad_()
    for indices, weights, dy in (first, second, third):
        reference(v, indices, weights).backward(dy)
    dense = torch.zeros_like(values)
    for rows, g in row_gradients([tuple(first), tuple(second), tuple(third)]):
        dense[rows] = g
    torch.testing.assert_close(dense, v.grad)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_lower_precision_stays_close_to_float64(dtype, tolerance):
    values, indices, weights, dy = make_read(19, 12, 40, 60)
    low = values.to(dtype)
    exact = low.double()
    torch.testing.assert_close(
        gather_sum(low, indices, weights.to(dtype)).double(),
        reference(exact, indices, weights.to(dtype).double()),
        rtol=tolerance,
        atol=tolerance,
    )
    torch.testing.assert_close(
        gather_dot(low, indices, dy.to(dtype)).double(),
        (exact[indices] * dy.to(dtype).double()[:, None]).sum(-1),
        rtol=tolerance,
        atol=10 * tolerance,
    )


def test_gather_sum_and_gather_dot_are_adjoint():
    """<gather_sum(w), dy> = <w, gather_dot(dy)> for any w and dy."""
    values, indices, weights, dy = make_read(23, 7, 31, 90)
    torch.testing.assert_close(
        (gather_sum(values, indices, weights) * dy).sum(), (weights * gather_dot(values, indices, dy)).sum()
    )


def rowwise_reference(values, gradient, v, read, lr, beta2, eps, blocks):
    """One step of `rowwise` with the dense gradient, from the formula, a row and a block at a time."""
    values, v = values.clone(), v.clone()
    size = values.size(1) // blocks
    for r in read:
        for c in range(blocks):
            g = gradient[r, c * size : (c + 1) * size]
            m = (g**2).mean()
            v[r, c] = m if v[r, c] == 0 else beta2 * v[r, c] + (1 - beta2) * m
            values[r, c * size : (c + 1) * size] -= lr * g / (v[r, c].sqrt() + eps)
    return values, v


@pytest.mark.parametrize("blocks", [1, 2, 8])
def test_rowwise_equals_its_formula(blocks):
    values, *_ = make_read(1, 1, 16, 30)
    expected, v = values.clone(), torch.zeros(30, blocks, dtype=torch.float64)
    state = {"v": v.clone()}
    for step in range(4):
        _, indices, weights, dy = make_read(9, 4, 16, 30, seed=step)
        p = values.clone().requires_grad_()
        reference(p, indices, weights).backward(dy)
        expected, v = rowwise_reference(
            expected, p.grad, v, set(indices.flatten().tolist()), 0.1, 0.9, 1e-8, blocks
        )
        scatter_update(values, state, [(indices, weights, dy)], lr=0.1, betas=(0.5, 0.9), eps=1e-8)
        torch.testing.assert_close(values, expected)
        torch.testing.assert_close(state["v"], v)


def test_rowwise_of_one_column_and_all_rows_is_rmsprop_after_its_first_step():
    """With a block a column `rowwise` is torch.optim.RMSprop, but for the start of v, given here."""
    V, rows = 6, 5
    values, *_ = make_read(1, 1, V, rows)
    v = torch.rand(rows, V, dtype=torch.float64) + 0.1
    p = values.clone().requires_grad_()
    optimizer = torch.optim.RMSprop([p], lr=0.03, alpha=0.95, eps=1e-8)
    state = {"v": v.clone()}
    optimizer.state[p] = {"step": torch.tensor(0.0), "square_avg": v.clone()}
    for step in range(3):
        indices = torch.arange(rows).repeat(4, 1)
        _, _, weights, dy = make_read(4, rows, V, rows, seed=step)
        optimizer.zero_grad()
        reference(p, indices, weights).backward(dy)
        optimizer.step()
        scatter_update(values, state, [(indices, weights, dy)], lr=0.03, betas=(0.0, 0.95), eps=1e-8)
        torch.testing.assert_close(values, p.detach())


def test_adam_equals_sparse_adam():
    """Over steps that touch different rows: SparseAdam counts the optimiser's steps, not the row's."""
    values, *_ = make_read(1, 1, 16, 30)
    p = values.clone().requires_grad_()
    optimizer = torch.optim.SparseAdam([p], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
    state = {"exp_avg": torch.zeros_like(values), "exp_avg_sq": torch.zeros_like(values)}
    for step in range(5):
        _, indices, weights, dy = make_read(6, 4, 16, 30, seed=step)
        dense = values.clone().requires_grad_()
        reference(dense, indices, weights).backward(dy)
        read = indices.unique()
        p.grad = torch.sparse_coo_tensor(read[None], dense.grad[read], values.shape, check_invariants=True)
        optimizer.step()
        state["step"] = step + 1
        scatter_update(values, state, [(indices, weights, dy)], lr=0.02, betas=(0.9, 0.99), eps=1e-8)
        torch.testing.assert_close(values, p.detach())


@pytest.mark.parametrize("kind", ["rowwise", "adam"])
def test_update_is_deterministic_and_leaves_unread_rows_alone(kind):
    def run():
        values, indices, weights, dy = make_read(200, 8, 32, 100, dtype=torch.float32)
        before = values.clone()
        state = (
            {"v": torch.zeros(100, 8)}
            if kind == "rowwise"
            else {"step": 1, "exp_avg": torch.zeros(100, 32), "exp_avg_sq": torch.zeros(100, 32)}
        )
        indices = indices.clamp(max=60)
        scatter_update(values, state, [(indices, weights, dy)], lr=0.1, betas=(0.9, 0.99), eps=1e-8)
        return before, values, state

    before, values, state = run()
    assert torch.equal(values[61:], before[61:])
    assert not torch.equal(values[:61], before[:61])
    _, again, state_again = run()
    assert torch.equal(values, again)
    assert all(torch.equal(torch.as_tensor(state[k]), torch.as_tensor(state_again[k])) for k in state)
