"""Neural tangent kernel of the finite network: the residual variance if every weight of the potential were free.

    energy    Φ_s = ∂E_s/∂θ / N
    forces    Φ_sm = ∂(Σ_j δ_mj·F_j)/∂θ / √(3N), random signs δ_m: with equal signs the sum over all 3N force
              components would be 0 by translation; with random signs its square is on average the mean of their squares

The gradients by millions of parameters are sketched to a few hundred numbers; the residual variance of the sketches
ranks frames as that of the full gradients does, and calibration sets its scale.

The method costs one backward pass through the potential per frame and one through its forces per frame and tangent:
far more than the forward pass. It suits the screening of pools, not molecular dynamics. It distinguishes frames, but
not the atoms of a frame, which all get the score of their frame.

Sources: Holzmüller et al. 2023 (finite-width tangent kernel, sketched, bmdal), arXiv:2605.13788 (forces).
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.communicator import Communicator, gather
from ase_uq.forward_pass import ForwardPass, Gradients, Targets
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods.base import Accumulator, Head, Implied, Method, Raw
from ase_uq.numerics.hashing import random_signs, substream
from ase_uq.numerics.posterior import mean_square, residual
from ase_uq.numerics.sketch import Sketch

MOST_TANGENTS = 1024  # each costs a backward pass


class NTKHead(Head):
    """A fitted neural tangent kernel.

    Args:
        settings: Hyper-parameters and results of the fit, as JSON values.
        tensors: Roots R with v = ‖ΦR‖² of a sketch Φ: `energy_root`, mean 1 over the fitted frames, and `force_root`,
            mean 1 over the fitted atoms; float64.
    """

    gradients = True
    energy_root: Tensor
    force_root: Tensor

    def __init__(self, settings: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        super().__init__(settings, tensors)
        self.sketch = Sketch(settings["parameters"], settings["size"], settings["seed"])

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        size = min(settings.whole("size", 1), settings.whole("parameters", 1))
        settings.whole("tangents", 1, MOST_TANGENTS)
        settings.whole("seed", -(2**63), 2**63 - 1)
        for name in ("energy_root", "force_root"):
            tensors.take(name, size, size)
        return Implied({"forces": 2, "energy": 2, "stress": 2})

    def forward(self, forward_pass: ForwardPass) -> Raw:
        energy = (energy_rows(forward_pass, self.sketch) @ self.energy_root).square().sum(1)
        rows = force_rows(forward_pass, self.sketch, self._settings["tangents"], self._settings["seed"])
        forces = (rows @ self.force_root).square().sum(2).mean(1)
        # Each score is informative about the other's errors too.
        scores = torch.stack([forces, energy], 1)
        atoms = scores[forward_pass.frame_of_atom]
        return Raw(
            forces=atoms[:, None, :],
            energy=scores.flip(1),
            energies=atoms[:, 1],
            stress=scores,
            distance=atoms[:, 0],
        )


@dataclass(frozen=True)
class NTK(Method):
    """Fits the residual variance of the neural tangent kernel in one streaming pass.

    Args:
        size: Length of the sketch of a gradient; 512 or more preserve the ranking of hundreds of frames.
        tangents: Number of random directions along which the forces of a frame are projected; each costs a backward
            pass through the forces. On acetylacetone 4 ranked frames as well as 8, and better than 1 or 2.
        noise: Noise variance σ², relative to the mean square of the gradients.
        seed: Seed of the sketch and of the directions.
    """

    name = "ntk"
    head = NTKHead
    forces = True
    gradients = True
    size: int = 512
    tangents: int = 4
    noise: float = 1e-6
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.size >= 1:
            raise ValueError(f"size is at least 1, not {self.size!r}.")
        if not 1 <= self.tangents <= MOST_TANGENTS:
            raise ValueError(f"tangents is between 1 and {MOST_TANGENTS}, not {self.tangents!r}.")
        if not 0 < self.noise <= 1:
            raise ValueError(f"the noise is above 0 and at most 1, not {self.noise!r}.")

    def start(self) -> "NTKAccumulator":
        return NTKAccumulator(self)


class NTKAccumulator(Accumulator):
    """Gram matrices of the sketches of energies and of forces."""

    def __init__(self, method: NTK) -> None:
        self.method = method
        self.sketch: Sketch | None = None
        self.sums: dict[str, Tensor] = {}

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        if self.sketch is None:
            first = next(_gradients(forward_pass).of_energies())
            self.sketch = Sketch.like(first, self.method.size, self.method.seed)
        energy = energy_rows(forward_pass, self.sketch)
        forces = force_rows(forward_pass, self.sketch, self.method.tangents, self.method.seed)
        # A sum over the force components of a frame, not a mean: a larger frame carries more information.
        counts = forward_pass.n_atoms_of_frame.double()
        forces = (forces * (counts / self.method.tangents).sqrt()[:, None, None]).flatten(0, 1)
        of_batch = {
            "energy": energy.T @ energy,
            "forces": forces.T @ forces,
            "counts": torch.stack([torch.ones_like(counts), counts], 1).sum(0),
        }
        self.sums = {name: value + self.sums[name] if self.sums else value for name, value in of_batch.items()}

    def _finish(self, communicator: Communicator) -> NTKHead:
        parameters = self._parameters(communicator)
        size = min(self.method.size, parameters)
        # A rank without frames contributes zeros.
        shapes = {"energy": (size, size), "forces": (size, size), "counts": (2,)}
        sums = self.sums or {name: torch.zeros(shape, dtype=torch.float64) for name, shape in shapes.items()}
        sums = communicator.sum(sums)
        frames, atoms = sums["counts"].tolist()
        settings: dict[str, Any] = asdict(self.method) | {"parameters": parameters}
        tensors = {}
        for name, root, count in (("energy", "energy_root", frames), ("forces", "force_root", atoms)):
            square = mean_square(sums[name], count)
            rest = residual(sums[name] / square, count, self.method.noise)
            tensors[root] = rest.root / (square * rest.mean) ** 0.5
            settings[name] = {"rows": int(count), "effective": rest.effective, "jitter": rest.jitter}
        return NTKHead(settings, tensors)

    def _parameters(self, communicator: Communicator) -> int:
        length = None if self.sketch is None else torch.tensor([[self.sketch.length]], dtype=torch.float64)
        lengths = gather(length, communicator)
        assert lengths is not None  # at least one rank has had a batch
        return int(lengths[0])


def energy_rows(forward_pass: ForwardPass, sketch: Sketch) -> Tensor:
    """(n_frames, size) sketches of ∂E/∂θ / N."""
    rows = torch.stack([sketch(gradient) for gradient in _gradients(forward_pass).of_energies()])
    return rows / forward_pass.n_atoms_of_frame.double()[:, None]


def force_rows(forward_pass: ForwardPass, sketch: Sketch, tangents: int, seed: int) -> Tensor:
    """(n_frames, tangents, size) sketches of ∂(Σ_j δ_j·F_j)/∂θ / √(3N)."""
    gradients = _gradients(forward_pass)
    rows = [
        torch.stack([sketch(gradient) for gradient in gradients.of_forces(directions(forward_pass, number, seed))])
        for number in range(tangents)
    ]
    return torch.stack(rows, 1) / (3 * forward_pass.n_atoms_of_frame.double()).sqrt()[:, None, None]


def directions(forward_pass: ForwardPass, number: int, seed: int) -> Tensor:
    """(n_atoms, 3) random signs of the tangent δ with this number.

    The signs depend on the index of an atom in its frame: they are the same in every batch and along a trajectory,
    unlike signs drawn anew for each frame. Reordering the atoms changes the score somewhat.
    """
    first = forward_pass.n_atoms_of_frame.cumsum(0) - forward_pass.n_atoms_of_frame
    place = torch.arange(len(forward_pass.numbers), device=first.device) - first[forward_pass.frame_of_atom]
    axes = torch.arange(3, device=first.device)
    return random_signs(3 * place[:, None] + axes, substream(seed, 2 + number))


def _gradients(forward_pass: ForwardPass) -> Gradients:
    if forward_pass.gradients is None:
        raise ValueError("the tangent kernel needs gradients: evaluate with gradients=True.")
    return forward_pass.gradients
