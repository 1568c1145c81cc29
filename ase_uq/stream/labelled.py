"""Labelled frames → this rank's evaluated batches."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from tqdm import tqdm

from ase_uq.backends.base import Backend
from ase_uq.communicator import Communicator, shard
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.labels import Labels, labels_of
from ase_uq.stream.limits import batches_of


class LabelledStream:
    """Evaluates labelled frames batch by batch; may be iterated again.

    Args:
        backend: The potential.
        frames: All ranks' frames.
        communicator: Decides which batches are this rank's.
        batch_atoms: Most atoms a batch.
        forces: Whether the potential's forces are wanted, or features and energies do.
        gradients: Whether `ForwardPass.gradients` are wanted.
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

    def __iter__(self) -> Iterator[tuple[ForwardPass, Targets]]:
        total = sum(len(batch) for _, batch in self._batches)
        with tqdm(total=total, desc=self._title, unit="frame", disable=not self._title, leave=False) as bar:
            for first, frames in self._batches:
                batch = self._backend.collate(frames, first=first)
                forward_pass = self._backend.forward(batch, forces=self._forces, gradients=self._gradients)
                yield forward_pass, targets_of([labels_of(atoms, self._keys) for atoms in frames], forward_pass, first)
                bar.update(len(frames))


def targets_of(labels: Sequence[Labels], forward_pass: ForwardPass, first: int = 0) -> Targets:
    """Reference values of a batch whose first frame is number `first`, as float64 tensors beside its forward pass."""
    counts = forward_pass.n_atoms_of_frame.tolist()
    return Targets(
        frames=torch.arange(first, first + len(counts), device=forward_pass.energy.device),
        energy=_joined([label.energy for label in labels], [()] * len(counts), forward_pass),
        forces=_joined([label.forces for label in labels], [(count, 3) for count in counts], forward_pass),
        stress=_joined([label.stress for label in labels], [(6,)] * len(counts), forward_pass),
    )


def _joined(
    values: Sequence[np.ndarray | float | None], shapes: Sequence[tuple[int, ...]], forward_pass: ForwardPass
) -> Tensor | None:
    """One tensor of all frames' values, NaN for those without; None where all are without."""
    if all(value is None for value in values):
        return None
    filled = [np.full(shape, np.nan if v is None else v) for v, shape in zip(values, shapes, strict=True)]
    joined = np.concatenate(filled) if len(shapes[0]) == 2 else np.stack(filled)
    return torch.from_numpy(joined).to(forward_pass.energy.device)
