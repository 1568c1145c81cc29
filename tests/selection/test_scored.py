"""Choosing from scored frames by what stands in them: the choices of `select`, without the potential."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.io import write

from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.fitting.fit import fit
from ase_uq.io.frames import read_frames
from ase_uq.predictor import Predictor
from ase_uq.scoring.score import score
from ase_uq.selection.scored import select_scored
from ase_uq.selection.select import Selection, select
from ase_uq.testing.methods import ELEMENTS, labelled_frames
from ase_uq.uncertainty_model.model import UncertaintyModel

pytestmark = pytest.mark.filterwarnings("ignore:.*tells nothing about:ase_uq.errors.UQWarning")  # invented labels

N = 24


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    train, held_out = labelled_frames(40, seed=1), labelled_frames(40, seed=3)
    return fit(ToyCalculator(ELEMENTS), train, held_out, methods=["bll"], progress=False)


@pytest.fixture(scope="module")
def predictor(model: UncertaintyModel) -> Predictor:
    return Predictor(ToyCalculator(ELEMENTS), model)


@pytest.fixture(scope="module")
def pool() -> list[Atoms]:
    return labelled_frames(N, seed=2)


@pytest.fixture(scope="module")
def scored(predictor: Predictor, pool: list[Atoms], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("scored") / "scored.xyz"
    score(pool, predictor, out=out, progress=False)
    return out


def chosen_from(frames, model: UncertaintyModel, n: int = 5, **options) -> Selection:
    return select_scored(frames, n, model, progress=False, **options)


@pytest.mark.parametrize(
    "options",
    [
        {"strategy": "top"},
        {"strategy": "top", "halt": "q0.9"},
        {"strategy": "random", "seed": 3},
        {"strategy": "bands", "flag": "q0.3", "halt": "q0.95", "seed": 4},
    ],
    ids=lambda options: "-".join(options),
)
def test_choices_are_those_with_the_potential(scored, model, predictor, pool, options):
    expected = select(pool, 5, calculator=predictor, duplicates=0, progress=False, **options)
    found = chosen_from(scored, model, **options)
    assert found.indices.tolist() == expected.indices.tolist()
    np.testing.assert_allclose(found.uncertainties, expected.uncertainties, rtol=1e-6)
    assert [one.reason for one in found.chosen] == [one.reason for one in expected.chosen]
    np.testing.assert_allclose([one.score for one in found.chosen], [one.score for one in expected.chosen], rtol=1e-6)
    assert found.bands == expected.bands
    assert (found.n_pool, found.near_duplicates, found.method, found.left_out) == (N, 0, "", {})
    assert all(np.isnan(one.distance) and one.atom is None for one in found.chosen)


def test_shards_are_one_pool(predictor, model, pool, tmp_path: Path):
    """Indices count through the files; the number in the trajectory stays beside them."""
    shards = [tmp_path / "1.xyz", tmp_path / "2.xyz"]
    for number, out in enumerate(shards, 1):
        score(pool, predictor, out=out, shard=f"{number}/2", batch_atoms=20, progress=False)
    found = chosen_from(shards, model)
    frames = found.frames(shards)
    together = read_frames(shards)
    assert sorted(atoms.info["source_frame"] for atoms in together) == list(range(N))
    whole = select(pool, 5, calculator=predictor, strategy="top", duplicates=0, progress=False)
    assert [atoms.info["source_frame"] for atoms in frames] == whole.indices.tolist()
    for rank, (atoms, index) in enumerate(zip(frames, found.indices, strict=True), 1):
        assert (atoms.info["selected_rank"], atoms.info["source_index"]) == (rank, index)
        np.testing.assert_array_equal(atoms.positions, together[index].positions)
        assert "selected_distance" not in atoms.info
        assert atoms.calc is None
        assert "forces_uncertainty" not in atoms.arrays


def test_a_list_of_scored_frames_and_the_path_of_the_model_will_do(scored, model, tmp_path: Path):
    model.save(tmp_path / "my.uq.safetensors")
    found = select_scored(read_frames(scored), 4, tmp_path / "my.uq.safetensors", progress=False)
    assert found.indices.tolist() == chosen_from(scored, model, 4).indices.tolist()


@pytest.mark.parametrize("strategy", ["lcmd", "maxdet", "maxdist"])
def test_strategies_that_compare_features_are_refused(scored, model, strategy):
    with pytest.raises(
        ValueError, match=rf"'{strategy}' compares features, .* \(--model, .* one of 'top', 'bands', 'random'\."
    ):
        chosen_from(scored, model, strategy=strategy)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strategy": "best"}, "strategy must be one of 'lcmd'"),
        ({"n": 0}, "0 frames were asked for; 1 or more was expected"),
        ({"strategy": "bands", "flag": 0.1}, "chooses between two thresholds: give flag and halt"),
        ({"flag": 2.0, "halt": 1.0}, "below"),
    ],
)
def test_options_out_of_range_are_refused(scored, model, options, message):
    with pytest.raises(ValueError, match=message):
        chosen_from(scored, model, **options)


def test_frames_without_results_of_this_model_are_refused(scored, model, pool):
    with pytest.raises(InputError, match=r"frame 0 of the pool has no forces_uncertainty, which frames have that `sco"):
        chosen_from(pool, model)
    frames = read_frames(scored)
    frames[7].positions[0] += 0.5  # its uncertainties are of another structure
    with pytest.raises(InputError, match=r"frame 7 of the pool has no forces_uncertainty"):
        chosen_from([atoms.copy() for atoms in frames], model)
    two = dataclasses.replace(model, methods={"bll": model.methods["bll"], "other": model.methods["bll"]})
    with pytest.raises(InputError, match="frame 0 of the pool has no forces_uncertainty_bll"):
        chosen_from(scored, two)


def test_frames_of_another_model_are_refused(scored, model, predictor, pool, tmp_path: Path):
    """Also of one pool, in whose other frames the name is right."""
    other = dataclasses.replace(model, record=dataclasses.replace(model.record, uncertainty=2 * model.record.error))
    score(pool, Predictor(predictor.backend, other), out=tmp_path / "other.xyz", progress=False)
    with pytest.raises(InputError, match=rf"frame {N} of the pool was scored with another .* \({other.name}\) than"):
        chosen_from([scored, tmp_path / "other.xyz"], model)


def test_damaged_frames_are_named_and_left_out(scored, model, tmp_path: Path):
    lines = scored.read_text().splitlines(keepends=True)
    second = 2 + int(lines[0])
    lines[second + 3] = lines[second + 3].replace(".", "x", 1)
    (tmp_path / "damaged.xyz").write_text("".join(lines))
    with pytest.warns(UQWarning, match="frame 1 was left out"):
        found = chosen_from(tmp_path / "damaged.xyz", model, N - 1)
    assert list(found.left_out) == [1]
    assert sorted(found.indices.tolist()) == [0, *range(2, N)]
    assert np.isnan(found.uncertainties[1])


def test_a_pool_without_a_readable_frame_is_refused(model, tmp_path: Path):
    (tmp_path / "damaged.xyz").write_text("3\n\nH 0 0 0\n")
    with pytest.warns(UQWarning, match="frame 0 was left out"), pytest.raises(InputError, match="none of the 1 frames"):
        chosen_from(tmp_path / "damaged.xyz", model)
    with pytest.raises(InputError, match="the pool has no frames"):
        chosen_from([], model)


def test_a_reading_that_is_not_a_number_is_the_largest(scored, model):
    frames = read_frames(scored)
    frames[3].arrays["forces_uncertainty"][0] = np.nan
    frames[3].calc = None
    assert chosen_from(frames, model, 1).indices.tolist() == [3]
    bands = chosen_from(frames, model, 1, flag=0.0, halt=1e9).bands
    assert bands is not None
    assert bands.failed == 1


def test_fewer_than_asked_for_are_told(scored, model):
    with pytest.warns(UQWarning, match=f"99 frames were asked for and the pool has {N}: no more than these"):
        assert len(chosen_from(scored, model, 99).chosen) == N
    readings = np.sort(chosen_from(scored, model).uncertainties)
    with pytest.warns(UQWarning, match=r"2 of the 5 frames asked for were chosen: no more of the pool lie from -inf"):
        found = chosen_from(scored, model, halt=float(readings[2]))
    assert len(found.chosen) == 2


def test_the_choice_is_shown_as_that_of_select_is(scored, model):
    assert "top" in repr(chosen_from(scored, model))


def test_select_takes_several_files(predictor, pool, tmp_path: Path):
    paths = [tmp_path / "a.xyz", tmp_path / "b.xyz"]
    for path, frames in zip(paths, (pool[:10], pool[10:]), strict=True):
        write(path, frames)
    found = select(paths, 6, calculator=predictor, progress=False)
    assert found.indices.tolist() == select(pool, 6, calculator=predictor, progress=False).indices.tolist()
    for atoms, index in zip(found.frames(paths), found.indices, strict=True):
        np.testing.assert_allclose(atoms.positions, pool[index].positions, atol=1e-8)
