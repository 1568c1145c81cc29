"""The origin of the frames of a fit: their runs, their digests and the package versions."""

import hashlib
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols

from ase_uq.calibration.energy_shift import EnergyShift


def runs_of(frames: list[Atoms]) -> np.ndarray:
    """(n_frames,) number of the run in `info["run"]`, by first appearance; frames without it are one run."""
    names = [str(atoms.info.get("run", "")) for atoms in frames]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int32)


def digest_of(atoms: Atoms) -> str:
    """sha256 of the elements and coordinates of a frame, to the precision of files."""
    # Files round coordinates to eight digits. If each was rounded here, however coarsely, some coordinate of a large
    # frame would be rounded differently from that in its file. Three sums over all coordinates identify the frame as
    # well, and are very rarely rounded differently.
    coordinates = np.concatenate([atoms.positions.ravel(), atoms.cell.array.ravel()])
    waves = np.cos(np.outer([1.0, 2.0, 3.0], np.arange(len(coordinates))))
    sums = (waves @ coordinates).round(4) + 0.0
    return hashlib.sha256(atoms.numbers.astype(np.int32).tobytes() + sums.tobytes()).hexdigest()


def described(frames: list[Atoms]) -> dict[str, Any]:
    """Frames as an uncertainty model remembers them: how many, of what, and a digest; JSON values."""
    numbers, counts = np.unique(np.concatenate([atoms.numbers for atoms in frames]), return_counts=True)
    elements = {chemical_symbols[int(z)]: int(n) for z, n in zip(numbers, counts, strict=True)}
    digest = hashlib.sha256("".join(sorted(digest_of(atoms) for atoms in frames)).encode()).hexdigest()
    return {"frames": len(frames), "atoms": int(counts.sum()), "elements": elements, "digest": digest}


def provenance_of(train: dict[str, Any], calibration: list[Atoms], shift: EnergyShift | None) -> dict[str, Any]:
    """A description of the frames and package versions that an uncertainty model is made from, as JSON values.

    Args:
        train: Training frames, as `described`.
        calibration: Calibration frames.
        shift: What was taken out of their energies.
    """
    versions = {}
    for package in ("ase-uq", "ase", "torch", "mace-torch", "orb-models", "sevenn"):
        with suppress(PackageNotFoundError):
            versions[package] = version(package)
    told = {} if shift is None else {"energy_shift": shift.as_json()}
    return {"train": train, "calibration": described(calibration), "versions": versions, **told}
