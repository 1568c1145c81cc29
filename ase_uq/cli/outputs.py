"""Files that a verb reads and writes: what is refused before seconds are spent on importing a potential."""

from collections.abc import Mapping
from pathlib import Path

import typer

from ase_uq.io.files import check_writable
from ase_uq.io.hdf5 import SUFFIXES, h5py, is_h5md_name


def check_inputs(*files: Path | None) -> None:
    """Refuses files that are not there.

    Args:
        files: To be read; None for one that was not given.

    Raises:
        FileNotFoundError: One of them is missing.
    """
    for file in files:
        if file is not None and not file.is_file():
            raise FileNotFoundError(f"there is no file {file}.")


def check_outputs(*files: Path | None, may_exist: bool = True, otherwise: str = "--overwrite to replace it") -> None:
    """Refuses files that cannot be written, or may not.

    Args:
        files: To be written; None for one that was not given.
        may_exist: Whether they may be there already.
        otherwise: What to give to write existing ones all the same, for messages.

    Raises:
        FileExistsError: One of them exists.
        ArtefactError: One of them cannot be written.
    """
    for file in files:
        if file is None:
            continue
        if file.exists() and not may_exist:
            raise FileExistsError(f"{file} exists. Give another name, or {otherwise}.")
        check_writable(file)


def check_xyz_names(files: Mapping[str, Path | None]) -> None:
    """Refuses names for extended XYZ files that would have other programs take them for another format.

    Args:
        files: By option; None for one that was not given.

    Raises:
        BadParameter: One of them ends otherwise.
    """
    for option, file in files.items():
        if file is not None and file.suffix not in (".xyz", ".extxyz"):
            raise typer.BadParameter(
                f"{file} is written as extended XYZ: give a name that ends in .xyz or .extxyz.",
                param_hint=f"'{option}'",
            )


def check_scored_name(out: Path) -> None:
    """Refuses a name for scored frames that stands for no format in which they can be written.

    Raises:
        BadParameter: It ends otherwise.
        MissingDependency: The package that writes the format is not installed.
    """
    if is_h5md_name(out):
        h5py()
    elif out.suffix not in (".xyz", ".extxyz"):
        raise typer.BadParameter(
            f"{out} is in no format that scored frames are written in: give a name that ends in .xyz or .extxyz for "
            f"extended XYZ, or in {' or '.join(SUFFIXES)} for HDF5 (H5MD).",
            param_hint="'--out'",
        )


def leave_list(file: Path | None) -> None:
    """Leaves an empty file where nothing was flagged, so that a script goes on; None for no file."""
    if file is not None:
        file.touch()
