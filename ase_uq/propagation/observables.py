"""Numbers of frames that averages are taken of."""

from collections.abc import Sequence
from numbers import Real
from typing import Any, TypeGuard

import numpy as np
from ase import Atoms

from ase_uq.errors import InputError


def distances_of(frames: Sequence[Atoms], one: int, other: int) -> np.ndarray:
    """(n_frames,) distance of two atoms, Å; of the nearest image in a cell.

    Raises:
        InputError: A frame does not have these atoms, or they are the same.
    """
    for number, atoms in enumerate(frames):
        if not (0 <= one < len(atoms) and 0 <= other < len(atoms)) or one == other:
            raise InputError(
                f"atoms {one} and {other} of frame {number}, which has {len(atoms)}, have no distance: give the "
                "numbers of two different atoms, from 0 on."
            )
    return np.array([atoms.get_distance(one, other, mic=bool(atoms.pbc.any())) for atoms in frames])


def entries_of(frames: Sequence[Atoms], key: str) -> np.ndarray:
    """(n_frames,) a number in the info of each frame.

    Raises:
        InputError: A frame has no such entry, or one that is not a number.
    """
    values = []
    for number, atoms in enumerate(frames):
        entry = atoms.info.get(key)
        if not _is_number(entry):
            there = ", ".join(sorted(k for k, v in atoms.info.items() if _is_number(v))) or "none"
            raise InputError(f"frame {number} has no number {key!r} in its info ({entry!r}). Numbers there: {there}.")
        values.append(float(entry))
    return np.array(values)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, Real) and not isinstance(value, bool | np.bool_)
