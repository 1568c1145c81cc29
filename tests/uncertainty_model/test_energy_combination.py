"""The combination of energies: its law on numbers made with numpy, where the truth is known, and in the product."""

import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from scipy.optimize import minimize

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.calibration import AffineCalibrator, FarFieldCalibrator
from ase_uq.engines.ase.bias import UncertaintyBias
from ase_uq.errors import UQWarning
from ase_uq.fitting import combination as fitting
from ase_uq.fitting.energy_combination import combine_energies, fit_energy_combination
from ase_uq.forward_pass import ForwardPass
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.uncertainty_model.combination import Combination
from ase_uq.uncertainty_model.energy_combination import EnergyCombination, EnergyFeatures

KEPT = EnergyCombination(0.6, -4.0, 0.2, {"knows": 0.7, "more": 0.4}, {"anchor": 1.0, "all": 0.9}, bound=0.8)


def features(seed: int, n_frames: int = 100, knows: float = 0.0) -> EnergyFeatures:
    """The anchor sees a level of errors; `knows` sees more by so much, `noise` sees noise."""
    random = np.random.default_rng(seed)
    level, hidden, noise = random.normal(size=(3, n_frames)) * np.array([[1.0], [0.5], [0.5]])
    base, way = torch.tensor(level - 8), torch.tensor(random.uniform(-0.3, 0.2, n_frames))
    return EnergyFeatures(
        base, way, {"knows": base + torch.tensor(knows * hidden), "noise": base + torch.tensor(noise)}
    )


def residuals(seed: int, known: EnergyFeatures) -> np.ndarray:
    """Errors whose log σ² `knows` has right."""
    return np.random.default_rng(seed).normal(size=len(known.base)) * np.exp(known.others["knows"].numpy() / 2)


class TestLaw:
    def test_is_what_numpy_says(self):
        random = np.random.default_rng(0)
        base, knows, more = random.normal(-3, 2, size=(3, 50))
        way = random.uniform(-0.5, 1, 50)
        found = KEPT(
            EnergyFeatures(*map(torch.tensor, (base, way)), {"knows": torch.tensor(knows), "more": torch.tensor(more)})
        )
        share = np.minimum(np.maximum(0, 1 - way / 0.6), 1)
        t = [0.8 * np.tanh((other - base) / 0.8) for other in (knows, more)]
        expected = base + share * (0.2 + 0.7 * t[0] + 0.4 * t[1])
        expected = np.where(base < -4, np.maximum(expected, base), np.maximum(expected, -4))
        np.testing.assert_allclose(base + found.numpy(), expected, rtol=1e-12)
        assert np.abs(expected - base).max() > 0.5

    def test_beyond_the_end_nothing_is_added(self):
        base = torch.tensor([-3.0, torch.inf, torch.nan, -3.0])
        far = EnergyFeatures(base, torch.tensor([0.6, 1.0, 1.0, torch.nan]), {"knows": 3 - base, "more": base + 2})
        assert KEPT(far).tolist() == [0, 0, 0, 0]

    def test_nothing_is_added_without_weights(self):
        none = replace(KEPT, constant=0.0, weights={})
        assert none(features(0)).tolist() == [0] * 100


class TestFit:
    def test_weights_are_those_of_another_optimiser(self):
        known = features(1, knows=1.5)
        errors = residuals(2, known)
        found = fit_energy_combination(known, errors)
        assert list(found.likelihoods) == ["anchor", "knows", "noise", "all"]
        base, end = known.base.numpy(), max(np.quantile(known.way.numpy(), 0.8), 0.1)
        share = np.clip(1 - known.way.numpy() / end, 0, 1)
        t = np.tanh(known.others["knows"].numpy() - base)

        def loss(x: np.ndarray) -> float:
            eta = base + share * (x[0] + x[1] * t)
            return float(np.mean(eta + errors**2 * np.exp(-eta)))

        best = minimize(loss, [0.0, 0.5], method="Nelder-Mead", bounds=[(-5, 5), (0, 1)], options={"xatol": 1e-7}).x
        assert found.weights.keys() == {"knows"}
        np.testing.assert_allclose([found.constant, found.weights["knows"]], best * 100 / 103, atol=1e-5)
        assert found.end == pytest.approx(end, rel=1e-12)
        assert found.floor == pytest.approx(np.median(base), rel=1e-12)

    def test_a_method_that_knows_more_helps_on_fresh_frames(self):
        found = fit_energy_combination(known := features(1, knows=1.5), residuals(2, known))
        fresh = features(3, n_frames=2000, knows=1.5)
        squares = residuals(4, fresh) ** 2
        logs = [fresh.base.numpy(), fresh.base.numpy() + found(fresh).numpy()]
        before, after = (np.mean(log + squares * np.exp(-log)) / 2 for log in logs)
        assert after < before - 0.02

    @pytest.mark.parametrize("seed", range(3))
    def test_one_that_knows_nothing_is_not_kept(self, seed: int):
        found = fit_energy_combination(known := features(seed), residuals(10 + seed, known))
        assert (found.weights, found.constant) == ({}, 0.0)
        assert found.describe("bll")[0] == "log σ² = bll"

    def test_frames_without_a_label_do_not_count(self):
        errors = residuals(2, known := features(1, knows=1.5))
        errors[::3] = np.nan
        there = torch.tensor(np.isfinite(errors))
        others = {name: values[there] for name, values in known.others.items()}
        some = EnergyFeatures(known.base[there], known.way[there], others)
        assert fit_energy_combination(known, errors) == fit_energy_combination(some, errors[np.isfinite(errors)])


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


def fitted(calculator: ToyCalculator, calibration: list[Atoms]) -> UncertaintyModel:
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        patch.setattr(fitting, "_TRAINING", Training(hidden=(4,), max_epochs=2))
        methods = ("bll", "mahalanobis")
        return fit(calculator, labelled_frames(20, seed=1), calibration, methods=methods, progress=False)


@pytest.fixture(scope="module")
def model(calculator: ToyCalculator) -> UncertaintyModel:
    """With a correction that acts on most frames, whatever the few calibration frames support."""
    return with_energy(
        fitted(calculator, labelled_frames(20, seed=2)),
        EnergyCombination(1.0, -99.0, 0.3, {"mahalanobis": 0.8}, {"anchor": 0.1, "mahalanobis": 0.0}),
    )


def with_energy(model: UncertaintyModel, energy: EnergyCombination | None) -> UncertaintyModel:
    found = model.combination
    assert isinstance(found, Combination)
    parts = (found.inputs, found.fade, found.floor, found.ensemble, found.constant, found.weights, found.likelihoods)
    return replace(model, combination=Combination(*parts, energy=energy))


@pytest.fixture(scope="module")
def batch(calculator: ToyCalculator) -> ForwardPass:
    return forward_pass_of(load_backend(calculator), labelled_frames(6, seed=3))


def of_energies(model: UncertaintyModel, batch: ForwardPass) -> dict[str, Any]:
    assert model.combination is not None
    assert model.far_field is not None
    calibrators = model.combination.inputs.energy_calibrators
    scores = {name: model.methods[name].head(batch).energy for name in calibrators}
    limit = model.far_field.limits(batch).energy
    variances = {name: c.variance(scores[name], limit).numpy() for name, c in calibrators.items()}
    bll = calibrators["bll"]
    assert isinstance(bll, FarFieldCalibrator)
    return {**variances, "way": bll.way(scores["bll"]).numpy()}


class TestInTheProduct:
    def test_the_plain_key_is_corrected_and_those_of_methods_are_not(self, model: UncertaintyModel, batch: ForwardPass):
        found, alone = model.apply(batch), with_energy(model, None).apply(batch)
        assert list(found) == list(alone)
        for key, value in alone.items():
            assert torch.equal(found[key], value) == (key != "energy_uncertainty"), key
        rows = of_energies(model, batch)
        logs = {name: np.log(rows[name]) for name in ("bll", "mahalanobis")}
        share = np.clip(1 - rows["way"], 0, 1)
        expected = logs["bll"] + share * (0.3 + 0.8 * np.tanh(logs["mahalanobis"] - logs["bll"]))
        counts = batch.n_atoms_of_frame.numpy()
        np.testing.assert_allclose(found["energy_uncertainty"].numpy(), counts * np.exp(expected / 2), rtol=1e-9)

    def test_nothing_earned_is_the_anchor_to_the_bit(self, model: UncertaintyModel, batch: ForwardPass):
        none = EnergyCombination(1.0, -3.0, 0.0, {}, {"anchor": 0.1})
        found = with_energy(model, none).apply(batch)
        assert torch.equal(found["energy_uncertainty"], found["energy_uncertainty_bll"])

    def test_far_away_it_is_the_anchor_to_the_bit(self, model: UncertaintyModel, calculator: ToyCalculator):
        far = forward_pass_of(load_backend(calculator), labelled_frames(4, seed=5, spread=(0.8, 0.9)))
        assert (of_energies(model, far)["way"] == 1).all()
        found = model.apply(far)
        assert torch.equal(found["energy_uncertainty"], found["energy_uncertainty_bll"])

    def test_a_file_gives_the_same_bits(self, model: UncertaintyModel, batch: ForwardPass, tmp_path: Path):
        model.save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a")
        assert again.summary(details=True) == model.summary(details=True)
        for key, value in model.apply(batch).items():
            assert torch.equal(again.apply(batch)[key], value), key
        again.save(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()

    def test_the_summary_says_what_was_kept(self, model: UncertaintyModel):
        said = model.summary(details=True)
        assert "    energy   log σ² = bll + f·(+0.30 + 0.80·mahalanobis), f from 1 to 0 at t = 1.00\n" in said
        assert "             cross-validated NLL: anchor 0.100, mahalanobis 0.000\n" in said

    def test_members_deviate_by_it(self, model: UncertaintyModel, calculator: ToyCalculator):
        (prediction,) = Predictor(calculator, model, ensemble=16).predict(labelled_frames(1, seed=3))
        assert prediction["energy_ensemble"].std() == pytest.approx(prediction["energy_uncertainty"], rel=1e-6)
        assert prediction["energy_uncertainty"] != pytest.approx(prediction["energy_uncertainty_bll"], rel=1e-3)

    def test_the_bias_follows_the_anchor(self, model: UncertaintyModel, calculator: ToyCalculator):
        results = []
        for one in (model, with_energy(model, None)):
            with pytest.warns(UQWarning, match="not physical dynamics"):
                bias = UncertaintyBias(UncertainCalculator(calculator, one), height=1.0, width=1.0)
            bias.calculate(labelled_frames(1, seed=3)[0])
            results.append(bias.results)
        assert results[0]["bias_energy"] == results[1]["bias_energy"] < 0
        np.testing.assert_array_equal(results[0]["bias_forces"], results[1]["bias_forces"])


class TestWhereThereIsNone:
    def test_without_labels_of_energies(self, calculator: ToyCalculator, batch: ForwardPass):
        calibration = labelled_frames(20, seed=2)
        for atoms in calibration[9:]:  # nine are too few
            del atoms.info["REF_energy"]
        found = fitted(calculator, calibration)
        assert isinstance(found.combination, Combination)
        assert found.combination.energy is None
        assert "energy_uncertainty" not in found.apply(batch)

    def test_without_a_far_end_or_another_method(self, model: UncertaintyModel):
        assert isinstance(model.combination, Combination)
        inputs = model.combination.inputs
        bll = inputs.methods["bll"]
        affine = replace(bll, calibrators={**bll.calibrators, "energy": AffineCalibrator(0.1, 0.2, 0, "")})
        observed: Any = None  # nothing of it is read
        assert combine_energies(replace(inputs, methods={**inputs.methods, "bll": affine}), observed) is None
        forces_only = {
            name: replace(m, calibrators={"forces": m.calibrators["forces"]}) for name, m in inputs.methods.items()
        }
        assert combine_energies(replace(inputs, methods=forces_only), observed) is None
        assert combine_energies(replace(inputs, methods={"bll": bll}), observed) is None
