"""Several processes that share a run: start and end of the process group, sums, gathers, the device mesh.

With one process every operation is the identity, so there is no second code path.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

T = TypeVar("T")
# A rank waits this long for the others, which may still sample or grade; a rank that has ended is noticed by its agent.
TIMEOUT = timedelta(hours=4)


class Ranks:
    """The default process group if torch.distributed is initialised, else this process alone.

    Numbers and objects travel by gloo, tensors by the backend of their device.
    """

    def __init__(self, *, alone: bool = False) -> None:
        """`alone`: this process alone, whatever the group."""
        grouped = not alone and dist.is_available() and dist.is_initialized()
        self.size, self.rank = (dist.get_world_size(), dist.get_rank()) if grouped else (1, 0)
        self._group: dist.ProcessGroup | None = None  # of gather_objects; None: the default group

    @property
    def is_main(self) -> bool:
        """Whether this rank writes files and prints."""
        return self.rank == 0

    @cached_property
    def background(self) -> dist.ProcessGroup | None:
        """A gloo group for a background thread, as two threads would mix up the collectives of one group."""
        if self.size == 1:
            return None
        group = dist.new_group(backend="gloo", timeout=TIMEOUT)
        assert isinstance(group, dist.ProcessGroup), "all ranks are members"
        return group

    def for_background_thread(self) -> Ranks:
        """The same ranks for a background thread, which may only gather objects: by a group of its own."""
        ranks = Ranks()
        ranks._group = ranks.background
        return ranks

    def gather(self, values: Tensor, counts: list[int] | None = None) -> Tensor:
        """(n,) of each rank, concatenated in rank order; `counts`: how many each rank has, if the caller knows."""
        if self.size == 1:
            return values
        counts = counts or self.gather_objects(len(values))
        padded = values.new_zeros(max(counts))
        padded[: len(values)] = values
        gathered = [torch.empty_like(padded) for _ in range(self.size)]
        dist.all_gather(gathered, padded)
        return torch.cat([tensor[:count] for tensor, count in zip(gathered, counts, strict=True)])

    def gather_objects(self, value: T) -> list[T]:
        """The `value` of each rank, in rank order."""
        if self.size == 1:
            return [value]
        gathered: list[T | None] = [None] * self.size
        dist.all_gather_object(gathered, value, group=self._group)
        return gathered  # pyright: ignore[reportReturnType]

    def broadcast(self, value: T) -> T:
        """The main rank's `value`."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values)
        return values[0]

    def sum_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its sum over the ranks; all ranks pass the same shapes in the same order."""
        if self.size > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def largest(self, numbers: dict[str, float]) -> dict[str, float]:
        """The maximum of each entry over the ranks that have it."""
        gathered = self.gather_objects(numbers)
        names = dict.fromkeys(name for entries in gathered for name in entries)
        return {name: max(entries[name] for entries in gathered if name in entries) for name in names}

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather_objects(None)

    def mesh(self, device: torch.device, replicas: int) -> DeviceMesh:
        """All ranks as ("shard",), or as ("replicate", "shard") of `replicas` x size / replicas (HSDP).

        Every group waits TIMEOUT; the groups that init_device_mesh would make wait 30 minutes.
        """
        if replicas == 1:
            return init_device_mesh(device.type, (self.size,), mesh_dim_names=("shard",))
        grid = torch.arange(self.size).view(replicas, -1)
        rows = grid.T.tolist(), grid.tolist()
        groups: list[Any] = [dist.new_subgroups_by_enumeration(members, timeout=TIMEOUT)[0] for members in rows]
        return DeviceMesh.from_group(groups, device.type, mesh=grid, mesh_dim_names=("replicate", "shard"))


ALONE = Ranks(alone=True)


@contextmanager
def start(device: torch.device, *, alone: bool = False) -> Iterator[Ranks]:
    """Join the process group that the environment describes (RANK, WORLD_SIZE, MASTER_ADDR, MASTER_PORT of torchrun).

    Without such an environment there is no group, unless `alone` asks for one of a single process; a group that exists
    is used. After an error the group is left as it is: other ranks may wait in it, and their agent ends them.
    """
    backend = "gloo" if device.type == "cpu" else "cpu:gloo,cuda:nccl"
    if device.type == "cuda":
        torch.cuda.set_device(device)
    joins = not dist.is_initialized() and int(os.environ.get("WORLD_SIZE", "1")) > 1
    starts_group = not dist.is_initialized() and not joins and alone
    if joins:
        dist.init_process_group(backend, timeout=TIMEOUT)
    elif starts_group:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    ranks = Ranks()
    yield ranks
    ranks.barrier()
    if (joins or starts_group) and "vllm" not in sys.modules:  # vLLM's engine ends the group when the process ends
        dist.destroy_process_group()


def local_device(kind: str) -> torch.device:
    """ "cpu", or the CUDA device of this rank: number LOCAL_RANK, or 0 for one rank; `start` needs the number."""
    index = os.environ.get("LOCAL_RANK", "0") if int(os.environ.get("WORLD_SIZE", "1")) > 1 else "0"
    return torch.device(kind) if kind == "cpu" else torch.device(kind, int(index))
