"""The edge of the calibration data, per element: the unit of the extrapolation grade gamma."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_QUANTILE = 0.999
# Fewer atoms cannot determine a quantile this high: such an element takes the widest edge of the other elements.
_SMALLEST_COUNT = 50


@dataclass(frozen=True)
class EdgeTable:
    """Distance at the edge of the calibration data, for every element that was fitted.

    Args:
        edges: (119,) distance at the edge by atomic number; `nan` for an element that was not fitted.
        counts: Number of calibration atoms of each fitted element, by atomic number.
        inherited: Atomic numbers of the elements that are too rare and take the widest edge of the others.
    """

    edges: Tensor
    counts: dict[int, int]
    inherited: tuple[int, ...]

    def grade(self, distance: Tensor, numbers: Tensor) -> Tensor:
        """(n_atoms,) gamma: distance divided by the edge of the atom's element; `inf` if it was not fitted."""
        edges = self.edges.to(distance)[numbers]
        # A NaN distance, from a potential that has failed, stays NaN.
        return torch.where(edges.isnan() & ~distance.isnan(), torch.inf, distance / edges)

    @property
    def elements(self) -> frozenset[int]:
        """Atomic numbers that were fitted."""
        return frozenset(self.counts)


def fit_edges(distance: np.ndarray, numbers: np.ndarray, fitted: frozenset[int]) -> EdgeTable:
    """The 99.9 % quantile of the distance of calibration atoms, per element.

    Args:
        distance: (n_atoms,) distances of the calibration atoms.
        numbers: (n_atoms,) atomic numbers of the calibration atoms.
        fitted: Atomic numbers of the elements among the training atoms.
    """
    edges = np.full(119, np.nan)
    counts = {z: int((numbers == z).sum()) for z in sorted(fitted)}
    frequent = [z for z, count in counts.items() if count >= _SMALLEST_COUNT]
    for z in frequent:
        edges[z] = np.quantile(distance[numbers == z], _QUANTILE)
    widest = np.nanmax(edges) if frequent else float(np.quantile(distance, _QUANTILE))
    inherited = tuple(z for z in counts if z not in frequent)
    for z in inherited:
        edges[z] = widest
    return EdgeTable(torch.from_numpy(edges), counts, inherited)
