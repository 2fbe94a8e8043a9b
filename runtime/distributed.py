"""
Many processes: who this one is, and the collectives of a pool whose columns are shared out.

torchrun starts the processes and says in the environment who each is; torch.distributed connects them: NCCL
between GPUs, gloo between CPUs. Started without torchrun, a process is alone, a group of size 1, and each
collective hands back what it was given.
"""

import atexit
import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from config import fail

RANK, WORLD_SIZE, LOCAL_RANK = (int(os.environ.get(name, default)) for name, default in
                                (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0)))


@dataclass(frozen=True)
class Group:
    """
    Some of the processes, of which this is number `rank`. N tokens a process, G = size.

    All exchange blocks of equal size; what they return is in the order of the ranks.
    """

    size: int = 1
    rank: int = 0
    handle: Any = None  # of torch.distributed; None: all processes

    def all_gather(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, k) each, of any dtypes -> (G*N, k) each: those of all processes, in one collective."""
        if self.size == 1:
            return tensors
        packed = torch.cat([x.contiguous().view(torch.uint8) for x in tensors], dim=1)  # (N, bytes)
        result = packed.new_empty(self.size * len(packed), packed.size(1))
        dist.all_gather_single(result, packed, group=self.handle)
        widths = [x.size(1) * x.element_size() for x in tensors]
        return tuple(part.contiguous().view(x.dtype)
                     for part, x in zip(result.split(widths, dim=1), tensors, strict=True))

    def _all_to_all(self, x):
        """x (G, ...), block i for process i -> (G, ...), block i from process i."""
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(result, x.contiguous(), group=self.handle)
        return result

    def tokens_to_columns(self, x: torch.Tensor) -> torch.Tensor:
        """All columns of the tokens of this process (N, V) -> its columns of all tokens (G*N, V/G)."""
        if self.size == 1:
            return x
        return self._all_to_all(x.unflatten(1, (self.size, -1)).transpose(0, 1)).flatten(0, 1)

    def columns_to_tokens(self, x: torch.Tensor) -> torch.Tensor:
        """The inverse: (G*N, V/G) -> (N, V)."""
        if self.size == 1:
            return x
        return self._all_to_all(x.unflatten(0, (self.size, -1))).transpose(0, 1).flatten(1)

    def reduce_scatter(self, x: torch.Tensor) -> torch.Tensor:
        """Parts of a sum for all tokens (G*N, bag) -> the sum for those of this process (N, bag)."""
        if self.size == 1:
            return x
        return self._all_to_all(x.unflatten(0, (self.size, -1))).sum(0)


@dataclass(frozen=True)
class Sharding:
    """How a pool lies on the processes. Those in `columns` have equal shares of its columns."""

    columns: Group = Group()
    replicas: Group = Group()  # those that have the same columns as this process

    @property
    def world_size(self) -> int:
        return self.columns.size * self.replicas.size


ALONE = Sharding()  # a process that has the whole pool


def start(device: str) -> None:
    """Connects the processes that torchrun started: by NCCL what is on a GPU, by gloo what is not."""
    if WORLD_SIZE == 1:
        return
    if device == "cuda":
        if LOCAL_RANK >= torch.cuda.device_count():
            fail(f"process {RANK} has no GPU: this machine has {torch.cuda.device_count()}", alone=True)
        torch.cuda.set_device(LOCAL_RANK)
    store = next(dist.rendezvous("env://"))[0]
    if os.environ.get("GROUP_WORLD_SIZE", "1") == "1":
        # on one machine torchrun may keep its store when it starts us again, with the addresses of those that
        # died in it. On several it makes a new one, and they may count their starts differently
        store = dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=RANK, world_size=WORLD_SIZE)
    atexit.register(dist.destroy_process_group)  # however it ends: gloo's threads must not outlive Python


def make_sharding(group_size: int) -> Sharding:
    """Neighbouring ranks share a pool out, `group_size` of them; to be called by all processes alike."""
    if WORLD_SIZE == 1:
        return ALONE
    columns = [list(range(i, i + group_size)) for i in range(0, WORLD_SIZE, group_size)]
    replicas = [list(range(i, WORLD_SIZE, group_size)) for i in range(group_size)]
    own = []
    for ranks in columns + replicas:
        handle = dist.new_group(ranks)
        if RANK in ranks:
            own.append(Group(len(ranks), ranks.index(RANK), handle))
    return Sharding(*own)


def all_reduce_sum(x: torch.Tensor) -> torch.Tensor:
    """In place, over all processes."""
    if WORLD_SIZE > 1:
        dist.all_reduce(x)
    return x


def gather_objects(x) -> list:
    """x of every process, in the order of the ranks: small things, rarely."""
    result = [x]
    if WORLD_SIZE > 1:
        result = [None] * WORLD_SIZE
        dist.all_gather_object(result, x)
    return result
