"""
A GPT whose feed-forward blocks can be replaced by memory layers.

The architecture is GPT-2 (pre-LayerNorm, GELU, the head shares its weights with the token embedding), with
rotary positions by default. In the blocks that mem_layers lists, a MemoryLayer (memory.py) replaces the MLP.
All memory layers read the same ValuePool. The GPT owns this pool and passes it to them. The baselines
(mem_kind, moe_layers) are in baselines.py.

Why rotary positions: a position embedding that is added to a token would also be in the memory's query. The
same name at another position would then read other slots, and would not find what was learnt before. GPT-2's
weights need positions=learned; there, mem_query=tokens keeps the positions out of the query.
"""

import contextlib
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from runtime.cli import at_least, check_choices

import torch
import torch.nn as nn
from torch.nn import functional as F

from baselines import PEER, HashedMemory, MoE
from memory import MemoryLayer
from pool import PoolOptimizer, ValuePool


def rotation(first: int, T: int, width: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Rotary positions (Su et al. 2021, arXiv 2104.09864, section 3.2). Numbers i and i + width/2 of a query or
    key are the coordinates of a point. At position t, the point is rotated by t * 10_000 ** (-2 * i / width)
    radians.

    Returns cosines and sines for `rotate`, (T, width) each, for positions first ... first + T - 1. The first
    half of the sines is negated, so `rotate` turns (a, b) into (a cos - b sin, b cos + a sin).
    """
    frequency = 10_000.0 ** (-torch.arange(0, width, 2, device=device) / width)  # radians per token
    angle = torch.arange(first, first + T, device=device).unsqueeze(1) * frequency  # (T, width/2)
    return torch.cat([angle.cos()] * 2, dim=1), torch.cat((-angle.sin(), angle.sin()), dim=1)


def rotate(x, cos, sin):
    """Rotates x (..., T, width). The score of a query and a key then depends only on their distance."""
    return (x * cos + x.roll(x.size(-1) // 2, -1) * sin).type_as(x)


class CausalSelfAttention(nn.Module):
    def __init__(self, width: int, n_head: int, dropout: float = 0.0, bias: bool = True, rotary: bool = True):
        super().__init__()
        multiple = 2 * n_head if rotary else n_head  # rotary positions rotate the numbers of a head in pairs
        if width % multiple:
            raise ValueError(f"n_embd={width} must be a multiple of {'2 * ' * rotary}n_head={multiple}")
        self.n_head = n_head
        self.dropout = nn.Dropout(dropout)
        self.c_attn = nn.Linear(width, 3 * width, bias=bias)  # q, k, v
        self.c_proj = nn.Linear(width, width, bias=bias)

    def forward(self, x, turn, past=None):
        """
        x (B, T, C). turn: the result of `rotation` for these T positions, or None. past: keys and values of P
        earlier tokens, or None. Returns (B, T, C), and keys and values of all tokens (B, n_head, P + T,
        C/n_head).
        """
        B, T, C = x.size()  # batch, time, width
        qkv = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # (B, n_head, T, C/n_head) each
        if turn is not None:
            q, k = rotate(q, *turn), rotate(k, *turn)
        if past is not None:
            k, v = torch.cat((past[0], k), dim=2), torch.cat((past[1], v), dim=2)
        # with P past and T new tokens, new token i sees tokens 0 to P + i
        P = k.size(2) - T
        mask = torch.ones(T, P + T, dtype=torch.bool, device=x.device).tril(P) if P and T > 1 else None
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=not P and T > 1,
                                           dropout_p=self.dropout.p if self.training else 0.0)
        return self.dropout(self.c_proj(y.transpose(1, 2).reshape(B, T, C))), (k, v)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, bias: bool = True):
        super().__init__()
        self.c_fc = nn.Linear(width, hidden, bias=bias)
        self.c_proj = nn.Linear(hidden, width, bias=bias)

    def forward(self, x):
        return self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))


def shift(x, previous=None):
    """
    x (B, T, ...) -> for each token, x of the previous token. previous (B, 1, ...): what the first token gets;
    None: 0.
    """
    return torch.cat((torch.zeros_like(x[:, :1]) if previous is None else previous, x[:, :-1]), dim=1)


class Block(nn.Module):
    """
    A block of a Transformer: attention, then an MLP, a memory layer, or both. memory and mlp: modules, or
    None. query: what the memory's queries are made from, see query_sources.
    """

    def __init__(self, width: int, attn: nn.Module, memory: nn.Module | None, mlp: nn.Module | None,
                 query: str = "state", dropout: float = 0.0, bias: bool = True):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width, bias=bias)
        self.attn = attn
        self.ln_2 = nn.LayerNorm(width, bias=bias)
        self.memory, self.mlp, self.query = memory, mlp, query
        self.dropout = nn.Dropout(dropout)

    def forward(self, x, turn, pool, tokens, embeddings, past=None):
        """
        x (B, T, C), tokens (B, T): their ids, embeddings (B, T, C) -> x, past of this block. turn: from
        `rotation`, or None. past: see GPT.forward.
        """
        keys_values, previous = (None, None) if past is None else (past[:2], past[2])
        y, keys_values = self.attn(self.ln_1(x), turn, keys_values)
        x = x + y
        h = self.ln_2(x)
        if self.mlp is not None:
            x = x + self.dropout(self.mlp(h))
        if self.memory is not None:
            left, right, previous = self.query_sources(h, tokens, embeddings, previous)
            x = x + self.dropout(self.memory(h, pool, left, right))
        return x, (*keys_values, previous)

    def query_sources(self, h, tokens, embeddings, previous=None):
        """
        What the two halves of a query are made from:

        state    h, the output of ln_2 for this token, for both halves: the published layer
        shifted  h of this token and h of the previous one, as RWKV mixes tokens (Peng et al. 2023, arXiv
                 2305.13048). A slot can then stand for two tokens, such as a first and a last name
        tokens   normalised embeddings of this token and of the previous one. Only these two tokens then
                 decide which slots are read
        ids      the ids of this token and of the previous one, for HashedMemory

        Returns left and right, (B, T, ...) each, and `left` of the last token, (B, 1, ...): the right half of
        the next query comes from there. previous: this, from an earlier call, or None.
        """
        if self.query == "state":
            return h, h, None
        if self.query == "tokens":
            embeddings = F.layer_norm(embeddings, embeddings.shape[-1:])
        left = {"shifted": h, "tokens": embeddings, "ids": tokens}[self.query]
        return left, shift(left, previous), left[:, -1:]


@dataclass
class GPTConfig:
    # --- model
    vocab_size: int = 0  # tokens in the vocabulary; 0: as many as the corpus has
    block_size: int = 128  # longest context, in tokens
    n_layer: int = 3  # Transformer blocks
    n_head: int = 4  # attention heads; n_embd must be a multiple of 2 * n_head (positions=learned: n_head)
    n_embd: int = 64  # width of the model
    dropout: float = 0.0  # share of activations dropped in training
    bias: bool = True  # biases in Linear and LayerNorm, as in GPT-2
    positions: Literal["rotary", "learned"] = "rotary"  # learned: added to the embeddings, as in GPT-2
    mlp_width: int = 0  # hidden units of an MLP; 0: 4 * n_embd
    scale_embeddings: bool = False  # multiply embeddings by sqrt(n_embd), as the output of blocks is larger

    # --- memory
    mem_layers: tuple[int, ...] = ()  # blocks with a memory layer, counted from 0; Berges et al. use 3
    mem_kind: Literal["product-key", "peer", "hash"] = "product-key"  # peer and hash: see baselines.py
    mem_num_keys: int = 128  # half-keys for each half of a query; the pool has mem_num_keys**2 slots
    mem_heads: int = 4  # heads; each searches the pool with its own query
    mem_knn: int = 16  # slots that each head reads per token
    mem_key_dim: int = 32  # width of a query, both halves together; hash has no queries
    mem_swilu: bool = True  # multiply what was read by a gate, as Memory+ does; peer has no gate
    mem_qk_norm: bool = True  # normalise queries and half-keys, so that more slots get used; hash has neither
    mem_query: Literal["state", "shifted", "tokens"] = "state"  # see Block.query_sources; hash has no queries
    mem_mode: Literal["replace", "add"] = "replace"  # replace the MLP, or add the memory to it
    mem_dtype: Literal["float32", "bfloat16"] = "float32"  # dtype of the pool's values
    kernel: Literal["auto", "triton", "torch"] = "auto"  # auto: triton on a GPU, otherwise torch

    # --- baselines
    moe_layers: tuple[int, ...] = ()  # blocks with a mixture of experts, counted from 0
    moe_experts: int = 32  # experts per block
    moe_top_k: int = 2  # experts per token, each an MLP with mlp_width / moe_top_k hidden units
    moe_balance: float = 0.01  # weight of the loss that spreads tokens over experts

    def __post_init__(self):
        """Checks what belongs to no layer. The layers check their own sizes, when a GPT is made."""
        check_choices(self)
        self.mem_layers, self.moe_layers = tuple(sorted(self.mem_layers)), tuple(sorted(self.moe_layers))
        at_least(1, self, "block_size", "n_layer", "n_head", "n_embd")
        at_least(0, self, "vocab_size", "mlp_width", "moe_balance")
        for name, layers in (("mem_layers", self.mem_layers), ("moe_layers", self.moe_layers)):
            if len(set(layers) & set(range(self.n_layer))) < len(layers):
                raise ValueError(f"{name}={','.join(map(str, layers))} must be different numbers of layers, "
                                 f"from 0 to {self.n_layer - 1}")


def make_block(c: GPTConfig, layer: int) -> Block:
    has_memory, has_experts = layer in c.mem_layers, layer in c.moe_layers
    replaces = has_memory and c.mem_mode == "replace"
    if replaces and has_experts:
        raise ValueError(f"moe_layers={layer} is also one of mem_layers: choose one, or mem_mode=add")
    attn = CausalSelfAttention(c.n_embd, c.n_head, c.dropout, c.bias, rotary=c.positions == "rotary")
    with option("mem_"):
        memory = make_memory(c) if has_memory else None
    hidden = c.mlp_width or 4 * c.n_embd
    mlp = None if replaces or has_experts else MLP(c.n_embd, hidden, c.bias)
    if has_experts:
        with option("moe_"):
            mlp = MoE(c.n_embd, hidden, c.moe_experts, c.moe_top_k, c.n_layer)
    query = getattr(memory, "query", c.mem_query)  # a hash has no choice
    return Block(c.n_embd, attn, memory, mlp, query, c.dropout, c.bias)


def make_memory(c: GPTConfig) -> nn.Module:
    if c.mem_kind == "hash":
        return HashedMemory(width=c.n_embd, num_values=c.mem_num_keys**2, heads=c.mem_heads, knn=c.mem_knn,
                            value_dim=c.n_embd, vocab_size=c.vocab_size, swilu=c.mem_swilu, bias=c.bias)
    sizes = dict(width=c.n_embd, num_keys=c.mem_num_keys, heads=c.mem_heads, knn=c.mem_knn,
                 key_dim=c.mem_key_dim, qk_norm=c.mem_qk_norm, bias=c.bias)
    if c.mem_kind == "product-key":
        return MemoryLayer(**sizes, value_dim=c.n_embd, swilu=c.mem_swilu)
    if c.mem_mode == "add":
        raise ValueError("kind=peer needs mem_mode=replace: no output projection could start at 0")
    return PEER(**sizes)


@contextlib.contextmanager
def option(prefix: str):
    """
    In a `with` block, an error such as "knn=0 must be ..." becomes "mem_knn=0 must be ...", which names an
    option. If its name has the prefix already (value_blocks), it stays.
    """
    try:
        yield
    except ValueError as error:
        raise ValueError(prefix + str(error).removeprefix(prefix)) from None


@contextlib.contextmanager
def eval_mode(model: nn.Module):
    """
    Evaluation mode in a `with` block. Afterwards each submodule has its old mode, even after an exception.
    """
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


class GPT(nn.Module):
    """
    pool_class(num_values, value_dim, dtype=..., kernel=...) makes the pool: a ValuePool, or a ShardedPool if
    many processes share it.
    """

    def __init__(self, config: GPTConfig, pool_class=ValuePool):
        super().__init__()
        if config.vocab_size < 1:
            raise ValueError("vocab_size must be at least 1")
        self.config = config
        self.wte = nn.Embedding(config.vocab_size, config.n_embd)  # also the weights of the head
        self.wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList([make_block(config, layer) for layer in range(config.n_layer)])
        self.ln_f = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.pool = None
        if memories := self.memories():
            with option(f"mem_num_keys={config.mem_num_keys}: the pool's "):
                self.pool = pool_class(memories[0].num_values, config.n_embd,
                                       dtype=getattr(torch, config.mem_dtype), kernel=config.kernel)
            self.pool.usage.num_slots = memories[0].num_slots  # a slot of PEER has two rows

        # initialised as in GPT-2, but with the standard deviation 1/sqrt(C). GPT-2's 0.02 fits C = 2,500 and
        # is too small for narrow models. Output projections start smaller in deeper models, also as in GPT-2
        std = config.n_embd**-0.5
        for name, module in self.named_modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                residual = name.endswith(("c_proj", "memory.out"))
                nn.init.normal_(module.weight, std=std / math.sqrt(2 * config.n_layer) if residual else std)
                if getattr(module, "bias", None) is not None:
                    nn.init.zeros_(module.bias)
                if name.endswith("memory.out") and config.mem_mode == "add":
                    nn.init.zeros_(module.weight)  # the memory adds nothing at first

    def memories(self) -> list[nn.Module]:
        """The memory layers."""
        return [block.memory for block in self.blocks if block.memory is not None]

    def forward(self, idx, targets=None, past=None):
        """
        idx (B, T), token ids -> logits, loss, past.

        With targets (B, T): logits (B, T, vocab_size), and the mean cross-entropy in nats. A target of -1 is
        ignored. Without targets: logits of the last position only (B, 1, vocab_size), and loss None.

        past: None, or the past that an earlier call returned; idx then continues the text of that call. It
        has one tuple per block: keys, values, and what the next token's query needs from the last token (see
        Block.query_sources).
        """
        P, T = 0 if past is None else past[0][0].size(2), idx.size(1)
        if P + T > self.config.block_size:
            raise ValueError(f"{P + T} tokens do not fit block_size={self.config.block_size}")
        embeddings = x = self.wte(idx)  # (B, T, C)
        if self.wpe is None:
            turn = rotation(P, T, self.config.n_embd // self.config.n_head, idx.device)
        else:
            turn, x = None, x + self.wpe.weight[P:P + T]
        if self.config.scale_embeddings:  # wte has small numbers, because it is also the head
            x = x * self.config.n_embd**0.5
        x = self.dropout(x)
        new_past = []
        for layer, block in enumerate(self.blocks):
            x, block_past = block(x, turn, self.pool, idx, embeddings, None if past is None else past[layer])
            new_past.append(block_past)
        balances = [block.mlp.take_balance() for block in self.blocks if isinstance(block.mlp, MoE)]
        if targets is None:
            return F.linear(self.ln_f(x[:, -1:]), self.wte.weight), None, new_past
        logits = F.linear(self.ln_f(x), self.wte.weight)  # (B, T, vocab_size)
        loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        for balance in filter(torch.is_tensor, balances):  # None in evaluation mode
            # adds the gradient of balance, but not its value: losses stay comparable between models
            loss = loss + self.config.moe_balance * (balance - balance.detach())
        return logits, loss, new_past

    @torch.no_grad()
    def generate(self, idx, max_new_tokens: int, temperature: float = 1.0, top_k: int | None = None,
                 seed: int | None = None, stop: Iterable[int] | None = None, on_token=None):
        """
        Continues idx (B, T), T >= 1, by at most max_new_tokens: returns (B, T + new).

        temperature=0 takes the likeliest token. top_k: draw only from the k likeliest. The same seed draws
        the same tokens. Generation ends early once every row has produced one of the tokens in `stop`. Ignore
        what a row has after it. If the context grows beyond block_size, the oldest tokens are dropped.
        on_token: called with each row's new token, (B, 1), as soon as it is there.
        """
        if temperature < 0:
            raise ValueError(f"temperature={temperature} must not be negative")
        generator = None if seed is None else torch.Generator(idx.device).manual_seed(seed)
        stopped = torch.zeros(len(idx), dtype=torch.bool, device=idx.device)
        stop = None if stop is None else torch.tensor([*stop], dtype=torch.long, device=idx.device)
        past, new, block_size = None, idx, self.config.block_size
        with eval_mode(self):
            for _ in range(max_new_tokens):
                # the context is full: the oldest token is dropped, so past must be computed again
                if past is None or past[0][0].size(2) == block_size:
                    past, new = None, idx[:, -block_size:]
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
                if on_token is not None:
                    on_token(new)
                if stop is not None:
                    stopped |= torch.isin(new[:, 0], stop)
                    if stopped.all():
                        break
        return idx

    def dense_parameters(self) -> list[nn.Parameter]:
        """All parameters that learn, except the pool's values."""
        values = None if self.pool is None else self.pool.values
        return [p for p in self.parameters() if p.requires_grad and p is not values]

    def optimizers(self, lr: float, value_lr: float, weight_decay: float, betas: tuple[float, float],
                   **pool_options) -> list[torch.optim.Optimizer]:
        """
        AdamW for the dense parameters, with weight decay for matrices, and PoolOptimizer if there is a pool.
        pool_options: arguments of PoolOptimizer. value_blocks is the number of blocks in a whole row; with a
        ShardedPool, each process has its share of them.
        """
        dense = self.dense_parameters()
        groups = [{"params": [p for p in dense if p.dim() >= 2], "weight_decay": weight_decay},
                  {"params": [p for p in dense if p.dim() < 2], "weight_decay": 0.0}]
        optimizers = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
        if self.pool is not None:
            parts = self.pool.value_dim // self.pool.values.size(1)  # a ShardedPool has a part of the columns
            blocks = pool_options.pop("value_blocks", 8)
            if blocks % parts and pool_options.get("kind", "rowwise") == "rowwise":
                raise ValueError(f"value_blocks={blocks} must be a multiple of the {parts} processes that "
                                 "share the pool's columns")
            pool_options |= dict(value_blocks=max(1, blocks // parts), kernel=self.config.kernel)
            with option("value_"):
                optimizers.append(PoolOptimizer(self.pool.parameters(), value_lr, **pool_options))
        return optimizers

    def macs_per_token(self) -> int:
        """
        Multiply-adds per token in a forward pass over block_size tokens. Counted: all matrices, one for each
        number; attention (a token sees half of the block on average); the rows read. Not counted: elementwise
        operations (normalisation, softmax, GELU), top-k and embedding look-ups. A training step, forward and
        backward, costs three times as much.
        """
        matrices = sum(x.numel() for name, x in (*self.named_parameters(), *self.named_buffers())
                       if x.dim() >= 2 and name not in ("pool.values", "wpe.weight"))
        attention = self.config.n_layer * self.config.block_size * self.config.n_embd
        return matrices - self.idle() + attention + self.numbers_read()

    def count_parameters(self) -> dict[str, int]:
        """dense: all except the pool. memory: the pool. active: the parameters that one token uses."""
        memory = 0 if self.pool is None else self.pool.num_values * self.pool.value_dim
        dense = sum(p.numel() for name, p in self.named_parameters() if name != "pool.values")
        return {"dense": dense, "memory": memory, "active": dense - self.idle() + self.numbers_read()}

    def idle(self) -> int:
        """Dense parameters that a token does not use: those of other experts."""
        return sum(block.mlp.idle for block in self.blocks if isinstance(block.mlp, MoE))

    def numbers_read(self) -> int:
        """Numbers of the pool that a token reads."""
        return sum(memory.rows_per_token for memory in self.memories()) * self.config.n_embd
