"""Reference values are found where they are, and left behind where they would be wrong."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import write

from ase_uq.errors import LabelError
from ase_uq.io.frames import read_frames
from ase_uq.io.labels import drop_labels, keep_structure, labels_of, refuse_own_forces

VOIGT = np.array([1.0, 2.0, 3.0, 4.0, 5.0, 6.0])  # xx, yy, zz, yz, xz, xy
MATRIX = np.array([[1.0, 6.0, 5.0], [6.0, 2.0, 4.0], [5.0, 4.0, 3.0]])


@pytest.mark.parametrize("stress", [VOIGT, MATRIX, MATRIX.ravel(), MATRIX.tolist()], ids=["voigt", "3x3", "9", "lists"])
def test_labels_from_info_and_arrays(stress):
    atoms = molecule("CH4")
    forces = np.arange(15.0).reshape(5, 3)
    atoms.info |= {"REF_energy": -1, "REF_stress": stress}
    atoms.arrays["REF_forces"] = forces
    atoms.calc = SinglePointCalculator(atoms, energy=99.0, forces=np.zeros((5, 3)))  # not the reference
    labels = labels_of(atoms)
    assert labels.energy == -1.0
    np.testing.assert_array_equal(labels.forces, forces)
    np.testing.assert_array_equal(labels.stress, VOIGT)


def test_labels_survive_a_file(tmp_path):
    atoms = molecule("CH4")
    atoms.info |= {"REF_energy": -1.5, "REF_stress": MATRIX}
    atoms.set_array("REF_forces", np.arange(15.0).reshape(5, 3))
    write(tmp_path / "a.xyz", atoms)
    labels = labels_of(read_frames(tmp_path / "a.xyz")[0])
    assert labels.energy == -1.5
    np.testing.assert_array_equal(labels.forces, np.arange(15.0).reshape(5, 3))
    np.testing.assert_array_equal(labels.stress, VOIGT)


def test_labels_from_the_results_of_a_reference_calculator():
    atoms = bulk("Cu", cubic=True)
    atoms.calc = SinglePointCalculator(atoms, energy=-2.0, forces=np.ones((4, 3)), stress=VOIGT)
    labels = labels_of(atoms)
    assert labels.energy == -2.0
    np.testing.assert_array_equal(labels.forces, np.ones((4, 3)))
    np.testing.assert_array_equal(labels.stress, VOIGT)


def test_labels_by_other_names_and_labels_that_are_not_all_there():
    atoms = molecule("CH4")
    assert labels_of(atoms) == labels_of(Atoms())
    atoms.info["dft_energy"] = -3.0
    labels = labels_of(atoms, ("dft_energy", "dft_forces", "dft_stress"))
    assert (labels.energy, labels.forces, labels.stress) == (-3.0, None, None)
    assert labels_of(atoms).energy is None
    atoms.arrays["REF_forces"] = np.ones((5, 3))
    assert labels_of(atoms).energy is None
    np.testing.assert_array_equal(labels_of(atoms).forces, np.ones((5, 3)))


def test_a_stress_of_another_shape_is_refused():
    atoms = Atoms("H", info={"REF_energy": 0.0, "REF_stress": [0.0] * 4})
    with pytest.raises(LabelError, match=r"stress of shape \(4,\); 6 \(Voigt\) or 9 numbers"):
        labels_of(atoms)


def test_forces_that_agree_but_for_rounding_are_the_potentials_own():
    refuse_own_forces("the labels", 2e-5, 1.0, purpose="to judge by")
    refuse_own_forces("the labels", 0.0, 0.0, purpose="to judge by")  # of a crystal at rest
    with pytest.raises(LabelError, match=r"^the labels are the potential's own .*agree to 5e-06\): .* to judge by\."):
        refuse_own_forces("the labels", 1e-5, 2.0, purpose="to judge by")


def test_labels_of_a_start_are_dropped():
    atoms = molecule("CH4")
    atoms.info |= {"REF_energy": -1.0, "REF_stress": VOIGT, "charge": 1}
    atoms.set_array("REF_forces", np.ones((5, 3)))
    atoms.set_array("forces_uncertainty", np.ones((5, 3)))
    drop_labels(atoms)
    assert atoms.info == {"charge": 1}
    assert set(atoms.arrays) == {"numbers", "positions", "forces_uncertainty"}
    drop_labels(atoms)


def test_labels_by_unknown_names_do_not_stay_with_a_structure():
    atoms = molecule("CH4")
    atoms.set_momenta(np.ones((5, 3)))
    atoms.set_tags(1)
    atoms.set_array("dft_forces", np.ones((5, 3)))
    keep_structure(atoms, "momenta")
    assert set(atoms.arrays) == {"numbers", "positions", "momenta", "tags"}
    keep_structure(atoms)
    assert set(atoms.arrays) == {"numbers", "positions", "tags"}


FORCES = np.arange(15.0).reshape(5, 3)
RENAMED = {"energy": ("info", "REF_energy", -1.0), "forces": ("arrays", "REF_forces", FORCES)}
RENAMED |= {"stress": ("info", "REF_stress", MATRIX)}
RESULTS = {"energy": -1.0, "forces": FORCES, "stress": VOIGT}


def half_renamed(renamed: set[str], results: dict) -> Atoms:
    atoms = molecule("CH4")
    for store, key, value in map(RENAMED.get, renamed):
        getattr(atoms, store)[key] = value
    if results:
        atoms.calc = SinglePointCalculator(atoms, **results)
    return atoms


@pytest.mark.parametrize("also", [set(), {"energy"}, {"forces"}])  # under both names, with the same value
@pytest.mark.parametrize(
    "renamed", [{"energy"}, {"forces"}, {"energy", "forces"}, {"forces", "stress"}, {"energy", "stress"}]
)
def test_labels_of_which_some_were_renamed_are_all_used(tmp_path, renamed, also):
    rest = {kind: value for kind, value in RESULTS.items() if kind not in renamed or kind in also}
    atoms = half_renamed(renamed, rest)
    write(tmp_path / "a.xyz", atoms)
    for frame in (atoms, *read_frames(tmp_path / "a.xyz")):
        labels = labels_of(frame)
        assert labels.energy == -1.0
        np.testing.assert_array_equal(labels.forces, FORCES)
        np.testing.assert_array_equal(labels.stress, VOIGT)


def test_results_of_a_potential_do_not_complete_labels():
    labels = labels_of(half_renamed({"forces"}, {"energy": -7.0, "forces": FORCES + 0.1}))
    assert labels.energy is None
    np.testing.assert_array_equal(labels.forces, FORCES)


def shared(make) -> list[Atoms]:
    calculator = make()
    frames = [Atoms("CH", [[0, 0, 0], [0, 0, 1 + 0.1 * number]], calculator=calculator) for number in range(3)]
    for atoms in frames:
        atoms.get_forces()
    return frames


@pytest.mark.parametrize("make", [EMT, lambda: LennardJones(epsilon=0.1)], ids=["EMT", "LennardJones"])
def test_results_of_another_structure_are_no_labels(make):
    *others, last = shared(make)
    assert labels_of(last).energy == last.get_potential_energy()
    for atoms in others:
        with pytest.raises(LabelError, match=r"^test frame 3 has a calculator with the results of another structure"):
            labels_of(atoms, which="test frame 3")
        with pytest.raises(LabelError, match=r"\(positions differ\): several frames share it, .* Give each frame"):
            labels_of(atoms, ("energy", "forces", "stress"))
        atoms.info["REF_energy"] = -1.0  # its own
        assert labels_of(atoms).energy == -1.0
        assert labels_of(atoms).forces is None


@pytest.mark.parametrize("change", [{"positions": [[0, 0, 0], [0, 0, 2]]}, {"pbc": True}, {"numbers": [1, 1]}])
def test_results_from_before_a_change_are_no_labels(tmp_path, change):
    atoms = Atoms("CH", [[0, 0, 0], [0, 0, 1]], cell=[9, 9, 9])
    atoms.calc = SinglePointCalculator(atoms, energy=-1.0)
    write(tmp_path / "a.xyz", atoms)
    for frame in (atoms, *read_frames(tmp_path / "a.xyz")):
        assert labels_of(frame).energy == -1.0
        ((name, value),) = change.items()
        setattr(frame, name, value)
        with pytest.raises(LabelError, match=rf"a frame .* another structure \({name} differ\)"):
            labels_of(frame)


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("REF_energy", "-1.5 eV", r"frame 4 has a reference energy of '-1\.5 eV'; one number in eV was expected"),
        ("REF_energy", np.array([1.0, 2.0]), r"frame 4 has a reference energy of '\[1\. 2\.\]'; one number in eV"),
        ("REF_energy", [], r"frame 4 has a reference energy of '\[\]'; one number in eV"),
        ("REF_energy", {"dft": 1}, r"frame 4 has a reference energy of .*; one number in eV"),
        ("REF_stress", "none", r"frame 4 has a reference stress of 'none'; numbers were expected"),
        ("REF_stress", [[1.0], [1.0, 2.0]], r"frame 4 has a reference stress of .*; numbers were expected"),
    ],
)
def test_labels_that_are_no_numbers_are_refused(key, value, message):
    atoms = Atoms("H", info={"REF_energy": 0.0} | {key: value})
    with pytest.raises(LabelError, match=message):
        labels_of(atoms, which="frame 4")


def test_forces_that_are_no_numbers_are_refused():
    atoms = Atoms("H")
    atoms.arrays["REF_forces"] = np.array(["x"])
    with pytest.raises(LabelError, match=r"^frame 4 has reference forces of \"\['x'\]\"; numbers were expected\.$"):
        labels_of(atoms, which="frame 4")


@pytest.mark.parametrize("energy", [-1.5, np.float32(-1.5), np.array(-1.5), np.array([-1.5]), [-1.5], "-1.5"])
def test_one_number_is_an_energy_in_whatever_form(energy):
    labels = labels_of(Atoms("H", info={"REF_energy": energy}))
    assert (labels.energy, type(labels.energy)) == (-1.5, float)
