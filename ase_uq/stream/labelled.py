"""Labelled frames → this rank's evaluated batches."""

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from tqdm import tqdm

from ase_uq.backends.base import Backend
from ase_uq.communicator import Communicator, shard
from ase_uq.forward_pass import Evaluation, Targets
from ase_uq.io.frames import Labels, labels_of


def batches_of(frames: Iterable[Atoms], batch_atoms: int) -> Iterator[list[Atoms]]:
    """Consecutive frames in batches of at most `batch_atoms` atoms; a larger frame stands alone."""
    batch: list[Atoms] = []
    filled = 0
    for atoms in frames:
        if batch and filled + len(atoms) > batch_atoms:
            yield batch
            batch, filled = [], 0
        batch.append(atoms)
        filled += len(atoms)
    if batch:
        yield batch


class BatchLimit:
    """How much is evaluated together: halved where the device runs out of memory, and carefully grown back.

    Args:
        n_atoms: Most atoms of a batch at the start, and the most it ever grows to.
        n_edges: The same of edges, for dense structures have many more of them; by default 60 for each atom.

    Attributes:
        n_atoms: Most atoms now.
        n_edges: Most edges now.
    """

    _PATIENCE = 20  # batches that must fit before a larger one is tried
    _GROWTH = 1.25

    def __init__(self, n_atoms: int, n_edges: int | None = None) -> None:
        self._most = (float(n_atoms), float(60 * n_atoms if n_edges is None else n_edges))
        self._scale = 1.0
        self._failed = math.inf  # the smallest scale that did not fit
        self._successes = 0

    @property
    def n_atoms(self) -> float:
        return self._most[0] * self._scale

    @property
    def n_edges(self) -> float:
        return self._most[1] * self._scale

    @property
    def is_reduced(self) -> bool:
        """Whether it is lower than at the start."""
        return self._scale < 1

    def fits(self, n_atoms: float, n_edges: float) -> bool:
        """Whether so many may be evaluated together."""
        return n_atoms <= self.n_atoms and n_edges <= self.n_edges

    def halve(self, n_atoms: float, n_edges: float) -> None:
        """After a batch of this size did not fit: from now on half of it."""
        size = min(self._scale, max(n_atoms / self._most[0], n_edges / self._most[1]))
        self._failed, self._scale, self._successes = size, size / 2, 0

    def count_success(self) -> None:
        """After a batch that fitted; many of them in a row let the next ones be larger, short of what failed."""
        self._successes += 1
        if self._scale == 1 or self._successes < self._PATIENCE:
            return
        if self._scale * self._GROWTH > 0.9 * self._failed:
            # Just below what failed it stays, until much has gone well: another process may have left the device.
            if self._successes < 10 * self._PATIENCE:
                return
            self._failed = math.inf
        self._scale, self._successes = min(1.0, self._scale * self._GROWTH), 0


class LabelledStream:
    """Evaluates labelled frames batch by batch; may be iterated again.

    Args:
        backend: The potential.
        frames: All ranks' frames.
        communicator: Decides which batches are this rank's.
        batch_atoms: Most atoms a batch.
        forces: Whether the potential's forces are wanted, or features and energies do.
        gradients: Whether `Evaluation.gradients` are wanted.
        keys: Names of the labels, as in `frames.labels_of`.
        title: What the progress bar says; empty for none.
    """

    def __init__(
        self,
        backend: Backend,
        frames: Sequence[Atoms],
        communicator: Communicator,
        *,
        batch_atoms: int,
        forces: bool,
        gradients: bool = False,
        keys: tuple[str, str, str] | None = None,
        title: str = "",
    ) -> None:
        self._backend = backend
        # A derivative of one structure runs through the graph of its whole batch.
        batches = list(batches_of(frames, 1 if gradients else batch_atoms))
        firsts = np.cumsum([0, *(len(batch) for batch in batches)]).tolist()
        self._batches = shard(list(zip(firsts, batches, strict=False)), communicator)
        self._forces = forces
        self._gradients = gradients
        self._keys = keys
        self._title = title if communicator.rank == 0 else ""

    def __iter__(self) -> Iterator[tuple[Evaluation, Targets]]:
        total = sum(len(batch) for _, batch in self._batches)
        with tqdm(total=total, desc=self._title, unit="frame", disable=not self._title, leave=False) as bar:
            for first, frames in self._batches:
                batch = self._backend.collate(frames, first=first)
                evaluation = self._backend.evaluate(batch, forces=self._forces, gradients=self._gradients)
                yield evaluation, targets_of([labels_of(atoms, self._keys) for atoms in frames], evaluation, first)
                bar.update(len(frames))


def targets_of(labels: Sequence[Labels], evaluation: Evaluation, first: int = 0) -> Targets:
    """Reference values of a batch whose first frame is number `first`, as float64 tensors beside its evaluation."""
    counts = evaluation.n_atoms_of_frame.tolist()
    return Targets(
        frames=torch.arange(first, first + len(counts), device=evaluation.energy.device),
        energy=_joined([label.energy for label in labels], [()] * len(counts), evaluation),
        forces=_joined([label.forces for label in labels], [(count, 3) for count in counts], evaluation),
        stress=_joined([label.stress for label in labels], [(6,)] * len(counts), evaluation),
    )


def _joined(
    values: Sequence[np.ndarray | float | None], shapes: Sequence[tuple[int, ...]], evaluation: Evaluation
) -> Tensor | None:
    """One tensor of all frames' values, NaN for those without; None where all are without."""
    if all(value is None for value in values):
        return None
    filled = [np.full(shape, np.nan if v is None else v) for v, shape in zip(values, shapes, strict=True)]
    joined = np.concatenate(filled) if len(shapes[0]) == 2 else np.stack(filled)
    return torch.from_numpy(joined).to(evaluation.energy.device)
