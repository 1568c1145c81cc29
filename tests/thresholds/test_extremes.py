"""Correlated readings: against the theory of autoregressive series, scipy's Pareto fit, and fresh simulated runs."""

import numpy as np
import pytest
from scipy.signal import lfilter
from scipy.stats import genpareto

from ase_uq.thresholds import extremes


def autoregressive(rng, n_runs, n, rho):
    """Stationary Gaussian series with unit variance and correlation rho of neighbours."""
    noise = rng.normal(size=(n_runs, n)) * np.sqrt(1 - rho**2)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    return lfilter([1.0], [1.0, -rho], noise, axis=1)


@pytest.mark.parametrize("rho", [0.5, 0.8, 0.9, 0.95])
def test_the_correlation_time_of_an_autoregressive_series(rho):
    series = list(autoregressive(np.random.default_rng(0), 40, 5000, rho))
    assert extremes.correlation_time(series) == pytest.approx((1 + rho) / (1 - rho) / 2, rel=0.1)


def test_white_noise_has_no_memory_however_short_the_runs():
    rng = np.random.default_rng(1)
    times = [extremes.correlation_time(list(rng.normal(size=(8, 40)))) for _ in range(200)]
    assert np.mean(np.array(times) == 0.5) > 0.95
    assert extremes.correlation_time([rng.normal(size=5000)]) == pytest.approx(0.5, abs=0.1)


def test_the_swings_of_a_vibration_do_not_cancel():
    rng = np.random.default_rng(9)
    time = np.arange(2000)
    # Amplitude and phase of each run are its own, and kept for ever.
    runs = [np.sin(time / 4 + 6 * rng.random()) + 0.1 * rng.normal(size=2000) for _ in range(5)]
    assert extremes.correlation_time(runs) > 100


def test_runs_at_different_levels_do_not_pass_for_slow_ones():
    rng = np.random.default_rng(2)
    runs = rng.normal(size=(20, 200)) + 100 * rng.normal(size=(20, 1))
    assert extremes.correlation_time(list(runs)) == pytest.approx(0.5, abs=0.2)


@pytest.mark.parametrize("series", [[], [np.array([1.0])], [np.ones(50)], [np.array([1.0, 2.0])]])
def test_what_cannot_tell_has_no_memory(series):
    assert extremes.correlation_time(series) == 0.5


@pytest.mark.parametrize(
    ("run", "separation", "expected"),
    [
        ([0, 5, 0, 0, 0, 7, 0], 1, [5, 7]),
        ([0, 5, 6, 5, 0, 0, 0], 1, [6]),
        ([0, 5, 0, 7, 0, 0, 0], 1, [5, 7]),
        ([0, 5, 0, 7, 0, 0, 0], 2, [7]),
        ([5, 0, 0, 0, 0, 0, 5], 5, [5, 5]),
        ([5, 0, 0, 0, 0, 0, 5], 6, [5]),
        ([0, 0, 4, 0], 1, []),
        ([5, 5, 5], 1, [5]),
    ],
)
def test_excursions(run, separation, expected):
    np.testing.assert_array_equal(extremes.peaks([np.array(run, float)], 5, separation), expected)


def test_excursions_end_with_their_run():
    np.testing.assert_array_equal(extremes.peaks([np.array([0.0, 5]), np.array([6.0, 0])], 5, 10), [5, 6])


def test_the_extremal_index_of_a_moving_maximum():
    # X_i = max(Z_i, ..., Z_{i+k-1}) has extremal index 1/k.
    rng = np.random.default_rng(3)
    noise = rng.random((20, 20_004))
    series = [np.lib.stride_tricks.sliding_window_view(run, 5).max(1) for run in noise]
    assert extremes.extremal_index(series, 0.9995, 10) == pytest.approx(0.2, rel=0.1)
    assert extremes.extremal_index(list(noise), 0.9995, 1) == pytest.approx(1, rel=0.05)
    assert extremes.extremal_index(list(noise), 2.0, 1) == 1


@pytest.mark.parametrize("shape", [0.2, 0.35])
def test_the_tail_is_scipys_fit_where_all_peaks_are_apart(shape):
    excess = genpareto.rvs(shape, scale=0.3, size=400, random_state=4)
    # A peak every tenth sample, on a random floor far below that has no tail.
    run = np.random.default_rng(4).random(4000)
    run[::10] = 2 + excess
    found = extremes.fit_tail([run], quantile=0.91)
    above = excess + 2 - found.threshold
    expected_shape, _, expected_scale = genpareto.fit(above[above >= 0], floc=0)
    assert found.n_peaks == np.count_nonzero(above >= 0)
    assert found.rate == found.n_peaks / 4000
    assert (found.shape, found.scale) == pytest.approx((expected_shape, expected_scale), abs=2e-3)


def test_the_return_level_inverts_its_formula():
    for shape in (0.0, 0.1, 0.3):
        tail = extremes.Tail(threshold=1, shape=shape, scale=0.5, rate=0.01, n_peaks=100)
        level = tail.return_level(0.05, 10_000)
        survival = genpareto.sf(level - 1, shape, scale=0.5)
        assert 1 - np.exp(-10_000 * 0.01 * survival) == pytest.approx(0.05)
    # So short a run that even the beginning of the tail is reached less often than asked for.
    assert tail.return_level(0.5, 1) == 1


def test_a_tail_that_ends_is_taken_for_an_exponential_one():
    excess = genpareto.rvs(-0.3, size=500, random_state=4)
    run = np.random.default_rng(4).random(5000)
    run[::10] = 2 + excess
    found = extremes.fit_tail([run], quantile=0.91)
    above = excess[excess + 2 >= found.threshold] + 2 - found.threshold
    assert found.shape == pytest.approx(0, abs=1e-3)
    assert found.scale == pytest.approx(above.mean(), rel=1e-2)


@pytest.mark.parametrize(("steps", "promised"), [(2000, 0.05), (8000, 0.15)])
def test_false_alarms_of_correlated_runs_are_at_most_those_promised(steps, promised):
    """Thresholds from 40 runs of 2000 steps each; 200 fresh runs for each threshold say what it does."""
    rng = np.random.default_rng(5)
    rho, alarms = 0.95, []
    for _ in range(20):
        reference = np.exp(0.3 * autoregressive(rng, 40, 2000, rho))
        threshold = extremes.fit_tail(list(reference)).return_level(promised, steps)
        alarms.append(np.mean(np.exp(0.3 * autoregressive(rng, 200, steps, rho)).max(1) >= threshold))
    # Each reference has a threshold of its own: it is their mean that is promised.
    assert np.mean(alarms) <= promised
    assert np.mean(alarms) > promised / 5


def test_counting_correlated_steps_as_independent_ones_overstates_the_alarms():
    rng = np.random.default_rng(6)
    runs = autoregressive(rng, 400, 20_000, 0.95)
    level = np.quantile(runs, 1 - 1e-4)
    share = np.mean(runs.max(1) >= level)
    index = extremes.extremal_index(list(runs), level, 20)
    assert 1 - np.exp(-index * 1e-4 * 20_000) == pytest.approx(share, abs=0.05)
    assert share + 0.25 < 1 - (1 - 1e-4) ** 20_000


def test_the_upper_end_of_the_band_lies_above_the_true_level():
    rng = np.random.default_rng(7)
    truth = np.quantile(np.exp(0.3 * autoregressive(rng, 2000, 4000, 0.9)).max(1), 0.9)
    bands = [extremes.tail_band(list(np.exp(0.3 * autoregressive(rng, 20, 2000, 0.9))), 0.1, 4000) for _ in range(6)]
    assert all(low < high for low, high in bands)
    assert sum(truth <= high for _, high in bands) >= 5
    assert sum(low <= 1.2 * truth for low, _ in bands) >= 3


def test_a_constant_run_has_a_tail_of_nothing():
    tail = extremes.fit_tail([np.ones(100)])
    assert tail.return_level(0.05, 1000) == pytest.approx(1)


def test_maxima_of_pieces_of_runs():
    runs = [np.array([1.0, 5, 2, 3, 9]), np.array([4.0]), np.array([7.0, 6])]
    maxima, of_run = extremes.run_maxima(runs, 2)
    np.testing.assert_array_equal(maxima, [5, 3, 7])
    np.testing.assert_array_equal(of_run, [0, 0, 2])
    maxima, of_run = extremes.run_maxima(runs, 6)
    assert (len(maxima), len(of_run)) == (0, 0)


def test_bootstrapped_blocks_stand_in_a_run_and_never_across_two():
    runs = [np.arange(0.0, 30), np.arange(100.0, 105), np.arange(200.0, 230)]
    series = extremes.block_bootstrap(runs, 47, 50, 10, np.random.default_rng(7))
    assert series.shape == (50, 47)
    for start in range(0, 47, 10):
        steps = np.diff(series[:, start : start + 10], axis=1)
        np.testing.assert_array_equal(steps, 1)
    assert set(np.floor(series.ravel() / 100)) == {0, 2}  # the run of five has no whole block


def test_blocks_are_no_longer_than_the_longest_run():
    series = extremes.block_bootstrap([np.arange(5.0), np.arange(3.0)], 12, 4, 100, np.random.default_rng(8))
    np.testing.assert_array_equal(series, np.tile([0, 1, 2, 3, 4], 3)[:12][None].repeat(4, 0))
