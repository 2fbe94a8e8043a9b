"""
The three operations a memory layer does to its pool of values, and nothing else: tensors in, tensors out.

    gather_sum      y[n]     = sum_j weights[n, j] * values[indices[n, j]]         forward
    gather_dot      dw[n, j] = <values[indices[n, j]], dy[n]>                      gradient of the weights
    scatter_update  g[r]     = sum over (n, j) with indices[n, j] = r of weights[n, j] * dy[n]
                    and at once the optimiser's step on row r, for the rows that were read

The gradient of a gather is a gather: sort the indices, and the places where row r was read stand together, so
that g[r] is a weighted bag too, over rows of dy. So the gradient is never written down: not for the whole
pool, and not for all the rows that were read. It exists for a chunk of rows that fits the cache, and is spent
there.

Everything is deterministic: a stable sort, sums in a fixed order, no atomics.

`values` is (num_values, V); `indices` and `weights` are (N, bag): the rows that each of N tokens reads, and
by how much. A *read* is the tuple (indices, weights, dy), dy being (N, V): all that is needed for g.
"""

import torch
import torch.nn.functional as F

CHUNK = 2**19  # numbers in a chunk of row gradients: 2 MiB of float32, about a core's cache


def gather_sum(values: torch.Tensor, indices: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """y[n] = sum_j weights[n, j] * values[indices[n, j]]: (N, V), of the dtype of values."""
    return F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")


def gather_dot(values: torch.Tensor, indices: torch.Tensor, dy: torch.Tensor) -> torch.Tensor:
    """dw[n, j] = <values[indices[n, j]], dy[n]>: (N, bag), like values. The adjoint of gather_sum."""
    N, bag = indices.size()
    token = torch.arange(N, device=indices.device).repeat_interleave(bag)  # the token of each flat index
    dw = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        dy.to(values.dtype), values, indices.reshape(-1), token[::bag], token, 0)  # 0: mode 'sum'
    return dw.view(N, bag)


def row_gradients(reads):
    """
    Yields (rows, g): the indices of a chunk of the rows that were read, ascending, and their gradients (rows,
    V).

    Every row that any of the reads touched comes once, with the sum over all the reads. g is the caller's to
    spoil.
    """
    if sum(indices.numel() for indices, _, _ in reads) == 0:
        return
    # one long list of (row, token, weight), sorted by row; tokens of all reads are numbered through
    indices = torch.cat([indices.reshape(-1) for indices, _, _ in reads])
    weights = torch.cat([weights.reshape(-1) for _, weights, _ in reads])
    dy = torch.cat([dy for _, _, dy in reads])
    bags = torch.tensor([indices.size(1) for indices, _, _ in reads], device=dy.device)
    tokens = torch.tensor([len(indices) for indices, _, _ in reads], device=dy.device)
    token = torch.arange(len(dy), device=dy.device).repeat_interleave(bags.repeat_interleave(tokens))
    indices, order = torch.sort(indices, stable=True)
    token, weights = token[order], weights.to(dy.dtype)[order]
    # row rows[i] was read at places start[i] ... start[i+1] - 1 of the list
    rows, counts = torch.unique_consecutive(indices, return_counts=True)
    start = F.pad(counts.cumsum(0), (1, 0))

    step = max(1, CHUNK // dy.size(1))
    edges = start[::step].tolist()
    if len(rows) % step:
        edges.append(len(token))
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        chunk = slice(i * step, min((i + 1) * step, len(rows)))
        yield rows[chunk], F.embedding_bag(token[a:b], dy, start[chunk] - a, per_sample_weights=weights[a:b],
                                           mode="sum")


def scatter_update(values: torch.Tensor, state: dict, reads: list, lr: float, betas: tuple[float, float],
                   eps: float) -> None:
    """
    One step of the pool's optimiser, in place, on the rows that `reads` touched and on no others.

    Which optimiser follows from `state`; g is the gradient of row r. rowwise: state['v'], (num_values,
    blocks). For each block c of the row's columns, with m = mean of g[c]**2:
        v[r, c] = m the first time, then beta2 * v + (1 - beta2) * m
        values[r, c] -= lr * g[c] / (sqrt(v[r, c]) + eps)
    adam: state['exp_avg'] and state['exp_avg_sq'], like values, and state['step'], 1 at the first call: Adam
    with
        moments that only move when the row is read (torch.optim.SparseAdam).
    """
    beta1, beta2 = betas
    for rows, g in row_gradients(reads):
        if "v" in state:
            blocks = g.view(len(rows), state["v"].size(1), -1)  # (rows, blocks, V/blocks)
            mean_sq = blocks.square().mean(2)
            v = state["v"][rows]
            v = torch.where(v == 0, mean_sq, torch.lerp(mean_sq, v, beta2))  # 0: never read until now
            state["v"][rows] = v
            blocks.div_(v.sqrt_().add_(eps).unsqueeze(2))
            scale = lr
        else:
            exp_avg = torch.lerp(state["exp_avg"][rows], g, 1 - beta1)
            exp_avg_sq = torch.lerp(state["exp_avg_sq"][rows], g.square_(), 1 - beta2)
            state["exp_avg"][rows], state["exp_avg_sq"][rows] = exp_avg, exp_avg_sq
            g = exp_avg.div_(exp_avg_sq.sqrt_().add_(eps))
            scale = lr * (1 - beta2 ** state["step"]) ** 0.5 / (1 - beta1 ** state["step"])
        values.index_add_(0, rows, g.to(values.dtype), alpha=-scale)
