"""How far runs leave the calibration data: where they do, the potential is not to be trusted without labels."""

import threading
import warnings
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from ase_uq.errors import UQWarning
from ase_uq.thresholds.reduction import Reduction

_QUANTILE = 0.99
_INSIDE = 0.999  # share of calibration atoms with a gamma below 1
_WORTH_A_WORD = 0.05


@dataclass
class Reach:
    """Counts the readings that calibration frames hardly have: above their 99 % quantile, or with gamma above 1.

    Args:
        level: The 99 % quantile of the calibration frames, eV/Å; infinite if they cannot tell.
        times: Number of atoms of the structure, as a multiple of that of calibration frames: the largest of more atoms
            is larger.
        n_atoms: Number of atoms of the structure.
        reduction: How its atoms become a reading; gamma is that of the atoms that it looks at.
    """

    level: float
    times: float
    n_atoms: int
    reduction: Reduction
    n_readings: int = 0
    n_above: int = 0
    n_outside: int = 0
    n_grades: int = 0
    largest: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False, compare=False)

    @classmethod
    def of(cls, calculator: BaseCalculator, atoms: Atoms, reduction: Reduction) -> "Reach":
        """The counts of no readings yet, for a structure with a calculator that has an uncertainty model."""
        model: Any = getattr(calculator, "uncertainty_model", None)
        if model is None:
            return cls(np.inf, 1.0, len(atoms), reduction)
        try:
            readings = model.threshold_data(reduction).finite.readings
        except ValueError:  # chosen indices mean other atoms in other systems
            readings = []
        level = float(np.quantile(readings, _QUANTILE)) if len(readings) else np.inf
        return cls(level, max(1.0, len(atoms) / model.record.n_atoms_of_frame.mean()), len(atoms), reduction)

    def add(self, readings: np.ndarray) -> None:
        """Counts readings, eV/Å."""
        self.n_readings += len(readings)
        self.n_above += int(np.sum(readings > self.level))

    def add_grades(self, gamma: np.ndarray, numbers: np.ndarray) -> None:
        """Counts the gamma of one structure."""
        largest = replace(self.reduction, kind="max")(gamma, numbers)
        with self._lock:  # runs that go forward together have a thread each
            self.n_grades += 1
            self.n_outside += largest > 1
            self.largest = max(self.largest, largest)

    @property
    def excess(self) -> float:
        """Share of the readings that are beyond the calibration data, without those that are to be expected."""
        found = (
            (self.n_above, self.n_readings, _QUANTILE**self.times),
            (self.n_outside, self.n_grades, _INSIDE**self.n_atoms),
        )
        return max(1 - (1 - count / max(n, 1)) / inside for count, n, inside in found)

    def describe(self) -> str:
        """The counts in words."""
        parts = []
        if np.isfinite(self.level):
            share = self.n_above / max(self.n_readings, 1)
            parts.append(
                f"{share:.2g} of the readings are above {self.level:.3g} eV/Å, the 99 % quantile of the calibration"
            )
        if self.n_grades:
            share = self.n_outside / self.n_grades
            parts.append(f"{share:.2g} have an atom with gamma above 1, the largest {self.largest:.3g}")
        return "; ".join(parts)

    def judge(self, limit: float, conditions: str) -> None:
        """Refuses runs that leave the calibration data too often.

        Raises:
            ValueError: More than this share of the readings is beyond it.
        """
        if self.excess > limit:
            raise ValueError(
                f"these reference runs ({conditions}) are not to be trusted: {self.describe()}. A threshold from them "
                "would let through what the potential does not know. Lower the temperature, or label such frames and "
                f"fit again; beyond={np.ceil(100 * self.excess) / 100:g} (--beyond) takes the runs all the same."
            )

    def tell(self, conditions: str) -> None:
        """Warns of runs that leave the calibration data more often than frames like its own would."""
        if self.excess > _WORTH_A_WORD:
            warnings.warn(
                f"the reference runs ({conditions}) leave the calibration data: {self.describe()}. False alarms "
                "counted on them make thresholds larger than the potential deserves.",
                UQWarning,
                stacklevel=3,
            )
