"""Posterior variances in feature form and greedy pivots, which kernel methods share."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.errors import LabelError
from ase_uq.numerics.linalg import whitener


@dataclass(frozen=True)
class Residual:
    """Residual variance v(x) = ‖Φ(x) root‖², the variance that a Gaussian process still has at x.

    Args:
        root: (d, d) float64 matrix, as in the formula.
        mean: Mean of v over the fitted rows.
        effective: Σ v / σ² over the fitted rows, the effective number of parameters.
        jitter: Relative jitter of the factorisation.
    """

    root: Tensor
    mean: float
    effective: float
    jitter: float


def residual(gram: Tensor, count: float, noise: float) -> Residual:
    """The residual variance in feature form: O(d²) per query, however many rows were fitted.

    v(x) = k(x, x) - k_xT (K_TT + σ²I)⁻¹ k_Tx = σ² Φ(x)ᵀ (Φ_TᵀΦ_T + σ²I)⁻¹ Φ(x),  k(x, y) = Φ(x)·Φ(y)

    The rows Φ root are the posterior features of bmdal (Holzmüller et al. 2023): their inner products are the
    posterior covariance.

    Args:
        gram: (d, d) Φ_TᵀΦ_T of the fitted rows.
        count: Number of fitted rows.
        noise: σ².
    """
    mean_gram = gram / count
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root, jitter = whitener(mean_gram + noise / count * eye)
    root = root * (noise / count) ** 0.5
    mean = float((root * (mean_gram @ root)).sum())
    return Residual(root, mean, mean * count / noise, jitter)


def mean_square(gram: Tensor, count: float, offset: float = 0.0) -> float:
    """Mean of ‖Φ‖² over the rows of a Gram matrix, the unit of a relative noise.

    Args:
        gram: (d, d) ΦᵀΦ.
        count: Number of rows.
        offset: ‖mean‖² of the mean that was subtracted from the rows, if any.

    Raises:
        LabelError: The rows are zero, or only rounding errors are left of them.
    """
    square = float(gram.diagonal().sum()) / count
    if square <= 1e-28 * offset:
        raise LabelError(
            "all training frames have the same features, so that no distances can be measured. Give frames that differ."
        )
    return square


@dataclass(frozen=True)
class Pivots:
    """A partial Cholesky factorisation of a kernel matrix K ≈ factor factorᵀ.

    Args:
        indices: Rows in the order in which they were taken; no row occurs twice.
        factor: (n, rank) factor; its rows at `indices` are lower triangular.
        values: (rank,) the pivots in descending order: the variance that each row had left when it was taken. Their
            product is the determinant of the block of K that was taken.
    """

    indices: list[int]
    factor: Tensor
    values: Tensor


def pivoted_cholesky(columns: Callable[[int], Tensor], diagonal: Tensor, rank: int, *, smallest: float = 0.0) -> Pivots:
    """Takes rows one after the other, always the one with the most variance given those taken before: greedy MaxDet.

    c = (k_j - L L_j)/√d_j,  d ← d - c²;  costs O(n·rank²), and one column of K per step.

    Args:
        columns: Function j → (n,) column of K.
        diagonal: (n,) diagonal of K.
        rank: Largest number of rows to take.
        smallest: Ends when no pivot is larger than this: the other rows are known from those taken.
    """
    left = diagonal.double().clone()
    factor = torch.zeros(len(left), min(rank, len(left)), dtype=left.dtype, device=left.device)
    indices, values = [], []
    for step in range(factor.shape[1]):
        index = int(left.argmax())
        pivot = float(left[index])
        if pivot <= smallest:
            break
        column = columns(index).double() - factor[:, :step] @ factor[index, :step]
        # Rounding errors left on the rows taken before would later be divided by small pivots.
        column[indices] = 0.0
        factor[:, step] = column / pivot**0.5
        left = left - factor[:, step].square()
        indices.append(index)
        values.append(pivot)
        left[indices] = -torch.inf
    taken = torch.tensor(values, dtype=left.dtype, device=left.device)
    return Pivots(indices, factor[:, : len(indices)], taken)
