"""The edge of the calibration data, per element: what the extrapolation grade gamma is measured in."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_QUANTILE = 0.999
# Fewer atoms do not know a quantile this high: such an element takes the widest edge of the others.
_SMALLEST_COUNT = 50


@dataclass(frozen=True)
class EdgeTable:
    """Distance at the edge of the calibration data, for every element that was fitted.

    Args:
        edges: (119,) by atomic number; `nan` for an element that was not fitted.
        counts: Calibration atoms of each fitted element, by atomic number.
        inherited: Atomic numbers of the elements too rare for an edge of their own.
    """

    edges: Tensor
    counts: dict[int, int]
    inherited: tuple[int, ...]

    def grade(self, distance: Tensor, numbers: Tensor) -> Tensor:
        """(n_atoms,) gamma: distance over the edge of the atom's element; `inf` for an element never fitted."""
        edges = self.edges.to(distance)[numbers]
        # A distance that is NaN, of a potential that has broken, stays NaN.
        return torch.where(edges.isnan() & ~distance.isnan(), torch.inf, distance / edges)

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that were fitted."""
        return frozenset(self.counts)


def fit_edges(distance: np.ndarray, numbers: np.ndarray, fitted: frozenset[int]) -> EdgeTable:
    """The 99.9 % quantile of the distance of calibration atoms, per element.

    Args:
        distance: (n_atoms,) of the calibration atoms.
        numbers: (n_atoms,) their atomic numbers.
        fitted: Atomic numbers among the training atoms.
    """
    edges = np.full(119, np.nan)
    counts = {z: int((numbers == z).sum()) for z in sorted(fitted)}
    own = [z for z, count in counts.items() if count >= _SMALLEST_COUNT]
    for z in own:
        edges[z] = np.quantile(distance[numbers == z], _QUANTILE)
    widest = np.nanmax(edges) if own else float(np.quantile(distance, _QUANTILE))
    inherited = tuple(z for z in counts if z not in own)
    for z in inherited:
        edges[z] = widest
    return EdgeTable(torch.from_numpy(edges), counts, inherited)
