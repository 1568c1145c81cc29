"""What can go wrong with a batch: results that are not finite, a full device, and errors of a potential's package."""

import re
import traceback
from collections.abc import Sequence

import torch
from ase import Atoms
from ase.neighborlist import neighbor_list

from ase_uq.forward_pass import ForwardPass

_TOO_CLOSE = 0.3  # Å; bonds are at least 0.7 Å long
# Allocators of the CPU, CUDA, its libraries, warp and XLA each say it in their own way.
_OUT_OF_MEMORY = re.compile(
    r"out of (cpu |gpu |device |host )?memory|not enough memory|resource_exhausted|bad_?alloc|alloc(ation)?_?failed|"
    r"(can.?t|cannot|could not|unable to|failed to|fail to) allocate|allocation .*failed",
    re.IGNORECASE,
)


def not_finite(forward_pass: ForwardPass) -> str:
    """The first result of a pass that is not finite, by its name; empty if all are.

    A stress that is NaN throughout, of a frame whose other results are finite, is one that the potential does not give.
    """
    members, force_layer, stress = forward_pass.members, forward_pass.force_layer, forward_pass.stress
    if stress is not None:
        stress = stress[~stress.isnan().all(1)]
    values = {
        "energy": forward_pass.energy,
        "atomic energies": forward_pass.energies,
        "forces": forward_pass.forces,
        "stress": stress,
        "features": forward_pass.features,
        "last layer of the energy": forward_pass.energy_layer.features,
        "last layer of the forces": None if force_layer is None else force_layer.features,
        "energies of the committee": None if members is None else members.energy,
        "forces of the committee": None if members is None else members.forces,
    }
    finite = {name: value.isfinite().all() for name, value in values.items() if value is not None}
    if bool(torch.stack(list(finite.values())).all()):  # one transfer from the device
        return ""
    return next(name for name, is_finite in finite.items() if not is_finite)


def reason_of_not_finite(name: str, atoms: Atoms) -> str:
    """Words for a structure of whose results one is not finite, with its two closest atoms if they explain it."""
    first, second, distance = neighbor_list("ijd", atoms, _TOO_CLOSE)
    where = "Look at its positions, and at the weights of the potential."
    if len(distance):
        i, j, d = min(zip(first.tolist(), second.tolist(), distance.tolist(), strict=True), key=lambda pair: pair[2])
        where = f"Atoms {i} and {j} are {d:.2g} Å apart." if i != j else f"Atom {i} is {d:.2g} Å from its own image."
    return f"the potential gives numbers that are not finite: its {name}. {where}"


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error, or what it was raised from, says that memory could not be allocated."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or _OUT_OF_MEMORY.search(str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def is_fatal(error: Exception) -> bool:
    """Whether the device cannot be used after this error, so that every later frame would fail as well."""
    return "CUDA error" in str(error) or type(error).__name__ == "AcceleratorError"


def reason_of_error(error: Exception) -> str:
    """Words for an error of the potential's package, in one line; if it has no message, the line that raised it."""
    text = " ".join(str(error).split())
    if not text and (frames := traceback.extract_tb(error.__traceback__)):
        text = f"{frames[-1].line} in {frames[-1].name}"
    return f"the potential cannot evaluate it ({type(error).__name__}: {text[:300]})."


def named(frames: Sequence[Atoms], first: int) -> str:
    """The numbers of a batch, for messages."""
    return f"frame {first}" if len(frames) == 1 else f"frames {first} to {first + len(frames) - 1}"
