"""Sums of a score over the sites around an atom.

The force on an atom, F_j = -Σ_i ∂e_i/∂R_j, is made by the sites around it, so what is known about them bears on its
error as much as what is known about itself.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ase_uq.evaluation import Edges, Evaluation
from ase_uq.methods.base import Raw

RADII = (2.5, 3.5, 5.0)  # Å: bonded neighbours, the next ones, most of what a potential sees


def sum_over_sites(values: Tensor, edges: Edges, radii: Sequence[float]) -> Tensor:
    """(n_atoms, n_radii) own value plus the cosine-weighted sum over the neighbours within each radius, Å.

    weight(r) = ½(1 + cos πr/radius): falls smoothly to zero, so that a neighbour may come and go. A radius beyond the
    potential's cutoff is cut to it, or its sum would jump where the neighbour list ends.
    """
    # All radii at once: on a GPU a small structure costs as many launches as there are operations.
    reach = torch.tensor([min(radius, edges.cutoff) for radius in radii], dtype=torch.float64, device=values.device)
    share = edges.distance.double()[:, None] / reach
    weight = 0.5 * (1 + torch.cos(torch.pi * share.clamp(max=1)))
    own = values[:, None].expand(-1, len(radii))
    return own.index_add(0, edges.target, weight * values[edges.source, None])


def raw_of_atoms(distance: Tensor, evaluation: Evaluation, radii: Sequence[float]) -> Raw:
    """The raw uncertainties of a method that knows one distance of each atom and nothing else.

    Forces read it and its sums over sites, energies per atom and stresses its mean over the structure.

    Args:
        distance: (n_atoms,) variance-like, mean 1 over the fitted atoms.
        evaluation: The batch.
        radii: Å, of the sums.
    """
    sites = sum_over_sites(distance, evaluation.edges, radii)
    counts = evaluation.n_atoms_of_frame.double()[:, None]
    mean = evaluation.sum_over_atoms(distance[:, None]) / counts
    return Raw(
        forces=torch.cat([distance[:, None], sites], 1)[:, None, :],
        energy=mean,
        energies=distance,
        stress=mean,
        distance=distance,
    )
