"""Small potentials whose weights are drawn, and rates and weights for them."""

from typing import Any

import torch

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.mace import loading  # before e3nn, which the mace package patches
from ase_uq.backends.stochastic import Blip
from ase_uq.backends.toy import ToyCalculator
from ase_uq.numerics.variational import Rates
from ase_uq.testing.backends import standard_frames

from .builders import make_mace, make_mh1_like

MACECalculator = loading.MACECalculator
BUILDERS = {"residual": make_mace, "mh-1": make_mh1_like}


def mace_backend(kind: str = "residual", **options: Any) -> Backend:
    model = BUILDERS[kind](**options)
    head = {"head": "omat"} if kind == "mh-1" else {}
    return load_backend(MACECalculator(models=model, device="cpu", default_dtype="float64", **head))


def toy_backend() -> Backend:
    return load_backend(ToyCalculator())


def rates_of(backend: Backend, constant: float | None = None) -> Rates:
    """Those of a network whose answer depends on the structure, or constant ones."""
    model = backend.stochastic()
    if constant is not None:
        return Rates.constant(list(model.groups), constant)
    rows = model.invariants(backend.collate(standard_frames()))
    made = Rates.network(list(model.groups), rows, 0.01, seed=0)
    held = dict(made.named_buffers())
    held["outer"] = 0.1 * torch.randn(
        held["outer"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return Rates(made.settings, held)


def blip_of(backend: Backend, constant: float | None = None, n_members: int = 3) -> Blip:
    weights = {name: one.detach().clone() for name, one in backend.stochastic().parameters.items()}
    return Blip(backend.identity, weights, rates_of(backend, constant), n_members, seed=5)
