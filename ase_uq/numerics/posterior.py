"""What kernel methods share: posterior variances in feature form, greedy pivots, random projections.

Nothing here draws from a generator with a state. Every random number is a hash of its place, so that it does not depend
on batches, ranks, devices or versions of torch, and need not be stored.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.errors import LabelError
from ase_uq.numerics.linalg import whitener

# Random numbers by place.


# Posterior variance.


@dataclass(frozen=True)
class Residual:
    """Residual variance v(x) = ‖Φ(x) root‖², what a Gaussian process still does not know at x.

    Args:
        root: (d, d) float64.
        mean: Of v over the fitted rows.
        effective: Σ v / σ² over the fitted rows, the effective number of parameters.
        jitter: Relative jitter of the factorisation.
    """

    root: Tensor
    mean: float
    effective: float
    jitter: float


def residual(gram: Tensor, count: float, noise: float) -> Residual:
    """The residual variance in feature form: O(d²) a query, however many rows were fitted.

    v(x) = k(x, x) - k_xT (K_TT + σ²I)⁻¹ k_Tx = σ² Φ(x)ᵀ (Φ_TᵀΦ_T + σ²I)⁻¹ Φ(x),  k(x, y) = Φ(x)·Φ(y)

    The rows Φ root are the posterior features of bmdal (Holzmüller et al. 2023): their inner products are the
    posterior covariance.

    Args:
        gram: (d, d) Φ_TᵀΦ_T of the fitted rows.
        count: Number of them.
        noise: σ².
    """
    mean_gram = gram / count
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root, jitter = whitener(mean_gram + noise / count * eye)
    root = root * (noise / count) ** 0.5
    mean = float((root * (mean_gram @ root)).sum())
    return Residual(root, mean, mean * count / noise, jitter)


def mean_square(gram: Tensor, count: float, offset: float = 0.0) -> float:
    """Mean of ‖Φ‖² over the rows of a Gram matrix, the unit that the noise is relative to.

    Args:
        gram: (d, d) ΦᵀΦ.
        count: Number of rows.
        offset: ‖mean‖² where a mean was taken from the rows.

    Raises:
        LabelError: The rows are zero, or nothing but rounding is left of them.
    """
    square = float(gram.diagonal().sum()) / count
    if square <= 1e-28 * offset:
        raise LabelError("all training frames have the same features: they span nothing to measure distances by.")
    return square


@dataclass(frozen=True)
class Pivots:
    """A partial Cholesky factorisation of a kernel matrix K ≈ factor factorᵀ.

    Args:
        indices: Rows in the order in which they were taken; no row twice.
        factor: (n, rank); its rows at `indices` are lower triangular.
        values: (rank,) the pivots, descending: the variance that each had left when it was taken. Their product is
            the determinant of the block of K that was taken.
    """

    indices: list[int]
    factor: Tensor
    values: Tensor


def pivoted_cholesky(columns: Callable[[int], Tensor], diagonal: Tensor, rank: int, *, smallest: float = 0.0) -> Pivots:
    """Takes, one after the other, the row with the most variance given those taken before: greedy MaxDet.

    c = (k_j - L L_j)/√d_j,  d ← d - c²;  O(n·rank²), and one column of K a step.

    Args:
        columns: j → (n,) column of K.
        diagonal: (n,) of K.
        rank: Most rows to take.
        smallest: A pivot that is not larger ends it: the rest is known from the rows taken.
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
        # What rounding leaves on the rows taken before would be divided by small pivots later.
        column[indices] = 0.0
        factor[:, step] = column / pivot**0.5
        left = left - factor[:, step].square()
        indices.append(index)
        values.append(pivot)
        left[indices] = -torch.inf
    taken = torch.tensor(values, dtype=left.dtype, device=left.device)
    return Pivots(indices, factor[:, : len(indices)], taken)


# Random projection.
