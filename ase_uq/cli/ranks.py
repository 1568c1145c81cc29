"""The processes that a launcher started for one command: those of torchrun, or of SLURM's srun."""

import os
import re
import warnings
from collections.abc import Iterator, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from ase_uq.errors import InputError, UQWarning

if TYPE_CHECKING:
    from torch.distributed import Store

    from ase_uq.communicator import Communicator

# What a rank waits for the others to start, and then for their results: one part of the frames may take much longer
# than another.
_START, _PATIENCE = timedelta(minutes=10), timedelta(hours=2)
_FIRST_PORT, _N_PORTS = 20_000, 40_000


def is_launched(environment: MutableMapping[str, str] = os.environ) -> bool:
    """Whether there are other ranks; sets the variables that torch reads where srun has started them.

    Args:
        environment: Variables of the process.

    Raises:
        InputError: They are no launcher's.
    """
    for name in ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS"):
        if not (value := environment.get(name, "1")).isdecimal():
            raise InputError(f"{name}={value!r} is no number of processes. Unset it, or start with torchrun or srun.")
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

    if device.startswith("cuda:"):
        raise InputError(f"--device {device} would put all ranks on one device. Give --device cuda; each takes one.")
    if on_accelerator := (device or ("cuda" if torch.cuda.is_available() else "cpu")) == "cuda":
        # A launcher may show each rank one device alone.
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
        backend = "nccl" if on_accelerator else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
    except (RuntimeError, ValueError) as error:
        raise InputError(
            f"the {os.environ['WORLD_SIZE']} processes of this command did not find each other "
            f"({str(error).splitlines()[0]}). Start all of them with one torchrun or srun; in a shell inside a SLURM "
            "step, unset SLURM_STEP_NUM_TASKS to use one process."
        ) from error
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
