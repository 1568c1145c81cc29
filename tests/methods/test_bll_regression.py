"""Closed forms of the Bayesian regression against dense algebra, other people's code and worked numbers."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from scipy.stats import multivariate_normal
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import DotProduct, WhiteKernel
from sklearn.linear_model import BayesianRidge
from torch import Tensor

from ase_uq.methods.bll.regression import (
    Statistics,
    maximise_evidence,
    negative_log_evidence,
    posterior,
    residual_matrix,
)

# The worked example, to ten digits.
PHI = torch.tensor([[1, 0], [1, 1], [0, 2], [2, 1]], dtype=torch.float64)
Y = torch.tensor([[1, 0.5, 0], [0.2, 1, -1], [-1, 0.3, 0.7], [1.5, -0.4, 0.1]], dtype=torch.float64)
PRIOR = torch.tensor([1.0, 2.0], dtype=torch.float64)
NOISE = torch.tensor([[1, 0.2, 0], [0.2, 2, 0.1], [0, 0.1, 0.5]], dtype=torch.float64)

seeds = st.integers(0, 10_000)


def statistics_of(phi: Tensor, y: Tensor) -> Statistics:
    return Statistics(phi.T @ phi, phi.T @ y, y.T @ y, float(len(phi)))


def problem(seed: int, rows: int = 30, width: int = 5, outputs: int = 2, noise: float = 0.3) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    phi = normal(rows, width)
    return phi, phi @ normal(width, outputs) + noise * normal(rows, outputs)


def leverages(phi: Tensor, prior: Tensor, at: Tensor) -> Tensor:
    return posterior(statistics_of(phi, torch.zeros(len(phi), 1, dtype=phi.dtype)), prior).leverage(at)


class TestWorkedExample:
    """Ten digits are given, so half a unit of the tenth is the tolerance."""

    def test_posterior(self):
        found = posterior(statistics_of(PHI, Y), PRIOR)
        torch.testing.assert_close(found.precision, torch.tensor([[7, 3], [3, 8]], dtype=torch.float64))
        expected = [[0.7340425532, 0.0425531915, -0.1680851064], [-0.3127659574, 0.1340425532, 0.1255319149]]
        np.testing.assert_allclose(found.mean, expected, rtol=0, atol=6e-11)
        assert found.jitter == 0

    def test_negative_log_evidence(self):
        found = negative_log_evidence(statistics_of(PHI, Y), PRIOR, NOISE)
        assert found == pytest.approx(18.0473107262, abs=6e-11)

    def test_noise_of_largest_evidence(self):
        statistics = statistics_of(PHI, Y)
        noise = residual_matrix(statistics, posterior(statistics, PRIOR)) / 4
        np.testing.assert_allclose(noise.diagonal(), [0.2782978723, 0.3273404255, 0.3256914894], atol=6e-11)

    def test_prediction_and_leverage(self):
        found = posterior(statistics_of(PHI, Y), PRIOR)
        new = torch.tensor([[1.0, -1.0]], dtype=torch.float64)
        assert float(found.leverage(new)) == pytest.approx(0.4468085106, abs=6e-11)
        np.testing.assert_allclose((new @ found.mean)[0], [1.0468085106, -0.0914893617, -0.2936170213], atol=6e-11)
        own = found.leverage(PHI)
        np.testing.assert_allclose(own, [0.170212766, 0.1914893617, 0.5957446809, 0.5744680851], atol=6e-10)
        assert float(own.sum()) == pytest.approx(1.5319148936, abs=6e-11)

    def test_evidence_prefers_no_weights_at_all(self):
        """A least evidence at λ → ∞ is a boundary, not an error."""
        found = maximise_evidence(statistics_of(PHI, Y))
        assert found.boundary == "prior"
        assert found.prior_precision == pytest.approx(np.exp(30))
        assert found.effective == pytest.approx(0, abs=1e-10)
        assert found.noise == pytest.approx(float((Y**2).mean()))


class TestEvidence:
    @given(seed=seeds)
    @settings(max_examples=25, deadline=None)
    def test_is_the_density_of_the_dense_gaussian(self, seed: int):
        phi, y = problem(seed, rows=7, width=3)
        generator = torch.Generator().manual_seed(seed + 1)
        prior = torch.rand(3, generator=generator, dtype=torch.float64) + 0.1
        half = torch.randn(2, 2, generator=generator, dtype=torch.float64)
        noise = half @ half.T + 0.1 * torch.eye(2, dtype=torch.float64)
        rows = torch.eye(7, dtype=torch.float64) + phi @ torch.diag(1 / prior) @ phi.T
        # Row-major vec(Y): Cov = (rows) ⊗ (noise).
        covariance = torch.kron(rows, noise).numpy()
        expected = -multivariate_normal(np.zeros(14), covariance).logpdf(y.numpy().ravel())
        assert negative_log_evidence(statistics_of(phi, y), prior, noise) == pytest.approx(expected, rel=1e-9)

    @pytest.mark.parametrize("seed", range(5))
    def test_maximum_is_that_of_an_optimiser(self, seed: int):
        statistics = statistics_of(*problem(seed))
        found = maximise_evidence(statistics)

        def loss(x: np.ndarray) -> float:
            prior = torch.full((5,), float(np.exp(x[0])), dtype=torch.float64)
            noise = float(np.exp(x[1])) * torch.eye(2, dtype=torch.float64)
            return negative_log_evidence(statistics, prior, noise)

        options = {"xatol": 1e-9, "fatol": 1e-13, "maxiter": 4000}
        best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options=options)
        # A minimum by values alone is known to about the square root of their rounding.
        assert np.log(found.prior_precision) == pytest.approx(best.x[0], abs=1e-5)
        assert np.log(found.noise) == pytest.approx(best.x[1], abs=1e-5)
        assert loss(np.log([found.prior_precision, found.noise])) <= best.fun + 1e-9
        assert found.boundary == ""

    @pytest.mark.parametrize("seed", range(5))
    def test_maximum_is_mackays_fixed_point(self, seed: int):
        statistics = statistics_of(*problem(seed))
        found = maximise_evidence(statistics)
        fitted = posterior(statistics, torch.full((5,), found.prior_precision, dtype=torch.float64))
        squares = float((fitted.mean**2).sum()) / found.noise
        # λ = Kγ / tr(Σ_e⁻¹BᵀB); the root is found to 1e-13 in log λ.
        assert found.prior_precision == pytest.approx(2 * found.effective / squares, rel=1e-10)
        rest = float(torch.trace(residual_matrix(statistics, fitted)))
        assert found.noise == pytest.approx(rest / 60, rel=1e-10)

    @pytest.mark.parametrize("seed", range(5))
    def test_agrees_with_scikit_learns_bayesian_ridge(self, seed: int):
        phi, y = problem(seed, rows=60, outputs=1)
        ridge = BayesianRidge(
            fit_intercept=False, alpha_1=1e-16, alpha_2=1e-16, lambda_1=1e-16, lambda_2=1e-16, tol=1e-14, max_iter=5000
        ).fit(phi.numpy(), y.numpy().ravel())
        found = maximise_evidence(statistics_of(phi, y))
        # Its fixed-point iteration stops where the weights do, some digits before its hyper-parameters.
        assert found.prior_precision == pytest.approx(ridge.lambda_ / ridge.alpha_, rel=1e-6)
        assert found.noise == pytest.approx(1 / ridge.alpha_, rel=1e-6)
        prior = torch.full((5,), found.prior_precision, dtype=torch.float64)
        np.testing.assert_allclose(posterior(statistics_of(phi, y), prior).mean[:, 0], ridge.coef_, rtol=1e-6)

    def test_does_not_depend_on_the_order_of_the_rows(self):
        phi, y = problem(0, rows=200)
        order = torch.randperm(200, generator=torch.Generator().manual_seed(0))
        one = maximise_evidence(statistics_of(phi, y))
        two = maximise_evidence(statistics_of(phi[order], y[order]))
        assert one.prior_precision == pytest.approx(two.prior_precision, rel=1e-11)

    def test_no_data_noise_means_no_prior(self):
        """Exact labels drive λ to the bound from below, which the caller may set."""
        phi, y = problem(0, noise=0.0)
        found = maximise_evidence(statistics_of(phi, y), smallest=1e-6)
        assert found.boundary == "data"
        assert found.prior_precision == pytest.approx(1e-6)
        assert found.effective == pytest.approx(5, abs=1e-5)

    def test_labels_that_are_all_zero_do_not_fail(self):
        phi, _ = problem(0)
        found = maximise_evidence(statistics_of(phi, torch.zeros(30, 2, dtype=torch.float64)))
        assert np.isfinite([found.prior_precision, found.noise, found.effective]).all()


class TestPosterior:
    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_gaussian_process_with_a_linear_kernel(self, seed: int):
        """Kernel φᵀΛ_0⁻¹φ' and unit noise: the same mean and variance, from an N × N instead of a D × D matrix."""
        phi, y = problem(seed, outputs=1)
        precision = 1.7
        kernel = (1 / precision) * DotProduct(sigma_0=0, sigma_0_bounds="fixed") + WhiteKernel(1.0)
        process = GaussianProcessRegressor(kernel, optimizer=None).fit(phi.numpy(), y.numpy().ravel())
        new = problem(seed + 100)[0]
        mean, deviation = process.predict(new.numpy(), return_std=True)
        found = posterior(statistics_of(phi, y), torch.full((5,), precision, dtype=torch.float64))
        np.testing.assert_allclose((new @ found.mean)[:, 0], mean, rtol=1e-9, atol=1e-10)
        # scikit-learn gives the variance with the unit noise: 1 + u.
        np.testing.assert_allclose(1 + found.leverage(new), deviation**2, rtol=1e-8)

    @given(seed=seeds, rows=st.integers(1, 40))
    @settings(max_examples=25, deadline=None)
    def test_leverages_of_the_rows_sum_to_the_effective_parameters(self, seed: int, rows: int):
        phi, _ = problem(seed, rows=rows)
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        own = leverages(phi, prior, phi)
        s = torch.linalg.eigvalsh(phi.T @ phi).clamp(min=0)
        assert float(own.sum()) == pytest.approx(float((s / (s + 0.3)).sum()), rel=1e-10)
        assert float(own.min()) >= 0
        assert float(own.max()) < 1

    @given(seed=seeds)
    @settings(max_examples=25, deadline=None)
    def test_more_rows_never_raise_the_leverage(self, seed: int):
        phi, _ = problem(seed, rows=12)
        more, _ = problem(seed + 1, rows=3)
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        at, _ = problem(seed + 2, rows=20)
        before, after = leverages(phi, prior, at), leverages(torch.cat([phi, more]), prior, at)
        assert bool((after <= before * (1 + 1e-12)).all())

    @given(seed=seeds, copies=st.integers(2, 5))
    @settings(max_examples=10, deadline=None)
    def test_copies_of_the_data_divide_the_leverage(self, seed: int, copies: int):
        phi, _ = problem(seed)
        prior = torch.full((5,), 1e-12, dtype=torch.float64)
        torch.testing.assert_close(
            leverages(phi.repeat(copies, 1), prior, phi), leverages(phi, prior, phi) / copies, rtol=1e-9, atol=0
        )

    @given(seed=seeds, weight=st.floats(0.01, 100))
    @settings(max_examples=10, deadline=None)
    def test_tempering_divides_the_leverage_and_keeps_the_mean(self, seed: int, weight: float):
        """[likelihood × prior]^w is the posterior with Λ_n → wΛ_n: a slope b = 1/w in the calibration."""
        statistics = statistics_of(*problem(seed))
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        parts = {"gram": weight * statistics.gram, "cross": weight * statistics.cross}
        plain, tempered = (
            posterior(statistics, prior),
            posterior(dataclasses.replace(statistics, **parts), weight * prior),
        )
        torch.testing.assert_close(tempered.mean, plain.mean, rtol=1e-9, atol=1e-12)
        at = problem(seed + 1)[0]
        torch.testing.assert_close(tempered.leverage(at), plain.leverage(at) / weight, rtol=1e-9, atol=0)

    @given(seed=seeds)
    @settings(max_examples=10, deadline=None)
    def test_scaled_features_with_a_scaled_prior_have_the_same_leverage(self, seed: int):
        """φ → φA with Λ_0 → A⁻¹Λ_0A⁻ᵀ, for the diagonal A that keep Λ_0 diagonal."""
        phi, _ = problem(seed)
        scale = torch.rand(5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.1
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        at = problem(seed + 1)[0]
        torch.testing.assert_close(
            leverages(phi * scale, prior * scale**2, at * scale), leverages(phi, prior, at), rtol=1e-9, atol=0
        )

    @given(seed=seeds)
    @settings(max_examples=10, deadline=None)
    def test_turned_features_have_the_same_leverage(self, seed: int):
        phi, _ = problem(seed)
        turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        torch.testing.assert_close(
            leverages(phi @ turn, prior, phi @ turn), leverages(phi, prior, phi), rtol=1e-9, atol=0
        )

    # Squares of smaller ones are below what float64 holds to its full precision.
    @given(seed=seeds, stretch=st.just(0.0) | st.floats(1e-100, 1e6))
    @settings(max_examples=20, deadline=None)
    def test_leverage_grows_with_the_square_along_a_direction(self, seed: int, stretch: float):
        phi, _ = problem(seed)
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        at = problem(seed + 1)[0]
        torch.testing.assert_close(
            leverages(phi, prior, stretch * at), stretch**2 * leverages(phi, prior, at), rtol=1e-10, atol=0
        )
        assert float(leverages(phi, prior, at).min()) > 0

    @given(seed=seeds)
    @settings(max_examples=10, deadline=None)
    def test_one_more_row_is_the_rank_one_update(self, seed: int):
        """S' = S - Sφφᵀ S/(1 + φᵀSφ)."""
        phi, y = problem(seed)
        prior = torch.full((5,), 0.3, dtype=torch.float64)
        old = torch.linalg.inv(posterior(statistics_of(phi[:-1], y[:-1]), prior).precision)
        row = phi[-1]
        updated = old - torch.outer(old @ row, old @ row) / (1 + row @ old @ row)
        new = posterior(statistics_of(phi[:-1], y[:-1]) + statistics_of(phi[-1:], y[-1:]), prior)
        torch.testing.assert_close(torch.linalg.inv(new.precision), updated, rtol=1e-9, atol=1e-12)

    def test_rank_deficient_features_work_and_the_jitter_is_declared(self):
        phi, y = problem(0)
        twice = torch.cat([phi, phi], 1)  # every feature twice: rank 5 of 10
        found = posterior(statistics_of(twice, y), torch.full((10,), 1e-300, dtype=torch.float64))
        assert 0 < found.jitter <= 1e-9
        # With no prior the leverage of the rows is that of the five features alone.
        alone = leverages(phi, torch.full((5,), 1e-300, dtype=torch.float64), phi)
        torch.testing.assert_close(found.leverage(twice), alone, rtol=1e-6, atol=0)

    def test_statistics_of_parts_add(self):
        phi, y = problem(0)
        whole, parts = statistics_of(phi, y), statistics_of(phi[:7], y[:7]) + statistics_of(phi[7:], y[7:])
        for name in ("gram", "cross", "square", "count"):
            np.testing.assert_allclose(getattr(parts, name), getattr(whole, name), rtol=1e-12, atol=1e-12)
