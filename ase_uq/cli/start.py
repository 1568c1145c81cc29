"""The structure that a verb starts from, without the entries that are no longer true once atoms move."""

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ase import Atoms

    from ase_uq.engines.ase.calculator import UncertainCalculator

# Other arrays of START, above all reference forces, would stand beside later positions as if they belonged to them.
_KEPT_ARRAYS = {"numbers", "positions", "momenta", "masses", "tags", "initial_charges", "initial_magmoms"}


def read_start(path: Path) -> "Atoms":
    """The last frame of a file.

    Raises:
        LabelError: The file is missing or cannot be read.
    """
    from ase_uq.io.frames import read_frames

    atoms = read_frames(path, name="START")[-1]
    for name in set(atoms.arrays) - _KEPT_ARRAYS:
        del atoms.arrays[name]
    return atoms


def give_calculator(atoms: "Atoms", calculator: "UncertainCalculator") -> None:
    """Sets the calculator, and keeps only those entries of `info` that its potential reads."""
    atoms.info = {key: atoms.info[key] for key in calculator.predictor.backend.info_keys if key in atoms.info}
    atoms.calc = calculator
