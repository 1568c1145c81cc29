"""The artefact: heads, calibrators, edges and provenance for one potential, in one safetensors file."""

import hashlib
import os
from copy import deepcopy
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.backends.identity import Identity
from ase_uq.calibration import AffineCalibrator, Calibrator, EdgeTable, load_calibrator
from ase_uq.calibration.intervals import IntervalTable
from ase_uq.forward_pass import Evaluation
from ase_uq.io.tensor_file import read_artefact, write_artefact
from ase_uq.methods import method_class
from ase_uq.methods.base import Head, Raw
from ase_uq.thresholds.evidence import Evidence, ReferenceRuns
from ase_uq.thresholds.meanings import Meaning, Quantile, conformal
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.combination import Combination
from ase_uq.uncertainty_model.record import CalibrationRecord

_KIND = "uncertainty model"
_SCHEMA = 3  # 2: a combination of several methods; 3: runs of the calibration frames, reference runs


@dataclass(frozen=True)
class FittedMethod:
    """A head with the calibrators of its quantities.

    Args:
        head: Raw uncertainties of an evaluated batch.
        calibrators: By quantity: `forces`, and where labels allowed `energy`, `energies`, `stress`.
        likelihoods: By quantity: cross-validated negative log-likelihoods of the forms tried, and of a constant.
    """

    head: Head
    calibrators: dict[str, Calibrator]
    likelihoods: dict[str, dict[str, float]]

    def standard_deviations(self, raw: Raw, n_atoms_of_frame: Tensor) -> dict[str, Tensor]:
        """Calibrated standard deviations by results key, from what the head gave."""
        forces = self.calibrators["forces"].variance(raw.forces).sqrt()
        found = {"forces_uncertainty": forces.expand(-1, 3)}
        if "energy" in self.calibrators:
            # Calibrated per atom of a structure, so that sizes can be mixed.
            found["energy_uncertainty"] = n_atoms_of_frame * self.calibrators["energy"].variance(raw.energy).sqrt()
        if "energies" in self.calibrators:
            found["energies_uncertainty"] = self.calibrators["energies"].variance(raw.energies[:, None]).sqrt()
        if "stress" in self.calibrators:
            stress = self.calibrators["stress"].variance(raw.stress).sqrt()
            found["stress_uncertainty"] = stress[:, None].expand(-1, 6)
        return found


@dataclass(frozen=True)
class UncertaintyModel:
    """Everything fitted for one potential.

    Args:
        identity: The potential it belongs to.
        methods: Fitted methods by name.
        primary: Name of the method whose results stand under the plain keys, or `combined`.
        combination: The estimator of forces made of all methods, where `primary` is `combined`. Its distance, and its
            energies and stresses, are those of its anchor.
        edges: Distance at the edge of the calibration data, per element.
        record: Readings of the calibration frames.
        provenance: Versions, counts, splits and digests; JSON values.
        stressed: What deliberately bad frames read, where some were given: `MissRate` is made of them too. Nothing was
            calibrated on them.
        reference: Runs that false alarms are counted on, where some were made.
    """

    identity: Identity
    methods: dict[str, FittedMethod]
    primary: str
    edges: EdgeTable
    record: CalibrationRecord
    provenance: dict[str, Any]
    combination: Combination | None = None
    stressed: CalibrationRecord | None = None
    reference: ReferenceRuns | None = None

    def apply(self, evaluation: Evaluation) -> dict[str, Tensor]:
        """Calibrated standard deviations and gamma of a batch, by results key.

        The plain keys are those of the primary method; with several methods `<key>_<method>` stands beside.
        """
        results: dict[str, Tensor] = {}
        with torch.no_grad():
            raws = {name: fitted.head(evaluation) for name, fitted in self.methods.items()}
            for name, fitted in self.methods.items():
                found = fitted.standard_deviations(raws[name], evaluation.n_atoms_of_frame)
                if name == self._leading:
                    results |= found
                    results["gamma"] = self.edges.grade(raws[name].distance, evaluation.numbers)
                if len(self.methods) > 1:
                    results |= {f"{key}_{name}": value for key, value in found.items()}
            if self.combination is not None:
                results["forces_uncertainty"] = self.combination(evaluation, raws).sqrt().expand(-1, 3)
        return results

    @property
    def _leading(self) -> str:
        """The method that gives what the primary estimator does not."""
        return self.primary if self.combination is None else self.combination.view.anchor

    def to(self, device: torch.device) -> "UncertaintyModel":
        """A copy with its heads and edges on a device; they stay float64, and this model stays where it is."""
        methods = {n: replace(fitted, head=deepcopy(fitted.head).to(device)) for n, fitted in self.methods.items()}
        edges = replace(self.edges, edges=self.edges.edges.to(device))
        combination = None if self.combination is None else deepcopy(self.combination).to(device)
        return replace(self, methods=methods, edges=edges, combination=combination)

    @cached_property
    def digest(self) -> str:
        """Of what it says of its calibration frames: another for another fit, the same with other reference runs."""
        return hashlib.sha256(np.ascontiguousarray(self.record.uncertainty).tobytes()).hexdigest()

    @property
    def gradients(self) -> bool:
        """Whether a head asks for `Evaluation.gradients`, which cost passes beyond the potential's own."""
        return any(fitted.head.gradients for fitted in self.methods.values())

    @property
    def results(self) -> tuple[str, ...]:
        """Results keys that it gives."""
        calibrated = [f"{quantity}_uncertainty" for quantity in self.methods[self._leading].calibrators]
        alone = [
            f"{quantity}_uncertainty_{name}"
            for name, fitted in self.methods.items()
            for quantity in fitted.calibrators
            if len(self.methods) > 1
        ]
        return (*calibrated, "gamma", *alone)

    def threshold(self, meaning: float | Meaning, reduction: Reduction | None = None) -> float:
        """A threshold in eV/Å from its meaning.

        Args:
            meaning: A number, returned as it is, or a meaning such as `Quantile(0.99)` or `MissRate(0.3, 0.1)`.
            reduction: How a frame becomes a reading; the largest ε_i by default.

        Returns:
            A float; of a meaning a `ResolvedThreshold`, which also says what it promises and how sure it is.

        Raises:
            ValueError: The calibration data or reference runs cannot support the meaning.
            TypeError: It is neither a number nor a meaning.
        """
        if isinstance(meaning, Real):
            return float(meaning)
        if not isinstance(meaning, Meaning):
            raise TypeError(f"a threshold is a number in eV/Å or a meaning such as Quantile(0.99), not {meaning!r}.")
        return meaning.resolve(self.evidence(reduction))

    def evidence(self, reduction: Reduction | None = None) -> Evidence:
        """What thresholds are made of, with frames read by a reduction."""
        reduction = reduction or Reduction()
        stressed = None if self.stressed is None else self.stressed.evidence(reduction)
        return replace(self.record.evidence(reduction), runs=self.reference, stressed=stressed)

    def with_reference(self, runs: ReferenceRuns) -> "UncertaintyModel":
        """A copy that carries reference runs, which `FalseAlarms` and `Cusum` count on; those before are replaced."""
        return replace(self, reference=runs)

    def intervals(self, confidence: float) -> "IntervalTable":
        """What turns the uncertainty of an atom into a bound of its force error.

        Split conformal and Mondrian: for an atom of each element, of a frame like those of the calibration,
        P(‖F_ref - F‖ ≤ bound) ≥ confidence. Elements with too few units share the factor of all atoms together.

        Args:
            confidence: In (0, 1).

        Raises:
            ValueError: `confidence` is outside (0, 1), or there are fewer than 1/(1 - confidence) - 1 units.
        """
        if not 0 < confidence < 1:
            raise ValueError(f"a confidence lies between 0 and 1, not at {confidence!r}.")
        alpha = 1 - confidence
        needed, record = conformal.fewest_units(alpha), self.record
        unit = np.repeat(record.groups, record.n_atoms_of_frame)
        scores = record.error / np.maximum(record.uncertainty, np.finfo(np.float32).tiny)
        if (n_units := len(np.unique(unit))) < needed:
            raise ValueError(
                f"an interval of confidence {confidence:g} needs at least {needed} independent calibration frames or "
                f"blocks, the uncertainty model has {n_units}. Calibrate on more, or ask for less confidence."
            )
        factors = torch.full((len(chemical_symbols),), conformal.conformal_quantile(scores, alpha, unit))
        for z in np.unique(record.numbers):
            own = record.numbers == z
            if len(np.unique(unit[own])) >= needed:
                factors[z] = conformal.conformal_quantile(scores[own], alpha, unit[own])
        return IntervalTable(factors.double(), frozenset(int(z) for z in np.unique(record.numbers)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one safetensors file, whole or not at all.

        Raises:
            ArtefactError: The file cannot be written.
        """
        tensors = {
            "identity/probe": self.identity.probe,
            "edges": self.edges.edges,
            **_record_tensors("record", self.record),
        }
        methods = {}
        for name, fitted in self.methods.items():
            tensors |= {f"head/{name}/{key}": value for key, value in fitted.head.state_dict().items()}
            methods[name] = {
                "settings": fitted.head.settings,
                "calibrators": {quantity: c.settings for quantity, c in fitted.calibrators.items()},
                "likelihoods": fitted.likelihoods,
            }
        if self.combination is not None:
            tensors |= {f"combination/{key}": value for key, value in self.combination.state_dict().items()}
        if self.stressed is not None:
            tensors |= _record_tensors("stressed", self.stressed)
        if self.reference is not None:
            runs = self.reference.readings
            tensors["reference/readings"] = torch.from_numpy(np.concatenate(runs).astype(np.float32))
            tensors["reference/lengths"] = torch.tensor([len(run) for run in runs])
        header = {
            "identity": {"settings": self.identity.settings, "weights": self.identity.weights},
            "methods": methods,
            "primary": self.primary,
            "combination": None if self.combination is None else self.combination.settings,
            "edges": {"counts": self.edges.counts, "inherited": list(self.edges.inherited)},
            "provenance": self.provenance,
            "reference": None if self.reference is None else _settings_of(self.reference),
        }
        write_artefact(path, _KIND, _SCHEMA, header, tensors)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UncertaintyModel":
        """The model in a file; nothing in it is executed.

        Raises:
            ArtefactError: There is no such file, or it is not an uncertainty model, newer than this package,
                truncated or altered.
        """
        header, tensors = read_artefact(path, _KIND, _SCHEMA)
        methods = {}
        for name, stored in header["methods"].items():
            prefix = f"head/{name}/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            methods[name] = FittedMethod(
                head=method_class(name).load(stored["settings"], own),
                calibrators={quantity: load_calibrator(c) for quantity, c in stored["calibrators"].items()},
                likelihoods=stored["likelihoods"],
            )
        combination = None
        if header.get("combination"):
            prefix = "combination/"
            own = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
            calibrators = {name: fitted.calibrators["forces"] for name, fitted in methods.items()}
            combination = Combination.load(header["combination"], own, calibrators)
        identity = header["identity"]
        reference = header.get("reference") and _reference(header["reference"], tensors)
        return cls(
            identity=Identity(identity["settings"], identity["weights"], tensors["identity/probe"]),
            methods=methods,
            primary=header["primary"],
            edges=EdgeTable(
                tensors["edges"],
                {int(z): count for z, count in header["edges"]["counts"].items()},
                tuple(header["edges"]["inherited"]),
            ),
            record=_record("record", tensors),
            provenance=header["provenance"],
            combination=combination,
            stressed=_record("stressed", tensors) if "stressed/run" in tensors else None,
            reference=reference or None,
        )

    def summary(self) -> str:
        """What it was fitted on, what was found and how far it reaches, for people."""
        provenance = self.provenance
        lines = [
            f"uncertainty model for a {self.identity.settings['package']} potential "
            f"(fingerprint {self.identity.fingerprint[:12]})",
            f"  fitted on      {provenance['train']['frames']} frames, {provenance['train']['atoms']} atoms",
            f"  calibrated on  {provenance['calibration']['frames']} frames, "
            f"{provenance['calibration']['atoms']} atoms",
            f"  versions       {', '.join(f'{k} {v}' for k, v in provenance['versions'].items())}",
        ]
        for name, fitted in self.methods.items():
            lines.append(f"  method {name}{' (primary)' if name == self.primary else ''}")
            lines += [_describe(quantity, fitted) for quantity in fitted.calibrators]
        if self.combination is not None:
            first, *rest = self.combination.describe()
            lines += ["  combined (primary)", f"    forces   {first}", *(f"             {line}" for line in rest)]
        norms, errors = self.record.uncertainty, self.record.error
        lines.append(
            f"  calibration    force RMSE {np.sqrt(np.mean(errors**2) / 3):.4f} eV/Å a component, "
            f"mean z² {np.mean(errors**2 / norms**2):.2f} (target 1)"
        )
        readings = self.record.readings(Reduction())
        # Only those that `threshold` would give: a few frames know no high quantile.
        known = [q for q in (0.5, 0.9, 0.99) if Quantile(q).needed <= np.isfinite(readings).sum()]
        quantiles = ", ".join(f"{q:.0%} {np.quantile(readings, q):.3f}" for q in known)
        lines.append(f"  largest ε of a calibration frame, eV/Å: {quantiles}")
        n_units = len(np.unique(self.record.groups))
        if n_units < len(readings):
            lines.append(
                f"  thresholds count {n_units} blocks, not {len(readings)} frames: neighbouring frames are alike"
            )
        if self.stressed is not None:
            lines.append(
                f"  stressed       {len(self.stressed.run)} frames, largest force error of a frame: median "
                f"{np.median(self.stressed.errors(Reduction())):.3f} eV/Å"
            )
        if self.reference is not None:
            runs = self.reference
            lines.append(
                f"  reference      {len(runs.readings)} runs, {runs.n_steps} readings every {runs.interval:g} fs"
                + (f", {runs.conditions}" if runs.conditions else "")
            )
        counted = ", ".join(
            f"{chemical_symbols[z]} {count}{' (edge inherited)' if z in self.edges.inherited else ''}"
            for z, count in self.edges.counts.items()
        )
        lines.append(f"  gamma edges from calibration atoms: {counted}")
        return "\n".join(lines)


def _record_tensors(name: str, record: CalibrationRecord) -> dict[str, Tensor]:
    return {f"{name}/{field.name}": torch.from_numpy(getattr(record, field.name)) for field in fields(record)}


def _record(name: str, tensors: dict[str, Tensor]) -> CalibrationRecord:
    stored = {key.removeprefix(f"{name}/"): v.numpy() for key, v in tensors.items() if key.startswith(f"{name}/")}
    # Before version 3 nobody asked which run a frame came from.
    stored.setdefault("run", np.zeros(len(stored["n_atoms_of_frame"]), np.int32))
    return CalibrationRecord(**stored)


def _settings_of(runs: ReferenceRuns) -> dict[str, Any]:
    return {"interval": runs.interval, "reduction": asdict(runs.reduction), "conditions": runs.conditions}


def _reference(settings: dict[str, Any], tensors: dict[str, Tensor]) -> ReferenceRuns:
    readings = tensors["reference/readings"].numpy()
    lengths = tensors["reference/lengths"].numpy()
    stored = settings["reduction"]
    scope = (None if stored[key] is None else tuple(stored[key]) for key in ("elements", "indices"))
    return ReferenceRuns(
        tuple(np.split(readings, np.cumsum(lengths)[:-1])),
        settings["interval"],
        Reduction(stored["kind"], *scope),
        settings["conditions"],
    )


def _describe(quantity: str, fitted: FittedMethod) -> str:
    calibrator = fitted.calibrators[quantity]
    text = f"    {quantity:8s} {calibrator.describe()}"
    tried = fitted.likelihoods.get(quantity)
    if tried:
        chosen = "affine" if isinstance(calibrator, AffineCalibrator) else "power"
        best = min(value for key, value in tried.items() if key.startswith(chosen))
        text += f"   cross-validated NLL {best:.3f} (a constant: {tried['constant']:.3f})"
    return text
