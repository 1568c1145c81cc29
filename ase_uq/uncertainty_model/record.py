"""The data that an uncertainty model keeps of its calibration frames."""

from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

import numpy as np

from ase_uq.display.representation import Brief
from ase_uq.thresholds.data import ThresholdData, exchangeable_groups
from ase_uq.thresholds.reduction import Reduction, readings_of


@dataclass(frozen=True, repr=False)
class CalibrationRecord(Brief):
    """Uncertainties and errors of the calibration frames, atom by atom: thresholds are made from them.

    Args:
        uncertainty: (n_atoms,) ε_i, eV/Å.
        error: (n_atoms,) ‖F_ref - F‖, eV/Å.
        numbers: (n_atoms,) atomic numbers.
        n_atoms_of_frame: (n_frames,) number of atoms of each frame.
        run: (n_frames,) number of the run that each frame comes from.
    """

    uncertainty: np.ndarray
    error: np.ndarray
    numbers: np.ndarray
    n_atoms_of_frame: np.ndarray
    run: np.ndarray

    def readings(self, reduction: Reduction) -> np.ndarray:
        """(n_frames,) reading of each frame, eV/Å."""
        return readings_of(self.uncertainty, self.numbers, self.n_atoms_of_frame, reduction)

    def errors(self, reduction: Reduction) -> np.ndarray:
        """(n_frames,) largest ‖F_ref - F‖ among the atoms that a reduction looks at, eV/Å."""
        return readings_of(self.error, self.numbers, self.n_atoms_of_frame, replace(reduction, kind="max"))

    def threshold_data(self, reduction: Reduction) -> ThresholdData:
        """The data that thresholds are made from.

        Raises:
            ValueError: The indices of the reduction mean different atoms in different frames.
        """
        if reduction.indices is not None and not self.is_one_system:
            raise ValueError(
                "a criterion for chosen indices needs calibration frames of one system, in which an index is always "
                "the same atom, but these frames are of several systems. Give the threshold in eV/Å, or choose atoms "
                "by their elements."
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
        """(n_frames,) exchangeable unit of each frame: the frame itself, or a block if frames follow a trajectory.

        The length of a block comes from the correlation time of readings and largest errors; blocks end where the run
        or the composition changes. Frames of one run count as consecutive, even if frames of other runs lie between.
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
