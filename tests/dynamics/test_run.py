"""Runs under a monitor: their trajectory, and how another run goes on from it."""

import csv

import numpy as np
import pytest
from ase import units
from ase.md.langevin import Langevin
from ase.md.verlet import VelocityVerlet

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import WatchPolicy
from ase_uq.dynamics.run import Origin, ramp, run_md
from ase_uq.io.frames import read_frames
from tests.dynamics.builders import crystal

STEP = 0.5  # fs


def made(atoms, **options):
    dynamics = VelocityVerlet(atoms, STEP * units.fs)
    return dynamics, UncertaintyMonitor(dynamics, **options)


def test_the_trajectory_has_steps_and_times_and_ends_with_the_last_step(tmp_path):
    atoms, seen = crystal([0.1]), []
    dynamics, monitor = made(atoms, halt=0.5)
    file = tmp_path / "run.xyz"
    halted = run_md(
        dynamics, monitor, 7, trajectory=file, interval=3, after_step=lambda: seen.append(monitor.last.step)
    )
    assert not halted
    frames = read_frames(file)
    assert [frame.info["step"] for frame in frames] == [0, 3, 6, 7]
    assert [frame.info["time_fs"] for frame in frames] == pytest.approx([0, 1.5, 3, 3.5])
    np.testing.assert_allclose(frames[-1].get_momenta(), atoms.get_momenta(), atol=1e-8)  # digits of the file
    assert seen == list(range(8))


def test_a_halted_run_ends_with_the_step_of_the_halt(tmp_path):
    dynamics, monitor = made(crystal([0.1, 0.1, 0.1, 0.1, 0.6]), halt=0.5)
    seen, file = [], tmp_path / "run.xyz"
    assert run_md(dynamics, monitor, 9, trajectory=file, after_step=lambda: seen.append(monitor.last.level))
    assert [frame.info["step"] for frame in read_frames(file)] == [0, 4]
    assert seen == [*["ok"] * 4, "halt"]


def test_without_a_file_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not run_md(*made(crystal([0.1]), halt=0.5), 2)
    assert run_md(*made(crystal([0.6]), halt=0.5), 2)
    assert not list(tmp_path.iterdir())


def test_another_run_goes_on_from_the_last_frame(tmp_path):
    file, log = tmp_path / "run.xyz", tmp_path / "log.csv"
    policy = WatchPolicy(flag=0.3)
    run_md(*made(crystal([0.4]), policy=policy, log=log), 4, trajectory=file, interval=1)
    last = read_frames(file)[-1]
    origin = Origin.at_end_of(last)
    assert origin == Origin(4, 2.0, written=True, judged=True)
    atoms = crystal([0.4])
    atoms.positions, atoms.arrays["momenta"] = last.positions, last.get_momenta()
    dynamics, monitor = made(atoms, policy=policy, log=log)
    run_md(dynamics, monitor, 3, trajectory=file, interval=1, origin=origin)
    frames = read_frames(file)
    assert [frame.info["step"] for frame in frames] == list(range(8))
    assert [frame.info["time_fs"] for frame in frames] == pytest.approx([STEP * step for step in range(8)])
    with open(log) as lines:
        assert [int(row["step"]) for row in csv.DictReader(lines)] == list(range(8))
    assert monitor.n_flagged == 3


def test_a_frame_that_no_run_has_written_is_the_beginning(tmp_path):
    assert Origin.at_end_of(crystal()) == Origin(0, 0.0, written=True, judged=False)
    file = tmp_path / "run.xyz"
    dynamics, monitor = made(crystal([0.1]), halt=0.5)
    run_md(dynamics, monitor, 2, trajectory=file, interval=1, origin=Origin.at_end_of(crystal()))
    assert [frame.info["step"] for frame in read_frames(file)] == [1, 2]
    assert monitor.last.step == 2


def test_a_ramp_takes_the_thermostat_evenly_to_another_temperature():
    dynamics = Langevin(crystal([0.1]), STEP * units.fs, temperature_K=100, friction=0.01, fixcm=False)
    kelvin = []
    dynamics.attach(ramp(dynamics, 100, 300, 4))
    dynamics.attach(lambda: kelvin.append(dynamics.temp / units.kB))
    dynamics.run(4)
    assert kelvin == pytest.approx([100, 150, 200, 250, 300])
