"""The primary estimator if several methods are fitted: learned where the calibration frames support it.

    log σ² = A + f·(c + Σ_k s_k·t_k),    0 ≤ s_k ≤ 1,    f = 1 - t/ρ between 0 and 1

A is the anchor, the calibrated log σ² of the first method that measures a distance (the Bayesian last layer by default;
methods without additional passes come first). It ends where the potential knows nothing, and t is the way there
(`calibration.far_field`). The t_k correct it near the calibration frames:

    of a method      by the difference between its calibrated log σ² and that of the anchor
    of the errors    by an ensemble of small networks, which reads the features of an atom and the mean of the features
                     around it, its element, the predicted force and the distances around it, and is trained for the
                     likelihood of errors about the anchor

and are bounded, |t_k| ≤ 1. They fade with the way, and vanish where four of five calibration atoms lie behind, ρ:
likelihood on frames like the training frames picks corrections that are wrong by orders of magnitude elsewhere, and
what a network answers out there means nothing. The way is that of the atom or that of the sites in its receptive field,
whichever is longer: an atom deep in a slab looks like one of the bulk, but its surroundings do not. Nor do corrections
lower log σ² below the median A of the calibration atoms: the errors of perfect crystals vanish by symmetry, not because
they are known so well, and an atom that the anchor is sure of already may stand in a structure that nobody has seen.

The likelihood of left-out calibration frames decides which corrections are kept. Networks are trained on training and
calibration frames by cross-fitting: the prediction for a calibration frame comes from a network that has not seen it.
Each network leaves out the same share of both sets.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.calibration import Calibrator, FarFieldCalibrator
from ase_uq.calibration.base import LARGEST_LOG, SMALLEST_LOG
from ase_uq.calibration.far_field import SHORTEST_SPAN
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods.base import Raw
from ase_uq.numerics.buffers import tensors_of
from ase_uq.numerics.networks import MLPEnsemble
from ase_uq.numerics.sites import HOPS, RADII, around, mean_around
from ase_uq.uncertainty_model.corrections import LARGEST_CORRECTION, bounded, check_weights, floored, in_words
from ase_uq.uncertainty_model.energy_combination import EnergyCombination, EnergyFeatures
from ase_uq.uncertainty_model.fitted_method import FittedMethod

EARLIER_LARGEST_CORRECTION = 2.0  # of files that do not say
_NEIGHBOURHOOD = RADII[1]
_SMALLEST = 1e-12
_FORCE_FLOOR = 1e-3  # eV/Å; predicted forces much smaller than this count as zero
RESIDUAL = "residual"  # name of the correction by networks
N_VIEWS = len(RADII) + HOPS


@dataclass(frozen=True)
class CombinationFeatures:
    """What the combination reads from a batch.

    Args:
        base: (n_atoms, n_components) log σ² of the anchor.
        way: (n_atoms, n_components) t of the anchor: 0 at the calibration frames, 1 where nothing is known.
        field: (n_atoms, 1) logarithm of the mean distance of the anchor over the receptive field.
        others: (n_atoms, n_components, n_others) log σ² of the other methods.
        network_inputs: (n_atoms, n_inputs) inputs of the networks; n_inputs is 0 where there are no networks.
    """

    base: Tensor
    way: Tensor
    field: Tensor
    others: Tensor
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
        methods: The fitted methods by name.
    """

    anchor: str
    others: tuple[str, ...]
    distances: tuple[str, ...]
    elements: tuple[int, ...]
    methods: Mapping[str, FittedMethod]

    @property
    def span(self) -> float:
        """Logarithm of how much the distance of the anchor grows from the calibration frames to the far end."""
        return max(self._far_field.far[0] - self._far_field.near[0], SHORTEST_SPAN)

    @property
    def _far_field(self) -> FarFieldCalibrator:
        calibrator = self.methods[self.anchor].calibrators["forces"]
        assert isinstance(calibrator, FarFieldCalibrator)
        return calibrator

    @property
    def energy_calibrators(self) -> dict[str, Calibrator]:
        """Calibrators of energies by method, of those that have one."""
        calibrators = {name: method.calibrators for name, method in self.methods.items()}
        return {name: of_method["energy"] for name, of_method in calibrators.items() if "energy" in of_method}

    def features(
        self, forward_pass: ForwardPass, raws: Mapping[str, Raw], limit: Tensor | None, *, networks: bool = True
    ) -> CombinationFeatures:
        """The features of a batch, which must have forces; `limit` is σ∞² of `FarField`."""
        base = self.log_variance(self.anchor, forward_pass, raws, limit)
        others = [
            self.log_variance(name, forward_pass, raws, limit, base.shape[1]).expand_as(base) for name in self.others
        ]
        views = views_of(forward_pass, raws[self.anchor])
        distances = [raws[name].distance for name in self.distances]
        inputs = network_inputs(forward_pass, views, self.elements, distances) if networks else views[:, :0]
        return CombinationFeatures(
            base=base,
            way=self._far_field.way(raws[self.anchor].forces),
            field=views[:, -1:],
            others=torch.stack(others, 2) if others else base.new_zeros((*base.shape, 0)),
            network_inputs=inputs,
        )

    def log_variance(
        self,
        name: str,
        forward_pass: ForwardPass,
        raws: Mapping[str, Raw],
        limit: Tensor | None,
        n_components: int = 3,
    ) -> Tensor:
        """(n_atoms, n_components) log σ² of a method, or of its mean variance for an anchor with one component."""
        variance = self.methods[name].force_variance(raws[name], limit, forward_pass.numbers)
        if n_components == 1:  # the anchor does not distinguish components
            variance = variance.mean(1, keepdim=True)
        return variance.clamp(min=1e-300).log()


def views_of(forward_pass: ForwardPass, raw: Raw) -> Tensor:
    """(n_atoms, n_views) logarithms of a method's distance, at each atom and around it."""
    sites = around(raw.distance, forward_pass.edges, RADII)
    return torch.cat([sites.sums / sites.counts, sites.hops[:, 1:]], 1).clamp(min=_SMALLEST).log()


def network_inputs(
    forward_pass: ForwardPass, views: Tensor, elements: Sequence[int], distances: Sequence[Tensor]
) -> Tensor:
    """(n_atoms, n_inputs) what force errors may depend on.

    Args:
        forward_pass: The batch, with forces.
        views: As of `views_of`.
        elements: Atomic numbers that are distinguished.
        distances: (n_atoms,) distances of further methods.
    """
    assert forward_pass.forces is not None
    features = forward_pass.features.double()
    kinds = torch.tensor(elements, device=forward_pass.numbers.device)
    columns = [
        features,
        # Neighbours pull at the atom, so their errors are part of its force error.
        mean_around(features, forward_pass.edges, _NEIGHBOURHOOD),
        views,
        (forward_pass.forces.double().norm(dim=1, keepdim=True) + _FORCE_FLOOR).log(),
        (forward_pass.numbers[:, None] == kinds).double(),
        *(distance.clamp(min=_SMALLEST).log()[:, None] for distance in distances),
    ]
    return torch.cat(columns, 1)


@dataclass(frozen=True)
class Fade:
    """The share of the corrections that counts: 1 at the calibration frames, 0 at the end of the way.

    Args:
        centre: Mean of the `field` of the calibration atoms.
        span: Logarithm of how much the distance grows from there to where nothing is known.
        end: ρ, the way at which no correction is left, at most 1.
    """

    centre: float
    span: float
    end: float = 1.0

    @classmethod
    def load(cls, settings: Mapping[str, float]) -> "Fade":
        """From the settings of a file; earlier ones have half of the end, how far calibration atoms reach."""
        end = settings["end"] if "end" in settings else min(2 * settings["reach"], 1.0)
        return cls(settings["centre"], settings["span"], end)

    def way(self, features: CombinationFeatures) -> Tensor:
        """(n_atoms, n_components) the longer way, of the atom or of its receptive field."""
        return torch.maximum(features.way, (features.field - self.centre) / self.span)

    def __call__(self, features: CombinationFeatures) -> Tensor:
        """(n_atoms, n_components) f."""
        return (1 - self.way(features) / self.end).clamp(0, 1)


@dataclass(frozen=True)
class KnownParts:
    """What is known of the rest of a file when its combination is checked.

    Args:
        calibrators: By method and quantity.
        scores: By method, how many scores of each quantity it gives; None where that is not known.
        elements: Atomic numbers of the fitted elements, ascending.
        width: Number of latent features; None if no method tells.
    """

    calibrators: Mapping[str, Mapping[str, Calibrator]]
    scores: Mapping[str, Mapping[str, int] | None]
    elements: list[int]
    width: int | None


def check_shared(settings: Entries, tensors: StoredTensors, model: KnownParts) -> str:
    """Refuses wrong entries that a combination has in files of every schema; returns the anchor.

    Raises:
        WrongEntry: An entry is missing or wrong.
    """
    names, elements = tuple(model.calibrators), model.elements
    anchor = settings.text("anchor", names)
    others = settings.names("others", [name for name in names if name != anchor])
    distances = settings.names("distances", others)
    if settings.elements("elements") != elements:
        raise settings.wrong("elements", f"{elements}, as in header.edges.counts,")
    kept = check_weights(settings, (*others, RESIDUAL))
    if (settings["ensemble"] is not None) != (RESIDUAL in kept):
        raise settings.wrong("ensemble", f"one beside a weight of {RESIDUAL}, else null,")
    if settings["ensemble"] is not None:
        n_inputs, _ = MLPEnsemble.check(settings.under("ensemble"), tensors.under("ensemble."), "linear", 1)
        n_features = n_inputs - N_VIEWS - 1 - len(elements) - len(distances)
        if n_features < 2 or n_features % 2 or model.width not in (None, n_features // 2):
            raise settings.under("ensemble").wrong("sizes", "as many inputs as features, elements and distances give")
    return anchor


class Combination(torch.nn.Module):
    """The fitted estimator of force uncertainties, and of those of energies.

    Args:
        inputs: How features are read from a batch.
        fade: Where corrections count.
        floor: Log σ² below which corrections do not lead: the median of the anchor over the calibration atoms.
        ensemble: Networks of the residual model, or None if it was not kept.
        constant: c.
        weights: s_k by name of a method, and `residual`; corrections that were not kept are absent.
        likelihoods: Cross-validated mean negative log-likelihood per component, for each variant that was tried.
        bound: Largest correction of log σ².
        energy: Corrections of the anchor's energy uncertainties; None if these are as they are.
    """

    def __init__(
        self,
        inputs: CombinationInputs,
        fade: Fade,
        floor: float,
        ensemble: MLPEnsemble | None,
        constant: float,
        weights: dict[str, float],
        likelihoods: dict[str, float],
        bound: float = LARGEST_CORRECTION,
        energy: EnergyCombination | None = None,
    ) -> None:
        super().__init__()
        self.inputs = inputs
        self.fade = fade
        self.bound = bound
        self.floor = floor
        self.ensemble = ensemble
        self.constant = constant
        self.weights = weights
        self.likelihoods = likelihoods
        self.energy = energy

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values from which, with the buffers and the methods, `load` restores it."""
        return {
            "kind": "fading",
            "anchor": self.inputs.anchor,
            "others": list(self.inputs.others),
            "distances": list(self.inputs.distances),
            "elements": list(self.inputs.elements),
            "fade": asdict(self.fade),
            "floor": self.floor,
            "bound": self.bound,
            "ensemble": None if self.ensemble is None else self.ensemble.settings,
            "constant": self.constant,
            "weights": self.weights,
            "likelihoods": self.likelihoods,
            "energy": None if self.energy is None else self.energy.settings,
        }

    @staticmethod
    def check(settings: Entries, tensors: StoredTensors, model: "KnownParts") -> None:
        """Refuses settings and tensors of a file that are not those of a combination of its methods.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        anchor = check_shared(settings, tensors, model)
        if not isinstance(model.calibrators[anchor]["forces"], FarFieldCalibrator):
            raise settings.wrong("anchor", "a method whose forces have a far_field calibrator")
        fade = settings.under("fade")
        end = "end" if "end" in fade else "reach"
        fade.keys(("centre", "span", end))
        fade.number("centre")
        fade.number("span", 1e-3)
        fade.number(end, 1e-3)
        settings.number("floor", SMALLEST_LOG, LARGEST_LOG)
        if "bound" in settings:
            settings.number("bound", 1e-3, LARGEST_LOG)
        if settings.value.get("energy") is not None:
            of_energies = {name: c["energy"] for name, c in model.calibrators.items() if "energy" in c}
            if not isinstance(of_energies.pop(anchor, None), FarFieldCalibrator):
                raise settings.wrong("energy", f"null, as energies of {anchor} have no far_field calibrator,")
            EnergyCombination.check(settings.under("energy"), tuple(of_energies))
        tensors.nothing_else()

    @classmethod
    def load(
        cls, settings: dict[str, Any], tensors: Mapping[str, Tensor], methods: Mapping[str, FittedMethod]
    ) -> "Combination":
        """The combination with these settings and buffers, of these fitted methods."""
        inputs = CombinationInputs(
            anchor=settings["anchor"],
            others=tuple(settings["others"]),
            distances=tuple(settings["distances"]),
            elements=tuple(settings["elements"]),
            methods=methods,
        )
        return cls(
            inputs,
            Fade.load(settings["fade"]),
            settings["floor"],
            ensemble_of(settings, tensors),
            settings["constant"],
            settings["weights"],
            settings["likelihoods"],
            settings.get("bound", EARLIER_LARGEST_CORRECTION),
            None if settings.get("energy") is None else EnergyCombination(**settings["energy"]),
        )

    def forward(self, forward_pass: ForwardPass, raws: Mapping[str, Raw], limit: Tensor | None) -> Tensor:
        """(n_atoms, n_components) variances of the force components, (eV/Å)²."""
        features = self.inputs.features(forward_pass, raws, limit, networks=self.ensemble is not None)
        corrections = corrections_of_methods(features, self.inputs.others, self.bound)
        if self.ensemble is not None:
            corrections[RESIDUAL] = bounded(self.ensemble(features.network_inputs), self.bound)
        total = sum((weight * corrections[name] for name, weight in self.weights.items()), self.constant)
        return floored(features.base + self.fade(features) * total, features.base, self.floor).exp()

    def energy_correction(self, raws: Mapping[str, Raw], limit: Tensor | None) -> Tensor | None:
        """(n_frames,) what is added to the log σ² of the anchor's energy; None where nothing is."""
        if self.energy is None or not self.energy.weights:
            return None
        read = (self.inputs.anchor, *self.energy.weights)
        calibrators = {name: c for name, c in self.inputs.energy_calibrators.items() if name in read}
        scores = {name: raws[name].energy for name in calibrators}
        return self.energy(EnergyFeatures.of(self.inputs.anchor, calibrators, scores, limit))

    def describe(self) -> list[str]:
        """A few lines that say what was kept and how much each correction weighs."""
        return in_words(self.inputs.anchor, self.fade.end, self.constant, self.weights, self.likelihoods)


def ensemble_of(settings: dict[str, Any], tensors: Mapping[str, Tensor]) -> MLPEnsemble | None:
    """The networks of a combination with these settings and buffers, if it has some."""
    if settings["ensemble"] is None:
        return None
    return MLPEnsemble(settings["ensemble"], tensors_of("ensemble", tensors))


def corrections_of_methods(
    features: CombinationFeatures, names: Sequence[str], limit: float = LARGEST_CORRECTION
) -> dict[str, Tensor]:
    """(n_atoms, n_components) corrections towards each of the other methods, bounded."""
    return {name: bounded(features.others[:, :, k] - features.base, limit) for k, name in enumerate(names)}
