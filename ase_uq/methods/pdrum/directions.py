"""Vectors at an atom that rotate with the structure, from which an equivariant model of a force is built."""

import torch
from torch import Tensor

from ase_uq.errors import PotentialMismatch
from ase_uq.forward_pass import Edges, ForwardPass

WIDTH = 32  # vectors per atom; if a potential has more, they are mixed
_RADIAL = 8
_REACH = 6.0  # Å
_LARGEST_NUMBER = 118


def mixing_of(n_vectors: int, seed: int) -> Tensor:
    """The weights from which `directions` makes vectors; float64, the same on every rank.

    Args:
        n_vectors: Number of l = 1 channels of the potential; 0 where it has none.
        seed: Seed of the random weights.

    Returns:
        (n_vectors, at most WIDTH): the combinations of the channels that are taken; for a potential without channels,
        (119, WIDTH / _RADIAL): random weights of the elements.
    """
    if 0 < n_vectors <= WIDTH:
        return torch.eye(n_vectors, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    shape = (n_vectors, WIDTH) if n_vectors else (_LARGEST_NUMBER + 1, WIDTH // _RADIAL)
    return torch.randn(shape, generator=generator, dtype=torch.float64) / shape[1] ** 0.5


def width_of(mixing: Tensor) -> int:
    """Number of vectors that `directions` makes of each atom."""
    return WIDTH if mixing.shape == (_LARGEST_NUMBER + 1, WIDTH // _RADIAL) else mixing.shape[1]


def directions(forward_pass: ForwardPass, mixing: Tensor) -> Tensor:
    """(n_atoms, 3, width) float64: the potential's own l = 1 channels, or v_ic = Σ_j f_c(r_ij) a_c(z_j) r̂_ij.

    The f_c are Gaussians under an envelope that falls smoothly to zero, the a_c random weights of the elements. All
    vectors vanish at a centre of symmetry, as the force does.

    Raises:
        PotentialMismatch: The weights are for another number of channels.
    """
    own = None if forward_pass.vectors is None else forward_pass.vectors.shape[2]
    if len(mixing) != (_LARGEST_NUMBER + 1 if own is None else own):
        raise PotentialMismatch(
            f"the directions of P-DRUM were fitted for a potential with a mixing of {len(mixing)} rows, but this one "
            f"has {own or 'no'} vectors for each atom. Load the potential it was fitted on, or fit again."
        )
    if forward_pass.vectors is not None:
        return forward_pass.vectors.double() @ mixing
    edges = forward_pass.edges
    distance = edges.distance.double()[:, None]
    weights = (_radial(edges)[:, :, None] * mixing[forward_pass.numbers[edges.source]][:, None, :]).flatten(1)
    arrows = (edges.vector.double() / distance)[:, :, None] * weights[:, None, :]
    return arrows.new_zeros((len(forward_pass.numbers), *arrows.shape[1:])).index_add_(0, edges.target, arrows)


def _radial(edges: Edges) -> Tensor:
    """(n_edges, _RADIAL) Gaussians of the distance, centred from 0.8 Å to the end of the envelope."""
    reach = min(_REACH, edges.cutoff)
    distance = edges.distance.double()[:, None]
    centres = torch.linspace(0.8, reach, _RADIAL, dtype=torch.float64, device=distance.device)
    width = (reach - 0.8) / (_RADIAL - 1)
    envelope = 0.5 * (1 + torch.cos(torch.pi * (distance / reach).clamp(max=1)))
    return envelope * torch.exp(-((distance - centres) ** 2) / (2 * width**2))
