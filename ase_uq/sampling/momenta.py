"""Momenta to start a run with."""

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation


def set_thermal_momenta(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Draws momenta from the Maxwell-Boltzmann distribution of a temperature (K); ASE's own function is deprecated.

    The net momentum is removed and, without periodicity, the net rotation too; the temperature does not change. A
    single atom keeps its momentum, since it only has the motion of its centre of mass.
    """
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(spread[:, None] * rng.standard_normal((len(atoms), 3)))
    if len(atoms) > 1:
        Stationary(atoms)
        if not atoms.pbc.any():
            ZeroRotation(atoms)
