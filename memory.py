"""
Product-key memory: a layer that looks things up in a large table of learnt values.

The layer is from Lample et al. 2019, "Large Memory Layers with Product Keys" (arXiv 1907.05242). Its default
form here is Memory+, from Berges et al. 2024, "Memory Layers at Scale" (arXiv 2412.09764).

    N  tokens (batch * time)    S    num_keys, half-keys per side    slot  one row of the pool
    C  width of the model       D    key_dim, width of a query       bag   the H*K slots of a token
    H  heads                    V    value_dim, width of a value     side  left or right half of a query
    K  knn, slots per head      S*S  num_values, rows of the pool

The algorithm, for each token and head:
  1. make a query in two halves, q_left and q_right, with D/2 numbers each;
  2. score the S half-keys of each side: left[i] = <q_left, key_left[i]>, right[j] = <q_right, key_right[j]>;
  3. slot (i, j) has the score left[i] + right[j]. Find the K slots with the highest scores. They are among
     the K*K sums of the K best left and the K best right half-keys: if i is not one of the K best, then K
     other left half-keys make better slots with the same j. So 2*S dot products are enough for S*S slots;
  4. a softmax over the K best scores gives weights; the weighted sum of these K rows is the answer;
  5. sum the answers of all heads, multiply the sum by a gate (Memory+), and project it back to width C.

The values are learnt like other parameters, but their gradient is never a tensor of their size: see pool.py.
"""

import torch
import torch.nn as nn
from torch.nn import functional as F

from kernel import SlotScores, top_k
from pool import ValuePool


def pruned_pairs(knn: int) -> list[list[int]]:
    """
    Take the sums a[i] + b[j] of two descending lists. Returns the pairs (i, j) that can be among the `knn`
    greatest sums, as [list of all i, list of all j].

    Indices up to i and up to j form (i+1) * (j+1) - 1 other pairs. Their sums are at least as great as that
    of pair (i, j). So only pairs with (i+1) * (j+1) <= knn are needed: 119 of 32 * 32 pairs for knn = 32.
    """
    pairs = [(i, j) for i in range(knn) for j in range(knn // (i + 1))]
    return [[i for i, _ in pairs], [j for _, j in pairs]]


_pairs_on_device = {}


@torch.compiler.assume_constant_result
def pruned_pairs_on(device: torch.device, knn: int) -> torch.Tensor:
    """pruned_pairs as a tensor (2, pairs). Copied to a GPU only once, because the CPU waits for each copy."""
    if (device, knn) not in _pairs_on_device:
        _pairs_on_device[device, knn] = torch.tensor(pruned_pairs(knn), device=device)
    return _pairs_on_device[device, knn]


def best_slots(queries: torch.Tensor, half_keys: torch.Tensor, knn: int):
    """queries (H, 2, N, D/2) -> scores of the best slots (H, N, K), and their half-keys (H, 2, N, K)."""
    half_scores = queries @ half_keys.mT  # (H, 2, N, S)
    best, best_half_keys = top_k(half_scores, knn)  # (H, 2, N, K): the best half-keys of each side
    ranks = pruned_pairs_on(best.device, knn).unsqueeze(1).expand(*best.shape[:3], -1)  # (H, 2, N, pairs)
    left, right = best.gather(-1, ranks).unbind(1)  # (H, N, pairs)
    scores, best_pairs = top_k(left + right, knn)  # (H, N, K)
    return scores, best_half_keys.gather(-1, ranks.gather(-1, best_pairs.unsqueeze(1).expand_as(best)))


def product_key_search(queries: torch.Tensor, half_keys: torch.Tensor, knn: int):
    """
    The `knn` slots with the highest scores of all S*S slots, exactly (Lample et al. 2019, section 3.1).

    queries (N, H, 2, D/2), half_keys (H, 2, S, D/2), both with the same floating dtype, and knn <= S. Slot
    i*S + j of head h has the score <queries[n, h, 0], half_keys[h, 0, i]> + <queries[n, h, 1], half_keys[h,
    1, j]>. Returns scores (N, H, K), descending and differentiable, and indices (N, H, K), int64. Slots with
    equal scores are in any order, and any of them may be left out.
    """
    queries = queries.permute(1, 2, 0, 3).contiguous()  # (H, 2, N, D/2)
    scores, chosen = SlotScores.apply(best_slots, queries, half_keys, knn)  # best_slots, with a gradient
    indices = chosen[:, 0] * half_keys.size(2) + chosen[:, 1]
    return scores.transpose(0, 1), indices.transpose(0, 1)  # (H, N, K) -> (N, H, K)


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

    Raises a ValueError for impossible sizes.
    """

    def __init__(self, width: int, num_keys: int, heads: int, knn: int, key_dim: int, value_dim: int,
                 swilu: bool = True, qk_norm: bool = True, bias: bool = True):
        super().__init__()
        for name, size in dict(width=width, num_keys=num_keys, heads=heads, key_dim=key_dim,
                               value_dim=value_dim).items():
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        if key_dim % 2:
            raise ValueError(f"key_dim={key_dim} must be even: a query has two halves")
        if not 1 <= knn <= num_keys:
            raise ValueError(f"knn={knn} must be between 1 and num_keys={num_keys}")
        self.num_keys, self.heads, self.knn, self.value_dim = num_keys, heads, knn, value_dim
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

    def search(self, x: torch.Tensor, left: torch.Tensor | None, right: torch.Tensor | None):
        """Chooses the slots for x. Arguments as for forward -> weights (N, H*K), indices (N, H*K)."""
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
        with torch.autocast(x.device.type, enabled=False):
            scores, indices = product_key_search(queries.to(dtype), half_keys.to(dtype), self.knn)
        return scores.softmax(-1).flatten(1), indices.flatten(1)

    def forward(self, x: torch.Tensor, pool: ValuePool, left: torch.Tensor | None = None,
                right: torch.Tensor | None = None) -> torch.Tensor:
        """
        x (..., C) -> (..., C). The pool must have num_keys**2 rows of width value_dim.

        The left half of each query is computed from `left`, and the right half from `right`. Both have the
        shape of x. By default both are x, as published.
        """
        check_pool(pool, self.num_keys**2, self.value_dim)
        if any(source is not None and source.shape != x.shape for source in (left, right)):
            raise ValueError(f"left and right must have the shape of x, {tuple(x.shape)}")
        weights, indices = self.search(x, left, right)
        y = pool(indices, weights).to(x.dtype).view(*x.shape[:-1], self.value_dim)
        if self.gate is not None:
            y = y * F.silu(self.gate(x))
        return self.out(y)


def check_pool(pool: ValuePool, num_values: int, value_dim: int) -> None:
    """Raises a ValueError if the pool has another size: an index could then point outside the pool."""
    if (pool.num_values, pool.value_dim) != (num_values, value_dim):
        raise ValueError(f"the pool has {pool.num_values:,} rows of width {pool.value_dim}, and this layer "
                         f"needs {num_values:,} of width {value_dim}")
