"""Every variant of the orb-v3 architecture keeps the contract."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.io import read, write

from ase_uq.artefact import write_artefact
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.orb import (
    AtomGraphs,
    D3SumModel,
    ForcefieldAtomsAdapter,
    ORBCalculator,
    pretrained,
    save_potential,
)
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.evaluation import Evaluation
from ase_uq.testing.backends import BackendContract, count_forwards, process_state, standard_frames

from .builders import ORB_SIZES, charged_frames, make_orb, water


def calculator_of(
    kind: str = "direct", dtype: str = "float32", settings: dict[str, Any] | None = None, **arguments: Any
) -> ORBCalculator:
    """A calculator with a model of its own; equal arguments give equal weights."""
    adapter = ForcefieldAtomsAdapter(radius=6.0, max_num_neighbors=120)
    return ORBCalculator(make_orb(kind, dtype, **arguments), adapter, device="cpu", **(settings or {}))


def evaluate(backend: Backend, *frames: Atoms) -> Evaluation:
    return backend.evaluate(backend.collate(frames))


class OrbContract(BackendContract):
    """What the variants share: all are made by `calculator_of`."""

    dtype = "float32"
    is_equivariant = False
    kind = "direct"
    arguments: dict[str, Any] = {}  # noqa: RUF012

    def make_calculator(self, dtype="float32"):
        return calculator_of(self.kind, dtype, **self.arguments)

    def last_layer(self, calculator):
        model = getattr(calculator.model, "xc_model", calculator.model)
        heads = [model.heads[name] for name in ("energy", "forces") if name in model.heads]
        return [head.mlp[-2].weight for head in heads]

    def forward_modules(self, backend):
        return [backend._model.model]


class TestDirect(OrbContract):
    conservative = False


class TestDirectFloat64(TestDirect):
    dtype = "float64"

    # ORBCalculator builds its graphs in torch's default dtype, so the bare one needs that to be float64.
    def test_mean_is_the_calculators_own(self, backend, frames):
        torch.set_default_dtype(torch.float64)
        try:
            super().test_mean_is_the_calculators_own(backend, frames)
        finally:
            torch.set_default_dtype(torch.float32)


class TestConservative(OrbContract):
    kind = "conservative"


class TestConservativeFloat64(TestConservative):
    dtype = "float64"

    test_mean_is_the_calculators_own = TestDirectFloat64.test_mean_is_the_calculators_own


class TestDirectWithChargeAndSpin(TestDirect):
    arguments = {"has_charge_spin_cond": True}  # noqa: RUF012

    def make_frames(self):
        return charged_frames()


class TestConservativeWithChargeAndSpin(TestConservative):
    arguments = {"has_charge_spin_cond": True}  # noqa: RUF012

    def make_frames(self):
        return charged_frames()
