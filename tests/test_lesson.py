"""
The lesson runs from top to bottom, and prints what is stored in the file and what the text says. This command
runs it and stores what it prints; out/lesson must be gone: jupyter execute --inplace docs/lesson.ipynb
"""

import contextlib
import io
import json
from pathlib import Path

import matplotlib
import pytest
import torch

import train
from data import corpus

ROOT = Path(train.__file__).parent
CELLS = json.loads((ROOT / "docs" / "lesson.ipynb").read_text(encoding="utf-8"))["cells"]
CODE = [cell for cell in CELLS if cell["cell_type"] == "code"]
BY_HAND = 8  # cells before the training: their numbers are small, and the same on every machine


def run(cells: list[dict], names: dict) -> list[str]:
    """What the cells print. names: their variables. A check in a cell may raise an AssertionError."""
    texts = []
    for cell in cells:
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec("".join(cell["source"]), names)
        texts.append(printed.getvalue())
    return texts


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The corpus and the run go to a temporary folder, and no window opens. PyTorch's settings come back."""
    matplotlib.use("Agg")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    yield
    torch.set_printoptions(profile="default")


def test_the_numbers_to_check_by_hand_and_the_answers_of_the_exercises():
    stored = ["".join(line for output in cell["outputs"] for line in output.get("text", [])
                      if output["output_type"] == "stream") for cell in CODE[:BY_HAND]]
    names = {}
    assert run(CODE[:BY_HAND], names) == stored
    assert str(ROOT) not in json.dumps(CELLS), "no path of this machine"
    text = {cell["id"]: " ".join("".join(cell["source"]).split()) for cell in CELLS}
    scores = torch.tensor([[2.0, 0], [0, 2], [1, 1]]) @ torch.tensor([5.0, 0])
    assert scores.tolist() == [10, 0, 5] and "The scores are 10, 0 and 5" in text["exercise-1"]
    weights = [f"{weight:.1g}" if weight < 0.9 else f"{weight:.3f}" for weight in scores.softmax(0).tolist()]
    assert weights == ["0.993", "5e-05", "0.007"] and "0.993, 0.00005 and 0.007" in text["exercise-1"]
    assert names["sums"][divmod(5, 3)] == 2 and "Its score is `1 + 1 = 2`" in text["exercise-3"]
    assert all(f"= {number}`" in text["exercise-4"] for number in (11, 9, 8, 6, 4, 10))
    assert names["needed"](4).sum() == 8 and "= 8` of 16" in text["exercise-5"]
    model = train.GPT(train.TrainConfig(**train.PRESETS["facts"], vocab_size=300))
    layer = model.blocks[0].memory
    assert layer.half_keys.numel() == model.pool.num_values == 16_384 and layer.heads * layer.knn == 64
    assert text["exercise-6"].count("16,384") == 4
    pool = names["ValuePool"](9, 2)
    (pool(names["slots"], torch.tensor([[0.75, 0.25], [0.25, 0.75]])) * names["dy"]).sum().backward()
    assert pool.values.grad.to_dense()[[7, 4, 1]].tolist() == [[3, 2], [0, 6], [1, 0]]
    assert all(row in text["exercise-7"] for row in ("= [3, 2]`", "= [0, 6]`", "stays [1, 0]"))


@pytest.mark.slow
def test_it_runs_from_top_to_bottom():
    texts = run(CODE, {"__name__": "__main__"})
    assert len(texts) == 13 and all(texts)
