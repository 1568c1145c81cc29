"""From σ of the force components to one number a frame."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from ase_uq.thresholds.reduction import Reduction, atom_norms, readings_of

NUMBERS = np.array([6, 1, 1, 8, 1])
NORMS = np.array([0.5, 0.1, 0.2, 0.9, 0.3])
KINDS = ["max", "mean", "top3", 0.5, 0.9]


def test_the_norm_of_an_atom_is_that_of_its_three_components():
    np.testing.assert_allclose(atom_norms(np.array([[3.0, 4.0, 0.0], [1.0, 1.0, 1.0]])), [5, math.sqrt(3)])
    assert atom_norms(np.zeros((0, 3))).shape == (0,)


@pytest.mark.parametrize(
    ("reduction", "reading"),
    [
        (Reduction(), 0.9),
        (Reduction("mean"), 0.4),
        (Reduction("top3"), (0.9 + 0.5 + 0.3) / 3),
        (Reduction(0.5), 0.3),
        (Reduction(0.25), 0.2),
        (Reduction(elements=("H",)), 0.3),
        (Reduction("mean", elements=("H", "C")), 0.275),
        (Reduction(indices=(0, 1)), 0.5),
        (Reduction("top3", indices=(1, 2)), 0.15),  # the mean of those there are
        (Reduction(elements=("H",), indices=(0, 1)), 0.1),
        (Reduction(indices=(-1,)), 0.3),
        (Reduction(elements=("Fe",)), -math.inf),
        (Reduction(indices=()), -math.inf),
    ],
)
def test_the_reading_of_each_reduction(reduction, reading):
    assert reduction(NORMS, NUMBERS) == pytest.approx(reading)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_is_never_hidden(kind):
    assert math.isnan(Reduction(kind)(np.array([0.1, math.nan, 0.3, 0.2]), np.ones(4)))
    assert math.isnan(Reduction(kind)(np.array([0.1, math.nan, math.inf, 0.2]), np.ones(4)))


@pytest.mark.parametrize("kind", ["max", "mean", "top3"])
def test_one_infinite_atom_makes_the_reading_infinite(kind):
    assert Reduction(kind)(np.array([0.1, math.inf, 0.3]), np.ones(3)) == math.inf


def test_a_quantile_next_to_infinity_is_a_number():
    norms = np.array([1.0, 2.0, math.inf])
    assert Reduction(0.5)(norms, np.ones(3)) == 2
    assert Reduction(0.6)(norms, np.ones(3)) == math.inf
    assert Reduction(0.9)(np.full(3, math.inf), np.ones(3)) == math.inf


@given(arrays(float, st.integers(1, 20), elements=st.floats(0, 10)), st.sampled_from(KINDS), st.randoms())
def test_the_order_of_the_atoms_does_not_matter_and_the_reading_lies_within_them(norms, kind, random):
    reading = Reduction(kind)(norms, np.ones(len(norms)))
    shuffled = norms.tolist()
    random.shuffle(shuffled)
    assert Reduction(kind)(np.array(shuffled), np.ones(len(norms))) == pytest.approx(reading)
    assert norms.min() - 1e-9 <= reading <= norms.max() + 1e-9


@given(arrays(float, 6, elements=st.floats(0, 10)), st.integers(0, 5), st.floats(0, 5), st.sampled_from(KINDS))
def test_a_larger_atom_never_lowers_the_reading(norms, atom, more, kind):
    larger = norms.copy()
    larger[atom] += more
    reduction = Reduction(kind)
    assert reduction(larger, np.ones(6)) >= reduction(norms, np.ones(6)) - 1e-9


def test_readings_of_many_frames_are_those_of_each():
    frames = [NORMS, NORMS[:2], NORMS[3:]]
    numbers = [NUMBERS, NUMBERS[:2], NUMBERS[3:]]
    reduction = Reduction("mean", elements=("H",))
    together = readings_of(np.concatenate(frames), np.concatenate(numbers), [5, 2, 2], reduction)
    np.testing.assert_array_equal(together, [reduction(a, b) for a, b in zip(frames, numbers, strict=True)])
    assert readings_of(np.zeros(0), np.zeros(0), [], reduction).shape == (0,)


@pytest.mark.parametrize("kind", ["median", "", 0, 1, 0.0, 1.0, 95, -0.5, math.nan, True, None])
def test_other_reductions_are_refused(kind):
    with pytest.raises(ValueError, match=r"a reduction is 'max', 'mean', 'top3' or a quantile between 0 and 1, not"):
        Reduction(kind)


def test_elements_and_indices_that_do_not_exist_are_refused():
    with pytest.raises(ValueError, match=r"'Xq' is not a chemical symbol"):
        Reduction(elements=("C", "Xq"))
    with pytest.raises(IndexError, match=r"atom index 9 is beyond the frame's 5 atoms"):
        Reduction(indices=(0, 9))(NORMS, NUMBERS)
