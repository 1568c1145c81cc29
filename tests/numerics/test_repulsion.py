"""The universal repulsion: the slope of its own energy, the bare nuclei at short distances, and worked numbers."""

import numpy as np
import pytest
import torch

from ase_uq.numerics.repulsion import zbl_force


def zbl_energy(r: float, z1: int, z2: int) -> float:
    """As in the book (Ziegler, Biersack, Littmark 1985), with 0.8854 a₀ = 0.4685 Å and e²/(4πε₀) = 14.3996 eV Å."""
    x = r * (z1**0.23 + z2**0.23) / 0.46850
    phi = 0.18175 * np.exp(-3.19980 * x) + 0.50986 * np.exp(-0.94229 * x)
    phi += 0.28022 * np.exp(-0.40290 * x) + 0.02817 * np.exp(-0.20162 * x)
    return 14.399645 * z1 * z2 / r * phi


def force(r: float, z1: int, z2: int) -> float:
    return float(zbl_force(torch.tensor([r], dtype=torch.float64), torch.tensor([z1]), torch.tensor([z2]))[0])


@pytest.mark.parametrize(("z1", "z2"), [(1, 1), (1, 8), (14, 14), (42, 73), (92, 1)])
@pytest.mark.parametrize("r", [0.05, 0.3, 0.9, 2.0])
def test_is_the_slope_of_the_energy(r: float, z1: int, z2: int):
    h = 1e-5 * r
    slope = (zbl_energy(r + h, z1, z2) - zbl_energy(r - h, z1, z2)) / (2 * h)
    assert force(r, z1, z2) == pytest.approx(-slope, rel=1e-6)


def test_is_that_of_bare_nuclei_where_no_electron_is_between():
    assert force(1e-4, 14, 14) == pytest.approx(14.399645 * 14**2 / 1e-8, rel=1e-2)


def test_elements_can_be_exchanged():
    assert force(0.7, 1, 8) == force(0.7, 8, 1)
