"""Averages over a trajectory have the error bars of what they would be in the ensemble of each member."""

from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from scipy import stats

from ase_uq import propagation
from ase_uq.errors import InputError
from ase_uq.io.results import annotated

KELVIN = 300.0


def frames_of(energies: np.ndarray, members: np.ndarray) -> list[Atoms]:
    """`members` (n, M) are deviations of energies, eV."""
    return [
        annotated(Atoms("H", [(n, 0, 0)]), {"energy": e, "energy_uncertainty": 1.0, "energy_ensemble": e + m})
        for n, (e, m) in enumerate(zip(energies, members, strict=True))
    ]


def linear(n_frames: int, n_members: int, size: float, seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, an observable that goes with the first, and deviations that are linear in them."""
    rng = np.random.default_rng(seed)
    features = rng.normal(size=(n_frames, 3))
    weights = size * units.kB * KELVIN * rng.normal(size=(3, n_members))
    return features, features[:, 0] + 0.1 * rng.normal(size=n_frames), features @ weights


def test_the_error_bar_is_that_of_the_closed_form():
    """Var ⟨a⟩ = β² cᵀ S c with c the covariance of the observable and the features: the limit of many members."""
    features, values, deviations = linear(400, 20_000, 0.05)
    found = propagation.average(frames_of(np.zeros(400), deviations), values, KELVIN)
    covariance = np.cov(np.column_stack([values, features]).T, ddof=0)[0, 1:]
    variance = 0.05**2 * covariance @ covariance  # S = (0.05 kT)² times the unit matrix
    assert found.value == pytest.approx(values.mean())
    assert found.std == pytest.approx(variance**0.5, rel=0.02)


def test_the_cumulant_is_the_first_order_of_the_reweighted():
    _, values, deviations = linear(300, 32, 1e-3)
    frames = frames_of(np.zeros(300), deviations)
    one, other = (propagation.average(frames, values, KELVIN, by=by) for by in ("cumulant", "reweighted"))
    np.testing.assert_allclose(one.members - one.value, other.members - other.value, atol=2e-5)
    assert one.std > 5e-4


def test_reweighting_gives_the_average_of_the_other_ensemble():
    """A harmonic well of another stiffness: ⟨x²⟩ = kT/k is known."""
    rng = np.random.default_rng(1)
    kt, stiff = units.kB * KELVIN, 2.0
    x = rng.normal(scale=(kt / stiff) ** 0.5, size=2_000)
    members = np.array([0.9, 1.0, 1.1, 1.2]) * stiff
    deviations = 0.5 * (members - stiff) * x[:, None] ** 2
    found = propagation.average(frames_of(0.5 * stiff * x**2, deviations), x**2, KELVIN, by="reweighted")
    np.testing.assert_allclose(found.members, kt / members, rtol=0.1)


@pytest.mark.parametrize("by", ["cumulant", "reweighted"])
def test_the_mean_energy_is_that_of_each_member_in_its_own_ensemble(by: Any):
    """In harmonic wells it is kT/2 above the minimum, whatever the stiffness: only the minimum of a member counts."""
    kt, stiff = units.kB * KELVIN, 2.0
    x = stats.norm.ppf((np.arange(4_000) + 0.5) / 4_000, scale=(kt / stiff) ** 0.5)
    minima, softer = np.array([0.0, 0.1, -0.3, 0.02]), np.array([0.98, 1.02, 0.99, 1.0]) * stiff
    energies = -500 + 0.5 * stiff * x**2
    frames = frames_of(energies, minima + 0.5 * (softer - stiff) * x[:, None] ** 2)
    found = propagation.average(frames, "energy", KELVIN, by=by)
    assert found.value == pytest.approx(-500 + kt / 2, abs=1e-4)
    np.testing.assert_allclose(found.members - found.value, minima, atol=1e-5)  # its stiffness alone would be 2.6e-4
    assert found.std == pytest.approx(np.sqrt(np.square(minima).mean()), rel=1e-3)


def test_a_shift_of_a_member_changes_nothing():
    _, values, deviations = linear(50, 8, 0.1)
    plain, shifted = (
        propagation.average(frames_of(np.zeros(50), deviations + shift), values, KELVIN) for shift in (0.0, 3.0)
    )
    np.testing.assert_allclose(plain.members, shifted.members, rtol=1e-6)
    assert plain.effective_frames == pytest.approx(shifted.effective_frames)


def test_observables_may_be_many():
    _, values, deviations = linear(50, 8, 0.1)
    several = np.column_stack([values, 2 * values])
    found = propagation.average(frames_of(np.zeros(50), deviations), several, KELVIN)
    assert (found.value.shape, found.std.shape, found.members.shape) == ((2,), (2,), (8, 2))
    assert found.std[1] == pytest.approx(2 * found.std[0])


def test_members_that_would_have_gone_elsewhere_are_refused():
    _, values, deviations = linear(100, 8, 8.0)
    with pytest.raises(InputError, match=r"that \d\.\d of 100 frames would count, and at least 10 must"):
        propagation.average(frames_of(np.zeros(100), deviations), values, KELVIN)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0}, "lies above 0 K, not at 0"),
        ({"temperature": float("nan")}, "lies above 0 K, not at nan"),
        ({"values": [1.0]}, r"a value of each: 20 frames and values of shape \(1,\) were given"),
        ({"values": 1.0}, r"values of shape \(\) were given"),
        ({"values": [1.0] * 19 + [np.inf]}, "the value of frame 19 is not finite"),
        ({"values": "volume"}, "values are numbers, or 'energy', not 'volume'"),
        ({"by": "magic"}, "by 'cumulant' or 'reweighted', not by 'magic'"),
    ],
)
def test_what_makes_no_sense_is_refused(change: dict[str, Any], message: str):
    _, values, deviations = linear(20, 8, 0.01)
    options = {"values": values, "temperature": KELVIN} | change
    with pytest.raises(ValueError, match=message):
        propagation.average(frames_of(np.zeros(20), deviations), **options)


def test_where_the_truth_is_a_draw_averages_are_covered_as_promised(monkeypatch: pytest.MonkeyPatch):
    """The true potential differs from ours by one draw of the weights; its average is known by exact reweighting."""
    rng = np.random.default_rng(3)
    n_worlds, kt, frames = 400, units.kB * KELVIN, [Atoms()] * 200
    z = []
    for _ in range(n_worlds):
        features = rng.normal(size=(200, 3))
        values = features @ rng.normal(size=3)
        truth, members = (0.05 * kt * features @ rng.normal(size=(3, n)) for n in (1, 128))
        weights = np.exp(-truth[:, 0] / kt)
        monkeypatch.setattr("ase_uq.propagation.averages.energies_of", lambda _, m=members: (np.zeros(200), m))
        found = propagation.average(frames, values, KELVIN, by="reweighted")
        z.append((weights @ values / weights.sum() - found.value) / found.std)
    for level in (0.68, 0.90, 0.95):
        inside = (np.abs(z) <= stats.norm.ppf(0.5 + level / 2)).sum()
        low, high = stats.binom.interval(0.999, n_worlds, level)
        assert low <= inside <= high
