"""Turns labelled frames into this rank's forward passes, each with its targets."""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_uq.backends.base import Backend
from ase_uq.communicator import Communicator
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.labels import Labels, labels_of
from ase_uq.io.source import Source
from ase_uq.stream.passes import complete, passes


class LabelledStream:
    """Evaluates labelled frames batch by batch; may be iterated again.

    Args:
        backend: The potential.
        frames: Frames of all ranks.
        communicator: Decides which batches belong to this rank.
        batch_atoms: Largest number of atoms in a batch.
        forces: Whether the potential's forces are needed, or only features and energies.
        gradients: Whether `ForwardPass.gradients` are needed.
        keys: Names of the labels, as in `labels_of`.
        title: Title of the progress bar; empty for none.
        name: Word for a frame in messages.

    Raises:
        InputError: On iteration, at a frame that the potential cannot evaluate, or whose results are not finite.
    """

    def __init__(
        self,
        backend: Backend,
        frames: Sequence[Atoms],
        communicator: Communicator,
        *,
        batch_atoms: int | None,
        forces: bool,
        gradients: bool = False,
        keys: tuple[str, str, str] | None = None,
        title: str = "",
        name: str = "frame",
    ) -> None:
        self._backend, self._frames, self._keys, self._name = backend, frames, keys, name
        self._how = {
            "communicator": communicator,
            "batch_atoms": batch_atoms,
            "forces": forces,
            "gradients": gradients,
            "title": title,
        }

    def __iter__(self) -> Iterator[tuple[ForwardPass, Targets]]:
        events = passes(self._backend, Source(self._frames), lambda forward_pass: forward_pass, **self._how)
        for batch in complete(events, self._name):
            labels = [labels_of(atoms, self._keys) for atoms in batch.frames]
            yield batch.value, targets_of(labels, batch.value, batch.numbers[0])


def predicted_forces(
    backend: Backend, frames: Sequence[Atoms], batch_atoms: int | None, name: str = "frame"
) -> np.ndarray:
    """(n_atoms, 3) forces of all frames, one frame after the other, eV/Å; `name` is the word for a frame in messages.

    Raises:
        InputError: The potential cannot evaluate a frame, or its results are not finite.
    """
    events = passes(backend, Source(frames), _forces, batch_atoms=batch_atoms)
    return np.concatenate([batch.value for batch in complete(events, name)])


def _forces(forward_pass: ForwardPass) -> np.ndarray:
    assert forward_pass.forces is not None
    return forward_pass.forces.double().cpu().numpy()


def targets_of(labels: Sequence[Labels], forward_pass: ForwardPass, first: int = 0) -> Targets:
    """Reference values of a batch as float64 tensors on the device of its forward pass.

    Args:
        labels: Labels of each frame.
        forward_pass: Forward pass of the batch.
        first: Number of its first frame.
    """
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
    """One tensor with the values of all frames, NaN for frames without a value; None if no frame has one."""
    if all(value is None for value in values):
        return None
    filled = [np.full(shape, np.nan if v is None else v) for v, shape in zip(values, shapes, strict=True)]
    joined = np.concatenate(filled) if len(shapes[0]) == 2 else np.stack(filled)
    return torch.from_numpy(joined).to(forward_pass.energy.device)
