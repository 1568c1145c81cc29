"""Where the frames of a fit came from."""

import hashlib
import importlib.metadata
from typing import Any

import numpy as np
from ase import Atoms
from ase.data import chemical_symbols


def runs_of(frames: list[Atoms]) -> np.ndarray:
    """(n_frames,) number of the run in `info["run"]`, in the order of first appearance; those without are one run."""
    names = [str(atoms.info.get("run", "")) for atoms in frames]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int32)


def digest_of(atoms: Atoms) -> str:
    """sha256 of the elements and coordinates of a frame, as precise as files hold them."""
    # Files round coordinates to eight digits. Rounding each here, however coarsely, would cut some coordinate of a
    # large frame the other way than its file; three sums over all of them say the same and are cut very rarely.
    coordinates = np.concatenate([atoms.positions.ravel(), atoms.cell.array.ravel()])
    waves = np.cos(np.outer([1.0, 2.0, 3.0], np.arange(len(coordinates))))
    sums = (waves @ coordinates).round(4) + 0.0
    return hashlib.sha256(atoms.numbers.astype(np.int32).tobytes() + sums.tobytes()).hexdigest()


def provenance_of(train: list[Atoms], calibration: list[Atoms]) -> dict[str, Any]:
    """What an uncertainty model says of the frames and package versions that it was made from."""

    def described(frames: list[Atoms]) -> dict[str, Any]:
        numbers, counts = np.unique(np.concatenate([atoms.numbers for atoms in frames]), return_counts=True)
        elements = {chemical_symbols[int(z)]: int(n) for z, n in zip(numbers, counts, strict=True)}
        digest = hashlib.sha256("".join(sorted(digest_of(atoms) for atoms in frames)).encode()).hexdigest()
        return {"frames": len(frames), "atoms": int(counts.sum()), "elements": elements, "digest": digest}

    packages = ("ase-uq", "ase", "torch", "mace-torch", "orb-models")
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in installed}
    return {"train": described(train), "calibration": described(calibration), "versions": versions}
