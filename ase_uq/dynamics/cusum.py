"""The CUSUM rule finds readings that have drifted upwards, although each is below any threshold."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
from scipy.optimize import brentq

from ase_uq.dynamics.rules import Rule
from ase_uq.thresholds.criteria import Criterion, FalseAlarms, PerElement, conformal, extremes
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData

# Fewest independent readings that tell mean and spread: with fewer, simulated runs alarmed more often than promised.
_FEWEST_INDEPENDENT = 100

# Number of series of the bootstrap, and most readings of all of them together (a second of work).
_SERIES = 400
_MOST_READINGS = 20_000_000

# Length of a bootstrap block, in independent readings. Readings of different blocks are uncorrelated, so 1/(2·10) of
# the variance of their sums is lost. Longer blocks would lose less, but there would be too few different ones.
_BLOCK = 10


@dataclass(frozen=True)
class Cusum(Rule):
    """Triggers when readings add up to more than in reference runs: a small rise that lasts is found early.

    S is the one-sided cumulative sum of x = (log reading - mean)/sd, with mean and sd of the reference runs:
    S ← max(0, S + (x - drift)·Δt/interval), with an alarm at S ≥ h. S counts simulated time, not steps. One reading
    counts for no longer than `memory`, the time over which readings are correlated: it says nothing about later times.
    S never grows beyond h, so that the alarm ends soon after its cause. NaN and infinity trigger at once.

    h follows from the allowed false alarms. It is the largest of three limits: Siegmund's, from the run length between
    two false alarms of independent readings, scaled by 2τ for correlated ones; the limit at which runs put together
    from blocks of the reference runs alarm as often as allowed; and, if the reference runs are long and many enough,
    the conformal quantile of their own largest sums, each run against mean and sd of all the others. All three allow
    for what a short reference leaves unknown. The share of false alarms holds on average over references; with a
    single reference it may be several times as large.

    Source: Page, Biometrika 41, 100 (1954); Siegmund, Sequential Analysis, 1985, for the run length.

    Args:
        criterion: The allowed false alarms.
        drift: Rise to ignore, in standard deviations of the reference: half of the rise that should be found.
        mean: Mean of the logarithms of the reference readings; `resolved` sets this and everything below.
        sd: Standard deviation of the logarithms of the reference readings.
        h: Value of S from which on there is an alarm.
        interval: Time between two readings of the reference, fs.
        memory: Longest time for which one reading counts, 2τ·interval, fs.

    Raises:
        TypeError: `criterion` is not a `FalseAlarms`.
        ValueError: `drift` is not positive.
    """

    criterion: FalseAlarms
    drift: float = 0.5
    mean: float | None = None
    sd: float | None = None
    h: float | None = None
    interval: float | None = None
    memory: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, FalseAlarms):
            raise TypeError(
                "a Cusum is made from the false alarms that are allowed, such as "
                f"Cusum(FalseAlarms(per_run=0.05, ps=100)), not from {self.criterion!r}."
            )
        if not 0 < self.drift < math.inf:
            raise ValueError(f"the drift of a Cusum is a positive number of standard deviations, not {self.drift!r}.")

    def __str__(self) -> str:
        return f"a CUSUM by {self.criterion}"

    @property
    def threshold(self) -> float:
        """exp(mean + drift·sd), eV/Å: readings above this make the sum grow."""
        mean, sd, *_ = self._numbers()
        return math.exp(mean + self.drift * sd)

    @property
    def at_once(self) -> float:
        return math.inf

    @property
    def criteria(self) -> tuple[Criterion | PerElement, ...]:
        return (self.criterion,)

    def resolved(self, threshold_data: ThresholdData, element: ThresholdData | None = None) -> "Cusum":
        runs = threshold_data.require_runs(self.criterion)
        logs = [np.log(run) for run in runs.readings]
        mean, sd = float(np.concatenate(logs).mean()), float(np.concatenate(logs).std())
        if sd <= 1e-12 * max(1.0, abs(mean)):
            raise ValueError(
                f"all readings of the reference runs are {math.exp(mean):.4g} eV/Å, so {self} cannot tell what is "
                "more than usual. Make reference runs of a structure that moves."
            )
        scores = [(log - mean) / sd for log in logs]
        memory = _memory(scores)
        self._require(runs, memory)
        length = self.criterion.n_readings(runs)
        between_alarms = -length / math.log1p(-self.criterion.per_run)
        h = max(
            memory * cusum_limit(between_alarms / memory, self.drift),
            _bootstrapped_limit(scores, memory, self.drift, length, self.criterion.per_run),
            _seen_limit(logs, self.drift, length, self.criterion.per_run),
        )
        return replace(self, mean=mean, sd=sd, h=h, interval=runs.interval, memory=memory * runs.interval)

    def judge(self, state: Sequence[float] | None, reading: float, time: float | None) -> tuple[list[float], bool]:
        if time is None:
            raise ValueError(
                f"{self} adds up over simulated time, and an optimiser has none. Use Threshold({self.criterion}) here."
            )
        mean, sd, h, interval, memory = self._numbers()
        total, before = (0.0, time - interval) if state is None else state
        if math.isnan(reading) or reading == math.inf:
            return [total, time], True
        # If the clock was set back, the time since the last reading is unknown; the reading counts like a first one.
        elapsed = min(time - before if time >= before else interval, memory)
        # Without atoms or uncertainty the score is -inf; the product with an elapsed time of 0 would be NaN.
        score = (math.log(reading) - mean) / sd if reading > 0 else -math.inf
        total = min(h, max(0.0, total + (score - self.drift) * elapsed / interval)) if elapsed > 0 else total
        return [total, time], total >= h

    def _require(self, runs: ReferenceRuns, memory: float) -> None:
        needed = math.ceil(_FEWEST_INDEPENDENT * memory)
        if runs.n_steps < needed:
            raise ValueError(
                f"{self} needs at least {needed} readings of reference runs, {_FEWEST_INDEPENDENT} times the "
                f"{memory * runs.interval:.3g} fs over which they are correlated; the uncertainty model has "
                f"{runs.n_steps}. Make longer reference runs, or more."
            )

    def _numbers(self) -> tuple[float, float, float, float, float]:
        numbers = (self.mean, self.sd, self.h, self.interval, self.memory)
        if None in numbers:
            raise ValueError(
                f"{self} has no numbers yet: they depend on the reference runs. UncertaintyMonitor asks the calculator "
                "for them; elsewhere use rule.resolved(calc.threshold_data(Reduction()))."
            )
        return cast(tuple[float, float, float, float, float], numbers)


def cusum_limit(run_length: float, drift: float) -> float:
    """Limit h of a CUSUM of independent standard normal readings, from the run length between two false alarms.

    Siegmund: run_length = (e^(2kb) - 2kb - 1)/(2k²) with k the drift and b = h + 1.166; h is at least zero.

    Args:
        run_length: Mean number of readings between two false alarms.
        drift: Rise to ignore, in standard deviations.
    """
    scaled = 2 * drift**2 * run_length
    # y = 2kb solves e^y - y - 1 = scaled; the left side is larger at e^y = (scaled + 3)², which brackets the root.
    y = brentq(lambda y: math.expm1(y) - y - scaled, 0.0, 2 * math.log(scaled + 3))
    return max(0.0, cast(float, y) / (2 * drift) - 1.166)


def _memory(scores: Sequence[np.ndarray]) -> float:
    """Number of readings, 2τ, that are worth one independent reading.

    τ is taken one standard error, τ·sqrt(2(2W + 1)/n) with Sokal's window W = 5τ, above its estimate: too short a
    memory would break the promise, too long a memory only delays an alarm. If the means of the runs differ by more than
    that explains, readings are correlated throughout a run, and the spread of the means gives the memory.

    Source: Madras and Sokal, J. Stat. Phys. 50, 109 (1988).
    """
    time = extremes.correlation_time(scores)
    within = 2 * time * (1 + math.sqrt(2 * (10 * time + 1) / sum(map(len, scores))))
    if len(scores) == 1:
        return within
    return max(within, sum(len(run) * float(run.mean()) ** 2 for run in scores) / (len(scores) - 1))


def _largest_sums(scores: np.ndarray, drift: float) -> np.ndarray:
    """(n_series, n_readings) → (n_series,): the largest value of each CUSUM."""
    sums = np.cumsum(scores - drift, 1)
    return (sums - np.minimum(np.minimum.accumulate(sums, 1), 0)).max(1)


def _seen_limit(logs: Sequence[np.ndarray], drift: float, length: int, per_run: float) -> float:
    """Sum that a share `per_run` of reference runs of this length reaches; 0 if they are too few or too short."""
    if len(logs) < 2:  # no other run to compare it with
        return 0.0
    maxima, runs = [], []
    for number, log in enumerate(logs):
        if n_pieces := len(log) // length:
            others = np.concatenate([other for i, other in enumerate(logs) if i != number])
            scores = (log[: n_pieces * length] - others.mean()) / others.std()
            maxima.append(_largest_sums(scores.reshape(n_pieces, length), drift))
            runs += [number] * n_pieces
    if len(set(runs)) < conformal.fewest_units(per_run):
        return 0.0
    return float(np.nextafter(conformal.conformal_quantile(np.concatenate(maxima), per_run, np.array(runs)), np.inf))


def _bootstrapped_limit(
    scores: Sequence[np.ndarray], memory: float, drift: float, length: int, per_run: float
) -> float:
    """Sum that a share `per_run` of runs of this length reaches, for runs made from blocks of the reference runs."""
    rng = np.random.default_rng(0)
    n_steps = sum(map(len, scores))
    simulated_length = min(length, _MOST_READINGS // _SERIES)
    block = math.ceil(_BLOCK * memory)
    maxima = []
    for _ in range(_SERIES // 50):
        drawn = extremes.block_bootstrap(scores, simulated_length, 50, block, rng)
        # The mean of the reference has a standard error of sqrt(memory/n), which shifts every reading of a run.
        error = rng.normal(0, math.sqrt(memory / n_steps), (50, 1))
        maxima.append(_largest_sums(drawn + error, drift))
    # Longer runs than the simulated ones have proportionally more chances: P(no alarm) is a power of the length.
    limit = np.quantile(np.concatenate(maxima), (1 - per_run) ** (simulated_length / length), method="higher")
    # Sums at or above h are alarms, but a sum at the quantile must not be one.
    return float(np.nextafter(limit, np.inf))
