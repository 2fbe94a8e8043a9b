"""model.py against torch's own Transformer, against brute force, and against itself without the cache."""

import contextlib
import copy
import math
import pickle
import re

import pytest
import torch
import torch.nn as nn
from test_kernel import DEVICE
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from model import GPT, GPTConfig
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


def loss_of(model, seed=1):
    idx, targets = tokens(2, 9, seed=seed), tokens(2, 9, seed=9)
    return model(idx.to(model.wte.weight.device), targets.to(model.wte.weight.device))[1]


def train_step(model, optimizers, seed=1):
    for optimizer in optimizers:
        optimizer.zero_grad()
    loss_of(model, seed).backward()
    for optimizer in optimizers:
        optimizer.step()


def optimizers_of(model, **options):
    return model.optimizers(1e-2, 1e-1, 0.1, (0.9, 0.99), **options)


QUERIES = ["state", "shifted", "tokens"]
KINDS = [
    {},
    *(dict(mem_layers=(1, 2), mem_query=query) for query in QUERIES),
    dict(mem_layers=(0, 1, 2), mem_kind="peer", mem_query="shifted"),
    dict(mem_layers=(0, 2), mem_kind="hash"),
    dict(moe_layers=(0, 2), moe_experts=4),
    dict(positions="learned", mem_layers=(1,), mem_query="tokens"),
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
    names = {"self_attn.in_proj_": "attn.c_attn.", "self_attn.out_proj.": "attn.c_proj.",
             "linear1.": "mlp.c_fc.", "linear2.": "mlp.c_proj.", "norm1.": "ln_1.", "norm2.": "ln_2."}
    ours = model.state_dict()
    theirs = {f"layers.{i}.{a}{kind}": ours[f"blocks.{i}.{b}{kind}"]
              for i in range(3) for a, b in names.items() for kind in ("weight", "bias")}
    encoder.load_state_dict(theirs | {"norm.weight": ours["ln_f.weight"], "norm.bias": ours["ln_f.bias"]})
    idx, targets = tokens(2, 11), tokens(2, 11, seed=2)
    mask = nn.Transformer.generate_square_subsequent_mask(11, dtype=torch.float64)
    hidden = encoder(scale * ours["wte.weight"][idx], mask=mask)
    logits, loss, _ = model(idx, targets)
    torch.testing.assert_close(logits, hidden @ ours["wte.weight"].T)
    expected = F.cross_entropy((hidden @ ours["wte.weight"].T).transpose(1, 2), targets)
    torch.testing.assert_close(loss, expected)
    assert model.pool is None and len(optimizers_of(model)) == 1


@pytest.mark.parametrize("kind", KINDS)
def test_no_token_sees_a_later_one(kind):
    model = make_model(**kind)
    idx = tokens(1, 12)
    before = model(idx, idx)[0]
    idx[0, 7] = (idx[0, 7] + 1) % 50
    after = model(idx, idx)[0]
    torch.testing.assert_close(before[:, :7], after[:, :7], rtol=0, atol=1e-12)
    assert (before[:, 7:] - after[:, 7:]).abs().amax(-1).min() > 1e-6, "tokens from 7 on see the change"


@pytest.mark.parametrize("parts", [[1] * 12, [5, 1, 1, 5], [1, 11]])
@pytest.mark.parametrize("kind", KINDS)
def test_cache_changes_no_logits(parts, kind):
    """The cache has keys, values, and what the next token's query takes from this one, or None."""
    model = make_model(**kind)
    idx = tokens(3, 12)
    whole = model(idx, idx)[0]
    past, at = None, 0
    for part in parts:
        logits, _, past = model(idx[:, at : at + part], past=past)
        at += part
        torch.testing.assert_close(logits[:, 0], whole[:, at - 1])
    for block, (keys, values, previous) in zip(model.blocks, past, strict=True):
        assert keys.shape == values.shape == (3, 2, 12, 8)
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
    for length, past in ((17, None), (7, model(tokens(1, 10))[2])):
        with pytest.raises(ValueError, match="17 tokens do not fit block_size=16"):
            model(tokens(1, length), past=past)


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

@pytest.mark.parametrize("positions", ["rotary", "learned"])
@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
@pytest.mark.parametrize("query", QUERIES)
def test_a_memory_layer_gets_the_sources_of_its_queries(query, kind, positions):
    """
    Also where a text comes in parts, as in generation. PEER once ignored mem_query. A hash always gets ids,
    and `tokens` has no positions.
    """
    model = make_model(mem_layers=(1,), mem_query=query, mem_kind=kind, positions=positions)
    calls, idx = [], tokens(2, 9)
    model.blocks[1].memory.register_forward_pre_hook(lambda module, args: calls.append(args))
    past = None
    for part in idx.split([4, 1, 4], dim=1):
        past = model(part, past=past)[2]
    assert all(pool is model.pool for _, pool, _, _ in calls)
    if query == "state" and kind != "hash":
        assert all(left is x and right is x for x, _, left, right in calls)
        return
    x, left, right = (torch.cat([call[i] for call in calls], dim=1) for i in (0, 2, 3))
    expected = idx if kind == "hash" else x
    if query == "tokens" and kind != "hash":
        embeddings = model.wte(idx)
        mean, variance = embeddings.mean(-1, keepdim=True), embeddings.var(-1, keepdim=True, correction=0)
        expected = (embeddings - mean) / (variance + 1e-5).sqrt()
    torch.testing.assert_close(left, expected)
    assert torch.equal(right[:, 1:], left[:, :-1]) and not right[:, 0].any()  # the first has none


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


def test_generate_takes_a_top_k_above_the_vocabulary_and_no_new_tokens():
    model, idx = make_model(mem_layers=(1,)), tokens(2, 4)
    assert torch.equal(model.generate(idx, 9, seed=5, top_k=1000), model.generate(idx, 9, seed=5))
    assert torch.equal(model.generate(idx, 0), idx)


@pytest.mark.parametrize("temperature, top_k", [(0, None), (1.0, None), (0.7, 5)])
@pytest.mark.parametrize("prompt, steps", [(9, 14), (16, 3), (30, 4)])
@pytest.mark.parametrize("kind", [*(dict(mem_query=query) for query in QUERIES), dict(mem_kind="hash"),
                                  dict(positions="learned")])
def test_generate_equals_the_naive_way_also_past_the_block_size(temperature, top_k, prompt, steps, kind):
    """Tokens are compared, not logits: the cache may change the last bit of a logit."""
    model = make_model(mem_layers=(0, 1), **kind)
    idx = tokens(3, prompt)
    ours = model.generate(idx, steps, temperature, top_k, seed=3)
    assert torch.equal(ours, naive_generate(model, idx, steps, temperature, top_k, seed=3))


def test_generate_stops_when_every_row_has_stopped():
    model = make_model()
    idx = tokens(1, 4).repeat(2, 1)
    idx[1, 0] = (idx[1, 0] + 1) % 50  # the texts differ a little, and share some of their later tokens
    free = model.generate(idx, 12, temperature=0)
    sizes = []
    for stop in free[:, 4:].unique():
        first = [(row == stop).nonzero().flatten().tolist() or [11] for row in free[:, 4:]]
        stopped = model.generate(idx, 12, temperature=0, stop=[stop.item(), 50])
        assert torch.equal(stopped, free[:, : 5 + max(places[0] for places in first)])
        sizes.append(stopped.size(1))
    last = free[:, 6].tolist()  # each row stops at a token of its own
    first = [row.index(next(token for token in row if token in last)) for row in free[:, 4:].tolist()]
    assert model.generate(idx, 12, temperature=0, stop=set(last)).size(1) == 5 + max(first)
    assert torch.equal(model.generate(idx, 12, temperature=0, stop=[]), free), "nothing stops it"
    assert min(sizes) < 16 == max(sizes), "with one token both stop early, with another one row never does"


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
    with pytest.raises(KeyboardInterrupt) if fails else contextlib.nullcontext():
        model.generate(tokens(2, 4), 3)
    assert modes(model) == before and not any(any(mode.values()) for mode in during) and during
    assert model.pool.usage.summary() == (0, 0), "generation does not count as use"


# --- the pool, gradients and optimisers ---------------------------------------------------------------------

def test_layers_share_one_pool_and_models_share_nothing():
    """Class-level state would be shared by all models of a process."""
    a, b = make_model(mem_layers=(0, 2)).train(), make_model(mem_layers=(0, 2))
    assert sum("pool" in name for name in a.state_dict()) == 1
    before = copy.deepcopy([*b.parameters(), *b.buffers()])
    train_step(a, optimizers_of(a))
    assert len(a.pool.values.grad.reads) == 2 and b.pool.values.grad is None
    models = ([*model.parameters(), *model.buffers()] for model in (a, b))
    for ours, theirs, old in zip(*models, before, strict=True):
        assert torch.equal(theirs, old) and not torch.equal(ours, old)


@pytest.mark.parametrize("kind, rows", [("product-key", 64), ("peer", 128), ("hash", 64)])
def test_pool_class_makes_the_pool(kind, rows):
    """And each of the options reaches it, or its optimiser."""
    calls = []

    def pool_class(*sizes, **options):
        calls.append((sizes, options))
        return ValuePool(*sizes, **options)

    config = GPTConfig(**SMALL, mem_layers=(1,), mem_kind=kind, mem_dtype="bfloat16", kernel="torch")
    model = GPT(config, pool_class)
    assert calls == [((rows, 16), dict(dtype=torch.bfloat16, kernel="torch"))]
    optimizers = optimizers_of(model, stochastic_rounding=True)
    assert optimizers[1].param_groups[0]["kernel"] == "torch"
    train_step(model, optimizers)


@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
def test_use_is_the_weight_that_each_slot_got(kind):
    """Also for PEER, whose slots are two rows each."""
    model = make_model(mem_layers=(1,), mem_kind=kind).train()
    calls = []
    model.pool.register_forward_hook(lambda pool, args, y: calls.append(args))
    model(tokens(2, 9))
    (indices, weights), = calls
    usage = model.pool.usage.total_weight
    assert len(usage) == model.config.mem_num_keys**2
    total = torch.bincount(indices.flatten(), weights.detach().abs().flatten(), minlength=len(usage))
    torch.testing.assert_close(usage, total.to(usage.dtype))


@pytest.mark.parametrize("changes", [
    *KINDS,
    dict(mem_layers=(0,), moe_layers=(0,), mem_mode="add"),
    dict(mem_layers=(1,), mem_swilu=False, mem_qk_norm=False, bias=False),
    dict(mem_layers=(1,), mem_kind="hash", mem_swilu=False, bias=False),
])
def test_every_parameter_is_in_one_group_and_every_dense_one_gets_a_gradient(changes):
    model = make_model(**changes)
    optimizers = optimizers_of(model)
    grouped = [p for optimizer in optimizers for group in optimizer.param_groups for p in group["params"]]
    assert sorted(map(id, grouped)) == sorted(map(id, model.parameters()))
    loss_of(model).backward()
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
    loss_of(model).backward()
    values = model.pool.values
    torch.manual_seed(0)
    direction, losses = 1e-5 * torch.randn_like(values), []
    with torch.no_grad():
        for sign in (1, -2):
            values.add_(direction, alpha=sign)
            losses.append(loss_of(model))
    expected = (losses[0] - losses[1]) / 2
    torch.testing.assert_close((values.grad.to_dense() * direction).sum(), expected, rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind, reads", [("product-key", 2), ("peer", 4), ("hash", 2)])
@pytest.mark.parametrize("frozen", ["pool", "blocks.0"])
def test_what_is_frozen_stays_and_the_rest_learns(frozen, kind, reads):
    """The reads of a frozen layer count too: the pool learns from them."""
    model = make_model(mem_layers=(0, 2), mem_kind=kind).train()
    model.get_submodule(frozen).requires_grad_(False)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    train_step(model, optimizers_of(model))
    assert len(getattr(model.pool.values.grad, "reads", [])) == (0 if frozen == "pool" else reads)
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) == name.startswith(frozen), name


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_after_a_training_step_is_the_same_model(kind):
    """And it shares nothing: when the copy learns, the model and its gradients stay."""
    model = make_model(**kind).train()
    train_step(model, optimizers_of(model))
    expected, reads = loss_of(model.eval()), model.pool and list(model.pool.values.grad.reads)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(loss_of(other), expected)
        assert model.pool is None or other.pool.values.grad is None
        train_step(other.train(), optimizers_of(other))
        assert not torch.equal(loss_of(other.eval()), expected) and torch.equal(loss_of(model), expected)
        assert model.pool is None or model.pool.values.grad.reads == reads


@pytest.mark.parametrize("options", [
    dict(backend="aot_eager"),
    pytest.param(dict(backend="inductor"), marks=pytest.mark.slow),
    pytest.param(dict(mode="reduce-overhead"), marks=pytest.mark.skipif(
        not torch.cuda.is_available(), reason="CUDA graphs need a GPU")),
])
def test_a_compiled_training_step_learns_as_the_eager_one(options):
    """
    With backward and the optimisers inside of what is compiled. Two layers read one pool: Inductor could use
    the memory of dy, which a read keeps, again, and a CUDA graph does, in its next run.
    """
    # make_model's biases matter: without them the first token's right half-query is zero, and all slots tie
    model = make_model(mem_layers=(0, 1), mem_num_keys=64, n_layer=2).float().train().to(DEVICE)
    results = []
    for step in (train_step, torch.compile(train_step, **options)):
        twin = copy.deepcopy(model)
        # steps of SGD are as exact as gradients; Adam makes much of a gradient of almost zero
        optimizers = [torch.optim.SGD(twin.dense_parameters(), lr=0.01),
                      PoolOptimizer(twin.pool.parameters(), lr=1.0, kind="sgd")]
        for seed in range(3):  # a CUDA graph is recorded in the second run
            step(twin, optimizers, seed)
        assert len(twin.pool.values.grad.reads) == 2
        pairs = zip(twin.parameters(), model.parameters(), strict=True)
        results.append([(new - old).detach() for new, old in pairs])
    assert all(change.any() for change in results[0])
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-5)


# --- counts -------------------------------------------------------------------------------------------------

def test_counts():
    model = make_model(mem_layers=(1, 2))
    counts = model.count_parameters()
    C, H, K, S = 16, 2, 4, 8
    assert counts["memory"] == S * S * C
    assert sum(p.numel() for p in model.parameters()) == counts["dense"] + counts["memory"]
    assert counts["active"] == counts["dense"] + 2 * H * K * C
    model.pool.values.requires_grad_(False)
    assert model.count_parameters() == counts
    peer = make_model(mem_layers=(1, 2), mem_kind="peer").count_parameters()
    assert peer["memory"] == 2 * S * S * C and peer["active"] == peer["dense"] + 2 * 2 * H * K * C
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

@pytest.mark.parametrize("message, wrong", [
    ("vocab_size must be at least 1", dict(vocab_size=0)),
    ("mem_layers=3 must be different numbers of layers, from 0 to 2", dict(mem_layers=(3,))),
    ("mem_layers=-1 must", dict(mem_layers=(-1,))),
    ("mem_layers=1,1 must", dict(mem_layers=(1, 1))),
    ("mem_knn=9 must", dict(mem_layers=(1,), mem_knn=9)),
    ("mem_key_dim=7 must", dict(mem_layers=(1,), mem_key_dim=7)),
    ("mem_num_keys=50000: the pool's num_values=25", dict(mem_layers=(1,), mem_num_keys=50_000)),
    ("mem_num_keys=40000: the pool's", dict(mem_layers=(1,), mem_num_keys=40_000, mem_kind="peer")),
    ("mem_knn=0 must be at least 1", dict(mem_layers=(1,), mem_knn=0, mem_kind="hash")),
    ("n_embd=15 must be a multiple of 2 [*] n_head", dict(n_embd=15)),
    ("n_embd=14 must be a multiple of 2 [*] n_head=4", dict(n_embd=14)),
    ("n_embd=15 must be a multiple of n_head=2", dict(n_embd=15, positions="learned")),
    ("n_layer=0 must be at least 1", dict(n_layer=0)),
    ("dropout", dict(dropout=1.5)),
    ("mlp_width=-1 must", dict(mlp_width=-1)),
    ("moe_layers=3 must", dict(moe_layers=(3,))),
    ("moe_layers=1 is also one of mem_layers", dict(moe_layers=(1,), mem_layers=(1,))),
    ("moe_top_k=2 must be between 1 and experts=1", dict(moe_layers=(1,), moe_experts=1)),
    ("moe_top_k=2 must divide the 7 hidden units", dict(moe_layers=(1,), mlp_width=7)),
    ("moe_balance=-1.0 must", dict(moe_balance=-1.0)),
    ("mem_kind=peer needs mem_mode=replace", dict(mem_layers=(1,), mem_kind="peer", mem_mode="add")),
    ("mem_query=x must be one of state, shifted, tokens", dict(mem_query="x")),
    ("mem_dtype=float16 must be one of float32, bfloat16", dict(mem_dtype="float16")),
])
def test_config_refuses_what_cannot_be(message, wrong):
    """Each message begins with the name of an option, which the command line shows."""
    with pytest.raises(ValueError, match=f"^{message}") as error, torch.device("meta"):
        GPT(GPTConfig(**SMALL | wrong))
    assert re.match(r"\w+", str(error.value))[0] in vars(GPTConfig())


@pytest.mark.parametrize("sizes", [dict(mem_key_dim=7), dict(mem_knn=9)])
def test_a_hash_has_neither_the_limits_of_queries_nor_of_keys(sizes):
    make_model(mem_layers=(1,), mem_kind="hash", **sizes)
