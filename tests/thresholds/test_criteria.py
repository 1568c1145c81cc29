"""What a threshold means in terms of calibration data and reference runs, and what it refuses to mean."""

import copy
import math
import pickle

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from ase_uq.thresholds.conformal import binomial_band
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, PerElement, Quantile
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData, exchangeable_groups
from ase_uq.thresholds.reduction import Reduction
from ase_uq.thresholds.resolved import ResolvedThreshold


def threshold_data(readings, errors=None, groups=None, **more):
    readings = np.asarray(readings, float)
    errors = np.ones(len(readings)) if errors is None else np.asarray(errors, float)
    groups = np.arange(len(readings)) if groups is None else np.asarray(groups)
    return ThresholdData(readings, errors, groups, **more)


def frames(rng, n):
    """Readings, and errors that scatter about them."""
    readings = rng.lognormal(-2, 0.5, n)
    return readings, readings * np.abs(rng.normal(size=n))


def correlated(rng, n_runs, n, rho=0.9):
    noise = rng.normal(size=(n_runs, n)) * np.sqrt(1 - rho**2)
    noise[:, 0] /= np.sqrt(1 - rho**2)
    return np.exp(0.3 * lfilter([1.0], [1.0, -rho], noise, axis=1))


def reference(runs, interval=0.5, **more):
    return ReferenceRuns(tuple(np.asarray(runs, float)), interval, **more)


# --- Quantile ---------------------------------------------------------------------------------------


def test_a_quantile_is_where_that_fraction_of_the_frames_lies_below():
    readings = np.random.default_rng(0).permutation(1000) / 1000
    for q in (0.1, 0.5, 0.9, 0.99, 0.999):
        found = Quantile(q).resolve(threshold_data(readings))
        assert np.mean(readings < found) == pytest.approx(q, abs=1e-3)
        assert found.band is not None
        assert found.band[0] <= found <= found.band[1]


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_higher_quantile_is_a_higher_threshold(low, high):
    low, high = sorted((low, high))
    found = threshold_data(np.random.default_rng(1).gamma(2, size=50))
    assert Quantile(low).resolve(found) <= Quantile(high).resolve(found)


def test_frames_without_a_reading_are_left_out():
    readings = np.arange(10.0)
    with_gaps = np.concatenate([readings, [math.inf, -math.inf, math.nan]])
    assert Quantile(0.5).resolve(threshold_data(with_gaps)) == Quantile(0.5).resolve(threshold_data(readings)) == 4.5


@pytest.mark.parametrize(("q", "needed"), [(0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)])
def test_too_few_frames_to_know_the_quantile_are_refused(q, needed):
    assert Quantile(q).resolve(threshold_data(np.arange(float(needed)))).needed == needed
    with pytest.raises(
        ValueError, match=rf"Quantile\({q}\) needs at least {needed} calibration frames.*has {needed - 1}"
    ):
        Quantile(q).resolve(threshold_data(np.arange(needed - 1.0)))


@pytest.mark.parametrize("q", [0, 1, -0.1, 1.5, 99, math.nan])
def test_a_quantile_outside_0_and_1_is_refused(q):
    with pytest.raises(ValueError, match=r"a quantile lies between 0 and 1, not at"):
        Quantile(q)


# --- ErrorBound -------------------------------------------------------------------------------------


def test_few_frames_are_worse_than_the_tolerance_and_below_the_bound():
    rng = np.random.default_rng(2)
    slipped = []
    for _ in range(400):
        threshold = ErrorBound(0.15, confidence=0.9).resolve(threshold_data(*frames(rng, 60)))
        readings, errors = frames(rng, 200)
        slipped.append(np.mean((errors > 0.15) & (readings < threshold)))
    assert 0 < np.mean(slipped) <= 0.1


def test_the_bound_is_the_conformal_factor():
    readings = np.full(19, 2.0)
    errors = np.arange(1.0, 20)
    # 95 % of 20 units is the largest of 19: errors stay below 9.5 times the reading.
    found = ErrorBound(3.8, confidence=0.95).resolve(threshold_data(readings, errors))
    assert found == pytest.approx(3.8 / 9.5)
    assert "9.5 times the reading" in found.promise


def test_readings_near_zero_do_not_blow_the_bound_up():
    readings = np.concatenate([[1e-30], np.ones(200)])
    assert ErrorBound(1.0, confidence=0.9).resolve(threshold_data(readings, np.ones(201))) == pytest.approx(1.0)


def test_low_readings_with_large_errors_are_not_forgiven():
    rng = np.random.default_rng(0)

    def frames_with_low_ones(n):
        """One frame in a hundred reads next to nothing and is wrong."""
        is_low = rng.random(n) < 0.009
        return np.where(is_low, rng.uniform(0.001, 0.01, n), rng.uniform(1, 2, n)), np.where(is_low, 0.5, 0.1)

    slipped = []
    for _ in range(20):
        threshold = ErrorBound(0.3, confidence=0.998).resolve(threshold_data(*frames_with_low_ones(2000)))
        readings, errors = frames_with_low_ones(20_000)
        slipped.append(np.mean((errors > 0.3) & (readings < threshold)))
    assert np.mean(slipped) <= 0.002


def test_too_few_units_for_a_bound_are_refused():
    ErrorBound(0.3, confidence=0.95).resolve(threshold_data(np.ones(19)))
    with pytest.raises(ValueError, match=r"ErrorBound\(0\.3, confidence=0\.95\) needs at least 19 .* has 18 units\."):
        ErrorBound(0.3, confidence=0.95).resolve(threshold_data(np.ones(18)))
    with pytest.raises(ValueError, match=r"has 100 frames in 10 units, since neighbouring frames are alike"):
        ErrorBound(0.3, confidence=0.95).resolve(threshold_data(np.ones(100), groups=np.repeat(np.arange(10), 10)))


# --- MissRate ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("confidence", "at_most"), [(None, 0.1), (None, 0.25), (0.9, 0.25)])
def test_of_the_bad_frames_few_are_missed(confidence, at_most):
    rng = np.random.default_rng(3)
    missed = []
    for _ in range(300):
        threshold = MissRate(0.15, at_most, confidence).resolve(threshold_data(*frames(rng, 300)))
        readings, errors = frames(rng, 4000)
        missed.append(np.mean(readings[errors > 0.15] < threshold))
    missed = np.array(missed)
    if confidence is None:
        assert at_most / 2 < missed.mean() <= at_most + 3 * missed.std() / np.sqrt(len(missed))
    else:
        # Of 4000 fresh frames some hundred are bad, which blurs each share a little.
        assert np.mean(missed <= at_most + 0.02) >= confidence


def test_the_threshold_is_the_kth_smallest_of_the_bad_readings():
    readings = np.arange(1.0, 41)
    errors = np.where(readings > 20, 1.0, 0.0)  # 20 bad frames, k = ⌊0.1·21⌋ = 2
    found = MissRate(0.5, at_most=0.1).resolve(threshold_data(readings, errors))
    assert (float(found), found.n_units, found.needed) == (22.0, 20, 9)


def test_perturbed_frames_count_too():
    good = threshold_data(np.ones(50), np.zeros(50))
    perturbed = threshold_data(np.arange(1.0, 10), np.ones(9))
    with pytest.raises(ValueError, match=r"at least 9 independent units .* above 0\.3 eV/Å, .* has 0 \(among 50 units"):
        MissRate(0.3, 0.1).resolve(good)
    found = MissRate(0.3, 0.1).resolve(threshold_data(np.ones(50), np.zeros(50), perturbed=perturbed))
    assert (found, found.n_units) == (1.0, 9)
    with pytest.raises(ValueError, match=r"has 9 \(among 50 units and 9 units that were perturbed\)"):
        MissRate(0.3, 0.05).resolve(threshold_data(np.ones(50), np.zeros(50), perturbed=perturbed))


def test_their_units_are_not_mixed_up_with_those_of_the_calibration():
    both = threshold_data(
        np.ones(5), np.ones(5), np.arange(5), perturbed=threshold_data(np.ones(5), np.ones(5), np.arange(5))
    )
    assert both.worse_than(0.5).n_units == 10


def test_the_refusal_says_what_to_do_in_pac_form_too():
    bad = threshold_data(np.ones(21), np.ones(21))
    with pytest.raises(ValueError, match=r"confidence=0\.9\) needs at least 22 .*perturb-frames"):
        MissRate(0.3, 0.1, confidence=0.9).resolve(bad)


# --- FalseAlarms ------------------------------------------------------------------------------------


def test_long_and_many_runs_give_the_quantile_of_their_maxima():
    runs = np.ones((19, 100))
    runs[:, 50] = np.arange(2.0, 21)
    found = FalseAlarms(per_run=0.05, steps=100).resolve(threshold_data([1.0], runs=reference(runs)))
    # The largest of 19 maxima; that run itself has no alarm, which is a reading at or above.
    assert 20 < found < 20 + 1e-9
    assert (found.n_units, found.needed, found.band) == (19, 19, None)


def test_alarms_of_fresh_runs_are_those_promised():
    rng = np.random.default_rng(4)
    alarms = []
    for _ in range(300):
        criterion = FalseAlarms(per_run=0.1, steps=500)
        threshold = criterion.resolve(threshold_data([1.0], runs=reference(correlated(rng, 19, 500))))
        alarms.append(np.mean(correlated(rng, 20, 500).max(1) >= threshold))
    k, n = round(20 * np.sum(alarms)), 20 * len(alarms)
    low, high = binomial_band(k, n, 0.99)
    # Runs that share a threshold are not independent: their spread widens the band.
    wider = 3 * np.std(alarms) / np.sqrt(len(alarms))
    assert low - wider < 0.1 < high + wider


def test_short_runs_are_extrapolated_by_their_tail_and_say_so():
    rng = np.random.default_rng(5)
    runs = reference(correlated(rng, 20, 2000))
    found = FalseAlarms(per_run=0.1, steps=20_000).resolve(threshold_data([1.0], runs=runs))
    assert "extrapolated" in found.promise
    assert found.band is not None
    assert found.band[0] <= found <= found.band[1]
    alarms = np.mean(correlated(rng, 400, 20_000).max(1) >= found)
    assert alarms <= 0.1 + 3 * np.sqrt(0.1 * 0.9 / 400)
    # Longer runs, or fewer alarms, want a higher threshold.
    assert FalseAlarms(per_run=0.1, steps=40_000).resolve(threshold_data([1.0], runs=runs)) > found
    assert FalseAlarms(per_run=0.05, steps=20_000).resolve(threshold_data([1.0], runs=runs)) > found


@pytest.mark.parametrize("steps", [0.5, 10.7])
def test_a_share_of_a_reading_is_no_length_of_a_run(steps):
    with pytest.raises(ValueError, match=rf"steps must be a whole number of readings, not {steps}. Give a time as ps"):
        FalseAlarms(per_run=0.05, steps=steps)


@pytest.mark.parametrize("make", [lambda: Quantile("0.9"), lambda: ErrorBound(None), lambda: MissRate(0.3, "0.1")])  # pyright: ignore
def test_what_is_no_number_is_refused_in_words(make):
    with pytest.raises(ValueError, match=r"not (at )?('0.9'|None|'0.1')"):
        make()


def test_picoseconds_are_readings_at_the_interval_of_the_reference():
    rng = np.random.default_rng(6)
    for interval, steps in ((0.5, 200), (2.0, 50)):
        data = threshold_data([1.0], runs=reference(correlated(rng, 20, 200), interval))
        by_time, by_steps = (FalseAlarms(0.1, **length).resolve(data) for length in ({"ps": 0.1}, {"steps": steps}))
        assert float(by_time) == float(by_steps)


def test_a_run_shorter_than_a_reading_is_refused():
    data = threshold_data([1.0], runs=reference(np.ones((20, 10)), interval=2.0))
    with pytest.raises(ValueError, match=r"ps=0\.001\) is shorter than the 2 fs between two readings"):
        FalseAlarms(0.1, ps=0.001).resolve(data)


def test_runs_too_short_to_extrapolate_from_are_refused():
    runs = reference(correlated(np.random.default_rng(7), 5, 400))
    with pytest.raises(ValueError, match=r"one alarm in 3\.9e\+06 readings, but the reference runs have 2000;"):
        FalseAlarms(per_run=0.05, steps=200_000).resolve(threshold_data([1.0], runs=runs))
    with pytest.raises(ValueError, match=r"at least 30 independent excursions .* Make more .* 19 of 1000 readings"):
        FalseAlarms(per_run=0.05, steps=1000).resolve(threshold_data([1.0], runs=runs))


def test_without_reference_runs_it_says_how_to_make_them():
    with pytest.raises(ValueError, match=r"counts alarms in reference runs.*`ase-uq reference`"):
        FalseAlarms(per_run=0.05, steps=1000).resolve(threshold_data(np.ones(1000)))


def test_reference_runs_read_otherwise_are_refused():
    data = threshold_data([1.0], reduction=Reduction("mean"), runs=reference(np.ones((20, 10))))
    with pytest.raises(ValueError, match=r"the reference runs were read with .*'max'.*'mean'"):
        FalseAlarms(per_run=0.1, steps=10).resolve(data)


# --- arguments --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ErrorBound(0), r"a tolerated force error must be a positive number in eV/Å, not 0"),
        (lambda: ErrorBound(math.nan), r"a tolerated force error .* not nan"),
        (lambda: ErrorBound(0.3, confidence=1), r"confidence lies between 0 and 1, not at 1"),
        (lambda: MissRate(-1), r"a tolerated force error .* not -1"),
        (lambda: MissRate(0.3, at_most=10), r"at_most lies between 0 and 1, not at 10"),
        (lambda: MissRate(0.3, confidence=0), r"confidence lies between 0 and 1, not at 0"),
        (lambda: FalseAlarms(per_run=5, steps=10), r"per_run lies between 0 and 1, not at 5"),
        (lambda: FalseAlarms(per_run=0.1), r"give steps or ps, not None and None"),
        (lambda: FalseAlarms(per_run=0.1, steps=10, ps=1), r"give steps or ps, not 10 and 1"),
        (lambda: FalseAlarms(per_run=0.1, ps=-1), r"the length of a run must be positive, not -1"),
        (lambda: ReferenceRuns((), 1.0), r"there is no reference run"),
        (lambda: ReferenceRuns((np.ones(3),), 0.0), r"a positive time in fs, not 0\.0"),
        (lambda: ReferenceRuns((np.ones(3), np.ones((2, 2))), 1.0), r"reference run 1 has readings of shape \(2, 2\)"),
        (lambda: ReferenceRuns((np.array([1, np.nan]),), 1.0), r"reference run 0 has readings that are not finite"),
        (lambda: ReferenceRuns((np.array([1.0, 0]),), 1.0), r"not finite and positive"),
    ],
)
def test_arguments_that_mean_nothing_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("criterion", [0.3, FalseAlarms(per_run=0.1, steps=10), None])
def test_per_element_takes_what_calibration_frames_resolve(criterion):
    with pytest.raises(TypeError, match=r"PerElement takes a criterion that calibration frames can resolve"):
        PerElement(criterion)


@pytest.mark.parametrize(
    ("criterion", "text"),
    [
        (Quantile(0.99), "Quantile(0.99)"),
        (MissRate(0.3, 0.1, 0.9), "MissRate(error=0.3, at_most=0.1, confidence=0.9)"),
        (FalseAlarms(0.05, ps=100), "FalseAlarms(per_run=0.05, ps=100)"),
        (PerElement(MissRate(0.3)), "PerElement(MissRate(error=0.3, at_most=0.1))"),
    ],
)
def test_meanings_print_as_they_are_written(criterion, text):
    assert str(criterion) == text


# --- the number -------------------------------------------------------------------------------------


def test_a_threshold_is_a_float_that_remembers():
    found = Quantile(0.9).resolve(threshold_data(np.arange(100.0)))
    assert isinstance(found, float)
    assert found * 2 == float(found) * 2
    text = found.describe()
    assert text.startswith("89.1 eV/Å by Quantile(0.9): 0.9 of frames like the calibration frames stay below")
    assert "(100 units, 10 needed; 90 % band " in text
    for again in (pickle.loads(pickle.dumps(found)), copy.deepcopy(found)):
        assert isinstance(again, ResolvedThreshold)
        assert (again, again.describe()) == (found, text)


# --- units ------------------------------------------------------------------------------------------


def test_frames_of_a_trajectory_are_put_into_blocks_of_two_correlation_times():
    rng = np.random.default_rng(8)
    series = np.log(correlated(rng, 1, 4000)[0])
    groups = exchangeable_groups([series, rng.normal(size=4000)], np.zeros(4000, int))
    # (1 + ρ)/(1 - ρ) = 19 frames a block.
    assert np.bincount(groups)[0] == pytest.approx(19, abs=4)
    assert (np.diff(groups) >= 0).all()


def test_independent_frames_are_units_of_their_own():
    rng = np.random.default_rng(9)
    groups = exchangeable_groups([rng.normal(size=300), rng.normal(size=300)], np.zeros(300, int))
    np.testing.assert_array_equal(groups, np.arange(300))


def test_blocks_end_with_their_run():
    rng = np.random.default_rng(10)
    series = np.log(correlated(rng, 10, 50)).ravel()
    segments = np.repeat(np.arange(10), 50)
    groups = exchangeable_groups([series], segments)
    assert len(np.unique(groups)) < 200
    for number in np.unique(groups):
        assert len(np.unique(segments[groups == number])) == 1


@pytest.mark.parametrize(("level", "said"), [(0.5, False), (1.5, True)])
def test_false_alarms_say_that_their_runs_left_the_calibration_data(level: float, said: bool):
    """As of runs that somebody made himself."""
    runs = ReferenceRuns(tuple(np.full(10, level) + 0.01 * np.arange(10) for _ in range(30)), 1.0)
    frames = ThresholdData(np.linspace(0, 1, 1000), np.linspace(0, 1, 1000), np.arange(1000), runs=runs)
    promise = FalseAlarms(per_run=0.05, steps=10).resolve(frames).promise
    assert promise.endswith("like the reference have an alarm") != said
    assert promise.endswith(", 100% of whose readings are above the 99 % quantile of the calibration frames") == said
