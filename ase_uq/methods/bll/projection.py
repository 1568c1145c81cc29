"""Leverage through the projection of a direct force head, which removes net force and torque."""

import torch
from torch import Tensor

from ase_uq.forward_pass import ForceLayer, ForwardPass


def projected_leverage(layer: ForceLayer, root: Tensor, forward_pass: ForwardPass) -> Tensor:
    """(n_atoms, 3) leverage of each force component through the potential's own projection.

    F = P(φB) with independent columns of B gives Var F_ia ∝ Σ_b ‖Σ_j P_(ia),(jb) φ_j R‖². With P = I - UUᵀ, U the
    orthonormal rigid modes, and a_i = φ_i R minus its mean over the structure (which removes the translations),

        u_ia = ‖a_i‖² - 2 Σ_m U_iam c_ma·a_i + Σ_mn U_iam U_ian Σ_b c_mb·c_nb,    c_mb = Σ_j U_jbm a_j.

    Without P the leverage is overestimated by a factor of 30 to 50 if the features have a large common part.

    Args:
        layer: Last layer of the direct force head.
        root: (n_last, n_last) R with φRRᵀφᵀ the leverage before the projection.
        forward_pass: The batch, for its positions and frames.
    """
    rows = removed_mean(layer, forward_pass) @ root
    leverage = rows.square().sum(1, keepdim=True).expand(-1, 3)
    if not bool(layer.torque_free.any()):
        return leverage
    modes = _rotations(forward_pass, layer.torque_free)
    coupling = forward_pass.sum_over_atoms(torch.einsum("ibm,ik->imbk", modes, rows))
    overlap = torch.einsum("smbk,snbk->smn", coupling, coupling)[forward_pass.frame_of_atom]
    cross = torch.einsum("iam,imak,ik->ia", modes, coupling[forward_pass.frame_of_atom], rows)
    square = torch.einsum("iam,ian,imn->ia", modes, modes, overlap)
    return (leverage - 2 * cross + square).clamp(min=0)


def removed_mean(layer: ForceLayer, forward_pass: ForwardPass) -> Tensor:
    """Features minus their mean over the structure, where the head removes the net force; float64.

    Mean removal is linear over atoms, so these features are exact; the bias drops out.
    """
    features = layer.features.double()
    if not layer.force_free:
        return features
    counts = forward_pass.n_atoms_of_frame.double()[:, None]
    return features - (forward_pass.sum_over_atoms(features) / counts)[forward_pass.frame_of_atom]


def without_torque(layer: ForceLayer, forces: Tensor, forward_pass: ForwardPass) -> Tensor:
    """(n_atoms, 3, n) forces without their net torque on each structure, where the head removes it."""
    if not bool(layer.torque_free.any()):
        return forces
    modes = _rotations(forward_pass, layer.torque_free)
    torque = forward_pass.sum_over_atoms(torch.einsum("iam,ian->imn", modes, forces))
    return forces - torch.einsum("iam,imn->ian", modes, torque[forward_pass.frame_of_atom])


def _rotations(forward_pass: ForwardPass, torque_free: Tensor) -> Tensor:
    """(n_atoms, 3 components, 3 modes) orthonormal rotations of each structure; zero where torque is kept."""
    positions = forward_pass.positions.double()
    counts = forward_pass.n_atoms_of_frame.double()[:, None]
    centre = forward_pass.sum_over_atoms(positions) / counts
    r = positions - centre[forward_pass.frame_of_atom]
    axes = torch.eye(3, dtype=r.dtype, device=r.device)
    # e_k × r, k in the last axis
    turns = torch.linalg.cross(axes.expand(len(r), 3, 3), r[:, None, :].expand(len(r), 3, 3)).transpose(1, 2)
    overlap = forward_pass.sum_over_atoms(torch.einsum("iak,ial->ikl", turns, turns))
    values, vectors = torch.linalg.eigh(overlap)
    # Linear molecules have two rotations and single atoms none.
    kept = values > 1e-8 * values.amax(1, keepdim=True).clamp(min=1e-30)
    inverse_root = torch.where(kept, values.clamp(min=1e-300).rsqrt(), 0.0)
    orthonormal = (vectors * inverse_root[:, None, :]) * torque_free[:, None, None]
    return torch.einsum("iak,ikl->ial", turns, orthonormal[forward_pass.frame_of_atom])
