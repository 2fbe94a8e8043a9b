"""
What differs on a GPU: large pools, and a training step that never waits for the GPU. Without a GPU, a
small pool is checked, and a device where waiting is an error stands in.
"""

from unittest.mock import MagicMock

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
import memory
from experiments.speed import DEVICE, draw_indices, train_step
from pool import PoolOptimizer, ValuePool
from train import TrainConfig

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="no GPU here")
# the largest allowed difference from float64, divided by the largest number of the result
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2**-8}
POOLS = [pytest.param(1024, 64, 64, 6, id="small"), *(
    pytest.param(rows, 1024, 4096, 64, id=f"{rows // 2**20}M_rows", marks=(needs_gpu, pytest.mark.slow))
    for rows in (2**20, 2**22))]  # these need 70 GB


def assert_near(ours, exact, tolerance):
    assert (ours.double() - exact).abs().max() <= tolerance * exact.abs().max()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("num_values, V, N, bag", POOLS)
def test_the_operations_equal_float64(num_values, V, N, bag, dtype):
    """
    For some tokens and rows. Some rows are read much more often than others, and every token reads row 3.
    Each operation runs twice and must give the same bits.
    """
    torch.manual_seed(0)
    values = torch.empty(num_values, V, dtype=dtype, device=DEVICE).normal_()
    indices = draw_indices("zipf", num_values, N, bag).int()
    indices[:, 0] = 3
    weights, dy = torch.rand(N, bag, device=DEVICE), torch.randn(N, V, device=DEVICE)

    def update():
        new, state = values.clone(), {"v": torch.zeros(num_values, 8, device=DEVICE),
                                      "step": torch.ones((), dtype=torch.int64, device=DEVICE)}
        kernel.scatter_update(new, [(indices, weights, dy)], state, lr=0.1)
        return new, state["v"]

    (y, dw, new, v), again = ((kernel.gather_sum(values, indices, weights),
                               kernel.gather_dot(values, indices, dy), *update()) for _ in range(2))
    assert all(map(torch.equal, (y, dw, new, v), again))

    # Triton (on a GPU) computes sums of 16-bit values in float32, but PyTorch (on a CPU) in 16 bits
    tolerance = TOLERANCE[torch.float32 if DEVICE == "cuda" else dtype]
    tokens = torch.randperm(N, device=DEVICE)[:200]
    read = values[indices[tokens]].double()  # (tokens, bag, V)
    assert_near(y[tokens], torch.einsum("nk,nkv->nv", weights[tokens].double(), read), tolerance)
    assert_near(dw[tokens], torch.einsum("nkv,nv->nk", read, dy[tokens].double()), tolerance)

    rows, counts = indices.unique(return_counts=True)
    most_read = rows[counts.topk(20).indices]  # Triton sums these in pieces
    for row in torch.cat((most_read, rows[torch.randperm(len(rows), device=DEVICE)[:100]])).tolist():
        token, j = (indices == row).nonzero(as_tuple=True)
        g = (weights[token, j].double() @ dy[token].double()).view(8, -1)
        mean_sq = g.square().mean(1)  # in the first step, v is this mean
        exact = values[row].double() - 0.1 * (g / mean_sq.sqrt().unsqueeze(1)).flatten()
        assert_near(v[row], mean_sq, TOLERANCE[torch.float32])
        assert_near(new[row], exact, TOLERANCE[dtype])
    changed = torch.cat([(a != b).any(1) for a, b in zip(new.split(2**18), values.split(2**18), strict=True)])
    assert set(changed.nonzero().flatten().tolist()) <= set(rows.tolist())


@needs_gpu
@pytest.mark.parametrize("options", [dict(mem_query="state"), dict(mem_dtype="bfloat16"),
                                     dict(mem_query="tokens", mem_layers=(1,))])
def test_a_training_step_never_waits_for_the_gpu(options):
    """Its batch has one token many times, so that some rows are read very often."""
    step = train_step(TrainConfig(vocab_size=2, **options))
    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


class NoCopies(TorchDispatchMode):
    """An operation that copies a tensor from the CPU to another device is an error: the CPU would wait."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.is_meta:
            assert not any(isinstance(x, torch.Tensor) and x.is_cpu and x.dim() for x in args), operation
        return result


@pytest.mark.skipif(kernel.triton is None, reason="no Triton here")
@pytest.mark.parametrize("kind", ["rowwise", "adam", "sgd"])
@pytest.mark.parametrize("dtype, num_keys", [(torch.float32, 16), (torch.bfloat16, 16),
                                             (torch.float32, 10_000)])  # too many for the search in Triton
def test_a_step_needs_no_number_from_the_device(monkeypatch, kind, dtype, num_keys):
    """
    On PyTorch's device `meta`, where tensors have shapes and no numbers: item(), nonzero(), unique() and a
    copy to the CPU are errors there. The Triton kernels are left out, as they never talk to the CPU.
    """

    def tensor(*args, device=None, **options):
        raise AssertionError("a list or a number is copied to the device, and the CPU waits")

    for name in ("gather_sum", "gather_dot", "sum_pieces", "update", "best_slots", "half_score_gradients"):
        monkeypatch.setattr(kernel, f"{name}_kernel", MagicMock())
    monkeypatch.setattr(kernel, "resolve_kernel", lambda kernel, device: "triton")
    half_keys = torch.randn(2, 2, num_keys, 4, device="meta", requires_grad=True)
    pool = ValuePool(num_keys**2, 16, dtype, device="meta")
    optimizer = PoolOptimizer(pool.parameters(), lr=0.1, kind=kind,
                              stochastic_rounding=dtype == torch.bfloat16)

    def step():
        optimizer.zero_grad()
        for _ in range(2):  # layers that share the pool
            queries = torch.randn(9, 2, 2, 4, device="meta", requires_grad=True)
            scores, indices = memory.fast_search(queries, half_keys, 4)
            pool(indices.flatten(1), scores.softmax(-1).flatten(1)).sum().backward()
        optimizer.step()

    step()  # makes what is kept
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "as_tensor", tensor)
    with NoCopies():
        step()
