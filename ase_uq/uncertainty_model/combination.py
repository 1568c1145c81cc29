"""The primary estimator if several methods are fitted: learned where the calibration data support it.

    log σ² = A + g·(c + Σ_k s_k·t_k) + (1 - g)·t_A,    0 ≤ s_k ≤ 1

A is the anchor, the calibrated site sums of the first method that measures a distance (the Bayesian last layer by
default; methods without additional passes come first): it grows with the distance from the training frames without
limit. The t_k correct it:

    of a method      by the difference between its calibrated log σ² and that of the anchor
    of the errors    by an ensemble of small networks, which reads the features of an atom and the mean of the features
                     around it, its element, the predicted force and the distances around it, and is trained for the
                     likelihood of errors about the anchor

and are bounded, |t_k| ≤ 2. The gate g, between 0 and 1, switches them off where nothing supports them: likelihood on
frames like the training frames picks corrections that are wrong by orders of magnitude elsewhere. The gate looks at the
distances at the atom and around it. Their mean, the level, may be fairly large. Their pattern, near sites compared with
far ones, must occur in the calibration data: an atom deep in a slab looks like an atom of the bulk, but the atoms
around it do not.

Where the gate is closed, the anchor itself is an extrapolation. Two forms of it were calibrated, an affine one and a
power law, and there the larger one counts: t_A ≥ 0 is the amount by which the other form exceeds A, bounded as well.

The likelihood of left-out calibration frames decides which corrections are kept. Networks are trained on training and
calibration frames by cross-fitting: the prediction for a calibration frame comes from a network that has not seen it.
Each network leaves out the same share of both sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ase_uq.calibration import Calibrator, load_calibrator
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods.base import Raw
from ase_uq.numerics.buffers import Buffers, tensors_of
from ase_uq.numerics.networks import MLPEnsemble
from ase_uq.numerics.sites import RADII, around, mean_around

LARGEST_CORRECTION = 2.0  # of log σ²: a factor e in σ
_NEIGHBOURHOOD = RADII[1]
_SMALLEST = 1e-12
_FORCE_FLOOR = 1e-3  # eV/Å; predicted forces much smaller than this count as zero
_PATTERN_RIDGE = 1e-3  # of the standardised pattern, so that directions that hardly vary decide nothing
_PATTERN_QUANTILE, _PATTERN_SLOPE = 0.999, 4.0
_LEVEL_QUANTILE, _LEVEL_SLOPE = 0.999, 2.0
RESIDUAL = "residual"  # name of the correction by networks


@dataclass(frozen=True)
class CombinationFeatures:
    """What the combination reads from a batch.

    Args:
        base: (n_atoms, n_components) log σ² of the anchor.
        careful: (n_atoms, n_components) t_A ≥ 0.
        others: (n_atoms, n_components, n_others) log σ² of the other methods.
        around: (n_atoms, n_views) logarithms of the distance of the anchor, at the atom and around it.
        network_inputs: (n_atoms, n_inputs) inputs of the networks.
    """

    base: Tensor
    careful: Tensor
    others: Tensor
    around: Tensor
    network_inputs: Tensor

    @classmethod
    def joined(cls, batches: Sequence["CombinationFeatures"]) -> "CombinationFeatures":
        """The atoms of all batches, one after the other."""
        return cls(*(torch.cat([getattr(batch, name) for batch in batches]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class CombinationInputs:
    """How features are made from a batch, and which methods are read.

    Args:
        anchor: Name of the anchor.
        others: Names of the other methods.
        distances: Names of those other methods whose distance is an input of the networks.
        elements: Atomic numbers that the networks distinguish.
        calibrators: Calibrator of the forces of each method, by name.
        alternative: Calibrator of the forces of the anchor in the other form.
    """

    anchor: str
    others: tuple[str, ...]
    distances: tuple[str, ...]
    elements: tuple[int, ...]
    calibrators: Mapping[str, Calibrator]
    alternative: Calibrator

    def features(self, forward_pass: ForwardPass, raws: Mapping[str, Raw]) -> CombinationFeatures:
        """The features of a batch, which must have forces."""
        assert forward_pass.forces is not None
        sites = around(raws[self.anchor].distance, forward_pass.edges, RADII)
        views = torch.cat([sites.sums / sites.counts, sites.hops[:, 1:]], 1).clamp(min=_SMALLEST).log()
        base = _log_variance(self.calibrators[self.anchor], raws[self.anchor])
        careful = _log_variance(self.alternative, raws[self.anchor]) - base
        others = [
            _log_variance(self.calibrators[name], raws[name], base.shape[1]).expand_as(base) for name in self.others
        ]
        features = forward_pass.features.double()
        kinds = torch.tensor(self.elements, device=forward_pass.numbers.device)
        columns = [
            features,
            # Neighbours pull at the atom, so their errors are part of its force error.
            mean_around(features, forward_pass.edges, _NEIGHBOURHOOD),
            views,
            (forward_pass.forces.double().norm(dim=1, keepdim=True) + _FORCE_FLOOR).log(),
            (forward_pass.numbers[:, None] == kinds).double(),
            *(raws[name].distance.clamp(min=_SMALLEST).log()[:, None] for name in self.distances),
        ]
        return CombinationFeatures(
            base=base,
            careful=bounded(careful.clamp(min=0)),
            others=torch.stack(others, 2) if others else base.new_zeros((*base.shape, 0)),
            around=views,
            network_inputs=torch.cat(columns, 1),
        )


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

    @classmethod
    def fit(cls, views: Tensor, calibration: Tensor) -> "Gate":
        """The gate for the (n, n_views) views of all atoms; the views of the calibration atoms set its edges."""
        pattern = views[:, 1:] - views[:, :1]
        centre, spread = pattern.mean(0), pattern.std(0).clamp(min=1e-9)
        z = (pattern - centre) / spread
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        precision = torch.linalg.inv(z.T @ z / len(z) + _PATTERN_RIDGE * eye)
        gate = cls({"centre": centre, "spread": spread, "precision": precision, "edges": z.new_zeros(2)})
        far, level = gate._far(calibration).cpu().numpy(), calibration.mean(1).cpu().numpy()
        edges = [np.quantile(far, _PATTERN_QUANTILE), np.quantile(level, _LEVEL_QUANTILE)]
        gate.edges = torch.tensor(edges, dtype=z.dtype, device=z.device)
        return gate

    def _far(self, views: Tensor) -> Tensor:
        z = (views[:, 1:] - views[:, :1] - self.centre) / self.spread
        return ((z @ self.precision) * z).sum(1).clamp(min=_SMALLEST).log()

    def forward(self, views: Tensor) -> Tensor:
        """(n, n_views) → (n,) values between 0 and 1."""
        pattern = torch.sigmoid(_PATTERN_SLOPE * (self.edges[0] - self._far(views)))
        return pattern * torch.sigmoid(_LEVEL_SLOPE * (self.edges[1] - views.mean(1)))


class Combination(torch.nn.Module):
    """The fitted estimator of force uncertainties.

    Args:
        inputs: How features are read from a batch.
        gate: Decides where corrections count.
        ensemble: Networks of the residual model, or None if it was not kept.
        constant: c.
        weights: s_k by name of a method, and `residual`; corrections that were not kept are absent.
        likelihoods: Cross-validated mean negative log-likelihood per component, for each variant that was tried.
    """

    def __init__(
        self,
        inputs: CombinationInputs,
        gate: Gate,
        ensemble: MLPEnsemble | None,
        constant: float,
        weights: dict[str, float],
        likelihoods: dict[str, float],
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.gate = gate
        self.ensemble = ensemble
        self.constant = constant
        self.weights = weights
        self.likelihoods = likelihoods

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values from which, with the buffers and the calibrators of the methods, `load` restores it."""
        return {
            "anchor": self.inputs.anchor,
            "others": list(self.inputs.others),
            "distances": list(self.inputs.distances),
            "elements": list(self.inputs.elements),
            "alternative": self.inputs.alternative.settings,
            "ensemble": None if self.ensemble is None else self.ensemble.settings,
            "constant": self.constant,
            "weights": self.weights,
            "likelihoods": self.likelihoods,
        }

    @classmethod
    def load(
        cls, settings: dict[str, Any], tensors: Mapping[str, Tensor], calibrators: Mapping[str, Calibrator]
    ) -> "Combination":
        """The combination with these settings and buffers, and the methods' calibrators of the forces."""
        inputs = CombinationInputs(
            anchor=settings["anchor"],
            others=tuple(settings["others"]),
            distances=tuple(settings["distances"]),
            elements=tuple(settings["elements"]),
            calibrators=calibrators,
            alternative=load_calibrator(settings["alternative"]),
        )
        ensemble = None
        if settings["ensemble"] is not None:
            ensemble = MLPEnsemble(settings["ensemble"], tensors_of("ensemble", tensors))
        return cls(
            inputs,
            Gate(tensors_of("gate", tensors)),
            ensemble,
            settings["constant"],
            settings["weights"],
            settings["likelihoods"],
        )

    def forward(self, forward_pass: ForwardPass, raws: Mapping[str, Raw]) -> Tensor:
        """(n_atoms, n_components) variances of the force components, (eV/Å)²."""
        features = self.inputs.features(forward_pass, raws)
        corrections = corrections_of_methods(features, self.inputs.others)
        if self.ensemble is not None:
            corrections[RESIDUAL] = bounded(self.ensemble(features.network_inputs))
        total = sum((weight * corrections[name] for name, weight in self.weights.items()), self.constant)
        gate = self.gate(features.around)[:, None]
        return (features.base + gate * total + (1 - gate) * features.careful).exp()

    def describe(self) -> list[str]:
        """A few lines that say what was kept and how much each correction weighs."""
        kept = " ".join(f"+ {weight:.2f}·{name}" for name, weight in self.weights.items())
        inside = f"{self.inputs.anchor} + gate·({self.constant:+.2f} {kept})" if kept else self.inputs.anchor
        tried = ", ".join(f"{name} {value:.3f}" for name, value in self.likelihoods.items())
        return [
            f"log σ² = {inside}; far from the data at least that of {self.inputs.alternative.describe()}",
            f"cross-validated NLL {min(self.likelihoods.values()):.3f} of {tried}",
        ]


def _log_variance(calibrator: Calibrator, raw: Raw, n_components: int = 3) -> Tensor:
    variance = calibrator.variance(raw.forces)
    if n_components == 1:  # the anchor does not distinguish components
        variance = variance.mean(1, keepdim=True)
    return variance.clamp(min=1e-300).log()


def corrections_of_methods(features: CombinationFeatures, names: Sequence[str]) -> dict[str, Tensor]:
    """(n_atoms, n_components) corrections towards each of the other methods, bounded."""
    return {name: bounded(features.others[:, :, k] - features.base) for k, name in enumerate(names)}


def bounded(values: Tensor) -> Tensor:
    """Corrections of log σ², limited smoothly to ±`LARGEST_CORRECTION`; small ones are unchanged."""
    return LARGEST_CORRECTION * torch.tanh(values / LARGEST_CORRECTION)
