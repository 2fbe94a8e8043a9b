"""memory.py against brute force over all slots, autograd's dense gradient, and the published formula."""

import copy
import math
from pathlib import Path

import pytest
import torch
from test_kernel import DEVICE, SIDES
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from memory import MemoryLayer, MemoryUsage, PoolOptimizer, ValuePool, product_key_search, pruned_pairs, top_k

SHAPES = [
    (1, 1, 2, 1, 1),
    (5, 2, 2, 7, 7),
    (9, 3, 8, 16, 5),
    (4, 1, 6, 33, 32),
    (16, 4, 32, 64, 16),
    (3, 2, 4, 40, 39),
    (6, 2, 4, 68, 3),
    (5, 1, 8, 32, 2),
]


def brute_force(queries, half_keys, knn):
    """Scores of all S*S slots, and the best of them."""
    left, right = (torch.einsum("nhd,hsd->nhs", queries[:, :, side], half_keys[:, side]) for side in (0, 1))
    scores = (left.unsqueeze(-1) + right.unsqueeze(-2)).flatten(2)  # (N, H, S*S)
    return scores, scores.topk(knn).values


@pytest.mark.parametrize("N, H, D, S, knn", SHAPES)
@pytest.mark.parametrize("ties", [False, True])
def test_search_equals_brute_force(N, H, D, S, knn, ties):
    g = torch.Generator().manual_seed(N * S + knn)
    queries = torch.randn(N, H, 2, D // 2, generator=g, dtype=torch.float64)
    half_keys = torch.randn(H, 2, S, D // 2, generator=g, dtype=torch.float64)
    if ties:
        queries, half_keys = queries.round(), half_keys.round()
    scores, indices = product_key_search(queries, half_keys, knn)
    all_scores, best = brute_force(queries, half_keys, knn)
    torch.testing.assert_close(scores, best)
    torch.testing.assert_close(all_scores.gather(-1, indices), scores)  # the indices are of these scores
    assert all(len(set(slots)) == knn for slots in indices.flatten(0, 1).tolist()), "no slot comes twice"


def test_search_where_every_slot_ties():
    scores, indices = product_key_search(torch.zeros(2, 1, 2, 3), torch.ones(1, 2, 8, 3), 8)
    assert torch.equal(scores, torch.zeros(2, 1, 8))
    assert all(len(set(slots)) == 8 for slots in indices[:, 0].tolist())


def test_search_gradient_equals_brute_force():
    queries = torch.randn(6, 2, 2, 4, dtype=torch.float64, requires_grad=True)
    half_keys = torch.randn(2, 2, 20, 4, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(6, 2, 5, dtype=torch.float64)
    ours = torch.autograd.grad(product_key_search(queries, half_keys, 5)[0], (queries, half_keys), upstream)
    theirs = torch.autograd.grad(brute_force(queries, half_keys, 5)[1], (queries, half_keys), upstream)
    torch.testing.assert_close(ours, theirs)


def test_pruned_grid_has_the_pairs_that_can_win():
    assert len(pruned_pairs(32)[0]) == 119
    assert len(pruned_pairs(1)[0]) == 1


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("swilu", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("token_shift", [False, True])
def test_layer_equals_the_formula(qk_norm, swilu, bias, token_shift):
    """Written from the paper, one token and one head at a time, over all slots."""
    torch.manual_seed(0)
    C, S, H, K, D, V = 12, 9, 3, 4, 8, 10
    layer = MemoryLayer(C, S, H, K, D, V, swilu=swilu, qk_norm=qk_norm, bias=bias).double()
    pool = ValuePool(S * S, V).double()
    x, before = torch.randn(2, 2, 5, C, dtype=torch.float64)
    if qk_norm:
        layer.scale.data.uniform_(1, 3)
    expected = torch.zeros(2, 5, C, dtype=torch.float64)
    for b in range(2):
        for t in range(5):
            y = torch.zeros(V, dtype=torch.float64)
            of_x, of_before = ((layer.query.weight @ state[b, t] + (layer.query.bias if bias else 0))
                               .view(H, 2, -1) for state in (x, before))
            for h in range(H):
                q, k = of_x[h], layer.half_keys[h]
                if token_shift:
                    q = torch.stack((of_x[h, 0], of_before[h, 1]))
                if qk_norm:
                    q, k = layer.scale[h] * q / q.norm(dim=-1, keepdim=True), k / k.norm(dim=-1, keepdim=True)
                scores = torch.stack([q[0] @ k[0, i] + q[1] @ k[1, j] for i in range(S) for j in range(S)])
                best = scores.topk(K)
                w = best.values.softmax(0)
                y += (w[:, None] * pool.values[best.indices]).sum(0)
            if swilu:
                y = y * F.silu(layer.gate.weight @ x[b, t] + (layer.gate.bias if bias else 0))
            expected[b, t] = layer.out.weight @ y + (layer.out.bias if bias else 0)
    torch.testing.assert_close(layer(x, pool, before if token_shift else None), expected)
    assert (
        (layer.query.bias is None) != bias
        and (layer.gate is None) != swilu
        and (layer.scale is None) != qk_norm
    )


def test_pool_gradient_equals_autograd_over_layers_and_micro_batches():
    torch.manual_seed(0)
    layers = [MemoryLayer(8, 6, 2, 3, 4, 8).double() for _ in range(2)]
    pool = ValuePool(36, 8).double()
    batches = [torch.randn(1, 4, 8, dtype=torch.float64) for _ in range(3)]

    class DensePool:  # the same layers over a plain tensor, which autograd sees
        values = pool.values.detach().clone().requires_grad_()

        def __call__(self, indices, weights):
            return (weights.unsqueeze(-1) * self.values[indices]).sum(1)

    dense = DensePool()
    dense_grads = []
    for x in batches:
        layers[1](layers[0](x, dense), dense).square().sum().backward()
    for layer in layers:
        dense_grads += [p.grad.clone() for p in layer.parameters()]
        layer.zero_grad()
    for x in batches:
        layers[1](layers[0](x, pool), pool).square().sum().backward()
    assert len(pool.reads) == 6 and pool.values.grad is None
    torch.testing.assert_close(pool.dense_gradient(), dense.values.grad)
    torch.testing.assert_close([p.grad for layer in layers for p in layer.parameters()], dense_grads)


@pytest.mark.parametrize("layers", [1, 2])
def test_peer_equals_its_formula_and_autograd(layers):
    """One token and one expert at a time; the gradients too, of both rows of an expert among others."""
    torch.manual_seed(0)
    C, S, H, K, D = 8, 6, 2, 3, 4
    peers = [MemoryLayer(C, S, H, K, D, C, kind="peer").double() for _ in range(layers)]
    pool = ValuePool(2 * S * S, C).double()
    values = pool.values.detach().clone().requires_grad_()
    x = torch.randn(5, C, dtype=torch.float64, requires_grad=True)
    expected = x
    for layer in peers:
        scores, indices = layer.search(expected, expected)
        weights = scores.softmax(-1)
        tokens = []
        for n in range(len(x)):
            y = torch.zeros(C, dtype=torch.float64)
            for h in range(H):
                for k in range(K):
                    up, down = values[S * S + indices[n, h, k]], values[indices[n, h, k]]
                    y = y + weights[n, h, k] * F.gelu(up @ expected[n]) * down
            tokens.append(y)
        expected = torch.stack(tokens)
    ours = x
    for layer in peers:
        ours = layer(ours, pool)
    torch.testing.assert_close(ours, expected)
    parameters = [x, *(p for layer in peers for p in layer.parameters())]
    exact = torch.autograd.grad(expected.square().sum(), (values, *parameters))
    ours.square().sum().backward()
    torch.testing.assert_close(tuple(p.grad for p in parameters), exact[1:])
    torch.testing.assert_close(pool.dense_gradient(), exact[0])
    assert len(pool.reads) == 2 * layers


def test_hash_reads_where_the_last_two_tokens_say():
    torch.manual_seed(0)
    S, H, K = 128, 4, 16
    layers = [MemoryLayer(8, S, H, K, 4, 8, kind="hash") for _ in range(2)]
    bigrams = torch.arange(1000)
    x = torch.randn(1000, 8)
    scores, indices = layers[0].hash(x, bigrams)
    assert scores.shape == indices.shape == (1000, H, K)
    assert torch.equal(scores[3, 1], layers[0].score(x)[3, 16:32])
    assert torch.equal(layers[0].hash(-x, bigrams)[1], indices), "the state has no say in it"
    assert not torch.equal(layers[1].hash(x, bigrams)[1], indices), "each layer has hashes of its own"
    assert indices.min() >= 0 and indices.max() < S * S
    # as random numbers would: 64,000 draws of 16,384 slots leave e**-3.9 of them unread, and few bigrams meet
    assert abs(1 - len(indices.unique()) / S**2 - math.exp(-64_000 / S**2)) < 0.01
    same = (indices[:-1].flatten(1) == indices[1:].flatten(1)).float().mean()
    assert same < 10 / S**2, "neighbours have different slots"
    # Python's integers as the oracle
    multiplier = layers[0].multipliers[7].item()
    high = ((5 + 1) * multiplier % 2**64) >> 33
    assert indices[5].flatten()[7] == (high * S * S) >> 31


def test_reads_are_kept_only_where_a_gradient_is_wanted():
    pool = ValuePool(16, 8)
    layer = MemoryLayer(8, 4, 1, 2, 4, 8)
    with torch.no_grad():
        layer(torch.randn(3, 8), pool)
    assert pool.reads == []
    layer(torch.randn(3, 8), pool).sum().backward()
    assert len(pool.reads) == 1 and not pool.reads[0][1].requires_grad, "a read must not hold on to the graph"
    PoolOptimizer(pool, 0.1).zero_grad()
    assert pool.reads == []


@pytest.mark.parametrize("kernel", SIDES)
def test_a_step_between_forward_and_backward_is_an_error(kernel):
    """Guards against gradients of the weights that are taken from other values than the output was."""
    pool = ValuePool(16, 8, kernel=kernel).to(DEVICE)
    optimizer = PoolOptimizer(pool, 0.1)
    indices, weights = torch.randint(16, (3, 2), device=DEVICE), torch.rand(3, 2, device=DEVICE)
    first, second = (pool(indices, weights.requires_grad_()) for _ in range(2))
    first.sum().backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        second.sum().backward()


@pytest.mark.parametrize("kind", ["product-key", "peer", "hash"])
def test_the_pool_of_a_frozen_layer_learns_as_if_it_were_not_frozen(kind):
    results = []
    for frozen in (False, True):
        torch.manual_seed(0)
        pool = ValuePool(32 if kind == "peer" else 16, 8)
        layer = MemoryLayer(8, 4, 2, 2, 4, 8, kind=kind).requires_grad_(not frozen)
        layer(torch.randn(5, 8), pool, bigrams=torch.arange(5)).square().sum().backward()
        assert all((p.grad is None) == frozen for p in layer.parameters())
        results.append(pool.dense_gradient())
    with torch.no_grad():
        assert not layer(torch.randn(5, 8), pool, bigrams=torch.arange(5)).requires_grad
    pool.eval()
    assert not layer(torch.randn(5, 8), pool, bigrams=torch.arange(5)).requires_grad
    assert torch.equal(*results) and all(half.any() for half in results[0].chunk(2)), "peer reads both halves"


def test_a_pool_of_another_size_and_an_unknown_kind_are_errors():
    """Guards against reads of anything: nothing else looks whether an index is in the pool."""
    for kind, rows in (("product-key", 15), ("product-key", 32), ("peer", 16)):
        with pytest.raises(ValueError, match=f"the pool has {rows} rows"):
            MemoryLayer(8, 4, 2, 2, 4, 8, kind=kind)(torch.randn(5, 8), ValuePool(rows, 8))
    with pytest.raises(ValueError, match="must be 'product-key'"):
        MemoryLayer(8, 4, 2, 2, 4, 8, kind="Peer")


def test_autocast_leaves_the_search_exact():
    """Guards against scores of 8 bits, of which many are equal."""
    torch.manual_seed(0)
    layer, pool = MemoryLayer(32, 64, 2, 8, 32, 32), ValuePool(64**2, 32)
    searched = []
    pool.register_forward_pre_hook(lambda module, read: searched.append(read))
    with torch.autocast("cpu", torch.bfloat16):
        layer(torch.randn(200, 32), pool)
    (_, weights), = searched
    assert weights.dtype == torch.float32
    assert all(len(head.unique()) == 8 for head in weights.view(-1, 8)), "no two of a head's scores are equal"


class Largest(TorchDispatchMode):
    """Notes how many numbers the largest new tensor has that an operation returns."""

    def __init__(self, old):
        super().__init__()
        self.old, self.numel = {tensor.untyped_storage().data_ptr() for tensor in old}, 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.layout == torch.strided:  # a sparse one's parts come too
                if x.untyped_storage().data_ptr() not in self.old:
                    self.numel = max(self.numel, x.numel())
        return result


@pytest.mark.parametrize("kind", ["rowwise", "adam"])
@pytest.mark.parametrize("layer_kind", ["product-key", "peer", "hash"])
def test_a_step_makes_no_tensor_of_the_pool_s_size(kind, layer_kind):
    """Nor even one with a number for each slot."""
    slots = 128**2
    layer = MemoryLayer(16, 128, 2, 4, 16, 16, kind=layer_kind)
    pool = ValuePool(2 * slots if layer_kind == "peer" else slots, 16)
    optimizer = PoolOptimizer(pool, 0.1, kind)
    state = [x for x in optimizer.state[pool.values].values() if torch.is_tensor(x)]
    with Largest([pool.values, pool.usage.total_weight, *state]) as largest:
        for _ in range(2):
            optimizer.zero_grad()
            layer(torch.randn(4, 16), pool, bigrams=torch.arange(4)).square().sum().backward()
            optimizer.step()
    assert 0 < largest.numel < slots
    with largest:
        pool.dense_gradient()
    assert largest.numel == pool.values.numel(), "what is looked for is found"


@pytest.mark.parametrize("kind", ["rowwise", "adam"])
def test_optimizer_is_one_that_torch_knows(kind):
    """Schedulers change its lr; its state survives a save and a load, and goes on as if nothing had been."""
    torch.manual_seed(0)
    pools = [ValuePool(25, 16) for _ in range(2)]
    pools[1].load_state_dict(pools[0].state_dict())
    optimizers = [PoolOptimizer(pool, 0.1, kind) for pool in pools]
    scheduler = torch.optim.lr_scheduler.StepLR(optimizers[0], step_size=1, gamma=0.5)

    def step(pool, optimizer, seed):
        torch.manual_seed(seed)
        optimizer.zero_grad()
        pool(torch.randint(25, (7, 3)), torch.rand(7, 3, requires_grad=True)).square().sum().backward()
        optimizer.step()

    step(pools[0], optimizers[0], 1)
    scheduler.step()
    assert optimizers[0].param_groups[0]["lr"] == 0.05
    pools[1].load_state_dict(pools[0].state_dict())
    optimizers[1].load_state_dict(copy.deepcopy(optimizers[0].state_dict()))
    for pool, optimizer in zip(pools, optimizers, strict=True):
        step(pool, optimizer, 2)
    assert torch.equal(pools[0].values, pools[1].values)


@pytest.mark.parametrize("kind", ["rowwise", "adam"])
def test_optimizer_does_not_care_for_the_scale_of_the_gradient(kind):
    results = []
    for scale in (1.0, 1e3, 1e-5):
        torch.manual_seed(0)
        pool = ValuePool(25, 16)
        optimizer = PoolOptimizer(pool, 0.1, kind)
        for _ in range(3):
            optimizer.zero_grad()
            y = pool(torch.randint(25, (7, 3)), torch.rand(7, 3, requires_grad=True))
            y.backward(scale * torch.randn(7, 16))
            optimizer.step()
        results.append(pool.values)
    for other in results[1:]:
        torch.testing.assert_close(results[0], other, rtol=1e-3, atol=1e-4)


def test_usage_equals_the_paper_s_measures():
    usage = MemoryUsage(10)
    assert usage.summary() == (0.0, 0.0)
    usage.add(torch.arange(10)[None], torch.full((1, 10), 0.1))
    share, kl = usage.summary()
    assert share == 1.0 and abs(kl) < 1e-6
    usage.reset()
    usage.add(torch.tensor([[3, 3]]), torch.tensor([[0.5, 0.5]]))
    share, kl = usage.summary()
    assert share == 0.1 and math.isclose(kl, math.log(10))
    usage.add(torch.tensor([[4]]), torch.tensor([[3.0]]))
    p = torch.tensor([0.25, 0.75])
    assert math.isclose(
        usage.summary()[1], F.kl_div(torch.full((2,), 0.1).log(), p, reduction="sum"), rel_tol=1e-6
    )


@pytest.mark.parametrize(
    "wrong, message",
    [(dict(key_dim=5), "even"), (dict(knn=9), "between 1 and num_keys=4"), (dict(knn=0), "between 1")],
)
def test_layer_refuses_what_cannot_be(wrong, message):
    sizes = dict(width=8, num_keys=4, heads=1, knn=2, key_dim=4, value_dim=8)
    with pytest.raises(ValueError, match=message):
        MemoryLayer(**sizes | wrong)


def test_optimizer_refuses_what_cannot_be():
    with pytest.raises(ValueError, match="multiple of value_blocks"):
        PoolOptimizer(ValuePool(16, 12), 0.1)
    with pytest.raises(ValueError, match="rowwise"):
        PoolOptimizer(ValuePool(16, 8), 0.1, "sgd")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("S, k", [(1, 1), (2, 2), (50, 16), (127, 1), (128, 16), (132, 40), (1024, 32)])
def test_top_k_equals_topk(S, k, dtype):
    """Both signs and zeros, neighbouring numbers, denormals, ties: the column must not change the order."""
    generator = torch.Generator().manual_seed(S)
    magnitude = 10.0 ** torch.randint(-44, 8, (3, 2, S), generator=generator)
    x = torch.randn(3, 2, S, generator=generator) * magnitude
    x[0] = x[0].sign() * 0.0
    x[1] = torch.nextafter(torch.ones(2, S), torch.tensor(2.0)).where(x[1] > 0, torch.ones(2, S))
    x = x.to(dtype)
    values, indices = top_k(x, k)
    assert torch.equal(values, x.topk(k).values)
    assert torch.equal(values, x.gather(-1, indices))
    assert all(len(row.unique()) == k for row in indices.flatten(0, 1))


def test_the_readme_s_example_learns():
    """As it stands there: its loss falls, and only what it may learn is in its optimisers."""
    code = (Path(__file__).parents[1] / "README.md").read_text().split("```python\n")[1].split("```")[0]
    names = {}
    torch.manual_seed(0)
    exec(code.replace("range(100)", "range(1)"), names)
    first = names["loss"].item()
    assert len(names["pool"].reads) == 1
    torch.manual_seed(0)
    exec(code, names)
    assert names["loss"].item() < 0.5 * first
