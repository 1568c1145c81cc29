"""Inputs of a MACE model from structures: as mace builds them, for a whole batch at once."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from ase import Atoms
from mace import data as mace_data
from mace.data.neighborhood import get_neighborhood
from mace.tools import torch_geometric, torch_tools
from mace.tools.utils import AtomicNumberTable
from torch import Tensor

_STRUCTURAL = {
    *("edge_index", "shifts", "unit_shifts", "positions", "node_attrs"),
    *("cell", "volume", "rcell", "pbc", "batch", "ptr"),
}


@dataclass(frozen=True)
class Graphs:
    """Turns structures into the inputs of a MACE model, on the CPU; can be pickled.

    mace makes some thirty tensors of each structure and joins them, which takes as long as a layer of a small
    potential. Here only those that depend on the structure are made, and for all structures together; the others are
    taken from mace once. A batch with a structure that has a further entry for the potential is left to mace.

    Args:
        info_keys: mace's names of what the potential may read of `atoms.info`, and the names that it has there.
        arrays_keys: The same for `atoms.arrays`.
        numbers: Atomic numbers that the potential knows, in its order.
        cutoff: Cutoff in the potential's own unit of length.
        heads: Names of its heads.
        head: The one that predicts.
        dtype: Name of its precision, `"float32"` or `"float64"`.
    """

    info_keys: tuple[tuple[str, str], ...]
    arrays_keys: tuple[tuple[str, str], ...]
    numbers: tuple[int, ...]
    cutoff: float
    heads: tuple[str, ...]
    head: str
    dtype: str

    def __call__(self, frames: Sequence[Atoms]) -> dict[str, Tensor]:
        if any(self._has_entries(atoms) for atoms in frames):
            return self._left_to_mace(frames)
        return self._joined(frames)

    def _has_entries(self, atoms: Atoms) -> bool:
        return any(key in atoms.info for _, key in self.info_keys) or any(
            key in atoms.arrays for _, key in self.arrays_keys
        )

    def _joined(self, frames: Sequence[Atoms]) -> dict[str, Tensor]:
        dtype = getattr(torch, self.dtype)
        counts = [len(atoms) for atoms in frames]
        starts = np.concatenate([[0], np.cumsum(counts)])
        # It changes the cell that it is given, in directions that are not periodic.
        edges, shifts, unit_shifts, cells = zip(
            *(
                get_neighborhood(atoms.positions, self.cutoff, tuple(atoms.pbc.tolist()), atoms.cell.array.copy())
                for atoms in frames
            ),
            strict=True,
        )
        kind_of = np.zeros(max(self.numbers) + 1, int)
        kind_of[list(self.numbers)] = np.arange(len(self.numbers))
        kinds = kind_of[np.concatenate([atoms.numbers for atoms in frames])]
        cell = torch.as_tensor(np.concatenate(cells), dtype=dtype)
        volume = torch.linalg.det(cell.view(-1, 3, 3))
        reciprocal = torch.zeros_like(cell).view(-1, 3, 3)
        reciprocal[volume != 0] = 2 * torch.pi * torch.linalg.inv(cell.view(-1, 3, 3)[volume != 0].mT)
        made = {
            "edge_index": torch.as_tensor(
                np.concatenate([edge + start for edge, start in zip(edges, starts, strict=False)], 1), dtype=torch.long
            ),
            "shifts": torch.as_tensor(np.concatenate(shifts), dtype=dtype),
            "unit_shifts": torch.as_tensor(np.concatenate(unit_shifts), dtype=dtype),
            "positions": torch.as_tensor(np.concatenate([atoms.positions for atoms in frames]), dtype=dtype),
            "node_attrs": torch.eye(len(self.numbers), dtype=dtype)[kinds],
            "cell": cell,
            "volume": volume,
            "rcell": reciprocal.view(-1, 3),
            "pbc": torch.as_tensor(np.stack([atoms.pbc for atoms in frames])),
            "batch": torch.as_tensor(np.repeat(np.arange(len(frames)), counts)),
            "ptr": torch.as_tensor(starts),
        }
        of_atom, of_frame = _constants(self)
        made |= {key: _repeated(value, int(starts[-1])) for key, value in of_atom.items()}
        return made | {key: _repeated(value, len(frames)) for key, value in of_frame.items()}

    def _left_to_mace(self, frames: Sequence[Atoms]) -> dict[str, Tensor]:
        keys = mace_data.KeySpecification(dict(self.info_keys), dict(self.arrays_keys))
        with torch_tools.default_dtype(self.dtype):
            graphs = [
                mace_data.AtomicData.from_config(
                    mace_data.config_from_atoms(atoms, key_specification=keys, head_name=self.head),
                    z_table=AtomicNumberTable(self.numbers),
                    cutoff=self.cutoff,
                    heads=list(self.heads),
                )
                for atoms in frames
            ]
        made: dict[str, Any] = torch_geometric.Batch.from_data_list(graphs).to_dict()
        return made


@lru_cache(maxsize=16)
def _constants(graphs: Graphs) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """(1, ...) rows that are the same for all atoms, and for all structures without entries for the potential."""
    number = graphs.numbers[0]
    # Of three atoms and two structures, so that each tensor's length says what its rows are of.
    made = graphs._left_to_mace([Atoms([number]), Atoms([number] * 2, [[0.0, 0, 0], [0, 0, 1]])])
    rest = {key: value[:1] for key, value in made.items() if key not in _STRUCTURAL}
    return (
        {key: value for key, value in rest.items() if len(made[key]) == 3},
        {key: value for key, value in rest.items() if len(made[key]) == 2},
    )


def _repeated(value: Tensor, n: int) -> Tensor:
    return value.repeat(n, *[1] * (value.dim() - 1))
