"""The exact posterior of conservative forces: evidence against numerics, variances against dense algebra."""

import json
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from scipy.optimize import minimize

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, LabelError, UQWarning
from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.methods.bll import BLL
from ase_uq.methods.bll.exact import maximise_joint_evidence
from ase_uq.methods.bll.regression import Statistics
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

pytestmark = pytest.mark.filterwarnings("ignore:bll. the exact posterior:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(12, seed=1)


@pytest.fixture(scope="module")
def head(backend: Backend, frames: list[Atoms]) -> Iterator[Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        yield fit_head(BLL(conservative="exact", ridge=1e-6), backend, frames)


def statistics(rows: np.ndarray, targets: np.ndarray) -> Statistics:
    x, y = torch.from_numpy(rows), torch.from_numpy(targets)[:, None]
    return Statistics(x.T @ x, x.T @ y, y.T @ y, float(len(rows)))


class TestEvidence:
    width = 6

    def draws(self, seed: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        rng = np.random.default_rng(seed)
        weights = rng.normal(size=self.width)
        energies, forces = rng.normal(size=(60, self.width)), 2 * rng.normal(size=(200, self.width))
        noisy = energies @ weights + 0.05 * rng.normal(size=60), forces @ weights + 0.3 * rng.normal(size=200)
        return energies, noisy[0], forces, noisy[1]

    def test_is_largest_where_a_dense_search_finds_it(self):
        energies, of_energies, forces, of_forces = self.draws(1)
        rows, targets = np.concatenate([energies, forces]), np.concatenate([of_energies, of_forces])

        def loss(logs: np.ndarray) -> float:
            """-ln N(y | 0, noise + X Xᵀ/λ), without any posterior."""
            prior, energy, force = np.exp(logs)
            noise = np.repeat([1 / energy, 1 / force], [60, 200])
            covariance = np.diag(noise) + rows @ rows.T / prior
            return 0.5 * (np.linalg.slogdet(covariance)[1] + targets @ np.linalg.solve(covariance, targets))

        best = minimize(loss, np.array([0.0, 3.0, 1.0]), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 1e-9})
        found = maximise_joint_evidence(statistics(energies, of_energies), statistics(forces, of_forces), 1e-12)
        np.testing.assert_allclose(np.log([found.prior, found.energy, found.force]), best.x, atol=1e-3)

    def test_effective_numbers_add_up_to_the_weights_and_noises_are_those_that_were_added(self):
        energies, of_energies, forces, of_forces = self.draws(2)
        found = maximise_joint_evidence(statistics(energies, of_energies), statistics(forces, of_forces), 1e-12)
        rest = found.prior * float(torch.linalg.inv(found.precision).trace())
        assert found.energy_effective + found.force_effective + rest == pytest.approx(self.width, rel=1e-9)
        assert found.energy**-0.5 == pytest.approx(0.05, rel=0.2)
        assert found.force**-0.5 == pytest.approx(0.3, rel=0.1)

    def test_the_prior_is_bounded_from_below(self):
        energies, of_energies, forces, of_forces = self.draws(3)
        parts = statistics(energies, of_energies), statistics(forces, of_forces)
        found = maximise_joint_evidence(*parts, smallest=10.0)
        data = found.precision - found.prior * torch.eye(self.width)
        assert found.prior == pytest.approx(10 * float(data.diagonal().mean()), rel=1e-6)

    @pytest.mark.parametrize("noises", [(1e-5, 1e-3), (1e-2, 1e-5)])
    def test_is_largest_where_labels_have_many_digits(self, noises: tuple[float, float]):
        """The bound of the prior moves with the noises then: a search that takes it for fixed stops half way."""
        rng = np.random.default_rng(5)
        weights, counts, smallest = rng.normal(size=20), (10, 120), 1e-9
        rows = [rng.normal(size=(n, 20)) for n in counts]
        targets = [x @ weights + noise * rng.normal(size=len(x)) for x, noise in zip(rows, noises, strict=True)]
        x, y = np.concatenate(rows), np.concatenate(targets)
        bounds = [smallest * np.square(part).sum(0).mean() for part in rows]

        def loss(logs: np.ndarray) -> float:
            free, energy, force = np.exp(logs)
            prior = free + energy * bounds[0] + force * bounds[1]
            covariance = np.diag(np.repeat([1 / energy, 1 / force], counts)) + x @ x.T / prior
            return 0.5 * (np.linalg.slogdet(covariance)[1] + y @ np.linalg.solve(covariance, y))

        parts = [statistics(*each) for each in zip(rows, targets, strict=True)]
        found = maximise_joint_evidence(*parts, smallest=smallest)
        free = max(found.prior - found.energy * bounds[0] - found.force * bounds[1], 1e-30)
        here = np.log([free, found.energy, found.force])
        starts = (here, np.array([0.0, *(-2 * np.log(noises))]), np.array([0.0, 10.0, 10.0]))
        best = min(minimize(loss, start, method="Nelder-Mead", options={"maxiter": 400}).fun for start in starts)
        assert loss(here) <= best + 0.02

    def test_labels_without_noise_are_no_error(self):
        energies, _, forces, _ = self.draws(4)
        weights = np.ones(self.width)
        parts = statistics(energies, energies @ weights), statistics(forces, forces @ weights)
        found = maximise_joint_evidence(*parts, smallest=1e-12)
        assert np.isfinite([found.prior, found.energy, found.force]).all()


class TestVariances:
    def test_are_those_of_dense_algebra(self, head: Any, backend: Backend):
        """Slopes by finite differences of the features, and the covariance that the file of the head holds."""
        atoms = molecule("CH3OH")
        atoms.rattle(0.1, seed=3)

        def psi(shift: np.ndarray) -> np.ndarray:
            moved = atoms.copy()
            moved.positions += shift.reshape(-1, 3)
            return forward_pass_of(backend, [moved]).energy_layer.features.double().sum(0).numpy()

        step = 1e-4
        slopes = np.array([psi(step * axis) - psi(-step * axis) for axis in np.eye(3 * len(atoms))]) / (2 * step)
        expected = np.square(slopes @ head.slope_root.numpy()).sum(1).reshape(-1, 3)
        found = head(forward_pass_of(backend, [atoms], gradients=True)).forces[:, :, 0].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-9)

    def test_are_1_on_average_over_the_fitted_components(self, head: Any, backend: Backend, frames: list[Atoms]):
        scores = [head(forward_pass_of(backend, [atoms], gradients=True)).forces[:, :, 0].flatten() for atoms in frames]
        assert float(torch.cat(scores).mean()) == pytest.approx(1, rel=1e-6)

    def test_their_trace_does_not_turn_and_no_net_force_is_uncertain(self, head: Any, backend: Backend):
        atoms = molecule("CH3OH")
        turned = atoms.copy()
        turned.rotate(40, (1, 2, 3))
        one, other = (head(forward_pass_of(backend, [a], gradients=True)).forces[:, :, 0] for a in (atoms, turned))
        torch.testing.assert_close(one.sum(1), other.sum(1), rtol=1e-6, atol=1e-9)

    def test_all_probes_are_exact_and_few_have_no_bias(self, head: Any, backend: Backend, frames: list[Atoms]):
        from copy import deepcopy

        evaluated = [forward_pass_of(backend, [atoms], gradients=True) for atoms in frames]
        exact = torch.cat([head(e).forces[:, :, 0] for e in evaluated])
        width = len(head.slope_root)

        def estimated(n_probes: int) -> torch.Tensor:
            copy = deepcopy(head)
            copy.estimate(n_probes)
            return torch.cat([copy(e).forces[:, :, 0] for e in evaluated])

        torch.testing.assert_close(estimated(width), exact, rtol=1e-8, atol=1e-12)
        torch.testing.assert_close(estimated(10 * width), exact, rtol=1e-8, atol=1e-12)
        for n_probes in (4, 16):
            ratios = estimated(n_probes) / exact
            assert float(ratios.mean()) == pytest.approx(1, abs=3 * (2 / n_probes) ** 0.5)
            assert float(ratios.std()) < 1.5 * (2 / n_probes) ** 0.5

    def test_probes_cost_so_many_passes(self, head: Any, backend: Backend, monkeypatch: pytest.MonkeyPatch):
        from copy import deepcopy

        calls: list[int] = []
        forward_pass = forward_pass_of(backend, [molecule("H2O")], gradients=True)
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
        head(forward_pass)
        assert len(calls) == len(head.slope_root)
        copy = deepcopy(head)
        copy.estimate(5)
        copy(forward_pass)
        assert len(calls) == len(head.slope_root) + 5

    def test_a_crystal_whose_sites_are_centres_has_none(self, head: Any, backend: Backend):
        """Why this score alone is no detector of what is strange."""
        crystal = Atoms("C", [(0, 0, 0)], cell=[1.9] * 3, pbc=True)
        found = head(forward_pass_of(backend, [crystal], gradients=True)).forces
        assert float(found[:, :, 0].max()) < 1e-12
        assert float(found[:, :, 1:].min()) > 0


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        calculator, train, held_out = ToyCalculator(ELEMENTS), labelled_frames(12, seed=1), labelled_frames(12, seed=2)
        return fit(calculator, train, held_out, methods=[BLL(conservative="exact")], progress=False)


def test_from_fit_to_results(model: UncertaintyModel):
    calculator = ToyCalculator(ELEMENTS)
    exact = UncertainCalculator(calculator, model, every=2)
    few = UncertainCalculator(calculator, model, every=2, force_probes=8)
    atoms = molecule("CH3OH")
    one, other = (calc.get_property("forces_uncertainty", atoms) for calc in (exact, few))
    assert not np.allclose(one, other)
    np.testing.assert_allclose(one, other, rtol=2)
    assert not hasattr(model.methods["bll"].head, "directions"), "the model of the user is not changed"


def test_members_have_its_covariances(model: UncertaintyModel):
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=1)
    backend = load_backend(ToyCalculator(ELEMENTS))
    (prediction,) = Predictor(backend, model, ensemble=500, ensemble_forces=500).predict([atoms])
    found = prediction["forces_ensemble"].var(2)
    expected = model.methods["bll"].head(forward_pass_of(backend, [atoms], gradients=True)).forces[:, :, 0].numpy()
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=0.3, atol=1e-12)


def test_zero_probes_are_all_of_them_on_a_model_that_estimated(model: UncertaintyModel):
    backend, atoms = load_backend(ToyCalculator(ELEMENTS)), molecule("CH3OH")
    few = Predictor(backend, model, force_probes=2)
    (again,), (exact,) = (Predictor(backend, m).predict([atoms]) for m in (few.uncertainty_model, model))
    np.testing.assert_array_equal(again["forces_uncertainty"], exact["forces_uncertainty"])
    assert not np.allclose(few.predict([atoms])[0]["forces_uncertainty"], exact["forces_uncertainty"])


@pytest.mark.parametrize("change", ["null", "without energy", "with force"])
def test_files_that_say_something_else_are_refused(head: Any, change: str):
    settings = json.loads(json.dumps(head.settings))
    if change == "null":
        settings["slope"] = None
    elif change == "without energy":
        del settings["energy"]
    else:
        settings["force"] = {}
    with pytest.raises(WrongEntry):
        type(head).check(Entries(settings, "settings"), StoredTensors(dict(head.state_dict())))


def test_says_what_it_costs_before_it_starts(backend: Backend, frames: list[Atoms]):
    with pytest.warns(UQWarning, match=r"takes \d+ backward passes for every frame, here and wherever"):
        fit_head(BLL(conservative="exact"), backend, frames)


def test_bad_input(backend: Backend, frames: list[Atoms], model: UncertaintyModel):
    with pytest.raises(ValueError, match="scored by 'sites' or 'exact', not by 'probes'"):
        BLL(conservative="probes")  # pyright: ignore[reportArgumentType]
    direct = load_backend(ToyCalculator(ELEMENTS, direct=True))
    with pytest.raises(InputError, match="their own last layer is exact already"):
        fit_head(BLL(conservative="exact"), direct, frames)
    for label in ("REF_energy", "REF_forces"):
        bare = [atoms.copy() for atoms in frames]
        for atoms in bare:
            del (atoms.info if label == "REF_energy" else atoms.arrays)[label]
        with pytest.raises(LabelError, match="needs reference energies and forces of training frames"):
            fit_head(BLL(conservative="exact"), backend, bare)
    with pytest.raises(ValueError, match=r"force_probes=0\.5 is not a whole number of 0 or more"):
        Predictor(backend, model, force_probes=0.5)  # pyright: ignore[reportArgumentType]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        plain = fit(ToyCalculator(ELEMENTS), frames, labelled_frames(20, seed=2), methods=["bll"], progress=False)
    with pytest.raises(ValueError, match=r"no method of this model \(bll\) has an exact posterior"):
        Predictor(backend, plain, force_probes=16)
