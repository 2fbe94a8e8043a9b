"""
Training on many processes: connect them, share a pool, and wrap a model in DistributedDataParallel.

torchrun starts the processes and gives each a rank. torch.distributed connects them, with NCCL between GPUs
and gloo between CPUs. A process that was started without torchrun is a group of size 1, and its exchanges
return their input.

    pool = ShardedPool(num_values, value_dim)       # in every process, after torch.distributed is initialised
    model = data_parallel(MyModel(pool))            # in place of DistributedDataParallel(MyModel(pool))
    optimizer = PoolOptimizer(pool.parameters(), lr=6e-2, value_blocks=8 // columns_group(pool).size)

All processes must call a pool with the same number of tokens. The loss of each process must be the mean over
the same number of targets, because the gradient is the mean over processes, as in DDP.

With FSDP2, leave the pool's values out: fully_shard(model, ignored_params={pool.values}).
"""

import atexit
import os
import time
from dataclasses import dataclass
from typing import Any

from runtime.cli import fail

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel

from kernel import gather_sum
from pool import FactoredGradient, Gather, MemoryUsage, ValuePool

# torchrun sets these in the environment
WORLD_SIZE = int(os.environ.get("WORLD_SIZE") or 1)
RANK, LOCAL_RANK = (int(os.environ.get(name) or 0) if WORLD_SIZE > 1 else 0
                    for name in ("RANK", "LOCAL_RANK"))


# --- processes ----------------------------------------------------------------------------------------------

def find_device(name: str) -> str:
    """auto, cpu or cuda -> cpu or cuda"""
    if name == "cuda" and not torch.cuda.is_available():
        fail("--device=cuda: torch finds no CUDA device; use --device=cpu, or install a CUDA build of torch")
    return ("cuda" if torch.cuda.is_available() else "cpu") if name == "auto" else name


def start(device: str) -> None:
    """Connects the processes that torchrun started: by NCCL for tensors on a GPU, by gloo for all others."""
    if dist.is_initialized() or WORLD_SIZE == 1:
        return
    backend = "gloo"
    if find_device(device) == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            raise OSError(f"process {RANK} has no GPU: this machine has {torch.cuda.device_count()}")
        torch.cuda.set_device(LOCAL_RANK)
        backend = "cpu:gloo,cuda:nccl"
    try:
        store = next(dist.rendezvous("env://"))[0]
        if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
            # a restart on one machine may get the old store, with the addresses of dead processes: a new
            # prefix hides them. On several machines the store is new, and restart counts may differ
            store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    except (RuntimeError, ValueError) as error:
        raise OSError(f"process {RANK} of {WORLD_SIZE} cannot connect to the others "
                      f"({str(error).splitlines()[0]}): start them with torchrun, or unset WORLD_SIZE to run "
                      "one process") from None
    atexit.register(disconnect)


def disconnect() -> None:
    """At every exit: gloo's threads must not outlive Python. They need it to let go of the last tensors."""
    dist.destroy_process_group()
    time.sleep(0.2)


def world_size() -> int:
    """The number of connected processes. WORLD_SIZE is the number of processes that torchrun starts."""
    return dist.get_world_size() if dist.is_initialized() else 1


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """Sums x over all processes, in place."""
    if world_size() > 1:
        dist.all_reduce(x)
    return x


def gather_objects(x) -> list:
    """x of every process, in the order of the ranks. Slow: for small objects only."""
    result = [x] * world_size()
    if world_size() > 1:
        dist.all_gather_object(result, x)
    return result


class _AllToAll(torch.autograd.Function):
    """The gradient takes the way back, which is another exchange of this kind."""

    @staticmethod
    def forward(ctx, x, handle):
        ctx.handle = handle
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(result, x.contiguous(), group=handle)
        return result

    @staticmethod
    def backward(ctx, dy):
        return _AllToAll.apply(dy, ctx.handle), None


@dataclass(frozen=True)
class Group:
    """
    Processes that exchange tensors: `size` of them (G in comments), with N tokens each. This process has the
    number `rank`. Results are in the order of the ranks, and have gradients.
    """

    size: int = 1
    rank: int = 0
    handle: Any = None  # for torch.distributed

    def __deepcopy__(self, memo):
        return self  # a copy of a model talks to the same processes

    def all_to_all(self, x: torch.Tensor) -> torch.Tensor:
        """x (G, ...), block i for process i -> (G, ...), block i from process i."""
        return x if self.size == 1 else _AllToAll.apply(x, self.handle)

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """x (N, k) of each process -> x of all processes (G*N, k)."""
        return self.all_to_all(x.expand(self.size, *x.shape)).flatten(0, 1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Sums x (G*N, k) over the processes -> the sum's rows for this process's tokens (N, k)."""
        return self.all_to_all(x.unflatten(0, (self.size, -1))).sum(0)

    def tokens_to_columns(self, x: torch.Tensor) -> torch.Tensor:
        """All columns of this process's tokens (N, V) -> this process's columns of all tokens (G*N, V/G)."""
        return self.all_to_all(x.unflatten(1, (self.size, -1)).transpose(0, 1)).flatten(0, 1)

    def columns_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: (G*N, V/G) -> (N, V)."""
        return self.all_to_all(x.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1)


def make_groups(group_size: int) -> tuple[Group, Group]:
    """
    Each group of group_size neighbouring ranks shares the columns of one pool. Returns the group of this
    process, and the group of all processes that hold the same columns as this one. Called by all processes.
    """
    if world_size() == 1:
        return Group(), Group()
    world = list(range(dist.get_world_size()))
    columns = [world[i:i + group_size] for i in range(0, len(world), group_size)]
    replicas = [world[i::group_size] for i in range(group_size)]
    handles = (dist.new_subgroups_by_enumeration(ranks)[0] for ranks in (columns, replicas))
    of_columns, of_replicas = (Group(handle.size(), handle.rank(), handle) for handle in handles)
    return of_columns, of_replicas


# --- a pool on many processes -------------------------------------------------------------------------------

class ShardedPool(ValuePool):
    """
    A ValuePool that is split by columns: each of G processes holds value_dim / G columns of every row, in
    `values`. Each receives the bags of all G*N tokens, and computes their sums in its own columns. Then it
    sends each process the sums for that process's tokens. Initial values, reads and gradients are the same
    for any number of processes.

    group_size: G, the number of neighbouring ranks that share one pool; 0: all processes. If there are more
    processes, each group has a copy of the pool, and all copies get the same updates. Raises a ValueError if
    G does not divide value_dim or the number of processes.

    All processes must make the pool, call it (also in evaluation) and call usage.summary() in the same order,
    because each of these calls waits for the other processes.
    """

    def __init__(self, num_values: int, value_dim: int, dtype: torch.dtype = torch.float32,
                 kernel: str = "auto", device=None, group_size: int = 0):
        group_size = group_size or world_size()
        if world_size() % group_size:
            raise ValueError(f"group_size={group_size} must divide the number of processes, {world_size()}")
        if value_dim % group_size:
            raise ValueError(f"value_dim={value_dim} must be a multiple of the {group_size} processes that "
                             "share the pool's columns")
        super().__init__(num_values, value_dim // group_size, dtype, kernel, device="meta")  # no values yet
        self.columns_group, self.replicas_group = make_groups(group_size)
        self.value_dim = value_dim
        self.usage = ShardedUsage(num_values)
        self.values = nn.Parameter(torch.empty_like(self.values, device=device or torch.get_default_device()))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draws all columns, as a ValuePool does, and keeps the columns of this process."""
        if self.values.is_meta:
            return
        for rows in self.values.split(4096):
            whole = torch.randn(len(rows), self.value_dim, device=rows.device) * self.value_dim**-0.5
            rows.copy_(whole.chunk(self.columns_group.size, dim=1)[self.columns_group.rank])

    def read(self, operation, indices, x):
        group, is_sum = self.columns_group, operation is gather_sum
        indices = group.all_gather(indices)  # (G*N, bag)
        x = group.all_gather(x) if is_sum else group.tokens_to_columns(x)  # (G*N, bag) or (G*N, V/G)
        y = Gather.apply(operation, self.values, indices, x, self.kernel, self._share_reads)
        # (G*N, V/G) -> (N, V), or dot products of these columns (G*N, bag) -> of all columns (N, bag)
        return group.columns_to_tokens(y) if is_sum else group.reduce_scatter(y)

    def _share_reads(self, gradient: FactoredGradient) -> FactoredGradient:
        """The reads of all processes with these columns. The loss is their mean, so dy is divided."""
        shared = FactoredGradient(gradient, [
            tuple(map(self.replicas_group.all_gather, (indices, weights, dy / world_size())))
            for indices, weights, dy in gradient.reads])
        # the bounds of all columns together: so all processes skip the same steps
        shared.agree = lambda bound: self.columns_group.all_gather(bound.view(1, 1)).sum()
        return shared


class ShardedUsage(MemoryUsage):
    """Each process counts what its own tokens read. summary() adds up all processes, so all must call it."""

    def summary(self) -> tuple[float, float]:
        everywhere = MemoryUsage(self.num_slots)
        if self.total_weight is not None:  # the same in all processes: they read equally often
            everywhere.total_weight = all_reduce_sum(self.total_weight.clone())
        return everywhere.summary()


def columns_group(pool: ValuePool) -> Group:
    """The processes that share the columns of the pool."""
    return pool.columns_group if isinstance(pool, ShardedPool) else Group()


def data_parallel(model: nn.Module, **options) -> nn.Module:
    """
    Wraps a model in DistributedDataParallel (DDP). DDP then ignores the pools in the model: it neither copies
    their columns between processes nor averages their gradients. options: arguments of DDP. With
    init_sync=False, all processes must have started with the same seed.

    Returns the model itself if there is nothing to average: one process, or only pools learn. Raises a
    ValueError for a pool that is not a ShardedPool of the processes that are connected now.
    """
    if world_size() == 1:
        return model
    ignored = set()
    for name, module in model.named_modules():
        if isinstance(module, ValuePool):
            replicas = getattr(module, "replicas_group", Group())
            if columns_group(module).size * replicas.size != world_size():
                raise ValueError(f"{name or 'the model'} must be a ShardedPool that was made after the "
                                 "processes were connected")
            if options.get("init_sync", True) and replicas.size > 1:  # as DDP does with all other parameters
                dist.broadcast(module.values.detach(), group_src=0, group=replicas.handle)
            ignored.add(f"{name}.values" if name else "values")
    if not any(p.requires_grad for name, p in model.named_parameters() if name not in ignored):
        return model
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, ignored)
    return DistributedDataParallel(model, **options)
