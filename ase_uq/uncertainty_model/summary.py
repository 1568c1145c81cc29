"""An uncertainty model in words."""

from typing import TYPE_CHECKING

import numpy as np
from ase.data import chemical_symbols

from ase_uq.thresholds.criteria import Quantile
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.fitted_method import FittedMethod

if TYPE_CHECKING:
    from ase_uq.uncertainty_model.model import UncertaintyModel


def summary_of(model: "UncertaintyModel") -> str:
    """Text that says what an `UncertaintyModel` was fitted on, how well it is calibrated and how far it reaches."""
    provenance = model.provenance
    lines = [
        f"uncertainty model for a {model.identity.settings['package']} potential "
        f"(fingerprint {model.identity.fingerprint[:12]})",
        f"  fitted on      {provenance['train']['frames']} frames, {provenance['train']['atoms']} atoms",
        f"  calibrated on  {provenance['calibration']['frames']} frames, {provenance['calibration']['atoms']} atoms",
        f"  versions       {', '.join(f'{k} {v}' for k, v in provenance['versions'].items())}",
    ]
    for name, fitted in model.methods.items():
        lines.append(f"  method {name}{' (primary)' if name == model.primary else ''}")
        lines += [_describe(quantity, fitted) for quantity in fitted.calibrators]
    if model.combination is not None:
        first, *rest = model.combination.describe()
        lines += ["  combined (primary)", f"    forces   {first}", *(f"             {line}" for line in rest)]
    if (far := model.far_field) is not None:
        steps = ", ".join(f"{m:.2g} at {f:g}" for f, m in zip(far.fractions, far.median_forces, strict=True))
        lines += [
            f"  far field      reached by training frames rattled by {far.fraction:g} of each nearest distance, where the "
            f"median force stops growing (eV/Å: {steps})",
            f"                 σ∞ is at least {far.force:.3g} eV/Å, the forces of training frames",
        ]
    if shift := provenance.get("energy_shift"):
        lines.append(f"  energies       offset of {shift}, taken out before calibration")
    norms, errors = model.record.uncertainty, model.record.error
    lines.append(
        f"  calibration    force RMSE {np.sqrt(np.mean(errors**2) / 3):.4f} eV/Å per component, "
        f"mean z² {np.mean(errors**2 / norms**2):.2f} (target 1)"
    )
    readings = model.record.readings(Reduction())
    # Only quantiles that `threshold` would give: few frames do not determine a high quantile.
    known = [q for q in (0.5, 0.9, 0.99) if Quantile(q).needed <= np.isfinite(readings).sum()]
    quantiles = ", ".join(f"{q:.0%} {np.quantile(readings, q):.3f}" for q in known)
    lines.append(f"  largest ε of a calibration frame, eV/Å: {quantiles}")
    n_units = len(np.unique(model.record.groups))
    if n_units < len(readings):
        lines.append(f"  thresholds count {n_units} blocks, not {len(readings)} frames: neighbouring frames are alike")
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
    counted = ", ".join(
        f"{chemical_symbols[z]} {count}{' (edge inherited)' if z in model.edges.inherited else ''}"
        for z, count in model.edges.counts.items()
    )
    lines.append(f"  gamma edges from calibration atoms: {counted}")
    return "\n".join(lines)


def _describe(quantity: str, fitted: FittedMethod) -> str:
    calibrator = fitted.calibrators[quantity]
    text = f"    {quantity:8s} {calibrator.describe()}"
    tried = fitted.likelihoods.get(quantity)
    if tried:
        best = min(value for form, value in tried.items() if form != "constant")
        text += f"   cross-validated NLL {best:.3f} (a constant: {tried['constant']:.3f})"
    return text
