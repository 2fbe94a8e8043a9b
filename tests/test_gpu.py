"""A training step never waits for the GPU: neither on one, nor on a device where waiting is an error."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import kernel
import memory
from experiments.speed import train_step
from pool import PoolOptimizer, ValuePool
from train import TrainConfig


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
@pytest.mark.parametrize("options", [dict(), dict(mem_dtype="bfloat16"), dict(mem_layers=(1,))])
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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_step_needs_no_number_from_the_device(monkeypatch, kind, dtype):
    """
    On PyTorch's device `meta`, where tensors have shapes and no numbers: item(), nonzero(), unique() and a
    copy to the CPU are errors there. The Triton kernels are left out, as they never talk to the CPU.
    """

    class Launch:
        def __getitem__(self, grid):
            return lambda *args, **options: None

    def tensor(*args, device=None, **options):
        raise AssertionError("a list or a number is copied to the device, and the CPU waits")

    for name in ("gather_sum", "gather_dot", "sum_pieces", "update"):
        monkeypatch.setattr(kernel, f"{name}_kernel", Launch())
    monkeypatch.setattr(kernel, "resolve_kernel", lambda kernel, device: "triton")
    monkeypatch.setattr(memory, "_pairs_on_device", {})
    half_keys = torch.randn(2, 2, 16, 4, device="meta", requires_grad=True)
    pool = ValuePool(256, 16, dtype, device="meta")
    pool.usage.total_weight = pool.usage.total_weight.to("meta")
    optimizer = PoolOptimizer(pool.parameters(), lr=0.1, kind=kind,
                              stochastic_rounding=dtype == torch.bfloat16)

    def step():
        optimizer.zero_grad()
        for _ in range(2):  # layers that share the pool
            queries = torch.randn(9, 2, 2, 4, device="meta", requires_grad=True)
            scores, indices = memory.product_key_search(queries, half_keys, 4)
            pool(indices.flatten(1), scores.softmax(-1).flatten(1)).sum().backward()
        optimizer.step()

    step()  # makes what is kept
    monkeypatch.setattr(torch, "tensor", tensor)
    monkeypatch.setattr(torch, "as_tensor", tensor)
    with NoCopies():
        step()
