"""Structures on which the laws are tested."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.build import molecule


def standard_frames() -> list[Atoms]:
    """A methanol molecule, a box of water, linear CO2, an oxygen atom and a periodic hydrogen atom."""
    methanol = molecule("CH3OH")
    methanol.rattle(0.05, seed=1)
    water = molecule("H2O", cell=[3.1] * 3, pbc=True)
    water.center()
    water = water.repeat((2, 2, 1))
    water.rattle(0.05, seed=2)
    oxygen = Atoms("O", [(0.3, 0.2, 0.1)])
    hydrogen = Atoms("H", [(0.1, 0.2, 0.3)], cell=np.diag([2.9, 3.1, 3.3]) + 0.2, pbc=True)
    return [methanol, water, molecule("CO2"), oxygen, hydrogen]


def displaced(frames: Sequence[Atoms], displacements: np.ndarray) -> list[Atoms]:
    """Copies of the frames, with all their atoms displaced by the rows of (n_atoms, 3) displacements in Å."""
    copies = [atoms.copy() for atoms in frames]
    rows = np.split(displacements, np.cumsum([len(atoms) for atoms in copies])[:-1])
    for atoms, shifts in zip(copies, rows, strict=True):
        atoms.positions += shifts
    return copies


def periodic(frames: Sequence[Atoms]) -> Atoms:
    """The first periodic structure with more than one atom."""
    return next(atoms for atoms in frames if atoms.pbc.all() and len(atoms) > 1)
