"""Files of HDF5: every frame comes back to the last bit, and others read it without this package."""

import builtins
import gc
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.constraints import FixAtoms
from ase.io import read

from ase_uq.errors import InputError, MissingDependency
from ase_uq.io import h5md, h5md_writer
from ase_uq.io.contents import Contents, atoms_of, contents_of
from ase_uq.io.frames import read_frames
from ase_uq.io.h5md import count_h5md, is_h5md, read_h5md
from ase_uq.io.h5md_writer import write_h5md
from ase_uq.io.records import record_of, records_in
from ase_uq.io.results import stored
from ase_uq.io.source import Source

RNG = np.random.default_rng(0)


def results_of(atoms: Atoms) -> dict[str, Any]:
    n = len(atoms)
    return {
        "energy": RNG.normal(),
        "forces": RNG.normal(size=(n, 3)),
        "energy_uncertainty": RNG.normal(),
        "forces_uncertainty": RNG.normal(size=(n, 3)),
        "gamma": RNG.normal(size=n),
        "energy_ensemble": RNG.normal(size=5),
        "forces_ensemble": RNG.normal(size=(n, 3, 2)),
    }


def contents(frames: list[Atoms]) -> list[Contents]:
    return [contents_of(a, *stored(a, results_of(a), source_frame=2 * i))[0] for i, a in enumerate(frames)]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "run.h5"


@pytest.fixture
def written(path: Path) -> Callable[[list[Contents]], Path]:
    def write(every: list[Contents]) -> Path:
        records = path.with_name("records")
        records.write_bytes(b"".join(record_of(int(c["observables/source_frame"]), c) for c in every))
        write_h5md(path, lambda: records_in(records), "source_frame")
        return path

    return write


def assert_same(found: list[Contents], wanted: list[Contents]) -> None:
    """To the last bit; a number that stands among others of its name as a text is the same in JSON."""
    assert len(found) == len(wanted)
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            if isinstance(ours[name], str):
                assert ours[name] == h5md_writer.as_text(value)
            else:
                np.testing.assert_array_equal(ours[name], value, err_msg=name)


def equal(n: int = 7) -> list[Atoms]:
    frames = [molecule("H2O", info={"run": f"ü{i}", "step": i, "flag": i % 2 == 0}) for i in range(n)]
    for atoms in frames:
        atoms.rattle(0.1, rng=RNG)
        atoms.set_array("REF_forces", RNG.normal(size=(3, 3)))
        atoms.set_array("marks", np.array([True, False, True]))
        atoms.set_array("labels", np.array(["a", "b", "c"]))
    return frames


def ragged() -> list[Atoms]:
    """Of several sizes, and no two with the same entries."""
    frames = [molecule(name) for name in ("H2O", "CH3OH", "C60", "H2O")] + [Atoms("Ar"), bulk("Si"), molecule("H2O")]
    frames[0].info |= {"only": 1.5, "mixed": 1, "vector": np.ones(2), "label": "x"}
    frames[1].info |= {"mixed": 2.5, "count": 3, "vector": np.ones(3)}
    frames[2].set_constraint(FixAtoms([3, 5]))
    frames[3].info |= {"mixed": "text", "single": np.float32(0.1), "nothing": np.nan}
    frames[3].set_array("tags", np.array([1, 2, 3]))
    frames[4].info |= {"single": 0.1}
    frames[5].set_array("REF_forces", RNG.normal(size=(2, 3)))
    frames[6].set_array("tags", np.array([0.5, 2, 3]))
    return frames


@pytest.mark.parametrize("make", [equal, ragged])
@pytest.mark.parametrize("block", [(1024, 1 << 24), (3, 1 << 24), (1024, 6000), (1, 1)])
def test_frames_come_back_to_the_last_bit(written, monkeypatch: pytest.MonkeyPatch, make, block):
    wanted = contents(make())
    for module in (h5md, h5md_writer):
        monkeypatch.setattr(module, "BLOCK_FRAMES", block[0])
        monkeypatch.setattr(module, "BLOCK_BYTES", block[1])
    path = written(wanted)
    assert is_h5md(path)
    assert count_h5md(path) == len(wanted)
    for start in (0, 2, len(wanted)):
        assert_same(list(read_h5md(path, start)), wanted[start:])
        assert_same(list(read_h5md(path, start, at_once=3000)), wanted[start:])


@pytest.mark.parametrize("make", [equal, ragged])
def test_frames_that_are_read_and_written_again_are_the_same_file(written, make):
    path = written(contents(make()))
    before = path.read_bytes()
    again = list(read_h5md(path))
    assert written(again).read_bytes() == before


def test_no_frames(written):
    path = written([])
    assert is_h5md(path)
    assert count_h5md(path) == 0
    assert list(read_h5md(path)) == []


def test_a_source_has_the_frames(written):
    wanted = contents(ragged())
    source = Source(written(wanted))
    assert source.total() == 7
    for number, atoms in source.read(3):
        assert isinstance(atoms, Atoms)
        assert atoms.info["source_frame"] == 2 * number
    (last,) = read_frames(f"{source.name}@-1:")
    np.testing.assert_array_equal(last.calc.results["forces_ensemble"], wanted[-1]["particles/forces_ensemble"])
    assert last.calc.results.keys() == results_of(last).keys()
    assert [str(c) for c in read_frames(source.name)[2].constraints] == [str(FixAtoms([3, 5]))]


class TestLayout:
    """What others rely on."""

    def test_of_frames_of_one_size(self, written):
        frames = equal()
        every = contents(frames)
        with h5py.File(written(every)) as file:
            assert list(file["h5md"].attrs["version"]) == [1, 1]
            atoms, observables = file["particles/atoms"], file["observables/atoms"]
            for name in ("forces", "REF_forces", "marks"):
                values = atoms[name]["value"]
                np.testing.assert_array_equal(values, [c[f"particles/{name}"] for c in every])
                assert values.chunks is None  # one piece, which everything reads
            np.testing.assert_array_equal(atoms["position/value"], [a.positions for a in frames])
            np.testing.assert_array_equal(atoms["species/value"], [a.numbers for a in frames])
            np.testing.assert_array_equal(atoms["box/edges/value"], np.zeros((7, 3, 3)))
            assert list(atoms["box"].attrs["boundary"]) == ["none"] * 3
            assert atoms["box"].attrs["dimension"] == 3
            assert [json_text for json_text in observables["run/value"].asstr()[:2]] == ['"\\u00fc0"', '"\\u00fc1"']
            assert observables["step/value"].dtype == np.int64
            assert list(atoms["forces/step"]) == list(observables["energy/step"]) == [0, 2, 4, 6, 8, 10, 12]
            units = {
                name: atoms[name]["value"].attrs.get("unit", "") for name in ("forces", "position", "gamma", "marks")
            }
            assert units == {"forces": "eV Angstrom-1", "position": "Angstrom", "gamma": "", "marks": ""}
            origins = {name: group.attrs.get("ASE_ENTRY_ORIGIN", "") for name, group in atoms.items()}
            assert origins == {
                **dict.fromkeys(("forces", "forces_uncertainty", "gamma", "forces_ensemble"), "calc"),
                **dict.fromkeys(("REF_forces", "marks", "labels"), "arrays"),
                **dict.fromkeys(("box", "position", "species"), ""),
            }
            assert observables["energy_uncertainty"].attrs["ASE_ENTRY_ORIGIN"] == "calc"
            assert observables["step"].attrs["ASE_ENTRY_ORIGIN"] == "info"

    def test_of_frames_of_several_sizes(self, written):
        frames = ragged()
        with h5py.File(written(contents(frames))) as file:
            assert list(file["parameters/ase_uq/n_atoms"]) == [3, 6, 60, 3, 1, 2, 3]
            positions = file["particles/atoms/position/value"]
            assert positions.shape == (7, 60, 3)
            for atoms, padded in zip(frames, positions, strict=True):
                np.testing.assert_array_equal(padded[: len(atoms)], atoms.positions)
                assert np.isnan(padded[len(atoms) :]).all()
            assert np.isnan(file["particles/atoms/species/value"][0, 3:]).all()
            labels = file["particles/atoms/REF_forces"]
            assert list(labels["present"]) == [False] * 5 + [True, False]
            assert np.isnan(labels["value"][0]).all()
            entries = file["observables/atoms"]
            assert list(entries["mixed/value"].asstr()) == ["1", "2.5", '"text"', *[""] * 4] or list(
                entries["mixed/value"].asstr()
            ) == ["1", "2.5", "", '"text"', "", "", ""]
            assert list(entries["vector/value"].asstr()[:2]) == ["[1.0, 1.0]", "[1.0, 1.0, 1.0]"]
            assert list(entries["nothing/present"]) == [False] * 3 + [True] + [False] * 3

    def test_the_cell_of_the_first_frame_says_what_is_periodic(self, written):
        with h5py.File(written(contents([Atoms("H", cell=[3, 3, 3], pbc=(True, False, True)), Atoms("H")]))) as file:
            assert list(file["particles/atoms/box"].attrs["boundary"]) == ["periodic", "none", "periodic"]
            np.testing.assert_array_equal(file["particles/atoms/box/pbc/value"], [[True, False, True], [False] * 3])

    def test_empty_rows_take_little_room(self, written):
        sizes = {}
        for name, frames in {
            "small": [Atoms("H")] * 200,
            "and one large": [*[Atoms("H")] * 199, Atoms("H5000")],
        }.items():
            sizes[name] = written(contents(frames)).stat().st_size
        assert sizes["and one large"] < sizes["small"] + 5000 * 250


@pytest.mark.parametrize("make", [equal, ragged])
def test_ase_reads_it_with_znh5md(written, make):
    """Without this package: every result where ASE has results, and every entry of info and arrays."""
    pytest.importorskip("znh5md", reason="znh5md is not installed; pip install znh5md brings it")
    frames = make()
    every = contents(frames)
    found = read(written(every), ":")
    for atoms, original, kept in zip(found, frames, every, strict=True):
        np.testing.assert_array_equal(atoms.positions, original.positions)
        np.testing.assert_array_equal(atoms.numbers, original.numbers)
        np.testing.assert_array_equal(atoms.pbc, original.pbc)
        assert atoms.calc.results.keys() == results_of(original).keys()
        for key, value in atoms.calc.results.items():
            place = "particles" if f"particles/{key}" in kept else "observables"
            np.testing.assert_array_equal(value, kept[f"{place}/{key}"], err_msg=key)
        for key in original.info.keys() - {"nothing"}:  # not a number is nothing to it
            np.testing.assert_array_equal(atoms.info[key], original.info[key], err_msg=key)
        for key in original.arrays:
            np.testing.assert_array_equal(atoms.arrays[key], original.arrays[key], err_msg=key)


class TestRefusals:
    def test_a_file_that_is_cut_off(self, written):
        path = written(contents(equal()))
        path.write_bytes(path.read_bytes()[:-100])
        with pytest.raises(InputError, match=r"run.h5 is cut off or damaged, and cannot be read as HDF5: .*truncated"):
            Source(path)

    @pytest.mark.parametrize("signature", [b"HEAP", b"SNOD"])
    def test_a_file_that_is_damaged_inside(self, written, signature: bytes):
        """Its size is right, so h5py opens it, and raises a RuntimeError or a KeyError once it looks into it."""
        path = written(contents(equal()))
        path.write_bytes(path.read_bytes().replace(signature, bytes(4)))
        with pytest.raises(InputError, match=r"run.h5 is cut off or damaged, and cannot be read as HDF5: .+"):
            Source(path)

    def test_a_newer_layout(self, written):
        path = written(contents(equal()))
        with h5py.File(path, "a") as file:
            file["parameters/ase_uq"].attrs["layout"] = 2
        with pytest.raises(
            InputError, match=r"newer ase_uq: its layout is version 2, this package reads up to 1. Update"
        ):
            Source(path)

    def test_what_others_wrote_is_left_to_ase(self, path: Path):
        with h5py.File(path, "w") as file:
            file.create_group("h5md")
        assert not is_h5md(path)
        path.write_bytes(b"text")
        assert not is_h5md(path)

    def test_without_h5py(self, written, monkeypatch: pytest.MonkeyPatch):
        path = written(contents(equal()))
        real = builtins.__import__

        def missing(name: str, *arguments: Any) -> Any:
            if name == "h5py":
                raise ImportError("No module named 'h5py'", name="h5py")
            return real(name, *arguments)

        monkeypatch.setattr(builtins, "__import__", missing)
        with pytest.raises(
            MissingDependency, match=r'need h5py, which is not installed. Run: pip install "ase-uq\[hdf5\]"'
        ):
            Source(path)

    def test_a_frame_that_makes_no_structure_is_left_out(self, written):
        every = contents(equal())
        every[1]["particles/labels"] = "["
        frames = [atoms for _, atoms in Source(written(every)).read()]
        assert [isinstance(atoms, Atoms) for atoms in frames] == [True, False, *[True] * 5]
        assert frames[1].reason.startswith("JSONDecodeError")

    @pytest.mark.parametrize("make", [equal, lambda: 20 * ragged()])
    def test_a_disk_without_room_says_so(self, written, make):
        """Wherever it ends; a limit on the size of files is such a disk. HDF5 alone would end the process later."""
        path = written(contents(make()))
        records, size = path.with_name("records"), path.stat().st_size
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        for share in np.linspace(0, 0.99, 12):
            resource.setrlimit(resource.RLIMIT_FSIZE, (int(share * size), before[1]))
            try:
                with pytest.raises(OSError, match="File too large") as error:
                    write_h5md(path, lambda: records_in(records), "source_frame")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, before)
            assert error.value.strerror == "File too large"
            gc.collect()
        write_h5md(path, lambda: records_in(records), "source_frame")
        assert path.stat().st_size == size


def test_atoms_are_those_of_the_contents(written):
    frames = ragged()
    wanted = contents(frames)
    for atoms, kept in zip(map(atoms_of, read_h5md(written(wanted))), map(atoms_of, wanted), strict=True):
        assert atoms == kept
        assert atoms.info.keys() == kept.info.keys()
