"""OpenMM: a monitor sees each step of a simulation, and ends it between two steps."""

import importlib
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import molecule

from ase_uq import Halt, UncertainCalculator, UncertaintyModel, UncertaintyMonitor, fit, read_frames
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, MissingDependency, UncertaintyHalt
from ase_uq.testing.methods import ELEMENTS, labelled_frames

pytest.importorskip("openmmml", reason='OpenMM is not installed; pip install "ase-uq[openmm]" brings it')

import openmm
from openmm import app, unit
from openmmml import MLPotential

from ase_uq.engines.openmm import OpenMMDynamics

pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def fitted() -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    return fit(ToyCalculator(ELEMENTS), train, held_out, methods=["bll"], progress=False)


@pytest.fixture
def calculator(fitted: UncertaintyModel) -> UncertainCalculator:
    return UncertainCalculator(ToyCalculator(ELEMENTS), fitted)


def topology_of(atoms: Atoms) -> Any:
    topology = app.Topology()
    residue = topology.addResidue("MOL", topology.addChain())
    for number, symbol in enumerate(atoms.symbols):
        topology.addAtom(f"{symbol}{number}", app.Element.getBySymbol(symbol), residue)
    return topology


def methanol(calculator: Any) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.set_velocities(np.random.default_rng(0).normal(size=(len(atoms), 3)) * 0.2)
    atoms.calc = calculator
    return atoms


def simulated(atoms: Atoms) -> Any:
    system = MLPotential("ase").createSystem(topology_of(atoms), aseAtoms=atoms)
    integrator = openmm.VerletIntegrator(0.5 * unit.femtosecond)
    simulation = app.Simulation(topology_of(atoms), system, integrator, openmm.Platform.getPlatformByName("Reference"))
    simulation.context.setPositions(atoms.positions / 10)
    simulation.context.setVelocities(atoms.get_velocities() * 1000 * units.fs / 10)
    return simulation


def watched(calculator: Any, **options: Any) -> tuple[OpenMMDynamics, UncertaintyMonitor, list[float]]:
    atoms = methanol(calculator)
    dynamics = OpenMMDynamics(simulated(atoms), atoms)
    monitor = UncertaintyMonitor(dynamics, **options)
    readings: list[float] = []
    dynamics.attach(monitor)
    dynamics.attach(lambda: readings.append(monitor.last.reading))
    return dynamics, monitor, readings


def test_a_simulation_is_watched_at_each_step_and_halts_between_two(calculator: Any, tmp_path: Path):
    dynamics, monitor, readings = watched(calculator, halt=1e9)
    before = calculator.n_calculated
    assert dynamics.run(25)
    assert len(readings) == calculator.n_calculated - before + 1 == 26  # nothing is evaluated twice
    assert monitor.time_fs == pytest.approx(12.5)
    halt = sorted(readings)[-3] - 1e-6
    step = int(np.argmax(np.array(readings) >= halt))
    assert 2 < step < 25

    options = {"flag": halt / 2, "frames": tmp_path / "flagged.xyz"}
    dynamics, monitor, _ = watched(calculator, halt=halt, **options)
    with pytest.raises(UncertaintyHalt, match=rf"halted at step {step} \({step / 2:g} fs\)"):
        dynamics.run(25)
    state = dynamics.simulation.context.getState(positions=True, velocities=True, forces=True, energy=True)
    atoms = dynamics.atoms
    np.testing.assert_allclose(atoms.positions, state.getPositions(asNumpy=True).value_in_unit(unit.angstrom))
    np.testing.assert_allclose(
        atoms.get_velocities() * 1000 * units.fs / 10, state.getVelocities(asNumpy=True)._value, rtol=1e-12
    )
    fresh = atoms.copy()
    fresh.calc = UncertainCalculator(calculator.predictor.backend, calculator.uncertainty_model)
    energy = state.getPotentialEnergy().value_in_unit(unit.kilojoule_per_mole) * units.kJ / units.mol
    assert energy == pytest.approx(fresh.get_potential_energy(), rel=1e-9)
    flagged = read_frames(tmp_path / "flagged.xyz")
    assert flagged[-1].info["flag_step"] == dynamics.simulation.currentStep == step
    np.testing.assert_allclose(
        flagged[-1].arrays["forces_uncertainty"], fresh.calc.results["forces_uncertainty"], atol=1e-6
    )

    with pytest.raises(UncertaintyHalt, match=f"halted at step {step + 1} "):
        dynamics.simulation.step(3)  # by OpenMM's own function as well
    dynamics.observers.clear()
    assert dynamics.run(3)
    assert dynamics.nsteps == step + 4

    dynamics, monitor, _ = watched(calculator, halt=halt, on_halt=Halt(mode="stop"))
    assert not dynamics.run(25)
    assert dynamics.nsteps == step


# Of the solute only what the water feels: charges, and sizes of its atoms.
SOLUTE = """<ForceField>
 <AtomTypes>
  <Type name="C" class="C" element="C" mass="12.011"/>
  <Type name="H" class="H" element="H" mass="1.008"/>
  <Type name="O" class="O" element="O" mass="15.999"/>
 </AtomTypes>
 <Residues><Residue name="MOL">{atoms}</Residue></Residues>
 <NonbondedForce coulomb14scale="0.833333" lj14scale="0.5">
  <UseAttributeFromResidue name="charge"/>
  <Atom class="C" sigma="0.34" epsilon="0.36"/>
  <Atom class="H" sigma="0.24" epsilon="0.07"/>
  <Atom class="O" sigma="0.30" epsilon="0.71"/>
 </NonbondedForce>
</ForceField>"""


def test_a_solute_is_watched_in_water_of_a_force_field(calculator: Any, tmp_path: Path):
    """The water comes first, so that the solute's atoms have other indices in OpenMM."""
    solute, water = methanol(calculator), molecule("H2O")
    atoms = "".join(f'<Atom name="{a.symbol}{a.index}" type="{a.symbol}" charge="0.0"/>' for a in solute)
    (tmp_path / "solute.xml").write_text(SOLUTE.format(atoms=atoms))
    topology = app.Topology()
    residue = topology.addResidue("HOH", topology.addChain())
    oxygen, *hydrogens = [
        topology.addAtom(name, app.Element.getBySymbol(name[0]), residue) for name in ("O", "H1", "H2")
    ]
    for hydrogen in hydrogens:
        topology.addBond(oxygen, hydrogen)
    residue = topology.addResidue("MOL", topology.addChain())
    for number, symbol in enumerate(solute.symbols):
        topology.addAtom(f"{symbol}{number}", app.Element.getBySymbol(symbol), residue)
    force_field = app.ForceField(str(tmp_path / "solute.xml"), "amber14/tip3p.xml")
    classical = force_field.createSystem(topology, rigidWater=False)
    classical.setParticleMass(5, 2.014)
    particles = list(range(3, 9))
    system = MLPotential("ase").createMixedSystem(topology, classical, particles, aseAtoms=solute)
    simulation = app.Simulation(
        topology, system, openmm.VerletIntegrator(0.0005), openmm.Platform.getPlatformByName("Reference")
    )
    positions = np.concatenate([water.positions + np.array([4.0, 0, 0]), solute.positions])
    simulation.context.setPositions(positions / 10)
    dynamics = OpenMMDynamics(simulation, solute, particles)
    monitor = UncertaintyMonitor(dynamics, flag=1e-6, frames=tmp_path / "flagged.xyz")
    dynamics.attach(monitor)
    dynamics.run(3)
    state = simulation.context.getState(positions=True, velocities=True)
    moved = state.getPositions(asNumpy=True).value_in_unit(unit.angstrom)
    assert np.abs(moved[:3] - positions[:3]).max() > 1e-6
    np.testing.assert_allclose(solute.positions, moved[3:])
    velocities = state.getVelocities(asNumpy=True).value_in_unit(unit.angstrom / unit.picosecond)
    np.testing.assert_allclose(solute.get_velocities() * 1000 * units.fs, velocities[3:])
    assert solute.get_masses()[2] == 2.014  # an isotope
    assert [atoms.info["flag_step"] for atoms in read_frames(tmp_path / "flagged.xyz")] == [0, 1, 2, 3]


def test_particles_that_do_not_fit_are_refused(calculator: Any):
    atoms = methanol(calculator)
    simulation = simulated(atoms)
    with pytest.raises(InputError, match=r"atoms are 6 and the particles of OpenMM 2\. Give particles"):
        OpenMMDynamics(simulation, atoms, [0, 1])
    empty = openmm.System()
    for _ in atoms:
        empty.addParticle(1.0)
    bare = app.Simulation(topology_of(atoms), empty, openmm.VerletIntegrator(0.001))
    with pytest.raises(InputError, match="the system has no force from Python"):
        OpenMMDynamics(bare, atoms)


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "openmm", None)
    monkeypatch.delitem(sys.modules, "ase_uq.engines.openmm")
    with pytest.raises(MissingDependency, match=r'needs OpenMM, and openmm .* Run: pip install "ase-uq\[openmm\]"'):
        importlib.import_module("ase_uq.engines.openmm")
