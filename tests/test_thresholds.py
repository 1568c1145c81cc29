"""What a threshold means in terms of the calibration data."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ase_uq.dynamics import Meaning
from ase_uq.thresholds import Quantile


def test_a_quantile_is_where_that_fraction_of_the_frames_lies_below():
    readings = np.random.default_rng(0).permutation(1000) / 1000
    for q in (0.1, 0.5, 0.9, 0.99, 0.999):
        assert np.mean(readings < Quantile(q).resolve(readings)) == pytest.approx(q, abs=1e-3)


@given(st.floats(0.01, 0.9), st.floats(0.01, 0.9))
def test_a_higher_quantile_is_a_higher_threshold(low, high):
    low, high = sorted((low, high))
    readings = np.random.default_rng(1).gamma(2, size=50)
    assert Quantile(low).resolve(readings) <= Quantile(high).resolve(readings)


def test_frames_without_a_reading_are_left_out():
    readings = np.arange(10.0)
    with_gaps = np.concatenate([readings, [math.inf, -math.inf, math.nan]])
    assert Quantile(0.5).resolve(with_gaps) == Quantile(0.5).resolve(readings) == 4.5


@pytest.mark.parametrize(("q", "needed"), [(0.5, 2), (0.9, 10), (0.99, 100), (0.999, 1000)])
def test_too_few_frames_to_know_the_quantile_are_refused(q, needed):
    Quantile(q).resolve(np.arange(float(needed)))
    with pytest.raises(
        ValueError, match=rf"Quantile\({q}\) needs at least {needed} calibration frames.*has {needed - 1}"
    ):
        Quantile(q).resolve(np.arange(needed - 1.0))


@pytest.mark.parametrize("q", [0, 1, -0.1, 1.5, 99, math.nan])
def test_a_quantile_outside_0_and_1_is_refused(q):
    with pytest.raises(ValueError, match=r"a quantile lies between 0 and 1, not at"):
        Quantile(q)


def test_a_quantile_is_a_meaning_that_rules_understand():
    assert isinstance(Quantile(0.9), Meaning)
