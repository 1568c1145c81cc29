"""Thresholds in words mean the same in Python as on the command line."""

import numpy as np
import pytest

from ase_uq import ErrorBound, FalseAlarms, MissRate, Quantile, WatchPolicy
from ase_uq.dynamics.rules import Patience, Refractory, Threshold
from ase_uq.thresholds.levels import as_level, level_of

WORDS = {
    "q0.99": Quantile(0.99),
    "q.5": Quantile(0.5),
    "miss=0.1@0.3": MissRate(0.3, 0.1),
    "bound=0.95@0.3": ErrorBound(0.3, 0.95),
    "alarms=0.05@100ps": FalseAlarms(0.05, ps=100),
}


@pytest.mark.parametrize(("words", "criterion"), WORDS.items(), ids=WORDS)
def test_rules_and_policies_take_words(words: str, criterion: object):
    assert level_of(words) == as_level(words) == criterion
    assert Threshold(words) == Threshold(criterion)
    assert Patience(words, fs=20) == Patience(criterion, fs=20)
    for policy in (WatchPolicy(flag=words), WatchPolicy(flag=words, refractory=5), WatchPolicy(halt=words, patience=5)):
        (rule,) = policy.rules.values()
        assert rule.criteria == (criterion,)
    rule = WatchPolicy(halt=0.1, patience=9, at_once=words).rules["halt"]
    assert rule.criteria == (criterion,)
    assert Refractory(Threshold(words), 5).criteria == (criterion,)


@pytest.mark.parametrize("level", [0.5, np.float32(2), Quantile(0.9), None, "hot", "0.5", "quick"])
def test_all_else_is_left_as_it_is(level: object):
    assert as_level(level) is level


@pytest.mark.parametrize("words", ["q1.5", "q0.9.9", "miss=0.1", "alarms=5@100ps", "bound=95@0.3"])
def test_words_of_a_criterion_that_is_none(words: str):
    for use in (as_level, Threshold, lambda words: WatchPolicy(halt=words)):
        with pytest.raises(
            ValueError, match=f"'{words}' is neither a number in eV/Å nor a criterion: .* Give one of 0.5"
        ):
            use(words)
