"""memory.py against brute force over all slots, autograd, and the published formula."""

import itertools

import pytest
import torch
import torch.nn as nn
from torch.nn import functional as F

from memory import MemoryLayer, fast_search, normalize, product_key_search, pruned_pairs
from pool import ValuePool

# --- the search ---------------------------------------------------------------------------------------------

SHAPES = [  # N, H, D, S, knn
    (1, 1, 2, 1, 1),
    (5, 2, 2, 7, 7),
    (9, 3, 8, 16, 5),
    (4, 1, 6, 33, 32),
    (6, 2, 4, 68, 3),
    (2, 1, 8, 140, 64),
]

SEARCHES = [product_key_search, fast_search]


def brute_force(queries, half_keys, knn):
    """The scores of all S*S slots, and the best of them."""
    left, right = (torch.einsum("nhd,hsd->nhs", queries[:, :, side], half_keys[:, side]) for side in (0, 1))
    scores = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(2)  # (N, H, S*S)
    return scores, scores.topk(knn).values


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("N, H, D, S, knn", SHAPES)
@pytest.mark.parametrize("ties", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_search_equals_brute_force(N, H, D, S, knn, ties, dtype, search):
    g = torch.Generator().manual_seed(N * S + knn)
    queries = torch.randn(N, H, 2, D // 2, generator=g, dtype=dtype)
    half_keys = torch.randn(H, 2, S, D // 2, generator=g, dtype=dtype)
    if ties:
        queries, half_keys = queries.round(), half_keys.round()
    scores, indices = search(queries, half_keys, knn)
    all_scores, best = brute_force(queries, half_keys, knn)
    torch.testing.assert_close(scores, best)
    torch.testing.assert_close(all_scores.gather(-1, indices), scores)  # these slots have these scores
    assert all(len(set(slots)) == knn for slots in indices.flatten(0, 1).tolist()), "a slot came twice"


def test_search_of_many_tokens():
    """
    On a CPU, the search takes 64 tokens at a time here, and the last part is shorter. Scores and gradients
    are those of plain PyTorch. The backward pass keeps no half-scores, which are the largest tensor.
    """
    N, H, S, K = 150, 4, 512, 3
    torch.manual_seed(0)
    queries = torch.randn(N, H, 2, 4, dtype=torch.float64, requires_grad=True)
    half_keys = torch.randn(H, 2, S, 4, dtype=torch.float64, requires_grad=True)
    upstream, saved = torch.randn(N, H, K, dtype=torch.float64), []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        scores, indices = fast_search(queries, half_keys, K)
    assert saved and max(saved) < N * H * 2 * S
    torch.testing.assert_close(scores, product_key_search(queries, half_keys, K)[0])
    half_scores = torch.einsum("nhpd,hpsd->nhps", queries, half_keys)
    expected = half_scores.gather(-1, torch.stack((indices // S, indices % S), 2)).sum(2)
    torch.testing.assert_close(scores, expected)
    ours, theirs = (torch.autograd.grad(x, (queries, half_keys), upstream) for x in (scores, expected))
    torch.testing.assert_close(ours, theirs)


def test_the_pruned_grid_has_the_pairs_that_can_win_and_no_others():
    """By brute force: (i, j) cannot win if knn other pairs are at least as good in all descending lists."""
    assert pruned_pairs(32).shape == (2, 119)
    for knn in range(1, 20):
        grid = itertools.product(range(knn), repeat=2)
        can_win = {(i, j) for i, j in grid
                   if sum(a <= i and b <= j for a, b in itertools.product(range(knn), repeat=2)) <= knn}
        pairs = list(map(tuple, pruned_pairs(knn).T.tolist()))
        assert set(pairs) == can_win and len(pairs) == len(can_win)


# --- the layer against its formula --------------------------------------------------------------------------

def formula(layer, pool, x, left, right):
    """The layer as the papers define it, one token and one head at a time, over all slots. x (N, C)."""
    S, H, bias = layer.num_keys, layer.heads, layer.out.bias is not None
    tokens = []
    for n in range(len(x)):
        q_left, q_right = (
            (linear.weight @ source[n] + (linear.bias if bias else 0)).view(H, -1)
            for linear, source in ((layer.query_left, left), (layer.query_right, right)))
        y = torch.zeros(layer.value_dim, dtype=x.dtype)
        for h in range(H):
            q, k = torch.stack((q_left[h], q_right[h])), layer.half_keys[h]
            if layer.scale is not None:
                q, k = layer.scale[h] * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
            scores = torch.stack([q[0] @ k[0, i] + q[1] @ k[1, j] for i in range(S) for j in range(S)])
            best = scores.topk(layer.knn)
            weights = best.values.softmax(0)
            y = y + sum(w * pool.values[slot] for w, slot in zip(weights, best.indices, strict=True))
        if layer.gate is not None:
            y = y * F.silu(layer.gate.weight @ x[n] + (layer.gate.bias if bias else 0))
        tokens.append(layer.out.weight @ y + (layer.out.bias if bias else 0))
    return torch.stack(tokens)


def make_layer(C=12, S=9, H=3, K=4, D=8, V=10, **options):
    torch.manual_seed(0)
    layer, pool = MemoryLayer(C, S, H, K, D, V, **options), ValuePool(S * S, V)
    if layer.scale is not None:
        layer.scale.data.uniform_(1, 3)
    return layer, pool


def assert_equals_the_formula(layer, pool, x, left=None, right=None):
    """The output, and the gradients of x, of both sources, of every parameter and of the values."""
    layer, pool = layer.double(), pool.double()
    y, dy = layer(x, pool, left, right), torch.randn_like(x)
    expected = formula(layer, pool, *(x if source is None else source for source in (x, left, right)))
    torch.testing.assert_close(y, expected)
    inputs = [source for source in (x, left, right) if source is not None]
    ours, theirs = (torch.autograd.grad(result, [*inputs, *layer.parameters(), pool.values], dy,
                                        allow_unused=True) for result in (y, expected))
    torch.testing.assert_close(ours[-1].to_dense(), theirs[-1])
    for our, their in zip(ours[:-1], theirs[:-1], strict=True):
        assert (our is None) == (their is None)  # without a gate, nothing depends on x if both sources do not
        torch.testing.assert_close(our, their)


@pytest.mark.parametrize("sources", ["none", "left", "right", "both"])
@pytest.mark.parametrize("swilu, qk_norm, bias", itertools.product([False, True], repeat=3))
def test_layer_and_gradients_equal_the_formula(sources, swilu, qk_norm, bias):
    layer, pool = make_layer(S=5, swilu=swilu, qk_norm=qk_norm, bias=bias)
    x, left, right = (torch.randn(3, 12, dtype=torch.float64, requires_grad=True) for _ in range(3))
    assert_equals_the_formula(layer, pool, x, left if sources in ("left", "both") else None,
                              right if sources in ("right", "both") else None)
    assert (layer.gate is None) != swilu and (layer.scale is None) != qk_norm
    for linear in (layer.query_left, layer.query_right, layer.out):
        assert (linear.bias is None) != bias


@pytest.mark.parametrize("N, C, S, H, K, D, V", [
    (3, 5, 7, 1, 4, 4, 6),  # one head
    (3, 5, 7, 2, 1, 4, 6),  # one slot per head
    (3, 5, 7, 1, 1, 4, 1),  # one number per value
    (1, 5, 7, 2, 3, 4, 6),  # one token
    (3, 5, 1, 2, 1, 4, 6),  # a pool of one slot
    (1, 1, 1, 1, 1, 2, 1),  # one of everything
    (3, 5, 4, 2, 4, 4, 6),  # as many slots per head as half-keys
])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_the_smallest_sizes_equal_the_formula(N, C, S, H, K, D, V, qk_norm):
    x = torch.randn(N, C, dtype=torch.float64, requires_grad=True)
    assert_equals_the_formula(*make_layer(C, S, H, K, D, V, qk_norm=qk_norm), x)


def test_an_empty_batch():
    layer, pool = make_layer()
    x = torch.randn(0, 4, 12, requires_grad=True)
    y = layer(x, pool)
    assert y.shape == x.shape
    y.sum().backward()
    assert not pool.values.grad.to_dense().any() and x.grad.shape == x.shape


# --- precision ----------------------------------------------------------------------------------------------

def test_autocast_leaves_the_search_exact():
    """In bfloat16 a score has 8 bits, and many scores of a head would be equal."""
    layer, pool = make_layer(32, 64, 2, 8, 32, 32)
    searched = []
    pool.register_forward_pre_hook(lambda module, read: searched.append(read))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(200, 32), pool)
    (_, weights), = searched
    assert weights.dtype == torch.float32
    assert all(len(head.unique()) == 8 for head in weights.view(-1, 8)), "two weights of a head are equal"


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_a_16_bit_layer_searches_in_float32(dtype, qk_norm):
    """Its queries and half-keys have 16 bits, but the scores of the slots must not."""
    layer = make_layer(32, 16, 2, 8, 32, 32, qk_norm=qk_norm)[0].to(dtype)
    x = torch.randn(50, 32).to(dtype)
    with torch.no_grad():
        weights, indices = (result.view(50, 2, 8) for result in layer.search(x, None, None))
        halves = (linear(x).view(50, 2, 16) for linear in (layer.query_left, layer.query_right))
        queries = torch.stack(tuple(halves), dim=2).double()  # (N, H, 2, D/2)
        half_keys = layer.half_keys.double()  # (H, 2, S, D/2)
        if qk_norm:
            queries = F.normalize(queries, dim=-1) * layer.scale.double().view(2, 1, 1)
            half_keys = F.normalize(half_keys, dim=-1)
        scores, best = brute_force(queries, half_keys, 8)
    assert weights.dtype == torch.float32
    torch.testing.assert_close(scores.gather(-1, indices), best, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(weights.double(), best.softmax(-1), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("of_layer, of_pool", [
    (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16), (torch.float64, torch.float64),
    (torch.float32, torch.bfloat16), (torch.float32, torch.float16)])
@pytest.mark.parametrize("x_is_zero", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_other_dtypes_give_finite_results_and_the_dtype_of_x(of_layer, of_pool, x_is_zero, bias):
    """A zero vector without biases makes a query of length 0, which cannot be normalised."""
    layer, pool = make_layer(bias=bias)
    x = torch.zeros(6, 12) if x_is_zero else torch.randn(6, 12)
    exact = layer(x, pool)
    layer, pool, x = layer.to(of_layer), pool.to(of_pool), x.to(of_layer).requires_grad_()
    y = layer(x, pool)
    assert y.dtype == of_layer and y.isfinite().all()
    if of_layer.itemsize > 2:  # with 16-bit queries other slots may win
        torch.testing.assert_close(y.float(), exact, rtol=2e-2, atol=2e-2)
    y.float().square().sum().backward()
    for p in (x, *layer.parameters()):
        assert p.grad.dtype == p.dtype and p.grad.isfinite().all()
    assert pool.values.grad.dtype == of_pool and pool.values.grad.to_dense().isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_normalize(dtype):
    torch.manual_seed(0)
    x = torch.randn(5, 7).to(dtype)
    x[1] = 0
    x[2] *= 100 if dtype == torch.float16 else 1e15  # the square of a number may not fit the dtype
    x.requires_grad_()
    y = normalize(x)
    assert y.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(y.norm(dim=-1), torch.tensor([1.0, 0, 1, 1, 1]).to(y.dtype))
    y.sum().backward()
    assert x.grad.isfinite().all() and not x.grad[1].any()


# --- projections are modules --------------------------------------------------------------------------------

# --- mistakes -----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("wrong, message", [
    (dict(key_dim=5), "key_dim=5 must be even"),
    (dict(key_dim=0), "key_dim=0 must be even and at least 2"),
    (dict(knn=9), "knn=9 must be between 1 and num_keys=4"),
    (dict(knn=0), "knn=0 must be between 1"),
    (dict(num_keys=0), "knn=2 must be between 1 and num_keys=0"),
    (dict(heads=0), "heads=0 must be at least 1"),
])
def test_sizes_that_cannot_be_are_refused(wrong, message):
    sizes = dict(width=8, num_keys=4, heads=1, knn=2, key_dim=4, value_dim=8)
    with pytest.raises(ValueError, match=message):
        MemoryLayer(**sizes | wrong)


def test_a_source_of_another_shape_is_refused():
    """It could be broadcast, or its tokens could be those of other places."""
    layer, pool = make_layer()
    x = torch.randn(2, 4, 12)
    for sources in ((x[:, :1], x), (x, x.flatten(0, 1))):
        with pytest.raises(ValueError, match="left and right must have the shape of x"):
            layer(x, pool, *sources)


@pytest.mark.parametrize("name", ["query_left", "query_right", "gate", "out"])
def test_another_module_in_place_of_a_projection_learns(name):
    """Such as a LoRA adapter or a quantised layer, which has no `weight`. The layer must call it."""
    layer, pool = make_layer()
    x = torch.randn(3, 12)
    before, linear = layer(x, pool), getattr(layer, name)
    setattr(layer, name, nn.Sequential(linear, nn.Tanh()))
    after = layer(x, pool)
    after.square().sum().backward()
    assert not torch.allclose(before, after) and linear.weight.grad.any()
