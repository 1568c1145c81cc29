import csv

import numpy as np
import pytest
from ase import Atoms, units
from ase.io import read, write

from ase_uq import Quantile, UncertaintyModel, read_frames


@pytest.fixture
def md(run, files):
    def md(*words, start=files.start, steps=20, temperature=300):
        options = ["--temperature", temperature, "--steps", steps, "--timestep", 0.25]
        return run("md", start, "--model", "toy:", "--uq", files.uq, *options, *words)

    return md


def rows(path):
    with open(path) as file:
        return list(csv.DictReader(file))


def test_a_quiet_run_ends_well(md, tmp_path):
    result = md("--halt", 1000, "--trajectory", "run.xyz", "--interval", 8, "--log", "run.csv")
    assert result.exit_code == 0
    assert result.stdout == "done: 20 steps, 5 fs; 0 frames flagged\n"
    assert "md: 100%" in result.stderr
    assert "ns/day" in result.stderr
    frames = read("run.xyz", ":")
    assert [atoms.info["step"] for atoms in frames] == [0, 8, 16, 20]
    assert [atoms.info["time_fs"] for atoms in frames] == pytest.approx([0, 2, 4, 5])
    assert [int(row["step"]) for row in rows("run.csv")] == list(range(21))
    assert all(atoms.has("momenta") for atoms in frames)


def test_nothing_of_the_start_stands_beside_later_positions(md, files):
    assert "REF_forces" in read(files.start).arrays
    assert md("--halt", 1000, "--flag", 1e-6, "--frames", "flagged.xyz").exit_code == 0
    for atoms in read("flagged.xyz", ":"):
        assert "REF_forces" not in atoms.arrays
        assert "REF_energy" not in atoms.info


def test_a_halted_run(md, files, tmp_path):
    start = read(files.start)
    words = ["--trajectory", "run.xyz", "--interval", 7, "--frames", "flagged.xyz", "--log", "run.csv"]
    result = md("--flag", "q0.5", "--halt", "q0.9", *words, temperature=3000, steps=500)
    assert result.exit_code == 3
    assert result.stdout == ""
    log, frames, flagged = rows("run.csv"), read_frames("run.xyz"), read_frames("flagged.xyz")
    step = int(log[-1]["step"])
    assert 0 < step < 500
    assert log[-1]["level"] == "halt"
    halt = UncertaintyModel.load(files.uq).threshold(Quantile(0.9))
    message = next(line for line in result.stderr.splitlines() if line.startswith("halted"))
    assert message.startswith(f"halted at step {step}, {step * 0.25:.6g} fs: ")
    assert f"reached halt at {halt:.4g} eV/A" in message
    assert "worst atom" in message
    assert f"{len(flagged)} frames added to flagged.xyz" in result.stderr
    assert len(flagged) == sum(row["level"] != "ok" for row in log)
    assert frames[-1].info["step"] == flagged[-1].info["flag_step"] == step
    assert [atoms.info["step"] for atoms in frames] == [*range(0, step, 7), step]
    assert not np.allclose(frames[-1].positions, start.positions)


def test_a_run_goes_on_from_its_trajectory(md):
    words = ["--halt", 1000, "--trajectory", "run.xyz", "--interval", 5]
    assert md(*words, steps=10).exit_code == 0
    before = read("run.xyz", "-1")
    refused = md(*words, start="run.xyz", steps=10)
    assert refused.exit_code == 1
    assert "run.xyz exists. Give another name, or --append" in refused.stderr
    assert md(*words, "--append", start="run.xyz", steps=10).exit_code == 0
    frames = read("run.xyz", ":")
    # The shared frame is there once.
    assert [atoms.info["step"] for atoms in frames] == [0, 5, 10, 15, 20]
    assert [atoms.info["time_fs"] for atoms in frames] == pytest.approx([0, 1.25, 2.5, 3.75, 5])
    # With the velocities: five steps later, atoms are about where they take them.
    moved = frames[3].positions - before.positions
    expected = before.get_velocities() * 5 * 0.25 * units.fs
    assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.9


def test_a_halted_run_goes_on_where_it_was_halted(md):
    words = ["--trajectory", "run.xyz", "--interval", 1, "--frames", "flagged.xyz", "--log", "run.csv"]
    halted = md("--halt", "q0.9", *words, temperature=3000, steps=500)
    assert halted.exit_code == 3
    assert "1 frame added to flagged.xyz" in halted.stderr
    assert "start from it with --trajectory run.xyz --append" in halted.stderr
    step = int(rows("run.csv")[-1]["step"])
    again = md("--halt", 1e6, "--flag", 1e-6, *words, "--append", start="run.xyz", steps=5)
    assert again.exit_code == 0
    assert again.stdout == "done: 5 steps, 1.25 fs; 5 frames flagged, added to flagged.xyz\n"
    log, frames, flagged = rows("run.csv"), read("run.xyz", ":"), read("flagged.xyz", ":")
    assert [int(row["step"]) for row in log] == list(range(step + 6))
    assert [float(row["time_fs"]) for row in log] == pytest.approx([0.25 * n for n in range(step + 6)])
    assert [atoms.info["step"] for atoms in frames] == list(range(step + 6))
    assert [atoms.info["time_fs"] for atoms in frames] == pytest.approx([0.25 * n for n in range(step + 6)])
    assert [atoms.info["flag_step"] for atoms in flagged] == list(range(step, step + 6))


def test_a_run_that_goes_on_halts_at_a_later_step(md):
    words = ["--halt", 1e-6, "--trajectory", "run.xyz", "--frames", "flagged.xyz"]
    assert md(*words).exit_code == 3
    again = md(*words, "--append", start="run.xyz")
    assert again.exit_code == 3
    assert "halted at step 1, 0.25 fs" in again.stderr
    assert "1 frame added to flagged.xyz" in again.stderr
    assert [atoms.info["step"] for atoms in read("run.xyz", ":")] == [0, 1]


def test_a_run_that_goes_on_draws_other_noise(md, files):
    # Two steps from rest without forces to speak of: the velocities are the noise of the thermostat.
    words = ["--halt", 1e9, "--trajectory", "run.xyz", "--append", "--friction", 1]
    atoms = read(files.start)
    atoms.set_momenta(np.zeros((len(atoms), 3)))
    write("still.xyz", atoms)
    assert md(*words, start="still.xyz", steps=1).exit_code == 0
    first = read("run.xyz", "-1").get_momenta()
    still = read("run.xyz", "-1")
    still.positions, still.info = atoms.positions, {"step": 1, "time_fs": 0.25}
    still.set_momenta(np.zeros((len(atoms), 3)))
    write("run.xyz", still)
    assert md(*words, start="run.xyz", steps=1).exit_code == 0
    assert np.abs(read("run.xyz", "-1").get_momenta() - first).max() > 0.1 * np.abs(first).max()


def test_a_trajectory_that_no_run_has_written_is_gone_on_from_its_only_frame(md, files):
    write("run.xyz", read(files.start))
    words = ["--halt", 1e9, "--trajectory", "run.xyz", "--append", "--interval", 1, "--log", "run.csv"]
    assert md(*words, start="run.xyz", steps=2).exit_code == 0
    assert [atoms.info.get("step") for atoms in read("run.xyz", ":")] == [None, 1, 2]
    assert [int(row["step"]) for row in rows("run.csv")] == [0, 1, 2]


@pytest.mark.parametrize("symbols", ["O", "CO"])
def test_few_atoms_have_velocities_too(md, symbols):
    write("few.xyz", Atoms(symbols, positions=[(0, 0, 1.2 * n) for n in range(len(symbols))]))
    result = md("--halt", 1e9, "--trajectory", "run.xyz", start="few.xyz", steps=2)
    assert result.exit_code == 0
    assert "nan K" not in result.stderr
    momenta = read("run.xyz", "0").get_momenta()
    assert np.isfinite(momenta).all()
    assert momenta.any()


def test_the_same_seed_gives_the_same_run(md):
    for name, seed in (("a.csv", 1), ("b.csv", 1), ("c.csv", 2)):
        md("--halt", 1000, "--log", name, "--seed", seed)
    readings = [[row["reading"] for row in rows(name)] for name in ("a.csv", "b.csv", "c.csv")]
    assert readings[0] == readings[1] != readings[2]


def test_velocities_of_the_start_are_used(md, files):
    atoms = read(files.start)
    atoms.set_momenta(np.zeros((len(atoms), 3)))
    write("still.xyz", atoms)
    md("--halt", 1000, "--trajectory", "run.xyz", start="still.xyz", temperature=0, steps=1)
    assert read("run.xyz", "0").get_kinetic_energy() == 0


def test_the_thermostat_follows_the_ramp(md, files):
    # A friction of 1/fs makes the atoms follow within a few steps.
    words = ["--trajectory", "run.xyz", "--interval", 1, "--friction", 1, "--temperature-end", 5000]
    assert md("--halt", 1e9, *words, steps=80).exit_code == 0
    kelvin = [atoms.get_temperature() for atoms in read("run.xyz", ":")]
    assert np.mean(kelvin[:20]) < 1500
    assert np.mean(kelvin[-20:]) > 2500


def test_patience_and_reduction_reach_the_monitor(md):
    result = md("--halt", 1e-6, "--patience", 2, "--reduce", "0.9", "--log", "run.csv")
    assert result.exit_code == 3
    # 2 fs of patience at 0.25 fs a step: halted at the first step after them.
    assert [row["level"] for row in rows("run.csv")].index("halt") in (8, 9)
    assert "(0.9)" in result.stderr


@pytest.mark.parametrize(
    ("words", "part"),
    [
        ([], "give one of them or both"),
        (["--halt", "hot"], "'hot' is neither a number in eV/Å"),
        (["--halt", "q1.5"], "'q1.5' is neither a number in eV/Å"),
        (["--halt", 1, "--timestep", 0], "0.0 is not positive"),
        (["--halt", 1, "--friction", -1], "-1.0 is not positive"),
        (["--halt", 1, "--interval", 0], "--interval"),
        (["--halt", -1], "a threshold is a positive number in eV/Å, not -1"),
        (["--flag", 0], "a threshold is a positive number in eV/Å, not 0"),
        (["--halt", "nan"], "a threshold is a positive number in eV/Å, not nan"),
        (["--halt", 0.2, "--flag", 0.3], "0.3 eV/Å is not below --halt, 0.2 eV/Å"),
        (["--halt", 0.2, "--flag", 0.2], "0.2 eV/Å is not below --halt, 0.2 eV/Å"),
        (["--halt", 1, "--reduce", "median"], "'median' is none of max, mean and top3, nor a quantile"),
        (["--halt", 1, "--reduce", "0.x"], "'0.x' is none of max, mean and top3, nor a quantile"),
        (["--halt", 1, "--reduce", "0"], "'0' is none of max, mean and top3, nor a quantile"),
        (["--halt", 1, "--trajectory", "run.traj"], "give a name that ends in .xyz or .extxyz"),
        (["--halt", 1, "--frames", "flagged"], "give a name that ends in .xyz or .extxyz"),
    ],
)
def test_wrong_usage(md, words, part):
    result = md(*words)
    assert result.exit_code == 2
    assert part in " ".join(result.stderr.replace("│", "").split())


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["--halt", "q0.9999"], "calibration frames"),
        (["--flag", 1, "--patience", 5], "patience belongs to halt"),
        (["--halt", 1, "--trajectory", "no/run.xyz"], "cannot write no/run.xyz: No such file or directory. Choose"),
        (["--halt", 1, "--frames", "no/flagged.xyz"], "no/flagged.xyz cannot be written"),
        (["--halt", 1, "--device", "gpu9"], "device is 'gpu9'"),
        (["--halt", 1, "--dtype", "float16"], "dtype is 'float16'"),
    ],
)
def test_what_is_refused_is_one_line(md, words, part):
    result = md(*words)
    assert result.exit_code == 1
    assert result.stderr.startswith("error: ")
    assert part in result.stderr
    assert len(result.stderr.splitlines()) == 1


def test_a_start_that_is_not_there(md):
    result = md("--halt", 1, start="no.xyz")
    assert (result.exit_code, result.stderr) == (1, "error: START: there is no file no.xyz.\n")
