"""
Product-key memory: a layer that looks things up in a large table of learnt values.

The layer is from Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv 1907.05242). Its default
form here is Memory+, from Berges et al. 2024, "Memory Layers at Scale" (arXiv 2412.09764).

    N  tokens (batch * time)    S    num_keys, half-keys per side    slot  one row of the pool
    C  width of the model       D    key_dim, width of a query       pool  the table of all values
    H  heads                    V    value_dim, width of a value     side  left or right half of a query
    K  knn, slots per head      S*S  num_values, rows of the pool

The algorithm, for each token and head:
  1. make a query in two halves, one per side, with D/2 numbers each;
  2. score the S half-keys of each side: a[i] = <left half, left half-key i>, b[j] = <right half, right
     half-key j>;
  3. slot (i, j) has the score a[i] + b[j]. Find the K slots with the highest scores. They are among the K*K
     sums of the K best left and the K best right half-keys: if i is not one of the K best, then K other left
     half-keys make better slots with the same j. So 2*S dot products are enough for S*S slots;
  4. a softmax over the K best scores gives weights; the weighted sum of these K rows is the answer;
  5. sum the answers of all heads, multiply the sum by a gate (Memory+), and project it back to width C.

The values are learnt like other parameters, but their gradient is never a tensor of their size: see pool.py.
"""

import torch
import torch.nn as nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from kernel import best_slots_triton, can_search_in_triton, half_score_gradients_triton, top_k
from pool import ValuePool


def product_key_search(queries: torch.Tensor, half_keys: torch.Tensor, knn: int):
    """
    The `knn` slots with the highest scores of all S*S slots, exactly (Lample et al. 2019, section 3.1).

    queries (N, H, 2, D/2), half_keys (H, 2, S, D/2), both with the same floating dtype, and knn <= S. Slot
    i*S + j of head h has the score <queries[n, h, 0], half_keys[h, 0, i]> + <queries[n, h, 1], half_keys[h,
    1, j]>. Returns scores (N, H, K), descending and differentiable, and slots (N, H, K), int64. Slots with
    equal scores are in any order, and any of them may be left out.
    """
    half_scores = torch.einsum("nhpd,hpsd->nhps", queries, half_keys)  # (N, H, 2, S): a and b
    best, half_key = half_scores.topk(knn)  # (N, H, 2, K): the best of each side
    sums = best[:, :, 0, :, None] + best[:, :, 1, None, :]  # (N, H, K, K): a[i] + b[j]
    scores, pair = sums.flatten(2).topk(knn)  # (N, H, K): the best pairs; pair = K * (row of sums) + column
    i = half_key[:, :, 0].gather(2, pair // knn)  # (N, H, K)
    j = half_key[:, :, 1].gather(2, pair % knn)  # (N, H, K)
    return scores, i * half_keys.size(2) + j


# --- the same search, in a third of the time ----------------------------------------------------------------

@torch.compiler.disable  # a compiled graph cannot hold numpy's sort
def fast_search(queries: torch.Tensor, half_keys: torch.Tensor, knn: int, kernel: str = "auto"):
    """
    product_key_search, but faster: it leaves out pairs that cannot win (pruned_pairs), has a faster top_k
    (kernel.py), and keeps no half-scores for the backward pass (SlotScores). On a GPU, one kernel does all
    but the dot products. kernel: see kernel.py.
    """
    queries = queries.permute(1, 2, 0, 3).contiguous()  # (H, 2, N, D/2)
    scores, chosen = SlotScores.apply(queries, half_keys, knn, kernel)
    slots = chosen[:, 0] * half_keys.size(2) + chosen[:, 1]
    return scores.transpose(0, 1), slots.transpose(0, 1)  # (H, N, K) -> (N, H, K)


def pruned_pairs(knn: int, device=None) -> torch.Tensor:
    """
    Take the sums a[i] + b[j] of two descending lists. Returns the pairs (i, j) that can be among the `knn`
    greatest sums: a tensor (2, pairs) of all i and all j.

    Up to i and up to j there are (i+1) * (j+1) - 1 other pairs, and their sums are at least as great. So only
    pairs with (i+1) * (j+1) <= knn are needed: 119 of 32 * 32 pairs for knn = 32.
    Example: pruned_pairs(3) -> [[0, 0, 0, 1, 2], [0, 1, 2, 0, 0]]. (1, 1) is left out: the sums of (0, 0),
    (0, 1) and (1, 0) are at least as great.
    """
    rank = torch.arange(1, knn + 1, device=device)
    size = sum(knn // i for i in range(1, knn + 1))  # with a known size, the CPU does not wait for a GPU
    return (rank[:, None] * rank <= knn).nonzero_static(size=size).T


def best_slots(half_scores: torch.Tensor, knn: int, kernel: str = "auto"):
    """half_scores (H, 2, N, S) -> scores of the best slots (H, N, K), and their half-keys (H, 2, N, K)."""
    if can_search_in_triton(half_scores, half_scores.size(-1), knn, kernel):
        return best_slots_triton(half_scores, knn)
    pairs = pruned_pairs(knn, half_scores.device)  # (2, P)
    best, half_key = top_k(half_scores, knn)  # (H, 2, N, K): the best half-keys of each side
    ranks = pairs.unsqueeze(1).expand(*best.shape[:3], -1)  # (H, 2, N, P): the ranks i and j of each pair
    a, b = best.gather(-1, ranks).unbind(1)  # (H, N, P)
    scores, pair = top_k(a + b, knn)  # (H, N, K): the best pairs, as numbers from 0 to P - 1
    rank = ranks.gather(-1, pair.unsqueeze(1).expand_as(best))  # (H, 2, N, K): their ranks on each side
    return scores, half_key.gather(-1, rank)


def half_score_gradients(d_scores: torch.Tensor, chosen: torch.Tensor, num_keys: int, kernel: str = "auto"):
    """
    The gradient of the half-scores (H, 2, N, S), given that of the scores (H, N, K) of the chosen half-keys
    (H, 2, N, K). A score is a sum of two half-scores, and a half-key may be in several slots of a token.
    """
    if can_search_in_triton(d_scores, num_keys, chosen.size(-1), kernel):
        return half_score_gradients_triton(d_scores, chosen, num_keys)
    d_scores = d_scores.unsqueeze(1).expand_as(chosen)
    return d_scores.new_zeros(*chosen.shape[:3], num_keys).scatter_add_(-1, chosen, d_scores)


class SlotScores(torch.autograd.Function):
    """
    The scores of the best slots, and their half-keys, with a gradient: for the half-keys i and j of a slot,
    score = <queries[h, 0, n], half_keys[h, 0, i]> + <queries[h, 1, n], half_keys[h, 1, j]>.

    On a CPU, this searches for a few tokens at a time, so that 1 MiB of half-scores stays in the cache. And
    half-scores are not kept for the backward pass. With one thread, a training step takes 10% less time.
    """

    @staticmethod
    def forward(ctx, queries, half_keys, knn, kernel):
        ctx.kernel = kernel
        ctx.size = max(1, 2**18 // half_keys[..., 0].numel() if half_keys.is_cpu else queries.size(2))
        parts = [best_slots(some @ half_keys.mT, knn, kernel) for some in queries.split(ctx.size, 2)]
        scores, chosen = (torch.cat(results, -2) for results in zip(*parts, strict=True))
        ctx.save_for_backward(queries, half_keys, chosen)
        ctx.mark_non_differentiable(chosen)
        return scores, chosen  # (H, N, K), (H, 2, N, K)

    @staticmethod
    @once_differentiable
    def backward(ctx, d_scores, _):
        queries, half_keys, chosen = ctx.saved_tensors
        d_queries, d_half_keys = torch.empty_like(queries), torch.zeros_like(half_keys)
        for q, dq, i, d in zip(*(x.split(ctx.size, -2) for x in (queries, d_queries, chosen, d_scores)),
                               strict=True):
            d_half_scores = half_score_gradients(d, i, half_keys.size(2), ctx.kernel)
            dq.copy_(d_half_scores @ half_keys)
            d_half_keys += d_half_scores.mT @ q
        return d_queries, d_half_keys, None, None


# --- the layer ----------------------------------------------------------------------------------------------

def normalize(x: torch.Tensor) -> torch.Tensor:
    """x / |x| over the last dimension, in float32 or float64. If |x| < 1e-6: 0, and no gradient."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / norm.masked_fill(norm < 1e-6, torch.inf)


class MemoryLayer(nn.Module):
    """
    A product-key memory, which replaces the MLP of a Transformer block. The default is Memory+ (Berges et al.
    2024). Without swilu and qk_norm, the layer is that of Lample et al. 2019, section 3, plus an output
    projection.

    swilu    the gate of Memory+ (Berges et al. 2024, section 2.2): out = W_o (y * silu(W_g x))
    qk_norm  half-keys and the halves of queries get length 1, and each head learns a scale for its queries.
             Without qk_norm, the model may use only a few slots
    bias     all projections have a bias

    Raises a ValueError for impossible sizes. num_values is the number of rows that the pool must have.
    """

    def __init__(self, width: int, num_keys: int, heads: int, knn: int, key_dim: int, value_dim: int,
                 swilu: bool = True, qk_norm: bool = True, bias: bool = True):
        super().__init__()
        if heads < 1:
            raise ValueError(f"heads={heads} must be at least 1")
        if key_dim < 2 or key_dim % 2:
            raise ValueError(f"key_dim={key_dim} must be even and at least 2: a query has two halves")
        if not 1 <= knn <= num_keys:
            raise ValueError(f"knn={knn} must be between 1 and num_keys={num_keys}")
        self.num_keys, self.heads, self.knn, self.value_dim = num_keys, heads, knn, value_dim
        self.num_slots = self.num_values = num_keys**2  # each slot is one row of the pool
        self.rows_per_token = heads * knn
        self.query_left = nn.Linear(width, heads * key_dim // 2, bias=bias)
        self.query_right = nn.Linear(width, heads * key_dim // 2, bias=bias)
        self.half_keys = nn.Parameter(torch.empty(heads, 2, num_keys, key_dim // 2))
        self.scale = nn.Parameter(torch.empty(heads)) if qk_norm else None
        self.gate = nn.Linear(width, value_dim, bias=bias) if swilu else None
        self.out = nn.Linear(value_dim, width, bias=bias)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Initialises half_keys and scale. (The nn.Linear modules initialise themselves.)"""
        D = 2 * self.half_keys.size(3)
        nn.init.uniform_(self.half_keys, -(D**-0.5), D**-0.5)
        if self.scale is not None:  # half-scores start with variance 1: a cosine has 2/D
            nn.init.constant_(self.scale, (D / 2) ** 0.5)

    def search(self, x: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None,
               kernel: str = "auto"):
        """
        Chooses the slots for x. Arguments as for forward -> weights (N, H*K), indices (N, H*K). The page in
        explorer/model.js computes the same. kernel: see kernel.py.
        """
        if any(source is not None and source.shape != x.shape for source in (left, right)):
            raise ValueError(f"left and right must have the shape of x, {tuple(x.shape)}")
        left, right = ((x if source is None else source).reshape(-1, x.size(-1))
                       for source in (left, right))  # (N, C) each
        halves = self.query_left(left), self.query_right(right)  # (N, H*D/2) each
        queries = torch.stack([half.unflatten(1, (self.heads, -1)) for half in halves], 2)  # (N, H, 2, D/2)
        half_keys = self.half_keys  # (H, 2, S, D/2)
        if self.scale is not None:
            queries = normalize(queries) * self.scale.view(-1, 1, 1)
            half_keys = normalize(half_keys)
        # scores are always float32 or float64: many different scores would be equal with 16 bits
        dtype = torch.promote_types(half_keys.dtype, torch.float32)
        device = "cpu" if x.is_meta else x.device.type  # autocast does not know the device meta
        with torch.autocast(device, enabled=False):
            scores, indices = fast_search(queries.to(dtype), half_keys.to(dtype), self.knn, kernel)
        return scores.softmax(-1).flatten(1), indices.flatten(1)

    def forward(self, x: torch.Tensor, pool: ValuePool, left: torch.Tensor | None = None,
                right: torch.Tensor | None = None) -> torch.Tensor:
        """
        x (..., C) -> (..., C). The pool must have num_values = num_keys**2 rows of width value_dim.

        The left half of each query is computed from `left`, and the right half from `right`. Both have the
        shape of x. By default both are x, as published.
        """
        check_pool(pool, self.num_values, self.value_dim)
        weights, indices = self.search(x, left, right, pool.kernel)
        y = pool(indices, weights).to(x.dtype).view(*x.shape[:-1], self.value_dim)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.out(y)


def check_pool(pool: ValuePool, num_values: int, value_dim: int) -> None:
    """Raises a ValueError if the pool has another size: an index could then point outside the pool."""
    if (pool.num_values, pool.value_dim) != (num_values, value_dim):
        raise ValueError(f"the pool has {pool.num_values:,} rows of width {pool.value_dim}, and this layer "
                         f"needs {num_values:,} of width {value_dim}")
