"""POPS: the covariance of a linear model whose errors come from its form, not from a lack of data.

The posterior of a linear model shrinks with every row that it is fitted on, but if the model cannot fit the rows, its
errors do not shrink. POPS asks instead how far the weights would have to move to fit one row exactly. The smallest
such move, in the metric of the precision Λ = ΦᵀΦ + Λ_0, is

    δθ_i = S φ_i e_i/h_i,    S = Λ⁻¹,  h_i = φ_iᵀ S φ_i,    so that φ_iᵀ δθ_i = e_i,

and the covariance of the moves of all rows, Σ = (1/n) Σ_i δθ_i δθ_iᵀ = S [(1/n) Σ_i φ_i φ_iᵀ (e_i/h_i)²] S, does not
shrink with n. The score of an atom is φᵀΣφ: large where a training atom with similar features had a large error,
and where no training atom was similar.

Here φ are the latent features of an atom, standardised, and a constant (it bounds h_i from below; otherwise an atom at
the mean of all atoms would move the weights without bound). e_i² is the mean square over the components of the force
residual of the atom, which a scale of the force errors, linear in the features, would have to fit.
Source: Swinburne and Perez 2025; the application to atoms of a trained potential is our own.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import LabelError
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods._distance import DistanceHead, units_of
from ase_uq.methods.base import Accumulator, Method
from ase_uq.numerics.moves import pops_root
from ase_uq.numerics.sample import RowSample, labels_of_atoms


class POPSHead(DistanceHead):
    """The root of the covariance.

    Args:
        settings: JSON values.
        tensors: `centre` (d,) and `root` (d + 1, d + 1) with distance = ‖(1, x - centre) root‖².
    """

    centre: Tensor
    root: Tensor

    @classmethod
    def check_distance(cls, settings: Entries, tensors: StoredTensors) -> tuple[int, None]:
        width = len(tensors.take("centre", None))
        tensors.take("root", width + 1, width + 1)
        return width, None

    def distance(self, forward_pass: ForwardPass) -> Tensor:
        return (with_constant(forward_pass.features.double() - self.centre) @ self.root).square().sum(1)


@dataclass(frozen=True)
class POPS(Method):
    """Fits the POPS covariance of the force residuals.

    Args:
        ridge: Prior precision of the weights, relative to the unit variance of the standardised features.
        rows: Maximum number of atoms in the fit; if there are more, a pseudo-random sample of them. Leverages are known
            only when all atoms have been seen, so the atoms are kept until then. The head does not hold them.
    """

    name = "pops"
    head = POPSHead
    forces = True
    labels = True
    ridge: float = 1e-9
    rows: int = 20_000

    def __post_init__(self) -> None:
        if not 0 < self.ridge < 1:
            raise ValueError(f"the ridge lies between 0 and 1, not at {self.ridge!r}.")
        if not self.rows >= 1:
            raise ValueError(f"rows is a number of atoms, 1 or more, not {self.rows!r}.")

    def start(self) -> "POPSAccumulator":
        return POPSAccumulator(self)


def with_constant(rows: Tensor) -> Tensor:
    """(n, d) → (n, d + 1): every row of features with a one in front."""
    return torch.cat([torch.ones_like(rows[:, :1]), rows], 1)


class POPSAccumulator(Accumulator):
    """Collects a bounded sample of atoms: their features and e²."""

    def __init__(self, method: POPS) -> None:
        self.method = method
        self.sample = RowSample(method.rows)

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        if targets.forces is None:
            return
        assert forward_pass.forces is not None  # guaranteed by `forces = True` of the method
        squares = (targets.forces.double() - forward_pass.forces.double()).square().mean(1, keepdim=True)
        rows = torch.cat([squares, forward_pass.features.double()], 1)
        labelled = squares[:, 0].isfinite()
        self.sample.add(labels_of_atoms(forward_pass, targets)[labelled], rows[labelled])

    def _finish(self, communicator: Communicator) -> POPSHead:
        kept = self.sample.finish(communicator)
        if kept is None:
            raise LabelError("pops needs training frames with reference forces, and there are none.")
        squares, features = kept[:, 0], kept[:, 1:]
        centre = features.mean(0)
        units = units_of((features - centre).square().mean(0))
        rows = with_constant((features - centre) / units)
        prior = self.method.ridge * torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
        # This precision is a mean over rows instead of a sum: S and h change by the same factor, and Σ does not change.
        root, jitter = pops_root(rows, squares, rows.T @ rows / len(rows) + prior)
        mean_square = float((rows @ root).square().sum(1).mean())
        root = root / torch.cat([torch.ones_like(units[:1]), units])[:, None] / max(mean_square, 1e-300) ** 0.5
        settings = {
            "ridge": self.method.ridge,
            "atoms": len(rows),
            "mean_square": mean_square,
            "jitter": jitter,
        }
        return POPSHead(settings, {"centre": centre, "root": root})
