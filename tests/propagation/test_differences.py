"""Differences and barriers have the error bars of the members that all structures share."""

import numpy as np
import pytest
from ase import Atoms

from ase_uq import propagation
from ase_uq.errors import InputError
from ase_uq.io.results import annotated


def frame(energy: float, members: np.ndarray, number: int = 0) -> Atoms:
    members = energy + members - members.mean()
    results = {"energy": energy, "energy_uncertainty": members.std(), "energy_ensemble": members}
    return annotated(Atoms("H", [(number, 0, 0)]), results)


@pytest.fixture
def draws() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(3, 20_000))


def test_a_difference_is_that_of_its_terms(draws: np.ndarray):
    common, own = draws[0], 0.3 * draws[1]
    found = propagation.difference((1, frame(2.0, common + own)), (-1, frame(0.5, common)))
    assert found.value == 1.5
    assert found.std == pytest.approx(own.std(), rel=0.02)
    assert found.independent == pytest.approx(np.hypot((common + own).std(), common.std()))
    assert found.members.shape == (20_000,)
    assert str(found) == f"1.5000 ± {found.std:.4f} eV ({found.independent:.4f} if errors were independent)"


def test_errors_that_are_independent_add_up(draws: np.ndarray):
    found = propagation.difference((1, frame(0.0, draws[0])), (-2, frame(0.0, draws[1])))
    assert found.std == pytest.approx(found.independent, rel=0.03)
    assert found.independent == pytest.approx(5**0.5, rel=0.02)


def test_a_structure_minus_itself_is_certain(draws: np.ndarray):
    atoms = frame(-7000.0, draws[0])
    assert propagation.difference((1, atoms), (-1, atoms)).std == 0


def test_the_top_of_a_barrier_is_each_members_own(draws: np.ndarray):
    """Two tops of the same height: whichever a member takes for the higher one counts."""
    images = [frame(0.0, 0 * draws[0], 0), frame(1.0, 0.1 * draws[0], 1), frame(1.0, 0.1 * draws[1], 2)]
    found = propagation.barrier(images)
    assert found.value == 1.0
    expected = np.maximum(1 + 0.1 * (draws[0] - draws[0].mean()), 1 + 0.1 * (draws[1] - draws[1].mean()))
    np.testing.assert_allclose(found.members, expected)
    assert found.std == pytest.approx(np.sqrt(np.mean((expected - 1) ** 2)))
    # Of the larger of two, about 1: E[max²] = 1 for standard normal draws.
    assert found.std == pytest.approx(0.1, rel=0.03)


def test_a_path_that_only_falls_has_no_barrier(draws: np.ndarray):
    images = [frame(-float(n), 1e-3 * draws[0], n) for n in range(3)]
    found = propagation.barrier(images)
    assert (found.value, found.std, found.independent) == (0, 0, 0)


def test_too_little_is_refused(draws: np.ndarray):
    atoms = frame(0.0, draws[0])
    with pytest.raises(ValueError, match=r"two terms or more, and 1 was given: difference\(\(1, b\), \(-1, a\)\)"):
        propagation.difference((1, atoms))
    with pytest.raises(ValueError, match=r"coefficients are finite numbers, not \[nan, 1\.0\]"):
        propagation.difference((np.nan, atoms), (1, atoms))
    with pytest.raises(ValueError, match="three images or more, and 2 were given"):
        propagation.barrier([atoms, atoms])


def test_frames_without_members_are_named(draws: np.ndarray):
    bare, other = Atoms("H"), frame(0.0, draws[0][:8])
    with pytest.raises(InputError, match=r"frame 1 has no energy_ensemble of its own\. Calculate it with Uncertain"):
        propagation.difference((1, frame(0.0, draws[0])), (-1, bare))
    with pytest.raises(InputError, match=r"frame 1 has 8 members, frame 0 has 20000: calculate all frames with one"):
        propagation.difference((1, frame(0.0, draws[0])), (-1, other))


def test_results_of_another_structure_do_not_count(draws: np.ndarray):
    moved = frame(0.0, draws[0])
    moved.positions += 1
    with pytest.raises(InputError, match="frame 0 has no energy_ensemble of its own"):
        propagation.difference((1, moved), (-1, frame(0.0, draws[0])))
