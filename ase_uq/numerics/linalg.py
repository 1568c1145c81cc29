"""Factorisations in float64 that report the jitter they needed."""

import torch
from torch import Tensor

# Jitters relative to the mean diagonal. Correlated features make Gram matrices with condition numbers beyond 1e10.
JITTER_LADDER = (0.0, 1e-12, 1e-11, 1e-10, 1e-9, 1e-8, 1e-7, 1e-6)


def cholesky(matrix: Tensor) -> tuple[Tensor, float]:
    """Lower Cholesky factor of a symmetric matrix, and the relative jitter that was needed.

    Raises:
        ValueError: No jitter of the ladder makes it positive definite.
    """
    matrix = (matrix + matrix.T) / 2
    scale = matrix.diagonal().mean()
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for jitter in JITTER_LADDER:
        factor, failed = torch.linalg.cholesky_ex(matrix + jitter * scale * eye)
        if not int(failed):
            return factor, jitter
    raise ValueError(
        f"a {len(matrix)} x {len(matrix)} matrix is not positive definite even with a relative jitter of "
        f"{JITTER_LADDER[-1]:.0e}: the features probably hold values that are not finite."
    )


def whitener(precision: Tensor) -> tuple[Tensor, float]:
    """(d, d) W with ‖φW‖² = φ precision⁻¹ φᵀ, and the relative jitter."""
    factor, jitter = cholesky(precision)
    eye = torch.eye(len(factor), dtype=factor.dtype, device=factor.device)
    return torch.linalg.solve_triangular(factor, eye, upper=False).T.contiguous(), jitter
