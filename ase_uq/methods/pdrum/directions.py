"""Vectors around an atom that turn with the structure: what an equivariant model of a force is built of."""

import torch
from torch import Tensor

from ase_uq.forward_pass import Edges, ForwardPass

WIDTH = 32  # vectors an atom; a potential with more has them mixed
_RADIAL = 8
_REACH = 6.0  # Å
_LARGEST_NUMBER = 118


def mixing_of(n_vectors: int, seed: int) -> Tensor:
    """What `directions` makes vectors with; float64, the same on every rank.

    Args:
        n_vectors: l = 1 channels of the potential; 0 where it has none.
        seed: Of the random numbers.

    Returns:
        (n_vectors, at most WIDTH): which combinations of its channels are taken; where it has none,
        (119, WIDTH / _RADIAL): random weights of the elements.
    """
    if 0 < n_vectors <= WIDTH:
        return torch.eye(n_vectors, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shape = (n_vectors, WIDTH) if n_vectors else (_LARGEST_NUMBER + 1, WIDTH // _RADIAL)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5


def directions(forward_pass: ForwardPass, mixing: Tensor) -> Tensor:
    """(n_atoms, 3, width) float64: the potential's own l = 1 channels, or v_ic = Σ_j f_c(r_ij) a_c(z_j) r̂_ij.

    f are Gaussians under an envelope that falls smoothly to zero, a random weights of the elements. All vanish at a
    centre of symmetry, as the force does.
    """
    if forward_pass.vectors is not None:
        return forward_pass.vectors.double() @ mixing
    edges = forward_pass.edges
    distance = edges.distance.double()[:, None]
    weights = (_radial(edges)[:, :, None] * mixing[forward_pass.numbers[edges.source]][:, None, :]).flatten(1)
    arrows = (edges.vector.double() / distance)[:, :, None] * weights[:, None, :]
    return arrows.new_zeros((len(forward_pass.numbers), *arrows.shape[1:])).index_add_(0, edges.target, arrows)


def _radial(edges: Edges) -> Tensor:
    """(n_edges, _RADIAL) Gaussians of the distance, from 0.8 Å to where the envelope ends."""
    reach = min(_REACH, edges.cutoff)
    distance = edges.distance.double()[:, None]
    centres = torch.linspace(0.8, reach, _RADIAL, dtype=torch.float64, device=distance.device)
    width = (reach - 0.8) / (_RADIAL - 1)
    envelope = 0.5 * (1 + torch.cos(torch.pi * (distance / reach).clamp(max=1)))
    return envelope * torch.exp(-((distance - centres) ** 2) / (2 * width**2))
