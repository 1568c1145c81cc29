"""Choosing frames of a pool, with the toy potential: the algorithms themselves are tested in `test_selection`."""

from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ase_uq import embedded
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.engines.ase.calculator import UncertainCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.fitting.fit import fit
from ase_uq.methods.pops import POPS
from ase_uq.predictor import Predictor
from ase_uq.selection.points import Scan
from ase_uq.selection.select import Selection
from ase_uq.selection.select import select as choose_frames
from ase_uq.selection.strategies import LargestCluster, Points, Space, choose
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.thresholds.criteria import Quantile
from ase_uq.uncertainty_model.model import UncertaintyModel

pytestmark = pytest.mark.filterwarnings("ignore:.*tells nothing about:ase_uq.errors.UQWarning")  # invented labels


@pytest.fixture(scope="module")
def train() -> list[Atoms]:
    return labelled_frames(40, seed=1)


@pytest.fixture(scope="module")
def pool() -> list[Atoms]:
    """Like the training frames; the last ten are torn."""
    frames = labelled_frames(40, seed=2)
    for atoms in frames[30:]:
        atoms.positions += np.random.default_rng(len(atoms)).normal(scale=0.4, size=atoms.positions.shape)
    return frames


@pytest.fixture(scope="module")
def model(train: list[Atoms]) -> UncertaintyModel:
    return fitted(train, ["bll"])


@pytest.fixture(scope="module")
def select(model: UncertaintyModel):
    def select(pool, n, **options) -> Selection:
        calculator = options.pop("calculator", ToyCalculator(ELEMENTS))
        return choose_frames(pool, n, calculator=calculator, progress=False, **{"uncertainty_model": model} | options)

    return select


def fitted(train: list[Atoms], methods) -> UncertaintyModel:
    return fit(ToyCalculator(ELEMENTS), train, labelled_frames(40, seed=3), methods=methods, progress=False)


def pooled(model: UncertaintyModel, frames: list[Atoms]) -> torch.Tensor:
    forward_pass = forward_pass_of(load_backend(ToyCalculator(ELEMENTS)), frames)
    rows = model.methods["bll"].head.features(forward_pass)
    return torch.stack([rows[forward_pass.frame_of_atom == k].mean(0) for k in range(len(frames))])


def _around(atoms: Atoms, centre: int) -> list[int]:
    """The atom and those bound to it, whose surroundings change with it."""
    return np.flatnonzero(atoms.get_all_distances()[centre] < 2.0).tolist()


def readings(model: UncertaintyModel, frames: list[Atoms]) -> np.ndarray:
    calculator, found = UncertainCalculator(ToyCalculator(ELEMENTS), model), []
    for atoms in frames:
        calculator.calculate(atoms)
        found.append(np.linalg.norm(calculator.results["forces_uncertainty"], axis=1).max())
    return np.array(found)


class TestStructures:
    def test_a_structure_is_the_mean_of_its_atoms(self, select, model, pool, train):
        own, known = Points.single(pooled(model, pool)), Points.single(pooled(model, train))
        expected = [pick.candidate for pick in choose(Space(own, known), 12, LargestCluster())]
        found = select(pool, 12, train=train)
        assert found.indices.tolist() == expected
        assert (found.method, found.strategy, found.n_pool) == ("bll", "lcmd", 40)

    @pytest.mark.parametrize("strategy", ["lcmd", "maxdet", "maxdist"])
    def test_what_is_unlike_the_training_frames_is_chosen(self, select, pool, train, strategy):
        found = select(pool, 8, train=train, strategy=strategy)
        assert np.mean(found.indices >= 30) >= 0.75
        assert np.mean(select(pool, 8, train=train, strategy="random").indices >= 30) < 0.75

    def test_files_and_batches_change_nothing(self, select, pool, train, tmp_path: Path):
        write(tmp_path / "pool.xyz", pool)
        write(tmp_path / "train.xyz", train)
        expected = select(pool, 10, train=train)
        found = select(tmp_path / "pool.xyz", 10, train=str(tmp_path / "train.xyz"), batch_atoms=7)
        assert found.indices.tolist() == expected.indices.tolist()
        np.testing.assert_allclose(found.uncertainties, expected.uncertainties, rtol=1e-5)  # digits of the file

    def test_an_uncertain_calculator_brings_its_model(self, select, model, pool):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model)
        found = select(pool, 5, calculator=calculator, uncertainty_model=None)
        assert found.indices.tolist() == select(pool, 5).indices.tolist()

    def test_uncertainties_are_those_of_the_calculator(self, select, model, pool):
        found = select(pool, 3)
        np.testing.assert_allclose(found.uncertainties, readings(model, pool), rtol=1e-9)
        for one in found.chosen:
            assert one.uncertainty == found.uncertainties[one.frame]

    def test_distances_are_in_units_of_the_typical_one(self, select, model, pool, train):
        own, known = pooled(model, pool), pooled(model, train)
        first = select(pool, 1, train=train).chosen[0]
        typical = torch.nn.functional.pdist(own).median()
        assert first.distance == pytest.approx(float((own[first.frame] - known).norm(dim=1).min() / typical), rel=1e-4)

    def test_the_reason_is_told(self, select, pool, train):
        first, *_ = select(pool, 3, train=train).chosen
        assert first.reason.startswith("farthest around training frame ")
        assert select(pool, 1).chosen[0].reason == "nothing like it is known"
        assert select(pool, 1, strategy="top").chosen[0].reason == "most uncertain"

    def test_near_duplicates_are_left_out_and_counted(self, select, pool, train):
        turned = [atoms.copy() for atoms in pool[:10]]
        for atoms in turned:
            atoms.rotate(40, (1, 2, 3))
        copies = [*pool[:10], *turned, *train[:5]]
        with pytest.warns(
            UQWarning, match=r"10 of the 25 frames asked for were chosen: 15 are near-duplicates of these"
        ):
            found = select(copies, 25, train=train)
        assert sorted(found.indices % 10) == list(range(10))
        assert found.near_duplicates == 15

    def test_a_pool_that_is_all_the_same(self, select, pool):
        with pytest.warns(UQWarning, match="1 of the 4 frames asked for were chosen"):
            assert len(select([pool[0]] * 4, 4).chosen) == 1


class TestEnvironments:
    def test_a_frame_is_chosen_for_one_of_its_atoms(self, select, train):
        pool = labelled_frames(20, seed=5, spread=(0.02, 0.03))
        torn = next(k for k, atoms in enumerate(pool) if atoms.get_chemical_formula() == "CH4O")
        hydrogen = int(np.flatnonzero(pool[torn].numbers == 1)[0])
        pool[torn].positions[hydrogen] *= 1.4
        first = select(pool, 1, train=train, per="environment", strategy="maxdist").chosen[0]
        assert first.frame == torn
        assert first.atom in _around(pool[torn], hydrogen)
        assert select(pool, 1).chosen[0].atom is None

    def test_an_element_without_training_atoms_comes_first(self, select, pool, train):
        no_oxygen = [atoms for atoms in train if 8 not in atoms.numbers]
        first = select(pool, 1, train=no_oxygen, per="environment").chosen[0]
        assert pool[first.frame].numbers[first.atom] == 8
        assert first.distance == np.inf


class TestBands:
    def test_top_are_the_most_uncertain(self, select, model, pool):
        expected = np.argsort(-readings(model, pool), kind="stable")[:6]
        assert select(pool, 6, strategy="top").indices.tolist() == expected.tolist()

    @pytest.mark.parametrize("strategy", ["bands", "lcmd", "top"])
    def test_only_candidates_are_chosen_and_all_are_counted(self, select, model, pool, strategy):
        found = readings(model, pool)
        flag, halt = np.quantile(found, [0.4, 0.9])
        chosen = select(pool, 5, strategy=strategy, flag=flag, halt=halt)
        assert ((flag <= found[chosen.indices]) & (found[chosen.indices] < halt)).all()
        bands = chosen.bands
        assert (bands.trusted, bands.candidate, bands.failed) == (16, 20, 4)
        assert bands.describe() == (
            f"bands at {flag:.3g} and {halt:.3g} eV/Å: trusted 16 (40.0%), candidate 20 (50.0%), failed 4 (10.0%)"
        )

    def test_thresholds_may_be_meanings(self, select, model, pool):
        assert select(pool, 2, flag=Quantile(0.5)).bands.flag == model.threshold(Quantile(0.5))

    def test_no_candidate_is_nothing_chosen(self, select, pool):
        with pytest.warns(
            UQWarning, match=r"0 of the 3 frames asked for were chosen: 0 of the 0 between 1e\+05 and inf"
        ):
            found = select(pool, 3, flag=1e5)
        assert not found.chosen
        assert found.indices.dtype == int
        assert found.frames(pool) == []

    @pytest.mark.parametrize("strategy", ["random", "bands"])
    def test_the_seed_makes_what_is_random(self, select, pool, strategy):
        options = {"strategy": strategy} | ({"flag": 1e-9, "halt": 1e9} if strategy == "bands" else {})
        first, again, other = (select(pool, 10, seed=seed, **options).indices.tolist() for seed in (1, 1, 2))
        assert first == again != other


class TestMethods:
    def test_the_first_with_features_is_taken(self, select, pool, train):
        several = fitted(train, ["pops", "kernel", "bll"])
        assert select(pool, 2, uncertainty_model=several).method == "kernel"
        own = select(pool, 5, uncertainty_model=several, method="bll", train=train)
        assert own.indices.tolist() == select(pool, 5, train=train).indices.tolist()
        with pytest.raises(ValueError, match=r"the method 'pops' has no features to .* in: take 'kernel' or 'bll'\."):
            select(pool, 2, uncertainty_model=several, method="pops")
        with pytest.raises(ValueError, match=r"has no method 'gmm'\. It has pops, kernel, bll"):
            select(pool, 2, uncertainty_model=several, method="gmm")

    def test_none_with_features(self, select, pool, train):
        alone = fitted(train, [POPS()])
        message = (
            "none of the fitted methods, pops, has features to measure distances in: fit 'bll' or 'kernel' as well"
        )
        with pytest.raises(ValueError, match=message):
            select(pool, 2, uncertainty_model=alone)


class TestCumulants:
    def test_a_structure_is_the_cumulants_over_its_atoms(self, model, pool):
        predictor = Predictor(load_backend(ToyCalculator(ELEMENTS)), model)
        head = model.methods["bll"].head
        points = Scan(predictor, head, "structure", None, 3).pool(pool, "")[0]
        for atoms, row in zip(pool, points.rows, strict=True):
            features = head.features(forward_pass_of(predictor.backend, [atoms])).numpy()
            apart = features - features.mean(0)
            expected = [features.mean(0), np.sqrt((apart**2).mean(0)), np.cbrt((apart**3).mean(0))]
            np.testing.assert_allclose(row, np.concatenate(expected), rtol=1e-4, atol=1e-5)

    def test_other_frames_are_chosen_by_more_of_them(self, select, pool, train):
        alone, one, more = (
            select(pool, 8, train=train, **options) for options in ({}, {"cumulants": 1}, {"cumulants": 3})
        )
        assert alone.indices.tolist() == one.indices.tolist()
        assert more.indices.tolist() != one.indices.tolist()


class TestFrames:
    def test_chosen_frames_know_their_rank_and_carry_no_results(self, select, pool, tmp_path: Path):
        frames = [atoms.copy() for atoms in pool]
        for atoms in frames:
            atoms.calc = SinglePointCalculator(atoms, energy=-1.0, forces=np.zeros((len(atoms), 3)))
        write(tmp_path / "pool.xyz", frames)
        found = select(frames, 4)
        for source in (frames, tmp_path / "pool.xyz"):
            chosen = found.frames(source)
            assert [atoms.info["source_index"] for atoms in chosen] == found.indices.tolist()
            assert [atoms.info["selected_rank"] for atoms in chosen] == [1, 2, 3, 4]
            for atoms, one in zip(chosen, found.chosen, strict=True):
                assert atoms.calc is None
                assert (atoms.info["selected_uncertainty"], atoms.info["selected_distance"]) == (
                    one.uncertainty,
                    one.distance,
                )
                assert "selected_atom" not in atoms.info
                np.testing.assert_allclose(atoms.positions, frames[one.frame].positions, atol=1e-7)
                assert "REF_forces" in atoms.arrays
        assert "selected_rank" not in frames[found.indices[0]].info

    def test_the_atom_is_told_where_environments_were_compared(self, select, pool):
        found = select(pool, 2, per="environment")
        assert [atoms.info["selected_atom"] for atoms in found.frames(pool)] == [one.atom for one in found.chosen]


@pytest.mark.parametrize("strategy", ["lcmd", "maxdet", "maxdist", "top", "random"])
def test_a_pool_of_fewer_frames_is_taken_whole(select, pool, strategy: str):
    with pytest.warns(
        UQWarning, match=r"100 frames were asked for and the pool has 6: no more than these can be chosen\."
    ):
        found = select(pool[-6:], 100, strategy=strategy)
    assert sorted(found.indices) == list(range(6))


class TestRefusals:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"n": 0}, "0 frames were asked for; 1 or more was expected"),
            ({"strategy": "best"}, "strategy must be one of 'lcmd', 'maxdet', .*, not 'best'"),
            ({"per": "atom"}, "per must be one of 'structure', 'environment', not 'atom'"),
            ({"cumulants": 5}, r"cumulants is 5; the highest order of 1 \(means alone\) to 4 was expected"),
            ({"cumulants": 2, "per": "environment"}, "cumulants is 2, but an environment is one atom"),
            ({"strategy": "bands", "flag": 0.1}, "chooses between two thresholds: give flag and halt"),
            ({"flag": 0.5, "halt": 0.5}, "flag is 0.5 eV/Å and halt is 0.5 eV/Å, so no frame lies between"),
            ({"duplicates": 1.0}, "duplicates must be a share of the typical distance from 0 to below 1, not 1.0"),
            ({"strategy": "maxdet", "noise": -1.0}, "the noise is -1.0; a number above 0 was expected"),
        ],
    )
    def test_options(self, select, pool, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            select(pool, options.pop("n", 3), **options)

    def test_no_frames(self, select, tmp_path: Path):
        with pytest.raises(InputError, match="the pool has no frames"):
            select([], 1)
        (tmp_path / "empty.xyz").touch()
        with pytest.raises(InputError, match=r"the file .*empty.xyz is empty"):
            select(tmp_path / "empty.xyz", 1)
        with pytest.raises(InputError, match=r"there is no file .*no.xyz"):
            select(tmp_path / "no.xyz", 1)

    def test_no_training_frames(self, select, pool):
        with pytest.raises(InputError, match="there are no training frames"):
            select(pool, 1, train=[])

    def test_a_structure_without_finite_features_is_left_out(
        self, select, pool, model, monkeypatch: pytest.MonkeyPatch
    ):
        head = type(model.methods["bll"].head)
        whole, bad = head.features, pool[1].positions[0]

        def broken(self, forward_pass):
            rows = whole(self, forward_pass)
            rows[(forward_pass.positions == torch.tensor(bad)).all(1)] = torch.nan
            return rows

        monkeypatch.setattr(head, "features", broken)
        with pytest.warns(UQWarning, match="frame 1 was left out: its features are not finite: its atoms are"):
            found = select(pool, 39)
        assert list(found.left_out) == [1]
        assert sorted(found.indices) == [0, *range(2, 40)]
        kept = select([pool[0], *pool[2:]], 39)
        np.testing.assert_allclose(np.delete(found.uncertainties, 1), kept.uncertainties, rtol=1e-12)
        with pytest.raises(InputError, match="training frame 1 of the list cannot be evaluated: its features are"):
            select(pool[2:], 1, train=pool[:2])

    def test_a_structure_that_only_collating_refuses_is_left_out(self, select, pool, monkeypatch: pytest.MonkeyPatch):
        real = ToyBackend._collate

        def collate(self, frames):
            if any("head" in atoms.info for atoms in frames):
                raise InputError("there is no such head.")
            return real(self, frames)

        monkeypatch.setattr(ToyBackend, "_collate", collate)
        strange = pool[0].copy()
        strange.info["head"] = "other"
        with pytest.warns(UQWarning, match=r"frame 4 was left out: there is no such head\."):
            found = select([*pool[:4], strange, *pool[4:]], 40)
        assert sorted(found.indices) == [0, 1, 2, 3, *range(5, 41)]

    def test_damaged_frames_are_named_and_left_out(self, select, pool, tmp_path: Path):
        whole = select(pool[:6], 5)
        write(tmp_path / "pool.xyz", pool[:6])
        lines = (tmp_path / "pool.xyz").read_text().splitlines(keepends=True)
        starts = np.cumsum([0, *(len(atoms) + 2 for atoms in pool[:5])])
        del lines[starts[2] + 3]  # an atom of frame 2
        (tmp_path / "pool.xyz").write_text("".join(lines))
        with pytest.warns(UQWarning, match="frame 2 was left out: it is truncated"):
            found = select(tmp_path / "pool.xyz", 3)
        assert (found.n_pool, list(found.left_out)) == (6, [2])
        assert np.isnan(found.uncertainties).tolist() == [False, False, True, False, False, False]
        kept = np.delete(whole.uncertainties, 2)
        np.testing.assert_allclose(np.delete(found.uncertainties, 2), kept, atol=1e-6)
        assert 2 not in found.indices
        for index, atoms in zip(found.indices, found.frames(tmp_path / "pool.xyz"), strict=True):
            assert atoms.info["source_index"] == index
            np.testing.assert_allclose(atoms.positions, pool[index].positions, atol=1e-6)
        with (
            pytest.warns(UQWarning, match="frame 2 was left out"),
            pytest.warns(UQWarning, match=r"6 frames were asked for and the pool has 5 that can be evaluated: no more"),
        ):
            assert len(select(tmp_path / "pool.xyz", 6).chosen) == 5
        with pytest.raises(InputError, match=r"training frame 2 of .*pool.xyz cannot be read: it is truncated"):
            select(pool, 2, train=tmp_path / "pool.xyz")

    def test_frames_that_cannot_be_evaluated_are_named_and_left_out(self, select, pool):
        broken = pool[1].copy()
        broken.positions[0] = np.nan
        with pytest.warns(UQWarning) as caught:
            found = select([pool[0], broken, Atoms("Au"), *pool[1:]], 39)
        assert list(found.left_out) == [1, 2]
        assert "frame 1 was left out: positions of structure 1" in str(caught[0].message)
        assert "frame 2 was left out: structure 2 (Au) contains Au, which the potential does not know" in str(
            caught[1].message
        )
        expected = select(pool, 39).indices
        assert found.indices.tolist() == [i + 2 if i else 0 for i in expected]
        with (
            pytest.warns(UQWarning, match="frame 0 was left out"),
            pytest.raises(InputError, match=r"none of the 1 frames of the list can be evaluated. Frame 0: structure 0"),
        ):
            select([Atoms("Au")], 1)
        with pytest.raises(
            InputError, match=r"training frame 0 of the list cannot be evaluated: structure 0 \(Au\) contains Au"
        ):
            select(pool, 2, train=[Atoms("Au")])

    def test_elements_that_were_not_fitted_are_told(self, train, pool):
        calculator = ToyCalculator((*ELEMENTS, "N"))
        own = fit(calculator, train, labelled_frames(40, seed=3), methods=["bll"], progress=False)
        new = [Atoms("NH", [(0, 0, 0), (0, 0, 1.0 + 0.1 * k)]) for k in range(3)]
        with pytest.warns(
            UQWarning, match="3 frames of the pool contain N, which the uncertainty model was fitted with"
        ):
            found = choose_frames([*pool, *new], 1, calculator=calculator, uncertainty_model=own, progress=False)
        assert found.indices[0] >= 40

    def test_a_bare_potential_needs_a_model_and_an_uncertain_one_has_its_own(self, select, model, pool):
        with pytest.raises(TypeError, match="ToyCalculator is a bare potential: give the uncertainty_model"):
            select(pool, 1, uncertainty_model=None)
        with pytest.raises(TypeError, match="UncertainCalculator already has an uncertainty model"):
            select(pool, 1, calculator=UncertainCalculator(ToyCalculator(ELEMENTS), model))


def test_a_pool_of_the_embedded_molecule_is_read_as_users_have_it():
    pytest.importorskip("mace")
    frames = read(embedded.path("test_300K.xyz"), ":20") + read(embedded.path("test_900K.xyz"), ":20")
    model = UncertaintyModel.load(embedded.path("mace.uq.safetensors"))
    found = choose_frames(
        frames,
        8,
        calculator="embedded:mace",
        uncertainty_model=model,
        train=read(embedded.path("train_300K.xyz"), ":50"),
        progress=False,
    )
    assert np.mean(found.indices >= 20) > 0.7
