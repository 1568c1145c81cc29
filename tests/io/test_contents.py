"""Whatever people keep in a structure is kept, to the last bit, or named."""

from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms, FixBondLengths, FixCartesian, FixConstraint
from ase.io.jsonio import encode

from ase_uq.io.contents import Contents, atoms_of, contents_of
from ase_uq.io.results import stored, with_results


def back(atoms: Atoms, results: dict[str, Any] | None = None) -> tuple[Atoms, list[str]]:
    contents, left_out = contents_of(atoms, *stored(atoms, results or {}))
    return with_results(atoms_of(contents)), left_out


VALUES = {
    "number": 0.1 + 0.2,
    "single": np.float32(0.1),
    "whole": -7,
    "huge": 10**30,
    "flag": True,
    "text": "two words, ü and\na line",
    "digits": "300",
    "none": None,
    "nested": {"a": [1, {"b": None}]},
    "vector": np.array([1.0, np.nan, -np.inf]),
    "matrix": np.arange(6).reshape(2, 3),
    "flags": np.array([True, False]),
    "one": np.array([2.5]),
    "empty": {},
    "words": ["a", "b c"],
}


@pytest.mark.parametrize("key", VALUES)
def test_entries_of_info_come_back(key: str):
    atoms = Atoms("H", info={key: VALUES[key]})
    found, left_out = back(atoms)
    assert left_out == []
    value = found.info[key]
    np.testing.assert_array_equal(value, VALUES[key])
    if isinstance(VALUES[key], np.ndarray | np.generic):
        assert value.dtype == VALUES[key].dtype
    elif not isinstance(VALUES[key], float | int):
        assert type(value) is type(VALUES[key])


@pytest.mark.parametrize(
    ("given", "found"), [([1, 2.5], np.array([1, 2.5])), ((1, "a"), [1, "a"]), ([[1], [2, 3]],) * 2]
)
def test_lists_of_numbers_are_arrays_as_in_extended_xyz(given: Any, found: Any):
    entry = back(Atoms("H", info={"x": given}))[0].info["x"]
    assert type(entry) is type(found)
    assert list(entry) == list(found)


ARRAYS = {
    "floats": np.array([1 / 3, -0.0, 5e-324]),
    "singles": np.array([0.1, 0.2, 0.3], np.float32),
    "long": np.array([0.1, 0.2, 0.3], np.longdouble),
    "whole": np.array([2**62, -1, 0]),
    "marks": np.array([True, False, True]),
    "labels": np.array(["a", "", "b c"]),
    "columns": np.arange(6.0).reshape(3, 2),
    "tensors": np.arange(27.0).reshape(3, 3, 3),
    "initial_charges": np.array([-1.0, 0.5, 0.5]),
    "initial_magmoms": np.array([1.0, 0.0, 0.0]),
    "momenta": np.arange(9.0).reshape(3, 3),
    "tags": np.array([1, 2, 3]),
    "charges": np.array([-0.5, 0.2, 0.3]),
}


@pytest.mark.parametrize("key", ARRAYS)
def test_arrays_come_back(key: str):
    atoms = molecule("H2O")
    atoms.set_array(key, ARRAYS[key])
    found, left_out = back(atoms)
    assert left_out == []
    values = found.calc.results[key] if key == "charges" else found.arrays[key]  # a result to ASE's readers
    np.testing.assert_array_equal(values, ARRAYS[key])
    assert values.dtype.kind == ARRAYS[key].dtype.kind


def test_structure_and_results_come_back_bit_for_bit():
    rng = np.random.default_rng(0)
    atoms = molecule("CH3OH", cell=rng.normal(size=(3, 3)) + 9 * np.eye(3), pbc=(True, False, True))
    atoms.positions += rng.normal(size=(6, 3))
    results = {
        "energy": -1 / 3,
        "forces": rng.normal(size=(6, 3)),
        "stress": rng.normal(size=6),
        "forces_uncertainty": rng.normal(size=(6, 3)),
        "energy_uncertainty_bll": 0.1,
        "gamma": rng.normal(size=6),
        "energy_ensemble": rng.normal(size=4),
        "forces_ensemble": rng.normal(size=(6, 3, 4)),
        "stress_ensemble": rng.normal(size=(6, 4)),
    }
    found, left_out = back(atoms, results)
    assert left_out == []
    assert found == atoms
    assert found.calc.results.keys() == results.keys()
    for key, value in results.items():
        np.testing.assert_array_equal(found.calc.results[key], value, err_msg=key)
    assert found.arrays["forces_ensemble"].shape == (6, 12)  # in columns, as extended XYZ has it


KEYS = ["position", "species", "box", "force", "a/b", "a%2Fb", "100%", ".", "..", "with space", "ü", '"', "value"]


@pytest.mark.parametrize("key", KEYS)
def test_any_name_will_do(key: str):
    atoms = Atoms("H2", info={key: 1.5})
    atoms.set_array(key, np.array([1.0, 2.0]))
    contents, left_out = contents_of(atoms, *stored(atoms, {}))
    assert left_out == []
    for name in contents:
        assert name.count("/") == 1
        assert name.partition("/")[2] not in (".", "..")
    found = atoms_of(contents)
    assert found.info[key] == 1.5
    np.testing.assert_array_equal(found.arrays[key], [1.0, 2.0])
    np.testing.assert_array_equal(found.positions, atoms.positions)


def test_what_no_file_holds_is_named_and_left_out():
    atoms = molecule("H2O", info={"object": object(), 3: 1, "half": 1j, "bad\0": 1, "": 1, "magmom": "up", "x": 1})
    atoms.set_array("complex", np.ones(3, complex))
    atoms.set_array("things", np.array([1, "a", None], object))
    atoms.arrays["stresses"] = np.array(["a", "b", "c"])  # numbers to ASE
    atoms.arrays["void"] = np.empty((3, 0))
    found, left_out = back(atoms)
    assert sorted(left_out) == sorted(
        [
            *("info['object']", "info[3]", "info['half']", "info['bad\\x00']", "info['']", "info['magmom']"),
            *("arrays['complex']", "arrays['things']", "arrays['stresses']", "arrays['void']"),
        ]
    )
    assert found.info["x"] == 1
    assert found.arrays.keys() == {"numbers", "positions"}


class Homemade(FixConstraint):
    """A constraint that ASE cannot write down."""


def test_constraints_come_back_or_are_named():
    atoms = molecule("CH3OH")
    atoms.set_constraint([FixAtoms([0, 2]), FixCartesian(1, [True, False, True]), FixBondLengths([(0, 1)])])
    found, left_out = back(atoms)
    assert left_out == []
    described, wanted = (encode([c.todict() for c in one.constraints]) for one in (found, atoms))
    assert described == wanted
    atoms.set_constraint([Homemade(), FixAtoms([1])])
    found, left_out = back(atoms)
    assert left_out == ["the constraint Homemade"]
    assert found.info["lost_constraints"] == "Homemade"
    assert [type(c) for c in found.constraints] == [FixAtoms]
    atoms.set_constraint([Homemade()])
    assert back(atoms)[0].constraints == []


def test_contents_are_none_of_the_readers_business():
    """A structure does not change when the block of numbers that it was read from does."""
    atoms = molecule("H2O", info={"vector": np.ones(2)})
    atoms.set_array("x", np.ones((3, 2)))
    contents: Contents = contents_of(atoms, *stored(atoms, {"forces": np.ones((3, 3)), "gamma": np.ones(3)}))[0]
    contents = {name: np.array(value) if isinstance(value, np.ndarray) else value for name, value in contents.items()}
    found = atoms_of(contents)
    for value in contents.values():
        if isinstance(value, np.ndarray):
            value[...] = 0
    assert found == atoms
    for values in (found.info["vector"], found.arrays["x"], found.arrays["gamma"], found.calc.results["forces"]):
        np.testing.assert_array_equal(values, np.ones_like(values))
