"""What an uncertainty model remembers of its calibration frames."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from ase_uq.thresholds.data import ThresholdData, exchangeable_groups
from ase_uq.thresholds.reduction import Reduction, readings_of


@dataclass(frozen=True)
class CalibrationRecord:
    """What the calibration frames read, atom by atom: thresholds are made of it.

    Args:
        uncertainty: (n_atoms,) ε_i, eV/Å.
        error: (n_atoms,) ‖F_ref - F‖, eV/Å.
        numbers: (n_atoms,) atomic numbers.
        n_atoms_of_frame: (n_frames,).
        run: (n_frames,) number of the run that a frame comes from.
    """

    uncertainty: np.ndarray
    error: np.ndarray
    numbers: np.ndarray
    n_atoms_of_frame: np.ndarray
    run: np.ndarray

    def readings(self, reduction: Reduction) -> np.ndarray:
        """(n_frames,) eV/Å."""
        return readings_of(self.uncertainty, self.numbers, self.n_atoms_of_frame, reduction)

    def errors(self, reduction: Reduction) -> np.ndarray:
        """(n_frames,) largest ‖F_ref - F‖ among the atoms that a reduction looks at, eV/Å."""
        return readings_of(self.error, self.numbers, self.n_atoms_of_frame, replace(reduction, kind="max"))

    def threshold_data(self, reduction: Reduction) -> ThresholdData:
        """Its frames as thresholds are made of them.

        Raises:
            ValueError: Chosen indices mean different atoms in different frames.
        """
        if reduction.indices is not None and not self.is_one_system:
            raise ValueError(
                "a criterion for chosen indices needs calibration frames of one system, in which an index is always "
                "the same atom; these are several. Give the threshold in eV/Å, or choose atoms by their elements."
            )
        return ThresholdData(self.readings(reduction), self.errors(reduction), self.groups, reduction)

    @property
    def _frames_numbers(self) -> list[np.ndarray]:
        return np.split(self.numbers, np.cumsum(self.n_atoms_of_frame)[:-1])

    @property
    def is_one_system(self) -> bool:
        """Whether all frames have the same atoms in the same order, so that an index names the same atom in each."""
        first, *others = self._frames_numbers
        return all(np.array_equal(first, other) for other in others)

    @cached_property
    def groups(self) -> np.ndarray:
        """(n_frames,) exchangeable unit of each frame: itself, or a block where frames follow a trajectory.

        Blocks are as long as the largest reading or error of a frame remembers, and end where the run or the
        composition changes. Frames of one run follow each other, also where those of others stand between them.
        """
        order = np.argsort(self.run, kind="stable")
        numbers = self._frames_numbers
        changed = [sorted(numbers[a]) != sorted(numbers[b]) for a, b in pairwise(order)]
        segments = np.concatenate([[0], np.cumsum(np.array(changed, bool) | (np.diff(self.run[order]) != 0))])
        whole = Reduction()
        smallest = np.finfo(np.float32).tiny
        series = [np.log(np.maximum(v, smallest))[order] for v in (self.readings(whole), self.errors(whole))]
        groups = np.empty(len(order), int)
        groups[order] = exchangeable_groups(series, segments)
        return groups
