"""Two and four processes, connected by gloo, equal one; and what befalls one of them ends or restarts all."""

import json
import os
import random
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import SMALL, assert_fails, log, tensors

import checkpoint
import train
from distributed import Group, Sharding
from memory import ValuePool

WORKER = """
import os, signal, sys
from pathlib import Path
import checkpoint, evaluate, train
from data import prepare
from distributed import RANK, gather_objects
prepare.DATA = evaluate.DATA = Path(sys.argv[1])
{patch}
train.main(sys.argv[2:])
"""


class Processes:
    """`world` processes that train together, each given a bit of code first; output and exit statuses."""

    def __init__(self, world: int, data: Path, options, patch: str = ""):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        shared = {
            "WORLD_SIZE": str(world),
            "MASTER_ADDR": "localhost",
            "MASTER_PORT": str(port),
            "OMP_NUM_THREADS": "1",
        }
        self.all = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER.format(patch=patch), data, *SMALL, *options],
                cwd=Path(train.__file__).parent,
                text=True,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            )
            for rank in range(world)
        ]

    def wait(self):
        results = [process.communicate(timeout=120) for process in self.all]
        self.out, self.err = ([result[i] for result in results] for i in (0, 1))
        self.status = [process.returncode for process in self.all]
        return self


@pytest.fixture
def together(facts_folder):
    """together(world, options): trains, and all goes well."""

    def together(world, *options, patch=""):
        processes = Processes(world, facts_folder, options, patch).wait()
        assert processes.status == [0] * world, processes.err
        return processes

    return together


def whole_pool(folder: Path) -> dict:
    names = checkpoint.load_part(folder, next(folder.glob("pool_0*")).name)
    return checkpoint.load_pool(folder, Group(), names)


def assert_equal_but_for_rounding(a: Path, b: Path):
    """Losses, recall, slot use, values, state of the optimisers."""
    for one, two in zip(log(a), log(b), strict=True):
        assert one.pop("recall", None) == two.pop("recall", None)
        assert one == pytest.approx(two, rel=1e-4)
    a, b = checkpoint.checkpoints(a)[-1], checkpoint.checkpoints(b)[-1]
    for one, two in ((whole_pool(a), whole_pool(b)), (tensors(a), tensors(b))):
        names = [name for name in one if not name.startswith("pool_")]
        assert set(names) == {name for name in two if not name.startswith("pool_")}
        for name in names:
            torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=2e-5,
                                       msg=lambda m, n=name: n + m)


REPLICAS_ARE_EQUAL = """
save = train.save_checkpoint
def check_and_save(out_dir, step, model, optimizers, meta, keep):
    pool = model.pool
    mine = pool.sharding.columns.rank, pool.values, *optimizers[1].state[pool.values].values()
    dense = [p.detach() for p in model.parameters() if p.requires_grad]
    same = lambda a, b: a.equal(b) if hasattr(a, "equal") else a == b
    for rank, (other, *tensors) in enumerate(gather_objects(mine)):
        assert other != mine[0] or all(map(same, tensors, mine[1:])), rank
    for rank, other in enumerate(gather_objects(dense)):
        assert all(map(same, other, dense)), rank
    save(out_dir, step, model, optimizers, meta, keep)
train.save_checkpoint = check_and_save
"""


@pytest.mark.parametrize(
    "world, options",
    [
        (2, ["--value_optimizer=adam", "--accum_steps=2", "--mem_group_size=1"]),
        (2, ["--mem_kind=peer"]),
        (2, ["--mem_kind=hash", "--mem_layers=0,1"]),
        pytest.param(4, ["--mem_group_size=2", "--batch_size=8", "--accum_steps=2"], marks=pytest.mark.slow),
    ],
)
def test_many_processes_equal_one(run, together, world, options):
    run(*(option for option in options if "group" not in option))
    out = run.out.with_name("together")
    printed = together(world, f"--out_dir={out}", *options, patch=REPLICAS_ARE_EQUAL)
    assert_equal_but_for_rounding(run.out, out)
    assert printed.out[0].count("validation loss") == 1 and not "".join(printed.out[1:] + printed.err)
    assert (out / "loss.png").exists()


PRINT_ANSWERS = """
answer = evaluate.answer
def printing(*arguments):
    answers = answer(*arguments)
    print("answers", answers, flush=True)
    return answers
evaluate.answer = printing
"""


def test_processes_share_questions_and_all_get_all_answers(together, tmp_path):
    """Of which neither number nor lengths are alike for each."""
    options = "--max_steps=1", "--eval_questions=15", "--mem_layers=0,1", "--scale_embeddings=false"
    one, two = (together(world, *options, f"--out_dir={tmp_path / str(world)}", patch=PRINT_ANSWERS)
                for world in (1, 2))
    first, *others = (next(line for line in out.splitlines() if line.startswith("answers"))
                      for out in (*one.out, *two.out))
    answers = json.loads(first.removeprefix("answers"))
    assert len(answers) == 15 and len(set(map(tuple, answers))) > 3, "else this shows nothing"
    assert others == [first] * 2


STOP_AFTER = """
draw = train.draw_batch
def stopping(*arguments):
    if RANK == 0 and arguments[-2:] == (0, {steps} - 1):
        signal.raise_signal(signal.SIGTERM)
    return draw(*arguments)
train.draw_batch = stopping
"""


@pytest.mark.slow
def test_a_checkpoint_goes_from_1_to_4_to_2_to_1_processes(run, together):
    options = ["--max_steps=8", "--eval_interval=2", "--mem_layers=0,1", "--keep=9"]
    whole = run.out.with_name("whole")
    run(*options, out=whole)
    shutil.copytree(whole, run.out)
    for step in (4, 6, 8):
        shutil.rmtree(run.out / f"step_00000{step}", ignore_errors=True)
    for world, steps in ((4, 4), (2, 6)):
        together(world, *options, f"--out_dir={run.out}", "--resume", patch=STOP_AFTER.format(steps=steps))
        folder = checkpoint.checkpoints(run.out)[-1]
        assert checkpoint.step_of(folder) == steps
        assert {path.name for path in folder.glob("pool*")} == {f"pool_{i}of{world}.pt" for i in range(world)}
    run(*options, "--resume")
    assert_equal_but_for_rounding(whole, run.out)


def test_an_error_in_one_process_ends_all(facts_folder, tmp_path):
    """With the message of the one, and no other's traceback."""
    patch = """
draw = train.draw_batch
def broken(*arguments):
    if RANK == 1 and arguments[-2:] == (0, 4):
        raise ZeroDivisionError("of process 1 alone")
    return draw(*arguments)
train.draw_batch = broken
"""
    ended = Processes(2, facts_folder, [f"--out_dir={tmp_path / 'out'}"], patch).wait()
    assert all(ended.status)
    assert "ZeroDivisionError: of process 1 alone" in ended.err[1] and "Traceback" not in ended.err[0]
    assert "process 0 ends, having lost another" in ended.err[0]
    assert checkpoint.find_checkpoint(tmp_path / "out").name == "step_000003"


def test_what_cannot_be_shared_out_is_refused(facts_folder, tmp_path):
    options = [f"--out_dir={tmp_path / 'out'}", "--value_blocks=1"]
    ended = Processes(2, facts_folder, options).wait()
    assert ended.status == [2, 2] and ended.err[1] == "", ended.err
    assert ended.err[0] == (
        "error: --value_blocks=1 must be a multiple of the 2 processes that share the pool's columns\n"
    )


def test_what_cannot_be_shared_out_is_refused_by_name(run, monkeypatch, capsys):
    monkeypatch.setattr(train, "WORLD_SIZE", 3)
    monkeypatch.setattr(checkpoint, "WORLD_SIZE", 3)
    assert_fails(lambda: run("--batch_size=4"), "--batch_size=4 must be a multiple of 3: 3 processes", capsys)
    assert_fails(
        lambda: run("--batch_size=6", "--mem_group_size=2"),
        "--mem_group_size=2 must divide the number of processes, 3",
        capsys,
    )
    assert_fails(lambda: run("--batch_size=6"), "--n_embd=16 must be a multiple of 3", capsys)
    with pytest.raises(ValueError, match="value_dim=16 must be a multiple of the 3 processes"):
        ValuePool(9, 16, sharding=Sharding(Group(3, 0)))


@pytest.mark.slow
def test_a_shared_pool_in_files_and_a_shard_gone(run, together, tmp_path):
    run()
    out = run.out.with_name("files")
    options = f"--out_dir={out}", f"--mem_file={tmp_path / 'pool'}", "--resume"
    together(2, *options)
    assert {path.name for path in tmp_path.glob("pool*")} == {"pool.0of2", "pool.1of2"}
    assert_equal_but_for_rounding(run.out, out)
    (out / "step_000006" / "pool_1of2.pt").unlink()
    again = together(2, *options)
    assert "step_000006 is damaged and passed over: pool_1of2.pt is missing" in again.out[0]
    assert_equal_but_for_rounding(run.out, out)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_nothing_is_lost(run, together, facts_folder):
    """SIGKILL at a random moment, to either process; the losses are those of a run left alone."""
    options = "--max_steps=200", "--eval_interval=10"
    together(2, *options, f"--out_dir={run.out}")
    out = run.out.with_name("killed")
    script = run.out.with_name("worker.py")
    script.write_text(WORKER.format(patch="print('process', os.getpid(), flush=True)"))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc_per_node=2",
        "--max-restarts=3",
        "--monitor-interval=0.1",
        f"--master-port={random.randint(20_000, 60_000)}",
        script,
        facts_folder,
        *SMALL,
        *options,
        f"--out_dir={out}",
    ]
    root = str(Path(train.__file__).parent)
    env = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root}
    job = subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    pids = [int(re.match(r"process (\d+)", job.stdout.readline()).group(1)) for _ in range(2)]
    try:
        while not checkpoint.checkpoints(out) and job.poll() is None:
            time.sleep(0.02)
        time.sleep(random.uniform(0, 0.5))
        os.kill(random.choice(pids), signal.SIGKILL)
        printed = job.communicate(timeout=240)[0]
    finally:
        job.terminate()  # and with it its processes
    assert job.returncode == 0 and "resumed from" in printed, printed
    losses = [[line["loss"] for line in log(folder) if "loss" in line] for folder in (run.out, out)]
    assert len(losses[0]) == 200 and losses[0] == losses[1]
    assert json.loads((out / "step_000200" / "meta.json").read_text())["step"] == 200
