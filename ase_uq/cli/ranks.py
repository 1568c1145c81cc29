"""The processes that a launcher started for one command: those of torchrun, or of SLURM's srun."""

import atexit
import os
import re
import socket
import time
import warnings
from collections.abc import Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING

import typer

from ase_uq.cli.console import silence
from ase_uq.errors import InputError, UQWarning

if TYPE_CHECKING:
    from torch.distributed import Store

    from ase_uq.communicator import Communicator

# What a rank waits for the others to start, and then for their results: one part of the frames may take much longer
# than another.
_START, _PATIENCE = timedelta(minutes=10), timedelta(hours=2)
_FAREWELL = 2.0  # seconds that rank 0 waits for the others to learn who failed first
_FAILED = "failed"
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

    Raises:
        InputError: The ranks do not find each other, or there is not one accelerator for each of them.
    """
    if not is_launched():
        yield None, device
        return
    import torch.distributed as dist

    from ase_uq.communicator import Distributed

    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=_START))
    except (RuntimeError, ValueError) as error:
        raise _not_found(error) from error
    try:
        device = own_device(device)
        try:
            backend = "nccl" if check_devices(store, rank, size, device) else "gloo"
            dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=_PATIENCE)
        except InputError:
            raise
        except (RuntimeError, ValueError) as error:
            raise _not_found(error) from error
        with warnings.catch_warnings():
            if rank:
                warnings.simplefilter("ignore", UQWarning)
            yield Distributed(), device
    except Exception:
        if rank == 0:
            atexit.register(_linger, store, size)
        if not _is_first(store, rank):
            raise typer.Exit(1) from None
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def own_device(device: str, environment: Mapping[str, str] = os.environ) -> str:
    """The device of this rank: one of the machine's accelerators for each, or what the user gave where there are none.

    Args:
        device: As the user gave it.
        environment: Variables of the process.

    Raises:
        InputError: It would be the same one for all ranks, or there is none.
    """
    import torch

    if device.startswith("cuda:"):
        raise InputError(f"--device {device} would put all ranks on one device. Give --device cuda; each takes one.")
    if (device or ("cuda" if torch.cuda.is_available() else "cpu")) != "cuda":
        return device
    if not (count := torch.cuda.device_count()):
        raise InputError(
            f"--device cuda, but rank {environment.get('RANK')} sees no GPU. Ask the launcher for one a rank "
            "(srun --gpus-per-task 1), or leave --device out to compute on CPUs."
        )
    if "LOCAL_RANK" not in environment:
        raise InputError(
            "LOCAL_RANK is not set, which says which GPU of its machine a rank takes. Start with torchrun or srun, or "
            "set it to the number of the rank on its machine, from 0."
        )
    # A launcher may show each rank one device alone.
    device = f"cuda:{int(environment['LOCAL_RANK']) % count}"
    torch.cuda.set_device(device)
    return device


def check_devices(store: "Store", rank: int, size: int, device: str) -> bool:
    """Whether the ranks compute on accelerators: each on one of its own then, as NCCL sums over no others.

    Args:
        store: What the ranks tell each other by.
        rank: This one.
        size: How many there are.
        device: Device of this one.

    Raises:
        InputError: Two ranks have one accelerator, some have none, or one has failed before.
    """
    store.set(f"device of {rank}", _name_of(device))
    rank_of: dict[str, int] = {}
    names: list[str] = []
    for other in range(size):
        names.append(name := store.get(f"device of {other}").decode())
        if name == _FAILED:
            raise InputError(f"rank {other} has failed.")
        if bool(name) != bool(names[0]):
            with_one, without = (other, 0) if name else (0, other)
            raise InputError(
                f"rank {with_one} has a GPU and rank {without} has none. Give each rank one, or --device cpu."
            )
        if name and (first := rank_of.setdefault(name, other)) != other:
            raise InputError(
                f"ranks {first} and {other} have one GPU ({name}). Start as many ranks on a machine as it has GPUs, "
                "or give --device cpu."
            )
    return bool(names[0])


def _name_of(device: str) -> str:
    """A name that no other accelerator has, whatever its number is for this rank; empty for a CPU."""
    import torch

    if not device.startswith("cuda"):
        return ""
    properties = torch.cuda.get_device_properties(device)
    return f"{properties.name} {properties.uuid} of {socket.gethostname()}"


def _not_found(error: Exception) -> InputError:
    return InputError(
        f"the {os.environ['WORLD_SIZE']} processes of this command did not find each other "
        f"({str(error).splitlines()[0]}). Start all of them with one torchrun or srun; in a shell inside a SLURM "
        "step, unset SLURM_STEP_NUM_TASKS to use one process."
    )


def _is_first(store: "Store", rank: int) -> bool:
    """Whether no other rank has said why it failed, as far as can be known."""
    try:
        with silence():  # torch prints a stack of its own
            first = store.compare_set("failed", "", str(rank))
            store.set(f"device of {rank}", _FAILED)  # or others would wait for it
            store.add("heard", 1)
        return first == str(rank).encode()
    except RuntimeError:  # rank 0, which keeps the store, was killed
        return True


def _linger(store: "Store", size: int) -> None:
    """Rank 0 takes the store with it, so the others ask first; those that are busy, or killed, are not waited for."""
    end = time.monotonic() + _FAREWELL
    while store.add("heard", 0) < size and time.monotonic() < end:
        time.sleep(0.02)
