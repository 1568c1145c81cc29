"""The energies of structures and of their members, as arrays."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_uq.errors import InputError
from ase_uq.io.results import current_results


def energies_of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) energies of the potential and (n, n_members) those of the members, eV.

    Raises:
        InputError: A frame has no `energy_ensemble`, or not as many members as the first.
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
        if members[-1].shape != members[0].shape:
            raise InputError(
                f"frame {number} has {len(members[-1])} members, frame 0 has {len(members[0])}: calculate all frames "
                "with one number of members and one uncertainty model."
            )
    return np.array(energies), np.stack(members)
