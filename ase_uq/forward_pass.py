"""What one forward pass of a potential gave for one batch of structures: the torch side of the package.

Every tensor is detached and on the potential's device. `n_atoms` counts the atoms of the whole batch,
`n_frames` its structures; `frame_of_atom` joins the two.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Edges:
    """The potential's own neighbour list.

    Args:
        source: (n_edges,) index of the neighbour.
        target: (n_edges,) index of the atom whose neighbour it is.
        vector: (n_edges, 3) Å, from the atom to its neighbour.
        cutoff: Å; no pair farther apart is listed.
    """

    source: Tensor
    target: Tensor
    vector: Tensor
    cutoff: float = float("inf")

    @cached_property
    def distance(self) -> Tensor:
        """(n_edges,) Å."""
        return self.vector.norm(dim=1)


@dataclass(frozen=True)
class EnergyLayer:
    """The last layer of the energy, linear in its weights: energy_s = weights · Σ_{i in s} features_i + base_s.

    Args:
        features: (n_atoms, n_last) φ_i, eV for unit-less weights.
        weights: (n_last,) the trained weights w.
        base: (n_frames,) what the last layer does not produce: isolated atoms, shifts, repulsion; eV.
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
        weights: (n_last, 3).
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
    """What each member of a committee predicts; the mean over them is the potential's own prediction.

    Args:
        energy: (n_members, n_frames) eV.
        forces: (n_members, n_atoms, 3) eV/Å, or None where forces were not asked for.
        stress: (n_members, n_frames, 6) eV/Å³, Voigt, or None.
    """

    energy: Tensor
    forces: Tensor | None = None
    stress: Tensor | None = None


@dataclass(frozen=True)
class ConfidenceBins:
    """What a confidence head says of the mean absolute error of an atom's force components.

    Args:
        probabilities: (n_atoms, n_bins).
        edges: (n_bins + 1,) eV/Å, edges of the bins; errors beyond the last one were left out of its training.
    """

    probabilities: Tensor
    edges: Tensor


class Gradients(ABC):
    """Derivatives of one forward pass that cost further passes through the potential, taken when they are asked for.

    θ are all the parameters of the potential in the order of `named_parameters`, frozen ones too; of a committee,
    those of its first member, whose derivatives these are. What does not depend on a parameter has 0 in its place.
    """

    @abstractmethod
    def of_features(self, cotangent: Tensor, energy_cotangent: Tensor | None = None) -> Tensor:
        """(n_atoms, n_features) → (n_atoms, 3): -∂/∂R_j Σ_ik cotangent_ik features_ik; one backward pass.

        With `energy_cotangent`, (n_atoms, n_last), the same pass adds -∂/∂R_j Σ_ik energy_cotangent_ik φ_ik of the
        features of the energy's last layer.

        Raises:
            InputError: This potential cannot differentiate the features of its last layer.
        """

    @abstractmethod
    def of_energies(self) -> Iterator[Tensor]:
        """(n_parameters,) ∂E_s/∂θ of one frame after the other; one backward pass each."""

    @abstractmethod
    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        """(n_atoms, 3) → (n_parameters,) ∂(Σ_j tangents_j · F_j)/∂θ over the atoms of one frame after the other.

        One backward pass through the force calculation each.

        Raises:
            InputError: The potential's forces cannot be differentiated once more.
        """


@dataclass(frozen=True)
class ForwardPass:
    """Means and features of a batch, all from the same forward pass.

    Args:
        numbers: (n_atoms,) atomic numbers.
        positions: (n_atoms, 3) Å, as the potential saw them.
        frame_of_atom: (n_atoms,) index of the structure an atom belongs to.
        n_atoms_of_frame: (n_frames,) atoms a structure.
        energy: (n_frames,) eV.
        features: (n_atoms, n_features) invariants of all layers and norms of the equivariant channels.
        energy_layer: Exact last-layer features of the energy.
        edges: The potential's neighbour list.
        forces: (n_atoms, 3) eV/Å, or None where they were not asked for.
        stress: (n_frames, 6) eV/Å³ in Voigt order, or None.
        energies: (n_atoms,) eV, or None where the potential has none.
        force_layer: Last layer of a direct force head, or None for conservative forces.
        vectors: (n_atoms, 3, n_vectors) polar vectors among the channels of the first layer, components x, y, z;
            None where there are none.
        members: Predictions of the members where the potential is a committee.
        confidence: What the potential's own confidence head says, where it has one.
        gradients: Further derivatives, where they were asked for.
        extras: Per-atom results that the wrapped calculator has beside the standard ones.
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
    energies: Tensor | None = None
    force_layer: ForceLayer | None = None
    vectors: Tensor | None = None
    members: Members | None = None
    confidence: ConfidenceBins | None = None
    gradients: Gradients | None = None
    extras: dict[str, Tensor] = field(default_factory=dict)

    @property
    def n_frames(self) -> int:
        """Structures in the batch."""
        return len(self.n_atoms_of_frame)

    def sum_over_atoms(self, values: Tensor) -> Tensor:
        """(n_atoms, ...) → (n_frames, ...): the sum over the atoms of every structure."""
        total = torch.zeros((self.n_frames, *values.shape[1:]), dtype=values.dtype, device=values.device)
        return total.index_add_(0, self.frame_of_atom, values)


@dataclass(frozen=True)
class Targets:
    """Reference values of a batch; None where no frame carries one, NaN for the frames that do not.

    Args:
        frames: (n_frames,) place of each frame in the data set: frames that stand together may be neighbours of one
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
    """Label less prediction in float64; NaN where there is no label."""
    predicted = predicted.double()
    return torch.full_like(predicted, torch.nan) if reference is None else reference - predicted
