"""Relaxations of EMT, whose uncertainties are made up: the minima are ASE's, what is said of them is ours."""

import math
from dataclasses import asdict, dataclass, replace

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, fcc111, molecule
from ase.calculators.emt import EMT
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.io import read
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.sciopt import SciPyFminCG

from ase_uq.dynamics import Patience, Threshold
from ase_uq.dynamics.checks import Check, Finite
from ase_uq.dynamics.relaxation import Relaxation, relax
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import read_frames
from tests.dynamics import builders

EXTRA = ["energy_uncertainty", "forces_uncertainty", "stress_uncertainty", "gamma"]


class Uncertain(EMT):
    """EMT with uncertainties.

    Args:
        script: Largest ε of each call, of atom 1 along z, in eV/Å; the last goes on for ever.
        energy: Standard deviation of the energy of each call, eV; the last goes on for ever.
        gamma: Of every atom.
        lazy: Uncertainties only where one is asked for, and at the first call.
    """

    implemented_properties = [*EMT.implemented_properties, *EXTRA]  # noqa: RUF012

    def __init__(self, script=(0.01,), energy=(0.02,), gamma=0.5, lazy=False):
        super().__init__()
        self.script, self.energy, self.gamma, self.lazy = script, energy, gamma, lazy
        self.n_calls = 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        super().calculate(atoms, properties, list(system_changes))
        sigma = np.zeros((len(atoms), 3))
        sigma[1, 2] = self.script[min(self.n_calls, len(self.script) - 1)]
        if not self.lazy or self.n_calls == 0 or set(properties) & set(EXTRA):
            self.results |= {
                "energy_uncertainty": self.energy[min(self.n_calls, len(self.energy) - 1)],
                "forces_uncertainty": sigma,
                "stress_uncertainty": np.array([0.1, 0.2, 0.3, 0.0, 0.0, 0.1]) * units.GPa,
                "gamma": np.full(len(atoms), self.gamma),
            }
        self.n_calls += 1


def cluster(**uncertainties):
    """Eight atoms of copper and one of aluminium, shaken."""
    atoms = Atoms("CuAlCu7", bulk("Cu", cubic=True).repeat((2, 2, 1)).positions[:9])
    atoms.rattle(0.15, seed=2)
    atoms.calc = Uncertain(**uncertainties)
    return atoms


def crystal(**uncertainties):
    atoms = bulk("Cu", a=3.7, cubic=True)
    atoms.rattle(0.1, seed=2)
    atoms.calc = Uncertain(**uncertainties)
    return atoms


def largest(forces):
    return np.linalg.norm(forces, axis=1).max()


# --- how it ends ------------------------------------------------------------------------------------


def test_a_relaxation_ends_where_that_of_ase_does():
    atoms, bare = cluster(), cluster()
    bare.calc = EMT()
    start = bare.get_potential_energy()
    optimizer = BFGS(bare, logfile=None)
    assert optimizer.run(0.02, 300)
    found = relax(atoms, fmax=0.02, steps=300, halt=1.0, flag=0.5)
    np.testing.assert_array_equal(atoms.positions, bare.positions)
    assert (found.status, found.converged, found.reason) == ("converged", True, "")
    assert found.n_steps == optimizer.nsteps > 5
    assert found.largest_force == pytest.approx(largest(bare.get_forces()))
    assert found.largest_force <= found.fmax == 0.02
    assert found.energy == pytest.approx(bare.get_potential_energy())
    assert found.start_energy == pytest.approx(start)
    assert found.gain == pytest.approx(start - bare.get_potential_energy())
    assert found.gain > 0


@pytest.mark.parametrize("make", [BFGS, LBFGS, FIRE, SciPyFminCG])
def test_it_costs_no_call_beyond_those_of_the_optimiser(make, tmp_path):
    bare, atoms = cluster(), cluster()
    make(bare, logfile=None).run(0.02, 30)
    options = {"frames": tmp_path / "flagged.xyz", "log": tmp_path / "log.csv", "trajectory": tmp_path / "run.xyz"}
    relax(atoms, fmax=0.02, steps=30, optimizer=make, flag=1e-6, halt=1e6, **options)
    assert atoms.calc.n_calls == bare.calc.n_calls
    np.testing.assert_array_equal(atoms.positions, bare.positions)


@pytest.mark.parametrize("optimizer", ["bfgs", "lbfgs", "FIRE", LBFGS])
def test_every_optimiser_finds_the_minimum(optimizer):
    atoms = crystal()
    found = relax(atoms, fmax=0.001, optimizer=optimizer)
    assert found.converged
    assert found.energy == pytest.approx(4 * bulk_energy(3.7), abs=1e-5)


def bulk_energy(a):
    return bulk_with_emt(a).get_potential_energy()


def bulk_with_emt(a):
    atoms = bulk("Cu", a=a)
    atoms.calc = EMT()
    return atoms


def test_what_is_uncertain_is_stopped_and_goes_on_when_called_again():
    atoms = cluster(script=[0.1] * 4 + [0.8])
    start = atoms.positions.copy()
    found = relax(atoms, fmax=0.02, halt=0.5)
    assert (found.status, found.converged, found.is_located, found.n_steps) == ("uncertain", False, False, 4)
    assert found.reason.startswith("force uncertainty (max) 0.8 eV/A reached halt at 0.5 eV/A")
    assert "worst atom 1 (Al" in found.reason
    assert found.forces_uncertainty == pytest.approx(0.8)
    assert found.largest_force == pytest.approx(largest(atoms.get_forces()))
    assert found.largest_force > 0.02
    stopped = atoms.positions.copy()
    assert np.abs(stopped - start).max() > 0.01
    # The first structure is judged too: nothing moves while the cause is there.
    again = relax(atoms, fmax=0.02, halt=0.5)
    assert (again.status, again.n_steps) == ("uncertain", 0)
    np.testing.assert_array_equal(atoms.positions, stopped)
    onwards = relax(atoms, fmax=0.02, halt=1.0)
    assert onwards.converged
    assert onwards.start_energy == pytest.approx(found.energy)


def test_uncertain_goes_before_converged():
    atoms = crystal(script=[0.8])
    atoms.positions = bulk("Cu", a=3.7, cubic=True).positions
    assert relax(atoms, halt=0.5).status == "uncertain"
    assert relax(atoms).status == "converged"


def test_a_relaxation_out_of_steps_is_unfinished_and_can_go_on():
    atoms = cluster()
    found = relax(atoms, fmax=1e-3, steps=3)
    assert (found.status, found.n_steps, found.reason) == ("unfinished", 3, "")
    assert found.largest_force > 1e-3
    assert str(found).startswith("not converged in 3 steps: largest force ")
    assert relax(atoms, fmax=1e-3).converged


@dataclass(frozen=True)
class Third(Check):
    """Finds something in the third frame."""

    def inspect(self, state, snapshot):
        count = (state or 0) + 1
        return count, "it is the third" if count == 3 else ""


def test_checks_stop_it_with_or_without_a_threshold():
    for levels in ({}, {"halt": 1.0}):
        found = relax(cluster(), checks=[Third()], **levels)
        assert (found.status, found.n_steps) == ("uncertain", 2)
        assert "it is the third" in found.reason
        assert str(found).startswith("stopped after 2 steps, since ")


def test_forces_that_are_not_finite_stop_it():
    atoms = cluster()
    calculate = atoms.calc.calculate

    def broken(*arguments):
        calculate(*arguments)
        if atoms.calc.n_calls > 2:
            atoms.calc.results["forces"] = np.full((9, 3), np.nan)

    atoms.calc.calculate = broken
    found = relax(atoms, checks=[Finite()])
    assert (found.status, found.n_steps) == ("uncertain", 2)
    assert math.isnan(found.largest_force)


# --- how far to trust it ------------------------------------------------------------------------------


def test_a_minimum_is_located_only_to_the_uncertainty_of_its_forces():
    known, unknown = relax(cluster(script=[0.03])), relax(cluster(script=[0.21]))
    assert known.converged
    assert unknown.converged
    assert (known.is_located, unknown.is_located) == (True, False)
    assert (unknown.forces_uncertainty, unknown.atom, unknown.symbol) == (pytest.approx(0.21), 1, "Al")
    assert (
        "forces are uncertain by up to 0.03 eV/Å (atom 1, Al): the minimum is located as well as was asked for"
        in str(known)
    )
    assert (
        "uncertain by up to 0.21 eV/Å (atom 1, Al), more than 0.05: the minimum is located only to that accuracy"
        in str(unknown)
    )


def test_the_uncertainty_is_that_of_the_last_structure():
    n_calls = relax(cluster(), fmax=0.02).n_steps + 1
    assert relax(cluster(script=[0.9] * (n_calls - 1) + [0.01]), fmax=0.02).forces_uncertainty == pytest.approx(0.01)


def test_forces_on_fixed_atoms_decide_nothing_unless_all_are_fixed():
    atoms = cluster(script=[0.9])
    atoms.set_constraint(FixAtoms([1]))
    held = atoms.positions[1].copy()
    found = relax(atoms)
    assert found.is_located
    assert found.forces_uncertainty == 0
    assert found.atom != 1
    np.testing.assert_array_equal(atoms.positions[1], held)
    assert found.largest_force == pytest.approx(largest(atoms.get_forces()))  # of the free ones
    atoms.set_constraint(FixAtoms(range(9)))
    found = relax(atoms)
    assert (found.n_steps, found.atom, found.forces_uncertainty) == (0, 1, pytest.approx(0.9))


def test_the_energy_gained_is_set_against_its_uncertainty():
    sure = relax(cluster(energy=[0.03, 0.04]))
    assert (sure.start_energy_uncertainty, sure.energy_uncertainty) == (0.03, 0.04)
    assert sure.gain_uncertainty == pytest.approx(0.05)
    energy, gain = f"energy {sure.energy:.6f} eV, uncertain by 0.04 eV", f"{sure.gain:.3g} eV below the start"
    assert f"{energy}; {gain}, uncertain by at most 0.05 eV" in str(sure)
    unsure = relax(cluster(energy=[30.0, 40.0]))
    assert unsure.gain == pytest.approx(sure.gain)
    assert "below the start, no more than the uncertainty of that difference, at most 50 eV" in str(unsure)
    assert "the start" not in str(replace(sure, n_steps=0))
    assert "0.3 eV above the start" in str(replace(sure, energy=sure.start_energy + 0.3))


def test_without_uncertainties_of_energy_stress_and_gamma_nothing_is_said_of_them():
    atoms = crystal()
    atoms.calc.implemented_properties = [*EMT.implemented_properties, "forces_uncertainty"]
    calculate = atoms.calc.calculate

    def only_forces(*arguments):
        calculate(*arguments)
        for key in ("energy_uncertainty", "stress_uncertainty", "gamma"):
            del atoms.calc.results[key]

    atoms.calc.calculate = only_forces
    found = relax(atoms, cell=True)
    assert found.converged
    assert (found.energy_uncertainty, found.gain_uncertainty) == (None, None)
    assert (found.stress_uncertainty, found.gamma) == (None, None)
    assert f"energy {found.energy:.6f} eV; {found.gain:.3g} eV below the start" in str(found)
    assert not any(word in str(found) for word in ("GPa", "gamma", "None"))


@pytest.mark.parametrize(
    ("gamma", "text"),
    [
        (0.5, None),
        (3.25, "gamma is up to 3.25: beyond the calibration data (1), uncertainties are a hint only"),
        (math.inf, "an element here was never seen by the uncertainty model: no uncertainty can be believed"),
    ],
)
def test_beyond_the_calibration_data_it_says_so(gamma, text):
    found = relax(cluster(gamma=gamma))
    assert found.converged
    assert found.gamma == gamma
    assert (text or "gamma") in str(found) if text else "gamma" not in str(found)
    # With an unseen element a small uncertainty is worth nothing.
    assert found.is_located == (gamma < math.inf)
    assert ("as well as was asked for" in str(found)) == (gamma < math.inf)


def test_a_cell_is_relaxed_too_and_its_stress_is_as_uncertain_as_said():
    atoms, bare = crystal(), crystal()
    bare.calc = EMT()
    BFGS(FrechetCellFilter(bare), logfile=None).run(0.01, 200)
    found = relax(atoms, cell=True, fmax=0.01, halt=1.0)
    assert found.converged
    np.testing.assert_allclose(atoms.cell.array, bare.cell.array)
    assert abs(atoms.get_volume() - 3.7**3) > 1
    assert found.stress_uncertainty == pytest.approx(0.3 * units.GPa)
    assert "the stress on the cell is uncertain by up to 0.3 GPa" in str(found)
    assert relax(atoms).stress_uncertainty is None


def test_skipped_uncertainties_are_asked_for_at_the_end():
    atoms = cluster(script=[0.9, 0.03], lazy=True)
    found = relax(atoms)
    assert found.converged
    assert found.forces_uncertainty == pytest.approx(0.03)


def test_what_it_found_is_numbers_and_words():
    found = relax(cluster())
    assert isinstance(found, Relaxation)
    assert all(isinstance(value, str | int | float | None) for value in asdict(found).values())
    assert str(found) == found.describe()


# --- what it leaves ------------------------------------------------------------------------------------


def test_the_trajectory_has_every_step_with_its_uncertainties_and_without_labels_of_the_start(tmp_path):
    atoms = cluster(script=[0.1] * 4 + [0.8])
    atoms.info["REF_energy"] = 1.0
    atoms.set_array("REF_forces", np.ones((9, 3)))
    relax(atoms, halt=0.5, trajectory=tmp_path / "run.xyz")
    frames = read_frames(tmp_path / "run.xyz")
    assert [frame.info["step"] for frame in frames] == [0, 1, 2, 3, 4]
    assert frames[-1].calc.results["forces_uncertainty"][1, 2] == pytest.approx(0.8)
    np.testing.assert_allclose(frames[-1].positions, atoms.positions, atol=1e-7)
    raw = read(tmp_path / "run.xyz", "-1")
    assert "REF_energy" not in raw.info
    assert "REF_forces" not in raw.arrays
    assert atoms.info["REF_energy"] == 1.0  # of the user's own structure nothing is taken


def test_options_of_the_monitor_reach_it(tmp_path):
    script = [0.1, 0.1, 0.4, 0.1, 0.8]
    options = {"frames": tmp_path / "flagged.xyz", "log": tmp_path / "log.csv", "before": 1}
    assert relax(cluster(script=script), flag=0.3, halt=0.7, **options).n_steps == 4
    levels = [frame.info["flag_level"] for frame in read(tmp_path / "flagged.xyz", ":")]
    assert levels == ["before", "flag", "before", "halt"]
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 6
    # Atom 1, the only uncertain one, is aluminium.
    for options in ({"elements": ["Cu"]}, {"indices": [0, 2]}):
        assert relax(cluster(script=script), halt=0.7, **options).converged
    assert relax(cluster(script=[0.9]), halt=0.7, reduce="mean").converged
    assert relax(cluster(script=[0.9]), halt=Threshold(0.7)).status == "uncertain"


def test_the_progress_bar_shows_force_and_uncertainty(terminal, capsys):
    relax(cluster(script=[0.123]), steps=3, progress=True)
    shown = capsys.readouterr().err
    assert "relax: 100%" in shown
    assert "± 0.123 eV/Å" in shown
    relax(cluster(), steps=3)
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("levels", [{}, {"halt": 1.0}])
def test_a_halt_by_a_watch_of_the_users_own_is_theirs(levels):
    atoms = cluster()
    calculate = atoms.calc.calculate

    def watched(*arguments):
        calculate(*arguments)
        if atoms.calc.n_calls > 2:
            raise UncertaintyHalt("from elsewhere", step=2, reading=1.0, threshold=1.0)

    atoms.calc.calculate = watched
    with pytest.raises(UncertaintyHalt, match="from elsewhere"):
        relax(atoms, **levels)


# --- what is refused ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "text"),
    [
        ({"fmax": 0}, ValueError, "fmax of a relaxation is a positive number, not 0"),
        ({"fmax": math.nan}, ValueError, "fmax of a relaxation is a positive number, not nan"),
        ({"steps": 0}, ValueError, "steps of a relaxation is a positive number, not 0"),
        ({"optimizer": "newton"}, ValueError, "there is no optimiser 'newton'; there are bfgs, lbfgs, fire. Give one"),
        (
            {"optimizer": EMT},
            TypeError,
            "an optimiser is one of bfgs, lbfgs, fire or an optimiser class of ASE, not <c",
        ),
        ({"optimizer": 3}, TypeError, "an optimiser is one of bfgs, lbfgs, fire or an optimiser class of ASE, not 3"),
        ({"cell": True}, ValueError, "the structure is not periodic along a and b and c. Leave cell out"),
        ({"halt": Patience(0.5, fs=10)}, ValueError, "an optimiser has none"),
        ({"halt": 0.2, "flag": 0.3}, ValueError, "Give a flag below the halt"),
        ({"halt": -1}, ValueError, "a threshold is a positive number"),
        ({"before": 3}, ValueError, "nothing to watch for"),
        ({"frames": "flagged.xyz"}, ValueError, "nothing to watch for"),
    ],
)
def test_what_is_wrong_is_said_before_anything_moves(options, error, text):
    atoms = cluster()
    before = atoms.positions.copy()
    with pytest.raises(error) as caught:
        relax(atoms, **options)
    assert text in str(caught.value)
    np.testing.assert_array_equal(atoms.positions, before)


def test_a_slab_has_no_cell_to_relax():
    atoms = fcc111("Cu", (1, 1, 3), vacuum=5)
    atoms.calc = Uncertain()
    with pytest.raises(
        ValueError, match=r"cell=True relaxes the whole cell, but the structure is not periodic along c. Leave"
    ):
        relax(atoms, cell=True)


def test_a_cell_needs_a_stress():
    atoms = crystal()
    atoms.calc.implemented_properties = ["energy", "forces", *EXTRA]
    with pytest.raises(ValueError, match=r"Uncertain gives no stress, which cell=True needs. Leave cell out"):
        relax(atoms, cell=True)


def test_a_calculator_with_uncertainties_is_needed():
    atoms = molecule("H2O")
    with pytest.raises(ValueError, match="has no calculator"):
        relax(atoms)
    atoms.calc = EMT()
    with pytest.raises(ValueError, match="EMT gives no forces_uncertainty"):
        relax(atoms)


class Skipping(builders.Uncertain):
    """One that gives uncertainties at every third step, and where they are asked for."""

    every = 3
    n_structures = 0

    def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
        super().calculate(atoms, properties, system_changes)
        self.n_structures += bool(system_changes)
        if (self.n_structures - 1) % self.every and not set(properties) & set(builders.EXTRA):
            for key in builders.EXTRA:
                del self.results[key]


def test_the_last_structure_is_judged_also_where_its_uncertainty_was_skipped():
    atoms = bulk("Cu", cubic=True)
    atoms.rattle(0.1, seed=1)
    atoms.calc = Skipping(atoms)
    found = relax(atoms, fmax=2.5, halt=0.02)
    assert found.n_steps == 1
    assert found.forces_uncertainty > 0.02
    assert found.status == "uncertain"
    assert "reached halt at 0.02 eV/A" in found.reason
