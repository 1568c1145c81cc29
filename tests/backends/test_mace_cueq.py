"""MACE with cuEquivariance kernels: another order of the equivariant channels, the same features."""

import warnings

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_uq import UncertainCalculator, UQWarning, fit
from ase_uq.backends import load_backend
from ase_uq.backends.mace.backend import MACECalculator

from .builders import make_mace


# Conversion takes a minute for a model of correlation 3, and orders the channels of this one in the same way.
@pytest.fixture(scope="module")
def plain() -> MACECalculator:
    return MACECalculator(models=make_mace(), device="cpu", default_dtype="float64")


@pytest.fixture(scope="module")
def accelerated() -> MACECalculator:
    default = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the conversion, to mace's authors
        calculator = MACECalculator(models=make_mace(), device="cpu", default_dtype="float64", enable_cueq=True)
    torch.set_default_dtype(default)  # mace's conversion changes it
    calculator.implemented_properties = list(set(calculator.implemented_properties))
    return calculator


def rattled(n_frames: int, seed: int) -> list[Atoms]:
    random = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        atoms = molecule("CH3CH2OH")
        atoms.positions += 0.1 * random.normal(size=(len(atoms), 3))
        atoms.info["REF_energy"] = random.normal()
        atoms.set_array("REF_forces", random.normal(size=(len(atoms), 3)))
        frames.append(atoms)
    return frames


def test_features_and_last_layer_are_those_of_the_plain_model(plain, accelerated):
    atoms = molecule("CH3CH2OH")
    expected, accelerated_pass = (
        backend.forward(backend.collate([atoms])) for backend in (load_backend(plain), load_backend(accelerated))
    )
    # Rounding of float64 kernels; a wrong order of the channels is off by tenths.
    for name in ("features", "forces", "energy", "vectors"):
        np.testing.assert_allclose(getattr(accelerated_pass, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        accelerated_pass.energy_layer.features, expected.energy_layer.features, rtol=1e-6, atol=1e-6
    )


def test_an_uncertainty_model_of_the_plain_model_serves_the_accelerated_one(plain, accelerated):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # invented errors follow no method
        model = fit(plain, rattled(20, 1), rattled(20, 2), methods=("bll",), progress=False)
    atoms, other = molecule("CH3CH2OH"), molecule("CH3CH2OH")
    with pytest.warns(UQWarning, match="taken as the same potential in another form"):
        atoms.calc = UncertainCalculator(accelerated, model)
    other.calc = UncertainCalculator(plain, model)
    atoms.get_forces(), other.get_forces()
    for key in ("forces_uncertainty", "energy_uncertainty", "gamma"):
        np.testing.assert_allclose(atoms.calc.results[key], other.calc.results[key], rtol=1e-5)
