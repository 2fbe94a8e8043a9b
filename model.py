"""
A GPT whose feed-forward blocks can be swapped for memory layers.

The architecture is GPT-2's (pre-LayerNorm, GELU, the head tied to the token embedding) with rotary positions
and scaled embeddings. With mem_layers=() that is all it is. Where a block's index is in mem_layers, a
MemoryLayer (memory.py) takes the place of its MLP; all memory layers read one ValuePool, which the GPT owns
and passes down. Where it is in moe_layers, a mixture of experts does: what else one may do with more
parameters at the same cost a token.

Why rotary: a position that is added to a token's state is in the memory's query too. The same name at
another place of the text then asks for other slots, and hardly finds what was learnt at the first.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn as nn
from torch.nn import functional as F

from config import at_least
from distributed import ALONE, Sharding
from memory import MemoryLayer, PoolOptimizer, ValuePool


@dataclass
class GPTConfig:
    vocab_size: int = 0  # tokens in the vocabulary; 0 is for train.py: as many as the corpus has
    block_size: int = 128  # longest context, in tokens
    n_layer: int = 3  # Transformer blocks
    n_head: int = 4  # attention heads, each of an even width
    n_embd: int = 64  # width of the model
    dropout: float = 0.0  # share of activations dropped in training
    bias: bool = True  # biases in Linear and LayerNorm, as GPT-2 has
    mlp_width: int = 0  # hidden units of an MLP; 0: 4 * n_embd
    scale_embeddings: bool = True  # times sqrt(n_embd): a token is not lost in what blocks add to it

    mem_layers: tuple[int, ...] = ()  # blocks with a memory layer, from 0; the papers spread 3 over the depth
    mem_kind: Literal["product-key", "peer", "hash"] = "product-key"  # see memory.py
    mem_num_keys: int = 128  # half-keys a side; the pool has the square of it as slots
    mem_heads: int = 4  # each searches with a query of its own
    mem_knn: int = 16  # slots that each head reads
    mem_key_dim: int = 32  # width of a query, both halves; hash has none
    mem_swilu: bool = True  # gate what was read (Memory+); peer has no gate
    mem_qk_norm: bool = True  # normalise queries and keys, which hash has not; off, slot use may collapse
    mem_token_shift: bool = True  # product-key: the second half of a query is of the token before
    mem_mode: Literal["replace", "add"] = "replace"  # the MLP gives way, or stays too
    mem_dtype: Literal["float32", "bfloat16"] = "float32"  # of the pool's values
    kernel: Literal["auto", "triton", "torch"] = "auto"  # of the pool; auto: triton on a GPU, else torch

    moe_layers: tuple[int, ...] = ()  # blocks with a mixture of experts, from 0
    moe_experts: int = 32  # a block
    moe_top_k: int = 2  # experts that a token goes through, each an MLP of mlp_width / moe_top_k hidden units
    moe_balance: float = 0.01  # weight of the loss that spreads tokens over experts; training alone has it

    def __post_init__(self):
        self.mem_layers, self.moe_layers = tuple(sorted(self.mem_layers)), tuple(sorted(self.moe_layers))
        at_least(1, self, "block_size", "n_layer", "n_head", "n_embd", "mem_num_keys", "mem_heads", "mem_knn",
                 "mem_key_dim", "moe_experts", "moe_top_k")
        at_least(0, self, "vocab_size", "mlp_width", "moe_balance")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout={self.dropout} must be at least 0 and below 1")
        if self.n_embd % (2 * self.n_head):
            raise ValueError(f"n_embd={self.n_embd} must be a multiple of 2 * n_head={2 * self.n_head}: "
                             "positions turn a head's numbers in pairs")
        for name, layers in (("mem_layers", self.mem_layers), ("moe_layers", self.moe_layers)):
            if wrong := set(layers) - set(range(self.n_layer)):
                raise ValueError(f"{name}: there is no layer {min(wrong)}, only 0 to {self.n_layer - 1}")
            if len(set(layers)) < len(layers):
                raise ValueError(f"{name}={layers} names a layer twice")
        if self.mem_mode == "replace" and set(self.mem_layers) & set(self.moe_layers):
            raise ValueError(f"moe_layers={self.moe_layers} and mem_layers={self.mem_layers} share a layer")
        if self.mem_layers and self.mem_knn > self.mem_num_keys:
            raise ValueError(f"mem_knn={self.mem_knn} must be at most mem_num_keys={self.mem_num_keys}")
        if self.mem_layers and self.mem_num_keys > 32_767:
            raise ValueError(f"mem_num_keys={self.mem_num_keys} must be at most 32767: rows are int32")
        if self.mem_layers and self.mem_key_dim % 2:
            raise ValueError(f"mem_key_dim={self.mem_key_dim} must be even: a query has two halves")
        if self.mem_kind == "peer" and self.mem_mode == "add":
            raise ValueError("mem_kind=peer has no output projection that mem_mode=add could set to zero")
        if self.moe_layers and self.moe_top_k > self.moe_experts:
            raise ValueError(f"moe_top_k={self.moe_top_k} must be at most moe_experts={self.moe_experts}")
        if self.moe_layers and self.hidden % self.moe_top_k:
            raise ValueError(f"moe_top_k={self.moe_top_k} must divide an MLP's {self.hidden} hidden units")

    @property
    def hidden(self) -> int:
        """Hidden units of an MLP."""
        return self.mlp_width or 4 * self.n_embd

    def macs_per_token(self) -> int:
        """
        Multiply-adds of a forward pass, a token, at the length block_size: of every matrix; of attention,
        where a token sees half the block on average; of the search, 2 * num_keys products with half-keys a
        head; and of the rows read. Not counted: what is done number by number (normalisation, softmax, GELU),
        choosing (top-k), and looking up embeddings. A training step costs three times as many.
        """
        C, reads = self.n_embd, self.mem_heads * self.mem_knn
        attention = 4 * C * C + self.block_size * C
        search = self.mem_heads * self.mem_key_dim * (C + self.mem_num_keys)
        memory = {"product-key": search + reads * C + (1 + self.mem_swilu) * C * C,
                  "peer": search + 2 * reads * C,
                  "hash": C * reads + reads * C + (1 + self.mem_swilu) * C * C}[self.mem_kind]
        mlps = self.n_layer - len(self.moe_layers) - len(self.mem_layers) * (self.mem_mode == "replace")
        moe = 2 * C * self.hidden + C * self.moe_experts
        return (self.n_layer * attention + mlps * 2 * C * self.hidden + len(self.mem_layers) * memory
                + len(self.moe_layers) * moe + self.vocab_size * C)


def rotation(first: int, T: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.2): at position t the numbers i and
    i + width/2 of a query or key are turned, like a point of the plane, by t * 10_000 ** (-2 * i / width)
    radians.

    Returns the cosines and the sines of positions first ... first + T - 1, (T, width) each, for `rotate`: the
    sines of the first half with the minus that they have in its formula.
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)  # radians a token
    angle = torch.arange(first, first + T, device=device).unsqueeze(1) * frequency  # (T, width/2)
    return torch.cat([angle.cos()] * 2, dim=1), torch.cat((-angle.sin(), angle.sin()), dim=1)


def rotate(x, cos, sin):
    """x (..., T, width) turned: how a query and a key match then depends on their distance alone."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)  # q, k, v
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x, turn, past=None):
        """
        x (B, T, C), turn: the rotation of its T positions, past: a tuple that begins with keys and values of
        earlier tokens, or None -> (B, T, C), all keys and values.
        """
        B, T, C = x.size()  # batch, time, width
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C/n_head) each
        q, k = rotate(q, *turn), rotate(k, *turn)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        # of T new tokens after P past ones, the i-th sees P + i + 1
        P = k.size(2) - T
        mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P) if P and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not P and T > 1,
                                           dropout_p=self.dropout if self.training else 0.0)
        y = self.c_proj(y.transpose(1, 2).reshape(B, T, C))
        return F.dropout(y, self.dropout, self.training), (k, v)


class MLP(nn.Module):
    def __init__(self, config: GPTConfig):
        super().__init__()
        self.c_fc = nn.Linear(config.n_embd, config.hidden, bias=config.bias)
        self.c_proj = nn.Linear(config.hidden, config.n_embd, bias=config.bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


class MoE(nn.Module):
    """
    A mixture of experts: each token goes through the top_k of E MLPs (small, without bias) that a router
    scores highest, and their outputs are averaged with the softmax of those scores (Shazeer et al. 2017,
    arXiv 1701.06538). No token is ever dropped.

    Leaves `balance`, the load-balancing loss of Fedus et al. 2021 (arXiv 2101.03961, section 2.2), over the
    tokens of this process: 1 where all experts are chosen alike, E / top_k where the same ones always are.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        C, E, width = config.n_embd, config.moe_experts, config.hidden // config.moe_top_k
        self.top_k = config.moe_top_k
        self.router = nn.Linear(C, E, bias=False)
        self.c_fc = nn.Parameter(torch.empty(E, C, width).normal_(std=C**-0.5))
        # top_k times an MLP's: an average of top_k experts, each 1/top_k as wide, starts as large as an MLP
        std = self.top_k / math.sqrt(2 * config.n_layer * C)
        self.c_proj = nn.Parameter(torch.empty(E, width, C).normal_(std=std))

    def forward(self, x):
        shape, x = x.shape, x.flatten(0, -2)  # (N, C)
        logits = self.router(x)  # (N, E)
        scores, experts = logits.topk(self.top_k)  # (N, top_k)
        weights = scores.softmax(-1)
        # sorted by expert, the tokens of one stand together: a matrix product each, and no token is padding
        order = experts.flatten().argsort(stable=True)  # (N * top_k,)
        token, E = order // self.top_k, logits.size(1)
        counts = experts.flatten().bincount(minlength=E)
        y = torch.cat([F.gelu(part @ self.c_fc[e], approximate="tanh") @ self.c_proj[e]
                       for e, part in enumerate(x[token].split(counts.tolist()))])
        y = torch.zeros_like(x).index_add(0, token, y * weights.flatten()[order].unsqueeze(1))
        self.balance = E * (counts / counts.sum() * logits.softmax(-1).mean(0)).sum()
        return y.view(shape)


def token_before(x, last=None):
    """x (B, T, ...), last: x of the one before the first, or None: 0 -> like x, of the token before each."""
    return torch.cat((torch.zeros_like(x[:, :1]) if last is None else last, x[:, :-1]), dim=1)


class Block(nn.Module):
    def __init__(self, config: GPTConfig, layer: int):
        super().__init__()
        self.dropout = config.dropout
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        is_memory = layer in config.mem_layers
        self.mlp = None
        if not is_memory or config.mem_mode == "add":
            self.mlp = MoE(config) if layer in config.moe_layers else MLP(config)
        self.memory = MemoryLayer(
            width=config.n_embd, num_keys=config.mem_num_keys, heads=config.mem_heads, knn=config.mem_knn,
            key_dim=config.mem_key_dim, value_dim=config.n_embd, swilu=config.mem_swilu,
            qk_norm=config.mem_qk_norm, bias=config.bias, kind=config.mem_kind) if is_memory else None
        self.token_shift = config.mem_token_shift and config.mem_kind == "product-key"

    def forward(self, x, turn, pool, bigrams, past=None):
        """past, also returned: keys, values, and the last token's h, which half of the next query is of."""
        y, keys_values = self.attn(self.ln_1(x), turn, past)
        x = x + y
        h = self.ln_2(x)
        if self.mlp is not None:
            x = x + F.dropout(self.mlp(h), self.dropout, self.training)
        if self.memory is not None:
            before = token_before(h, None if past is None else past[2]) if self.token_shift else None
            x = x + F.dropout(self.memory(h, pool, before, bigrams), self.dropout, self.training)
        return x, (*keys_values, h[:, -1:])


class GPT(nn.Module):
    """
    sharding: how the pool's columns lie on processes. mem_file: a file to hold the pool's values, instead of
    the memory. draw_pool=False: the pool's values are yet to be loaded.
    """

    def __init__(self, config: GPTConfig, sharding: Sharding = ALONE, mem_file: str | None = None,
                 draw_pool: bool = True):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be at least 1")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # the head too: the two are tied
        self.blocks = nn.ModuleList([Block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.pool = None
        if config.mem_layers:
            dtype = getattr(torch, config.mem_dtype)
            rows_a_slot = 2 if config.mem_kind == "peer" else 1
            self.pool = ValuePool(config.mem_num_keys**2 * rows_a_slot, config.n_embd, dtype, config.kernel,
                                  sharding, mem_file, draw_pool, rows_a_slot=rows_a_slot)

        # GPT-2's initialisation, but for the width: its 0.02 is 1/sqrt(C) for C = 2,500, and too small for
        # narrow models. What a block adds to the residual stream starts smaller, the more blocks
        std = config.n_embd**-0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("c_proj", "memory.out"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * config.n_layer) if residual else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("memory.out") and config.mem_mode == "add":
                    nn.init.zeros_(module.weight)  # the GPT starts as the function that it was without memory

    def forward(self, idx, targets=None, past=None):
        """
        idx (B, T), token ids -> logits, loss, past.

        With targets (B, T), -1 where nothing is asked: logits (B, T, vocab_size) and the mean cross-entropy
        in nats. Without: logits of the last position (B, 1, vocab_size), and loss None. past: None, or what
        an earlier call returned; idx then goes on where that call's ended.
        """
        P, T = 0 if past is None else past[0][0].size(2), idx.size(1)
        if P + T > self.config.block_size:
            raise ValueError(f"{P + T} tokens do not fit block_size={self.config.block_size}")
        x = self.wte(idx)  # (B, T, C)
        if self.config.scale_embeddings:  # tied to the head, they are small
            x = x * self.config.n_embd**0.5
        x = F.dropout(x, self.config.dropout, self.training)
        turn = rotation(P, T, self.config.n_embd // self.config.n_head, idx.device)
        # for mem_kind='hash': a number for each token and the one before it, at the start of all a token 0
        bigrams = token_before(idx, None if past is None else past[-1]) * self.config.vocab_size + idx
        new_past = []
        for layer, block in enumerate(self.blocks):
            x, past_of_block = block(x, turn, self.pool, bigrams, None if past is None else past[layer])
            new_past.append(past_of_block)
        new_past.append(idx[:, -1:])
        if targets is None:
            return F.linear(self.ln_f(x[:, -1:]), self.wte.weight), None, new_past
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        for block in self.blocks:
            if self.training and isinstance(block.mlp, MoE):
                # the gradient alone: the loss that is shown stays one that models can be compared by
                loss = loss + self.config.moe_balance * (block.mlp.balance - block.mlp.balance.detach())
        return logits, loss, new_past

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int | None = None, stop: int | None = None):
        """
        Continues idx (B, T) by at most max_new_tokens: returns (B, T + new).

        temperature 0 takes the likeliest token; top_k keeps only the k likeliest to draw from; the same seed
        draws the same tokens. Ends early once every row has produced the token `stop`; what a row has after
        it is meaningless. Where the context grows past block_size, the oldest tokens fall out of it.
        """
        was_training = self.training
        self.eval()
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        past, new = None, idx
        for _ in range(max_new_tokens):
            # what is cached has seen the tokens that fall out, so a window that moves starts afresh
            if past is None or past[0][0].size(2) == self.config.block_size:
                past, new = None, idx[:, -self.config.block_size:]
            logits, _, past = self(new, past=past)
            logits = logits[:, -1].float()
            if temperature == 0:
                new = logits.argmax(-1, keepdim=True)
            else:
                logits = logits / temperature
                if top_k is not None and top_k < logits.size(-1):
                    logits[logits < logits.topk(top_k).values[:, -1:]] = -torch.inf
                new = torch.multinomial(logits.softmax(-1), 1, generator=generator)
            idx = torch.cat((idx, new), dim=1)
            if stop is not None:
                stopped |= new[:, 0] == stop
                if stopped.all():
                    break
        self.train(was_training)
        return idx

    def optimizers(self, lr: float, value_lr: float, weight_decay: float, betas: tuple[float, float],
                   **pool_options) -> list[torch.optim.Optimizer]:
        """AdamW for the dense parameters, of which matrices decay; and PoolOptimizer if there is a pool."""
        dense = [p for p in self.parameters() if p.requires_grad]
        groups = [{"params": [p for p in dense if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in dense if p.dim() < 2], "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
        if self.pool is not None:
            optimizers.append(PoolOptimizer(self.pool, value_lr, **pool_options))
        return optimizers

    def count_parameters(self) -> dict[str, int]:
        """dense: all but the pool; memory: the pool; active: what one token goes through of both."""
        c = self.config
        dense = sum(p.numel() for p in self.parameters() if p.requires_grad)
        memory = 0 if self.pool is None else self.pool.values.numel() * self.pool.sharding.columns.size
        read = len(c.mem_layers) * c.mem_heads * c.mem_knn * c.n_embd * (2 if c.mem_kind == "peer" else 1)
        idle = len(c.moe_layers) * (c.moe_experts - c.moe_top_k) * 2 * c.n_embd * c.hidden // c.moe_top_k
        return {"dense": dense, "memory": memory, "active": dense - idle + read}
