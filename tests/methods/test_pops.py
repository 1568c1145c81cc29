"""The POPS covariance: a golden example, its properties, and dense algebra."""

import numpy as np
import pytest
import torch
from ase import Atoms
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.errors import LabelError
from ase_uq.methods.pops import POPS, with_constant
from ase_uq.numerics.moves import pops_root
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

from .builders import batches_of, evaluation_of

RIDGE = 1e-4


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(30, seed=11)


def regression(seed: int, count: int = 40, width: int = 5) -> tuple[Tensor, Tensor, Tensor]:
    """Features, residuals and precision of a linear model that cannot be right."""
    random = torch.Generator().manual_seed(seed)
    features = torch.randn(count, width, generator=random, dtype=torch.float64)
    targets = features.square().sum(1) + torch.randn(count, generator=random, dtype=torch.float64)
    precision = features.T @ features + torch.eye(width, dtype=torch.float64)
    return features, targets - features @ torch.linalg.solve(precision, features.T @ targets), precision


def moves_of(features: Tensor, residuals: Tensor, precision: Tensor) -> Tensor:
    """(n, d) δθ_i = Sφ_i e_i/h_i, one after the other."""
    inverse = torch.linalg.inv(precision)
    return torch.stack([inverse @ phi * e / (phi @ inverse @ phi) for phi, e in zip(features, residuals, strict=True)])


class TestCovariance:
    def test_golden_example(self):
        features = torch.tensor([[1, 0], [1, 1], [0, 2], [2, 1]], dtype=torch.float64)
        targets = torch.tensor([1, 0.2, -1, 1.5], dtype=torch.float64)
        precision = features.T @ features + torch.diag(torch.tensor([1.0, 2.0], dtype=torch.float64))
        residuals = targets - features @ torch.linalg.solve(precision, features.T @ targets)
        root, jitter = pops_root(features, residuals.square(), precision)
        expected = [[0.0299565855, -0.0068352364], [-0.0068352364, 0.0137095512]]
        np.testing.assert_allclose(root @ root.T, expected, atol=5e-11)
        assert jitter == 0

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_is_the_covariance_of_moves_that_fit_a_row_each(self, seed: int):
        features, residuals, precision = regression(seed)
        moves = moves_of(features, residuals, precision)
        np.testing.assert_allclose((features * moves).sum(1), residuals, rtol=1e-9, atol=1e-12)
        root, _ = pops_root(features, residuals.square(), precision)
        np.testing.assert_allclose(root @ root.T, moves.T @ moves / len(moves), rtol=1e-8, atol=1e-12)

    def test_a_move_is_the_smallest_that_fits_its_row(self):
        """In the metric of the precision: any other that fits it too is longer."""
        features, residuals, precision = regression(0)
        moves = moves_of(features, residuals, precision)
        random = torch.Generator().manual_seed(1)
        for phi, move in zip(features[:5], moves, strict=False):
            along = torch.randn(len(move), generator=random, dtype=torch.float64)
            other = move + along - phi * (along @ phi) / (phi @ phi)
            assert float(phi @ other) == pytest.approx(float(phi @ move))
            assert float(move @ precision @ move) < float(other @ precision @ other)

    def test_more_of_the_same_data_do_not_shrink_it(self):
        """The posterior covariance halves; POPS stays, but for the prior, which counts half as much."""
        features, residuals, precision = regression(0)
        once, _ = pops_root(features, residuals.square(), precision)
        twice, _ = pops_root(features.repeat(2, 1), residuals.square().repeat(2), 2 * precision)
        torch.testing.assert_close(twice @ twice.T, once @ once.T, rtol=1e-10, atol=1e-14)


class TestHead:
    def test_score_is_dense_algebra(self, backend: Backend, frames: list[Atoms]):
        head = fit_head(POPS(ridge=RIDGE), backend, frames, batch_atoms=20)
        train, new = forward_pass_of(backend, frames), forward_pass_of(backend, labelled_frames(5, seed=12))
        x = train.features.numpy()
        spread = x.std(0)
        units = np.maximum(spread, 1e-6 * spread.max())

        def design(rows: np.ndarray) -> np.ndarray:
            return np.concatenate([np.ones((len(rows), 1)), (rows - x.mean(0)) / units], 1)

        phi = design(x)
        reference = np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])
        squares = ((reference - train.forces.numpy()) ** 2).mean(1)
        inverse = np.linalg.inv(phi.T @ phi + len(phi) * RIDGE * np.eye(phi.shape[1]))
        leverage = np.einsum("nd,de,ne->n", phi, inverse, phi)
        middle = (phi * (squares / leverage**2)[:, None]).T @ phi / len(phi)
        covariance = inverse @ middle @ inverse
        scale = np.einsum("nd,de,ne->n", phi, covariance, phi).mean()
        assert head.settings["mean_square"] == pytest.approx(scale, rel=1e-8)
        for forward_pass in (train, new):
            rows = design(forward_pass.features.numpy())
            expected = np.einsum("nd,de,ne->n", rows, covariance, rows) / scale
            np.testing.assert_allclose(head(forward_pass).distance, expected, rtol=1e-8)

    def test_does_not_depend_on_the_size_of_the_training_set(self, backend: Backend, frames: list[Atoms]):
        once, thrice = (fit_head(POPS(ridge=RIDGE), backend, frames * copies) for copies in (1, 3))
        unseen = forward_pass_of(backend, labelled_frames(5, seed=12))
        torch.testing.assert_close(thrice(unseen).distance, once(unseen).distance, rtol=1e-8, atol=0)
        assert thrice.settings["mean_square"] == pytest.approx(once.settings["mean_square"], rel=1e-8)

    def test_is_larger_where_the_errors_were(self):
        """Which the leverage, that knows features only, cannot say."""
        random = torch.Generator().manual_seed(0)
        x = torch.randn(2000, 2, generator=random, dtype=torch.float64)
        noise = torch.randn(2000, 3, generator=random, dtype=torch.float64)
        forces = noise * torch.where(x[:, :1].abs() > x[:, 1:].abs(), 1.0, 0.05)
        head = POPS().fit(batches_of(x, forces=forces), Serial())
        along = evaluation_of(torch.tensor([[2.0, 0.0], [0.0, 2.0]], dtype=torch.float64))
        bad, good = head.distance(along).tolist()
        assert bad > 1.5 * good

    def test_only_atoms_with_forces_count(self, backend: Backend, frames: list[Atoms]):
        partly = [atoms.copy() for atoms in frames]
        for atoms in partly[10:]:
            del atoms.arrays["REF_forces"]
        for batch_atoms in (20, 10_000):
            head = fit_head(POPS(ridge=RIDGE), backend, partly, batch_atoms=batch_atoms)
            assert head.settings["atoms"] == sum(len(atoms) for atoms in partly[:10])

    def test_a_sample_gives_nearly_the_head_of_all(self):
        random = torch.Generator().manual_seed(0)
        x = torch.randn(8000, 3, generator=random, dtype=torch.float64)
        forces = torch.randn(8000, 3, generator=random, dtype=torch.float64)
        every, some = (POPS(rows=rows).fit(batches_of(x, forces=forces), Serial()) for rows in (8000, 2000))
        assert some.settings["atoms"] == 2000
        at = evaluation_of(3 * torch.randn(100, 3, generator=random, dtype=torch.float64))
        torch.testing.assert_close(some.distance(at), every.distance(at), rtol=0.25, atol=0)

    def test_an_atom_at_the_mean_of_all_does_not_move_the_weights_without_end(self):
        """Its features are zero, and without the constant its leverage would be."""
        random = torch.Generator().manual_seed(0)
        x = torch.randn(500, 2, generator=random, dtype=torch.float64)
        x = torch.cat([x - x.mean(0), torch.zeros(1, 2, dtype=torch.float64)])
        head = POPS().fit(batches_of(x, forces=torch.ones(501, 3, dtype=torch.float64)), Serial())
        assert head.settings["mean_square"] < 10

    def test_a_constant_stands_before_the_features(self):
        assert with_constant(torch.tensor([[2.0, 3.0]])).tolist() == [[1.0, 2.0, 3.0]]


@pytest.mark.parametrize("ridge", [0.0, -1e-9, 1.0, float("nan")])
def test_a_ridge_outside_its_range_is_refused(ridge: float):
    with pytest.raises(ValueError, match="the ridge lies between 0 and 1"):
        POPS(ridge=ridge)


def test_no_rows_are_refused():
    with pytest.raises(ValueError, match="rows is a number of atoms, 1 or more, not 0"):
        POPS(rows=0)


def test_frames_without_forces_are_refused(backend: Backend, frames: list[Atoms]):
    unlabelled = [atoms.copy() for atoms in frames]
    for atoms in unlabelled:
        del atoms.arrays["REF_forces"]
    with pytest.raises(LabelError, match="pops needs training frames with reference forces, and there are none"):
        fit_head(POPS(), backend, unlabelled)
