"""The exact posterior of the last layer of a conservative potential, from energies and forces together.

Forces are slopes of the energy, so they are linear in the same weights:

    E_s = w·ψ_s + base        F_jα = w·G_jα + base,    G_jα = -∂ψ/∂R_jα
    Λ_n = λI + β_E Σ_s ψ̃_s ψ̃_sᵀ + β_F Σ_jα G_jα G_jαᵀ,    ψ̃ = ψ per atom, about its mean (an intercept, as for energies)

in units in which features have a spread of about 1, with the prior precision λ and the noise precisions β_E and β_F of
largest evidence (n_E without the one that the intercept takes),

    ln p = ½(D ln λ + n_E ln β_E + n_F ln β_F - β_E RSS_E - β_F RSS_F - λ|w|² - ln|Λ_n|) + const.

The variance of a force component is G Λ_n⁻¹ Gᵀ, which takes as many backward passes as there are weights: no single one
could give all of them. K random directions of the weights give an unbiased estimate for K passes. The mean of the
potential is never changed. Source: MacKay 1992 for the evidence; two noises and the slopes are our own derivation.

The posterior shrinks with every row, though a model that cannot fit the rows has errors that do not. In its place may
stand the covariance of the moves of the weights that fit one row each (see `methods.pops`), over the rows of energies
and of force components together, each in units of its noise: φ_r = √β ψ̃ or √β G and e_r = √β times the error of the
potential itself. Rows of which the posterior knows more than of most (h_r below the median) are left out, as in the
code of Swinburne and Perez 2025: a move that fits an error along features that hardly vary has no bound.
"""

from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.forward_pass import ForwardPass, Slopes
from ase_uq.methods.bll.regression import Statistics
from ase_uq.numerics.linalg import cholesky, whitener
from ase_uq.numerics.moves import pops_root

_LARGEST_LOG = 40.0  # of the precisions, beside those of a unit scale of features and targets
_SMALLEST_LEVERAGE = 1e-12  # of the largest; below it a row is rounding, as slopes at a site of high symmetry are
_SMALLEST_SHARE = 1e-12  # of the sum of squares that residuals have; below it they are rounding


def slopes_of(forward_pass: ForwardPass, weights: Tensor) -> Slopes:
    """(n_last, k) → G_jα·w of each column of weights, and likewise by strain; float64, one backward pass each.

    Raises:
        ValueError: The pass was made without gradients.
    """
    if forward_pass.gradients is None:
        raise ValueError("slopes of features need gradients: evaluate with gradients=True.")
    found = forward_pass.gradients.of_energy_layer(weights)
    return Slopes(found.forces.double(), None if found.virials is None else found.virials.double())


@dataclass(frozen=True)
class JointEvidence:
    """The precisions of largest evidence.

    Args:
        prior: λ.
        energy: β_E.
        force: β_F.
        energy_effective: γ_E, effective number of weights that energies determine.
        force_effective: γ_F, likewise of forces.
        precision: (d, d) Λ_n.
    """

    prior: float
    energy: float
    force: float
    energy_effective: float
    force_effective: float
    precision: Tensor


def maximise_joint_evidence(energy: Statistics, force: Statistics, smallest: float) -> JointEvidence:
    """λ, β_E and β_F of largest evidence; γ_E + γ_F + λ tr Λ_n⁻¹ is the number of weights.

    Args:
        energy: Of the energies per atom, about their means; their count is without the intercept.
        force: Of the force components.
        smallest: Smallest prior precision, relative to the mean diagonal of that of the data; it is added to λ.
    """
    width = len(energy.gram)
    eye = torch.eye(width, dtype=energy.gram.dtype, device=energy.gram.device)
    parts = (energy, force)
    # The smallest prior moves with the noises, and is added, so that the evidence stays smooth.
    floors = [smallest * float(part.gram.diagonal().mean()) for part in parts]

    def at(logs: np.ndarray) -> tuple[float, np.ndarray, JointEvidence]:
        free, *noises = np.exp(logs).tolist()
        prior = free + sum(noise * floor for noise, floor in zip(noises, floors, strict=True))
        precision = noises[0] * energy.gram + noises[1] * force.gram + prior * eye
        factor, _ = cholesky(precision)
        cross = noises[0] * energy.cross + noises[1] * force.cross
        weights = torch.cholesky_solve(cross, factor)[:, 0]
        covariance = torch.cholesky_inverse(factor)
        squares, effective = [], []
        for noise, part in zip(noises, parts, strict=True):
            total = float(part.square[0, 0])
            rest = total - 2 * float(weights @ part.cross[:, 0]) + float(weights @ part.gram @ weights)
            squares.append(max(rest, _SMALLEST_SHARE * max(total, 1e-300)))
            effective.append(noise * float((covariance * part.gram).sum()))
        size = float(weights @ weights)
        value = width * np.log(prior) - prior * size - 2 * float(factor.diagonal().log().sum())
        of_prior = width / prior - float(covariance.trace()) - size
        slopes = [of_prior * free]
        for noise, part, square, gamma, floor in zip(noises, parts, squares, effective, floors, strict=True):
            value += part.count * np.log(noise) - noise * square
            slopes.append(part.count - gamma - noise * square + of_prior * noise * floor)
        found = JointEvidence(prior, noises[0], noises[1], effective[0], effective[1], precision)
        return -value / 2, -np.array(slopes) / 2, found

    start = np.zeros(3)
    for place, part in enumerate(parts, 1):
        start[place] = -np.log(max(float(part.square[0, 0]) / max(part.count, 1), 1e-300))
    bounds = [(middle - _LARGEST_LOG, middle + _LARGEST_LOG) for middle in start]
    count = sum(part.count for part in parts)

    def loss(logs: np.ndarray) -> tuple[float, np.ndarray]:
        value, slope, _ = at(logs)
        return value / count, slope / count

    # With many digits the evidence is steep on one side: a search may end on the way, and goes on from another place.
    options = {"ftol": 1e-15, "gtol": 1e-10, "maxiter": 1000}
    starts = [start + step for step in (np.zeros(3), np.array([0, 10, 10]), np.array([0, 20, 0]), np.array([0, 0, 20]))]
    found = [minimize(loss, x, jac=True, method="L-BFGS-B", bounds=bounds, options=options) for x in starts]
    return at(min(found, key=lambda result: result.fun).x)[2]


def moves_root(rows: Tensor, errors: Tensor, precision: Tensor) -> tuple[Tensor, float]:
    """(d, d) R with RRᵀ the covariance of the moves that fit a row each, and the relative jitter of the precision.

    Args:
        rows: (n, d) φ_r of energies and force components, in units of their noises.
        errors: (n,) e_r.
        precision: (d, d) Λ_n.
    """
    leverages = (rows @ whitener(precision)[0]).square().sum(1)
    kept = (leverages >= leverages.median()) & (leverages > _SMALLEST_LEVERAGE * leverages.max())
    return pops_root(rows[kept], errors[kept].square(), precision)
