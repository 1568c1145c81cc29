"""A table of every results key, with its shape, unit and meaning; the only behaviour is look-up."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ase.outputs import Properties, all_outputs


@dataclass(frozen=True)
class Property:
    """One results key.

    Args:
        name: Key in `calc.results`, `atoms.info` or `atoms.arrays`.
        per_atom: Whether the first axis counts atoms.
        shape: Shape of the value, without the atom axis; -1 for as many as were asked for.
        unit: ASE unit.
        meaning: Description in one line.
    """

    name: str
    per_atom: bool
    shape: tuple[int, ...]
    unit: str
    meaning: str


_TABLE = (
    Property("energy", False, (), "eV", "total energy of the potential"),
    Property("free_energy", False, (), "eV", "the total energy again, under the name that ASE's optimisers ask for"),
    Property("energies", True, (), "eV", "energy of each atom, as the potential gives it"),
    Property("forces", True, (3,), "eV/Å", "forces of the potential, unchanged"),
    Property("stress", False, (6,), "eV/Å³", "stress of the potential in Voigt order, unchanged"),
    Property("energy_uncertainty", False, (), "eV", "standard deviation of the total energy"),
    Property("energies_uncertainty", True, (), "eV", "standard deviation of each atom's energy"),
    Property("forces_uncertainty", True, (3,), "eV/Å", "standard deviation of each force component"),
    Property("forces_interval", True, (), "eV/Å", "bound of the norm of each atom's force error"),
    Property(
        "stress_uncertainty",
        False,
        (6,),
        "eV/Å³",
        "standard deviation of each stress component, in Voigt order, where the stress is that of the cell",
    ),
    Property("energy_ensemble", False, (-1,), "eV", "samples of the total energy, the same draws for all structures"),
    Property(
        "forces_ensemble",
        True,
        (3, -1),
        "eV/Å",
        "samples of the forces, from the draws of the first members of the energy",
    ),
    Property(
        "stress_ensemble", False, (6, -1), "eV/Å³", "samples of the stress, from the same draws as those of the forces"
    ),
    Property("gamma", True, (), "1", "distance from the fitted atoms; 1 = edge of the calibration data"),
    Property("contact", True, (), "1", "distance of the closest neighbour; 1 = shortest of these elements in training"),
)
PROPERTIES = {entry.name: entry for entry in _TABLE}
STANDARD = ("energy", "free_energy", "energies", "forces", "stress")
UNCERTAINTIES = tuple(entry.name for entry in _TABLE if entry.name not in STANDARD)


@lru_cache(maxsize=1024)  # it is asked for each key of each frame
def find_property(key: str) -> Property | None:
    """The entry of a key; for `<key>_<method>`, the quantity from one method alone, that of `<key>`. Else None."""
    if key in PROPERTIES:
        return PROPERTIES[key]
    owners = [name for name in UNCERTAINTIES if key.startswith(name + "_")]
    return PROPERTIES[max(owners, key=len)] if owners else None


def known_to_ase(results: Mapping[str, Any]) -> Properties:
    """The results that ASE has a name for, as `atoms.get_properties` gives them; `Properties` accepts no others."""
    return Properties({key: value for key, value in results.items() if key in all_outputs})
