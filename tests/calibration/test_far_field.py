"""log σ² between the calibration frames and where nothing is known: both ends, another optimiser, known truths."""

import json
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import minimize

from ase_uq.calibration import FarFieldCalibrator, Residuals, far_field_choice, fit_far_field, load_calibrator
from ase_uq.calibration.far_field import _Loss

FAR = np.log([1e4, 3e3])


def simulated(
    seed: int = 0, *, slope: float = 1.0, shares: tuple[float, ...] = (0.8, 0.2), n_frames: int = 300, n_atoms: int = 10
) -> Residuals:
    """Rows that obey the law with σ = 0.05 eV/Å at the calibration frames."""
    random = np.random.default_rng(seed)
    count = n_frames * n_atoms
    scores = random.lognormal(sigma=1.5, size=(count, 2))
    limits = random.lognormal(1.0, 0.5, count)
    way = ((np.log(scores) - np.log(scores).mean(0)) / (FAR - np.log(scores).mean(0))) @ np.array(shares) * slope
    constant = np.log(0.05**2)
    far = np.where(way > 0, np.log(limits), np.log(limits).mean())
    variance = np.exp(constant + (far - constant) * np.minimum(way, 1))
    residuals = random.normal(size=(count, 3)) * np.sqrt(variance)[:, None]
    return Residuals(scores, (residuals**2).sum(1), 3, np.repeat(np.arange(n_frames), n_atoms), limits)


def fitted(residuals: Residuals) -> FarFieldCalibrator:
    found = fit_far_field(residuals, FAR)
    assert found is not None
    return found


def shares_of(found: FarFieldCalibrator) -> np.ndarray:
    """τ w_k: how much of the way each score makes."""
    return np.array(found.slopes) * (np.array(found.far) - found.near)


class TestEnds:
    def test_where_the_calibration_frames_are_it_is_the_constant(self):
        found = fitted(simulated())
        scores = torch.tensor([found.near], dtype=torch.float64).exp()
        limit = torch.tensor([7.0], dtype=torch.float64)
        assert found.way(scores).item() == pytest.approx(0, abs=1e-12)
        assert found.variance(scores, limit).item() == pytest.approx(np.exp(found.constant))

    @given(factor=st.floats(1.001, 1e12), limit=st.floats(1e-2, 1e6))
    def test_beyond_the_far_scores_it_is_the_limit_and_no_more(self, factor: float, limit: float):
        found = FarFieldCalibrator(
            -6.0, tuple((1 / (FAR - 0.5) * [0.7, 0.3]).tolist()), (0.5, 0.5), tuple(FAR.tolist()), 0.0, (1e-3, 1e-3)
        )
        scores = torch.tensor(np.exp(FAR) * factor)[None]
        assert found.way(scores).item() == pytest.approx(1)
        assert found.variance(scores, torch.tensor([limit], dtype=torch.float64)).item() == pytest.approx(limit)

    def test_a_score_below_all_of_the_calibration_rows_counts_as_the_smallest_of_them(self):
        found = fitted(simulated())
        limit = torch.ones(2, dtype=torch.float64)
        scores = torch.tensor([found.floors, (1e-9, 1e-9)], dtype=torch.float64)
        smallest, below = found.variance(scores, limit).tolist()
        assert below == smallest


class TestFit:
    def test_finds_the_law_that_made_the_residuals(self):
        found = fitted(simulated())
        assert shares_of(found) == pytest.approx([0.8, 0.2], abs=0.12)
        assert np.exp(found.constant / 2) == pytest.approx(0.05, rel=0.03)

    @pytest.mark.parametrize("seed", range(3))
    def test_is_the_optimum_that_another_method_finds(self, seed: int):
        rows = simulated(seed, n_frames=40)
        found = fitted(rows)
        assert rows.limits is not None
        logs, squares = np.log(np.maximum(rows.scores, found.floors)), rows.squares / 3
        width = 0.05 / (1 - np.quantile(((logs - found.near) / (FAR - found.near)).mean(1), 0.99))

        def loss(constant: float, slope: float, share: float) -> float:
            way = np.minimum(slope * ((logs - found.near) / (FAR - found.near)) @ [share, 1 - share], 1)
            limits = np.where(way > 0, np.log(rows.limits), np.log(rows.limits).mean())
            log_variance = constant + (limits - constant) * way
            likelihood = 40 * 0.5 * np.mean(log_variance + squares * np.exp(-log_variance))
            prior = 0.5 * (np.log(slope) / width) ** 2 - np.mean(np.log(np.array([share, 1 - share]) + 1e-3))
            return likelihood + prior

        other = minimize(
            lambda x: loss(x[0], min(np.exp(x[1]), 1), 1 / (1 + np.exp(-x[2]))),
            [np.log(squares.mean()), -0.01, 0.0],
            method="Nelder-Mead",
            options={"xatol": 1e-9, "fatol": 1e-12, "maxiter": 5000, "maxfev": 5000},
        )
        slope = shares_of(found).sum()
        assert loss(found.constant, slope, shares_of(found)[0] / slope) <= other.fun + 1e-6

    @pytest.mark.parametrize("limit", [0.0, 3.0])
    @pytest.mark.parametrize("log_slope", [-0.3, 0.3])
    def test_the_slope_of_what_is_minimised_is_that_of_finite_differences(self, log_slope: float, limit: float):
        random = np.random.default_rng(0)
        limits = limit + random.normal(size=50)
        loss = _Loss(random.normal(0.4, 0.5, (50, 3)), random.chisquare(3, 50), limits, 7, -0.1, 0.2)
        x = np.concatenate([[0.2, log_slope], random.normal(size=3)])
        numeric = [(loss(x + h)[0] - loss(x - h)[0]) / 2e-6 for h in 1e-6 * np.eye(5)]
        np.testing.assert_allclose(loss(x)[1], numeric, rtol=1e-5, atol=1e-7)

    def test_a_gentle_slope_near_the_data_hardly_changes_how_far_the_way_goes(self):
        few = simulated(slope=0.5, n_frames=12)
        assert 0.85 < shares_of(fitted(few)).sum() <= 1

    def test_the_way_is_never_longer_than_whole(self):
        assert shares_of(fitted(simulated(slope=2.0))).sum() <= 1 + 1e-9

    def test_a_score_that_hardly_grows_on_the_way_takes_no_part(self):
        rows = simulated()
        rows.scores[:, 1] = 1 + 0.1 * rows.scores[:, 1] / rows.scores[:, 1].max()
        found = fit_far_field(rows, np.array([FAR[0], 0.1]))
        assert found is not None
        assert found.slopes[0] > 0
        assert found.slopes[1] == 0

    def test_frames_that_reach_the_end_themselves_decide_how_far_the_way_goes(self):
        random = np.random.default_rng(0)
        scores = np.exp(random.uniform(0, FAR[0] * 2, (2000, 1)))
        residuals = 0.3 * random.normal(size=(2000, 3))  # far below σ∞, wherever they are
        rows = Residuals(scores, (residuals**2).sum(1), 3, np.arange(2000) // 10, np.full(2000, 9.0))
        found = fit_far_field(rows, FAR[:1])
        assert found is not None
        assert found.slopes[0] * (FAR[0] - found.near[0]) < 0.2

    def test_nothing_is_known_only_beyond_the_calibration_frames(self):
        rows = simulated()
        found = fit_far_field(rows, np.log(rows.scores).mean(0) - 1)
        assert found is not None
        assert found.far == pytest.approx(np.quantile(np.log(rows.scores), 0.99, axis=0))

    def test_a_larger_limit_never_makes_less_of_it(self):
        found = fitted(simulated())
        scores = torch.logspace(-3, 6, 50, dtype=torch.float64)[:, None].expand(-1, 2)
        small, large = (found.variance(scores, torch.full((50,), x, dtype=torch.float64)) for x in (1.0, 100.0))
        assert bool((large >= small).all())

    def test_it_never_falls_on_the_way(self):
        rows = simulated()
        assert rows.limits is not None
        found = fitted(replace(rows, limits=rows.limits * 1e-6))  # below the errors of the calibration frames
        scores = torch.logspace(-3, 6, 50, dtype=torch.float64)[:, None].expand(-1, 2)
        variance = found.variance(scores, torch.full((50,), 1e-6, dtype=torch.float64))
        np.testing.assert_allclose(variance, np.exp(found.constant))
        assert found.constant == pytest.approx(np.log((rows.squares / 3).mean()), abs=1e-4)

    def test_scores_that_are_all_the_same_have_no_far_field(self):
        rows = simulated()
        same = Residuals(np.ones_like(rows.scores), rows.squares, 3, rows.groups, rows.limits)
        assert fit_far_field(same, np.zeros(2)) is None
        assert far_field_choice(same, np.zeros(2)) is None

    def test_scores_of_zero_are_no_infinity(self):
        rows = simulated()
        rows.scores[:5] = 0
        found = fitted(rows)
        assert np.isfinite([found.constant, *found.slopes, *found.near]).all()

    def test_rows_without_limits_are_refused(self):
        rows = simulated()
        with pytest.raises(ValueError, match="σ∞² of every calibration row"):
            fit_far_field(Residuals(rows.scores, rows.squares, 3, rows.groups), FAR)

    def test_scores_without_limits_are_refused(self):
        with pytest.raises(ValueError, match="σ∞² of each row"):
            fitted(simulated()).variance(torch.ones(1, 2, dtype=torch.float64))


class TestElements:
    def rows(self, n_frames: int) -> Residuals:
        """Every frame has an oxygen, whose errors are twice as large as those of its nine hydrogens."""
        rows = simulated(n_frames=n_frames)
        numbers = np.tile([8, *[1] * 9], n_frames)
        return Residuals(rows.scores, rows.squares * np.where(numbers == 8, 4, 1), 3, rows.groups, rows.limits, numbers)

    def test_have_a_constant_of_their_own(self):
        found = fitted(self.rows(500))
        assert found.elements[8] - found.elements[1] == pytest.approx(np.log(4), abs=0.15)

    def test_with_few_frames_borrow_that_of_all(self):
        found = fitted(self.rows(10))
        assert 0.1 < found.elements[8] - found.elements[1] < 0.8

    def test_their_offsets_fade_with_the_way(self):
        found = fitted(self.rows(500))
        near = torch.tensor([found.near], dtype=torch.float64).exp().expand(3, -1)
        limit, numbers = torch.full((3,), 50.0, dtype=torch.float64), torch.tensor([1, 8, 6])
        of_all = found.constant
        at_near = found.variance(near, limit, numbers).log() - of_all
        assert at_near.tolist() == pytest.approx([found.elements[1], found.elements[8], 0.0])
        far = torch.tensor([found.far], dtype=torch.float64).exp().expand(3, -1) * 1e9
        assert found.variance(far, limit, numbers).tolist() == pytest.approx([50.0] * 3)


class TestChoice:
    def test_says_what_the_law_is_worth(self):
        choice = far_field_choice(simulated(), FAR)
        assert choice is not None
        assert choice.nll["far field"] < choice.constant_nll - 0.05
        assert (choice.n_rows, choice.n_groups) == (3000, 300)


def test_settings_make_it_again():
    found = fitted(simulated())
    assert load_calibrator(json.loads(json.dumps(found.settings))) == found


def test_description_names_both_ends():
    text = fitted(simulated()).describe()
    assert text.startswith("σ from 0.0")
    assert "to σ∞" in text
