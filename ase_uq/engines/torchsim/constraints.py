"""States with the constraints of the ASE structures that they are made from, which TorchSim drops."""

import warnings
from typing import Any

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms
from ase.constraints import FixAtoms

from ase_uq.errors import UQWarning


def initial_state(system: Any, device: torch.device, dtype: torch.dtype) -> ts.SimState:
    """A state as `ts.initialize_state` makes it, in which the atoms of ASE's `FixAtoms` stay fixed.

    Warns of the other constraints, which it has not.

    Args:
        system: ASE Atoms, several of them, or whatever else TorchSim takes.
        device: Device of the state.
        dtype: Dtype of the state.
    """
    state = ts.initialize_state(system, device, dtype)
    structures = [system] if isinstance(system, Atoms) else system if isinstance(system, list | tuple) else []
    if not all(isinstance(atoms, Atoms) for atoms in structures):
        return state
    fixed, lost = [], set()
    starts = np.cumsum([0, *map(len, structures)])
    for start, atoms in zip(starts, structures, strict=False):  # the last start is the end
        for constraint in atoms.constraints:
            if isinstance(constraint, FixAtoms):
                fixed.append(start + np.arange(len(atoms))[constraint.index])
            else:
                lost.add(type(constraint).__name__)
    if fixed and len(indices := np.unique(np.concatenate(fixed))):
        state.constraints = [*state.constraints, ts.constraints.FixAtoms(atom_idx=torch.from_numpy(indices).to(device))]
    if lost:
        warnings.warn(
            f"TorchSim has no constraints {', '.join(sorted(lost))}: the run goes on without them. Of ASE's "
            "constraints FixAtoms is kept; give a state with TorchSim's own for others, or run in ASE.",
            UQWarning,
            stacklevel=4,
        )
    return state
