"""The misspecification-aware covariance of the exact posterior: dense algebra, row by row, and what it refuses."""

import json
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_uq import Predictor, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import UQWarning
from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.methods.bll import BLL
from ase_uq.methods.bll.exact import moves_root
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames, on_ranks

pytestmark = pytest.mark.filterwarnings("ignore:bll. the exact posterior:ase_uq.errors.UQWarning")

METHOD = BLL(conservative="exact", covariance="pops", ridge=1e-4)


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(12, seed=1)


@pytest.fixture(scope="module")
def head(backend: Backend, frames: list[Atoms]) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        return fit_head(METHOD, backend, frames)


class TestMoves:
    def rows(self) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        random = torch.Generator().manual_seed(1)
        rows = torch.randn(41, 5, generator=random, dtype=torch.float64)
        errors = torch.randn(41, generator=random, dtype=torch.float64)
        return rows, errors, rows.T @ rows + torch.eye(5, dtype=torch.float64)

    def test_are_those_of_the_rows_that_the_posterior_knows_least_of(self):
        rows, errors, precision = self.rows()
        inverse = torch.linalg.inv(precision)
        leverages = torch.einsum("nd,de,ne->n", rows, inverse, rows)
        moves = (rows @ inverse) * (errors / leverages)[:, None]
        torch.testing.assert_close((rows * moves).sum(1), errors)
        moves = moves[leverages.argsort()[20:]]
        root, jitter = moves_root(rows, errors, precision)
        torch.testing.assert_close(root @ root.T, moves.T @ moves / 21)
        assert jitter == 0

    def test_rows_without_slopes_move_nothing(self):
        """Most sites of a crystal may be centres: the median is zero then, and an error over nothing has no bound."""
        rows, errors, precision = self.rows()
        many = torch.cat([rows, torch.zeros(100, 5, dtype=torch.float64)])
        root, _ = moves_root(many, torch.cat([errors, torch.ones(100, dtype=torch.float64)]), precision)
        inverse = torch.linalg.inv(precision)
        moves = (rows @ inverse) * (errors / torch.einsum("nd,de,ne->n", rows, inverse, rows))[:, None]
        torch.testing.assert_close(root @ root.T, moves.T @ moves / 41)


def test_scores_are_dense_algebra(head: Any, backend: Backend, frames: list[Atoms]):
    """Of one weighted regression on energies per atom and all force components, with its rows written out."""
    of_energies, of_forces, errors, force_errors = [], [], [], []
    for atoms in frames:
        e = forward_pass_of(backend, [atoms], gradients=True)
        assert e.gradients is not None
        assert e.forces is not None
        phi = e.energy_layer.features
        of_energies.append(phi.mean(0).numpy())
        slopes = e.gradients.of_energy_layer(torch.eye(phi.shape[1], dtype=phi.dtype)).forces
        of_forces.append(slopes.reshape(-1, phi.shape[1]).numpy())
        errors.append((atoms.info["REF_energy"] - float(e.energy)) / len(atoms))
        force_errors.append((atoms.arrays["REF_forces"] - e.forces.numpy()).ravel())
    psi, slopes = np.array(of_energies), np.concatenate(of_forces)
    psi, energies, forces = psi - psi.mean(0), np.array(errors) - np.mean(errors), np.concatenate(force_errors)
    spread = np.sqrt(np.square(psi).mean(0) + np.square(slopes).mean(0))
    scale = np.maximum(spread, 1e-6 * spread.max())
    noises = head.settings["energy"]["noise"], head.settings["slope"]["noise"]
    rows = np.concatenate([psi / scale / noises[0], slopes / scale / noises[1]])
    errors = np.concatenate([energies / noises[0], forces / noises[1]])
    inverse = np.linalg.inv(rows.T @ rows + head.settings["slope"]["prior_precision"] * np.eye(rows.shape[1]))
    leverages = np.einsum("nd,de,ne->n", rows, inverse, rows)
    median = np.sort(leverages)[(len(rows) - 1) // 2]
    moves = [inverse @ r * e / h for r, e, h in zip(rows, errors, leverages, strict=True) if h >= median]
    covariance = np.cov(np.array(moves).T, bias=True) + np.outer(np.mean(moves, 0), np.mean(moves, 0))
    covariance = covariance / np.outer(scale, scale)

    def variances(of: np.ndarray) -> np.ndarray:
        return np.einsum("nd,de,ne->n", of, covariance, of)

    atoms = molecule("CH3OH")
    atoms.rattle(0.1, seed=3)
    e = forward_pass_of(backend, [atoms], gradients=True)
    assert e.gradients is not None
    phi = e.energy_layer.features
    new = e.gradients.of_energy_layer(torch.eye(phi.shape[1], dtype=phi.dtype)).forces.reshape(-1, phi.shape[1]).numpy()
    found = head(e)
    expected = variances(new) / variances(slopes).mean()
    np.testing.assert_allclose(found.forces[:, :, 0].numpy().ravel(), expected, rtol=1e-6, atol=1e-9)
    middle = phi.mean(0).numpy()[None] - np.array(of_energies).mean(0)
    intercept = 1 / head.settings["energy"]["effective"]
    assert float(found.energy[0, 0]) == pytest.approx(variances(middle)[0] / variances(psi).mean() + intercept)


def test_it_differs_from_the_posterior(head: Any, backend: Backend, frames: list[Atoms]):
    other = fit_head(BLL(conservative="exact", ridge=1e-4), backend, frames)
    e = forward_pass_of(backend, labelled_frames(3, seed=9)[:1], gradients=True)
    one, two = (each(e).forces[:, :, 0] for each in (head, other))
    assert not torch.allclose(one, two, rtol=0.1)
    assert head.settings["covariance"] == "pops"
    assert "covariance" not in other.settings


def test_ranks_share_the_rows(backend: Backend, head: Any, frames: list[Atoms]):
    for other in on_ranks(3, lambda ranks: fit_head(METHOD, backend, frames, communicator=ranks)):
        np.testing.assert_allclose(
            other.slope_root @ other.slope_root.T, head.slope_root @ head.slope_root.T, rtol=1e-4, atol=1e-6
        )


def test_batches_and_frames_without_labels_do_not_matter(backend: Backend, head: Any, frames: list[Atoms]):
    unlabelled = [atoms.copy() for atoms in labelled_frames(2, seed=7)]
    for atoms in unlabelled:
        del atoms.info["REF_energy"]
        del atoms.arrays["REF_forces"]
    again = fit_head(METHOD, backend, [*frames, *unlabelled], batch_atoms=1)
    np.testing.assert_allclose(again.slope_root @ again.slope_root.T, head.slope_root @ head.slope_root.T, rtol=1e-6)


def test_from_fit_to_members():
    calculator, train, held_out = ToyCalculator(ELEMENTS), labelled_frames(10, seed=1), labelled_frames(10, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        model = fit(calculator, train, held_out, methods=[METHOD], progress=False)
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=1)
    (prediction,) = Predictor(calculator, model, ensemble=500, ensemble_forces=500).predict([atoms])
    found = prediction["forces_ensemble"].var(2)
    e = forward_pass_of(load_backend(calculator), [atoms], gradients=True)
    expected = model.methods["bll"].head(e).forces[:, :, 0].numpy()
    np.testing.assert_allclose(found / found.sum(), expected / expected.sum(), rtol=0.3, atol=1e-12)


def test_other_words_are_refused():
    with pytest.raises(ValueError, match="the covariance is that of the 'posterior' or 'pops', not 'sandwich'"):
        BLL(conservative="exact", covariance="sandwich")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="covariance='pops' is an option of conservative='exact'"):
        BLL(covariance="pops")


def test_a_file_with_another_word_is_refused(head: Any):
    settings = json.loads(json.dumps(head.settings)) | {"covariance": "sandwich"}
    tensors = dict(head.named_buffers())
    with pytest.raises(WrongEntry, match="covariance"):
        type(head).check(Entries(settings, "settings"), StoredTensors(tensors))
