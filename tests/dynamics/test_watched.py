"""A watched calculator where ASE shows no steps: vibrations, phonons, hopping, loops of one's own."""

import math

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.eos import calculate_eos
from ase.io import Trajectory
from ase.md.verlet import VelocityVerlet
from ase.optimize import BFGS, FIRE
from ase.optimize.basin import BasinHopping
from ase.optimize.minimahopping import MinimaHopping
from ase.phonons import Phonons
from ase.units import fs, kB
from ase.vibrations import Vibrations

from ase_uq.dynamics import Bonds, Finite, Halt, Patience, WatchedCalculator
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import read_frames
from ase_uq.thresholds.criteria import PerElement, Quantile
from tests.dynamics.builders import EXTRA, Remembering, Uncertain, crystal


def nitrogen():
    """Two atoms at the minimum of EMT, watched from there."""
    atoms = molecule("N2")
    atoms.calc = EMT()
    BFGS(atoms, logfile=None).run(fmax=1e-4)
    atoms.calc = Uncertain(atoms)
    return atoms


def watched(atoms, **options):
    atoms.calc = WatchedCalculator(atoms.calc, **options)
    return atoms.calc


def test_results_are_those_of_the_wrapped_calculator_bit_for_bit():
    bare, atoms = crystal(), crystal()
    calculator = watched(atoms, flag=0.1)
    for move in (0.0, 0.05, 0.3):
        for each in (bare, atoms):
            each.positions[0, 0] += move
        np.testing.assert_array_equal(atoms.get_forces(), bare.get_forces())
        np.testing.assert_array_equal(atoms.get_stress(), bare.get_stress())
        assert atoms.get_potential_energy() == bare.get_potential_energy()
        assert calculator.results.keys() == bare.calc.results.keys()
        for key in EXTRA:
            np.testing.assert_array_equal(calculator.get_property(key, atoms), bare.calc.results[key])
    assert calculator.calculator.n_calls == bare.calc.n_calls == len(calculator.records) == 3
    assert calculator.implemented_properties == bare.calc.implemented_properties
    assert calculator.implemented_properties is not calculator.calculator.implemented_properties


def test_each_calculation_is_judged_once_and_remembered_with_its_number():
    atoms = crystal([0.1, 0.4, 0.2])
    calculator = watched(atoms, flag=0.3, halt=0.5)
    for _ in range(3):
        atoms.get_forces()
        atoms.get_potential_energy()
        atoms.positions[0, 0] += 0.01
    assert calculator.records == [(0, 0.1, "ok"), (1, 0.4, "flag"), (2, 0.2, "ok")]
    assert max(calculator.records, key=lambda record: record.reading).step == 1
    assert (calculator.last.step, calculator.last.dynamics, calculator.last.time_fs) == (2, None, None)


def test_results_do_not_change_when_the_wrapped_calculator_goes_on():
    # EMT writes the forces of every calculation into one array.
    atoms = crystal()
    calculator = watched(atoms, flag=0.3)
    atoms.get_forces()
    kept = calculator.results["forces"]
    before = kept.copy()
    other = atoms.copy()
    other.positions[0] += 0.3
    calculator.calculator.get_forces(other)
    np.testing.assert_array_equal(kept, before)


@pytest.mark.parametrize("mode", ["raise", "stop"])
def test_a_halt_raises_out_of_whatever_asked_and_the_results_stand(mode, tmp_path):
    atoms = crystal([0.1, 0.8, 0.2])
    calculator = watched(atoms, halt=0.5, frames=tmp_path / "a.xyz", on_halt=Halt(mode=mode))
    atoms.get_forces()
    atoms.positions[0, 0] += 0.01
    with pytest.raises(UncertaintyHalt, match=r"halted at calculation 1: force uncertainty .*atom 1 \(Al.*kept") as e:
        atoms.get_forces()
    assert (e.value.step, e.value.reading, e.value.threshold) == (1, 0.8, 0.5)
    assert np.isfinite(atoms.get_forces()).all()
    assert calculator.calculator.n_calls == 2
    (frame,) = read_frames(tmp_path / "a.xyz")
    assert frame.info["flag_step"] == 1
    assert "flag_time_fs" not in frame.info
    np.testing.assert_allclose(frame.positions, atoms.positions, atol=1e-8)
    np.testing.assert_allclose(frame.calc.results["forces"], atoms.get_forces(), atol=1e-8)
    assert set(frame.calc.results) >= {*EXTRA, "energy", "stress"}
    atoms.positions[0, 0] += 0.01
    atoms.get_forces()
    assert [record.level for record in calculator.records] == ["ok", "halt", "ok"]


def test_a_calculation_without_uncertainty_is_passed_over_but_for_the_checks():
    atoms = crystal([0.8], skipped=(1,))
    calculator = watched(atoms, flag=0.5)
    for _ in range(3):
        atoms.get_forces()
        atoms.positions[0, 0] += 0.01
    assert [record.step for record in calculator.records] == [0, 2]

    atoms = crystal([0.1], skipped=(0, 1))
    calculator = watched(atoms, flag=0.5, checks=[Bonds()])
    atoms.get_forces()
    atoms.positions[0] += 1.0
    with pytest.raises(UncertaintyHalt, match=r"Bonds: .* are fused"):
        atoms.get_forces()
    assert math.isnan(calculator.records[0].reading)


def test_a_calculator_that_gives_only_what_it_is_asked_for_is_judged_once():
    class Sparing(Uncertain):
        def calculate(self, atoms=None, properties=("energy",), system_changes=("positions",)):
            before = {} if system_changes else dict(self.results)
            super().calculate(atoms, properties, system_changes)
            wanted = {*properties, *(["forces_uncertainty"] if "forces" in properties else [])}
            self.results = before | {key: self.results[key] for key in wanted}

    atoms = crystal()
    atoms.calc = Sparing(atoms, [0.1])
    calculator = watched(atoms, flag=0.5)
    atoms.get_potential_energy()
    assert calculator.records == []
    atoms.get_forces()
    atoms.get_stress()
    atoms.get_potential_energy()
    assert calculator.records == [(0, 0.1, "ok")]
    assert calculator.calculator.n_calls == 3


def test_an_input_that_only_the_wrapped_calculator_reads_makes_a_new_calculation():
    class Charged(Uncertain):
        def check_state(self, atoms, tol=1e-15):
            changes = super().check_state(atoms, tol)
            return changes or (["info"] if self.atoms.info.get("charge") != atoms.info.get("charge") else [])

    atoms = crystal()
    atoms.calc = Charged(atoms)
    calculator = watched(atoms, flag=1.0)
    for charge in (0, 0, 1):
        atoms.info["charge"] = charge
        atoms.get_forces()
    assert calculator.calculator.n_calls == len(calculator.records) == 2


def test_per_element_thresholds_follow_the_structure():
    atoms = crystal()
    calculator = watched(atoms, flag=PerElement(Quantile(0.5)))
    assert calculator.watches == {"flag": ()}
    atoms.get_forces()
    found = {watch.reduction.elements: watch.rule.threshold for watch in calculator.watches["flag"]}
    assert found == {("Al",): pytest.approx(0.25), ("Cu",): pytest.approx(0.5)}
    atoms.symbols[1] = "Cu"
    atoms.get_forces()
    assert [watch.reduction.elements for watch in calculator.watches["flag"]] == [("Cu",)]


# --- in ASE ----------------------------------------------------------------------------------------


def test_vibrations_show_the_worst_displacement(tmp_path):
    spectra, calls = [], []
    for is_watched in (False, True):
        atoms = nitrogen()
        bare = atoms.calc
        if is_watched:
            calculator = watched(atoms, flag=1e-9)
        vibrations = Vibrations(atoms, name=tmp_path / f"vib{is_watched}", delta=0.01)
        vibrations.run()
        spectra.append(vibrations.get_energies())
        calls.append(bare.n_calls)
    np.testing.assert_array_equal(*spectra)
    assert calls[0] == calls[1] == len(calculator.records) == 13
    assert calculator.records[0].reading == 0.0  # the equilibrium
    np.testing.assert_allclose([record.reading for record in calculator.records[1:]], 0.01)  # σ is the displacement


def test_vibrations_halt_at_a_displacement_and_go_on(tmp_path):
    atoms = nitrogen()
    start = atoms.positions.copy()
    atoms.calc.script = [0.1] * 5 + [0.8, 0.1]
    calculator = watched(atoms, halt=0.5)
    vibrations = Vibrations(atoms, name=tmp_path / "vib")
    with pytest.raises(UncertaintyHalt, match="halted at calculation 5"):
        vibrations.run()
    # What ASE leaves behind, as the docstring says.
    atoms.positions = start
    assert vibrations.clean(empty_files=True) == 1
    vibrations.run()
    assert len(vibrations.get_energies()) == 6
    assert calculator.calculator.n_calls == 13  # the halted displacement too was calculated once


def test_phonons_are_watched(tmp_path):
    frequencies, calls = [], []
    for is_watched in (False, True):
        atoms = bulk("Al")
        calculator = bare = Uncertain(atoms * (2, 2, 2))
        if is_watched:
            calculator = WatchedCalculator(bare, flag=1e-9, halt=0.06)
        phonons = Phonons(atoms, calculator, supercell=(2, 2, 2), delta=0.05, name=str(tmp_path / f"ph{is_watched}"))
        phonons.run()
        phonons.read(acoustic=True)
        frequencies.append(phonons.band_structure(np.array([[0.1, 0.2, 0.3]])))
        calls.append(bare.n_calls)
    np.testing.assert_array_equal(*frequencies)
    assert calls == [7, 7]
    np.testing.assert_allclose([record.reading for record in calculator.records], [0] + [0.05] * 6, atol=1e-12)


def test_an_equation_of_state_says_which_volumes_to_trust():
    atoms = bulk("Al", cubic=True)
    atoms.calc = Uncertain(atoms)
    calculator = watched(atoms, flag=0.05)
    calculate_eos(atoms, npoints=7, eps=0.06)
    levels = [record.level for record in calculator.records]
    assert len(levels) >= 7
    assert levels[0] == levels[6] == "flag"  # compressed and stretched most
    assert "ok" in levels[2:5]


def hopping(atoms):
    np.random.seed(3)  # noqa: NPY002  (basin hopping takes its moves from there)
    names = {"logfile": None, "optimizer_logfile": None, "trajectory": None, "local_minima_trajectory": None}
    return BasinHopping(atoms, temperature=300 * kB, dr=0.5, fmax=0.3, **names)


def cluster():
    atoms = Atoms("Cu4", [[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0], [0.4, 0.5, 2.9]])
    atoms.calc = Uncertain(atoms)
    return atoms


def test_every_step_of_basin_hopping_is_judged_and_it_goes_on():
    ends = []
    for is_watched in (False, True):
        atoms = cluster()
        bare = atoms.calc
        if is_watched:
            calculator = watched(atoms, flag=1e-9)
        search = hopping(atoms)
        n_first = bare.n_calls
        search.run(4)
        ends.append((bare.n_calls, search.Emin, atoms.positions))
    assert len(calculator.records) == ends[0][0]
    for bare, seen in zip(*ends, strict=True):
        np.testing.assert_array_equal(bare, seen)

    halt = max(record.reading for record in calculator.records)
    expected = next(record.step for record in calculator.records if record.reading == halt)
    assert expected > n_first
    atoms = cluster()
    calculator = watched(atoms, halt=halt)
    search = hopping(atoms)
    with pytest.raises(UncertaintyHalt, match=f"halted at calculation {expected}"):
        search.run(4)
    calculator.calculator.script = [0.1]
    search.run(2)
    assert calculator.last.step > expected


def test_minima_hopping_is_watched(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    atoms = cluster()
    calculator = watched(atoms, halt=0.8)
    with pytest.raises(UncertaintyHalt):
        MinimaHopping(atoms, T0=2000.0, fmax=0.3, mdmin=2, rng=np.random.RandomState(1))(totalsteps=20)
    assert len(calculator.records) == calculator.calculator.n_calls > 5
    assert calculator.last.level == "halt"


def test_it_is_a_drop_in_for_dynamics_and_trajectories(tmp_path):
    ends = []
    for is_watched in (False, True):
        atoms = crystal()
        bare = atoms.calc
        if is_watched:
            watched(atoms, flag=0.5)
        with VelocityVerlet(atoms, fs, trajectory=str(tmp_path / "run.traj")) as dynamics:
            dynamics.run(5)
        with FIRE(atoms, logfile=None) as relaxation:
            relaxation.run(fmax=0.0, steps=5)
        with Trajectory(tmp_path / "run.traj") as written:
            ends.append((bare.n_calls, atoms.positions, written[-1].get_forces(), written[-1].get_stress()))
    for bare, seen in zip(*ends, strict=True):
        np.testing.assert_array_equal(bare, seen)


def test_a_calculator_that_remembers_is_not_called_again_for_a_structure_seen_before():
    atoms = crystal()
    atoms.calc = Remembering(atoms)
    calculator = watched(atoms, flag=1.0)
    for x in (0.0, 0.1, 0.0):
        atoms.positions[0, 0] = x
        atoms.get_forces()
    assert calculator.calculator.n_calls == 2


# --- mistakes --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"nothing to watch for"),
        ({"halt": 0}, ValueError, r"positive number in eV/Å, not 0"),
        ({"halt": math.nan}, ValueError, r"positive number in eV/Å, not nan"),
        ({"halt": 0.3, "flag": 0.5}, ValueError, r"Give a flag below"),
        ({"halt": Patience(0.5, fs=10)}, ValueError, r"for 10 fs needs simulated time, .* a WatchedCalculator"),
        ({"halt": 0.5, "on_flag": Halt()}, ValueError, r"on_flag is given but flag is not"),
        ({"flag": 0.5, "on_halt": Halt()}, ValueError, r"on_halt is given but halt is not"),
        ({"halt": 0.5, "checks": ["bonds"]}, TypeError, r"checks are objects such as Finite\(\).*not 'bonds'"),
        ({"halt": 0.5, "frames": "/no/such/folder/a.xyz"}, ValueError, r"cannot be written"),
        ({"flag": Quantile(0.999)}, ValueError, r"needs at least 1000 calibration frames"),
    ],
)
def test_mistakes_are_told_when_the_calculator_is_made(options, error, message):
    with pytest.raises(error, match=message):
        WatchedCalculator(Uncertain(crystal()), **options)


def test_a_calculator_without_uncertainties_is_refused_where_a_rule_needs_them():
    with pytest.raises(ValueError, match=r"LennardJones gives no forces_uncertainty.*Wrap it"):
        WatchedCalculator(LennardJones(), halt=0.5)
    with pytest.raises(ValueError, match=r"the structure has no calculator"):
        WatchedCalculator(None, halt=0.5)
    atoms = crystal()
    atoms.calc = WatchedCalculator(EMT(), checks=Finite())
    atoms.get_forces()
    assert atoms.calc.last.level == "ok"


def test_a_structure_without_an_atom_to_look_at_is_refused():
    atoms = crystal()
    watched(atoms, halt=0.5, elements="Fe")
    with pytest.raises(ValueError, match=r"no atom of \w+ is looked at with elements=\['Fe'\]"):
        atoms.get_forces()
