"""The energies, forces and stresses of structures and of their members, as arrays."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_uq.errors import InputError
from ase_uq.io.results import ENSEMBLE_KEY, current_results

_OF_STRESS = (
    " Only crystals have one, where stresses are slopes of the energy or of a committee, and the uncertainty model was "
    "calibrated with stresses among the labels."
)


def energies_of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) energies of the potential and (n, n_members) those of the members, eV.

    Raises:
        InputError: A frame has no `energy_ensemble`, or not as many members as the first, or those of another
            uncertainty model, or some that are not finite.
    """
    energies, members = [], []
    for number, atoms in enumerate(frames):
        results = current_results(atoms)  # a calculator that several structures share has those of the last one
        if "energy_ensemble" not in results or "energy" not in results:
            raise InputError(
                f"frame {number} has no energy_ensemble of its own. Calculate it with UncertainCalculator(..., "
                "ensemble=64) or `ase-uq score --ensemble 64`, and keep its results where a calculator is shared: "
                "read_frames gives each frame its own."
            )
        energies.append(float(results["energy"]))
        members.append(np.asarray(results["energy_ensemble"], float).ravel())
        _check(number, atoms, frames[0], members)
    return np.array(energies), np.stack(members)


def arrays_of(frames: Sequence[Atoms], quantity: str) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Arrays of each structure and of its members, which are last: (..., n_members).

    Args:
        frames: Calculated structures.
        quantity: `"forces"`, (n_atoms, 3) eV/Å, or `"stress"`, (6,) eV/Å³ in Voigt order.

    Raises:
        InputError: As in `energies_of`, of `forces_ensemble` or `stress_ensemble`.
    """
    own: list[np.ndarray] = []
    members: list[np.ndarray] = []
    key = f"{quantity}_ensemble"
    for number, atoms in enumerate(frames):
        results = current_results(atoms)
        if key not in results or quantity not in results:
            raise InputError(
                f"frame {number} has no {key} of its own. Calculate it with UncertainCalculator(..., "
                "ensemble=16, ensemble_forces=16), and keep its results where a calculator is shared: read_frames "
                f"gives each frame its own.{_OF_STRESS if quantity == 'stress' else ''}"
            )
        own.append(np.array(results[quantity], float))
        members.append(np.array(results[key], float))
        if members[-1].shape[:-1] != own[-1].shape:
            raise InputError(
                f"frame {number} has a {key} of shape {members[-1].shape}: {(*own[-1].shape, 'members')} was expected. "
                "It is somebody else's entry of this name; calculate the frame again."
            )
        _check(number, atoms, frames[0], members)
    return own, members


def _check(number: int, atoms: Atoms, first: Atoms, members: list[np.ndarray]) -> None:
    found, expected = members[-1].shape[-1], members[0].shape[-1]
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
    if not np.isfinite(members[-1]).all():
        raise InputError(
            f"members of frame {number} are not finite: the potential gave no energies or forces for it. Leave it out."
        )
