"""A potential that is trained on in closed form: its change is linear in all of its weights.

    E(θ + w) = E(θ) + w·∂E/∂θ,  F(θ + w) = F(θ) + w·∂F/∂θ

The weights w minimise squared errors of energies and forces plus a ridge, as a fine-tuning that goes not far does (the
regime of the tangent kernel). A frame has an equation for its energy and one for each of a few random directions of its
forces; the gradients are sketched. After one pass over all frames a training costs a fraction of a second.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from torch import Tensor
from tqdm import tqdm

from ase_uq.backends.base import Backend
from ase_uq.fitting.provenance import digest_of
from ase_uq.methods.ntk import directions, energy_rows, force_rows
from ase_uq.numerics.sketch import Sketch

SIZE, TANGENTS = 2048, 4  # numbers of a sketch, directions of the forces of a frame
ENERGY_WEIGHT = 3.0  # Å, as in the fine-tuning
RIDGES = 10.0 ** np.arange(-7, 1)  # in units of the mean diagonal of the kernel


@dataclass(frozen=True)
class Equations:
    """What frames say about the change of the weights.

    Args:
        rows: (n_frames, 1 + n_tangents, size) left sides: of the energy an atom times its weight, and of the forces
            along each direction δ, divided by √(3N): the mean square over directions is that over force components.
        values: (n_frames, 1 + n_tangents) right sides: label minus what the potential says; eV/Å.
        common: (n_frames, 2 * size) gradients of the energy an atom and of the forces along one direction that all
            frames share, which can be compared between frames.
    """

    rows: Tensor
    values: Tensor
    common: Tensor

    def part(self, numbers: Sequence[int]) -> "Equations":
        chosen = torch.as_tensor(numbers)
        return Equations(self.rows[chosen], self.values[chosen], self.common[chosen])


def equations(backend: Backend, frames: Sequence[Atoms], path: Path) -> Equations:
    """Those of frames; what the file has of the same potential, frames and options is not computed again."""
    origin = origin_of(backend, frames)
    if path.exists() and (kept := torch.load(path)).pop("origin", None) == origin:
        return Equations(**kept)
    rows, values, common = [], [], []
    sketch = None
    for number, atoms in enumerate(tqdm(frames, desc=path.stem, unit="frame"), 1):
        found = backend.forward(backend.collate([atoms]), gradients=True)
        assert found.gradients is not None
        assert found.forces is not None
        sketch = sketch or Sketch.like(next(found.gradients.of_energies()), SIZE, 0)
        energy = energy_rows(found, sketch)
        missing = torch.from_numpy(atoms.arrays["REF_forces"]) - found.forces.detach().double()
        along = [(directions(found, t, number) * missing).sum() for t in range(TANGENTS)]
        energy_error = (atoms.info["REF_energy"] - float(found.energy)) / len(atoms)
        rows.append(torch.cat([ENERGY_WEIGHT * energy, force_rows(found, sketch, TANGENTS, number)[0]]).detach())
        values.append(torch.stack([torch.tensor(ENERGY_WEIGHT * energy_error), *along]))
        values[-1][1:] /= (3 * len(atoms)) ** 0.5
        common.append(torch.cat([energy[0], force_rows(found, sketch, 1, 0)[0, 0]]).detach())
    parts = {"rows": torch.stack(rows), "values": torch.stack(values), "common": torch.stack(common)}
    torch.save(parts | {"origin": origin}, path)
    return Equations(**parts)


def origin_of(backend: Backend, frames: Sequence[Atoms]) -> str:
    """Digest of everything that equations follow from."""
    digest = hashlib.sha256(f"{backend.identity.fingerprint} {SIZE} {TANGENTS} {ENERGY_WEIGHT}".encode())
    for atoms in frames:
        digest.update(digest_of(atoms).encode())
        for label in (atoms.info["REF_energy"], atoms.arrays["REF_forces"]):
            digest.update(np.asarray(label, float).tobytes())
    return digest.hexdigest()


def trained(new: Equations, old: Equations, ridge: float | None = None) -> tuple[Tensor, float]:
    """(size,) change of the weights, and the ridge.

    All old frames together weigh half of all new ones, as in the batches of the fine-tuning. Without a ridge it is the
    one with the least error on new frames that are left out one by one, which has a closed form.
    """
    old_weight = (0.5 * len(new.rows) / len(old.rows)) ** 0.5
    # The forces of a frame count as one equation, however many directions stand for them.
    scale = torch.full((new.rows.shape[1],), (new.rows.shape[1] - 1) ** -0.5, dtype=torch.float64)
    scale[0] = 1
    rows = torch.cat([new.rows, old_weight * old.rows]) * scale[:, None]
    values = torch.cat([new.values, old_weight * old.values]) * scale
    left, right = rows.flatten(0, 1), values.flatten()
    spectrum, vectors = torch.linalg.eigh(left @ left.T)
    spectrum = spectrum.clamp(min=0)
    unit = float(spectrum.mean())
    if ridge is None:
        ridge = min(RIDGES, key=lambda each: left_out(spectrum, vectors, right, each * unit, new.values.shape))
    weights = left.T @ (vectors @ ((vectors.T @ right) / (spectrum + ridge * unit)))
    return weights, ridge


def left_out(spectrum: Tensor, vectors: Tensor, right: Tensor, ridge: float, shape: torch.Size) -> float:
    """Mean square of what is wrong on frames, the first ones, of which each is left out in turn.

    With A = (K + λ)⁻¹ and α = A y, the errors on a block b of equations that is left out are A_bb⁻¹ α_b.
    """
    n_frames, width = shape
    first = vectors[: n_frames * width]
    damped = 1 / (spectrum + ridge)
    alpha = (first @ (damped * (vectors.T @ right))).reshape(n_frames, width)
    blocks = first.reshape(n_frames, width, -1)
    inverse = (blocks * damped) @ blocks.transpose(1, 2)
    return float(torch.linalg.solve(inverse, alpha).square().mean())


def force_errors(of: Equations, weights: Tensor) -> Tensor:
    """(n_frames, n_tangents) errors along the directions, eV/Å; their mean square is that of force components."""
    return of.values[:, 1:] - of.rows[:, 1:] @ weights
