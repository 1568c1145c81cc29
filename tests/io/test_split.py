import numpy as np
import pytest
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_uq import split_as_mace, split_frames, write_frames
from ase_uq.errors import LabelError


def frames_of(runs, key="run"):
    """One atom at the number of its frame; None for a frame that names no run."""
    frames = [Atoms("H", [(float(number), 0, 0)]) for number in range(len(runs))]
    for atoms, run in zip(frames, runs, strict=True):
        if run is not None:
            atoms.info[key] = run
    return frames


def numbers(frames):
    return [int(atoms.positions[0, 0]) for atoms in frames]


@settings(deadline=None)
@given(
    runs=st.lists(st.sampled_from(["a", "b", 3, None]), min_size=2, max_size=40).filter(lambda r: len(set(r)) > 1),
    share=st.floats(0.01, 0.99),
    seed=st.integers(0, 5),
)
def test_no_run_stands_on_both_sides(runs, share, seed):
    train, calibration = split_frames(frames_of(runs), share, seed=seed)
    assert train
    assert calibration
    assert sorted(numbers(train) + numbers(calibration)) == list(range(len(runs)))
    assert numbers(train) == sorted(numbers(train))
    assert numbers(calibration) == sorted(numbers(calibration))
    sides = [{atoms.info.get("run") for atoms in side} for side in (train, calibration)]
    assert not sides[0] & sides[1]


@settings(deadline=None)
@given(runs=st.lists(st.integers(1, 30), min_size=1, max_size=4), length=st.integers(1, 12), seed=st.integers(0, 5))
def test_no_block_stands_on_both_sides_and_none_holds_two_runs(runs, length, seed):
    names = [name for name, n in enumerate(runs) for _ in range(n)]
    blocks, start = [], 0
    for n in runs:
        blocks += [range(start + i, start + min(i + length, n)) for i in range(0, n, length)]
        start += n
    if len(blocks) < 2:
        return
    train, calibration = split_frames(frames_of(names), 0.3, by=length, seed=seed)
    held_out = set(numbers(calibration))
    assert all(held_out.isdisjoint(block) or held_out.issuperset(block) for block in blocks)
    assert train


def test_the_share_is_met_as_closely_as_runs_allow():
    frames = frames_of(np.repeat(np.arange(20), 10).tolist())
    for share in (0.1, 0.2, 0.5):
        assert len(split_frames(frames, share)[1]) == share * 200
    assert numbers(split_frames(frames)[1]) == numbers(split_frames(frames)[1])
    assert any(numbers(split_frames(frames)[1]) != numbers(split_frames(frames, seed=seed)[1]) for seed in (1, 2))


def test_other_entries_tell_runs_apart_and_files_will_do(tmp_path):
    frames = frames_of(["bulk"] * 6 + ["slab"] * 2, key="config_type")
    write_frames(tmp_path / "all.xyz", frames)
    train, calibration = split_frames(tmp_path / "all.xyz", by="config_type")
    assert (numbers(train), numbers(calibration)) == ([0, 1, 2, 3, 4, 5], [6, 7])


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({}, LabelError, r"all 4 frames are of one run \(info\['run'\] tells runs apart\), so none can be kept apart"),
        ({"by": 9}, LabelError, "all 4 frames are of one block of 9, so none can be kept apart"),
        ({"by": 0}, ValueError, "by is 0; the name of an entry in info, or a number of frames from 1 on was expected"),
        ({"calibration": 1.0}, ValueError, "calibration is 1.0; a share of the frames between 0 and 1 was expected"),
        ({"calibration": 0}, ValueError, "calibration is 0; a share"),
    ],
)
def test_what_cannot_be_split(settings, error, message):
    with pytest.raises(error, match=message):
        split_frames(frames_of([None] * 4), **settings)


# As MACE did it


@pytest.fixture
def files(tmp_path):
    """Twelve frames, the fourth an isolated atom that MACE does not count, and indices as MACE writes them."""
    frames = frames_of([None] * 12)
    frames[3].info["config_type"] = "IsolatedAtom"
    write_frames(tmp_path / "train.xyz", frames)
    (tmp_path / "my_valid_indices_123.txt").write_text("10\n3\n0\n")
    return tmp_path / "train.xyz", tmp_path / "my_valid_indices_123.txt"


def test_the_frames_that_mace_held_out_are_those_to_calibrate_on(files):
    train, calibration = split_as_mace(*files)
    assert numbers(calibration) == [0, 4, 11]
    assert numbers(train) == [1, 2, 5, 6, 7, 8, 9, 10]
    train, calibration = split_as_mace(*files, keep_isolated_atoms=True)
    assert numbers(calibration) == [0, 3, 10]
    assert len(train) == 9


def test_it_is_the_split_of_mace_itself(tmp_path):
    data = pytest.importorskip("mace.data.utils")
    frames = frames_of([None] * 60)
    train, valid = data.random_train_valid_split(frames, 0.3, 7, str(tmp_path), "my")
    found = split_as_mace(frames, tmp_path / "my_valid_indices_7.txt")
    assert [numbers(side) for side in found] == [sorted(numbers(side)) for side in (train, valid)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no indices"),
        ("1\n2\n1\n", "names a frame twice: it is not a file of MACE"),
        ("1\nx\n", r"has other things than one index on each line \(invalid literal .*'x'\): it is not a file of MACE"),
        ("1\n11\n", "has 2 indices up to 11, and there are 11 frames without isolated atoms: it was written for other"),
        ("-1\n", "was written for other training files"),
        ("\n".join(map(str, range(11))), "has 11 indices up to 10, and there are 11 frames"),
    ],
)
def test_indices_of_other_frames_are_refused(files, text, message):
    files[1].write_text(text)
    with pytest.raises(LabelError, match=message):
        split_as_mace(*files)


def test_a_file_of_indices_that_is_missing(files, tmp_path):
    with pytest.raises(LabelError, match=r"validation frames cannot be read from .*none.txt: No such file"):
        split_as_mace(files[0], tmp_path / "none.txt")
