"""Matrix-normal Bayesian linear regression from its sufficient statistics: in closed form, without data or epochs.

    Y | B ~ MN(ΦB, I, Σ_e),   B ~ MN(0, Λ_0⁻¹, Σ_e),   Λ_n = ΦᵀΦ + Λ_0,   B_n = Λ_n⁻¹ΦᵀY

With frozen features everything depends only on A = ΦᵀΦ, C = ΦᵀY, T = YᵀY and the number of rows N.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import root_scalar
from torch import Tensor

from ase_uq.numerics.linalg import cholesky

# The evidence may be largest without a prior or with a prior that forbids everything; neither is an error.
_LOG_PRECISION = (-30.0, 30.0)
# Nats per row: evidences that differ by less count as equal, as happens far out, where the prior has no effect.
_FLAT = 1e-9


@dataclass(frozen=True)
class Statistics:
    """Sufficient statistics of a regression; those of two data sets add.

    Args:
        gram: (d, d) A = ΦᵀΦ, float64.
        cross: (d, k) C = ΦᵀY.
        square: (k, k) T = YᵀY.
        count: N, the number of rows.
    """

    gram: Tensor
    cross: Tensor
    square: Tensor
    count: float

    def __add__(self, other: "Statistics") -> "Statistics":
        return Statistics(
            self.gram + other.gram,
            self.cross + other.cross,
            self.square + other.square,
            self.count + other.count,
        )


@dataclass(frozen=True)
class Posterior:
    """B | Y ~ MN(mean, precision⁻¹, Σ_e).

    Args:
        mean: (d, k) B_n.
        precision: (d, d) Λ_n.
        factor: (d, d) lower Cholesky factor of the precision.
        jitter: Relative jitter that was added for the factorisation.
    """

    mean: Tensor
    precision: Tensor
    factor: Tensor
    jitter: float

    def leverage(self, features: Tensor) -> Tensor:
        """(n, d) → (n,): u = φ Λ_n⁻¹ φᵀ."""
        return torch.linalg.solve_triangular(self.factor, features.double().T, upper=False).square().sum(0)


def posterior(statistics: Statistics, prior_precision: Tensor) -> Posterior:
    """The posterior under a diagonal prior precision (d,)."""
    precision = statistics.gram + torch.diag(prior_precision)
    factor, jitter = cholesky(precision)
    return Posterior(torch.cholesky_solve(statistics.cross, factor), precision, factor, jitter)


def residual_matrix(statistics: Statistics, fitted: Posterior) -> Tensor:
    """(k, k) M = RᵀR + B_nᵀΛ_0B_n = T - B_nᵀΛ_nB_n; the noise of largest evidence is M/N."""
    matrix = statistics.square - statistics.cross.T @ fitted.mean
    return (matrix + matrix.T) / 2


def negative_log_evidence(statistics: Statistics, prior_precision: Tensor, noise: Tensor) -> float:
    """-log p(Y) under prior precision (d,) and noise covariance Σ_e (k, k)."""
    fitted = posterior(statistics, prior_precision)
    outputs = statistics.square.shape[0]
    residual = residual_matrix(statistics, fitted)
    value = statistics.count * outputs / 2 * np.log(2 * np.pi)
    value += statistics.count / 2 * float(torch.logdet(noise))
    log_precision = 2 * float(fitted.factor.diagonal().log().sum())
    value += outputs / 2 * (log_precision - float(prior_precision.log().sum()))
    return value + 0.5 * float(torch.trace(torch.linalg.solve(noise, residual)))


@dataclass(frozen=True)
class Evidence:
    """The scalar prior precision of largest evidence.

    Args:
        prior_precision: λ of Λ_0 = λI.
        noise: σ² of Σ_e = σ²I, the only form compatible with rotations.
        effective: γ = Σ_d s_d/(s_d + λ), the effective number of parameters.
        boundary: `"prior"` or `"data"` where no prior precision has more evidence than the largest or the
            smallest that was allowed, else empty.
    """

    prior_precision: float
    noise: float
    effective: float
    boundary: str


def maximise_evidence(statistics: Statistics, smallest: float = 0.0) -> Evidence:
    """Largest evidence over a scalar prior precision, noise profiled out: one eigendecomposition, then O(d) per step.

    L(λ) = NK/2·log σ²(λ) + K/2·Σ_d log((s_d + λ)/λ),   σ²(λ) = tr M(λ)/(NK),   s = eig(A)
    2 dL/dlog λ = λ·tr(BᵀB)/σ² - K·γ

    Source: the evidence framework of MacKay (1992), in the form of `Statistics`.

    Args:
        statistics: Statistics of the regression.
        smallest: Lower bound on λ. For data without noise the evidence is largest without a prior, and the posterior
            in directions without data is then only as good as the rounding of the gram matrix.
    """
    eigenvalues, vectors = torch.linalg.eigh((statistics.gram + statistics.gram.T) / 2)
    s = eigenvalues.clamp(min=0).cpu().numpy()
    rotated = (vectors.T @ statistics.cross).square().sum(1).cpu().numpy()
    total = float(torch.trace(statistics.square))
    outputs = statistics.square.shape[0]
    rows = statistics.count * outputs

    def noise(precision: float) -> float:
        return max((total - float((rotated / (s + precision)).sum())) / rows, 1e-16 * total / rows, 1e-300)

    def loss(log_precision: float) -> float:
        precision = np.exp(log_precision)
        return rows / 2 * np.log(noise(precision)) + outputs / 2 * float(np.log1p(s / precision).sum())

    lowest, highest = max(_LOG_PRECISION[0], np.log(max(smallest, 1e-300))), _LOG_PRECISION[1]

    def slope(log_precision: float) -> float:
        precision = np.exp(log_precision)
        shrunk = precision * float((rotated / (s + precision) ** 2).sum()) / noise(precision)
        return (shrunk - outputs * float((s / (s + precision)).sum())) / 2

    grid = np.linspace(lowest, highest, 121)
    best = int(np.argmin([loss(x) for x in grid]))
    left, right = grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)]
    # The zero of the slope is known to rounding error, the minimum of the loss only to its square root: then the order
    # in which frames are summed would show in the sixth digit.
    inside = slope(left) < 0 < slope(right)
    log_precision = float(root_scalar(slope, bracket=(left, right), xtol=1e-13).root if inside else grid[best])
    flat = loss(log_precision) + _FLAT * rows
    boundary = "prior" if loss(highest) <= flat else "data" if loss(lowest) <= flat else ""
    log_precision = {"prior": highest, "data": lowest}.get(boundary, log_precision)
    precision = float(np.exp(log_precision))
    return Evidence(precision, noise(precision), float((s / (s + precision)).sum()), boundary)
