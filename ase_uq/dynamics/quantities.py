"""What thresholds can be set on: the uncertainty of forces, energy or stress, or gamma."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms

from ase_uq.thresholds.reduction import Reduction, atom_norms


@dataclass(frozen=True)
class Quantity:
    """One of the quantities.

    Args:
        name: Name that users give.
        key: Results key.
        meaning: What it is, in words.
        unit: Unit of readings and thresholds; empty if they have none.
        per_atom: Whether each atom has a value, so that a reduction makes one reading of them.
    """

    name: str
    key: str
    meaning: str
    unit: str
    per_atom: bool

    def values(self, atoms: Atoms, results: Mapping[str, Any]) -> np.ndarray | None:
        """(n_atoms,) or (n,) values of a structure; None if its results do not have them.

        They are infinite for an atom of an element never seen, or for a structure with one. If a position is not
        finite, all are NaN, whatever the calculator says.
        """
        if not np.isfinite(atoms.positions).all():
            return np.full(len(atoms) if self.per_atom else 1, math.nan)
        if self.key not in results:
            return None
        values = np.asarray(results[self.key], float)
        values = atom_norms(values) if self.name == "forces" else np.abs(np.atleast_1d(values))
        if results.get("gamma") is None:
            return values
        unseen = np.isinf(results["gamma"])
        # NaN stays NaN: it triggers at once, where infinity may have to wait.
        return np.where((unseen if self.per_atom else unseen.any()) & ~np.isnan(values), math.inf, values)

    def reading(self, values: np.ndarray, numbers: np.ndarray, reduction: Reduction) -> float:
        """The one number of a structure that rules judge."""
        return reduction(values, numbers) if self.per_atom else float(values.max())

    def number(self, value: float, unit: str | None = None) -> str:
        """A value with its unit, in words; `unit` instead of its own, where that is not plain ASCII."""
        return f"{value:.4g} {self.unit if unit is None else unit}".rstrip()


_TABLE = (
    Quantity("forces", "forces_uncertainty", "force uncertainty", "eV/Å", True),
    Quantity("gamma", "gamma", "gamma", "", True),
    Quantity("energy", "energy_uncertainty", "energy uncertainty", "eV", False),
    Quantity("stress", "stress_uncertainty", "stress uncertainty", "eV/Å³", False),
)
QUANTITIES = {quantity.name: quantity for quantity in _TABLE}
