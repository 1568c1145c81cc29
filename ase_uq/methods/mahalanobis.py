"""Mahalanobis distance to the training atoms of the same element.

    d_i² = (x_i - μ_z)ᵀ Σ_z⁻¹ (x_i - μ_z)

The features of each element have one normal distribution, fitted in one streaming pass, without labels, and exactly
for any number of atoms. Unlike the leverage of a Bayesian last layer, which has one covariance for all atoms, this
distance knows that surroundings usual for one element may be unheard of for another.
Source: Mahalanobis 1936; as an out-of-distribution score per class, Lee et al. 2018.
"""

from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods._distance import DistanceHead, elements_of_all, rows_of, units_of
from ase_uq.methods.base import Accumulator, Method
from ase_uq.numerics.linalg import whitener
from ase_uq.numerics.moments import Moments, reduced


class MahalanobisHead(DistanceHead):
    """Means and whiteners: one row per element, and a last row for all elements that were not fitted.

    Args:
        settings: JSON values.
        tensors: `elements` (n_elements,) ascending atomic numbers; `centres` (n_elements + 1, d) and `roots`
            (n_elements + 1, d, d) with distance = ‖(x - centre) root‖².
    """

    elements: Tensor
    centres: Tensor
    roots: Tensor

    @classmethod
    def check_distance(cls, settings: Entries, tensors: StoredTensors) -> tuple[int, list[int]]:
        elements = tensors.elements("elements")
        width = tensors.take("centres", len(elements) + 1, None).shape[1]
        tensors.take("roots", len(elements) + 1, width, width)
        return width, elements.tolist()

    def distance(self, forward_pass: ForwardPass) -> Tensor:
        rows = rows_of(forward_pass.numbers, self.elements)
        centred = forward_pass.features.double() - self.centres[rows]
        distance = torch.zeros_like(centred[:, 0])
        for row in rows.unique().tolist():
            same = rows == row
            distance[same] = (centred[same] @ self.roots[row]).square().sum(1)
        return distance


@dataclass(frozen=True)
class Mahalanobis(Method):
    """Fits a normal distribution of the features per element.

    The covariance of each element is shrunk towards the pooled covariance within the elements, which counts as much
    as d atoms, one per feature: Σ_z = (S_z + d·Σ_within)/(n_z + d), with S_z the scatter of the element's n_z atoms.
    Shrinkage matters for elements with few atoms, whose own covariance is known badly or not at all. An element that
    was not fitted gets the mean and covariance of all atoms.

    Args:
        ridge: Added to the variance of every feature, relative to its variance within the elements.
    """

    name = "mahalanobis"
    head = MahalanobisHead
    ridge: float = 1e-9

    def __post_init__(self) -> None:
        if not 0 < self.ridge < 1:
            raise ValueError(f"the ridge lies between 0 and 1, not at {self.ridge!r}.")

    def start(self) -> "MahalanobisAccumulator":
        return MahalanobisAccumulator(self)


class MahalanobisAccumulator(Accumulator):
    """Moments of the features, one set per element."""

    def __init__(self, method: Mahalanobis) -> None:
        self.method = method
        self.moments: dict[int, Moments] = {}
        self.device = torch.device("cpu")

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.device = forward_pass.features.device
        for z in forward_pass.numbers.unique().tolist():
            rows = Moments.of(forward_pass.features[forward_pass.numbers == z])
            self.moments[z] = self.moments[z] + rows if z in self.moments else rows

    def _finish(self, communicator: Communicator) -> MahalanobisHead:
        elements = elements_of_all(self.moments, communicator)
        # A rank may lack an element that other ranks have; its empty sums must still be on the device.
        none = Moments.empty(0, self.device)
        totals = {z: reduced(self.moments.get(z, none), communicator) for z in elements}
        moments = {z: total for z, total in totals.items() if total is not None}
        every = reduce(Moments.__add__, moments.values())
        width = len(every.mean)
        within = sum((m.scatter for m in moments.values()), torch.zeros_like(every.scatter)) / every.count
        units = units_of(within.diagonal())
        eye = torch.eye(width, dtype=units.dtype, device=units.device)

        def root_of(covariance: Tensor) -> tuple[Tensor, float]:
            root, jitter = whitener(covariance / torch.outer(units, units) + self.method.ridge * eye)
            return root / units[:, None], jitter

        shrunk = [(m.scatter + width * within) / (m.count + width) for m in moments.values()]
        roots, jitters = zip(*(root_of(c) for c in (*shrunk, every.scatter / every.count)), strict=True)
        # The sum of d_i² over the atoms of an element is tr(Wᵀ S_z W).
        pairs = zip(roots, moments.values(), strict=False)
        total = sum(float((root.T @ m.scatter @ root).trace()) for root, m in pairs)
        scale = (every.count / max(total, 1e-300)) ** 0.5
        return MahalanobisHead(
            {
                "ridge": self.method.ridge,
                "atoms": {str(z): int(m.count) for z, m in moments.items()},
                "mean_square": total / every.count,
                "jitter": max(jitters),
            },
            {
                "elements": torch.tensor(elements, device=units.device),
                "centres": torch.stack([*(m.mean for m in moments.values()), every.mean]),
                "roots": torch.stack(roots) * scale,
            },
        )
