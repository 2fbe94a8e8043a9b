"""The lesson runs from top to bottom, and prints what is stored in the file and what the text says."""

import json
import re
import sys

import pytest
import torch

import train
from data import corpus

sys.path.insert(0, str(corpus.DATA.parent / "docs"))
from make_lesson import LESSON, code_cells, read_lesson, run_cell  # noqa: E402

BY_HAND = 7  # cells before the training: their numbers are small, and the same on every machine


def printed(outputs: list[dict]) -> str:
    return "".join(line for output in outputs for line in output.get("text", []))


def run(cells: list[dict]) -> list[str]:
    """What the cells print. Raises an AssertionError where a check in a cell fails."""
    names = {"__name__": "__main__"}
    return [printed(run_cell("".join(cell["source"]), names)) for cell in cells]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    """The corpus and the run go to a temporary folder. Settings of PyTorch and sys.path come back."""
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(corpus, "DATA", tmp_path / "data")
    yield
    torch.set_printoptions(profile="default")


def test_the_numbers_to_check_by_hand_are_the_stored_ones():
    cells = code_cells(read_lesson())[:BY_HAND]
    assert run(cells) == [printed(cell["outputs"]) for cell in cells]


def test_the_answers_of_the_exercises():
    names, lesson = {}, read_lesson()
    for cell in code_cells(lesson)[:BY_HAND]:
        run_cell("".join(cell["source"]), names)
    text = {cell["id"]: " ".join("".join(cell["source"]).split()) for cell in lesson["cells"]}
    scores = torch.tensor([[2.0, 0], [0, 2], [1, 1]]) @ torch.tensor([5.0, 0])
    assert scores.tolist() == [10, 0, 5] and "The scores are 10, 0 and 5" in text["exercise-1"]
    weights = [f"{weight:.1g}" if weight < 0.9 else f"{weight:.3f}" for weight in scores.softmax(0).tolist()]
    assert weights == ["0.993", "5e-05", "0.007"] and "0.993, 0.00005 and 0.007" in text["exercise-1"]
    assert names["sums"][divmod(5, 3)] == 2 and "Its score is `1 + 1 = 2`" in text["exercise-3"]
    scores, slots = names["product_key_search"](
        torch.ones(1, 1, 2, 1), torch.tensor([[1.0, 6, 3, 0], [3, 0, 5, 1]]).view(1, 2, 4, 1), 3)
    assert scores.flatten().tolist() == [11, 9, 8] and slots.flatten().tolist() == [6, 4, 10]
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
    texts = run(code_cells(read_lesson()))
    assert len(texts) == 12 and all(texts)


def test_its_form():
    """Twelve steps: a text, at most 20 lines of code that were run, and one exercise with an answer."""
    lesson = read_lesson()
    cells = lesson["cells"]
    kinds = ["markdown", *12 * ["markdown", "code", "markdown"], "markdown"]
    assert [cell["cell_type"] for cell in cells] == kinds
    for step in range(1, 13):
        text, code, exercise = cells[3 * step - 2:3 * step + 1]
        assert text["source"][0].startswith(f"## {step}. ")
        assert code["execution_count"] == step and code["outputs"]
        assert all(output["output_type"] != "error" for output in code["outputs"])
        assert len(code["source"]) <= 20 and max(map(len, code["source"])) <= 111  # with the newline
        exercise = "".join(exercise["source"])
        assert exercise.count(f"**Exercise {step}.**") == exercise.count("**Exercise") == 1
        assert exercise.count("<details><summary>Answer</summary>\n\n") == 1
        assert exercise.endswith("\n\n</details>")
    assert LESSON.stat().st_size < 300_000


def test_jupyter_can_read_it():
    """What nbformat 4.5 asks for: https://nbformat.readthedocs.io/en/latest/format_description.html"""
    lesson = read_lesson()
    assert (lesson["nbformat"], lesson["nbformat_minor"]) == (4, 5) and "kernelspec" in lesson["metadata"]
    ids = [cell["id"] for cell in lesson["cells"]]
    assert len(set(ids)) == len(ids) and all(re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", name) for name in ids)
    for cell in lesson["cells"]:
        of_code = {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert cell.keys() == {"cell_type", "id", "metadata", "source"} | of_code
    text = json.dumps(lesson)
    assert "/home/" not in text and str(LESSON.parents[1]) not in text
