"""The data that thresholds are made from: readings and errors of calibration frames, and reference runs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np

from ase_uq.display.representation import Brief
from ase_uq.thresholds import extremes
from ase_uq.thresholds.reduction import Reduction


@dataclass(frozen=True, repr=False)
class ReferenceRuns(Brief):
    """Readings of runs in which the potential is trusted; false alarms are counted on them. No labels are needed.

    Args:
        readings: One array per independent run, (n_readings,) eV/Å, in the order of the steps.
        interval: Time between two readings, fs.
        reduction: How the atoms of a frame became a reading.
        conditions: What was run, in words, such as `"malonaldehyde, Langevin 300 K"`.

    Raises:
        ValueError: There is no run, a run is empty, a reading is not finite and positive, or the interval is not
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
            raise ValueError(f"the interval of reference runs must be a positive time in fs, not {self.interval!r}.")
        for number, run in enumerate(self.readings):
            if np.ndim(run) != 1 or not len(run):
                raise ValueError(f"reference run {number} has readings of shape {np.shape(run)}, not (n_readings,).")
            if not (np.isfinite(run).all() and np.all(np.asarray(run) > 0)):
                raise ValueError(
                    f"reference run {number} has readings that are not finite and positive. A reference run must be "
                    "one that went well: leave this one out."
                )

    @property
    def n_steps(self) -> int:
        """Number of readings of all runs together."""
        return sum(map(len, self.readings))


@dataclass(frozen=True, eq=False, repr=False)
class ThresholdData(Brief):
    """The data that a threshold is made from.

    Args:
        readings: (n_frames,) readings of the calibration frames, eV/Å.
        errors: (n_frames,) largest ‖F_ref - F‖ among the atoms that are looked at, eV/Å.
        groups: (n_frames,) exchangeable unit of each frame: frames of one block of a trajectory have the same number.
        reduction: How the atoms of a frame became a reading.
        runs: Reference runs, if there are any.
        perturbed: The data of the perturbed frames, if there are any.
    """

    readings: np.ndarray
    errors: np.ndarray
    groups: np.ndarray
    reduction: Reduction = field(default_factory=Reduction)
    runs: ReferenceRuns | None = None
    perturbed: "ThresholdData | None" = None

    @cached_property
    def finite(self) -> "ThresholdData":
        """The data of the frames with a finite reading; in the others, for example, no atom is looked at."""
        kept = np.isfinite(self.readings) & np.isfinite(self.errors)
        return replace(self, readings=self.readings[kept], errors=self.errors[kept], groups=self.groups[kept])

    def worse_than(self, error: float) -> "ThresholdData":
        """The data of the frames with a larger error, including perturbed frames."""
        frames = self.finite
        if frames.perturbed is not None:
            perturbed = frames.perturbed.finite
            groups = perturbed.groups + (frames.groups.max() + 1 if len(frames.groups) else 0)
            frames = replace(
                frames,
                readings=np.concatenate([frames.readings, perturbed.readings]),
                errors=np.concatenate([frames.errors, perturbed.errors]),
                groups=np.concatenate([frames.groups, groups]),
                perturbed=None,
            )
        bad = frames.errors > error
        return replace(frames, readings=frames.readings[bad], errors=frames.errors[bad], groups=frames.groups[bad])

    @property
    def n_units(self) -> int:
        """Number of independent units among the frames."""
        return len(np.unique(self.groups))

    def share_beyond(self, runs: ReferenceRuns) -> float:
        """Share of the readings of runs above the 99 % quantile of the calibration frames; 0 without such frames."""
        readings = self.finite.readings
        return float(np.mean(np.concatenate(runs.readings) > np.quantile(readings, 0.99))) if len(readings) else 0.0

    def require_runs(self, criterion: object) -> ReferenceRuns:
        """The reference runs.

        Raises:
            ValueError: There are none, or their readings were made with another reduction.
        """
        if self.runs is None:
            raise ValueError(
                f"{criterion} counts alarms in reference runs, but the uncertainty model has none. Make them with "
                "`ase-uq reference`, or with reference_runs(...) and UncertaintyModel.with_reference(...)."
            )
        if self.runs.reduction != self.reduction:
            raise ValueError(
                f"the reference runs were read with {self.runs.reduction}, but {criterion} is asked for with "
                f"{self.reduction}. Make reference runs with the same reduction."
            )
        return self.runs


def exchangeable_groups(series: Sequence[np.ndarray], segments: np.ndarray) -> np.ndarray:
    """The exchangeable unit of each frame: blocks of two correlation times where frames follow a trajectory.

    Args:
        series: Arrays of (n_frames,) quantities in the order of the frames; the one with the longest correlation time
            decides.
        segments: (n_frames,) number of the run that each frame comes from; blocks never reach across two runs.

    Returns:
        (n_frames,) number of the unit of each frame; each frame is a unit by itself if neighbours are not alike.
    """
    cuts = np.flatnonzero(np.diff(segments)) + 1
    slowest = max(extremes.correlation_time(np.split(values, cuts)) for values in series)
    length = max(1, int(np.ceil(2 * slowest - 1e-9))) if slowest > 0.5 else 1
    groups, first = np.empty(len(segments), int), 0
    for part in np.split(np.arange(len(segments)), cuts):
        blocks = (part - part[0]) // length if len(part) else part
        groups[part] = first + blocks
        first += int(blocks[-1]) + 1 if len(part) else 0
    return groups
