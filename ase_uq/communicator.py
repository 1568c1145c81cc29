"""Sums over ranks. A fit that is a sum needs nothing else to run on many devices.

torchrun --nproc-per-node 4 your_fit.py      # with torch.distributed initialised by your script
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor


class Communicator(Protocol):
    """What a fit asks of the ranks it runs on."""

    rank: int
    size: int

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the statistics of all ranks, the same on each."""
        ...


class Serial:
    """One process."""

    rank = 0
    size = 1

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(statistics)


class Distributed:
    """The ranks of an initialised `torch.distributed` process group.

    Raises:
        RuntimeError: No process group was initialised.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised: call init_process_group first.")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # NCCL sums on GPUs only, and a rank without frames has its empty statistics on the CPU.
        self._device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # One flat message: many small ones cost more than they carry.
        flat = torch.cat([statistics[name].reshape(-1) for name in sorted(statistics)])
        home = flat.device
        flat = flat.to(self._device)
        dist.all_reduce(flat)
        flat = flat.to(home)
        summed, start = {}, 0
        for name in sorted(statistics):
            shape = statistics[name].shape
            summed[name] = flat[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        return summed


def shard[T](items: Sequence[T], communicator: Communicator) -> Sequence[T]:
    """This rank's part of a sequence: every size-th item; may be empty."""
    return items[communicator.rank :: communicator.size]
