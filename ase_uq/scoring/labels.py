"""The labels of a frame that is scored: written beside the potential's results, under names of their own."""

import warnings
from contextlib import suppress
from typing import Any

import numpy as np
from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.errors import LabelError, UQWarning
from ase_uq.io.labels import LABEL_KEYS, Labels, check_labels, drop_labels, labels_of, other_head
from ase_uq.io.results import has_uncertainties, uncertainties_belong
from ase_uq.prediction import Prediction

# The same potential on another device or in another precision; labels differ by more than a hundredth.
_SAME_FORCES = 1e-3
_SAME_ENERGY = 1e-5, 1e-6  # eV an atom, and share of the energy
_NO_FORCES = 1e-3  # eV/Å; forces this small, as in a perfect crystal, tell nothing


def with_labels(number: int, atoms: Atoms, prediction: Prediction, backend: Backend, named: set[str]) -> Atoms:
    """The frame as it is written: labels under ASE's names, whose place the results take, become `REF_*`.

    Energy and forces that the potential itself gave, as in a trajectory that it made, are no labels. Neither are those
    of another head of the potential.

    Args:
        number: Number of the frame, for messages.
        atoms: The frame; not changed.
        prediction: Its results.
        backend: The potential.
        named: Heads whose labels a warning has named; added to.
    """
    head = other_head(atoms, backend.heads, backend.head)
    if head and any(key in atoms.info or key in atoms.arrays for key in LABEL_KEYS[0]):
        if head not in named:
            named.add(head)
            warnings.warn(
                f"frame {number} is labelled for head {head!r} of the potential, which predicts with head "
                f"{backend.head!r} here: the labels of such frames are not written beside these results.",
                UQWarning,
                stacklevel=2,
            )
        atoms = atoms.copy()
        drop_labels(atoms)
    # A frame of an earlier scoring or of a watched run has the results of that potential.
    if head or (has_uncertainties(atoms) and uncertainties_belong(atoms)):
        return atoms
    with suppress(LabelError):  # those of another structure, or of another shape
        results = labels_of(atoms, LABEL_KEYS[1])
        if (results.energy is not None or results.forces is not None) and not _is_own(results, prediction):
            return _renamed(atoms, labels_of(atoms))
    return atoms


def _is_own(labels: Labels, prediction: Prediction) -> bool:
    forces, energy = prediction["forces"], prediction["energy"]
    size = float(np.linalg.norm(forces))
    if labels.forces is not None and labels.forces.shape == forces.shape and size > _NO_FORCES * len(forces) ** 0.5:
        return float(np.linalg.norm(labels.forces - forces)) < _SAME_FORCES * size
    per_atom, share = _SAME_ENERGY
    return labels.energy is None or abs(labels.energy - energy) < per_atom * len(forces) + share * abs(energy)


def _renamed(atoms: Atoms, labels: Labels) -> Atoms:
    check_labels("a frame", atoms, labels)
    copy = atoms.copy()
    values: tuple[Any, ...] = (labels.energy, labels.forces, labels.stress)
    for name, store, value in zip(LABEL_KEYS[0], (copy.info, copy.arrays, copy.info), values, strict=True):
        if value is not None and name not in store:
            store[name] = value
    return copy
