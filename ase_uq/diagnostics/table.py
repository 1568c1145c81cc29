"""The numbers of an assessment, as a table for people."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

UNITS = {"forces": "eV/Å", "forces_max": "eV/Å", "energy_per_atom": "eV", "stress": "eV/Å³"}
_TITLES = {
    "forces": "forces",
    "forces_max": "largest force error of each frame",
    "energy_per_atom": "energy per atom",
    "stress": "stress",
}


@dataclass(frozen=True)
class MetricValue:
    """One number of an assessment.

    Args:
        method: Name of the method.
        quantity: `forces`, `forces_max` (largest of each frame), `energy_per_atom` or `stress`.
        element: Chemical symbol, or `all`.
        metric: Name of a function in `metrics`, for coverage with the level (`coverage_68`); or `left_out`, the number
            of atoms or frames without a finite, positive standard deviation, which no metric includes.
        value: The number, in ASE's units; NaN if it is not defined.
        low: Lower end of its 95 % interval; NaN if there is none.
        high: Upper end of its 95 % interval; NaN if there is none.
        n: Number of atoms or frames that it was computed from; for `left_out`, of all atoms or frames.
    """

    method: str
    quantity: str
    element: str
    metric: str
    value: float
    low: float
    high: float
    n: int


# Heading and format of the metrics in the table.
_COLUMNS: dict[str, tuple[str, Callable[[float], str]]] = {
    "rmse": ("RMSE", "{:.3g}".format),
    "sharpness": ("sharpness", "{:.3g}".format),
    "mean_squared_z": ("z²", "{:.2f}".format),
    "coverage_68": ("68%", "{:.0%}".format),
    "coverage_90": ("90%", "{:.0%}".format),
    "coverage_95": ("95%", "{:.0%}".format),
    "miscalibration_area": ("ECE", "{:.3f}".format),
    "nll": ("NLL", "{:.2f}".format),
    "rll": ("RLL", "{:.2f}".format),
    "spearman": ("Spearman", "{:.2f}".format),
    "attainable_spearman": ("of", "{:.2f}".format),
    "auroc": ("AUROC", "{:.2f}".format),
    "auprc": ("AUPRC", "{:.2f}".format),
    "ause": ("AUSE", "{:.2f}".format),
}


def aligned_table(scores: Sequence[MetricValue], n_frames: int, tolerance: float) -> str:
    """The most telling scores as aligned text: one block per quantity, one row per method, and a legend.

    Args:
        scores: The numbers of an assessment.
        n_frames: Labelled frames that were evaluated.
        tolerance: Force errors above it counted as bad, eV/Å.
    """
    of_all = [score for score in scores if score.element == "all"]
    blocks = [
        _block(f"{_TITLES[quantity]} ({UNITS[quantity]})", [score for score in of_all if score.quantity == quantity])
        for quantity in dict.fromkeys(score.quantity for score in of_all)
    ]
    by_element = [score for score in scores if score.element != "all"]
    if by_element:
        blocks.insert(1, _block("forces by element (eV/Å)", by_element))
    legend = (
        f"{n_frames} frames. z²: mean squared z, 1 if calibrated; 68%, 90%, 95%: coverage; ECE: miscalibration area; "
        "RLL: 0 for a\nconstant uncertainty, 1 for an oracle; Spearman: with its 95 % interval; of: the Spearman that "
        "calibrated\nuncertainties of this spread attain; AUROC, AUPRC: for force errors above "
        f"{tolerance:g} eV/Å, undefined (-) if there are none."
    )
    return "\n\n".join([*blocks, legend])


def _block(title: str, scores: Sequence[MetricValue]) -> str:
    """A title and aligned columns, one row per method and element."""
    rows: dict[tuple[str, str], dict[str, MetricValue]] = {}
    for score in scores:
        rows.setdefault((score.method, score.element), {})[score.metric] = score
    shown = [metric for metric in _COLUMNS if any(metric in row for row in rows.values())]
    several = {element for _, element in rows} != {"all"}
    cells = [["method", *(["element"] if several else []), "n", *(_COLUMNS[metric][0] for metric in shown)]]
    notes = []
    for (method, element), row in rows.items():
        left_out = row["left_out"]
        names = [method, element] if several else [method]
        cells.append([*names, f"{left_out.n - left_out.value:.0f}", *(_cell(metric, row) for metric in shown)])
        if left_out.value:
            notes.append(
                f"  {' '.join(names)}: {left_out.value:.0f} of {left_out.n} have no finite, positive uncertainty and "
                "are left out."
            )
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    n_names = 2 if several else 1
    lines = [
        "  ".join(c.ljust(w) if i < n_names else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        for line in cells
    ]
    return "\n".join([title, *(f"  {line.rstrip()}" for line in lines), *notes])


def _cell(metric: str, row: Mapping[str, MetricValue]) -> str:
    score = row.get(metric)
    if score is None or np.isnan(score.value):
        return "-"
    text = _COLUMNS[metric][1]
    if metric == "spearman" and np.isfinite(score.low):
        return f"{text(score.value)} ({text(score.low)}–{text(score.high)})"
    return text(score.value)
