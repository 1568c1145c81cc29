"""Uncertainties in eV/Å from the confidence head of a potential, such as orb-v3 models have.

The head was trained to tell in which bin the mean absolute error of an atom's force components lies. With the
probabilities p_b and the centres c_b of the bins, and for normal errors, where σ = √(π/2) E|e|,

    σ_i = √(π/2) Σ_b p_b c_b.

The estimate saturates at the last edge (0.3 or 0.4 eV/Å): larger errors were left out of the head's training, so it
cannot tell a bad atom from a hopeless one. The probability of the last bin is a second score beside σ², an alarm that
keeps rising after σ has levelled off; it is not a bound on the error. Source: Rhodes et al. 2025 (orb-v3) and the code
of orb-models; the conversion to a standard deviation is our own.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import InputError
from ase_uq.forward_pass import ConfidenceBins, ForwardPass, Targets
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods._distance import MeanOverAtoms
from ase_uq.methods.base import Accumulator, Head, Implied, Method, Raw

# Added to the probability of the last bin: smaller probabilities from a softmax carry no information.
_SMALLEST_TAIL = 1e-3


class ConfidenceHead(Head):
    """The expected squared error of each atom, and the probability of the last bin as a second score.

    Args:
        settings: `mean_square`, the mean σ² over the fitted atoms, (eV/Å)².
    """

    grows = False

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        settings.positive("mean_square")
        return Implied({"forces": 2, "energy": 1, "stress": 1})

    def forward(self, forward_pass: ForwardPass) -> Raw:
        confidence = _confidence_of(forward_pass)
        variance = expected_variance(confidence)
        tail = confidence.probabilities[:, -1].double() + _SMALLEST_TAIL
        distance = variance / self._settings["mean_square"]
        mean = forward_pass.sum_over_atoms(distance[:, None]) / forward_pass.n_atoms_of_frame[:, None]
        return Raw(
            forces=torch.stack([variance, tail], 1)[:, None, :],
            energy=mean,
            energies=distance,
            stress=mean,
            distance=distance,
        )


@dataclass(frozen=True)
class Confidence(Method):
    """Reads the potential's own confidence head; it has no hyper-parameters."""

    name = "confidence"
    head = ConfidenceHead

    def start(self) -> "ConfidenceAccumulator":
        return ConfidenceAccumulator()


def expected_variance(confidence: ConfidenceBins) -> Tensor:
    """(n_atoms,) σ² of a force component, (eV/Å)²; float64."""
    edges = confidence.edges.double()
    centres = (edges[1:] + edges[:-1]) / 2
    return math.pi / 2 * (confidence.probabilities.double() @ centres).square()


class ConfidenceAccumulator(Accumulator):
    """Accumulates the mean variance over the atoms."""

    def __init__(self) -> None:
        self.mean = MeanOverAtoms()

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.mean.add(expected_variance(_confidence_of(forward_pass)))

    def _finish(self, communicator: Communicator) -> ConfidenceHead:
        return ConfidenceHead({"mean_square": self.mean.finish(communicator)}, {})


def _confidence_of(forward_pass: ForwardPass) -> ConfidenceBins:
    if forward_pass.confidence is None:
        raise InputError(
            "the confidence method needs a potential with a confidence head, and this one has none. orb-v3 models "
            "have one; for others take another method, for example bll."
        )
    return forward_pass.confidence
