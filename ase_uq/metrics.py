"""How wrong predictions are, and whether their standard deviations say so.

Arguments come in scikit-learn's order, `(y_true, y_pred, y_std)`: arrays of one shape (a scalar `y_std` is spread
over it), standard deviations in the unit of the values, every component a Gaussian error of its own. Forces may be
handed over as (n_atoms, 3). Frames of one run are not independent: bootstrap these numbers by runs, not by atoms.

    accuracy        mae, rmse
    scoring rules   nll, crps                                least for the true distribution
    calibration     mean_squared_z, coverage, miscalibration_area, ence
    resolution      spearman, auroc, sharpness               are the large errors where they are expected?
"""

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri

__all__ = [
    "auroc",
    "coverage",
    "crps",
    "ence",
    "mae",
    "mean_squared_z",
    "miscalibration_area",
    "nll",
    "rmse",
    "sharpness",
    "spearman",
]


def mae(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Mean absolute error of a component, mean |y - μ|."""
    return float(np.mean(np.abs(_residuals(y_true, y_pred))))


def rmse(y_true: ArrayLike, y_pred: ArrayLike) -> float:
    """Root of the mean squared error of a component, sqrt(mean (y - μ)²)."""
    return float(np.sqrt(np.mean(_residuals(y_true, y_pred) ** 2)))


def nll(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> float:
    """Mean negative log-likelihood of a component, mean ½[log 2πσ² + (y - μ)²/σ²], natural logarithm.

    Proper: least in expectation at the true σ. Its zero depends on the unit of y, so compare differences.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    return float(np.mean(0.5 * np.log(2 * np.pi) + np.log(std) + 0.5 * (residuals / std) ** 2))


def crps(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> float:
    """Mean continuous ranked probability score, ∫ (F(x) - [x ≥ y])² dx of the Gaussian F, in the unit of y.

    mean σ[z(2Φ(z) - 1) + 2φ(z) - 1/√π] with z = (y - μ)/σ (Gneiting and Raftery 2007, eq. 21). Proper like the
    likelihood, kinder to single large errors; for σ → 0 it is the mean absolute error.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    z = residuals / std
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return float(np.mean(std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))))


def mean_squared_z(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> float:
    """Mean of z² = (y - μ)²/σ²: 1 where calibrated on average, 4 where errors are twice what was said."""
    residuals, std = _judged(y_true, y_pred, y_std)
    return float(np.mean((residuals / std) ** 2))


def coverage(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike, *, level: float = 0.68) -> float:
    """Fraction of components inside their central interval of a level, |z| ≤ Φ⁻¹(½ + level/2); `level` if calibrated.

    Args:
        y_true: Reference values.
        y_pred: Predicted values.
        y_std: Their standard deviations.
        level: In (0, 1).
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level!r}.")
    residuals, std = _judged(y_true, y_pred, y_std)
    return float(np.mean(np.abs(residuals) <= ndtri(0.5 + level / 2) * std))


def miscalibration_area(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike, *, n_levels: int = 100) -> float:
    """Mean over levels p of |p - coverage(p)|, the expected calibration error; 0 if calibrated, at most ½.

    Levels are evenly spaced from 0 to 1 (Kuleshov et al. 2018; the area in `uncertainty_toolbox`). Errors 1.5, 2 and
    3 times what was said give 0.13, 0.20 and 0.29; too large uncertainties by the same factors the same.

    Args:
        y_true: Reference values.
        y_pred: Predicted values.
        y_std: Their standard deviations.
        n_levels: Levels, with both ends.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    levels = np.linspace(0, 1, n_levels)
    z = np.sort(np.abs(residuals / std), axis=None)
    observed = np.searchsorted(z, ndtri(0.5 + levels / 2), side="right") / z.size
    return float(np.mean(np.abs(levels - observed)))


def ence(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike, *, n_bins: int = 10) -> float:
    """Expected normalised calibration error: mean over bins of |RMV - RMSE|/RMV, bins of equal count in σ.

    RMV is the root mean variance of a bin, RMSE its root mean squared error (Levi et al. 2022). It depends on the
    number of bins, and is above 0 for finite samples even where calibrated: about sqrt(n_bins/πn).

    Args:
        y_true: Reference values.
        y_pred: Predicted values.
        y_std: Their standard deviations.
        n_bins: At most the number of components.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    if not 1 <= n_bins <= residuals.size:
        raise ValueError(f"{n_bins} bins for {residuals.size} values: give between 1 and {residuals.size}.")
    # Ties in σ are ordered by the error, so that the order of the input does not matter.
    order = np.lexsort((np.abs(residuals).ravel(), std.ravel()))
    errors = []
    for bin_ in np.array_split(order, n_bins):
        rmv = np.sqrt(np.mean(std.ravel()[bin_] ** 2))
        errors.append(abs(rmv - np.sqrt(np.mean(residuals.ravel()[bin_] ** 2))) / rmv)
    return float(np.mean(errors))


def sharpness(y_std: ArrayLike) -> float:
    """Root of the mean variance, sqrt(mean σ²): what the uncertainties claim, whatever the errors are."""
    return float(np.sqrt(np.mean(_checked_std(y_std) ** 2)))


def spearman(errors: ArrayLike, y_std: ArrayLike) -> float:
    """Rank correlation of |error| with σ: 1 if the larger uncertainty always has the larger error.

    Gaussian errors with the right σ do not reach 1: 0.46 in one dimension where log σ spreads by 0.5, 0.72 for the
    norms of three. Pearson correlation of the ranks, ties with their mean rank; NaN where all σ or errors are equal.

    Args:
        errors: Of any sign, or norms of vectors.
        y_std: σ of each, or any score that should grow with the error.
    """
    errors, scores = _pair(np.abs(_array(errors, "errors")), _array(y_std, "y_std"), "errors", "y_std")
    a, b = _ranks(errors), _ranks(scores)
    a, b = a - a.mean(), b - b.mean()
    norm = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / norm) if norm > 0 else float("nan")


def auroc(errors: ArrayLike, y_std: ArrayLike, *, tolerance: float) -> float:
    """Probability that of an error above the tolerance and one below, the former has the larger σ; ties count half.

    The area under the receiver operating characteristic of "bad by its σ" (Mann-Whitney U); ½ is a coin. NaN where
    no error, or every error, is above the tolerance.

    Args:
        errors: Of any sign, or norms of vectors.
        y_std: σ of each, or any score that should grow with the error.
        tolerance: |error| above it is bad; unit of the errors.
    """
    errors, scores = _pair(np.abs(_array(errors, "errors")), _array(y_std, "y_std"), "errors", "y_std")
    bad = errors > tolerance
    n_bad = int(bad.sum())
    n_good = bad.size - n_bad
    if not n_bad or not n_good:
        return float("nan")
    return float((_ranks(scores)[bad].sum() - n_bad * (n_bad + 1) / 2) / (n_bad * n_good))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, equal values with the mean of theirs."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    return (last - (counts - 1) / 2)[place]


def _residuals(y_true: ArrayLike, y_pred: ArrayLike) -> np.ndarray:
    true, predicted = _array(y_true, "y_true"), _array(y_pred, "y_pred")
    if true.shape != predicted.shape:
        raise ValueError(f"y_true has shape {true.shape}, y_pred {predicted.shape}; they must be equal.")
    return true - predicted


def _judged(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Residuals and standard deviations of one shape."""
    residuals, std = _residuals(y_true, y_pred), _checked_std(y_std)
    if std.ndim == 0:
        std = np.full(residuals.shape, float(std))
    if std.shape != residuals.shape:
        raise ValueError(f"y_true has shape {residuals.shape}, y_std {std.shape}; they must be equal.")
    return residuals, std


def _checked_std(y_std: ArrayLike) -> np.ndarray:
    std = _array(y_std, "y_std")
    if not (std > 0).all():
        raise ValueError(
            f"y_std has {int((~(std > 0)).sum())} values that are not positive; each is a standard deviation."
        )
    return std


def _pair(a: np.ndarray, b: np.ndarray, name_a: str, name_b: str) -> tuple[np.ndarray, np.ndarray]:
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has shape {a.shape}, {name_b} {b.shape}; they must be equal.")
    return a.ravel(), b.ravel()


def _array(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, float)
    if not array.size:
        raise ValueError(f"{name} is empty.")
    if np.isnan(array).any():
        raise ValueError(f"{name} has {int(np.isnan(array).sum())} values that are NaN; leave them out.")
    return array
