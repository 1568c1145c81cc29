"""σ² = e^c·Πu^p: recovery, the identity of the optimum, convexity, zero scores."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from ase_uq.calibration import PowerCalibrator, Residuals, fit_power, load_calibrator, mean_nll


def simulated(seed: int, constant: float = -1.0, powers: tuple[float, ...] = (0.7, 0.3), count: int = 400) -> Residuals:
    random = np.random.default_rng(seed)
    scores = random.lognormal(sigma=1.5, size=(count, len(powers)))
    sigma = np.sqrt(np.exp(constant) * np.prod(scores ** np.array(powers), 1))
    residuals = random.normal(size=(count, 3)) * sigma[:, None]
    return Residuals(scores, (residuals**2).sum(1), 3, np.arange(count))


def variance_of(calibrator: PowerCalibrator, residuals: Residuals) -> np.ndarray:
    return calibrator.variance(torch.from_numpy(residuals.scores)).numpy()


def test_known_constant_and_powers_are_recovered():
    found = fit_power(simulated(0, count=20_000))
    # Standard errors: sqrt(2/3N) = 0.006 of c, a third less of p where log u has a spread of 1.5; five of them.
    assert found.constant == pytest.approx(-1.0, abs=0.03)
    assert found.powers == pytest.approx((0.7, 0.3), abs=0.02)
    assert found.boundary == ""


def test_variance_is_a_number_however_large_the_scores_are():
    calibrator = PowerCalibrator(3.0, (20.0,), (1e-3,))
    found = calibrator.variance(torch.tensor([[1e300], [0.0], [torch.nan]], dtype=torch.float64))
    assert bool((found[:2].isfinite() & (found[:2] > 0)).all())
    assert bool(found[2].isnan())


@given(seed=st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_mean_square_over_variance_is_one_at_the_optimum(seed: int):
    residuals = simulated(seed, count=50)
    ratio = residuals.squares / 3 / variance_of(fit_power(residuals), residuals)
    assert np.mean(ratio) == pytest.approx(1, rel=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_no_start_finds_a_better_optimum(seed: int):
    """The problem is convex, so a search from anywhere ends at most where this one does."""
    residuals = simulated(seed, count=60)
    found = fit_power(residuals)
    logs = np.log(residuals.scores)

    def loss(x: np.ndarray) -> float:
        return mean_nll(np.exp(x[0] + logs @ x[1:]), residuals)

    own = loss(np.array([found.constant, *found.powers]))
    random = np.random.default_rng(seed)
    for start in random.normal(size=(8, 3)):
        other = minimize(loss, np.abs(start), bounds=[(None, None), (0, 20), (0, 20)], method="L-BFGS-B")
        assert own <= other.fun + 1e-9


def test_slopes_vanish_at_the_optimum():
    """Derivative by p_k: mean[(1 - (q/K)/σ²)·log u_k] = 0 where p_k > 0."""
    residuals = simulated(1)
    found = fit_power(residuals)
    assert min(found.powers) > 0
    ratio = residuals.squares / 3 / variance_of(found, residuals)
    np.testing.assert_allclose(((1 - ratio)[:, None] * np.log(residuals.scores)).mean(0), 0, atol=1e-12)


def test_scores_that_say_the_same_share_one_power():
    """The curvature is singular: no step along the direction that changes nothing."""
    one, two = simulated(0, powers=(0.7,)), simulated(0, powers=(0.7,))
    two = Residuals(np.repeat(two.scores, 2, 1), two.squares, 3, two.groups)
    found = fit_power(two)
    assert sum(found.powers) == pytest.approx(fit_power(one).powers[0], rel=1e-9)
    assert min(found.powers) > 0


def test_powers_are_never_negative():
    """A score that falls where errors grow gets no say, not a negative one."""
    residuals = simulated(0, powers=(-0.8, 0.5))
    found = fit_power(residuals)
    assert found.powers[0] == 0
    assert found.powers[1] > 0.3


def test_scores_that_say_nothing_are_useless():
    found = fit_power(simulated(0, powers=(-0.8,)))
    assert found.boundary == "useless"
    residuals = simulated(0, powers=(-0.8,))
    np.testing.assert_allclose(variance_of(found, residuals), residuals.squares.mean() / 3, rtol=1e-6)


def test_scores_of_zero_survive():
    residuals = simulated(0)
    residuals.scores[:5, 0] = 0
    found = fit_power(residuals)
    variance = variance_of(found, residuals)
    assert np.isfinite(variance).all()
    assert (variance > 0).all()
    assert np.isfinite(found.constant)


def test_residuals_of_zero_survive():
    residuals = simulated(0)
    residuals.squares[:50] = 0
    assert np.isfinite(variance_of(fit_power(residuals), residuals)).all()


@pytest.mark.parametrize("scale", [1e-9, 1e9])
def test_units_of_the_residuals_scale_the_variance(scale: float):
    plain = simulated(0)
    other = Residuals(plain.scores, plain.squares * scale, 3, plain.groups)
    np.testing.assert_allclose(
        variance_of(fit_power(other), other), scale * variance_of(fit_power(plain), plain), rtol=1e-9
    )


def test_variance_grows_with_every_score():
    calibrator = PowerCalibrator(0.0, (0.5, 0.2), (1e-12, 1e-12))
    low, high = torch.tensor([[1.0, 2.0]]), torch.tensor([[1.5, 2.0]])
    assert float(calibrator.variance(high)) > float(calibrator.variance(low))
    assert float(calibrator.variance(torch.tensor([[4.0, 1.0]]))) == pytest.approx(2.0)


def test_settings_make_it_again():
    found = fit_power(simulated(0))
    assert load_calibrator(json.loads(json.dumps(found.settings))) == found


def test_description_has_the_numbers():
    assert PowerCalibrator(np.log(0.5), (0.25, 0.0), (1e-12, 1e-12)).describe() == "σ² = 0.5·u[0]^0.25"
    assert PowerCalibrator(0.0, (0.0,), (1e-12,), "useless").describe() == "σ² = 1·1"


def test_a_score_below_all_calibration_rows_counts_as_their_smallest():
    random = np.random.default_rng(3)
    scores = random.uniform(0.5, 2.0, size=(200, 1))
    rows = Residuals(scores, scores[:, 0] ** 2 * random.chisquare(1, 200), 1, np.arange(200))
    calibrator = fit_power(rows)
    at_edge, below = calibrator.variance(torch.tensor([[scores.min()], [1e-9]])).tolist()
    assert below == at_edge > 0
