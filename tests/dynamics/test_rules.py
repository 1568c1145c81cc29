"""Rules are pure functions, so most of this is a table of cases; a CUSUM is held against theory and simulation."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.signal import lfilter

from ase_uq.dynamics import cusum
from ase_uq.dynamics.cusum import Cusum, cusum_limit
from ase_uq.dynamics.rules import AllOf, AnyOf, Patience, Refractory, Rule, Threshold
from ase_uq.thresholds.criteria import FalseAlarms, PerElement, Quantile
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData

READINGS = st.lists(st.floats(0, 2) | st.just(math.nan) | st.just(math.inf), max_size=40)
LEVELS = st.floats(0.01, 2)
NAN, INF = math.nan, math.inf

# x = log reading, alarm at S = 2, one reading stands for 1 fs.
CUSUM = Cusum(FalseAlarms(0.05, steps=100), drift=0.5, mean=0.0, sd=1.0, h=2.0, interval=1.0, memory=1.0)
UP = math.exp(1.2)  # adds 0.7 to the sum: an alarm at the third reading
DOWN = math.exp(-0.5)  # takes 1 from it

RULES = [
    Threshold(0.5),
    Patience(0.5, fs=2),
    CUSUM,
    AnyOf(Patience(0.5, fs=2), Threshold(1.5)),
    AllOf(Patience(0.5, fs=3), CUSUM),
    Refractory(Threshold(0.5), fs=3),
    Refractory(CUSUM, fs=2),
    AnyOf(Refractory(Patience(0.5, fs=1), fs=4), AllOf(Threshold(1.0), Patience(0.2, fs=2))),
]


def alarms(rule: Rule, readings, dt: float = 1.0, through=lambda state: json.loads(json.dumps(state))) -> list[bool]:
    state, triggered = None, []
    for step, reading in enumerate(readings):
        # Through JSON at every step: a state that does not survive it could not be restarted.
        state, now = rule.judge(through(state), reading, step * dt)
        triggered.append(now)
    return triggered


def first(triggered: list[bool]) -> float:
    return triggered.index(True) if True in triggered else math.inf


def steps_of(triggered: list[bool]) -> list[int]:
    return [step for step, now in enumerate(triggered) if now]


def evidence_of(readings=(), *, runs=None, interval: float = 1.0) -> ThresholdData:
    """Calibration frames with these readings, and reference runs."""
    readings = np.asarray(readings, float)
    reference = None if runs is None else ReferenceRuns(tuple(runs), interval)
    return ThresholdData(readings, readings, np.arange(len(readings)), runs=reference)


def walk(rng: np.random.Generator, shape, rho: float) -> np.ndarray:
    """AR(1) series of unit variance along the last axis; integrated autocorrelation time (1 + rho)/(1 - rho)/2."""
    noise = rng.normal(size=shape)
    noise[..., 1:] *= math.sqrt(1 - rho**2)
    return lfilter([1], [1, -rho], noise, axis=-1)


def alarm_times(scores: np.ndarray, h: float, drift: float = 0.5) -> np.ndarray:
    """(n_series,) step at which each sum reaches h for the first time, inf if never: Page's recursion as written."""
    total, when = np.zeros(len(scores)), np.full(len(scores), math.inf)
    for step, score in enumerate(scores.T):
        total = np.maximum(0, total + score - drift)
        when = np.where((total >= h) & np.isinf(when), step, when)
    return when


def run_length(when: np.ndarray, n_steps: int) -> float:
    """Readings to an alarm: maximum likelihood of an exponential, of which some have not happened yet."""
    return float(np.minimum(when + 1, n_steps).sum() / np.isfinite(when).sum())


@pytest.mark.parametrize(
    ("reading", "triggers"),
    [(0.0, False), (0.499, False), (0.5, True), (0.501, True), (math.inf, True), (math.nan, True), (-math.inf, False)],
)
def test_a_threshold_triggers_at_and_above_its_value_and_for_nan(reading, triggers):
    assert Threshold(0.5).judge(None, reading, None) == (None, triggers)


def test_an_infinite_threshold_triggers_for_unseen_elements_and_nan_only():
    assert alarms(Threshold(math.inf), [1e300, math.inf, math.nan]) == [False, True, True]


@pytest.mark.parametrize(
    ("readings", "step"),
    [
        ([1, 1, 1, 1], 2),  # above since time 0, for 2 fs at step 2
        ([0, 1, 1, 1], 3),
        ([1, 1, 0, 1, 1, 1], 5),  # a break starts the clock anew
        ([1, 0, 1, 0, 1, 0], math.inf),
        ([0, math.nan, 0], 1),  # NaN does not wait
        ([1, math.nan], 1),
        ([math.inf, math.inf, math.inf], 2),
        ([-math.inf] * 5, math.inf),
    ],
)
def test_patience_waits_for_its_time_without_a_break(readings, step):
    assert first(alarms(Patience(0.5, fs=2), readings)) == step


def test_patience_counts_time_and_not_steps():
    above = np.ones(100)
    assert first(alarms(Patience(0.5, fs=20), above, dt=0.5)) == 40
    assert first(alarms(Patience(0.5, fs=20), above, dt=5.0)) == 4


def test_patience_is_not_one_step_late_by_rounding():
    # 7 * 0.1 is not 0.7 in binary.
    assert first(alarms(Patience(0.5, fs=0.7), np.ones(20), dt=0.1)) == 7


def test_patience_starts_anew_when_the_clock_is_set_back():
    rule = Patience(0.5, fs=2)
    state, _ = rule.judge(None, 1.0, 1000.0)
    state, now = rule.judge(state, 1.0, 0.0)
    assert not now
    assert rule.judge(state, 1.0, 2.0)[1]


@pytest.mark.parametrize(
    ("rule", "readings", "steps"),
    [
        # Halt at 1.5 at once, at 0.5 after 2 fs.
        (AnyOf(Patience(0.5, 2), Threshold(1.5)), [1, 1, 1, 1], [2, 3]),
        (AnyOf(Patience(0.5, 2), Threshold(1.5)), [0, 2, 0, 1, 1, 1], [1, 5]),
        (AnyOf(Patience(0.5, 2), Threshold(1.5)), [0, INF, 0, NAN, 0], [1, 3]),
        # A spike above all levels is let go by the patience, and the rules remember each on its own.
        (AllOf(Patience(0.5, 2), Threshold(1.0)), [2, 2, 0.7, 2, 2, 0], [3, 4]),
        (AllOf(Patience(0.5, 2), Threshold(1.0)), [2, 0, 2, 0, 2], []),
        (AllOf(Patience(0.5, 2), Threshold(1.0)), [0, NAN, 0, INF, 0], [1]),
        (AllOf(Patience(0.5, 1), CUSUM), [UP, UP, UP, DOWN, UP], [2]),
        # Silent at steps 1, 2 and at 3 again heard; alarms within the silence do not prolong it.
        (Refractory(Threshold(0.5), 3), [1] * 8, [0, 3, 6]),
        (Refractory(Threshold(0.5), 3), [1, 0, 0, 0, 1, 1], [0, 4]),
        (Refractory(Threshold(0.5), 3), [0, 0, 1, 1, 0, 1], [2, 5]),
        (Refractory(Threshold(0.5), 10), [1, NAN, 1, INF, 1, NAN], [0, 1, 3, 5]),
        (Refractory(Patience(0.5, 2), 3), [1] * 12, [2, 7]),  # it waits again after the silence
        (Refractory(Patience(0.5, 2), 3), [0, INF, 0], [1]),
        (Refractory(CUSUM, 2), [UP] * 12, [2, 6, 10]),  # and the sum begins at zero again
    ],
)
def test_rules_made_of_rules(rule, readings, steps):
    assert steps_of(alarms(rule, readings)) == steps


@pytest.mark.parametrize(
    ("readings", "steps"),
    [
        ([UP] * 5, [2, 3, 4]),
        ([UP, UP, DOWN, UP, UP, UP], [5]),  # 0.7, 1.4, 0.4, 1.1, 1.8, 2.5
        ([DOWN] * 50 + [UP] * 3, [52]),  # the past below does not count for it
        ([UP] * 50 + [DOWN, DOWN], list(range(2, 50))),  # and the past above not for ever
        ([math.exp(0.4)] * 200, []),  # a rise within the drift
        ([1, INF, 1, NAN, 1], [1, 3]),
        ([UP, UP, -INF, UP, UP, 0.0, UP], []),  # no atom looked at, or no uncertainty: as low as can be
    ],
)
def test_a_cusum_adds_up_small_rises_that_stay(readings, steps):
    assert steps_of(alarms(CUSUM, readings)) == steps


@pytest.mark.parametrize(
    ("rule", "dt", "time"),
    [
        (CUSUM, 1.0, 2.0),
        (CUSUM, 0.25, 2.0),  # the first reading counts for one interval of the reference, whatever the step
        (replace(CUSUM, interval=0.5, h=4.0, memory=100.0), 0.25, 2.5),
        (replace(CUSUM, h=20.0, memory=100.0), 7.0, 28.0),  # 0.7 + 4 · 4.9
        (CUSUM, 7.0, 14.0),  # a reading stands for no longer than it is remembered
    ],
)
def test_a_cusum_counts_time_and_not_steps(rule, dt, time):
    assert first(alarms(rule, [UP] * 100, dt=dt)) * dt == time


def test_a_one_sided_cusum_is_not_inverted():
    # IPSuite's one-sided test took the absolute value exactly where it should not.
    assert not any(alarms(CUSUM, [math.exp(-5)] * 100))
    assert first(alarms(CUSUM, [math.exp(5)] * 100)) == 0


def test_a_cusum_goes_on_when_the_clock_is_set_back():
    state, _ = CUSUM.judge(None, UP, 1000.0)
    state, now = CUSUM.judge(state, UP, 0.0)
    assert state == pytest.approx([1.4, 0.0])
    assert not now
    assert CUSUM.judge(state, UP, 1.0)[1]


def test_a_step_that_is_judged_twice_adds_nothing_to_a_cusum():
    state, _ = CUSUM.judge(None, UP, 5.0)
    assert CUSUM.judge(state, UP, 5.0) == (state, False)


def test_a_refractory_time_ends_when_the_clock_is_set_back():
    rule = Refractory(Threshold(0.5), fs=3)
    state, now = rule.judge(None, 1.0, 1000.0)
    assert now
    state, now = rule.judge(state, 1.0, 0.0)
    assert not now
    assert rule.judge(state, 1.0, 3.0)[1]


def test_a_refractory_time_is_not_one_step_long_by_rounding():
    assert steps_of(alarms(Refractory(Threshold(0.5), fs=0.7), np.ones(20), dt=0.1)) == [0, 7, 14]


def test_thresholds_of_rules_made_of_rules():
    assert AnyOf(Patience(0.5, 2), Threshold(1.5)).threshold == 0.5
    assert AllOf(Patience(0.5, 2), Threshold(1.5)).threshold == 1.5
    assert Refractory(Threshold(0.3), 5).threshold == 0.3
    assert CUSUM.threshold == pytest.approx(math.exp(0.5))


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(READINGS, st.floats(0.1, 3))
def test_a_restart_at_any_step_changes_no_alarm(rule, readings, dt):
    # alarms() hands the state through JSON at every step.
    assert alarms(rule, readings, dt) == alarms(rule, readings, dt, through=lambda state: state)


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(READINGS, st.floats(0.1, 3))
def test_nan_triggers_every_rule_at_once(rule, readings, dt):
    found = alarms(rule, readings, dt)
    assert all(now for reading, now in zip(readings, found, strict=True) if math.isnan(reading))


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(READINGS)
def test_judging_does_not_change_the_state_it_is_handed(rule, readings):
    state = None
    for step, reading in enumerate(readings):
        before = json.dumps(state)
        after, _ = rule.judge(state, reading, float(step))
        assert json.dumps(state) == before
        state = after


@given(READINGS, LEVELS, LEVELS, st.floats(0.5, 10))
def test_raising_a_threshold_never_triggers_earlier(readings, low, high, fs):
    low, high = sorted((low, high))
    assert first(alarms(Threshold(high), readings)) >= first(alarms(Threshold(low), readings))
    assert first(alarms(Patience(high, fs), readings)) >= first(alarms(Patience(low, fs), readings))


@given(READINGS, LEVELS, st.floats(0.5, 10), st.floats(0.5, 10))
def test_more_patience_never_triggers_earlier(readings, value, short, long):
    short, long = sorted((short, long))
    assert first(alarms(Patience(value, long), readings)) >= first(alarms(Patience(value, short), readings))
    assert first(alarms(Patience(value, short), readings)) >= first(alarms(Threshold(value), readings))


@given(READINGS, st.floats(0.5, 10))
def test_a_refractory_time_only_leaves_alarms_out_and_never_the_first(readings, fs):
    plain, silent = alarms(Threshold(0.5), readings), alarms(Refractory(Threshold(0.5), fs), readings)
    assert first(silent) == first(plain)
    assert all(before >= after for before, after in zip(plain, silent, strict=True))


@pytest.mark.parametrize("rule", RULES, ids=str)
@given(READINGS)
def test_the_same_readings_give_the_same_alarms_and_the_past_does_not_know_the_future(rule, readings):
    whole = alarms(rule, readings)
    assert alarms(rule, readings) == whole
    assert alarms(rule, readings[: len(readings) // 2]) == whole[: len(readings) // 2]


# --- CUSUM: where its limit comes from -------------------------------------------------------------------------------


@pytest.mark.parametrize(("readings", "h"), [(1e4, 7.35), (1e5, 9.65), (1e6, 11.96), (1e7, 14.26)])
def test_the_limit_of_a_cusum_is_that_of_siegmund(readings, h):
    assert cusum_limit(readings, 0.5) == pytest.approx(h, abs=0.005)


@pytest.mark.parametrize("drift", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("readings", [1e-6, 1.0, 10.0, 1e3, 1e12])
def test_the_limit_of_a_cusum_solves_its_equation(readings, drift):
    h = cusum_limit(readings, drift)
    scaled = 2 * drift * (h + 1.166)
    again = (math.exp(scaled) - scaled - 1) / (2 * drift**2)
    assert again == pytest.approx(readings, rel=1e-6) if h > 0 else again >= readings


def test_independent_readings_alarm_as_seldom_as_theory_says():
    n_series, n_steps, wanted = 500, 6000, 1000.0
    scores = np.random.default_rng(0).normal(size=(n_series, n_steps))
    found = run_length(alarm_times(scores, cusum_limit(wanted, 0.5)), n_steps)
    # 500 exponential times are known to 4.5 %; Siegmund's formula is good to a few per cent here.
    assert found == pytest.approx(wanted, rel=0.15)


def test_correlated_readings_alarm_far_too_early_unless_the_limit_is_corrected():
    # methods.md §12.4: h = 4 is meant for 338 readings; with rho = 0.9 (2τ = 19) it alarms after 62, and 19 h after
    # 9000: 338 decorrelated ones and somewhat more.
    scores = walk(np.random.default_rng(1), (300, 20_000), rho=0.9)
    assert cusum_limit(338, 0.5) == pytest.approx(4, abs=0.01)
    assert run_length(alarm_times(scores, 4.0), 20_000) == pytest.approx(62, rel=0.2)
    assert 338 * 19 < run_length(alarm_times(scores, 19 * 4.0), 20_000) < 2 * 338 * 19


def share_with_an_alarm(rule: Cusum, logs: np.ndarray) -> float:
    assert rule.mean is not None
    assert rule.h is not None
    return float(np.isfinite(alarm_times((logs - rule.mean) / rule.sd, rule.h, rule.drift)).mean())


@pytest.mark.parametrize("rho", [0.0, 0.9])
def test_fresh_runs_of_the_resolved_rule_keep_the_promise_of_false_alarms(rho):
    """Many references, each with runs of its own: what is promised holds on average over both."""
    rng = np.random.default_rng(2)
    memory = (1 + rho) / (1 - rho)
    length, per_run = round(100 * memory), 0.1
    criterion = FalseAlarms(per_run, steps=length)
    kept, naive, found = [], [], []
    for _ in range(12):
        reference = -2 + 0.3 * walk(rng, round(400 * memory), rho)
        rule = Cusum(criterion).resolved(evidence_of(runs=[np.exp(reference)]))
        fresh = -2 + 0.3 * walk(rng, (100, length), rho)
        kept.append(share_with_an_alarm(rule, fresh))
        uncorrected = replace(rule, h=cusum_limit(-length / math.log1p(-per_run), rule.drift))
        naive.append(share_with_an_alarm(uncorrected, fresh))
        found.append(share_with_an_alarm(rule, fresh + 0.3 * 1.5))
    # 1200 runs: the share is known to 0.009 if all references were alike, twice that since they are not.
    assert np.mean(kept) < per_run + 0.03
    assert np.mean(found) > 0.99  # of a rise by 1.5 standard deviations, so that the promise is not bought by silence
    if rho == 0.9:
        assert np.mean(naive) > 0.9


def test_judging_step_by_step_is_the_recursion_that_the_limit_was_made_for():
    rng = np.random.default_rng(3)
    logs = walk(rng, (20, 400), 0.5)
    rule = Cusum(FalseAlarms(0.5, steps=100)).resolved(evidence_of(runs=[np.exp(walk(rng, 5000, 0.5))], interval=2.0))
    when = alarm_times((logs - rule.mean) / rule.sd, rule.h)
    assert 0 < np.isfinite(when).sum() < 20
    assert [first(alarms(rule, np.exp(series), dt=2.0)) for series in logs] == when.tolist()


def test_a_resolved_cusum_knows_its_reference():
    runs = [np.exp(0.2 * np.random.default_rng(seed).normal(size=2000) - 1) for seed in (0, 1)]
    rule = Cusum(FalseAlarms(0.05, ps=1)).resolved(evidence_of(runs=runs, interval=0.5))
    logs = np.log(np.concatenate(runs))
    assert (rule.mean, rule.sd, rule.interval) == (pytest.approx(logs.mean()), pytest.approx(logs.std()), 0.5)
    assert rule.threshold == pytest.approx(math.exp(logs.mean() + 0.5 * logs.std()))
    # White noise is remembered for one reading, within what 4000 of them tell.
    assert 0.5 <= rule.memory < 0.6
    longer = Cusum(FalseAlarms(0.05, ps=100)).resolved(evidence_of(runs=runs, interval=0.5))
    assert longer.h > rule.h
    # 1 ps is 2000 readings, and the bootstrap has a seed of its own.
    assert Cusum(FalseAlarms(0.05, steps=2000)).resolved(evidence_of(runs=runs, interval=0.5)).h == rule.h


def test_the_bootstrap_raises_the_limit_where_readings_have_a_tail_that_theory_does_not_know():
    rng = np.random.default_rng(4)
    criterion = FalseAlarms(0.05, steps=500)

    def corrected(rule: Cusum) -> float:
        assert rule.memory is not None
        return rule.memory * cusum_limit(-500 / math.log(0.95) / rule.memory, rule.drift)

    normal = Cusum(criterion).resolved(evidence_of(runs=[np.exp(rng.normal(size=5000))]))
    skewed = Cusum(criterion).resolved(evidence_of(runs=[np.exp(rng.exponential(size=5000))]))
    assert normal.h == pytest.approx(corrected(normal), rel=0.1)
    assert skewed.h > 1.2 * corrected(skewed)


def test_runs_that_differ_for_all_their_lives_are_not_taken_for_independent_readings():
    rng = np.random.default_rng(5)
    offsets = rng.normal(size=30)
    alike = [np.exp(rng.normal(size=1000)) for _ in offsets]
    differing = [np.exp(0.2 * offset + rng.normal(size=1000)) for offset in offsets]
    criterion = FalseAlarms(0.1, steps=1000)
    rule = Cusum(criterion).resolved(evidence_of(runs=differing))
    assert rule.h > 5 * Cusum(criterion).resolved(evidence_of(runs=alike)).h
    fresh = 0.2 * rng.normal(size=(500, 1)) + rng.normal(size=(500, 1000))
    assert share_with_an_alarm(rule, fresh) < 0.1 + 0.04


def test_enough_runs_of_the_length_keep_the_promise_also_where_theory_and_bootstrap_do_not(monkeypatch):
    """Log readings with a heavy tail; references of 19 runs, each with runs of its own to alarm in."""
    rng = np.random.default_rng(7)
    criterion = FalseAlarms(0.05, steps=300)
    monkeypatch.setattr(cusum, "_SERIES", 50)
    shares = []
    for _ in range(40):
        runs = rng.gamma(0.5, size=(19, 300))
        rule = Cusum(criterion).resolved(evidence_of(runs=list(np.exp(runs))))
        shares.append(share_with_an_alarm(rule, rng.gamma(0.5, size=(100, 300))))
    assert np.mean(shares) <= 0.05 + 3 * np.std(shares) / math.sqrt(len(shares))
    assert np.mean(shares) > 0.005


def test_the_limit_of_seen_runs_is_the_conformal_quantile_of_sums_against_all_others():
    rng = np.random.default_rng(8)
    logs = list(rng.normal(size=(9, 100)) + 0.3 * rng.normal(size=(9, 1)))
    highest = []
    for number, log in enumerate(logs):
        others = np.concatenate(logs[:number] + logs[number + 1 :])
        total = most = 0.0
        for x in (log - others.mean()) / others.std():
            total = max(0.0, total + x - 0.5)
            most = max(most, total)
        highest.append(most)
    assert cusum._seen_limit(logs, 0.5, 100, 0.1) == pytest.approx(max(highest))
    assert cusum._seen_limit(logs, 0.5, 100, 0.2) == pytest.approx(sorted(highest)[7])
    assert cusum._seen_limit(logs, 0.5, 100, 0.05) == 0
    assert cusum._seen_limit(logs, 0.5, 101, 0.1) == 0


def test_runs_longer_than_the_bootstrap_are_judged_by_the_chances_of_shorter_ones(monkeypatch):
    # Without the limit of theory, which would hide it.
    monkeypatch.setattr(cusum, "cusum_limit", lambda run_length, drift: 0.0)
    threshold_data = evidence_of(runs=[np.exp(np.random.default_rng(6).normal(size=20_000))])
    whole = Cusum(FalseAlarms(0.2, steps=2000)).resolved(threshold_data)
    monkeypatch.setattr(cusum, "_MOST_READINGS", cusum._SERIES * 200)
    pieces = Cusum(FalseAlarms(0.2, steps=2000)).resolved(threshold_data)
    assert pieces.h != whole.h
    assert pieces.h == pytest.approx(whole.h, rel=0.2)


def test_a_promise_that_costs_nothing_does_not_alarm_at_every_step():
    readings = np.exp(np.random.default_rng(9).normal(size=2000))
    rule = Cusum(FalseAlarms(0.99, steps=1)).resolved(evidence_of(runs=[readings]))
    assert not any(alarms(rule, [0.5] * 20))


def test_a_cusum_without_or_with_too_short_references_is_refused_with_the_number_required():
    rule = Cusum(FalseAlarms(0.05, steps=100))
    with pytest.raises(ValueError, match=r"FalseAlarms\(per_run=0.05, steps=100\) counts alarms in reference runs"):
        rule.resolved(evidence_of())
    white = np.exp(np.random.default_rng(7).normal(size=100))
    # 2τ = 1 and its standard error, sqrt(12/100), 100 times
    with pytest.raises(ValueError, match=r"a CUSUM by .* needs at least 135 readings of reference runs.*has 100"):
        rule.resolved(evidence_of(runs=[white]))
    with pytest.raises(ValueError, match=r"all readings of the reference runs are 0.2 eV/Å.*cannot tell"):
        rule.resolved(evidence_of(runs=[np.full(1000, 0.2)]))
    with pytest.raises(ValueError, match=r"a CUSUM by .* has no numbers yet.*reference runs"):
        rule.judge(None, 1.0, 0.0)


@pytest.mark.parametrize("criterion", [0.5, Quantile(0.9), None])
def test_a_cusum_of_anything_but_false_alarms_is_refused(criterion):
    with pytest.raises(TypeError, match=r"made from the false alarms that are allowed.*not from"):
        Cusum(criterion)


@pytest.mark.parametrize("drift", [0, -1, math.nan, math.inf])
def test_a_drift_that_is_not_positive_is_refused(drift):
    with pytest.raises(ValueError, match=r"drift of a Cusum is a positive number of standard deviations, not"):
        Cusum(FalseAlarms(0.05, steps=100), drift=drift)


# --- Criteria and levels ---------------------------------------------------------------------------------------------


def test_a_meaning_becomes_a_number_and_a_number_stays():
    threshold_data = evidence_of(np.arange(1, 101))
    number = Quantile(0.9).resolve(threshold_data)
    rule = Patience(Quantile(0.9), fs=5)
    assert rule.resolved(threshold_data) == Patience(number, fs=5)
    assert Threshold(0.5).resolved(threshold_data) == Threshold(0.5)
    assert AnyOf(rule, Threshold(200)).resolved(threshold_data) == AnyOf(Patience(number, fs=5), Threshold(200))
    assert AllOf(rule, Threshold(200)).resolved(threshold_data) == AllOf(Patience(number, fs=5), Threshold(200))
    assert Refractory(rule, 9).resolved(threshold_data) == Refractory(Patience(number, fs=5), 9)
    with pytest.raises(ValueError, match=r"Quantile\(0.9\) for 5 fs has no number yet.*calibration data"):
        rule.judge(None, 1.0, 0.0)


def test_a_number_for_each_element_is_that_of_its_own_data_or_of_all():
    rule, everything = Threshold(PerElement(Quantile(0.9))), evidence_of(np.arange(1, 101))
    enough, few = evidence_of(np.arange(1, 101) / 100), evidence_of([0.1, 0.2])
    assert rule.resolved(everything, enough) == Threshold(Quantile(0.9).resolve(enough))
    assert rule.resolved(everything, few) == Threshold(Quantile(0.9).resolve(everything))
    assert rule.resolved(everything) == Threshold(Quantile(0.9).resolve(everything))
    # A plain criterion in the same rule is one of all atoms.
    both = AnyOf(Patience(PerElement(Quantile(0.9)), 5), Threshold(Quantile(0.95)))
    found = both.resolved(everything, enough)
    assert [r.threshold for r in found.rules] == [Quantile(0.9).resolve(enough), Quantile(0.95).resolve(everything)]
    with pytest.raises(ValueError, match=r"Quantile\(0.9\) needs at least 10 calibration frames"):
        rule.resolved(few, few)


def test_numbers_of_any_make_and_things_that_become_one_are_thresholds():
    class Resolved:
        def __float__(self):
            return 0.5

    for value in (1, np.float32(0.5), np.float64(0.5), Resolved()):
        assert Threshold(value).threshold == float(value)


@pytest.mark.parametrize("value", [0, 0.0, -0.5, math.nan, -math.inf])
@pytest.mark.parametrize("make", [Threshold, lambda value: Patience(value, fs=1)])
def test_a_threshold_that_is_not_positive_is_refused(make, value):
    with pytest.raises(ValueError, match=r"positive number in eV/Å, not .*Quantile"):
        make(value)


@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_a_threshold_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"a number in eV/Å or a criterion.*not .* \((str|NoneType|list)\)"):
        Threshold(value)


@pytest.mark.parametrize("fs", [0, -1, math.nan, math.inf])
def test_times_that_are_not_positive_are_refused(fs):
    with pytest.raises(ValueError, match=r"patience is a positive time in fs, not .*Use Threshold"):
        Patience(0.5, fs)
    with pytest.raises(ValueError, match=r"a refractory time is a positive time in fs, not"):
        Refractory(Threshold(0.5), fs)


def test_rules_are_made_of_rules_only():
    with pytest.raises(TypeError, match=r"AnyOf takes rules such as Threshold\(0.5\), not 0.5"):
        AnyOf(Threshold(0.3), 0.5)
    with pytest.raises(ValueError, match=r"AllOf takes two rules or more, not 1"):
        AllOf(Threshold(0.3))
    with pytest.raises(TypeError, match=r"Refractory takes a rule such as Threshold\(0.3\), not 0.3"):
        Refractory(0.3, 5)


def test_rules_over_time_say_that_optimisers_have_no_time():
    with pytest.raises(ValueError, match=r"simulated time in fs, and an optimiser has none. Use Threshold\(0.5\)"):
        Patience(0.5, fs=20).judge(None, 0.0, None)
    with pytest.raises(ValueError, match=r"adds up over simulated time, and an optimiser has none. Use Threshold\(Fal"):
        CUSUM.judge(None, 0.0, None)
    with pytest.raises(ValueError, match=r"a refractory time.*an optimiser has none. Use a threshold of 0.3 without"):
        Refractory(Threshold(0.3), 5).judge(None, 0.0, None)


@pytest.mark.parametrize(
    ("rule", "at_once"),
    [
        (Threshold(0.5), 0.5),
        (Patience(0.5, fs=2), INF),
        (CUSUM, INF),
        (AnyOf(Patience(0.5, fs=2), Threshold(1.5)), 1.5),
        (AllOf(Threshold(0.5), Threshold(1.0)), 1.0),
        (Refractory(Threshold(0.5), fs=3), 0.5),
    ],
)
def test_from_this_reading_on_a_rule_triggers_at_the_first_step(rule, at_once):
    assert rule.at_once == at_once
    if at_once < INF:
        assert rule.judge(None, at_once, 0.0)[1]
        assert not rule.judge(None, at_once * 0.99, 0.0)[1]
    else:
        assert not rule.judge(None, 1.0, 0.0)[1]
