"""OpenMM (8.6, with openmmml 1.8): its simulations, watched as those of ASE are.

    from openmm.app import Simulation
    from openmmml import MLPotential

    atoms.calc = UncertainCalculator("mace:my.model", "my.uq.safetensors")
    system = MLPotential("ase").createSystem(topology, aseAtoms=atoms)
    simulation = Simulation(topology, system, integrator)
    simulation.context.setPositions(atoms.positions / 10)  # nm
    dynamics = OpenMMDynamics(simulation, atoms)
    dynamics.attach(UncertaintyMonitor(dynamics, halt=0.5, flag=0.3, frames="flagged.xyz"))
    dynamics.run(100_000)

openmmml needs no more than the calculator to run the potential; this adds the monitor.
"""

from ase_uq.errors import MissingDependency

try:
    import openmm  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependency(
        f'ase_uq.engines.openmm needs OpenMM, and {error.name} is not installed. Run: pip install "ase-uq[openmm]"'
    ) from error

from ase_uq.engines.openmm.dynamics import OpenMMDynamics

__all__ = ["OpenMMDynamics"]
