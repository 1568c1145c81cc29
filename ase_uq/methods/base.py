"""The protocol of a method: labelled, evaluated batches in; a fitted head out; and what a head gives."""

from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import LabelError
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.numerics.buffers import Fitted

Batches = Iterable[tuple[ForwardPass, Targets]]


@dataclass(frozen=True)
class Raw:
    """Uncalibrated, variance-like scores of a batch: non-negative, larger means less certain.

    Several scores of the same quantity stand in the last axis; a calibrator combines them.

    Args:
        forces: (n_atoms, n_components, n_scores) with one component for an isotropic method, three otherwise.
        energy: (n_frames, n_scores) of the energy per atom of a structure.
        energies: (n_atoms,) of the energy of each atom, on the scale of the first score of `energy`.
        stress: (n_frames, n_scores).
        distance: (n_atoms,) scale-free distance from the fitted atoms, mean 1 over them.
    """

    forces: Tensor
    energy: Tensor
    energies: Tensor
    stress: Tensor
    distance: Tensor


class Head(Fitted, ABC):
    """A fitted method.

    Args:
        settings: Hyper-parameters and what the fit found, JSON values.
        tensors: Buffers, by name.

    Attributes:
        gradients: Whether it asks for `ForwardPass.gradients`, which cost passes beyond the potential's own.
        grows: Whether its scores grow with the distance from the training frames, however far. What learns the errors
            of frames, or asks a committee, may say anything out there.
        measures: Whether it has `features`.
    """

    gradients: bool = False
    grows: bool = True
    measures: bool = False

    @abstractmethod
    def forward(self, forward_pass: ForwardPass) -> Raw:
        """Raw uncertainties of a batch, from what one forward pass of the potential gave."""

    def features(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms, width) float64 the space that it measures in, before the training frames made a posterior of it.

        A head that has one, in which the distance between two atoms means something, defines this and `measures`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no features to measure distances in")


class Accumulator(ABC):
    """What a method keeps of the training frames, batch by batch. A subclass defines `_add` and `_finish`.

    Attributes:
        progress: Whether to show bars for what takes long.
    """

    progress: bool = False
    _batches: int = 0

    def add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        """Takes what it needs of a batch."""
        self._batches += 1
        self._add(forward_pass, targets)

    def finish(self, communicator: Communicator) -> Head:
        """The head fitted on the batches of all ranks.

        Raises:
            LabelError: No rank has had a batch.
        """
        batches = torch.tensor([self._batches], dtype=torch.float64)
        if not communicator.sum({"batches": batches})["batches"]:
            raise LabelError("there are no training frames.")
        return self._finish(communicator)

    @abstractmethod
    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        """Takes what it needs of a batch."""

    @abstractmethod
    def _finish(self, communicator: Communicator) -> Head:
        """The head fitted on the batches of all ranks; this one may have had none, but not all."""


class Method(ABC):
    """How to fit. A subclass is a frozen dataclass of hyper-parameters, each with a default, in `methods/<name>.py`.

    Attributes:
        name: What users call it, and the suffix of its results keys.
        head: The class that its settings and tensors make again.
        forces: Whether the fit looks at the potential's forces, which cost a backward pass of conservative ones.
        gradients: Whether it asks for `ForwardPass.gradients`.
    """

    name: str
    head: type[Head]
    forces: bool = False
    gradients: bool = False

    @abstractmethod
    def start(self) -> Accumulator:
        """An accumulator for one fit. All methods of a fit share one pass over the training frames."""

    @classmethod
    def load(cls, settings: dict[str, Any], tensors: dict[str, Tensor]) -> Head:
        """The head with these settings and buffers."""
        return cls.head(settings, tensors)

    def fit(self, batches: Batches, communicator: Communicator) -> Head:
        """Fits on this rank's evaluated batches with their reference values."""
        accumulator = self.start()
        for forward_pass, targets in batches:
            accumulator.add(forward_pass, targets)
        return accumulator.finish(communicator)
