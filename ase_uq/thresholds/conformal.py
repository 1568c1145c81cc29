"""Distribution-free bounds from exchangeable units: split conformal, recall-controlled and PAC thresholds.

Frames of one trajectory are not exchangeable, but blocks of them are. `groups` numbers the block or run of each score;
a group then counts as one unit however many scores it has, and the promise holds for a score of a new group (Lee,
Barber and Willett, Distribution-free inference with hierarchical data, 2023). Without groups each score is a unit,
and the textbook formulas apply.
"""

import numpy as np
from scipy.special import betainc, betaincinv

_ROUNDING = 1e-9  # shares like 0.05·20 must not miss their rank because of a rounding error


def conformal_quantile(scores: np.ndarray, alpha: float, groups: np.ndarray | None = None) -> float:
    """q̂ with P(score ≤ q̂) ≥ 1 - alpha for a new score: the ⌈(1 - alpha)(n + 1)⌉-th smallest of n.

    With K groups of n_k scores each score weighs 1/(n_k(K + 1)), and the remaining 1/(K + 1) lies at infinity.

    Args:
        scores: (n,) scores in any unit.
        alpha: Share in (0, 1) of new scores that may be larger.
        groups: (n,) group of each score.

    Returns:
        The quantile; infinity if there are fewer than `fewest_units(alpha)` units.
    """
    scores = np.asarray(scores, float)
    if not len(scores):
        return np.inf
    weights = _weights(len(scores), groups)
    order = np.argsort(scores, kind="stable")
    (enough,) = np.nonzero(np.cumsum(weights[order]) >= 1 - alpha - _ROUNDING)
    return float(scores[order][enough[0]]) if len(enough) else np.inf


def recall_threshold(bad_scores: np.ndarray, alpha: float, groups: np.ndarray | None = None) -> float:
    """τ with P(score < τ) ≤ alpha for a new bad frame: the ⌊alpha(n + 1)⌋-th smallest of the n bad ones.

    Frames with scores at or above τ are flagged. If there are fewer than `fewest_units(alpha)` units, τ is minus
    infinity and all frames are flagged.
    """
    return -conformal_quantile(-np.asarray(bad_scores, float), alpha, groups)


def recall_threshold_pac(bad_scores: np.ndarray, alpha: float, delta: float, groups: np.ndarray | None = None) -> float:
    """τ that misses at most a share alpha of new bad frames, with probability 1 - delta over calibration sets.

    It is the score of the largest rank k for which a Beta(k, n + 1 - k) variable lies below alpha with that
    probability. A group counts with its lowest score: it is missed if any of its frames is.

    Returns:
        The threshold; minus infinity if there are fewer than `fewest_units_pac(alpha, delta)` units.
    """
    scores = np.asarray(bad_scores, float)
    if groups is not None and len(scores):
        _, place = np.unique(groups, return_inverse=True)
        lowest = np.full(place.max() + 1, np.inf)
        np.minimum.at(lowest, place, scores)
        scores = lowest
    rank = pac_rank(len(scores), alpha, delta)
    return float(np.sort(scores)[rank - 1]) if rank else -np.inf


def pac_rank(n: int, alpha: float, delta: float) -> int:
    """The largest k with BetaCDF(alpha; k, n + 1 - k) ≥ 1 - delta; 0 if there is none."""
    ranks = np.arange(1, n + 1)
    return int(np.count_nonzero(betainc(ranks, n + 1 - ranks, alpha) >= 1 - delta - _ROUNDING))


def fewest_units(alpha: float) -> int:
    """Smallest number of units with a finite conformal quantile, ⌈1/alpha⌉ - 1: 9 for 10 %, 19 for 5 %."""
    return int(np.ceil(1 / alpha - _ROUNDING)) - 1


def fewest_units_pac(alpha: float, delta: float) -> int:
    """Smallest number of units whose `pac_rank` is not 0, ⌈ln delta / ln(1 - alpha)⌉: 22 for 10 % and 90 %."""
    return int(np.ceil(np.log(delta) / np.log1p(-alpha) - _ROUNDING))


def binomial_band(k: int, n: int, confidence: float = 0.9) -> tuple[float, float]:
    """Exact (Clopper-Pearson) interval of a share that was observed as k of n."""
    tail = (1 - confidence) / 2
    low = 0.0 if k == 0 else float(betaincinv(k, n - k + 1, tail))
    high = 1.0 if k == n else float(betaincinv(k + 1, n - k, 1 - tail))
    return low, high


def _weights(n: int, groups: np.ndarray | None) -> np.ndarray:
    if groups is None:
        return np.full(n, 1 / (n + 1))
    _, place, counts = np.unique(groups, return_inverse=True, return_counts=True)
    return 1 / (counts[place] * (len(counts) + 1))
