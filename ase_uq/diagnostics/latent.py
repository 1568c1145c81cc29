"""The latent map: where frames lie in the space of a potential's features, seen along its two widest directions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.stream.passes import complete, passes


@dataclass(frozen=True)
class LatentMap:
    """Frames in the plane of the first two principal components.

    Args:
        coordinates: (n_frames, 2) coordinates by group, in the unit of the features.
        explained: (2,) share of the variance along each component.
    """

    coordinates: Mapping[str, np.ndarray]
    explained: np.ndarray


def frame_features(backend: Backend, frames: Sequence[Atoms], *, batch_atoms: int | None = None) -> np.ndarray:
    """(n_frames, n_features) features of the potential, averaged over the atoms of each frame.

    Args:
        backend: The potential.
        frames: The frames.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.

    Raises:
        InputError: A frame cannot be evaluated.
    """
    events = passes(backend, Source(frames), _means, batch_atoms=batch_atoms, forces=False)
    return np.concatenate([batch.value for batch in complete(events)])


def _means(forward_pass: ForwardPass) -> np.ndarray:
    """(n_frames, n_features) features of one batch, averaged over the atoms of each frame."""
    sums = forward_pass.sum_over_atoms(forward_pass.features.double())
    return (sums / forward_pass.n_atoms_of_frame[:, None]).cpu().numpy()


def principal_plane(features: Mapping[str, np.ndarray]) -> LatentMap:
    """Projects groups of frames onto their first two principal components.

    All groups have the same weight, however many frames they have.

    Args:
        features: (n_frames, n_features) features by group.

    Raises:
        ValueError: There is no group, or a group has no frames.
    """
    if not features or not all(len(rows) for rows in features.values()):
        raise ValueError("a latent map needs at least one group, and frames in each of them.")
    centre = np.mean([rows.mean(0) for rows in features.values()], axis=0)
    weighted = np.concatenate([(rows - centre) / np.sqrt(len(rows)) for rows in features.values()])
    _, spread, axes = np.linalg.svd(weighted, full_matrices=False)
    # A single frame or feature has only one component; the second is then 0.
    axes = np.concatenate([axes[:2], np.zeros((max(0, 2 - len(axes)), axes.shape[1]))])
    variance = np.pad(spread, (0, 2))[:2] ** 2
    # The sign of a principal component is arbitrary: its largest entry is made positive.
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1, 1)
    total = max(float(np.sum(spread**2)), np.finfo(float).tiny)
    return LatentMap({name: (rows - centre) @ axes.T for name, rows in features.items()}, variance / total)


def evenly[T](frames: Sequence[T], most: int) -> list[T]:
    """At most `most` of the frames, evenly spaced, including the first and the last."""
    if len(frames) <= most:
        return list(frames)
    return [frames[i] for i in np.linspace(0, len(frames) - 1, most).round().astype(int)]
