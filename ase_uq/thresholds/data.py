"""What thresholds are made of: readings and errors of calibration frames, and reference runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ase_uq.thresholds import extremes
from ase_uq.thresholds.reduction import Reduction


@dataclass(frozen=True)
class ReferenceRuns:
    """Readings of runs in which the potential is trusted: what false alarms are counted on. No labels are needed.

    Args:
        readings: One array a run, (n_readings,) eV/Å, of steps one after the other; independent runs.
        interval: Time between two readings, fs.
        reduction: How atoms became a reading.
        conditions: What was run, for people: `"malonaldehyde, Langevin 300 K"`.

    Raises:
        ValueError: No run, an empty one, a reading that is not finite and positive, or an interval that is not
            positive.
    """

    readings: tuple[np.ndarray, ...]
    interval: float
    reduction: Reduction = field(default_factory=Reduction)
    conditions: str = ""

    def __post_init__(self) -> None:
        if not self.readings:
            raise ValueError("there is no reference run: give the readings of at least one.")
        if not 0 < self.interval < np.inf:
            raise ValueError(f"the interval of reference runs is a positive time in fs, not {self.interval!r}.")
        for number, run in enumerate(self.readings):
            if np.ndim(run) != 1 or not len(run):
                raise ValueError(f"reference run {number} has readings of shape {np.shape(run)}, not (n_readings,).")
            if not (np.isfinite(run).all() and np.all(np.asarray(run) > 0)):
                raise ValueError(
                    f"reference run {number} has readings that are not finite and positive. A reference is a run "
                    "that went well: leave this one out."
                )

    @property
    def n_steps(self) -> int:
        """Readings of all runs."""
        return sum(map(len, self.readings))


@dataclass(frozen=True, eq=False)
class ThresholdData:
    """What a threshold is made of.

    Args:
        readings: (n_frames,) readings of the calibration frames, eV/Å.
        errors: (n_frames,) largest ‖F_ref - F‖ among the atoms that are looked at, eV/Å.
        groups: (n_frames,) exchangeable unit of each frame: frames of one block of a trajectory have the same number.
        reduction: How atoms became readings.
        runs: Reference runs, where there are any.
        perturbed: The same of deliberately bad frames, where there are any.
    """

    readings: np.ndarray
    errors: np.ndarray
    groups: np.ndarray
    reduction: Reduction = field(default_factory=Reduction)
    runs: ReferenceRuns | None = None
    perturbed: "ThresholdData | None" = None

    @cached_property
    def finite(self) -> "ThresholdData":
        """Only the frames with a finite reading, of at least one atom that is looked at."""
        kept = np.isfinite(self.readings) & np.isfinite(self.errors)
        return replace(self, readings=self.readings[kept], errors=self.errors[kept], groups=self.groups[kept])

    def worse_than(self, error: float) -> "ThresholdData":
        """The frames with a larger error, perturbed ones too."""
        found = self.finite
        if found.perturbed is not None:
            other = found.perturbed.finite
            groups = other.groups + (found.groups.max() + 1 if len(found.groups) else 0)
            found = replace(
                found,
                readings=np.concatenate([found.readings, other.readings]),
                errors=np.concatenate([found.errors, other.errors]),
                groups=np.concatenate([found.groups, groups]),
                perturbed=None,
            )
        bad = found.errors > error
        return replace(found, readings=found.readings[bad], errors=found.errors[bad], groups=found.groups[bad])

    @property
    def n_units(self) -> int:
        """Independent units among the frames."""
        return len(np.unique(self.groups))

    def require_runs(self, criterion: object) -> ReferenceRuns:
        """The reference runs.

        Raises:
            ValueError: There are none, or their readings were made otherwise.
        """
        if self.runs is None:
            raise ValueError(
                f"{criterion} counts alarms in reference runs, and the uncertainty model has none. Make them with "
                "`ase-uq reference`, or with reference_runs(...) and UncertaintyModel.with_reference(...)."
            )
        if self.runs.reduction != self.reduction:
            raise ValueError(
                f"the reference runs were read with {self.runs.reduction}, and {criterion} is asked for with "
                f"{self.reduction}. Make reference runs with the same reduction."
            )
        return self.runs


def exchangeable_groups(series: Sequence[np.ndarray], segments: np.ndarray) -> np.ndarray:
    """The exchangeable unit of each frame: blocks of two correlation times where frames follow a trajectory.

    Args:
        series: Arrays of (n_frames,) quantities in the order of the frames; the slowest decides.
        segments: (n_frames,) number of the run that a frame comes from; blocks never reach across two.

    Returns:
        (n_frames,) numbers of units; each frame is its own where neighbours are not alike.
    """
    cuts = np.flatnonzero(np.diff(segments)) + 1
    slowest = max(extremes.correlation_time(np.split(values, cuts)) for values in series)
    length = max(1, int(np.ceil(2 * slowest - 1e-9))) if slowest > 0.5 else 1
    groups, first = np.empty(len(segments), int), 0
    for part in np.split(np.arange(len(segments)), cuts):
        own = (part - part[0]) // length if len(part) else part
        groups[part] = first + own
        first += int(own[-1]) + 1 if len(part) else 0
    return groups
