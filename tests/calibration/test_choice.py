"""Which form is taken, on which folds, and what it is worth: coverage by simulation."""

import numpy as np
import pytest
import torch
from scipy.stats import binom, norm

from ase_uq.calibration import AffineCalibrator, PowerCalibrator, Residuals, fit_affine, fit_calibrator, mean_nll
from ase_uq.calibration.choice import _FOLDS


def simulated(form: str, seed: int = 0, n_frames: int = 200, n_atoms: int = 10) -> tuple[Residuals, np.ndarray]:
    """Rows whose variance is affine or a power of their first score, and their residuals (n, 3)."""
    random = np.random.default_rng(seed)
    count = n_frames * n_atoms
    scores = random.lognormal(sigma=1.5, size=(count, 2))
    u = scores[:, 0]
    variance = {"affine": 0.5 + 2 * u, "power": 0.8 * u**0.4, "constant": np.ones(count)}[form]
    residuals = random.normal(size=(count, 3)) * np.sqrt(variance)[:, None]
    return Residuals(scores, (residuals**2).sum(1), 3, np.repeat(np.arange(n_frames), n_atoms)), residuals


def test_affine_data_choose_the_affine_form():
    choice = fit_calibrator(simulated("affine")[0])
    assert isinstance(choice.calibrator, AffineCalibrator)
    assert choice.calibrator.column == 0
    assert min(choice.nll, key=lambda name: choice.nll[name]) == "affine[0]"


def test_power_data_choose_the_power_law():
    choice = fit_calibrator(simulated("power")[0])
    assert isinstance(choice.calibrator, PowerCalibrator)
    assert choice.calibrator.powers == pytest.approx((0.4, 0.0), abs=0.05)


def test_all_forms_and_the_constant_are_reported():
    residuals, _ = simulated("affine")
    choice = fit_calibrator(residuals)
    assert set(choice.nll) == {"power", "affine[0]", "affine[1]"}
    assert choice.nll["affine[0]"] < choice.constant_nll
    assert (choice.n_rows, choice.n_groups) == (2000, 200)
    # Fitted on all rows, not on the last fold's.
    assert choice.calibrator == fit_affine(residuals, 0)


def test_likelihoods_are_those_of_left_out_frames():
    residuals, _ = simulated("affine", n_frames=10)
    folds = np.arange(10) // 2
    total = 0.0
    for k in range(5):
        inside = np.isin(residuals.groups, np.flatnonzero(folds == k))
        left_out = residuals.only(inside)
        calibrator = fit_affine(residuals.only(~inside), 1)
        variance = calibrator.variance(torch.from_numpy(left_out.scores)).numpy()
        total += mean_nll(variance, left_out) * inside.sum()
    assert fit_calibrator(residuals).nll["affine[1]"] == pytest.approx(total / 100, rel=1e-12)


def test_folds_are_contiguous_in_the_frames(monkeypatch: pytest.MonkeyPatch):
    """Neighbours of one trajectory stay together, whatever the order of the rows."""
    seen: list[np.ndarray] = []
    only = Residuals.only

    def watched(self: Residuals, chosen: np.ndarray) -> Residuals:
        seen.append(np.unique(self.groups[chosen]))
        return only(self, chosen)

    monkeypatch.setattr(Residuals, "only", watched)
    residuals, _ = simulated("affine", n_frames=23)
    order = np.random.default_rng(0).permutation(len(residuals.squares))
    fit_calibrator(only(residuals, order))
    left_out = {tuple(groups) for groups in seen if len(groups) < 10}
    assert len(left_out) == _FOLDS
    assert sorted(sum(left_out, ())) == list(range(23))
    assert all(np.diff(groups).max() == 1 for groups in left_out)


def test_group_numbers_need_not_be_consecutive():
    residuals, _ = simulated("affine", n_frames=20)
    scattered = Residuals(residuals.scores, residuals.squares, 3, residuals.groups * 7 + 3)
    assert fit_calibrator(scattered).nll == fit_calibrator(residuals).nll


def test_too_few_frames_are_refused():
    residuals, _ = simulated("affine", n_frames=4)
    with pytest.raises(ValueError, match="calibration needs at least 5 frames, but 4 were given"):
        fit_calibrator(residuals)


@pytest.mark.parametrize("form", ["affine", "power", "constant"])
@pytest.mark.parametrize("level", [0.68, 0.90, 0.95])
def test_calibrated_intervals_hold_what_they_should(form: str, level: float):
    choice = fit_calibrator(simulated(form, seed=1, n_frames=1000)[0])
    fresh, residuals = simulated(form, seed=2, n_frames=300)
    sigma = np.sqrt(choice.calibrator.variance(torch.from_numpy(fresh.scores)).numpy())
    inside = np.abs(residuals) < norm.ppf((1 + level) / 2) * sigma[:, None]
    # The 9000 components are independent: a binomial count, in its central 99.99 % (of nine tests), widened by
    # 0.5 % for the calibrator, which 10 000 atoms know to about that.
    low, high = np.array(binom.interval(0.9999, inside.size, level)) / inside.size
    assert low - 0.005 < inside.mean() < high + 0.005


@pytest.mark.parametrize("form", ["affine", "power"])
def test_calibrated_scores_have_unit_mean_square_on_fresh_frames(form: str):
    choice = fit_calibrator(simulated(form, seed=1, n_frames=1000)[0])
    fresh, residuals = simulated(form, seed=2, n_frames=1000)
    z = residuals / np.sqrt(choice.calibrator.variance(torch.from_numpy(fresh.scores)).numpy())[:, None]
    # Standard error of the mean of 30 000 squares: sqrt(2/30000) = 0.008, twice for fit and test; four of them.
    assert (z**2).mean() == pytest.approx(1, abs=0.045)


def test_likelihood_is_least_at_the_true_variance():
    residuals, _ = simulated("affine")
    truth = 0.5 + 2 * residuals.scores[:, 0]
    own = mean_nll(truth, residuals)
    assert all(mean_nll(truth * factor, residuals) > own for factor in (0.5, 0.8, 1.25, 2.0))
