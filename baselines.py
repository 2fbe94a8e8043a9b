"""
Baselines for memory layers: other ways to have more parameters at the same cost per token.

    MoE           a mixture of experts in place of the MLP
    PEER          slots that are tiny MLPs instead of values (He 2024, arXiv 2407.04153)
    HashedMemory  the same pool, but a fixed hash of two tokens chooses the slots. The comparison shows how
                  much the learnt search helps

To add a kind of memory, write a module with forward(x, pool, left, right) -> (..., C) and the attributes
num_values (rows of the pool), num_slots (slots whose use is counted) and rows_per_token. On many processes,
all must read the pool equally often. Then name it in mem_kind and make_memory of model.py.
"""

import math

import torch
import torch.nn as nn
from torch.nn import functional as F

from memory import MemoryLayer, check_pool
from pool import ValuePool


class MoE(nn.Module):
    """
    A mixture of experts (Shazeer et al. 2017, arXiv 1701.06538). A router scores `experts` MLPs for each
    token, and the token goes through the best `top_k` of them. The softmax of their scores weights the sum of
    their outputs. Each expert has hidden / top_k hidden units and no bias. No token is dropped. n_layer:
    blocks of the model; with more blocks, the output projections start smaller.

    In training, forward sets `balance`: the load-balancing loss of Fedus et al. 2021 (arXiv 2101.03961,
    section 2.2) over the tokens of this process. It is 1 if all experts are chosen equally often, and
    experts / top_k if all tokens choose the same experts.

    idle: the number of parameters that a token does not use. Raises a ValueError for impossible sizes.
    """

    def __init__(self, width: int, hidden: int, experts: int, top_k: int, n_layer: int):
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"top_k={top_k} must be between 1 and experts={experts}")
        if hidden % top_k:
            raise ValueError(f"top_k={top_k} must divide the {hidden} hidden units of an MLP")
        self.top_k = top_k
        self.idle = 2 * width * hidden // top_k * (experts - top_k)
        self.balance = None
        self.router = nn.Linear(width, experts, bias=False)
        self.c_fc = nn.Parameter(torch.empty(experts, width, hidden // top_k).normal_(std=width**-0.5))
        # this std makes the average of top_k experts start as large as the output of one MLP
        std = top_k / math.sqrt(2 * n_layer * width)
        self.c_proj = nn.Parameter(torch.empty(experts, hidden // top_k, width).normal_(std=std))

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (N, C)
        logits = self.router(x)  # (N, E)
        scores, experts = logits.topk(self.top_k)  # (N, top_k)
        weights = scores.softmax(-1)
        # with tokens sorted by expert, each expert needs two matrix products and no padding
        order = experts.flatten().argsort(stable=True)  # (N * top_k,)
        token, E = order // self.top_k, logits.size(1)
        counts = experts.flatten().bincount(minlength=E)
        y = torch.cat([F.gelu(part @ self.c_fc[e], approximate="tanh") @ self.c_proj[e]
                       for e, part in enumerate(x[token].split(counts.tolist()))])
        y = torch.zeros_like(x).index_add(
            0, token, (y * weights.flatten()[order].unsqueeze(1)).to(x.dtype))
        if self.training:
            self.balance = E * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum()
        return y.view(shape)

    def take_balance(self) -> torch.Tensor | None:
        """Returns `balance` and clears it, because copy.deepcopy fails if a model holds an autograd graph."""
        balance, self.balance = self.balance, None
        return balance


class PEER(MemoryLayer):
    """
    Parameter-efficient expert retrieval (He 2024): slot j is an MLP with one hidden unit, and

        y = sum_j w_j * gelu(<u_j, x>) * v_j

    where v_j is row j of the pool and u_j is row j + num_keys**2. So the pool has 2 * num_keys**2 rows of
    width `width`. There is no gate and no output projection, as published.
    """

    def __init__(self, width: int, num_keys: int, heads: int, knn: int, key_dim: int, qk_norm: bool = True,
                 bias: bool = True):
        super().__init__(width, num_keys, heads, knn, key_dim, width, swilu=False, qk_norm=qk_norm, bias=bias)
        self.out = None
        self.num_values *= 2
        self.rows_per_token *= 2

    def forward(self, x, pool: ValuePool, left=None, right=None):
        check_pool(pool, self.num_values, self.value_dim)
        weights, indices = self.search(x, left, right, pool.kernel)  # (N, H*K)
        hidden = F.gelu(pool.dot(indices + self.num_slots, x.reshape(-1, self.value_dim)))
        return pool(indices, weights * hidden).to(x.dtype).view(x.shape)


class HashedMemory(nn.Module):
    """
    A memory that chooses slots by hashing this token and the previous one. Each layer has heads * knn random
    hash functions, one for each slot that a token reads. The scores are a linear function of x. There are
    neither queries nor keys. The read, the gate and the output projection are those of MemoryLayer.
    """

    query = "ids"  # whatever mem_query says: left and right are the ids of this token and of the previous one
    forward = MemoryLayer.forward

    def __init__(self, width: int, num_values: int, heads: int, knn: int, value_dim: int, vocab_size: int,
                 swilu: bool = True, bias: bool = True):
        super().__init__()
        for name, size in (("heads", heads), ("knn", knn)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        self.heads, self.knn, self.value_dim, self.vocab_size = heads, knn, value_dim, vocab_size
        self.num_slots = self.num_values = num_values
        self.rows_per_token = heads * knn
        self.score = nn.Linear(width, heads * knn, bias=bias)
        self.register_buffer("multipliers", 2 * torch.randint(2**62, (heads * knn,)) + 1)  # odd
        self.gate = nn.Linear(width, value_dim, bias=bias) if swilu else None
        self.out = nn.Linear(value_dim, width, bias=bias)

    def hash(self, token: torch.Tensor, previous: torch.Tensor) -> torch.Tensor:
        """
        token, previous (N,), int64 -> slots (N, H*K). Multiply-shift hashing: multiply the number of the pair
        by a random odd number, and let the product overflow. Its high bits depend on all bits of the pair.
        """
        pair = previous * self.vocab_size + token + 1  # + 1: 0 would always get slot 0
        high = ((pair.unsqueeze(1) * self.multipliers) >> 33) & (2**31 - 1)  # (N, H*K)
        return (high * self.num_values) >> 31

    def search(self, x: torch.Tensor, token: torch.Tensor, previous: torch.Tensor, kernel: str = "auto"):
        """x (..., C), token and previous (...): ids -> weights (N, H*K), slots (N, H*K). kernel: not used."""
        scores = self.score(x).flatten(0, -2).unflatten(1, (self.heads, self.knn))  # (N, H, K)
        return scores.softmax(-1).flatten(1), self.hash(token.flatten(), previous.flatten())
