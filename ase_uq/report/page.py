"""One page for people: how uncertain a potential was along scored frames, where, and whether that can be believed.

The page is one file that asks nothing of a network: pictures, data and the script that turns structures are inside,
and its content security policy has browsers refuse anything else.
"""

import base64
import hashlib
import io
import json
import os
import platform
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from html import escape
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_uq.backends.base import Backend
from ase_uq.diagnostics.evaluate import Assessment, assess
from ase_uq.diagnostics.latent import LatentMap, evenly, frame_features, principal_plane
from ase_uq.diagnostics.table import UNITS
from ase_uq.dynamics.policy import check_order
from ase_uq.io.frames import Frames, read_frames
from ase_uq.report import plots
from ase_uq.report.output import PICTURE_METADATA, check_outputs, publish
from ase_uq.report.survey import ScoredFrame, Survey, survey
from ase_uq.report.viewer import cut_out, drawing, packed, plotly_script
from ase_uq.thresholds.criteria import Criterion
from ase_uq.thresholds.reduction import Reduction
from ase_uq.thresholds.resolved import ResolvedThreshold
from ase_uq.uncertainty_model.model import UncertaintyModel

if TYPE_CHECKING:  # whether matplotlib is installed, `plots` tells
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

N_WORST = 6
_MOST_REFERENCE = 500  # training and calibration frames in the latent map, each


@dataclass(frozen=True)
class Report:
    """What was written.

    Args:
        page: The HTML file.
        pictures: PNG files.
        survey: What the frames say.
        flag: eV/Å, or None.
        halt: Likewise.
    """

    page: Path
    pictures: tuple[Path, ...]
    survey: Survey
    flag: float | None
    halt: float | None

    def summary(self) -> str:
        """One line for people."""
        found = self.survey
        text = f"{_count(found.n_frames, 'frame')}, {_count(len(found.numbers), 'atom')}"
        for name, level in (("flag", self.flag), ("halt", self.halt)):
            if level is not None:
                text += f", {int(found.above(level).sum())} at or above {name}"
        if found.n_without:
            text += f"; {found.n_without} without uncertainties left out"
        pictures = _count(len(self.pictures), "picture")
        return f"{text}. Page written to {self.page}, {pictures} to {self.pictures[0].parent}"


def write_report(
    path: str | os.PathLike[str],
    frames: Frames | Iterable[Atoms],
    uncertainty_model: UncertaintyModel,
    *,
    flag: float | Criterion | None = None,
    halt: float | Criterion | None = None,
    reduction: Reduction | None = None,
    label_keys: tuple[str, str, str] | None = None,
    backend: Backend | None = None,
    train: Frames | None = None,
    calibration: Frames | None = None,
    pictures: str | os.PathLike[str] | None = None,
    sources: Mapping[str, str] | None = None,
    batch_atoms: int = 1000,
) -> Report:
    """Writes a page about scored frames, and its pictures as PNG files.

    Args:
        path: HTML file; replaced if it exists.
        frames: Scored frames, in a file or one by one; read once. Those of a file that cannot be read, and labels and
            notes that cannot be used, are left out with a warning.
        uncertainty_model: What they were scored with.
        flag: Threshold, eV/Å, or a criterion such as `Quantile(0.99)`.
        halt: Likewise.
        reduction: How a frame becomes a reading; the largest ε_i by default.
        label_keys: Names of energy, forces and stress of the reference; `REF_energy`, `REF_forces`, `REF_stress` by
            default.
        backend: The potential, for the latent map; without it there is none.
        train: Training frames, for the latent map.
        calibration: Calibration frames, likewise.
        pictures: Folder of the PNG files, made if it is missing; by default `<path>_figures`. The pictures of an
            earlier report in it are replaced, other files are left alone.
        sources: What to say about where things come from, by name; for example the files.
        batch_atoms: Most atoms evaluated together, for the latent map.

    Raises:
        InputError: No frame has uncertainties, those of one have another shape, or the potential cannot evaluate one.
        LabelError: The labels are the potential's own; training or calibration frames that cannot be read.
        ArtefactError: Something cannot be written; what was there before stands.
        FileExistsError: The folder of the pictures is a file, or holds a file of somebody else's that a picture would
            overwrite.
        ValueError: Flag is not below halt, calibration data cannot support a criterion, or frames of the latent map
            were given without the potential.
    """
    path = Path(path)
    folder = path.with_name(f"{path.stem}_figures") if pictures is None else Path(pictures)
    if backend is None and not (train is None and calibration is None):
        raise ValueError(
            "training and calibration frames are for the latent map, which needs the potential: give the backend too."
        )
    check_outputs(path, folder)
    reduction = reduction or Reduction()
    flag, halt = _levels(uncertainty_model, flag, halt, reduction)
    found = survey(frames, reduction=reduction, label_keys=label_keys)
    plane = None
    if backend is not None:
        plane = _plane(backend, found, {"training": train, "calibration": calibration}, batch_atoms)
    page = _Page(found, uncertainty_model, flag, halt, reduction, dict(sources or {}))
    text = page.text(plane)
    return Report(path, publish(path, text, folder, page.pictures), found, flag, halt)


def _levels(
    model: UncertaintyModel, flag: float | Criterion | None, halt: float | Criterion | None, reduction: Reduction
) -> tuple[float | None, float | None]:
    known = [None if level is None else model.threshold(level, reduction) for level in (flag, halt)]
    for name, level in zip(("flag", "halt"), known, strict=True):
        if level is not None and not level > 0:
            raise ValueError(f"{name} is {level:g} eV/Å; a positive force uncertainty was expected.")
    flag, halt = known
    if flag is not None and halt is not None:
        check_order(flag, halt)
    return flag, halt


def _plane(backend: Backend, found: Survey, known: Mapping[str, Frames | None], batch_atoms: int) -> LatentMap | None:
    groups = {
        name: evenly(read_frames(frames, name=f"{name} frames"), _MOST_REFERENCE)
        for name, frames in known.items()
        if frames is not None
    }
    groups["scored"] = [frame.atoms for frame in found.kept if frame.is_finite]
    if not groups["scored"]:
        return None
    return principal_plane(
        {name: frame_features(backend, frames, batch_atoms=batch_atoms) for name, frames in groups.items()}
    )


@dataclass
class _Page:
    """Sections of the page; drawing one adds its pictures, PNG files by name."""

    found: Survey
    model: UncertaintyModel
    flag: float | None
    halt: float | None
    reduction: Reduction
    sources: dict[str, str]
    pictures: dict[str, bytes] = field(default_factory=dict)

    def text(self, plane: LatentMap | None) -> str:
        worst = self.found.worst(N_WORST)
        top = max((float(f.uncertainty[np.isfinite(f.uncertainty)].max(initial=0)) for f in worst), default=0) or 1.0
        sections = [self._along()]
        if self.found.samples:
            sections.append(self._quality())
        sections.append(self._elements())
        if plane is not None:
            sections.append(self._map(plane))
        sections += [self._worst(worst, top), self._provenance()]
        resources = files("ase_uq.report")
        style, script = (resources.joinpath(name).read_text("utf-8") for name in ("page.css", "page.js"))
        data = {
            "structures": [drawing(frame) for frame in worst],
            "colours": [[i / 3, colour] for i, colour in enumerate(plots.UNCERTAINTY_COLOURS)],
            "largest": top,
        }
        library = plotly_script()
        allowed = " ".join(f"'sha256-{_sha256(text)}'" for text in (script, library))
        # plotly compiles its shaders' loops with Function, hence unsafe-eval; whatever is not in this file is refused.
        policy = (
            f"default-src 'none'; img-src data: blob:; style-src 'unsafe-inline'; script-src {allowed} 'unsafe-eval'"
        )
        title = f"Uncertainty of {self._subject()}"
        return _DOCUMENT.format(
            policy=policy,
            title=escape(title),
            style=style,
            facts=self._facts(),
            sections="\n".join(sections),
            version=escape(version("ase-uq")),
            data=_json(data),
            library=packed(library),
            script=script,
        )

    def _subject(self) -> str:
        formulas = list(self.found.compositions)
        named = ", ".join(formulas[:3]) + (f" and {len(formulas) - 3} more compositions" if len(formulas) > 3 else "")
        return f"{_count(self.found.n_frames, 'frame')} of {named}"

    def _facts(self) -> str:
        found = self.found
        worst = found.worst(1)[0]
        facts = [
            ("frames", f"{found.n_frames:,}", _count(len(found.numbers), "atom")),
            ("largest uncertainty", f"{_number(worst.reading)} eV/Å", f"frame {worst.place}"),
            ("median uncertainty", f"{_number(_quantile(found.reading, 0.5))} eV/Å", "of a frame"),
        ]
        if np.isfinite(found.gamma).any():
            share = found.n_beyond / found.n_frames
            facts.append(("beyond calibration data", f"{share:.0%}", f"{_count(found.n_beyond, 'frame')} with γ > 1"))
        if "forces" in found.samples:
            sample = found.samples["forces"]
            rmse, z = np.sqrt(np.mean(sample.residuals**2)), np.mean((sample.residuals / sample.std) ** 2)
            facts.append(("force RMSE", f"{_number(rmse)} eV/Å", f"mean z² {z:.2f}, 1 if calibrated"))
        cells = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}<small>{escape(note)}</small></dd></div>"
            for name, value, note in facts
        )
        told = {
            "Frames without uncertainties, left out": found.n_without,
            "Frames whose uncertainty is not a number": int(np.isnan(found.reading).sum()),
        }
        notes = "".join(f'<p class="quiet">{what}: {count:,}.</p>' for what, count in told.items() if count)
        return f'{self._verdict()}<dl class="facts">{cells}</dl>{notes}'

    def _verdict(self) -> str:
        bands = self._bands()
        if not bands:
            return '<p class="verdict">No threshold was given: see below how large the uncertainties are.</p>'
        n = self.found.n_frames
        bar = "".join(f'<i class="{css}" style="width:{100 * count / n:.2f}%"></i>' for css, _, count in bands if count)
        rows = "".join(
            f'<li><b class="{css}">{escape(css)}</b> {escape(says)}: {_count(count, "frame")} ({count / n:.1%})</li>'
            for css, says, count in bands
        )
        trusted = bands[0][2] / n
        return (
            f'<p class="verdict"><strong>{trusted:.1%}</strong> of the frames stay below '
            f"{_number(self.flag if self.flag is not None else self.halt)} eV/Å.</p>"
            f'<div class="bands" aria-hidden="true">{bar}</div><ul class="legend">{rows}</ul>'
        )

    def _bands(self) -> list[tuple[str, str, int]]:
        """Class, criterion and number of frames of each band between thresholds."""
        levels = [(css, level) for css, level in (("candidate", self.flag), ("failed", self.halt)) if level is not None]
        if not levels:
            return []
        counts = [int(self.found.above(level).sum()) for _, level in levels]
        bands = [("accurate", f"below {_number(levels[0][1])} eV/Å", self.found.n_frames - counts[0])]
        for i, (css, level) in enumerate(levels):
            says = f"from {_number(level)} eV/Å"
            bands.append((css, says, counts[i] - (counts[i + 1] if i + 1 < len(levels) else 0)))
        return bands

    def _along(self) -> str:
        found = self.found
        label = "frame" if found.time is None else "time (fs)"
        time, reading = _with_gaps(found.along, found.reading)
        # A run that begins well and ends in thousands of eV/Å would be a flat line and a spike.
        finite = found.reading[np.isfinite(found.reading) & (found.reading > 0)]
        spread = finite.max() / np.median(finite) if len(finite) else 1
        axes = []
        for size in ((8.6, 3.4), (4.6, 3.2)):  # of a desktop and a phone: text must stay legible
            _, ax = plots.plt.subplots(figsize=size, layout="constrained")
            plots.run(time, reading, flag=self.flag, halt=self.halt, log=spread > 100, x_label=label, ax=ax)
            axes.append(ax)
        n_flagged = int(found.above(self.flag).sum()) if self.flag is not None else 0
        worst = found.worst(1)[0]
        alt = (
            f"Line of the force uncertainty over {label}: median {_number(_quantile(found.reading, 0.5))}, largest "
            f"{_number(worst.reading)} eV/Å at frame {worst.place}; {_count(n_flagged, 'flagged frame')}."
        )
        caption = (
            f"Each frame is read by the {self._reading()} of its atoms: ε, the norm of the standard deviations of the "
            "three components of their force."
        )
        figure = self._figure("uncertainty", axes[0], alt, caption, css="wide", small=axes[1])
        return _section("Uncertainty along the frames", figure)

    def _reading(self) -> str:
        kind = self.reduction.kind
        return {"max": "largest uncertainty", "mean": "mean uncertainty", "top3": "mean of the three largest"}.get(
            str(kind), f"{kind} quantile of the uncertainties"
        )

    def _quality(self) -> str:
        names = {"forces": "forces", "energy_per_atom": "energy per atom"}
        sample = self.found.samples.get("forces", next(iter(self.found.samples.values())))
        quantity = next(name for name, other in self.found.samples.items() if other is sample)
        ax = None
        for name, each in self.found.samples.items():
            ax = plots.reliability(each.residuals, each.std, label=names[name], ax=ax)
        assert ax is not None
        curves = self._figure(
            "reliability",
            ax,
            "Share of reference values inside the central interval of each level, against that level: "
            + "; ".join(text.get_text() for text in _legend(ax)),
            "On the dashed line uncertainties are as large as the errors. Below it errors are larger than was said.",
        )
        panels = [curves]
        if (sample.errors > 0).any():
            ax = plots.error_against_uncertainty(
                sample.errors, sample.uncertainties, components=sample.residuals.shape[1], unit=UNITS[quantity]
            )
            panels.append(
                self._figure(
                    "errors",
                    ax,
                    f"True errors of the {names[quantity]} against their uncertainties: {ax.texts[0].get_text()}",
                    "Calibrated, the red line lies on the black one, and 95 % of the points in the wide band.",
                )
            )
        n = len(np.unique(sample.frame))
        text = (
            f"<p>{n:,} of {_count(self.found.n_frames, 'frame')} {'carries' if n == 1 else 'carry'} reference "
            f"{escape(names[quantity])}. "
            "<code>ase-uq evaluate</code> judges them method by method, with intervals.</p>"
        )
        return _section("Are the uncertainties right?", f'{text}<div class="pair">{"".join(panels)}</div>')

    def _elements(self) -> str:
        found = self.found
        scored = None
        if "forces" in found.samples:
            sample = {("reported", "forces"): found.samples["forces"]}
            scored = assess(sample, found.n_frames, n_bootstrap=0, progress=False)
        heads = ["element", "atoms", "median ε", "99 % below", "largest ε"]
        with_gamma = bool(np.isfinite(found.gamma).any() or np.isinf(found.gamma).any())
        heads += ["γ > 1"] if with_gamma else []
        heads += ["force RMSE", "mean z²", "in 68 %", "in 95 %", "Spearman"] if scored else []
        rows = []
        everything = np.full(len(found.numbers), True)
        for name, among in [("all", everything)] + [
            (chemical_symbols[z], found.numbers == z) for z in np.unique(found.numbers)
        ]:
            values, gamma = found.uncertainty[among], found.gamma[among]
            cells = [f"{among.sum():,}", *(_number(_quantile(values, q)) for q in (0.5, 0.99, 1))]
            cells += [f"{np.mean(gamma > 1):.1%}"] if with_gamma else []
            cells += _scores(scored, name) if scored else []
            rows.append(
                f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{escape(cell)}</td>" for cell in cells)}</tr>'
            )
        head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
        table = (
            '<div class="scroll" tabindex="0" role="region" aria-label="By element"><table>'
            "<caption>Force uncertainties of atoms, eV/Å</caption>"
            f"<thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table></div>"
        )
        if scored:
            table += (
                '<p class="quiet">Force RMSE: of a component, eV/Å. Mean z²: 1 where calibrated, 4 where errors are '
                "twice what was said. In 68 %, in 95 %: share of components inside these intervals. Spearman: rank "
                "correlation of errors with uncertainties.</p>"
            )
        return _section("By element", table)

    def _map(self, plane: LatentMap) -> str:
        coordinates = dict(plane.coordinates)
        points = coordinates.pop("scored")
        readings = [frame.reading for frame in self.found.kept if frame.is_finite]
        ax = plots.latent_map(coordinates, points, readings, explained=plane.explained)
        each = f"; of every {self.found.stretch} frames the most uncertain is shown" if self.found.stretch > 1 else ""
        caption = (
            "Features of the potential, averaged over the atoms of a frame, along the two directions in which the "
            f"frames differ most{each}. Frames apart from the known ones are new to the model; the reverse need not "
            "hold, since a plane shows two directions of many."
        )
        known = " and ".join(f"{len(c)} {name}" for name, c in coordinates.items()) or "no known"
        alt = f"Principal components of {_count(len(points), 'scored frame')} among {known} frames."
        n_nowhere = len(self.found.kept) - len(points)
        if n_nowhere:
            caption += f" {_count(n_nowhere, 'frame')} with positions that are not finite cannot be on the map."
        return _section("Where the frames lie", self._figure("latent_map", ax, alt, caption, css="narrow"))

    def _worst(self, worst: list[ScoredFrame], top: float) -> str:
        cards = []
        for number, frame in enumerate(worst):
            atoms, indices = cut_out(frame)
            ax = plots.structure(atoms, frame.uncertainty[indices], largest=top)
            atom = frame.worst_atom
            named = f"{frame.atoms[atom].symbol} {atom} at {_number(frame.uncertainty[atom])} eV/Å"
            alt = f"Frame {frame.place}, {frame.atoms.get_chemical_formula()}; most uncertain is {named}."
            image = self._image(f"frame_{frame.place}", ax, alt, css="")
            time = "" if np.isnan(frame.time) else f" at {frame.time:,.6g} fs"
            rest = _not_drawn(frame, len(indices))
            turns = f' data-structure="{number}"' if len(indices) else ""
            reason = frame.atoms.info.get("flag_reason")
            cards.append(
                f'<figure{turns}><div class="view">{image}</div>'
                f"<figcaption><strong>Frame {frame.place}</strong>{escape(time)}, "
                f"{escape(frame.atoms.get_chemical_formula())}. Most uncertain: {escape(named)}.{escape(rest)}"
                f"{f'<br>{escape(str(reason))}' if reason else ''}</figcaption>"
                '<button type="button" hidden>Turn in 3-D</button></figure>'
            )
        colours = ", ".join(plots.UNCERTAINTY_COLOURS)
        scale = (
            f'<div class="scale"><i style="background:linear-gradient(90deg, {colours})"></i>'
            f"<span><span>0</span><span>force uncertainty of an atom</span><span>{_number(top)} eV/Å</span>"
            "</span></div>"
        )
        text = "<p>Drag to turn, scroll or pinch to zoom; names and uncertainties of atoms appear under the pointer."
        gap = self.found.gap
        if gap >= 1 or (self.found.time is not None and gap > 0):
            near = _count(int(gap), "frame") if self.found.time is None else f"{gap:,.6g} fs"
            text += f" What lies within {near} of a worse frame is left out."
        return _section("The most uncertain frames", f'{text}</p>{scale}<div class="frames">{"".join(cards)}</div>')

    def _provenance(self) -> str:
        model = self.model
        rows = {
            **self.sources,
            "frames are numbered": self._numbering(),
            "flag": _told(self.flag),
            "halt": _told(self.halt),
            "potential": f"{model.identity.settings['package']}, fingerprint {model.identity.fingerprint}",
            "written": f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z} by ase_uq {version('ase-uq')}, ASE "
            f"{version('ase')}, torch {version('torch')}, Python {platform.python_version()}",
        }
        pairs = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in rows.items() if value)
        details = json.dumps(model.provenance, indent=2, ensure_ascii=False)
        return _section(
            "Where this comes from",
            f'<dl class="source">{pairs}</dl><pre tabindex="0">{escape(model.summary())}</pre>'
            f'<details><summary>Data it was fitted on</summary><pre tabindex="0">{escape(details)}</pre></details>',
        )

    def _numbering(self) -> str:
        found = self.found
        text = "as in the trajectory that was scored" if found.counts_source else "as in the frames of this report"
        text += ", from 0"
        if found.n_missing:
            upto, are = int(found.place.max()) + 1, "is" if found.n_missing == 1 else "are"
            text += f"; {found.n_missing:,} of the first {_count(upto, 'frame')} {are} not here"
        return text

    def _figure(
        self, name: str, ax: "Axes", alt: str, caption: str, *, css: str = "", small: "Axes | None" = None
    ) -> str:
        image = self._image(name, ax, alt, css="ink")
        if small is not None:
            source = f'<source media="(max-width: 40rem)" srcset="{_data_uri(small)}">'
            image = f"<picture>{source}{image}</picture>"
        return f'<figure class="{css}">{image}<figcaption>{escape(caption)}</figcaption></figure>'

    def _image(self, name: str, ax: "Axes", alt: str, *, css: str) -> str:
        """Adds the picture to the files and gives it as an element of the page."""
        buffer = io.BytesIO()
        _figure_of(ax).savefig(buffer, format="png", dpi=200, metadata=PICTURE_METADATA)
        self.pictures[f"{name}.png"] = buffer.getvalue()
        return f'<img class="{css}" alt="{escape(alt)}" src="{_data_uri(ax)}">'


_DOCUMENT = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{title}</h1>
{facts}
</header>
<main>
{sections}
</main>
<footer><p class="quiet">Written by ase_uq {version}. Standard deviations are calibrated for frames like the
calibration frames; far from them they say that the potential does not know, not by how much it is wrong.</p></footer>
<script type="application/json" id="structures">{data}</script>
<script type="application/gzip" id="plotly">{library}</script>
<script>{script}</script>
</body>
</html>
"""


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{body}</section>"


def _with_gaps(time: np.ndarray, reading: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The readings with NaN where frames are missing, so that no line is drawn over what nobody has seen."""
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
    found = {score.metric: score.value for score in assessment.select(element=element)}
    forms = {"rmse": "{:.3g}", "mean_squared_z": "{:.2f}", "coverage_68": "{:.0%}", "coverage_95": "{:.0%}"}
    forms["spearman"] = "{:.2f}"
    return ["–" if np.isnan(found.get(m, np.nan)) else form.format(found[m]) for m, form in forms.items()]


def _legend(ax: "Axes") -> list:
    legend = ax.get_legend()
    return [] if legend is None else legend.get_texts()


def _not_drawn(frame: ScoredFrame, n_drawn: int) -> str:
    """What is to be said where the picture does not show all of a frame."""
    n_finite = int(np.isfinite(frame.atoms.positions).all(1).sum())
    text = ""
    if n_drawn < n_finite:
        text += f" The {n_drawn:,} atoms around it are shown."
    n_nowhere = len(frame.atoms) - n_finite
    if n_nowhere:
        text += f" The positions of {_count(n_nowhere, 'atom')} are not finite: not drawn."
    if not np.isfinite(frame.atoms.cell.array).all():
        text += " Its cell is not finite: not drawn."
    return text


def _count(n: int, noun: str) -> str:
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def _told(level: float | None) -> str:
    if level is None:
        return ""
    return level.describe() if isinstance(level, ResolvedThreshold) else f"{level:g} eV/Å"


def _number(value: float | None) -> str:
    return "–" if value is None else "undefined" if np.isnan(value) else f"{value:.3g}"


def _quantile(values: np.ndarray, q: float) -> float:
    """Of uncertainties, with those that are not a number above all that are."""
    known = np.nan_to_num(values, nan=np.inf, posinf=np.inf)
    # Next to an infinite value numpy's interpolation gives NaN, so there the value above is taken.
    return float(np.quantile(known, q, method="linear" if np.isfinite(known).all() else "higher"))


def _sha256(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _json(data: object) -> str:
    """JSON for a script element, which ends where "</script" stands, whatever it stands in."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False).replace("<", "\\u003c")
