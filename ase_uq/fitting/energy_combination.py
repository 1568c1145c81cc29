"""Fits the combination of energies: which corrections by other methods the calibration frames support."""

import numpy as np
import torch

from ase_uq.calibration import FarFieldCalibrator
from ase_uq.fitting.calibrate import Observed
from ase_uq.fitting.combination import FLOOR_QUANTILE, Likelihood, earned, end_of
from ase_uq.uncertainty_model.combination import CombinationInputs
from ase_uq.uncertainty_model.energy_combination import EnergyCombination, EnergyFeatures


def combine_energies(inputs: CombinationInputs, observed: Observed) -> EnergyCombination | None:
    """Fits it to the calibration frames of all ranks.

    None where there is nothing to combine: the calibration frames have no energies or too few, the anchor's calibrator
    of energies has no far end, on the way to which corrections fade, or there is no other method of energies.

    Args:
        inputs: How the combination of forces reads a batch.
        observed: Scores and residuals of the calibration frames.
    """
    calibrators = inputs.energy_calibrators
    if not isinstance(calibrators.get(inputs.anchor), FarFieldCalibrator) or len(calibrators) < 2:
        return None
    assert observed.energy_limit is not None
    scores = {name: torch.from_numpy(observed.raw[name].energy) for name in calibrators}
    features = EnergyFeatures.of(inputs.anchor, calibrators, scores, torch.from_numpy(observed.energy_limit))
    return fit_energy_combination(features, observed.energy[:, 0])


def fit_energy_combination(features: EnergyFeatures, residuals: np.ndarray) -> EnergyCombination:
    """Tries the anchor alone, with each other method, and with all; keeps the likeliest.

    Args:
        features: Of the calibration frames.
        residuals: (n_frames,) of energies per atom, eV; NaN for frames without a label.
    """
    labelled = np.isfinite(residuals)

    def column(values: torch.Tensor) -> np.ndarray:
        return values.numpy()[labelled, None]

    base, end = column(features.base), end_of(column(features.way))
    fade = features.fade(end)
    table = {name: column(fade * value) for name, value in features.corrections().items()}
    floor = float(np.quantile(base, FLOOR_QUANTILE))
    rows = Likelihood(base, column(fade), residuals[labelled, None] ** 2, table, floor)
    tried: dict[str, tuple[str, ...]] = {"anchor": (), **{name: (name,) for name in table}}
    if len(table) > 1:
        tried["all"] = tuple(table)
    found = earned(rows, tried, np.arange(len(base)))
    return EnergyCombination(end, rows.floor, found.constant, found.weights, found.likelihoods)
