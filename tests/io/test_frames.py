"""Frames on disk keep every key, and nothing that is not theirs."""

import math
import resource

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.db import connect
from ase.io import read, write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ase_uq.errors import LabelError
from ase_uq.io.extxyz import frame_text
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.io.results import annotated
from ase_uq.properties import PROPERTIES, UNCERTAINTIES, find_property

KEYS = (*PROPERTIES, *(f"{key}_bll" for key in UNCERTAINTIES if key.endswith("_uncertainty")))


def results_of(n_atoms: int, seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    results = {}
    for key in KEYS:
        entry = find_property(key)
        shape = tuple(7 if n == -1 else n for n in entry.shape)
        shape = (n_atoms, *shape) if entry.per_atom else shape
        results[key] = rng.uniform(0.001, 2, shape) if shape else float(rng.uniform(0.001, 2))
    results["gamma"][0] = math.inf
    return results


def assert_results(found, expected):
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert np.shape(found[key]) == np.shape(value), key
        # extxyz writes arrays with eight decimals.
        np.testing.assert_allclose(found[key], value, atol=1e-8, err_msg=key)


@pytest.mark.parametrize("atoms", [molecule("CH4"), Atoms("Ar"), bulk("Cu") * 2], ids=["molecule", "atom", "crystal"])
def test_every_key_comes_back(tmp_path, atoms):
    results = results_of(len(atoms))
    write_frames(tmp_path / "a.xyz", [annotated(atoms, results, origin="here", run=3)])
    (back,) = read_frames(tmp_path / "a.xyz")
    assert_results(back.calc.results, results)
    assert (back.info["origin"], back.info["run"]) == ("here", 3)
    np.testing.assert_allclose(back.positions, atoms.positions, atol=1e-8)
    assert_results(read_frames(str(tmp_path / "a.xyz"))[0].calc.results, results)


def test_every_key_survives_a_second_round(tmp_path):
    atoms = molecule("CH4")
    write_frames(tmp_path / "a.xyz", [annotated(atoms, results_of(5))])
    write_frames(tmp_path / "b.xyz", read_frames(tmp_path / "a.xyz"))
    assert (tmp_path / "a.xyz").read_text() == (tmp_path / "b.xyz").read_text()


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    sigma=st.integers(1, 6).flatmap(lambda n: arrays(float, (n, 3), elements=st.floats(0, 1e3))),
    energy=st.floats(0, 1e6),
    stress=arrays(float, 6, elements=st.floats(0, 10)),
)
def test_any_numbers_come_back(tmp_path, sigma, energy, stress):
    atoms = Atoms(f"H{len(sigma)}", np.arange(3.0 * len(sigma)).reshape(-1, 3))
    results = {"forces_uncertainty": sigma, "energy_uncertainty": energy, "stress_uncertainty": stress}
    write_frames(tmp_path / "a.xyz", [annotated(atoms, results)])
    assert_results(read_frames(tmp_path / "a.xyz")[0].calc.results, results)


def test_other_programs_of_ase_read_what_they_know(tmp_path):
    results = results_of(5)
    write_frames(tmp_path / "a.xyz", [annotated(molecule("CH4"), results)] * 2)
    images = read(tmp_path / "a.xyz", ":")
    assert len(images) == 2
    assert images[0].get_potential_energy() == pytest.approx(results["energy"])
    np.testing.assert_allclose(images[0].get_forces(), results["forces"], atol=1e-8)
    np.testing.assert_allclose(images[0].arrays["forces_uncertainty"], results["forces_uncertainty"], atol=1e-8)


@pytest.mark.parametrize("suffix", ["xyz", "traj", "json", "cif"])
def test_the_writers_of_ase_are_not_broken_by_keys_they_do_not_know(tmp_path, suffix):
    frame = annotated(bulk("Cu", cubic=True), results_of(4))
    write(tmp_path / f"a.{suffix}", frame)
    np.testing.assert_allclose(read(tmp_path / f"a.{suffix}").cell, frame.cell, atol=1e-6)


def test_results_of_a_live_calculator_are_carried():
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    atoms.get_forces()
    frame = annotated(atoms)
    assert frame.get_potential_energy() == atoms.get_potential_energy()
    assert frame.calc is not atoms.calc


def test_the_structure_itself_is_not_touched():
    atoms = molecule("CH4")
    atoms.info["mine"] = 1
    frame = annotated(atoms, results_of(5), flag_step=3)
    frame.positions += 1
    assert atoms.info == {"mine": 1}
    assert atoms.calc is None
    assert set(atoms.arrays) == {"numbers", "positions"}
    np.testing.assert_array_equal(atoms.positions, molecule("CH4").positions)


def moved_after_reading(path):
    write_frames(path, [annotated(molecule("CH4"), results_of(5))])
    (atoms,) = read_frames(path)
    atoms.positions += 0.1
    return atoms


def moved_after_calculating(path):
    atoms = bulk("Cu", cubic=True)
    atoms.calc = EMT()
    atoms.get_forces()
    atoms.positions[0] += 0.1
    return atoms


@pytest.mark.parametrize("moved", [moved_after_reading, moved_after_calculating])
def test_results_of_other_positions_are_not_written(tmp_path, moved):
    write_frames(tmp_path / "a.xyz", [moved(tmp_path / "before.xyz")])
    (back,) = read_frames(tmp_path / "a.xyz")
    assert back.calc is None
    assert not set(back.info) & set(KEYS)
    assert not set(back.arrays) & set(KEYS)


def test_new_results_replace_all_the_old_ones():
    old = annotated(molecule("CH4"), results_of(5))
    new = annotated(old, {"energy": 1.0, "energy_uncertainty": 0.5})
    assert new.calc.results == {"energy": 1.0, "energy_uncertainty": 0.5}
    assert new.info["energy_uncertainty"] == 0.5
    assert "forces_uncertainty" not in new.arrays  # it belonged to the old results
    assert "stress_uncertainty_bll" not in new.info


def test_annotations_without_a_calculator_stay(tmp_path):
    frame = annotated(molecule("CH4"), results_of(5))
    frame.calc = None
    write_frames(tmp_path / "a.xyz", [frame])
    assert set(UNCERTAINTIES) <= set(read_frames(tmp_path / "a.xyz")[0].calc.results)


def test_entries_that_only_sound_like_ours_are_left_alone(tmp_path):
    atoms = molecule("CH4")
    atoms.info |= {"gamma_only": True, "energy_uncertainty_bll": 0.5}
    write_frames(tmp_path / "a.xyz", [atoms])
    back = read_frames(tmp_path / "a.xyz")
    write_frames(tmp_path / "b.xyz", back)
    assert back[0].calc.results == {"energy_uncertainty_bll": 0.5}
    assert back[0].info["gamma_only"]


def test_appending_keeps_what_is_there_and_writing_does_not(tmp_path):
    path = tmp_path / "a.xyz"
    write_frames(path, [molecule("CH4")], append=True)
    write_frames(path, [molecule("H2O"), molecule("NH3")], append=True)
    assert [str(atoms.symbols) for atoms in read_frames(path)] == ["CH4", "OH2", "NH3"]
    write_frames(path, [molecule("H2O")])
    assert len(read_frames(path)) == 1


def test_frames_in_a_list_are_frames():
    frames = (molecule("CH4"), molecule("H2O"))
    assert read_frames(frames) == list(frames)
    assert read_frames(frames)[0] is frames[0]
    with pytest.raises(LabelError, match=r"train: the list has no structures"):
        read_frames([], name="train")


def test_a_missing_file_is_told(tmp_path):
    with pytest.raises(LabelError, match=r"train: there is no file .*nowhere.xyz"):
        read_frames(tmp_path / "nowhere.xyz", name="train")


def test_an_empty_file_is_told(tmp_path):
    (tmp_path / "a.xyz").touch()
    with pytest.raises(LabelError, match=r"frames: the file .*a.xyz is empty"):
        read_frames(tmp_path / "a.xyz")


def test_a_file_without_structures_is_told(tmp_path):
    (tmp_path / "a.xyz").write_text("\n\n")
    with pytest.raises(LabelError, match=r"frames: the file .*a.xyz has no structures"):
        read_frames(tmp_path / "a.xyz")


@pytest.mark.parametrize("before", [(0,), (3,), (1, 4), (0, 1, 2, 3, 4, 5)])
@pytest.mark.parametrize("blank", ["\n", " \t\n", "\n\n\n"])
def test_blank_lines_between_frames_end_nothing(tmp_path, before, blank):
    frames = [molecule(name) for name in ("CH4", "H2O", "NH3", "CO", "C6H6")]
    texts = [frame_text(atoms) for atoms in frames]
    joined = "".join(blank * (number in before) + text for number, text in enumerate([*texts, ""]))
    (tmp_path / "a.xyz").write_text(joined)
    assert [str(atoms.symbols) for atoms in read_frames(tmp_path / "a.xyz")] == [str(a.symbols) for a in frames]


def test_a_truncated_file_is_told_with_how_far_it_goes(tmp_path):
    path = tmp_path / "a.xyz"
    write_frames(path, [annotated(molecule("CH4"), results_of(5))] * 3)
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:-2]))
    with pytest.raises(LabelError, match=r"a.xyz cannot be read after structure 2: it is truncated: 3 of its 5 "):
        read_frames(path)


def test_a_file_of_something_else_is_told(tmp_path):
    (tmp_path / "a.xyz").write_text("these are not the frames\nyou are looking for\n")
    with pytest.raises(LabelError, match=r"after structure 0: a number of atoms was expected, found 'these are"):
        read_frames(tmp_path / "a.xyz")


def test_what_is_carried_is_not_overwritten_by_the_next_calculation():
    atoms = molecule("CH4")
    results = results_of(5)
    frame = annotated(atoms, results)
    kept = frame.get_forces().copy()
    results["forces"] += 1
    np.testing.assert_array_equal(frame.get_forces(), kept)


@pytest.mark.parametrize("append", [True, False])
def test_a_full_disk_is_told_by_name_and_leaves_no_half_frame(append, tmp_path):
    path = tmp_path / "a.xyz"
    write_frames(path, [molecule("CH4")])
    before = path.stat().st_size if append else 0
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (before + 100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*a\.xyz'"):
            write_frames(path, [molecule("C6H6")], append=append)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert path.stat().st_size == before
    if append:
        write_frames(path, [molecule("H2O")], append=True)
        assert [str(atoms.symbols) for atoms in read_frames(path)] == ["CH4", "OH2"]


def test_a_full_disk_leaves_no_empty_file(tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(OSError, match=r"File too large: '.*new\.xyz'"):
            write_frames(tmp_path / "new.xyz", [molecule("C6H6")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())


def test_a_device_that_is_full_is_told_by_name():
    with pytest.raises(OSError, match=r"No space left on device: '/dev/full'"):
        write_frames("/dev/full", [molecule("CH4")])


def test_nothing_is_added_to_a_file_that_was_cut_off(tmp_path):
    path = tmp_path / "a.xyz"
    write_frames(path, [annotated(molecule("CH4"), results_of(5))])
    cut = path.read_bytes()[:-20]
    path.write_bytes(cut)
    with pytest.raises(ValueError, match=r"a\.xyz ends in the middle of a line: it was cut off\. Remove its last"):
        write_frames(path, [molecule("CH4")], append=True)
    assert path.read_bytes() == cut
    path.write_bytes(b"")
    write_frames(path, [molecule("CH4")], append=True)
    assert len(read_frames(path)) == 1


class TestSeveralFilesAndParts:
    @pytest.fixture
    def file(self, tmp_path):
        write(tmp_path / "five.xyz", [Atoms("H", [(float(i), 0, 0)]) for i in range(5)])
        return tmp_path / "five.xyz"

    @pytest.mark.parametrize(
        ("part", "expected"),
        [(":2", [0, 1]), ("-1", [4]), ("1", [1]), ("::2", [0, 2, 4]), ("3:", [3, 4]), (":", [0, 1, 2, 3, 4])],
    )
    def test_a_part_of_a_file(self, file, part, expected):
        assert [atoms.positions[0, 0] for atoms in read_frames(f"{file}@{part}")] == expected

    def test_several(self, file):
        found = read_frames([file, f"{file}@:2", str(file)])
        assert [atoms.positions[0, 0] for atoms in found] == [0, 1, 2, 3, 4, 0, 1, 0, 1, 2, 3, 4]

    def test_a_query_of_a_database(self, file, tmp_path):
        with connect(tmp_path / "all.db") as database:
            for number, atoms in enumerate(read_frames(file)):
                database.write(atoms, kept=number % 2)
        found = read_frames(f"{tmp_path / 'all.db'}@kept=1")
        assert [atoms.positions[0, 0] for atoms in found] == [1, 3]
        with pytest.raises(LabelError, match=r"test frames: .*kept=7 has no structures"):
            read_frames(f"{tmp_path / 'all.db'}@kept=7", name="test frames")

    @pytest.mark.parametrize("part", ["7", "5:", "-9"])
    def test_a_part_with_nothing_in_it(self, file, part):
        with pytest.raises(LabelError, match=rf"frames: .*five.xyz@{part} has no structures"):
            read_frames(f"{file}@{part}")

    def test_no_index(self, file):
        with pytest.raises(LabelError, match=r"'first' in .*five.xyz@first is no index: write .*five.xyz@:100 or"):
            read_frames(f"{file}@first")

    def test_an_at_in_the_name_of_a_file(self, file):
        file.rename(file.with_name("a@1.xyz"))
        assert len(read_frames(file.with_name("a@1.xyz"))) == 5
