"""Extended XYZ: which entries of a structure it can hold, and structures written as its text."""

import io
import json
import os
import re
import warnings
from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.constraints import FixAtoms, FixCartesian
from ase.io import write
from ase.io.extxyz import (
    SPECIAL_3_3_KEYS,
    key_val_dict_to_str,
    key_val_str_to_dict,
    output_column_format,
    per_atom_properties,
    per_config_properties,
)
from ase.io.formats import UnknownFileTypeError, filetype, ioformats
from ase.stress import voigt_6_to_full_3x3_stress

from ase_uq.errors import UQWarning
from ase_uq.io.results import LOST_KEY, StoredResults, annotated, hidden_labels, lost_constraints, stored
from ase_uq.properties import PROPERTIES, STANDARD

# Names that extended XYZ uses itself, and names of columns that it can tell from their types and widths.
_RESERVED = ("Lattice", "Properties", "pbc", "pos", "species", "symbols")
# To the reader these are the numbers, the charges of a calculator, constraints, and results of the whole structure.
_RESERVED_COLUMNS = (*_RESERVED, "Z", "charge", "move_mask", *per_config_properties)
_WORD = re.compile(r"[\w.:/+-]+", re.ASCII)
_COMPRESSED = (".gz", ".bz2", ".xz")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character, which has no bytes
_INT32 = np.iinfo(np.int32)
_COLUMN = re.compile(r"[^\s:\"'=\\]+")


def check_xyz_name(path: str | os.PathLike[str], endings: str = ".xyz or .extxyz") -> None:
    """Refuses the name of another format for a file of frames, which are written as extended XYZ.

    Args:
        path: Name of the file.
        endings: What names may end in, for the message.

    Raises:
        ValueError: ASE, and with it `read_frames`, would take the file for another format, or for compressed.
    """
    name = Path(path).name
    try:
        taken_for = "" if name.endswith(_COMPRESSED) else filetype(name, read=False)
    except UnknownFileTypeError:  # a name without a suffix
        return
    if not taken_for or (taken_for in ioformats and taken_for not in ("xyz", "extxyz")):
        raise ValueError(
            f"{path} would be written as extended XYZ, but its name is that of {taken_for or 'a compressed file'}: "
            f"give a name that ends in {endings}."
        )


def unwritable(atoms: Atoms) -> list[str]:
    """Names of the entries that extended XYZ cannot hold: writing would fail, or the file could not be read again."""
    return [
        *(f"info[{key!r}]" for key in _unfit_info(atoms)),
        *(f"arrays[{key!r}]" for key in _unfit_arrays(atoms)),
        *(f"the constraint {kind}" for kind in _unkept_constraints(atoms)),
    ]


def warn_of_unwritable(names: Collection[str], format: str = "extended XYZ") -> None:
    """Warns which entries are left out of a file of a format."""
    if names:
        warnings.warn(
            f"{', '.join(sorted(names))} cannot be kept in {format} and {'is' if len(names) == 1 else 'are'} left out.",
            UQWarning,
            stacklevel=3,
        )


def without_unwritable(atoms: Atoms) -> Atoms:
    """The same structure, or a copy without the entries that extended XYZ cannot hold."""
    info, arrays = _unfit_info(atoms), _unfit_arrays(atoms)
    if not info and not arrays:
        return atoms
    copy = atoms.copy()
    for store, unfit in ((copy.info, info), (copy.arrays, arrays)):
        for key in unfit:
            del store[key]
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
    return _text(frame, frame.info, frame.arrays)


def extxyz_text(atoms: Atoms, results: Mapping[str, Any], **info: Any) -> str:
    """Text of a structure with `results`, which must belong to it, and further entries of info."""
    return _text(atoms, *stored(atoms, results, **info))


def _text(atoms: Atoms, info: Mapping[str, Any], arrays: Mapping[str, np.ndarray]) -> str:
    """Text of a structure with this info and these arrays: the bytes that ASE writes, in a third of the time.

    ASE formats one number at a time; here one format string covers a whole frame.
    """
    if np.shape(info.get("stress", ())) == (6,):
        info = {**info, "stress": voigt_6_to_full_3x3_stress(info["stress"])}
    if atoms.constraints:  # ASE knows how to write them
        frame = atoms.copy()
        frame.info, frame.arrays = dict(info), dict(arrays)
        if unkept := _unkept_constraints(frame):  # a run that goes on from this frame can then say so
            frame.info[LOST_KEY] = " ".join([*unkept, *lost_constraints(frame)])
        buffer = io.StringIO()
        write(buffer, frame, format="extxyz")
        return buffer.getvalue()
    columns = {"symbols": np.array(list(atoms.symbols)), "positions": atoms.positions}
    columns |= {name: column for name, column in arrays.items() if name not in ("numbers", "positions")}
    properties, widths, row_format = _layout(tuple((name, c.dtype.str, c.shape[1:]) for name, c in columns.items()))
    comment = _comment(atoms, info, properties)
    cells = [c.reshape(len(atoms), width).tolist() for c, width in zip(columns.values(), widths, strict=True)]
    flat = [cell for rows in zip(*cells, strict=True) for row in rows for cell in row]
    return f"{len(atoms)}\n{comment}\n" + row_format * len(atoms) % tuple(flat)


@lru_cache(maxsize=64)
def _layout(columns: tuple[tuple[str, str, tuple[int, ...]], ...]) -> tuple[str, list[int], str]:
    """ASE's description of columns, their widths and the format of a row, from their names, dtypes and shapes."""
    arrays = {name: np.empty((0, *shape), dtype) for name, dtype, shape in columns}
    comment, widths, _, row_format = output_column_format(Atoms(), list(arrays), arrays, False)
    return comment.removesuffix(' pbc="F F F"'), widths, row_format


def _comment(atoms: Atoms, info: Mapping[str, Any], properties: str) -> str:
    """The second line of a frame."""
    cell = atoms.cell.array
    lattice = [f'Lattice="{" ".join(map(str, cell.ravel().tolist()))}"'] if cell.any() else []
    entries = [text for key, value in info.items() if (text := _entry(key, value))]
    return " ".join([*lattice, properties, *entries, key_val_dict_to_str({"pbc": atoms.pbc})])


def _entry(key: Any, value: Any) -> str:
    """An entry of info, as ASE writes it; most are numbers."""
    if not _is_word(key):
        return key_val_dict_to_str({key: value})
    if type(value) is float:
        return f"{key}={value}"
    if isinstance(value, np.ndarray) and value.ndim == 1 and value.dtype == np.float64:
        text = " ".join(map(str, value.tolist()))
        return f'{key}="{text}"' if " " in text else f"{key}={text}"
    return key_val_dict_to_str({key: value})


@lru_cache(maxsize=1024)
def _is_word(key: Any) -> bool:
    return isinstance(key, str) and _WORD.fullmatch(key) is not None


def _unfit_info(atoms: Atoms) -> list[Any]:
    return [key for key, value in atoms.info.items() if not _fits_info(key, value)]


def _unfit_arrays(atoms: Atoms) -> list[Any]:
    columns = {"species", "pos0", "pos1", "pos2"}
    unfit: list[Any] = []
    for key, values in atoms.arrays.items():
        # The reader numbers the columns of a wide array: one of these names may be that of another array.
        names = {key} if values.ndim < 2 or values.shape[1] == 1 else {f"{key}{c}" for c in range(values.shape[1])}
        if not _fits_array(key, values) or (key not in ("numbers", "positions") and columns & names):
            unfit.append(key)
        else:
            columns |= names
    return unfit


def _fits_info(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not _is_key(key):
        return False
    if key in SPECIAL_3_3_KEYS:  # nine numbers to the reader, and six of a stress are written as nine
        if not _is_numeric(value, "if"):
            return False
        return (isinstance(value, np.ndarray) and value.size == 9) or (key == "stress" and np.shape(value) == (6,))
    if key in per_config_properties and not _is_numeric(value):  # arrays of numbers to the reader
        return False
    if isinstance(value, str):
        if _WORD.fullmatch(value):  # the usual note, without the time of parsing it
            return True
        return _is_line(value) and "\\" not in value and _comes_back(key, value)
    if isinstance(value, np.ndarray):
        simple = value.ndim < 2 and value.dtype.kind in "bif"
        return bool(value.size) and value.dtype.kind in "biufU" and (simple or _comes_back(key, value))
    if isinstance(value, list | tuple | dict):
        return _comes_back(key, value)
    return value is None or (isinstance(value, bool | int | float | np.number | np.bool_) and np.isrealobj(value))


@cache
def _is_key(key: str) -> bool:
    if not _is_line(key) or key in _RESERVED:
        return False
    with suppress(IndexError, ValueError):  # of a key that is all equals signs, of one that wants nine numbers
        return key_val_str_to_dict(key_val_dict_to_str({key: 1})).keys() == {key}
    return key in SPECIAL_3_3_KEYS


def _comes_back(key: str, value: Any) -> bool:
    """Whether ASE's reader finds this entry, and nothing else, in what its writer makes of it."""
    plain = value.tolist() if isinstance(value, np.ndarray) else value
    try:
        text = json.dumps(plain)
        entries = key_val_str_to_dict(key_val_dict_to_str({key: value}))
        if entries.keys() != {key}:
            return False
        back = entries[key]
        if isinstance(plain, str):  # text may come back as numbers or truth values
            return back == value if isinstance(back, str) else bool(np.size(back))
        return isinstance(back, np.ndarray) or json.dumps(back) == text
    except (TypeError, ValueError, RecursionError, IndexError):  # no JSON, or none that the reader understands
        return False


def _is_numeric(value: Any, kinds: str = "biuf") -> bool:
    try:
        return np.asarray(value).dtype.kind in kinds
    except ValueError:  # a ragged list
        return False


def _fits_array(key: Any, values: np.ndarray) -> bool:
    if key in ("numbers", "positions"):
        return True
    if not isinstance(key, str) or not _COLUMN.fullmatch(key) or key in _RESERVED_COLUMNS:
        return False
    if values.ndim not in (1, 2) or not values.size:
        return False
    if values.dtype.kind in "OU":
        is_result = key in per_atom_properties or key == "initial_charges"  # numbers to the reader
        return not is_result and all(
            isinstance(text, str) and text.split() == [text] and _is_line(text) for text in values.flat
        )
    if values.dtype.kind == "i":  # 32 bits to the reader
        return bool(_INT32.min <= values.min() and values.max() <= _INT32.max)
    return values.dtype.kind in "bf"


def _unkept_constraints(atoms: Atoms) -> list[str]:
    kept = FixAtoms, FixCartesian
    return sorted({type(constraint).__name__ for constraint in atoms.constraints if not isinstance(constraint, kept)})


def _is_line(text: str) -> bool:
    """Whether a text is a single line, without a line break at its end, that a file can hold."""
    # A zero byte in a file is what a power cut leaves.
    return text.splitlines() == [text] and "\0" not in text and not _SURROGATE.search(text)
