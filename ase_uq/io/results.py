"""Results of a calculator on a frame: stored where files keep them, and restored from there."""

from collections.abc import Iterable, Mapping
from copy import deepcopy
from functools import cache, lru_cache
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator

from ase_uq.errors import InputError
from ase_uq.properties import PROPERTIES, STANDARD, UNCERTAINTIES, find_property

# Entry of info: sums over the structure that uncertainties in info and arrays belong to. A copy keeps all of them, and
# then somebody moves its atoms.
BELONG_KEY = "uncertainty_of"
# Entry of info: which uncertainty model drew the members that a frame has.
ENSEMBLE_KEY = "ensemble_of"
# Entry of info: the uncertainty model that `score` took. A file of another one has the same keys.
SCORED_KEY = "scored_with"
LOST_KEY = "lost_constraints"  # entry of info that names the constraints which a frame had and its file has not


_STANDARD_DEVIATIONS = tuple(key for key in UNCERTAINTIES if key.endswith("_uncertainty"))


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
    notes: dict[str, Any] = {}
    if results is None:
        results = current_results(atoms)
        if isinstance(atoms.calc, StoredResults) and not stale:
            notes = {key: atoms.info[key] for key in (ENSEMBLE_KEY, SCORED_KEY) if key in atoms.info}
    copy = atoms.copy()
    # Copies: some calculators write the next results into the same arrays.
    known = {key: deepcopy(value) for key, value in results.items() if find_property(key) is not None}
    uncertain = any(key not in STANDARD for key in known)
    if stale or uncertain or not uncertainties_belong(copy):
        # Uncertainties that a file or an earlier calculation left would be taken for those of this calculation.
        drop_uncertainties(copy)
    if uncertain:
        copy.info[BELONG_KEY] = check_sums(copy)
        copy.info |= {key: note for key, note in notes.items() if key == SCORED_KEY or "energy_ensemble" in known}
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
            copy.set_array(key, columns_of(value))
        else:
            copy.info[key] = np.asarray(value, float) if entry.shape else float(value)
    copy.info.update(info)
    return copy


def stored(atoms: Atoms, results: Mapping[str, Any], **info: Any) -> tuple[dict[Any, Any], dict[Any, np.ndarray]]:
    """What info and arrays of a structure are in a file that keeps `results`, which must belong to it.

    Args:
        atoms: Structure. Results of an earlier calculation in its info and arrays are left out.
        results: Results; those without a known key are left out.
        info: Further entries of info.
    """
    entries, arrays = ({key: store[key] for key in store if not _is_known(key)} for store in (atoms.info, atoms.arrays))
    for key, value in results.items():
        known = _property(key)
        if known is not None:
            (arrays if known.per_atom else entries)[key] = columns_of(value) if known.per_atom else value
    entries.pop(ENSEMBLE_KEY, None)
    return entries | {BELONG_KEY: check_sums(atoms), **info}, arrays


def _is_known(key: Any) -> bool:
    return isinstance(key, str) and _property(key) is not None


_property = cache(find_property)  # called for every key of every frame


def columns_of(value: Any) -> np.ndarray:
    """A result of each atom as files have it: in columns, where it is a matrix."""
    array = np.asarray(value, float)
    return array.reshape(len(array), -1) if array.ndim > 2 else array


def hidden_labels(atoms: Atoms) -> list[str]:
    """Names of ASE's own under which a structure has an entry of info or arrays and a current result as well."""
    return _hidden(atoms, current_results(atoms))


def _hidden(atoms: Atoms, results: Mapping[str, Any]) -> list[str]:
    return [key for key in STANDARD if key in results and key in _store(atoms, key)]


def _store(atoms: Atoms, key: str) -> dict[str, Any]:
    return atoms.arrays if PROPERTIES[key].per_atom else atoms.info


def lost_constraints(atoms: Atoms) -> list[str]:
    """Kinds of the constraints that a structure had before a file that could not hold them, and has not again."""
    kinds = {type(constraint).__name__ for constraint in atoms.constraints}
    return [kind for kind in str(atoms.info.get(LOST_KEY, "")).split() if kind not in kinds]


def has_uncertainties(atoms: Atoms) -> bool:
    """Whether a calculator of ours has left its uncertainties in info, arrays or results."""
    results = atoms.calc.results if isinstance(atoms.calc, Calculator) else {}
    # `gamma` or `contact` alone may be anybody's.
    return any(key in results or key in _store(atoms, key) for key in _STANDARD_DEVIATIONS)


def drop_uncertainties(atoms: Atoms) -> None:
    """Removes uncertainties that an earlier calculation left in info and arrays; labels stay."""
    for store, per_atom in ((atoms.info, False), (atoms.arrays, True)):
        for key in [key for key in store if _is_uncertainty(key, per_atom)]:
            del store[key]
    for key in (BELONG_KEY, ENSEMBLE_KEY, SCORED_KEY):
        atoms.info.pop(key, None)


def _is_uncertainty(key: Any, per_atom: bool) -> bool:
    """Whether an entry of arrays (`per_atom`) or info has the name and the place of one of our uncertainties.

    Only standard deviations come from several methods, with a suffix: `contact_id` or `gamma_only` are the user's own.
    """
    if not isinstance(key, str):
        return False
    of_a_method = key.startswith(tuple(f"{name}_" for name in _STANDARD_DEVIATIONS))
    entry = find_property(key) if key in UNCERTAINTIES or of_a_method else None
    return entry is not None and entry.per_atom == per_atom


def uncertainties_belong(atoms: Atoms) -> bool:
    """Whether uncertainties in info and arrays are those of this structure; True as well if nobody noted it."""
    noted = atoms.info.get(BELONG_KEY)
    if noted is None:
        return True
    try:
        # Files round positions; who moves an atom by less does not change its uncertainty either.
        return bool(np.allclose(np.asarray(noted, float), check_sums(atoms), rtol=1e-12, atol=1e-5))
    except (TypeError, ValueError):  # somebody else's entry of this name
        return False


def check_sums(atoms: Atoms) -> np.ndarray:
    """(3,) sums over numbers, positions and cell that differ between structures, and hardly with rounding."""
    values = np.concatenate([atoms.positions.ravel(), atoms.cell.array.ravel(), atoms.numbers])
    return _waves(len(values)) @ values


@lru_cache(maxsize=8)
def _waves(n: int) -> np.ndarray:
    return np.cos(np.outer([1.0, 2.0, 3.0], np.arange(n)))


def with_results(atoms: Atoms) -> Atoms:
    """Adds the uncertainties in info and arrays to the stored results; returns the same structure.

    Those of another structure, as of a copy whose atoms were moved, are removed.
    """
    if not uncertainties_belong(atoms):
        drop_uncertainties(atoms)
        return atoms
    results = dict(atoms.calc.results) if isinstance(atoms.calc, Calculator) else {}
    known = len(results)
    for store, per_atom in ((atoms.info, False), (atoms.arrays, True)):
        results |= {key: shaped(key, value) for key, value in store.items() if _is_uncertainty(key, per_atom)}
    if len(results) > known:
        atoms.calc = StoredResults(atoms, results)
    return atoms


def shaped(key: str, value: Any) -> Any:
    """A result of each atom from the columns in which files have it; anything else as it is."""
    entry = _property(key)
    if entry is None or not entry.per_atom or len(entry.shape) < 2:
        return value
    array = np.asarray(value)
    fits = array.dtype.kind == "f" and array.size % (len(array) * entry.shape[0]) == 0
    return array.reshape(len(array), *entry.shape) if fits else value  # somebody else's column of this name


def _is_stale(atoms: Atoms) -> bool:
    # Results of a shared calculator, or of positions before the last step, are not this structure's.
    return isinstance(atoms.calc, Calculator) and bool(atoms.calc.check_state(atoms))


def current_results(atoms: Atoms) -> Mapping[str, Any]:
    """The results of the calculator of a structure if they are of this structure, else none."""
    return atoms.calc.results if isinstance(atoms.calc, Calculator) and not _is_stale(atoms) else {}


def scored_results(atoms: Atoms, keys: Iterable[str], scored_with: str, name: str) -> Mapping[str, Any]:
    """The results of a frame that `score` wrote.

    Args:
        atoms: The frame.
        keys: Results that the uncertainty model gives.
        scored_with: Name of the uncertainty model, as in `UncertaintyModel.name`. Frames that do not tell theirs, as of
            other tools, are taken for its own.
        name: What messages call the frame.

    Raises:
        InputError: A result is missing, or the frame was scored with another uncertainty model.
    """
    results = current_results(atoms)
    if lacking := [key for key in keys if key not in results]:
        raise InputError(
            f"{name} has no {lacking[0]}, which frames have that `score` wrote with this uncertainty model, unless "
            "they were changed since. Score them, or name the potential as well."
        )
    if other := told_of_another_model(atoms, scored_with, name):
        raise InputError(f"{other}, or name the potential as well.")
    return results


def told_of_another_model(atoms: Atoms, scored_with: str, name: str) -> str:
    """What there is to say, but for the full stop, if a frame tells that it was scored with another model than this."""
    noted = str(atoms.info.get(SCORED_KEY, scored_with))
    if noted == scored_with:
        return ""
    return (
        f"{name} was scored with another uncertainty model ({noted}) than the one that is given ({scored_with}). Give "
        "the one it was scored with (`ase-uq info --details` tells the name of each), score the frames again"
    )
