"""MACE with cuEquivariance kernels: another order of the equivariant channels, the same features."""

import warnings

import numpy as np
import pytest
import torch
from ase.build import molecule

from ase_uq import UncertainCalculator, UQWarning, embedded
from ase_uq.backends import load_backend
from ase_uq.backends.mace.backend import MACECalculator
from ase_uq.backends.mace.loading import load_potential


@pytest.fixture(scope="module")
def accelerated() -> MACECalculator:
    model = load_potential(embedded.path("mace.safetensors"))
    default = torch.get_default_dtype()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the conversion, to mace's authors
        calculator = MACECalculator(models=model, device="cpu", default_dtype="float64", enable_cueq=True)
    torch.set_default_dtype(default)  # mace's conversion changes it
    calculator.implemented_properties = list(set(calculator.implemented_properties))
    return calculator


def test_features_and_last_layer_are_those_of_the_plain_model(accelerated):
    atoms = molecule("CH3CH2OH")
    plain = load_backend("embedded:mace", dtype="float64")
    fast = load_backend(accelerated)
    expected = plain.forward(plain.collate([atoms]))
    found = fast.forward(fast.collate([atoms]))
    # Rounding of float64 kernels on float32 weights; a wrong order of the channels is off by tenths.
    for name in ("features", "forces", "energy", "vectors"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(found.energy_layer.features, expected.energy_layer.features, rtol=1e-6, atol=1e-6)


def test_an_uncertainty_model_of_the_plain_model_serves_the_accelerated_one(accelerated):
    atoms = molecule("CH3CH2OH")
    with pytest.warns(UQWarning, match="taken as the same potential in another form"):
        atoms.calc = UncertainCalculator(accelerated, embedded.path("mace.uq.safetensors"))
    other = molecule("CH3CH2OH")
    other.calc = UncertainCalculator("embedded:mace", embedded.path("mace.uq.safetensors"))
    atoms.get_forces(), other.get_forces()
    for key in ("forces_uncertainty", "energy_uncertainty", "gamma"):
        np.testing.assert_allclose(atoms.calc.results[key], other.calc.results[key], rtol=1e-5)
