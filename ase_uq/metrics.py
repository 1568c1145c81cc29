"""How wrong predictions are, and whether their standard deviations say so.

Arguments come in scikit-learn's order, `(y_true, y_pred, y_std)`: arrays of one shape (a scalar `y_std` is spread
over it), standard deviations in the unit of the values, every component a Gaussian error of its own. Forces may be
handed over as (n_atoms, 3). Measures of resolution rank whole errors instead, for forces the norms of their vectors.
Atoms of a frame and frames of a run are not independent: `bootstrap` resamples whole frames, or blocks of them.

    accuracy        mae, rmse
    scoring rules   nll, crps, rll                           best for the true distribution
    calibration     mean_squared_z, coverage, miscalibration_area, ence
    resolution      spearman, auroc, auprc, ause, sharpness  are the large errors where they are expected?
    reference       attainable_spearman, bootstrap           what the numbers could be, and how sure they are
"""

from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import ArrayLike
from scipy.special import ndtr, ndtri
from scipy.stats import rankdata

__all__ = [
    "attainable_spearman",
    "auprc",
    "auroc",
    "ause",
    "bootstrap",
    "coverage",
    "crps",
    "ence",
    "mae",
    "mean_squared_z",
    "miscalibration_area",
    "nll",
    "rll",
    "rmse",
    "sharpness",
    "spearman",
    "summands",
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
    return float(np.mean(_nll(*_judged(y_true, y_pred, y_std))))


def crps(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> float:
    """Mean continuous ranked probability score, ∫ (F(x) - [x ≥ y])² dx of the Gaussian F, in the unit of y.

    mean σ[z(2Φ(z) - 1) + 2φ(z) - 1/√π] with z = (y - μ)/σ (Gneiting and Raftery 2007, eq. 21). Proper like the
    likelihood, kinder to single large errors; for σ → 0 it is the mean absolute error.
    """
    return float(np.mean(_crps(*_judged(y_true, y_pred, y_std))))


def rll(y_true: ArrayLike, y_pred: ArrayLike, y_std: ArrayLike) -> float:
    """Relative log-likelihood, (NLL_const - NLL)/(NLL_const - NLL_oracle): 0 for the best constant σ, 1 for the oracle.

    The constant is the root mean squared error, the oracle knows σ = |y - μ| of each component (Kellner and Ceriotti
    2024). The zero of the likelihood and the unit of y cancel. Below 0 a constant would have been better. Calibrated
    Gaussian errors do not reach 1: 0.28 where log σ spreads by 0.5, 0.61 where it spreads by 1.

    Residuals of exactly 0, which symmetry makes, have no oracle and are left out. NaN where all are 0 or of one size.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    squares = residuals**2
    known = squares > 0
    squares, variances = squares[known], std[known] ** 2
    if not squares.size or squares.min() == squares.max():
        return float("nan")
    # Twice the NLL, without its constant: of one σ² = MSE, of the given σ, of σ² = r².
    constant = np.log(squares.mean()) + 1
    given = np.mean(np.log(variances) + squares / variances)
    oracle = np.mean(np.log(squares)) + 1
    return float((constant - given) / (constant - oracle))


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
    return float(np.mean(_inside(*_judged(y_true, y_pred, y_std), level)))


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
    number of bins, and is above 0 for finite samples even where calibrated: about sqrt(n_bins/πn). Values of equal σ
    each count with the mean of their squared errors, as if they came in every order.

    Args:
        y_true: Reference values.
        y_pred: Predicted values.
        y_std: Their standard deviations.
        n_bins: At most the number of components.
    """
    residuals, std = _judged(y_true, y_pred, y_std)
    if not 1 <= n_bins <= residuals.size:
        raise ValueError(f"{n_bins} bins for {residuals.size} values: give between 1 and {residuals.size}.")
    levelled = _levelled(residuals.ravel() ** 2, std.ravel() ** 2)
    sizes = np.full(n_bins, residuals.size // n_bins)
    sizes[: residuals.size % n_bins] += 1
    rmv, rms = np.sqrt(np.add.reduceat(np.stack(levelled), np.cumsum(sizes) - sizes, axis=1) / sizes)
    return float(np.mean(np.abs(rmv - rms) / rmv))


def summands(residuals: ArrayLike, y_std: ArrayLike, *, levels: Sequence[float] = (0.68,)) -> dict[str, np.ndarray]:
    """What each component adds to the metrics that are means, so that resamples of rows need not compute it again.

    The means are `mae`, the squares of `rmse` and `sharpness`, `nll`, `crps`, `mean_squared_z`, and `coverage` at each
    level as `coverage_68`.

    Args:
        residuals: y - μ.
        y_std: Standard deviations of the same shape.
        levels: Of the coverage.
    """
    residuals, std = _judged(residuals, np.zeros_like(residuals), y_std)
    return {
        "mae": np.abs(residuals),
        "rmse": residuals**2,
        "sharpness": std**2,
        "nll": _nll(residuals, std),
        "crps": _crps(residuals, std),
        "mean_squared_z": (residuals / std) ** 2,
        **{f"coverage_{100 * level:.0f}": _inside(residuals, std, level) for level in levels},
    }


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
    ranks = rankdata(_ranked(errors, y_std), axis=1)
    a, b = ranks - ranks.mean(axis=1, keepdims=True)
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
    errors, scores = _ranked(errors, y_std)
    bad = errors > tolerance
    if bad.all() or not bad.any():
        return float("nan")
    of_good, of_bad = np.sort(scores[~bad]), np.sort(scores[bad])
    # How many good ones each bad one surpasses, without ties and with them.
    surpassed = [np.searchsorted(of_good, of_bad, side).mean() for side in ("left", "right")]
    return float(np.mean(surpassed) / of_good.size)


def auprc(errors: ArrayLike, y_std: ArrayLike, *, tolerance: float) -> float:
    """Average precision of "bad by its σ": mean over the bad ones of how many of those with at least their σ are bad.

    The area under the curve of precision against recall as a sum of steps, Σ (R_k - R_k-1) P_k over the distinct σ
    from the largest on. 1 if all bad ones stand first; a coin gives the share of bad ones, so this tells more than
    `auroc` where they are rare. NaN where no error is above the tolerance.

    Args:
        errors: Of any sign, or norms of vectors.
        y_std: σ of each, or any score that should grow with the error.
        tolerance: |error| above it is bad; unit of the errors.
    """
    errors, scores = _ranked(errors, y_std)
    order = np.argsort(-scores)
    descending, bad = scores[order], (errors > tolerance)[order]
    if not bad.any():
        return float("nan")
    # Equal σ are found together: precision and recall are known where one ends.
    ends = np.append(np.flatnonzero(descending[1:] != descending[:-1]), bad.size - 1)
    found = np.cumsum(bad)[ends]
    return float(np.sum(np.diff(found, prepend=0) * found / (ends + 1)) / found[-1])


def ause(errors: ArrayLike, y_std: ArrayLike) -> float:
    """Area under the sparsification error: how much worse it is to remove values by their σ than by their error.

    The curve of an order is the mean |error| of what is left after its first k of n values are removed, divided by
    the mean |error| of all. AUSE is the mean over k = 0 … n - 1 of the curve of descending σ less that of descending
    |error| (Ilg et al. 2018). 0 for the best order. A coin, whose curve is flat, gives 0.57 for Gaussian errors of one
    σ, 0.36 for the norms of three, and more where errors differ more. Values of equal σ each count with the mean of
    their errors, as if they came in every order. NaN where all errors are 0.

    Args:
        errors: Of any sign, or norms of vectors.
        y_std: σ of each, or any score that should grow with the error.
    """
    errors, scores = _ranked(errors, y_std)
    if not errors.any():
        return float("nan")
    sizes = errors / errors.max()  # a ratio: the mean of the smallest numbers there are would vanish
    _, by_score = _levelled(sizes, scores)
    # Ascending, the first m values are what is left after n - m were removed.
    left = np.arange(1, sizes.size + 1)
    difference = (np.cumsum(by_score) - np.cumsum(np.sort(sizes))) / left
    return float(difference.mean() / sizes.mean())


def attainable_spearman(
    y_std: ArrayLike, *, frames: ArrayLike | None = None, n_draws: int = 20, seed: int = 0
) -> float:
    """The `spearman` of Gaussian errors with exactly these σ: its mean over simulated errors.

    What a perfectly calibrated method with these σ would reach. A small number says that the σ hardly differ,
    so that a small `spearman` is no fault. NaN where all σ are equal.

    Args:
        y_std: (n,) of scalars, or (n, n_components) of vectors, which are ranked by their norms.
        frames: (n,) any label of the frame of each; given, the largest error and the largest σ of each frame are
            ranked.
        n_draws: How many sets of errors are drawn.
        seed: Of the draws.
    """
    std = np.abs(_array(y_std, "y_std"))
    if std.ndim not in (1, 2):
        raise ValueError(f"y_std has shape {std.shape}; (n,) or (n, n_components) was expected.")
    if n_draws < 1:
        raise ValueError(f"{n_draws} draws were asked for; at least 1 is needed.")
    vectors = std.reshape(len(std), -1)
    groups = None if frames is None else _groups(frames, len(std), "frames")
    scores = _largest(np.linalg.norm(vectors, axis=1), groups)
    rng = np.random.default_rng(seed)
    draws = (np.linalg.norm(vectors * rng.standard_normal(vectors.shape), axis=1) for _ in range(n_draws))
    return float(np.mean([spearman(_largest(errors, groups), scores) for errors in draws]))


def bootstrap(
    statistic: Callable[[np.ndarray], ArrayLike],
    groups: ArrayLike,
    *,
    block: int = 1,
    n_resamples: int = 200,
    level: float = 0.95,
    seed: int = 0,
) -> np.ndarray:
    """Percentile interval of a statistic, from resampling whole groups with replacement (Efron 1979).

        low, high = bootstrap(lambda rows: spearman(errors[rows], std[rows]), frame_of_atom)

    Resamples for which the statistic is NaN, such as an `auroc` without a bad value, are left out; where all are, the
    interval is NaN. `ence` and `miscalibration_area` grow with noise, of which resamples have more: their intervals lie
    high.

    Args:
        statistic: Of the row numbers of a resample, which come with repetitions; gives a number or an array.
        groups: (n_rows,) any label of the group of each row: its structure, or its run.
        block: Consecutive groups, in the order of their labels, that are resampled together, such as neighbouring
            frames of a run.
        n_resamples: How many.
        level: Of the interval, in (0, 1).
        seed: Of the resamples: the same seed and groups resample the same rows, whatever the statistic.

    Returns:
        (2, ...) low and high, each of the shape of the statistic.

    Raises:
        ValueError: There are fewer than two groups or blocks.
    """
    if not 0 < level < 1:
        raise ValueError(f"the level of an interval lies between 0 and 1, not at {level!r}.")
    if block < 1 or n_resamples < 1:
        raise ValueError(f"block is {block} and n_resamples {n_resamples}; both must be at least 1.")
    of_row = _groups(groups, None, "groups") // block
    n_groups = int(of_row.max()) + 1
    if n_groups < 2:
        raise ValueError("there is one group only, or one block; intervals need at least two. Give a smaller block.")
    # Rows of a group stand together, so that the memory a resample reads does too.
    order = np.argsort(of_row, kind="stable")
    sizes = np.bincount(of_row)
    rng = np.random.default_rng(seed)
    values = []
    for _ in range(n_resamples):
        times = np.bincount(rng.integers(n_groups, size=n_groups), minlength=n_groups)
        values.append(np.asarray(statistic(np.repeat(order, np.repeat(times, sizes))), float))
    return _quantiles(np.stack(values), (0.5 - level / 2, 0.5 + level / 2))


def _quantiles(values: np.ndarray, levels: tuple[float, float]) -> np.ndarray:
    """(n, ...) → (2, ...) quantiles along the first axis of what is not NaN; NaN where nothing else is there."""
    # Sorting puts NaN last; numpy's nanquantile walks over the columns one by one, and warns of empty ones.
    ordered = np.sort(values, axis=0)
    last = np.count_nonzero(~np.isnan(ordered), axis=0) - 1
    places = np.multiply.outer(levels, np.maximum(last, 0))
    below = np.floor(places).astype(int)
    above = np.minimum(below + 1, np.maximum(last, 0))
    low, high = (np.take_along_axis(ordered, place, 0) for place in (below, above))
    return low + (places - below) * (high - low)


def _nll(residuals: np.ndarray, std: np.ndarray) -> np.ndarray:
    return 0.5 * np.log(2 * np.pi) + np.log(std) + 0.5 * (residuals / std) ** 2


def _crps(residuals: np.ndarray, std: np.ndarray) -> np.ndarray:
    z = residuals / std
    density = np.exp(-0.5 * z**2) / np.sqrt(2 * np.pi)
    return std * (z * (2 * ndtr(z) - 1) + 2 * density - 1 / np.sqrt(np.pi))


def _inside(residuals: np.ndarray, std: np.ndarray, level: float) -> np.ndarray:
    return np.abs(residuals) <= ndtri(0.5 + level / 2) * std


def _groups(labels: ArrayLike, n_rows: int | None, name: str) -> np.ndarray:
    """Labels as numbers from 0 on, in the order of the labels."""
    labels = np.asarray(labels)
    if labels.ndim != 1 or not labels.size or n_rows not in (None, len(labels)):
        raise ValueError(f"{name} has shape {labels.shape}; ({n_rows or 'n_rows'},) was expected.")
    return np.unique(labels, return_inverse=True)[1]


def _largest(values: np.ndarray, groups: np.ndarray | None) -> np.ndarray:
    if groups is None:
        return values
    largest = np.zeros(int(groups.max()) + 1)
    np.maximum.at(largest, groups, values)
    return largest


def _levelled(values: np.ndarray, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Keys in ascending order, and their values; those of equal keys are replaced by their mean."""
    order = np.argsort(keys)
    keys, values = keys[order], values[order]
    starts = np.flatnonzero(np.append(True, keys[1:] != keys[:-1]))
    counts = np.diff(starts, append=len(keys))
    return keys, np.repeat(np.add.reduceat(values, starts) / counts, counts)


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
    if n_others := int((std <= 0).sum()):  # _array refuses NaN
        raise ValueError(f"y_std has {n_others} values that are not positive; each is a standard deviation.")
    return std


def _ranked(errors: ArrayLike, y_std: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """|error| and score of each value, flat."""
    absolute, scores = np.abs(_array(errors, "errors")), _array(y_std, "y_std")
    if absolute.shape != scores.shape:
        raise ValueError(f"errors has shape {absolute.shape}, y_std {scores.shape}; they must be equal.")
    return absolute.ravel(), scores.ravel()


def _array(values: ArrayLike, name: str) -> np.ndarray:
    array = np.asarray(values, float)
    if not array.size:
        raise ValueError(f"{name} is empty.")
    if np.isnan(array).any():
        raise ValueError(f"{name} has {int(np.isnan(array).sum())} values that are NaN; leave them out.")
    return array
