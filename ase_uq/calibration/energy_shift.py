"""A constant by which reference energies differ from predicted ones: another E0 or functional, and no uncertainty."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import numpy as np
from ase.data import atomic_numbers, chemical_symbols

from ase_uq.io.entries import Entries

# An offset is told apart if energies scatter about it by less than this share of it, and it is at least this large.
_LARGEST_SPREAD, _SMALLEST = 1 / 3, 1e-3  # eV an atom
_WORTH_A_CONSTANT = 0.5  # by which one more for every frame must lower the spread
# Frames more than the constants that are fitted: so many, and so many times as many.
_FEWEST_BEYOND, _TIMES_BEYOND = 4, 2
_NAMED = 8  # elements


@dataclass(frozen=True)
class EnergyShift:
    """Constants that explain most of the difference between reference and predicted energies.

    Args:
        of_element: Shift of one atom of each element, eV, by atomic number.
        of_frame: Shift of every frame, eV.
        determined: Whether the frames determine the shifts of the elements; else only their sums over frames of like
            compositions have a meaning.
        low: Smallest shift of a frame, eV.
        high: Largest shift of a frame, eV.
        spread: Standard deviation of what is left, eV per atom.
        inflation: Factor by which residuals about fitted constants are too small.
    """

    of_element: Mapping[int, float]
    of_frame: float
    determined: bool
    low: float
    high: float
    spread: float
    inflation: float

    def taken_out(self, residuals: np.ndarray, numbers: np.ndarray, n_atoms_of_frame: np.ndarray) -> np.ndarray:
        """(n_frames,) residuals per atom, eV, without the shift; arguments as in `energy_shift`."""
        of_atom = np.array([self.of_element.get(number, 0.0) for number in numbers.tolist()])
        total = np.bincount(np.repeat(np.arange(len(residuals)), n_atoms_of_frame), of_atom, len(residuals))
        return residuals - (total + self.of_frame) / n_atoms_of_frame

    def describe(self) -> str:
        """The shift and the spread about it, in words."""
        alike = np.isclose(self.low, self.high, rtol=1e-3)
        size = f"{self.low:+.3g}" if alike else f"{self.low:+.3g} to {self.high:+.3g}"
        elements = [f"{chemical_symbols[z]} {shift:+.3g}" for z, shift in self.of_element.items()]
        named = ", ".join(elements) if self.determined and 1 < len(elements) <= _NAMED else ""
        named = named and f", as of {named} eV an atom"
        return f"{size} eV{named} (reference - prediction), with a spread of {self.spread:.2g} eV per atom about it"

    def as_json(self) -> dict[str, Any]:
        """The fields as JSON values."""
        return asdict(self) | {"of_element": {chemical_symbols[z]: shift for z, shift in self.of_element.items()}}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """The shift that `as_json` gave."""
        of_element = {atomic_numbers[symbol]: shift for symbol, shift in values["of_element"].items()}
        return cls(**{**values, "of_element": of_element})

    @staticmethod
    def check(values: Entries) -> None:
        """Raises WrongEntry if these are not values that `as_json` gives."""
        values.keys([field.name for field in fields(EnergyShift)])
        of_element = values.under("of_element")
        for symbol in of_element.keys(chemical_symbols[1:]):
            of_element.number(symbol)
        for name in ("of_frame", "low", "high"):
            values.number(name)
        values.number("spread", 0)
        values.number("inflation", 1)
        if not isinstance(values["determined"], bool):
            raise values.wrong("determined", "true or false")


def energy_shift(residuals: np.ndarray, numbers: np.ndarray, n_atoms_of_frame: np.ndarray) -> EnergyShift | None:
    """The shift in residuals of energies; None if there is none that is large beside their spread.

    Least squares over a constant for each element and, where these do not explain it, one more for every frame.

    Args:
        residuals: (n_frames,) reference - prediction per atom, eV; NaN for frames without a label.
        numbers: (n_atoms,) atomic numbers of all frames.
        n_atoms_of_frame: (n_frames,) number of atoms of each frame.
    """
    labelled = np.isfinite(residuals)
    if not labelled.any():
        return None
    elements, element = np.unique(numbers, return_inverse=True)
    counts = np.zeros((len(residuals), len(elements)))
    np.add.at(counts, (np.repeat(np.arange(len(residuals)), n_atoms_of_frame), element), 1)
    size = float(np.sqrt(np.mean(residuals[labelled] ** 2)))
    found: EnergyShift | None = None
    for columns in (counts, np.column_stack([counts, np.ones(len(counts))])):
        per_atom = columns / n_atoms_of_frame[:, None]
        shifts, _, rank, _ = np.linalg.lstsq(per_atom[labelled], residuals[labelled])
        beyond = int(labelled.sum()) - rank
        if beyond < max(_FEWEST_BEYOND, _TIMES_BEYOND * rank):
            break
        left = residuals - per_atom @ shifts
        spread = float(np.sqrt(np.sum(left[labelled] ** 2) / beyond))
        if found is None or spread < _WORTH_A_CONSTANT * found.spread:
            totals = (columns @ shifts)[labelled]
            found = EnergyShift(
                of_element=dict(zip(elements.tolist(), shifts.tolist(), strict=False)),
                of_frame=0.0 if len(shifts) == len(elements) else float(shifts[-1]),
                determined=bool(rank == len(shifts) == len(elements)),
                low=float(totals.min()),
                high=float(totals.max()),
                spread=spread,
                inflation=float(np.sqrt((beyond + rank) / beyond)),
            )
    return None if found is None or size < _SMALLEST or found.spread > _LARGEST_SPREAD * size else found
