"""experiments/speed.py: every measurement runs, and its rows can be drawn. No test looks at a time."""

import sys

import pytest
import torch
from conftest import assert_fails

import kernel
from experiments import plots, speed
from experiments.models import costs
from experiments.results import read_json_lines


@pytest.mark.parametrize("command, methods", [
    ("step --rows=256,1024 --tokens=4,8 --peers_up_to=256 --bag=4 --value_dim=16", 5),
    ("model --models=moe --n_layer=6 --n_embd=16 --n_head=2 --mem_layers=3,5 --block_size=16 "
     "--mem_num_keys=32 --batch_size=2", 3),
])
def test_a_measurement_runs_and_keeps_its_rows(command, methods, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "product_key_memory", None)  # not installed
    path = tmp_path / "step.jsonl"
    speed.main([*command.split(), "--repeats=1", f"--json={path}"])
    rows = read_json_lines(path)
    assert len({row["method"] for row in rows}) == methods and all(row["seconds"] > 0 for row in rows)
    assert " ms (" in capsys.readouterr().out
    if methods == 5:
        assert len(rows) == 2 * 2 * 2 + 2 * 2 * 5, "all five methods for the small pool"


# the interface of lucidrains' product-key-memory 0.3.0
PRODUCT_KEY_MEMORY = """
import torch

class PKM(torch.nn.Module):
    def __init__(self, dim, heads=4, num_keys=128, topk=32, dim_head=128):
        super().__init__()
        assert (dim, heads, num_keys, topk, dim_head) == (16, 4, 16, 2, 8)
        self.values = torch.nn.EmbeddingBag(num_keys**2, dim, mode="sum")

    def forward(self, x):  # (1, N, dim)
        return x + self.values(torch.zeros(x.size(1), 1, dtype=int, device=x.device))
"""


def test_a_layer_is_compared_with_others_and_drawn(tmp_path, capsys, monkeypatch):
    (tmp_path / "product_key_memory.py").write_text(PRODUCT_KEY_MEMORY)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "product_key_memory", raising=False)
    path = tmp_path / "layer.jsonl"
    sizes = "--peers_up_to=256 --tokens=4 --bag=8 --value_dim=16 --repeats=1"
    speed.main(["layer", "--rows=256,1024", *sizes.split(), f"--json={path}"])
    sys.modules.pop("product_key_memory")
    methods = {size: [row["method"] for row in read_json_lines(path) if row["rows"] == size]
               for size in (256, 1024)}
    assert methods[1024] == ["nanoPKM", "dense MLP"]
    assert sorted({*methods[256]} - {*methods[1024]}) == [
        "embedding_bag, fused Adam", "product-key-memory, Adam", "product-key-memory, fused Adam"]
    assert "times as long as nanoPKM" in capsys.readouterr().out
    plots.main([str(path)])
    assert path.with_suffix(".png").stat().st_size > 10_000
    wrong, before = ["layer", "--rows=300", *sizes.split(), f"--json={path}"], path.read_bytes()
    assert_fails(lambda: speed.main(wrong), "such as 289", capsys)
    assert path.read_bytes() == before


@pytest.mark.skipif(kernel.triton is None, reason="no Triton here")
def test_the_search_is_measured_as_on_a_gpu(tmp_path, monkeypatch, capsys):
    """The results of one size are in the file before the next size is measured."""
    path, seen, measure = tmp_path / "search.jsonl", [], speed.measure
    monkeypatch.setattr(speed, "measure",
                        lambda *args: seen.append(len(read_json_lines(path))) or measure(*args))
    sizes = "--tokens=1 --num_keys=4,8 --knn=2 --heads=1 --key_dim=2 --repeats=1"
    speed.main(["search", *sizes.split(), f"--json={path}"])
    assert seen == [0, 4] and len({row["method"] for row in read_json_lines(path)}) == 4
    assert "times as fast as torch" in capsys.readouterr().out
    if speed.DEVICE == "cpu":
        monkeypatch.delenv("TRITON_INTERPRET")
        assert_fails(lambda: speed.main(["search"]), "--kernel=triton needs a GPU", capsys)


def test_models_in_another_size_cost_the_same():
    size = dict(n_layer=12, n_head=12, n_embd=768, vocab_size=50_304, mem_layers=(3, 6, 9), mem_num_keys=1024,
                mem_key_dim=256, mem_dtype="bfloat16")
    configs = speed.choose_configs(["moe", "hash"], size)
    macs = [costs(config)[0] for config in configs.values()]
    assert len(macs) == 4 and max(macs) <= 1.001 * min(macs)
    assert configs["hash"].mem_layers == (3, 6, 9) and configs["dense"].mem_layers == ()
    assert speed.choose_configs([], {})["dense"].mlp_width == 276


def test_operations_are_measured_as_on_a_gpu(capsys):
    rows = list(speed.measure_one_size(1, 4096, 16, torch.float32, "zipf"))
    assert [row["method"] for row in rows] == ["copy", "gather_sum", "gather_dot", "rowwise update",
                                               "index_select"]
    assert "of a copy" in capsys.readouterr().out


@pytest.mark.parametrize("argv, message", [
    ([], "name a measurement"),
    (["operations", "--rows=64"], "unknown option --rows"),
    (["model", "--models=moa"], "--models=moa must be one of dense"),
    (["model", "--models=shifted-16x", "--n_embd=16", "--n_head=2"], "error: --models=shifted-16x costs"),
    (["model", "--n_embd=70"], "--n_embd=70 must"),
])
def test_a_mistake_is_one_line_and_status_2(argv, message, capsys):
    assert_fails(lambda: speed.main(argv), message, capsys)
