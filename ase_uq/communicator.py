"""Sums over ranks. A fit that is made of sums needs nothing else to run on many devices.

torchrun --nproc-per-node 4 -m ase_uq.cli fit ...
torchrun --nproc-per-node 4 your_fit.py      # with torch.distributed initialised by your script
"""

from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from ase_uq.errors import InputError


class Communicator(Protocol):
    """What a fit needs from the ranks it runs on."""

    rank: int
    size: int

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum of the statistics over all ranks; the same on each rank."""
        ...


class Serial:
    """A single process."""

    rank = 0
    size = 1

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return dict(statistics)


class Distributed:
    """The ranks of an initialised `torch.distributed` process group.

    Raises:
        RuntimeError: No process group was initialised.
        InputError: In `sum`: another rank has ended, or answers no more.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("torch.distributed is not initialised: call init_process_group first.")
        self.rank = dist.get_rank()
        self.size = dist.get_world_size()
        # NCCL sums only on GPUs, and the empty statistics of a rank without frames are on the CPU.
        self._device = torch.device("cuda" if "nccl" in dist.get_backend() else "cpu")

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        # One flat message, since many small messages cost more time than their contents.
        flat = torch.cat([statistics[name].reshape(-1) for name in sorted(statistics)])
        home = flat.device
        flat = flat.to(self._device)
        try:
            dist.all_reduce(flat)
        except RuntimeError as error:  # of gloo, or of NCCL
            raise InputError(
                "another rank has ended, or answers no more, so nothing can be summed over all of them. Its message "
                "says why; if there is none, it was killed: by a limit of time or memory, for example."
            ) from error
        flat = flat.to(home)
        summed, start = {}, 0
        for name in sorted(statistics):
            shape = statistics[name].shape
            summed[name] = flat[start : start + shape.numel()].reshape(shape)
            start += shape.numel()
        return summed


def gather(rows: Tensor | None, communicator: Communicator) -> Tensor | None:
    """The (n, ...) rows of all ranks in float64, one rank after the other; None if no rank has any.

    The result is the same on each rank. A rank without rows takes part with None and learns their shape from the
    others. Rows have at most two further dimensions.
    """
    device = torch.device("cpu") if rows is None else rows.device
    message = torch.zeros(communicator.size, 4, dtype=torch.float64, device=device)
    if rows is not None:
        message[communicator.rank, : rows.dim() + 1] = torch.tensor([rows.dim(), *rows.shape], dtype=torch.float64)
    shapes = communicator.sum({"shape": message})["shape"].long()
    counts = shapes[:, 1].tolist()
    if not sum(counts):
        return None
    n_dim, _, *shape = shapes.amax(0).tolist()
    start = sum(counts[: communicator.rank])
    padded = torch.zeros((sum(counts), *shape[: n_dim - 1]), dtype=torch.float64, device=device)
    if rows is not None:
        padded[start : start + len(rows)] = rows
    return communicator.sum({"rows": padded})["rows"]


def shard[T](items: Iterable[T], communicator: Communicator) -> Iterator[T]:
    """This rank's part of what all ranks have: every size-th item; may be empty."""
    return islice(items, communicator.rank, None, communicator.size)
