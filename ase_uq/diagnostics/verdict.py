"""An assessment in sentences: is it good, for forces and energies, and what to do next."""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

from ase_uq.diagnostics.table import MetricValue

_QUANTITIES = {"forces": "forces", "energy_per_atom": "energies", "stress": "stresses"}
_CALIBRATED = 0.8, 1.25  # mean z² that counts as calibrated
_ALL_THERE_IS = 0.8  # share of the attainable rank correlation that counts as all there is
_FEW_FRAMES = 20


def sentences(scores: Sequence[MetricValue], n_frames: int, tolerance: float) -> list[str]:
    """What the numbers of an assessment say about its first method, and about the others beside it.

    Args:
        scores: The numbers of an assessment.
        n_frames: Labelled frames that were evaluated.
        tolerance: Force errors above it counted as bad, eV/Å.
    """
    if not scores:
        return []
    primary = scores[0].method
    values = {(s.method, s.quantity, s.metric): s.value for s in scores if s.element == "all"}

    def value(quantity: str, metric: str, method: str = primary) -> float:
        return values.get((method, quantity, metric), math.nan)

    there = [quantity for quantity in _QUANTITIES if (primary, quantity, "rmse") in values]
    text = [_size(quantity, primary, value) for quantity in there]
    text += [_ranking(value, tolerance)] if "forces" in there else []
    missing = [name for quantity, name in _QUANTITIES.items() if quantity not in there]
    if missing:
        text.append(f"Of {' and '.join(missing)} nothing can be said: there are no labels or no uncertainties of them.")
    methods = list(dict.fromkeys(score.method for score in scores))
    return [*text, _next(methods, n_frames, value)]


def as_json(scores: Sequence[MetricValue], n_frames: int, tolerance: float) -> dict[str, Any]:
    """All numbers and the sentences, as JSON values; None where a number is not defined."""
    rows = [asdict(score) for score in scores]
    defined = [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()} for row in rows]
    verdict = sentences(scores, n_frames, tolerance)
    return {"n_frames": n_frames, "tolerance": tolerance, "verdict": verdict, "scores": defined}


def _size(quantity: str, primary: str, value: Callable[..., float]) -> str:
    name, z2, coverage = _QUANTITIES[quantity], value(quantity, "mean_squared_z"), value(quantity, "coverage_90")
    if math.isnan(z2):
        return f"Uncertainties of {name} ({primary}) cannot be judged: none is finite and positive."
    low, high = _CALIBRATED
    covered = "" if math.isnan(coverage) else f"; 90 % intervals hold {coverage:.0%} of the errors"
    if low <= z2 <= high:
        return f"Uncertainties of {name} ({primary}) are as large as the errors{covered}."
    factor = math.sqrt(z2)
    how = f"{factor:.2g} times too small" if z2 > 1 else f"{1 / factor:.2g} times too large"
    return f"Uncertainties of {name} ({primary}) are {how}{covered}."


def _ranking(value: Callable[..., float], tolerance: float) -> str:
    rank, attainable = value("forces", "spearman"), value("forces", "attainable_spearman")
    area = value("forces", "auroc")
    if math.isnan(rank):
        text = "Whether they are larger where the errors are cannot be said."
    elif math.isnan(attainable) or rank >= _ALL_THERE_IS * attainable:
        text = f"They are larger where the errors are larger (rank correlation {rank:.2f}), as far as that is possible."
    elif rank > 0:
        text = f"They tell large errors from small ones in part (rank correlation {rank:.2f} of {attainable:.2f})."
    else:
        text = f"They do not tell large errors from small ones (rank correlation {rank:.2f})."
    if math.isnan(area):
        return f"{text} No or all force errors are above {tolerance:g} eV/Å: another tolerance shows more."
    return f"{text} An atom with an error above {tolerance:g} eV/Å has the larger uncertainty in {area:.0%} of pairs."


def _next(methods: Sequence[str], n_frames: int, value: Callable[..., float]) -> str:
    """What to do next, the most needed first."""
    primary, z2 = methods[0], value("forces", "mean_squared_z")
    best = min(methods, key=lambda name: _or_infinity(value("forces", "nll", name)))
    if n_frames < _FEW_FRAMES:
        return f"Next: {n_frames} frames say little; label more, of another run than training and calibration frames."
    if not math.isnan(z2) and not _CALIBRATED[0] <= z2 <= _CALIBRATED[1]:
        return (
            "Next: these frames are unlike the calibration frames. Label some like them and fit again with those among "
            "the calibration frames."
        )
    if best != primary:
        return f"Next: {best} has the better likelihood here; `ase-uq fit --methods {best}` makes a model of it alone."
    return "Next: use it, for frames like these; `ase-uq md --flag q0.99` watches a run, `ase-uq score` a finished one."


def _or_infinity(number: float) -> float:
    return math.inf if math.isnan(number) else number
