"""The results that a user sees: those of one structure as numpy arrays, with the keys of `properties`."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from ase_uq.display.representation import Brief
from ase_uq.properties import STANDARD


@dataclass(frozen=True, repr=False)
class Prediction(Brief):
    """Results of one structure in ASE's units.

    Args:
        results: Arrays and floats by results key: standard results and uncertainties, with the keys and shapes of
            `properties`, and additional per-atom results of the wrapped calculator (such as `confidence` of orb).
    """

    results: dict[str, Any]

    def __getitem__(self, key: str) -> Any:
        return self.results[key]

    def standard(self) -> dict[str, Any]:
        """The results that ASE knows, which `SinglePointCalculator` accepts."""
        return {key: value for key, value in self.results.items() if key in STANDARD}

    @property
    def atom_uncertainty(self) -> np.ndarray:
        """(n_atoms,) ε_i = sqrt(Σ_c σ_ic²), eV/Å."""
        return np.linalg.norm(self.results["forces_uncertainty"], axis=1)
