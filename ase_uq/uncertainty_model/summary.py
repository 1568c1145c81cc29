"""An uncertainty model in words, and the numbers behind them."""

from textwrap import fill
from typing import TYPE_CHECKING, Any

import numpy as np
from ase.data import chemical_symbols

from ase_uq import metrics
from ase_uq.thresholds.criteria import Quantile
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.combination import Combination
from ase_uq.uncertainty_model.fitted_method import FittedMethod

if TYPE_CHECKING:
    from ase_uq.uncertainty_model.model import UncertaintyModel

_WIDTH = 110  # characters of a line of sentences
_A_LINE = 10  # elements; more are a table
_CALIBRATED = 0.8, 1.25  # mean z² in which nobody needs to be told
_FAR = (
    "they lead to what the potential is wrong by where it knows nothing, which is right within a factor of two more "
    "often than not; "
)
_RANKS = 0.2  # rank correlation below which uncertainties hardly tell good atoms from bad ones
_CHANCES = (0.5, 0.9, 0.99)


def summary_of(model: "UncertaintyModel", *, details: bool = False) -> str:
    """Text that says what an `UncertaintyModel` was fitted on, how good it is, how far it reaches and what is next.

    Args:
        model: The model.
        details: Whether to add its name, the formula of each calibrator and the versions.
    """
    provenance = model.provenance
    lines = [
        f"uncertainty model for a {model.identity.settings['package']} potential "
        f"(fingerprint {model.identity.fingerprint[:12]})",
        f"  fitted on      {provenance['train']['frames']} frames, {provenance['train']['atoms']} atoms",
        f"  calibrated on  {provenance['calibration']['frames']} frames, {provenance['calibration']['atoms']} atoms",
        f"  methods        {', '.join(_methods(model))}",
        *_refit(provenance),
    ]
    if details:
        lines += _formulas(model)
    if (far := model.far_field) is not None:
        lines.append(
            f"  far field      nothing is known of training frames rattled by {far.fraction:g} of each bond: "
            f"σ from {far.force:.3g} eV/Å, {far.length * far.force:.2g} eV/atom"
        )
    if model.energy_shift is not None:
        lines.append(f"  energies       offset of {model.energy_shift.describe()}, taken out before calibration")
    numbers = numbers_of(model)
    lines.append(
        f"  calibration    force RMSE {numbers['force_rmse']:.4f} eV/Å per component, "
        f"mean z² {numbers['mean_squared_z']:.2f} (target 1)"
    )
    quantiles = ", ".join(f"{float(q):.0%} {value:.3f}" for q, value in numbers["readings"].items())
    lines.append(f"  largest ε of a calibration frame, eV/Å: {quantiles}")
    if numbers["units"] < numbers["calibration_frames"]:
        lines.append(
            f"  thresholds count {numbers['units']} units, not {numbers['calibration_frames']} frames: neighbouring "
            "frames are alike"
        )
    if model.perturbed is not None:
        lines.append(
            f"  perturbed      {len(model.perturbed.run)} frames, largest force error of a frame: median "
            f"{np.median(model.perturbed.errors(Reduction())):.3f} eV/Å"
        )
    if model.reference is not None:
        runs = model.reference
        lines.append(
            f"  reference      {len(runs.readings)} runs, {runs.n_steps} readings every {runs.interval:g} fs"
            + (f", {runs.conditions}" if runs.conditions else "")
        )
    return "\n".join([*lines, *_elements(model), "", *(fill(text, _WIDTH) for text in _sentences(model, numbers))])


def facts_of(model: "UncertaintyModel") -> dict[str, str]:
    """What a model is, in a few words each."""
    counts = {part: model.provenance[part]["frames"] for part in ("train", "calibration")}
    symbols = [chemical_symbols[z] for z in model.edges.counts]
    return {
        "potential": f"{model.identity.settings['package']}, {model.identity.fingerprint[:12]}",
        "methods": ", ".join(_methods(model)),
        "elements": " ".join(symbols) if len(symbols) <= _A_LINE else f"{len(symbols)} elements",
        "frames": f"fitted on {counts['train']}, calibrated on {counts['calibration']} frames",
    }


def numbers_of(model: "UncertaintyModel") -> dict[str, Any]:
    """What `summary_of` says, as JSON values."""
    record = model.record
    readings = record.readings(Reduction())
    # Only quantiles that `threshold` would give: few frames do not determine a high quantile.
    known = [q for q in _CHANCES if Quantile(q).needed <= np.isfinite(readings).sum()]
    rank = metrics.spearman(record.error, record.uncertainty)
    return {
        "name": model.name,
        "package": model.identity.settings["package"],
        "fingerprint": model.identity.fingerprint,
        "methods": list(model.methods),
        "primary": model.primary,
        "quantities": list(model.methods[model.leading].calibrators),
        "training_frames": model.provenance["train"]["frames"],
        "calibration_frames": len(readings),
        "units": len(np.unique(record.groups)),
        "force_rmse": float(np.sqrt(np.mean(record.error**2) / 3)),
        "mean_squared_z": float(np.mean(record.error**2 / record.uncertainty**2)),
        "rank_correlation": float(rank) if np.isfinite(rank) else None,
        "readings": {f"{q:g}": float(np.quantile(readings, q)) for q in known},
        "perturbed_frames": 0 if model.perturbed is None else len(model.perturbed.run),
        "far_field": None if model.far_field is None else model.far_field.settings,
        "reference_runs": 0 if model.reference is None else len(model.reference.readings),
        "elements": {chemical_symbols[z]: count for z, count in model.edges.counts.items()},
        "edge_inherited": [chemical_symbols[z] for z in model.edges.inherited],
        "versions": dict(model.provenance["versions"]),
        "refit": model.provenance.get("refit"),
    }


def _methods(model: "UncertaintyModel") -> list[str]:
    names = [*model.methods, *(["combined"] if model.combination is not None else [])]
    return [f"{name} (primary)" if name == model.primary and len(names) > 1 else name for name in names]


def _refit(provenance: dict[str, Any]) -> list[str]:
    """What an uncertainty model was made from, if it was one of another potential."""
    if "refit" not in provenance:
        return []
    told = provenance["refit"]
    heads = "" if told["kept"] == "fitted again" else f", heads fitted on potential {told['heads'][:12]}"
    return [f"  refit          from that of potential {told['from'][:12]}: {told['kept']}{heads}"]


def _formulas(model: "UncertaintyModel") -> list[str]:
    lines = [
        f"  name           {model.name}, as in scored_with of frames",
        f"  versions       {', '.join(f'{k} {v}' for k, v in model.provenance['versions'].items())}",
    ]
    for name, fitted in model.methods.items():
        lines.append(f"  method {name}{' (primary)' if name == model.primary else ''}")
        lines += [_describe(quantity, fitted) for quantity in fitted.calibrators]
    if model.combination is not None:
        first, *rest = model.combination.describe()
        lines += ["  combined (primary)", f"    forces   {first}", *(f"             {line}" for line in rest)]
        if isinstance(model.combination, Combination) and (energy := model.combination.energy) is not None:
            first, *rest = energy.describe(model.leading)
            lines += [f"    energy   {first}", *(f"             {line}" for line in rest)]
    if (far := model.far_field) is not None:
        forces = ", ".join(f"{m:.2g} at {f:g}" for f, m in zip(far.fractions, far.median_forces, strict=True))
        lines.append(f"  median force of rattled frames, eV/Å: {forces}")
    return lines


def _describe(quantity: str, fitted: FittedMethod) -> str:
    calibrator = fitted.calibrators[quantity]
    text = f"    {quantity:8s} {calibrator.describe()}"
    tried = fitted.likelihoods.get(quantity)
    if tried:
        best = min(value for form, value in tried.items() if form != "constant")
        text += f"   cross-validated NLL {best:.3f} (a constant: {tried['constant']:.3f})"
    return text


def _elements(model: "UncertaintyModel") -> list[str]:
    """Calibration atoms of each element: in a line, or for many elements in a table."""
    marks = {z: "*" if z in model.edges.inherited else "" for z in model.edges.counts}
    entries = [f"{chemical_symbols[z]} {count}{marks[z]}" for z, count in model.edges.counts.items()]
    note = " (* too few: the edge of the others)" if model.edges.inherited else ""
    if len(entries) <= _A_LINE:
        return [f"  gamma edges from calibration atoms{note}: {', '.join(entries)}"]
    width = 2 + max(map(len, entries))
    rows = ["".join(entry.ljust(width) for entry in entries[i : i + 8]) for i in range(0, len(entries), 8)]
    title = f"  gamma edges from calibration atoms of {len(entries)} elements{note}:"
    return [title, *(f"    {row.rstrip()}" for row in rows)]


def _sentences(model: "UncertaintyModel", numbers: dict[str, Any]) -> list[str]:
    """Whether it is good, near and far from the data and for energies, and what to do next."""
    low, high = _CALIBRATED
    z2, rank = numbers["mean_squared_z"], numbers["rank_correlation"]
    if low <= z2 <= high:
        good = "On the calibration frames the uncertainties are as large as the errors on average."
    else:
        by, of = abs(np.sqrt(z2) - 1), "larger" if z2 > 1 else "smaller"
        good = f"On the calibration frames the errors are {by:.0%} {of} than the uncertainties say."
    if rank is not None and rank < _RANKS:
        good += (
            f" They hardly tell good atoms from bad ones there (rank correlation {rank:.2f}): frames that differ more "
            "from one another would show whether they do elsewhere."
        )
    elif rank is not None:
        good += f" Atoms with larger uncertainties have larger errors there (rank correlation {rank:.2f})."
    few = [chemical_symbols[z] for z in model.edges.inherited]
    far = (
        "Near the calibration frames (gamma up to 1) they are numbers to rely on; farther away "
        + ("they are extrapolated and only say that something is new; " if model.far_field is None else _FAR)
        + "elements that are not listed have infinite gamma."
    )
    if few:
        named = " ".join(few) if len(few) <= _A_LINE else f"{len(few)} elements"
        far += f" For {named} there were too few calibration atoms to know where near ends."
    other = [name for name in ("energy", "stress") if name in numbers["quantities"]]
    missing = [name for name in ("energy", "stress") if name not in other]
    energies = f"Beside forces there are uncertainties of {' and '.join(other)}." if other else ""
    if missing:
        energies += f" There is none of {' or '.join(missing)}, since the calibration frames had no such labels."
    return [good, far, energies.strip(), _next(numbers)]


def _next(numbers: dict[str, Any]) -> str:
    steps = ["`ase-uq evaluate` judges it on test frames that it has not seen"]
    if numbers["readings"]:
        q, value = list(numbers["readings"].items())[-1]
        steps.append(f"a first threshold for `ase-uq md` is --flag q{q} ({value:.3g} eV/Å)")
    if not numbers["reference_runs"]:
        steps.append("`ase-uq reference` makes the runs for thresholds by false alarms")
    if not numbers["perturbed_frames"]:
        steps.append("`ase-uq perturb-frames` makes the frames for thresholds by missed errors")
    return f"Next: {'; '.join(steps)}."
