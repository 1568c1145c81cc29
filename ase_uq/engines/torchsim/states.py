"""The tensors of a TorchSim state, kept and put back system by system."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch_sim.state import get_attrs_for_scope


def rows_of(state: Any) -> dict[tuple[str, str], Tensor]:
    """Copies of all per-atom and per-system tensors of a state, since integrators may write in place."""
    return {
        (scope, name): value.clone()
        for scope in ("per-atom", "per-system")
        for name, value in get_attrs_for_scope(state, scope)
        if isinstance(value, torch.Tensor)
    }


def put_back(state: Any, before: Mapping[tuple[str, str], Tensor], systems: Tensor) -> None:
    """Resets the rows of the chosen systems, (n_systems,) booleans, to the values that they had before."""
    if not systems.any():
        return
    for (scope, name), then in before.items():
        now = getattr(state, name)
        # The history of L-BFGS grows, so its shape may differ; a halted replica's part of it is never used.
        if name == "system_idx" or now.shape != then.shape:
            continue
        rows = systems if scope == "per-system" else systems[state.system_idx]
        setattr(state, name, torch.where(rows.reshape(-1, *[1] * (now.ndim - 1)), then, now))
