"""Residual variance, pivots and sketches against dense algebra, scikit-learn and the statistics they promise."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct
from torch import Tensor

from ase_uq.errors import LabelError, PotentialMismatch
from ase_uq.numerics.hashing import random_bits, random_normal, random_signs, random_uniform, substream
from ase_uq.numerics.posterior import mean_square, pivoted_cholesky, residual
from ase_uq.numerics.sketch import Sketch

NOISE = 1e-2


def rows_of(seed: int, count: int = 40, width: int = 5) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def eye(size: int) -> Tensor:
    return torch.eye(size, dtype=torch.float64)


def variance(train: Tensor, at: Tensor, noise: float = NOISE) -> Tensor:
    return (at @ residual(train.T @ train, len(train), noise).root).square().sum(1)


class TestResidual:
    @given(seed=st.integers(0, 1000), count=st.integers(1, 30), width=st.integers(1, 8))
    @settings(max_examples=30, deadline=None)
    def test_feature_form_is_kernel_form(self, seed: int, count: int, width: int):
        """K1. v = k(x, x) - k_xT (K_TT + σ²I)⁻¹ k_Tx, also with fewer rows than features."""
        train, at = rows_of(seed, count, width).numpy(), rows_of(seed + 1, 7, width).numpy()
        inverse = np.linalg.inv(train @ train.T + NOISE * np.eye(count))
        cross = at @ train.T
        expected = (at**2).sum(1) - np.einsum("it,tu,iu->i", cross, inverse, cross)
        found = variance(torch.from_numpy(train), torch.from_numpy(at))
        np.testing.assert_allclose(found, expected, rtol=1e-7, atol=1e-10)

    def test_it_is_the_posterior_variance_of_scikit_learn(self):
        """K1."""
        train, at = rows_of(0), rows_of(1, 10)
        process = GaussianProcessRegressor(DotProduct(sigma_0=0.0, sigma_0_bounds="fixed"), alpha=NOISE, optimizer=None)
        process.fit(train.numpy(), np.zeros(len(train)))
        _, deviation = process.predict(at.numpy(), return_std=True)
        np.testing.assert_allclose(variance(train, at), deviation**2, rtol=1e-8)

    @given(seed=st.integers(0, 1000), noise=st.sampled_from([1e-8, 1e-4, 1.0]))
    @settings(max_examples=30, deadline=None)
    def test_fitted_rows_have_less_than_the_noise_and_none_less_than_nothing(self, seed: int, noise: float):
        """K2."""
        train = rows_of(seed)
        assert float(variance(train, train, noise).max()) < noise
        assert float(variance(train, 1e3 * rows_of(seed + 1), noise).min()) >= 0

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=30, deadline=None)
    def test_more_rows_never_raise_it(self, seed: int):
        """K2."""
        train, at = rows_of(seed), rows_of(seed + 1, 100)
        assert bool((variance(train, at) <= variance(train[:-7], at) * (1 + 1e-12)).all())

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_turning_the_features_changes_nothing(self, seed: int):
        """K6."""
        train, at = rows_of(seed), rows_of(seed + 1)
        turn, _ = torch.linalg.qr(rows_of(seed + 2, 5))
        torch.testing.assert_close(variance(train @ turn, at @ turn), variance(train, at), rtol=1e-9, atol=0)

    def test_mean_and_effective_number_are_those_of_the_fitted_rows(self):
        train = rows_of(0)
        found = residual(train.T @ train, len(train), NOISE)
        own = variance(train, train)
        assert found.mean == pytest.approx(float(own.mean()), rel=1e-12)
        gram = train.T @ train
        hat = gram @ torch.linalg.inv(gram + NOISE * eye(5))
        assert found.effective == pytest.approx(float(hat.trace()), rel=1e-10)
        assert found.jitter == 0

    def test_rows_times_the_root_have_the_posterior_covariance_as_inner_products(self):
        """The posterior features of bmdal, which selection works on."""
        train, at = rows_of(0), rows_of(1, 6)
        root = residual(train.T @ train, len(train), NOISE).root
        posterior = (at @ root) @ (at @ root).T
        inverse = torch.linalg.inv(train @ train.T + NOISE * eye(len(train)))
        expected = at @ at.T - at @ train.T @ inverse @ train @ at.T
        torch.testing.assert_close(posterior, expected, rtol=1e-7, atol=1e-9)

    def test_features_that_no_row_has_keep_their_prior(self):
        train = torch.cat([rows_of(0), torch.zeros(40, 1, dtype=torch.float64)], 1)
        new = torch.zeros(1, 6, dtype=torch.float64)
        new[0, 5] = 2.0
        assert float(variance(train, new)) == pytest.approx(4.0, rel=1e-10)


class TestMeanSquare:
    def test_is_the_mean_square_of_the_rows(self):
        train = rows_of(0)
        assert mean_square(train.T @ train, 40) == pytest.approx(float(train.square().sum(1).mean()))

    @pytest.mark.parametrize(("rows", "offset"), [(torch.zeros(3, 2), 0.0), (1e-16 * torch.ones(3, 2), 1e3)])
    def test_nothing_but_rounding_is_refused(self, rows: Tensor, offset: float):
        with pytest.raises(LabelError, match="all training frames have the same features"):
            mean_square(rows.double().T @ rows.double(), 3, offset)


class TestPivots:
    @given(seed=st.integers(0, 1000), rank=st.integers(1, 12))
    @settings(max_examples=30, deadline=None)
    def test_their_product_is_the_determinant_of_what_was_taken(self, seed: int, rank: int):
        """K3."""
        rows = rows_of(seed)
        kernel = rows @ rows.T + NOISE * eye(40)
        found = pivoted_cholesky(lambda j: kernel[j], kernel.diagonal(), rank)
        assert len(found.indices) == rank
        block = kernel[found.indices][:, found.indices]
        assert float(found.values.log().sum()) == pytest.approx(float(torch.logdet(block)), rel=1e-9, abs=1e-9)
        factor = found.factor[found.indices]
        torch.testing.assert_close(factor @ factor.T, block, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(factor, factor.tril(), rtol=0, atol=0)

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_each_is_the_largest_variance_left(self, seed: int):
        """Against the posterior variance given the rows taken before, computed anew each time."""
        rows = rows_of(seed)
        kernel = rows @ rows.T + NOISE * eye(40)
        found = pivoted_cholesky(lambda j: kernel[j], kernel.diagonal(), 9)
        for step, (index, pivot) in enumerate(zip(found.indices, found.values, strict=True)):
            past = found.indices[:step]
            left = kernel.diagonal() - torch.einsum(
                "ni,ij,nj->n", kernel[:, past], torch.linalg.inv(kernel[past][:, past]), kernel[:, past]
            )
            left[past] = 0
            assert float(pivot) == pytest.approx(float(left.max()), rel=1e-8)
            assert float(left[index]) == pytest.approx(float(left.max()), rel=1e-8)

    @given(seed=st.integers(0, 1000), copies=st.integers(1, 5))
    @settings(max_examples=20, deadline=None)
    def test_no_row_is_taken_twice(self, seed: int, copies: int):
        """K4, up to the last row and with rows that are copies of others."""
        rows = rows_of(seed, 8).repeat(copies, 1)
        kernel = rows @ rows.T + NOISE * eye(len(rows))
        found = pivoted_cholesky(lambda j: kernel[j], kernel.diagonal(), 1000)
        assert sorted(found.indices) == list(range(len(rows)))
        assert bool((found.values[1:] <= found.values[:-1] * (1 + 1e-9)).all())

    def test_copies_without_noise_are_left(self):
        """Rank 5 of 40 rows: the rest is known from five of them."""
        rows = rows_of(0, 8).repeat(5, 1)
        found = pivoted_cholesky(lambda j: rows @ rows[j], rows.square().sum(1), 40, smallest=1e-10)
        assert len(found.indices) == 5
        torch.testing.assert_close(found.factor @ found.factor.T, rows @ rows.T, rtol=1e-9, atol=1e-9)

    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_a_copy_scores_what_the_noise_leaves_of_it(self, seed: int):
        """K7. After the first copy the second has v·σ²/(v + σ²), beside the noise on its own diagonal."""
        one = rows_of(seed, 1)
        rows = torch.cat([one, one])
        v = float(one.square().sum())
        kernel = rows @ rows.T + NOISE * eye(2)
        found = pivoted_cholesky(lambda j: kernel[j], kernel.diagonal(), 2)
        assert float(found.values[0]) == pytest.approx(v + NOISE)
        second = float(found.values[1]) - NOISE
        assert second == pytest.approx(v * NOISE / (v + NOISE), rel=1e-8)
        assert second <= NOISE

    def test_turning_the_features_changes_nothing(self):
        """K6."""
        rows = rows_of(3)
        turn, _ = torch.linalg.qr(rows_of(4, 5))
        taken = [
            pivoted_cholesky(lambda j, x=x: x @ x[j], x.square().sum(1), 5, smallest=1e-10) for x in (rows, rows @ turn)
        ]
        assert taken[0].indices == taken[1].indices
        torch.testing.assert_close(taken[0].values, taken[1].values, rtol=1e-9, atol=0)


class TestRandom:
    def test_bits_are_those_of_splitmix64(self):
        """The published sequence of the seed 1234567 (Rosetta Code)."""
        expected = [
            6457827717110365317,
            3203168211198807973,
            9817491932198370423,
            4593380528125082431,
            16408922859458223821,
        ]
        assert [int(bits) % 2**64 for bits in random_bits(torch.arange(5), 1234567)] == expected

    def test_numbers_belong_to_their_places(self):
        places = torch.randperm(1000, generator=torch.Generator().manual_seed(0))
        assert torch.equal(random_bits(places, 7), random_bits(torch.arange(1000), 7)[places])
        assert torch.equal(random_normal(10, 7), random_normal(1000, 7)[:10])

    def test_seeds_and_streams_are_unlike(self):
        streams = [random_signs(torch.arange(4000), substream(seed, k)) for seed in range(3) for k in range(3)]
        correlation = torch.corrcoef(torch.stack(streams)) - eye(9)
        assert float(correlation.abs().max()) < 5 / 4000**0.5

    def test_distributions(self):
        """Moments within five standard errors of 100 000 draws."""
        bits = random_bits(torch.arange(100_000), 1)
        uniform, normal = random_uniform(bits), random_normal(100_000, 1)
        signs = random_signs(torch.arange(100_000), 1)
        assert 0 < float(uniform.min()) < float(uniform.max()) < 1
        assert float(uniform.mean()) == pytest.approx(0.5, abs=5 * (1 / 12 / 1e5) ** 0.5)
        assert float(normal.mean()) == pytest.approx(0.0, abs=5 / 1e5**0.5)
        assert float(normal.var()) == pytest.approx(1.0, abs=5 * (2 / 1e5) ** 0.5)
        assert float((normal**4).mean()) == pytest.approx(3.0, abs=5 * (96 / 1e5) ** 0.5)
        assert set(signs.tolist()) == {-1.0, 1.0}
        assert float(signs.mean()) == pytest.approx(0.0, abs=5 / 1e5**0.5)


class TestSketch:
    @pytest.mark.parametrize("size", [32, 128, 512])
    def test_inner_products_are_kept_to_one_over_the_root_of_the_size(self, size: int):
        """K5, for vectors of all alignments, sparse ones among them."""
        vectors = rows_of(0, 40, 20_000)
        vectors[20:] += 2 * vectors[:20]
        vectors[::5, 100:] = 0
        vectors = vectors / vectors.norm(dim=1, keepdim=True)
        sketch = Sketch(20_000, size, seed=3)
        sketches = torch.stack([sketch(vector) for vector in vectors])
        errors = (sketches @ sketches.T - vectors @ vectors.T).flatten()
        deviation = float(errors.square().mean().sqrt()) * size**0.5
        # 1 for orthogonal vectors, √2 for the squares of norms.
        assert 0.9 < deviation < 1.2
        assert abs(float(errors.mean())) < 0.3 / size**0.5

    def test_it_is_linear(self):
        sketch = Sketch(3000, 64, seed=0)
        a, b = rows_of(1, 2, 3000)
        torch.testing.assert_close(sketch(2 * a - b), 2 * sketch(a) - sketch(b), rtol=1e-10, atol=1e-10)

    def test_the_seed_is_all_of_it(self):
        vector = rows_of(1, 1, 3000)[0]
        assert torch.equal(Sketch(3000, 64, seed=5)(vector), Sketch.like(vector, 64, seed=5)(vector))
        assert not torch.equal(Sketch(3000, 64, seed=5)(vector), Sketch(3000, 64, seed=6)(vector))
        assert not Sketch(3000, 64, seed=5).state_dict()

    @pytest.mark.parametrize("length", [10, 64])
    def test_short_vectors_are_left_as_they_are(self, length: int):
        vector = rows_of(1, 1, length)[0].float()
        sketch = Sketch(length, 64, seed=0)
        assert sketch.size == length
        assert torch.equal(sketch(vector), vector.double())

    def test_ranking_of_residual_variances_survives(self):
        """What the sketch is for; the values are others (methods §7.3)."""
        spread = torch.linspace(0.1, 1, 2000, dtype=torch.float64) ** 6
        train, at = rows_of(0, 100, 2000) * spread, rows_of(1, 300, 2000) * spread
        at *= torch.linspace(0.5, 2, 300, dtype=torch.float64)[:, None]
        sketch = Sketch(2000, 512, seed=0)
        sketched = [torch.stack([sketch(row) for row in rows]) for rows in (train, at)]
        exact, rough = variance(train, at), variance(*sketched)
        ranks = [values.argsort().argsort().double() for values in (exact, rough)]
        assert float(torch.corrcoef(torch.stack(ranks))[0, 1]) > 0.95

    def test_vectors_of_another_length_are_refused(self):
        with pytest.raises(
            PotentialMismatch, match="fitted for a potential with 3000 parameters, but this one has 2999"
        ):
            Sketch(3000, 64, seed=0)(torch.zeros(2999))
