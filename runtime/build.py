"""
Prepares a run: finds the checkpoint to continue from, and makes or loads the model. The pool is in memory or
in a file; many processes split it by columns.
"""

import contextlib
import fcntl
import functools
import os
from dataclasses import fields
from pathlib import Path

import torch
import torch.nn as nn

from model import GPT, GPTConfig
from pool import ValuePool
from runtime.checkpoint import checkpoints, find_checkpoint, is_checkpoint, load_part, load_pool
from runtime.cli import fail
from runtime.distributed import RANK, WORLD_SIZE, ShardedPool, columns_group, gather_objects

# In this file, `config` is a train.TrainConfig.


@contextlib.contextmanager
def own_folder(config):
    """
    Makes out_dir. In the `with` block, no other run may write there: the first process locks the file .lock.
    The lock ends with the process, even if that is killed. Called by all processes.
    """
    if config.eval_only:  # writes nothing
        yield
        return
    if not config.out_dir:
        fail("--out_dir= must name a folder")
    out_dir = Path(config.out_dir)
    lock, problem, is_new = None, None, not out_dir.exists()
    if is_checkpoint(out_dir):
        fail(f"--out_dir={out_dir} has the name of a checkpoint: name the folder of the run, such as "
             f"{out_dir.parent}")
    if RANK == 0:
        try:
            lock = lock_folder(out_dir)
        except BlockingIOError:
            problem = (f"another run is training in {out_dir}: choose another --out_dir, or wait. Many "
                       "processes train together if torchrun starts them")
        except OSError as error:
            problem = f"--out_dir={out_dir}: {error.strerror}"
    if problem := gather_objects(problem)[0]:
        fail(problem)
    try:
        yield
    finally:
        if lock:
            (out_dir / ".lock").unlink(missing_ok=True)
            if is_new:
                with contextlib.suppress(OSError):  # not empty
                    out_dir.rmdir()
            lock.close()


def lock_folder(out_dir: Path):
    """An open file that holds the lock. Raises a BlockingIOError if another process holds it."""
    out_dir.mkdir(parents=True, exist_ok=True)
    path = out_dir / ".lock"
    while True:
        lock = open(path, "a")
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            raise
        except OSError as error:  # some network disks have no locks
            print(f"{out_dir} cannot be locked ({error.strerror}): start no other run there", flush=True)
        with contextlib.suppress(FileNotFoundError):  # another run has just ended and removed the file
            if os.path.samestat(os.stat(path), os.fstat(lock.fileno())):
                return lock
        lock.close()


def find_start(config, checkpoint: Path | None) -> Path | None:
    """The checkpoint to continue from or to evaluate; None for a new run."""
    out_dir = Path(config.out_dir)
    if checkpoint is None and config.eval_only:
        return find_trained(out_dir)
    if checkpoint is None and config.resume:
        checkpoint = find_checkpoint(out_dir)
    if checkpoint is None and (existing := checkpoints(out_dir)):
        fail(f"{existing[-1]} already exists: continue from it with --resume, or choose another --out_dir")
    return checkpoint


def find_trained(out_dir: Path) -> Path:
    """The newest checkpoint, which must exist. out_dir: the folder of a run, or one checkpoint in it."""
    checkpoint = find_checkpoint(out_dir)
    if checkpoint is None:
        fail(f"no checkpoint in {out_dir}: train a model with python train.py, or name another --out_dir")
    return checkpoint


def check_same_model(config, stored) -> None:
    """
    Refuses options that would change the model or the pool's optimiser. A resumed run may change all other
    options. stored: the TrainConfig in the checkpoint.
    """
    fixed = {field.name for field in fields(GPTConfig)} - {"dropout", "kernel"}
    for name in sorted(fixed | {"value_optimizer", "value_blocks"}):
        if getattr(config, name) != getattr(stored, name):
            fail(f"--{name}={getattr(config, name)}: the model in {config.out_dir} has "
                 f"{getattr(stored, name)}, which cannot change; choose another --out_dir")


def make_model(config, checkpoint: Path | None) -> GPT:
    """
    A new model, or the model in the checkpoint, on the CPU. Each process has its columns of the pool. The
    weights are the same for any number of processes.
    """
    pool_class, file = choose_pool_class(config), choose_pool_file(config, checkpoint)
    model, problem = None, None
    try:
        if checkpoint:
            with torch.device("meta"):  # tensors without memory, which load_model replaces
                model = GPT(config, pool_class)
            load_model(checkpoint, model, file)
        else:
            if file:
                pool_class = functools.partial(pool_in_file, pool_class, file)
            torch.manual_seed(config.seed)
            model = GPT(config, pool_class)
    except ValueError as error:
        problem = f"--{error}"
    except (OSError, RuntimeError) as error:
        if not file and "alloc" not in str(error):  # torch reports a lack of memory as a RuntimeError
            raise
        cause = (f"--mem_file={file}" if file else
                 "the model does not fit into memory; --mem_file keeps the pool in a file")
        problem = f"{cause}: {str(error).splitlines()[0]}"
    if message := next(filter(None, gather_objects(problem)), None):
        fail(message)  # all processes fail, even if only one has the problem
    return model


def choose_pool_class(config):
    """ValuePool for one process, or ShardedPool for many: each process has some of the columns."""
    group_size = config.mem_group_size or WORLD_SIZE
    if WORLD_SIZE % group_size:
        fail(f"--mem_group_size={group_size} must divide the number of processes, {WORLD_SIZE}")
    if config.mem_layers and config.n_embd % group_size:
        fail(f"--n_embd={config.n_embd} must be a multiple of {group_size}, the processes that share the "
             "pool's columns")
    return functools.partial(ShardedPool, group_size=group_size) if WORLD_SIZE > 1 else ValuePool


def choose_pool_file(config, checkpoint: Path | None) -> str:
    """This process's file for the values of the pool; "" for a pool in memory."""
    file = config.mem_file
    if file and WORLD_SIZE > 1:
        file = f"{file}.{RANK}of{WORLD_SIZE}"
    # the file may exist if this run made it. Then the run has a checkpoint, or it has a log and is resumed
    is_same_run = checkpoint or config.resume and (Path(config.out_dir) / "log.jsonl").exists()
    if any(gather_objects(bool(file) and Path(file).exists() and not is_same_run)):
        fail(f"--mem_file={file} already exists: delete it, or choose another file")
    return file


def load_model(checkpoint: Path, model: GPT, file: str = "") -> None:
    """
    Gives a model on the meta device the parameters of a checkpoint. They are memory-mapped files, so a pool
    is never in memory twice. file: copy the pool's values to this file (see values_in_file).
    """
    state = load_part(checkpoint, "model.pt")
    if model.pool is not None:
        state["pool.values"] = stored = load_pool(checkpoint, columns_group(model.pool))["values"]
        if file:
            state["pool.values"] = values_in_file(stored, file).copy_(stored)
    model.load_state_dict(state, assign=True)


# --- a pool in a file ---------------------------------------------------------------------------------------

def values_in_file(like: torch.Tensor, path: str) -> torch.Tensor:
    """
    A tensor with the shape and dtype of `like`, stored in a file, so it may be larger than memory. An
    existing file is used if it has the right size.
    """
    if os.path.exists(path) and os.path.getsize(path) != like.nbytes:
        raise ValueError(f"mem_file={path} already exists, but does not have the size of the pool: choose "
                         "another file")
    with open(path, "ab") as f:
        if hasattr(os, "posix_fallocate"):  # fails now if the disk is full; macOS has no such call
            os.posix_fallocate(f.fileno(), 0, like.nbytes)
    return torch.from_file(path, shared=True, size=like.numel(), dtype=like.dtype).view(like.shape)


def pool_in_file(pool_class, path: str, *arguments, **options) -> ValuePool:
    """pool_class(*arguments, **options), with its values in a file."""
    pool = pool_class(*arguments, **options, device="meta")
    pool.values = nn.Parameter(values_in_file(pool.values, path))
    pool.reset_parameters()
    return pool
