"""The combined estimator on scenes made with numpy, where the truth is known, and its scenes on the toy potential."""

import json
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.calibration import FarFieldCalibrator, PowerCalibrator
from ase_uq.fitting import combination as fitting
from ase_uq.fitting.combination import Fitted, fit_combination
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods.base import Head, Raw
from ase_uq.numerics.networks import folds_of
from ase_uq.numerics.sites import RADII, around, sum_over_sites
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.uncertainty_model.combination import (
    RESIDUAL,
    Combination,
    CombinationFeatures,
    CombinationInputs,
    Fade,
)
from ase_uq.uncertainty_model.corrections import LARGEST_CORRECTION, floored
from ase_uq.uncertainty_model.fitted_method import FittedMethod

Rows = tuple[CombinationFeatures, Tensor, Tensor]
QUICK = Training(hidden=(8,), learning_rate=1e-2, batch=128, max_epochs=5, patience=5)


class Given(CombinationInputs):
    """A view of batches that are scenes already."""

    span = 5.0  # pyright: ignore[reportAssignmentType, reportIncompatibleVariableOverride]

    def features(self, forward_pass: Any, raws: Any, limit: Any, *, networks: bool = True) -> CombinationFeatures:
        return forward_pass


class NoHead(Head):
    """Scores are made up."""

    def forward(self, forward_pass: ForwardPass) -> Raw:
        raise NotImplementedError


@dataclass(frozen=True)
class World:
    """Atoms whose errors are known: log σ² = level + strength·tanh(2·hidden); the anchor sees the level alone.

    Args:
        strength: Of what only an input of the networks tells.
        n_components: Of the anchor's variance.
        others: By name, how much of the hidden part another method sees, and its noise.
    """

    strength: float = 0.0
    n_components: int = 1
    others: tuple[tuple[str, float, float], ...] = ()

    @property
    def inputs(self) -> CombinationInputs:
        return Given("near", tuple(name for name, _, _ in self.others), (), (1,), {})

    def rows(self, seed: int, n_frames: int = 80, n_atoms: int = 10, scale: float = 1.0) -> Rows:
        """CombinationFeatures, squared residuals and frames."""
        random = np.random.default_rng(seed)
        n, shape = n_frames * n_atoms, (n_frames * n_atoms, self.n_components)
        level = random.normal(size=(n, 1))
        network_inputs = random.normal(size=(n, 3))
        hidden = self.strength * np.tanh(2 * network_inputs[:, :1])
        base = np.broadcast_to(level - 4, shape)
        others = [base + share * hidden + random.normal(scale=noise, size=shape) for _, share, noise in self.others]
        residuals = random.normal(size=(n, 3)) * scale * np.exp((level - 4 + hidden) / 2)
        squares = residuals**2 if self.n_components == 3 else (residuals**2).mean(1, keepdims=True)
        features = CombinationFeatures(
            base=torch.tensor(base),
            way=torch.tensor(random.uniform(-0.2, 0.3, shape)),
            field=torch.tensor(random.uniform(-1, 1.5, (n, 1))),
            others=torch.tensor(np.stack(others, 2) if others else np.zeros((*shape, 0))),
            network_inputs=torch.tensor(network_inputs),
        )
        return features, torch.tensor(squares), torch.arange(n_frames).repeat_interleave(n_atoms)

    def fit(self, *, training: Rows | None = None, seed: int = 0) -> Fitted:
        return fit_combination(self.inputs, training, self.rows(seed))


def nll(variance: Tensor | np.ndarray, squares: Tensor) -> float:
    variance = torch.as_tensor(variance)
    return float(0.5 * (torch.log(2 * torch.pi * variance) + squares / variance).mean())


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hardly trained networks, where they are not the point."""
    monkeypatch.setattr(fitting, "_TRAINING", QUICK)


class TestWeights:
    def rows(self) -> fitting.Likelihood:
        random = np.random.default_rng(0)
        base, fade, good, useless = random.normal(size=(4, 900, 1))
        fade = 1 / (1 + np.exp(-fade))
        squares = np.exp(base + fade * (0.4 + 0.8 * good)) * random.chisquare(3, size=base.shape) / 3
        harmful = base - np.log(squares)
        corrections = {"good": fade * good, "useless": fade * useless, "harmful": fade * harmful}
        return fitting.Likelihood(base, fade, squares, corrections, -np.inf)

    def test_are_those_of_another_optimiser(self):
        rows = self.rows()
        names = ("good", "useless", "harmful")

        def loss(x: np.ndarray) -> float:
            return rows.nll(rows.log_variance(names, x[0], x[1:]))

        bounds = [(-5, 5), *[(0, 1)] * 3]
        expected = minimize(loss, [0.1] * 4, method="SLSQP", bounds=bounds, options={"ftol": 1e-13, "maxiter": 500})
        constant, weights = rows.fitted(names)
        np.testing.assert_allclose([constant, *weights], expected.x, atol=1e-4)
        assert weights[2] == 0.0
        # The standard error of 900 rows with three components each is 0.05.
        np.testing.assert_allclose([constant, weights[0]], [0.4, 0.8], atol=0.15)

    def test_make_the_likelihood_stationary(self):
        rows = self.rows()
        names = ("good", "harmful")
        constant, weights = rows.fitted(names)
        slope = 1 - rows.squares * np.exp(-rows.log_variance(names, constant, weights))
        assert np.mean(slope * rows.fade) == pytest.approx(0, abs=1e-6)
        assert np.mean(slope * rows.corrections["good"]) == pytest.approx(0, abs=1e-6)
        assert np.mean(slope * rows.corrections["harmful"]) > 0

    def test_are_none_without_corrections(self):
        constant, weights = self.rows().fitted(())
        assert constant == 0.0
        assert len(weights) == 0

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("n_components", [1, 3])
    def test_of_a_method_that_knows_more_and_of_one_that_knows_nothing(self, n_components: int):
        world = World(1.5, n_components, others=(("knows", 1.0, 0.3), ("noise", 0.0, 2.0)))
        rows = world.rows(0)
        fitted = fit_combination(world.inputs, None, rows)
        weights = fitted.combination.weights
        assert weights["knows"] > 0.5
        assert weights.get("noise", 0.0) < 0.1
        assert fitted.variance.shape == rows[1].shape
        fresh = world.rows(1)
        assert nll(fitted.combination(fresh[0], {}, None), fresh[1]) < nll(fresh[0].base.exp(), fresh[1]) - 0.1

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("n_components", [1, 3])
    def test_without_anything_that_helps_the_anchor_stands_alone(self, n_components: int):
        world = World(0.0, n_components, others=(("noise", 0.0, 2.0),))
        rows = world.rows(0)
        fitted = fit_combination(world.inputs, None, rows)
        fresh = world.rows(1)[0]
        assert fitted.combination.weights == {}
        assert fitted.combination.constant == 0.0
        assert fitted.combination.ensemble is None
        torch.testing.assert_close(fitted.combination(fresh, {}, None), fresh.base.exp(), rtol=1e-12, atol=0)
        np.testing.assert_allclose(fitted.variance, rows[0].base.exp(), rtol=1e-12)
        assert fitted.combination.describe()[0] == "log σ² = near"

    @pytest.mark.usefixtures("quick")
    def test_likelihoods_name_what_was_tried(self):
        others = World(1.5, others=(("knows", 1.0, 0.3),)).fit().combination
        assert list(others.likelihoods) == ["anchor", "methods", RESIDUAL, "all"]
        assert list(World().fit().combination.likelihoods) == ["anchor", RESIDUAL]
        formula, tried = others.describe()
        assert "near + f·(" in formula
        assert "·knows" in formula
        assert tried.startswith(f"cross-validated NLL: anchor {others.likelihoods['anchor']:.3f}, ")


class TestResidual:
    @pytest.mark.parametrize("from_training", [True, False])
    def test_what_networks_can_learn_is_kept(self, from_training: bool):
        world = World(1.5)
        # Errors on training frames are a hundredth, and say where they are large all the same.
        training = world.rows(5, n_frames=200, scale=0.01) if from_training else None
        fitted = fit_combination(world.inputs, training, world.rows(0, n_frames=120))
        likelihoods = fitted.combination.likelihoods
        assert likelihoods[RESIDUAL] < likelihoods["anchor"] - 0.1
        assert fitted.combination.weights[RESIDUAL] > 0.5
        assert fitted.combination.ensemble is not None
        fresh = world.rows(1, n_frames=200)
        assert nll(fitted.combination(fresh[0], {}, None), fresh[1]) < nll(fresh[0].base.exp(), fresh[1]) - 0.1

    def test_training_frames_count_where_calibration_frames_are_few(self):
        world = World(1.5)
        calibration = world.rows(0, n_frames=20, n_atoms=5)
        with_training = fit_combination(world.inputs, world.rows(5, n_frames=200, scale=0.01), calibration)
        assert with_training.combination.weights[RESIDUAL] > 0.5
        alone = fit_combination(world.inputs, None, calibration)
        fresh = world.rows(1, n_frames=200)
        found, expected = (nll(fitted.combination(fresh[0], {}, None), fresh[1]) for fitted in (with_training, alone))
        assert found < expected

    @pytest.mark.parametrize("seed", range(2))
    def test_noise_does_no_harm(self, seed: int):
        world = World(0.0)
        combination = world.fit(training=world.rows(5 + seed, n_frames=100), seed=seed).combination
        fresh = world.rows(100 + seed, n_frames=300)
        assert nll(combination(fresh[0], {}, None), fresh[1]) < nll(fresh[0].base.exp(), fresh[1]) + 0.02

    @pytest.mark.usefixtures("quick")
    def test_training_frames_without_labels_take_no_part(self):
        world = World(1.5)
        training = world.rows(5)
        features, squares, frames = training
        blind = torch.arange(len(squares)) % 20 < 10  # every second frame
        hidden = (features, squares.masked_fill(blind[:, None], torch.nan), frames)
        fitted = world.fit(training=hidden).combination
        assert fitted.likelihoods != world.fit(training=training).combination.likelihoods
        assert np.isfinite(list(fitted.likelihoods.values())).all()

    @pytest.mark.usefixtures("quick")
    @pytest.mark.parametrize("labelled", [0, 10])
    def test_training_frames_nearly_all_of_which_have_no_labels(self, labelled: int):
        world = World(1.5)
        features, squares, frames = world.rows(5, n_frames=400)
        squares[labelled:] = torch.nan
        few = world.rows(0, n_frames=10)
        fitted = fit_combination(world.inputs, (features, squares, frames), few)
        assert np.isfinite(fitted.variance).all()

    @pytest.mark.usefixtures("quick")
    def test_training_frames_without_errors_teach_nothing(self):
        """Such as frames labelled with the potential itself."""
        world = World(1.5)
        features, squares, frames = world.rows(5)
        found = world.fit(training=(features, 0 * squares, frames)).combination
        unlabelled = world.fit(training=(features, squares * torch.nan, frames)).combination
        assert found.likelihoods == unlabelled.likelihoods
        assert np.isfinite(list(found.likelihoods.values())).all()

    def test_each_network_leaves_out_as_much_of_either_set(self):
        training, calibration = torch.arange(1000).repeat_interleave(3), 7 + torch.arange(40).repeat_interleave(2)
        groups = fitting._interleaved(training, calibration)
        assert len(groups.unique()) == 1040
        folds = folds_of(groups, 5)
        for own, share in ((folds[:3000], 600), (folds[3000:], 16)):
            assert torch.bincount(own, minlength=5).tolist() == pytest.approx([share] * 5, rel=0.3)
        # Frames stay whole and in their order.
        assert torch.equal(groups[:3000].unique_consecutive(), groups[:3000:3])
        assert bool((groups[3000::2].diff() > 0).all())


class TestOutOfFold:
    """What a calibration frame reads comes from a network that has not seen it."""

    @pytest.fixture(autouse=True)
    def no_early_stop(self, monkeypatch: pytest.MonkeyPatch):
        # A member that stops draws no more batches, and those of the others are then other random ones.
        monkeypatch.setattr(fitting, "_TRAINING", replace(QUICK, max_epochs=8, patience=8))

    @pytest.mark.parametrize("with_training", [True, False])
    @pytest.mark.parametrize("frame", [0, 17, 79])
    def test_its_own_errors_change_nothing_of_it(self, with_training: bool, frame: int):
        world = World(1.5)
        training = world.rows(5, n_frames=100) if with_training else None
        features, squares, frames = world.rows(0)
        own = frames == frame
        changed = torch.where(own[:, None], 1e4 * squares, squares)
        (_, before), (_, after) = (
            fitting._residual_model(training, (features, errors, frames), "") for errors in (squares, changed)
        )
        torch.testing.assert_close(after[own], before[own], rtol=1e-6, atol=1e-9)
        assert float((after - before).abs().max()) > 0.1

    def test_variances_of_calibration_atoms_are_those_out_of_fold(self):
        world = World(1.5)
        rows = world.rows(0)
        fitted = fit_combination(world.inputs, None, rows)
        combination = fitted.combination
        assert RESIDUAL in combination.weights
        _, seen = fitting._residual_model(None, rows, "")
        correction = combination.weights[RESIDUAL] * torch.tanh(seen) + combination.constant
        expected = floored(rows[0].base + combination.fade(rows[0]) * correction, rows[0].base, combination.floor).exp()
        np.testing.assert_allclose(fitted.variance, expected, rtol=1e-10)
        assert not np.allclose(fitted.variance, combination(rows[0], {}, None))


class TestFade:
    def at(self, way: list[float], field: float | list[float]) -> CombinationFeatures:
        column = torch.tensor(way, dtype=torch.float64)[:, None]
        fields = torch.as_tensor(field, dtype=torch.float64).expand(len(way))[:, None]
        return CombinationFeatures(column, column, fields, column[:, :0, None], column[:, :0])

    def test_is_whole_near_and_nothing_at_the_end(self):
        found = Fade(0.0, 5.0, 0.4)(self.at([-0.5, 0.0, 0.1, 0.2, 0.4, 0.41, 1.0], -1.0))
        np.testing.assert_allclose(found[:, 0], [1, 1, 0.75, 0.5, 0, 0, 0], atol=1e-12)

    def test_is_that_of_the_receptive_field_where_that_is_farther_out(self):
        found = Fade(2.0, 5.0, 0.4)(self.at([-0.5, -0.5, -0.5, 0.3], [2.0, 2.5, 9.0, 2.0]))
        np.testing.assert_allclose(found[:, 0], [1, 0.75, 0, 0.25], atol=1e-12)

    def test_is_nothing_where_nothing_is_known(self):
        assert float(Fade(0.0, 5.0)(self.at([1.0], 0.0))) == 0

    def test_ends_behind_four_of_five_calibration_atoms(self):
        features = World(1.5).rows(0)[0]
        found = fit_combination(World().inputs, None, World(1.5).rows(0)).combination.fade
        assert found.centre == pytest.approx(float(features.field.mean()))
        way = np.maximum(features.way.numpy(), (features.field.numpy() - found.centre) / 5.0)
        assert found.end == pytest.approx(np.quantile(way, 0.8))

    @pytest.mark.parametrize(("reach", "end"), [(0.2, 0.4), (0.9, 1.0)])
    def test_older_files_say_half_of_it(self, reach: float, end: float):
        assert Fade.load({"centre": 1.0, "span": 5.0, "reach": reach}) == Fade(1.0, 5.0, end)


def test_corrections_lead_to_no_less_than_the_median_of_the_anchor():
    rows = World(1.5).rows(0)
    assert fit_combination(World().inputs, None, rows).combination.floor == float(rows[0].base.quantile(0.5))
    base = torch.tensor([-6.0, -4.0, -9.0])
    torch.testing.assert_close(floored(base - 1.5, base, -6.0), torch.tensor([-6.0, -5.5, -9.0]))
    torch.testing.assert_close(floored(base + 1.5, base, -6.0), base + 1.5)


class TestFarAway:
    @pytest.fixture
    def combination(self, quick: None) -> Combination:
        """With networks that say the wildest things."""
        others = (("knows", 1.0, 0.3),)
        combination = World(1.5, others=others).fit().combination
        wild = fit_combination(World().inputs, None, World(1.5).rows(0)).combination
        ensemble = wild.ensemble or fitting._residual_model(None, World(1.5).rows(0), "")[0]
        ensemble.weights *= 100
        weights = {"knows": 0.9, RESIDUAL: 1.4}
        return Combination(combination.inputs, combination.fade, -99.0, ensemble, 0.3, weights, {})

    def test_the_anchor_is_all_there_is(self, combination: Combination):
        features = World(1.5, others=(("knows", 5.0, 3.0),)).rows(3)[0]
        far = replace(features, way=torch.full_like(features.way, 0.7))
        torch.testing.assert_close(combination(far, {}, None), far.base.exp(), rtol=1e-12, atol=0)
        assert not torch.allclose(combination(features, {}, None), features.base.exp())

    def test_corrections_fade_in_proportion(self, combination: Combination):
        features = World(1.5, others=(("knows", 1.0, 0.3),)).rows(3)[0]
        whole = replace(features, way=torch.zeros_like(features.way), field=torch.zeros_like(features.field) - 9)
        found, full = (combination(f, {}, None).log() - f.base for f in (features, whole))
        torch.testing.assert_close(found, combination.fade(features) * full, rtol=1e-9, atol=1e-12)

    def test_corrections_are_bounded_everywhere(self, combination: Combination):
        features = World(1.5, others=(("knows", 50.0, 30.0),)).rows(3)[0]
        correction = combination(features, {}, None).log() - features.base
        limit = (0.3 + LARGEST_CORRECTION * (0.9 + 1.4)) * (1 + 1e-12)
        assert float(correction.abs().max()) <= limit
        assert float(correction.abs().max()) > 0.5 * limit

    def test_a_potential_that_has_broken_is_not_hidden(self, combination: Combination):
        features = World(1.5, others=(("knows", 1.0, 1.0),)).rows(3)[0]
        features.base[4] = torch.nan
        found = combination(features, {}, None)
        assert bool(found[4].isnan().all())
        assert int(found.isnan().sum()) == 1


@pytest.mark.usefixtures("quick")
class TestSameBits:
    world = World(1.5, 3, others=(("knows", 1.0, 0.3), ("more", 0.5, 1.0)))

    def test_settings_and_tensors_are_all_of_it(self):
        combination = self.with_all(self.world.fit().combination)
        settings = json.loads(json.dumps(combination.settings))
        tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in _state(combination)}
        again = Combination.load(settings, tensors, {})
        assert again.inputs == CombinationInputs("near", ("knows", "more"), (), (1,), {})
        assert again.settings == combination.settings
        assert again.describe() == combination.describe()
        again.inputs = combination.inputs
        features = self.world.rows(1)[0]
        assert torch.equal(again(features, {}, None), combination(features, {}, None))

    def test_without_networks_too(self):
        found = self.world.fit().combination
        combination = Combination(found.inputs, found.fade, -99.0, None, 0.1, {"knows": 0.5}, {"anchor": 1.0})
        again = Combination.load(json.loads(json.dumps(combination.settings)), dict(_state(combination)), {})
        assert again.ensemble is None
        assert again.weights == {"knows": 0.5}

    def test_all_tensors_move_with_it(self):
        combination = self.with_all(self.world.fit().combination)
        assert not list(combination.parameters())
        moved = combination.to("meta")
        assert {name for name, _ in moved.named_buffers()} >= {"ensemble.weights"}
        assert all(buffer.is_meta for buffer in moved.buffers())

    def test_the_same_data_give_the_same_bits_and_leave_random_states_alone(self):
        training = self.world.rows(5)
        before = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002 (it must not change)
        threads = torch.get_num_threads()
        one, two = (self.world.fit(training=training) for _ in range(2))
        assert torch.equal(torch.get_rng_state(), before[0])
        assert (np.random.get_state()[1] == before[1]).all()  # noqa: NPY002
        assert torch.get_num_threads() == threads
        assert one.combination.settings == two.combination.settings
        np.testing.assert_array_equal(one.variance, two.variance)
        for (name, first), (_, second) in zip(_state(one.combination), _state(two.combination), strict=True):
            assert torch.equal(first, second), name

    def test_what_is_given_is_not_changed(self):
        training, calibration = self.world.rows(5), self.world.rows(0)
        fit_combination(self.world.inputs, training, calibration)
        for rows, expected in ((training, self.world.rows(5)), (calibration, self.world.rows(0))):
            for name in CombinationFeatures.__dataclass_fields__:
                assert torch.equal(getattr(rows[0], name), getattr(expected[0], name))
            assert torch.equal(rows[1], expected[1])
            assert torch.equal(rows[2], expected[2])

    def with_all(self, combination: Combination) -> Combination:
        """Everything kept, however little it helps."""
        ensemble = fitting._residual_model(None, self.world.rows(0), "")[0]
        weights = {"knows": 0.7, "more": 0.2, RESIDUAL: 0.4}
        return Combination(combination.inputs, combination.fade, -99.0, ensemble, 0.1, weights, combination.likelihoods)


class TestView:
    """Scenes of the toy potential, with raw scores made up."""

    def raws(self, n_components: dict[str, int], n_atoms: int) -> dict[str, Raw]:
        random = np.random.default_rng(0)

        def raw(components: int) -> Raw:
            forces = torch.from_numpy(random.lognormal(size=(n_atoms, components, 2)))
            distance = torch.from_numpy(random.lognormal(size=n_atoms))
            return Raw(forces, forces[:, 0], distance, forces[:, 0], distance)

        return {name: raw(components) for name, components in n_components.items()}

    def inputs(self, **options: Any) -> CombinationInputs:
        calibrators = {
            "near": FarFieldCalibrator(-4.0, (0.1, 0.2), (0.1, 0.2), (3.0, 4.0), 0.5, (1e-3, 1e-3)),
            "other": PowerCalibrator(-1.0, (0.2, 0.1), (1e-3, 1e-3)),
        }
        methods = {name: FittedMethod(NoHead({}, {}), {"forces": c}, {}) for name, c in calibrators.items()}
        return CombinationInputs(
            "near", ("other",), methods=methods, **{"distances": (), "elements": (1, 6), **options}
        )

    def limit(self, n_atoms: int) -> Tensor:
        return torch.linspace(1, 3, n_atoms, dtype=torch.float64)

    @pytest.mark.parametrize(("own", "other"), [(1, 1), (1, 3), (3, 1), (3, 3)])
    def test_components_are_those_of_the_anchor(self, own: int, other: int):
        batch = forward_pass_of(load_backend(ToyCalculator(ELEMENTS)), labelled_frames(3, seed=1))
        raws = self.raws({"near": own, "other": other}, len(batch.numbers))
        inputs, limit = self.inputs(), self.limit(len(batch.numbers))
        features = inputs.features(batch, raws, limit)
        near = inputs.methods["near"].calibrators["forces"]
        assert isinstance(near, FarFieldCalibrator)
        way = near.way(raws["near"].forces).numpy()
        base = -4.0 + (np.where(way > 0, np.log(limit.numpy())[:, None], 0.5) + 4.0) * way
        np.testing.assert_allclose(features.base, base, rtol=1e-12)
        np.testing.assert_allclose(features.way, np.minimum(way, 1), rtol=1e-12)
        assert 0.1 < np.mean(way > 0) < 0.9
        others = inputs.methods["other"].calibrators["forces"].variance(raws["other"].forces).numpy()
        if own == 1:
            others = others.mean(1, keepdims=True)
        expected = np.broadcast_to(np.log(others), base.shape)
        assert features.others.shape == (len(batch.numbers), own, 1)
        np.testing.assert_allclose(features.others[:, :, 0], expected, rtol=1e-12)

    def test_inputs_are_all_that_errors_may_depend_on(self):
        batch = forward_pass_of(load_backend(ToyCalculator(ELEMENTS)), labelled_frames(3, seed=1))
        raws = self.raws({"near": 1, "other": 1}, len(batch.numbers))
        features = self.inputs(distances=("other",)).features(batch, raws, self.limit(len(batch.numbers)))
        sites = around(raws["near"].distance, batch.edges, RADII)
        views = torch.cat([sites.sums / sites.counts, sites.hops[:, 1:]], 1).log()
        assert batch.forces is not None
        ones = torch.ones(len(batch.numbers), 1, dtype=torch.float64)
        near, weights = (sum_over_sites(x, batch.edges, [3.5])[:, :, 0] for x in (batch.features, ones))
        expected = [
            batch.features,
            near / weights,
            views,
            (batch.forces.norm(dim=1, keepdim=True) + 1e-3).log(),
            torch.stack([batch.numbers == 1, batch.numbers == 6], 1).double(),
            raws["other"].distance.log()[:, None],
        ]
        torch.testing.assert_close(features.network_inputs, torch.cat(expected, 1))

    def test_batch_equals_singles(self):
        frames = [*labelled_frames(3, seed=1), Atoms("O"), *labelled_frames(1, seed=2, cell=4.2)]
        backend = load_backend(ToyCalculator(ELEMENTS))
        batch = forward_pass_of(backend, frames)
        raws, limit = self.raws({"near": 3, "other": 1}, len(batch.numbers)), self.limit(len(batch.numbers))
        together = self.inputs().features(batch, raws, limit)
        alone = []
        for k, atoms in enumerate(frames):
            own = batch.frame_of_atom == k
            parts = {n: Raw(r.forces[own], r.energy, r.energies, r.stress, r.distance[own]) for n, r in raws.items()}
            alone.append(self.inputs().features(forward_pass_of(backend, [atoms]), parts, limit[own]))
        joined = CombinationFeatures.joined(alone)
        for name in CombinationFeatures.__dataclass_fields__:
            torch.testing.assert_close(getattr(joined, name), getattr(together, name), rtol=1e-9, atol=1e-12)

    def test_a_distance_of_zero_is_no_infinity(self):
        batch = forward_pass_of(load_backend(ToyCalculator(ELEMENTS)), [Atoms("O")])
        raws = self.raws({"near": 1, "other": 1}, 1)
        zero = {name: replace(raw, forces=0 * raw.forces, distance=0 * raw.distance) for name, raw in raws.items()}
        features = self.inputs(distances=("other",)).features(batch, zero, self.limit(1))
        for name in CombinationFeatures.__dataclass_fields__:
            assert bool(torch.isfinite(getattr(features, name)).all()), name


def _state(combination: Combination) -> list[tuple[str, Tensor]]:
    return list(combination.state_dict().items())
