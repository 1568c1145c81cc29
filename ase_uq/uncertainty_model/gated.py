"""The primary estimator of uncertainty models in files of schema 2 to 4, for reading them: fits make `Combination`.

    log σ² = A + g·(c + Σ_k s_k·t_k) + (1 - g)·t_A,    0 ≤ s_k ≤ 1

The anchor A had no far end, so a gate g, between 0 and 1, switched the corrections t_k off where the distances at and
around an atom were unlike those of the calibration frames; and there the larger one of two forms of the anchor counted,
an affine one and a power law: t_A ≥ 0 is the amount by which the other form exceeds A.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ase_uq.calibration import Calibrator, FarFieldCalibrator, checked_calibrator, load_calibrator
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods.base import Raw
from ase_uq.numerics.buffers import Buffers, tensors_of
from ase_uq.uncertainty_model.combination import (
    EARLIER_LARGEST_CORRECTION,
    N_VIEWS,
    RESIDUAL,
    CombinationInputs,
    KnownParts,
    check_shared,
    ensemble_of,
    network_inputs,
    views_of,
)
from ase_uq.uncertainty_model.corrections import bounded
from ase_uq.uncertainty_model.fitted_method import FittedMethod

_SMALLEST = 1e-12
_PATTERN_SLOPE, _LEVEL_SLOPE = 4.0, 2.0


class Gate(Buffers):
    """1 where the distances at and around an atom are like those of the calibration data, falling to 0 elsewhere.

    Args:
        tensors: `centre` and `spread` (n_views - 1,) of the pattern, which is the other views minus the first;
            `precision` (n_views - 1, n_views - 1) of the standardised pattern; `edges` (2,) of the logarithm of its
            squared distance and of the mean view.
    """

    centre: Tensor
    spread: Tensor
    precision: Tensor
    edges: Tensor

    def forward(self, views: Tensor) -> Tensor:
        """(n, n_views) → (n,) values between 0 and 1."""
        z = (views[:, 1:] - views[:, :1] - self.centre) / self.spread
        far = ((z @ self.precision) * z).sum(1).clamp(min=_SMALLEST).log()
        pattern = torch.sigmoid(_PATTERN_SLOPE * (self.edges[0] - far))
        return pattern * torch.sigmoid(_LEVEL_SLOPE * (self.edges[1] - views.mean(1)))


class GatedCombination(torch.nn.Module):
    """The estimator of force uncertainties in an older file.

    Args:
        settings: JSON values, as the file has them.
        tensors: Buffers, by name.
        methods: The fitted methods.
    """

    def __init__(
        self, settings: dict[str, Any], tensors: Mapping[str, Tensor], methods: Mapping[str, FittedMethod]
    ) -> None:
        super().__init__()
        self.settings = settings
        names = {name: tuple(settings[name]) for name in ("others", "distances", "elements")}
        self.inputs = CombinationInputs(settings["anchor"], **names, methods=methods)
        self.alternative: Calibrator = load_calibrator(settings["alternative"])
        self.gate = Gate(tensors_of("gate", tensors))
        self.ensemble = ensemble_of(settings, tensors)
        self.weights: dict[str, float] = settings["weights"]

    @staticmethod
    def check(settings: Entries, tensors: StoredTensors, model: KnownParts) -> None:
        """Refuses settings and tensors of a file that are not those of a combination of its methods.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        anchor = check_shared(settings, tensors, model)
        alternative = checked_calibrator(settings.under("alternative"))
        scores = model.scores[anchor]
        if isinstance(alternative, FarFieldCalibrator) or not (
            scores is None or alternative.combines(scores["forces"])
        ):
            raise settings.wrong("alternative", f"an affine or power calibrator for the scores of {anchor}")
        size = N_VIEWS - 1
        gate = tensors.under("gate.")
        gate.take("centre", size)
        gate.take("spread", size, low=SMALLEST)
        gate.take("precision", size, size)
        gate.take("edges", 2)
        gate.nothing_else()
        tensors.nothing_else()

    def forward(self, forward_pass: ForwardPass, raws: Mapping[str, Raw], limit: Tensor | None) -> Tensor:
        """(n_atoms, n_components) variances of the force components, (eV/Å)²; older models have no `limit`."""
        inputs, raw = self.inputs, raws[self.inputs.anchor]
        base = inputs.log_variance(inputs.anchor, forward_pass, raws, limit)
        careful = self.alternative.variance(raw.forces).clamp(min=1e-300).log() - base
        bound = EARLIER_LARGEST_CORRECTION
        others = {
            name: inputs.log_variance(name, forward_pass, raws, limit, base.shape[1]).expand_as(base)
            for name in inputs.others
        }
        corrections = {name: bounded(value - base, bound) for name, value in others.items()}
        views = views_of(forward_pass, raw)
        if self.ensemble is not None:
            distances = [raws[name].distance for name in inputs.distances]
            rows = network_inputs(forward_pass, views, inputs.elements, distances)
            corrections[RESIDUAL] = bounded(self.ensemble(rows), bound)
        total = sum((weight * corrections[name] for name, weight in self.weights.items()), self.settings["constant"])
        gate = self.gate(views)[:, None]
        return (base + gate * total + (1 - gate) * bounded(careful.clamp(min=0), bound)).exp()

    def describe(self) -> list[str]:
        """A few lines that say what was kept and how much each correction weighs."""
        kept = " ".join(f"+ {weight:.2f}·{name}" for name, weight in self.weights.items())
        constant, likelihoods = self.settings["constant"], self.settings["likelihoods"]
        inside = f"{self.inputs.anchor} + gate·({constant:+.2f} {kept})" if kept else self.inputs.anchor
        tried = ", ".join(f"{name} {value:.3f}" for name, value in likelihoods.items())
        return [
            f"log σ² = {inside}; far from the data at least that of {self.alternative.describe()}",
            f"cross-validated NLL: {tried}",
        ]
