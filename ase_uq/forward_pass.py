"""The results of one forward pass of a potential for one batch of structures: the torch side of the package.

Every tensor is detached and on the device of the potential. `n_atoms` counts the atoms of the whole batch,
`n_frames` its structures; `frame_of_atom` connects the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from ase_uq.errors import InputError

NO_LAST_LAYER = "this potential keeps no graph of the last layer of its energy to differentiate."


@dataclass(frozen=True)
class Edges:
    """The neighbour list of the potential.

    Args:
        source: (n_edges,) index of the neighbour.
        target: (n_edges,) index of the atom whose neighbour it is.
        vector: (n_edges, 3) vector from the atom to its neighbour, Å.
        cutoff: Largest distance of a listed pair, Å.
    """

    source: Tensor
    target: Tensor
    vector: Tensor
    cutoff: float = float("inf")

    @cached_property
    def distance(self) -> Tensor:
        """(n_edges,) length of each edge, Å."""
        return self.vector.norm(dim=1)

    @cached_property
    def weights(self) -> dict[tuple[float, ...], Tensor]:
        """(n_edges, n_radii) weights by radii, as `numerics.sites` makes them once for all methods."""
        return {}


@dataclass(frozen=True)
class EnergyLayer:
    """The last layer of the energy, linear in its weights: energy_s = weights · Σ_{i in s} features_i + base_s.

    Args:
        features: (n_atoms, n_last) φ_i, eV for unit-less weights.
        weights: (n_last,) the trained weights w.
        base: (n_frames,) the part of the energy that the last layer does not produce: isolated atoms, shifts,
            repulsion; eV.
    """

    features: Tensor
    weights: Tensor
    base: Tensor


@dataclass(frozen=True)
class ForceLayer:
    """The last layer of a direct force head: forces = P(features @ weights) + base.

    P removes the net force of every structure and, where `torque_free`, its net torque.

    Args:
        features: (n_atoms, n_last) φ_i, eV/Å for unit-less weights.
        weights: (n_last, 3) the trained weights.
        base: (n_atoms, 3) forces that the head does not produce (pair repulsion, dispersion), eV/Å.
        force_free: Whether the net force is removed.
        torque_free: (n_frames,) whether the net torque is removed as well.
    """

    features: Tensor
    weights: Tensor
    base: Tensor
    force_free: bool
    torque_free: Tensor


@dataclass(frozen=True)
class Members:
    """The predictions of each member of a committee; their mean is the prediction of the potential.

    Args:
        energy: (n_members, n_frames) eV.
        forces: (n_members, n_atoms, 3) eV/Å, or None if forces were not asked for.
        stress: (n_members, n_frames, 6) eV/Å³, Voigt, or None.
    """

    energy: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None


@dataclass(frozen=True)
class ConfidenceBins:
    """Predictions of a confidence head for the mean absolute error of an atom's force components.

    Args:
        probabilities: (n_atoms, n_bins) probability of each bin.
        edges: (n_bins + 1,) edges of the bins, eV/Å; errors beyond the last edge were left out of the training.
    """

    probabilities: Tensor
    edges: Tensor


@dataclass(frozen=True)
class Slopes:
    """Derivatives of Σ_i φ_i·w, of the features of the energy's last layer, for k sets of weights w.

    Args:
        forces: (n_atoms, 3, k) -∂/∂R_j, eV/Å for unit-less weights.
        virials: (n_frames, 6, k) ∂/∂ε by symmetric strain, Voigt, eV; None where the pass kept no graph of strain.
    """

    forces: Tensor
    virials: Tensor | None


class Gradients(ABC):
    """Derivatives of one forward pass that cost further passes through the potential, computed on request.

    θ are all the parameters of the potential in the order of `named_parameters`, including frozen ones. For a
    committee, parameters and derivatives are those of the first member. A derivative by a parameter that a quantity
    does not depend on is 0.
    """

    @abstractmethod
    def of_features(self, cotangent: Tensor, energy_cotangent: Tensor | None = None) -> Tensor:
        """(n_atoms, n_features) → (n_atoms, 3): -∂/∂R_j Σ_ik cotangent_ik features_ik; one backward pass.

        With `energy_cotangent`, (n_atoms, n_last), the same pass adds -∂/∂R_j Σ_ik energy_cotangent_ik φ_ik of the
        features of the energy's last layer.

        Raises:
            InputError: This potential cannot differentiate the features of its last layer.
        """

    def of_energy_layer(self, weights: Tensor) -> Slopes:
        """(n_last, k) → derivatives of the energy's last layer for each column of weights; one backward pass each.

        Raises:
            InputError: This potential cannot differentiate the features of its last layer.
        """
        raise InputError(NO_LAST_LAYER)

    @abstractmethod
    def of_energies(self) -> Iterator[Tensor]:
        """(n_parameters,) ∂E_s/∂θ for one frame after the other; one backward pass each."""

    @abstractmethod
    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        """(n_atoms, 3) → (n_parameters,) ∂(Σ_j tangents_j · F_j)/∂θ, for the atoms of one frame after the other.

        Each frame costs one backward pass through the force calculation.

        Raises:
            InputError: The forces of the potential cannot be differentiated again.
        """


@dataclass(frozen=True)
class ForwardPass:
    """Means and features of a batch, all from the same forward pass.

    Args:
        numbers: (n_atoms,) atomic numbers.
        positions: (n_atoms, 3) Å, as the potential saw them.
        frame_of_atom: (n_atoms,) index of the structure that each atom belongs to.
        n_atoms_of_frame: (n_frames,) number of atoms of each structure.
        energy: (n_frames,) eV.
        features: (n_atoms, n_features) invariants of all layers and norms of the equivariant channels.
        energy_layer: Exact last-layer features of the energy.
        edges: The potential's neighbour list.
        forces: (n_atoms, 3) eV/Å, or None if they were not asked for.
        stress: (n_frames, 6) eV/Å³ in Voigt order, or None; NaN for a frame that has none, as without a cell.
        volumes: (n_frames,) volumes of the cells, Å³, where there is a stress; 0 without a cell, and where the stress
            is not that of the cell. `Backend.forward` gives them.
        energies: (n_atoms,) eV, or None if the potential has none.
        force_layer: Last layer of a direct force head, or None for conservative forces.
        vectors: (n_atoms, 3, n_vectors) polar vectors among the channels of the first layer, components x, y, z;
            None if there are none.
        members: Predictions of the members, if the potential is a committee or its weights are drawn.
        confidence: Predictions of the confidence head of the potential, if it has one.
        gradients: Further derivatives, if they were asked for.
        extras: Per-atom results that the wrapped calculator has in addition to the standard ones.
    """

    numbers: Tensor
    positions: Tensor
    frame_of_atom: Tensor
    n_atoms_of_frame: Tensor
    energy: Tensor
    features: Tensor
    energy_layer: EnergyLayer
    edges: Edges
    forces: Tensor | None = None
    stress: Tensor | None = None
    volumes: Tensor | None = None
    energies: Tensor | None = None
    force_layer: ForceLayer | None = None
    vectors: Tensor | None = None
    members: Members | None = None
    confidence: ConfidenceBins | None = None
    gradients: Gradients | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_frames(self) -> int:
        """Number of structures in the batch."""
        return len(self.n_atoms_of_frame)

    def sum_over_atoms(self, values: Tensor) -> Tensor:
        """(n_atoms, ...) → (n_frames, ...): the sum over the atoms of each structure."""
        total = torch.zeros((self.n_frames, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.frame_of_atom, values)


@dataclass(frozen=True)
class Targets:
    """Reference values of a batch; None if no frame has one, NaN for the frames without.

    Args:
        frames: (n_frames,) place of each frame in the data set; frames with close places may be neighbours in one
            trajectory.
        energy: (n_frames,) eV.
        forces: (n_atoms, 3) eV/Å.
        stress: (n_frames, 6) eV/Å³, Voigt.
    """

    frames: Tensor
    energy: Tensor | None = None
    forces: Tensor | None = None
    stress: Tensor | None = None


def residuals_of(reference: Tensor | None, predicted: Tensor) -> Tensor:
    """Label minus prediction in float64; NaN where there is no label."""
    predicted = predicted.double()
    return torch.full_like(predicted, torch.nan) if reference is None else reference - predicted
