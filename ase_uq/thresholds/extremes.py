"""Correlated readings of runs: how long their memory is, how their peaks cluster, and how far their tail reaches.

A series has one array per run; nothing is compared across the ends of runs.

Source: Coles, An Introduction to Statistical Modeling of Extreme Values, 2001; Sokal, Monte Carlo methods in
statistical mechanics, 1997 (the window of the autocorrelation time).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.optimize import minimize

_WINDOW = 5.0
# Allowed shapes of a tail. With a negative shape the tail would end just above the largest observed peak; in simulated
# runs, such thresholds were reached up to three times as often as promised. Above 1/2 a tail has no finite variance.
_SHAPES = (0.0, 0.5)
_RESAMPLES = 200


def correlation_time(series: Sequence[np.ndarray]) -> float:
    """Integrated autocorrelation time in samples, 1/2 + Σ_t |ρ(t)| over Sokal's window, pooled over runs.

    The sum is over magnitudes of ρ, so that the swings of a vibration do not cancel: half a period later the series
    still remembers. Each run is measured from its own mean, so that runs at different levels are not mistaken for slow
    ones.

    Returns:
        The time; at least 0.5, the value of white noise. It is also 0.5 if the correlation of neighbours is not
        significant (below two standard deviations) or the runs are too short to tell.
    """
    centred = [np.asarray(run, float) - np.mean(run) for run in series if len(run) > 1]
    n = sum(map(len, centred))
    power = sum(float(run @ run) for run in centred)
    if n < 4 or power <= 0:
        return 0.5
    longest = max(map(len, centred))
    covariances = np.zeros(longest)
    pairs = np.zeros(longest)
    for run in centred:
        covariances[: len(run)] += _autocovariance(run)
        pairs[: len(run)] += np.arange(len(run), 0, -1)
    # Each lag is averaged over its number of pairs: a sum over fewer pairs does not mean a smaller correlation.
    rho = covariances / np.maximum(pairs, 1) / (power / n)
    if rho[1] < 2 / np.sqrt(n):
        return 0.5
    times = 0.5 + np.cumsum(np.abs(rho[1:]))
    (wide,) = np.nonzero(np.arange(1, longest) >= _WINDOW * times)
    return max(0.5, float(times[wide[0]] if len(wide) else times.max()))


def _autocovariance(run: np.ndarray) -> np.ndarray:
    """Σ_i x_i x_{i+t} for each lag t, by Fourier transform."""
    size = 1 << (2 * len(run) - 1).bit_length()
    spectrum = np.fft.rfft(run, size)
    return np.fft.irfft(spectrum * spectrum.conj(), size)[: len(run)]


def peaks(series: Sequence[np.ndarray], threshold: float, separation: int) -> np.ndarray:
    """(n_clusters,) largest reading of each excursion at or above a threshold (runs declustering).

    Args:
        series: Readings, one array per run.
        threshold: Reading at which an excursion begins.
        separation: Exceedances at most this many samples apart belong to one excursion.
    """
    largest = []
    for run in series:
        (above,) = np.nonzero(run >= threshold)
        if len(above):
            cuts = np.flatnonzero(np.diff(above) > separation) + 1
            largest += [float(run[cluster].max()) for cluster in np.split(above, cuts)]
    return np.array(largest)


def extremal_index(series: Sequence[np.ndarray], threshold: float, separation: int) -> float:
    """θ, the number of clusters per exceedance: 1 for independent samples, less if exceedances come together."""
    exceedances = sum(int(np.count_nonzero(run >= threshold)) for run in series)
    return len(peaks(series, threshold, separation)) / exceedances if exceedances else 1.0


@dataclass(frozen=True)
class Tail:
    """A generalised Pareto tail of the peaks of excursions.

    Args:
        threshold: u, where the tail begins.
        shape: ξ.
        scale: σ > 0.
        rate: λ, excursions per sample: θ times the share of samples above u.
        n_peaks: Number of excursions that the tail was fitted to.
    """

    threshold: float
    shape: float
    scale: float
    rate: float
    n_peaks: int

    def return_level(self, probability: float, steps: int) -> float:
        """The level that the largest of `steps` samples reaches with this probability; at least u.

        From P = 1 - exp(-steps·λ·(1 + ξ(τ - u)/σ)^(-1/ξ)).
        """
        survival = -np.log1p(-probability) / (steps * self.rate)
        if survival >= 1:
            return self.threshold
        if abs(self.shape) < 1e-6:
            return self.threshold - self.scale * float(np.log(survival))
        return self.threshold + self.scale / self.shape * float(survival**-self.shape - 1)


def fit_tail(series: Sequence[np.ndarray], quantile: float = 0.98) -> Tail:
    """The tail above a quantile of all samples, by maximum likelihood on declustered peaks, 0 ≤ ξ ≤ 1/2.

    Peaks are more than two correlation times apart. Tails that end, such as those of Gaussian readings, are
    overestimated, so the error is on the side of fewer alarms.
    """
    threshold = float(np.quantile(np.concatenate([np.asarray(run, float) for run in series]), quantile))
    heights = peaks(series, threshold, _separation(series))
    return _tail(heights, threshold, len(heights) / sum(map(len, series)))


def tail_band(
    series: Sequence[np.ndarray],
    probability: float,
    steps: int,
    *,
    quantile: float = 0.98,
    confidence: float = 0.9,
    seed: int = 0,
) -> tuple[float, float]:
    """Interval of `Tail.return_level` over resampled excursions, whose number is drawn from a Poisson distribution."""
    rng = np.random.default_rng(seed)
    best = fit_tail(series, quantile)
    heights = peaks(series, best.threshold, _separation(series))
    levels = []
    for _ in range(_RESAMPLES):
        n = max(2, int(rng.poisson(len(heights))))
        resampled = _tail(rng.choice(heights, n), best.threshold, best.rate * n / len(heights))
        levels.append(resampled.return_level(probability, steps))
    low, high = np.quantile(levels, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def run_maxima(series: Sequence[np.ndarray], steps: int) -> tuple[np.ndarray, np.ndarray]:
    """Maxima of pieces of `steps` samples, and the run that each piece is from; shorter ends of runs are left out."""
    maxima, runs = [], []
    for number, run in enumerate(series):
        whole = len(run) // steps
        maxima += np.asarray(run[: whole * steps], float).reshape(whole, steps).max(1).tolist() if whole else []
        runs += [number] * whole
    return np.array(maxima), np.array(runs, int)


def block_bootstrap(
    series: Sequence[np.ndarray], length: int, n_series: int, block: int, rng: np.random.Generator
) -> np.ndarray:
    """(n_series, length) new series, put together from blocks of those runs that are at least one block long.

    Args:
        series: Readings, one array per run.
        length: Length of each new series.
        n_series: Number of new series.
        block: Samples per block; limited to the length of the longest run.
        rng: Generator that draws the blocks.
    """
    block = min(block, max(map(len, series)))
    ends = np.cumsum([len(run) for run in series])
    starts = np.concatenate([np.arange(end - len(run), end - block + 1) for run, end in zip(series, ends, strict=True)])
    drawn = rng.choice(starts, (n_series, -(-length // block)))
    places = (drawn[:, :, None] + np.arange(block)).reshape(n_series, -1)[:, :length]
    return np.concatenate([np.asarray(run, float) for run in series])[places]


def _separation(series: Sequence[np.ndarray]) -> int:
    return int(np.ceil(2 * correlation_time(series)))


def _tail(heights: np.ndarray, threshold: float, rate: float) -> Tail:
    excess = np.maximum(heights - threshold, 0.0)
    mean = float(excess.mean()) if len(excess) else 0.0
    if mean <= 0:
        return Tail(threshold, 0.0, max(abs(threshold), 1.0) * 1e-12, rate, len(heights))
    scaled = excess / mean

    def negative_log_likelihood(parameters: np.ndarray) -> float:
        log_scale, shape = parameters
        relative = scaled / np.exp(log_scale)
        if shape < 1e-6:
            return len(scaled) * log_scale + float(relative.sum())
        return len(scaled) * log_scale + (1 + 1 / shape) * float(np.log1p(shape * relative).sum())

    bounds = [(-5.0, 5.0), _SHAPES]
    log_scale, shape = minimize(negative_log_likelihood, (0.0, 0.1), method="Nelder-Mead", bounds=bounds).x
    return Tail(threshold, float(shape), mean * float(np.exp(log_scale)), rate, len(heights))
