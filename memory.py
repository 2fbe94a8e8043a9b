"""
Product-key memory: a layer that looks things up in a large table of learnt values.

Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv 1907.05242), and Berges et al. 2024,
"Memory Layers at Scale" (arXiv 2412.09764), whose Memory+ is the default here: query-key normalisation, a
gate, one pool of values for several layers.

    N  tokens (B*T)          S  num_keys, half-keys a side       V  value_dim, width of a value
    C  width of the GPT      D  key_dim, width of a query        bag  the H*K rows that one token reads
    H  heads                 K  knn, slots that a head reads     num_values = S*S, rows of the pool

The algorithm, for each token and head:
  1. make a query in two halves: one from the token's state, one from that of the token before or, as in the
     papers, both from the same;
  2. score the S half-keys of each side against its half of the query: 2*S dot products;
  3. slot (i, j) of the pool has the score left[i] + right[j]. So the best K of S*S slots are among the K*K
     sums of the best K of each side: an exact search over S*S keys at the cost of 2*S;
  4. softmax over the K scores gives weights; the weighted sum of K rows of the pool is what was remembered;
  5. sum over the heads, gate, project back to the width of the GPT.

A step reads N*bag rows of the pool and learns only those. So the gradient of the pool is never a tensor of
the pool's size: the backward pass keeps each *read* (indices, weights, dy), and PoolOptimizer turns reads
into steps, a few rows at a time (kernel.py).

Two kin of it are here to be compared with. PEER (He 2024, arXiv 2407.04153): a slot found is not a value but
an MLP with one hidden unit. And a control, 'hash': the slots are found by a fixed hash of the last two
tokens, so that all that is missing is the learnt addressing.
"""

import functools
import math
import os

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from distributed import ALONE, Sharding, all_reduce_sum
from kernel import gather_dot, gather_sum, row_gradients, scatter_update, sort_reads


@functools.cache
def pruned_pairs(knn: int) -> tuple[list[int], list[int]]:
    """
    The pairs (i, j) of ranks that can be among the best `knn` sums of two descending lists.

    Pair (i, j) has (i+1) * (j+1) - 1 others at least as good, so those with (i+1) * (j+1) > knn can be left
    out: of the 32 * 32 pairs for knn = 32, 119 remain.
    """
    pairs = [(i, j) for i in range(knn) for j in range(knn) if (i + 1) * (j + 1) <= knn]
    return [i for i, _ in pairs], [j for _, j in pairs]


def top_k(x: torch.Tensor, k: int):
    """
    x.topk(k), exactly, but faster on the CPU, and for long rows. x (..., S) -> values, indices (..., k),
    descending.
    """
    S = x.size(-1)
    if S > 128 and S % 4 == 0 and k <= S // 4:  # the best k are in the k groups of 4 with the greatest maxima
        groups = x.unflatten(-1, (4, S // 4))  # group c has the columns c, c + S/4, c + 2*S/4, c + 3*S/4
        best = top_k(groups.amax(-2), k)[1].unsqueeze(-2)  # (..., 1, k)
        values, place = top_k(groups.gather(-1, best.expand(*best.shape[:-2], 4, k)).flatten(-2), k)  # of 4*k
        return values, best.squeeze(-2).gather(-1, place % k) + place // k * (S // 4)
    if not x.is_cpu or x.dtype != torch.float32 or torch.compiler.is_compiling():
        return x.topk(k)
    # numpy selects and sorts several times as fast as torch, but only values. So each value takes its column
    # along: float64 has 29 bits more than float32, and a column in the lowest 28 changes no order
    rows = x.double()
    rows.view(torch.int64).bitwise_or_(torch.arange(S))
    if S > 64:  # of fewer, sorting all is faster
        rows.numpy().partition(S - k, -1)  # in place: the greatest k last
        rows = rows[..., -k:].contiguous()
    rows.numpy().sort(-1)
    best = rows[..., -k:].flip(-1)
    return best.float(), best.view(torch.int64) & (2**28 - 1)


def product_key_search(queries: torch.Tensor, half_keys: torch.Tensor, knn: int):
    """
    The `knn` slots of S*S with the highest scores, exactly (Lample et al. 2019, section 3.1).

    queries (N, H, 2, D/2), half_keys (H, 2, S, D/2), both of one floating dtype, knn <= S. Slot i*S + j of
    head h has the score <queries[n, h, 0], half_keys[h, 0, i]> + <queries[n, h, 1], half_keys[h, 1, j]>.
    Returns scores (N, H, K), descending, with their gradient, and indices (N, H, K), int64. Ties go either
    way.
    """
    S = half_keys.size(2)
    half_scores = torch.einsum("nhpd,hpsd->nhps", queries, half_keys)  # (N, H, 2, S), p: the side
    # which slots are best is a choice, with no gradient ...
    with torch.no_grad():
        best, best_half_keys = top_k(half_scores, knn)  # (N, H, 2, K): of each side by itself
        ranks = torch.tensor(pruned_pairs(knn), device=best.device)  # (2, pairs)
        ranks = ranks.expand(*best.shape[:2], -1, -1)  # (N, H, 2, pairs)
        left, right = best.gather(-1, ranks).unbind(2)  # (N, H, pairs)
        which = top_k(left + right, knn)[1].unsqueeze(2).expand(-1, -1, 2, -1)  # (N, H, 2, K): of the pairs
        chosen = best_half_keys.gather(-1, ranks.gather(-1, which))  # (N, H, 2, K): half-keys of K slots
    # ... the scores of the chosen are differentiable
    scores = half_scores.gather(-1, chosen).sum(2)
    return scores, chosen[:, :, 0] * S + chosen[:, :, 1]


class MemoryUsage(nn.Module):
    """How much of a pool is in use, since `reset`: the measures of Lample et al. 2019, section 4.2."""

    def __init__(self, num_values: int):
        super().__init__()
        self.register_buffer("total_weight", torch.zeros(num_values), persistent=False)

    def add(self, indices, weights):
        weights = weights.detach().abs().flatten()  # of PEER some are negative
        self.total_weight.index_add_(0, indices.flatten(), weights.to(self.total_weight))

    def reset(self):
        self.total_weight.zero_()

    def summary(self) -> tuple[float, float]:
        """
        (share of the slots that were read, KL divergence in nats of the slots' use from uniform use), of the
        reads of all processes.

        The divergence is 0 where all slots are used alike, and ln(num_values) where one slot does all the
        work.
        """
        total_weight = all_reduce_sum(self.total_weight.clone())
        used = total_weight[total_weight > 0].double()
        if len(used) == 0:
            return 0.0, 0.0
        p = used / used.sum()
        num_values = len(total_weight)
        return len(used) / num_values, math.log(num_values) + (p * p.log()).sum().item()


# The two reads of a pool. Backward gives the weights, or x, their gradient, and leaves the pool's as a read:
# (indices, weights, dy). As a loss is a mean over the tokens of all processes, and each differentiates the
# mean over its own, a read is divided by their number.
#
# Each of G processes has N tokens and V/G of the pool's columns: each gets the bags of all tokens, does its
# columns' share, and hands back what belongs to others' tokens. With G = 1 nothing moves.

class _Sum(torch.autograd.Function):
    """y[n] = sum_j weights[n, j] * values[indices[n, j]]; the weights' gradient is dots of dy, as in _Dot."""

    @staticmethod
    def forward(ctx, values, indices, weights, pool):
        columns = pool.sharding.columns
        indices, weights = columns.all_gather(indices.int(), weights)  # (G*N, bag)
        # values too, so that a step between forward and backward is an error and not a wrong gradient
        ctx.save_for_backward(values, indices, weights)
        ctx.pool = pool
        return columns.columns_to_tokens(gather_sum(values, indices, weights, pool.kernel))  # (N, V)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        values, indices, weights = ctx.saved_tensors
        pool, columns = ctx.pool, ctx.pool.sharding.columns
        dy = columns.tokens_to_columns(dy).contiguous()  # (G*N, V/G)
        pool.reads.append((indices, weights.detach(), dy / pool.sharding.world_size))
        return None, None, columns.reduce_scatter(gather_dot(values, indices, dy, pool.kernel)), None


class _Dot(torch.autograd.Function):
    """dots[n, j] = <values[indices[n, j]], x[n]>, the adjoint of _Sum; the gradient of x is a sum of rows."""

    @staticmethod
    def forward(ctx, values, indices, x, pool):
        columns = pool.sharding.columns
        (indices,), x = columns.all_gather(indices.int()), columns.tokens_to_columns(x)
        ctx.save_for_backward(values, indices, x)
        ctx.pool = pool
        return columns.reduce_scatter(gather_dot(values, indices, x, pool.kernel))  # (N, bag)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_dots):
        values, indices, x = ctx.saved_tensors
        pool, columns = ctx.pool, ctx.pool.sharding.columns
        (d_dots,) = columns.all_gather(d_dots.contiguous())  # (G*N, bag)
        pool.reads.append((indices, d_dots / pool.sharding.world_size, x.detach()))
        return None, None, columns.columns_to_tokens(gather_sum(values, indices, d_dots, pool.kernel)), None


class ValuePool(nn.Module):
    """
    The rows that memory layers read: `values` (num_values, value_dim). Layers get the pool as an argument to
    forward, so several can share one (Berges et al. 2024, section 2.2).

    `values` does not require a gradient: none is ever made. What backward leaves in `reads` is what
    PoolOptimizer learns from. kernel: 'auto', 'triton' or 'torch' (kernel.py).

    sharding: several processes, each of which holds some columns: values is (num_values, value_dim / G) then,
    of the same pool however many they are. file: a path, where the values then are instead of in memory; a
    pool that is there is overwritten, and anything else an error. draw=False: values are yet to be loaded.
    rows_a_slot: 2 for 'peer', whose first half of the rows is read by `forward`, and counted as use.
    """

    def __init__(self, num_values: int, value_dim: int, dtype=torch.float32, kernel: str = "auto",
                 sharding: Sharding = ALONE, file: str | None = None, draw: bool = True,
                 rows_a_slot: int = 1):
        super().__init__()
        columns = sharding.columns
        if value_dim % columns.size:
            raise ValueError(f"value_dim={value_dim} must be a multiple of the {columns.size} processes that "
                             "share its columns")
        shape = num_values, value_dim // columns.size
        if file is None:
            values = torch.empty(shape, dtype=dtype)
        else:
            if os.path.exists(file) and os.path.getsize(file) != math.prod(shape) * dtype.itemsize:
                raise ValueError(f"mem_file={file} is there, and not of the size of the pool: choose another")
            with open(file, "ab") as f:  # so that a disk too small is noticed now, not at a page's first use
                if hasattr(os, "posix_fallocate"):  # macOS has none
                    os.posix_fallocate(f.fileno(), 0, math.prod(shape) * dtype.itemsize)
            values = torch.from_file(file, shared=True, size=math.prod(shape), dtype=dtype).view(shape)
        for rows in values.split(2**12) if draw else ():
            drawn = torch.empty(len(rows), value_dim).normal_(std=value_dim**-0.5)
            rows.copy_(drawn.chunk(columns.size, dim=1)[columns.rank])
        self.values = nn.Parameter(values, requires_grad=False)
        self.kernel, self.sharding, self.file = kernel, sharding, file
        self.usage = MemoryUsage(num_values // rows_a_slot)
        self.reads = []  # (indices, weights, dy) of every read since zero_grad

    @torch.compiler.disable  # backward has a side effect, which a compiled graph would lose
    def forward(self, indices, weights):
        """indices (N, bag), weights (N, bag) -> sums of rows (N, value_dim), of the dtype of weights."""
        if self.training:
            self.usage.add(indices, weights)
        return _Sum.apply(self.values, indices, self._with_gradient(weights), self)

    @torch.compiler.disable
    def dot(self, indices, x):
        """indices (N, bag), x (N, value_dim) -> products of rows with x (N, bag), of the dtype of x."""
        return _Dot.apply(self.values, indices, self._with_gradient(x), self)

    def _with_gradient(self, x):
        """x; in training a leaf where nothing before it learns: so backward comes by, and the pool learns."""
        return x.detach().requires_grad_() if self.training and not x.requires_grad else x

    def all_reads(self) -> list:
        """`reads`, with those of the processes that hold the same columns: all get the same, in one order."""
        return [self.sharding.replicas.all_gather(*read) for read in self.reads]

    def dense_gradient(self) -> torch.Tensor:
        """The gradient that the reads stand for, like `values`. For tests and the curious."""
        gradient = torch.zeros_like(self.values)
        if reads := self.all_reads():
            for rows, g in row_gradients(*sort_reads(reads)):
                gradient[rows] = g.to(gradient.dtype)
        return gradient


class MemoryLayer(nn.Module):
    """
    A product-key memory that stands where a Transformer's MLP does. With swilu, qk_norm and bias all off, and
    without `before`, it computes the formula of Lample et al. 2019, section 3, with an output projection.

    swilu    out = W_o (y * silu(W_g x)), the gate of Memory+ (Berges et al. 2024, section 2.2)
    qk_norm  halves of queries and keys have length 1, times a learnt scale; without it slot use may collapse
    bias     in the projections

    kind='peer'  y = sum_j w_j * gelu(<u_j, x>) * v_j, where row j of the pool is v_j and row j + S*S is u_j;
                 with neither gate nor output projection, as in the paper
    kind='hash'  the slots of each head are hashes of the last two tokens, no two heads or layers having the
                 same; their weights are a softmax still, over scores that are linear in x
    """

    def __init__(self, width: int, num_keys: int, heads: int, knn: int, key_dim: int, value_dim: int,
                 swilu: bool = True, qk_norm: bool = True, bias: bool = True, kind: str = "product-key"):
        super().__init__()
        if key_dim % 2:
            raise ValueError(f"key_dim={key_dim} must be even: a query has two halves")
        if not 1 <= knn <= num_keys:
            raise ValueError(f"knn={knn} must be between 1 and num_keys={num_keys}")
        if kind not in ("product-key", "peer", "hash"):
            raise ValueError(f"kind={kind!r} must be 'product-key', 'peer' or 'hash'")
        self.kind, self.num_keys, self.heads, self.knn = kind, num_keys, heads, knn
        if kind == "hash":
            self.score = nn.Linear(width, heads * knn, bias=bias)
            self.register_buffer("multipliers", 2 * torch.randint(2**62, (heads * knn,)) + 1)
        else:
            self.query = nn.Linear(width, heads * key_dim, bias=bias)
            self.half_keys = nn.Parameter(torch.empty(heads, 2, num_keys, key_dim // 2))
            nn.init.uniform_(self.half_keys, -(key_dim**-0.5), key_dim**-0.5)
            # cosines of random vectors have the variance 2/D: this makes it 1
            self.scale = nn.Parameter(torch.full((heads,), (key_dim / 2) ** 0.5)) if qk_norm else None
        self.gate = nn.Linear(width, value_dim, bias=bias) if swilu and kind != "peer" else None
        self.out = nn.Linear(value_dim, width, bias=bias) if kind != "peer" else None

    def search(self, x, before):
        """x (N, C), before (N, C): what the two halves of queries are of -> scores, indices (N, H, K)."""
        H = self.heads
        half_keys = self.half_keys  # (H, 2, S, D/2)
        sources = torch.stack((x, before))  # (2, N, C)
        queries = torch.einsum("pnc,hpdc->nhpd", sources, self.query.weight.view(H, 2, half_keys.size(3), -1))
        if self.query.bias is not None:
            queries = queries + self.query.bias.view(H, 2, -1)  # (N, H, 2, D/2)
        if self.scale is not None:
            queries = F.normalize(queries, dim=-1) * self.scale.view(H, 1, 1)
            half_keys = F.normalize(half_keys, dim=-1)
        with torch.autocast(x.device.type, enabled=False):  # of bfloat16 scores many would be equal
            return product_key_search(queries.to(half_keys.dtype), half_keys, self.knn)

    def hash(self, x, bigrams):
        """x (N, C), bigrams (N,), int64: a number for each pair of tokens -> as search."""
        # multiply-shift hashing: of the product, which overflows, the high bits depend on all of the number
        high = (bigrams.unsqueeze(1) + 1) * self.multipliers >> 33 & 2**31 - 1  # (N, H*K)
        indices = high * self.num_keys**2 >> 31
        return self.score(x).view(-1, self.heads, self.knn), indices.view(-1, self.heads, self.knn)

    def forward(self, x: torch.Tensor, pool: ValuePool, before: torch.Tensor | None = None,
                bigrams: torch.Tensor | None = None) -> torch.Tensor:
        """
        x (..., C) -> (..., C). The pool has num_keys**2 rows of value_dim, for 'peer' twice as many.

        before: like x, of the token before each. Then the second half of a query is made from it, as RWKV
        mixes two tokens (Peng et al. 2023, arXiv 2305.13048): a slot is of both, such as a name, from the
        start of training. In the papers both halves are of one token. bigrams (...): see `hash`.
        """
        rows = self.num_keys**2 * (2 if self.kind == "peer" else 1)
        if len(pool.values) != rows:  # else a read could be of anything
            raise ValueError(f"the pool has {len(pool.values):,} rows, and this layer needs {rows:,}")
        shape, x = x.shape, x.flatten(0, -2)  # (N, C)
        if self.kind == "hash":
            scores, indices = self.hash(x, bigrams.flatten())
        else:
            scores, indices = self.search(x, x if before is None else before.flatten(0, -2))
        weights, indices = scores.softmax(-1).flatten(1), indices.flatten(1)  # (N, H*K)
        if self.kind == "peer":
            weights = weights * F.gelu(pool.dot(indices + self.num_keys**2, x))
        y = pool(indices, weights)  # (N, V)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return (y if self.out is None else self.out(y)).view(shape)


class PoolOptimizer(torch.optim.Optimizer):
    """
    Learns the values of a pool from its reads. Only rows that were read move, there is no weight decay, and a
    step costs what was read, never what the pool holds.

    kind='rowwise'  a second moment for each of `value_blocks` equal blocks of a row's columns
    kind='adam'     torch.optim.SparseAdam: two numbers a parameter
    Both are given by formula in kernel.scatter_update. Both are invariant to the scale of the gradient, so
    clipping has no meaning here. Like any optimiser: `step` uses the gradient, `zero_grad` forgets it.

    The state is of float32 also where the values are of fewer bits. stochastic_rounding, for bfloat16 values:
    a number between two neighbours becomes either by chance, drawn from (seed, step, row, column); without it
    small steps vanish.

    A process that holds 1/G of the columns has 1/G of the state, so G must divide value_blocks.
    """

    def __init__(self, pool: ValuePool, lr: float, kind: str = "rowwise", value_blocks: int = 8,
                 betas=(0.9, 0.99), eps: float = 1e-12, stochastic_rounding: bool = False, seed: int = 0):
        super().__init__([pool.values], dict(lr=lr, betas=betas, eps=eps))
        columns = pool.sharding.columns
        num_values, V = pool.values.size()
        # having seen a block of this size freed, glibc keeps smaller ones: the update, which goes by chunks,
        # then does not fault the pages of each in anew
        torch.empty(31 * 2**18)
        dtype = torch.promote_types(pool.values.dtype, torch.float32)
        if stochastic_rounding and pool.values.dtype != torch.bfloat16:
            raise ValueError(f"stochastic_rounding is for bfloat16 values, not {pool.values.dtype}")
        if kind == "adam":
            state = {name: torch.zeros_like(pool.values, dtype=dtype) for name in ("exp_avg", "exp_avg_sq")}
        elif kind == "rowwise":
            if V * columns.size % value_blocks:
                raise ValueError(f"value_dim={V * columns.size} must be a multiple of {value_blocks=}")
            if value_blocks % columns.size:
                raise ValueError(f"{value_blocks=} must be a multiple of the {columns.size} processes that "
                                 "share the pool's columns")
            state = {"v": pool.values.new_zeros(num_values, value_blocks // columns.size, dtype=dtype)}
        else:
            raise ValueError(f"kind={kind!r} must be 'rowwise' or 'adam'")
        self.pool, self.stochastic_rounding = pool, stochastic_rounding
        self.seed = seed * 1_000_003 + columns.rank * 0x5BD1E995
        self.state[pool.values] = state | {"step": 0}

    @torch.no_grad()
    def step(self):
        group, state = self.param_groups[0], self.state[self.pool.values]
        state["step"] += 1
        key = (self.seed + state["step"]) % 2**31 if self.stochastic_rounding else None
        scatter_update(self.pool.values, state, self.pool.all_reads(), group["lr"], group["betas"],
                       group["eps"], key, self.pool.kernel)

    def zero_grad(self, set_to_none: bool = True):
        self.pool.reads.clear()

    def load_state_dict(self, state_dict):
        super().load_state_dict(state_dict)
        # torch gives all state the dtype of its parameter, and ours may have more bits than the values
        for name, value in state_dict["state"][0].items():
            if torch.is_tensor(value):
                self.state[self.pool.values][name] = value.to(self.pool.values.device)
