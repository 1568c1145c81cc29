"""The toy potential with drawn weights: those of its energy, with one α a structure.

E_t = base + Σ_i (w ∘ (1 + √α(G) ε_t))·φ_i,    α a function of the mean of φ over the atoms
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ase_uq.backends._autograd import VOIGT
from ase_uq.backends.base import Batch
from ase_uq.backends.stochastic import Drawn, StochasticModel
from ase_uq.numerics.variational import Rates


class StochasticToy(StochasticModel):
    """A toy potential whose weights can be drawn.

    Args:
        potential: A conservative `ToyPotential`, or a copy of one.
    """

    def __init__(self, potential: Any) -> None:
        self._potential = potential
        self.layers = (("energy", potential.weights.numel()),)

    @property
    def parameters(self) -> dict[str, torch.nn.Parameter]:
        return dict(self._potential.named_parameters())

    def invariants(self, batch: Batch) -> Tensor:
        return _means(self._potential(batch.data, forces=False)["phi"], batch.data)

    def draw(
        self, batch: Batch, rates: Rates, noise: Sequence[Tensor], *, forces: bool = True, training: bool = False
    ) -> Drawn:
        graph, (epsilon,) = batch.data, noise
        out = self._potential(graph, forces=False, keep_graph=True)
        alpha = rates(_means(out["phi"], graph))
        n_frames = len(alpha)
        drawn = _sums(out["phi"] @ (self._potential.weights * epsilon).T, graph, n_frames)
        energy = (out["energy"][:, None] + alpha.sqrt().to(drawn) * drawn).T
        if not forces:
            return Drawn(energy, None, None, alpha)
        slopes = [
            torch.autograd.grad(one.sum(), (out["positions"], out["strain"]), retain_graph=True, create_graph=training)
            for one in energy
        ]
        volume = torch.linalg.det(graph.cell).abs()
        virial = torch.stack([strain for _, strain in slopes])
        stress = virial / torch.where(volume > 0, volume, torch.inf)[:, None, None]
        return Drawn(
            energy=energy,
            forces=-torch.stack([positions for positions, _ in slopes]),
            stress=stress.reshape(len(energy), n_frames, 9)[..., VOIGT],
            rates=alpha,
        )


def _sums(rows: Tensor, graph: Any, n_frames: int) -> Tensor:
    """(n_atoms, k) → (n_frames, k)."""
    return rows.new_zeros(n_frames, rows.shape[1]).index_add(0, graph.frame_of_atom, rows)


def _means(rows: Tensor, graph: Any) -> Tensor:
    counts = graph.n_atoms_of_frame
    return _sums(rows, graph, len(counts)) / counts[:, None]
