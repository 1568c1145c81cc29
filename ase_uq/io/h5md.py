"""H5MD, molecular data in HDF5: files of frames that h5py, and ASE with the package znh5md, read without this one.

`particles/atoms/NAME/value` has what each atom has, (frames, atoms, ...), `observables/atoms/NAME/value` what each
frame has. Where frames differ in size, the rows of atoms that a frame has not are NaN. Values that fit into no array of
numbers are texts in JSON, and empty for frames that have none. The attribute `ASE_ENTRY_ORIGIN` says where ASE keeps an
entry. `parameters/ase_uq` has what H5MD has no place for: the number of atoms of each frame, and constraints.
"""

import os
from collections.abc import Iterator, Mapping
from math import prod
from typing import Any

import numpy as np

from ase_uq.errors import InputError
from ase_uq.io.contents import CONSTRAINTS, EDGES, ENTRY, PBC, PER_ATOM, SPECIES, Contents
from ase_uq.io.hdf5 import h5py, is_h5md_name, is_hdf5

LAYOUT = 1  # of what stands in `OWN`
OWN = "parameters/ase_uq"
N_ATOMS = f"{OWN}/n_atoms"
BLOCK_FRAMES, BLOCK_BYTES = 1024, 1 << 24  # that are written and read at once, or a single frame


def opened(path: str | os.PathLike[str]) -> Any:
    """The file, open for reading; also on a file system without locks."""
    return h5py().File(path, "r", locking="best-effort")


def is_h5md(path: str | os.PathLike[str]) -> bool:
    """Whether a file is one that `write_h5md` wrote; what others wrote, ASE may know how to read.

    Raises:
        MissingDependency: It may be one, and h5py is not installed.
        InputError: It is cut off or damaged.
    """
    if not is_h5md_name(path) or not is_hdf5(path):
        return False
    h5py()
    try:
        with opened(path) as file:
            layout = int(file[OWN].attrs["layout"]) if OWN in file else 0
    except Exception as error:  # of a damaged file h5py raises anything from OSError to KeyError
        raise InputError(f"{path} is cut off or damaged, and cannot be read as HDF5: {error}.") from error
    if layout > LAYOUT:
        raise InputError(
            f"{path} was written by a newer ase_uq: its layout is version {layout}, this package reads up to {LAYOUT}. "
            "Update ase_uq."
        )
    return layout > 0


def count_h5md(path: str | os.PathLike[str]) -> int:
    """Number of frames of a file."""
    with opened(path) as file:
        return len(file[N_ATOMS])


def read_h5md(path: str | os.PathLike[str], start: int = 0, at_once: int | None = None) -> Iterator[Contents]:
    """What the file has of each frame; `atoms_of` makes structures of it.

    Args:
        path: The file.
        start: First frame wanted.
        at_once: Bytes of the frames that are read together, by default those of a block; fewer where many files are
            read in turns.
    """
    at_once = BLOCK_BYTES if at_once is None else at_once
    with opened(path) as file:
        n_atoms = file[N_ATOMS][:]
        elements = dict(_elements(file))
        of_an_atom = sum(
            group["value"].dtype.itemsize * prod(group["value"].shape[2:])
            for path, group in elements.items()
            if path.startswith(PER_ATOM)
        )
        while start < len(n_atoms):
            most = np.maximum.accumulate(n_atoms[start : start + BLOCK_FRAMES])
            fit = np.arange(1, len(most) + 1) * most * of_an_atom <= at_once
            stop = start + max(int(np.argmin(fit)) if not fit.all() else len(fit), 1)
            yield from _read(elements, start, stop, n_atoms[start:stop])
            start = stop


def _elements(file: Any) -> Iterator[tuple[str, Any]]:
    """Names of all values, and the groups in which they are."""
    atoms = file["particles/atoms"]
    yield from ((PER_ATOM + name, group) for name, group in atoms.items() if name != "box")
    yield from ((path, group) for path in (EDGES, PBC) if (group := atoms.get(path)) is not None)
    yield from ((ENTRY + name, group) for name, group in file.get("observables/atoms", {}).items())
    if CONSTRAINTS in file[OWN]:
        yield CONSTRAINTS, file[OWN][CONSTRAINTS]


def _read(elements: Mapping[str, Any], start: int, stop: int, n_atoms: np.ndarray) -> Iterator[Contents]:
    frames: list[Contents] = [{} for _ in range(start, stop)]
    for path, group in elements.items():
        values = group["value"]
        if values.dtype.kind == "O":
            for frame, text in zip(frames, values.asstr()[start:stop], strict=True):
                if text:
                    frame[path] = text
            continue
        per_atom = path.startswith(PER_ATOM)
        read = values[start:stop, : n_atoms.max()] if per_atom else values[start:stop]
        if path == SPECIES:
            read = np.nan_to_num(read).astype(np.uint8)
        present = group["present"][start:stop] if "present" in group else np.ones(len(frames), bool)
        for index in np.flatnonzero(present):
            frames[index][path] = read[index, : n_atoms[index]] if per_atom else read[index, ...]
    yield from frames


def place_of(path: str) -> str:
    """The group of a value."""
    room, _, name = path.partition("/")
    if path == CONSTRAINTS:
        return f"{OWN}/{path}"
    return f"particles/atoms/{path}" if room == "box" else f"{room}/atoms/{name}"
