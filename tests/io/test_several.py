"""Frames of several files and of parts of them, one by one: what `read_frames` gives, but streamed."""

import os

import pytest
from ase import Atoms
from ase.db import connect
from ase.io import write

from ase_uq import read_frames
from ase_uq.errors import InputError
from ase_uq.io.several import source_of
from ase_uq.io.source import Unreadable


@pytest.fixture
def files(tmp_path):
    frames = [Atoms("H", [(float(number), 0, 0)]) for number in range(9)]
    write(tmp_path / "a.xyz", frames[:5])
    write(tmp_path / "b.traj", frames[5:])
    with connect(tmp_path / "c.db") as database:  # pyright: ignore[reportGeneralTypeIssues]
        for number, atoms in enumerate(frames):
            database.write(atoms, odd=number % 2)
    return tmp_path


def given(folder, names):
    return [os.path.join(folder, name) for name in names]


def numbers(items):
    return [int(atoms.positions[0, 0]) for _, atoms in items]


CASES = [
    ["a.xyz"],
    ["a.xyz", "b.traj"],
    ["b.traj", "a.xyz", "b.traj"],
    ["a.xyz@:2"],
    ["a.xyz@1:4:2", "b.traj@1:"],
    ["a.xyz@-2:", "a.xyz@::-1", "b.traj@0"],
    ["a.xyz@:100", "c.db@odd=1"],
]


@pytest.mark.parametrize("names", CASES)
@pytest.mark.parametrize("start", [0, 1, 3])
def test_they_are_those_of_read_frames_and_numbered_throughout(files, names, start):
    paths = given(files, names)
    source = source_of(paths)
    expected = [int(atoms.positions[0, 0]) for atoms in read_frames(paths)]
    items = list(source.read(start))
    assert [number for number, _ in items] == list(range(len(expected)))[start:]
    assert numbers(items) == expected[start:]
    assert source.total() == len(expected)


def test_a_single_path_and_a_list_of_structures(files):
    assert numbers(source_of(files / "a.xyz").read()) == [0, 1, 2, 3, 4]
    assert source_of(files / "a.xyz").digest() == source_of([files / "a.xyz"]).digest()
    structures = read_frames(files / "a.xyz")
    assert numbers(source_of(structures).read()) == [0, 1, 2, 3, 4]


def test_digests_tell_all_of_them_apart(files):
    cases = [*CASES, ["a.xyz@:3"], ["b.traj", "a.xyz"]]
    digests = {source_of(given(files, names)).digest() for names in cases}
    assert len(digests) == len(cases)


def test_after_the_last_readable_frame_of_a_file_the_next_file_follows(files):
    text = (files / "a.xyz").read_text().splitlines(keepends=True)
    (files / "a.xyz").write_text("".join([*text[:8], "H not a number\n", *text[9:12]]))
    items = [item for _, item in source_of(given(files, ["a.xyz", "b.traj"])).read()]
    problems = [item for item in items if isinstance(item, Unreadable)]
    assert [item.reason.rpartition(" (")[2] for item in problems] == [f"frame 2 of {files / 'a.xyz'})"]
    assert not any(item.last for item in problems)
    assert [int(item.positions[0, 0]) for item in items if isinstance(item, Atoms)] == [0, 1, 3, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a.xyz", "none.xyz"], r"there is no file .*none.xyz"),
        (["none.xyz@:3"], r"there is no file .*none.xyz"),
        (["a.xyz@first"], r"'first' in .*a.xyz@first is no index: write .*a.xyz@:100"),
        (["a.xyz@9"], r"a.xyz@9 has no structures"),
        (["c.db@odd=7"], r"c.db@odd=7 has no structures"),
    ],
)
def test_what_is_not_there_is_named(files, names, message):
    with pytest.raises(InputError, match=message):
        source_of(given(files, names))


@pytest.mark.parametrize("part", ["a:b", "1:b", "x"])
def test_a_part_that_is_none_is_named(tmp_path, part):
    write(tmp_path / "run.xyz", Atoms("H"))
    with pytest.raises(InputError, match=f"{part!r} in .*run.xyz@{part} is no index"):
        source_of(f"{tmp_path / 'run.xyz'}@{part}")
