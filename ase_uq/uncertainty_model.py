"""The artefact: heads, calibrators, edges and provenance for one potential, in one safetensors file."""

import os
from copy import deepcopy
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.artefact import read_artefact, write_artefact
from ase_uq.backends.base import Identity
from ase_uq.calibration import AffineCalibrator, Calibrator, EdgeTable, load_calibrator
from ase_uq.combined import Combination
from ase_uq.evaluation import Evaluation
from ase_uq.methods import method_class
from ase_uq.methods.base import Head, Raw
from ase_uq.readings import Reduction, readings_of
from ase_uq.thresholds import Quantile

_KIND, _SCHEMA = "uncertainty model", 2  # 2: a combination of several methods


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
class CalibrationRecord:
    """What the calibration frames read, atom by atom: thresholds are made of it.

    Args:
        uncertainty: (n_atoms,) ε_i, eV/Å.
        error: (n_atoms,) ‖F_ref - F‖, eV/Å.
        numbers: (n_atoms,) atomic numbers.
        n_atoms_of_frame: (n_frames,).
    """

    uncertainty: np.ndarray
    error: np.ndarray
    numbers: np.ndarray
    n_atoms_of_frame: np.ndarray

    def readings(self, reduction: Reduction) -> np.ndarray:
        """(n_frames,) eV/Å."""
        return readings_of(self.uncertainty, self.numbers, self.n_atoms_of_frame, reduction)


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
    """

    identity: Identity
    methods: dict[str, FittedMethod]
    primary: str
    edges: EdgeTable
    record: CalibrationRecord
    provenance: dict[str, Any]
    combination: Combination | None = None

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

    def threshold(self, meaning: float | Quantile, reduction: Reduction | None = None) -> float:
        """A threshold in eV/Å from its meaning.

        Args:
            meaning: A number, returned as it is, or a meaning such as `Quantile(0.99)`.
            reduction: How a frame becomes a reading; the largest ε_i by default.

        Raises:
            ValueError: The calibration data cannot support the meaning.
            TypeError: It is neither a number nor a meaning.
        """
        if isinstance(meaning, Real):
            return float(meaning)
        if not isinstance(meaning, Quantile):
            raise TypeError(f"a threshold is a number in eV/Å or a meaning such as Quantile(0.99), not {meaning!r}.")
        return meaning.resolve(self.record.readings(reduction or Reduction()))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one safetensors file, whole or not at all.

        Raises:
            ArtefactError: The file cannot be written.
        """
        tensors = {
            "identity/probe": self.identity.probe,
            "edges": self.edges.edges,
            **{f"record/{name}": torch.from_numpy(values) for name, values in vars(self.record).items()},
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
        header = {
            "identity": {"settings": self.identity.settings, "weights": self.identity.weights},
            "methods": methods,
            "primary": self.primary,
            "combination": None if self.combination is None else self.combination.settings,
            "edges": {"counts": self.edges.counts, "inherited": list(self.edges.inherited)},
            "provenance": self.provenance,
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
        fields = ("uncertainty", "error", "numbers", "n_atoms_of_frame")
        return cls(
            identity=Identity(identity["settings"], identity["weights"], tensors["identity/probe"]),
            methods=methods,
            primary=header["primary"],
            edges=EdgeTable(
                tensors["edges"],
                {int(z): count for z, count in header["edges"]["counts"].items()},
                tuple(header["edges"]["inherited"]),
            ),
            record=CalibrationRecord(*(tensors[f"record/{name}"].numpy() for name in fields)),
            provenance=header["provenance"],
            combination=combination,
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
        counted = ", ".join(
            f"{chemical_symbols[z]} {count}{' (edge inherited)' if z in self.edges.inherited else ''}"
            for z, count in self.edges.counts.items()
        )
        lines.append(f"  gamma edges from calibration atoms: {counted}")
        return "\n".join(lines)


def _describe(quantity: str, fitted: FittedMethod) -> str:
    calibrator = fitted.calibrators[quantity]
    text = f"    {quantity:8s} {calibrator.describe()}"
    tried = fitted.likelihoods.get(quantity)
    if tried:
        chosen = "affine" if isinstance(calibrator, AffineCalibrator) else "power"
        best = min(value for key, value in tried.items() if key.startswith(chosen))
        text += f"   cross-validated NLL {best:.3f} (a constant: {tried['constant']:.3f})"
    return text
