"""The fitted residual networks."""

import math
from typing import Any, Literal, get_args

import torch
from scipy import special
from torch import Tensor

from ase_uq.forward_pass import ForwardPass
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods.base import Head, Implied, Raw
from ase_uq.methods.pdrum.conservative import forces_of
from ase_uq.methods.pdrum.directions import directions, width_of
from ase_uq.numerics.buffers import tensors_of
from ase_uq.numerics.networks import MLPEnsemble

Variant = Literal["norm", "diff", "diff_invariant", "diff_conservative"]
Target = Literal["magnitude", "log", "quantile"]


def magnitude_of_unit(target: Target, quantile: float, components: int) -> float:
    """The target's value for the norm of a Gaussian vector with a standard deviation of 1 in each component.

    This is the mean of the chi distribution, √(8/π) for 3 components and √(2/π) for 1, the exponential of the mean of
    its logarithm, or its quantile. A prediction divided by this value is a standard deviation.
    """
    half = components / 2
    if target == "magnitude":
        return math.sqrt(2) * math.exp(special.gammaln(half + 0.5) - special.gammaln(half))
    if target == "log":
        return math.sqrt(2) * math.exp(special.digamma(half) / 2)
    return math.sqrt(2 * special.gammaincinv(half, quantile))


class PDRUMHead(Head):
    """Fitted residual networks.

    Args:
        settings: Hyper-parameters; `forces` and, where energies were labelled, `energy`: settings of the ensembles,
            with `out_of_fold`, the mean squared residual of the training frames over their mean score, each scored by
            the network that has not seen it; `mean_score`, eV²/Å², over the training atoms.
        tensors: Tensors of the ensembles as `forces.…` and `energy.…`; for the equivariant and the conservative
            `diff` also the `mixing` that makes their vectors, `vector_units`, and `force_unit`, eV/Å; the conservative
            `diff` has `weights` of the vectors instead of an ensemble.
    """

    mixing: Tensor
    vector_units: Tensor
    force_unit: Tensor
    weights: Tensor

    grows = False

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__(settings, {name: tensor for name, tensor in tensors.items() if "." not in name})
        for part in ("forces", "energy"):
            if buffers := tensors_of(part, tensors):
                self.add_module(part, MLPEnsemble(settings[part], buffers))
        self.gradients = settings["variant"] == "diff_conservative"

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        variant = settings.text("variant", get_args(Variant))
        settings.text("target", get_args(Target) if variant == "norm" else ("magnitude",))
        settings.number("quantile", 1e-9, 1 - 1e-9)
        settings.positive("mean_score")
        output = "softplus" if variant == "norm" else "linear"
        width = None
        if "energy" in settings:
            width, _ = MLPEnsemble.check(settings.under("energy"), tensors.under("energy."), output, 1)
        n_outputs = 3 if variant == "diff_invariant" else 1
        if variant in ("diff", "diff_conservative"):
            mixing = tensors.take("mixing", width if variant == "diff_conservative" else None, None)
            n_outputs = width_of(mixing) if variant == "diff" else mixing.shape[1]
            tensors.take("vector_units", n_outputs, low=SMALLEST)
            tensors.take("force_unit", low=SMALLEST)
        if variant == "diff_conservative":
            tensors.take("weights", n_outputs)
            width = len(tensors.take("mixing", None, None))
        else:
            inputs, _ = MLPEnsemble.check(settings.under("forces"), tensors.under("forces."), output, n_outputs)
            if width not in (None, inputs):
                raise settings.under("forces").wrong("sizes", f"{width} inputs, as of the networks of the energy,")
            width = inputs
        return Implied({"forces": 1, "energy": 1, "stress": 1}, width)

    def forward(self, forward_pass: ForwardPass) -> Raw:
        if self._settings["variant"] == "norm":
            atoms = self.force_score(self.get_submodule("forces")(forward_pass.features), None)
        else:
            atoms = self.expected_forces(forward_pass).square().mean(1)
        counts = forward_pass.n_atoms_of_frame.double()
        mean = forward_pass.sum_over_atoms(atoms) / counts
        energy, energies = mean, atoms
        if "energy" in self._settings:
            each = self.get_submodule("energy")(forward_pass.features)[:, 0]
            energy = self.energy_score(forward_pass.sum_over_atoms(each) / counts)
            energies = self.energy_score(each)
        return Raw(
            forces=atoms[:, None, None],
            energy=energy[:, None],
            energies=energies,
            stress=mean[:, None],
            distance=atoms / self._settings["mean_score"],
        )

    def expected_forces(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms, 3) eV/Å: residuals that a `diff` expects. They are not meant to be added to the forces."""
        if self.gradients:
            weights = self.force_unit * self.weights / self.vector_units
            return forces_of(forward_pass, self.mixing, weights)
        vectors = directions(forward_pass, self.mixing) if self._settings["variant"] == "diff" else None
        return self.combined(self.get_submodule("forces")(forward_pass.features), vectors)

    def combined(self, outputs: Tensor, vectors: Tensor | None) -> Tensor:
        """(n_atoms, 3) eV/Å: the outputs themselves if they are forces, else the sum of the vectors that they weigh."""
        if vectors is None:
            return outputs
        return self.force_unit * torch.einsum("ic,iac->ia", outputs, vectors / self.vector_units)

    def force_score(self, outputs: Tensor, vectors: Tensor | None) -> Tensor:
        """(n_atoms,) eV²/Å², the variance of a force component, from magnitudes or from the inputs of `combined`."""
        if self._settings["variant"] == "norm":
            return (outputs[:, 0] / self._unit(3)).square()
        return self.combined(outputs, vectors).square().mean(1)

    def energy_score(self, outputs: Tensor) -> Tensor:
        """eV², the variance of an energy, from the outputs of the networks."""
        return (outputs / (self._unit(1) if self._settings["variant"] == "norm" else 1.0)).square()

    def _unit(self, components: int) -> float:
        return magnitude_of_unit(self._settings["target"], self._settings["quantile"], components)
