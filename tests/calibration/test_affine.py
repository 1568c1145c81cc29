"""σ² = a + b·u: worked numbers, the identity of the optimum, an optimiser, and the boundaries."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ase_uq.calibration import AffineCalibrator, Residuals, fit_affine, load_calibrator, mean_nll
from ase_uq.calibration.affine import _SMALLEST_SHARE


def rows(u: np.ndarray, q: np.ndarray, components: int = 3) -> Residuals:
    return Residuals(np.asarray(u, float).reshape(len(q), -1), np.asarray(q, float), components, np.arange(len(q)))


def simulated(seed: int, a: float = 0.5, b: float = 2.0, count: int = 500, components: int = 3) -> Residuals:
    random = np.random.default_rng(seed)
    u = random.lognormal(sigma=1.5, size=count)
    residuals = random.normal(size=(count, components)) * np.sqrt(a + b * u)[:, None]
    return rows(u, (residuals**2).sum(1), components)


def variance_of(calibrator, residuals: Residuals) -> np.ndarray:
    return calibrator.variance(torch.from_numpy(residuals.scores)).numpy()


class TestWorkedExample:
    residuals = rows(np.array([1, 2, 4, 8, 16]) * 1e-5, np.array([3, 2, 9, 15, 40]))

    def test_intercept_and_slope(self):
        found = fit_affine(self.residuals)
        # A minimum by its values is known to about the square root of their rounding.
        assert found.intercept == pytest.approx(0.1394641542, rel=1e-6)
        assert found.slope == pytest.approx(65370.577, rel=1e-6)
        assert found.boundary == ""

    def test_likelihood(self):
        """The worked number is the mean over rows of K/2·log σ² + q/2σ², without K/2·log 2π."""
        variance = variance_of(fit_affine(self.residuals), self.residuals)
        squares = self.residuals.squares
        assert np.mean(1.5 * np.log(variance) + squares / (2 * variance)) == pytest.approx(3.0576739065, abs=6e-11)
        # `mean_nll` is the same a component, with the constant.
        per_component = 3.0576739065 / 3 + 0.5 * np.log(2 * np.pi)
        assert mean_nll(variance, self.residuals) == pytest.approx(per_component, abs=2e-11)

    def test_mean_squared_mahalanobis_distance_is_the_number_of_components(self):
        variance = variance_of(fit_affine(self.residuals), self.residuals)
        assert np.mean(self.residuals.squares / variance) == pytest.approx(3, abs=1e-12)


@given(seed=st.integers(0, 10_000), components=st.sampled_from([1, 3, 6]))
@settings(max_examples=25, deadline=None)
def test_mean_square_over_variance_is_one_at_the_optimum(seed: int, components: int):
    residuals = simulated(seed, count=40, components=components)
    found = fit_affine(residuals)
    floored = found.intercept <= _SMALLEST_SHARE * residuals.squares.mean() / components * (1 + 1e-9)
    if not floored:
        ratio = residuals.squares / variance_of(found, residuals)
        assert np.mean(ratio) == pytest.approx(components, rel=1e-12)


@pytest.mark.parametrize("seed", range(6))
def test_optimum_is_that_of_nelder_mead(seed: int):
    residuals = simulated(seed)
    found = fit_affine(residuals)

    def loss(x: np.ndarray) -> float:
        return mean_nll(np.exp(x[0]) + np.exp(x[1]) * residuals.scores[:, 0], residuals)

    best = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-14, "maxiter": 4000})
    assert loss(np.log([found.intercept, found.slope])) <= best.fun + 1e-12
    np.testing.assert_allclose(np.log([found.intercept, found.slope]), best.x, atol=1e-4)


def test_known_coefficients_are_recovered():
    found = fit_affine(simulated(0, count=20_000))
    # Standard errors at 20 000 rows are about 1 and 2 %; five of them.
    assert found.intercept == pytest.approx(0.5, rel=0.06)
    assert found.slope == pytest.approx(2.0, rel=0.1)


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e9])
def test_units_of_the_score_and_of_the_residuals_do_not_matter(scale: float):
    plain = simulated(0)
    found = fit_affine(plain)
    other = fit_affine(rows(plain.scores * scale, plain.squares))
    assert other.slope * scale == pytest.approx(found.slope, rel=1e-5)
    assert other.intercept == pytest.approx(found.intercept, rel=1e-5)
    other = fit_affine(rows(plain.scores, plain.squares * scale))
    assert other.slope / scale == pytest.approx(found.slope, rel=1e-5)


def test_recalibration_keeps_the_ranking():
    residuals = simulated(0)
    assert (np.argsort(variance_of(fit_affine(residuals), residuals)) == np.argsort(residuals.scores[:, 0])).all()


def test_a_score_that_says_nothing_is_useless():
    random = np.random.default_rng(0)
    u, q = random.lognormal(size=500), random.chisquare(3, size=500)
    found = fit_affine(rows(u, np.sort(q)[::-1][np.argsort(np.argsort(u))]))  # errors fall with the score
    assert found.boundary == "useless"
    assert found.slope * u.mean() < 2e-3 * found.intercept


def test_a_variance_without_floor_is_bare():
    random = np.random.default_rng(0)
    u = random.lognormal(sigma=3, size=2000)
    found = fit_affine(rows(u, u * random.chisquare(3, size=2000)))
    assert found.boundary == "bare"
    assert found.slope == pytest.approx(1.0, rel=0.1)
    assert found.intercept > 0


def test_the_intercept_has_a_floor():
    """One row with zero score and zero residual must not make the variance vanish."""
    random = np.random.default_rng(0)
    u = random.lognormal(sigma=3, size=2000)
    q = u * random.chisquare(3, size=2000)
    u[0] = q[0] = 0
    residuals = rows(u, q)
    found = fit_affine(residuals)
    assert found.intercept >= _SMALLEST_SHARE * q.mean() / 3
    assert np.isfinite(mean_nll(variance_of(found, residuals), residuals))


@pytest.mark.parametrize("u", [np.zeros(20), np.full(20, 3.0)])
def test_a_constant_score_gives_the_constant_variance(u: np.ndarray):
    q = np.random.default_rng(0).chisquare(3, size=20)
    residuals = rows(u, q)
    np.testing.assert_allclose(variance_of(fit_affine(residuals), residuals), q.mean() / 3, rtol=1e-9)


def test_it_uses_the_column_that_is_asked_for():
    residuals = simulated(0)
    noise = np.random.default_rng(1).lognormal(size=len(residuals.squares))
    both = Residuals(np.stack([noise, residuals.scores[:, 0]], 1), residuals.squares, 3, residuals.groups)
    found = fit_affine(both, column=1)
    assert found.column == 1
    np.testing.assert_allclose(variance_of(found, both), variance_of(fit_affine(residuals), residuals))


def test_settings_make_it_again():
    found = fit_affine(simulated(0))
    assert load_calibrator(json.loads(json.dumps(found.settings))) == found


def test_description_has_the_numbers():
    assert AffineCalibrator(0.25, 3.0, column=1).describe() == "σ² = 0.25 + 3·u[1]"
