"""Toy potentials that say more of themselves than the toy does: a committee, and one with a confidence head.

And evaluations made of given features, for oracles that know nothing of atoms.
"""

from dataclasses import replace

import torch
from torch import Tensor

from ase_uq.backends.base import Batch
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.forward_pass import ConfidenceBins, Edges, EnergyLayer, ForwardPass, Members, Targets
from ase_uq.numerics.linalg import whitener
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames


class ToyCommittee(ToyBackend):
    """Toy potentials that agree about what the training frames of the contract tell, and differ in the rest."""

    def __init__(self, members: int = 4) -> None:
        super().__init__(ToyCalculator(ELEMENTS))
        root = _unknown_directions()
        draws = torch.randn(len(root), members, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        self._members = []
        for draw in draws.T:
            calculator = ToyCalculator(ELEMENTS)
            calculator.potential.weights += 1e-3 * root @ draw
            self._members.append(ToyBackend(calculator))

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        found = [member._forward(batch, forces, gradients) for member in self._members]

        def stacked(name: str):
            values = [getattr(forward_pass, name) for forward_pass in found]
            return None if values[0] is None else torch.stack(values)

        stacks = {name: stacked(name) for name in ("energy", "forces", "stress")}
        means = {name: None if stack is None else stack.mean(0) for name, stack in stacks.items()}
        return replace(found[0], members=Members(**stacks), **means)


class ToyWithConfidence(ToyBackend):
    """A toy potential whose confidence head believes that errors grow with the distance from the training frames."""

    edges = torch.linspace(0, 0.4, 51, dtype=torch.float64)

    def __init__(self) -> None:
        super().__init__(ToyCalculator(ELEMENTS))
        self._root = _unknown_directions()

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        forward_pass = super()._forward(batch, forces, gradients)
        error = 0.02 * (forward_pass.energy_layer.features @ self._root).norm(dim=1, keepdim=True)
        centres = (self.edges[1:] + self.edges[:-1]) / 2
        probabilities = torch.softmax(-(((centres - error) / 0.03) ** 2) / 2, 1)
        return replace(forward_pass, confidence=ConfidenceBins(probabilities, self.edges))


def evaluation_of(features: Tensor, numbers: Tensor | None = None) -> ForwardPass:
    """One frame of atoms with these (n_atoms, d) features, far from one another and without forces."""
    count = len(features)
    none = torch.zeros(0, dtype=torch.long)
    return ForwardPass(
        numbers=torch.ones(count, dtype=torch.long) if numbers is None else numbers,
        positions=torch.zeros(count, 3, dtype=torch.float64),
        frame_of_atom=torch.zeros(count, dtype=torch.long),
        n_atoms_of_frame=torch.tensor([count]),
        energy=torch.zeros(1, dtype=torch.float64),
        features=features,
        energy_layer=EnergyLayer(features, features[0], torch.zeros(1, dtype=torch.float64)),
        edges=Edges(none, none, torch.zeros(0, 3, dtype=torch.float64)),
        forces=torch.zeros(count, 3, dtype=torch.float64),
    )


def batches_of(
    features: Tensor, numbers: Tensor | None = None, forces: Tensor | None = None, size: int = 100
) -> list[tuple[ForwardPass, Targets]]:
    """The atoms as labelled frames of a size."""
    found = []
    for number, own in enumerate(torch.arange(len(features)).split(size)):
        forward_pass = evaluation_of(features[own], None if numbers is None else numbers[own])
        found.append((forward_pass, Targets(torch.tensor([number]), forces=None if forces is None else forces[own])))
    return found


def _unknown_directions() -> Tensor:
    """(n_last, n_last) R with RRᵀ the covariance of the weights of the last layer after the contract's frames."""
    phi = forward_pass_of(ToyBackend(ToyCalculator(ELEMENTS)), labelled_frames(40, seed=1)).energy_layer.features
    return whitener(phi.T @ phi / len(phi) + 1e-5 * torch.eye(phi.shape[1], dtype=phi.dtype))[0]
