"""The contents of each section of a report's page: the values for its template, and the pictures."""

import base64
import io
import json
import platform
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from ase_uq.diagnostics.assessment import Assessment
from ase_uq.diagnostics.evaluate import assess
from ase_uq.diagnostics.latent import LatentMap
from ase_uq.diagnostics.table import UNITS
from ase_uq.report import plots
from ase_uq.report.output import PICTURE_METADATA
from ase_uq.report.survey import ScoredFrame, Survey
from ase_uq.report.viewer import cut_out, drawing
from ase_uq.thresholds.criteria import ResolvedThreshold
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.model import UncertaintyModel

if TYPE_CHECKING:  # `plots` reports a missing matplotlib
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_WORST = 6


@dataclass(frozen=True)
class Picture:
    """A picture in the page.

    Args:
        alt: Description for readers who cannot see it.
        source: The PNG file as a data URI.
        caption: Text below it.
        small: The same picture with larger letters for narrow screens, as a data URI; may be empty.
    """

    alt: str
    source: str
    caption: str = ""
    small: str = ""


@dataclass
class Sections:
    """Everything a page is made from.

    Args:
        found: Survey of the frames.
        model: Uncertainty model that the frames were scored with.
        flag: Threshold, eV/Å, or None.
        halt: Threshold, eV/Å, or None.
        reduction: How a frame becomes a reading.
        sources: Further lines for the section "Where this comes from", by name.
        pictures: PNG files by name, which `values` adds.
    """

    found: Survey
    model: UncertaintyModel
    flag: float | None
    halt: float | None
    reduction: Reduction
    sources: dict[str, str]
    pictures: dict[str, bytes] = field(default_factory=dict)

    def values(self, plane: LatentMap | None) -> dict[str, Any]:
        """The values of `page.html.j2`, without style and scripts. Pictures are drawn in the order of the page."""
        survey = self.found
        worst = survey.worst(N_WORST)
        top = max((float(f.uncertainty[np.isfinite(f.uncertainty)].max(initial=0)) for f in worst), default=0) or 1.0
        return {
            "subject": self._subject(),
            "n_frames": survey.n_frames,
            "bands": self._bands(),
            "facts": self._facts(),
            "left_out": {
                "Frames without uncertainties, left out": survey.n_without,
                "Frames whose uncertainty is not a number": int(np.isnan(survey.reading).sum()),
            },
            "along": self._along(),
            "quality": self._quality() if survey.samples else None,
            "elements": self._elements(),
            "latent_map": None if plane is None else self._map(plane),
            "near": self._near(),
            "largest": top,
            "colours": plots.UNCERTAINTY_COLOURS,
            "cards": [self._card(frame, top) for frame in worst],
            "provenance": self._provenance(),
            "model_summary": self.model.summary(),
            "fitted_on": json.dumps(self.model.provenance, indent=2, ensure_ascii=False),
            "structures": [drawing(frame) for frame in worst],
            "colour_scale": [[i / 3, colour] for i, colour in enumerate(plots.UNCERTAINTY_COLOURS)],
            "version": version("ase-uq"),
        }

    def _subject(self) -> str:
        formulas = list(self.found.compositions)
        named = ", ".join(formulas[:3]) + (f" and {len(formulas) - 3} more compositions" if len(formulas) > 3 else "")
        return f"{counted(self.found.n_frames, 'frame')} of {named}"

    def _facts(self) -> list[tuple[str, str, str]]:
        """Name, value and note of each of the numbers at the top of the page."""
        survey = self.found
        worst = survey.worst(1)[0]
        facts = [
            ("frames", f"{survey.n_frames:,}", counted(len(survey.numbers), "atom")),
            ("largest uncertainty", f"{number(worst.reading)} eV/Å", f"frame {worst.place}"),
            ("median uncertainty", f"{number(_quantile(survey.reading, 0.5))} eV/Å", "of a frame"),
        ]
        if np.isfinite(survey.gamma).any():
            share = survey.n_beyond / survey.n_frames
            facts.append(("beyond calibration data", f"{share:.0%}", f"{counted(survey.n_beyond, 'frame')} with γ > 1"))
        if "forces" in survey.samples:
            sample = survey.samples["forces"]
            rmse, z = np.sqrt(np.mean(sample.residuals**2)), np.mean((sample.residuals / sample.std) ** 2)
            facts.append(("force RMSE", f"{number(rmse)} eV/Å", f"mean z² {z:.2f}, 1 if calibrated"))
        return facts

    def _bands(self) -> list[dict[str, Any]]:
        """Name, criterion and number of frames of each band between thresholds."""
        levels = {"candidate": self.flag, "failed": self.halt}
        levels = {name: level for name, level in levels.items() if level is not None}
        if not levels:
            return []
        says = [f"below {number(min(levels.values()))} eV/Å", *(f"from {number(x)} eV/Å" for x in levels.values())]
        above = [self.found.n_frames, *(int(self.found.above(level).sum()) for level in levels.values()), 0]
        return [
            {"name": name, "says": criterion, "count": more - fewer}
            for name, criterion, (more, fewer) in zip(["accurate", *levels], says, pairwise(above), strict=True)
        ]

    def _along(self) -> Picture:
        survey = self.found
        label = "frame" if survey.time is None else "time (fs)"
        time, reading = _with_gaps(survey.along, survey.reading)
        # On a linear axis, a run that begins well and ends in thousands of eV/Å would be a flat line and a spike.
        finite = survey.reading[np.isfinite(survey.reading) & (survey.reading > 0)]
        spread = finite.max() / np.median(finite) if len(finite) else 1
        axes = []
        for size in ((8.6, 3.4), (4.6, 3.2)):  # for a desktop and a phone, so that text stays legible
            _, ax = plots.plt.subplots(figsize=size, layout="constrained")
            plots.run(time, reading, flag=self.flag, halt=self.halt, log=spread > 100, x_label=label, ax=ax)
            axes.append(ax)
        n_flagged = int(survey.above(self.flag).sum()) if self.flag is not None else 0
        worst = survey.worst(1)[0]
        alt = (
            f"Line of the force uncertainty over {label}: median {number(_quantile(survey.reading, 0.5))}, largest "
            f"{number(worst.reading)} eV/Å at frame {worst.place}; {counted(n_flagged, 'flagged frame')}."
        )
        caption = (
            f"The reading of a frame is the {self._reading()} of its atoms. The uncertainty ε of an atom is the norm "
            "of the standard deviations of the three components of its force."
        )
        return self._picture("uncertainty", axes[0], alt, caption, small=axes[1])

    def _reading(self) -> str:
        """The reduction in words."""
        kind = self.reduction.kind
        words = {"max": "largest uncertainty", "mean": "mean uncertainty", "top3": "mean of the three largest values"}
        return words.get(str(kind), f"{kind} quantile of the uncertainties")

    def _quality(self) -> dict[str, Any]:
        names = {"forces": "forces", "energy_per_atom": "energy per atom"}
        sample = self.found.samples.get("forces", next(iter(self.found.samples.values())))
        quantity = next(name for name, other in self.found.samples.items() if other is sample)
        ax = None
        for name, each in self.found.samples.items():
            ax = plots.reliability(each.residuals, each.std, label=names[name], ax=ax)
        assert ax is not None
        pictures = [
            self._picture(
                "reliability",
                ax,
                "Share of reference values inside the central interval of each level, against that level: "
                + "; ".join(text.get_text() for text in _legend(ax)),
                "On the dashed line, uncertainties are as large as the errors. Below it, errors are larger than "
                "predicted.",
            )
        ]
        if (sample.errors > 0).any():
            ax = plots.error_against_uncertainty(
                sample.errors, sample.uncertainties, components=sample.residuals.shape[1], unit=UNITS[quantity]
            )
            pictures.append(
                self._picture(
                    "errors",
                    ax,
                    f"True errors of the {names[quantity]} against their uncertainties: {ax.texts[0].get_text()}",
                    "If calibrated, the red line lies on the black one, and 95 % of the points lie in the wide band.",
                )
            )
        return {"n_frames": len(np.unique(sample.frame)), "quantity": names[quantity], "pictures": pictures}

    def _elements(self) -> dict[str, Any]:
        """Headings and rows of the table by element; whether it also has errors."""
        survey = self.found
        scored = None
        if "forces" in survey.samples:
            sample = {("reported", "forces"): survey.samples["forces"]}
            scored = assess(sample, survey.n_frames, n_bootstrap=0, progress=False)
        heads = ["element", "atoms", "median ε", "99 % below", "largest ε"]
        with_gamma = bool(np.isfinite(survey.gamma).any() or np.isinf(survey.gamma).any())
        heads += ["γ > 1"] if with_gamma else []
        heads += ["force RMSE", "mean z²", "in 68 %", "in 95 %", "Spearman"] if scored else []
        rows = {}
        everything = np.full(len(survey.numbers), True)
        for name, among in [("all", everything)] + [
            (chemical_symbols[z], survey.numbers == z) for z in np.unique(survey.numbers)
        ]:
            values, gamma = survey.uncertainty[among], survey.gamma[among]
            cells = [f"{among.sum():,}", *(number(_quantile(values, q)) for q in (0.5, 0.99, 1))]
            cells += [f"{np.mean(gamma > 1):.1%}"] if with_gamma else []
            cells += _scores(scored, name) if scored else []
            rows[name] = cells
        return {"heads": heads, "rows": rows, "judged": bool(scored)}

    def _map(self, plane: LatentMap) -> Picture:
        coordinates = dict(plane.coordinates)
        points = coordinates.pop("scored")
        readings = [frame.reading for frame in self.found.kept if frame.is_finite]
        ax = plots.latent_map(coordinates, points, readings, explained=plane.explained)
        length = self.found.stretch
        each = f"; of every {length} frames, only the most uncertain is shown" if length > 1 else ""
        caption = (
            "Features of the potential, averaged over the atoms of a frame, along the two directions in which the "
            f"frames differ most{each}. Frames far from the known ones are new to the model. Frames near them may be "
            "new as well, since the plane shows only two of many directions."
        )
        known = " and ".join(f"{len(c)} {name}" for name, c in coordinates.items()) or "no known"
        alt = f"Principal components of {counted(len(points), 'scored frame')} among {known} frames."
        n_nowhere = len(self.found.kept) - len(points)
        if n_nowhere:
            caption += f" {counted(n_nowhere, 'frame')} with positions that are not finite cannot be on the map."
        return self._picture("latent_map", ax, alt, caption)

    def _card(self, frame: ScoredFrame, top: float) -> dict[str, Any]:
        atoms, indices = cut_out(frame)
        ax = plots.structure(atoms, frame.uncertainty[indices], largest=top)
        atom = frame.worst_atom
        named = f"{frame.atoms[atom].symbol} {atom} at {number(frame.uncertainty[atom])} eV/Å"
        formula = frame.atoms.get_chemical_formula()
        alt = f"Frame {frame.place}, {formula}; most uncertain is {named}."
        return {
            "picture": self._picture(f"frame_{frame.place}", ax, alt),
            "turns": len(indices) > 0,
            "place": frame.place,
            "time": "" if np.isnan(frame.time) else f" at {frame.time:,.6g} fs",
            "formula": formula,
            "named": named,
            "not_drawn": _not_drawn(frame, len(indices)),
            "reason": str(frame.atoms.info.get("flag_reason") or ""),
        }

    def _near(self) -> str:
        """Distance within which frames near a worse one are left out, in words; empty if none are."""
        gap = self.found.gap
        if self.found.time is None:
            return counted(int(gap), "frame") if gap >= 1 else ""
        return f"{gap:,.6g} fs" if gap > 0 else ""

    def _provenance(self) -> dict[str, str]:
        model = self.model
        return {
            **self.sources,
            "frames are numbered": self._numbering(),
            "flag": _told(self.flag),
            "halt": _told(self.halt),
            "potential": f"{model.identity.settings['package']}, fingerprint {model.identity.fingerprint}",
            "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by ase_uq {version('ase-uq')}, ASE "
            f"{version('ase')}, torch {version('torch')}, Python {platform.python_version()}",
        }

    def _numbering(self) -> str:
        survey = self.found
        text = "as in the trajectory that was scored" if survey.counts_source else "as in the frames of this report"
        text += ", from 0"
        if survey.n_missing:
            upto, are = int(survey.place.max()) + 1, "is" if survey.n_missing == 1 else "are"
            text += f"; {survey.n_missing:,} of the first {counted(upto, 'frame')} {are} not here"
        return text

    def _picture(self, name: str, ax: "Axes", alt: str, caption: str = "", *, small: "Axes | None" = None) -> Picture:
        """Adds a picture to the files, and returns it for the page."""
        buffer = io.BytesIO()
        _figure_of(ax).savefig(buffer, format="png", dpi=200, metadata=PICTURE_METADATA)
        self.pictures[f"{name}.png"] = buffer.getvalue()
        return Picture(alt, _data_uri(ax), caption, "" if small is None else _data_uri(small))


def _with_gaps(time: np.ndarray, reading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Times and readings with NaN where frames are missing, so that no line is drawn across the gaps."""
    steps = np.diff(time)
    after = np.flatnonzero(steps > 5 * np.median(steps)) + 1 if len(steps) else []
    return np.insert(time, after, time[after]), np.insert(reading, after, np.nan)


def _figure_of(ax: "Axes") -> "Figure":
    figure = ax.get_figure(root=True)
    assert figure is not None
    return figure


def _data_uri(ax: "Axes") -> str:
    """The figure as a transparent PNG; the figure is closed."""
    buffer = io.BytesIO()
    _figure_of(ax).savefig(buffer, dpi=150, transparent=True)
    plots.plt.close(_figure_of(ax))
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _scores(assessment: Assessment, element: str) -> list[str]:
    """Scores of an element as cells of the table."""
    values = {score.metric: score.value for score in assessment.select(element=element)}
    forms = {"rmse": "{:.3g}", "mean_squared_z": "{:.2f}", "coverage_68": "{:.0%}", "coverage_95": "{:.0%}"}
    forms["spearman"] = "{:.2f}"
    return ["–" if np.isnan(values.get(m, np.nan)) else form.format(values[m]) for m, form in forms.items()]


def _legend(ax: "Axes") -> list:
    legend = ax.get_legend()
    return [] if legend is None else legend.get_texts()


def _not_drawn(frame: ScoredFrame, n_drawn: int) -> str:
    """Which parts of a frame the picture does not show, in words."""
    n_finite = int(np.isfinite(frame.atoms.positions).all(1).sum())
    text = ""
    if n_drawn < n_finite:
        text += f" The {n_drawn:,} atoms around it are shown."
    n_nowhere = len(frame.atoms) - n_finite
    if n_nowhere:
        text += f" The positions of {counted(n_nowhere, 'atom')} are not finite: not drawn."
    if not np.isfinite(frame.atoms.cell.array).all():
        text += " Its cell is not finite: not drawn."
    return text


def counted(n: int, noun: str) -> str:
    """A number and a noun with a regular plural, such as "3 frames"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _told(level: float | None) -> str:
    """A threshold in words; empty if there is none."""
    if level is None:
        return ""
    return level.describe() if isinstance(level, ResolvedThreshold) else f"{level:g} eV/Å"


def number(value: float) -> str:
    """A value with three significant digits; "undefined" for NaN."""
    return "undefined" if np.isnan(value) else f"{value:.3g}"


def _quantile(values: np.ndarray, q: float) -> float:
    """Quantile of uncertainties; NaN counts as larger than all numbers."""
    known = np.nan_to_num(values, nan=np.inf, posinf=np.inf)
    # With an infinite value numpy's interpolation would give NaN, so the next higher value is taken.
    return float(np.quantile(known, q, method="linear" if np.isfinite(known).all() else "higher"))
