"""
The three operations a memory layer does to its pool of values, and nothing else: tensors in, tensors out.

    gather_sum      y[n]     = sum_j weights[n, j] * values[indices[n, j]]         forward
    gather_dot      dw[n, j] = <values[indices[n, j]], dy[n]>                      gradient of the weights
    scatter_update  g[r]     = sum over (n, j) with indices[n, j] = r of weights[n, j] * dy[n]
                    and at once the optimiser's step on row r, for the rows that were read

The gradient of a gather is a gather: sort the indices, and the places where row r was read stand together, so
that g[r] is a weighted bag too, over rows of dy. So the gradient is never written down: not for the whole
pool, and not for all the rows that were read. It lives in a processor's cache (PyTorch) or registers
(Triton), and is spent there.

`values` is (num_values, V), float32, bfloat16 or float16; `indices` and `weights` are (N, bag): the rows that
each of N tokens reads, and by how much. A *read* is the tuple (indices, weights, dy), dy being (N, V): all
that g needs. g and the optimiser's arithmetic are of float32 at least, and so is every sum in Triton; PyTorch
gathers 16-bit values by operations that round to 16 bits. Everything is deterministic: a stable sort, sums in
a fixed order, no atomics.

Each operation is there twice: in plain PyTorch, which is also the fast one on CPUs, and in Triton for GPUs.
kernel='auto' takes Triton for tensors on a GPU; 'triton' and 'torch' insist.
"""

from __future__ import annotations

import math
import os
import warnings

import torch
import torch.nn.functional as F

try:
    import triton
    import triton.language as tl
except ImportError:  # there is no Triton for this system; PyTorch is enough
    triton = None

CHECK_INDICES = os.environ.get("NANOPKM_CHECK") == "1"  # an index out of range reads or writes anything
CHUNK = 2**19  # numbers in a chunk of row gradients: 2 MiB of float32, about a core's cache


def resolve_kernel(kernel: str, device: torch.device | str) -> str:
    """'auto', 'triton' or 'torch' -> 'triton' or 'torch'; a ValueError says why, where Triton cannot run."""
    on_gpu = torch.device(device).type == "cuda"
    if kernel == "auto":
        return "triton" if on_gpu and triton is not None else "torch"
    if kernel == "triton" and triton is None:
        raise ValueError("kernel=triton: the package triton is not installed; use kernel=torch")
    if kernel == "triton" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("kernel=triton needs a GPU, or TRITON_INTERPRET=1 to try it; use kernel=torch")
    return kernel


def _check_indices(indices, num_values):
    if CHECK_INDICES and indices.numel():
        low, high = (bound.item() for bound in indices.aminmax())
        if low < 0 or high >= num_values:
            raise IndexError(f"indices from {low} to {high} in a pool of {num_values} rows")


def gather_sum(values, indices, weights, kernel: str = "auto") -> torch.Tensor:
    """y[n] = sum_j weights[n, j] * values[indices[n, j]]: (N, V), of the dtype of weights."""
    _check_indices(indices, len(values))
    if resolve_kernel(kernel, values.device) == "triton":
        return _gather_sum_triton(values, indices, weights)
    y = F.embedding_bag(indices, values, per_sample_weights=weights.to(values.dtype), mode="sum")
    return y.to(weights.dtype)


def gather_dot(values, indices, dy, kernel: str = "auto") -> torch.Tensor:
    """dw[n, j] = <values[indices[n, j]], dy[n]>: (N, bag), of the dtype of dy. The adjoint of gather_sum."""
    _check_indices(indices, len(values))
    if resolve_kernel(kernel, values.device) == "triton":
        return _gather_dot_triton(values, indices, dy)
    N, bag = indices.size()
    if values.is_cpu and values.dtype in (torch.float32, torch.float64) and bag <= len(values):
        # dw is dy @ values.T at some places: those of a sparse matrix that has the pool's rows for columns
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # "Sparse CSR tensor support is in beta"
            places = torch.sparse_csr_tensor(torch.arange(N + 1) * bag, indices.reshape(-1).long(),
                                             dy.new_zeros(N * bag, dtype=values.dtype), (N, len(values)),
                                             check_invariants=False)
        dw = torch.sparse.sampled_addmm(places, dy.to(values.dtype), values.t(), beta=0.0).values()
    else:
        token = torch.arange(N, device=indices.device).repeat_interleave(bag)  # the token of each flat index
        dw = torch.ops.aten._embedding_bag_per_sample_weights_backward(
            dy.to(values.dtype), values, indices.reshape(-1), token[::bag], token, 0)  # 0: mode 'sum'
    return dw.view(N, bag).to(dy.dtype)


def scatter_update(values, state: dict, reads: list, lr: float, betas: tuple[float, float], eps: float,
                   stochastic_rounding: int | None = None, kernel: str = "auto") -> None:
    """
    One step of the pool's optimiser, in place, on the rows that `reads` touched and on no others.

    Which optimiser follows from `state`, whose tensors are of float32 at least; g is the gradient of row r.
    rowwise: state['v'], (num_values, blocks). For each block c of a row's columns, with m = mean of g[c]**2:
        v[r, c] = m the first time, then beta2 * v + (1 - beta2) * m
        values[r, c] -= lr * g[c] / (sqrt(v[r, c]) + eps)
    adam: state['exp_avg'] and state['exp_avg_sq'], like values, and state['step'], first 1: Adam with
        moments that only move when the row is read (torch.optim.SparseAdam).
    stochastic_rounding: for bfloat16 values, an integer below 2**31, another one each step, by which new
        values are rounded up or down by chance, in proportion. Else steps below half a last place are lost.
    """
    if sum(indices.numel() for indices, _, _ in reads) == 0:
        return
    if stochastic_rounding is not None and values.dtype != torch.bfloat16:
        raise ValueError(f"stochastic rounding is for bfloat16 values, and these are {values.dtype}")
    if "v" in state:
        moments = (state["v"],)
    else:
        moments, step = (state["exp_avg"], state["exp_avg_sq"]), state["step"]
        lr = lr * (1 - betas[1] ** step) ** 0.5 / (1 - betas[0] ** step)
    sorted_reads = sort_reads(reads)
    _check_indices(sorted_reads[0], len(values))
    update = _update_triton if resolve_kernel(kernel, values.device) == "triton" else _update_torch
    update(values, moments, sorted_reads, lr, *betas, eps, stochastic_rounding)
    torch.autograd.graph.increment_version(values)  # Triton's writes are not seen by autograd


def sort_reads(reads: list):
    """
    All places where a row was read, sorted by row: rows (R,), start (R + 1,), token (places,), weights
    (places,), dy (tokens of all reads, V).

    Row rows[i] was read at the places start[i] ... start[i + 1] - 1, so that its gradient is the sum over
    those of weights[place] * dy[token[place]]. Tokens of all reads are numbered through.
    """
    indices = torch.cat([indices.reshape(-1) for indices, _, _ in reads])
    weights = torch.cat([weights.reshape(-1) for _, weights, _ in reads])
    dy = torch.cat([dy for _, _, dy in reads])
    first, token = 0, []
    for read_indices, _, _ in reads:
        N, bag = read_indices.size()
        token.append(torch.arange(first, first + N, device=dy.device).unsqueeze(1).expand(N, bag).reshape(-1))
        first += N
    indices, order = torch.sort(indices, stable=True)
    rows, counts = torch.unique_consecutive(indices, return_counts=True)
    token, weights = torch.cat(token).index_select(0, order), weights.index_select(0, order)
    return rows.long(), F.pad(counts.cumsum(0), (1, 0)), token, weights, dy


# --- PyTorch ------------------------------------------------------------------------------------------------

def row_gradients(rows, start, token, weights, dy):
    """Yields (rows, g) of what sort_reads found, by chunks of rows: g (rows, V) is the caller's to spoil."""
    dy = dy.to(torch.promote_types(dy.dtype, torch.float32))
    weights = weights.to(dy.dtype)
    step = max(1, CHUNK // dy.size(1))
    edges = start[::step].tolist()
    if len(rows) % step:
        edges.append(len(token))
    for i, (a, b) in enumerate(zip(edges, edges[1:], strict=False)):
        chunk = slice(i * step, min((i + 1) * step, len(rows)))
        g = F.embedding_bag(token[a:b], dy, start[chunk] - a, per_sample_weights=weights[a:b], mode="sum")
        yield rows[chunk], g


def _update_torch(values, moments, sorted_reads, lr, beta1, beta2, eps, stochastic_rounding):
    def add(to, rows, what, alpha=1.0):  # to[rows] += alpha * what, on all cores: index_add_ runs on one
        to.add_(torch.sparse_coo_tensor(rows.unsqueeze(0), what, to.shape, is_coalesced=True,
                                        check_invariants=False), alpha=alpha)

    for rows, g in row_gradients(*sorted_reads):
        if len(moments) == 1:  # rowwise
            v = moments[0]
            blocks = g.view(len(rows), v.size(1), -1)  # (rows, blocks, V/blocks)
            mean_sq = torch.linalg.vector_norm(blocks, dim=2).square_().div_(blocks.size(2))
            new_v = v.index_select(0, rows)
            new_v = torch.where(new_v == 0, mean_sq, torch.lerp(mean_sq, new_v, beta2))  # 0: not read before
            v.index_copy_(0, rows, new_v)
            blocks.div_(new_v.sqrt_().add_(eps).unsqueeze(2))
        else:  # adam
            exp_avg, exp_avg_sq = (moment.index_select(0, rows) for moment in moments)
            change = (g - exp_avg).mul_(1 - beta1)
            change_sq = g.square_().sub_(exp_avg_sq).mul_(1 - beta2)
            add(moments[0], rows, change)
            add(moments[1], rows, change_sq)
            g = exp_avg.add_(change).div_(exp_avg_sq.add_(change_sq).sqrt_().add_(eps))
        if values.dtype == g.dtype:
            add(values, rows, g, alpha=-lr)
            continue
        new = values[rows].to(g.dtype).sub_(g, alpha=lr)
        if stochastic_rounding is not None:
            columns = torch.arange(values.size(1), device=values.device)
            noise = _noise(rows.unsqueeze(1) * values.size(1) + columns, stochastic_rounding)
            bits = new.view(torch.int32) + (noise & 0xFFFF).to(torch.int32)
            new = (bits & -0x10000).view(torch.float32)
        values[rows] = new.to(values.dtype)


def _noise(place: torch.Tensor, seed: int) -> torch.Tensor:
    """32 bits for each place (int64) and seed, those of _noise_triton: the mixing of MurmurHash3."""
    x = (place + seed * 0x9E3779B1 & 0xFFFFFFFF) ^ ((place >> 32) * 0x85EBCA6B & 0xFFFFFFFF)
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        x = (x ^ (x >> shift)) * factor & 0xFFFFFFFF
    return x ^ (x >> 16)


# --- Triton -------------------------------------------------------------------------------------------------
#
# What decides the speed is how many bytes are on the way at once: an H100 needs 3.35 TB/s * 0.7 us = 2.3 MB:
# 18 KB for each of its 132 multiprocessors. A program loads a tile of ROWS rows * COLUMNS columns at a time,
# about 2,048 numbers (8 KB of float32), 16 bytes a load and four loads a thread. At 40 registers a thread, 12
# such programs fit a multiprocessor: five times the bytes needed. So there is nothing to tune, and V is the
# only constant compiled in that a user can change: no kernel is compiled anew for another batch or pool.
#
# Loads are 16 bytes wide where a row's bytes are a multiple of 16. A row's index is int64 before it is
# multiplied by V: a pool may have more than 2**31 numbers.

def _jit(function):
    return triton.jit(function, do_not_specialize=["seed"]) if triton is not None else function


def gather_settings(V: int, element_size: int) -> dict:
    columns = min(1024, 1 << (V - 1).bit_length())
    rows = min(64, 2048 // columns)
    num_warps = max(1, min(8, rows * columns * element_size // 2048))
    return dict(V=V, ROWS=rows, COLUMNS=columns, num_warps=num_warps)


@_jit
def gather_sum_kernel(
        y_ptr,  # (bags, V)
        values_ptr,  # (num_values, V)
        indices_ptr, weights_ptr,  # (places,)
        begin_ptr, end_ptr,  # (bags,): bag n has the places begin[n] ... end[n] - 1
        V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """y[n] = sum over bag n of weights[place] * values[indices[place]]. A program: a bag, COLUMNS wide."""
    bag = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    begin, end = tl.load(begin_ptr + bag), tl.load(end_ptr + bag)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        row = tl.load(indices_ptr + place, mask=place < end, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + place, mask=place < end, other=0.0).to(tl.float32)
        mask = (place < end)[:, None] & (column < V)[None, :]
        tile = tl.load(values_ptr + row[:, None] * V + column[None, :], mask=mask, other=0.0)
        total += weight[:, None] * tile.to(tl.float32)
    tl.store(y_ptr + bag * V + column, tl.sum(total, 0).to(y_ptr.dtype.element_ty), mask=column < V)


@_jit
def gather_dot_kernel(
        dw_ptr,  # (N, bag)
        values_ptr,  # (num_values, V)
        indices_ptr,  # (N, bag)
        dy_ptr,  # (N, V)
        bag, V: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """dw[n, j] = <values[indices[n, j]], dy[n]>. A program: a token, ROWS rows of its bag."""
    token = tl.program_id(0).to(tl.int64)
    j = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    row = tl.load(indices_ptr + token * bag + j, mask=j < bag, other=0).to(tl.int64)
    total = tl.zeros((ROWS,), tl.float32)
    for first in range(0, V, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        dy = tl.load(dy_ptr + token * V + column, mask=column < V, other=0.0).to(tl.float32)
        mask = (j < bag)[:, None] & (column < V)[None, :]
        tile = tl.load(values_ptr + row[:, None] * V + column[None, :], mask=mask, other=0.0)
        total += tl.sum(tile.to(tl.float32) * dy[None, :], 1)
    tl.store(dw_ptr + token * bag + j, total.to(dw_ptr.dtype.element_ty), mask=j < bag)


@_jit
def _noise_triton(place, seed):
    x = (place.to(tl.uint32) + seed.to(tl.uint32) * 0x9E3779B1) ^ ((place >> 32).to(tl.uint32) * 0x85EBCA6B)
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = (x ^ (x >> 13)) * 0xC2B2AE35
    return x ^ (x >> 16)


@_jit
def update_kernel(
        values_ptr,  # (num_values, V)
        v_ptr,  # rowwise: (num_values, BLOCKS); adam: exp_avg_sq, (num_values, V)
        exp_avg_ptr,  # adam: (num_values, V); rowwise: None
        rows_ptr, begin_ptr, end_ptr,  # (R,): row rows[i] was read at the places begin[i] ... end[i] - 1
        token_ptr, weights_ptr,  # (places,)
        dy_ptr,  # (tokens of all reads, V)
        lr, beta1, beta2, eps, seed,
        V: tl.constexpr, BLOCKS: tl.constexpr, BLOCKS_PADDED: tl.constexpr, WIDTH_PADDED: tl.constexpr,
        ROWS: tl.constexpr, STOCHASTIC: tl.constexpr):
    """The formulas of scatter_update. A program: one row of the pool, its gradient in registers."""
    WIDTH: tl.constexpr = V // BLOCKS
    i = tl.program_id(0)
    row = tl.load(rows_ptr + i).to(tl.int64)
    begin, end = tl.load(begin_ptr + i), tl.load(end_ptr + i)
    block = tl.arange(0, BLOCKS_PADDED)
    within = tl.arange(0, WIDTH_PADDED)
    column = block[:, None] * WIDTH + within[None, :]  # (blocks, width): the row's columns, block by block
    mask = (block < BLOCKS)[:, None] & (within < WIDTH)[None, :]
    place_in_pool = row * V + column
    # asked for early, needed late
    values = tl.load(values_ptr + place_in_pool, mask=mask, other=0.0).to(tl.float32)

    g = tl.zeros((BLOCKS_PADDED, WIDTH_PADDED), tl.float32)
    for first in range(begin, end, ROWS):
        place = first + tl.arange(0, ROWS)
        token = tl.load(token_ptr + place, mask=place < end, other=0).to(tl.int64)
        weight = tl.load(weights_ptr + place, mask=place < end, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + token[:, None, None] * V + column[None, :, :],
                     mask=(place < end)[:, None, None] & mask[None, :, :], other=0.0)
        g += tl.sum(weight[:, None, None] * dy.to(tl.float32), 0)

    if exp_avg_ptr is None:
        mean_sq = tl.sum(g * g, 1) / WIDTH
        v = tl.load(v_ptr + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
        v = tl.where(v == 0, mean_sq, beta2 * v + (1 - beta2) * mean_sq)
        tl.store(v_ptr + row * BLOCKS + block, v, mask=block < BLOCKS)
        values -= lr * g / (tl.sqrt(v) + eps)[:, None]
    else:
        exp_avg = tl.load(exp_avg_ptr + place_in_pool, mask=mask, other=0.0)
        exp_avg_sq = tl.load(v_ptr + place_in_pool, mask=mask, other=0.0)
        exp_avg = beta1 * exp_avg + (1 - beta1) * g
        exp_avg_sq = beta2 * exp_avg_sq + (1 - beta2) * g * g
        tl.store(exp_avg_ptr + place_in_pool, exp_avg, mask=mask)
        tl.store(v_ptr + place_in_pool, exp_avg_sq, mask=mask)
        values -= lr * exp_avg / (tl.sqrt(exp_avg_sq) + eps)
    if STOCHASTIC:
        bits = values.to(tl.uint32, bitcast=True) + (_noise_triton(place_in_pool, seed) & 0xFFFF)
        values = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    tl.store(values_ptr + place_in_pool, values.to(values_ptr.dtype.element_ty), mask=mask)


def _gather_sum_triton(values, indices, weights):
    N, bag = indices.size()
    start = torch.arange(N + 1, device=values.device) * bag
    y = weights.new_empty(N, values.size(1))
    _bags_triton(y, values, indices.contiguous(), weights.contiguous(), start[:-1], start[1:])
    return y


def _bags_triton(y, values, indices, weights, begin, end):
    if len(y):
        settings = gather_settings(values.size(1), values.element_size())
        grid = len(y), triton.cdiv(values.size(1), settings["COLUMNS"])
        gather_sum_kernel[grid](y, values, indices, weights, begin, end, **settings)


def _gather_dot_triton(values, indices, dy):
    N, bag = indices.size()
    dw = dy.new_empty(N, bag)
    if dw.numel():
        settings = gather_settings(values.size(1), values.element_size())
        grid = N, triton.cdiv(bag, settings["ROWS"])
        gather_dot_kernel[grid](dw, values, indices.contiguous(), dy.contiguous(), bag, **settings)
    return dw


def update_settings(V: int, blocks: int, element_size: int) -> dict:
    """As gather_settings; but few rows of a large pool are read often in a step: 4 places at a time do."""
    width = 1 << (V // blocks - 1).bit_length()
    padded = 1 << (blocks - 1).bit_length()
    places = max(1, min(4, 2048 // (padded * width)))
    return dict(V=V, BLOCKS=blocks, BLOCKS_PADDED=padded, WIDTH_PADDED=width, ROWS=places,
                num_warps=max(1, min(8, padded * width * element_size // 512)))


def _update_triton(values, moments, sorted_reads, lr, beta1, beta2, eps, stochastic_rounding):
    rows, start, token, weights, dy = sorted_reads
    begin, end = start[:-1].clone(), start[1:].clone()
    # a row that very many tokens read would keep one program busy while all others wait. So it is cut into
    # pieces, whose sums are made by as many programs, and the row then has those sums for its places
    piece = max(64, math.isqrt(len(token)))
    long = (end - begin > piece).nonzero()[:, 0]
    if len(long):
        pieces = (end[long] - begin[long] + piece - 1) // piece
        first = pieces.cumsum(0) - pieces
        of = torch.arange(len(long), device=dy.device).repeat_interleave(pieces)  # the long row of each piece
        number = torch.arange(len(of), device=dy.device)
        piece_begin = begin[long][of] + piece * (number - first[of])
        sums = torch.empty(len(of), dy.size(1), device=dy.device)
        _bags_triton(sums, dy, token, weights, piece_begin, torch.minimum(piece_begin + piece, end[long][of]))
        begin[long], end[long] = len(token) + first, len(token) + first + pieces
        token = torch.cat((token, len(dy) + number))
        weights = torch.cat((weights, weights.new_ones(len(of))))
        dy = torch.cat((dy.float(), sums))
    blocks = moments[0].size(1) if len(moments) == 1 else 1
    exp_avg, v = (None, *moments) if len(moments) == 1 else moments
    update_kernel[(len(rows),)](
        values, v, exp_avg, rows, begin, end, token, weights, dy, lr, beta1, beta2, eps,
        stochastic_rounding or 0, STOCHASTIC=stochastic_rounding is not None,
        **update_settings(values.size(1), blocks, dy.element_size()))
