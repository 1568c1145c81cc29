"""Other people's tools, each on a real run: results are the bare potential's, and the uncertainties can be had.

A tool that is not installed skips its tests: `pip install phonopy matcalc ipi janus-core`.
"""

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
import uuid
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule
from ase.io import read, write

from ase_uq import (
    UncertainCalculator,
    UncertaintyMonitor,
    WatchedCalculator,
    embedded,
    load_backend,
    propagation,
    read_frames,
)
from ase_uq.engines.ase.bias import UncertaintyBias
from ase_uq.errors import InputError, MissingDependency, UncertaintyHalt, UQWarning
from ase_uq.io.results import annotated
from ase_uq.testing.backends import count_forwards


@pytest.fixture(scope="module")
def bare() -> Any:
    return load_backend("embedded:mace", device="cpu").calculator


@pytest.fixture
def calculator(bare: Any) -> UncertainCalculator:
    return UncertainCalculator(bare, embedded.path("mace.uq.safetensors"))


def water_in_a_box() -> Atoms:
    """Few atoms, and so few displacements."""
    atoms = molecule("H2O", cell=(7.0, 7.5, 8.0), pbc=True)
    atoms.center()
    return atoms


def molecule_in(cell: Sequence[float] | None = (7.0, 7.5, 8.0)) -> Atoms:
    """The molecule in a periodic box, or in vacuum."""
    atoms = read(embedded.path("malonaldehyde.xyz"))
    return Atoms(atoms.numbers, atoms.positions, cell=cell, pbc=cell is not None)


def attached(atoms: Atoms, calculator: Any) -> Atoms:
    atoms.calc = calculator
    return atoms


def test_properties_of_ase_are_those_it_knows(bare: Any, calculator: UncertainCalculator):
    atoms = molecule_in()
    found = attached(atoms, calculator).get_properties(["energy", "forces", "stress"])
    assert set(found) == {"energy", "free_energy", "energies", "forces", "stress", "natoms"}
    attached(atoms, bare)
    np.testing.assert_array_equal(found["forces"], atoms.get_forces())
    np.testing.assert_array_equal(found["stress"], atoms.get_stress())
    watched = attached(molecule_in(), WatchedCalculator(calculator, halt=10.0)).get_properties(["energy", "forces"])
    np.testing.assert_array_equal(watched["forces"], found["forces"])
    with pytest.warns(UQWarning, match="not physical dynamics"):
        bias = UncertaintyBias(calculator, height=0.1, width=0.02)
    assert set(attached(molecule_in(), bias).get_properties(["energy", "forces"])) <= set(found)


# phonopy


def phonopy_run(calculator: Any) -> tuple[np.ndarray, list[np.ndarray]]:
    """Force constants, and the force uncertainties of each displaced supercell where there are any."""
    from phonopy import Phonopy
    from phonopy.structure.atoms import PhonopyAtoms

    atoms = water_in_a_box()
    cell = PhonopyAtoms(symbols=atoms.get_chemical_symbols(), positions=atoms.positions, cell=atoms.cell.array)
    phonon = Phonopy(cell, supercell_matrix=np.eye(3), primitive_matrix="P")
    phonon.generate_displacements(distance=0.01)
    forces, uncertainties = [], []
    for displaced in phonon.supercells_with_displacements:
        supercell = Atoms(displaced.symbols, displaced.positions, cell=displaced.cell, pbc=True, calculator=calculator)
        forces.append(supercell.get_forces())
        if "forces_uncertainty" in calculator.results:
            uncertainties.append(calculator.results["forces_uncertainty"])
    phonon.forces = forces
    phonon.produce_force_constants()
    return phonon.force_constants, uncertainties


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # spglib, of phonopy 2
def test_phonopy_gets_the_bare_force_constants_and_an_uncertainty_of_each_displacement(
    bare: Any, calculator: UncertainCalculator
):
    pytest.importorskip("phonopy")
    expected, none = phonopy_run(bare)
    constants, uncertainties = phonopy_run(calculator)
    np.testing.assert_array_equal(constants, expected)
    assert not none
    # A molecule in a box keeps its mirror planes: fewer than two displacements of each coordinate.
    assert 2 * 3 <= len(uncertainties) < 3 * 6
    assert all(u.shape == (3, 3) and (u > 0).all() for u in uncertainties)
    assert len({u.tobytes() for u in uncertainties}) == len(uncertainties)


# matcalc


def test_matcalc_relaxes_to_the_bare_minimum(bare: Any, calculator: UncertainCalculator, tmp_path: Path):
    matcalc = pytest.importorskip("matcalc")

    def relaxed(calculator: Any) -> dict[str, Any]:
        return matcalc.RelaxCalc(calculator, fmax=0.05, relax_cell=False, traj_file=str(tmp_path / "relax.traj")).calc(
            molecule_in()
        )

    expected, found = relaxed(bare), relaxed(calculator)
    assert expected["is_converged"]
    for key in ("energy", "forces", "stress"):
        np.testing.assert_array_equal(found[key], expected[key])
    # They are of the final structure: asking for it again costs nothing.
    final = found["final_structure"].to_ase_atoms()
    assert not calculator.calculation_required(attached(final, calculator), ["forces_uncertainty"])
    assert len(read(tmp_path / "relax.traj", ":")) > 2


# A crystal that nobody relaxed.
@pytest.mark.filterwarnings("ignore:Elastic strain-stress fits:RuntimeWarning")
def test_matcalc_gets_the_bare_elastic_tensor(bare: Any, calculator: UncertainCalculator):
    matcalc = pytest.importorskip("matcalc")

    def tensor(calculator: Any) -> np.ndarray:
        # So close that the molecules feel their images in every direction.
        crystal = molecule_in((5.0, 4.5, 3.5))
        return matcalc.ElasticityCalc(
            calculator, relax_structure=False, norm_strains=(-0.01, 0.01), shear_strains=(-0.02, 0.02)
        ).calc(crystal)["elastic_tensor"]

    np.testing.assert_array_equal(tensor(calculator), tensor(bare))


# A molecule that nobody relaxed.
@pytest.mark.filterwarnings("ignore:.*acoustic .* at Gamma")
def test_matcalc_phonons_leave_a_record_of_every_displaced_supercell(bare: Any, calculator: UncertainCalculator):
    matcalc = pytest.importorskip("matcalc")

    def phonons(calculator: Any) -> dict[str, Any]:
        return matcalc.PhononCalc(
            calculator,
            relax_structure=False,
            supercell_matrix=np.eye(3, dtype=int),
            t_max=100,
            t_step=50,
            write_phonon=False,
        ).calc(water_in_a_box())

    watched = WatchedCalculator(calculator, halt=10.0)
    expected, found = phonons(bare), phonons(watched)
    np.testing.assert_array_equal(found["phonon"].force_constants, expected["phonon"].force_constants)
    n_displaced = len(found["phonon"].supercells_with_displacements)
    readings = [record.reading for record in watched.records]
    assert len(readings) >= n_displaced > 0
    assert all(0 < reading < 10 for reading in readings)


# janus-core


@pytest.fixture
def in_tmp(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in: janus-core writes into the one it finds itself in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.usefixtures("in_tmp")
def test_janus_single_point_is_the_bare_one(bare: Any, calculator: UncertainCalculator):
    single_point = pytest.importorskip("janus_core.calculations.single_point")
    expected = single_point.SinglePoint(struct=attached(molecule_in(), bare)).run()
    calculation = single_point.SinglePoint(struct=attached(molecule_in(), calculator))
    found = calculation.run()
    for key in ("energy", "forces", "stress"):
        np.testing.assert_array_equal(found[key], expected[key])
    assert calculation.struct.calc.results["forces_uncertainty"].shape == (9, 3)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # spglib, of janus-core
@pytest.mark.usefixtures("in_tmp")
def test_janus_relaxation_ends_at_the_bare_minimum(bare: Any, calculator: UncertainCalculator):
    geom_opt = pytest.importorskip("janus_core.calculations.geom_opt")

    def relaxed(calculator: Any) -> Atoms:
        calculation = geom_opt.GeomOpt(struct=attached(molecule_in(), calculator), fmax=0.05, filter_class=None)
        calculation.run()
        return calculation.struct

    found = relaxed(calculator)
    np.testing.assert_array_equal(found.positions, relaxed(bare).positions)
    assert np.abs(found.positions - molecule_in().positions).max() > 0.001
    assert found.calc.results["forces_uncertainty"].shape == (9, 3)


@pytest.mark.filterwarnings("ignore:The implementation of `fixcm=True`:FutureWarning")  # ASE, of janus-core's Langevin
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # ASE, of janus-core
@pytest.mark.filterwarnings("ignore:Skipping unhashable information:UserWarning")  # ASE, of janus-core's info
def test_janus_md_goes_as_the_bare_one_and_takes_a_monitor(bare: Any, calculator: UncertainCalculator, in_tmp: Path):
    md = pytest.importorskip("janus_core.calculations.md")

    def run(calculator: Any, **levels: Any) -> np.ndarray:
        calculation = md.NVT(struct=attached(molecule_in(), calculator), steps=6, temp=300, timestep=0.5, seed=1)
        if levels:
            calculation.dyn.attach(UncertaintyMonitor(calculation.dyn, **levels))
        calculation.run()
        return calculation.struct.positions

    found = run(calculator, flag=1e-6, halt=10.0, frames="flagged.xyz")
    np.testing.assert_array_equal(found, run(bare))
    flagged = read_frames(in_tmp / "flagged.xyz")
    assert len(flagged) == 7
    assert all(atoms.calc.results["forces_uncertainty"].shape == (9, 3) for atoms in flagged)
    with pytest.raises(UncertaintyHalt, match="halted at step 0 "):
        run(calculator, halt=1e-6)


# i-PI

INPUT = """
<simulation verbosity='low' floatformat='%20.12e'>
  <output prefix='run'>
    <trajectory filename='positions' format='ase'> positions </trajectory>
    <trajectory filename='forces' format='ase'> forces </trajectory>
    <trajectory filename='forces_uncertainty' extra_type='forces_uncertainty'> extras </trajectory>
    <trajectory filename='energy_uncertainty' extra_type='energy_uncertainty'> extras </trajectory>
  </output>
  <total_steps>4</total_steps>
  <prng><seed>1</seed></prng>
  FORCEFIELD
  <system>
    <initialize nbeads='BEADS'>
      <file mode='ase'> start.xyz </file>
      <velocities mode='thermal' units='kelvin'> 300 </velocities>
    </initialize>
    <forces> <force forcefield='uq'/> </forces>
    <ensemble> <temperature units='kelvin'> 300 </temperature> </ensemble>
    <motion mode='dynamics'>
      <dynamics mode='nvt'>
        <timestep units='femtosecond'> 0.5 </timestep>
        <thermostat mode='pile_g'> <tau units='femtosecond'> 100 </tau> </thermostat>
      </dynamics>
    </motion>
  </system>
</simulation>
"""
SOCKET = "<ffsocket name='uq' mode='unix'> <address>ADDRESS</address> </ffsocket>"
CLIENT = ("i-pi-py_driver", "-u", "-a", "ADDRESS", "-m", "custom", "-P")
PARAMETERS = "template=start.xyz,model=embedded:mace,uq=my.uq.safetensors"
DIRECT = """<ffdirect name='uq'>
    <pes>custom</pes> <pes_path>DRIVER</pes_path> <batch_size>2</batch_size>
    <parameters>{template: start.xyz, model: embedded:mace, uq: my.uq.safetensors}</parameters>
  </ffdirect>"""


@pytest.fixture
def driver_file() -> str:
    pytest.importorskip("ipi")
    from ase_uq.engines import ipi_driver

    return ipi_driver.__file__


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """What an i-PI run of the molecule needs but its input."""
    write(tmp_path / "start.xyz", molecule_in(), format="extxyz")
    shutil.copy(embedded.path("mace.uq.safetensors"), tmp_path / "my.uq.safetensors")
    return tmp_path


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Ours, as i-PI loads it."""
    pytest.importorskip("ipi")
    from ipi.pes import load_pes

    from ase_uq.engines import ipi_driver

    template = tmp_path_factory.mktemp("ipi") / "start.xyz"
    write(template, molecule_in(), format="extxyz")
    load = load_pes("custom", ipi_driver.__file__)
    return load(str(template), "embedded:mace", str(embedded.path("mace.uq.safetensors")))


def start(folder: Path, program: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [program, "input.xml"],
        cwd=folder,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def finished(process: subprocess.Popen[str]) -> None:
    text, _ = process.communicate(timeout=240)
    assert process.returncode == 0, text


def through_a_socket(folder: Path, driver: str, program: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The client is i-PI's program in this process, which has imported and compiled all that it needs."""
    address = f"ase_uq_{uuid.uuid4().hex[:12]}"
    (folder / "input.xml").write_text(
        INPUT.replace("FORCEFIELD", SOCKET).replace("ADDRESS", address).replace("BEADS", "1")
    )
    server = start(folder, program)
    try:
        assert server.stdout is not None
        while not Path(f"/tmp/ipi_{address}").exists():
            try:
                server.wait(0.1)
            except subprocess.TimeoutExpired:
                continue
            pytest.fail(server.stdout.read())
        words = [*(address if part == "ADDRESS" else part for part in CLIENT), driver, "-o", PARAMETERS]
        monkeypatch.chdir(folder)
        monkeypatch.setattr(sys, "argv", words)
        runpy.run_path(str(Path(sys.executable).with_name(words[0])), run_name="__main__")
        finished(server)
    finally:
        server.kill()


HALT = 0.035  # eV/Å, which a bead reaches at step 4


def inside_ipi(folder: Path, driver: str, program: Path, _: pytest.MonkeyPatch) -> None:
    """A run that its uncertainty is to end."""
    watching = DIRECT.replace("uq: my", f"halt: {HALT}, frames: flagged.xyz, uq: my")
    text = INPUT.replace("FORCEFIELD", watching).replace("DRIVER", driver).replace("BEADS", "2")
    (folder / "input.xml").write_text(text.replace("<total_steps>4<", "<total_steps>4000<"))
    finished(start(folder, program))
    (flagged,) = read_frames(folder / "flagged.xyz")
    assert flagged.info["flag_step"] == 4
    assert flagged.info["flag_reading"] >= HALT
    assert (folder / "EXIT").read_text() == flagged.info["flag_reason"] + "\n"
    assert (folder / "RESTART").stat().st_size


def test_the_page_shows_what_is_run_here():
    page = (Path(__file__).resolve().parents[2] / "docs" / "other_tools.md").read_text()
    for line in INPUT.splitlines():
        if "extra_type='forces_uncertainty'" in line:
            assert line.strip() in page
    assert " ".join(CLIENT) in page
    assert PARAMETERS.replace("embedded:mace", "mace:my.model") in page


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:unclosed <socket:ResourceWarning")  # i-PI's client leaves it open
@pytest.mark.parametrize(("go", "n_beads"), [(through_a_socket, 1), (inside_ipi, 2)])
def test_an_ipi_run_has_our_forces_and_the_uncertainties_of_every_step_and_bead(
    go: Any,
    n_beads: int,
    folder: Path,
    driver_file: str,
    calculator: UncertainCalculator,
    preloaded_bin: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    go(folder, driver_file, preloaded_bin / "i-pi", monkeypatch)
    for bead in range(n_beads):
        frames = read(folder / f"run.positions_{bead}.extxyz", ":")
        forces = read(folder / f"run.forces_{bead}.extxyz", ":")
        # i-PI looks for EXIT once a second, too; if it does so in the midst of a step, the step is taken back.
        assert len(frames) == 5 or (go is inside_ipi and len(frames) == 4)
        assert np.abs(frames[-1].positions - frames[0].positions).max() > 0.001
        values = {}
        for key in ("forces_uncertainty", "energy_uncertainty"):
            text = (folder / f"run.{key}_{bead}").read_text()
            assert re.findall(r"#EXTRAS\((\w+)\)# Step: +(\d+)", text) == [
                (key, str(step)) for step in range(len(frames))
            ]
            values[key] = np.split(np.loadtxt(text.splitlines()), len(frames))
        for step, atoms in enumerate(frames):
            expected = attached(Atoms(atoms.numbers, atoms.positions, cell=molecule_in().cell, pbc=True), calculator)
            # The files round positions to 1e-8 Å, the potential is in single precision.
            np.testing.assert_allclose(forces[step].get_forces(), expected.get_forces(), atol=2e-5)
            for key, found in values.items():
                np.testing.assert_allclose(found[step].squeeze(), calculator.results[key], rtol=1e-4, err_msg=key)


def in_bohr(atoms: Atoms) -> tuple[np.ndarray, np.ndarray]:
    """Cell, with vectors as columns, and positions as i-PI sends them."""
    return atoms.cell.array.T / units.Bohr, atoms.positions / units.Bohr


def test_driver_answers_as_ipis_own_ase_driver_does(folder: Path, driver: Any, calculator: UncertainCalculator):
    from ipi.pes import load_pes

    skewed = molecule_in()
    skewed.set_cell([[6.0, 0, 0], [0.7, 6.5, 0], [0.3, -0.4, 5.0]])
    theirs = load_pes("ase", "")(str(folder / "start.xyz"))
    theirs.ase_calculator = calculator
    expected, found = theirs(*in_bohr(skewed)), driver(*in_bohr(skewed))
    for number in range(3):
        np.testing.assert_allclose(np.ravel(found[number]), np.ravel(expected[number]), rtol=1e-6, atol=1e-6)
    assert np.abs(found[2]).max() > 1e-3
    extras = json.loads(found[3])
    assert list(extras) == ["energy_uncertainty", "energies_uncertainty", "forces_uncertainty", "gamma", "contact"]
    for key, value in extras.items():
        np.testing.assert_allclose(value, calculator.results[key], rtol=1e-4, err_msg=key)


def test_ipis_own_tool_reweights_by_our_members(folder: Path, driver_file: str, tmp_path: Path):
    """Its cumulant expansion of an observable is that of `propagation.average`."""
    from ase_uq.engines.ipi_driver import UncertainDriver

    model = str(folder / "my.uq.safetensors")
    # i-PI hands over options as text.
    asked = UncertainDriver(str(folder / "start.xyz"), "embedded:mace", model, ensemble="8")  # pyright: ignore
    frames = [molecule_in() for _ in range(12)]
    for number, atoms in enumerate(frames):
        atoms.rattle(0.002, seed=number)
    cells, positions = zip(*(in_bohr(atoms) for atoms in frames), strict=True)
    extras = [json.loads(answer[3]) for answer in asked(list(cells), list(positions))]
    calculator = UncertainCalculator("embedded:mace", model, ensemble=8)
    calculated = [annotated(atoms, calculator.results_of([atoms])[0]) for atoms in frames]
    lengths = [atoms.get_distance(0, 1) for atoms in frames]
    for found, atoms in zip(extras, calculated, strict=True):
        assert atoms.calc is not None
        np.testing.assert_allclose(found["energy_ensemble"], atoms.calc.results["energy_ensemble"], rtol=1e-6)
        np.testing.assert_allclose(np.array(found["committee_pot"]) * units.Ha, found["energy_ensemble"], rtol=1e-6)
    pot, obs = np.array([found["energy_ensemble"] for found in extras]), np.array(lengths)
    tool = runpy.run_path(str(Path(sys.executable).with_name("i-pi-committee-reweight")))
    kelvin = 3000
    reweighted, _ = tool["CEA"](pot, obs[:, None], units.kB * kelvin)
    expected = propagation.average(calculated, lengths, kelvin)
    np.testing.assert_allclose(reweighted[0] - obs.mean(), expected.members - expected.value, rtol=1e-3, atol=1e-9)


def test_driver_leaves_a_molecule_in_vacuum(folder: Path, driver_file: str, calculator: UncertainCalculator):
    from ase_uq.engines.ipi_driver import UncertainDriver

    atoms = molecule_in(None)
    write(folder / "vacuum.xyz", atoms, format="extxyz")
    driver = UncertainDriver(str(folder / "vacuum.xyz"), "embedded:mace", str(folder / "my.uq.safetensors"))
    # A cell so small that images would be felt.
    energy, forces, virial, _ = driver(np.eye(3) * 5, in_bohr(atoms)[1])
    attached(atoms, calculator)
    assert energy * units.Ha == pytest.approx(atoms.get_potential_energy(), rel=1e-6)  # single precision
    np.testing.assert_allclose(forces * units.Ha / units.Bohr, atoms.get_forces(), atol=2e-5)
    np.testing.assert_array_equal(virial, 0)


def test_driver_gives_a_slab_no_virial(folder: Path, driver_file: str, calculator: UncertainCalculator):
    """MACE divides by the volume of a cell that it makes itself, so that i-PI's would give another virial."""
    from ase_uq.engines.ipi_driver import UncertainDriver

    atoms = molecule_in()
    atoms.pbc = (True, True, False)
    write(folder / "slab.xyz", atoms, format="extxyz")
    with pytest.warns(UQWarning, match=r"periodic in some directions only.* virial that i-PI gets is zero.* barostat"):
        driver = UncertainDriver(str(folder / "slab.xyz"), "embedded:mace", str(folder / "my.uq.safetensors"))
    energy, forces, virial, _ = driver(*in_bohr(atoms))
    attached(atoms, calculator)
    assert energy * units.Ha == pytest.approx(atoms.get_potential_energy(), rel=1e-6)
    np.testing.assert_allclose(forces * units.Ha / units.Bohr, atoms.get_forces(), atol=2e-5)
    np.testing.assert_array_equal(virial, 0)
    # Why: the work of a strain is not the stress times the volume of this cell.
    work, strain = [], 1e-3
    for sign in (-1, 1):
        strained = atoms.copy()
        strained.set_cell(atoms.cell.array @ np.diag([1 + sign * strain, 1, 1]), scale_atoms=True)
        work.append(attached(strained, calculator).get_potential_energy())
    slope = (work[1] - work[0]) / (2 * strain)
    assert abs(slope) > 3 * abs(atoms.get_volume() * atoms.get_stress()[0])


@pytest.mark.parametrize("pbc", [True, False])
def test_driver_warns_of_slabs_only(folder: Path, driver_file: str, pbc: bool):
    from ase_uq.engines.ipi_driver import UncertainDriver

    atoms = molecule_in()
    atoms.pbc = pbc
    write(folder / "not_a_slab.xyz", atoms, format="extxyz")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UQWarning)
        UncertainDriver(str(folder / "not_a_slab.xyz"), "embedded:mace", str(folder / "my.uq.safetensors"))


def test_beads_that_are_sent_together_are_one_forward_pass(driver: Any):
    beads = [molecule_in() for _ in range(3)]
    for number, atoms in enumerate(beads):
        atoms.rattle(0.02, seed=number)
    cells, positions = zip(*(in_bohr(atoms) for atoms in beads), strict=True)
    with count_forwards(driver.predictor.backend.calculator.models) as n_forwards:
        together = driver(list(cells), list(positions))
    assert n_forwards() == 1
    for found, cell, at in zip(together, cells, positions, strict=True):
        alone = driver(cell, at)
        np.testing.assert_allclose(found[1], alone[1], atol=1e-6)
        assert json.loads(found[3])["energy_uncertainty"] == pytest.approx(
            json.loads(alone[3])["energy_uncertainty"], rel=1e-4
        )


def test_a_bead_that_is_not_finite_is_named_and_changes_no_other(driver: Any):
    beads = [molecule_in() for _ in range(3)]
    beads[1].positions[0] = beads[1].positions[1]
    cells, positions = zip(*(in_bohr(atoms) for atoms in beads), strict=True)
    with pytest.warns(UQWarning, match="structure 1: the potential's energy or forces are not finite"):
        together = driver(list(cells), list(positions))
    alone = driver(cells[0], positions[0])
    for number in (0, 2):
        np.testing.assert_allclose(together[number][1], alone[1], atol=1e-6)
    assert np.isnan(together[1][1]).any()


def rattled(count: int, largest: float) -> list[Atoms]:
    """Beads, each farther from the start than the one before."""
    beads = [molecule_in() for _ in range(count)]
    for number, atoms in enumerate(beads):
        atoms.rattle(largest * (number + 1) / count, seed=number)
    return beads


def reading_of(atoms: Atoms, calculator: UncertainCalculator) -> float:
    results = calculator.results_of([atoms])[0]
    return float(np.linalg.norm(results["forces_uncertainty"], axis=1).max())


@pytest.mark.parametrize("centroid", [0, 3])
def test_driver_ends_ipi_at_the_bead_or_the_centroid_it_does_not_know(
    centroid: int, folder: Path, driver: Any, calculator: UncertainCalculator, monkeypatch: pytest.MonkeyPatch
):
    from ase_uq.engines.ipi_driver import UncertainDriver

    monkeypatch.chdir(folder)
    quiet, loud = rattled(3, 0.01), rattled(3, 0.2)

    def worst(beads: list[Atoms]) -> tuple[float, int | None]:
        """The reading, and whose it is."""
        if not centroid:
            return max((reading_of(atoms, calculator), number) for number, atoms in enumerate(beads, 1))
        middle = molecule_in()
        middle.positions = np.mean([atoms.positions for atoms in beads], axis=0)
        return reading_of(middle, calculator), None

    (low, of_quiet), (high, of_loud) = worst(quiet), worst(loud)
    watching = UncertainDriver(
        "start.xyz",
        driver.predictor.backend,
        "my.uq.safetensors",
        halt=high * 0.999,
        flag=low * 0.999,
        frames="flagged.xyz",
        centroid=centroid,
    )

    def asked(beads: list[Atoms]) -> list[Any]:
        cells, positions = zip(*(in_bohr(atoms) for atoms in beads), strict=True)
        return watching(list(cells), list(positions))

    assert len(asked(quiet)) == 3
    assert not Path("EXIT").exists()
    with pytest.warns(UQWarning, match="i-PI is ended at evaluation 1: .*force uncertainty"):
        answers = asked(loud)
    np.testing.assert_allclose(answers[2][1], driver(*in_bohr(loud[2]))[1], atol=1e-6)
    assert asked(loud)  # beads that i-PI still asks for
    flagged = read_frames("flagged.xyz")
    assert [atoms.info["flag_level"] for atoms in flagged] == ["flag", "halt"]
    assert [atoms.info["flag_step"] for atoms in flagged] == [0, 1]
    assert [atoms.info.get("flag_image") for atoms in flagged] == [of_quiet, of_loud]
    np.testing.assert_allclose([atoms.info["flag_reading"] for atoms in flagged], [low, high], rtol=1e-4)
    assert Path("EXIT").read_text() == flagged[-1].info["flag_reason"] + "\n"
    with pytest.raises(FileExistsError, match=r"EXIT is there, at which i-PI would end at once\. Remove it"):
        UncertainDriver("start.xyz", driver.predictor.backend, "my.uq.safetensors", halt=1)


def test_a_centroid_of_other_beads_is_refused(folder: Path, driver: Any, monkeypatch: pytest.MonkeyPatch):
    from ase_uq.engines.ipi_driver import UncertainDriver

    monkeypatch.chdir(folder)
    of_four = UncertainDriver("start.xyz", driver.predictor.backend, "my.uq.safetensors", halt=1, centroid=4)
    with pytest.raises(InputError, match=r"i-PI sent 1 bead together, and the centroid is one of 4\. .* batch_size"):
        of_four(*in_bohr(molecule_in()))
    with pytest.raises(ValueError, match="nothing to watch for"):
        UncertainDriver("start.xyz", driver.predictor.backend, "my.uq.safetensors", frames="flagged.xyz")


def test_driver_refuses_another_number_of_atoms(driver: Any):
    with pytest.raises(InputError, match=r"i-PI sent 3 atoms and the template has 9\. Give template="):
        driver(np.eye(3), np.zeros((3, 3)))


def test_driver_without_ipi_says_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "ipi").mkdir()
    (tmp_path / "ipi" / "__init__.py").write_text("raise ModuleNotFoundError('no', name='ipi')")
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] == "ipi" or name == "ase_uq.engines.ipi_driver"]:
        monkeypatch.delitem(sys.modules, name)
    needs = r"ase_uq\.engines\.ipi_driver needs i-PI, and ipi is not installed\. Run: pip install ipi"
    with pytest.raises(MissingDependency, match=needs):
        importlib.import_module("ase_uq.engines.ipi_driver")
