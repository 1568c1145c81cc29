"""Mean distance to the nearest training atoms of the same element.

    d_i = mean over the k nearest training atoms j of ‖(x_i - x_j)/s‖,    s the spread of each feature in training

The score is d², since scores are variances. No shape of the density is assumed; the price is that training atoms are
kept.
Source: the latent distance of Hu, Musielewicz, Ulissi and Medford 2022, per element.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods._distance import DistanceHead, elements_of_all, rows_of, units_of
from ase_uq.methods.base import Accumulator, Method
from ase_uq.numerics.sample import RowSample, labels_of_atoms

_CHUNK = 2**24  # distances computed at once: 128 MiB


class KNNHead(DistanceHead):
    """The standardised training atoms, sorted by element.

    Args:
        settings: `neighbours`, `scale`, by which the squares are divided, and `atoms`, the number kept per element.
        tensors: `elements` (n_elements,) ascending atomic numbers; `units` (d,) of the features; `rows`
            (n_rows, d) the training atoms in these units.
    """

    elements: Tensor
    units: Tensor
    rows: Tensor

    @classmethod
    def check_distance(cls, settings: Entries, tensors: StoredTensors) -> tuple[int, list[int]]:
        settings.whole("neighbours", 1)
        settings.positive("scale")
        elements = tensors.elements("elements")
        width = len(tensors.take("units", None, low=SMALLEST))
        tensors.take("rows", sum(settings.wholes("atoms", 1, length=len(elements))), width)
        return width, elements.tolist()

    def distance(self, forward_pass: ForwardPass) -> Tensor:
        queries = forward_pass.features.double() / self.units
        places = rows_of(forward_pass.numbers, self.elements)
        # The last piece, all rows, serves elements that were not fitted.
        pieces = [*self.rows.split(self._settings["atoms"]), self.rows]
        distance = torch.zeros_like(queries[:, 0])
        for place in places.unique().tolist():
            same = places == place
            distance[same] = mean_distance(queries[same], pieces[place], self._settings["neighbours"])
        return distance.square() / self._settings["scale"]


@dataclass(frozen=True)
class KNN(Method):
    """Keeps training atoms to measure distances from.

    The spread of a feature is its spread within the elements. A training atom counts among its own neighbours. The
    atoms of an element that was not fitted are measured from the training atoms of all elements.

    Args:
        neighbours: Number of neighbours k, or the number of atoms of an element if it has fewer.
        rows: Maximum number of atoms kept per element; if there are more, a pseudo-random sample of them. The head
            holds elements * rows * features numbers of 8 bytes.
    """

    name = "knn"
    head = KNNHead
    neighbours: int = 10
    rows: int = 5_000

    def __post_init__(self) -> None:
        if not self.neighbours >= 2:
            raise ValueError(
                f"neighbours is 2 or more, not {self.neighbours!r}: the nearest to a training atom is that atom itself."
            )
        if not self.rows >= self.neighbours:
            raise ValueError(f"rows is at least the number of neighbours, {self.neighbours}, not {self.rows!r}.")

    def start(self) -> "KNNAccumulator":
        return KNNAccumulator(self)


def mean_distance(queries: Tensor, rows: Tensor, neighbours: int) -> Tensor:
    """(n, d), (n_rows, d) → (n,) mean Euclidean distance to the nearest rows, in chunks of bounded memory."""
    count = min(neighbours, len(rows))
    means = []
    for some in queries.split(max(1, _CHUNK // len(rows))):
        nearest = torch.cdist(some, rows).topk(count, largest=False).indices
        # cdist subtracts large squares, which loses half of the digits where atoms are close: distances are recomputed.
        means.append((some[:, None] - rows[nearest]).norm(dim=2).mean(1))
    return torch.cat(means)


class KNNAccumulator(Accumulator):
    """Collects a bounded sample of the atoms of each element."""

    def __init__(self, method: KNN) -> None:
        self.method = method
        self.samples: dict[int, RowSample] = {}
        self.device = torch.device("cpu")

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.device = forward_pass.features.device
        labels = labels_of_atoms(forward_pass, targets)
        for z in forward_pass.numbers.unique().tolist():
            same = forward_pass.numbers == z
            self.samples.setdefault(z, RowSample(self.method.rows)).add(labels[same], forward_pass.features[same])

    def _finish(self, communicator: Communicator) -> KNNHead:
        elements = elements_of_all(self.samples, communicator)
        empty = RowSample(self.method.rows)
        samples = [self.samples.get(z, empty).finish(communicator) for z in elements]
        # A rank may lack an element that other ranks have; it gets their rows on the CPU.
        pieces = [piece.to(self.device) for piece in samples if piece is not None]
        units = units_of(torch.cat([piece - piece.mean(0) for piece in pieces]).square().mean(0))
        pieces = [piece / units for piece in pieces]
        squares = torch.cat([mean_distance(piece, piece, self.method.neighbours).square() for piece in pieces])
        settings = {
            "neighbours": self.method.neighbours,
            "scale": max(float(squares.mean()), 1e-300),
            "atoms": [len(piece) for piece in pieces],
        }
        tensors = {"elements": torch.tensor(elements, device=units.device), "units": units, "rows": torch.cat(pieces)}
        return KNNHead(settings, tensors)
