"""bench.py: every measurement runs, and what it writes can be drawn. No test looks at a time."""

import json

import pytest

import bench
import plot


@pytest.mark.parametrize(
    "argv, methods",
    [
        (["step", "--rows=256,1024", "--tokens=4,8", "--peers_up_to=256", "--bag=4", "--value_dim=16"], 5),
        (["search"], 5),
        (["model"], 2),
    ],
)
def test_a_measurement_runs_and_keeps_its_rows(argv, methods, tmp_path, capsys):
    path = tmp_path / "rows.jsonl"
    bench.main([*argv, "--repeats=1", f"--json={path}"])
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len({row["method"] for row in rows}) == methods and all(row["seconds"] > 0 for row in rows)
    assert " ms (" in capsys.readouterr().out
    if argv[0] == "step":
        assert len(rows) == 2 * 2 * 2 + 2 * 2 * 5, "all five for the small pool"
        plot.plot_step(path)
        assert path.with_suffix(".png").stat().st_size > 10_000


def test_operations_are_measured_as_a_gpu_would_measure_them(monkeypatch, capsys):
    monkeypatch.setattr(bench, "OPERATION_ROWS", 4096)
    rows = bench.measure_operations(bench.BenchConfig(repeats=1, bag=2, value_dim=16))
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
    ],
)
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        bench.main(argv)
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.startswith("error: ") and err.count("\n") == 1 and message in err
