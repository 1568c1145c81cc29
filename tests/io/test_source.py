"""Frames one by one: what ASE reads, in any format, from any start, with damaged ones named."""

import gzip
import os
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import iread, write
from ase.io.trajectory import TrajectoryReader
from ase.units import Bohr

from ase_uq.errors import InputError, LabelError
from ase_uq.io.frames import read_frames
from ase_uq.io.labels import labels_of
from ase_uq.io.source import Source, Unreadable


def crystals(count: int = 5, seed: int = 0) -> list[Atoms]:
    """Rattled rock salt whose cell changes from frame to frame."""
    frames = []
    for number in range(count):
        atoms = bulk("NaCl", "rocksalt", a=5.6 + 0.01 * number, cubic=True)
        atoms.rattle(0.1, seed=seed + number)
        frames.append(atoms)
    return frames


def dump(path: Path, frames: list[Atoms], column: str = "element") -> None:
    lines = []
    for number, atoms in enumerate(frames):
        lines += ["ITEM: TIMESTEP", number, "ITEM: NUMBER OF ATOMS", len(atoms), "ITEM: BOX BOUNDS pp pp pp"]
        lines += [f"0.0 {length}" for length in atoms.cell.lengths()]
        lines.append(f"ITEM: ATOMS id type {column} x y z")
        for index, (symbol, position) in enumerate(zip(atoms.symbols, atoms.positions, strict=True)):
            kind = symbol if column == "element" else 0.0
            lines.append(f"{index + 1} {1 + (symbol == 'Cl')} {kind} {' '.join(map(str, position))}")
    path.write_text("\n".join(map(str, lines)) + "\n")


def written(path: Path, frames: list[Atoms]) -> Path:
    if path.suffix == ".dump":
        dump(path, frames)
    else:
        write(path, frames)
    return path


def split(source: Source, start: int = 0) -> tuple[dict[int, Atoms], dict[int, str]]:
    good, bad = {}, {}
    for number, item in source.read(start):
        if isinstance(item, Unreadable):
            bad[number] = item.reason
        else:
            good[number] = item
    return good, bad


NAMES = ["a.xyz", "a.extxyz", "a.xyz.gz", "a.traj", "a.db", "a.json", "XDATCAR", "a.dump"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("start", [0, 3, 5])
def test_frames_are_those_that_ase_reads(tmp_path: Path, name: str, start: int):
    path = written(tmp_path / name, crystals())
    expected = list(iread(path, ":"))
    good, bad = split(Source(path), start)
    assert not bad
    assert list(good) == list(range(start, 5))
    for number, atoms in good.items():
        assert atoms == expected[number]
        assert atoms.info.keys() == expected[number].info.keys()
        np.testing.assert_allclose(atoms.positions, crystals()[number].positions, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in NAMES if name != "a.json"])
def test_the_number_of_frames_is_known_beforehand(tmp_path: Path, name: str):
    assert Source(written(tmp_path / name, crystals(4))).total() == 4


def test_a_format_that_must_be_read_to_be_counted_is_not(tmp_path: Path):
    assert Source(written(tmp_path / "a.json", crystals(2))).total() is None


def test_a_list_is_its_frames():
    frames = crystals(3)
    source = Source(frames)
    assert source.total() == 3
    assert [atoms for _, atoms in source.read(1)] == frames[1:]


def test_a_digest_changes_with_the_contents_only(tmp_path: Path):
    frames = crystals(3)
    digest = Source(written(tmp_path / "a.xyz", frames)).digest()
    assert Source(written(tmp_path / "b.xyz", frames)).digest() == digest
    of_list = Source(frames).digest()
    assert Source([atoms.copy() for atoms in frames]).digest() == of_list
    frames[1].positions[0, 0] += 1e-6
    assert Source(frames).digest() != of_list
    charged = [Atoms("H", info={"charge": charge}) for charge in (0, 1)]
    assert Source(charged[:1]).digest() == Source(charged[1:]).digest()
    assert Source(charged[:1]).digest(["charge", "spin"]) != Source(charged[1:]).digest(["charge", "spin"])
    assert Source(written(tmp_path / "b.xyz", frames)).digest() != digest


def test_compositions_and_sizes_may_change_from_frame_to_frame(tmp_path: Path):
    frames = [molecule("CH4"), molecule("H2O"), *crystals(1), Atoms("Ar")]
    for name in ("a.xyz", "a.traj", "a.db"):
        good, bad = split(Source(written(tmp_path / name, frames)))
        assert not bad
        assert [str(atoms.symbols) for atoms in good.values()] == [str(atoms.symbols) for atoms in frames]


def test_cell_vectors_as_pseudo_atoms_belong_to_their_frame(tmp_path: Path):
    frames = crystals(3)
    write(tmp_path / "a.xyz", frames, format="extxyz", vec_cell=True)
    good, bad = split(Source(tmp_path / "a.xyz"))
    assert (list(good), bad) == ([0, 1, 2], {})
    np.testing.assert_allclose(good[2].cell.array, frames[2].cell.array)


@pytest.fixture
def lines(tmp_path: Path) -> list[str]:
    """Of five crystals of eight atoms: ten lines a frame."""
    return written(tmp_path / "whole.xyz", crystals()).read_text().splitlines(keepends=True)


@pytest.mark.parametrize(
    ("edit", "kept", "bad"),
    [
        (lambda lines: lines[:23] + lines[25:], [0, 1, 3, 4], {2: "truncated: 6 of its 8 atoms are there"}),
        (lambda lines: lines[:22] + lines[30:], [0, 1, 3, 4], {2: "truncated: 0 of its 8 atoms"}),
        (lambda lines: lines[:-3], [0, 1, 2, 3], {4: "truncated: 5 of its 8 atoms"}),
        (lambda lines: lines[:41], [0, 1, 2, 3], {4: "truncated: 0 of its 8"}),
        (lambda lines: [*lines[:20], "rubbish\n", "\x00\n", *lines[20:]], [0, 1, 3, 4, 5], {2: "found 'rubbish'"}),
        (lambda lines: [*lines[:20], "x8\n", *lines[21:]], [0, 1, 3, 4], {2: "found 'x8'"}),
        (lambda lines: [*lines[:24], "Na 0.1 oops 0.2\n", *lines[25:]], [0, 1, 3, 4], {2: "ValueError"}),
        (lambda lines: [*lines[:24], "Na 0.1 0.2\n", *lines[25:]], [0, 1, 3, 4], {2: "tuple of length 3"}),
        (lambda lines: [*lines[:24], "Qq 0.1 0.2 0.3\n", *lines[25:]], [0, 1, 3, 4], {2: "KeyError"}),
        (lambda lines: [*lines[:20], "\n", *lines[20:], "\n", "\n"], [0, 1, 2, 3, 4], {}),
        (lambda lines: [*lines[:20], "7\n", *lines[21:]], [0, 1, 3, 4], {2: "8 lines of atoms, but its first line"}),
    ],
)
def test_a_damaged_frame_costs_no_other(tmp_path: Path, lines: list[str], edit, kept: list[int], bad: dict[int, str]):
    path = tmp_path / "damaged.xyz"
    path.write_text("".join(edit(lines)))
    good, found = split(Source(path))
    assert list(good) == kept
    assert found.keys() == bad.keys()
    for number, reason in bad.items():
        assert reason in found[number]
    originals = [atoms for number, atoms in enumerate(crystals()) if number in kept or len(kept) == 5]
    for atoms, original in zip(good.values(), originals, strict=True):
        np.testing.assert_allclose(atoms.positions, original.positions, atol=1e-7)


@pytest.mark.parametrize("compressed", [False, True])
def test_stray_bytes_cost_no_other_frame(tmp_path: Path, lines: list[str], compressed: bool):
    encoded = [line.encode() for line in lines]
    encoded[11] = encoded[11].replace(b"Lattice", b'note="5 \xc5" Lattice')  # a comment in Latin-1
    encoded[34] = b"\xff\xfe\x00junk\n"
    path = tmp_path / ("a.xyz.gz" if compressed else "a.xyz")
    path.write_bytes(gzip.compress(b"".join(encoded)) if compressed else b"".join(encoded))
    good, bad = split(Source(path))
    assert (list(good), list(bad)) == ([0, 1, 2, 4], [3])
    assert good[1].info["note"] == "5 \N{REPLACEMENT CHARACTER}"


def test_an_archive_that_was_cut_off_keeps_its_whole_frames(tmp_path: Path, lines: list[str]):
    whole = gzip.compress("".join(lines * 20).encode(), compresslevel=1)
    (tmp_path / "a.xyz.gz").write_bytes(whole[: len(whole) // 2])
    good, bad = split(Source(tmp_path / "a.xyz.gz"))
    assert 10 < len(good) < 90
    (reason,) = bad.values()
    assert reason.startswith("the file cannot be read from here on (EOFError")


def test_a_truncated_xdatcar_block_does_not_lend_its_cell_to_the_next(tmp_path: Path):
    lines = written(tmp_path / "XDATCAR", crystals()).read_text().splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if "configuration=" in line]
    (tmp_path / "XDATCAR").write_text("".join(lines[: starts[2] + 4] + lines[starts[2] + 9 :]))
    good, bad = split(Source(tmp_path / "XDATCAR"))
    assert bad == {2: "it is truncated: 3 of its 8 atoms are there"}
    assert list(good) == [0, 1, 3, 4]
    for number, atoms in good.items():
        np.testing.assert_allclose(atoms.cell.array, crystals()[number].cell.array, atol=1e-6)


@pytest.mark.parametrize(
    "edit",
    [
        lambda lines, starts: ["\n", *lines[1:]],
        lambda lines, starts: [*lines[: starts[2]], "\n", "\n", *lines[starts[2] :], "\n"],
        lambda lines, starts: lines,
    ],
    ids=["blank title", "blank lines", "as ASE writes it"],
)
def test_blank_lines_of_an_xdatcar_end_nothing(tmp_path: Path, edit):
    frames = crystals(1) * 5
    lines = written(tmp_path / "XDATCAR", frames).read_text().splitlines(keepends=True)
    starts = [index for index, line in enumerate(lines) if "configuration=" in line]
    (tmp_path / "XDATCAR").write_text("".join(edit(lines, starts)))
    good, bad = split(Source(tmp_path / "XDATCAR"))
    assert (list(good), bad) == ([0, 1, 2, 3, 4], {})
    np.testing.assert_allclose(good[3].positions, frames[3].positions, atol=1e-6)


@pytest.mark.parametrize("before", [["ITEM: TIME\n0.5\n"] * 4, ["ITEM: UNITS\nmetal\n", "", "", ""]])
@pytest.mark.parametrize("both", [False, True])
def test_units_and_times_of_a_dump_belong_to_the_frame_after_them(tmp_path: Path, before: list[str], both: bool):
    dump(tmp_path / "a.dump", crystals(4))
    pieces = (tmp_path / "a.dump").read_text().split("ITEM: TIMESTEP")[1:]
    extra = ["ITEM: TIME\n0.5\n" * both] * 4
    text = "".join(f"{b}{e}ITEM: TIMESTEP{piece}" for b, e, piece in zip(before, extra, pieces, strict=True))
    (tmp_path / "a.dump").write_text(text)
    good, bad = split(Source(tmp_path / "a.dump"))
    assert (list(good), bad) == ([0, 1, 2, 3], {})
    for atoms, expected in zip(good.values(), iread(tmp_path / "a.dump", ":", format="lammps-dump-text"), strict=True):
        assert atoms == expected


def test_a_truncated_dump_is_not_a_smaller_frame(tmp_path: Path):
    dump(tmp_path / "a.dump", crystals())
    lines = (tmp_path / "a.dump").read_text().splitlines(keepends=True)
    del lines[2 * 17 + 12 : 2 * 17 + 14]
    (tmp_path / "a.dump").write_text("".join(lines[:-2]))
    good, bad = split(Source(tmp_path / "a.dump"))
    assert list(good) == [0, 1, 3]
    assert bad == {
        2: "it is truncated: 6 of its 8 atoms are there",
        4: "it is truncated: 6 of its 8 atoms are there",
    }


def test_types_of_a_dump_are_not_taken_for_elements(tmp_path: Path):
    dump(tmp_path / "a.dump", crystals(1), column="q")
    _, bad = split(Source(tmp_path / "a.dump"))
    assert "ASE would take the types for atomic numbers" in bad[0]


def forces_dump(path: Path, units: str = "") -> np.ndarray:
    forces = np.arange(24.0).reshape(8, 3)
    dump(path, crystals(2))
    lines = path.read_text().splitlines()
    numbers = iter([*range(8)] * 2)
    lines = [
        f"{line} fx fy fz"
        if "ATOMS id" in line
        else f"{line} {' '.join(map(str, forces[next(numbers)]))}"
        if len(line.split()) == 6 and "ITEM" not in line
        else line
        for line in lines
    ]
    path.write_text(units + "\n".join(lines) + "\n")
    return forces


def test_a_dump_with_forces_has_no_energy(tmp_path: Path):
    forces = forces_dump(tmp_path / "a.dump")
    for frames in (read_frames(tmp_path / "a.dump"), list(iread(tmp_path / "a.dump", ":", format="lammps-dump-text"))):
        assert len(frames) == 2
        for atoms in frames:
            labels = labels_of(atoms)
            assert labels.energy is None
            np.testing.assert_array_equal(labels.forces, forces)


@pytest.mark.parametrize("units", ["real", "lj", "si"])
def test_a_dump_in_other_units_is_refused(tmp_path: Path, units: str):
    forces_dump(tmp_path / "a.dump", f"ITEM: UNITS\n{units}\n")
    good, bad = split(Source(tmp_path / "a.dump"))
    assert not good
    assert list(bad) == [0, 1]
    assert all(f"its units are '{units}', and 'metal' was expected" in reason for reason in bad.values())


def test_what_reads_frames_refuses_dumps_without_elements(tmp_path: Path):
    dump(tmp_path / "a.dump", crystals(1), column="q")
    with pytest.raises(LabelError, match="after structure 0: it has no column `element`"):
        read_frames(tmp_path / "a.dump")


def ipi(path: Path, frames: list[Atoms], units: str, position: float = 1.0, length: float = 1.0, name: str = "abcABC"):
    text = ""
    for step, atoms in enumerate(frames):
        a, b, c, *angles = atoms.cell.cellpar()
        cell = " ".join(f"{x:.8f}" for x in (a * length, b * length, c * length, *angles))
        text += f"{len(atoms)}\n# CELL({name}): {cell}  Step: {step}  Bead: 0 {units}\n"
        for symbol, r in zip(atoms.symbols, atoms.positions * position, strict=True):
            text += f"{symbol:>8} {r[0]:12.8e} {r[1]:12.8e} {r[2]:12.8e}\n"
    path.write_text(text)


@pytest.mark.parametrize(
    ("units", "position", "length"),
    [
        ("positions{atomic_unit} cell{atomic_unit}", 1 / Bohr, 1 / Bohr),
        ("x_centroid{angstrom} cell{atomic_unit}", 1.0, 1 / Bohr),
        ("cell{angstrom} Traj: positions{angstrom}", 1.0, 1.0),
        ("positions{nanometer}  cell{angstrom}", 0.1, 1.0),
        ("", 1 / Bohr, 1 / Bohr),
    ],
)
def test_cell_and_units_of_i_pi_are_those_it_states(tmp_path: Path, units: str, position: float, length: float):
    frames = crystals(2)
    skewed = Atoms("NaCl", cell=[4, 5, 6, 70, 80, 100], pbc=True, scaled_positions=[[0, 0, 0], [0.5, 0.4, 0.3]])
    frames.append(skewed)
    ipi(tmp_path / "a.xyz", frames, units, position, length)
    for read in (read_frames(tmp_path / "a.xyz"), list(split(Source(tmp_path / "a.xyz"))[0].values())):
        assert len(read) == 3
        for atoms, expected in zip(read, frames, strict=True):
            np.testing.assert_allclose(atoms.positions, expected.positions, atol=1e-6)
            np.testing.assert_allclose(atoms.cell.array, expected.cell.array, atol=1e-6)
            assert atoms.pbc.all()
            assert str(atoms.symbols) == str(expected.symbols)


@pytest.mark.parametrize(
    ("units", "name", "message"),
    [
        ("forces{atomic_unit} cell{angstrom}", "abcABC", "i-PI wrote forces into it, and positions were expected"),
        ("positions{furlong} cell{angstrom}", "abcABC", "the unit 'furlong' of i-PI is none of atomic_unit, angstrom"),
        ("positions{angstrom} cell{inch}", "abcABC", "the unit 'inch' of i-PI is none of"),
        (
            "positions{angstrom} cell{angstrom}",
            "GENH",
            r"the cell 'CELL\(GENH\): 5.6.*' of i-PI cannot be read: CELL\(abc",
        ),
    ],
)
def test_what_i_pi_wrote_in_another_way_is_refused(tmp_path: Path, units: str, name: str, message: str):
    ipi(tmp_path / "a.xyz", crystals(1), units, name=name)
    with pytest.raises(LabelError, match=message):
        read_frames(tmp_path / "a.xyz")


@pytest.mark.parametrize(
    "comment", ["# made by hand", "i = 0, time = 0.0, E = -1.5", 'note="{a}" x={1 2}', "# a{b} c{d}"]
)
def test_comments_of_others_are_not_those_of_i_pi(tmp_path: Path, comment: str):
    (tmp_path / "a.xyz").write_text(f"1\n{comment}\nH 0 0 1.5\n")
    (atoms,) = read_frames(tmp_path / "a.xyz")
    assert (atoms.positions[0, 2], atoms.pbc.any()) == (1.5, False)


def test_a_damaged_frame_of_a_traj_costs_no_other(tmp_path: Path):
    path = written(tmp_path / "a.traj", crystals())
    with TrajectoryReader(str(path)) as trajectory:
        offset = int(trajectory.backend._offsets[2])
    with open(path, "r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * 8)
    good, bad = split(Source(path))
    assert list(good) == [0, 1, 3, 4]
    assert list(bad) == [2]
    assert good[3] == crystals()[3]


def test_what_ase_cannot_go_on_from_ends_the_file(tmp_path: Path):
    path = written(tmp_path / "a.traj", crystals())
    os.truncate(path, 30)
    (item,) = [item for _, item in Source(path).read()]
    assert isinstance(item, Unreadable)
    assert item.last
    assert item.reason.startswith("the file cannot be read from here on (")


@pytest.mark.parametrize("name", ["a.xyz", "XDATCAR", "a.dump", "a.traj"])
def test_memory_does_not_grow_with_the_file(tmp_path: Path, name: str):
    peaks = []
    for folder, count in (("few", 40), ("many", 400)):
        (tmp_path / folder).mkdir()
        path = written(tmp_path / folder / name, crystals(10) * (count // 10))
        source = Source(path)
        tracemalloc.start()
        assert sum(isinstance(item, Atoms) for _, item in source.read()) == count
        source.total()
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    # One frame more held is some 3 kB: 360 of them would be a megabyte.
    assert peaks[1] < peaks[0] + 100_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file .*in.strange"),
        ("", "in.strange is empty"),
        ("neither fish nor fowl", "in.strange is in no format that ASE knows"),
    ],
)
def test_files_that_are_none(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "in.strange"
    if text is not None:
        path.write_text(text)
    with pytest.raises(InputError, match=message):
        Source(path)
