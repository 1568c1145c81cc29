"""Distribution-free bounds: the textbook ranks, MAPIE as an oracle, and coverage over many calibration sets."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import beta, binomtest

from ase_uq.thresholds.conformal import (
    binomial_band,
    conformal_quantile,
    fewest_units,
    fewest_units_pac,
    pac_rank,
    recall_threshold,
    recall_threshold_pac,
)

SHARES = st.sampled_from([0.05, 0.1, 0.2, 0.25, 0.5])


@given(st.integers(1, 60), SHARES, st.integers(0, 2**31))
def test_without_groups_it_is_the_textbook_rank(n, alpha, seed):
    scores = np.random.default_rng(seed).normal(size=n)
    rank = int(np.ceil((1 - alpha) * (n + 1) - 1e-9))
    expected = np.sort(scores)[rank - 1] if rank <= n else np.inf
    assert conformal_quantile(scores, alpha) == expected
    # A group for each score is no group at all.
    assert conformal_quantile(scores, alpha, np.arange(n)) == expected


@given(st.integers(1, 60), SHARES, st.integers(0, 2**31))
def test_recall_is_the_mirrored_rank(n, alpha, seed):
    scores = np.random.default_rng(seed).normal(size=n)
    rank = int(np.floor(alpha * (n + 1) + 1e-9))
    expected = np.sort(scores)[rank - 1] if rank else -np.inf
    assert recall_threshold(scores, alpha) == expected


def test_the_bound_is_mapies():
    from mapie.regression import SplitConformalRegressor
    from sklearn.linear_model import LinearRegression

    rng = np.random.default_rng(0)
    x = rng.normal(size=(400, 1))
    y = 2 * x[:, 0] + rng.normal(size=400)
    base = LinearRegression().fit(x[:200], y[:200])
    other = SplitConformalRegressor(base, confidence_level=0.9, prefit=True).conformalize(x[200:], y[200:])
    _, interval = other.predict_interval(x[:1])
    half = float(interval[0, 1, 0] - interval[0, 0, 0]) / 2
    assert conformal_quantile(np.abs(y[200:] - base.predict(x[200:])), 0.1) == pytest.approx(half, rel=1e-12)


@pytest.mark.parametrize(("alpha", "needed"), [(0.1, 9), (0.05, 19), (0.2, 4), (0.01, 99), (1 / 3, 2)])
def test_units_needed_are_those_from_which_on_the_bound_is_finite(alpha, needed):
    assert fewest_units(alpha) == needed
    assert np.isfinite(conformal_quantile(np.arange(needed), alpha))
    assert conformal_quantile(np.arange(needed - 1), alpha) == np.inf
    assert np.isfinite(recall_threshold(np.arange(needed), alpha))
    assert recall_threshold(np.arange(needed - 1), alpha) == -np.inf


# Of reference/methods.md, section 12.2.
@pytest.mark.parametrize(("n", "rank"), [(50, 2), (100, 6), (200, 15), (500, 41)])
def test_pac_ranks_are_the_golden_ones(n, rank):
    assert pac_rank(n, 0.1, 0.1) == rank
    assert beta.cdf(0.1, rank, n + 1 - rank) >= 0.9 > beta.cdf(0.1, rank + 1, n - rank)


@pytest.mark.parametrize(
    ("alpha", "delta", "needed"), [(0.1, 0.1, 22), (0.05, 0.1, 45), (0.05, 0.05, 59), (0.01, 0.05, 299)]
)
def test_units_needed_for_pac_are_the_golden_ones(alpha, delta, needed):
    assert fewest_units_pac(alpha, delta) == needed
    assert (pac_rank(needed, alpha, delta), pac_rank(needed - 1, alpha, delta)) == (1, 0)
    assert recall_threshold_pac(np.arange(needed - 1.0), alpha, delta) == -np.inf
    assert recall_threshold_pac(np.arange(float(needed)), alpha, delta) == 0


def test_one_group_counts_as_one_unit_however_many_scores_it_has():
    scores, groups = np.arange(800.0), np.repeat(np.arange(8), 100)
    assert conformal_quantile(scores, 0.1, groups) == np.inf
    assert np.isfinite(conformal_quantile(np.arange(900.0), 0.1, np.repeat(np.arange(9), 100)))


def test_unequal_groups_weigh_the_same():
    # 9 groups: a tenth of the mass lies at infinity, so the bound at 10 % is the largest score of all.
    scores = np.concatenate([np.zeros(1000), np.arange(1.0, 9.0)])
    groups = np.concatenate([np.zeros(1000, int), np.arange(1, 9)])
    assert conformal_quantile(scores, 0.1, groups) == 8
    assert conformal_quantile(scores, 0.5, groups) == 4


def test_a_group_is_missed_where_any_of_its_frames_is():
    scores = np.concatenate([np.full(22, 5.0), np.arange(22.0)])
    assert recall_threshold_pac(scores, 0.1, 0.1, np.tile(np.arange(22), 2)) == 0


def correlated_set(rng, n_groups, size):
    """Scores whose groups have levels of their own: within one they are all but copies."""
    return (rng.normal(size=(n_groups, 1)) + 0.1 * rng.normal(size=(n_groups, size))).ravel()


@pytest.mark.parametrize("groups_are_known", [True, False])
def test_coverage_of_correlated_sets_holds_on_average_and_varies_less_with_groups(groups_are_known):
    rng = np.random.default_rng(1)
    n_groups, size, alpha = 9, 20, 0.1
    groups = np.repeat(np.arange(n_groups), size) if groups_are_known else None
    covered = [
        np.mean(correlated_set(rng, 400, 1) <= conformal_quantile(correlated_set(rng, n_groups, size), alpha, groups))
        for _ in range(400)
    ]
    if groups_are_known:
        assert np.mean(covered) >= 1 - alpha - 3 * np.std(covered) / np.sqrt(len(covered))
    else:
        # What treating neighbours as independent costs: the promise is broken on average.
        assert np.mean(covered) < 1 - alpha - 3 * np.std(covered) / np.sqrt(len(covered))


def test_coverage_is_what_was_promised_and_not_much_more():
    rng = np.random.default_rng(2)
    for n, alpha in ((9, 0.1), (39, 0.05), (100, 0.2)):
        covered = [rng.exponential() <= conformal_quantile(rng.exponential(size=n), alpha) for _ in range(20_000)]
        exact = np.ceil((1 - alpha) * (n + 1) - 1e-9) / (n + 1)
        assert abs(np.mean(covered) - exact) < 4 * np.sqrt(exact * (1 - exact) / len(covered))


def test_pac_keeps_its_promise_in_the_stated_share_of_calibration_sets():
    rng = np.random.default_rng(3)
    n, alpha, delta = 60, 0.1, 0.1
    # Uniform scores: the share missed below τ is τ itself.
    missed = np.array([recall_threshold_pac(rng.random(n), alpha, delta) for _ in range(20_000)])
    kept = int(np.count_nonzero(missed <= alpha))
    low, high = binomial_band(kept, len(missed), 0.999)
    expected = beta.cdf(alpha, pac_rank(n, alpha, delta), n + 1 - pac_rank(n, alpha, delta))
    assert expected >= 1 - delta
    assert low < expected < high


@settings(max_examples=50)
@given(st.integers(0, 40), st.integers(1, 40), st.sampled_from([0.8, 0.9, 0.95]))
def test_the_band_is_scipys_exact_one(k, extra, confidence):
    n = k + extra
    interval = binomtest(k, n).proportion_ci(confidence, method="exact")
    assert binomial_band(k, n, confidence) == pytest.approx((interval.low, interval.high), abs=1e-9)


def test_nothing_bounds_nothing():
    assert conformal_quantile(np.array([]), 0.1) == np.inf
    assert recall_threshold(np.array([]), 0.1) == -np.inf
    assert recall_threshold_pac(np.array([]), 0.1, 0.1, np.array([], int)) == -np.inf
