"""
Two and four processes, connected by gloo, compute what one process computes. An error in one of them
ends all, or restarts all.
"""

import itertools
import json
import os
import random
import re
import runpy
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

import train
from runtime import checkpoint, distributed
from runtime.distributed import Group, ShardedPool, data_parallel

WORKER = """
import os, signal, sys
from pathlib import Path
import evaluate, train
from data import corpus
from runtime import checkpoint, distributed, log
from runtime.distributed import RANK, columns_group, gather_objects
corpus.DATA = Path(sys.argv[1])
{patch}
train.main(sys.argv[2:])
"""


class Processes:
    """`world` processes that run the same code; afterwards their output and their exit statuses."""

    def __init__(self, world: int, code: str, *arguments):
        with socket.socket() as s:
            s.bind(("localhost", 0))
            port = s.getsockname()[1]
        shared = {"WORLD_SIZE": str(world), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port),
                  "OMP_NUM_THREADS": "1"}
        self.all = [
            subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=Path(train.__file__).parent,
                             text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                             env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
            for rank in range(world)
        ]

    def wait(self):
        results = [process.communicate(timeout=120) for process in self.all]
        self.out, self.err = ([result[i] for result in results] for i in (0, 1))
        self.status = [process.returncode for process in self.all]
        return self


def start_training(world: int, data: Path, options, patch: str = "") -> Processes:
    return Processes(world, WORKER.format(patch=patch), data, *SMALL, *options)


# --- a model of one's own -----------------------------------------------------------------------------------

OWN_MODEL = """
import copy, pickle, sys
import torch
import torch.nn as nn
from baselines import PEER
from memory import MemoryLayer
from pool import PoolOptimizer, ValuePool
from runtime import distributed
from runtime.distributed import RANK, ShardedPool, data_parallel

world, group_size, kind = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.start("cpu")

class Model(nn.Module):
    def __init__(self, pool_class, **options):
        super().__init__()
        self.pool, self.expert_pool = (pool_class(rows, 8, **options) for rows in (36, 32))
        self.layers = nn.ModuleList(MemoryLayer(8, 6, 2, 3, 4, 8) for _ in range(2))
        self.experts = PEER(8, 4, 2, 2, 4)
    def forward(self, x):
        for layer in self.layers:
            x = x + layer(x, self.pool)
        return x + self.experts(x, self.expert_pool)

def make(pool_class, **options):
    torch.manual_seed(0)
    return Model(pool_class, **options).double()

alone, model = make(ValuePool), make(ShardedPool, group_size=group_size)
parallel = data_parallel(model)
columns = model.pool.columns_group
mine = lambda x: x.chunk(columns.size, 1)[columns.rank]
pools = lambda m: [m.pool, m.expert_pool]
optimizers = [PoolOptimizer([p.values for p in pools(m)], lr=0.1, kind=kind, value_blocks=blocks)
              for m, blocks in ((alone, 4), (model, 4 // columns.size))]
for ours, whole in zip(pools(model), pools(alone)):
    assert torch.equal(ours.values, mine(whole.values)), "the same initial values"
for step in range(4):
    x = torch.randn(8 * world, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
    for m in (alone, model):
        m.zero_grad()
        m.pool.usage.reset()
    for part in x.chunk(2):  # two micro-batches
        alone(part).square().mean().backward()
        parallel(part.chunk(world)[RANK]).square().mean().backward()
    for ours, whole in zip(pools(model), pools(alone)):
        torch.testing.assert_close(ours.values.grad.to_dense(), mine(whole.values.grad.to_dense()))
    for (name, p), q in zip(model.named_parameters(), alone.parameters()):
        if not name.endswith("values"):
            torch.testing.assert_close(p.grad, q.grad, msg=lambda m, name=name: name + m)
    if step == 2:  # a number in one column of one process is infinite, or its square: nobody learns
        before = [p.values.clone() for p in pools(model)]
        for count, bad in enumerate((torch.inf, 1e160), 1):
            model.zero_grad()
            y = model.pool(torch.zeros(1, 2, dtype=torch.int64), torch.rand(1, 2).double())
            dy = torch.ones_like(y)
            dy[0, 0] = bad if RANK == world - 1 else 1
            y.backward(dy)
            optimizers[1].step()
            assert optimizers[1].skipped_steps == count
        assert all(torch.equal(p.values, b) for p, b in zip(pools(model), before))
        continue
    for optimizer in optimizers:
        optimizer.step()
    for ours, whole in zip(pools(model), pools(alone)):
        torch.testing.assert_close(ours.values, mine(whole.values))
    # the tokens of all processes count as use, each once
    shares = [m.pool.usage.summary() for m in (alone, model)]
    torch.testing.assert_close(torch.tensor(shares[0]), torch.tensor(shares[1]))

twin = copy.deepcopy(model)
assert twin.pool.columns_group is model.pool.columns_group and twin.pool.values is not model.pool.values
torch.testing.assert_close(twin(x), model(x))
try:
    pickle.dumps(model)
    assert world == 1
except TypeError as error:
    assert "cannot pickle" in str(error)
model.layers.requires_grad_(False), model.experts.requires_grad_(False)
model.zero_grad()
data_parallel(model)(x.chunk(world)[RANK]).sum().backward()  # nothing is left for DDP; the pools still learn
assert model.pool.values.grad.to_dense().any()
print("done")
"""


@pytest.mark.parametrize("world, group_size, kind", [
    (2, 2, "sgd"), (2, 1, "rowwise"),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (2, 2, "rowwise"), (2, 2, "adam"), (2, 1, "sgd"),
        *itertools.product((4,), (2, 4), ("sgd", "rowwise", "adam"))]),
])
def test_a_model_of_one_s_own_on_many_processes_equals_one(world, group_size, kind):
    """By the gradients and by sgd too: rowwise and adam would hide a gradient that is scaled wrongly."""
    ended = Processes(world, OWN_MODEL, str(world), str(group_size), kind).wait()
    assert ended.status == [0] * world, ended.err
    assert ended.out == ["done\n"] * world


SMALL_MODEL = """
import warnings
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from memory import MemoryLayer
from pool import PoolOptimizer, ValuePool
from runtime import distributed
from runtime.distributed import RANK, ShardedPool, data_parallel

class Model(torch.nn.Module):
    def __init__(self, pool_class, **options):
        super().__init__()
        self.pool, self.layer = pool_class(36, 8, **options), MemoryLayer(8, 6, 2, 3, 4, 8)
    def forward(self, x):
        return self.layer(x, self.pool)

early = Model(ShardedPool)
distributed.start("cpu")
"""


def run_small_model(code: str) -> None:
    ended = Processes(2, SMALL_MODEL + code).wait()
    assert ended.status == [0, 0], ended.err


def test_a_bare_ddp_around_a_pool_ends_in_an_error_before_any_step():
    run_small_model("""
for pool_class in (ValuePool, ShardedPool):
    for options in ({}, dict(gradient_as_bucket_view=True), dict(static_graph=True)):
        torch.manual_seed(0)
        model = Model(pool_class)
        before = [p.detach().clone() for p in model.parameters()]
        try:
            parallel = DistributedDataParallel(model, init_sync=False, **options)
            parallel(torch.randn(5, 8)).sum().backward()
            assert False, "no error"
        except ValueError as error:
            assert "DDP" in str(error)
        assert all(map(torch.equal, before, model.parameters()))
""")


def test_a_sharded_pool_works_with_fsdp_and_a_plain_one_warns():
    """With a ValuePool, each process would learn a pool of its own: here the one of the whole batch warns."""
    run_small_model("""
models = []
for pool_class in (ValuePool, ShardedPool):
    torch.manual_seed(0)
    models.append(Model(pool_class))
alone, model = models
fully_shard(model, mesh=init_device_mesh("cpu", (2,)), ignored_params={model.pool.values})
optimizers = [[torch.optim.SGD([p for p in m.parameters() if p is not m.pool.values], lr=0.1),
               PoolOptimizer([m.pool.values], lr=0.1, kind="sgd")] for m in models]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for step in range(5):
        x = torch.randn(8, 8, generator=torch.Generator().manual_seed(step))
        for m, part, both in ((alone, x, optimizers[0]), (model, x.chunk(2)[RANK], optimizers[1])):
            m(part).square().mean().backward()
            for optimizer in both:
                optimizer.step()
                optimizer.zero_grad()
torch.testing.assert_close(model.pool.values, alone.pool.values.chunk(2, 1)[RANK])
assert ["ShardedPool" in str(warning.message) for warning in caught] == [True]
""")


def test_copies_of_a_pool_start_equal_and_wrong_pools_are_refused():
    """Seeds often differ between processes. DDP then copies the first one's weights, and so does the pool."""
    run_small_model("""
for model in (early, Model(ValuePool)):
    try:
        data_parallel(model)
        assert False, "no error"
    except ValueError as error:
        assert "after the processes were connected" in str(error)
torch.manual_seed(RANK)
model = Model(ShardedPool, group_size=1)
data_parallel(model)(torch.randn(5, 8)).sum().backward()
values = model.pool.values
for tensor in (values.detach(), values.grad.to_dense(), model.layer.out.weight.detach()):
    both = [torch.empty_like(tensor) for _ in range(2)]
    dist.all_gather(both, tensor)
    assert torch.equal(*both)
""")


def test_the_files_to_copy_for_many_processes_are_enough(tmp_path):
    """As docs/processes.md says. cli.py must stand in runtime/, too."""
    root = Path(__file__).parents[1]
    (tmp_path / "runtime").mkdir()
    for name in ("memory.py", "pool.py", "kernel.py", "runtime/distributed.py", "runtime/cli.py"):
        shutil.copy(root / name, tmp_path / name)
    code = "import sys; sys.path[:0] = ['.']; from runtime.distributed import ShardedPool, data_parallel"
    subprocess.run([sys.executable, "-I", "-c", code], cwd=tmp_path, check=True)


TORCHRUN = dict(RANK="1", WORLD_SIZE="4", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.mark.parametrize("changes, ranks", [
    ({}, (1, 4, 1)), (dict(LOCAL_RANK=None), (1, 4, 0)), (dict.fromkeys(TORCHRUN), (0, 1, 0)),
    (dict.fromkeys(TORCHRUN, ""), (0, 1, 0)), (dict(WORLD_SIZE=None), (0, 1, 0))])
def test_variables_of_a_cluster(changes, ranks, monkeypatch):
    """A process without WORLD_SIZE is alone. If it trains in the same folder as another, it is refused."""
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    module = runpy.run_path(distributed.__file__)
    assert tuple(module[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")) == ranks


@pytest.mark.parametrize("changes", [dict(MASTER_ADDR=None), dict(RANK=None), dict(MASTER_PORT="no number")])
def test_processes_that_cannot_connect_say_so(run, monkeypatch, capsys, changes):
    """Guards against many processes that train the same model, each alone."""
    for name, value in (TORCHRUN | changes).items():
        monkeypatch.delenv(name, raising=False) if value is None else monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "WORLD_SIZE", 4)
    assert_fails(run, "cannot connect to the others", capsys, also="start them with torchrun, or unset")
    assert not run.out.exists()


def test_a_process_that_is_alone_needs_no_group():
    pools = []
    for pool_class in (ShardedPool, distributed.ValuePool):
        torch.manual_seed(0)
        pools.append(pool_class(9, 4))
    assert torch.equal(pools[0].values, pools[1].values) and data_parallel(pools[0]) is pools[0]


# --- train.py -----------------------------------------------------------------------------------------------

@pytest.fixture
def together(facts_folder):
    """together(world, options): trains, and all goes well."""

    def together(world, *options, patch=""):
        processes = start_training(world, facts_folder, options, patch).wait()
        assert processes.status == [0] * world, processes.err
        return processes

    return together


def whole_pool(folder: Path) -> dict:
    return checkpoint.Checkpoint(folder).pool_columns(Group())


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
parts_of = train.parts_of
def check_parts(model, optimizers):
    pool = model.pool
    mine = columns_group(pool).rank, pool.values.detach(), *optimizers[1].state[pool.values].values()
    dense = [p.detach() for p in model.dense_parameters()]
    same = lambda a, b: a.equal(b) if hasattr(a, "equal") else a == b
    for rank, (other, *tensors) in enumerate(gather_objects(mine)):
        assert other != mine[0] or all(map(same, tensors, mine[1:])), rank
    for rank, other in enumerate(gather_objects(dense)):
        assert all(map(same, other, dense)), rank
    return parts_of(model, optimizers)
train.parts_of = check_parts
"""


@pytest.mark.parametrize("world, options", [
    (2, ["--value_optimizer=adam", "--accum_steps=2", "--mem_group_size=1"]),
    (2, ["--mem_query=tokens", "--mem_layers=0,1", "--value_optimizer=sgd", "--value_lr=3"]),
    *(pytest.param(*case, marks=pytest.mark.slow) for case in [
        (2, ["--mem_kind=peer"]),
        (2, ["--mem_kind=hash", "--mem_layers=0,1", "--train_only=memory", "--positions=learned"]),
        (4, ["--mem_group_size=2", "--batch_size=8", "--accum_steps=2"])])])
def test_many_processes_equal_one(run, together, world, options):
    run(*(option for option in options if "group" not in option))
    out = run.out.with_name("together")
    printed = together(world, f"--out_dir={out}", *options, patch=REPLICAS_ARE_EQUAL)
    assert_equal_but_for_rounding(run.out, out)
    assert printed.out[0].count("recall, the share of") == 1 and not "".join(printed.out[1:] + printed.err)
    assert (out / "loss.png").exists()


PRINT_ANSWERS = """
answer = evaluate.answer
def printing(*arguments):
    answers = answer(*arguments)
    print("answers", answers, flush=True)
    return answers
evaluate.answer = printing
"""


@pytest.mark.slow
def test_processes_share_questions_and_all_get_all_answers(together, tmp_path):
    """Of which neither number nor lengths are alike for each."""
    options = "--max_steps=1", "--eval_questions=15", "--mem_layers=0,1"
    outputs = [out for world in (1, 2) for out in together(
        world, *options, f"--out_dir={tmp_path / str(world)}", patch=PRINT_ANSWERS).out]
    first, *others = (re.search("^answers (.*)", out, re.MULTILINE)[1] for out in outputs)
    assert len(set(map(tuple, json.loads(first)))) > 3, "else this shows nothing"
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
    return 1 / 0 if RANK == 1 and arguments[-2:] == (0, 4) else draw(*arguments)
train.draw_batch = broken
"""
    ended = start_training(2, facts_folder, [f"--out_dir={tmp_path / 'out'}"], patch).wait()
    assert all(ended.status)
    assert "ZeroDivisionError" in ended.err[1] and "Traceback" not in ended.err[0]
    assert "process 0 ends because another process has ended" in ended.err[0]
    assert checkpoint.find_checkpoint(tmp_path / "out").step == 3


def test_what_cannot_be_shared_out_is_refused(facts_folder, tmp_path):
    options = [f"--out_dir={tmp_path / 'out'}", "--value_blocks=1"]
    ended = start_training(2, facts_folder, options).wait()
    assert ended.status == [2, 2] and ended.err[1] == "", ended.err
    assert ended.err[0] == (
        "error: --value_blocks=1 must be a multiple of the 2 processes that share the pool's columns\n")


def test_a_pool_that_cannot_be_split_is_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 3)
    with pytest.raises(ValueError, match="value_dim=16 must be a multiple of the 3 processes"):
        ShardedPool(9, 16)
    with pytest.raises(ValueError, match="group_size=2 must divide the number of processes, 3"):
        ShardedPool(9, 16, group_size=2)


@pytest.mark.slow
def test_a_shared_pool_in_files_and_a_shard_gone(run, together):
    run()
    out = run.out.with_name("files")
    options = f"--out_dir={out}", "--mem_on_disk", "--resume"
    together(2, *options)
    assert_equal_but_for_rounding(run.out, out)
    (out / "step_000006" / "pool_1of2.pt").unlink()
    assert "step_000006 is damaged and skipped: " in together(2, *options).out[0]
    assert_equal_but_for_rounding(run.out, out)


@pytest.mark.slow
def test_torchrun_restarts_a_killed_process_and_nothing_is_lost(run, together, facts_folder):
    """SIGKILL at a random moment, to either process; the losses are those of a run left alone."""
    options = "--max_steps=200", "--eval_interval=10"
    together(2, *options, f"--out_dir={run.out}")
    out, script = run.out.with_name("killed"), run.out.with_name("worker.py")
    script.write_text(WORKER.format(patch="print('process', os.getpid(), flush=True)"))
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--max-restarts=3",
                "--monitor-interval=0.1", f"--master-port={random.randint(20_000, 60_000)}"]
    root = str(Path(train.__file__).parent)
    job = subprocess.Popen([sys.executable, *torchrun, script, facts_folder, *SMALL, *options, "--resume",
                            f"--out_dir={out}"], text=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                           env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": root})
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
