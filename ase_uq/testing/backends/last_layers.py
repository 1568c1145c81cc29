"""Laws of the last layers: they are linear in their weights and give exactly the prediction."""

import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForceLayer, ForwardPass
from ase_uq.testing.backends.comparing import assert_close, forward
from ase_uq.testing.backends.observing import changed
from ase_uq.testing.backends.under_test import BackendUnderTest


class LastLayerLaws(BackendUnderTest):
    """Laws of w·φ + base."""

    def test_energy_is_that_of_the_last_layer(self, backend: Backend, evaluated: ForwardPass):
        e = evaluated
        layer = e.energy_layer
        summed = e.sum_over_atoms(layer.features.double() @ layer.weights.double()) + layer.base
        assert_close(summed, e.energy, backend, "w·Σφ + base")

    def test_forces_are_those_of_the_last_layer(self, backend: Backend, evaluated: ForwardPass):
        e = evaluated
        if e.force_layer is None:
            pytest.skip("forces are conservative; test_forces_are_the_gradient_of_the_energy is their law")
        layer = e.force_layer
        projected = _project(layer.features.double() @ layer.weights.double(), layer, e)
        assert_close(projected + layer.base, e.forces, backend, "P(φB) + base")

    def test_last_layers_are_linear_in_the_trained_weights(
        self, backend: Backend, evaluated: ForwardPass, spare: BaseCalculator, frames: list[Atoms]
    ):
        """Changed last-layer weights w' change the energy by exactly (w' - w)·Σφ and the forces by P(φ(B' - B))."""
        weights = [weight.detach() for weight in self.last_layer(spare)]
        generator = torch.Generator().manual_seed(0)
        noise = [torch.randn(weight.shape, generator=generator, dtype=torch.float64) for weight in weights]
        with changed(weights, [w + 0.1 * n.to(w) * w.abs().mean() for w, n in zip(weights, noise, strict=True)]):
            other = forward(load_backend(spare), frames)
            original = evaluated
            change = (other.energy_layer.weights - original.energy_layer.weights).double()
            assert float(change.abs().max()) > 0, "last_layer names tensors that the weights do not hold"
            assert_close(other.energy_layer.features, original.energy_layer.features, backend, "features")
            moved = original.sum_over_atoms(original.energy_layer.features.double() @ change)
            size = torch.cat([original.energy, other.energy]).abs().max().double()
            assert_close(other.energy - original.energy, moved, backend, "change of the energy", size)
            if original.force_layer is not None and other.force_layer is not None:
                layer = original.force_layer
                moved = layer.features.double() @ (other.force_layer.weights - layer.weights).double()
                assert original.forces is not None
                assert other.forces is not None
                assert_close(
                    other.forces - original.forces, _project(moved, layer, original), backend, "change of the forces"
                )


def _project(forces: Tensor, layer: ForceLayer, e: ForwardPass) -> Tensor:
    """P by its definition: the least-squares remainder after fitting rigid motions."""
    remainder = forces.clone()
    for index, torque_free in enumerate(layer.torque_free.tolist()):
        in_frame = e.frame_of_atom == index
        x = e.positions[in_frame].double()
        x = x - x.mean(0)
        n_atoms = len(x)
        shifts = torch.eye(3, dtype=x.dtype).repeat(n_atoms, 1)  # (3 n_atoms, 3)
        turns = torch.stack([torch.linalg.cross(axis.expand_as(x), x).reshape(-1) for axis in torch.eye(3).to(x)], 1)
        modes = [shifts] * layer.force_free + [turns] * torque_free
        if modes:
            span = torch.cat([mode.to(x) for mode in modes], 1)
            left, values, _ = torch.linalg.svd(span, full_matrices=False)
            left = left[:, values > 1e-6 * values.max()]  # a linear molecule has one rotation fewer
            flat = remainder[in_frame].reshape(-1)
            remainder[in_frame] = (flat - left @ (left.T @ flat)).reshape(-1, 3)
    return remainder
