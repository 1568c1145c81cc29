"""Laws of derivatives: by positions, by strain and by the parameters of the potential."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.stress import full_3x3_to_voigt_6_stress as full_to_voigt
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends.comparing import array, assert_close, forward, meaningful, rounding, scale
from ase_uq.testing.backends.observing import changed, count_forwards
from ase_uq.testing.backends.structures import displaced, periodic
from ase_uq.testing.backends.under_test import BackendUnderTest

# Step of finite differences in Å (and in strain), and their tolerance relative to the largest value.
DIFFERENCES = {torch.float32: (3e-3, 3e-2), torch.float64: (1e-4, 1e-5)}


class GradientLaws(BackendUnderTest):
    """Laws of derivatives, compared with finite differences."""

    def test_forces_are_the_gradient_of_the_energy(self, backend: Backend, frames: list[Atoms]):
        if not self.conservative or "forces" not in backend.results:
            pytest.skip("there are no conservative forces; test_forces_are_those_of_the_last_layer is for direct ones")
        step, tolerance = DIFFERENCES[backend.dtype]
        random = np.random.default_rng(0)
        for atoms in (frames[0], periodic(frames)):
            directions = random.normal(size=(3, len(atoms), 3))
            moved = []
            for direction in directions:
                for sign in (1, -1):
                    moved.append(atoms.copy())
                    moved[-1].positions += sign * step * direction
            energies = forward(backend, moved).energy.cpu().double().numpy().reshape(3, 2)
            forces = array(forward(backend, [atoms]).forces)
            differences = -(energies[:, 0] - energies[:, 1]) / (2 * step)
            expected = (directions * forces).sum((1, 2))
            atol = tolerance * scale(expected, forces) + rounding(energies, backend) / step
            np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)

    def test_stress_is_the_derivative_by_strain(self, backend: Backend, frames: list[Atoms]):
        if not self.conservative or "stress" not in backend.results:
            pytest.skip("there is no stress that must be a derivative of the energy")
        assert_slope_by_strain(backend, periodic(frames))

    def test_stress_of_a_slab_is_that_of_its_cell_or_of_none(self, backend: Backend, frames: list[Atoms]):
        if not self.conservative or "stress" not in backend.results:
            pytest.skip("there is no stress that must be a derivative of the energy")
        slab = periodic(frames)
        slab.pbc = (True, True, False)
        try:
            volumes = forward(backend, [slab]).volumes
        except NotImplementedError:
            pytest.skip("the potential takes no structure that is periodic in some directions only")
        assert volumes is not None
        if float(volumes[0]):
            assert_slope_by_strain(backend, slab)

    def test_gradients_are_of_the_same_pass(self, backend: Backend, frames: list[Atoms]):
        module = backend._modules()[0]
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        random = torch.Generator().manual_seed(0)
        for forces in (True, False):
            batch = backend.collate(frames)
            plain, before = backend.forward(batch, forces=forces), _parameters(backend)
            with count_forwards(self.forward_modules(backend)) as count:
                e = backend.forward(batch, forces=forces, gradients=True)
                assert e.gradients is not None
                assert count() == self.n_forwards
                cotangent = torch.randn(e.features.shape, generator=random).to(e.features)
                with torch.no_grad():  # gradients must work even if the caller has switched them off
                    rows = list(e.gradients.of_energies())
                    of_features = e.gradients.of_features(cotangent)
                assert count() <= self.n_forwards + 1, "gradients took more than one further forward"
            assert [row.shape for row in rows] == [(n_parameters,)] * len(frames)
            assert of_features.shape == e.positions.shape
            for value in (*rows, of_features):
                assert not value.requires_grad
                assert bool(torch.isfinite(value).all())
            with_gradients = dict(meaningful(e, frames))
            for name, value in meaningful(plain, frames):
                assert not with_gradients[name].requires_grad, name
                assert_close(with_gradients[name], value, backend, name)
            for now, then in zip(_parameters(backend), before, strict=True):
                assert now.keys() == then.keys()
                for key, value in then.items():
                    same = torch.equal(now[key], value) if isinstance(value, Tensor) else now[key] == value
                    assert same, f"{key} of the potential has changed"
            after = dict(meaningful(backend.forward(batch, forces=forces), frames))
            for name, value in meaningful(plain, frames):
                assert torch.equal(after[name], value), f"{name} has changed after gradients were taken"

    def test_gradients_of_features(self, backend: Backend, frames: list[Atoms]):
        step, tolerance = DIFFERENCES[backend.dtype]
        random = np.random.default_rng(3)
        # The norm of a vector that is 0 by symmetry has no derivative, so symmetry is broken first.
        frames = displaced(frames, 0.05 * random.normal(size=(sum(map(len, frames)), 3)))
        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        cotangent = torch.as_tensor(random.normal(size=tuple(e.features.shape))).to(e.features)
        last = e.energy_layer.features
        energy_cotangent = (
            torch.as_tensor(random.normal(size=tuple(last.shape))).to(last)
            * scale(array(e.features))
            / scale(array(last))
        )
        gradient = array(e.gradients.of_features(cotangent, energy_cotangent)).astype(float)
        direction = random.normal(size=gradient.shape)
        values = []
        for sign in (1, -1):
            moved = forward(backend, displaced(frames, sign * step * direction))
            terms = [
                cotangent.double() * moved.features.double(),
                energy_cotangent.double() * moved.energy_layer.features.double(),
            ]
            values.append(array(moved.sum_over_atoms(torch.cat(terms, 1))).sum(1))
        differences = -(values[0] - values[1]) / (2 * step)
        starts = np.cumsum([0, *map(len, frames[:-1])])
        expected = np.add.reduceat((direction * gradient).sum(1), starts)
        size = scale(array(cotangent * e.features), array(energy_cotangent * last))
        noise = 10 * torch.finfo(backend.dtype).eps * size * len(direction)
        atol = tolerance * scale(expected, gradient) + noise / step
        np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)

    def test_gradients_of_the_last_layer(self, backend: Backend, frames: list[Atoms]):
        """By positions the same as `of_features`, and by strain what finite differences are."""
        step, tolerance = DIFFERENCES[backend.dtype]
        atoms = periodic(frames)
        (atoms,) = displaced([atoms], 0.05 * np.random.default_rng(6).normal(size=(len(atoms), 3)))
        e = backend.forward(backend.collate([atoms]), gradients=True)
        assert e.gradients is not None
        last = e.energy_layer.features
        generator = torch.Generator().manual_seed(7)
        weights = torch.randn(last.shape[1], 3, generator=generator).to(last)
        found = e.gradients.of_energy_layer(weights)
        assert found.forces.shape == (len(atoms), 3, 3)
        none = torch.zeros_like(e.features)
        for column in range(3):
            expected = e.gradients.of_features(none, weights[:, column].expand_as(last).contiguous())
            assert_close(found.forces[:, :, column], expected, backend, "slopes of the last layer")
        if not self.conservative or "stress" not in backend.results:
            return
        assert found.virials is not None
        assert found.virials.shape == (1, 6, 3)
        strain = np.random.default_rng(8).normal(size=(3, 3))
        strain = (strain + strain.T) / 2
        moved = []
        for sign in (1, -1):
            moved.append(atoms.copy())
            moved[-1].set_cell(atoms.cell.array @ (np.eye(3) + sign * step * strain), scale_atoms=True)
        plus, minus = (forward(backend, [each]).energy_layer.features.double().sum(0) for each in moved)
        differences = array((plus - minus) @ weights.double()) / (2 * step)
        work = array(found.virials[0]).astype(float).T @ (np.array([1, 1, 1, 2, 2, 2]) * full_to_voigt(strain))
        size = scale(array(last @ weights))
        noise = 10 * torch.finfo(backend.dtype).eps * size * len(atoms)
        atol = tolerance * scale(work, array(found.virials)) + noise / step
        np.testing.assert_allclose(work, differences, rtol=0, atol=atol)

    def test_gradients_of_energies(self, backend: Backend, spare: BaseCalculator, frames: list[Atoms]):
        def energies(e: ForwardPass) -> np.ndarray:
            return array(e.energy if e.members is None else e.members.energy[0])

        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        rows = np.stack([array(row) for row in e.gradients.of_energies()])
        for index in (0, len(frames) - 1):
            single = backend.forward(backend.collate([frames[index]]), gradients=True)
            assert single.gradients is not None
            (row,) = single.gradients.of_energies()
            assert_close(torch.as_tensor(rows[index]), row.cpu(), backend, "gradient of one frame of a batch")
        _check_by_parameters(load_backend(spare), frames, rows, energies)

    def test_gradients_of_forces(self, backend: Backend, spare: BaseCalculator, frames: list[Atoms]):
        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        random = np.random.default_rng(4)
        tangents = torch.as_tensor(random.normal(size=tuple(e.positions.shape))).to(e.positions)

        def work(e: ForwardPass) -> np.ndarray:
            forces = e.forces if e.members is None or e.members.forces is None else e.members.forces[0]
            assert forces is not None
            return array(e.sum_over_atoms((tangents * forces).sum(1)))

        rows = np.stack([array(row) for row in e.gradients.of_forces(tangents)])
        again = backend.forward(backend.collate(frames), forces=False, gradients=True)
        assert again.gradients is not None
        for row, other in zip(rows, again.gradients.of_forces(tangents), strict=True):
            assert_close(other.cpu(), torch.as_tensor(row), backend, "gradient where forces were not asked for")
        _check_by_parameters(load_backend(spare), frames, rows, work)


def _check_by_parameters(
    backend: Backend, frames: list[Atoms], rows: np.ndarray, values: Callable[[ForwardPass], np.ndarray]
) -> None:
    """Compares rows with differences of the values, one per frame, between potentials with nearby parameters."""
    step, tolerance = DIFFERENCES[backend.dtype]
    generator = torch.Generator().manual_seed(5)
    parameters = list(backend._modules()[0].parameters())
    directions = []
    for parameter in parameters:
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        directions.append(noise.to(parameter) * (parameter.detach().abs().mean() + 0.01))
    both = []
    for sign in (1, -1):
        pairs = zip(parameters, directions, strict=True)
        with changed(parameters, [parameter.detach() + sign * step * direction for parameter, direction in pairs]):
            both.append(values(forward(backend, frames)))
    differences = (both[0] - both[1]) / (2 * step)
    expected = rows @ torch.cat([direction.flatten() for direction in directions]).cpu().numpy()
    atol = tolerance * scale(expected) + 10 * rounding(both[0], backend) / step
    np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)


def assert_slope_by_strain(backend: Backend, atoms: Atoms) -> None:
    """Asserts that the stress is the derivative of the energy by strain, over the volume of the cell."""
    step, tolerance = DIFFERENCES[backend.dtype]
    moved = []
    for x, y in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        for sign in (1, -1):
            strain = np.zeros((3, 3))
            strain[x, y] += sign * step / 2
            strain[y, x] += sign * step / 2
            moved.append(atoms.copy())
            moved[-1].set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    energies = forward(backend, moved).energy.cpu().double().numpy().reshape(6, 2)
    # d/dε of ε (e_x e_yᵀ + e_y e_xᵀ) / 2 is the stress component itself.
    differences = (energies[:, 0] - energies[:, 1]) / (2 * step * atoms.get_volume())
    stress = array(forward(backend, [atoms]).stress)[0]
    atol = tolerance * scale(stress) + rounding(energies, backend) / (step * atoms.get_volume())
    np.testing.assert_allclose(differences, stress, rtol=0, atol=atol)


def _parameters(backend: Backend) -> list[dict[str, Any]]:
    """The state of each parameter and module that belongs to the user."""
    states: list[dict[str, Any]] = []
    for root in backend._modules():
        for name, parameter in root.named_parameters():
            has = {"gradient": parameter.grad is not None, "requires_grad": parameter.requires_grad}
            states.append({"name": name, "values": parameter.detach().clone()} | has)
        states += [{"name": name, "training": module.training} for name, module in root.named_modules()]
    return states
