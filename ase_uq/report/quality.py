"""Against the reference, where frames have labels: predictions, uncertainties, and frames trusted in error."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from ase_uq.diagnostics.table import UNITS
from ase_uq.report import plots
from ase_uq.report.axes import Axes
from ase_uq.report.pictures import Album, Picture
from ase_uq.report.survey import Survey
from ase_uq.report.words import counted, number, quantile

_NAMES = {"forces": "forces", "energy_per_atom": "energy per atom"}
_AXES = {"forces": "force component", "energy_per_atom": "energy per atom"}


def quality(survey: Survey, bands: Mapping[str, np.ndarray], tolerance: float, album: Album) -> dict[str, Any]:
    """The values of the section about labelled frames.

    Args:
        survey: Survey of the frames; some have labels.
        bands: (n_frames,) whether each frame is in a band between thresholds, by its name.
        tolerance: Force errors above it are wrong, eV/Å.
        album: Where pictures are added.
    """
    sample = survey.samples.get("forces", next(iter(survey.samples.values())))
    quantity = next(name for name, other in survey.samples.items() if other is sample)
    pictures = [_parity(survey, name, album) for name in survey.samples]
    ax = None
    for name, each in survey.samples.items():
        ax = plots.reliability(each.residuals, each.std, label=_NAMES[name], ax=ax)
    assert ax is not None
    pictures.append(
        album.add(
            "reliability",
            ax,
            "Share of reference values inside the central interval of each level, against that level: "
            + "; ".join(text.get_text() for text in _legend(ax)),
            "On the dashed line, uncertainties are as large as the errors. Below it, errors are larger than predicted.",
        )
    )
    if (sample.errors > 0).any():
        components = sample.residuals.shape[1]
        ax = plots.error_against_uncertainty(
            sample.errors, sample.uncertainties, components=components, unit=UNITS[quantity]
        )
        pictures.append(
            album.add(
                "errors",
                ax,
                f"True errors of the {_NAMES[quantity]} against their uncertainties: {ax.texts[0].get_text()}",
                "If calibrated, the line with markers lies on the diagonal, and 95 % of the points lie in the wide "
                "band.",
            )
        )
    return {
        "n_frames": len(np.unique(sample.frame)),
        "quantity": _NAMES[quantity],
        "energy_offset": survey.energy_offset if "energy_per_atom" in survey.samples else "",
        "pictures": pictures,
        "bands": _errors_of_bands(survey.error, bands, tolerance),
    }


def _parity(survey: Survey, name: str, album: Album) -> Picture:
    predicted = survey.predicted[name]
    # The reference without the offset of the calibration frames, if they have one.
    reference = predicted + survey.samples[name].residuals
    ax = plots.parity(reference, predicted, quantity=_AXES[name], unit=UNITS[name])
    what = "component of the forces" if name == "forces" else _NAMES[name]
    alt = f"Predicted against reference {_AXES[name]}, {reference.size:,} values: {ax.texts[0].get_text()}"
    return album.add(f"parity_{name}", ax, alt, f"Each {what}. Without errors, all points lie on the diagonal.")


def _errors_of_bands(error: np.ndarray, bands: Mapping[str, np.ndarray], tolerance: float) -> dict[str, Any] | None:
    """Headings and rows of the table by band, and what it says of the trusted frames; None if there is nothing."""
    rows, verdict = [], ""
    for name, among in bands.items():
        errors = error[among & ~np.isnan(error)]
        if not len(errors):
            continue
        n_wrong = int((errors > tolerance).sum())
        share = f"{n_wrong / len(errors):.1%}"
        rows.append(
            (name, [f"{len(errors):,}", f"{n_wrong:,} ({share})", *(number(quantile(errors, q)) for q in (0.5, 1))])
        )
        if name == "trusted":
            verdict = (
                f"Of {counted(len(errors), 'trusted frame')} with reference forces, {n_wrong:,} ({share}) "
                f"{'was' if n_wrong == 1 else 'were'} wrong: by more than {number(tolerance)} eV/Å."
            )
    heads = ["frames called", "labelled", f"wrong by more than {number(tolerance)}", "median error", "largest error"]
    return {"heads": heads, "rows": rows, "verdict": verdict} if rows else None


def _legend(ax: Axes) -> list:
    legend = ax.get_legend()
    return [] if legend is None else legend.get_texts()
