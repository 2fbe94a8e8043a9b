"""
The operations of a memory layer on its pool of values: functions that take tensors and return tensors.

    gather_sum      y[n]     = sum_j weights[n, j] * values[indices[n, j]]         forward pass
    gather_dot      dw[n, j] = <values[indices[n, j]], dy[n]>                      gradient of the weights
    scatter_update  g[r]     = sum of weights[n, j] * dy[n] over all (n, j) with indices[n, j] = r
                    computes g[r] and updates row r, for each row r that was read
    top_k           the k greatest numbers of each row of a tensor, as x.topk(k), but faster
    best_slots, half_score_gradients     the search of memory.py without its dot products, in Triton

    values            (num_values, V)  the pool: float16, bfloat16, float32 or float64
    indices, weights  (N, bag)         the rows that each of N tokens reads, and their weights
    dy                (N, V)           the gradient of the loss with respect to y
    read              the tuple (indices, weights, dy), which is all that g depends on

The gradient of the whole pool is never in memory. Sort the indices: then all reads of row r stand next to
each other, and g[r] is a weighted sum of rows of dy, just as y[n] is a weighted sum of rows of values. So g
is computed for a few rows at a time, updates these rows, and is forgotten.

Triton computes in float32. PyTorch computes g and the update in float32 too (float64 for float64 values), but
gather_sum and gather_dot in the dtype of the values. The same inputs give the same bits on the same device:
the sort is stable, every sum has a fixed order, and there are no atomics.

Each operation on the pool exists twice: in Triton for GPUs, and in PyTorch for CPUs. kernel='auto' chooses
by the device of the tensors. kernel='triton' and kernel='torch' choose one of the two.
"""

from __future__ import annotations  # without Triton, the annotation tl.constexpr is only a string

import os
import warnings

import torch
import torch.nn.functional as F

try:
    import numpy  # PyTorch can share memory with numpy only if numpy is there
except ImportError:
    numpy = None
try:
    import triton
    import triton.language as tl
except ImportError:  # Triton does not exist for every system, and PyTorch is enough
    triton = None

CHUNK = 2**19  # PyTorch: numbers of g to compute at a time. 2 MiB of float32, about the cache of a CPU core
PIECE = 128  # Triton: a row that was read more than 128 times is summed in pieces of 128 reads


def check_kernel(kernel: str) -> None:
    if kernel not in ("auto", "triton", "torch"):
        raise ValueError(f"kernel={kernel!r} must be 'auto', 'triton' or 'torch'")


def resolve_kernel(kernel: str, device: torch.device | str) -> str:
    """'auto', 'triton' or 'torch' -> 'triton' or 'torch'. A ValueError says why Triton cannot run here."""
    check_kernel(kernel)
    on_gpu = torch.device(device).type == "cuda"
    if kernel == "auto":
        return "triton" if on_gpu and triton is not None else "torch"
    if kernel == "triton" and triton is None:
        raise ValueError("kernel=triton: the package triton is not installed; use kernel=torch")
    if kernel == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernel=triton needs a GPU, or TRITON_INTERPRET=1 to try it; use kernel=torch")
    return kernel


def gather_sum(values, indices, weights, kernel: str = "auto") -> torch.Tensor:
    """Returns y (N, V) in the dtype of weights: y[n] = sum_j weights[n, j] * values[indices[n, j]]."""
    if resolve_kernel(kernel, values.device) == "triton":
        return _gather_sum_triton(values, indices, weights)
    y = F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")
    return y.to(weights.dtype)


def gather_dot(values, indices, dy, kernel: str = "auto") -> torch.Tensor:
    """Returns dw (N, bag) in the dtype of dy: dw[n, j] = <values[indices[n, j]], dy[n]>."""
    if resolve_kernel(kernel, values.device) == "triton":
        return _gather_dot_triton(values, indices, dy)
    N, bag = indices.size()
    dy_cast = dy.to(values.dtype)
    if values.is_cpu and values.dtype in (torch.float32, torch.float64) and bag <= len(values):
        dw = _gather_dot_sparse(values, indices, dy_cast)
    elif values.is_cuda and values.dtype == torch.bfloat16:  # PyTorch lacks the operation below for this case
        dw = torch.einsum("njv,nv->nj", values[indices], dy_cast)
    else:
        token = torch.arange(N, device=indices.device).repeat_interleave(bag)  # the token of each index
        dw = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy_cast, values, indices.reshape(-1), token[::bag], token, 0)  # 0: mode 'sum'
    return dw.view(N, bag).to(dy.dtype)


def _gather_dot_sparse(values, indices, dy):
    """
    dw[n, j] is the entry (n, indices[n, j]) of the matrix dy @ values.T. sampled_addmm computes only the
    entries asked for, in 10% to 50% less time than the backward pass of embedding_bag.
    """
    N, bag = indices.size()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta"
        entries = torch.sparse_csr_tensor(torch.arange(N + 1) * bag, indices.reshape(-1).long(),
                                          dy.new_zeros(N * bag), (N, len(values)), check_invariants=False)
    return torch.sparse.sampled_addmm(entries, dy, values.t(), beta=0.0).values()


def scatter_update(values, reads: list, state: dict, lr: float, betas: tuple[float, float] = (0.9, 0.99),
                   eps: float = 1e-12, seed: int | None = None, finite: torch.Tensor | None = None,
                   kernel: str = "auto") -> None:
    """
    One step of the pool's optimiser, in place. Only the rows that were read change, in `values` and `state`.

    The tensors in `state` choose the optimiser. state['step'] is int64: the caller sets it to 1 for the first
    step, 2 for the second, and so on. The others are float32 (float64 for float64 values).
    rowwise: state has 'v' (num_values, blocks). For each block c of columns, with m = mean of g[r, c]**2:
        v[r, c] = m when row r is read for the first time, and beta2 * v[r, c] + (1 - beta2) * m later
        values[r, c] -= lr * g[r, c] / (sqrt(v[r, c]) + eps)
    adam: state has 'exp_avg' and 'exp_avg_sq', both as large as values. The formula is Adam's. The moments of
        a row only move when the row is read, as in torch.optim.SparseAdam.
    sgd: state has no further tensor. values[r] -= lr * g[r]

    seed: turns on stochastic rounding, for bfloat16 values only. A new value is then rounded up or down at
        random, drawn from (seed, step, row, column). Without it, changes smaller than half of the distance to
        the next bfloat16 number are lost.
    finite: a tensor with one bool. If it is False, nothing changes. The CPU does not wait for a GPU here.
    """
    if sum(read[0].numel() for read in reads) == 0:
        return
    if seed is not None:
        if values.dtype != torch.bfloat16:
            raise ValueError(f"stochastic rounding is for bfloat16 values, and these are {values.dtype}")
        seed = (seed + state["step"]) % 2**31
    if "exp_avg" in state:  # Adam's bias correction, for both moments
        step = state["step"].double()
        lr = lr * (1 - betas[1] ** step).sqrt() / (1 - betas[0] ** step)
    sorted_reads = sort_reads(reads)
    update = _update_triton if resolve_kernel(kernel, values.device) == "triton" else _update_torch
    update(values, state, sorted_reads, lr, *betas, eps, seed, finite)
    torch.autograd.graph.increment_version(values)  # autograd does not notice what Triton writes


def sort_reads(reads: list):
    """
    The reads of all layers and micro-batches in one list, sorted by row.

    Returns row, token, weights, (places,) each, and dy (tokens of all reads, V). A place is a position in the
    sorted list: token[place] read row[place] with weights[place]. The gradient of a row is the sum of
    weights[place] * dy[token[place]] over its places, which stand next to each other.

    Example: token 0 reads rows 7 and 2, and token 1 reads rows 2 and 9, with weights a, b and c, d. Then
    row = 2, 2, 7, 9; token = 0, 1, 0, 1; weights = b, c, a, d. So g[2] = b * dy[0] + c * dy[1]. The tokens of
    a second read would be 2, 3 and so on.
    """
    indices, weights, dy = zip(*reads, strict=True)
    dy = torch.cat(dy) if len(dy) > 1 else dy[0]
    tokens = torch.arange(len(dy), device=dy.device).split([len(i) for i in indices])  # of each read
    token = torch.cat([t.repeat_interleave(i.size(1)) for t, i in zip(tokens, indices, strict=True)])
    row, order = torch.sort(torch.cat([i.reshape(-1) for i in indices]), stable=True)
    weights = torch.cat([w.reshape(-1) for w in weights])
    return row, token.index_select(0, order), weights.index_select(0, order), dy


def can_search_in_triton(scores, num_keys: int, knn: int, kernel: str = "auto") -> bool:
    """Compiled for these sizes, the kernels spill no registers. They have no float64."""
    return (resolve_kernel(kernel, scores.device) == "triton" and scores.dtype == torch.float32
            and num_keys <= 8192 and knn <= 64)


def top_k(x: torch.Tensor, k: int):
    """x.topk(k) for finite x, but faster. x (..., S) -> values, indices (..., k)."""
    S = x.size(-1)
    if S > 128 and S % 4 == 0 and 4 * k < S:
        return _top_k_by_groups(x, k)
    is_plain = type(x) is torch.Tensor and x.is_cpu  # a subclass may have no numbers
    if numpy and is_plain and x.dtype == torch.float32 and k <= S:
        return _top_k_by_numpy(x, k)
    return x.topk(k)


def _top_k_by_groups(x, k):
    """
    The best k numbers are in the k groups of 4 with the greatest maxima. So choosing from S numbers becomes
    choosing from S/4 maxima, and then from 4*k numbers: about 3 times as fast as torch for S = 512 on a CPU.
    """
    S = x.size(-1)
    groups = x.unflatten(-1, (4, S // 4))  # group c has the columns c, c + S/4, c + 2*S/4 and c + 3*S/4
    best = top_k(groups.amax(-2), k)[1].unsqueeze(-2)  # (..., 1, k): the best groups
    members = groups.gather(-1, best.expand(*best.shape[:-2], 4, k)).flatten(-2)  # (..., 4*k)
    values, place = top_k(members, k)
    return values, best.squeeze(-2).gather(-1, place % k) + place // k * (S // 4)


def _top_k_by_numpy(x, k):
    """
    numpy sorts a row 5 times as fast as torch, but does not return the columns of the sorted numbers. So each
    float32 number becomes a float64, and its column is written into the lowest 28 of the 29 new bits.
    """
    rows = x.double().add_(2.0**-1000)  # changes only 0: its new bits would be a denormal number
    rows.view(torch.int64).bitwise_or_(torch.arange(x.size(-1)))
    rows.numpy().sort(-1)
    best = rows[..., -k:].flip(-1)
    return best.float(), best.view(torch.int64) & (2**28 - 1)


# --- PyTorch ------------------------------------------------------------------------------------------------

def row_gradients(row, token, weights, dy, dtype=None):
    """
    Yields (rows, g), the gradients g of some rows, until all rows that were read are done. The arguments are
    what sort_reads returns. In its example, rows are 2, 7, 9, and g is (b * dy[0] + c * dy[1], a * dy[0],
    d * dy[1]). You may overwrite g. It has about CHUNK numbers, so it stays in the CPU's cache: an update of
    many rows takes about half the time.
    """
    rows, counts = torch.unique_consecutive(row, return_counts=True)
    first_places = counts.cumsum(0) - counts  # of each row
    dy = dy.to(dtype or torch.promote_types(dy.dtype, torch.float32))
    weights = weights.to(dy.dtype)
    size = max(1, CHUNK // dy.size(1))  # rows per chunk
    edges = [*first_places[::size].tolist(), len(token)]  # the first place of each chunk, and the end
    chunks = zip(rows.long().split(size), first_places.split(size), edges[:-1], edges[1:], strict=True)
    for chunk, first, begin, end in chunks:
        yield chunk, F.embedding_bag(token[begin:end], dy, first - begin, mode="sum",
                                     per_sample_weights=weights[begin:end])


def _update_torch(values, state, sorted_reads, lr, beta1, beta2, eps, seed, finite):
    if finite is not None and not finite:
        return
    lr = float(lr)
    moment = state.get("v", state.get("exp_avg"))  # these keep their dtype if the values are converted
    dtype = torch.promote_types(values.dtype, torch.float32) if moment is None else moment.dtype
    for rows, g in row_gradients(*sorted_reads, dtype):
        if "v" in state:  # rowwise
            v = state["v"].index_select(0, rows)  # (rows, blocks)
            blocks = g.view(*v.shape, -1)  # (rows, blocks, V/blocks)
            mean_sq = torch.linalg.vector_norm(blocks, dim=2).square_().div_(blocks.size(2))
            v = torch.where(v == 0, mean_sq, torch.lerp(mean_sq, v, beta2))  # 0: not read before
            state["v"].index_copy_(0, rows, v)
            blocks.div_(v.sqrt_().add_(eps).unsqueeze(2))  # in place: this changes g
        elif "exp_avg" in state:  # adam
            exp_avg, exp_avg_sq = (state[name].index_select(0, rows) for name in ("exp_avg", "exp_avg_sq"))
            change = (g - exp_avg).mul_(1 - beta1)
            change_sq = g.square_().sub_(exp_avg_sq).mul_(1 - beta2)
            _add_to_rows(state["exp_avg"], rows, change)
            _add_to_rows(state["exp_avg_sq"], rows, change_sq)
            g = exp_avg.add_(change).div_(exp_avg_sq.add_(change_sq).sqrt_().add_(eps))
        if values.dtype == g.dtype:
            _add_to_rows(values, rows, g, alpha=-lr)
        else:
            new = values[rows].to(torch.promote_types(values.dtype, g.dtype)).sub_(g, alpha=lr)
            values[rows] = (new if seed is None else _round_by_chance(new, rows, seed)).to(values.dtype)


def _add_to_rows(matrix, rows, change, alpha=1.0):
    """matrix[rows] += alpha * change, by adding a sparse tensor: PyTorch uses all CPU cores for this."""
    matrix.add_(torch.sparse_coo_tensor(rows.unsqueeze(0), change, matrix.shape, is_coalesced=True,
                                        check_invariants=False), alpha=alpha)


def _round_by_chance(values, rows, seed):
    """
    Rounds values (rows, V) from float32 to bfloat16, which has 16 bits less. A random number is added to
    these 16 bits, and then they are cut off. So the nearer neighbour is more likely, and the mean is right.
    The random number is a hash of row, column and seed (mixed as in MurmurHash3), and the same in Triton.
    """
    x = rows.unsqueeze(1) + seed * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x85EBCA6B & 0xFFFFFFFF
    x = (x ^ (x >> 13)) * 0xC2B2AE35 & 0xFFFFFFFF
    x = (x ^ (x >> 16)) + torch.arange(values.size(1), device=rows.device) * 0x9E3779B1 & 0xFFFFFFFF
    x = (x ^ (x >> 16)) * 0x7FEB352D & 0xFFFFFFFF
    noise = ((x ^ (x >> 16)) & 0xFFFF).to(torch.int32)
    return (values.view(torch.int32) + noise & -0x10000).view(torch.float32)


# --- Triton -------------------------------------------------------------------------------------------------
#
# The kernels do little arithmetic, so they are fast if they load many bytes at once. A load takes 0.7 us on
# an H100: 3.35 TB/s * 0.7 us = 2.3 MB must be on their way, or 18 KB for each of its 132 multiprocessors. One
# program of gather_sum loads a tile of ROWS * COLUMNS numbers, 8 KB of float32, and 12 programs with 40
# registers per thread fit on a multiprocessor. So there is room for five times these 18 KB.
#
# Each load has 16 bytes if the bytes of a row are a multiple of 16. A row's index becomes int64 before it is
# multiplied by V, because a pool may have more than 2**31 numbers. The CPU never waits for the GPU here: it
# knows the size of every tensor without looking at numbers on the GPU.

def _jit(function):
    """Triton compiles once for each V, dtype and optimiser, but not for each number of places."""
    return triton.jit(function, do_not_specialize=["places"]) if triton is not None else function


def gather_settings(V: int, element_size: int) -> dict:
    """A tile has about 2,048 numbers. A thread loads 64 bytes of it."""
    columns = min(1024, triton.next_power_of_2(V))
    rows = min(64, 2048 // columns)
    num_warps = max(1, min(8, rows * columns * element_size // 2048))
    return dict(V=V, ROWS=rows, COLUMNS=columns, num_warps=num_warps)


def gather_dot_settings(V: int, element_size: int) -> dict:
    """Tiles twice as large, and 8 per program, so dy is loaded less often: 10% to 40% less time (H100)."""
    settings = gather_settings(V, element_size)
    return settings | dict(ROWS=2 * settings["ROWS"], TILES=8)


def update_settings(V: int, blocks: int, element_size: int) -> dict:
    """A thread loads 32 bytes of dy. Other numbers of warps change the time by less than 5% (H100)."""
    width, padded = triton.next_power_of_2(V // blocks), triton.next_power_of_2(blocks)
    return dict(V=V, PIECE=PIECE, BLOCKS=blocks, BLOCKS_PADDED=padded, WIDTH_PADDED=width,
                num_warps=max(1, min(8, padded * width * element_size // 1024)))


def search_settings(S: int, K: int) -> dict:
    """With sqrt(S / K) members per group, few numbers are sorted. Few warps: they wait for each other."""
    k = max(2, triton.next_power_of_2(K))
    s = max(k, triton.next_power_of_2(S))
    members = 2 ** (((s // k).bit_length() - 1) // 2)
    return dict(S=S, K=K, GROUPS=s // members, MEMBERS=members, K_PADDED=k,
                PAIRS=k * triton.next_power_of_2(k.bit_length()), num_warps=max(1, s // 1024))


def gradient_settings(S: int, K: int) -> dict:
    """A thread sums 8 columns, so that it can store 16 bytes twice."""
    s = triton.next_power_of_2(S)
    return dict(S=S, K=K, S_PADDED=s, num_warps=max(1, min(8, s // 256)))


@_jit
def _weighted_sum(values_ptr, indices_ptr, weights_ptr, begin, end, column,
                  V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Returns (COLUMNS,): the sum of weights[p] * values[indices[p]] for p = begin ... end - 1."""
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(indices_ptr + place, mask=place < end, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + place, mask=place < end, other=0.0).to(tl.float32)
        mask = (place < end)[:, None] & (column < V)[None, :]
        tile = tl.load(values_ptr + row[:, None] * V + column[None, :], mask=mask, other=0.0)
        total += weight[:, None] * tile.to(tl.float32)
    return tl.sum(total, 0)


@_jit
def gather_sum_kernel(
        y_ptr,  # (N, V)
        values_ptr,  # (num_values, V)
        indices_ptr, weights_ptr,  # (N, bag)
        bag, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y[n] = sum_j weights[n, j] * values[indices[n, j]]. One program: COLUMNS columns of one token."""
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    y = _weighted_sum(values_ptr, indices_ptr, weights_ptr, token * bag, (token + 1) * bag, column,
                      V, ROWS, COLUMNS)
    tl.store(y_ptr + token * V + column, y.to(y_ptr.dtype.element_ty), mask=column < V)


@_jit
def gather_dot_kernel(
        dw_ptr,  # (N, bag)
        values_ptr,  # (num_values, V)
        indices_ptr,  # (N, bag)
        dy_ptr,  # (N, V)
        bag, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr, TILES: tl.constexpr):
    """dw[n, j] = <values[indices[n, j]], dy[n]>. One program: TILES * ROWS rows of one token's bag."""
    token = tl.program_id(0).to(tl.int64)
    first_j = tl.program_id(1) * TILES * ROWS
    for first in range(first_j, tl.minimum(first_j + TILES * ROWS, bag), ROWS):
        j = first + tl.arange(0, ROWS)
        row = tl.load(indices_ptr + token * bag + j, mask=j < bag, other=0).to(tl.int64)
        total = tl.zeros((ROWS,), tl.float32)
        for first_column in range(0, V, COLUMNS):
            column = first_column + tl.arange(0, COLUMNS)
            dy = tl.load(dy_ptr + token * V + column, mask=column < V, other=0.0).to(tl.float32)
            mask = (j < bag)[:, None] & (column < V)[None, :]
            tile = tl.load(values_ptr + row[:, None] * V + column[None, :], mask=mask, other=0.0)
            total += tl.sum(tile.to(tl.float32) * dy[None, :], 1)
        tl.store(dw_ptr + token * bag + j, total.to(dw_ptr.dtype.element_ty), mask=j < bag)


@_jit
def _round_by_chance_triton(values, row, column, seed):
    """As _round_by_chance."""
    x = row.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    x = (x ^ (x >> 16)) + column.to(tl.uint32) * 0x9E3779B1
    x = (x ^ (x >> 16)) * 0x7FEB352D
    bits = values.to(tl.uint32, bitcast=True) + ((x ^ (x >> 16)) & 0xFFFF)
    return (bits & 0xFFFF0000).to(tl.float32, bitcast=True)


@_jit
def sum_pieces_kernel(
        sums_ptr,  # (2 * chunks, V): one row per program
        dy_ptr,  # (tokens of all reads, V)
        begin_ptr, end_ptr, token_ptr, weights_ptr,  # (places,)
        places, V: tl.constexpr, PIECE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """
    Sums the pieces of rows that were read very often. One program alone would need long for such a row, while
    all others wait. So a row with more than PIECE places is cut into pieces of PIECE places, and each piece
    has a program here. The last piece of a row is called its rest, and may be shorter.

    The CPU does not know where the pieces are, so it starts programs for every possible piece. Cut the list
    of all places into chunks of PIECE places. At most one rest begins in a chunk, and its row has the first
    place of the chunk. At most one other piece begins in a chunk, and its row has the last place. So chunk c
    has two programs: 2 * c for the other piece, and 2 * c + 1 for the rest.

    Example with PIECE = 4: a row has the places 2 to 10, and its pieces are 2-5, 6-9 and the rest, 10. The
    chunks are 0-3, 4-7 and 8-11. Piece 2-5 begins in chunk 0 and belongs to program 0, piece 6-9 begins in
    chunk 1 and belongs to program 2, and the rest begins in chunk 2 and belongs to program 5.
    """
    chunk, is_rest = tl.program_id(0) // 2, tl.program_id(0) % 2
    place = tl.minimum(chunk * PIECE + (1 - is_rest) * (PIECE - 1), places - 1)
    begin, end = tl.load(begin_ptr + place), tl.load(end_ptr + place)
    rest = begin + (end - begin - 1) // PIECE * PIECE
    first = tl.where(is_rest == 1, rest, place - (place - begin) % PIECE)
    if (end - begin > PIECE) & (first // PIECE == chunk) & ((first == rest) == (is_rest == 1)):
        column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
        total = _weighted_sum(dy_ptr, token_ptr, weights_ptr, first, tl.minimum(first + PIECE, end), column,
                              V, ROWS, COLUMNS)
        tl.store(sums_ptr + tl.program_id(0).to(tl.int64) * V + column, total, mask=column < V)


@_jit
def update_kernel(
        values_ptr,  # (num_values, V)
        v_ptr,  # (num_values, BLOCKS) for rowwise, otherwise None
        exp_avg_ptr, exp_avg_sq_ptr,  # (num_values, V) for adam, otherwise None
        row_ptr, token_ptr, weights_ptr,  # (places,), sorted by row
        begin_ptr, end_ptr,  # (places,): the row of this place has the places begin ... end - 1
        dy_ptr,  # (tokens of all reads, V)
        sums_ptr,  # (2 * chunks, V), from sum_pieces_kernel
        lr_ptr, seed_ptr, finite_ptr,  # one number each: float32, int64 and int32 (0 or 1)
        beta1, beta2, eps,
        V: tl.constexpr, PIECE: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr,
        WIDTH_PADDED: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The formulas of scatter_update. Each place has a program. Only the one of a row's first place works."""
    WIDTH: tl.constexpr = V // BLOCKS
    place = tl.program_id(0)
    row = tl.load(row_ptr + place).to(tl.int64)
    begin, end = tl.load(begin_ptr + place), tl.load(end_ptr + place)
    if place != begin:
        return
    block = tl.arange(0, BLOCKS_PADDED)
    column_in_block = tl.arange(0, WIDTH_PADDED)
    column = block[:, None] * WIDTH + column_in_block[None, :]  # (blocks, width): all columns of the row
    mask = (block < BLOCKS)[:, None] & (column_in_block < WIDTH)[None, :]
    offset = row * V + column
    # these loads start now, and the numbers arrive while g is summed
    values = tl.load(values_ptr + offset, mask=mask, other=0.0)
    if v_ptr is not None:
        v = tl.load(v_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)

    g = tl.zeros((BLOCKS_PADDED, WIDTH_PADDED), tl.float32)
    if end - begin <= PIECE:
        for p in range(begin, end):
            token = tl.load(token_ptr + p).to(tl.int64)
            dy = tl.load(dy_ptr + token * V + column, mask=mask, other=0.0)
            g += tl.load(weights_ptr + p).to(tl.float32) * dy.to(tl.float32)
    else:
        for first in range(begin, end, PIECE):
            is_rest = (first + PIECE >= end).to(tl.int64)
            g += tl.load(sums_ptr + (2 * (first // PIECE) + is_rest) * V + column, mask=mask, other=0.0)

    lr, finite = tl.load(lr_ptr), tl.load(finite_ptr) != 0
    values = values.to(tl.float32)
    mask = mask & finite  # nothing is stored if a gradient is not finite
    if v_ptr is not None:  # rowwise
        mean_sq = tl.sum(g * g, 1) / WIDTH
        v = tl.where(v == 0, mean_sq, beta2 * v + (1 - beta2) * mean_sq)
        tl.store(v_ptr + row * BLOCKS + block, v, mask=(block < BLOCKS) & finite)
        values -= lr * g / (tl.sqrt(v) + eps)[:, None]
    elif exp_avg_ptr is not None:  # adam
        exp_avg = tl.load(exp_avg_ptr + offset, mask=mask, other=0.0)
        exp_avg_sq = tl.load(exp_avg_sq_ptr + offset, mask=mask, other=0.0)
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
        tl.store(exp_avg_ptr + offset, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + offset, exp_avg_sq, mask=mask)
        values -= lr * exp_avg / (tl.sqrt(exp_avg_sq) + eps)
    else:  # sgd
        values -= lr * g
    if STOCHASTIC:
        values = _round_by_chance_triton(values, row, column, tl.load(seed_ptr))
    tl.store(values_ptr + offset, values.to(values_ptr.dtype.element_ty), mask=mask)


@_jit
def _sort_key(score, index, is_there):
    """
    An int64 that sorts like the score and has the index in its lower half: tl.topk does not tell where it
    found a number. The upper half has the bits of the score, a float32. Read as integers, these sort like the
    scores if all bits of negative scores are flipped, except for the sign. nan comes first, as in torch.topk.
    A score that is not there comes last.
    """
    bits = score.to(tl.int32, bitcast=True)
    bits = tl.where(score == score, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)
    return tl.where(is_there, bits, -(2**31)).to(tl.int64) << 32 | index


@_jit
def _score(sort_key):
    bits = (sort_key >> 32).to(tl.int32)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@_jit
def _load_sort_keys(half_scores_ptr, column, S: tl.constexpr):
    score = tl.load(half_scores_ptr + column, mask=column < S, other=0.0)
    return _sort_key(score, column, column < S)


@_jit
def _best_half_keys(half_scores_ptr, S: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr,
                    K_PADDED: tl.constexpr):
    """The sort keys of the K_PADDED best half-scores of a row, chosen by groups as in _top_k_by_groups."""
    member = tl.arange(0, MEMBERS)[:, None] * GROUPS  # group c has the columns c, c + GROUPS and so on
    keys = _load_sort_keys(half_scores_ptr, member + tl.arange(0, GROUPS)[None, :], S)
    best = tl.topk(tl.max(keys, 0), K_PADDED)
    if MEMBERS > 1:
        keys = _load_sort_keys(half_scores_ptr, member + (best & (GROUPS - 1))[None, :], S)
        best = tl.topk(keys.reshape(MEMBERS * K_PADDED), K_PADDED)
    return best


@_jit
def best_slots_kernel(
        scores_ptr,  # (H, N, K)
        chosen_ptr,  # (H, 2, N, K)
        half_scores_ptr,  # (H, 2, N, S)
        S: tl.constexpr, K: tl.constexpr, GROUPS: tl.constexpr, MEMBERS: tl.constexpr, K_PADDED: tl.constexpr,
        PAIRS: tl.constexpr):
    """
    best_slots of memory.py. One program: one token and head.

    All pairs (i, j) of ranks that can win are in groups of K_PADDED pairs. Group g has 2**g ranks i, from
    2**g - 1 on, and for each of them the first K_PADDED / 2**g ranks j. With K_PADDED = 4, group 0 is (0, 0),
    (0, 1), (0, 2), (0, 3), group 1 is (1, 0), (1, 1), (2, 0), (2, 1), and group 2 begins with (3, 0).
    """
    token, head, N = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    left = 2 * head * N + token  # rows of half_scores and of chosen
    right = left + N
    left_keys = _best_half_keys(half_scores_ptr + left * S, S, GROUPS, MEMBERS, K_PADDED)
    right_keys = _best_half_keys(half_scores_ptr + right * S, S, GROUPS, MEMBERS, K_PADDED)

    pair = tl.arange(0, PAIRS)
    group = pair // K_PADDED
    place = pair % K_PADDED << group
    i, j = (1 << group) - 1 + place // K_PADDED, place % K_PADDED >> group
    can_win = (i + 1) * (j + 1) <= K
    a = tl.gather(left_keys, tl.where(can_win, i, 0), 0)
    b = tl.gather(right_keys, tl.where(can_win, j, 0), 0)
    slot = (a & 0xFFFF) << 16 | b & 0xFFFF  # both half-keys
    best = tl.topk(_sort_key(_score(a) + _score(b), slot, can_win), K_PADDED)

    rank = tl.arange(0, K_PADDED)
    tl.store(scores_ptr + (head * N + token) * K + rank, _score(best), mask=rank < K)
    tl.store(chosen_ptr + left * K + rank, best >> 16 & 0xFFFF, mask=rank < K)
    tl.store(chosen_ptr + right * K + rank, best & 0xFFFF, mask=rank < K)


@_jit
def half_score_gradients_kernel(
        d_half_scores_ptr,  # (H, 2, N, S)
        d_scores_ptr,  # (H, N, K)
        chosen_ptr,  # (H, 2, N, K)
        S: tl.constexpr, K: tl.constexpr, S_PADDED: tl.constexpr):
    """The gradient of a slot's score goes to both of its half-keys. One program: a token, head and side."""
    token, side, N = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.num_programs(0)
    row = side * N + token  # side: of all heads, 0 to 2 * H - 1
    column = tl.arange(0, S_PADDED)
    total = tl.zeros((S_PADDED,), tl.float32)
    for k in range(K):
        d_score = tl.load(d_scores_ptr + (side // 2 * N + token) * K + k)
        total += tl.where(column == tl.load(chosen_ptr + row * K + k), d_score, 0.0)
    tl.store(d_half_scores_ptr + row * S + column, total, mask=column < S)


def _launch(kernel, grid, *arguments, **settings) -> None:
    """Runs a kernel on the GPU of its tensors. All kernels need rows that follow each other without gaps."""
    tensors = [x for x in arguments if torch.is_tensor(x)]
    if not all(x.is_contiguous() for x in tensors):
        raise ValueError("kernel=triton needs values and state that are contiguous: values.contiguous()")
    with torch.cuda.device_of(tensors[0]):
        kernel[grid](*arguments, **settings)


def _gather_sum_triton(values, indices, weights):
    (N, bag), V = indices.size(), values.size(1)
    y = weights.new_empty(N, V)
    if y.numel():
        settings = gather_settings(V, values.element_size())
        grid = N, triton.cdiv(V, settings["COLUMNS"])
        _launch(gather_sum_kernel, grid, y, values, indices.contiguous(), weights.contiguous(), bag,
                **settings)
    return y


def _gather_dot_triton(values, indices, dy):
    N, bag = indices.size()
    dw = dy.new_empty(N, bag)
    if dw.numel():
        settings = gather_dot_settings(values.size(1), values.element_size())
        grid = N, triton.cdiv(bag, settings["ROWS"] * settings["TILES"])
        _launch(gather_dot_kernel, grid, dw, values, indices.contiguous(), dy.contiguous(), bag, **settings)
    return dw


def best_slots_triton(half_scores, knn: int):
    """As best_slots in memory.py."""
    H, _, N, S = half_scores.size()
    scores = half_scores.new_empty(H, N, knn)
    chosen = half_scores.new_empty(H, 2, N, knn, dtype=torch.int64)
    if N:
        _launch(best_slots_kernel, (N, H), scores, chosen, half_scores.contiguous(),
                **search_settings(S, knn))
    return scores, chosen


def half_score_gradients_triton(d_scores, chosen, num_keys: int):
    """As half_score_gradients in memory.py."""
    H, _, N, K = chosen.size()
    d_half_scores = d_scores.new_empty(H, 2, N, num_keys)
    if N:
        _launch(half_score_gradients_kernel, (N, 2 * H), d_half_scores, d_scores.contiguous(),
                chosen.contiguous(), **gradient_settings(num_keys, K))
    return d_half_scores


def _update_triton(values, state, sorted_reads, lr, beta1, beta2, eps, seed, finite):
    row, token, weights, dy = sorted_reads
    V, places, device = dy.size(1), len(token), dy.device
    begin = torch.searchsorted(row, row, out_int32=True)
    end = torch.searchsorted(row, row, right=True, out_int32=True)
    sums = torch.empty(2 * triton.cdiv(places, PIECE), V, dtype=torch.float32, device=device)
    settings = gather_settings(V, dy.element_size())
    _launch(sum_pieces_kernel, (len(sums), triton.cdiv(V, settings["COLUMNS"])),
            sums, dy, begin, end, token, weights, places, PIECE=PIECE, **settings)
    v, exp_avg, exp_avg_sq = (state.get(name) for name in ("v", "exp_avg", "exp_avg_sq"))
    if not torch.is_tensor(lr):
        # not a copy from the CPU, which would make the CPU wait
        lr = torch.full((), lr, dtype=torch.float32, device=device)
    finite = torch.ones((), device=device) if finite is None else finite
    _launch(update_kernel, (places,), values, v, exp_avg, exp_avg_sq, row, token, weights, begin, end, dy,
            sums, lr.float(), seed, finite.int(), beta1, beta2, eps, STOCHASTIC=seed is not None,
            **update_settings(V, 1 if v is None else v.size(1), dy.element_size()))
