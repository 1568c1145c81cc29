"""Extended XYZ: which entries of a structure it can hold, and structures written as its text."""

import io
import re
import warnings
from collections.abc import Collection, Mapping
from functools import cache
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io import write
from ase.io.extxyz import output_column_format
from ase.stress import voigt_6_to_full_3x3_stress

from ase_uq.errors import UQWarning
from ase_uq.io.results import LOST_KEY, StoredResults, annotated, hidden_labels, lost_constraints
from ase_uq.properties import PROPERTIES, STANDARD, find_property

# Names that extended XYZ uses itself, and names of columns that it can tell from their types and widths.
_RESERVED = ("Lattice", "Properties", "pbc", "pos", "species", "symbols")
_COLUMN = re.compile(r"[^\s:\"'=\\]+")


def unwritable(atoms: Atoms) -> list[str]:
    """Names of the entries that extended XYZ cannot hold: writing would fail, or the file could not be read again."""
    info = [repr(key) for key, value in atoms.info.items() if not _fits_info(key, value)]
    arrays = [repr(key) for key, values in atoms.arrays.items() if not _fits_array(key, values)]
    return [
        *(f"info[{key}]" for key in info),
        *(f"arrays[{key}]" for key in arrays),
        *(f"the constraint {kind}" for kind in _unkept_constraints(atoms)),
    ]


def warn_of_unwritable(names: Collection[str]) -> None:
    """Warns which entries are left out of a file."""
    if names:
        warnings.warn(
            f"{', '.join(sorted(names))} cannot be kept in extended XYZ and {'is' if len(names) == 1 else 'are'} left "
            "out.",
            UQWarning,
            stacklevel=3,
        )


def without_unwritable(atoms: Atoms) -> Atoms:
    """The same structure, or a copy without the entries that extended XYZ cannot hold."""
    if not unwritable(atoms):
        return atoms
    copy = atoms.copy()
    copy.info = {key: value for key, value in atoms.info.items() if _fits_info(key, value)}
    for key in [key for key, values in copy.arrays.items() if not _fits_array(key, values)]:
        del copy.arrays[key]
    copy.calc = atoms.calc
    return copy


def frame_text(atoms: Atoms) -> str:
    """Text of a structure as `write_frames` writes it, with info, arrays and all results that belong to it."""
    if hidden := hidden_labels(atoms):
        first = hidden[0]
        warnings.warn(
            f"a structure has {', '.join(hidden)} among its results and in its info or arrays, and extended XYZ holds "
            f"only one of them: the results are written. To keep a label, call it REF_{first}.",
            UQWarning,
            stacklevel=3,
        )
    frame = annotated(atoms)
    results, frame.calc = frame.calc.results if isinstance(frame.calc, StoredResults) else {}, None
    for key in [key for key in results if key in STANDARD]:
        (frame.arrays if PROPERTIES[key].per_atom else frame.info)[key] = results[key]
    return _text(frame)


def extxyz_text(atoms: Atoms, results: Mapping[str, Any], **info: Any) -> str:
    """Text of a structure with `results`, which must belong to it, and further entries of info."""
    frame = atoms.copy()
    for store in (frame.info, frame.arrays):
        for key in [key for key in store if _property(key) is not None]:
            del store[key]  # left by an earlier calculation
    for key, value in results.items():
        entry = _property(key)
        if entry is not None:
            (frame.arrays if entry.per_atom else frame.info)[key] = value
    frame.info.update(info)
    return _text(frame)


_property = cache(find_property)  # called for every key of every frame


def _text(frame: Atoms) -> str:
    """Text of a structure whose results are in info and arrays: the bytes that ASE writes, in a third of the time.

    ASE formats one number at a time; here one format string covers a whole frame.
    """
    if np.shape(frame.info.get("stress", ())) == (6,):
        frame.info["stress"] = voigt_6_to_full_3x3_stress(frame.info["stress"])
    if frame.constraints and (unkept := _unkept_constraints(frame)):
        frame.info[LOST_KEY] = " ".join(
            [*unkept, *lost_constraints(frame)]
        )  # so that a run that goes on from this frame can say so
    if frame.constraints:  # ASE knows how to write them
        buffer = io.StringIO()
        write(buffer, frame, format="extxyz")
        return buffer.getvalue()
    names = [name for name in frame.arrays if name not in ("numbers", "positions")]
    columns = {"symbols": np.array(list(frame.symbols)), "positions": frame.positions}
    columns |= {name: frame.arrays[name] for name in names}
    comment, widths, _, row_format = output_column_format(frame, list(columns), columns, True)
    cells = [c.reshape(len(frame), width).tolist() for c, width in zip(columns.values(), widths, strict=True)]
    flat = [cell for rows in zip(*cells, strict=True) for row in rows for cell in row]
    return f"{len(frame)}\n{comment}\n" + row_format * len(frame) % tuple(flat)


def _fits_info(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not _is_line(key) or key in _RESERVED:
        return False
    if key == "stress" and np.size(value) not in (6, 9):
        return False  # ASE would take it for the stress of the frame
    if isinstance(value, str):
        return _is_line(value) and not value.endswith("\\")
    if isinstance(value, np.ndarray):
        return bool(value.size) and value.dtype.kind in "biufU"
    return value is None or isinstance(value, bool | int | float | np.number | np.bool_ | list | tuple | dict)


def _fits_array(key: Any, values: np.ndarray) -> bool:
    if key in ("numbers", "positions"):
        return True
    if not isinstance(key, str) or not _COLUMN.fullmatch(key) or key in _RESERVED:
        return False
    if values.ndim not in (1, 2) or not values.size:
        return False
    if values.dtype.kind in "OU":
        return all(isinstance(text, str) and text.split() == [text] for text in values.flat)
    return values.dtype.kind in "bif"


def _unkept_constraints(atoms: Atoms) -> list[str]:
    kept = FixAtoms, FixCartesian
    return sorted({type(constraint).__name__ for constraint in atoms.constraints if not isinstance(constraint, kept)})


def _is_line(text: str) -> bool:
    return text.splitlines() == [text]  # a single line, without a line break at its end
