"""The uncertainty model: heads, calibrators, edges and provenance for one potential, in one safetensors file."""

import hashlib
import os
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Real
from typing import Any

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.backends.identity import Identity
from ase_uq.calibration import EdgeTable
from ase_uq.calibration.energy_shift import EnergyShift
from ase_uq.calibration.intervals import IntervalTable
from ase_uq.display.representation import html_table
from ase_uq.forward_pass import ForwardPass
from ase_uq.thresholds.criteria import Criterion, PerElement, conformal
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData
from ase_uq.thresholds.levels import as_level
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.combination import Combination
from ase_uq.uncertainty_model.far_field import FarField
from ase_uq.uncertainty_model.file import read_model, write_model
from ase_uq.uncertainty_model.fitted_method import FittedMethod
from ase_uq.uncertainty_model.gated import GatedCombination
from ase_uq.uncertainty_model.record import CalibrationRecord
from ase_uq.uncertainty_model.summary import facts_of, numbers_of, summary_of


@dataclass(frozen=True, repr=False)
class UncertaintyModel:
    """Everything fitted for one potential.

    Args:
        identity: The potential it belongs to.
        methods: Fitted methods by name.
        primary: Name of the method whose results stand under the plain keys, or `combined`.
        combination: The estimator of force and energy uncertainties made of all methods, if `primary` is `combined`.
            The distance and the uncertainties of atomic energies and stresses are those of its anchor.
        edges: Distance at the edge of the calibration data, per element.
        record: Uncertainties and errors of the calibration frames.
        provenance: Versions, counts, splits and digests; JSON values.
        perturbed: Uncertainties and errors of the perturbed frames, if some were given; only `MissRate` uses them.
        reference: Reference runs, on which false alarms are counted, if some were made.
        far_field: What results may be wrong by where the potential knows nothing; None in models of before schema 5.
    """

    identity: Identity
    methods: dict[str, FittedMethod]
    primary: str
    edges: EdgeTable
    record: CalibrationRecord
    provenance: dict[str, Any]
    combination: Combination | GatedCombination | None = None
    perturbed: CalibrationRecord | None = None
    reference: ReferenceRuns | None = None
    far_field: FarField | None = None

    def __repr__(self) -> str:
        return f"<UncertaintyModel: {'; '.join(facts_of(self).values())}>"

    def _repr_html_(self) -> str:
        return html_table("UncertaintyModel", facts_of(self))

    def apply(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Calibrated standard deviations and gamma of a batch, by results key.

        Plain keys hold the results of the primary method; with several methods there is `<key>_<method>` for each.
        """
        results: dict[str, Tensor] = {}
        with torch.no_grad():
            raws = {name: fitted.head(forward_pass) for name, fitted in self.methods.items()}
            limits = None if self.far_field is None else self.far_field.limits(forward_pass)
            for name, fitted in self.methods.items():
                deviations = fitted.standard_deviations(raws[name], limits, forward_pass)
                if name == self.leading:
                    results |= deviations
                    results["gamma"] = self.edges.grade(raws[name].distance, forward_pass.numbers)
                if len(self.methods) > 1:
                    results |= {f"{key}_{name}": value for key, value in deviations.items()}
            if self.far_field is not None:
                results["contact"] = self.far_field.contact(forward_pass)
            if self.combination is not None:
                variance = self.combination(forward_pass, raws, limits and limits.forces)
                results["forces_uncertainty"] = variance.sqrt().expand(-1, 3)
            if isinstance(self.combination, Combination):
                added = self.combination.energy_correction(raws, limits and limits.energy)
                if added is not None:
                    results["energy_uncertainty"] = results["energy_uncertainty"] * (added / 2).exp()
        return results

    @property
    def energy_shift(self) -> EnergyShift | None:
        """By what the energies of the calibration frames differed from predicted ones; None if by no constant."""
        shift = self.provenance.get("energy_shift")
        return None if shift is None else EnergyShift.from_json(shift)

    @property
    def leading(self) -> str:
        """The method that gives all results that the combination does not give; without one, the primary method."""
        return self.primary if self.combination is None else self.combination.inputs.anchor

    def to(self, device: torch.device) -> "UncertaintyModel":
        """A copy with its heads and edges on a device; they stay float64, and this model stays where it is."""
        methods = {n: replace(fitted, head=deepcopy(fitted.head).to(device)) for n, fitted in self.methods.items()}
        edges = replace(self.edges, edges=self.edges.edges.to(device))
        combination = None if self.combination is None else deepcopy(self.combination).to(device)
        far_field = None if self.far_field is None else self.far_field.to(device)
        return replace(self, methods=methods, edges=edges, combination=combination, far_field=far_field)

    @cached_property
    def digest(self) -> str:
        """Digest of the calibration uncertainties: it differs between fits, but not between sets of reference runs."""
        return hashlib.sha256(np.ascontiguousarray(self.record.uncertainty).tobytes()).hexdigest()

    @property
    def name(self) -> str:
        """Tells it from others, in `scored_with` of the frames that were scored with it."""
        return f"uq-{self.digest[:8]}"  # digits alone would be read as a number

    @property
    def gradients(self) -> bool:
        """Whether a head needs `ForwardPass.gradients`, which cost passes in addition to that of the potential."""
        return any(fitted.head.gradients for fitted in self.methods.values())

    @property
    def results(self) -> tuple[str, ...]:
        """Results keys that `apply` gives."""
        calibrated = [f"{quantity}_uncertainty" for quantity in self.methods[self.leading].calibrators]
        alone = [
            f"{quantity}_uncertainty_{name}"
            for name, fitted in self.methods.items()
            for quantity in fitted.calibrators
            if len(self.methods) > 1
        ]
        contact = () if self.far_field is None else ("contact",)
        return (*calibrated, "gamma", *contact, *alone)

    def threshold(self, criterion: float | Criterion | str, reduction: Reduction | None = None) -> float:
        """A threshold in eV/Å from its criterion.

        Args:
            criterion: A number, returned as it is, or a criterion such as `Quantile(0.99)`, in words `"q0.99"`.
            reduction: How a frame becomes a reading; by default the largest ε_i.

        Returns:
            A float; for a criterion a `ResolvedThreshold`, which also says what it promises and how certain it is.

        Raises:
            ValueError: The calibration data or reference runs cannot support the criterion.
            TypeError: `criterion` is neither a number nor a criterion, or is `PerElement`, which is not one number.
        """
        criterion = as_level(criterion)
        if isinstance(criterion, Real):
            return float(criterion)
        if isinstance(criterion, PerElement):
            raise TypeError(
                f"{criterion} is a number for each element, not one: give it to a monitor, or ask for each, as in "
                "threshold(criterion, Reduction(elements=('C',)))."
            )
        if not isinstance(criterion, Criterion):
            raise TypeError(
                f"a threshold is a number in eV/Å or a criterion such as Quantile(0.99) or 'q0.99', not {criterion!r}."
            )
        return criterion.resolve(self.threshold_data(reduction))

    def threshold_data(self, reduction: Reduction | None = None) -> ThresholdData:
        """The data that thresholds are made from, with readings by a reduction."""
        reduction = reduction or Reduction()
        perturbed = None if self.perturbed is None else self.perturbed.threshold_data(reduction)
        return replace(self.record.threshold_data(reduction), runs=self.reference, perturbed=perturbed)

    def with_reference(self, runs: ReferenceRuns) -> "UncertaintyModel":
        """A copy with these reference runs, which `FalseAlarms` and `Cusum` use; earlier ones are replaced."""
        return replace(self, reference=runs)

    def intervals(self, confidence: float) -> "IntervalTable":
        """The table that turns the uncertainty of an atom into a bound of its force error.

        Split conformal and Mondrian: P(‖F_ref - F‖ ≤ bound) ≥ confidence for the atoms of each element, in frames like
        the calibration frames. Elements with too few units use the factor of all atoms together.

        Args:
            confidence: Confidence in (0, 1).

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
                f"an interval of confidence {confidence:g} needs at least {needed} independent calibration units, "
                f"but the uncertainty model has {n_units}. Calibrate on more frames, or ask for less "
                "confidence."
            )
        factors = torch.full((len(chemical_symbols),), conformal.conformal_quantile(scores, alpha, unit))
        for z in np.unique(record.numbers):
            of_element = record.numbers == z
            if len(np.unique(unit[of_element])) >= needed:
                factors[z] = conformal.conformal_quantile(scores[of_element], alpha, unit[of_element])
        return IntervalTable(factors.double(), frozenset(int(z) for z in np.unique(record.numbers)))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the model to one safetensors file, whole or not at all.

        Raises:
            ArtefactError: The file cannot be written.
        """
        write_model(path, self)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> "UncertaintyModel":
        """The model in a file; nothing in it is executed.

        Raises:
            ArtefactError: There is no such file, or it is not an uncertainty model, or it is newer than this package,
                truncated or altered.
        """
        return cls(**read_model(path))

    def summary(self, *, details: bool = False) -> str:
        """Text that says what the model was fitted on, how good it is, how far it reaches and what to do next.

        Args:
            details: Whether to add its name, the formula of each calibrator and the versions.
        """
        return summary_of(self, details=details)

    def numbers(self) -> dict[str, Any]:
        """The numbers of `summary`, as JSON values."""
        return numbers_of(self)
