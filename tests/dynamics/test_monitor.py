"""The monitor in real runs of ASE, on a potential whose uncertainty grows with the distance from where it began."""

import json
import math
import warnings
from types import SimpleNamespace
from typing import ClassVar

import numpy as np
import pytest
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms
from ase.filters import FrechetCellFilter
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB
from ase.optimize import BFGS, FIRE
from ase.optimize.sciopt import SciPyFminBFGS, SciPyFminCG
from ase.units import fs

from ase_uq.dynamics import (
    AllOf,
    AnyOf,
    Bonds,
    Call,
    Check,
    Cusum,
    EnergySpike,
    Finite,
    Flag,
    Halt,
    Log,
    MaxTemperature,
    Patience,
    Threshold,
    UncertaintyMonitor,
)
from ase_uq.errors import UncertaintyHalt, UQWarning
from ase_uq.io.frames import read_frames
from ase_uq.thresholds.criteria import FalseAlarms, PerElement, Quantile
from ase_uq.thresholds.data import ReferenceRuns
from tests.dynamics.builders import EXTRA, Uncertain, crystal


def verlet(atoms, dt=2.0):
    return VelocityVerlet(atoms, dt * fs)


def langevin(atoms):
    return Langevin(atoms, 2 * fs, temperature_K=600, friction=0.01 / fs, fixcm=False, rng=np.random.default_rng(1))


def rattled(atoms):
    atoms.rattle(0.3, seed=1)
    return atoms


RUNS = {
    "VelocityVerlet": verlet,
    "Langevin": langevin,
    "BFGS": lambda atoms: BFGS(rattled(atoms), logfile=None),
    "FIRE": lambda atoms: FIRE(rattled(atoms), logfile=None),
    "BFGS on a cell": lambda atoms: BFGS(FrechetCellFilter(rattled(atoms)), logfile=None),
}
SCIPY = {
    "SciPyFminCG": lambda atoms: SciPyFminCG(rattled(atoms), logfile=None),
    "SciPyFminBFGS": lambda atoms: SciPyFminBFGS(rattled(atoms), logfile=None),
}


def run(dynamics, steps):
    # A force limit of zero is never reached, so optimisers make all their steps too.
    return dynamics.run(steps) if isinstance(dynamics, VelocityVerlet | Langevin) else dynamics.run(0.0, steps)


def attached(dynamics, interval=1, **options):
    monitor = UncertaintyMonitor(dynamics, **options)
    dynamics.attach(monitor, interval=interval)
    return monitor


# --- halting and resuming -------------------------------------------------------------------------


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_halt_raises_at_the_right_step_and_the_run_goes_on_from_it(make, tmp_path):
    # The optimisers and MD of ASE all make one new calculation a step here, so call 4 is step 4.
    dynamics = make(crystal([0.1] * 4 + [0.8, 0.1]))
    monitor = attached(dynamics, halt=0.5, frames=tmp_path / "a.xyz")
    with pytest.raises(UncertaintyHalt, match=r"halted at step 4.*reached halt at 0.5 eV/A.*atom 1 \(Al") as caught:
        run(dynamics, 20)
    assert (dynamics.nsteps, caught.value.step) == (4, 4)
    assert (caught.value.reading, caught.value.threshold) == (0.8, 0.5)
    assert len(read_frames(tmp_path / "a.xyz")) == 1
    run(dynamics, 5)
    assert dynamics.nsteps == 9
    assert (monitor.n_flagged, monitor.n_halted) == (0, 1)
    assert len(read_frames(tmp_path / "a.xyz")) == 1


@pytest.mark.parametrize("make", RUNS.values(), ids=RUNS)
def test_halt_can_end_the_run_quietly(make):
    dynamics = make(crystal([0.1] * 4 + [0.8, 0.1]))
    attached(dynamics, halt=0.5, on_halt=Halt(mode="stop"))
    run(dynamics, 20)
    assert dynamics.nsteps == 4
    run(dynamics, 5)
    assert dynamics.nsteps == 9


@pytest.mark.parametrize("mode", ["raise", "stop"])
@pytest.mark.parametrize("make", SCIPY.values(), ids=SCIPY)
def test_halt_works_in_optimisers_whose_loop_is_scipys(make, mode):
    atoms = crystal()
    dynamics = make(atoms)
    atoms.calc.origin = atoms.positions.copy()  # so that step 0 reads zero, and step 1, after a line search, does not
    monitor = attached(dynamics, halt=1e-9, on_halt=Halt(mode=mode))
    if mode == "raise":
        with pytest.raises(UncertaintyHalt):
            run(dynamics, 20)
    else:
        assert not run(dynamics, 20)
    assert dynamics.nsteps == monitor.last.step == 1
    dynamics.observers.clear()
    run(dynamics, 2)
    assert dynamics.nsteps == 3


@pytest.mark.parametrize("mode", ["raise", "stop"])
def test_a_run_halted_at_its_first_step_is_not_stuck_there(mode, tmp_path):
    dynamics = verlet(crystal([0.8, 0.1]))
    monitor = attached(dynamics, halt=0.5, frames=tmp_path / "a.xyz", on_halt=Halt(mode=mode))
    if mode == "raise":
        with pytest.raises(UncertaintyHalt):
            dynamics.run(5)
    else:
        dynamics.run(5)
    assert dynamics.nsteps == 0
    dynamics.run(5)  # ASE shows step 0 to the observers again
    assert dynamics.nsteps == 5
    assert monitor.n_halted == 1
    assert len(read_frames(tmp_path / "a.xyz")) == 1


def test_a_resumed_run_halts_again_while_the_cause_is_there():
    dynamics = verlet(crystal([0.1, 0.8]))
    attached(dynamics, halt=0.5)
    for step in (1, 2, 3):
        with pytest.raises(UncertaintyHalt):
            dynamics.run(10)
        assert dynamics.nsteps == step


def test_a_first_structure_that_was_changed_is_judged_again():
    atoms = crystal([0.8])
    dynamics = verlet(atoms)
    attached(dynamics, halt=0.5)
    for _ in range(2):
        with pytest.raises(UncertaintyHalt):
            dynamics.run(5)
        atoms.positions[0] += 0.01
    assert dynamics.nsteps == 0


def test_a_new_calculator_is_picked_up_with_its_own_thresholds():
    atoms = crystal([0.1, 0.8])
    dynamics = verlet(atoms)
    monitor = attached(dynamics, halt=Quantile(0.7))
    assert monitor.halt.threshold == pytest.approx(0.7)
    with pytest.raises(UncertaintyHalt):
        dynamics.run(5)
    atoms.calc = Uncertain(atoms, [0.8], readings=np.linspace(0, 2, 101))
    dynamics.run(5)
    assert dynamics.nsteps == 6
    assert monitor.halt.threshold == pytest.approx(1.4)
    atoms.calc = EMT()
    with pytest.raises(ValueError, match=r"EMT gives no forces_uncertainty"):
        dynamics.run(5)


# --- what it costs, and that it changes nothing ----------------------------------------------------


@pytest.mark.parametrize("make", (RUNS | SCIPY).values(), ids=RUNS | SCIPY)
def test_watching_costs_no_call_and_moves_no_atom(make, tmp_path):
    ends = []
    for watched in (False, True):
        atoms = crystal()
        dynamics = make(atoms)
        if watched:
            monitor = attached(dynamics, flag=1e-6, halt=1e6, frames=tmp_path / "a.xyz", log=tmp_path / "log.csv")
        run(dynamics, 6)
        ends.append((atoms.calc.n_calls, atoms.positions, atoms.cell.array, atoms.get_velocities()))
    assert monitor.n_flagged > 0
    for bare, watched in zip(*ends, strict=True):
        np.testing.assert_array_equal(bare, watched)


def test_constraints_are_no_obstacle():
    atoms = crystal()
    atoms.set_constraint(FixAtoms([0]))
    dynamics = BFGS(rattled(atoms), logfile=None)
    monitor = attached(dynamics, flag=1e-6, indices=[0])
    run(dynamics, 3)
    assert monitor.n_flagged == 0  # the fixed atom has not moved
    assert monitor.last.step == 3


def test_a_step_without_uncertainty_is_passed_over_without_a_call():
    atoms = crystal([0.8], skipped=(1, 2, 4))
    dynamics = verlet(atoms)
    steps = []
    attached(dynamics, flag=0.5, on_flag=lambda event: steps.append(event.step))
    dynamics.run(5)
    assert steps == [0, 3, 5]
    assert atoms.calc.n_calls == 6


# --- readings --------------------------------------------------------------------------------------


def test_an_element_never_seen_reads_infinity():
    atoms = crystal()
    atoms.calc.gamma = np.array([1.0, math.inf, 1.0, 1.0])
    dynamics = verlet(atoms)
    attached(dynamics, halt=1e6)
    with pytest.raises(UncertaintyHalt, match=r"worst atom 1 \(Al, inf eV/A\)") as caught:
        dynamics.run(5)
    assert caught.value.reading == math.inf


@pytest.mark.parametrize("gamma", [1.0, math.inf])
def test_nan_halts_even_where_patience_would_wait(gamma):
    dynamics = verlet(crystal([0.1, 0.1, math.nan]))
    # An unseen element reads infinity, which has to wait; it must not hide that the model has broken.
    dynamics.attach(lambda: dynamics.nsteps == 2 and dynamics.atoms.calc.gamma.fill(gamma))
    attached(dynamics, halt=0.5, patience=1000)
    with pytest.raises(UncertaintyHalt, match=r"step 2 .*uncertainty \(max\) nan") as caught:
        dynamics.run(5)
    assert math.isnan(caught.value.reading)


def test_broken_positions_halt_without_a_call():
    atoms = crystal()
    monitor = UncertaintyMonitor(verlet(atoms), halt=0.5)
    atoms.positions[2] = math.nan
    with pytest.raises(UncertaintyHalt):
        monitor()
    assert atoms.calc.n_calls == 0


@pytest.mark.parametrize(
    ("options", "reading", "worst"),
    [
        ({}, 0.8, "worst atom 1 (Al, 0.8 eV/A)"),
        ({"reduce": "mean"}, 0.2, "worst atom 1 (Al"),
        ({"reduce": "top3"}, 0.8 / 3, "worst atom 1 (Al"),
        ({"reduce": 0.5}, 0.0, None),
        ({"elements": ["Al"]}, 0.8, "worst atom 1 (Al"),
        ({"elements": "Al"}, 0.8, "worst atom 1 (Al"),
        ({"elements": ("Cu",)}, 0.0, None),
        ({"indices": (1, 2), "reduce": "mean"}, 0.4, "worst atom 1 (Al"),
        ({"indices": np.array([-3])}, 0.8, "worst atom 1 (Al"),
        ({"indices": (0, 1), "elements": ["Cu"]}, 0.0, None),
    ],
)
def test_the_reading_is_reduced_over_the_chosen_atoms(options, reading, worst):
    dynamics = verlet(crystal([0.8]))
    monitor = attached(dynamics, flag=0.1, **options)
    dynamics.run(0)
    assert monitor.last.reading == pytest.approx(reading)
    assert (worst is None) == (monitor.last.level == "ok")
    assert (worst or "") in monitor.last.reason


def test_meanings_are_asked_of_the_calculator_for_the_same_reduction():
    atoms = crystal()
    monitor = UncertaintyMonitor(verlet(atoms), flag=Quantile(0.5), halt=Patience(Quantile(0.9), fs=3), elements=["Al"])
    assert monitor.flag.threshold == pytest.approx(0.25)  # aluminium's readings go up to 0.5
    assert (monitor.halt.threshold, monitor.halt.fs) == (pytest.approx(0.45), 3)
    assert {reduction.elements for reduction in atoms.calc.asked} == {("Al",)}


def test_each_element_has_a_reading_and_a_threshold_of_its_own():
    atoms = crystal([0.3])  # atom 1, the aluminium; half of its calibration atoms read more than 0.25
    dynamics = verlet(atoms)
    monitor = attached(dynamics, flag=PerElement(Quantile(0.5)), halt=0.9)
    found = {watch.reduction.elements: watch.rule.threshold for watch in monitor.watches["flag"]}
    assert found == {("Al",): pytest.approx(0.25), ("Cu",): pytest.approx(0.5)}
    assert monitor.flag.threshold == pytest.approx(0.25)
    dynamics.run(0)
    assert (monitor.last.level, monitor.last.reading, monitor.last.threshold) == ("flag", 0.3, pytest.approx(0.25))
    assert "at 0.25 eV/A by a threshold of PerElement(Quantile(0.5)); worst atom 1 (Al" in monitor.last.reason

    atoms = crystal([0.3])
    atoms.symbols[:2] = "AlCu"  # the same reading, on a copper atom, whose threshold is higher
    monitor = attached(verlet(atoms), flag=PerElement(Quantile(0.5)), halt=0.9)
    monitor()
    assert (monitor.last.level, monitor.last.reading, monitor.last.threshold) == ("ok", 0.3, pytest.approx(0.5))


def test_of_two_levels_the_higher_one_stands_with_its_own_threshold():
    monitor = attached(verlet(crystal([0.8])), flag=PerElement(Quantile(0.5)), halt=0.7, on_halt=[])
    monitor()
    assert (monitor.last.level, monitor.last.reading, monitor.last.threshold) == ("halt", 0.8, 0.7)


# --- checks ----------------------------------------------------------------------------------------


def broken(atoms, dynamics, step):
    """Tears an atom away at a step, as a potential does that no longer knows."""

    def tear():
        if dynamics.nsteps == step:
            atoms.positions[2] += 1.0
            atoms.get_forces()

    dynamics.attach(tear)


def test_a_check_halts_the_run_and_says_which_and_why(tmp_path):
    atoms = crystal([0.4])
    dynamics = verlet(atoms)
    broken(atoms, dynamics, 3)
    monitor = attached(dynamics, flag=0.3, halt=0.5, checks=[Finite(), Bonds()], frames=tmp_path / "a.xyz")
    with pytest.raises(UncertaintyHalt, match=r"halted at step 3 \(6 fs\): Bonds: .*(broken|fused)") as caught:
        dynamics.run(10)
    assert caught.value.reading == 0.4
    assert math.isnan(caught.value.threshold)
    assert (monitor.n_flagged, monitor.n_halted) == (3, 1)
    last = read_frames(tmp_path / "a.xyz")[-1]
    assert last.info["flag_level"] == "halt"
    assert last.info["flag_reason"].startswith("Bonds: ")


def test_a_check_adds_its_reason_to_that_of_a_rule():
    monitor = attached(verlet(crystal([0.8])), halt=0.5, checks=MaxTemperature(100), on_halt=[])
    monitor()
    assert monitor.last.reason.startswith("force uncertainty (max) 0.8 eV/A reached halt")
    assert "; MaxTemperature: temperature is" in monitor.last.reason
    assert monitor.last.threshold == 0.5


def test_checks_look_at_steps_whose_uncertainty_was_skipped():
    atoms = crystal([0.1], skipped=range(1, 100))
    dynamics = verlet(atoms)
    broken(atoms, dynamics, 3)
    events = []
    attached(dynamics, halt=0.5, checks=Bonds(), on_halt=events.append)
    dynamics.run(4)
    assert [event.step for event in events] == [3, 4]
    assert math.isnan(events[0].reading)


def test_checks_alone_need_no_uncertainty(tmp_path):
    atoms = crystal()
    atoms.calc = EMT()
    dynamics = verlet(atoms)
    broken(atoms, dynamics, 3)
    monitor = attached(dynamics, checks=[Bonds()], frames=tmp_path / "a.xyz", log=tmp_path / "a.csv", before=2)
    with pytest.raises(UncertaintyHalt, match="halted at step 3"):
        dynamics.run(10)
    assert (monitor.halt, monitor.flag, monitor.watches) == (None, None, {})
    assert [frame.info["flag_level"] for frame in read_frames(tmp_path / "a.xyz")] == ["before", "before", "halt"]
    assert (tmp_path / "a.csv").read_text().splitlines()[-1] == "3,6,nan,halt"
    with pytest.raises(ValueError, match="on_flag is given but flag is not"):
        UncertaintyMonitor(dynamics, checks=[Bonds()], on_flag=Halt())


def test_checks_see_energy_forces_and_time():
    class Seen(Check):
        snapshots: ClassVar[list] = []

        def inspect(self, state, snapshot):
            self.snapshots.append((snapshot.energy, snapshot.forces.copy(), snapshot.time))
            return None, ""

    atoms = crystal()
    dynamics = verlet(atoms)
    attached(dynamics, checks=Seen())
    dynamics.run(2)
    assert [time for *_, time in Seen.snapshots] == pytest.approx([0, 2, 4])
    assert Seen.snapshots[-1][0] == atoms.get_potential_energy()
    np.testing.assert_array_equal(Seen.snapshots[-1][1], atoms.get_forces())


# --- levels and time -------------------------------------------------------------------------------


def test_flagged_frames_carry_everything_and_are_on_the_disk_at_once(tmp_path):
    path = tmp_path / "flagged.xyz"
    atoms = crystal([0.1, 0.4, 0.1, 0.35, 0.9])
    dynamics = verlet(atoms)
    seen = []
    monitor = attached(
        dynamics, halt=0.5, flag=0.3, frames=path, on_flag=[Call(lambda event: seen.append(len(read_frames(path))))]
    )
    with pytest.raises(UncertaintyHalt):
        dynamics.run(10)
    assert seen == [1, 2]
    frames = read_frames(path)
    assert [frame.info["flag_step"] for frame in frames] == [1, 3, 4]
    assert [frame.info["flag_level"] for frame in frames] == ["flag", "flag", "halt"]
    assert [frame.info["flag_reading"] for frame in frames] == [0.4, 0.35, 0.9]
    assert [frame.info["flag_threshold"] for frame in frames] == [0.3, 0.3, 0.5]
    np.testing.assert_allclose([frame.info["flag_time_fs"] for frame in frames], [2, 6, 8])
    assert "by a threshold of 0.3; worst atom 1 (Al" in frames[0].info["flag_reason"]
    assert set(frames[2].calc.results) >= {"energy", "forces", "stress", *EXTRA}
    np.testing.assert_allclose(frames[2].calc.results["forces"], atoms.calc.results["forces"], atol=1e-8)
    np.testing.assert_allclose(frames[2].get_momenta(), atoms.get_momenta(), atol=1e-8)
    assert (monitor.n_flagged, monitor.n_halted) == (2, 1)
    assert "flag_reason" not in atoms.info
    assert "gamma" not in atoms.arrays


def test_an_earlier_run_is_added_to(tmp_path):
    for _ in range(2):
        dynamics = verlet(crystal([0.4, 0.1]))
        attached(dynamics, flag=0.3, frames=tmp_path / "a.xyz")
        dynamics.run(2)
    assert [frame.info["flag_step"] for frame in read_frames(tmp_path / "a.xyz")] == [0, 0]


def test_a_flag_level_alone_only_counts():
    dynamics = verlet(crystal([0.4]))
    monitor = attached(dynamics, flag=0.3)
    dynamics.run(4)
    assert (monitor.n_flagged, monitor.n_halted, monitor.halt) == (5, 0, None)


def test_actions_run_in_order_after_the_frame_is_kept_and_replace_the_halt(tmp_path):
    dynamics = verlet(crystal([0.8]))
    done = []
    attached(dynamics, halt=0.5, frames=tmp_path / "a.xyz", on_halt=(lambda event: done.append(1), Call(done.append)))
    dynamics.run(1)
    assert [type(item).__name__ for item in done] == ["int", "Event", "int", "Event"]
    assert len(read_frames(tmp_path / "a.xyz")) == 2


def test_the_log_has_one_line_a_step(tmp_path):
    dynamics = verlet(crystal([0.1, 0.4, 0.9]))
    attached(dynamics, halt=0.5, flag=0.3, log=tmp_path / "log.csv")
    with pytest.raises(UncertaintyHalt):
        dynamics.run(10)
    lines = (tmp_path / "log.csv").read_text().splitlines()
    assert lines == ["step,time_fs,reading,level", "0,0,0.1,ok", "1,2,0.4,flag", "2,4,0.9,halt"]


@pytest.mark.parametrize(("dt", "interval", "step"), [(2.0, 1, 13), (1.0, 1, 23), (2.0, 5, 15), (0.5, 3, 45)])
def test_patience_is_simulated_time_whatever_the_step_and_the_interval(dt, interval, step):
    # Above from step 3 on; 20 fs later, at the next step that is looked at, the run is halted.
    dynamics = verlet(crystal([0.1] * 3 + [0.8]), dt)
    monitor = attached(dynamics, interval, halt=0.5, flag=0.3, patience=20)
    with pytest.raises(UncertaintyHalt):
        dynamics.run(100)
    assert dynamics.nsteps == step
    assert monitor.n_flagged > 0  # the flag did not wait


def test_raising_the_threshold_never_halts_earlier():
    steps = []
    for halt in (0.05, 0.1, 0.2, 0.3):
        dynamics = langevin(crystal())
        attached(dynamics, halt=halt, on_halt=Halt(mode="stop"))
        dynamics.run(60)
        steps.append(dynamics.nsteps)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_a_spike_far_above_halts_without_patience():
    dynamics = verlet(crystal([0.1, 0.8, 0.8, 2.0]))
    attached(dynamics, halt=0.5, patience=20, at_once=1.5)
    with pytest.raises(UncertaintyHalt, match=r"halted at step 3.* or a threshold of 1.5"):
        dynamics.run(10)


def test_a_refractory_time_lets_one_frame_of_an_event_through(tmp_path):
    dynamics = verlet(crystal([0.1, 0.4]))
    attached(dynamics, flag=0.3, refractory=10, frames=tmp_path / "a.xyz")
    dynamics.run(14)
    assert [frame.info["flag_step"] for frame in read_frames(tmp_path / "a.xyz")] == [1, 6, 11]


# --- frames before an alarm ------------------------------------------------------------------------


def test_frames_before_an_alarm_come_first_oldest_first_and_never_twice(tmp_path):
    #               0     1     2    3     4    5     6     7     8    9     10
    script = [0.10, 0.11, 0.12, 0.4, 0.41, 0.2, 0.42, 0.21, 0.22, 0.23, 0.9]
    dynamics = verlet(crystal(script))
    monitor = attached(dynamics, flag=0.3, halt=0.5, before=2, frames=tmp_path / "a.xyz")
    with pytest.raises(UncertaintyHalt):
        dynamics.run(20)
    infos = [frame.info for frame in read_frames(tmp_path / "a.xyz")]
    kept = [(info["flag_step"], info["flag_level"]) for info in infos]
    assert kept == [
        (1, "before"), (2, "before"), (3, "flag"), (4, "flag"), (5, "before"), (6, "flag"),
        (8, "before"), (9, "before"), (10, "halt"),
    ]  # fmt: skip
    assert [info["flag_reading"] for info in infos] == [script[info["flag_step"]] for info in infos]
    assert [info["flag_time_fs"] for info in infos] == pytest.approx([2.0 * info["flag_step"] for info in infos])
    assert infos[0]["flag_reason"] == "before the flag at step 3"
    assert infos[-2]["flag_reason"] == "before the halt at step 10"
    assert (monitor.n_flagged, monitor.n_halted) == (3, 1)


def test_frames_before_an_alarm_are_those_of_their_own_step(tmp_path):
    atoms = crystal([0.1] * 5 + [0.9])
    dynamics = verlet(atoms)
    path = []
    dynamics.attach(lambda: path.append((atoms.positions.copy(), atoms.get_forces(), atoms.get_momenta())))
    attached(dynamics, halt=0.5, before=3, frames=tmp_path / "a.xyz")
    with pytest.raises(UncertaintyHalt):
        dynamics.run(20)
    frames = read_frames(tmp_path / "a.xyz")
    assert len(frames) == 4
    for frame in frames:
        positions, forces, momenta = path[frame.info["flag_step"]]
        np.testing.assert_allclose(frame.positions, positions, atol=1e-7)
        np.testing.assert_allclose(frame.calc.results["forces"], forces, atol=1e-7)
        np.testing.assert_allclose(frame.get_momenta(), momenta, atol=1e-7)
        assert set(frame.calc.results) >= set(EXTRA)


def test_a_run_without_alarm_writes_no_frame_before_it(tmp_path):
    dynamics = verlet(crystal([0.1]))
    attached(dynamics, halt=0.5, before=3, frames=tmp_path / "a.xyz")
    dynamics.run(10)
    assert list(tmp_path.iterdir()) == []


# --- restarting ------------------------------------------------------------------------------------


@pytest.mark.parametrize("own_count", [False, True])
def test_a_restored_monitor_goes_on_as_if_the_run_had_not_ended(tmp_path, own_count):
    script = [0.1] * 3 + [0.8]
    dynamics = verlet(crystal(script))
    monitor = attached(dynamics, halt=0.5, flag=0.3, patience=20, frames=tmp_path / "a.xyz")
    dynamics.run(8)
    state = json.loads(json.dumps(monitor.state()))

    dynamics = verlet(crystal([0.8]))
    if own_count:
        dynamics.nsteps = 8
    monitor = UncertaintyMonitor(dynamics, halt=0.5, flag=0.3, patience=20, frames=tmp_path / "a.xyz")
    monitor.restore(state)
    assert monitor.state() == state
    dynamics.attach(monitor)
    with pytest.raises(UncertaintyHalt, match=r"step 13 \(26 fs\)"):
        dynamics.run(100)
    steps = [frame.info["flag_step"] for frame in read_frames(tmp_path / "a.xyz")]
    assert steps == list(range(3, 14))
    assert (monitor.n_flagged, monitor.n_halted) == (10, 1)


def test_only_a_state_of_the_same_levels_is_taken():
    monitor = UncertaintyMonitor(verlet(crystal()), halt=0.5)
    with pytest.raises(ValueError, match=r"not a state of an UncertaintyMonitor: it lacks 'step'"):
        monitor.restore({})
    other = UncertaintyMonitor(verlet(crystal()), halt=0.5, flag=0.3)
    with pytest.raises(ValueError, match=r"levels \['halt'\], this monitor \['flag', 'halt'\]"):
        other.restore(monitor.state())


LONG = ReferenceRuns(tuple(np.random.default_rng(0).lognormal(-2.3, 0.1, (20, 500))), interval=2.0)
EVERYTHING = {
    "patience": {"halt": 0.5, "flag": 0.3, "patience": 6},
    "at once, refractory": {"halt": 0.5, "flag": 0.3, "patience": 6, "at_once": 0.93, "refractory": 7},
    "per element": {"halt": PerElement(Quantile(0.9)), "flag": PerElement(Quantile(0.5))},
    "per element, waiting": {"halt": Patience(PerElement(Quantile(0.9)), fs=6)},
    "cusum": {"halt": Cusum(FalseAlarms(per_run=0.05, steps=100))},
    "all of": {"halt": AllOf(Patience(0.3, fs=8), Threshold(0.4))},
    "any of": {"halt": AnyOf(Patience(0.3, fs=8), Threshold(0.9))},
    "checks": {"halt": 5.0, "checks": [Finite(), Bonds(), MaxTemperature(100), EnergySpike()]},
    "checks alone": {"checks": [Bonds(shortest=0.93)]},
}


@pytest.mark.parametrize("options", EVERYTHING.values(), ids=EVERYTHING)
@pytest.mark.parametrize("split", [1, 4, 9])
def test_a_run_in_two_parts_is_judged_as_one(options, split):
    script = [0.1, 0.32, 0.34, 0.1, 0.42, 0.45, 0.44, 0.46, 0.47, 0.51, 0.52, 0.2, 0.53, 0.9, 0.95, 0.96, 0.1]
    steps = len(script) + 8
    parts, whole = [], []

    def judged(dynamics, events):
        monitor = attached(dynamics, **options, on_halt=[])
        # A restored monitor has judged nothing yet when it is shown the step it was left at.
        dynamics.attach(
            lambda: monitor.last and events.append((monitor.last.step, monitor.last.level, monitor.last.reason))
        )
        return monitor

    dynamics = verlet(crystal(script, runs=LONG))
    judged(dynamics, whole)
    dynamics.run(steps)

    dynamics = verlet(atoms := crystal(script, runs=LONG))
    monitor = judged(dynamics, parts)
    dynamics.run(split)
    state = json.loads(json.dumps(monitor.state()))
    again = atoms.copy()
    again.calc = Uncertain(crystal(), script[split:], runs=LONG)
    dynamics = verlet(again)
    monitor = judged(dynamics, parts)
    monitor.restore(state)
    assert json.loads(json.dumps(monitor.state())) == state
    dynamics.run(steps - split)
    assert parts == whole
    assert {"ok", "halt"} <= {level for _, level, _ in whole}


class Fitted:
    """What tells one uncertainty model from another."""

    def __init__(self, fingerprint):
        self.identity = self
        self.fingerprint = fingerprint


def test_a_restart_with_another_uncertainty_model_is_refused():
    monitor = UncertaintyMonitor(verlet(crystal()), halt=Quantile(0.7), flag=0.1)
    state = json.loads(json.dumps(monitor.state()))
    message = (
        r"restart with another uncertainty model \(halt by a threshold of Quantile\(0.7\) 0.7 eV/Å then, 1.4 eV/Å "
    )
    with pytest.raises(ValueError, match=message + r"now\). Make the monitor with the calculator of the earlier run"):
        UncertaintyMonitor(verlet(crystal(readings=np.linspace(0, 2, 101))), halt=Quantile(0.7), flag=0.1).restore(
            state
        )

    monitors = []
    for fingerprint in ("0123456789", "0123456789", "abcdefghij", None):
        atoms = crystal()
        atoms.calc.uncertainty_model = None if fingerprint is None else Fitted(fingerprint)
        monitors.append(UncertaintyMonitor(verlet(atoms), halt=0.5))
    state = monitors[0].state()
    monitors[1].restore(state)
    with pytest.raises(ValueError, match=r"another uncertainty model \(potential 01234567 then, abcdefgh now\)"):
        monitors[2].restore(state)
    with pytest.raises(ValueError, match=r"potential 01234567 then, None now"):
        monitors[3].restore(state)


def test_a_rule_that_is_given_otherwise_begins_anew_after_a_restart():
    dynamics = verlet(crystal([0.6]))
    attached(dynamics, halt=0.5, patience=20)
    dynamics.run(8)
    state = dynamics.observers[0][0].state()
    for halt, step in ((0.5, 10), (0.55, 18)):  # waiting since step 0, or since the restart at 8
        dynamics = verlet(crystal([0.6]))
        monitor = attached(dynamics, halt=halt, patience=20)
        monitor.restore(state)
        with pytest.raises(UncertaintyHalt, match=f"halted at step {step + (halt > 0.5)} "):
            dynamics.run(30)


def test_an_optimiser_restores_without_time():
    dynamics = BFGS(rattled(crystal([0.4])), logfile=None)
    monitor = attached(dynamics, flag=0.3)
    run(dynamics, 3)
    state = json.loads(json.dumps(monitor.state()))
    assert state["time_fs"] is None
    monitor.restore(state)
    assert monitor.state() == state


# --- mistakes, told at once ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, r"nothing to watch for. Give halt, flag or both"),
        ({"halt": 0}, ValueError, r"positive number in eV/Å, not 0"),
        ({"halt": 0.5, "flag": -1}, ValueError, r"positive number in eV/Å, not -1"),
        ({"halt": math.nan}, ValueError, r"positive number in eV/Å, not nan"),
        ({"halt": "0.5"}, TypeError, r"a number in eV/Å or a criterion"),
        ({"halt": 0.5, "flag": 0.5}, ValueError, r"flag is 0.5 eV/Å and halt is 0.5 eV/Å.*Give a flag below"),
        ({"halt": Quantile(0.2), "flag": 0.5}, ValueError, r"flag is 0.5 eV/Å and halt is 0.2 eV/Å"),
        ({"halt": 0.5, "patience": 0}, ValueError, r"patience is a positive time in fs, not 0"),
        ({"flag": 0.5, "patience": 5}, ValueError, r"patience belongs to halt"),
        ({"halt": Patience(1, 2), "patience": 5}, ValueError, r"halt is already a rule"),
        ({"halt": 0.5, "on_flag": Halt()}, ValueError, r"on_flag is given but flag is not"),
        ({"flag": 0.5, "on_halt": Halt()}, ValueError, r"on_halt is given but halt is not"),
        ({"halt": 0.5, "on_halt": "stop"}, TypeError, r"a callable that takes one Event"),
        ({"halt": 0.5, "reduce": "median"}, ValueError, r"a reduction is 'max'"),
        ({"halt": 0.5, "elements": ["Fe"]}, ValueError, r"no atom of \w+ is looked at with elements=\['Fe'\]"),
        ({"halt": 0.5, "indices": []}, ValueError, r"no atom of \w+ is looked at"),
        ({"halt": 0.5, "indices": [7]}, IndexError, r"atom index 7 is beyond the frame's 4 atoms"),
        ({"halt": 0.5, "patience": 5, "at_once": 0.4}, ValueError, r"Give at_once above halt"),
        ({"halt": 0.5, "refractory": 5}, ValueError, r"refractory belongs to flag"),
        ({"checks": [Bonds()], "patience": 5}, ValueError, r"patience belongs to halt"),
        ({"halt": 0.5, "before": 3}, ValueError, r"before=3 frames have nowhere to go. Give frames too"),
        ({"halt": 0.5, "before": -1, "frames": "a.xyz"}, ValueError, r"a number of frames, 0 or more, not -1"),
        ({"halt": 0.5, "before": 2.5, "frames": "a.xyz"}, ValueError, r"a number of frames, 0 or more, not 2.5"),
        ({"halt": 0.5, "checks": ["bonds"]}, TypeError, r"checks are objects such as Finite\(\).*not 'bonds'"),
        ({"halt": 0.5, "flag": PerElement(Quantile(0.8))}, ValueError, r"for Cu, so no frame lies between"),
        ({"halt": 0.5, "frames": "/no/such/folder/a.xyz"}, ValueError, r"cannot be written"),
        ({"halt": 0.5, "log": "/no/such/folder/log"}, ValueError, r"cannot be written"),
    ],
)
def test_mistakes_are_told_when_the_monitor_is_made(options, error, message):
    with pytest.raises(error, match=message):
        UncertaintyMonitor(verlet(crystal()), **options)


@pytest.mark.parametrize("optimiser", [BFGS, FIRE])  # FIRE has a `dt`, which is no time
def test_patience_in_an_optimiser_is_refused(optimiser):
    with pytest.raises(ValueError, match=r"simulated time in fs, and an optimiser has none"):
        UncertaintyMonitor(optimiser(crystal(), logfile=None), halt=0.5, patience=20)


def test_calculators_without_uncertainty_are_refused():
    atoms = molecule("H2O")
    dynamics = verlet(atoms)
    with pytest.raises(ValueError, match=r"the structure has no calculator. Set atoms.calc = UncertainCalculator"):
        UncertaintyMonitor(dynamics, halt=0.5)
    atoms.calc = LennardJones()
    with pytest.raises(ValueError, match=r"LennardJones gives no forces_uncertainty.*Wrap it"):
        UncertaintyMonitor(dynamics, halt=0.5)


def test_a_calculator_that_breaks_its_promise_is_refused_at_the_first_step():
    dynamics = verlet(crystal([0.1], skipped=range(10)))
    attached(dynamics, halt=0.5)
    with pytest.raises(
        ValueError, match=r"Uncertain promises forces_uncertainty but its results of the structure at step 0 lack it"
    ):
        dynamics.run(5)


def test_a_calculator_that_skips_may_skip_the_first_step():
    atoms = crystal([0.8], skipped=(0, 1))
    atoms.calc.every = 3
    dynamics = verlet(atoms)
    attached(dynamics, halt=0.5)
    with pytest.raises(UncertaintyHalt, match="halted at step 2"):
        dynamics.run(5)


def test_meanings_need_a_calculator_that_knows_its_calibration_data():
    class Bare(EMT):
        implemented_properties = ["energy", "forces", "forces_uncertainty"]  # noqa: RUF012

    atoms = crystal()
    atoms.calc = Bare()
    with pytest.raises(ValueError, match=r"Bare has no calibration data to turn Quantile\(0.9\) into a number"):
        UncertaintyMonitor(verlet(atoms), halt=Quantile(0.9))


def test_what_is_neither_a_structure_nor_a_path_is_refused():
    images = [crystal() for _ in range(3)]
    path = NEB(images, method="improvedtangent")
    dynamics = BFGS(path, logfile=None)
    path.images = images[:2]
    with pytest.raises(ValueError, match=r"BFGS moves a NEB, which is neither a structure nor a path of at least thr"):
        UncertaintyMonitor(dynamics, halt=0.5)


@pytest.mark.parametrize("interval", [1, 3])
def test_a_monitor_attached_twice_says_so_at_once(interval):
    dynamics = verlet(crystal([0.1]))
    monitor = attached(dynamics, halt=0.5)
    dynamics.attach(monitor, interval=interval)
    with pytest.raises(ValueError, match=r"attached to its VelocityVerlet more than once. Attach it once"):
        dynamics.run(10)
    assert dynamics.nsteps == 0
    dynamics.observers.pop()
    dynamics.run(10)
    assert sum(monitor.state()["counts"].values()) == 11


def test_two_monitors_watch_one_run(tmp_path):
    dynamics = verlet(crystal([0.1, 0.4, 0.9]))
    attached(dynamics, flag=0.3, on_flag=[Flag(tmp_path / "a.xyz"), Log(tmp_path / "a.csv")])
    monitor = attached(dynamics, halt=0.5)
    with pytest.raises(UncertaintyHalt):
        dynamics.run(10)
    assert [frame.info["flag_step"] for frame in read_frames(tmp_path / "a.xyz")] == [1, 2]
    assert sum(monitor.state()["counts"].values()) == 3


# --- made for another run ----------------------------------------------------------------------------


@pytest.mark.parametrize("same_atoms", [True, False])
def test_a_monitor_that_is_attached_to_another_run_says_so(same_atoms):
    atoms = crystal([0.6])
    monitor = UncertaintyMonitor(verlet(atoms if same_atoms else crystal([0.1])), halt=0.5, patience=8)
    other = verlet(atoms)
    other.attach(monitor)
    with pytest.raises(ValueError, match=r"made for a VelocityVerlet that stands at step 0 .* make another"):
        other.run(50)
    assert other.nsteps == 2


def test_a_monitor_that_is_attached_twice_by_its_call_is_refused_too():
    dynamics = verlet(crystal([0.1]))
    monitor = attached(dynamics, halt=0.5)
    dynamics.attach(monitor.__call__)
    with pytest.raises(ValueError, match="attached to its VelocityVerlet more than once"):
        dynamics.run(1)


def test_a_loop_of_ones_own_moves_its_run():
    dynamics = verlet(crystal([0.1, 0.1, 0.1, 0.1, 0.6]))
    monitor = UncertaintyMonitor(dynamics, halt=0.5, on_halt=[])
    for _ in dynamics.irun(4):
        monitor()
        monitor()
    assert (monitor.last.step, monitor.n_halted) == (4, 1)


@pytest.mark.parametrize("what", [lambda: crystal(), lambda: None])
def test_what_is_no_run_is_refused(what):
    with pytest.raises(TypeError, match=r"a monitor watches a run, such as .*, not (Atoms|NoneType)"):
        UncertaintyMonitor(what(), halt=0.5)


def test_a_mask_is_not_taken_for_numbers_of_atoms():
    with pytest.raises(TypeError, match=r"not a mask: .*np.flatnonzero"):
        UncertaintyMonitor(verlet(crystal()), halt=0.5, indices=[True, False, False, False])


@pytest.mark.parametrize("rule", [lambda alarms: alarms, lambda alarms: AnyOf(Threshold(9.0), Patience(alarms, fs=4))])
@pytest.mark.parametrize(("dt", "interval", "warns"), [(2.0, 1, False), (1.0, 2, False), (1.0, 1, True)])
def test_readings_more_often_than_those_of_the_reference_are_warned_of(rule, dt, interval, warns):
    atoms = crystal([0.01], runs=LONG)
    atoms.calc.uncertainty_model = SimpleNamespace(reference=LONG)
    assert LONG.interval == 2.0
    dynamics = verlet(atoms, dt)
    attached(dynamics, interval, halt=rule(FalseAlarms(per_run=0.2, steps=50)))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        dynamics.run(4)
    assert [
        "every 2 fs, but this run is read every 1 fs" in str(w.message) for w in caught if w.category is UQWarning
    ] == ([True] * warns)


def test_the_same_potential_with_another_fit_is_another_uncertainty_model():
    monitors = []
    for digest in ("0123456789", "0123456789", "abcdefghij"):
        atoms = crystal()
        atoms.calc.uncertainty_model = SimpleNamespace(digest=digest)
        monitors.append(UncertaintyMonitor(verlet(atoms), halt=0.5))
    state = json.loads(json.dumps(monitors[0].state()))
    monitors[1].restore(state)
    with pytest.raises(ValueError, match=r"another uncertainty model \(fit 01234567 then, abcdefgh now\)"):
        monitors[2].restore(state)


@pytest.mark.parametrize(
    "make",
    [
        lambda atoms: verlet(atoms, 1.0),
        lambda atoms: Langevin(
            atoms, fs, temperature_K=300, friction=0.01 / fs, fixcm=False, rng=np.random.default_rng(0)
        ),
        lambda atoms: BFGS(atoms, logfile=None),
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_a_loop_over_step_is_judged_step_by_step(make, first):
    """ASE counts steps in `run` alone; whether the first structure is judged is up to the loop."""
    atoms = crystal([0.1, 0.1, 0.1, 0.1, 0.6, 0.1])
    atoms.rattle(0.05, seed=1)
    dynamics = make(atoms)
    monitor, seen = UncertaintyMonitor(dynamics, halt=0.5, on_halt=[]), []
    if first:
        monitor()
        assert monitor.last.step == 0
    for _ in range(6):
        dynamics.step()
        monitor()
        monitor()  # a step is judged once
        seen.append((monitor.last.step, monitor.last.time_fs))
    timed = not isinstance(dynamics, BFGS)
    assert [step for step, _ in seen] == [1, 2, 3, 4, 5, 6]
    assert [time for _, time in seen] == (pytest.approx([1, 2, 3, 4, 5, 6]) if timed else [None] * 6)
    assert sum(monitor.state()["counts"].values()) == 6 + first
    assert monitor.n_halted == 1


def test_a_loop_over_step_goes_on_in_another_process_and_after_a_run():
    atoms = crystal([0.1])
    dynamics = verlet(atoms, 1.0)
    monitor = UncertaintyMonitor(dynamics, halt=0.5)
    for _ in range(3):
        dynamics.step()
        monitor()
    for _ in dynamics.irun(2):
        monitor()
    dynamics.step()
    monitor()
    assert (monitor.last.step, monitor.last.time_fs) == (6, pytest.approx(6))
    state = json.loads(json.dumps(monitor.state()))
    dynamics = verlet(atoms, 1.0)
    monitor = UncertaintyMonitor(dynamics, halt=0.5)
    monitor.restore(state)
    dynamics.step()
    monitor()
    assert (monitor.last.step, monitor.last.time_fs) == (7, pytest.approx(7))
