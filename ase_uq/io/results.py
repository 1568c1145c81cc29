"""Results of a calculator on a frame: stored where files keep them, and restored from there."""

from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator

from ase_uq.properties import PROPERTIES, STANDARD, UNCERTAINTIES, find_property

LOST_KEY = "lost_constraints"  # entry of info that names the constraints which a frame had and its file has not


class StoredResults(SinglePointCalculator):
    """A `SinglePointCalculator` that also holds keys ASE does not know."""

    name = "stored"

    def __init__(self, atoms: Atoms, results: Mapping[str, Any]) -> None:
        super().__init__(atoms, **{key: value for key, value in results.items() if key in STANDARD})
        self.results.update(results)


def annotated(atoms: Atoms, results: Mapping[str, Any] | None = None, **info: Any) -> Atoms:
    """A copy of a structure with results stored where files keep them.

    Args:
        atoms: Structure; its constraints, velocities and info are copied.
        results: Results to store; None takes those of `atoms.calc` if they belong to these positions.
        info: Further entries of `atoms.info`, for example the reason a frame was flagged.

    Returns:
        A structure with all results in a calculator of stored values and the uncertainties in `info` and `arrays`
        as well. Entries of `info` and `arrays` with the name of a result, such as a label "energy", are left out:
        files hold one value under a name.
    """
    stale = results is None and _is_stale(atoms)
    if results is None:
        results = _current_results(atoms)
    copy = atoms.copy()
    # Copies: some calculators write the next results into the same arrays.
    known = {key: deepcopy(value) for key, value in results.items() if find_property(key) is not None}
    if stale or any(key not in STANDARD for key in known):
        # Uncertainties that a file or an earlier calculation left would be taken for those of this calculation.
        drop_uncertainties(copy)
    for key in _hidden(copy, known):
        del _store(copy, key)[key]
    if known:
        copy.calc = StoredResults(copy, known)
    for key, value in known.items():
        entry = find_property(key)
        assert entry is not None
        if key in STANDARD:
            continue
        if entry.per_atom:
            copy.set_array(key, np.asarray(value, float))
        else:
            copy.info[key] = np.asarray(value, float) if entry.shape else float(value)
    copy.info.update(info)
    return copy


def hidden_labels(atoms: Atoms) -> list[str]:
    """Names of ASE's own under which a structure has an entry of info or arrays and a current result as well."""
    return _hidden(atoms, _current_results(atoms))


def _hidden(atoms: Atoms, results: Mapping[str, Any]) -> list[str]:
    return [key for key in STANDARD if key in results and key in _store(atoms, key)]


def _store(atoms: Atoms, key: str) -> dict[str, Any]:
    return atoms.arrays if PROPERTIES[key].per_atom else atoms.info


def lost_constraints(atoms: Atoms) -> list[str]:
    """Kinds of the constraints that a structure had before a file that could not hold them, and has not again."""
    kinds = {type(constraint).__name__ for constraint in atoms.constraints}
    return [kind for kind in str(atoms.info.get(LOST_KEY, "")).split() if kind not in kinds]


def drop_uncertainties(atoms: Atoms) -> None:
    """Removes uncertainties that an earlier calculation left in info and arrays; labels stay."""
    for store in (atoms.info, atoms.arrays):
        for key in [key for key in store if key not in STANDARD and find_property(key) is not None]:
            del store[key]


def with_results(atoms: Atoms) -> Atoms:
    """Adds the uncertainties in info and arrays to the stored results; returns the same structure."""
    results = dict(atoms.calc.results) if isinstance(atoms.calc, Calculator) else {}
    known = len(results)
    for store, per_atom in ((atoms.info, False), (atoms.arrays, True)):
        for key, value in store.items():
            entry = find_property(key)
            # A user's own info entry with a name like `gamma_only` is not an array over atoms.
            if key.startswith(UNCERTAINTIES) and entry is not None and entry.per_atom == per_atom:
                results[key] = value
    if len(results) > known:
        atoms.calc = StoredResults(atoms, results)
    return atoms


def _is_stale(atoms: Atoms) -> bool:
    # Results of a shared calculator, or of positions before the last step, are not this structure's.
    return isinstance(atoms.calc, Calculator) and bool(atoms.calc.check_state(atoms))


def _current_results(atoms: Atoms) -> Mapping[str, Any]:
    return atoms.calc.results if isinstance(atoms.calc, Calculator) and not _is_stale(atoms) else {}
