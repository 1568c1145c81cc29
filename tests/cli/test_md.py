import csv
import itertools
import re
from types import SimpleNamespace

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.calculator import Calculator, all_changes
from ase.calculators.lj import LennardJones
from ase.constraints import FixAtoms, FixBondLength
from ase.io import read, write

from ase_uq import Quantile, UncertaintyModel, read_frames
from ase_uq.cli import _stopwatch
from ase_uq.sampling.ensembles import MDEnsemble, make_dynamics, set_temperature
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.thresholds.criteria import ErrorBound


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
    assert result.stderr == ""  # no bar, where stderr is no terminal
    frames = read("run.xyz", ":")
    assert [atoms.info["step"] for atoms in frames] == [0, 8, 16, 20]
    assert [atoms.info["time_fs"] for atoms in frames] == pytest.approx([0, 2, 4, 5])
    assert [int(row["step"]) for row in rows("run.csv")] == list(range(21))
    assert all(atoms.has("momenta") for atoms in frames)


def test_a_terminal_shows_a_bar(md, terminal):
    shown = md("--halt", 1000, "--quantity", "gamma", steps=3).stderr
    assert "md: 100%" in shown
    assert re.search(r"\d gamma, \d+ K, .* ns/day", shown)


def test_nothing_flagged_is_an_empty_list(md, run, files, tmp_path):
    """Not a missing file, at which a script would end."""
    assert md("--halt", 1000, "--frames", "flagged.xyz", steps=2).exit_code == 0
    assert (tmp_path / "flagged.xyz").read_bytes() == b""
    assert md("--halt", 1000, "--flag", 1e-6, "--frames", "flagged.xyz", steps=2).exit_code == 0
    before = (tmp_path / "flagged.xyz").read_bytes()
    assert md("--halt", 1000, "--frames", "flagged.xyz", steps=2).exit_code == 0
    assert (tmp_path / "flagged.xyz").read_bytes() == before != b""
    words = ["--model", "toy:", "--uq", files.uq, "--out", "relaxed.xyz", "--steps", 1, "--halt", 1000]
    run("relax", files.start, *words, "--frames", "flagged_too.xyz")
    assert (tmp_path / "flagged_too.xyz").read_bytes() == b""


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


def test_a_longer_run_goes_on_with_the_velocities(md):
    words = ["--halt", 1000, "--trajectory", "run.xyz", "--interval", 5]
    assert md(*words, steps=10).exit_code == 0
    before = read("run.xyz", "-1")
    assert md(*words, "--append", start="run.xyz", steps=20).exit_code == 0
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
    assert "to go on from here, give --append" in halted.stderr
    step = int(rows("run.csv")[-1]["step"])
    again = md("--halt", 1e6, "--flag", 1e-6, *words, "--append", start="run.xyz", steps=step + 5)
    assert again.exit_code == 0
    time = f"{0.25 * (step + 5):.6g}"
    assert again.stdout == f"done: {step + 5} steps, {time} fs; 5 frames flagged, added to flagged.xyz\n"
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
    assert "2 frames added to flagged.xyz" in again.stderr
    assert [atoms.info["step"] for atoms in read("run.xyz", ":")] == [0, 1]


def test_a_run_goes_on_with_its_constraints(md, run, files):
    atoms = read(files.start)
    atoms.set_constraint(FixBondLength(0, 1))
    write("start.traj", atoms)
    words = ["--halt", 1e9, "--trajectory", "run.xyz", "--append"]
    first = md(*words, start="start.traj", steps=2)
    assert first.exit_code == 0
    assert "the constraint FixBondLengths cannot be kept in extended XYZ and is left out" in _joined(first.stderr)
    again = md(*words, start="run.xyz", steps=9)
    assert again.exit_code == 0
    assert "none of them" not in _joined(again.stderr)
    lengths = [frame.get_distance(0, 1) for frame in (atoms, *read("run.xyz", ":"))]
    np.testing.assert_allclose(lengths, lengths[0], atol=1e-6)
    other = md("--halt", 1e9, start="run.xyz", steps=2)
    assert other.exit_code == 0
    assert "this run has none of them" in _joined(other.stderr)
    relaxed = run("relax", "run.xyz", "--model", "toy:", "--uq", files.uq, "--out", "relaxed.xyz", "--steps", 1)
    assert "this run has none of them" in _joined(relaxed.stderr)
    with_them = read("run.xyz")
    with_them.set_constraint(FixBondLength(0, 1))
    write("again.traj", with_them)
    assert "none of them" not in _joined(md("--halt", 1e9, start="again.traj", steps=2).stderr)


def _joined(text):
    return " ".join(text.split())


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


# --- ensembles -------------------------------------------------------------------------------------------


@pytest.fixture
def crystal(files):
    """A file with the start in a periodic box."""
    atoms = read(files.start)
    atoms.set_cell([6, 6, 6])
    atoms.pbc = True
    write("crystal.xyz", atoms)
    return "crystal.xyz"


def test_without_a_thermostat_the_energy_stays(md):
    words = ["--halt", 1e9, "--interval", 1]
    assert md(*words, "--ensemble", "nve", "--trajectory", "nve.xyz", steps=40).exit_code == 0
    assert md(*words, "--ensemble", "bussi", "--thermostat-time", 5, "--trajectory", "nvt.xyz", steps=40).exit_code == 0
    spread = {}
    for name in ("nve.xyz", "nvt.xyz"):
        frames = read(name, ":")
        spread[name] = np.std([atoms.get_total_energy() for atoms in frames])
        assert np.std([atoms.get_kinetic_energy() for atoms in frames]) > 0.01
    assert spread["nve.xyz"] < 0.05 * spread["nvt.xyz"]


class Free(Calculator):
    """No forces; those of a potential without a depth are as zero, and take most of the time."""

    implemented_properties = ["energy", "forces"]  # noqa: RUF012

    def calculate(self, atoms=None, properties=("energy",), system_changes=tuple(all_changes)):
        super().calculate(atoms, list(properties), list(system_changes))
        self.results = {"energy": 0.0, "forces": np.zeros((len(self.atoms), 3))}


def test_bussi_heats_what_moves_to_the_temperature():
    # Free particles: what the thermostat does is all that happens. Of ten atoms 3·10 - 6 degrees of freedom move;
    # their energy is a gamma variable of shape 24/2, so 1200 steps of a fast thermostat know its mean to some 1 %.
    rng = np.random.default_rng(1)
    atoms = Atoms("Ar10", positions=rng.uniform(-50, 50, (10, 3)))
    atoms.calc = Free()
    set_thermal_momenta(atoms, 100, rng)
    options = {"friction": 0.01, "thermostat_time": 1.0, "barostat_time": 1.0, "pressure": 0.0}
    dynamics = make_dynamics(MDEnsemble.bussi, atoms, timestep=1.0, temperature=100, rng=rng, **options)
    energies = [atoms.get_kinetic_energy() for _ in dynamics.irun(1200)]
    assert np.mean(energies[100:]) == pytest.approx(0.5 * 24 * units.kB * 100, rel=0.03)
    set_temperature(dynamics, 300)
    energies = [atoms.get_kinetic_energy() for _ in dynamics.irun(1200)]
    assert np.mean(energies[100:]) == pytest.approx(0.5 * 24 * units.kB * 300, rel=0.03)


@pytest.mark.parametrize(
    ("symbols", "pbc", "drift", "n_heated"),
    [
        ("H3", False, 0, 3),
        ("H3", True, 0, 6),
        ("H3", False, 1, 6),
        ("H3", True, 1, 9),
        ("H", True, 0, 3),
        ("H", False, 0, 3),
    ],
)
def test_degrees_of_freedom_that_a_scaling_thermostat_heats(symbols, pbc, drift, n_heated):
    positions = [(0, 0, 0), (0, 0, 1.1), (0, 0.9, 0.4)]
    atoms = Atoms(symbols, positions=positions[: len(Atoms(symbols))], pbc=pbc, cell=[5, 5, 5])
    atoms.calc = LennardJones(epsilon=0.0)
    set_thermal_momenta(atoms, 300, np.random.default_rng(0))
    atoms.set_momenta(atoms.get_momenta() + drift)
    options = {"friction": 0.01, "thermostat_time": 1.0, "barostat_time": 1.0, "pressure": 0.0}
    rng = np.random.default_rng(0)
    assert make_dynamics(MDEnsemble.bussi, atoms, timestep=1.0, temperature=300, rng=rng, **options).ndof == n_heated


def test_of_two_atoms_only_their_distance_is_heated():
    atoms = Atoms("CO", positions=[(0, 0, 0), (0, 0, 1.1)])
    atoms.calc = LennardJones(epsilon=0.0)
    atoms.set_momenta([(0, 0, 1), (0, 0, -1)])
    options = {"friction": 0.01, "thermostat_time": 1.0, "barostat_time": 1.0, "pressure": 0.0}
    rng = np.random.default_rng(0)
    assert make_dynamics(MDEnsemble.bussi, atoms, timestep=1.0, temperature=300, rng=rng, **options).ndof == 3 * 2 - 5


def test_bussi_follows_the_ramp(md):
    words = ["--trajectory", "run.xyz", "--interval", 1, "--thermostat-time", 2, "--temperature-end", 5000]
    assert md("--halt", 1e9, "--ensemble", "bussi", *words, steps=80).exit_code == 0
    kelvin = [atoms.get_temperature() for atoms in read("run.xyz", ":")]
    assert np.mean(kelvin[:20]) < 1500
    assert np.mean(kelvin[-20:]) > 2000


def test_pressure_makes_a_cell_smaller(md, crystal):
    words = ["--halt", 1e9, "--ensemble", "npt", "--barostat-time", 50, "--interval", 1]
    volumes = {}
    for pressure in (0, 1):
        name = f"{pressure}.xyz"
        assert md(*words, "--pressure", pressure, "--trajectory", name, start=crystal, steps=40).exit_code == 0
        frames = read(name, ":")
        volumes[pressure] = [atoms.get_volume() for atoms in frames]
        shapes = [atoms.cell.array / np.cbrt(atoms.get_volume()) for atoms in frames]
        np.testing.assert_allclose(shapes, np.broadcast_to(np.eye(3), (len(shapes), 3, 3)), atol=1e-6)
    assert volumes[0][0] == volumes[1][0] == pytest.approx(216)
    assert volumes[1][-1] < 216 < volumes[0][-1]


@pytest.mark.parametrize("ensemble", ["langevin", "nve", "bussi", "npt"])
def test_in_every_ensemble_a_halted_run_goes_on(md, crystal, ensemble):
    words = ["--ensemble", ensemble, "--trajectory", "run.xyz", "--interval", 1]
    halted = md("--halt", 1e-6, *words, start=crystal)
    assert halted.exit_code == 3
    assert md("--halt", 1e9, *words, "--append", start="run.xyz", steps=3).exit_code == 0
    frames = read("run.xyz", ":")
    assert [atoms.info["step"] for atoms in frames] == [0, 1, 2, 3]
    assert [atoms.info["time_fs"] for atoms in frames] == pytest.approx([0, 0.25, 0.5, 0.75])
    # With its velocities: where they take it.
    moved = frames[1].get_scaled_positions() - frames[0].get_scaled_positions()
    expected = frames[0].get_velocities() * 0.25 * units.fs
    assert np.corrcoef(moved.ravel(), expected.ravel())[0, 1] > 0.95


# --- what else is watched --------------------------------------------------------------------------------


def test_uncertainties_of_each_nth_step_and_what_that_saved(md):
    words = ["--halt", 1e9, "--log", "run.csv", "--trajectory"]
    result = md(*words, "run.xyz", "--interval", 1, "--every", 4)
    assert result.exit_code == 0
    assert [int(row["step"]) for row in rows("run.csv")] == [0, 4, 8, 12, 16, 20]
    with_them = [atoms.info["step"] for atoms in read("run.xyz", ":") if "forces_uncertainty" in atoms.arrays]
    assert with_them == [0, 4, 8, 12, 16, 20]
    assert "nan eV/Å" not in result.stderr
    saved = result.stdout.splitlines()[0]
    assert re.fullmatch(
        r"steps took \S+ ms with uncertainties and \S+ ms without; "
        r"computing them only every 4 steps (saved|cost) \S+% of the time",
        saved,
    )
    # The run is the same.
    assert md("--halt", 1e9, "--trajectory", "all.xyz").exit_code == 0
    np.testing.assert_array_equal(read("run.xyz", "-1").positions, read("all.xyz", "-1").positions)


def test_what_was_saved_is_counted_from_the_times(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(_stopwatch, "perf_counter", lambda: now[0])
    calculator = SimpleNamespace(results={})
    watch = _stopwatch.Stopwatch(calculator)
    watch.stop()  # ASE shows the first structure before a step was made
    # The first step of either kind takes long; of the others the bare ones take 6 ms, those with uncertainties 10.
    for step, seconds in enumerate([9.0, 5.0, 0.006, 0.006, 0.010, 0.006, 0.006, 0.006]):
        calculator.results = {"forces_uncertainty": 0} if step % 4 == 0 else {}
        watch.start()
        now[0] += seconds
        watch.stop()
        now[0] += 100  # what observers do is nobody's saving
    # Six of eight steps took 60 % of the time that they would have.
    assert watch.saved(4) == (
        "steps took 10 ms with uncertainties and 6 ms without; "
        "computing them only every 4 steps saved 30.0% of the time"
    )


def test_of_too_few_steps_nothing_is_said_to_be_saved(md):
    result = md("--halt", 1e9, "--every", 4, steps=3)
    assert result.stdout.splitlines()[0] == "too few steps to say what --every saved"


def test_what_thresholds_mean_is_told_at_the_start(md, files):
    result = md("--flag", "q0.5", "--halt", "bound=0.9@1000", steps=2)
    assert result.exit_code == 0
    model = UncertaintyModel.load(files.uq)
    told = [line for line in result.stderr.splitlines() if line.startswith(("flag:", "halt:"))]
    assert told == [
        f"flag: {model.threshold(Quantile(0.5)).describe()}",
        f"halt: {model.threshold(ErrorBound(1000, confidence=0.9)).describe()}",
    ]


def test_each_element_has_its_threshold(md):
    result = md("--halt", "q0.5", "--per-element", temperature=3000, steps=500)
    assert result.exit_code == 3
    told = [line.split(":")[0] for line in result.stderr.splitlines() if line.startswith("halt of")]
    assert told == ["halt of C", "halt of O", "halt of H"]


def test_at_once_does_not_wait(md):
    words = ["--patience", 3, "--log", "run.csv"]
    assert md("--halt", 1e-6, "--at-once", 1e-5, *words).exit_code == 3
    assert [row["level"] for row in rows("run.csv")] == ["halt"]


def test_after_a_flag_there_is_a_pause(md):
    # 20 steps of 0.25 fs, each above the flag: flagged at 0, 2 and 4 fs.
    result = md("--flag", 1e-6, "--refractory", 2, "--frames", "flagged.xyz")
    assert result.exit_code == 0
    steps = [atoms.info["flag_step"] for atoms in read("flagged.xyz", ":")]
    assert len(steps) in (2, 3)
    assert all(later - earlier >= 8 for earlier, later in itertools.pairwise(steps))


def test_frames_before_an_alarm_are_kept(md):
    result = md("--halt", "q0.9", "--before", 3, "--frames", "flagged.xyz", temperature=3000, steps=500)
    assert result.exit_code == 3
    assert "1 frame added to flagged.xyz (and those before them)" in result.stderr
    frames = read("flagged.xyz", ":")
    last = frames[-1].info["flag_step"]
    assert [atoms.info["flag_level"] for atoms in frames] == [*["before"] * min(3, last), "halt"]
    assert [atoms.info["flag_step"] for atoms in frames] == list(range(max(0, last - 3), last + 1))


def test_hot_atoms_halt_it(md):
    result = md("--halt", 1e9, "--max-temperature", 100, temperature=3000)
    assert result.exit_code == 3
    assert "MaxTemperature: temperature is" in result.stderr
    assert "more than 100 K" in result.stderr


def test_broken_bonds_halt_it(md):
    assert md("--halt", 1e9, temperature=1e6, steps=40).exit_code == 0
    result = md("--halt", 1e9, "--bonds", temperature=1e6, steps=40)
    assert result.exit_code == 3
    assert "Bonds: " in result.stderr


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
        (["--halt", 1, "--timestep", 0], "0.0 is not a positive number"),
        (["--halt", 1, "--timestep", "inf"], "inf is not a positive number"),
        (["--halt", 1, "--temperature-end", "inf"], "inf is not a temperature"),
        (["--halt", 1, "--friction", -1], "-1.0 is not a positive number"),
        (["--halt", 1, "--interval", 0], "--interval"),
        (["--halt", -1], "a threshold is a positive number in eV/Å, not -1"),
        (["--flag", 0], "a threshold is a positive number in eV/Å, not 0"),
        (["--halt", "nan"], "a threshold is a positive number in eV/Å, not nan"),
        (["--halt", 0.2, "--flag", 0.3], "flag is 0.3 eV/Å and halt is 0.2 eV/Å, so no frame lies between"),
        (["--halt", 0.2, "--flag", 0.2], "flag is 0.2 eV/Å and halt is 0.2 eV/Å, so no frame lies between"),
        (["--halt", 1, "--reduce", "median"], "'median' is not a reduction. Give max, mean, top3"),
        (["--halt", 1, "--reduce", "0.x"], "'0.x' is not a reduction. Give max, mean, top3"),
        (["--halt", 1, "--reduce", "0"], "'0' is not a reduction. Give max, mean, top3"),
        (["--halt", 1, "--every", 0], "--every"),
        (["--halt", 1, "--max-temperature", 0], "0.0 is not a positive number"),
        (["--halt", 1, "--ensemble", "nph"], "'nph' is not one of"),
        (["--halt", 1, "--ensemble", "npt", "--barostat-time", 0], "0.0 is not a positive number"),
        (["--halt", 1, "--ensemble", "bussi", "--thermostat-time", -2], "-2.0 is not a positive number"),
        (["--halt", 1, "--pressure", 1], "belongs to --ensemble npt, not to langevin. Leave it out"),
        (["--halt", 1, "--thermostat-time", 1], "belongs to --ensemble bussi and npt, not to langevin"),
        (
            ["--halt", 1, "--ensemble", "bussi", "--barostat-time", 9],
            "belongs to --ensemble npt, not to bussi",
        ),
        (["--halt", 1, "--ensemble", "nve", "--friction", 1], "belongs to --ensemble langevin, not to nve"),
        (
            ["--halt", 1, "--ensemble", "nve", "--temperature-end", 9],
            "belongs to --ensemble langevin and bussi",
        ),
        (["--halt", 1, "--per-element"], "--per-element needs a criterion"),
        (["--halt", 1, "--before", 2], "the frames before a flagged one are saved to --frames: give it too"),
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
        (["--halt", 1, "--at-once", 2], "patience is not given"),
        (["--halt", 1, "--refractory", 5], "refractory belongs to flag"),
        (["--halt", "alarms=0.1@9ps"], "the uncertainty model has none. Make them with `ase-uq reference`"),
        (["--halt", 1, "--ensemble", "npt"], "START is not periodic along all three vectors"),
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


def test_a_scaling_thermostat_needs_something_to_scale(md, files):
    atoms = read(files.start)
    atoms.set_momenta(np.zeros((len(atoms), 3)))
    write("still.xyz", atoms)
    result = md("--halt", 1, "--ensemble", "bussi", start="still.xyz")
    assert result.exit_code == 1
    assert "Bussi's thermostat scales velocities, but all of them are zero at the start" in result.stderr


def test_npt_takes_no_constraints_but_a_temperature_and_a_pressure(md, crystal):
    result = md("--halt", 1, "--ensemble", "npt", start=crystal, temperature=0)
    assert result.exit_code == 1
    assert "--ensemble npt needs a --temperature above 0 K, not 0 K" in result.stderr
    result = md("--halt", 1, "--ensemble", "npt", "--pressure", "nan", start=crystal)
    assert (result.exit_code, result.stderr) == (1, "error: --pressure is a number in GPa, not nan.\n")
    atoms = read(crystal)
    atoms.set_constraint(FixAtoms([0]))
    write("fixed.xyz", atoms)
    result = md("--halt", 1, "--ensemble", "npt", start="fixed.xyz")
    assert result.exit_code == 1
    assert "--ensemble npt of ASE does not support constraints, but START has some" in result.stderr


def test_npt_needs_a_stress():
    atoms = Atoms("H", cell=[5, 5, 5], pbc=True, calculator=SimpleNamespace(implemented_properties=["energy"]))
    options = {"friction": 0.01, "thermostat_time": 1.0, "barostat_time": 1.0, "pressure": 0.0, "rng": None}
    with pytest.raises(ValueError, match="npt needs the stress, which this potential does not give"):
        make_dynamics(MDEnsemble.npt, atoms, timestep=1.0, temperature=300, **options)


def test_a_start_that_is_not_there(md):
    result = md("--halt", 1, start="no.xyz")
    assert (result.exit_code, result.stderr) == (1, "error: START: there is no file no.xyz.\n")


def test_other_quantities_halt_and_are_told(md):
    halted = md("--quantity", "gamma", "--flag", 1e-7, "--halt", 1e-6)
    assert halted.exit_code == 3
    assert "gamma (max) " in halted.stderr
    assert "reached halt at 1e-06 by" in halted.stderr
    refused = md("--quantity", "energy", "--halt", "q0.9")
    assert refused.exit_code == 1
    assert "it is no threshold of energy. Give a number in eV." in refused.stderr
    wrong = md("--quantity", "gamma", "--flag", 2, "--halt", 1)
    assert wrong.exit_code == 2
    assert "flag is 2 and halt is 1, so no frame lies between" in " ".join(wrong.stderr.replace("│", "").split())


def test_without_thresholds_it_only_logs(md):
    result = md("--log", "run.csv", steps=3)
    assert result.exit_code == 0
    assert [row["level"] for row in rows("run.csv")] == ["ok"] * 4
    assert all(float(row["reading"]) > 0 for row in rows("run.csv"))


@pytest.mark.parametrize(
    "words", [["--frames", "out.xyz", "--trajectory", "out.xyz"], ["--trajectory", "out.xyz", "--log", "out.xyz"]]
)
def test_outputs_that_are_each_other_are_refused(md, words):
    result = md("--halt", 1, *words)
    assert result.exit_code == 1
    assert "out.xyz is given for two outputs" in result.stderr


def test_the_start_is_no_output(md, files):
    result = md("--halt", 1, "--frames", files.start)
    assert result.exit_code == 1
    assert "start.xyz is the input: it would be overwritten" in result.stderr
