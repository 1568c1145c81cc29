"""From raw, variance-like scores to standard deviations in ASE units, fitted on held-out frames.

`fit_calibrator` tries both forms and keeps the one that predicts left-out calibration frames better:

    affine   σ² = a + b·u            one score; (a, b) by the exact one-dimensional profile
    power    σ² = e^c · Π_k u_k^p_k  all scores; p_k ≥ 0
"""

from ase_uq.calibration.affine import AffineCalibrator, fit_affine
from ase_uq.calibration.base import Calibrator, Residuals, mean_nll
from ase_uq.calibration.choice import Choice, fit_calibrator
from ase_uq.calibration.edges import EdgeTable, fit_edges
from ase_uq.calibration.power import PowerCalibrator, fit_power

__all__ = [
    "AffineCalibrator",
    "Calibrator",
    "Choice",
    "EdgeTable",
    "PowerCalibrator",
    "Residuals",
    "fit_affine",
    "fit_calibrator",
    "fit_edges",
    "fit_power",
    "load_calibrator",
    "mean_nll",
]


def load_calibrator(settings: dict) -> Calibrator:
    """The calibrator with these settings, as `Calibrator.settings` gave them."""
    kinds: dict[str, type[Calibrator]] = {"affine": AffineCalibrator, "power": PowerCalibrator}
    return kinds[settings["kind"]].load(settings)
