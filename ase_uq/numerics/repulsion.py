"""Universal repulsion of two atoms at short distances: what physics knows and a potential need not have learned."""

import torch
from torch import Tensor

# Ziegler, Biersack and Littmark 1985: screening of the Coulomb repulsion of the nuclei, and its length.
_SHARES = (0.18175, 0.50986, 0.28022, 0.02817)
_RATES = (3.1998, 0.94229, 0.4029, 0.20162)
_LENGTH, _POWER = 0.46850, 0.23  # Å
_COULOMB = 14.399645  # e²/(4πε₀), eV Å


def zbl_force(distance: Tensor, first: Tensor, second: Tensor) -> Tensor:
    """(n,) magnitude of the ZBL repulsion, eV/Å.

        F = -d/dr [e²/(4πε₀) Z₁Z₂/r · Σ_k a_k exp(-b_k r/ℓ)],    ℓ = 0.4685 Å/(Z₁^0.23 + Z₂^0.23)

    Args:
        distance: (n,) distances, Å.
        first: (n,) atomic numbers of one atom of each pair.
        second: (n,) atomic numbers of the other.
    """
    one, two = first.to(distance), second.to(distance)
    length = _LENGTH / (one**_POWER + two**_POWER)
    shares, rates = distance.new_tensor(_SHARES), distance.new_tensor(_RATES)
    terms = shares * torch.exp(-rates * (distance / length)[:, None])
    screening, slope = terms.sum(1), (rates * terms).sum(1) / length
    return _COULOMB * one * two * (screening / distance + slope) / distance
