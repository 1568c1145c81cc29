"""Rules are pure functions, so most of this is a table of cases."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ase_uq.dynamics import Patience, Rule, Threshold
from ase_uq.dynamics.rules import as_rule, rules_of_levels
from ase_uq.thresholds import Quantile

READINGS = st.lists(st.floats(0, 2) | st.just(math.nan) | st.just(math.inf), max_size=40)
LEVELS = st.floats(0.01, 2)


def alarms(rule: Rule, readings, dt: float = 1.0) -> list[bool]:
    state, triggered = None, []
    for step, reading in enumerate(readings):
        # Through JSON at every step: a state that does not survive it could not be restarted.
        state, now = rule.judge(json.loads(json.dumps(state)), reading, step * dt)
        triggered.append(now)
    return triggered


def first(triggered: list[bool]) -> float:
    return triggered.index(True) if True in triggered else math.inf


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


@given(READINGS, LEVELS, st.floats(0.5, 10))
def test_the_same_readings_give_the_same_alarms_and_the_past_does_not_know_the_future(readings, value, fs):
    rule = Patience(value, fs)
    whole = alarms(rule, readings)
    assert alarms(rule, readings) == whole
    assert alarms(rule, readings[: len(readings) // 2]) == whole[: len(readings) // 2]


def test_a_meaning_becomes_a_number_and_a_number_stays():
    rule = Patience(Quantile(0.9), fs=5)
    assert rule.resolved(lambda meaning: 0.25) == Patience(0.25, fs=5)
    assert Threshold(Quantile(0.9)).resolved(lambda meaning: meaning.q) == Threshold(0.9)
    assert Threshold(0.5).resolved(lambda meaning: 0.1) == Threshold(0.5)
    with pytest.raises(ValueError, match=r"Quantile\(0.9\) for 5 fs has no number yet.*calibration data"):
        rule.judge(None, 1.0, 0.0)


def test_numbers_of_any_make_and_things_that_become_one_are_thresholds():
    class Resolved:
        def __float__(self):
            return 0.5

    for value in (1, np.float32(0.5), np.float64(0.5), Resolved()):
        assert Threshold(value).threshold == float(value)


def test_levels_are_given_as_numbers_meanings_or_rules():
    assert as_rule(0.5) == Threshold(0.5)
    assert as_rule(Quantile(0.9)) == Threshold(Quantile(0.9))
    assert as_rule(Patience(0.5, 3)) == Patience(0.5, 3)
    assert rules_of_levels(0.5, 0.3, 20) == {"flag": Threshold(0.3), "halt": Patience(0.5, 20)}
    assert list(rules_of_levels(0.5, 0.3, None)) == ["flag", "halt"]


@pytest.mark.parametrize("value", [0, 0.0, -0.5, math.nan, -math.inf])
@pytest.mark.parametrize("make", [Threshold, lambda value: Patience(value, fs=1)])
def test_a_threshold_that_is_not_positive_is_refused(make, value):
    with pytest.raises(ValueError, match=r"positive number in eV/Å, not .*Quantile"):
        make(value)


@pytest.mark.parametrize("value", ["0.5", None, [0.5]])
def test_a_threshold_that_is_no_number_is_refused(value):
    with pytest.raises(TypeError, match=r"a number in eV/Å or a meaning.*not .* \((str|NoneType|list)\)"):
        Threshold(value)


@pytest.mark.parametrize("fs", [0, -1, math.nan, math.inf])
def test_patience_that_is_not_positive_is_refused(fs):
    with pytest.raises(ValueError, match=r"patience is a positive time in fs, not .*Use Threshold"):
        Patience(0.5, fs)


def test_patience_says_that_optimisers_have_no_time():
    with pytest.raises(ValueError, match=r"fs of simulated time, and an optimiser has none. Use Threshold\(0.5\)"):
        Patience(0.5, fs=20).judge(None, 0.0, None)


def test_levels_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"nothing to watch for. Give halt, flag or both"):
        rules_of_levels(None, None, None)
    with pytest.raises(ValueError, match=r"patience belongs to halt, which is not given.*flag=Patience"):
        rules_of_levels(None, 0.3, 20)
    with pytest.raises(ValueError, match=r"halt is already a rule, a threshold of 0.5\. Leave patience out"):
        rules_of_levels(Threshold(0.5), None, 20)
