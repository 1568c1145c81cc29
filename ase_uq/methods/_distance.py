"""Shared parts of the methods whose only score is one distance of each atom from the fitted atoms."""

from abc import abstractmethod
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods.base import Head, Implied, Raw
from ase_uq.numerics.sites import RADII, around

# A feature that never varied in training gets this share of the largest spread as its unit: any change in it then
# counts as far from anything seen, but the distance does not overflow.
_SMALLEST_SPREAD = 1e-6
_LARGEST_NUMBER = 118

# Weight of the mean over the receptive field beside the sites within a radius. Between 0.2 and 1 the errors at silicon
# surfaces are covered equally well, without this term five times worse; on molecules it changes little.
REACH = 0.3


def raw_of_atoms(distance: Tensor, forward_pass: ForwardPass, radii: Sequence[float], reach: float = REACH) -> Raw:
    """Scores forces by the distance and its sums over sites, energies per atom and stresses by its mean.

    The scores of forces are s_k + reach · n_k · m, with s_k the sum of the distances within radius k, n_k the same sum
    of ones, and m the mean over the receptive field. Far sites hardly affect a force, but where the potential knows
    them a thousand times less well than the near ones, as around the centre of a slab, they cause the error.

    Args:
        distance: (n_atoms,) variance-like, with mean 1 over the fitted atoms.
        forward_pass: The batch.
        radii: Radii of the sums, Å.
        reach: Weight of the mean over the receptive field.
    """
    sites = around(distance, forward_pass.edges, radii)
    counts = forward_pass.n_atoms_of_frame.double()[:, None]
    mean = forward_pass.sum_over_atoms(distance[:, None]) / counts
    return Raw(
        forces=(sites.sums + reach * sites.counts * sites.hops[:, -1:])[:, None, :],
        energy=mean,
        energies=distance,
        stress=mean,
        distance=distance,
    )


class DistanceHead(Head):
    """A fitted method that gives every atom a distance; forces use it and its sums over nearby sites.

    A subclass annotates its buffers and defines `distance`.

    Args:
        settings: Hyper-parameters and results of the fit, as JSON values; `radii` and `reach` of `raw_of_atoms` are
            added.
        tensors: Buffers, by name.
    """

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__({"radii": list(RADII), "reach": REACH, **settings}, tensors)

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        radii = RADII
        if "radii" in settings:  # since version 0.2
            radii = settings.numbers("radii", SMALLEST)
        if "reach" in settings:
            settings.number("reach", 0)
        width, elements = cls.check_distance(settings, tensors)
        return Implied({"forces": 1 + len(radii), "energy": 1, "stress": 1}, width, elements)

    @classmethod
    def check_distance(cls, settings: Entries, tensors: StoredTensors) -> tuple[int | None, list[int] | None]:
        """The part of `check` about `distance`; returns the number of latent features and the fitted elements."""
        return super().check(settings, tensors).width, None

    @abstractmethod
    def distance(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms,) float64 distance, variance-like, with mean 1 over the fitted atoms."""

    def forward(self, forward_pass: ForwardPass) -> Raw:
        return raw_of_atoms(self.distance(forward_pass), forward_pass, self._settings["radii"], self._settings["reach"])


class MeanOverAtoms:
    """The mean of a number that every atom has, over the atoms of all batches and ranks."""

    def __init__(self) -> None:
        self._total = torch.zeros(2, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Takes (n_atoms,) values."""
        self._total += torch.stack([values.sum(), values.new_tensor(len(values))]).cpu()

    def finish(self, communicator: Communicator) -> float:
        """The mean; at least one atom must have been added."""
        total, count = communicator.sum({"total": self._total})["total"].tolist()
        return total / count


def units_of(mean_squares: Tensor) -> Tensor:
    """(n_features,) unit of each feature: its spread, or the smallest unit that is allowed."""
    spread = mean_squares.clamp(min=0).sqrt()
    return spread.clamp(min=_SMALLEST_SPREAD * float(spread.max().clamp(min=1e-300)))


def elements_of_all(numbers: Iterable[int], communicator: Communicator) -> list[int]:
    """Atomic numbers, ascending, of the elements that any rank has."""
    present = torch.zeros(_LARGEST_NUMBER + 1, dtype=torch.float64)
    present[list(numbers)] = 1.0
    return torch.nonzero(communicator.sum({"present": present})["present"]).flatten().tolist()


def rows_of(numbers: Tensor, elements: Tensor) -> Tensor:
    """(n_atoms,) index of each atom's element in the ascending `elements`, or `len(elements)` for any other element."""
    place = torch.searchsorted(elements, numbers.to(elements)).clamp(max=len(elements) - 1)
    return torch.where(elements[place] == numbers, place, len(elements))
