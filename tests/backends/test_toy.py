"""The toy potential keeps the contract, direct or not."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.neighborlist import neighbor_list
from ase.optimize import BFGS
from hypothesis import given
from hypothesis import strategies as st

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator, _neighbours
from ase_uq.errors import InputError
from ase_uq.testing.backends import BackendContract


class TestToy(BackendContract):
    def make_calculator(self, dtype="float64"):
        return ToyCalculator(dtype=dtype)

    def last_layer(self, calculator):
        return [calculator.potential.weights]


class TestToyFloat32(TestToy):
    dtype = "float32"


class TestToyDirect(BackendContract):
    conservative = False
    is_equivariant = False

    def make_calculator(self, dtype="float64"):
        return ToyCalculator(direct=True, dtype=dtype)

    def last_layer(self, calculator):
        return [calculator.potential.weights, calculator.potential.force_weights]


@given(
    n_atoms=st.integers(1, 9),
    pbc=st.tuples(*[st.booleans()] * 3),
    size=st.floats(2, 9),
    spread=st.floats(1, 20),
    vacuum=st.booleans(),
    seed=st.integers(0, 10_000),
)
def test_neighbours_are_those_of_ase(
    n_atoms: int, pbc: tuple[bool, ...], size: float, spread: float, vacuum: bool, seed: int
):
    rng = np.random.default_rng(seed)
    cell = size * np.eye(3) + rng.uniform(-1, 1, (3, 3)) * size / 3
    if vacuum:
        cell[~np.array(pbc)] = 0
    atoms = Atoms(["H"] * n_atoms, rng.uniform(-spread, spread, (n_atoms, 3)), cell=cell, pbc=pbc)
    first, second, lattice = neighbor_list("ijS", atoms, 4.0)
    expected = np.column_stack([first, second, lattice @ atoms.cell.complete().array])
    found = np.column_stack(_neighbours(atoms, 4.0))
    np.testing.assert_allclose(in_order(found), in_order(expected), atol=1e-9)


def in_order(rows: np.ndarray) -> np.ndarray:
    return rows[np.lexsort(rows.round(6).T)]


def test_a_molecule_has_no_stress():
    atoms = molecule("H2O", calculator=ToyCalculator())
    np.testing.assert_array_equal(atoms.get_stress(), np.zeros(6))


def test_seed_sets_the_weights_and_nothing_else():
    before = torch.random.get_rng_state()
    same, other = ToyCalculator(seed=3), ToyCalculator(seed=4)
    assert torch.equal(same.potential.weights, ToyCalculator(seed=3).potential.weights)
    assert not torch.equal(same.potential.weights, other.potential.weights)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_it_knows_the_elements_it_was_made_with():
    backend = load_backend(ToyCalculator(elements=("Cu", "H")))
    assert backend.elements == {1, 29}
    with pytest.raises(InputError, match=r"contains O, which the potential does not know\. It knows H, Cu"):
        backend.collate([molecule("H2O")])


def test_direct_forces_have_no_net_force_and_no_net_torque_without_a_cell():
    calculator = ToyCalculator(direct=True)
    for name in ("CH3CH2OH", "CO2", "H"):
        atoms = molecule(name, calculator=calculator)
        forces = atoms.get_forces()
        np.testing.assert_allclose(forces.sum(0), 0, atol=1e-12)
        np.testing.assert_allclose(np.cross(atoms.positions, forces).sum(0), 0, atol=1e-12)
    boxed = molecule("CH3CH2OH", calculator=calculator, cell=[12] * 3, pbc=True)
    assert np.abs(np.cross(boxed.positions, boxed.get_forces()).sum(0)).max() > 1e-3


def test_molecules_hold_together():
    atoms = molecule("CH4", calculator=ToyCalculator())
    assert BFGS(atoms, logfile=None).run(fmax=0.05, steps=50)
    assert atoms.get_all_distances().max() < 3
