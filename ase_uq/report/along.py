"""Along the run: its uncertainty, extrapolation grade and temperature, and the frames that were flagged."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from ase_uq.report import plots
from ase_uq.report.axes import Axes, plt
from ase_uq.report.pictures import Album, Picture
from ase_uq.report.survey import Survey
from ase_uq.report.words import counted, number, quantile
from ase_uq.thresholds.reduction import Reduction

MOST_FLAGGED = 200  # rows of the list of flagged frames


@dataclass(frozen=True)
class Along:
    """What a page shows along the run.

    Args:
        found: Survey of the frames.
        flag: Threshold, eV/Å, or None.
        halt: Threshold, eV/Å, or None.
        reduction: How a frame becomes a reading.
    """

    found: Survey
    flag: float | None
    halt: float | None
    reduction: Reduction

    def pictures(self, album: Album) -> list[Picture]:
        """The uncertainty with the temperature, and γ, where frames have them."""
        pictures = [self._uncertainty(album)]
        if np.isfinite(self.found.gamma_of_frame).any():
            pictures.append(self._gamma(album))
        return pictures

    def flagged(self) -> dict[str, Any] | None:
        """Headings and rows of the list of flagged frames, in their order; None if none was flagged."""
        survey = self.found
        lowest = min((level for level in (self.flag, self.halt) if level is not None), default=np.inf)
        chosen = np.flatnonzero(survey.above(lowest) | np.array([bool(reason) for reason in survey.reason]))
        if not len(chosen):
            return None
        ranks = np.nan_to_num(survey.reading[chosen], nan=np.inf)
        shown = np.sort(chosen[np.argsort(-ranks, kind="stable")[:MOST_FLAGGED]])
        with_time = survey.time is not None
        rows = []
        for i in shown.tolist():
            time = [] if survey.time is None else [f"{survey.time[i]:,.6g}"]
            rows.append((str(survey.place[i]), [*time, number(float(survey.reading[i])), self._why(i)]))
        heads = ["frame", *(["time (fs)"] if with_time else []), "reading (eV/Å)", "reason"]
        return {"heads": heads, "rows": rows, "n_more": len(chosen) - len(shown)}

    def _why(self, index: int) -> str:
        """Why a frame counts as flagged: what a monitor noted, and the highest threshold that it reaches."""
        reading = self.found.reading[index]
        levels = {"halt": self.halt, "flag": self.flag}
        reached = next((f"at or above {n}" for n, level in levels.items() if level and not reading < level), "")
        if np.isnan(reading):
            reached = "the reading is not a number"
        return "; ".join(filter(None, (self.found.reason[index], reached)))

    def _uncertainty(self, album: Album) -> Picture:
        survey = self.found
        # On a linear axis, a run that begins well and ends in thousands of eV/Å would be a flat line and a spike.
        finite = survey.reading[np.isfinite(survey.reading) & (survey.reading > 0)]
        log = bool(len(finite) and finite.max() / np.median(finite) > 100)
        time, reading, temperature = self._with_gaps(survey.reading, survey.temperature)
        # A single temperature is no course of it.
        kelvin = temperature if np.isfinite(temperature).sum() > 1 else None

        def draw(ax: Axes) -> None:
            levels = {"flag": self.flag, "halt": self.halt}
            plots.run(time, reading, temperature=kelvin, log=log, x_label=self._label, ax=ax, **levels)

        n_flagged = int(survey.above(self.flag).sum()) if self.flag is not None else 0
        worst = survey.worst(1)[0]
        alt = (
            f"Line of the force uncertainty over {self._label}: median {number(quantile(survey.reading, 0.5))}, "
            f"largest {number(worst.reading)} eV/Å at frame {worst.place}; {counted(n_flagged, 'flagged frame')}."
        )
        caption = (
            f"The reading of a frame is the {self._reading()} of its atoms. The uncertainty ε of an atom is the norm "
            "of the standard deviations of the three components of its force."
        )
        if kelvin is not None:
            alt += f" The temperature is between {np.nanmin(kelvin):.0f} and {np.nanmax(kelvin):.0f} K."
            caption += " The temperature, at the right, is that of the velocities in the frames."
        return _in_two_sizes(album, "uncertainty", draw, (3.4, 3.2), alt, caption)

    def _gamma(self, album: Album) -> Picture:
        survey = self.found
        time, gamma = self._with_gaps(survey.gamma_of_frame)
        known = survey.gamma_of_frame[~np.isnan(survey.gamma_of_frame)]
        alt = (
            f"Line of the largest γ of each frame over {self._label}: median {number(quantile(known, 0.5))}, largest "
            f"{number(quantile(known, 1))}; {counted(survey.n_beyond, 'frame')} with γ above 1."
        )
        caption = "Above 1, an atom of the frame is beyond the calibration data, and its uncertainty is extrapolated."

        def draw(ax: Axes) -> None:
            plots.gamma_along(time, gamma, x_label=self._label, ax=ax)

        return _in_two_sizes(album, "gamma", draw, (2.4, 2.4), alt, caption)

    @property
    def _label(self) -> str:
        return "frame" if self.found.time is None else "time (fs)"

    def _reading(self) -> str:
        """The reduction in words."""
        kind = self.reduction.kind
        words = {"max": "largest uncertainty", "mean": "mean uncertainty", "top3": "mean of the three largest values"}
        return words.get(str(kind), f"{kind} quantile of the uncertainties")

    def _with_gaps(self, *courses: np.ndarray) -> Iterator[np.ndarray]:
        """Times and courses with NaN where frames are missing, so that no line is drawn across the gaps."""
        time = self.found.along
        steps = np.diff(time)
        after = np.flatnonzero(steps > 5 * np.median(steps)) + 1 if len(steps) else []
        yield np.insert(time, after, time[after])
        for course in courses:
            yield np.insert(course, after, np.nan)


def _in_two_sizes(
    album: Album, name: str, draw: Callable[[Axes], None], heights: tuple[float, float], alt: str, caption: str
) -> Picture:
    """A picture for a desktop and one for a phone, so that text stays legible."""
    axes = []
    for size in zip((8.6, 4.6), heights, strict=True):
        _, ax = plt.subplots(figsize=size, layout="constrained")
        draw(ax)
        axes.append(ax)
    return album.add(name, axes[0], alt, caption, small=axes[1])
