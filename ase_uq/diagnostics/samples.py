"""Residuals and standard deviations, from which metrics are computed and figures are drawn."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from ase_uq.calibration.energy_shift import EnergyShift, energy_shift
from ase_uq.display.representation import Brief
from ase_uq.errors import UQWarning
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

    def only(self, chosen: np.ndarray | slice) -> "Sample":
        """The sample with only the chosen rows, given as a mask, as indices or as a slice."""
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


def without_energy_shift[K](
    samples: Mapping[K, Sample], numbers: Mapping[int, np.ndarray], shift: EnergyShift | None
) -> dict[K, Sample]:
    """Samples of energies per atom without the offset that the calibration frames had; a warning names a further one.

    An offset that only these frames have may be an error of the potential, so it stays in.

    Args:
        samples: Samples of `energy_per_atom` with the same frames and residuals, such as those of several methods.
        numbers: Atomic numbers of each frame, by its number.
        shift: The offset of the calibration frames, if they have one.
    """
    if not samples:
        return {}
    first = next(iter(samples.values()))
    of_frames = [numbers[frame] for frame in first.frame.tolist()]
    atoms = np.concatenate(of_frames), np.array([len(of_frame) for of_frame in of_frames])
    left = first.residuals[:, 0] if shift is None else shift.taken_out(first.residuals[:, 0], *atoms)
    further = energy_shift(left, *atoms)
    if further is not None:
        warnings.warn(
            f"the reference energies have an offset of {further.describe()} that the calibration frames do not have: "
            "another E0 or functional, or an error that the potential makes in all of these frames. It counts as an "
            "error here. Label with the reference of the calibration frames.",
            UQWarning,
            stacklevel=3,
        )
    return {key: replace(sample, residuals=left[:, None]) for key, sample in samples.items()}
