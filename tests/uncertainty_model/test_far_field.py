"""σ∞²: its three parts by hand, smooth and local, and pairs closer than the training frames had them."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.data import covalent_radii

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.forward_pass import Edges, ForwardPass
from ase_uq.numerics.repulsion import zbl_force
from ase_uq.testing.methods import forward_pass_of
from ase_uq.uncertainty_model.far_field import FarField

NAN = float("nan")
# Elements H, C and O; C and O have never met.
SHORTEST = torch.tensor([[1.5, 1.0, 0.9], [1.0, 1.3, NAN], [0.9, NAN, NAN]], dtype=torch.float64)
FAR_FIELD = FarField((1, 6, 8), SHORTEST, 0.5, (0.06, 0.08), (3.0, 2.0), 0.06, 0.07)


def evaluated(*frames: Atoms) -> ForwardPass:
    return forward_pass_of(load_backend(ToyCalculator()), list(frames))


def pair(symbols: str, distance: float) -> Atoms:
    return Atoms(symbols, [(0, 0, 0), (0, 0, distance)])


def force_of_zbl(distance: float, z1: int, z2: int) -> float:
    return float(zbl_force(torch.tensor([distance], dtype=torch.float64), torch.tensor([z1]), torch.tensor([z2])))


class TestVariance:
    def test_of_a_lone_atom_is_that_of_training_and_its_own_force(self):
        forward_pass = evaluated(Atoms("H"))
        assert forward_pass.forces is not None
        expected = 0.25 + forward_pass.forces.double().square().mean()
        torch.testing.assert_close(FAR_FIELD.variance(forward_pass), expected[None])

    def test_counts_the_forces_around_with_weights_that_fall_to_zero_at_the_cutoff(self):
        forward_pass = evaluated(molecule("CH3CH2OH"))
        assert forward_pass.forces is not None
        squares = forward_pass.forces.double().square().mean(1).numpy()
        positions = forward_pass.positions.numpy()
        distance = np.linalg.norm(positions[:, None] - positions[None], axis=2)
        cutoff = forward_pass.edges.cutoff
        weight = np.where(distance < cutoff, 0.5 * (1 + np.cos(np.pi * distance / cutoff)), 0)
        far = FarField((1, 6, 8), torch.full((3, 3), 0.1, dtype=torch.float64), 0.5, (), (), 0.06, 0.07)
        np.testing.assert_allclose(far.variance(forward_pass), 0.25 + weight @ squares / weight.sum(1), rtol=1e-6)

    @pytest.mark.parametrize(("symbols", "z1", "z2", "shortest"), [("CH", 6, 1, 1.0), ("OH", 8, 1, 0.9)])
    def test_grows_by_the_repulsion_that_training_lacked(self, symbols: str, z1: int, z2: int, shortest: float):
        near, touching = (evaluated(pair(symbols, distance)) for distance in (0.6, shortest))
        excess = force_of_zbl(0.6, z1, z2) - force_of_zbl(shortest, z1, z2)
        for forward_pass, expected in ((near, excess**2 / 3), (touching, 0.0)):
            assert forward_pass.forces is not None
            # Both atoms have the same force, so the mean around either is this.
            rest = 0.25 + forward_pass.forces.double().square().mean(1)
            torch.testing.assert_close(FAR_FIELD.variance(forward_pass) - rest, torch.full((2,), expected).double())

    @pytest.mark.parametrize(("symbols", "z1", "z2"), [("CO", 6, 8), ("SiH", 14, 1)])
    def test_elements_that_never_met_repel_from_four_fifths_of_a_bond(self, symbols: str, z1: int, z2: int):
        bond = 0.8 * (covalent_radii[z1] + covalent_radii[z2])
        contact = FAR_FIELD.contact(evaluated(pair(symbols, 0.9 * bond)))
        np.testing.assert_allclose(contact, 0.9, rtol=1e-5)

    def test_two_atoms_at_one_place_have_a_finite_one(self):
        forward_pass = evaluated(pair("CH", 1.0))
        edges = forward_pass.edges
        at_one_place = Edges(edges.source, edges.target, 0 * edges.vector, edges.cutoff)
        assert bool(torch.isfinite(FAR_FIELD._repulsion(at_one_place, forward_pass.numbers)).all())

    def test_an_atom_has_the_same_in_any_supercell_and_beside_anything_distant(self):
        cell = bulk("Si", cubic=True)
        cell.rattle(0.1, seed=1)
        far = FarField((14,), torch.tensor([[2.2]], dtype=torch.float64), 0.5, (), (), 0.06, 0.07)
        one, eight = (far.variance(evaluated(atoms)) for atoms in (cell, cell.repeat(2)))
        torch.testing.assert_close(eight, one.repeat(8), rtol=1e-4, atol=1e-6)
        water = molecule("H2O")
        distant = water + Atoms("Si2", [(40, 0, 0), (41.5, 0, 0)])
        torch.testing.assert_close(
            FAR_FIELD.variance(evaluated(distant))[:3], FAR_FIELD.variance(evaluated(water)), rtol=1e-4, atol=1e-6
        )

    def test_of_a_batch_is_that_of_each_structure(self):
        frames = [molecule("H2O"), Atoms("O"), molecule("CH4")]
        together = FAR_FIELD.variance(evaluated(*frames))
        alone = torch.cat([FAR_FIELD.variance(evaluated(atoms)) for atoms in frames])
        torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-8)


class TestEnergyVariance:
    def variance(self, *frames: Atoms) -> torch.Tensor:
        forward_pass = evaluated(*frames)
        return FAR_FIELD.energy_variance(FAR_FIELD.variance(forward_pass), forward_pass)

    def test_of_an_atom_that_moves_alone_is_the_work_of_its_force(self):
        atoms = Atoms("H")
        force = FAR_FIELD.variance(evaluated(atoms)).sqrt()
        torch.testing.assert_close(self.variance(atoms), (0.07 * force).square())

    def test_of_totals_adds_up_over_structures_that_are_far_apart(self):
        water, methane = molecule("H2O"), molecule("CH4")
        methane.positions += 40
        one, other, both = (float(self.variance(atoms).sqrt()) for atoms in (water, methane, water + methane))
        assert 8 * both == pytest.approx(3 * one + 5 * other, rel=1e-5)

    def test_is_the_same_per_atom_in_any_supercell_and_in_a_batch(self):
        cell = bulk("Si", cubic=True)
        cell.rattle(0.1, seed=1)
        one, eight, water = self.variance(cell, cell.repeat(2), molecule("H2O"))
        torch.testing.assert_close(eight, one, rtol=1e-4, atol=0)
        torch.testing.assert_close(water, self.variance(molecule("H2O"))[0])


class TestLimits:
    def test_of_an_atoms_energy_is_that_of_its_force_times_the_length_and_of_a_structure_their_mean(self):
        limits = FAR_FIELD.limits(forward_pass := evaluated(molecule("CH3CH2OH")))
        force = FAR_FIELD.variance(forward_pass)
        torch.testing.assert_close(limits.forces, force)
        torch.testing.assert_close(limits.energies.sqrt(), 0.07 * force.sqrt())
        torch.testing.assert_close(limits.energy.sqrt(), limits.energies.sqrt().mean()[None])


class TestStressVariance:
    """The toy potential has a cutoff of a few Å; crystals are rattled so that forces do not vanish."""

    def variance(self, *frames: Atoms) -> torch.Tensor:
        found = FAR_FIELD.limits(evaluated(*frames)).stress
        assert found is not None
        return found

    @pytest.fixture
    def cell(self) -> Atoms:
        atoms = bulk("C", cubic=True)
        atoms.rattle(0.1, seed=1)
        return atoms

    def test_is_that_of_forces_at_bonds_and_of_the_predicted_stress(self, cell: Atoms):
        forward_pass = evaluated(cell)
        assert forward_pass.stress is not None
        forces = FAR_FIELD.variance(forward_pass).sqrt().numpy()
        distances = cell.get_all_distances(mic=True) + 9 * np.eye(len(cell))
        virial = (forces * distances.min(1)).sum() / np.sqrt(10)
        predicted = float(forward_pass.stress.square().mean())
        assert float(self.variance(cell)) == pytest.approx((virial / cell.get_volume()) ** 2 + predicted, rel=1e-5)

    def test_its_share_of_a_bond_is_that_of_independent_forces_along_bonds(self):
        """Monte Carlo of ½ Σ_j d·r_j f_j beside Σ_j r_j f_j, over any number of bonds in any direction."""
        random = np.random.default_rng(0)
        directions = random.normal(size=(200_000, 4, 3))
        directions /= np.linalg.norm(directions, axis=2, keepdims=True)
        along = random.normal(size=(200_000, 4, 1))
        force = (directions * along).sum(1)
        virial = 0.5 * 1.7 * np.einsum("nja,njb->nab", directions * along, directions)
        voigt = virial.reshape(-1, 9)[:, [0, 4, 8, 5, 2, 1]]
        assert np.sqrt(np.mean(voigt**2) / np.mean(force**2)) == pytest.approx(1.7 / np.sqrt(10), rel=0.01)

    def test_is_the_same_in_any_supercell_and_in_a_batch(self, cell: Atoms):
        one, eight, again = self.variance(cell, cell.repeat(2), cell)
        torch.testing.assert_close(eight, one, rtol=1e-4, atol=0)
        torch.testing.assert_close(again, self.variance(cell)[0])

    def test_falls_with_the_volume_as_stresses_do(self):
        atoms = molecule("CH3CH2OH", cell=[30] * 3, pbc=True)
        larger = molecule("CH3CH2OH", cell=[30, 30, 60], pbc=True)
        small, large = self.variance(atoms, larger).sqrt()
        torch.testing.assert_close(small, 2 * large, rtol=1e-4, atol=0)

    def test_of_totals_adds_up_over_structures_that_are_far_apart(self):
        water, methane = molecule("H2O"), molecule("CH4")
        methane.positions += 20
        frames = [water, methane, water + methane]
        for atoms in frames:
            atoms.set_cell([60] * 3)
        forward_pass = replace(evaluated(*frames), stress=torch.zeros(3, 6, dtype=torch.float64))
        found = FAR_FIELD.limits(forward_pass).stress
        assert found is not None
        one, other, both = found.sqrt().tolist()
        assert both == pytest.approx(one + other, rel=1e-5)

    def test_of_a_compressed_perfect_crystal_is_at_least_its_stress(self):
        atoms = bulk("C", cubic=True)
        atoms.set_cell(0.8 * atoms.cell.array, scale_atoms=True)
        stress = evaluated(atoms).stress
        assert stress is not None
        assert float(self.variance(atoms)) > float(stress.square().mean())

    def test_without_a_cell_or_neighbours_there_is_next_to_none_and_without_stress_none(self):
        assert self.variance(molecule("H2O"), Atoms("H", cell=[30] * 3, pbc=True)).tolist() == pytest.approx(
            [1e-20] * 2
        )
        direct = forward_pass_of(load_backend(ToyCalculator(direct=True)), [bulk("C")])
        assert direct.volumes is None
        assert FAR_FIELD.limits(direct).stress is None


class TestContact:
    def test_is_the_smallest_share_of_the_shortest_distance_of_training(self):
        atoms = Atoms("CHH", [(0, 0, 0), (0, 0, 0.8), (0, 1.6, 0)])
        found = FAR_FIELD.contact(evaluated(atoms))
        between = np.hypot(0.8, 1.6) / 1.5
        np.testing.assert_allclose(found, [0.8, 0.8, min(1.6, between)], rtol=1e-6)

    def test_of_a_lone_atom_is_infinite(self):
        assert FAR_FIELD.contact(evaluated(Atoms("H"))).tolist() == [float("inf")]


def test_settings_make_it_again():
    again = FarField.load(json.loads(json.dumps(FAR_FIELD.settings)), SHORTEST)
    assert again.settings == FAR_FIELD.settings
    assert again.elements == (1, 6, 8)
    assert again.length == 0.07
