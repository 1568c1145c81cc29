"""A frame as named arrays and texts: what HDF5 keeps of it, and the records from which it is made.

The name of a value is the place that H5MD has for it: `particles/NAME` of what each atom has, `observables/NAME` of an
entry of info, `box/edges` and `box/pbc` of the cell. Numbers are arrays; everything else is a text in JSON.
"""

import json
import re
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import unquote

import numpy as np
from ase import Atoms
from ase.calculators.calculator import all_properties
from ase.constraints import dict2constraint
from ase.io.extxyz import per_config_properties, set_calc_and_arrays
from ase.io.jsonio import decode, encode

from ase_uq.io.results import LOST_KEY, columns_of, lost_constraints, shaped
from ase_uq.properties import find_property

Contents = dict[str, np.ndarray | str]

PER_ATOM, ENTRY = "particles/", "observables/"
SPECIES, POSITION, EDGES, PBC, CONSTRAINTS = (
    "particles/species",
    "particles/position",
    "box/edges",
    "box/pbc",
    "constraints",
)
# Names that H5MD has for something of its own, or that readers of it take for something else in ASE.
_TAKEN = {"box", "charge", "force", "mass", "position", "potential_energy", "species", "velocity"}
_NUMERIC = "biuf"
_ODD = re.compile(r"[\0\ud800-\udfff]")  # what a name in a file cannot have: an end, half a character


def contents_of(atoms: Atoms, info: Mapping[Any, Any], arrays: Mapping[Any, np.ndarray]) -> tuple[Contents, list[str]]:
    """What a file keeps of a structure with this info and these arrays, as `stored` gives them.

    Nothing is rounded.

    Returns:
        What is kept, and the names of the entries that cannot be.
    """
    contents: Contents = {
        SPECIES: atoms.numbers.astype(np.uint8),
        POSITION: atoms.positions,
        EDGES: atoms.cell.array,
        PBC: atoms.pbc,
    }
    left_out = []
    for key, values in arrays.items():
        if key in ("numbers", "positions"):
            continue
        if (kept := _kept_array(key, values)) is None:
            left_out.append(f"arrays[{key!r}]")
        else:
            contents[PER_ATOM + _name_of(key)] = kept
    if atoms.constraints:
        lost = _unkept_constraints(atoms)
        kept_ones = [constraint.todict() for constraint in atoms.constraints if type(constraint).__name__ not in lost]
        if kept_ones:
            contents[CONSTRAINTS] = encode(kept_ones)
        if lost:
            left_out += [f"the constraint {kind}" for kind in lost]
            info = {**info, LOST_KEY: " ".join([*lost, *lost_constraints(atoms)])}
    for key, value in info.items():
        if (entry := _kept_entry(key, value)) is None:
            left_out.append(f"info[{key!r}]")
        else:
            contents[ENTRY + _name_of(key)] = entry
    return contents, left_out


def atoms_of(contents: Contents) -> Atoms:
    """The structure, with results where ASE's reader of extended XYZ has them: ours in info and arrays."""
    info, arrays = {}, {}
    for path, value in contents.items():
        place, _, name = path.partition("/")
        if place == "observables":
            info[_key_of(name)] = _entry_of(value)
        elif place == "particles" and path not in (SPECIES, POSITION):
            key = _key_of(name)
            arrays[key] = np.array(json.loads(value)) if isinstance(value, str) else value
            if arrays[key].ndim > 2 and find_property(key) is not None:
                arrays[key] = columns_of(arrays[key])
    atoms = Atoms(
        contents[SPECIES],
        positions=contents[POSITION],
        cell=contents[EDGES],
        pbc=contents[PBC],
        charges=arrays.pop("initial_charges", None),
        info=info,
    )
    if CONSTRAINTS in contents:
        atoms.set_constraint(_constraints(as_text(contents[CONSTRAINTS])))
    set_calc_and_arrays(atoms, arrays)
    return atoms


def as_text(values: np.ndarray | str) -> str:
    """A value as JSON, which it is already or becomes where an array cannot hold those of all frames."""
    return values if isinstance(values, str) else json.dumps(values.tolist())


def key_at(path: str) -> str:
    """The key in info or arrays of what stands at a place."""
    return _key_of(path.partition("/")[2])


def _kept_array(key: Any, values: np.ndarray) -> np.ndarray | str | None:
    if not _is_name(key) or not values.size:
        return None
    if values.dtype.kind in _NUMERIC:
        return shaped(key, _common(values))
    is_text = values.dtype.kind in "OU" and all(isinstance(text, str) for text in values.flat)
    return json.dumps(values.tolist()) if is_text and key not in all_properties else None


def _kept_entry(key: Any, value: Any) -> np.ndarray | str | None:
    if not _is_name(key):
        return None
    if type(value) is float:  # most are
        return np.array(value)
    if not isinstance(value, str | dict) and value is not None:
        try:
            array = np.asarray(value)
        except ValueError:  # a ragged list
            array = np.empty(0)
        if array.dtype.kind in _NUMERIC and array.size:
            return _common(array)
    if key in per_config_properties:  # numbers to ASE
        return None
    try:
        text = json.dumps(value.tolist() if isinstance(value, np.ndarray) else value)
        return text if isinstance(value, str) or json.dumps(json.loads(text)) == text else None
    except (TypeError, ValueError, RecursionError):
        return None


def _common(values: np.ndarray) -> np.ndarray:
    """The same numbers in a type that every reader of HDF5 has: no longer than 8 bytes."""
    return values.astype(np.float64) if values.dtype.itemsize > 8 else values


def _entry_of(value: np.ndarray | str) -> Any:
    """An entry of info: a list of numbers is an array, as in extended XYZ."""
    if not isinstance(value, str):
        return value.copy() if value.ndim else value[()]
    entry = json.loads(value)
    if isinstance(entry, list) and entry:
        try:
            array = np.asarray(entry)
        except ValueError:  # a ragged list
            return entry
        return array if array.dtype.kind in _NUMERIC else entry
    return entry


@lru_cache(maxsize=1024)
def _is_name(key: Any) -> bool:
    return isinstance(key, str) and bool(key) and not _ODD.search(key)


@lru_cache(maxsize=1024)
def _name_of(key: str) -> str:
    """The name of a key in a file: itself, where no slash, which parts groups, and no name of H5MD is in it."""
    if key in _TAKEN or key in (".", ".."):
        return f"%{ord(key[0]):02X}{key[1:]}"
    return key.replace("%", "%25").replace("/", "%2F")


@lru_cache(maxsize=1024)
def _key_of(name: str) -> str:
    return unquote(name)


def _unkept_constraints(atoms: Atoms) -> list[str]:
    return sorted({type(constraint).__name__ for constraint in atoms.constraints if not _is_kept(constraint)})


def _constraints(text: str) -> list[Any]:
    known: Any = decode(text)
    return [dict2constraint(constraint) for constraint in known]


def _is_kept(constraint: Any) -> bool:
    try:
        _constraints(encode([constraint.todict()]))
    except Exception:  # one of the user's own, or one that ASE cannot write down
        return False
    return True
