"""README.md stays short, its code and the code in docs/ runs as it stands there, and its table is true."""

import math
import re
import shutil
import subprocess
import sys
import tomllib
import types
from pathlib import Path

import pytest
import torch

from experiments import compare
from memory import MemoryLayer
from pool import ValuePool

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str, text: str = README) -> list[str]:
    return [part.split("```")[0] for part in text.split(f"```{language}\n")[1:]]


def test_it_is_short():
    lines, words = README.splitlines(), README.split()
    without_links = re.sub(r"https?://[^ )]*", "", README)
    numbers = re.findall(r"(?<![\w.])\d[\d,.]*", without_links)
    assert len(lines) <= 220 and len(words) <= 2200 and len(numbers) <= 200
    assert "°" not in README
    assert max(map(len, lines)) <= 130


def test_its_table_is_what_the_command_prints(capsys):
    compare.main(["summary"])
    table = capsys.readouterr().out.strip()
    assert table in README
    assert len(table.splitlines()) <= 2 + 6 and table.splitlines()[0].count("|") == 5


def test_its_files_exist():
    pages = (ROOT / "README.md", ROOT / "experiments/README.md", *(ROOT / "docs").glob("*.md"))
    links = [(page, link) for page in pages
             for link in re.findall(r"\]\((?!http)([^)#\s]+)", page.read_text(encoding="utf-8"))]
    index = ROOT / "docs/index.html"
    targets = re.findall('(?:href|src)="([^"]+)"', index.read_text(encoding="utf-8"))
    assert len(targets) == 9
    links += [(index, link) for link in targets]
    for page, link in links:
        assert (page.parent / link).exists(), (page, link)


def test_the_picture_can_be_read_where_only_the_system_is_dark():
    """It was white on white: a picture follows the system, and the page around it may not."""
    picture = (ROOT / "docs/product_keys.svg").read_text(encoding="utf-8")
    _, _, width, height = re.search(r'viewBox="(.*?)"', picture)[1].split()
    assert f'<rect width="{width}" height="{height}" rx="8" class="paper"/>' in picture
    assert len(re.findall(r"\.paper { fill: #[0-9a-f]+ }", picture)) == 2, "one for light, one for dark"


def test_pip_and_uv_install_the_requirements_and_no_package():
    """`pip install -e .` and `uv run train.py`: the programs stay in this folder."""
    tables = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    assert tables["project"]["name"] == "nanopkm" and tables["project"]["requires-python"] == ">=3.11"
    setuptools = tables["tool"]["setuptools"]
    assert tables["project"]["dynamic"] == ["dependencies"] and setuptools["packages"] == []
    file, = setuptools["dynamic"]["dependencies"]["file"]
    assert (ROOT / file).read_text(encoding="utf-8").startswith("torch") and setuptools["py-modules"] == []


@pytest.mark.parametrize("heads, knn, num_keys", [(1, 1, 1), (2, 3, 4), (4, 16, 32)])
def test_the_idea_is_the_layer(heads, knn, num_keys):
    names = {}
    exec(blocks("python")[0], names)
    torch.manual_seed(0)
    layer = MemoryLayer(12, num_keys, heads, knn, key_dim=8, value_dim=10).double()
    pool = ValuePool(num_keys**2, 10, dtype=torch.float64)
    x = torch.randn(9, 12, dtype=torch.float64)
    torch.testing.assert_close(names["product_key_memory"](x, layer, pool.values), layer(x, pool))
    assert len(blocks("python")[0].splitlines()) <= 30


def test_the_example_by_hand():
    left, right = [1.0, 6, 3, 0], [3.0, 0, 5, 1]
    text = " ".join(README.split())
    assert all(", ".join(f"{score:g}" for score in scores) in text for scores in (left, right))
    by_brute_force = sorted(((a + b, 4 * i + j) for i, a in enumerate(left) for j, b in enumerate(right)))
    best = by_brute_force[::-1][:3]
    assert best == [(11, 6), (9, 4), (8, 10)] and "the slots 6, 4 and 10" in text
    weights = torch.tensor([score for score, _ in best]).softmax(0)
    assert "0.84, 0.11 and 0.04" in text
    assert [round(weight, 2) for weight in weights.tolist()] == [0.84, 0.11, 0.04]


def test_the_example_of_a_model_of_one_s_own_learns(tmp_path):
    """With nothing but the three files that it says, and without numpy."""
    for name in ("memory.py", "pool.py", "kernel.py"):
        shutil.copy(ROOT / name, tmp_path)
    example = "torch.manual_seed(0)\n" + blocks("python")[1]
    code = ("import sys; sys.path[:0] = ['.']; sys.modules['numpy'] = None; import torch\n"
            + example.replace("range(100)", "range(1)") + example)
    printed = subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True,
                             stdout=subprocess.PIPE).stdout
    first, last = map(float, printed.split())
    assert last < 0.5 * first


# --- nanoGPT with memory layers -----------------------------------------------------------------------------

# Two modules as in nanoGPT, with its names: a small GPT, and a training loop
MODEL = """
from dataclasses import dataclass
import torch
import torch.nn as nn
from torch.nn import functional as F

class MLP(nn.Sequential):
    def __init__(self, config):
        super().__init__(nn.Linear(config.n_embd, config.n_embd))

class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.ln_2 = nn.LayerNorm(config.n_embd)
        self.mlp = MLP(config)

    def forward(self, x):
        x = x + self.mlp(self.ln_2(x))
        return x

@dataclass
class GPTConfig:
    vocab_size: int = 50
    n_layer: int = 12
    n_embd: int = 32
    bias: bool = False

class GPT(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.transformer = nn.ModuleDict(dict(
            wte = nn.Embedding(config.vocab_size, config.n_embd),
            h = nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
        ))
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)

    def forward(self, idx, targets):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        return F.cross_entropy(self.lm_head(x).flatten(0, 1), targets.flatten())

    def configure_optimizers(self, weight_decay, learning_rate, betas, device_type):
        param_dict = {pn: p for pn, p in self.named_parameters()}
        param_dict = {pn: p for pn, p in param_dict.items() if p.requires_grad}
        return torch.optim.AdamW(param_dict.values(), learning_rate, betas, weight_decay=weight_decay)
"""

TRAIN = """
import torch
from model import GPTConfig, GPT

grad_clip, decay_lr, learning_rate, device_type = 1.0, True, 1e-2, 'cpu'
weight_decay, beta1, beta2 = 0.1, 0.9, 0.95

def get_lr(it):
    return learning_rate * (1 - it / 80)

torch.manual_seed(0)
idx, targets = torch.randint(50, (2, 4, 16))
model = GPT(GPTConfig())
optimizer = model.configure_optimizers(weight_decay, learning_rate, (beta1, beta2), device_type)
scaler = torch.amp.GradScaler('cpu', enabled=False)
losses = []
for iter_num in range(60):
    lr = get_lr(iter_num) if decay_lr else learning_rate
    for param_group in optimizer.param_groups:
        param_group['lr'] = lr
    loss = model(idx, targets)
    scaler.scale(loss).backward()
    if grad_clip != 0.0:
        torch.nn.utils.clip_grad_norm_(model.parameters(), grad_clip)
    scaler.step(optimizer)
    scaler.update()
    optimizer.zero_grad(set_to_none=True)
    losses.append(loss.item())
"""


def apply(diff: str, source: str) -> str:
    """Lines that the diff does not change stand in `source`, in this order, perhaps with others between."""
    done, rest = [], source.splitlines()
    for line in diff.splitlines():
        if line.startswith("+"):
            done.append(line[1:])
        else:
            text = line[1:]
            assert text in rest, f"the diff changes {text!r}, which is not there"
            place = rest.index(text)
            done += rest[:place] if line.startswith("-") else rest[:place + 1]
            rest = rest[place + 1:]
    return "\n".join(done + rest)


def test_the_diff_gives_nanogpt_a_memory(monkeypatch):
    """Guards a NameError: an import of train.py stood in the diff of model.py."""
    diffs = blocks("diff", (ROOT / "docs/nanogpt.md").read_text(encoding="utf-8"))
    assert 10 <= sum(line.startswith("+") for line in "".join(diffs).splitlines()) <= 20
    modules = {}
    for name, diff, source in zip(("model", "train"), diffs, (MODEL, TRAIN), strict=True):
        modules[name] = types.ModuleType(name)
        monkeypatch.setitem(sys.modules, name, modules[name])  # here train.py finds model.py
        exec(apply(diff, source), vars(modules[name]))
    trained = modules["train"]
    model = trained.model
    assert sum(isinstance(module, MemoryLayer) for module in model.modules()) == 3
    assert model.pool.values.grad is None, "zero_grad has forgotten the last step's reads"
    start = math.log(50)
    assert trained.losses[0] > 0.8 * start and trained.losses[-1] < 0.5 * trained.losses[0]
    pool_optimizer = trained.pool_optimizer
    assert pool_optimizer.state[model.pool.values]["step"] == 60
    assert math.isclose(pool_optimizer.param_groups[0]["lr"], 10 * trained.lr), "it follows the schedule"
