"""Structures as text: what ASE writes, byte for byte, without what cannot be read again."""

import io
import json
import re
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLength, FixCartesian, FixedPlane, Hookean
from ase.io import write
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ase_uq.dynamics.actions import Flag
from ase_uq.errors import UQWarning
from ase_uq.io.extxyz import extxyz_text, frame_text, unwritable
from ase_uq.io.frames import read_frames, write_frames
from ase_uq.io.results import LOST_KEY, annotated, lost_constraints
from ase_uq.scoring.journal import Journal

STD = np.linspace(0.1, 1.5, 15).reshape(5, 3)


def full() -> Atoms:
    """A methane molecule with an entry of each kind that the format can hold."""
    atoms = molecule("CH4", vacuum=3.0)
    atoms.set_momenta(STD)
    atoms.set_tags(range(5))
    atoms.arrays |= {
        "single": STD.astype(np.float32),
        "column": STD[:, :1] * 1e9,
        "flag": STD[:, 0] > 1,
        "label": np.array(["C1", "H1", "H2", "H3", "H4"]),
        "object": np.array(["a", "b", "c", "d", "e"], object),
        "REF_forces": STD,
    }
    atoms.info |= {"note": 'one "line" = 1', "list": [1.0, 2.0], "dict": {"a": [1]}, "none": None, "on": True}
    atoms.info |= {"matrix": STD[:2], "energy_uncertainty": 0.5}
    return atoms


def calculated(*, stress: bool = True) -> Atoms:
    atoms = full()
    results = {"forces": -STD, "energy": -1.5, "free_energy": -1.5, "energies": STD[:, 0]}
    atoms.calc = SinglePointCalculator(atoms, **results, **({"stress": np.arange(6.0)} if stress else {}))
    return atoms


def with_numbers() -> Atoms:
    atoms = Atoms("H", cell=[[1e-5, 1 / 3, 0], [0, 1e16, -0.0], [0, 0, 1e22]], pbc=[True, False, True])
    plain = {"a": 0.1, "b": 1e-5, "c": float("nan"), "d": -float("inf"), "e[0]": 0.5, "two words": 1.5, "é": 2.5}
    scalars = {"f": np.float64(1 / 3), "g": np.float32(0.1), "h": np.int64(3), "i": np.array(0.25), "j": True}
    vectors = {"k": np.array([1 / 3, 1e-9]), "l": np.array([0.1], np.float32), "m": np.array([1e20]), "n n": np.ones(2)}
    atoms.info |= plain | scalars | vectors | {"o": np.array([1, 2]), "p": np.array([True]), "q": -np.zeros(3)}
    return atoms


def fixed(constraint) -> Atoms:
    atoms = calculated()
    atoms.set_constraint(constraint)
    return atoms


def stressed(stress: np.ndarray) -> Atoms:
    atoms = calculated(stress=False)
    atoms.info["stress"] = stress
    return atoms


@pytest.mark.parametrize(
    "atoms",
    [
        full(),
        calculated(),
        stressed(np.arange(6.0)),
        stressed(np.arange(9.0).reshape(3, 3)),
        fixed(FixAtoms([0, 2])),
        fixed(FixCartesian([1], [True, False, True])),
        bulk("Cu"),
        with_numbers(),
        Atoms(),
        Atoms("U"),
    ],
    ids=lambda atoms: f"{atoms.symbols}-{len(atoms.info)}-{len(atoms.constraints)}",
)
def test_the_text_is_that_of_ase(atoms):
    buffer = io.StringIO()
    write(buffer, atoms, format="extxyz")
    assert frame_text(atoms) == buffer.getvalue()


@pytest.mark.parametrize(
    ("constraint", "lost"),
    [
        (FixBondLength(0, 1), "FixBondLengths"),
        ([FixAtoms([2]), Hookean(0, 1, 1.0, 5.0), FixedPlane(0, [0, 0, 1])], "FixedPlane Hookean"),
        ([FixAtoms([2]), FixCartesian(1, [True, False, True])], None),
    ],
)
def test_constraints_that_a_frame_cannot_keep_are_told_and_marked(tmp_path, constraint, lost):
    """Who goes on from the file would move what was held."""
    atoms = fixed(constraint)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        write_frames(tmp_path / "a.xyz", [atoms])
    messages = [str(one.message) for one in told if one.category is UQWarning]
    assert len(messages) == bool(lost)
    assert all(f"the constraint {kind}" in messages[0] for kind in (lost or "").split())
    (frame,) = read_frames(tmp_path / "a.xyz")
    assert frame.info.get(LOST_KEY) == lost
    assert lost_constraints(frame) == (lost or "").split()
    write_frames(tmp_path / "b.xyz", [frame])  # nothing new to tell, and the mark stays
    assert read_frames(tmp_path / "b.xyz")[0].info.get(LOST_KEY) == lost
    again = extxyz_text(atoms, atoms.calc.results)
    assert (f"{LOST_KEY}=" in again) == bool(lost)


@pytest.mark.parametrize(("store", "key", "value"), [("info", "energy", -2.0), ("arrays", "forces", STD)])
def test_a_label_by_the_name_of_a_result_gives_way_to_it(store, key, value):
    atoms, plain = calculated(), frame_text(calculated())
    getattr(atoms, store)[key] = value
    with pytest.warns(UQWarning, match=rf"has {key} among its results .* results are written\. .* call it REF_{key}\."):
        assert frame_text(atoms) == plain
    assert key in getattr(atoms, store)
    atoms.calc = None
    assert key in frame_text(atoms)


ODD = {
    "info['note']": ("info", "note", "two\nlines"),
    "info['ended']": ("info", "ended", "a line\n"),
    "info['empty']": ("info", "empty", ""),
    "info['return']": ("info", "return", "two\rlines"),
    "info['separator']": ("info", "separator", "two\u2028lines"),
    "info['slash']": ("info", "slash", "a\\"),
    "info['nothing']": ("info", "nothing", np.zeros(0)),
    "info['set']": ("info", "set", {1, 2}),
    "info['complex']": ("info", "complex", 1j),
    "info['stress']": ("info", "stress", 1),
    "info[('a', 'b')]": ("info", ("a", "b"), 1),
    "info['Lattice']": ("info", "Lattice", 3),
    "info['ragged']": ("info", "ragged", [[0, 1, 2], [3, 4]]),
    "info['virial']": ("info", "virial", np.zeros(6)),
    "info['dipole']": ("info", "dipole", "2.3 D"),
    "info['polarization']": ("info", "polarization", {"x": 1}),
    "info['dielectric_tensor']": ("info", "dielectric_tensor", [[1.0], [1.0, 2.0]]),
    "info['path']": ("info", "path", "C:\\runs\\new"),
    "info['tab']": ("info", "tab", "two\tparts"),
    "info['blank']": ("info", "blank", "  "),
    "info['json']": ("info", "json", "_JSON [1"),
    "info['zero']": ("info", "zero", "a\0b"),
    "info['half']": ("info", "half", "a\ud800b"),
    "info['quoted']": ("info", "quoted", ['one "line"']),
    "info['accents']": ("info", "accents", {"who": "Schrödinger"}),
    "info['deep']": ("info", "deep", {"a": [{"b": "c\\d"}]}),
    "info['objects']": ("info", "objects", [np.zeros(1)]),
    "info['names']": ("info", "names", np.array(["a'b", 'c"d'])),
    "info['a=b']": ("info", "a=b", 1),
    "arrays['Z']": ("arrays", "Z", np.ones(5, int)),
    "arrays['charge']": ("arrays", "charge", np.ones(5)),
    "arrays['move_mask']": ("arrays", "move_mask", np.ones(5, bool)),
    "arrays['energy']": ("arrays", "energy", np.ones(5)),
    "arrays['stresses']": ("arrays", "stresses", np.array(["a"] * 5)),
    "arrays['id']": ("arrays", "id", np.full(5, 2**40)),
    "arrays['negative']": ("arrays", "negative", np.full(5, -(2**31) - 1)),
    "arrays['pos1']": ("arrays", "pos1", np.zeros(5)),
    "arrays['forces_uncertainty2']": ("arrays", "forces_uncertainty2", np.zeros(5)),
    "arrays['tensor']": ("arrays", "tensor", np.zeros((5, 3, 3))),
    "arrays['complex']": ("arrays", "complex", np.zeros(5, complex)),
    "arrays['unsigned']": ("arrays", "unsigned", np.zeros(5, np.uint8)),
    "arrays['object']": ("arrays", "object", np.array([None] * 5)),
    "arrays['a:b']": ("arrays", "a:b", np.zeros(5)),
    "arrays['a b']": ("arrays", "a b", np.zeros(5)),
    "arrays['symbols']": ("arrays", "symbols", np.zeros(5)),
    "arrays['spaced']": ("arrays", "spaced", np.array(["a b"] * 5)),
}


@pytest.mark.parametrize("name", ODD)
def test_what_the_format_cannot_hold_is_left_out_and_named(tmp_path, name):
    store, key, value = ODD[name]
    atoms = annotated(molecule("CH4"), {"forces_uncertainty": STD}, kept=1)
    getattr(atoms, store)[key] = value
    atoms.set_array("label", np.array(["C1", "H1", "H2", "H3", "H4"]))
    assert unwritable(atoms) == [name]
    with pytest.warns(UQWarning, match=re.escape(f"{name} cannot be kept in extended XYZ and is left out.")):
        write_frames(tmp_path / "a.xyz", [molecule("H2O"), atoms])
    assert key in getattr(atoms, store), "the structure itself is not touched"
    found = read_frames(tmp_path / "a.xyz")[1]
    assert found.info["kept"] == 1
    assert found.arrays["label"].tolist() == ["C1", "H1", "H2", "H3", "H4"]
    np.testing.assert_allclose(found.calc.results["forces_uncertainty"], STD, atol=1e-8)
    assert not unwritable(found)


NAMES = st.text(max_size=8) | st.sampled_from(
    ["virial", "stress", "dipole", "magmom", "uid", "comment", "Lattice", "a b", "a=b", 'a"b', "_JSON", "1"]
)
TEXTS = st.text(max_size=12) | st.text("\\\"'{}[]= ,aT_1\t\n", max_size=12) | st.sampled_from(["_JSON {", "T", "1e5"])
NOTES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=3) | st.tuples(inner, inner),
    max_leaves=8,
)
FEW = arrays(
    st.sampled_from([float, np.float32, int, bool, "U3"]), st.sampled_from([(), (1,), (3,), (6,), (3, 3), (2, 2)])
)
COLUMNS = st.sampled_from([(2,), (2, 1), (2, 3), (2, 9)]).flatmap(
    lambda shape: arrays(st.sampled_from([float, np.int64, bool, "U3"]), shape)
)
COLUMN_NAMES = st.text("ab01_:Zé ", max_size=3) | st.sampled_from(
    ["Z", "pos", "pos0", "species", "charge", "charges", "stresses", "move_mask", "forces", "energy", "tags", "momenta"]
)


def as_json(value: object) -> str:
    """A note as the reader of extended XYZ has it: arrays are lists."""
    return json.dumps(value, default=lambda array: array.tolist())


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    notes=st.dictionaries(NAMES, NOTES | FEW, max_size=3), columns=st.dictionaries(COLUMN_NAMES, COLUMNS, max_size=3)
)
def test_whatever_is_written_can_be_read_again(tmp_path, notes, columns):
    atoms = Atoms("CO", [[0, 0, 0], [0, 0, 1.2]], info=notes | {"kept": 7})
    atoms.arrays |= columns
    lost = set(unwritable(atoms))
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Skipping")  # by ASE's writer, of what it leaves out itself
        warnings.filterwarnings("ignore", "info|arrays", UQWarning)
        write_frames(tmp_path / "a.xyz", [molecule("H2O"), atoms, molecule("NH3")])
    first, found, last = read_frames(tmp_path / "a.xyz")
    assert [str(a.symbols) for a in (first, found, last)] == ["OH2", "CO", "NH3"]
    assert not found.constraints
    np.testing.assert_allclose(found.positions, atoms.positions)
    results = {} if found.calc is None else found.calc.results
    there = {f"info[{key!r}]" for key in notes if key in found.info or key in results}
    there |= {f"arrays[{key!r}]" for key in columns if key in found.arrays or key in results}
    assert lost | there == {f"info[{key!r}]" for key in notes} | {f"arrays[{key!r}]" for key in columns}
    assert found.info["kept"] == 7
    for key, note in notes.items():
        if f"info[{key!r}]" not in lost and isinstance(note, dict):
            assert as_json(found.info[key]) == as_json(note)
        if f"info[{key!r}]" not in lost and isinstance(note, str) and isinstance(found.info.get(key), str):
            assert found.info[key] == note


def test_a_structure_without_atoms_is_written(tmp_path):
    write_frames(tmp_path / "a.xyz", [Atoms(cell=[1, 1, 1])])
    assert (tmp_path / "a.xyz").read_text().startswith("0\n")


@pytest.mark.parametrize("name", ["a.traj", "a.db", "a.json", "a.cif", "a.pdb", "XDATCAR", "a.xyz.gz", "a.extxyz.bz2"])
def test_names_of_other_formats_are_refused_wherever_frames_are_written(tmp_path, name):
    path = tmp_path / name
    for write_to in (
        lambda path: write_frames(path, [molecule("CH4")]),
        lambda path: write_frames(str(path), [molecule("CH4")], append=True),
        lambda path: Journal(path, None, {}),
        Flag,
    ):
        with pytest.raises(
            ValueError, match=rf"{name} would be written as extended XYZ, but its name is that of .*: give"
        ):
            write_to(path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "frames", "a.flagged", "a.xyz.part", "traj", "gz"])
def test_names_that_are_of_no_other_format_are_written(tmp_path, name):
    write_frames(tmp_path / name, [molecule("CH4")] * 2)
    assert (tmp_path / name).read_text().count("Properties=") == 2
