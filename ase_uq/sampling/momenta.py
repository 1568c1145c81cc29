"""Momenta to start a run with."""

import numpy as np
from ase import Atoms, units
from ase.md.velocitydistribution import Stationary, ZeroRotation


def set_thermal_momenta(atoms: Atoms, temperature: float, rng: np.random.Generator) -> None:
    """Draws momenta of a temperature (K) after Maxwell and Boltzmann, at rest as a whole; ASE's own is deprecated.

    The net momentum is taken out and, without periodicity, the net rotation; the temperature stays. A single atom
    keeps its momentum: it has no motion but that of its centre of mass.
    """
    spread = np.sqrt(atoms.get_masses() * units.kB * temperature)
    atoms.set_momenta(spread[:, None] * rng.standard_normal((len(atoms), 3)))
    if len(atoms) > 1:
        Stationary(atoms)
        if not atoms.pbc.any():
            ZeroRotation(atoms)
