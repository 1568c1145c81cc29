"""The neural tangent kernel against dense algebra on full Jacobians, and against the activation kernel."""

import dataclasses
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.errors import PotentialMismatch
from ase_uq.forward_pass import ForwardPass, Gradients, Targets
from ase_uq.methods.kernel import Kernel
from ase_uq.methods.ntk import NTK, directions
from ase_uq.numerics.sketch import Sketch
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

NOISE = 1e-4
TANGENTS = 3
EXACT = 1000  # more than the toy has parameters: nothing is sketched


@pytest.fixture(scope="module", params=["conservative", "direct"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return load_backend(ToyCalculator(ELEMENTS, direct=request.param == "direct"))


@pytest.fixture(scope="module")
def conservative() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(16, seed=11)


@pytest.fixture(scope="module")
def new() -> list[Atoms]:
    return labelled_frames(5, seed=12)


def gradients_of(forward_pass: ForwardPass) -> Gradients:
    assert forward_pass.gradients is not None
    return forward_pass.gradients


def force_jacobians(backend: Backend, frames: list[Atoms]) -> list[np.ndarray]:
    """(3N, P) ∂F/∂θ of each frame, one component after the other."""
    jacobians = []
    for atoms in frames:
        gradients = gradients_of(forward_pass_of(backend, [atoms], gradients=True))
        units = torch.eye(3 * len(atoms), dtype=torch.float64).reshape(-1, len(atoms), 3)
        jacobians.append(np.stack([next(gradients.of_forces(unit)).numpy() for unit in units]))
    return jacobians


def dense_score(train: np.ndarray, at: np.ndarray, count: float) -> np.ndarray:
    """σ²Φᵀ(Φ_TᵀΦ_T + σ²I)⁻¹Φ of rows with mean square 1, over its mean; count is what the squares are divided by."""
    unit = np.sqrt((train**2).sum() / count)
    train, at = train / unit, at / unit
    inverse = np.linalg.inv(train.T @ train + NOISE * np.eye(train.shape[1]))
    fitted = np.einsum("np,pq,nq->", train, inverse, train) / count
    return np.einsum("np,pq,nq->n", at, inverse, at) / fitted


class TestScores:
    def test_energy_is_dense_algebra(self, backend: Backend, frames: list[Atoms], new: list[Atoms]):
        raw = fit_head(NTK(noise=NOISE, tangents=1, size=EXACT), backend, frames, batch_atoms=20)(
            batch := forward_pass_of(backend, new, gradients=True)
        )

        def rows(structures: list[Atoms]) -> np.ndarray:
            gradients = gradients_of(forward_pass_of(backend, structures, gradients=True))
            return np.stack([g.numpy() / len(a) for g, a in zip(gradients.of_energies(), structures, strict=True)])

        expected = dense_score(rows(frames), rows(new), len(frames))
        np.testing.assert_allclose(raw.energy[:, 0], expected, rtol=1e-7)
        np.testing.assert_allclose(raw.energies, expected[batch.frame_of_atom], rtol=1e-7)

    def test_forces_are_dense_algebra(self, backend: Backend, frames: list[Atoms], new: list[Atoms]):
        """From full Jacobians and the tangents; every training atom counts as much as any other."""
        head = fit_head(NTK(noise=NOISE, tangents=TANGENTS, size=EXACT), backend, frames, batch_atoms=20)
        batch = forward_pass_of(backend, new, gradients=True)

        def rows(structures: list[Atoms], summed: bool) -> np.ndarray:
            stacked = []
            for atoms, jacobian in zip(structures, force_jacobians(backend, structures), strict=True):
                alone = forward_pass_of(backend, [atoms])
                tangents = np.stack([directions(alone, m, 0).numpy().ravel() for m in range(TANGENTS)])
                weight = len(atoms) / TANGENTS if summed else 1.0
                stacked.append(np.sqrt(weight) * tangents @ jacobian / np.sqrt(3 * len(atoms)))
            return np.concatenate(stacked)

        n_atoms = sum(len(atoms) for atoms in frames)
        scores = dense_score(rows(frames, True), rows(new, False), n_atoms).reshape(len(new), TANGENTS).mean(1)
        raw = head(batch)
        np.testing.assert_allclose(raw.energy[:, 1], scores, rtol=1e-7)
        np.testing.assert_allclose(raw.distance, scores[batch.frame_of_atom], rtol=1e-7)
        atoms = torch.stack([raw.distance, raw.energies], 1)
        assert torch.equal(raw.forces[:, 0], atoms)
        assert torch.equal(raw.stress, raw.energy.flip(1))

    def test_random_tangents_stand_for_all_components(self, conservative: Backend, new: list[Atoms]):
        """E‖∂(δ·F)/∂θ‖²/3N is the mean square of the rows of the Jacobian; 200 tangents are within a few percent."""
        atoms = new[0]
        (jacobian,) = force_jacobians(conservative, [atoms])
        alone = forward_pass_of(conservative, [atoms])
        tangents = np.stack([directions(alone, m, 0).numpy().ravel() for m in range(200)])
        found = ((tangents @ jacobian) ** 2).sum(1) / len(jacobian)
        expected = (jacobian**2).sum(1).mean()
        assert found.mean() == pytest.approx(expected, abs=5 * found.std() / 200**0.5)

    def test_equal_tangents_on_all_atoms_would_say_nothing(self, conservative: Backend, new: list[Atoms]):
        """Translation: the reason for random ones."""
        batch = forward_pass_of(conservative, new, gradients=True)
        for gradient in gradients_of(batch).of_forces(torch.ones_like(batch.positions)):
            assert float(gradient.abs().max()) < 1e-12

    def test_a_sketch_keeps_the_ranking(self, conservative: Backend):
        """57 parameters sketched to 48."""
        frames, new = labelled_frames(8, seed=11), labelled_frames(60, seed=12)
        batch = forward_pass_of(conservative, new, gradients=True)
        exact, sketched = (
            fit_head(NTK(noise=1e-2, size=size), conservative, frames)(batch).energy for size in (EXACT, 48)
        )
        for score in range(2):
            ranks = [values[:, score].argsort().argsort().double() for values in (exact, sketched)]
            assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.8


class OnlyLastLayer(Gradients):
    """The derivatives to the weights of the last layer, the first of the toy's parameters."""

    def __init__(self, forward_pass: ForwardPass) -> None:
        self._inner = gradients_of(forward_pass)
        self._count = len(forward_pass.energy_layer.weights)

    def of_features(self, cotangent: Tensor) -> Tensor:
        return self._inner.of_features(cotangent)

    def of_energies(self) -> Iterator[Tensor]:
        return (gradient[: self._count] for gradient in self._inner.of_energies())

    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        return (gradient[: self._count] for gradient in self._inner.of_forces(tangents))


def test_of_the_last_layer_it_is_the_activation_kernel(conservative: Backend, frames: list[Atoms], new: list[Atoms]):
    """K8."""

    def batch(structures: list[Atoms]) -> ForwardPass:
        forward_pass = forward_pass_of(conservative, structures, gradients=True)
        return dataclasses.replace(forward_pass, gradients=OnlyLastLayer(forward_pass))

    train = [(batch(frames), Targets(torch.arange(len(frames))))]
    tangent = NTK(noise=NOISE).fit(train, Serial())
    activation = Kernel(kernel="linear", features="last_layer", normalisation="global", noise=NOISE).fit(
        train, Serial()
    )
    found, expected = tangent(batch(new)).energy[:, 0], activation(batch(new)).energy[:, 1]
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=0)
    assert tangent.settings["energy"]["effective"] == pytest.approx(activation.settings["frames"]["effective"])


class TestDirections:
    def test_they_belong_to_places_in_a_frame(self, conservative: Backend, new: list[Atoms]):
        together = directions(forward_pass_of(conservative, new), 1, 0)
        alone = torch.cat([directions(forward_pass_of(conservative, [atoms]), 1, 0) for atoms in new])
        assert torch.equal(together, alone)
        assert set(together.flatten().tolist()) == {-1.0, 1.0}

    def test_numbers_and_seeds_give_others(self, conservative: Backend):
        batch = forward_pass_of(conservative, labelled_frames(1, seed=1))
        found = [directions(batch, number, seed) for number in range(3) for seed in range(3)]
        assert all(not torch.equal(a, b) for k, a in enumerate(found) for b in found[:k])


class TestCost:
    def test_it_is_declared(self, conservative: Backend, frames: list[Atoms]):
        """By method and head, so that nothing pays for it that did not ask."""
        assert NTK.gradients
        assert NTK.forces
        head = fit_head(NTK(tangents=1), conservative, frames)
        assert head.gradients

    def test_the_head_is_small(self, conservative: Backend, frames: list[Atoms]):
        """The sketch is made again from the seed, not stored."""
        head = fit_head(NTK(size=16, tangents=1), conservative, frames)
        assert {name: tuple(tensor.shape) for name, tensor in head.state_dict().items()} == {
            "energy_root": (16, 16),
            "force_root": (16, 16),
        }


class TestRefusals:
    def test_evaluations_without_gradients(self, conservative: Backend, frames: list[Atoms]):
        head = fit_head(NTK(tangents=1), conservative, frames)
        with pytest.raises(ValueError, match="needs gradients: evaluate with gradients=True"):
            head(forward_pass_of(conservative, frames))

    def test_another_potential(self, conservative: Backend, frames: list[Atoms]):
        head = fit_head(NTK(tangents=1), conservative, frames)
        other = load_backend(ToyCalculator(("H", "C", "O", "Si")))
        with pytest.raises(PotentialMismatch, match="fitted for a potential with 57 parameters, but this one has 94"):
            head(forward_pass_of(other, frames, gradients=True))

    def test_the_length_that_a_file_says_allocates_nothing(self):
        sketch = Sketch(10**12, 4, seed=0)
        with pytest.raises(PotentialMismatch, match="a potential with 1000000000000 parameters, but this one has 3"):
            sketch(torch.ones(3))

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"size": 0}, "size is at least 1, not 0"),
            ({"tangents": 0}, "tangents is between 1 and 1024, not 0"),
            ({"noise": 0.0}, "the noise is above 0 and at most 1, not 0.0"),
        ],
    )
    def test_options(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            NTK(**options)
