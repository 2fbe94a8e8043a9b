"""model.py against torch's own Transformer, and against itself without the cache."""

import copy
import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from memory import PoolOptimizer
from model import GPT, GPTConfig, MoE

SMALL = dict(
    vocab_size=50,
    block_size=16,
    n_layer=3,
    n_head=2,
    n_embd=16,
    mem_num_keys=8,
    mem_heads=2,
    mem_knn=4,
    mem_key_dim=8,
)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | changes))
    with torch.no_grad():  # far from the initialisation, so that every part shows in the output
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def tokens(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("scaled, scale", [(True, 4), (False, 1)])  # 4 is the root of the width
def test_without_memory_and_positions_it_is_torch_s_transformer(monkeypatch, scaled, scale):
    monkeypatch.setattr("model.rotate", lambda x, cos, sin: x)
    model = make_model(scale_embeddings=scaled)
    encoder = (
        torch.nn.TransformerEncoder(
            torch.nn.TransformerEncoderLayer(
                d_model=16,
                nhead=2,
                dim_feedforward=64,
                dropout=0.0,
                batch_first=True,
                norm_first=True,
                activation=lambda x: F.gelu(x, approximate="tanh"),
            ),
            3,
            norm=torch.nn.LayerNorm(16),
            enable_nested_tensor=False,
        )
        .double()
        .eval()
    )
    names = {
        "self_attn.in_proj_weight": "attn.c_attn.weight",
        "self_attn.in_proj_bias": "attn.c_attn.bias",
        "self_attn.out_proj.weight": "attn.c_proj.weight",
        "self_attn.out_proj.bias": "attn.c_proj.bias",
        "linear1.weight": "mlp.c_fc.weight",
        "linear1.bias": "mlp.c_fc.bias",
        "linear2.weight": "mlp.c_proj.weight",
        "linear2.bias": "mlp.c_proj.bias",
        "norm1.weight": "ln_1.weight",
        "norm1.bias": "ln_1.bias",
        "norm2.weight": "ln_2.weight",
        "norm2.bias": "ln_2.bias",
    }
    ours = model.state_dict()
    theirs = {f"layers.{i}.{a}": ours[f"blocks.{i}.{b}"] for i in range(3) for a, b in names.items()}
    encoder.load_state_dict(theirs | {"norm.weight": ours["ln_f.weight"], "norm.bias": ours["ln_f.bias"]})
    idx, targets = tokens(2, 11), tokens(2, 11, seed=2)
    mask = torch.nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    hidden = encoder(scale * ours["wte.weight"][idx], mask=mask)
    logits, loss, _ = model(idx, targets)
    torch.testing.assert_close(logits, hidden @ ours["wte.weight"].T)
    torch.testing.assert_close(
        loss, F.cross_entropy((hidden @ ours["wte.weight"].T).transpose(1, 2), targets)
    )
    assert not any("memory" in name or "pool" in name for name in ours)


KINDS = [
    {},
    dict(mem_layers=(1, 2)),
    dict(mem_layers=(1, 2), mem_token_shift=False),
    dict(mem_layers=(0, 1, 2), mem_kind="peer"),
    dict(mem_layers=(0, 2), mem_kind="hash"),
    dict(moe_layers=(0, 2), moe_experts=4),
]


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind):
    model = make_model(**kind)
    idx = tokens(1, 12)
    before = model(idx, idx)[0]
    idx[0, 7] = (idx[0, 7] + 1) % 50
    after = model(idx, idx)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6, "tokens from the 7th on see the change"


@pytest.mark.parametrize("parts", [[12], [1] * 12, [5, 1, 1, 5], [1, 11], [4, 4, 4]])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_changes_no_logits(parts, kind):
    model = make_model(**kind)
    idx = tokens(3, 12)
    whole = model(idx, idx)[0]
    past, at = None, 0
    for part in parts:
        logits, _, past = model(idx[:, at : at + part], past=past)
        at += part
        torch.testing.assert_close(logits[:, 0], whole[:, at - 1])


def naive_generate(model, idx, steps, temperature, top_k, seed):
    """nanoGPT's way: the whole window anew for each token."""
    g = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        window = idx[:, -model.config.block_size :]
        logits = model(window, window)[0][:, -1].float()
        if temperature == 0:
            new = logits.argmax(-1, keepdim=True)
        else:
            p = logits / temperature
            if top_k is not None:
                p[p < p.topk(top_k).values[:, -1:]] = -torch.inf
            new = torch.multinomial(p.softmax(-1), 1, generator=g)
        idx = torch.cat((idx, new), 1)
    return idx


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
@pytest.mark.parametrize("prompt, steps", [(1, 10), (9, 20), (16, 3), (30, 4)])
@pytest.mark.parametrize("mem_kind", ["product-key", "hash"])
def test_generate_equals_the_naive_way_also_past_the_block_size(temperature, top_k, prompt, steps, mem_kind):
    model = make_model(mem_layers=(1,), mem_kind=mem_kind)
    idx = tokens(3, prompt)
    ours = model.generate(idx, steps, temperature, top_k, seed=3)
    assert torch.equal(ours, naive_generate(model, idx, steps, temperature, top_k, seed=3))


def test_generate_with_a_seed_repeats_and_top_k_1_is_greedy():
    model = make_model(mem_layers=(1,))
    idx = tokens(2, 4)
    assert torch.equal(model.generate(idx, 9, seed=5), model.generate(idx, 9, seed=5))
    assert not torch.equal(model.generate(idx, 9, seed=5), model.generate(idx, 9, seed=6))
    assert torch.equal(model.generate(idx, 9, top_k=1), model.generate(idx, 9, temperature=0))


def test_generate_stops_when_every_row_has_stopped():
    model = make_model()
    idx = tokens(2, 4)
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 6].item()
    stopped = model.generate(idx[:1], 12, temperature=0, stop=stop)
    assert stopped.size(1) == 5 + (free[0, 4:] == stop).nonzero()[0].item()
    assert torch.equal(stopped, free[:1, : stopped.size(1)])
    model.train()
    model.generate(idx, 1)
    assert model.training, "generate leaves the mode as it was"


def test_a_context_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        make_model()(tokens(1, 17))


@pytest.mark.parametrize("C", [14, 64])
def test_a_new_model_s_projections_and_logits_are_of_size_1_whatever_its_width(C):
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=400, block_size=48, n_layer=2, n_head=1, n_embd=C, moe_layers=(1,))
    model = GPT(config)
    idx = torch.randint(400, (8, 48))
    logits = model(idx, idx)[0]
    assert 0.8 < logits.std() < 1.2
    for layer in (model.blocks[0].attn.c_attn, model.blocks[0].mlp.c_fc):
        assert 0.8 < layer(torch.randn(100, C)).std() < 1.2
    x = torch.randn(100, C)
    dense, mixed = (block.mlp(x).std() for block in model.blocks)
    assert 0.8 < mixed / dense < 1.25


def test_attention_sees_how_far_apart_tokens_are_and_nothing_else_of_their_places():
    """By explicit scores of complex numbers: a query and a key are turned by their distance alone."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(9, 16, dtype=torch.float64)  # but angles are of float32
    attention = model.blocks[0].attn
    distance = torch.arange(9.0, dtype=torch.float64).unsqueeze(1) - torch.arange(9)
    angle = distance.unsqueeze(2) * 10_000 ** -torch.tensor([0, 2 / 8, 4 / 8, 6 / 8])
    q, k, v = attention.c_attn(x).view(9, 3, 2, 8).unbind(1)  # (T, n_head, D) each
    q, k = (torch.complex(*y.chunk(2, dim=-1)) for y in (q, k))
    scores = torch.einsum("qhd,khd,qkd->hqk", q, k.conj(), torch.polar(torch.ones_like(angle), angle)).real
    scores = (scores / math.sqrt(8)).masked_fill(distance < 0, -torch.inf)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    model.blocks[0].ln_1, model.wte = torch.nn.Identity(), torch.nn.Embedding.from_pretrained(x / 4)
    got = []
    attention.register_forward_hook(lambda module, args, result: got.append(result[0][0]))
    model(torch.arange(9).unsqueeze(0))
    torch.testing.assert_close(got[0], attention.c_proj(y), rtol=1e-6, atol=1e-6)


def test_a_memory_layer_gets_the_token_before_each():
    model = make_model(mem_layers=(1,))
    got = []
    model.blocks[1].memory.register_forward_hook(lambda module, args, y: got.append((args[0], args[2])))
    past = None
    for part in tokens(2, 9).split([4, 1, 4], dim=1):
        past = model(part, past=past)[2]
    x, before = (torch.cat(parts, dim=1) for parts in zip(*got, strict=True))
    assert torch.equal(before[:, 1:], x[:, :-1]) and not before[:, 0].any(), "before the first there is none"


def test_positions_leave_the_dtype_of_queries_and_keys():
    with torch.autocast("cpu", torch.bfloat16):
        _, _, ((k, v, _), *_) = make_model().float()(tokens(1, 5))
    assert k.dtype == v.dtype == torch.bfloat16


def test_layers_share_one_pool_and_models_share_nothing():
    """Guards against sharing through class-level state."""
    a, b = make_model(mem_layers=(0, 2)), make_model(mem_layers=(0, 2))
    assert sum("pool" in name for name in a.state_dict()) == 1
    mine = {p.untyped_storage().data_ptr() for p in [*a.parameters(), *a.buffers()]}
    assert mine.isdisjoint(p.untyped_storage().data_ptr() for p in [*b.parameters(), *b.buffers()])
    before = copy.deepcopy(b.state_dict())
    idx = tokens(2, 8)
    optimizers = a.optimizers(1e-2, 1e-1, 0.1, (0.9, 0.99), kind="rowwise", value_blocks=8)
    a.train()
    a(idx, idx)[1].backward()
    assert len(a.pool.reads) == 2 and b.pool.reads == []
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())
    assert not torch.equal(a.pool.values, b.pool.values)
    assert a.pool.usage.summary()[0] > 0 and b.pool.usage.summary()[0] == 0


def test_use_is_of_the_slots_that_tokens_weighted():
    """Of PEER too, whose slots are two rows each."""
    for kind in ("product-key", "peer", "hash"):
        model = make_model(mem_layers=(1,), mem_kind=kind).train()
        seen = []
        model.pool.register_forward_hook(lambda pool, args, y, seen=seen: seen.append(args))
        model(tokens(2, 9))
        ((indices, weights),) = seen
        total = torch.zeros_like(model.pool.usage.total_weight)
        assert len(total) == model.config.mem_num_keys**2
        for index, weight in zip(indices.flatten(), weights.flatten(), strict=True):
            total[index] += weight.detach().abs()
        torch.testing.assert_close(model.pool.usage.total_weight, total)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        dict(mem_layers=(1, 2)),
        dict(mem_layers=(0,), mem_mode="add"),
        dict(mem_layers=(1,), mem_swilu=False, mem_qk_norm=False, bias=False),
        *KINDS[2:],
    ],
)
def test_every_parameter_is_in_one_group_and_every_dense_one_gets_a_gradient(changes):
    model = make_model(**changes)
    optimizers = model.optimizers(1e-3, 1e-2, 0.1, (0.9, 0.99), kind="rowwise", value_blocks=8)
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    model(tokens(2, 9), tokens(2, 9, seed=2))[1].backward()
    for name, p in model.named_parameters():
        if name == "pool.values":
            assert p.grad is None and isinstance(optimizers[1], PoolOptimizer)
        else:
            assert p.grad is not None and p.grad.abs().max() > 0, name
    for p in optimizers[0].param_groups[1]["params"]:
        assert p.dim() < 2


def test_add_mode_starts_as_the_function_that_it_was():
    torch.manual_seed(0)
    dense = GPT(GPTConfig(**SMALL))
    added = GPT(GPTConfig(**SMALL, mem_layers=(0, 2), mem_mode="add"))
    missing, unexpected = added.load_state_dict(dense.state_dict(), strict=False)
    assert unexpected == [] and all("memory" in name or "pool" in name for name in missing)
    idx = tokens(2, 9)
    torch.testing.assert_close(added(idx, idx)[0], dense(idx, idx)[0], rtol=0, atol=0)


def test_counts():
    model = make_model(mem_layers=(1, 2))
    counts = model.count_parameters()
    C, H, D, S = 16, 2, 8, 8
    block = 4 * C + 3 * C * C + 3 * C + C * C + C
    memory = C * H * D + H * D + H * S * D + H + 2 * (C * C + C)
    mlp = 8 * C * C + 5 * C
    assert counts["dense"] == 50 * C + 2 * C + 3 * block + 2 * memory + mlp
    assert counts["memory"] == S * S * C
    assert counts["active"] == counts["dense"] + 2 * H * 4 * C
    assert sum(p.numel() for p in model.parameters()) == counts["dense"] + counts["memory"]
    peer = make_model(mem_layers=(1, 2), mem_kind="peer").count_parameters()
    assert peer["memory"] == 2 * S * S * C and peer["active"] == peer["dense"] + 2 * 2 * H * 4 * C
    moe = make_model(moe_layers=(1,), moe_experts=8, moe_top_k=2).count_parameters()
    assert moe["dense"] - moe["active"] == 6 * 2 * C * 2 * C, "six of eight experts are idle"


@pytest.mark.parametrize("kind", [*KINDS, dict(mem_layers=(1,), mem_swilu=False, mlp_width=24)])
def test_macs_are_those_that_torch_counts(kind):
    """torch counts what matrices do; it does not count attention on the CPU, nor reads of the pool."""
    model = make_model(**kind)
    c = model.config
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, 16), tokens(2, 16))
    rows_read = len(c.mem_layers) * c.mem_heads * c.mem_knn * (2 if c.mem_kind == "peer" else 1)
    attention = c.n_layer * c.n_embd * 2 * sum(range(1, 17)) / 16  # both products, over what a token sees
    exact = counter.get_total_flops() / 2 / (2 * 16) + rows_read * c.n_embd + attention
    assert math.isclose(c.macs_per_token(), exact, rel_tol=0.01)


def every_expert(moe: MoE, x):
    """The same mixture, with every expert computed for every token: x (N, C) -> (N, C)."""
    logits = x @ moe.router.weight.T
    best = logits.topk(moe.top_k).indices
    mask = torch.full_like(logits, -torch.inf).scatter(1, best, 0.0)
    hidden = F.gelu(torch.einsum("nc,ecw->new", x, moe.c_fc), approximate="tanh")
    out = torch.einsum("new,ewc->nec", hidden, moe.c_proj)
    return ((logits + mask).softmax(-1).unsqueeze(-1) * out).sum(1)


@pytest.mark.parametrize("experts, top_k, N", [(4, 2, 40), (16, 1, 7), (3, 3, 5), (8, 4, 1)])
def test_experts_equal_a_mixture_of_all_of_them(experts, top_k, N):
    """Also where experts get no token at all, and in the gradients."""
    torch.manual_seed(0)
    config = GPTConfig(**SMALL, moe_layers=(0,), moe_experts=experts, moe_top_k=top_k, mlp_width=12)
    moe = MoE(config).double()
    x = torch.randn(N, 16, dtype=torch.float64, requires_grad=True)
    dy = torch.randn(N, 16, dtype=torch.float64)
    results = []
    for function in (moe, lambda x: every_expert(moe, x)):
        y = function(x)
        results.append([y, *torch.autograd.grad(y, (x, *moe.parameters()), dy)])
    torch.testing.assert_close(*results)


def test_balance_is_1_where_experts_are_used_alike_and_more_where_not():
    moe = MoE(GPTConfig(**SMALL, moe_layers=(0,), moe_experts=16, moe_top_k=2))
    with torch.no_grad():
        moe.router.weight.copy_(20 * torch.eye(16))
        x = torch.eye(16) + 0.5 * torch.eye(16).roll(1, dims=0)  # each token has two experts, each expert two
        moe(x)
        assert math.isclose(moe.balance.item(), 1.0, rel_tol=1e-5)
        moe(x[:1].expand(9, 16))
        assert moe.balance > 7, "half of the tokens' choices fall on the likeliest of 16"


def test_balance_moves_the_router_and_not_the_loss():
    """So that training losses can be compared, and a micro-batch's share is as that of the loss."""
    losses, grads = [], []
    for weight in (0.0, 0.5):
        model = make_model(moe_layers=(1,), moe_balance=weight).train()
        loss = model(tokens(2, 9), tokens(2, 9, seed=2))[1]
        loss.backward()
        losses.append(loss.item())
        grads.append(model.blocks[1].mlp.router.weight.grad)
        balance = model.blocks[1].mlp.balance
    assert losses[0] == losses[1]
    model.zero_grad()
    model(tokens(2, 9), tokens(2, 9, seed=2))
    (0.5 * model.blocks[1].mlp.balance).backward()
    torch.testing.assert_close(grads[1] - grads[0], model.blocks[1].mlp.router.weight.grad)
    assert balance > 1


def test_dropout_is_of_training_only():
    model = make_model(mem_layers=(1,), dropout=0.5)
    idx = tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


@pytest.mark.parametrize(
    "wrong, message",
    [
        (dict(mem_layers=(3,)), "no layer 3, only 0 to 2"),
        (dict(mem_layers=(-1,)), "no layer -1"),
        (dict(mem_layers=(1, 1)), "twice"),
        (dict(mem_layers=(1,), mem_knn=9), "mem_knn=9 must be at most"),
        (dict(mem_layers=(1,), mem_key_dim=7), "even"),
        (dict(n_embd=15), "multiple of 2 [*] n_head"),
        (dict(n_embd=14), "multiple of 2 [*] n_head"),
        (dict(n_layer=0), "n_layer=0 must be at least 1"),
        (dict(dropout=1.0), "below 1"),
        (dict(mlp_width=-1), "mlp_width=-1 must not be negative"),
        (dict(moe_layers=(3,)), "moe_layers: there is no layer 3"),
        (dict(moe_layers=(1,), mem_layers=(1,)), "share a layer"),
        (dict(moe_layers=(1,), moe_experts=1), "moe_top_k=2 must be at most moe_experts=1"),
        (dict(moe_layers=(1,), mlp_width=7), "must divide an MLP's 7 hidden units"),
        (dict(moe_balance=-1.0), "moe_balance=-1.0 must not be negative"),
        (dict(mem_layers=(1,), mem_kind="peer", mem_mode="add"), "no output projection"),
    ],
)
def test_config_refuses_what_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**SMALL | wrong)
