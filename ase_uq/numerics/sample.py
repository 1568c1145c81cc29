"""A bounded sample of atoms that depends neither on batches nor on how these are shared between ranks.

Every atom has a pseudo-random priority, made from the number of its frame and its place in the frame; the
sample consists of the atoms of lowest priority. The union of the samples of several ranks contains the sample of all.
"""

import torch
from torch import Tensor

from ase_uq.communicator import Communicator, gather
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.numerics.hashing import random_bits, random_uniform

_LABELS = 2  # columns before the row itself: number of the frame, place of the atom in the frame


def labels_of_atoms(forward_pass: ForwardPass, targets: Targets) -> Tensor:
    """(n_atoms, 2) for each atom, the number of its frame in the data set and its place in the frame."""
    counts = forward_pass.n_atoms_of_frame
    first = (counts.cumsum(0) - counts)[forward_pass.frame_of_atom]
    place = torch.arange(len(forward_pass.numbers), device=first.device) - first
    return torch.stack([targets.frames[forward_pass.frame_of_atom], place], 1)


class RowSample:
    """Rows of at most `limit` atoms; of all atoms if there are no more than that.

    Args:
        limit: Largest number of rows.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._pieces: list[Tensor] = []  # (n, 2 + width) float64, labels first
        self._bound = float("inf")  # atoms of higher priority are known not to be in the sample

    def add(self, labels: Tensor, rows: Tensor) -> None:
        """Adds atoms with their labels (n, 2), from `labels_of_atoms`, and their rows (n, width)."""
        chosen = _priority(labels) <= self._bound
        piece = torch.cat([labels[chosen].double(), rows[chosen].double()], 1)
        if not len(piece):
            return
        self._pieces.append(piece)
        # Trimmed only at twice the limit, so that for most batches nothing but the new rows is copied.
        if sum(len(piece) for piece in self._pieces) >= 2 * self._limit:
            self._trim()

    def finish(self, communicator: Communicator) -> Tensor | None:
        """(n, width) float64 sample of all ranks, ordered by frame and place, or None if no rank has an atom."""
        if self._pieces:
            self._trim()
        gathered = gather(self._pieces[0] if self._pieces else None, communicator)
        if gathered is None:
            return None
        kept = gathered[self._lowest(gathered)]
        # Ordered by frame, and within a frame by place: two stable sorts, the less important one first.
        for column in (1, 0):
            kept = kept[kept[:, column].argsort(stable=True)]
        return kept[:, _LABELS:]

    def _trim(self) -> None:
        rows = torch.cat(self._pieces)
        lowest = self._lowest(rows)
        self._pieces = [rows[lowest]]
        if len(lowest) == self._limit:
            self._bound = float(_priority(self._pieces[0]).max())

    def _lowest(self, rows: Tensor) -> Tensor:
        return _priority(rows).argsort(stable=True)[: self._limit]


def _priority(labels: Tensor) -> Tensor:
    """(n, 2 or more) → (n,) pseudo-random numbers between 0 and 1."""
    frames, places = labels[:, :_LABELS].long().T
    return random_uniform(random_bits(random_bits(frames) + places))
