"""Bounds on force errors from uncertainties, per element."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class IntervalTable:
    """Conformal factors by element: bound = factor · ε_i.

    Args:
        factors: (n_elements,) factor by atomic number.
        elements: Atomic numbers of the elements among the calibration atoms; any other element has an infinite bound.
    """

    factors: Tensor
    elements: frozenset[int]

    def __call__(self, forces_uncertainty: Tensor, numbers: Tensor) -> Tensor:
        """(n_atoms, 3) eV/Å and (n_atoms,) atomic numbers → (n_atoms,) bounds of ‖F_ref - F‖, eV/Å."""
        known = torch.zeros(len(self.factors), dtype=torch.bool)
        known[list(self.elements)] = True
        bounds = self.factors.to(numbers.device)[numbers] * forces_uncertainty.norm(dim=1)
        return torch.where(known.to(numbers.device)[numbers], bounds, torch.inf)
