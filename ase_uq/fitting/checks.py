"""Checks the frames of a fit before it begins."""

import hashlib
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.communicator import Communicator, gather
from ase_uq.errors import LabelError, UQWarning
from ase_uq.fitting.provenance import digest_of
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.frames import Frames, read_frames
from ase_uq.io.labels import check_labels, labels_of, refuse_other_heads, refuse_own_forces
from ase_uq.methods.base import Method
from ase_uq.stream.labelled import predicted_forces

FEWEST_FRAMES = 10
# Residuals this many times as large as the forces mean other units, another potential or other atoms.
_SUSPICIOUS_RATIO = 10.0
_NO_FORCE = 0.01  # eV/Å; where symmetry forbids a force, that of the potential is smaller


Files = Frames | Sequence[str | os.PathLike[str]]


@dataclass(frozen=True)
class Sets:
    """The frames of a fit.

    Args:
        train: Training frames; None where heads are there already.
        calibration: Calibration frames.
        perturbed: Deliberately bad frames; None for none.
    """

    train: list[Atoms] | None
    calibration: list[Atoms]
    perturbed: list[Atoms] | None

    @classmethod
    def read(cls, train: Files | None, calibration: Files, perturbed: Files | None) -> "Sets":
        """Those in files or lists, without isolated atoms.

        Raises:
            LabelError: A file is missing, empty or unreadable.
        """
        given = {"training": train, "calibration": calibration, "perturbed": perturbed}
        found = [
            None if frames is None else without_isolated_atoms(read_frames(frames, name=f"{name} frames"))
            for name, frames in given.items()
        ]
        assert found[1] is not None
        return cls(found[0], found[1], found[2])

    def check(
        self,
        backend: Backend,
        makers: Sequence[Method],
        keys: tuple[str, str, str] | None,
        batch_atoms: int | None,
        communicator: Communicator,
    ) -> None:
        """Refuses what cannot be fitted on, before minutes are spent on it.

        Args:
            backend: The potential.
            makers: Methods that are to be fitted on the training frames.
            keys: Names of the labels.
            batch_atoms: Largest number of atoms evaluated together.
            communicator: The ranks.

        Raises:
            LabelError: There are too few frames, labels are missing or not finite, or the potential's own forces,
                calibration frames are training frames, or ranks differ.
            InputError: The potential cannot evaluate a frame.
        """
        sets = {"training": self.train, "calibration": self.calibration, "perturbed": self.perturbed}
        given = {f"{name} frames": frames for name, frames in sets.items() if frames is not None}
        check_ranks_agree(communicator, backend, given, keys)
        if self.train is not None:
            # Without labels in either set, their names are wrong.
            calibrates = bool(self.calibration) and labels_of(self.calibration[0], keys).forces is not None
            needed_by = [method.name for method in makers if method.labels] if calibrates else None
            check_labelled(backend, "training", self.train, keys, forces=False, needed_by=needed_by)
        check_labelled(backend, "calibration", self.calibration, keys, forces=True)
        if self.train is not None:
            refuse_overlap(self.train, self.calibration)
        if self.perturbed is not None:
            check_labelled(backend, "perturbed", self.perturbed, keys, forces=True)
            backend.check(self.perturbed, name="perturbed structure")
        check_first_frames(backend, self.train, self.calibration, keys, batch_atoms)


def without_isolated_atoms(frames: list[Atoms]) -> list[Atoms]:
    """The frames without the isolated atoms that training sets contain for their energies."""
    return [atoms for atoms in frames if atoms.info.get("config_type") != "IsolatedAtom"]


def check_ranks_agree(
    communicator: Communicator, backend: Backend, sets: Mapping[str, list[Atoms]], keys: tuple[str, str, str] | None
) -> None:
    """Refuses ranks with other frames, labels or another potential, from which sums would be made all the same.

    Args:
        communicator: The ranks.
        backend: The potential of this one.
        sets: Frames of this one by their name.
        keys: Names of their labels.

    Raises:
        LabelError: Two ranks differ.
    """
    if communicator.size == 1:
        return
    told = {"potential": backend.identity.fingerprint}
    for name, frames in sets.items():
        digest = hashlib.sha256()
        for atoms in frames:
            labels = labels_of(atoms, keys)
            digest.update(digest_of(atoms).encode())
            for values in (labels.energy, labels.forces, labels.stress):
                digest.update(b"none" if values is None else np.asarray(values, float).tobytes())
        told[name] = digest.hexdigest()
    for what, text in told.items():
        mine = torch.zeros(communicator.size, dtype=torch.float64)
        # Six bytes are a whole number that float64 holds.
        mine[communicator.rank] = int.from_bytes(hashlib.sha256(text.encode()).digest()[:6])
        of_ranks = communicator.sum({what: mine})[what]
        if other := (of_ranks != of_ranks[0]).nonzero()[:, 0].tolist():
            raise LabelError(
                f"the {what} of rank {other[0]} {'is not that' if what == 'potential' else 'are not those'} of rank 0. "
                "Give all ranks the same files."
            )


def check_labelled(
    backend: Backend,
    what: str,
    frames: list[Atoms],
    keys: tuple[str, str, str] | None,
    *,
    forces: bool,
    needed_by: Sequence[str] | None = None,
) -> None:
    """Refuses too few frames, and frames without the labels that the fit needs, or with those of another head.

    Args:
        backend: The potential.
        what: Name of the frames in error texts, such as "training".
        frames: The frames.
        keys: Names of their labels.
        forces: Whether forces are needed, or an energy will do.
        needed_by: Names of the methods that need labels of these frames; if there are none, frames of which not one
            has labels will do. None if the fit itself needs them.

    Raises:
        LabelError: There are too few frames, or a frame lacks a label or has an unusable one, or one of another head.
    """
    if len(frames) < FEWEST_FRAMES:
        raise LabelError(
            f"there are {len(frames)} {what} frames; at least {FEWEST_FRAMES} are needed, a few hundred are better."
        )
    every = [labels_of(atoms, keys, f"{what} frame {index}") for index, atoms in enumerate(frames)]
    if needed_by == [] and all(labels.forces is None and labels.energy is None for labels in every):
        return
    for index, (atoms, labels) in enumerate(zip(frames, every, strict=True)):
        which = f"{what} frame {index}"
        if labels.forces is None and (forces or labels.energy is None):
            wanted = "forces" if forces else "energy or forces"
            names = ", ".join(keys) if keys else "REF_energy and REF_forces, or energy and forces"
            raise LabelError(
                f"{which} has no reference {wanted}. Looked for {names}; its info has "
                f"{sorted(atoms.info)}, its arrays have {sorted(atoms.arrays)}."
                + (f" Without labels, fit without {' and '.join(needed_by)}, which need them." if needed_by else "")
            )
        check_labels(which, atoms, labels)
    refuse_other_heads(what, dict(enumerate(frames)), backend.heads, backend.head)


def refuse_overlap(train: list[Atoms], calibration: list[Atoms], what: str = "calibration") -> None:
    """Refuses calibration frames that are also training frames.

    Args:
        train: Training frames.
        calibration: Frames held out of them.
        what: Name of the latter in error texts.

    Raises:
        LabelError: A frame is in both.
    """
    seen = {digest_of(atoms) for atoms in train}
    shared = [index for index, atoms in enumerate(calibration) if digest_of(atoms) in seen]
    if shared:
        raise LabelError(
            f"{len(shared)} of {len(calibration)} {what} frames are training frames (the first is frame "
            f"{shared[0]}). Errors on training frames are too small to calibrate on: hold frames out."
        )


def check_first_frames(
    backend: Backend,
    train: list[Atoms] | None,
    calibration: list[Atoms],
    keys: tuple[str, str, str] | None,
    batch_atoms: int | None,
) -> None:
    """Finds bad structures and wrong units before minutes are spent on all frames.

    Raises:
        InputError: The potential cannot evaluate a frame.
        LabelError: Forces that the potential needs are missing, or the labels are the potential's own forces.
    """
    if train is not None:
        backend.check(train, name="training structure")
    backend.check(calibration, name="calibration structure")
    first = calibration[:4]
    if train is not None and backend.direct and all(labels_of(atoms, keys).forces is None for atoms in train):
        raise LabelError(
            "training frames have no forces, which the direct force head of this potential needs. Label them, or say "
            "under which names the labels are (label_keys, --forces-key)."
        )
    reference = np.concatenate([np.asarray(labels_of(atoms, keys).forces) for atoms in first])
    forces = predicted_forces(backend, first, batch_atoms, "calibration frame")
    residual, *sizes = (float(np.sqrt(np.mean(values**2))) for values in (reference - forces, reference, forces))
    smaller = min(sizes)
    refuse_own_forces("the calibration labels", residual, smaller, purpose="to calibrate on")
    if residual > _SUSPICIOUS_RATIO * smaller:
        warnings.warn(
            f"force residuals ({residual:.3g} eV/Å RMS) are {residual / max(smaller, 1e-12):.0f} times the forces "
            f"({smaller:.3g} eV/Å): the labels are probably in other units than eV and Å, or belong to another "
            "potential. Check their units and their source.",
            UQWarning,
            stacklevel=4,
        )


def tell_zero_forces(
    what: str, batches: Iterable[tuple[ForwardPass, Targets]], communicator: Communicator
) -> Iterator[tuple[ForwardPass, Targets]]:
    """The same batches; after the last, warns of atoms whose reference forces are exactly 0, as constraints make them.

    Args:
        what: Name of the frames in the warning, such as "calibration".
        batches: Forward passes with their targets.
        communicator: Ranks whose batches are counted.
    """
    found: list[torch.Tensor] = []  # number of the frame, and size of the force, of each such atom
    for forward_pass, targets in batches:
        if targets.forces is not None and forward_pass.forces is not None:
            sizes = forward_pass.forces.double().norm(dim=1)
            wrong = (targets.forces == 0).all(1) & (sizes > _NO_FORCE)
            if wrong.any():
                found.append(torch.stack([targets.frames[forward_pass.frame_of_atom[wrong]], sizes[wrong]], 1))
        yield forward_pass, targets
    atoms = gather(torch.cat(found) if found else None, communicator)
    if atoms is not None:
        frames = atoms[:, 0].unique()
        warnings.warn(
            f"{len(atoms)} atoms of {len(frames)} {what} frames (the first is frame {int(frames[0])}) have reference "
            f"forces of exactly 0, while those of the potential are up to {float(atoms[:, 1].max()):.3g} eV/Å: they "
            "look like labels made with constraints, which set the forces of fixed atoms to 0. Label with "
            "get_forces(apply_constraint=False).",
            UQWarning,
            stacklevel=3,
        )
