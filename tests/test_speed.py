"""bench.py: every measurement runs, and what it writes can be drawn. No test looks at a time."""

import json

import pytest
import torch

import bench
import distributed
import plot
from memory import ValuePool


@pytest.mark.parametrize(
    "argv, methods",
    [
        (["step", "--rows=256,1024", "--tokens=4,8", "--peers_up_to=256", "--bag=4", "--value_dim=16"], 5),
        (["search"], 5),
        (["model"], 9),
    ],
)
def test_a_measurement_runs_and_keeps_its_rows(argv, methods, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    bench.main([*argv, "--repeats=1", f"--json={path}"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["method"] for row in rows}) == methods and all(row["seconds"] > 0 for row in rows)
    assert " ms (" in capsys.readouterr().out
    if argv[0] != "step":
        with pytest.raises(SystemExit):
            plot.plot_step(path)
        assert "has no rows that python bench.py step" in capsys.readouterr().err
    else:
        assert len(rows) == 2 * 2 * 2 + 2 * 2 * 5, "all five for the small pool"
        plot.plot_step(path)
        assert path.with_suffix(".png").stat().st_size > 10_000


def test_operations_are_measured_as_a_gpu_would_measure_them(capsys):
    rows = bench.measure_operations(bench.BenchConfig(repeats=1), num_values=4096, V=16)
    assert [row["method"] for row in rows] == ["gather_sum", "gather_dot", "rowwise update"]
    assert "of a copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a measurement"),
        (["speed"], "name a measurement"),
        (["step", "--rows=1000"], "must be squares"),
        (["step", "--reads=random"], "must be of uniform, zipf"),
        (["step", "--repeat=3"], "did you mean --repeats?"),
        (["search", "--rows=64"], "unknown option --rows"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err


@pytest.mark.parametrize("gpus, G", [(4, 4), (4, 2), (8, 2), (2, 1)])
def test_the_plan_counts_the_bytes_that_the_collectives_send(gpus, G, monkeypatch):
    sent = 0

    def count(result, x, group):
        nonlocal sent
        gathers = result.numel() > x.numel()  # all of it to each other; or a share to each
        sent += x.nbytes * (group - 1) if gathers else x.nbytes * (group - 1) // group
        result.copy_(x.repeat(group, *[1] * (x.dim() - 1)) if gathers else x)

    monkeypatch.setattr(distributed.dist, "all_gather_single", count)
    monkeypatch.setattr(distributed.dist, "all_to_all_single", count)
    config = bench.PlanConfig(n_embd=16, n_head=2, mem_layers=(1,), gpus=gpus, mem_group_size=G)
    N, bag = 5, config.mem_heads * config.mem_knn
    sharding = distributed.Sharding(distributed.Group(G, 0, G), distributed.Group(gpus // G, 0, gpus // G))
    pool = ValuePool(64, 16, sharding=sharding)
    weights = torch.rand(N, bag, requires_grad=True)
    pool(torch.randint(64, (N, bag)), weights).sum().backward()
    pool.all_reads()
    assert sent == N * sum(bench.bytes_sent(config).values())


def test_the_plan_says_what_fits_and_refuses_what_cannot_be(capsys, tmp_path):
    bench.main(["plan", f"--json={tmp_path / 'plan'}"])
    printed = capsys.readouterr().out
    assert "67,108,864 slots x 2,048 = 137.4B" in printed and "the bottleneck: " in printed
    rows = [json.loads(line) for line in open(tmp_path / "plan")]
    size = {row["learner"]: row["bytes_per_gpu"] for row in rows if "learner" in row}
    pool = 8192**2 * 2048 / 64
    places = 64 * 16_384 * 128  # of a layer
    reads = 3 * (places * 8 + 64 * 16_384 * 2048 / 64 * 4)  # indices, weights and dy
    sorts = 3 * places * 48
    assert size["adam"] - size["rowwise"] == pytest.approx(8 * pool - 4 * 8192**2)
    assert size["adam and a dense gradient"] - size["adam"] == pytest.approx(2 * pool - reads - sorts)
    with pytest.raises(SystemExit):
        bench.main(["plan", "--gpus=6"])
    assert "mem_group_size=6 must divide n_embd=2048" in capsys.readouterr().err
