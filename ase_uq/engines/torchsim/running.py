"""The systems of a batch that still run: only they are evaluated, and only their rows of the state move."""

from collections.abc import Mapping
from typing import Any

import torch
import torch_sim as ts
from ase import Atoms
from torch import Tensor
from torch_sim.models.interface import ModelInterface
from torch_sim.state import get_attrs_for_scope

from ase_uq.engines.torchsim.model import UncertainModel
from ase_uq.prediction import Prediction
from ase_uq.stream.passes import LeftOut


class RunningModel(ModelInterface):
    """The model as an integrator sees it: it evaluates the systems that still run, and remembers their predictions.

    Args:
        model: The model that evaluates them.

    Attributes:
        left_out: (n_systems,) whether to leave out each system; None to leave out none.
        broken: Systems that could not be evaluated in the last pass, and why.
        systems: Numbers, within the batch, of the systems that were evaluated.
        frames: Structures of these systems.
        predictions: Predictions for these systems.
    """

    def __init__(self, model: UncertainModel) -> None:
        super().__init__()
        self._model = model
        self._device, self._dtype = model.device, model.dtype
        self._compute_forces, self._compute_stress = model.compute_forces, model.compute_stress
        self.left_out: Tensor | None = None
        self.broken: dict[int, str] = {}
        self.systems: list[int] = []
        self.frames: list[Atoms] = []
        self.predictions: list[Prediction] = []

    def forward(self, state: ts.SimState, **kwargs: Any) -> dict[str, Tensor]:
        """The outputs of the model; rows of systems that were not evaluated are 0."""
        halted = set() if self.left_out is None else _chosen(self.left_out)
        not_finite = _not_finite(state)
        running = [system for system in range(state.n_systems) if system not in not_finite | halted]
        frames = self._model._frames(state, running)

        self.broken = dict.fromkeys(sorted(not_finite - halted), "positions or cell are no longer finite")
        self.systems, self.frames, self.predictions = [], [], []
        for system, atoms, outcome in zip(running, frames, self._model.predictor.outcomes(frames), strict=True):
            if isinstance(outcome, LeftOut):
                self.broken[system] = outcome.reason.rstrip(".")
            else:
                self.systems.append(system)
                self.frames.append(atoms)
                self.predictions.append(outcome)
        if not self.systems:
            return self._zeros(state)
        return self._model._outputs(state, dict(zip(self.systems, self.predictions, strict=True)))

    def _zeros(self, state: ts.SimState) -> dict[str, Tensor]:
        zeros = {"energy": state.positions.new_zeros(state.n_systems), "forces": torch.zeros_like(state.positions)}
        if self.compute_stress:
            zeros["stress"] = torch.zeros_like(state.cell)
        return zeros


def _not_finite(state: ts.SimState) -> set[int]:
    """Systems whose positions or cell are not finite."""
    lost_atoms = ~torch.isfinite(state.positions).all(1)
    lost_cells = ~torch.isfinite(state.cell).all(2).all(1)
    return {*state.system_idx[lost_atoms].tolist(), *_chosen(lost_cells)}


def _chosen(systems: Tensor) -> set[int]:
    """(n_systems,) booleans → numbers of the systems for which they are true."""
    return set(torch.nonzero(systems)[:, 0].tolist())


def copied_rows(state: Any) -> dict[tuple[str, str], Tensor]:
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
