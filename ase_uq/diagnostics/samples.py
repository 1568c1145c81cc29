"""Residuals and standard deviations, from which metrics are computed and figures are drawn."""

from dataclasses import dataclass

import numpy as np

from ase_uq.representation import Brief
from ase_uq.thresholds.reduction import Reduction, atom_norms, readings_of


@dataclass(frozen=True, repr=False)
class Sample(Brief):
    """Residuals and standard deviations of one quantity from one method.

    Args:
        residuals: (n, n_components) reference - prediction of each atom or frame, in ASE's units. For `forces_max`,
            the (n_frames, 1) largest ‖F_ref - F‖ of each frame.
        std: Standard deviations of the same shape. For `forces_max`, the largest ε of each frame.
        frame: (n,) number of the frame that each row belongs to.
        numbers: (n,) atomic numbers; None for quantities of frames.
    """

    residuals: np.ndarray
    std: np.ndarray
    frame: np.ndarray
    numbers: np.ndarray | None = None

    @property
    def errors(self) -> np.ndarray:
        """(n,) norms of the residuals."""
        return np.linalg.norm(self.residuals, axis=1)

    @property
    def uncertainties(self) -> np.ndarray:
        """(n,) norms of the standard deviations, sqrt(Σ_c σ_c²)."""
        return np.linalg.norm(self.std, axis=1)

    def only(self, chosen: np.ndarray) -> "Sample":
        """The sample with only the chosen rows, given as a mask or as indices."""
        numbers = None if self.numbers is None else self.numbers[chosen]
        return Sample(self.residuals[chosen], self.std[chosen], self.frame[chosen], numbers)


def largest_of_frames(sample: Sample) -> Sample:
    """The `forces_max` sample of a `forces` sample: largest error and uncertainty of each frame.

    NaN or inf of an atom becomes that of its frame.
    """
    assert sample.numbers is not None
    frames, counts = np.unique(sample.frame, return_counts=True)
    errors, uncertainties = (
        readings_of(atom_norms(values), sample.numbers, counts, Reduction())[:, None]
        for values in (sample.residuals, sample.std)
    )
    return Sample(errors, uncertainties, frames)
