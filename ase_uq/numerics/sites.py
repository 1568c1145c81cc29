"""Sums and means over the sites around an atom, from one value per site and the neighbour list of the potential.

The force on an atom, F_j = -Σ_i ∂e_i/∂R_j, comes from the sites around it, so its error depends on how well these are
known as much as on how well the atom itself is known. All functions here are local and smooth as neighbours come and
go, and give the same for an atom in any batch and any supercell.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ase_uq.forward_pass import Edges

RADII = (2.5, 3.5, 5.0)  # Å: bonded neighbours, next neighbours, most of what one layer of a potential sees
HOPS = 3  # messages reach two or more cutoffs; cosine weights vanish before their radius, so three means cover that


@dataclass(frozen=True)
class Sites:
    """Values around every atom.

    Args:
        sums: (n_atoms, 1 + n_radii) the value of the atom, then this value plus the weighted sum within each radius.
        counts: (n_atoms, 1 + n_radii) what `sums` would be if all values were 1.
        hops: (n_atoms, HOPS) weighted mean within the largest radius, the mean of these means, and so on.
    """

    sums: Tensor
    counts: Tensor
    hops: Tensor


def sum_over_sites(values: Tensor, edges: Edges, radii: Sequence[float]) -> Tensor:
    """(n_atoms,) or (n_atoms, m) → (n_atoms, [m,] n_radii): value of the atom plus the weighted sum within each radius.

    weight(r) = ½(1 + cos πr/radius) falls smoothly to zero, so that neighbours can come and go. Radii are in Å; a
    radius beyond the cutoff of the potential is reduced to the cutoff, or its sum would jump where the neighbour list
    ends.
    """
    return _summed(values, edges, _weights(edges, radii))


def mean_around(values: Tensor, edges: Edges, radius: float) -> Tensor:
    """(n_atoms, m) → (n_atoms, m): weighted mean of an atom's row and those of its neighbours within a radius, Å."""
    # Edges beyond the radius are dropped first: rows may be long, and most edges are longer than the radius.
    near = torch.nonzero(edges.distance < radius)[:, 0]
    edges = replace(edges, source=edges.source[near], target=edges.target[near], vector=edges.vector[near])
    ones = values.new_ones(len(values))
    return sum_over_sites(values, edges, [radius])[..., 0] / sum_over_sites(ones, edges, [radius])


def around(values: Tensor, edges: Edges, radii: Sequence[float]) -> Sites:
    """Sums and means of (n_atoms,) float64 values over the sites around every atom.

    Args:
        values: One value per site.
        edges: The neighbour list of the potential.
        radii: Radii of the sums, Å.
    """
    # All radii at once: on a GPU the cost for a small structure is the number of operations launched.
    weights = _weights(edges, radii)
    ones = torch.ones_like(values)
    both = _summed(torch.stack([values, ones], 1), edges, weights)
    sums = torch.cat([values[:, None], both[:, 0]], 1)
    counts = torch.cat([ones[:, None], both[:, 1]], 1)
    widest = max(range(len(radii)), key=lambda k: radii[k])
    hops = [both[:, 0, widest] / both[:, 1, widest]]
    for _ in range(HOPS - 1):
        hops.append(_summed(hops[-1], edges, weights[:, widest, None])[:, 0] / both[:, 1, widest])
    return Sites(sums, counts, torch.stack(hops, 1))


def _weights(edges: Edges, radii: Sequence[float]) -> Tensor:
    """(n_edges, n_radii) weights of the edges; several methods ask for the same."""
    known = edges.weights.get(tuple(radii))
    if known is not None:
        return known
    reach = torch.tensor(
        [min(radius, edges.cutoff) for radius in radii], dtype=torch.float64, device=edges.vector.device
    )
    share = edges.distance.double()[:, None] / reach
    edges.weights[tuple(radii)] = weights = 0.5 * (1 + torch.cos(torch.pi * share.clamp(max=1)))
    return weights


def _summed(values: Tensor, edges: Edges, weights: Tensor) -> Tensor:
    of_atoms = values[..., None].expand(*values.shape, weights.shape[1])
    of_neighbours = values[edges.source][..., None] * weights.reshape(
        len(weights), *[1] * (values.ndim - 1), weights.shape[1]
    )
    return of_atoms.index_add(0, edges.target, of_neighbours)
