"""The contents of each section of a report's page: the values for its template, and the pictures."""

import json
import platform
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import numpy as np
from ase.data import chemical_symbols

from ase_uq.diagnostics.assessment import Assessment
from ase_uq.diagnostics.evaluate import assess
from ase_uq.diagnostics.latent import LatentMap
from ase_uq.report import plots
from ase_uq.report.along import Along
from ase_uq.report.pictures import Album, Picture
from ase_uq.report.quality import quality
from ase_uq.report.survey import ScoredFrame, Survey
from ase_uq.report.viewer import cut_out, drawing
from ase_uq.report.words import counted, number, quantile, told
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.model import UncertaintyModel

N_WORST = 6


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
        tolerance: Force errors above it are wrong, eV/Å.
        album: The pictures, which `values` adds.
    """

    found: Survey
    model: UncertaintyModel
    flag: float | None
    halt: float | None
    reduction: Reduction
    sources: dict[str, str]
    tolerance: float
    album: Album = field(default_factory=Album)

    def values(self, plane: LatentMap | None) -> dict[str, Any]:
        """The values of `page.html.j2`, without style and scripts. Pictures are drawn in the order of the page."""
        survey = self.found
        along = Along(survey, self.flag, self.halt, self.reduction)
        worst = survey.worst(N_WORST)
        top = max((float(f.uncertainty[np.isfinite(f.uncertainty)].max(initial=0)) for f in worst), default=0) or 1.0
        return {
            "subject": self._subject(),
            "n_frames": survey.n_frames,
            "bands": self._legend(),
            "facts": self._facts(),
            "left_out": {
                "Frames without uncertainties, left out": survey.n_without,
                "Frames whose uncertainty is not a number": int(np.isnan(survey.reading).sum()),
            },
            "along": along.pictures(self.album),
            "flagged": along.flagged(),
            "quality": quality(survey, self._bands(), self.tolerance, self.album) if survey.samples else None,
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
            ("median uncertainty", f"{number(quantile(survey.reading, 0.5))} eV/Å", "of a frame"),
        ]
        if np.isfinite(survey.gamma).any():
            share = survey.n_beyond / survey.n_frames
            facts.append(("beyond calibration data", f"{share:.0%}", f"{counted(survey.n_beyond, 'frame')} with γ > 1"))
        if "forces" in survey.samples:
            sample = survey.samples["forces"]
            rmse, z = np.sqrt(np.mean(sample.residuals**2)), np.mean((sample.residuals / sample.std) ** 2)
            facts.append(("force RMSE", f"{number(rmse)} eV/Å", f"mean z² {z:.2f}, 1 if calibrated"))
        return facts

    def _bands(self) -> dict[str, np.ndarray]:
        """(n_frames,) whether each frame is in a band between thresholds, by name; none without thresholds."""
        levels = self._levels()
        if not levels:
            return {}
        everywhere = np.full(self.found.n_frames, True)
        edges = pairwise([everywhere, *(self.found.above(level) for level in levels.values()), ~everywhere])
        return {name: among & ~beyond for name, (among, beyond) in zip(["trusted", *levels], edges, strict=True)}

    def _levels(self) -> dict[str, float]:
        """The threshold at which each band but the first begins, by the name of the band."""
        return {name: level for name, level in (("candidate", self.flag), ("failed", self.halt)) if level is not None}

    def _legend(self) -> list[dict[str, Any]]:
        """Name, criterion and number of frames of each band."""
        levels = self._levels()
        says = {"trusted": f"below {number(min(levels.values(), default=np.nan))} eV/Å"}
        says |= {name: f"from {number(level)} eV/Å" for name, level in levels.items()}
        return [{"name": name, "says": says[name], "count": int(among.sum())} for name, among in self._bands().items()]

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
            cells = [f"{among.sum():,}", *(number(quantile(values, q)) for q in (0.5, 0.99, 1))]
            cells += [f"{np.mean(gamma > 1):.1%}"] if with_gamma else []
            cells += _scores(scored, name) if scored else []
            rows[name] = cells
        return {"heads": heads, "rows": list(rows.items()), "judged": bool(scored)}

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
        return self.album.add("latent_map", ax, alt, caption)

    def _card(self, frame: ScoredFrame, top: float) -> dict[str, Any]:
        atoms, indices = cut_out(frame)
        ax = plots.structure(atoms, frame.uncertainty[indices], largest=top)
        atom = frame.worst_atom
        named = f"{frame.atoms[atom].symbol} {atom} at {number(frame.uncertainty[atom])} eV/Å"
        formula = frame.atoms.get_chemical_formula()
        alt = f"Frame {frame.place}, {formula}; most uncertain is {named}."
        return {
            "picture": self.album.add(f"frame_{frame.place}", ax, alt),
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
            "flag": told(self.flag),
            "halt": told(self.halt),
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


def _scores(assessment: Assessment, element: str) -> list[str]:
    """Scores of an element as cells of the table."""
    values = {score.metric: score.value for score in assessment.select(element=element)}
    forms = {"rmse": "{:.3g}", "mean_squared_z": "{:.2f}", "coverage_68": "{:.0%}", "coverage_95": "{:.0%}"}
    forms["spearman"] = "{:.2f}"
    return ["–" if np.isnan(values.get(m, np.nan)) else form.format(values[m]) for m, form in forms.items()]


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
