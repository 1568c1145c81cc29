"""Metrics against closed forms, numerical integrals, other people's implementations, and their own laws."""

import inspect
import math

import numpy as np
import pytest
import uncertainty_toolbox as toolbox
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from mapie.metrics.regression import regression_coverage_score
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


@pytest.mark.parametrize("level", [0.5, 0.68, 0.9])
def test_coverage_is_that_of_mapie(sample: tuple[np.ndarray, np.ndarray, np.ndarray], level: float):
    true, predicted, std = sample
    half = stats.norm.ppf(0.5 + level / 2) * std
    intervals = np.stack([predicted - half, predicted + half], 1)
    expected = float(np.squeeze(regression_coverage_score(true, intervals)))
    assert metrics.coverage(true, predicted, std, level=level) == pytest.approx(expected, abs=1e-12)


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


def test_ence_does_not_order_errors_within_equal_std():
    # In bins sorted by the error one σ for all would look wrong at both ends, however right it is.
    residuals = np.random.default_rng(0).normal(size=4000)
    assert metrics.ence(residuals, np.zeros(4000), 1.0) == pytest.approx(abs(1 - residuals.std()), abs=0.001)


def test_auprc_by_hand():
    # From the largest σ on: bad, then a tie of bad and good, then good. Steps of ½ at precision 1 and 2/3.
    assert metrics.auprc([3, 2, 1, 0], [4, 3, 3, 1], tolerance=1.5) == pytest.approx(0.5 * 1 + 0.5 * 2 / 3)


def test_ause_by_hand():
    # Means of what is left, of their 2: the best order gives 2, 1.5, 1; the worst 2, 2.5, 3.
    assert metrics.ause([1, -2, 3], [1, 2, 3]) == 0
    assert metrics.ause([1, -2, 3], [3, 2, 1]) == pytest.approx((0 + 0.5 + 1) * 2 / 3 / 2)
    assert metrics.ause([1, -2, 3], [1, 1, 1]) == pytest.approx((0 + 0.25 + 0.5) * 2 / 3 / 2)


def test_ause_is_the_removal_one_by_one():
    rng = np.random.default_rng(2)
    std = np.exp(rng.normal(size=50))
    errors = std * rng.normal(size=50)

    def curve(keys: np.ndarray) -> np.ndarray:
        kept = np.abs(errors)[np.argsort(-keys)]
        return np.array([kept[k:].mean() for k in range(50)]) / kept.mean()

    assert metrics.ause(errors, std) == pytest.approx(np.mean(curve(std) - curve(np.abs(errors))))


def test_ause_of_a_coin():
    errors = np.random.default_rng(3).normal(size=(200_000, 3))
    assert metrics.ause(errors[:, 0], np.ones(200_000)) == pytest.approx(0.57, abs=0.01)
    assert metrics.ause(np.linalg.norm(errors, axis=1), np.ones(200_000)) == pytest.approx(0.36, abs=0.01)


def test_rll_by_hand():
    # Squares 1 and 9 have the mean 5; σ² = 2 and 8. Twice each NLL without its constant.
    constant, oracle = math.log(5) + 1, (math.log(1) + math.log(9)) / 2 + 1
    given = (math.log(2) + 1 / 2 + math.log(8) + 9 / 8) / 2
    found = metrics.rll([1, -3], [0, 0], np.sqrt([2, 8]))
    assert found == pytest.approx((constant - given) / (constant - oracle))


@pytest.mark.parametrize("spread", [0.1, 0.5, 1.0])
def test_rll_of_calibrated_errors(spread: float):
    """The mean of log z² is -(γ + log 2), that of e^(2 spread x) is e^(2 spread²)."""
    rng = np.random.default_rng(0)
    std = np.exp(spread * rng.normal(size=100_000))
    expected = 2 * spread**2 / (2 * spread**2 + np.euler_gamma + math.log(2))
    assert metrics.rll(std * rng.normal(size=100_000), np.zeros(100_000), std) == pytest.approx(expected, abs=0.01)


@pytest.mark.parametrize(("spread", "one", "three"), [(0.1, 0.11, 0.21), (0.5, 0.46, 0.72), (1.0, 0.69, 0.90)])
def test_attainable_spearman(spread: float, one: float, three: float):
    """By simulation, methods.md."""
    std = np.exp(spread * np.random.default_rng(8).normal(size=20_000))
    assert metrics.attainable_spearman(std, n_draws=5) == pytest.approx(one, abs=0.01)
    vectors = np.repeat(std[:, None], 3, axis=1)
    assert metrics.attainable_spearman(vectors, n_draws=5) == pytest.approx(three, abs=0.01)


def test_attainable_spearman_is_that_of_calibrated_errors(sample):
    true, predicted, std = sample
    found = metrics.spearman(true - predicted, std)
    assert metrics.attainable_spearman(std) == pytest.approx(found, abs=0.04)


def test_attainable_spearman_of_the_largest_of_each_frame():
    rng = np.random.default_rng(4)
    frames = np.repeat(np.arange(3000), 4)
    std = np.exp(rng.normal(size=(12_000, 1))) * np.ones(3)
    errors = np.linalg.norm(std * rng.normal(size=std.shape), axis=1).reshape(3000, 4).max(1)
    expected = metrics.spearman(errors, std[:, 0].reshape(3000, 4).max(1))
    assert metrics.attainable_spearman(std, frames=frames) == pytest.approx(expected, abs=0.01)
    alone = metrics.attainable_spearman(std, frames=np.arange(12_000))
    assert alone == pytest.approx(metrics.attainable_spearman(std))


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


@pytest.mark.parametrize("decimals", [8, 1, 0])
@pytest.mark.parametrize("tolerance", [0.1, 1, 3])
def test_auprc_against_scikit_learn(sample, decimals: int, tolerance: float):
    true, predicted, std = sample
    errors, scores = true - predicted, std.round(decimals)  # rounded: ties
    expected = sklearn_metrics.average_precision_score(np.abs(errors) > tolerance, scores)
    assert metrics.auprc(errors, scores, tolerance=tolerance) == pytest.approx(expected)


def test_rll_against_likelihoods_of_scipy(sample):
    true, predicted, std = sample
    given, constant, oracle = (
        -stats.norm.logpdf(true, predicted, scale).mean()
        for scale in (std, metrics.rmse(true, predicted), np.abs(true - predicted))
    )
    assert metrics.rll(*sample) == pytest.approx((constant - given) / (constant - oracle))


def test_bootstrap_against_scipy():
    values = np.random.default_rng(5).lognormal(size=60)
    options = {"n_resamples": 4000, "confidence_level": 0.9, "method": "percentile", "rng": np.random.default_rng(0)}
    expected = stats.bootstrap((values,), np.mean, **options).confidence_interval
    found = metrics.bootstrap(lambda rows: values[rows].mean(), np.arange(60), n_resamples=4000, level=0.9)
    np.testing.assert_allclose(found, expected, rtol=0.03)


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
    lambda true, predicted, std: metrics.auprc(true - predicted, std, tolerance=1),
    lambda true, predicted, std: metrics.ause(true - predicted, std),
    metrics.rll,
]


@pytest.mark.parametrize("judge", JUDGES)
@given(triple=triples(), order=st.permutations(range(7)))
def test_order_does_not_matter(judge, triple, order):
    shuffled = [values[list(order)] for values in triple]
    assert judge(*shuffled) == pytest.approx(judge(*triple), rel=1e-9, abs=1e-12, nan_ok=True)


def test_ause_of_the_smallest_errors_there_are():
    assert metrics.ause([5e-324, 0, 0, 0], [4.0, 3, 2, 1]) == 0
    assert metrics.ause([5e-324, 0, 0, 0], [1.0, 2, 3, 4]) > 0


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
    with_tolerance = (lambda e, s: metrics.auroc(e, s, tolerance=1), lambda e, s: metrics.auprc(e, s, tolerance=1))
    for measure in (metrics.spearman, metrics.ause, *with_tolerance):
        assert measure(errors, 2 * std) == pytest.approx(measure(errors, std), nan_ok=True)


@given(triple=triples())
def test_ause_is_not_negative_and_zero_for_the_oracle(triple):
    errors = triple[0] - triple[1]
    if errors.any():
        assert metrics.ause(errors, triple[2]) >= -1e-12
        assert metrics.ause(errors, np.abs(errors)) == pytest.approx(0, abs=1e-12)


# Squares of smaller ones are lost to rounding.
@given(residuals=arrays(float, 7, elements=st.floats(0.01, 100) | st.floats(-100, -0.01)), factor=st.floats(0.01, 100))
def test_rll_is_zero_for_a_constant_and_one_for_the_oracle(residuals, factor):
    zeros = np.zeros(7)
    if np.ptp(np.abs(residuals)) > 0.01:
        assert metrics.rll(residuals, zeros, metrics.rmse(residuals, zeros)) == pytest.approx(0, abs=1e-6)
        assert metrics.rll(residuals, zeros, np.abs(residuals)) == pytest.approx(1)
        std = np.abs(residuals) + 1
        scaled = metrics.rll(factor * residuals, zeros, factor * std)
        assert scaled == pytest.approx(metrics.rll(residuals, zeros, std), rel=1e-6, abs=1e-6)


def test_rll_leaves_out_residuals_of_zero():
    residuals, std = np.array([1, 0, -3.0]), np.array([2, 1, 2.0])
    assert metrics.rll(residuals, np.zeros(3), std) == metrics.rll(residuals[[0, 2]], np.zeros(2), std[[0, 2]])


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
    assert math.isnan(metrics.auprc([1, 2], [1, 2], tolerance=5))
    assert metrics.auprc([1, 2], [1, 2], tolerance=0.5) == 1
    assert math.isnan(metrics.ause([0, 0], [1, 2]))
    assert math.isnan(metrics.rll([1, -1], [0, 0], [1, 2]))
    assert math.isnan(metrics.rll([0, 0], [0, 0], [1, 2]))
    assert math.isnan(metrics.attainable_spearman([2, 2, 2]))


# Resampling


def test_bootstrap_resamples_whole_groups():
    groups = np.array(["b", "a", "b", "c", "a"])
    seen = []
    metrics.bootstrap(lambda rows: seen.append(rows) or 0.0, groups, n_resamples=50)
    for rows in seen:
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[2]
        assert counts[1] == counts[4]
        assert counts[[0, 1, 3]].sum() == 3
    assert len({tuple(rows) for rows in seen}) > 5


def test_bootstrap_joins_consecutive_groups_to_blocks():
    seen = []
    metrics.bootstrap(lambda rows: seen.append(rows) or 0.0, np.arange(5), block=2, n_resamples=50)
    for rows in seen:
        counts = np.bincount(rows, minlength=5)
        assert counts[0] == counts[1]
        assert counts[2] == counts[3]
        assert counts[[0, 2, 4]].sum() == 3


def test_bootstrap_of_correlated_rows_is_wider():
    rng = np.random.default_rng(6)
    groups = np.repeat(np.arange(40), 25)
    values = rng.normal(size=40)[groups] + 0.1 * rng.normal(size=1000)
    low, high = metrics.bootstrap(lambda rows: values[rows].mean(), groups)
    low_alone, high_alone = metrics.bootstrap(lambda rows: values[rows].mean(), np.arange(1000))
    assert high - low == pytest.approx(2 * 1.96 / math.sqrt(40), rel=0.3)
    assert high - low > 3 * (high_alone - low_alone)


def test_bootstrap_is_seeded_and_takes_arrays(sample):
    residuals, std = sample[0] - sample[1], sample[2]
    groups = np.arange(4000) // 10

    def both(rows: np.ndarray) -> list[float]:
        return [metrics.spearman(residuals[rows], std[rows]), metrics.sharpness(std[rows])]

    found = metrics.bootstrap(both, groups)
    assert found.shape == (2, 2)
    np.testing.assert_array_equal(found, metrics.bootstrap(both, groups))
    np.testing.assert_array_equal(found[:, 1], metrics.bootstrap(lambda rows: both(rows)[1], groups))
    assert (found != metrics.bootstrap(both, groups, seed=1)).all()
    low, high = found
    assert (low < both(np.arange(4000))).all()
    assert (high > both(np.arange(4000))).all()


def test_bootstrap_covers():
    """95 % intervals of a mean hold it in about 95 % of samples."""
    rng = np.random.default_rng(7)
    held = 0
    for _ in range(200):
        values = rng.normal(size=50)
        low, high = metrics.bootstrap(lambda rows, values=values: values[rows].mean(), np.arange(50))
        held += low < 0 < high
    assert held / 200 == pytest.approx(0.94, abs=0.05)


def test_bootstrap_leaves_out_resamples_without_a_value():
    values = iter([math.nan, 1.0, 2.0, math.nan, 3.0])
    low, high = metrics.bootstrap(lambda _: next(values), [0, 1], n_resamples=5, level=0.5)
    assert (low, high) == (1.5, 2.5)
    assert np.isnan(metrics.bootstrap(lambda _: math.nan, [0, 1])).all()


# What is refused


@pytest.mark.parametrize("name", ["nll", "crps", "rll", "mean_squared_z", "coverage", "miscalibration_area", "ence"])
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
    for measure in (metrics.spearman, metrics.ause):
        with pytest.raises(ValueError, match=r"errors has shape \(2,\), y_std \(3,\)"):
            measure(np.ones(2), np.ones(3))
    for measure in (metrics.auroc, metrics.auprc):
        with pytest.raises(ValueError, match=r"errors has shape \(2,\), y_std \(3,\)"):
            measure(np.ones(2), np.ones(3), tolerance=1)
    with pytest.raises(ValueError, match=r"y_std has shape \(1, 1, 1\); \(n,\) or \(n, n_components\) was expected"):
        metrics.attainable_spearman(np.ones((1, 1, 1)))
    with pytest.raises(ValueError, match="0 draws were asked for"):
        metrics.attainable_spearman(np.ones(3), n_draws=0)
    with pytest.raises(ValueError, match=r"frames has shape \(2,\); \(3,\) was expected"):
        metrics.attainable_spearman(np.ones(3), frames=[0, 1])


def test_bad_resampling_is_refused():
    def statistic(rows: np.ndarray) -> float:
        return float(rows.mean())

    with pytest.raises(ValueError, match="level of an interval"):
        metrics.bootstrap(statistic, [0, 1], level=95)
    with pytest.raises(ValueError, match="block is 0 and n_resamples 200"):
        metrics.bootstrap(statistic, [0, 1], block=0)
    with pytest.raises(ValueError, match="block is 1 and n_resamples 0"):
        metrics.bootstrap(statistic, [0, 1], n_resamples=0)
    with pytest.raises(ValueError, match="one group only, or one block; intervals need at least two"):
        metrics.bootstrap(statistic, [0, 1, 2], block=3)
    for groups in ([], np.ones((2, 2))):
        with pytest.raises(ValueError, match=r"groups has shape .*; \(n_rows,\) was expected"):
            metrics.bootstrap(statistic, groups)


def test_means_of_summands_are_the_metrics(sample):
    true, predicted, std = sample
    found = {name: rows.mean() for name, rows in metrics.summands(true - predicted, std, levels=(0.68, 0.9)).items()}
    expected = {name: getattr(metrics, name)(true, predicted, std) for name in ("nll", "crps", "mean_squared_z")}
    expected |= {"mae": metrics.mae(true, predicted), "rmse": metrics.rmse(true, predicted) ** 2}
    expected |= {f"coverage_{100 * p:.0f}": metrics.coverage(true, predicted, std, level=p) for p in (0.68, 0.9)}
    assert found == pytest.approx(expected | {"sharpness": metrics.sharpness(std) ** 2}, rel=1e-12)
    with pytest.raises(ValueError, match="y_std has 1 values that are not positive"):
        metrics.summands([1.0, 2.0], [1.0, 0.0])


def test_all_metrics_are_public():
    functions = {
        name
        for name, value in vars(metrics).items()
        if inspect.isfunction(value) and value.__module__ == metrics.__name__ and not name.startswith("_")
    }
    assert functions == set(metrics.__all__)
