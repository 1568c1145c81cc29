"""How far the weights of a linear model would have to move to fit single rows exactly: the POPS covariance.

Source: Swinburne and Perez 2025; `methods.pops` has the formulas.
"""

import torch
from torch import Tensor

from ase_uq.numerics.linalg import whitener


def pops_root(features: Tensor, squares: Tensor, precision: Tensor) -> tuple[Tensor, float]:
    """(d, d) R with RRᵀ = Σ_POPS, and the relative jitter that was added to the precision.

    Args:
        features: (n, d) φ.
        squares: (n,) e².
        precision: (d, d) Λ.
    """
    whitening, jitter = whitener(precision)
    rows = features @ whitening
    # The matrix between the whiteners is well conditioned, whatever the precision, so its root loses no digits.
    weighted = rows * (squares.sqrt() / rows.square().sum(1))[:, None]
    values, vectors = torch.linalg.eigh(weighted.T @ weighted / len(rows))
    return whitening @ (vectors * values.clamp(min=0).sqrt()), jitter
