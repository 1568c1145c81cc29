"""Frames that a potential knows nothing of: how they are made, where rattling stops, and what is read of them."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.errors import InputError
from ase_uq.fitting import know_nothing as fitting
from ase_uq.fitting.know_nothing import FRACTIONS, ShortestDistances, know_nothing
from ase_uq.methods import make_method
from ase_uq.methods.base import Head
from ase_uq.testing.methods import fit_head, forward_pass_of, labelled_frames

ELEMENTS = (1, 6, 8)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator())


def head_of(backend: Backend, frames: list[Atoms], name: str = "bll") -> Head:
    return fit_head(make_method(name), backend, frames)


def parents(frames: list[Atoms]) -> list[fitting.Parent]:
    return fitting.parents_of(frames, 5.0)


class TestShortestDistances:
    def test_are_those_of_all_pairs_that_are_neighbours(self, backend: Backend):
        collected = ShortestDistances()
        frames = [molecule(name) for name in ("CH4", "H2O", "CO2", "H2")]
        for atoms in frames:
            collected.add(forward_pass_of(backend, [atoms]))
        found = collected.finish(ELEMENTS, Serial()).numpy()
        expected = np.full((3, 3), np.inf)
        for atoms in frames:
            distances = atoms.get_all_distances() + np.where(np.eye(len(atoms)), np.inf, 0)
            for i, a in enumerate(ELEMENTS):
                for j, b in enumerate(ELEMENTS):
                    among = distances[np.ix_(atoms.numbers == a, atoms.numbers == b)]
                    expected[i, j] = min(expected[i, j], among.min(initial=np.inf))
        np.testing.assert_allclose(found[np.isfinite(expected)], expected[np.isfinite(expected)], rtol=1e-6)
        assert np.isnan(found[~np.isfinite(expected)]).all()


class TestParents:
    def test_atoms_move_by_shares_of_their_own_nearest_distance(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(fitting, "_FRAMES", (400, 400, 0))
        frames = [molecule("CH4"), molecule("H2O")] * 200
        moves = {1: [], 6: []}
        for parent in parents(frames):
            move = parent.rattled(0.1).positions - parent.atoms.positions
            for z, found in moves.items():
                found.append(move[parent.atoms.numbers == z].ravel())
        for found in moves.values():  # C-H is 1.09 Å, O-H 0.96 Å
            assert np.std(np.concatenate(found)) == pytest.approx(0.105, rel=0.1)

    def test_have_no_labels_and_no_constraints(self):
        atoms = molecule("CH4")
        atoms.arrays["REF_forces"] = np.zeros((5, 3))
        atoms.set_constraint(FixAtoms([0]))
        (parent,) = parents([atoms])
        assert set(parent.atoms.arrays) == {"numbers", "positions"}
        assert not parent.atoms.constraints
        assert (parent.displacements[0] != 0).all()
        assert "REF_forces" in atoms.arrays
        assert atoms.constraints

    @pytest.mark.parametrize("atoms", [bulk("Si", "sc", a=2.4), bulk("Si"), bulk("Si", cubic=True)])
    def test_a_small_cell_is_repeated_so_that_its_atoms_move_against_each_other(self, atoms: Atoms):
        (parent,) = parents([atoms])
        assert len(parent.atoms) >= 16
        assert len(parent.atoms) % len(atoms) == 0
        assert parent.atoms.get_volume() / len(parent.atoms) == pytest.approx(atoms.get_volume() / len(atoms))

    def test_a_slab_is_repeated_within_its_plane(self):
        slab = bulk("Si", "sc", a=2.4)
        slab.pbc = (True, True, False)
        (parent,) = parents([slab])
        assert parent.atoms.cell.lengths() == pytest.approx([9.6, 9.6, 2.4])

    def test_lone_atoms_are_no_parents(self):
        assert parents([Atoms("H"), Atoms("O")]) == []
        assert len(parents([Atoms("H"), molecule("CH4")])) == 1

    def test_are_the_same_each_time(self):
        frames = labelled_frames(30, seed=1)
        one, two = parents(frames), parents(frames)
        assert all((a.displacements == b.displacements).all() for a, b in zip(one, two, strict=True))

    @pytest.mark.parametrize(("n_atoms", "expected"), [(9, 12), (64, 6), (500, 4)])
    def test_are_few_where_frames_are_large(self, n_atoms: int, expected: int):
        frames = [Atoms(f"C{n_atoms}", np.linspace(0, n_atoms, n_atoms)[:, None] * [1.3, 0, 0]) for _ in range(20)]
        assert len(parents(frames)) == expected


class TestKnowNothing:
    def fitted(self, backend: Backend, frames: list[Atoms], names=("bll",)):
        heads = {n: head_of(backend, frames, n) for n in names}
        collected = ShortestDistances()
        for atoms in frames:
            collected.add(forward_pass_of(backend, [atoms]))
        elements = sorted({int(z) for atoms in frames for z in atoms.numbers})
        return know_nothing(backend, heads, frames, collected.finish(elements, Serial()), batch_atoms=100)

    def test_is_where_the_median_force_stops_growing(self, backend: Backend, monkeypatch: pytest.MonkeyPatch):
        sizes = iter([1.0, 2.0, 3.0, 2.5, 9.0])

        def forces(_) -> torch.Tensor:  # of all frames, which are one batch
            return torch.tensor([[next(sizes), 0.0, 0.0]], dtype=torch.float64)

        monkeypatch.setattr(fitting, "_forces", forces)
        found = self.fitted(backend, labelled_frames(12, seed=1))
        assert found is not None
        assert found.far_field.fraction == FRACTIONS[2]
        assert found.far_field.median_forces == (1.0, 2.0, 3.0, 2.5)
        assert found.far_field.fractions == FRACTIONS[:4]
        assert found.far_field.force == pytest.approx(9.0 / 3**0.5)

    def test_scores_there_are_medians_of_the_rattled_frames(self, backend: Backend):
        frames = labelled_frames(12, seed=1)
        found = self.fitted(backend, frames, ("bll", "pdrum"))
        assert found is not None
        assert set(found.scores) == {"bll"}  # networks answer anything far away
        head = head_of(backend, frames)
        made = fitting.parents_of(frames, backend.cutoff)
        rattled = [parent.rattled(found.far_field.fraction) for parent in made]
        forces = torch.cat([head(forward_pass_of(backend, [atoms])).forces[:, 0] for atoms in rattled])
        np.testing.assert_allclose(found.scores["bll"]["forces"], forces.log().median(0).values, rtol=1e-6)
        energy = torch.cat([head(forward_pass_of(backend, [atoms])).energy for atoms in rattled])
        np.testing.assert_allclose(found.scores["bll"]["energy"], energy.log().median(0).values, rtol=1e-6)
        batches = [forward_pass_of(backend, [atoms]) for atoms in rattled]
        distance = torch.tensor([head(batch).distance.mean() for batch in batches], dtype=torch.float64)
        np.testing.assert_allclose(found.scores["bll"]["energies"], [distance.log().median()], rtol=1e-6)
        stress = torch.cat([head(batch).stress for batch in batches])
        np.testing.assert_allclose(found.scores["bll"]["stress"], stress.log().median(0).values, rtol=1e-6)
        calm = torch.cat([head(forward_pass_of(backend, [atoms])).forces[:, 0] for atoms in frames])
        assert (found.scores["bll"]["forces"] > calm.log().median(0).values.numpy() + 1).all()

    def test_its_length_is_how_far_the_atoms_were_moved(self, backend: Backend):
        frames = labelled_frames(12, seed=1)
        found = self.fitted(backend, frames)
        assert found is not None
        moves = [
            (parent.rattled(found.far_field.fraction).positions - parent.atoms.positions).ravel()
            for parent in fitting.parents_of(frames, backend.cutoff)
        ]
        assert found.far_field.length == pytest.approx(np.sqrt(np.mean(np.concatenate(moves) ** 2)))

    def test_of_lone_atoms_alone_there_is_none(self, backend: Backend):
        heads = {"bll": head_of(backend, labelled_frames(12, seed=1))}
        lone = [Atoms("H"), Atoms("O")]
        shortest = torch.full((2, 2), torch.nan, dtype=torch.float64)
        assert know_nothing(backend, heads, lone, shortest, batch_atoms=100) is None

    def test_frames_that_cannot_be_evaluated_are_named(self, backend: Backend, monkeypatch: pytest.MonkeyPatch):
        frames = labelled_frames(12, seed=1)
        heads = {"bll": head_of(backend, frames)}

        def fails(*_, **__):
            raise RuntimeError("no such kernel")

        monkeypatch.setattr(type(backend), "_forward", fails)
        with pytest.raises(InputError, match=r"none of \d+ rattled training frames can be evaluated.*no such kernel"):
            know_nothing(backend, heads, frames, torch.ones(3, 3), batch_atoms=100)
