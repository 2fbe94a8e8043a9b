"""experiments/plan.py: counts the bytes that the code really sends, and says what fits."""

import pytest
import torch
from conftest import assert_fails

from experiments import plan
from runtime import distributed


@pytest.mark.parametrize("gpus, G", [(4, 4), (4, 2), (8, 2), (2, 1)])
def test_the_plan_counts_the_bytes_that_the_collectives_send(gpus, G, monkeypatch):
    """A ShardedPool that believes it is one of many processes. Its collectives count what they would send."""
    sent = 0

    def gather(results, x, group):
        nonlocal sent
        sent += x.nbytes * (group - 1)  # all of x to each of the others
        for result in results:
            result.copy_(x)

    def exchange(result, x, group):
        nonlocal sent
        sent += x.nbytes * (group - 1) // group  # one block of x to each of the others
        result.copy_(x)

    groups = [distributed.Group(size, 0, handle=size) for size in (G, gpus // G)]
    monkeypatch.setattr(distributed, "world_size", lambda: gpus)
    monkeypatch.setattr(distributed, "make_groups", lambda size: groups)
    monkeypatch.setattr(distributed.dist, "all_gather", gather)
    monkeypatch.setattr(distributed.dist, "all_to_all_single", exchange)
    config = plan.PlanConfig(n_embd=16, n_head=2, mem_layers=(1,), gpus=gpus, mem_group_size=G)
    N, bag = 5, config.mem_heads * config.mem_knn
    pool = distributed.ShardedPool(64, 16, group_size=G)
    weights = torch.rand(N, bag, requires_grad=True)
    pool(torch.randint(64, (N, bag)), weights).sum().backward()
    assert len(pool.values.grad.reads) and weights.grad is not None
    assert sent == N * sum(plan.bytes_sent(config).values())


def test_the_plan_says_what_fits_and_refuses_what_is_impossible(capsys):
    plan.main([])
    printed = capsys.readouterr().out
    assert "67,108,864 slots x 2,048 = 137.4B" in printed and "gradients of the weights" in printed
    total = plan.plan(plan.PlanConfig(**plan.LARGEST))
    pool = 8192**2 * 2048 / 64
    places = 64 * 16_384 * 128  # per layer
    reads = 3 * (places * 8 + 64 * 16_384 * 2048 / 64 * 4)  # indices, weights and dy
    sorts = 3 * places * 48
    assert total["adam"] - total["rowwise"] == pytest.approx(8 * pool - 4 * 8192**2)
    assert total["adam and a dense gradient"] - total["adam"] == pytest.approx(2 * pool - reads - sorts)
    assert_fails(lambda: plan.main(["--gpus=6"]), "--mem_group_size must divide gpus, n_embd and", capsys)
