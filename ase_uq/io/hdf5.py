"""HDF5 before anything is read or written: names of files, and the package that it takes."""

import os
from pathlib import Path
from typing import Any

from ase_uq.errors import MissingDependency

SUFFIXES = (".h5", ".h5md")
_MAGIC = b"\x89HDF\r\n\x1a\n"


def is_h5md_name(path: str | os.PathLike[str]) -> bool:
    """Whether the name is that of an H5MD file."""
    return Path(path).suffix in SUFFIXES


def is_hdf5(path: str | os.PathLike[str]) -> bool:
    """Whether a file begins as HDF5 does."""
    with open(path, "rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC


def h5py() -> Any:
    """The package that reads and writes HDF5.

    Raises:
        MissingDependency: It is not installed.
    """
    try:
        import h5py
    except ImportError as error:
        raise MissingDependency(
            'files in HDF5 (.h5) need h5py, which is not installed. Run: pip install "ase-uq[hdf5]"'
        ) from error
    return h5py
