"""Results of recent structures, found again if every bit of the potential's inputs is the same."""

from collections import OrderedDict
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

import numpy as np
from ase import Atoms

# Room for a band of images or the ends of a dimer, twice over; at most about 30 MB of results.
_MOST_STRUCTURES, _MOST_ATOMS = 100, 100_000


class Memory:
    """Results of the structures calculated last, by their inputs. Copies go in and copies come out."""

    def __init__(self) -> None:
        self._kept: OrderedDict[Hashable, tuple[int, dict[str, Any]]] = OrderedDict()
        self._n_atoms = 0

    def recall(self, inputs: Hashable | None) -> dict[str, Any]:
        """Results of these inputs; empty if there are none."""
        if inputs not in self._kept:
            return {}
        self._kept.move_to_end(inputs)
        return copied_results(self._kept[inputs][1])

    def keep(self, inputs: Hashable | None, n_atoms: int, results: Mapping[str, Any]) -> None:
        """Adds or replaces results; those unused for the longest time are dropped, but never the newest."""
        if inputs is None:
            return
        before, _ = self._kept.pop(inputs, (0, {}))
        self._kept[inputs] = n_atoms, copied_results(results)
        self._n_atoms += n_atoms - before
        while len(self._kept) > 1 and (len(self._kept) > _MOST_STRUCTURES or self._n_atoms > _MOST_ATOMS):
            _, (gone, _) = self._kept.popitem(last=False)
            self._n_atoms -= gone


def inputs_of(atoms: Atoms, info_keys: Sequence[str]) -> Hashable | None:
    """The inputs of the potential, to the last bit; None if they cannot be compared, as with NaN."""
    arrays = atoms.arrays
    values = (
        arrays["positions"],
        atoms.cell.array,
        atoms.pbc,
        arrays["numbers"],
        arrays.get("initial_charges"),
        arrays.get("initial_magmoms"),
        *(atoms.info.get(key) for key in info_keys),
    )
    parts = [_bits(value) for value in values]
    return None if None in parts else tuple(parts)


def _bits(value: Any) -> Hashable | None:
    """A value in a form for exact comparison, whatever its precision; None for NaN and for objects."""
    if value is None:
        return ()
    array = np.asarray(value)
    if array.dtype.kind in "US":
        return array.shape, array.dtype.str, array.tobytes()
    if array.dtype.kind not in "biuf":
        return None
    array = np.asarray(array, float)
    return None if np.isnan(array).any() else (array.shape, array.tobytes())


def copied_results(results: Mapping[str, Any]) -> dict[str, Any]:
    """Copies of results, whose arrays may be changed without changing the remembered ones."""
    return {key: value.copy() if isinstance(value, np.ndarray) else value for key, value in results.items()}
