"""Pairs that are closer than in the training frames: named in the message of a halt."""

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk
from ase.calculators.calculator import Calculator, all_changes
from ase.optimize import BFGS

from ase_uq import UncertaintyHalt, UncertaintyMonitor
from ase_uq.dynamics.structures import too_close


def test_the_closest_pair_is_named_with_what_training_had():
    atoms = Atoms("OHH", [(0, 0, 0), (0.61, 0, 0), (0, 0.9, 0)])
    assert too_close(atoms, np.array([0.7, 0.7, 0.95])) == "H-O 0.61 A, training never below 0.87"


def test_across_a_boundary():
    atoms = Atoms("OH", [(0.1, 0, 0), (4.8, 0, 0)], cell=[5, 5, 5], pbc=True)
    assert too_close(atoms, np.array([0.5, 0.5])) == "H-O 0.30 A, training never below 0.60"


def test_an_image_of_the_atom_itself():
    text = too_close(bulk("Si", "sc", a=1.0), np.array([0.5]))
    assert text == "Si is at 0.50 of the shortest distance of training from its own image"


@pytest.mark.parametrize("contact", [None, [1.0, 1.2], [np.inf, np.inf], [np.nan, np.nan]])
def test_nothing_is_said_of_pairs_that_training_had(contact):
    assert too_close(Atoms("OH", [(0, 0, 0), (1, 0, 0)]), None if contact is None else np.array(contact)) == ""


class Close(Calculator):
    """An uncertainty above any threshold, and a pair that is too close."""

    implemented_properties = ["energy", "forces", "forces_uncertainty", "contact"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=all_changes):
        super().calculate(atoms, properties, system_changes)
        assert self.atoms is not None
        shape = (len(self.atoms), 3)
        contact = np.full(shape[0], 0.8)
        self.results = {"energy": 0.0, "forces": np.zeros(shape), "forces_uncertainty": np.ones(shape)}
        self.results["contact"] = contact


def test_a_halt_says_so():
    atoms = Atoms("OH", [(0, 0, 0), (0.8, 0, 0)])
    atoms.calc = Close()
    run = BFGS(atoms, logfile=None)
    run.attach(UncertaintyMonitor(run, halt=0.5))
    with pytest.raises(UncertaintyHalt, match=r"worst atom 0 \(O, .*\); H-O 0\.80 A, training never below 1\.00"):
        run.run(fmax=0.01)
