"""The choice of a calibrator: the form that predicts left-out calibration frames better is kept."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch

from ase_uq.calibration.affine import fit_affine
from ase_uq.calibration.base import Calibrator, Residuals, mean_nll
from ase_uq.calibration.far_field import fit_far_field
from ase_uq.calibration.power import fit_power

_FOLDS = 5


@dataclass(frozen=True)
class Choice:
    """A calibrator, and the reasons for choosing it.

    Args:
        calibrator: The calibrator of the best form, fitted on all rows.
        nll: Cross-validated mean negative log-likelihood per component, for each form.
        of_folds: (n_folds,) the same in each fold, for the chosen form.
        constant_nll: The same likelihood for a constant variance; the difference shows what the scores are worth.
        n_rows: Number of rows it was fitted on.
        n_groups: Number of frames or blocks that the rows come from.
    """

    calibrator: Calibrator
    nll: dict[str, float]
    of_folds: np.ndarray
    constant_nll: float
    n_rows: int
    n_groups: int


def fit_calibrator(residuals: Residuals) -> Choice:
    """Fits the affine form on each score and the power law on all; keeps the better by cross-validated likelihood.

    Each fold consists of consecutive groups: such frames may be neighbours in one trajectory, and a frame cannot test
    what was learned from its neighbour.

    Raises:
        ValueError: There are fewer groups than folds.
    """
    fold = _folds(residuals)
    forms: dict[str, Callable[[Residuals], Calibrator]] = {"power": fit_power}
    for column in range(residuals.scores.shape[1]):
        forms[f"affine[{column}]"] = lambda rows, column=column: fit_affine(rows, column)
    found = {name: _cross_validated(fit, residuals, fold) for name, fit in forms.items()}
    return _choice(lambda best: forms[best](residuals), found, residuals, fold)


def far_field_choice(residuals: Residuals, far: np.ndarray) -> Choice | None:
    """The form that ends where the potential knows nothing; None if no score grows on the way there.

    Args:
        residuals: Calibration rows, with their `limits`.
        far: (n_scores,) log u∞ of each score.

    Raises:
        ValueError: There are fewer groups than folds.
    """
    fold = _folds(residuals)
    calibrator = fit_far_field(residuals, far)
    if calibrator is None:
        return None

    def fit(rows: Residuals) -> Calibrator:
        return fit_far_field(rows, far, like=calibrator) or calibrator

    found = {"far field": _cross_validated(fit, residuals, fold)}
    return _choice(lambda _: calibrator, found, residuals, fold)


def _choice(
    made: Callable[[str], Calibrator], of_folds: Mapping[str, np.ndarray], residuals: Residuals, fold: np.ndarray
) -> Choice:
    """The best form, from the mean negative log-likelihood of each in each fold."""
    nll = {name: float(np.average(values, weights=np.bincount(fold))) for name, values in of_folds.items()}
    best = min(nll, key=lambda name: nll[name])
    n_groups = len(np.unique(residuals.groups))
    constant = _constant_nll(residuals, fold)
    return Choice(made(best), nll, of_folds[best], constant, len(residuals.squares), n_groups)


def _folds(residuals: Residuals) -> np.ndarray:
    """(n,) fold of each row, of consecutive groups."""
    groups = np.unique(residuals.groups)
    if len(groups) < _FOLDS:
        raise ValueError(f"calibration needs at least {_FOLDS} frames, but {len(groups)} were given.")
    return (np.arange(len(groups)) * _FOLDS // len(groups))[np.searchsorted(groups, residuals.groups)]


def _cross_validated(fit: Callable[[Residuals], Calibrator], residuals: Residuals, fold: np.ndarray) -> np.ndarray:
    """(n_folds,) mean negative log-likelihood of a component of each fold, by a calibrator of the others."""
    found = []
    for k in range(_FOLDS):
        left_out = residuals.only(fold == k)
        limit, numbers = (
            None if rows is None else torch.from_numpy(rows) for rows in (left_out.limits, left_out.numbers)
        )
        calibrator = fit(residuals.only(fold != k))
        variance = calibrator.variance(torch.from_numpy(left_out.scores), limit, numbers).numpy()
        found.append(mean_nll(variance, left_out))
    return np.array(found)


def _constant_nll(residuals: Residuals, fold: np.ndarray) -> float:
    total = 0.0
    for k in range(_FOLDS):
        variance = residuals.squares[fold != k].mean() / residuals.components
        left_out = residuals.only(fold == k)
        total += mean_nll(np.full(len(left_out.squares), max(variance, 1e-300)), left_out) * len(left_out.squares)
    return total / len(residuals.squares)
