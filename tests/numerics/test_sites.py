"""Sums and means over the sites around an atom, against loops over every image of every neighbour."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.neighborlist import neighbor_list
from torch import Tensor

from ase_uq.forward_pass import Edges
from ase_uq.numerics.sites import HOPS, RADII, Sites, around, mean_around, sum_over_sites

CUTOFF = 6.0
FIELDS = ("sums", "counts", "hops")


def edges_of(frames: Sequence[Atoms], cutoff: float = CUTOFF) -> Edges:
    targets, sources, vectors, offset = [], [], [], 0
    for atoms in frames:
        i, j, vector = neighbor_list("ijD", atoms, cutoff)
        targets.append(i + offset)
        sources.append(j + offset)
        vectors.append(vector)
        offset += len(atoms)
    parts = (torch.from_numpy(np.concatenate(arrays)) for arrays in (sources, targets, vectors))
    return Edges(*parts, cutoff=cutoff)


def values_of(n_atoms: int, seed: int = 0) -> Tensor:
    return torch.from_numpy(np.random.default_rng(seed).lognormal(size=n_atoms))


def weight(atoms: Atoms, i: int, j: int, radius: float) -> float:
    """Of j for i, over all images within the radius: three cells to each side are more than enough."""
    steps = range(-3, 4) if atoms.pbc.any() else (0,)
    total = 0.0
    for shift in np.array([(a, b, c) for a in steps for b in steps for c in steps]):
        r = np.linalg.norm(atoms.positions[j] + shift @ atoms.cell.array - atoms.positions[i])
        if 1e-9 < r < radius:
            total += 0.5 * (1 + np.cos(np.pi * r / radius))
    return total


@pytest.fixture
def crystal() -> Atoms:
    """Skewed and smaller than the radii: atoms are neighbours of images of themselves."""
    atoms = molecule("CH3OH", cell=[[4.2, 0, 0], [0.6, 4.4, 0], [0, 0.3, 4.6]], pbc=True)
    atoms.rattle(0.1, seed=1)
    return atoms


STRUCTURES = {
    "molecule": molecule("CH3CH2OH"),
    "crystal": molecule("H2O", cell=[[3.4, 0, 0], [0.6, 3.6, 0], [0, 0.3, 3.8]], pbc=True),
    "one atom a cell": bulk("Cu"),
}


class TestLoops:
    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_sums_and_counts(self, kind: str):
        atoms = STRUCTURES[kind]
        own = values_of(len(atoms))
        found = around(own, edges_of([atoms]), RADII)
        assert found.sums.shape == found.counts.shape == (len(atoms), 1 + len(RADII))
        assert torch.equal(found.sums[:, 0], own)
        assert bool((found.counts[:, 0] == 1).all())
        for k, radius in enumerate(RADII):
            for i in range(len(atoms)):
                weights = [weight(atoms, i, j, radius) for j in range(len(atoms))]
                assert float(found.sums[i, 1 + k]) == pytest.approx(
                    float(own[i]) + np.dot(weights, own.numpy()), rel=1e-10
                )
                assert float(found.counts[i, 1 + k]) == pytest.approx(1 + sum(weights), rel=1e-10)

    @pytest.mark.parametrize("kind", STRUCTURES)
    def test_hops_are_means_of_means_within_the_widest_radius(self, kind: str):
        atoms = STRUCTURES[kind]
        everyone = range(len(atoms))
        weights = [[(i == j) + weight(atoms, i, j, 3.5) for j in everyone] for i in everyone]
        means = values_of(len(atoms)).tolist()
        # The widest is not the last.
        found = around(values_of(len(atoms)), edges_of([atoms]), (2.5, 3.5, 1.5)).hops
        assert found.shape == (len(atoms), HOPS)
        for hop in range(HOPS):
            means = [sum(weights[i][j] * means[j] for j in everyone) / sum(weights[i]) for i in everyone]
            np.testing.assert_allclose(found[:, hop], means, rtol=1e-10)

    def test_columns_are_summed_each_on_its_own(self, crystal: Atoms):
        edges = edges_of([crystal])
        columns = torch.stack([values_of(len(crystal), seed) for seed in range(3)], 1)
        found = sum_over_sites(columns, edges, RADII)
        assert found.shape == (len(crystal), 3, len(RADII))
        for k in range(3):
            torch.testing.assert_close(found[:, k], sum_over_sites(columns[:, k], edges, RADII), rtol=1e-14, atol=0)
        torch.testing.assert_close(found[:, 0], around(columns[:, 0], edges, RADII).sums[:, 1:], rtol=1e-14, atol=0)


class TestLocality:
    def test_batch_equals_singles(self, crystal: Atoms):
        frames = [molecule("H2O"), crystal, Atoms("O"), molecule("CH3OH")]
        own = [values_of(len(atoms), seed) for seed, atoms in enumerate(frames)]
        together = around(torch.cat(own), edges_of(frames), RADII)
        alone = [around(values, edges_of([atoms]), RADII) for values, atoms in zip(own, frames, strict=True)]
        for name in FIELDS:
            joined = torch.cat([getattr(sites, name) for sites in alone])
            torch.testing.assert_close(getattr(together, name), joined, rtol=1e-13, atol=0)

    def test_far_copies_have_the_values_of_one(self):
        atoms, far = molecule("CH3OH"), molecule("CH3OH")
        far.positions += 50.0
        own = values_of(len(atoms))
        _assert_repeated(around(own.repeat(2), edges_of([atoms + far]), RADII), around(own, edges_of([atoms]), RADII))

    def test_a_supercell_has_the_values_of_its_cell(self, crystal: Atoms):
        own = values_of(len(crystal))
        large = around(own.repeat(4), edges_of([crystal.repeat((2, 1, 2))]), RADII)
        _assert_repeated(large, around(own, edges_of([crystal]), RADII))

    def test_turning_changes_nothing(self, crystal: Atoms):
        turned = crystal.copy()
        turned.rotate(40, (1, 2, 3), rotate_cell=True)
        own = values_of(len(crystal))
        _assert_repeated(around(own, edges_of([turned]), RADII), around(own, edges_of([crystal]), RADII))

    @pytest.mark.parametrize("n_atoms", [1, 3])
    def test_without_neighbours_there_is_only_the_own_value(self, n_atoms: int):
        own = values_of(n_atoms)
        edges = edges_of([Atoms(f"H{n_atoms}", [(0, 0, 20.0 * k) for k in range(n_atoms)])])
        assert len(edges.source) == 0
        found = around(own, edges, RADII)
        assert torch.equal(found.sums, own[:, None].expand(-1, 1 + len(RADII)))
        assert bool((found.counts == 1).all())
        assert torch.equal(found.hops, own[:, None].expand(-1, HOPS))

    def test_means_lie_between_the_values(self, crystal: Atoms):
        own = values_of(len(crystal))
        found = around(own, edges_of([crystal]), RADII)
        for means in (found.sums / found.counts, found.hops):
            assert bool((means >= own.min() * (1 - 1e-12)).all())
            assert bool((means <= own.max() * (1 + 1e-12)).all())
        equal = around(torch.full_like(own, 7.0), edges_of([crystal]), RADII)
        torch.testing.assert_close(equal.hops, torch.full_like(equal.hops, 7.0), rtol=1e-13, atol=0)


class TestSmoothness:
    def test_a_neighbour_comes_and_goes_smoothly(self):
        def at(r: float) -> float:
            pair = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([[r, 0, 0]] * 2, dtype=torch.float64)
            values = torch.tensor([1.0, 1.0], dtype=torch.float64)
            return float(sum_over_sites(values, Edges(*pair), [2.0])[0, 0])

        assert at(0.0) == 2.0
        assert at(1.0) == pytest.approx(1.5)
        assert at(2.0 - 1e-4) == pytest.approx(1.0, abs=1e-8)
        assert at(2.0) == at(3.0) == 1.0

    @pytest.mark.parametrize("radius", [2.5, 4.0, 5.0])
    def test_all_is_smooth_where_a_radius_or_the_neighbour_list_ends(self, radius: float):
        """An atom leaves another, whose value is a tenth of its own and a hundredth of that of the atom behind it."""
        end = min(radius, 4.0)

        def at(r: float) -> Sites:
            atoms = Atoms("H3", [(0, 0, 0), (r, 0, 0), (r + 1.0, 0, 0)])
            own = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
            return around(own, edges_of([atoms], cutoff=4.0), [radius])

        for name in FIELDS:
            before, after = (getattr(at(end + step), name)[0] for step in (-1e-4, 1e-4))
            # Quadratic in the distance to the end; a jump or a kink would leave 1e-4 or more.
            assert float((after - before).abs().max()) < 1e-6

    def test_a_radius_ends_at_the_cutoff_of_the_potential(self):
        pair = torch.tensor([0, 1]), torch.tensor([1, 0]), torch.tensor([[2.0, 0, 0]] * 2, dtype=torch.float64)
        values = torch.ones(2, dtype=torch.float64)
        cut = sum_over_sites(values, Edges(*pair, cutoff=3.0), [5.0])
        assert torch.equal(cut, sum_over_sites(values, Edges(*pair), [3.0]))


def test_edges_in_single_precision_are_taken_in_double(crystal: Atoms):
    edges, own = edges_of([crystal]), values_of(len(crystal))
    single = Edges(edges.source, edges.target, edges.vector.float(), edges.cutoff)
    found, expected = around(own, single, RADII), around(own, edges, RADII)
    for name in FIELDS:
        assert getattr(found, name).dtype == torch.float64
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=0)


def test_values_are_not_changed():
    values = torch.ones(2, dtype=torch.float64)
    edges = Edges(torch.tensor([0]), torch.tensor([1]), torch.tensor([[1.0, 0, 0]]))
    sum_over_sites(values, edges, [2.0])
    around(values, edges, [2.0])
    assert values.tolist() == [1.0, 1.0]


def _assert_repeated(found: Sites, once: Sites) -> None:
    for name in FIELDS:
        expected = getattr(once, name)
        copies = len(getattr(found, name)) // len(expected)
        torch.testing.assert_close(getattr(found, name), expected.repeat(copies, 1), rtol=1e-10, atol=0)


class TestMeanAround:
    def test_is_the_ratio_of_the_sums(self):
        random = np.random.default_rng(0)
        positions = torch.from_numpy(random.uniform(0, 6, size=(12, 3)))
        pairs = [(i, j) for i in range(12) for j in range(12) if i != j]
        target, source = (torch.tensor(side) for side in zip(*pairs, strict=True))
        edges = Edges(source, target, positions[source] - positions[target])
        values = torch.from_numpy(random.normal(size=(12, 3)))
        sums = sum_over_sites(values, edges, [3.5])[:, :, 0]
        counts = sum_over_sites(torch.ones(12, dtype=torch.float64), edges, [3.5])
        torch.testing.assert_close(mean_around(values, edges, 3.5), sums / counts)

    def test_of_a_lone_atom_is_its_own(self):
        nothing = torch.zeros(0, dtype=torch.long)
        edges = Edges(nothing, nothing, torch.zeros(0, 3, dtype=torch.float64))
        values = torch.tensor([[1.0, 2.0]], dtype=torch.float64)
        assert torch.equal(mean_around(values, edges, 3.5), values)


def test_weights_are_made_once_for_each_set_of_radii(monkeypatch):
    """Several methods ask for the same; part of the edges has weights of its own."""
    edges, made = edges_of([molecule("CH3OH")]), []
    cos = torch.cos
    monkeypatch.setattr(torch, "cos", lambda share: made.append(share.shape) or cos(share))
    values = values_of(6)
    first = around(values, edges, RADII)
    for name in FIELDS:
        assert torch.equal(getattr(around(values, edges, RADII), name), getattr(first, name))
    assert len(made) == 1
    narrow = sum_over_sites(values, edges, RADII[:1])
    torch.testing.assert_close(narrow[:, 0], first.sums[:, 1])
    assert len(made) == 2
    mean_around(values[:, None], edges, RADII[0])
    assert len(made) == 3
