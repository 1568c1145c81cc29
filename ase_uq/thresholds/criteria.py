"""Criteria for thresholds, which calibration data and reference runs turn into a number in eV/Å.

A criterion states what the threshold is to achieve: a given share of frames below it (`Quantile`), at most a given
share of dangerous frames missed (`MissRate`, `ErrorBound`), or at most a given share of runs disturbed for nothing
(`FalseAlarms`). If there are too few data for a criterion, it is refused with the number that it needs.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from numbers import Integral, Real

import numpy as np

from ase_uq.thresholds import conformal, extremes
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData
from ase_uq.thresholds.resolved import ResolvedThreshold

# Extrapolation goes up to one alarm in this many times the readings of the reference runs; beyond, it is a guess.
_FARTHEST = 100.0
_FEWEST_PEAKS = 30
_TAIL = 0.98
_UNTRUSTED = 0.2  # share of reference readings beyond the calibration data from which on a promise says so


class Criterion(ABC):
    """Base of the criteria; subclasses are frozen dataclasses with a readable `__str__`."""

    @abstractmethod
    def resolve(self, threshold_data: ThresholdData) -> ResolvedThreshold:
        """The threshold that meets this criterion.

        Raises:
            ValueError: The data cannot support the criterion.
        """


@dataclass(frozen=True)
class Quantile(Criterion):
    """The reading that a fraction `q` of the calibration frames stay below.

    Args:
        q: Fraction in (0, 1), for example 0.99.

    Raises:
        ValueError: `q` is outside (0, 1).
    """

    q: float

    def __post_init__(self) -> None:
        if not isinstance(self.q, Real) or not 0 < self.q < 1:
            raise ValueError(f"a quantile lies between 0 and 1, not at {self.q!r}.")

    def __str__(self) -> str:
        return f"Quantile({self.q:g})"

    @property
    def needed(self) -> int:
        """Smallest number of calibration frames that determines this quantile: one of them lies above it."""
        return int(np.ceil(1 / (1 - self.q) - 1e-9))

    def resolve(self, threshold_data: ThresholdData) -> ResolvedThreshold:
        """The threshold in eV/Å.

        Raises:
            ValueError: There are fewer than 1/(1 - q) frames, too few to determine this quantile.
        """
        readings = threshold_data.finite.readings
        if len(readings) < self.needed:
            raise ValueError(
                f"Quantile({self.q}) needs at least {self.needed} calibration frames, but the uncertainty model has "
                f"{len(readings)}. Calibrate on more frames or ask for a lower quantile."
            )
        # Binomial ranks around q: where the quantile of the population could lie if the frames were independent.
        low, high = np.quantile(readings, np.clip(_binomial_spread(self.q, threshold_data.finite.n_units), 0, 1))
        return ResolvedThreshold(
            float(np.quantile(readings, self.q)),
            criterion=self,
            promise=f"{self.q:.4g} of frames like the calibration frames stay below it",
            n_units=len(readings),
            needed=self.needed,
            band=(float(low), float(high)),
        )


@dataclass(frozen=True)
class ErrorBound(Criterion):
    """Flags every frame whose error bound reaches a tolerance: split conformal.

    With q̂ the conformal quantile of error/reading over the calibration units, the largest force error of a
    frame stays below q̂·reading with the given confidence; the threshold is `error`/q̂. Then at most
    1 - `confidence` of all frames are both unflagged and worse than `error`. The calibration needs no frames that bad.

    Source: Vovk et al. 2005; blocks of frames as in Lee, Barber and Willett (2023).

    Args:
        error: Tolerated largest force error of an atom, eV/Å.
        confidence: Confidence in (0, 1).

    Raises:
        ValueError: `error` is not positive, or `confidence` is outside (0, 1).
    """

    error: float
    confidence: float = 0.95

    def __post_init__(self) -> None:
        _check_error(self.error)
        _check_share("confidence", self.confidence)

    def __str__(self) -> str:
        return f"ErrorBound({self.error:g}, confidence={self.confidence:g})"

    def resolve(self, threshold_data: ThresholdData) -> ResolvedThreshold:
        """The threshold in eV/Å.

        Raises:
            ValueError: There are fewer than 1/(1 - confidence) - 1 independent units.
        """
        finite = threshold_data.finite
        alpha = 1 - self.confidence
        needed = conformal.fewest_units(alpha)
        if finite.n_units < needed:
            raise ValueError(
                f"{self} needs at least {needed} independent calibration units, but the uncertainty model "
                f"has {_units(finite)}. Calibrate on more frames, or ask for less confidence."
            )
        # The floor only avoids a division by 0. If low readings were raised to a quantile of all readings, the share of
        # frames below that quantile could be unflagged and still worse than the tolerance.
        scores = finite.errors / np.maximum(finite.readings, np.finfo(np.float32).tiny)
        bound = conformal.conformal_quantile(scores, alpha, finite.groups)
        return ResolvedThreshold(
            self.error / bound if bound > 0 else np.inf,
            criterion=self,
            promise=f"at most {alpha:.4g} of frames are below it and worse than {self.error:g} eV/Å (errors stay "
            f"below {bound:.3g} times the reading)",
            n_units=finite.n_units,
            needed=needed,
        )


@dataclass(frozen=True)
class MissRate(Criterion):
    """Misses at most a given share of the frames with an error above a tolerance: recall-controlled.

    The threshold lies below all but a few of the readings of such bad frames, so the data must contain some:
    make them with `ase-uq perturb-frames`, label them with your reference and give them to `fit` as `perturbed`. The
    promise holds for bad frames like those.

    Without `confidence` the promise holds on average over calibration sets, k/(n_bad + 1) ≤ `at_most`; with it, the
    promise holds for this calibration set with that probability (the exact binomial, or PAC, form).

    Args:
        error: Tolerated largest force error of an atom, eV/Å.
        at_most: Share of the frames above it that may be missed, in (0, 1).
        confidence: Probability in (0, 1) that the promise is kept; None for a promise on average.

    Raises:
        ValueError: `error` is not positive, or a share is outside (0, 1).
    """

    error: float
    at_most: float = 0.1
    confidence: float | None = None

    def __post_init__(self) -> None:
        _check_error(self.error)
        _check_share("at_most", self.at_most)
        if self.confidence is not None:
            _check_share("confidence", self.confidence)

    def __str__(self) -> str:
        sure = "" if self.confidence is None else f", confidence={self.confidence:g}"
        return f"MissRate(error={self.error:g}, at_most={self.at_most:g}{sure})"

    @property
    def needed(self) -> int:
        """Smallest number of bad units."""
        if self.confidence is None:
            return conformal.fewest_units(self.at_most)
        return conformal.fewest_units_pac(self.at_most, 1 - self.confidence)

    def resolve(self, threshold_data: ThresholdData) -> ResolvedThreshold:
        """The threshold in eV/Å.

        Raises:
            ValueError: Too few calibration and perturbed frames are that bad.
        """
        bad = threshold_data.worse_than(self.error)
        if bad.n_units < self.needed:
            raise ValueError(
                f"{self} needs at least {self.needed} independent units with an error above {self.error:g} eV/Å, but "
                f"the uncertainty model has {bad.n_units} (among {_units(threshold_data.finite)}"
                f"{_and_perturbed(threshold_data)}). Make "
                "bad frames with `ase-uq perturb-frames`, label them with the reference and give them to fit as "
                "perturbed; or ask for a smaller error or a larger share."
            )
        if self.confidence is None:
            value = conformal.recall_threshold(bad.readings, self.at_most, bad.groups)
            how = "on average over calibration sets"
        else:
            value = conformal.recall_threshold_pac(bad.readings, self.at_most, 1 - self.confidence, bad.groups)
            how = f"with confidence {self.confidence:g}"
        return ResolvedThreshold(
            value,
            criterion=self,
            promise=f"at most {self.at_most:.4g} of frames worse than {self.error:g} eV/Å are missed, {how}",
            n_units=bad.n_units,
            needed=self.needed,
        )


@dataclass(frozen=True)
class FalseAlarms(Criterion):
    """At most a given share of runs is disturbed although nothing is wrong.

    Alarms are counted on reference runs, in which the potential is trusted. If there are enough of them and they are
    long enough, the threshold is a conformal quantile of the maxima of runs of this length. Else a generalised Pareto
    tail is fitted to the peaks of declustered readings, P(alarm) = 1 - exp(-n·λ·(1 + ξ(τ - u)/σ)^(-1/ξ)) with λ
    clusters per reading, so that neighbouring steps are not counted as if they were independent.

    Source: Coles, An Introduction to Statistical Modeling of Extreme Values, 2001, chapters 4 and 5.

    Args:
        per_run: Share of runs with an alarm, in (0, 1).
        steps: Length of a run as a number of readings; give this or `ps`.
        ps: Length of a run, ps.

    Raises:
        ValueError: `per_run` is outside (0, 1), or not exactly one length is given, or it is not positive.
    """

    per_run: float = 0.05
    steps: int | None = None
    ps: float | None = None

    def __post_init__(self) -> None:
        _check_share("per_run", self.per_run)
        if (self.steps is None) == (self.ps is None):
            raise ValueError(
                f"FalseAlarms counts runs of one length: give steps or ps, not {self.steps} and {self.ps}."
            )
        length = self.ps if self.steps is None else self.steps
        if not isinstance(length, Real) or not 0 < length < np.inf:
            raise ValueError(f"the length of a run must be positive, not {length!r}.")
        if self.steps is not None and not isinstance(self.steps, Integral):
            raise ValueError(f"steps must be a whole number of readings, not {self.steps!r}. Give a time as ps.")

    def __str__(self) -> str:
        length = f"ps={self.ps:g}" if self.steps is None else f"steps={self.steps}"
        return f"FalseAlarms(per_run={self.per_run:g}, {length})"

    def n_readings(self, runs: ReferenceRuns) -> int:
        """Number of readings in a run of the given length."""
        if self.steps is not None:
            return int(self.steps)
        assert self.ps is not None
        if 1000 * self.ps < runs.interval:
            raise ValueError(
                f"{self} is shorter than the {runs.interval:g} fs between two readings of the reference runs. Give a "
                "longer run."
            )
        return round(1000 * self.ps / runs.interval)

    def resolve(self, threshold_data: ThresholdData) -> ResolvedThreshold:
        """The threshold in eV/Å.

        Raises:
            ValueError: There are no reference runs, or they are too few or too short.
        """
        runs = threshold_data.require_runs(self)
        length = self.n_readings(runs)
        promise = f"at most {self.per_run:.4g} of runs of {length} readings like the reference have an alarm"
        if (share := threshold_data.share_beyond(runs)) > _UNTRUSTED:
            promise += f", {share:.0%} of whose readings are above the 99 % quantile of the calibration frames"
        needed = conformal.fewest_units(self.per_run)
        maxima, groups = extremes.run_maxima(runs.readings, length)
        if len(np.unique(groups)) >= needed:
            return ResolvedThreshold(
                # A reading at the threshold is an alarm, but a reading at the quantile must not be one.
                np.nextafter(conformal.conformal_quantile(maxima, self.per_run, groups), np.inf),
                criterion=self,
                promise=promise,
                n_units=len(np.unique(groups)),
                needed=needed,
            )
        return self._from_tail(runs, length, promise, needed)

    def _from_tail(self, runs: ReferenceRuns, length: int, promise: str, needed: int) -> ResolvedThreshold:
        way_out = (
            f"Make more reference runs: {needed} of {length} readings each give a guarantee without any extrapolation."
        )
        longest = -length / np.log1p(-self.per_run)  # readings to one alarm
        if longest > _FARTHEST * runs.n_steps:
            raise ValueError(
                f"{self} asks for one alarm in {longest:.3g} readings, but the reference runs have {runs.n_steps}; "
                f"extrapolation takes at least {longest / _FARTHEST:.0f}. {way_out}"
            )
        tail = extremes.fit_tail(runs.readings, _TAIL)
        if tail.n_peaks < _FEWEST_PEAKS:
            raise ValueError(
                f"{self} needs at least {_FEWEST_PEAKS} independent excursions above the {_TAIL:.0%} quantile of the "
                f"reference runs, but there are {tail.n_peaks}. {way_out}"
            )
        return ResolvedThreshold(
            tail.return_level(self.per_run, length),
            criterion=self,
            promise=f"{promise} (extrapolated from the tail)",
            n_units=tail.n_peaks,
            needed=_FEWEST_PEAKS,
            band=extremes.tail_band(runs.readings, self.per_run, length, quantile=_TAIL, confidence=0.9),
        )


@dataclass(frozen=True)
class PerElement:
    """A separate threshold for each element (Mondrian): the promise of the criterion then holds for every element.

    Atoms of an element are compared with the threshold of that element, which is made from the readings and errors of
    these atoms alone. An element with too few data gets the threshold of all atoms together.

    Args:
        criterion: What the threshold of each element is to achieve.

    Raises:
        TypeError: `criterion` is not a criterion, or needs reference runs, whose readings cover all atoms.
    """

    criterion: Criterion

    def __post_init__(self) -> None:
        if not isinstance(self.criterion, Criterion) or isinstance(self.criterion, FalseAlarms):
            raise TypeError(
                f"PerElement takes a criterion that calibration frames can resolve (Quantile, ErrorBound or MissRate), "
                f"not {self.criterion!r}."
            )

    def __str__(self) -> str:
        return f"PerElement({self.criterion})"


def _binomial_spread(q: float, n: int) -> tuple[float, float]:
    spread = 1.645 * np.sqrt(q * (1 - q) / max(n, 1))
    return q - spread, q + spread


def _units(threshold_data: ThresholdData) -> str:
    n_frames = len(threshold_data.readings)
    if threshold_data.n_units == n_frames:
        return f"{n_frames} units"
    return f"{n_frames} frames in {threshold_data.n_units} units, since neighbouring frames are alike"


def _and_perturbed(threshold_data: ThresholdData) -> str:
    return (
        ""
        if threshold_data.perturbed is None
        else f" and {_units(threshold_data.perturbed.finite)} that were perturbed"
    )


def _check_error(error: float) -> None:
    if not isinstance(error, Real) or not 0 < error < np.inf:
        raise ValueError(f"a tolerated force error must be a positive number in eV/Å, not {error!r}.")


def _check_share(name: str, value: float) -> None:
    if not isinstance(value, Real) or not 0 < value < 1:
        raise ValueError(f"{name} lies between 0 and 1, not at {value!r}.")
