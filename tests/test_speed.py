"""experiments/speed.py: every measurement runs, and its rows can be drawn. No test looks at a time."""

import json

import pytest
import torch
from conftest import assert_fails

from experiments import plots, speed


@pytest.mark.parametrize(
    "argv, methods",
    [
        (["step", "--rows=256,1024", "--tokens=4,8", "--peers_up_to=256", "--bag=4", "--value_dim=16"], 5),
        (["search"], 5),
        (["model"], 11),
        (["gpt2"], 2),
    ],
)
def test_a_measurement_runs_and_keeps_its_rows(argv, methods, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    speed.main([*argv, "--repeats=1", f"--json={path}"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["method"] for row in rows}) == methods and all(row["seconds"] > 0 for row in rows)
    assert " ms (" in capsys.readouterr().out
    if argv[0] == "step":
        assert len(rows) == 2 * 2 * 2 + 2 * 2 * 5, "all five methods for the small pool"
        plots.main([str(path)])
        assert path.with_suffix(".png").stat().st_size > 10_000
    else:
        assert_fails(lambda: plots.main([str(path)]), "experiments.speed step --json=FILE", capsys)


def test_operations_are_measured_as_on_a_gpu(capsys):
    rows = speed.measure_three_operations(speed.SpeedConfig(repeats=1), 4096, 16, torch.float32, "zipf")
    assert [row["method"] for row in rows] == ["gather_sum", "gather_dot", "rowwise update", "index_select"]
    assert "of a copy" in capsys.readouterr().out


@pytest.mark.parametrize(
    "argv, message",
    [
        ([], "name a measurement"),
        (["speed"], "name a measurement"),
        (["step", "--rows=1000"], "must be squares"),
        (["step", "--rows=-4"], "must be squares"),
        (["step", "--tokens=0"], "must be at least 1"),
        (["search", "--json=nowhere/rows.jsonl"], "there is no folder nowhere"),
        (["step", "--reads=random"], "must be uniform or zipf"),
        (["step", "--repeat=3"], "did you mean --repeats?"),
        (["search", "--rows=64"], "unknown option --rows"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    assert_fails(lambda: speed.main(argv), message, capsys)
