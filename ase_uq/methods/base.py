"""The protocol of a method: labelled, evaluated batches go in, a fitted head comes out, and the head gives `Raw`."""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import LabelError
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.numerics.buffers import Fitted
from ase_uq.numerics.draws import Draws

Batches = Iterable[tuple[ForwardPass, Targets]]


@dataclass(frozen=True)
class Raw:
    """Uncalibrated, variance-like scores of a batch: non-negative, larger means less certain.

    Several scores of the same quantity lie along the last axis; a calibrator combines them.

    Args:
        forces: (n_atoms, n_components, n_scores) with one component for an isotropic method, three otherwise.
        energy: (n_frames, n_scores) scores of the energy per atom of each structure.
        energies: (n_atoms,) scores of the energy of each atom, on the scale of the first score of `energy`.
        stress: (n_frames, n_scores) scores of the stress of each structure.
        distance: (n_atoms,) scale-free distance from the fitted atoms, with mean 1 over them. With a far field it is
            the score of the energy of each atom too.
    """

    forces: Tensor
    energy: Tensor
    energies: Tensor
    stress: Tensor
    distance: Tensor

    def mean_distance(self, forward_pass: ForwardPass) -> Tensor:
        """(n_frames, 1) mean distance of the atoms of each structure."""
        total = forward_pass.sum_over_atoms(self.distance[:, None])
        return total / forward_pass.n_atoms_of_frame[:, None]


@dataclass(frozen=True)
class Deviations:
    """Changes of forces and stresses by draws of a posterior: float64, on one scale for a structure, members last.

    Args:
        forces: (n_atoms, 3, n_members).
        stress: (n_frames, 6, n_members), Voigt, or None; it means nothing for a frame without a cell.
    """

    forces: Tensor
    stress: Tensor | None = None


@dataclass(frozen=True)
class Implied:
    """What the file of a head says of the rest of the file; None where it says nothing.

    Args:
        scores: Number of scores of `forces`, `energy` and `stress`, which calibrators combine.
        width: Number of latent features of an atom.
        elements: Atomic numbers of the fitted atoms, ascending.
    """

    scores: dict[str, int] | None = None
    width: int | None = None
    elements: list[int] | None = None


class Head(Fitted, ABC):
    """A fitted method.

    Args:
        settings: Hyper-parameters and results of the fit, as JSON values.
        tensors: Buffers, by name.

    Attributes:
        gradients: Whether the head needs `ForwardPass.gradients`, which cost passes beyond the potential's own.
        grows: Whether its scores grow all the way to frames that the potential knows nothing of. A head that learns
            errors, or that asks a committee, may say anything there.
        measures: Whether the head has `features`.
        correlates: Whether the head has `energy_rows` and `deviations`.
        differentiates: Whether its `deviations` need `ForwardPass.gradients`.
        strains: Whether its `deviations` are of stresses too, where the potential has some.
        estimates: Whether the head has `estimate`.
    """

    gradients: bool = False
    grows: bool = True
    measures: bool = False
    correlates: bool = False
    differentiates: bool = False
    strains: bool = False
    estimates: bool = False

    @abstractmethod
    def forward(self, forward_pass: ForwardPass) -> Raw:
        """Raw uncertainties of a batch, from the results of one forward pass of the potential."""

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        """Refuses settings and tensors of a file from which no head can be made that gives finite scores.

        A head whose file is checked no further has every buffer that its class annotates, and finite ones only. One
        with buffers that may be absent, or with more to say, overrides this.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        for name in _annotated(cls):
            if name not in tensors:
                raise WrongEntry(f"there is no tensor {tensors.prefix}{name}")
        tensors.finite()
        return Implied()

    def features(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms, width) float64 coordinates in the space that the head measures in, before any posterior.

        A head with such a space, where the distance between two atoms is meaningful, defines this and `measures`.
        """
        raise NotImplementedError(f"{type(self).__name__} has no features to measure distances in")

    def energy_rows(self, forward_pass: ForwardPass) -> Tensor:
        """(n_frames, width) float64 rows whose products are covariances of energies per atom, on any one scale.

        A head with a posterior that two structures share defines this and `correlates`.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how errors of energies are correlated")

    def estimate(self, n_probes: int) -> None:
        """From now on estimates variances that cost many backward passes from `n_probes` of them; 0 for all."""
        raise NotImplementedError(f"{type(self).__name__} has no variances to estimate")

    def deviations(self, forward_pass: ForwardPass, draws: Draws, n_members: int) -> Deviations:
        """Changes of forces and stresses by the first draws.

        Those of conservative potentials are the slopes of `energy_rows @ draws("energy", ...)`, times the number of
        atoms.
        """
        raise NotImplementedError(f"{type(self).__name__} does not say how errors of forces are correlated")


def _annotated(head: type[Head]) -> list[str]:
    """Names that a class and those above it annotate as tensors."""
    tensors = (Tensor, "Tensor", "torch.Tensor")
    return [name for c in head.__mro__ for name, kind in inspect.get_annotations(c).items() if kind in tensors]


class Accumulator(ABC):
    """Collects what a method keeps of the training frames, batch by batch. A subclass defines `_add` and `_finish`.

    Attributes:
        progress: Whether to show progress bars for long steps.
    """

    progress: bool = False
    _batches: int = 0

    def add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        """Takes what the method needs from a batch."""
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
        """Takes what the method needs from a batch."""

    @abstractmethod
    def _finish(self, communicator: Communicator) -> Head:
        """The head fitted on the batches of all ranks; at least one rank has had a batch, not necessarily this one."""


class Method(ABC):
    """A way to fit uncertainties: a frozen dataclass of hyper-parameters, each with a default, in `methods/<name>.py`.

    Attributes:
        name: The name that users give, and the suffix of the method's results keys.
        head: The class of head that is rebuilt from saved settings and tensors.
        forces: Whether the fit needs the potential's forces, which cost a backward pass if they are conservative.
        gradients: Whether the fit needs `ForwardPass.gradients`.
        labels: Whether the fit needs reference values of the training frames.
    """

    name: str
    head: type[Head]
    labels: bool = False
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
