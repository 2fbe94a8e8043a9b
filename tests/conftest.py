import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before kernel.py imports Triton

import sample  # noqa: E402
import train  # noqa: E402
from data import prepare  # noqa: E402

SMALL = [
    "--block_size=32",
    "--n_layer=2",
    "--n_head=2",
    "--n_embd=16",
    "--mem_layers=1",
    "--mem_num_keys=8",
    "--mem_heads=2",
    "--mem_knn=4",
    "--mem_key_dim=8",
    "--batch_size=4",
    "--max_steps=6",
    "--eval_interval=3",
    "--eval_batches=2",
    "--eval_questions=20",
    "--log_interval=1",
    "--warmup_steps=2",
    "--device=cpu",
]


@pytest.fixture(scope="session")
def facts_folder(tmp_path_factory):
    """A small corpus of facts, made once."""
    folder = tmp_path_factory.mktemp("data")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "DATA", folder)
        prepare.main(["facts", "--people=16", "--exposures=30", "--held_out=0.2"])
    return folder


@pytest.fixture
def run(facts_folder, tmp_path, monkeypatch):
    """run(options): trains a small model on a small corpus; what it leaves is in run.out."""
    for module in (prepare, train, sample):
        monkeypatch.setattr(module, "DATA", facts_folder)

    def run(*options, out=tmp_path / "out"):
        train.main([*SMALL, f"--out_dir={out}", *options])

    run.out = tmp_path / "out"
    return run
