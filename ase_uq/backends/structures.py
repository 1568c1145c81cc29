"""Checks that refuse structures which no potential, or not this one, can evaluate."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_uq.errors import InputError

_THINNEST = 1e-2  # Å, lower limit on the singular values of the periodic cell vectors; atoms are a hundred times larger


def check_structures(
    frames: Sequence[Atoms],
    elements: frozenset[int],
    required_info_keys: Sequence[str],
    *,
    first: int = 0,
    name: str = "structure",
) -> None:
    """Refuses structures that no potential, or not this one, can evaluate.

    Args:
        frames: Structures.
        elements: Atomic numbers that the potential knows.
        required_info_keys: Entries of `atoms.info` without which it cannot run.
        first: Number of the first structure, for messages.
        name: Word for a structure in messages.

    Raises:
        InputError: In the same cases as `Backend.collate`.
    """
    if not frames:
        raise InputError("there is no structure to evaluate.")
    for number, atoms in enumerate(frames, first):
        which = f"{name} {number} ({_formula(atoms)})"
        if len(atoms) == 0:
            raise InputError(f"{which} has no atoms.")
        for what, values in (("positions", atoms.positions), ("cell", atoms.cell.array)):
            if not np.isfinite(values).all():
                row = int(np.argwhere(~np.isfinite(values))[0][0])
                raise InputError(
                    f"{what} of {which} are not finite (row {row}: {values[row]}). The run has probably "
                    "blown up; go back to the last good frame."
                )
        _check_cell(which, atoms)
        unknown = sorted(set(atoms.numbers.tolist()) - elements)
        if unknown:
            names = ", ".join(_symbol(z) for z in unknown)
            known = ", ".join(chemical_symbols[z] for z in sorted(elements))
            raise InputError(f"{which} contains {names}, which the potential does not know. It knows {known}.")
        missing = [key for key in required_info_keys if key not in atoms.info]
        if missing:
            raise InputError(
                f"{which} has no {' and '.join(missing)} in atoms.info, which this potential reads. "
                f"Set it, for example atoms.info[{missing[0]!r}] = 0."
            )


def _symbol(z: int) -> str:
    return chemical_symbols[z] if 0 <= z < len(chemical_symbols) else f"atomic number {z}"


def _formula(atoms: Atoms) -> str:
    if len(atoms) and not 0 <= atoms.numbers.min() <= atoms.numbers.max() < len(chemical_symbols):
        return f"{len(atoms)} atoms"  # ASE has no symbol for some of them
    return atoms.get_chemical_formula() or "empty"


def _check_cell(which: str, atoms: Atoms) -> None:
    """Refuses cells in which periodic images coincide, so that neighbours cannot be listed."""
    if not atoms.pbc.any():
        return
    vectors = atoms.cell.array[atoms.pbc]
    thickness = np.linalg.svd(vectors, compute_uv=False)[-1]
    if thickness < _THINNEST:
        raise InputError(
            f"{which} is periodic in a cell without extent: {vectors.tolist()} Å are its periodic vectors. Give it a "
            "cell, or set atoms.pbc = False."
        )
