"""The structure that a verb starts from, without the entries that are no longer true once atoms move."""

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

    from ase_uq.engines.ase.calculator import UncertainCalculator


def read_start(path: Path) -> "Atoms":
    """The last frame of a file; warns if it was written without the constraints that it had.

    Raises:
        LabelError: The file is missing or cannot be read.
    """
    from ase_uq.errors import UQWarning
    from ase_uq.io.frames import read_frames
    from ase_uq.io.labels import keep_structure
    from ase_uq.io.results import LOST_KEY, lost_constraints

    atoms = read_frames(path, name="START")[-1]
    if LOST_KEY in atoms.info and (lost := lost_constraints(atoms)):
        warnings.warn(
            f"{path} was written without the constraints of its structure ({', '.join(lost)}), which extended XYZ "
            "cannot hold. To keep them, set them again and write START as .traj; this run has none of them.",
            UQWarning,
            stacklevel=2,
        )
    keep_structure(atoms, "momenta")
    return atoms


def give_calculator(atoms: "Atoms", calculator: "UncertainCalculator") -> None:
    """Sets the calculator, and keeps only those entries of `info` that its potential reads."""
    atoms.info = {key: atoms.info[key] for key in calculator.predictor.backend.info_keys if key in atoms.info}
    atoms.calc = calculator
