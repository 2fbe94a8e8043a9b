"""baselines.py against formulas, Python's integers, autograd, and a mixture that computes every expert."""

import copy
import itertools
import math

import pytest
import torch
from torch.nn import functional as F

from baselines import PEER, HashedMemory, MoE
from memory import MemoryLayer
from model import GPT, GPTConfig
from pool import ValuePool


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


# --- PEER ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("qk_norm, bias", itertools.product([False, True], repeat=2))
def test_peer_equals_its_formula_and_autograd(qk_norm, bias):
    """
    Two layers, one token and one slot at a time, with queries from other sources than x. Also the gradients,
    where both rows of a slot learn.
    """
    torch.manual_seed(0)
    C, S, H, K, D = 8, 6, 2, 3, 4
    peers = [PEER(C, S, H, K, D, qk_norm=qk_norm, bias=bias).double() for _ in range(2)]
    pool = ValuePool(2 * S * S, C).double()
    values = pool.values.detach().clone().requires_grad_()
    x, left, right = (normal(5, C).requires_grad_() for _ in range(3))
    ours = expected = x
    for layer in peers:
        ours = layer(ours, pool, left, right)
        weights, indices = layer.search(expected, left, right)
        tokens = []
        for n in range(len(x)):
            up, down = values[S * S + indices[n]], values[indices[n]]  # (H * K, C) each
            tokens.append((weights[n] * F.gelu(up @ expected[n])) @ down)
        expected = torch.stack(tokens)
    torch.testing.assert_close(ours, expected)
    parameters = [x, left, right, *(p for layer in peers for p in layer.parameters())]
    exact_values, *exact = torch.autograd.grad(expected.square().sum(), (values, *parameters))
    ours.square().sum().backward()
    torch.testing.assert_close([p.grad for p in parameters], exact)
    torch.testing.assert_close(pool.values.grad.to_dense(), exact_values)
    assert len(pool.values.grad.reads) == 4
    assert all(half.any() for half in exact_values.chunk(2))


# --- hashed memory ------------------------------------------------------------------------------------------

VOCABULARY = 50


@pytest.fixture
def pairs():
    """1,000 pairs of neighbouring tokens, all different."""
    return torch.arange(1000) % VOCABULARY, torch.arange(1000) // VOCABULARY


def make_hashed(S=128, H=4, K=16, **options):
    return HashedMemory(8, S * S, H, K, 8, VOCABULARY, **options)


def test_hash_equals_python_s_integers(pairs):
    """Python's integers do not overflow, so the oracle takes the product modulo 2**64 itself."""
    torch.manual_seed(0)
    token, previous = pairs
    for num_values in (1, 49, 128**2, 2**31 - 1):
        layer = HashedMemory(8, num_values, 2, 3, 8, VOCABULARY)
        slots = layer.hash(token, previous)
        assert slots.shape == (1000, 6)
        for n, j in itertools.product((0, 5, 499, 999), range(6)):
            pair = previous[n].item() * VOCABULARY + token[n].item() + 1
            high = (pair * layer.multipliers[j].item() % 2**64) >> 33
            assert slots[n, j] == (high * num_values) >> 31
            assert 0 <= slots[n, j] < num_values


def test_hashes_are_spread_as_random_numbers_are(pairs):
    torch.manual_seed(0)
    S = 128
    slots = make_hashed(S).hash(*pairs)
    # 64,000 random draws of 16,384 slots leave e**-3.9 of the slots unread
    assert abs(1 - len(slots.unique()) / S**2 - math.exp(-64_000 / S**2)) < 0.01
    assert (slots[:-1] == slots[1:]).float().mean() < 10 / S**2, "similar pairs share slots"
    same = [(slots[:, i] == slots[:, j]).float().mean() for i, j in itertools.combinations(range(64), 2)]
    assert max(same) < 0.1, "two heads have the same hash"
    assert (make_hashed(S).hash(*pairs) == slots).float().mean() < 0.05, "two layers have the same hash"


@pytest.mark.parametrize("swilu, bias", itertools.product([False, True], repeat=2))
def test_hashed_memory_equals_its_formula_and_autograd(swilu, bias):
    torch.manual_seed(0)
    S, H, K, V = 6, 2, 3, 10
    layer = HashedMemory(8, S * S, H, K, V, VOCABULARY, swilu=swilu, bias=bias).double()
    pool = ValuePool(S * S, V).double()
    values = pool.values.detach().clone().requires_grad_()
    x, token, previous = normal(2, 4, 8), *torch.randint(VOCABULARY, (2, 2, 4))
    expected = torch.zeros_like(x)
    for b, t in itertools.product(range(2), range(4)):
        slots = layer.hash(token[b, t].view(1), previous[b, t].view(1)).view(H, K)
        weights = layer.score(x[b, t]).view(H, K).softmax(-1)
        y = sum(weights[h, k] * values[slots[h, k]] for h, k in itertools.product(range(H), range(K)))
        if swilu:
            y = y * F.silu(layer.gate(x[b, t]))
        expected[b, t] = layer.out(y)
    ours = layer(x, pool, token, previous)
    torch.testing.assert_close(ours, expected)
    parameters = list(layer.parameters())
    exact_values, *exact = torch.autograd.grad(expected.square().sum(), (values, *parameters))
    ours.square().sum().backward()
    torch.testing.assert_close([p.grad for p in parameters], exact)
    torch.testing.assert_close(pool.values.grad.to_dense(), exact_values)
    assert (layer.gate is None) != swilu and (layer.out.bias is None) != bias


# --- all of them --------------------------------------------------------------------------------------------

def make(kind):
    """A layer that takes only x and a pool, and the number of rows that it needs."""
    torch.manual_seed(0)
    if kind == "product-key":
        return MemoryLayer(8, 4, 2, 2, 4, 8), 16
    if kind == "peer":
        return PEER(8, 4, 2, 2, 4), 32
    layer = HashedMemory(8, 16, 2, 2, 8, VOCABULARY)
    layer.register_forward_pre_hook(lambda layer, args: (*args, torch.arange(5), torch.arange(5) + 1))
    return layer, 16


@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
def test_a_pool_of_another_size_is_refused(kind):
    """Otherwise a read would return whatever stands in memory: nothing else looks whether an index fits."""
    layer, rows = make(kind)
    for wrong_rows, width in ((rows - 1, 8), (2 * rows, 8), (rows // 2, 8), (rows, 9)):
        with pytest.raises(ValueError, match=f"{wrong_rows} rows of width {width}, .* needs {rows} of"):
            layer(torch.randn(5, 8), ValuePool(wrong_rows, width))


@pytest.mark.parametrize("of_layer, of_pool", [(torch.float16, torch.float16), (torch.float64, torch.float64),
                                               (torch.float32, torch.bfloat16)])
@pytest.mark.parametrize("kind", ["peer", "hash"])
def test_other_dtypes_give_finite_results_and_the_dtype_of_x(kind, of_layer, of_pool):
    layer, rows = make(kind)
    pool = ValuePool(rows, 8, of_pool)
    y = layer.to(of_layer)(torch.randn(5, 8).to(of_layer), pool)
    assert y.dtype == of_layer and y.isfinite().all()
    y.float().square().sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())
    assert pool.values.grad.to_dense().isfinite().all()


# --- mixture of experts -------------------------------------------------------------------------------------

def every_expert(moe, x):
    """The same mixture, with every expert computed for every token: x (N, C) -> (N, C)."""
    logits = x @ moe.router.weight.T
    best = logits.topk(moe.top_k).indices
    mask = torch.full_like(logits, -torch.inf).scatter(1, best, 0.0)
    hidden = F.gelu(torch.einsum("nc,ecw->new", x, moe.c_fc), approximate="tanh")
    out = torch.einsum("new,ewc->nec", hidden, moe.c_proj)
    return ((logits + mask).softmax(-1).unsqueeze(-1) * out).sum(1)


@pytest.mark.parametrize("experts, top_k, N", [(4, 2, 40), (16, 1, 7), (3, 3, 5), (8, 4, 1), (1, 1, 3)])
def test_experts_equal_a_mixture_of_all_of_them(experts, top_k, N):
    """Also where some experts get no token, and also the gradients."""
    torch.manual_seed(0)
    moe = MoE(16, 12, experts, top_k, n_layer=3).double()
    x, dy = normal(N, 16).requires_grad_(), normal(N, 16)
    results = []
    for y in (moe(x.unsqueeze(0)).squeeze(0), every_expert(moe, x)):
        results.append([y, *torch.autograd.grad(y, (x, *moe.parameters()), dy)])
    torch.testing.assert_close(*results)


def test_balance_is_1_if_experts_are_used_alike_and_more_otherwise():
    moe = MoE(16, 64, experts=16, top_k=2, n_layer=3)
    with torch.no_grad():
        moe.router.weight.copy_(20 * torch.eye(16))
        x = torch.eye(16) + 0.5 * torch.eye(16).roll(1, dims=0)  # each token has two experts, each expert two
        moe(x)
        assert math.isclose(moe.take_balance().item(), 1.0, rel_tol=1e-5)
        moe(x[:1].expand(9, 16))
        assert 7 < moe.take_balance() <= 8, "always the same 2 of 16 experts"


def make_gpt(**changes):
    torch.manual_seed(0)
    sizes = dict(vocab_size=50, block_size=16, n_layer=2, n_head=2, n_embd=16, moe_experts=4, mem_num_keys=8,
                 mem_heads=2, mem_knn=4, mem_key_dim=8)
    return GPT(GPTConfig(**sizes, **changes))


def batch():
    return torch.randint(50, (2, 2, 9), generator=torch.Generator().manual_seed(1))


def test_balance_moves_the_router_and_not_the_loss():
    """The losses of different models stay comparable, and each micro-batch adds its share to the gradient."""
    losses, grads = [], []
    for weight in (0.0, 0.5):
        model = make_gpt(moe_layers=(1,), moe_balance=weight).double()
        loss = model(*batch())[1]
        loss.backward()
        losses.append(loss.item())
        grads.append(model.blocks[1].mlp.router.weight.grad)
    assert losses[0] == losses[1]
    model.zero_grad()
    seen = []
    model.blocks[1].mlp.register_forward_hook(lambda moe, args, y: seen.append(moe.balance))
    model(*batch())
    (0.5 * seen[0]).backward()
    torch.testing.assert_close(grads[1] - grads[0], model.blocks[1].mlp.router.weight.grad)
    assert seen[0] > 1


def test_a_model_with_experts_can_be_copied_after_a_forward_pass_without_targets():
    """deepcopy refuses a tensor with a graph, such as a balance that the layer still holds."""
    model = make_gpt(moe_layers=(0, 1))
    model(batch()[0])
    copy.deepcopy(model)


def test_one_mixture_may_be_in_evaluation_mode_while_the_model_trains():
    """As people do with parts that they freeze."""
    model = make_gpt(moe_layers=(0, 1))
    model.blocks[0].mlp.eval()
    model(*batch())[1].backward()


@pytest.mark.parametrize("changes", [dict(moe_layers=(0, 1)), dict(mem_layers=(1,)),
                                     *(dict(mem_layers=(1,), mem_kind=kind) for kind in ("peer", "hash"))])
def test_autocast_trains(changes):
    model = make_gpt(**changes)
    exact = model(*batch())[1]
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(*batch())[1]
    assert math.isclose(loss.item(), exact.item(), rel_tol=0.02)
    loss.backward()
    dense = model.dense_parameters()
    assert all(p.grad.dtype == torch.float32 and p.grad.isfinite().all() for p in dense)
    assert model.pool is None or model.pool.values.grad.to_dense().isfinite().all()
