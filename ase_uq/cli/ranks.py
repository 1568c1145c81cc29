"""The processes that a launcher started for one command: those of torchrun, or of SLURM's srun."""

import os
import re
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from ase_uq.errors import UQWarning

if TYPE_CHECKING:
    from torch.distributed import Store

    from ase_uq.communicator import Communicator

# What a rank waits for another one: as long as a part of the frames may take longer than another part.
_PATIENCE = timedelta(hours=2)
_FIRST_PORT, _N_PORTS = 20_000, 40_000


def is_launched(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether there are other ranks; sets the variables that torch reads where srun has started them.

    Args:
        environment: Variables of the process.
    """
    if "WORLD_SIZE" in environment:
        return int(environment["WORLD_SIZE"]) > 1
    if int(environment.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    environment["RANK"] = environment["SLURM_PROCID"]
    environment["WORLD_SIZE"] = environment["SLURM_STEP_NUM_TASKS"]
    environment["LOCAL_RANK"] = environment["SLURM_LOCALID"]
    environment.setdefault("MASTER_ADDR", first_host(environment["SLURM_STEP_NODELIST"]))
    # The same for all ranks of this step, and another one for the next.
    job = int(environment["SLURM_JOB_ID"]) * 7 + int(environment["SLURM_STEP_ID"])
    environment.setdefault("MASTER_PORT", str(_FIRST_PORT + job % _N_PORTS))
    return True


def first_host(nodes: str) -> str:
    """The first of SLURM's list of hosts, such as `gpu[03-05,9]` or `a1,b2`."""
    found = re.match(r"([^,\[]+)(?:\[(\d+)[^\]]*\]([^,]*))?", nodes)
    assert found is not None
    return "".join(part or "" for part in found.groups())


@contextmanager
def ranks(device: str) -> Iterator[tuple["Communicator | None", str]]:
    """The ranks of this command, and the device of this one; None in a single process, which no launcher started.

    Only rank 0 warns. If ranks fail, only the first one says why, and none goes on.

    Args:
        device: As the user gave it; with an accelerator each rank of a machine takes one of its own.
    """
    if not is_launched():
        yield None, device
        return
    import torch
    import torch.distributed as dist

    from ase_uq.communicator import Distributed

    if on_accelerator := (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    store, rank, size = next(dist.rendezvous("env://", timeout=_PATIENCE))
    dist.init_process_group(
        "nccl" if on_accelerator else "gloo", store=store, rank=rank, world_size=size, timeout=_PATIENCE
    )
    try:
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore", UQWarning)
            yield Distributed(), device
    except Exception:
        if not _is_first(store, rank):
            raise typer.Exit(1) from None
        raise
    finally:
        dist.destroy_process_group()


def _is_first(store: "Store", rank: int) -> bool:
    """Whether no other rank has failed before."""
    try:
        return store.compare_set("failed", "", str(rank)) == str(rank).encode()
    except RuntimeError:  # the process that keeps the store has ended
        return False
