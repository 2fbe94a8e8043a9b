"""model.py against torch's own Transformer, against brute force, and against itself without the cache."""

import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from evaluate import record_reads
from model import GPT, GPTConfig, eval_mode
from pool import PoolOptimizer, ValuePool

SMALL = dict(vocab_size=50, block_size=16, n_layer=3, n_head=2, n_embd=16,
             mem_num_keys=8, mem_heads=2, mem_knn=4, mem_key_dim=8)


def make_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = GPT(GPTConfig(**SMALL | changes))
    with torch.no_grad():  # far from the initialisation, so that every part shows in the output
        for p in model.parameters():
            p.add_(0.3 * torch.randn_like(p))
    return model.double().eval()


def tokens(*shape, seed=1):
    return torch.randint(50, shape, generator=torch.Generator().manual_seed(seed))


def optimizers_of(model, **options):
    return model.optimizers(1e-2, 1e-1, 0.1, (0.9, 0.99), **options)


QUERIES = ["state", "shifted", "tokens"]
KINDS = [
    {},
    *(dict(mem_layers=(1, 2), mem_query=query) for query in QUERIES),
    dict(mem_layers=(0, 1, 2), mem_kind="peer", mem_query="shifted"),
    dict(mem_layers=(0, 2), mem_kind="hash"),
    dict(moe_layers=(0, 2), moe_experts=4),
]

# --- the function -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("scaled, scale", [(True, 4), (False, 1)])  # the root of the width 16
def test_without_memory_and_positions_a_gpt_equals_torch_s_transformer(monkeypatch, scaled, scale):
    monkeypatch.setattr("model.rotate", lambda x, cos, sin: x)
    model = make_model(scale_embeddings=scaled)
    layer = nn.TransformerEncoderLayer(d_model=16, nhead=2, dim_feedforward=64, dropout=0.0, batch_first=True,
                                       norm_first=True, activation=lambda x: F.gelu(x, approximate="tanh"))
    encoder = nn.TransformerEncoder(layer, 3, norm=nn.LayerNorm(16), enable_nested_tensor=False)
    encoder = encoder.double().eval()
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
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    hidden = encoder(scale * ours["wte.weight"][idx], mask=mask)
    logits, loss, _ = model(idx, targets)
    torch.testing.assert_close(logits, hidden @ ours["wte.weight"].T)
    expected = F.cross_entropy((hidden @ ours["wte.weight"].T).transpose(1, 2), targets)
    torch.testing.assert_close(loss, expected)
    assert not any("memory" in name or "pool" in name for name in ours)


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind):
    model = make_model(**kind)
    idx = tokens(1, 12)
    before = model(idx, idx)[0]
    idx[0, 7] = (idx[0, 7] + 1) % 50
    after = model(idx, idx)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6, "tokens from 7 on see the change"


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


@pytest.mark.parametrize("kind", KINDS)
def test_past_has_one_tuple_per_block(kind):
    """Keys, values, and what the next token's query takes from this one, or None."""
    model = make_model(**kind)
    past = model(tokens(3, 5))[2]
    past = model(tokens(3, 2, seed=2), past=past)[2]
    assert len(past) == 3
    for block, (keys, values, previous) in zip(model.blocks, past, strict=True):
        assert keys.shape == values.shape == (3, 2, 7, 8)
        uses_previous = kind.get("mem_kind") == "hash" or kind.get("mem_query") in ("shifted", "tokens")
        assert (previous is not None) == (block.memory is not None and uses_previous)
        assert previous is None or previous.shape[:2] == (3, 1)


def test_targets_of_minus_1_ask_for_nothing():
    model = make_model()
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    targets[0, 3:] = targets[1, :2] = -1
    logits, loss, _ = model(idx, targets)
    asked = targets != -1
    torch.testing.assert_close(loss, F.cross_entropy(logits[asked], targets[asked]))


def test_a_context_that_is_too_long_is_refused():
    model = make_model()
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(tokens(1, 17))
    past = model(tokens(1, 10))[2]
    with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
        model(tokens(1, 7), past=past)


@pytest.mark.parametrize("C", [14, 64])
def test_a_new_model_s_projections_and_logits_have_size_1_whatever_its_width(C):
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


def test_attention_depends_on_how_far_apart_tokens_are_and_not_on_where_they_are():
    """Scores from complex numbers: the distance between a query and a key is the angle between them."""
    torch.manual_seed(0)
    model, x = make_model(), torch.randn(9, 16, dtype=torch.float64)  # the angles are float32
    attention = model.blocks[0].attn
    distance = torch.arange(9.0, dtype=torch.float64).unsqueeze(1) - torch.arange(9)
    angle = distance.unsqueeze(2) * 10_000 ** -torch.tensor([0, 2 / 8, 4 / 8, 6 / 8])
    q, k, v = attention.c_attn(x).view(9, 3, 2, 8).unbind(1)  # (T, n_head, width of a head) each
    q, k = (torch.complex(*y.chunk(2, dim=-1)) for y in (q, k))
    scores = torch.einsum("qhd,khd,qkd->hqk", q, k.conj(), torch.polar(torch.ones_like(angle), angle)).real
    scores = (scores / math.sqrt(8)).masked_fill(distance < 0, -torch.inf)
    y = torch.einsum("hqk,khd->qhd", scores.softmax(-1), v).flatten(1)
    model.blocks[0].ln_1, model.wte = nn.Identity(), nn.Embedding.from_pretrained(x)
    results = []
    attention.register_forward_hook(lambda module, args, result: results.append(result[0][0]))
    model(torch.arange(9).unsqueeze(0))
    torch.testing.assert_close(results[0], attention.c_proj(y), rtol=1e-6, atol=1e-6)


def test_positions_keep_the_dtype_of_queries_and_keys():
    with torch.autocast("cpu", torch.bfloat16):
        (keys, values, _), *_ = make_model().float()(tokens(1, 5))[2]
    assert keys.dtype == values.dtype == torch.bfloat16


def test_dropout_happens_in_training_only():
    model = make_model(mem_layers=(1,), dropout=0.5)
    idx = tokens(2, 9)
    assert torch.equal(model(idx)[0], model(idx)[0])
    model.train()
    assert not torch.equal(model(idx)[0], model(idx)[0])


# --- what queries are made from -----------------------------------------------------------------------------

@pytest.mark.parametrize("kind", ["product-key", "peer"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_memory_layer_gets_the_sources_of_its_queries(query, kind):
    """Also where a text comes in parts, as in generation. PEER once ignored mem_query."""
    model, idx = make_model(mem_layers=(1,), mem_query=query, mem_kind=kind), tokens(2, 9)
    calls = []
    model.blocks[1].memory.register_forward_pre_hook(lambda module, args: calls.append(args))
    past = None
    for part in idx.split([4, 1, 4], dim=1):
        past = model(part, past=past)[2]
    assert all(pool is model.pool for _, pool, _, _ in calls)
    if query == "state":
        assert all(left is x and right is x for x, _, left, right in calls)
        return
    x, left, right = (torch.cat([call[i] for call in calls], dim=1) for i in (0, 2, 3))
    expected = x
    if query == "tokens":
        embeddings = model.wte(idx)
        mean, variance = embeddings.mean(-1, keepdim=True), embeddings.var(-1, keepdim=True, correction=0)
        expected = (embeddings - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(left, expected)
    assert torch.equal(right[:, 1:], left[:, :-1]) and not right[:, 0].any()  # the first has none


def slots_read(model, idx):
    """The slots that each token reads in each memory layer: (layers, B, T, H*K)."""
    with record_reads(model.pool) as reads:
        model(idx)
    return torch.stack([indices.view(*idx.shape, -1) for indices, _ in reads])


@pytest.mark.parametrize("kind", [dict(mem_query=query) for query in QUERIES] + [dict(mem_kind="hash")])
def test_with_tokens_and_hash_this_and_the_previous_token_alone_decide_which_slots_are_read(kind):
    """Two texts that have two neighbouring tokens in common, at different places."""
    model = make_model(mem_layers=(0, 2), **kind)
    one, two = tokens(1, 12), tokens(1, 14, seed=2)
    two[0, 9:11] = one[0, 4:6]
    here, there = slots_read(model, one)[:, 0, 5], slots_read(model, two)[:, 0, 10]
    by_tokens_alone = kind in (dict(mem_query="tokens"), dict(mem_kind="hash"))
    for layer in range(2):
        assert torch.equal(here[layer], there[layer]) == by_tokens_alone, layer
    if by_tokens_alone:  # but they do depend on both of them
        for place in (4, 5):
            other = one.clone()
            other[0, place] = (other[0, place] + 1) % 50
            assert not torch.equal(slots_read(model, other)[0, 0, 5], here[0])


# --- generation ---------------------------------------------------------------------------------------------

def naive_generate(model, idx, steps, temperature, top_k, seed):
    """nanoGPT's way, without a cache: the whole window is computed again for each token."""
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
@pytest.mark.parametrize("kind", [dict(mem_query=query) for query in QUERIES] + [dict(mem_kind="hash")])
def test_generate_equals_the_naive_way_also_past_the_block_size(temperature, top_k, prompt, steps, kind):
    model = make_model(mem_layers=(0, 1), **kind)
    idx = tokens(3, prompt)
    ours = model.generate(idx, steps, temperature, top_k, seed=3)
    assert torch.equal(ours, naive_generate(model, idx, steps, temperature, top_k, seed=3))


def test_generate_with_a_seed_repeats_and_top_k_1_is_greedy():
    model = make_model(mem_layers=(1,))
    idx = tokens(2, 4)
    assert torch.equal(model.generate(idx, 9, seed=5), model.generate(idx, 9, seed=5))
    assert not torch.equal(model.generate(idx, 9, seed=5), model.generate(idx, 9, seed=6))
    assert torch.equal(model.generate(idx, 9, top_k=1), model.generate(idx, 9, temperature=0))
    assert torch.equal(model.generate(idx, 9, seed=5, top_k=1000), model.generate(idx, 9, seed=5))


def test_generate_stops_when_every_row_has_stopped():
    model = make_model()
    idx = tokens(2, 4)
    free = model.generate(idx, 12, temperature=0)
    stop = free[0, 6].item()
    stopped = model.generate(idx[:1], 12, temperature=0, stop=stop)
    assert stopped.size(1) == 5 + (free[0, 4:] == stop).nonzero()[0].item()
    assert torch.equal(stopped, free[:1, : stopped.size(1)])
    never = next(token for token in range(50) if token not in free[1, 4:])  # not in the second row
    assert torch.equal(model.generate(idx, 12, temperature=0, stop=never), free)


def test_generate_of_no_tokens_returns_the_prompt_and_leaves_it_alone():
    model = make_model(mem_layers=(1,))
    idx = tokens(2, 4)
    before = idx.clone()
    assert torch.equal(model.generate(idx, 0), idx)
    assert torch.equal(model.generate(idx, 3)[:, :4], before) and torch.equal(idx, before)


def modes(model):
    return {name: module.training for name, module in model.named_modules()}


@pytest.mark.parametrize("fails", [False, True])
def test_generate_leaves_the_mode_of_every_submodule_as_it_was(fails):
    """A part in evaluation mode, as people freeze it, stays so; also if something goes wrong."""
    model = make_model(mem_layers=(1,), dropout=0.5).train()
    model.blocks[1].attn.eval()
    before, during = modes(model), []
    assert len(set(before.values())) == 2

    def look(module, args):
        during.append(modes(model))
        if fails:
            raise KeyboardInterrupt

    model.blocks[2].register_forward_pre_hook(look)
    if fails:
        with pytest.raises(KeyboardInterrupt):
            model.generate(tokens(2, 4), 3)
    else:
        model.generate(tokens(2, 4), 3)
    assert modes(model) == before and not any(any(mode.values()) for mode in during) and during
    assert not model.pool.usage.total_weight.any(), "generation does not count as use"


def test_eval_mode_restores_every_mode():
    model = make_model(mem_layers=(1,)).train()
    model.blocks[0].eval()
    before = modes(model)
    with pytest.raises(RuntimeError, match="boom"), eval_mode(model):
        assert not any(modes(model).values())
        raise RuntimeError("boom")
    assert modes(model) == before


# --- the pool, gradients and optimisers ---------------------------------------------------------------------

def test_layers_share_one_pool_and_models_share_nothing():
    """Class-level state would be shared by all models of a process."""
    a, b = make_model(mem_layers=(0, 2)), make_model(mem_layers=(0, 2))
    assert sum("pool" in name for name in a.state_dict()) == 1
    mine = {p.untyped_storage().data_ptr() for p in [*a.parameters(), *a.buffers()]}
    assert mine.isdisjoint(p.untyped_storage().data_ptr() for p in [*b.parameters(), *b.buffers()])
    before = copy.deepcopy(b.state_dict())
    idx = tokens(2, 8)
    optimizers = optimizers_of(a)
    a.train()
    a(idx, idx)[1].backward()
    assert len(a.pool.values.grad.reads) == 2 and b.pool.values.grad is None
    for optimizer in optimizers:
        optimizer.step()
    assert all(torch.equal(before[name], value) for name, value in b.state_dict().items())
    assert not torch.equal(a.pool.values, b.pool.values)
    assert a.pool.usage.summary()[0] > 0 and b.pool.usage.summary()[0] == 0


def test_a_gpt_without_memory_has_no_pool():
    model = make_model()
    assert model.pool is None and len(optimizers_of(model)) == 1
    assert not any("memory" in name or "pool" in name for name in model.state_dict())


@pytest.mark.parametrize("kind", ["product-key", "peer"])
def test_pool_class_makes_the_pool(kind):
    calls = []

    def pool_class(*sizes, **options):
        calls.append((sizes, options))
        return ValuePool(*sizes, **options)

    config = GPTConfig(**SMALL, mem_layers=(1,), mem_kind=kind, mem_dtype="bfloat16", kernel="torch")
    model = GPT(config, pool_class)
    rows = 128 if kind == "peer" else 64
    assert calls == [((rows, 16), dict(dtype=torch.bfloat16, kernel="torch"))]
    assert model.pool.values.dtype == torch.bfloat16 and model.pool.values.shape == (rows, 16)
    model(tokens(2, 9), tokens(2, 9))[1].backward()
    pool_optimizer = optimizers_of(model, stochastic_rounding=True)[1]
    assert pool_optimizer.param_groups[0]["kernel"] == "torch"
    pool_optimizer.step()


@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
def test_use_is_the_weight_that_each_slot_got(kind):
    """Also for PEER, whose slots are two rows each."""
    model = make_model(mem_layers=(1,), mem_kind=kind).train()
    calls = []
    model.pool.register_forward_hook(lambda pool, args, y: calls.append(args))
    model(tokens(2, 9))
    (indices, weights), = calls
    total = torch.zeros_like(model.pool.usage.total_weight)
    assert len(total) == model.config.mem_num_keys**2
    for index, weight in zip(indices.flatten(), weights.flatten(), strict=True):
        total[index] += weight.detach().abs()
    torch.testing.assert_close(model.pool.usage.total_weight, total)


@pytest.mark.parametrize("changes", [
    *KINDS,
    dict(mem_layers=(0,), mem_mode="add"),
    dict(mem_layers=(0,), moe_layers=(0,), mem_mode="add"),
    dict(mem_layers=(1,), mem_swilu=False, mem_qk_norm=False, bias=False),
    dict(mem_layers=(1,), mem_kind="hash", mem_swilu=False, bias=False),
])
def test_every_parameter_is_in_one_group_and_every_dense_one_gets_a_gradient(changes):
    model = make_model(**changes)
    optimizers = optimizers_of(model)
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    model(tokens(2, 9), tokens(2, 9, seed=2))[1].backward()
    dense = {name: p for name, p in model.named_parameters() if name != "pool.values"}
    assert list(map(id, model.dense_parameters())) == list(map(id, dense.values()))
    for name, p in dense.items():
        assert p.grad is not None and p.grad.abs().max() > 0, name
    decayed, others = optimizers[0].param_groups
    assert all(p.dim() < 2 for p in others["params"]) and others["weight_decay"] == 0
    assert all(p.dim() >= 2 for p in decayed["params"]) and decayed["weight_decay"] == 0.1
    if model.pool is not None:
        assert isinstance(optimizers[1], PoolOptimizer) and optimizers[1].param_groups[0]["lr"] == 1e-1
        assert model.pool.values.grad.to_dense().any()


@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
def test_the_gradient_of_the_pool_equals_finite_differences(kind):
    model = make_model(mem_layers=(0, 2), mem_kind=kind)
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    model(idx, targets)[1].backward()
    values = model.pool.values
    torch.manual_seed(0)
    direction, losses = 1e-5 * torch.randn_like(values), []
    with torch.no_grad():
        for sign in (1, -2):
            values.add_(direction, alpha=sign)
            losses.append(model(idx, targets)[1])
    expected = (losses[0] - losses[1]) / 2
    torch.testing.assert_close((values.grad.to_dense() * direction).sum(), expected, rtol=1e-4, atol=0)


def test_a_frozen_pool_stays_and_the_rest_learns():
    model = make_model(mem_layers=(0, 2)).train()
    model.pool.values.requires_grad_(False)
    optimizers = optimizers_of(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    model(tokens(2, 9), tokens(2, 9, seed=2))[1].backward()
    assert model.pool.values.grad is None
    for optimizer in optimizers:
        optimizer.step()
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == (name == "pool.values"), name


def test_a_frozen_block_is_in_no_group_and_the_rest_learns():
    model = make_model(mem_layers=(0, 2)).train()
    model.blocks[0].requires_grad_(False)
    optimizers = optimizers_of(model)
    grouped = {id(p) for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]}
    assert grouped.isdisjoint(map(id, model.blocks[0].parameters()))
    model(tokens(2, 9), tokens(2, 9, seed=2))[1].backward()
    assert len(model.pool.values.grad.reads) == 2, "the frozen layer's reads count too"
    for optimizer in optimizers:
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_after_a_training_step_is_the_same_model(kind):
    model = make_model(**kind).train()
    optimizers = optimizers_of(model)
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    model(idx, targets)[1].backward()
    for optimizer in optimizers:
        optimizer.step()
    expected = model.eval()(idx, targets)[1]
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(idx, targets)[1], expected)
        assert model.pool is None or other.pool.values.grad is None
        other.train()(idx, targets)[1].backward()
        for optimizer in optimizers_of(other):
            optimizer.step()
    assert torch.equal(model(idx, targets)[1], expected), "a copy that learns changes nothing else"


def test_averaged_model_averages_everything():
    model = make_model(mem_layers=(0, 2)).train()
    averaged, optimizers, snapshots = torch.optim.swa_utils.AveragedModel(model), optimizers_of(model), []
    for seed in range(3):
        for optimizer in optimizers:
            optimizer.zero_grad()
        model(tokens(2, 9, seed=seed), tokens(2, 9, seed=9))[1].backward()
        for optimizer in optimizers:
            optimizer.step()
        averaged.update_parameters(model)
        snapshots.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, p in averaged.module.named_parameters():
        torch.testing.assert_close(p.detach(), sum(snapshot[name] for snapshot in snapshots) / 3)
    averaged.module.eval()(tokens(2, 9))


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_a_compiled_model_has_the_gradients_of_an_eager_one(backend):
    """Two layers on one pool: Inductor could reuse the memory of dy, which a read keeps."""
    # make_model's biases matter: without them the first token's right half-query is zero, and all slots tie
    model = make_model(mem_layers=(0, 1), mem_num_keys=64, n_layer=2).float().train()
    idx, targets = tokens(2, 9), tokens(2, 9, seed=2)
    loss = model(idx, targets)[1]
    loss.backward()
    eager, dense = model.pool.values.grad.to_dense(), [p.grad.clone() for p in model.dense_parameters()]
    compiled = torch.compile(model, backend=backend)
    for _ in range(2):
        model.zero_grad()
        compiled_loss = compiled(idx, targets)[1]
        compiled_loss.backward()
        torch.testing.assert_close(compiled_loss, loss)
        assert len(model.pool.values.grad.reads) == 2
        torch.testing.assert_close(model.pool.values.grad.to_dense(), eager, rtol=1e-3, atol=1e-6)
        for p, expected in zip(model.dense_parameters(), dense, strict=True):
            torch.testing.assert_close(p.grad, expected, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("query", QUERIES)
def test_add_mode_starts_as_the_function_that_the_model_was(query):
    torch.manual_seed(0)
    dense = GPT(GPTConfig(**SMALL))
    added = GPT(GPTConfig(**SMALL, mem_layers=(0, 2), mem_mode="add", mem_query=query))
    missing, unexpected = added.load_state_dict(dense.state_dict(), strict=False)
    assert unexpected == [] and all("memory" in name or "pool" in name for name in missing)
    idx = tokens(2, 9)
    torch.testing.assert_close(added(idx, idx)[0], dense(idx, idx)[0], rtol=0, atol=0)


# --- counts -------------------------------------------------------------------------------------------------

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
    model.pool.values.requires_grad_(False)
    assert model.count_parameters() == counts
    peer = make_model(mem_layers=(1, 2), mem_kind="peer").count_parameters()
    assert peer["memory"] == 2 * S * S * C and peer["active"] == peer["dense"] + 2 * 2 * H * 4 * C
    moe = make_model(moe_layers=(1,), moe_experts=8, moe_top_k=2).count_parameters()
    assert moe["dense"] - moe["active"] == 6 * 2 * C * 2 * C, "six of eight experts are idle"


@pytest.mark.parametrize("kind", [*KINDS, dict(mem_layers=(1,), mem_swilu=False, mlp_width=24)])
def test_macs_are_those_that_torch_counts(kind):
    """torch counts matrix products; on the CPU it counts neither attention nor reads of the pool."""
    model = make_model(**kind)
    c = model.config
    with FlopCounterMode(display=False) as counter:
        model(tokens(2, 16), tokens(2, 16))
    rows_read = len(c.mem_layers) * c.mem_heads * c.mem_knn * (2 if c.mem_kind == "peer" else 1)
    attention = c.n_layer * c.n_embd * 2 * sum(range(1, 17)) / 16  # both products, over what a token sees
    exact = counter.get_total_flops() / 2 / (2 * 16) + rows_read * c.n_embd + attention
    assert math.isclose(model.macs_per_token(), exact, rel_tol=0.01)


# --- configurations that cannot be --------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    (dict(mem_layers=(3,)), "mem_layers=3 must be different numbers of layers, from 0 to 2"),
    (dict(mem_layers=(-1,)), "mem_layers=-1 must"),
    (dict(mem_layers=(1, 1)), "mem_layers=1,1 must be different"),
    (dict(mem_layers=(1,), mem_knn=9), "mem_knn=9 must be between 1 and num_keys=8"),
    (dict(mem_layers=(1,), mem_key_dim=7), "mem_key_dim=7 must be even"),
    (dict(mem_layers=(1,), mem_heads=0), "mem_heads=0 must be"),
    (dict(mem_layers=(1,), mem_num_keys=50_000), "mem_num_keys=50000: the pool's num_values=2500000000 must"),
    (dict(mem_layers=(1,), mem_num_keys=40_000, mem_kind="peer"), "mem_num_keys=40000: the pool's"),
    (dict(mem_layers=(1,), mem_knn=0, mem_kind="hash"), "mem_heads=2, knn=0 and num_values=64 must"),
    (dict(n_embd=15), "multiple of 2 [*] n_head"),
    (dict(n_embd=14), "multiple of 2 [*] n_head"),
    (dict(n_layer=0), "n_layer=0 must be at least 1"),
    (dict(dropout=1.5), "dropout"),
    (dict(mlp_width=-1), "mlp_width=-1 must not be negative"),
    (dict(moe_layers=(3,)), "moe_layers=3 must"),
    (dict(moe_layers=(1,), mem_layers=(1,)), "moe_layers=1 is also one of mem_layers"),
    (dict(moe_layers=(1,), moe_experts=1), "moe_top_k=2 must be between 1 and experts=1"),
    (dict(moe_layers=(1,), mlp_width=7), "moe_top_k=2 must divide the 7 hidden units"),
    (dict(moe_balance=-1.0), "moe_balance=-1.0 must not be negative"),
    (dict(mem_layers=(1,), mem_kind="peer", mem_mode="add"), "mem_kind=peer needs mem_mode=replace"),
    (dict(mem_mode="x"), "mem_mode=x must be one of replace, add"),
    (dict(mem_kind="x"), "mem_kind=x must be one of product-key, peer, hash"),
    (dict(mem_query="x"), "mem_query=x must be one of state, shifted, tokens"),
    (dict(mem_dtype="float16"), "mem_dtype=float16 must be one of float32, bfloat16"),
    (dict(kernel="cuda"), "kernel=cuda must be one of auto, triton, torch"),
])
def test_config_refuses_what_cannot_be(wrong, message):
    """Each message begins with the name of an option, which the command line shows."""
    with pytest.raises(ValueError, match=message) as error, torch.device("meta"):
        GPT(GPTConfig(**SMALL | wrong))
    assert re.match(r"\w+", str(error.value))[0] in vars(GPTConfig())


@pytest.mark.parametrize("sizes", [
    dict(mem_num_keys=40_000), dict(mem_kind="hash", mem_key_dim=7), dict(mem_kind="hash", mem_knn=9)])
def test_a_limit_of_one_kind_of_memory_does_not_stop_another(sizes):
    """PEER's pool has twice as many rows, and a hash has neither queries nor keys."""
    with torch.device("meta"):
        assert GPT(GPTConfig(**SMALL | dict(mem_layers=(1,)) | sizes)).macs_per_token() > 0


def test_a_model_without_a_vocabulary_is_refused():
    with pytest.raises(ValueError, match="vocab_size must be at least 1"):
        GPT(GPTConfig())
