"""A constant by which reference energies differ from predicted ones: another E0 or functional, and no uncertainty."""

from dataclasses import dataclass

import numpy as np
from ase.data import chemical_symbols

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
        per_atom: (n_frames,) shift of each frame, divided by its number of atoms, eV.
        total: (n_frames,) shift of each frame, eV.
        of_element: Shift of one atom of each element, eV, by atomic number; empty if the frames do not determine them.
        spread: Standard deviation of what is left, eV per atom.
        inflation: Factor by which residuals about fitted constants are too small.
    """

    per_atom: np.ndarray
    total: np.ndarray
    of_element: dict[int, float]
    spread: float
    inflation: float

    def taken_out(self, residuals: np.ndarray) -> np.ndarray:
        """(n_frames,) residuals per atom without the shift, as large as those of frames that it was not fitted to."""
        return (residuals - self.per_atom) * self.inflation

    def describe(self) -> str:
        """The shift and the spread about it, in words."""
        low, high = self.total.min(), self.total.max()
        size = f"{low:+.3g}" if np.isclose(low, high, rtol=1e-3) else f"{low:+.3g} to {high:+.3g}"
        elements = [f"{chemical_symbols[z]} {shift:+.3g}" for z, shift in self.of_element.items()]
        named = f", as of {', '.join(elements)} eV an atom" if 1 < len(elements) <= _NAMED else ""
        return f"{size} eV{named} (reference - prediction), with a spread of {self.spread:.2g} eV per atom about it"


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
        columns = columns / n_atoms_of_frame[:, None]
        shifts, _, rank, _ = np.linalg.lstsq(columns[labelled], residuals[labelled])
        beyond = int(labelled.sum()) - rank
        if beyond < max(_FEWEST_BEYOND, _TIMES_BEYOND * rank):
            break
        per_atom = columns @ shifts
        spread = float(np.sqrt(np.sum((residuals - per_atom)[labelled] ** 2) / beyond))
        if found is None or spread < _WORTH_A_CONSTANT * found.spread:
            alone = rank == len(shifts) == len(elements)
            of_element = dict(zip(elements.tolist(), shifts.tolist(), strict=True)) if alone else {}
            total, inflation = (per_atom * n_atoms_of_frame)[labelled], float(np.sqrt((beyond + rank) / beyond))
            found = EnergyShift(per_atom, total, of_element, spread, inflation)
    return None if found is None or size < _SMALLEST or found.spread > _LARGEST_SPREAD * size else found
