"""Ensembles of networks: against plain torch, and no member learns from the fold that it is kept for."""

import json

import pytest
import torch
from torch import Tensor

from ase_uq.errors import LabelError
from ase_uq.numerics.networks import MLPEnsemble, folds_of, out_of_fold, pinball, squared_error, squared_log_error
from ase_uq.numerics.training import Training, _Descent, cross_fit

SHORT = Training(hidden=(16,), max_epochs=20)


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def smooth(inputs: Tensor) -> Tensor:
    return torch.sin(inputs[:, :1]) + 0.5 * inputs[:, 1:2] * inputs[:, 2:3]


class TestEnsemble:
    @pytest.mark.parametrize("output", ["linear", "softplus"])
    def test_is_torchs_own_layers(self, generator: torch.Generator, output: str):
        inputs = torch.randn(30, 4, generator=generator, dtype=torch.float64)
        targets = torch.rand(30, 2, generator=generator, dtype=torch.float64)
        training = Training(hidden=(8, 5), max_epochs=2)
        ensemble = cross_fit(inputs, targets, torch.arange(30), training=training, folds=3, output=output)
        for weights, found in zip(ensemble.weights.double(), ensemble.members(inputs), strict=True):
            layers, start = [], 0
            for fan_in, fan_out in ((4, 8), (8, 5), (5, 2)):
                layer = torch.nn.Linear(fan_in, fan_out, dtype=torch.float64)
                end = start + fan_in * fan_out
                layer.weight.data = weights[start:end].reshape(fan_in, fan_out).T
                layer.bias.data = weights[end : end + fan_out]
                layers += [layer, torch.nn.ReLU()]
                start = end + fan_out
            network = torch.nn.Sequential(*layers[:-1], *([torch.nn.Softplus()] if output == "softplus" else []))
            standardised = (inputs - inputs.mean(0)) / inputs.std(0, correction=0)
            expected = ensemble.shift + ensemble.unit * network(standardised)
            torch.testing.assert_close(found, expected.detach(), rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(ensemble(inputs), ensemble.members(inputs).mean(0))

    def test_settings_and_buffers_are_all(self, generator: torch.Generator):
        inputs = torch.randn(40, 3, generator=generator)
        ensemble = cross_fit(inputs, smooth(inputs), torch.arange(40), training=SHORT, folds=2)
        assert not list(ensemble.parameters())
        again = MLPEnsemble(json.loads(json.dumps(ensemble.settings)), dict(ensemble.state_dict()))
        assert torch.equal(again(inputs), ensemble(inputs))

    def test_a_row_does_not_depend_on_the_others(self, generator: torch.Generator):
        inputs = torch.randn(40, 3, generator=generator)
        ensemble = cross_fit(inputs, smooth(inputs), torch.arange(40), training=SHORT, folds=2)
        alone = torch.cat([ensemble(row[None]) for row in inputs])
        torch.testing.assert_close(ensemble(inputs), alone, rtol=1e-12, atol=1e-12)


class TestFolds:
    def test_rows_of_a_group_share_a_fold_and_folds_are_even(self):
        groups = torch.arange(100).repeat_interleave(3)
        fold = folds_of(groups, 5)
        assert torch.equal(fold.reshape(100, 3)[:, :1].expand(-1, 3), fold.reshape(100, 3))
        assert fold.bincount().tolist() == [60] * 5

    def test_neighbours_mostly_share_one(self):
        fold = folds_of(torch.arange(200), 5)
        assert int((fold[1:] != fold[:-1]).sum()) == 4 * 5 - 1

    def test_numbers_of_groups_may_have_gaps_and_any_order(self):
        groups = torch.tensor([30, 10, 1000, 20, 10])
        assert folds_of(groups, 2).tolist() == [0, 0, 1, 1, 0]

    @pytest.mark.parametrize("n_groups", [10, 11, 19, 23])
    def test_few_groups_still_fill_every_fold(self, n_groups: int):
        assert folds_of(torch.arange(n_groups), 5).unique().tolist() == [0, 1, 2, 3, 4]

    def test_too_few_are_refused_with_the_number_needed(self):
        with pytest.raises(LabelError, match="needs 10 labelled training frames, but there are 9"):
            folds_of(torch.arange(9).repeat(4), 5)
        with pytest.raises(ValueError, match="2 folds or more"):
            folds_of(torch.arange(9), 1)


class TestCrossFit:
    def test_learns(self, generator: torch.Generator):
        inputs = torch.randn(1000, 3, generator=generator)
        targets = 100 + 5 * smooth(inputs)
        groups = torch.arange(1000) // 10
        ensemble = cross_fit(inputs, targets, groups, training=Training(hidden=(64,), patience=10))
        unseen = out_of_fold(ensemble, inputs, folds_of(groups, 5))
        assert float((unseen - targets).square().mean()) < 0.03 * float(targets.var())

    def test_no_member_learns_from_its_fold(self, generator: torch.Generator):
        """Other targets in a fold change every member but its own, which keeps its bits."""
        inputs, groups = torch.randn(120, 3, generator=generator), torch.arange(120) // 2
        targets, fold = smooth(inputs), folds_of(groups, 3)

        def weights(targets: Tensor) -> Tensor:
            # With n_outputs the targets are not scaled, which would tell of all of them.
            return cross_fit(inputs, targets, groups, training=SHORT, folds=3, n_outputs=1).weights

        before = weights(targets)
        for member in range(3):
            changed = torch.where((fold == member)[:, None], -targets, targets)
            same = (weights(changed) == before).all(1).tolist()
            assert same == [other == member for other in range(3)]

    def test_what_can_only_be_memorised_is_not_known_out_of_fold(self, generator: torch.Generator):
        inputs = torch.randn(100, 30, generator=generator)
        targets = torch.randn(100, 1, generator=generator)
        groups = torch.arange(100)
        # The loss on what is held out never falls: without it the networks learn by heart.
        training = Training(hidden=(256,), max_epochs=60, weight_decay=0.0, learning_rate=1e-2)
        ensemble = cross_fit(inputs, targets, groups, training=training, folds=2)
        unseen = out_of_fold(ensemble, inputs, folds_of(groups, 2)).float()
        assert float((unseen - targets).square().mean()) > 0.9 * float(targets.square().mean())
        for member in range(2):
            rows = folds_of(groups, 2) == member
            torch.testing.assert_close(unseen[rows], ensemble.members(inputs)[member, rows].float())

    def test_members_stop_when_noise_is_all_that_is_left(self, generator: torch.Generator):
        inputs, targets = torch.randn(400, 20, generator=generator), torch.randn(400, 1, generator=generator)
        training = Training(hidden=(64,), patience=10, max_epochs=200)
        ensemble = cross_fit(inputs, targets, torch.arange(400), training=training)
        assert max(ensemble.settings["epochs"]) < 100
        assert len(set(ensemble.settings["epochs"])) > 1
        assert max(ensemble.settings["loss"]) < 1.5

    def test_the_same_seed_gives_the_same_bits_and_leaves_the_process_alone(self, generator: torch.Generator):
        inputs = torch.randn(200, 3, generator=generator)
        state, threads = torch.get_rng_state(), torch.get_num_threads()

        def weights(seed: int) -> Tensor:
            training = Training(hidden=(16,), max_epochs=5, seed=seed)
            return cross_fit(inputs, smooth(inputs), torch.arange(200), training=training).weights

        first = weights(0)
        torch.rand(3)
        torch.set_num_threads(1)
        try:
            with torch.no_grad():
                assert torch.equal(weights(0), first)
            assert torch.get_num_threads() == 1
        finally:
            torch.set_num_threads(threads)
        assert not torch.equal(weights(1), first)
        torch.manual_seed(0)
        state = torch.get_rng_state()
        weights(2)
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.get_num_threads() == threads

    def test_default_dtype_does_not_matter(self, generator: torch.Generator):
        inputs = torch.randn(60, 3, generator=generator, dtype=torch.float64)
        expected = cross_fit(inputs, smooth(inputs), torch.arange(60), training=SHORT, folds=2)
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            found = cross_fit(inputs, smooth(inputs), torch.arange(60), training=SHORT, folds=2)
        finally:
            torch.set_default_dtype(default)
        assert torch.equal(found.weights, expected.weights)

    def test_targets_without_a_label_are_left_out(self, generator: torch.Generator):
        inputs = torch.randn(1500, 3, generator=generator)
        targets = smooth(inputs)
        targets[::3] = torch.nan
        ensemble = cross_fit(inputs, targets, torch.arange(1500), training=Training(hidden=(64,)), folds=2)
        found = ensemble(inputs)[::3]
        assert float((found - smooth(inputs)[::3]).square().mean()) < 0.2 * float(smooth(inputs).var())

    def test_labels_in_one_block_only_are_refused(self, generator: torch.Generator):
        targets = torch.full((40, 1), torch.nan)
        targets[:5] = 1.0
        with pytest.raises(LabelError, match="one block"):
            cross_fit(torch.randn(40, 3, generator=generator), targets, torch.arange(40), training=SHORT, folds=2)

    def test_inputs_and_targets_that_never_vary_do_not_break_it(self, generator: torch.Generator):
        inputs = torch.cat([torch.randn(40, 2, generator=generator), torch.ones(40, 1)], 1)
        ensemble = cross_fit(inputs, torch.zeros(40, 1), torch.arange(40), training=SHORT, folds=2)
        assert bool(ensemble(inputs + 1).isfinite().all())

    def test_large_sets_are_drawn_from(self, generator: torch.Generator):
        inputs = torch.randn(2000, 3, generator=generator)
        training = Training(hidden=(64,), epoch_rows=200)
        ensemble = cross_fit(inputs, smooth(inputs), torch.arange(2000), training=training, folds=2)
        assert max(ensemble.settings["loss"]) < 0.1

    def test_a_bar_shows_epochs_and_loss(
        self, generator: torch.Generator, terminal: None, capsys: pytest.CaptureFixture[str]
    ):
        inputs = torch.randn(40, 3, generator=generator)
        cross_fit(inputs, smooth(inputs), torch.arange(40), training=SHORT, folds=2)
        assert capsys.readouterr().err == ""
        cross_fit(inputs, smooth(inputs), torch.arange(40), training=SHORT, folds=2, title="forces")
        shown = capsys.readouterr().err
        assert "forces" in shown
        assert "epoch" in shown

    @pytest.mark.parametrize("wrong", [{"hidden": (0,)}, {"batch": 0}, {"learning_rate": 0.0}, {"patience": 0}])
    def test_hyper_parameters_are_checked(self, wrong: dict):
        with pytest.raises(ValueError, match="above 0"):
            Training(**wrong)


class TestSums:
    """Targets of structures, outputs of atoms."""

    def test_learn_what_the_rows_add_up_to(self, generator: torch.Generator):
        counts = torch.randint(1, 5, (600,), generator=generator)
        segments = torch.repeat_interleave(counts)
        inputs = torch.randn(len(segments), 3, generator=generator)
        each = smooth(inputs) + 3
        targets = torch.zeros(600, 1).index_add_(0, segments, each)
        training = Training(hidden=(64,), patience=10)
        ensemble = cross_fit(inputs, targets, torch.arange(600), training=training, folds=2, segments=segments)
        assert float((ensemble(inputs) - each).square().mean()) < 0.1 * float(each.var())

    def test_one_row_each_is_no_sum(self, generator: torch.Generator):
        inputs = torch.randn(60, 3, generator=generator)
        options = {"training": Training(hidden=(16,), max_epochs=3), "folds": 2}
        plain = cross_fit(inputs, smooth(inputs), torch.arange(60), **options)
        summed = cross_fit(inputs, smooth(inputs), torch.arange(60), segments=torch.arange(60), **options)
        torch.testing.assert_close(summed.weights, plain.weights, rtol=1e-4, atol=1e-6)

    def test_order_of_rows_does_not_matter(self, generator: torch.Generator):
        segments = torch.arange(40).repeat_interleave(3)
        inputs, targets = torch.randn(120, 3, generator=generator), torch.randn(40, 1, generator=generator)
        order = torch.cat([torch.arange(0, 120, 3), torch.arange(1, 120, 3), torch.arange(2, 120, 3)])

        def weights(inputs: Tensor, segments: Tensor) -> Tensor:
            return cross_fit(inputs, targets, torch.arange(40), training=SHORT, folds=2, segments=segments).weights

        torch.testing.assert_close(weights(inputs[order], segments[order]), weights(inputs, segments))


class TestLosses:
    @pytest.mark.parametrize("quantile", [0.5, 0.9])
    def test_pinball_finds_the_quantile(self, generator: torch.Generator, quantile: float):
        inputs = torch.randn(4000, 2, generator=generator)
        scale = torch.exp(inputs[:, :1] / 2)
        targets = scale * torch.randn(4000, 1, generator=generator).abs()
        groups = torch.arange(4000)
        training = Training(hidden=(32,), patience=10)
        ensemble = cross_fit(
            inputs, targets, groups, training=training, loss=pinball(quantile), folds=2, output="softplus"
        )
        below = targets < out_of_fold(ensemble, inputs, folds_of(groups, 2))
        for rows in (inputs[:, 0] < -0.5, inputs[:, 0] > 0.5):
            assert float(below[rows].double().mean()) == pytest.approx(quantile, abs=0.04)

    def test_squared_log_error_finds_the_geometric_mean(self, generator: torch.Generator):
        inputs = torch.randn(2000, 2, generator=generator)
        targets = torch.exp(inputs[:, :1] + torch.randn(2000, 1, generator=generator))
        training = Training(hidden=(32,), patience=10)
        ensemble = cross_fit(
            inputs, targets, torch.arange(2000), training=training, loss=squared_log_error, folds=2, output="softplus"
        )
        error = torch.log(ensemble(inputs)) - inputs[:, :1]
        assert abs(float(error.mean())) < 0.1
        assert float(error.std()) < 0.3

    def test_squared_error_is_a_mean_over_components(self):
        assert squared_error(torch.tensor([[1.0, 2.0, 3.0]]), torch.zeros(1, 3)).tolist() == pytest.approx([14 / 3])

    def test_a_quantile_lies_between_0_and_1(self):
        with pytest.raises(ValueError, match="between 0 and 1"):
            pinball(1.0)


def test_descent_is_adamw(generator: torch.Generator):
    """Two members with the steps of torch's own optimiser, until one has a lower rate."""
    start = torch.randn(2, 5, generator=generator)
    scales = torch.randn(6, 2, 5, generator=generator)
    descent = _Descent(start.clone(), Training(learning_rate=0.05, weight_decay=0.1))
    own = [start[k].clone().requires_grad_() for k in range(2)]
    optimisers = [torch.optim.AdamW([weights], lr=0.05, weight_decay=0.1) for weights in own]
    for scale in scales:

        def losses(weights: Tensor, chosen: Tensor, scale: Tensor = scale) -> Tensor:
            return (scale * weights).square().sum(1, keepdim=True)

        descent.step(losses, torch.zeros(2, 1))
        for k, optimiser in enumerate(optimisers):
            optimiser.zero_grad()
            (scale[k] * own[k]).square().sum().backward()
            optimiser.step()
    descent.judge(lambda weights, chosen: weights.sum(1, keepdim=True), torch.zeros(2, 1))
    torch.testing.assert_close(descent.best, torch.stack([weights.detach() for weights in own]))
