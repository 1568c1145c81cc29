"""The energies and forces of structures and of their members, as arrays."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_uq.errors import InputError
from ase_uq.io.results import ENSEMBLE_KEY, current_results


def energies_of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) energies of the potential and (n, n_members) those of the members, eV.

    Raises:
        InputError: A frame has no `energy_ensemble`, or not as many members as the first, or those of another
            uncertainty model.
    """
    energies, members = [], []
    for number, atoms in enumerate(frames):
        results = current_results(atoms)  # a calculator that several structures share has those of the last one
        if "energy_ensemble" not in results or "energy" not in results:
            raise InputError(
                f"frame {number} has no energy_ensemble of its own. Calculate it with UncertainCalculator(..., "
                "ensemble=64), and keep its results where a calculator is shared: read_frames gives each frame its own."
            )
        energies.append(float(results["energy"]))
        members.append(np.asarray(results["energy_ensemble"], float).ravel())
        _check(number, atoms, frames[0], len(members[-1]), len(members[0]))
    return np.array(energies), np.stack(members)


def forces_of(frames: Sequence[Atoms]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """The (n_atoms, 3) forces of each structure and the (n_atoms, 3, n_members) ones of its members, eV/Å.

    Raises:
        InputError: As in `energies_of`, of `forces_ensemble`.
    """
    forces: list[np.ndarray] = []
    members: list[np.ndarray] = []
    for number, atoms in enumerate(frames):
        results = current_results(atoms)
        if "forces_ensemble" not in results or "forces" not in results:
            raise InputError(
                f"frame {number} has no forces_ensemble of its own. Calculate it with UncertainCalculator(..., "
                "ensemble=16, ensemble_forces=16), and keep its results where a calculator is shared: read_frames "
                "gives each frame its own."
            )
        forces.append(np.array(results["forces"], float))
        members.append(np.array(results["forces_ensemble"], float))
        _check(number, atoms, frames[0], members[-1].shape[2], members[0].shape[2])
    return forces, members


def _check(number: int, atoms: Atoms, first: Atoms, found: int, expected: int) -> None:
    drew, drew_first = atoms.info.get(ENSEMBLE_KEY), first.info.get(ENSEMBLE_KEY)
    if drew is not None and drew_first is not None and drew != drew_first:
        raise InputError(
            f"frame {number} has members of another uncertainty model ({drew}) than frame 0 ({drew_first}), which are "
            "not the same draws: score all frames with one."
        )
    if found != expected:
        raise InputError(
            f"frame {number} has {found} members, frame 0 has {expected}: calculate all frames with one number of "
            "members and one uncertainty model."
        )
