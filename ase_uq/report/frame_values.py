"""What a scored frame carries: results, labels and notes, wherever they are, checked before they are used."""

import warnings
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from reprlib import repr as shortened
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_uq.errors import UQWarning
from ase_uq.io.results import uncertainties_belong
from ase_uq.properties import STANDARD
from ase_uq.scoring.frame_score import NUMBER_KEY

_TIME_KEYS = ("time_fs", "flag_time_fs")  # in trajectories and in flagged frames of `ase-uq md`
_NAMED = 10  # frames with the same defect that get a warning each


@dataclass
class Warned:
    """Warns of frames; after ten with the same defect, only once more, that there are further ones."""

    counts: Counter[str] = field(default_factory=Counter)

    def __call__(self, defect: str, text: str) -> None:
        self.counts[defect] += 1
        if self.counts[defect] <= _NAMED:
            warnings.warn(text, UQWarning, stacklevel=2)
        elif self.counts[defect] == _NAMED + 1:
            warnings.warn(f"further frames {defect} are not named.", UQWarning, stacklevel=2)

    def checked(
        self, which: str, key: str, value: Any, shape: tuple[int, ...], *, finite: bool = True
    ) -> np.ndarray | None:
        """The value as numbers of this shape; None, with a warning, if it is something else."""
        if value is None:
            return None
        try:
            numbers = np.asarray(value, float)
        except (TypeError, ValueError):
            numbers, problem = np.empty(0), f"is {shortened(value)}, {_wanted(shape)} expected"
        else:
            if shape == () and numbers.size == 1:
                numbers = numbers.reshape(())
            problem = f"has shape {numbers.shape}, {_wanted(shape)} expected" if numbers.shape != shape else ""
            if not problem and finite and not np.isfinite(numbers).all():
                problem = "is not finite"
        if problem:
            self(f"whose {key} cannot be used", f"{key} of {which} {problem}: it is left out.")
        return None if problem else numbers

    def time(self, which: str, atoms: Atoms) -> float:
        """The time of a frame, fs; NaN if it has none."""
        key = next((key for key in _TIME_KEYS if key in atoms.info), "")
        time = self.checked(which, key, atoms.info.get(key), ())
        return np.nan if time is None else float(time)


def result(atoms: Atoms, key: str) -> Any:
    """A result from the calculator, else from arrays, else from info; None if there is none of this structure."""
    if key in (results := _results(atoms)) or (key not in STANDARD and not uncertainties_belong(atoms)):
        return results.get(key)
    return atoms.arrays.get(key, atoms.info.get(key))


def label(atoms: Atoms, key: str) -> Any:
    """A reference value from info, else from arrays, else from the calculator, whose results are the potential's."""
    return atoms.info.get(key, atoms.arrays.get(key, _results(atoms).get(key)))


def source_frame(atoms: Atoms) -> int | None:
    """Number of the frame in the trajectory that was scored; None if it has none."""
    number = atoms.info.get(NUMBER_KEY)
    return int(number) if isinstance(number, int | np.integer) and number >= 0 else None


def temperature(atoms: Atoms) -> float:
    """Temperature of the velocities, K; NaN without velocities, or if no atom can move or nobody knows how many can."""
    if not atoms.get_momenta().any():
        return np.nan
    try:
        n_free = atoms.get_number_of_degrees_of_freedom()
    except NotImplementedError:  # some constraints of ASE do not say what they fix, such as FixSymmetry
        return np.nan
    return float(atoms.get_temperature()) if n_free > 0 else np.nan


def flag_reason(atoms: Atoms) -> str:
    """Why a monitor kept this frame; empty if none did."""
    return str(atoms.info.get("flag_reason") or "")


def structure(atoms: Atoms) -> Atoms:
    """The structure with the notes a potential or a reader may need; without results, to save memory."""
    notes = {key: value for key, value in atoms.info.items() if isinstance(value, str | int | float | np.number)}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=notes)


def _results(atoms: Atoms) -> Mapping[str, Any]:
    return atoms.calc.results if isinstance(atoms.calc, Calculator) else {}


def _wanted(shape: tuple[int, ...]) -> str:
    return f"{shape} was" if shape else "a number was"
