"""What goes to LAMMPS and comes from it: the box, elements by type, energy, forces, virial and uncertainties."""

import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import atomic_masses, atomic_numbers, chemical_symbols

from ase_uq.dynamics.quantities import QUANTITIES
from ase_uq.errors import InputError, did_you_mean

# Names that LAMMPS knows them by: `d_force_uq` of an atom, and where the values come from.
PER_ATOM = {"d_energy_uq": "energies_uncertainty", "d_force_uq": "forces_uncertainty", "d_gamma": "gamma"}
_BAROSTATS = re.compile(r"\b(np[th]|nphug|press|box/relax|tnpt)\b")
# A type whose mass is that of its element may have an isotope's; one that is so far off has another element's.
_SAME_MASS, _OTHER_MASS = 0.005, 0.05


@dataclass(frozen=True, eq=False)
class Answer:
    """The results of one structure, in the order of the atoms' IDs.

    Args:
        ids: (n_atoms,) IDs of the atoms, rising.
        energy: Energy, eV.
        forces: (n_atoms, 3) forces, eV/Å.
        virial: (6,) xx yy zz xy xz yz, eV; zeros if it is not known.
        per_atom: (n_atoms,) values by the name that LAMMPS has for them; none at a step without uncertainties.
        totals: The largest and the mean ε_i, eV/Å, the standard deviation of the energy, eV, and the largest gamma;
            None at a step without uncertainties.
    """

    ids: np.ndarray
    energy: float
    forces: np.ndarray
    virial: np.ndarray
    per_atom: Mapping[str, np.ndarray]
    totals: tuple[float, float, float, float] | None


def answer_of(ids: np.ndarray, atoms: Atoms, results: Mapping[str, Any]) -> Answer:
    """The answer to LAMMPS, from the results of a calculator.

    An atom of an element never seen, with infinite gamma, has an infinite ε_i, as for a monitor.
    """
    deviations = QUANTITIES["forces"].values(atoms, results)
    per_atom, totals = {}, None
    if deviations is not None:
        values = {"d_force_uq": deviations} | {name: results.get(PER_ATOM[name]) for name in ("d_energy_uq", "d_gamma")}
        per_atom = {name: np.asarray(value, float) for name, value in values.items() if value is not None}
        energy = float(results.get("energy_uncertainty", np.nan))
        gamma = float(np.max(results.get("gamma", np.nan)))
        totals = float(deviations.max()), float(deviations.mean()), energy, gamma
    forces = np.asarray(results["forces"], float)
    return Answer(ids, float(results["energy"]), forces, virial_of(atoms, results), per_atom, totals)


def has_virial(atoms: Atoms, results: Mapping[str, Any]) -> bool:
    """Whether the virial of a structure is known: without periodicity always, in a crystal from its stress.

    Where a box is periodic in some directions only, potentials disagree on the volume that their stress belongs to.
    """
    return not atoms.pbc.any() or (bool(atoms.pbc.all()) and "stress" in results)


def virial_of(atoms: Atoms, results: Mapping[str, Any]) -> np.ndarray:
    """(6,) virial -dE/dε of a strain ε in LAMMPS's order xx yy zz xy xz yz, eV; zeros if it is not known.

    It is -V σ of a crystal with the stress σ and the volume V, and Σ_i r_i F_i without periodicity.
    """
    if not has_virial(atoms, results):
        return np.zeros(6)
    if atoms.pbc.any():
        return -atoms.get_volume() * np.asarray(results["stress"], float)[[0, 1, 2, 5, 4, 3]]
    virial = atoms.positions.T @ np.asarray(results["forces"], float)
    return np.array([virial[0, 0], virial[1, 1], virial[2, 2], virial[0, 1], virial[0, 2], virial[1, 2]])


def box_of(lammps: Any) -> tuple[np.ndarray, np.ndarray, list[bool]]:
    """Cell (3, 3), low corner (3,) and periodicity of the box of LAMMPS."""
    low, high, xy, yz, xz, periodic, _ = lammps.extract_box()
    x, y, z = np.subtract(high, low)
    return np.array([[x, 0, 0], [xy, y, 0], [xz, yz, z]]), np.array(low), [bool(each) for each in periodic]


def fixes_of(lammps: Any) -> dict[str, str]:
    """Styles of the fixes of LAMMPS by ID, in their order; on the first rank."""
    with tempfile.NamedTemporaryFile("r", suffix=".txt") as file:
        lammps.command(f"info fixes out overwrite {file.name}")
        return dict(re.findall(r"^Fix\[ *\d+\]: *(\S+), *style = (\S+),", file.read(), re.MULTILINE))


def check_barostats(fixes: Mapping[str, str], own: str) -> None:
    """Refuses barostats that look at the pressure of the first step before the potential has told its virial.

    Args:
        fixes: Styles by ID, in the order in which LAMMPS asks them.
        own: ID of the potential's, which may be there from before.

    Raises:
        InputError: One of them stands before it.
    """
    for name, style in fixes.items():
        if name == own:
            return
        if _BAROSTATS.search(style):
            raise InputError(
                f"fix {name} ({style}) was made before the potential came in, so it would look at a pressure of its "
                "first step that is not there yet. Give LAMMPS this fix after making LammpsDynamics."
            )


def numbers_of_types(elements: Sequence[str], n_types: int, calculator: BaseCalculator) -> np.ndarray:
    """(n_types + 1,) atomic number of each type of LAMMPS, which count from 1.

    Args:
        elements: Chemical symbol of each type, in their order.
        n_types: Number of types in LAMMPS.
        calculator: Calculator, which may say which elements its potential knows.

    Raises:
        InputError: There are more or fewer symbols than types, one is no symbol, or the potential does not know one.
    """
    if len(elements) != n_types:
        raise InputError(
            f"LAMMPS has {n_types} atom type{'s' * (n_types != 1)} and elements names {len(elements)}: "
            f"{' '.join(elements)}. Give the chemical symbol of each type, in their order."
        )
    for symbol in elements:
        if symbol not in chemical_symbols[1:]:
            raise InputError(f"{symbol!r} is no chemical symbol.{did_you_mean(symbol, chemical_symbols[1:])}")
    numbers = [atomic_numbers[symbol] for symbol in elements]
    backend = getattr(getattr(calculator, "predictor", None), "backend", None)
    known = getattr(backend, "elements", frozenset(numbers))
    for number in numbers:
        if number not in known:
            raise InputError(
                f"type {numbers.index(number) + 1} is {chemical_symbols[number]}, which the potential does not know. "
                "Give the elements of the types in their order, or another potential."
            )
    return np.array([0, *numbers])


def check_masses(numbers: np.ndarray, masses: np.ndarray) -> None:
    """Refuses masses of types that are exchanged.

    Args:
        numbers: (n_types + 1,) atomic number of each type.
        masses: (n_types + 1,) mass of each type in LAMMPS.

    Raises:
        InputError: A type has the mass of the element of another type, and not that of its own.
    """
    expected = atomic_masses[numbers]
    for kind in range(1, len(numbers)):
        off = np.abs(masses[kind] / expected[1:] - 1)
        if off[kind - 1] > _OTHER_MASS and off.min() < _SAME_MASS:
            other = chemical_symbols[numbers[1 + int(off.argmin())]]
            raise InputError(
                f"type {kind} of LAMMPS has the mass of {other}, {masses[kind]:g}, but elements say that it is "
                f"{chemical_symbols[numbers[kind]]}. Give the elements of the types in their order."
            )
