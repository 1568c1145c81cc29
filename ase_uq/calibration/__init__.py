"""From raw, variance-like scores to standard deviations in ASE units, fitted on held-out frames.

Scores that grow with the distance from the training frames end where the potential knows nothing (`fit_far_field`):

    far field   log σ² = c + (log σ∞² - c)·t    t from 0 at the calibration frames to 1 where nothing is known

For other scores `fit_calibrator` tries two forms and keeps the one that predicts left-out calibration frames better:

    affine      σ² = a + b·u                    one score; (a, b) by the exact one-dimensional profile
    power       σ² = e^c · Π_k u_k^p_k          all scores; p_k ≥ 0
"""

from ase_uq.calibration.affine import AffineCalibrator, fit_affine
from ase_uq.calibration.base import Calibrator, Residuals, mean_nll
from ase_uq.calibration.choice import Choice, far_field_choice, fit_calibrator
from ase_uq.calibration.edges import EdgeTable, fit_edges
from ase_uq.calibration.far_field import FarFieldCalibrator, fit_far_field
from ase_uq.calibration.power import PowerCalibrator, fit_power
from ase_uq.io.entries import Entries

__all__ = [
    "AffineCalibrator",
    "Calibrator",
    "Choice",
    "EdgeTable",
    "FarFieldCalibrator",
    "PowerCalibrator",
    "Residuals",
    "checked_calibrator",
    "far_field_choice",
    "fit_affine",
    "fit_calibrator",
    "fit_edges",
    "fit_far_field",
    "fit_power",
    "load_calibrator",
    "mean_nll",
]


_KINDS: dict[str, type[Calibrator]] = {
    "affine": AffineCalibrator,
    "far_field": FarFieldCalibrator,
    "power": PowerCalibrator,
}


def load_calibrator(settings: dict) -> Calibrator:
    """The calibrator with these settings, as `Calibrator.settings` gave them."""
    return _KINDS[settings["kind"]].load(settings)


def checked_calibrator(settings: Entries) -> Calibrator:
    """The calibrator with these settings of a file.

    Raises:
        WrongEntry: An entry is missing or wrong.
    """
    _KINDS[settings.text("kind", tuple(_KINDS))].check(settings)
    return load_calibrator(settings.value)
