"""The README's code runs as it stands there."""

from pathlib import Path

import torch

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_the_example_of_a_model_of_one_s_own_learns():
    code = README.split("```python\n")[1].split("```")[0]
    names = {}
    torch.manual_seed(0)
    exec(code.replace("range(100)", "range(1)"), names)
    first = names["loss"].item()
    assert len(names["pool"].values.grad.reads) == 1
    torch.manual_seed(0)
    exec(code, names)
    assert names["loss"].item() < 0.5 * first
