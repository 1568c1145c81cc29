"""Runs of molecular dynamics that were ended, by whatever, and go on: as if they had never been ended."""

import fcntl
import multiprocessing
import os
import random
import re
import signal
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms, units
from ase.constraints import FixBondLength
from ase.io import read, write
from ase.md.langevin import Langevin

import ase_uq.dynamics.run
from ase_uq import UncertainCalculator, UncertaintyModel
from ase_uq.dynamics import restart, saved_run
from ase_uq.dynamics.outputs import drop_frames
from ase_uq.dynamics.run import run_md
from ase_uq.io.frames import write_frames

OUTPUTS = ("run.xyz", "log.csv", "flagged.xyz")
WORDS = ["--timestep", 0.25, "--temperature", 3000, "--temperature-end", 2000, "--flag", "q0.1", "--halt", 1e6]
WORDS += ["--refractory", 0.6, "--before", 2, "--trajectory", "run.xyz", "--log", "log.csv", "--frames", "flagged.xyz"]

PRELOADED = [
    "ase_uq.backends.toy",
    "ase_uq.cli",
    "ase_uq.cli.potential",
    "ase_uq.dynamics.run",
    "ase_uq.display.progress",
]
PRELOADED += ["ase_uq.engines.ase.calculator", "ase.md.bussi", "ase.md.nose_hoover_chain", "ase.md.langevin"]
PRELOADED += [
    "ase_uq.cli.start",
    "ase_uq.backends.specs",
    "ase_uq.methods.bll",
    "ase.md.nvtberendsen",
    "pydantic.types",
]

# Run in a process of its own, which kills itself as the kernel would: without a word.
SCRIPT = """
import os, signal, time
from ase_uq.cli import main
from ase_uq.dynamics import actions, restart, saved_run
from ase_uq.io import frames

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def nth(number, owner, name, last):
    original, calls = getattr(owner, name), [0]
    def call(*arguments):
        calls[0] += 1
        if calls[0] == number:
            last(original, *arguments)
            die()
        return original(*arguments)
    setattr(owner, name, call)

def half(original, target, data):
    original(target, data[: len(data) // 2])

os.chdir({folder!r})
saved_run.SECONDS_AT_RISK = {risk}
{more}
main({words!r})
"""
KILLS = {
    "before anything is saved": "nth(1, saved_run, 'write_whole', lambda *a: None)",
    "before the first step": "nth(1, restart.Restart, 'restore', lambda *a: None)",
    "in the middle of the log's first line": "nth(1, actions.Log, '_write', half)",
    "in the middle of a row": "nth(9, actions.Log, '_write', half)",
    "after a row": "nth(12, actions.Log, '_write', lambda original, *a: original(*a))",
    "in the middle of a frame": "nth(6, frames, 'write_all', half)",
    "before the last byte of a frame": "nth(7, frames, 'write_all', lambda original, f, d: original(f, d[:-1]))",
    "after a frame": "nth(8, frames, 'write_all', lambda original, *a: original(*a))",
    "before a step is saved": "nth(2, saved_run, 'write_whole', lambda *a: None)",
    "while a step is saved": "nth(2, saved_run, 'write_whole', lambda o, p, d: open(str(p) + '.new', 'w').write('{'))",
    "after a step is saved": "nth(2, saved_run, 'write_whole', lambda original, *a: original(*a))",
    "after the last frame": "nth(19, restart.Restart, 'save', lambda *a: None)",
}


@pytest.fixture
def command(files, tmp_path, monkeypatch):
    """Words of one run; `interval` and `steps` are the test's."""
    monkeypatch.chdir(tmp_path)

    def command(*more, steps=16, interval=5, start=files.start):
        words = ["md", start, "--model", "toy:", "--uq", files.uq, "--steps", steps, "--interval", interval]
        return [str(word) for word in (*words, *WORDS, *more)]

    return command


def started(words, more="", risk=0.0) -> ForkServerProcess:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    script = SCRIPT.format(folder=os.getcwd(), words=words, more=more, risk=risk)
    process = context.Process(target=exec, args=(script, {}))
    process.start()
    return process


def ended(words, more="", risk=0.0) -> int | None:
    process = started(words, more, risk)
    process.join()
    return process.exitcode


def outputs() -> dict[str, bytes]:
    return {name: Path(name).read_bytes() for name in OUTPUTS}


def uninterrupted(words) -> dict[str, bytes]:
    """What the same command gives that nobody ends, made in the same folder under the same names."""
    assert ended(words) == 0
    found = outputs()
    for name in (*OUTPUTS, "run.xyz.restart"):
        os.unlink(name)
    assert found["flagged.xyz"].count(b"flag_level=before") >= 2
    assert found["flagged.xyz"].count(b"flag_level=flag") >= 2
    return found


def test_after_sigkill_everything_stands_once(command):
    whole = uninterrupted(command())
    for number, (name, kill) in enumerate(KILLS.items()):
        risk = 0.0 if number % 2 or "save" in name else 1e9  # every step is saved, or only the first one
        assert ended(command(), kill, risk) == -signal.SIGKILL, name
        assert ended(command(), "", risk) == 0, name
        assert outputs() == whole, name
        for file in (*OUTPUTS, "run.xyz.restart"):
            os.unlink(file)


@pytest.mark.parametrize("interval", [1, 100])
def test_a_process_killed_from_outside_again_and_again_arrives(command, interval):
    words = command(interval=interval)
    whole = uninterrupted(words)
    slow = "real = restart.Restart.save\n"
    slow += "restart.Restart.save = lambda *a: (time.sleep(0.01), real(*a))"
    waits = random.Random(interval)
    for _ in range(6):
        process = started(words, slow, risk=waits.choice([0.0, 0.05]))
        process.join(0.25 + waits.uniform(0, 0.3))
        process.kill()
        process.join()
        if process.exitcode == 0:
            break
    if process.exitcode != 0:
        # Killed between its last step and its exit, it has left nothing to do, and the next one says so.
        has_all_steps = b'"status": "ended"' in Path("run.xyz.restart").read_bytes()
        assert ended(words) == int(has_all_steps)
    assert outputs() == whole


@pytest.mark.parametrize("earlier", [("--seed", 5), ()])
def test_frames_of_other_runs_in_the_same_file_stay(command, earlier):
    """Also of one by the same command, whose trajectory was moved away when it had ended."""
    assert ended(command(*earlier)) == 0
    others = Path("flagged.xyz").read_bytes()
    for name in ("run.xyz", "log.csv", "run.xyz.restart"):
        os.unlink(name)
    assert ended(command(), KILLS["after a row"], 1e9) == -signal.SIGKILL
    assert ended(command(), "", 1e9) == 0
    found = Path("flagged.xyz").read_bytes()
    assert found.startswith(others)
    os.unlink("flagged.xyz")
    for name in ("run.xyz", "log.csv", "run.xyz.restart"):
        os.unlink(name)
    assert ended(command()) == 0
    alone = others + Path("flagged.xyz").read_bytes()
    # A run has another name where frames of others are in the file already.
    assert re.sub(rb"run=md-\w+", b"", found) == re.sub(rb"run=md-\w+", b"", alone)


def test_a_flagged_file_that_was_moved_away_is_begun_anew(command):
    whole = uninterrupted(command())
    assert ended(command(), KILLS["after a step is saved"].replace("2", "14", 1), 0.0) == -signal.SIGKILL
    moved = Path("flagged.xyz").rename("labelled.xyz").read_bytes()
    assert ended(command()) == 0
    assert moved + Path("flagged.xyz").read_bytes() == whole["flagged.xyz"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_a_run_with_its_step(command, run, monkeypatch, number):
    words = command()
    whole = uninterrupted(words)
    made = ase_uq.dynamics.run.ramp

    def press(dynamics, *arguments):
        """Beside the ramp: a signal at step 3, in the middle of what observers do."""
        heat = made(dynamics, *arguments)
        return lambda: (heat(), signal.raise_signal(number) if dynamics.nsteps == 3 else None)

    with monkeypatch.context() as patch:
        patch.setattr(ase_uq.dynamics.run, "ramp", press)
        found = run(*words)
    assert found.exit_code == 128 + number
    assert "interrupted at step 3; the same command goes on from there" in found.stderr
    assert read("run.xyz", "-1").info["step"] == 3
    again = run(*words)
    assert again.exit_code == 0
    assert "going on from step 3 of 16" in again.stderr
    # The frame of the interruption is there as well.
    frames = read("run.xyz", ":")
    assert [atoms.info["step"] for atoms in frames] == [0, 3, 5, 10, 15, 16]
    assert {name: data for name, data in outputs().items() if name != "run.xyz"} == {
        name: data for name, data in whole.items() if name != "run.xyz"
    }


def test_a_signal_in_the_last_step_comes_too_late(command, run, monkeypatch):
    made = ase_uq.dynamics.run.ramp

    def press(dynamics, *arguments):
        heat = made(dynamics, *arguments)
        return lambda: (heat(), signal.raise_signal(signal.SIGTERM) if dynamics.nsteps == 16 else None)

    monkeypatch.setattr(ase_uq.dynamics.run, "ramp", press)
    found = run(*command())
    assert found.exit_code == 0
    assert "done: 16 steps" in found.stdout
    assert "interrupted at" not in found.stderr


@pytest.mark.parametrize("ensemble", ["langevin", "nve", "bussi", "npt"])
@pytest.mark.parametrize("every", [1, 4])
def test_in_every_ensemble_two_parts_are_one_run(command, files, ensemble, every):
    atoms = read(files.start)
    atoms.set_cell([6, 6, 6])
    atoms.pbc = True
    if ensemble != "npt":
        atoms.set_constraint(FixBondLength(0, 1))
    write("start.traj", atoms)
    words = command("--ensemble", ensemble, "--every", every, "--refractory", 0.6 * every, start="start.traj")
    if ensemble in ("nve", "npt"):
        place = words.index("--temperature-end")
        del words[place : place + 2]
    whole = uninterrupted(words)
    assert ended(words, "nth(9, restart.Restart, 'save', lambda original, *a: original(*a))") == -signal.SIGKILL
    assert ended(words) == 0
    assert outputs() == whole


# --- what is refused -------------------------------------------------------------------------------------


def refused(result) -> str:
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    return " ".join(result.stderr.split())


def test_a_finished_run_is_refused_and_can_be_made_longer(command, run):
    assert run(*command(steps=5)).exit_code == 0
    before = outputs()
    for more in ([], ["--append"]):
        assert "run.xyz is finished: its run has all 5 steps" in refused(run(*command(*more, steps=5)))
    assert "was begun with another --steps (5, now 9)" in refused(run(*command(steps=9)))
    assert outputs() == before
    assert run(*command("--append", steps=9)).exit_code == 0
    assert [atoms.info["step"] for atoms in read("run.xyz", ":")] == [0, 5, 9]


def test_a_halted_run_is_gone_on_with_on_request_only(command, run):
    halted = run(*command("--halt", "q0.5"))
    assert halted.exit_code == 3
    assert "give --append and a higher --halt or a lower --temperature" in halted.stderr
    step = read("run.xyz", "-1").info["step"]
    assert f"was halted at step {step}. To go on from there, give --append" in refused(run(*command("--halt", "q0.5")))
    again = run(*command("--append"))
    assert again.exit_code == 0
    rows = Path("log.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(17))


def test_another_command_structure_or_trajectory_is_refused(command, run, files):
    assert run(*command(steps=5)).exit_code == 0
    assert "was begun with another --temperature (3000.0, now 400.0)" in refused(run(*command("--temperature", 400)))
    other = read(files.start)
    other.positions += 0.01 * np.arange(len(other))[:, None]
    write("other.xyz", other)
    for more in ([], ["--append"]):
        told = refused(run(*command(*more, steps=9, start="other.xyz")))
        assert "run.xyz was begun from another structure than START. Give another trajectory" in told
    os.unlink("run.xyz.restart")
    os.unlink("log.csv")
    for more in ([], ["--append"]):
        for start in (files.start, "run.xyz"):
            told = refused(run(*command(*more, steps=9, start=start)))
            assert "run.xyz exists, and run.xyz.restart, from which its run could go on, does not" in told


def test_the_trajectory_itself_will_do_as_start(command, run):
    assert run(*command(steps=5)).exit_code == 0
    assert run(*command("--append", steps=9, start="run.xyz")).exit_code == 0
    assert [atoms.info["step"] for atoms in read("run.xyz", ":")] == [0, 5, 9]


def test_an_altered_trajectory_or_restart_file_is_refused(command, run):
    assert run(*command(steps=5)).exit_code == 0
    whole, saved = Path("run.xyz").read_bytes(), Path("run.xyz.restart").read_bytes()
    for other in (whole[:-50], whole + b"\n"):
        Path("run.xyz").write_bytes(other)
        told = refused(run(*command("--append", steps=9)))
        assert f"run.xyz was altered since its run came to step 5: it has {len(other)} bytes, not {len(whole)}" in told
    Path("run.xyz").write_bytes(whole)
    for other in (saved[:-9], b"{}", b"[]", b""):
        Path("run.xyz.restart").write_bytes(other)
        assert "run.xyz.restart was not written by this version of ase_uq" in refused(run(*command("--append")))


def test_two_processes_do_not_write_one_trajectory(command, run):
    assert ended(command(), KILLS["after a row"]) == -signal.SIGKILL
    with open("run.xyz", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing run.xyz" in refused(run(*command()))
    assert run(*command()).exit_code == 0


def test_two_processes_do_not_write_one_log(command, run):
    assert ended(command(), KILLS["after a row"]) == -signal.SIGKILL
    with open("log.csv", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing log.csv" in refused(run(*command()))
    assert run(*command()).exit_code == 0


def test_what_cannot_begin_leaves_nothing(command, run, tmp_path):
    assert "calibration frames" in refused(run(*command("--halt", "q0.99999")))
    assert not list(tmp_path.iterdir())


def test_another_model_under_the_same_name_is_refused(command, run, files, tmp_path):
    model = UncertaintyModel.load(files.uq)
    model.save("my.uq.safetensors")
    words = command("--uq", "my.uq.safetensors")
    # Killed after more was written than was saved: what is refused drops nothing of it.
    assert ended(words, KILLS["after a row"], 0.0) == -signal.SIGKILL
    np.multiply(model.record.uncertainty, 1.001, out=model.record.uncertainty)
    model.save("my.uq.safetensors")
    before = outputs()
    assert "was begun with another potential or uncertainty model under the same name" in refused(run(*words))
    assert outputs() == before
    assert run(*words, "--append").exit_code == 0


def test_seconds_at_risk_are_few():
    assert 1 <= saved_run.SECONDS_AT_RISK <= 10


# --- files that runs share -------------------------------------------------------------------------------


def flagged(run: str, step: int) -> Atoms:
    return Atoms("H", info={"run": run, "flag_level": "flag", "flag_step": step, "flag_reason": "x" * 2000})


def test_runs_that_share_a_file_of_flagged_frames_lose_none_of_each_others(tmp_path):
    """One is requeued, and drops what it will make again, while others add to the file."""
    path = tmp_path / "flagged.xyz"
    context = multiprocessing.get_context("fork")

    def add(run):
        for step in range(60):
            write_frames(path, [flagged(run, step)], append=True)

    write_frames(path, [flagged("a", 0)])
    others = [context.Process(target=add, args=(run,)) for run in "bc"]
    for process in others:
        process.start()
    while any(process.is_alive() for process in others):
        write_frames(path, [flagged("a", 7)], append=True)
        drop_frames(path, "a", 3)
    for process in others:
        process.join()
        assert process.exitcode == 0
    found = [(atoms.info["run"], atoms.info["flag_step"]) for atoms in read(path, ":")]
    assert [step for run, step in found if run == "a"] == [0]
    for run in "bc":
        assert [step for name, step in found if name == run] == list(range(60))


def test_rows_of_an_earlier_run_in_the_same_log_stay(tmp_path, files, monkeypatch):
    """A run killed before it had as many steps as the one before."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(saved_run, "SECONDS_AT_RISK", 0.0)

    def go(trajectory: str, steps: int, until: int) -> None:
        with restart.Restart(trajectory, steps) as saved:
            atoms = saved.atoms or read(files.start)
            atoms.calc = UncertainCalculator("toy:", files.uq)
            dynamics = Langevin(
                atoms, 0.5 * units.fs, temperature_K=300, friction=0.01, fixcm=False, rng=np.random.default_rng(steps)
            )
            monitor = saved_run.monitored(dynamics, saved, log="log.csv")
            with suppress(KeyboardInterrupt):
                run_md(dynamics, monitor, steps, restart=saved, after_step=lambda: stop(dynamics.nsteps == until))

    def stop(now: bool) -> None:
        if now:
            raise KeyboardInterrupt

    go("first.xyz", 9, 99)
    first = Path("log.csv").read_bytes()
    go("second.xyz", 8, 99)
    whole = Path("log.csv").read_bytes()
    assert whole.startswith(first)
    os.truncate("log.csv", len(first))
    os.unlink("second.xyz")
    os.unlink("second.xyz.restart")
    go("second.xyz", 8, 4)
    with open("log.csv", "a") as file:
        file.write("5,2.5,0.1,ok\n6,3,0.")  # rows after the step that was saved last, the last one torn
    go("second.xyz", 8, 99)
    assert Path("log.csv").read_bytes() == whole
