"""The Mahalanobis distance per element against scikit-learn and dense algebra."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from sklearn.covariance import EmpiricalCovariance

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods._distance import REACH, raw_of_atoms
from ase_uq.methods.mahalanobis import Mahalanobis
from ase_uq.numerics.sites import RADII
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames, with_labels

from .builders import batches_of, evaluation_of

RIDGE = 1e-4


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator((*ELEMENTS, "N")))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(30, seed=11)


def numpy_distance(train: ForwardPass, new: ForwardPass, ridge: float) -> np.ndarray:
    """Written out, with the rule of shrinking; before the mean over the training atoms is divided out."""
    x, z = train.features.numpy(), train.numbers.numpy()
    elements = np.unique(z)
    width = x.shape[1]
    scatters = {e: np.cov(x[z == e].T, bias=True) * (z == e).sum() for e in elements}
    within = sum(scatters.values()) / len(x)
    spread = np.sqrt(np.diag(within))
    extra = ridge * np.diag(np.maximum(spread, 1e-6 * spread.max()) ** 2)
    found = []
    for row, number in zip(new.features.numpy(), new.numbers.numpy(), strict=True):
        if number in elements:
            count = (z == number).sum()
            covariance = (scatters[number] + width * within) / (count + width)
            centre = x[z == number].mean(0)
        else:
            covariance, centre = np.cov(x.T, bias=True), x.mean(0)
        found.append((row - centre) @ np.linalg.solve(covariance + extra, row - centre))
    return np.array(found)


class TestDistance:
    def test_is_dense_algebra(self, backend: Backend, frames: list[Atoms]):
        head = fit_head(Mahalanobis(ridge=RIDGE), backend, frames, batch_atoms=20)
        train = forward_pass_of(backend, frames)
        scale = numpy_distance(train, train, RIDGE).mean()
        assert head.settings["mean_square"] == pytest.approx(scale, rel=1e-9)
        # Ammonia: an element that was not fitted, beside one that was.
        new = forward_pass_of(backend, [*labelled_frames(5, seed=12), molecule("NH3")])
        for forward_pass in (train, new):
            expected = numpy_distance(train, forward_pass, RIDGE) / scale
            np.testing.assert_allclose(head(forward_pass).distance, expected, rtol=1e-8)

    def test_is_that_of_scikit_learn_per_element(self):
        """With many atoms there is next to nothing to shrink."""
        random = torch.Generator().manual_seed(0)
        numbers = torch.tensor([1, 8]).repeat(20_000)
        mixing = torch.randn(2, 3, 3, generator=random, dtype=torch.float64)
        x = torch.randn(len(numbers), 3, generator=random, dtype=torch.float64)
        x = torch.einsum("nd,nde->ne", x, mixing[(numbers == 8).long()]) + 5.0 * numbers[:, None]
        head = Mahalanobis(ridge=1e-12).fit(batches_of(x, numbers), Serial())
        found = head.distance(evaluation_of(x, numbers)).numpy() * head.settings["mean_square"]
        for z in (1, 8):
            own = x[numbers == z].numpy()
            expected = EmpiricalCovariance().fit(own).mahalanobis(own)
            # What 3 imaginary atoms among 20 000 change.
            np.testing.assert_allclose(found[numbers == z], expected, rtol=0.02)

    def test_usual_for_one_element_is_unusual_for_another(self):
        random = torch.Generator().manual_seed(1)
        numbers = torch.tensor([6, 8]).repeat(500)
        x = torch.randn(1000, 2, generator=random, dtype=torch.float64) + 20.0 * (numbers[:, None] == 8)
        head = Mahalanobis().fit(batches_of(x, numbers), Serial())
        swapped = head.distance(evaluation_of(x, numbers.flip(0)))
        assert float(swapped.min()) > 10 * float(head.distance(evaluation_of(x, numbers)).max())

    def test_a_rare_element_borrows_the_covariance_of_the_others(self):
        """One atom of oxygen has a mean but no spread: atoms like it are near, and none is infinitely far."""
        random = torch.Generator().manual_seed(2)
        x = torch.randn(401, 4, generator=random, dtype=torch.float64)
        numbers = torch.tensor([6] * 400 + [8])
        head = Mahalanobis().fit(batches_of(x, numbers), Serial())
        assert head.settings["atoms"] == {"6": 400, "8": 1}
        near = head.distance(evaluation_of(x[-1:] + 0.1, numbers[-1:]))
        far = head.distance(evaluation_of(x[-1:] + 10.0, numbers[-1:]))
        assert 0 < float(near) < 1
        assert 10 < float(far) < 1e4


def test_features_that_never_vary_do_not_break_it(backend: Backend):
    water = with_labels([_rattled(seed) for seed in range(12)])
    head = fit_head(Mahalanobis(), backend, water)
    assert bool(torch.isfinite(head(forward_pass_of(backend, water)).distance).all())
    new = head(forward_pass_of(backend, [molecule("CH3OH")])).distance
    assert bool(torch.isfinite(new).all())
    assert float(new.max()) > 1e3


def test_forces_read_the_sums_over_sites(backend: Backend, frames: list[Atoms]):
    head = fit_head(Mahalanobis(), backend, frames)
    forward_pass = forward_pass_of(backend, frames[:3])
    assert (head.settings["radii"], head.settings["reach"]) == (list(RADII), REACH)
    expected = raw_of_atoms(head.distance(forward_pass), forward_pass, RADII, REACH)
    assert torch.equal(head(forward_pass).forces, expected.forces)


@pytest.mark.parametrize("ridge", [0.0, -1e-9, 1.0, float("nan")])
def test_a_ridge_outside_its_range_is_refused(ridge: float):
    with pytest.raises(ValueError, match="the ridge lies between 0 and 1"):
        Mahalanobis(ridge=ridge)


def _rattled(seed: int) -> Atoms:
    atoms = molecule("H2O")
    atoms.rattle(0.1, seed=seed)
    return atoms
