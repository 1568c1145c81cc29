"""Residual forces that are the gradient of an energy: linear in fixed random functions of the features.

    r(D) = Σ_h w_h s_h(D),    s_h(D) = tanh(a_h · D √d / ‖D‖),    ΔF_j = -∂/∂R_j Σ_i r(D_i) = Σ_h w_h G_jh

The force features G take one backward pass for each h, but only in the fit: ΔF is linear in w, which is fitted by ridge
regression, and afterwards a single pass gives ΔF for any w. The functions are fixed before any data are seen, so that
the data can be streamed; because the scale of D is not known by then, D is divided by its length.
"""

import torch
from torch import Tensor

from ase_uq.forward_pass import ForwardPass, Gradients

WIDTH = 64
RIDGES = tuple(10.0**power for power in range(-10, 1))  # relative to the mean square of a force feature


def functions_of(n_features: int, seed: int) -> Tensor:
    """(n_features, WIDTH) vectors a_h, columns of unit length; float64, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    drawn = torch.randn(n_features, WIDTH, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm(dim=0)


def force_features(forward_pass: ForwardPass, functions: Tensor) -> Tensor:
    """(n_atoms, 3, WIDTH) G; one backward pass for each function."""
    gradients = _gradients(forward_pass)
    eye = torch.eye(functions.shape[1], dtype=functions.dtype, device=functions.device)
    parts = [gradients.of_features(_cotangent(forward_pass.features, functions, one)) for one in eye]
    return torch.stack(parts, 2).double()


def forces_of(forward_pass: ForwardPass, functions: Tensor, weights: Tensor) -> Tensor:
    """(n_atoms, 3) ΔF for these (WIDTH,) weights, float64; one backward pass."""
    return _gradients(forward_pass).of_features(_cotangent(forward_pass.features, functions, weights)).double()


def ridge_regression(force_features: Tensor, forces: Tensor, fold: Tensor) -> Tensor:
    """(n_folds, WIDTH) w, each row fitted without one fold; the ridge is the one that does best on the folds left out.

    Args:
        force_features: (n_atoms, 3, WIDTH) G.
        forces: (n_atoms, 3) ΔF.
        fold: (n_atoms,) fold that each atom belongs to.
    """
    grams, crosses, squares = [], [], []
    for member in range(int(fold.max()) + 1):
        rows, target = force_features[fold == member].flatten(0, 1), forces[fold == member].flatten()
        grams.append(rows.T @ rows)
        crosses.append(rows.T @ target)
        squares.append(target @ target)
    gram, cross, square = torch.stack(grams), torch.stack(crosses), torch.stack(squares)
    eye = torch.eye(gram.shape[1], dtype=gram.dtype, device=gram.device)
    others, mean_square = gram.sum(0) - gram, gram.sum(0).diagonal().mean()
    best, least = torch.zeros_like(cross), torch.inf
    for ridge in RIDGES:
        weights = torch.linalg.solve(others + ridge * mean_square * eye, cross.sum(0) - cross)
        error = square - 2 * (weights * cross).sum(1) + torch.einsum("kh,khl,kl->k", weights, gram, weights)
        if float(error.sum()) < least:
            best, least = weights, float(error.sum())
    return best


def _cotangent(features: Tensor, functions: Tensor, weights: Tensor) -> Tensor:
    """(n_atoms, n_features) ∂r(D_i)/∂D_i."""
    d = features.double()
    length = d.norm(dim=1, keepdim=True).clamp(min=1e-12)
    unit = d / length
    root = features.shape[1] ** 0.5
    slope = (1 - torch.tanh(root * unit @ functions).square()) * weights @ functions.T
    return root / length * (slope - (slope * unit).sum(1, keepdim=True) * unit)


def _gradients(forward_pass: ForwardPass) -> Gradients:
    if forward_pass.gradients is None:
        raise ValueError("the conservative P-DRUM takes derivatives of the features: evaluate with gradients=True.")
    return forward_pass.gradients
