"""Runs under a monitor: their trajectory, and how another run goes on from it."""

import csv
import json

import numpy as np
import pytest
from ase import units
from ase.build import molecule
from ase.md.langevin import Langevin
from ase.md.nose_hoover_chain import NoseHooverChainNVT
from ase.md.verlet import VelocityVerlet

from ase_uq.dynamics import saved_run
from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import WatchPolicy
from ase_uq.dynamics.restart import Restart, digest_of
from ase_uq.dynamics.run import ramp, run_md
from ase_uq.dynamics.saved_run import monitored
from ase_uq.errors import InputError
from ase_uq.io.frames import read_frames
from ase_uq.sampling.ensembles import check_restartable
from tests.dynamics.builders import crystal

STEP = 0.5  # fs


def made(atoms, **options):
    dynamics = VelocityVerlet(atoms, STEP * units.fs)
    return dynamics, UncertaintyMonitor(dynamics, **options)


def ran(file, steps, atoms, *, append=False, command=None, log=None, timestep=STEP, interval=1, **options):
    """One process of a run, with its monitor and whether it was halted."""
    with Restart(file, steps, command, append=append) as restart:
        if restart.atoms is not None:
            calculator, atoms = atoms.calc, restart.atoms
            atoms.calc = calculator
        dynamics = VelocityVerlet(atoms, timestep * units.fs)
        monitor = monitored(dynamics, restart, log=log, **options)
        return monitor, run_md(dynamics, monitor, steps, restart=restart, interval=interval)


def test_the_trajectory_has_steps_and_times_and_ends_with_the_last_step(tmp_path):
    atoms, file = crystal([0.1]), tmp_path / "run.xyz"
    _, halted = ran(file, 7, atoms, interval=3, halt=0.5)
    assert not halted
    frames = read_frames(file)
    assert [frame.info["step"] for frame in frames] == [0, 3, 6, 7]
    assert [frame.info["time_fs"] for frame in frames] == pytest.approx([0, 1.5, 3, 3.5])
    assert len({frame.info["run"] for frame in frames}) == 1
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta(), atol=1e-8)  # digits of the file


def test_a_halted_run_ends_with_the_step_of_the_halt(tmp_path):
    file = tmp_path / "run.xyz"
    _, halted = ran(file, 9, crystal([0.1, 0.1, 0.1, 0.1, 0.6]), interval=100, halt=0.5)
    assert halted
    assert [frame.info["step"] for frame in read_frames(file)] == [0, 4]


def test_without_a_file_nothing_is_written_and_each_step_is_told(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    seen = []
    dynamics, monitor = made(crystal([0.1]), halt=0.5)
    assert not run_md(dynamics, monitor, 7, after_step=lambda: seen.append(monitor.last.step))
    assert seen == list(range(8))
    dynamics, monitor = made(crystal([0.1, 0.1, 0.6]), halt=0.5)
    assert run_md(dynamics, monitor, 9, after_step=lambda: seen.append(monitor.last.level))
    assert seen[8:] == ["ok", "ok", "halt"]
    assert not list(tmp_path.iterdir())


def test_another_process_goes_on_with_the_run(tmp_path):
    file, log = tmp_path / "run.xyz", tmp_path / "log.csv"
    policy = WatchPolicy(flag=0.3)
    ran(file, 4, crystal([0.4]), log=log, policy=policy)
    monitor, _ = ran(file, 7, crystal([0.4]), log=log, policy=policy)
    frames = read_frames(file)
    assert [frame.info["step"] for frame in frames] == list(range(8))
    assert [frame.info["time_fs"] for frame in frames] == pytest.approx([STEP * step for step in range(8)])
    with open(log) as lines:
        assert [int(row["step"]) for row in csv.DictReader(lines)] == list(range(8))
    assert monitor.n_flagged == 8


def test_another_timestep_counts_on_from_the_time_of_the_run(tmp_path):
    file = tmp_path / "run.xyz"
    ran(file, 2, crystal([0.1]), command={"--timestep": "0.5"}, halt=0.5)
    with pytest.raises(InputError, match=r"was begun with another --timestep \(0\.5, now 1\)"):
        Restart(file, 4, {"--timestep": "1"})
    ran(file, 4, crystal([0.1]), command={"--timestep": "1"}, append=True, timestep=1.0, halt=0.5)
    assert [frame.info["time_fs"] for frame in read_frames(file)] == pytest.approx([0, 0.5, 1, 2, 3])
    # What is given now is the command from now on.
    with pytest.raises(InputError, match=r"was begun with another --timestep \(1, now 0\.5\)"):
        Restart(file, 9, {"--timestep": "0.5"})


def test_rules_that_a_change_does_not_concern_are_carried(tmp_path):
    """Patience has waited for 1.5 fs of 2 when the process ends."""
    for command, append in (("same", False), ("other", True)):
        file = tmp_path / f"{command}.xyz"
        ran(file, 3, crystal([0.6]), command={"a": "same"}, halt=0.5, patience=2)
        monitor, halted = ran(file, 9, crystal([0.6]), command={"a": command}, append=append, halt=0.5, patience=2)
        assert (halted, monitor.last.step) == (True, 4)
    file = tmp_path / "higher.xyz"
    ran(file, 3, crystal([0.6]), halt=0.5, patience=2)
    monitor, halted = ran(file, 9, crystal([0.6]), append=True, halt=0.55, patience=2)
    assert (halted, monitor.last.step) == (True, 8)
    file = tmp_path / "other_levels.xyz"
    ran(file, 3, crystal([0.6]), command={"a": "b"}, halt=0.5, patience=2)
    monitor, halted = ran(file, 9, crystal([0.6]), command={"a": "c"}, append=True, flag=0.5)
    assert (halted, monitor.n_flagged, monitor.last.step) == (False, 6, 9)


def test_frames_from_before_an_alarm_cross_the_restart(tmp_path):
    script = [0.1] * 4 + [0.4]
    options = {"flag": 0.3, "before": 3}
    ran(tmp_path / "whole.xyz", 6, crystal(script), frames=tmp_path / "a.xyz", **options)
    ran(tmp_path / "whole2.xyz", 3, crystal(script), frames=tmp_path / "b.xyz", **options)
    ran(tmp_path / "whole2.xyz", 6, crystal([0.1, 0.4]), frames=tmp_path / "b.xyz", **options)
    whole, parts = (
        [(frame.info["flag_step"], frame.info["flag_level"], *frame.positions.ravel()) for frame in read_frames(file)]
        for file in (tmp_path / "a.xyz", tmp_path / "b.xyz")
    )
    assert parts == whole
    assert [row[1] for row in whole] == ["before"] * 3 + ["flag"] * 3


def test_a_step_is_saved_every_few_seconds_only(tmp_path, monkeypatch):
    now, steps = [0.0], []
    monkeypatch.setattr(saved_run.time, "monotonic", lambda: now[0])
    real = saved_run.write_whole
    monkeypatch.setattr(
        saved_run, "write_whole", lambda path, data: (steps.append(json.loads(data)["step"]), real(path, data))
    )
    with Restart(tmp_path / "run.xyz", 20) as restart:
        dynamics = VelocityVerlet(crystal([0.1]), STEP * units.fs)
        restart.begin(dynamics)
        monitor = UncertaintyMonitor(dynamics, halt=0.5)
        run_md(dynamics, monitor, 20, restart=restart, after_step=lambda: now.__setitem__(0, now[0] + 1))
    assert steps == [0, 5, 10, 15, 20, 20]


def test_structures_are_told_apart_by_all_that_makes_a_run():
    atoms = crystal()
    known = {digest_of(atoms)}
    for change in (
        lambda a: a.positions.__setitem__((0, 0), 1e-9),
        lambda a: a.set_momenta(0.5 * a.get_momenta()),
        lambda a: a.set_pbc(False),
        lambda a: a.set_cell(1.001 * a.cell),
    ):
        other = atoms.copy()
        change(other)
        known.add(digest_of(other))
    assert len(known) == 5
    assert digest_of(atoms.copy()) in known


def test_a_ramp_takes_the_thermostat_evenly_to_another_temperature():
    dynamics = Langevin(crystal([0.1]), STEP * units.fs, temperature_K=100, friction=0.01, fixcm=False)
    kelvin = []
    dynamics.attach(ramp(dynamics, 100, 300, 4))
    dynamics.attach(lambda: kelvin.append(dynamics.temp / units.kB))
    dynamics.run(4)
    assert kelvin == pytest.approx([100, 150, 200, 250, 300])


def langevin(atoms, **options):
    return Langevin(atoms, 1.0, temperature_K=300, friction=0.01, fixcm=False, **options)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            langevin,
            r"Give Langevin rng=np\.random\.default_rng",
        ),
        (
            lambda atoms: NoseHooverChainNVT(atoms, 1.0, temperature_K=300, tdamp=50.0),
            "a run of NoseHooverChainNVT cannot go on later",
        ),
    ],
)
def test_dynamics_that_could_not_go_on_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        check_restartable(make(molecule("H2O")))


def test_dynamics_with_random_numbers_of_their_own_can_go_on():
    check_restartable(langevin(molecule("H2O"), rng=np.random.default_rng(0)))
