"""Reference values are found where they are, and left behind where they would be wrong."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
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
    with pytest.raises(LabelError, match=r"stress has shape \(4,\); 6 \(Voigt\) or 9 numbers"):
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
