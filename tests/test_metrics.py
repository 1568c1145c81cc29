"""Metrics against closed forms, numerical integrals, other people's implementations, and their own laws."""

import inspect
import math

import numpy as np
import pytest
import uncertainty_toolbox as toolbox
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy import integrate, stats
from sklearn import metrics as sklearn_metrics

from ase_uq import metrics

FINITE = st.floats(-100, 100)
STD = st.floats(0.01, 100)


@pytest.fixture(scope="module")
def sample() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y_true, y_pred, y_std) of 4000 calibrated components whose log σ spreads by 0.5."""
    rng = np.random.default_rng(0)
    std = np.exp(0.5 * rng.normal(size=4000))
    predicted = rng.normal(size=4000)
    return predicted + std * rng.normal(size=4000), predicted, std


def triples(n: int = 7):
    return st.tuples(
        arrays(float, n, elements=FINITE), arrays(float, n, elements=FINITE), arrays(float, n, elements=STD)
    )


# Values by hand or by theory


def test_errors_by_hand():
    assert metrics.mae([1, 2, 3], [1, 4, 0]) == pytest.approx(5 / 3)
    assert metrics.rmse([1, 2, 3], [1, 4, 0]) == pytest.approx(math.sqrt(13 / 3))


def test_sharpness_by_hand():
    assert metrics.sharpness([3, 4]) == pytest.approx(math.sqrt(12.5))


def test_coverage_by_hand():
    # |z| = 0.5, 1.5, 2.5 against 0.99 and 1.96
    assert metrics.coverage([0.5, -1.5, 2.5], np.zeros(3), np.ones(3)) == pytest.approx(1 / 3)
    assert metrics.coverage([0.5, -1.5, 2.5], np.zeros(3), np.ones(3), level=0.95) == pytest.approx(2 / 3)


def test_ence_by_hand():
    # Two bins: σ = 1 with errors of 1.5 twice (off by 0.5), σ = 2 with errors of 2 twice (off by 0).
    assert metrics.ence([1.5, -1.5, 2, -2], np.zeros(4), [1, 1, 2, 2], n_bins=2) == pytest.approx(0.25)


def test_spearman_and_auroc_by_hand():
    assert metrics.spearman([-1, 2, -3], [0.1, 0.2, 0.3]) == pytest.approx(1)
    assert metrics.spearman([1, 2, 3], [3, 2, 1]) == pytest.approx(-1)
    # Bad: 2 and 3. Of the pairs (2, 0), (2, 1), (3, 0), (3, 1) one is tied in σ and one is the wrong way round.
    assert metrics.auroc([0, 1, 2, 3], [1, 2, 2, 1.5], tolerance=1.5) == pytest.approx(2.5 / 4)


@pytest.mark.parametrize(("error", "std"), [(0.0, 1.0), (1.3, 0.4), (-2.0, 0.7), (0.01, 3.0)])
def test_crps_is_the_integral(error: float, std: float):
    def integrand(x: float) -> float:
        return (stats.norm.cdf(x, 0, std) - (x >= error)) ** 2

    reach = 12 * std + abs(error)
    integral, _ = integrate.quad(integrand, -reach, reach, points=[0, error], epsabs=1e-12, limit=200)
    assert metrics.crps([error], [0.0], [std]) == pytest.approx(integral, rel=1e-7)


def test_crps_of_a_certain_prediction_is_the_error():
    assert metrics.crps([2.0], [0.5], [1e-9]) == pytest.approx(1.5)


def test_calibrated_errors(sample):
    # 4000 values: three standard errors of each mean
    assert metrics.mean_squared_z(*sample) == pytest.approx(1, abs=3 * math.sqrt(2 / 4000))
    for level in (0.68, 0.9, 0.95):
        assert metrics.coverage(*sample, level=level) == pytest.approx(
            level, abs=3 * math.sqrt(level * (1 - level) / 4000)
        )
    assert metrics.miscalibration_area(*sample) < 0.02
    # sqrt(10 / (π · 4000)) = 0.028 is its mean for finite samples
    assert metrics.ence(*sample) < 0.06
    residuals = sample[0] - sample[1]
    assert metrics.spearman(residuals, sample[2]) == pytest.approx(0.46, abs=0.04)  # by simulation, methods.md


@pytest.mark.parametrize(("factor", "area"), [(1.5, 0.125), (2, 0.20), (3, 0.29), (5, 0.37), (10, 0.43)])
def test_miscalibration_area_tells_the_factor(sample, factor: float, area: float):
    true, predicted, std = sample
    assert metrics.miscalibration_area(true, predicted, std / factor) == pytest.approx(area, abs=0.015)
    assert metrics.miscalibration_area(true, predicted, std * factor) == pytest.approx(area, abs=0.015)


# Other people's implementations


def test_against_scikit_learn(sample):
    true, predicted, std = sample
    assert metrics.mae(true, predicted) == pytest.approx(sklearn_metrics.mean_absolute_error(true, predicted))
    assert metrics.rmse(true, predicted) == pytest.approx(sklearn_metrics.root_mean_squared_error(true, predicted))
    errors, scores = true - predicted, std.round(1)  # rounded: ties
    expected = sklearn_metrics.roc_auc_score(np.abs(errors) > 1, scores)
    assert metrics.auroc(errors, scores, tolerance=1) == pytest.approx(expected)


def test_against_scipy(sample):
    true, predicted, std = sample
    expected = -stats.norm.logpdf(true, predicted, std).mean()
    assert metrics.nll(true, predicted, std) == pytest.approx(expected)
    errors = (true - predicted).round(1)
    assert metrics.spearman(errors, std) == pytest.approx(stats.spearmanr(np.abs(errors), std).statistic)


def test_against_uncertainty_toolbox(sample):
    true, predicted, std = sample
    assert metrics.nll(*sample) == pytest.approx(toolbox.nll_gaussian(predicted, std, true))
    assert metrics.crps(*sample) == pytest.approx(toolbox.crps_gaussian(predicted, std, true))
    assert metrics.sharpness(std) == pytest.approx(toolbox.sharpness(std))
    expected = toolbox.mean_absolute_calibration_error(predicted, std, true, num_bins=100)
    assert metrics.miscalibration_area(*sample) == pytest.approx(expected)


# Laws


JUDGES = [
    metrics.nll,
    metrics.crps,
    metrics.mean_squared_z,
    metrics.coverage,
    metrics.miscalibration_area,
    lambda *sample: metrics.ence(*sample, n_bins=3),
    lambda true, predicted, _: metrics.mae(true, predicted),
    lambda true, predicted, _: metrics.rmse(true, predicted),
    lambda _, __, std: metrics.sharpness(std),
    lambda true, predicted, std: metrics.spearman(true - predicted, std),
    lambda true, predicted, std: metrics.auroc(true - predicted, std, tolerance=1),
]


@pytest.mark.parametrize("judge", JUDGES)
@given(triple=triples(), order=st.permutations(range(7)))
def test_order_does_not_matter(judge, triple, order):
    shuffled = [values[list(order)] for values in triple]
    assert judge(*shuffled) == pytest.approx(judge(*triple), rel=1e-9, abs=1e-12, nan_ok=True)


@given(triple=triples(), factor=st.floats(0.01, 100))
def test_units(triple, factor):
    scaled = [factor * values for values in triple]
    for of_unit in (metrics.crps, lambda t, p, s: metrics.rmse(t, p), lambda t, p, s: metrics.sharpness(s)):
        assert of_unit(*scaled) == pytest.approx(factor * of_unit(*triple), rel=1e-6, abs=1e-9)
    assert metrics.nll(*scaled) == pytest.approx(metrics.nll(*triple) + math.log(factor), rel=1e-6, abs=1e-6)
    assert metrics.mean_squared_z(*scaled) == pytest.approx(metrics.mean_squared_z(*triple), rel=1e-6)


@given(factor=st.floats(0.2, 5).filter(lambda factor: abs(factor - 1) > 0.1))
def test_scoring_rules_are_least_at_the_true_std(sample, factor):
    true, predicted, std = sample
    for rule in (metrics.nll, metrics.crps):
        assert rule(true, predicted, factor * std) > rule(true, predicted, std)


@given(triple=triples())
def test_nll_is_least_where_the_mean_squared_z_is_one(triple):
    true, predicted, std = triple
    found = metrics.mean_squared_z(true, predicted, std)
    if found > 1e-6:
        best = std * math.sqrt(found)
        assert metrics.nll(true, predicted, best) <= metrics.nll(true, predicted, std) + 1e-9


@given(triple=triples())
def test_coverage_grows_with_the_level(triple):
    covered = [metrics.coverage(*triple, level=level) for level in (0.1, 0.5, 0.9, 0.99)]
    assert covered == sorted(covered)


@given(triple=triples())
def test_rank_measures_see_only_the_order(triple):
    errors, std = triple[0] - triple[1], triple[2]
    for measure in (metrics.spearman, lambda e, s: metrics.auroc(e, s, tolerance=1)):
        assert measure(errors, 2 * std) == pytest.approx(measure(errors, std), nan_ok=True)


def test_shape_of_forces_and_one_std_for_all():
    rng = np.random.default_rng(1)
    true, predicted = rng.normal(size=(2, 5, 3))
    std = np.full((5, 3), 0.7)
    for judge in (metrics.nll, metrics.crps, metrics.mean_squared_z, metrics.ence, metrics.miscalibration_area):
        flat = judge(true.ravel(), predicted.ravel(), std.ravel())
        assert judge(true, predicted, std) == pytest.approx(flat)
        assert judge(true, predicted, 0.7) == pytest.approx(flat)


def test_rank_measures_without_contrast_are_nan():
    assert math.isnan(metrics.spearman([1, 1, 1], [1, 2, 3]))
    assert math.isnan(metrics.auroc([1, 2], [1, 2], tolerance=5))
    assert math.isnan(metrics.auroc([1, 2], [1, 2], tolerance=0.5))


# What is refused


@pytest.mark.parametrize("name", ["nll", "crps", "mean_squared_z", "coverage", "miscalibration_area", "ence"])
def test_bad_input_is_refused(name: str):
    judge = getattr(metrics, name)
    with pytest.raises(ValueError, match=r"y_true has shape \(3,\), y_pred \(2,\)"):
        judge(np.ones(3), np.ones(2), np.ones(3))
    with pytest.raises(ValueError, match=r"y_true has shape \(3,\), y_std \(3, 3\)"):
        judge(np.ones(3), np.ones(3), np.ones((3, 3)))
    with pytest.raises(ValueError, match="y_std has 1 values that are not positive"):
        judge(np.ones(3), np.ones(3), [1, 0, 1])
    with pytest.raises(ValueError, match="y_true has 1 values that are NaN"):
        judge([1, np.nan], np.ones(2), np.ones(2))
    with pytest.raises(ValueError, match="y_true is empty"):
        judge([], [], [])


def test_bad_options_are_refused():
    with pytest.raises(ValueError, match="level of an interval"):
        metrics.coverage([1], [1], [1], level=68)
    with pytest.raises(ValueError, match="10 bins for 3 values"):
        metrics.ence(np.ones(3), np.ones(3), np.ones(3))
    with pytest.raises(ValueError, match=r"errors has shape \(2,\), y_std \(3,\)"):
        metrics.spearman(np.ones(2), np.ones(3))


def test_all_metrics_are_public():
    functions = {
        name
        for name, value in vars(metrics).items()
        if inspect.isfunction(value) and value.__module__ == metrics.__name__ and not name.startswith("_")
    }
    assert functions == set(metrics.__all__)
