"""A simulation of OpenMM as a run of ASE: observers see each of its steps."""

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import openmm.unit
from ase import Atoms, units
from ase.md.md import MolecularDynamics
from ase.optimize.optimize import BaseDynamics

from ase_uq.errors import InputError, UncertaintyHalt

_NO_END = sys.maxsize
_OPENMM: Any = openmm  # a type checker may not have it
_UNIT = _OPENMM.unit
_VELOCITY = units.Angstrom / (1000 * units.fs)  # Å/ps
_DALTON = 1e-3  # masses that differ by more are another isotope's, or were repartitioned


class OpenMMDynamics(MolecularDynamics):
    """A `Simulation` of OpenMM as a run of ASE: what ASE attaches to its dynamics, such as monitors, sees each step.

    It is a reporter of the simulation. After each step it has OpenMM compute the forces of the new positions, which
    the next step needs in any case and gets from the calculator without another evaluation, and calls the observers.
    An exception in one of them, such as `UncertaintyHalt`, comes out of `run` or `simulation.step` between two steps;
    both go on from there.

    Args:
        simulation: The simulation, with positions.
        atoms: The structure that `createSystem` or `createMixedSystem` had as `aseAtoms`, with its calculator. Its
            positions and cell are kept up to date by openmmml, its velocities by this class, as OpenMM has them.
        particles: Indices of these atoms in OpenMM, where it has others as well; None if it has not.

    Attributes:
        simulation: The simulation.
        atoms: The structure.
        nsteps: Number of the current step, as OpenMM counts.
        dt: Time step, in ASE's unit.

    Raises:
        InputError: The system does not have as many particles as there are atoms, or has no force from Python.
    """

    def __init__(self, simulation: Any, atoms: Atoms, particles: Sequence[int] | None = None) -> None:
        self.simulation = simulation
        # MolecularDynamics would ask for a time step, which the integrator has.
        BaseDynamics.__init__(self, atoms)
        self.max_steps = _NO_END
        system = simulation.system
        self._particles = np.arange(system.getNumParticles()) if particles is None else np.asarray(particles, int)
        if len(self._particles) != len(atoms):
            raise InputError(
                f"atoms are {len(atoms)} and the particles of OpenMM {len(self._particles)}. Give particles, the "
                "indices of the atoms in OpenMM."
            )
        if not any(isinstance(force, _OPENMM.PythonForce) for force in system.getForces()):
            raise InputError(
                "the system has no force from Python, so nothing evaluates the atoms. Make it by "
                'MLPotential("ase").createSystem(topology, aseAtoms=atoms).'
            )
        masses: Any = np.array([system.getParticleMass(int(n)).value_in_unit(_UNIT.dalton) for n in self._particles])
        if (np.abs(atoms.get_masses() - masses) > _DALTON).any():
            atoms.set_masses(masses)
        self._take(self._state())
        simulation.reporters.append(self)

    def run(self, steps: int = 50) -> bool:
        """Makes steps; at step 0 the observers see the first structure before.

        Args:
            steps: Number of steps.

        Returns:
            Whether all of them were made.

        Raises:
            UncertaintyHalt: Raised by a monitor. `run` goes on from its step.
        """
        self.max_steps = _NO_END
        try:
            if self.simulation.currentStep == 0:
                self.report(self.simulation, self._state())
            self.simulation.step(steps)
        except _QuietEnd:
            return False
        return True

    def get_time(self) -> float:
        """Simulated time of the current step, in ASE's unit."""
        return self._time

    def describeNextReport(self, simulation: Any) -> dict[str, Any]:
        """What OpenMM asks its reporters: a report after each step, with forces, so that they are computed."""
        return {"steps": 1, "periodic": False, "include": ["velocities", "forces"]}

    def report(self, simulation: Any, state: Any) -> None:
        """Calls the observers; OpenMM calls it after each step.

        Raises:
            UncertaintyHalt: Raised by a monitor; also to end a simulation quietly, which `run` then does.
        """
        self._take(state)
        self.call_observers()
        if self.max_steps <= self.nsteps:
            raise _QuietEnd(f"ended at step {self.nsteps}.", step=self.nsteps, reading=np.nan, threshold=np.nan)

    def _state(self) -> Any:
        return self.simulation.context.getState(velocities=True, forces=True)

    def _take(self, state: Any) -> None:
        self.nsteps = int(self.simulation.currentStep)
        self.dt = self.simulation.integrator.getStepSize().value_in_unit(_UNIT.femtosecond) * units.fs
        self._time = state.getTime().value_in_unit(_UNIT.femtosecond) * units.fs
        velocities = state.getVelocities(asNumpy=True).value_in_unit(_UNIT.angstrom / _UNIT.picosecond)
        self.atoms.set_velocities(velocities[self._particles] * _VELOCITY)


class _QuietEnd(UncertaintyHalt):
    """Leaves the loop of OpenMM, which cannot be told to stop."""
