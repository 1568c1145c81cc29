"""The energies of structures and of their members, as arrays."""

from collections.abc import Sequence

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_uq.errors import InputError


def energies_of(frames: Sequence[Atoms]) -> tuple[np.ndarray, np.ndarray]:
    """(n,) energies of the potential and (n, n_members) those of the members, eV.

    Raises:
        InputError: A frame has no `energy_ensemble`, or not as many members as the first.
    """
    energies, members = [], []
    for number, atoms in enumerate(frames):
        results = atoms.calc.results if isinstance(atoms.calc, Calculator) else {}
        # A calculator that several structures share has the results of the last one.
        if isinstance(atoms.calc, Calculator) and atoms.calc.check_state(atoms):
            results = {}
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
