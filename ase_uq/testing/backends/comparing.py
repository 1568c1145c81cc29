"""Comparison of forward passes, up to rounding."""

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import torch
from ase import Atoms
from torch import Tensor

from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForwardPass

# Rounding error of a forward pass with another order of summation, relative to the largest value.
ROUNDING = {torch.float32: 2e-4, torch.float64: 1e-9}


def forward(backend: Backend, frames: Sequence[Atoms]) -> ForwardPass:
    """One forward pass over structures, with forces."""
    return backend.forward(backend.collate(frames))


def array(value: Tensor | None) -> np.ndarray:
    """A tensor as a numpy array; it must not be None."""
    assert value is not None
    return value.cpu().numpy()


def scale(*values: Any) -> float:
    """Largest absolute value, but never zero."""
    return max(float(np.abs(value).max()) for value in values) + 1e-12


def rounding(energies: np.ndarray, backend: Backend) -> float:
    """Rounding error of an energy, eV."""
    return 2 * torch.finfo(backend.dtype).eps * scale(energies)


def tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a forward pass with its dotted name."""
    for entry in fields(value):
        inner = getattr(value, entry.name)
        if isinstance(inner, Tensor):
            yield prefix + entry.name, inner
        elif is_dataclass(inner):
            yield from tensors(inner, f"{prefix}{entry.name}.")
        elif isinstance(inner, dict):
            yield from ((f"{prefix}{entry.name}.{key}", tensor) for key, tensor in inner.items())


def meaningful(e: ForwardPass, frames: Sequence[Atoms]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, except stresses of structures without a volume, which packages leave undefined."""
    with_volume = torch.tensor([atoms.cell.rank == 3 for atoms in frames])
    for name, value in tensors(e):
        rows = with_volume.to(value.device)
        yield name, value[..., rows, :] if name in ("stress", "members.stress") else value


def of_frame(e: ForwardPass, index: int, atoms: Atoms) -> dict[str, Any]:
    """The results of a batch for one of its structures, as float64 arrays; None for results that it lacks."""
    in_frame = (e.frame_of_atom == index).cpu()
    per_atom = {
        "numbers": e.numbers,
        "forces": e.forces,
        "energies": e.energies,
        "features": e.features,
        "phi": e.energy_layer.features,
        "force_phi": None if e.force_layer is None else e.force_layer.features,
        "vectors": e.vectors,
        "confidence": None if e.confidence is None else e.confidence.probabilities,
    }
    per_frame = {
        "energy": e.energy,
        "stress": None if atoms.cell.rank < 3 else e.stress,
        "base": e.energy_layer.base,
        "torque_free": None if e.force_layer is None else e.force_layer.torque_free,
        "members": None if e.members is None else e.members.energy.T,
    }
    edges = in_frame[e.edges.target.cpu()]
    results = {
        key: None if value is None else value.cpu()[in_frame].double().numpy() for key, value in per_atom.items()
    }
    results |= {key: None if value is None else value[index].cpu().double().numpy() for key, value in per_frame.items()}
    return results | {"distances": np.sort(e.edges.distance.cpu()[edges].double().numpy())}


def assert_same(actual: dict[str, Any], expected: dict[str, Any], backend: Backend) -> None:
    """Asserts that two results of `of_frame` are the same up to rounding."""
    for key, value in expected.items():
        if value is None:
            assert actual[key] is None, key
            continue
        assert actual[key].shape == value.shape, key
        if value.size:
            atol = ROUNDING[backend.dtype] * max(1.0, scale(value))
            np.testing.assert_allclose(actual[key], value, rtol=0, atol=atol, err_msg=key)


def assert_close(
    actual: Tensor, expected: Tensor | None, backend: Backend, what: str, size: Tensor | None = None
) -> None:
    """Asserts that two tensors agree up to rounding, relative to the largest value of `size`, else of `expected`."""
    assert expected is not None
    assert actual.shape == expected.shape, what
    if expected.numel():
        largest = float((expected if size is None else size).double().abs().max())
        deviation = float((actual.double() - expected.double()).abs().max())
        assert deviation <= ROUNDING[backend.dtype] * max(1.0, largest), f"{what} is off by {deviation}"
