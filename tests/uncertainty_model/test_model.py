"""The artefact: bit-identical round trips, the potential it belongs to, damaged files, thresholds, one old file."""

import dataclasses
import json
import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase.build import molecule
from safetensors.torch import load_file, save_file
from scipy.signal import lfilter

from ase_uq import Predictor, Quantile, Reduction, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import ArtefactError, LabelError, PotentialMismatch, UQWarning
from ase_uq.fitting import combination as combined
from ase_uq.forward_pass import Edges, EnergyLayer, ForceLayer, ForwardPass
from ase_uq.io.tensor_file import write_tensor_file
from ase_uq.methods.bll import BLL
from ase_uq.numerics.networks import MLPEnsemble
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.thresholds.conformal import conformal_quantile
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, PerElement
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData
from ase_uq.uncertainty_model.combination import RESIDUAL, Combination
from ase_uq.uncertainty_model.energy_combination import EnergyCombination
from ase_uq.uncertainty_model.record import CalibrationRecord

SEVERAL = ("bll", "pdrum", "kernel")
FITTED = Path(__file__).parents[1] / "fitted"
# Sixty toy frames: energies whose errors the distance does not order.
pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the energy:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS, direct=True)


@pytest.fixture(scope="module")
def model(calculator: ToyCalculator) -> UncertaintyModel:
    return fit(calculator, labelled_frames(60, seed=1), labelled_frames(60, seed=2), methods=["bll"], progress=False)


@pytest.fixture(scope="module")
def perturbed(calculator: ToyCalculator) -> UncertaintyModel:
    bad = labelled_frames(30, seed=5, spread=(0.3, 0.5))
    return fit(
        calculator,
        labelled_frames(60, seed=1),
        labelled_frames(60, seed=2),
        perturbed=bad,
        methods=["bll"],
        progress=False,
    )


@pytest.fixture
def path(model: UncertaintyModel, tmp_path: Path) -> Path:
    model.save(tmp_path / "a.uq.safetensors")
    return tmp_path / "a.uq.safetensors"


@pytest.fixture(scope="module", params=["conservative", "direct"])
def potential(request: pytest.FixtureRequest) -> ToyCalculator:
    return ToyCalculator(ELEMENTS, direct=request.param == "direct")


@pytest.fixture(scope="module")
def several(potential: ToyCalculator) -> UncertaintyModel:
    """Two methods, and a combination in which everything was kept."""
    with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        patch.setattr(combined, "_TRAINING", Training(hidden=(8,), max_epochs=2))
        methods = ("bll", "mahalanobis")
        model = fit(
            potential, labelled_frames(30, seed=1), labelled_frames(30, seed=2), methods=methods, progress=False
        )
    found = model.combination
    assert found is not None
    n_inputs = found.inputs.features(
        batch := forward_pass_of(load_backend(potential), labelled_frames(1, seed=3)),
        {name: fitted.head(batch) for name, fitted in model.methods.items()},
        torch.ones(len(batch.numbers), dtype=torch.float64),
    ).network_inputs.shape[1]
    ensemble = _networks(n_inputs)
    weights = {"mahalanobis": 0.3, RESIDUAL: 0.6}
    energy = EnergyCombination(1.0, -99.0, -0.1, {"mahalanobis": 0.5}, {"anchor": 0.1})
    kept = Combination(found.inputs, found.fade, -99.0, ensemble, -0.1, weights, found.likelihoods, energy=energy)
    return dataclasses.replace(model, combination=kept)


def _networks(n_inputs: int) -> MLPEnsemble:
    """Untrained: what they say is beside the point, but it depends on all inputs."""
    random = torch.Generator().manual_seed(0)
    sizes = [n_inputs, 4, 1]
    weights = torch.randn(5, 4 * n_inputs + 4 + 4 + 1, generator=random)
    scales = {
        "centre": torch.zeros(n_inputs, dtype=torch.float64),
        "spread": torch.full((n_inputs,), 10.0, dtype=torch.float64),
        "shift": torch.zeros(1, dtype=torch.float64),
        "unit": torch.ones(1, dtype=torch.float64),
    }
    return MLPEnsemble({"sizes": sizes, "output": "linear"}, {"weights": weights, **scales})


class TestCombination:
    def test_results_are_the_same_bits(self, several: UncertaintyModel, potential: ToyCalculator, tmp_path: Path):
        several.save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a")
        batch = forward_pass_of(load_backend(potential), labelled_frames(6, seed=3))
        found, expected = again.apply(batch), several.apply(batch)
        assert list(found) == list(expected)
        assert set(found) == set(several.results) == set(again.results)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key
        assert not torch.allclose(found["forces_uncertainty"], found["forces_uncertainty_bll"])
        again.save(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == (tmp_path / "a").read_bytes()

    def test_all_else_is_the_same(self, several: UncertaintyModel, tmp_path: Path):
        several.save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a")
        assert again.primary == "combined"
        assert again.summary() == several.summary()
        assert again.results == several.results
        assert again.combination is not None
        assert several.combination is not None
        assert again.combination.settings == several.combination.settings
        for name in ("anchor", "others", "distances", "elements"):
            assert getattr(again.combination.inputs, name) == getattr(several.combination.inputs, name)

    def test_without_networks_too(self, several: UncertaintyModel, potential: ToyCalculator, tmp_path: Path):
        found = several.combination
        assert found is not None
        plain = Combination(found.inputs, found.fade, -99.0, None, 0.1, {"mahalanobis": 0.4}, found.likelihoods)
        model = dataclasses.replace(several, combination=plain)
        model.save(tmp_path / "a")
        batch = forward_pass_of(load_backend(potential), labelled_frames(6, seed=3))
        result = UncertaintyModel.load(tmp_path / "a").apply(batch)["forces_uncertainty"]
        assert torch.equal(result, model.apply(batch)["forces_uncertainty"])

    def test_copies_on_a_device_are_copies(self, several: UncertaintyModel, potential: ToyCalculator):
        batch = forward_pass_of(load_backend(potential), labelled_frames(6, seed=3))
        expected = several.apply(batch)
        copy, gone = several.to(torch.device("cpu")), several.to(torch.device("meta"))
        assert copy.combination is not None
        assert gone.combination is not None
        for key, value in copy.apply(batch).items():
            assert torch.equal(value, expected[key]), key
        assert all(buffer.is_meta for buffer in gone.combination.buffers())
        assert copy.combination.ensemble is not None
        copy.combination.ensemble.weights += 5
        for key, value in several.apply(batch).items():
            assert torch.equal(value, expected[key]), key

    def test_batch_equals_singles(self, several: UncertaintyModel, potential: ToyCalculator):
        frames = [*labelled_frames(4, seed=3), molecule("O2")[:1]]
        predictor = Predictor(load_backend(potential), several)
        for together, atoms in zip(predictor.predict(frames), frames, strict=True):
            (alone,) = predictor.predict([atoms])
            for key in several.results:
                # A ridge of 1e-9 loses nine digits of sixteen in directions that no frame explored.
                np.testing.assert_allclose(together[key], alone[key], rtol=1e-5, atol=1e-12, err_msg=key)

    def test_other_plain_keys_than_forces_and_energy_are_those_of_the_anchor(
        self, several: UncertaintyModel, potential: ToyCalculator
    ):
        found = several.apply(forward_pass_of(load_backend(potential), labelled_frames(6, seed=3)))
        assert torch.equal(found["energies_uncertainty"], found["energies_uncertainty_bll"])
        assert not torch.allclose(found["energy_uncertainty"], found["energy_uncertainty_bll"])

    def test_thresholds_are_those_of_its_record(self, several: UncertaintyModel, tmp_path: Path):
        several.save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a")
        assert again.threshold(Quantile(0.5)) == several.threshold(Quantile(0.5))
        assert several.threshold(Quantile(0.5)) == np.quantile(several.record.readings(Reduction()), 0.5)

    def test_the_summary_says_what_it_is_made_of(self, several: UncertaintyModel):
        text = several.summary(details=True)
        assert "combined (primary)" in text
        assert "method bll\n" in text
        assert "method mahalanobis\n" in text
        assert f"+ 0.30·mahalanobis + 0.60·{RESIDUAL}" in text
        assert several.combination is not None
        assert all(line in text for line in several.combination.describe())

    def test_any_flipped_bit_is_found(self, several: UncertaintyModel, tmp_path: Path):
        several.save(tmp_path / "a")
        data = (tmp_path / "a").read_bytes()
        for offset in np.random.default_rng(0).integers(0, len(data), 20):
            flipped = bytearray(data)
            flipped[offset] ^= 1
            (tmp_path / "a").write_bytes(flipped)
            with pytest.raises(ArtefactError):
                UncertaintyModel.load(tmp_path / "a")


class TestRoundTrip:
    def test_results_are_the_same_bits(self, model: UncertaintyModel, calculator: ToyCalculator, path: Path):
        batch = forward_pass_of(load_backend(calculator), labelled_frames(6, seed=3))
        again = UncertaintyModel.load(path)
        found, expected = again.apply(batch), model.apply(batch)
        assert list(found) == list(expected)
        for key, value in expected.items():
            assert torch.equal(found[key], value), key

    def test_all_else_is_the_same(self, model: UncertaintyModel, path: Path):
        again = UncertaintyModel.load(path)
        assert again.summary() == model.summary()
        assert again.results == model.results
        assert again.provenance == model.provenance
        assert again.primary == model.primary
        assert again.identity.fingerprint == model.identity.fingerprint
        assert torch.equal(again.identity.probe, model.identity.probe)
        assert (again.edges.counts, again.edges.inherited) == (model.edges.counts, model.edges.inherited)
        torch.testing.assert_close(again.edges.edges, model.edges.edges, rtol=0, atol=0, equal_nan=True)
        for field in dataclasses.fields(model.record):
            name = field.name
            np.testing.assert_array_equal(getattr(again.record, name), getattr(model.record, name))
        assert again.threshold(Quantile(0.9)) == model.threshold(Quantile(0.9))

    def test_saving_what_was_loaded_gives_the_same_file(self, path: Path, tmp_path: Path):
        UncertaintyModel.load(path).save(tmp_path / "b")
        assert (tmp_path / "b").read_bytes() == path.read_bytes()

    def test_two_methods_keep_their_results_apart(self, calculator: ToyCalculator, tmp_path: Path):
        """Two methods would be two classes; here one of them is the other under a second name."""
        plain = fit(
            calculator, labelled_frames(60, seed=1), labelled_frames(60, seed=2), methods=["bll"], progress=False
        )
        both = dataclasses.replace(plain, methods={"bll": plain.methods["bll"], "second": plain.methods["bll"]})
        batch = forward_pass_of(load_backend(calculator), labelled_frames(3, seed=3))
        found = both.apply(batch)
        assert set(found) == set(both.results)
        assert torch.equal(found["forces_uncertainty_second"], found["forces_uncertainty"])
        assert "gamma_bll" not in found

    def test_nothing_in_the_file_is_executed(self, path: Path, monkeypatch: pytest.MonkeyPatch):
        def forbidden(*_: Any, **__: Any):
            raise AssertionError("something was unpickled")

        for owner, name in ((pickle, "Unpickler"), (pickle, "load"), (pickle, "loads"), (torch, "load")):
            monkeypatch.setattr(owner, name, forbidden)
        UncertaintyModel.load(path)

    def test_loading_needs_no_potential_package(self, path: Path):
        assert load_file(path)["record/numbers"].dtype == torch.uint8


class TestPotential:
    def test_its_own_is_accepted(self, model: UncertaintyModel):
        Predictor(load_backend(ToyCalculator(ELEMENTS, direct=True)), model)

    def test_its_own_in_another_precision_is_accepted(self, model: UncertaintyModel):
        Predictor(load_backend(ToyCalculator(ELEMENTS, direct=True, dtype="float32")), model)

    def test_other_weights_are_refused_with_the_deviation(self, model: UncertaintyModel):
        other = load_backend(ToyCalculator(ELEMENTS, direct=True, seed=5))
        with pytest.raises(PotentialMismatch, match=r"other weights: .* differ by \d\.\de[-+]\d\d \(relative"):
            Predictor(other, model)

    def test_another_setting_is_refused_by_name(self, model: UncertaintyModel):
        with pytest.raises(PotentialMismatch, match="direct was True, here it is False"):
            Predictor(load_backend(ToyCalculator(ELEMENTS)), model)
        with pytest.raises(PotentialMismatch, match=r"fitted for H, C, O, this potential is for H, C: another"):
            Predictor(load_backend(ToyCalculator(("H", "C"), direct=True)), model)

    def test_the_same_weights_in_another_form_are_accepted_with_a_warning(self, model: UncertaintyModel):
        rewritten = dataclasses.replace(model, identity=dataclasses.replace(model.identity, weights="0" * 64))
        with pytest.warns(UQWarning, match="weights are stored differently"):
            Predictor(load_backend(ToyCalculator(ELEMENTS, direct=True)), rewritten)

    def test_it_survives_the_file(self, path: Path):
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            Predictor(load_backend(ToyCalculator(ELEMENTS, direct=True, seed=5)), UncertaintyModel.load(path))


class TestDamage:
    """The layers below are tested in test_artefact; here that nothing gets past them."""

    def test_any_flipped_byte_is_found(self, path: Path):
        data = path.read_bytes()
        random = np.random.default_rng(0)
        for offset in random.integers(0, len(data), 50):
            flipped = bytearray(data)
            flipped[offset] ^= 0xFF
            path.write_bytes(flipped)
            with pytest.raises(ArtefactError):  # which of the messages depends on the byte
                UncertaintyModel.load(path)

    def test_any_flipped_bit_of_the_header_is_found(self, path: Path):
        data = path.read_bytes()
        random = np.random.default_rng(1)
        header = 8 + int.from_bytes(data[:8], "little")
        for offset in random.integers(0, header, 100):
            flipped = bytearray(data)
            flipped[offset] ^= 1 << int(random.integers(8))
            path.write_bytes(flipped)
            with pytest.raises(ArtefactError):
                UncertaintyModel.load(path)

    @pytest.mark.parametrize("share", [0.0, 0.01, 0.3, 0.9, 0.9999])
    def test_a_truncated_file_is_refused(self, path: Path, share: float):
        data = path.read_bytes()
        path.write_bytes(data[: int(share * len(data))])
        with pytest.raises(ArtefactError, match="truncated, damaged, or another kind of file"):
            UncertaintyModel.load(path)

    def test_a_newer_file_is_refused(self, tmp_path: Path):
        write_tensor_file(tmp_path / "b", "uncertainty model", 99, {}, {})
        with pytest.raises(ArtefactError, match="newer ase_uq: its uncertainty model layout is version 99"):
            UncertaintyModel.load(tmp_path / "b")

    def test_a_file_of_another_kind_is_refused(self, tmp_path: Path):
        write_tensor_file(tmp_path / "b", "potential", 1, {}, {})
        with pytest.raises(ArtefactError, match="is an ase_uq potential; an ase_uq uncertainty model was expected"):
            UncertaintyModel.load(tmp_path / "b")

    def test_files_that_are_not_ours_are_refused(self, tmp_path: Path):
        save_file({"weight": torch.ones(3)}, tmp_path / "a")
        (tmp_path / "b").write_text("an extended xyz, perhaps")
        (tmp_path / "c").write_bytes(pickle.dumps(np.ones(100)))
        for name, match in (("a", "not a file that ase_uq wrote"), ("b", "cannot be read"), ("c", "cannot be read")):
            with pytest.raises(ArtefactError, match=match):
                UncertaintyModel.load(tmp_path / name)

    def test_a_missing_file_is_named(self, tmp_path: Path):
        with pytest.raises(ArtefactError, match=r"there is no file .*nowhere\.uq\.safetensors"):
            UncertaintyModel.load(tmp_path / "nowhere.uq.safetensors")

    def test_a_method_that_is_not_installed_is_named(self, model: UncertaintyModel, tmp_path: Path):
        foreign = dataclasses.replace(model, methods={"theirs": model.methods["bll"]}, primary="theirs")
        foreign.save(tmp_path / "a")
        with pytest.raises(ArtefactError, match=r"there is no method 'theirs'"):
            UncertaintyModel.load(tmp_path / "a")


class TestSaving:
    def test_a_missing_folder_is_refused(self, model: UncertaintyModel, tmp_path: Path):
        with pytest.raises(ArtefactError, match=r"cannot write .* Choose a folder that exists"):
            model.save(tmp_path / "missing" / "a.uq.safetensors")
        assert os.listdir(tmp_path) == []

    def test_a_full_disk_leaves_nothing_behind(
        self, model: UncertaintyModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        def full(*_: Any, **__: Any):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("ase_uq.io.tensor_file.save_file", full)
        with pytest.raises(ArtefactError, match="No space left on device"):
            model.save(tmp_path / "a.uq.safetensors")
        assert os.listdir(tmp_path) == []


class TestSummary:
    def test_it_says_what_was_fitted_and_found(self, model: UncertaintyModel):
        text = model.summary(details=True)
        assert "toy potential" in text
        assert model.identity.fingerprint[:12] in text
        assert "fitted on      60 frames" in text
        assert "calibrated on  60 frames" in text
        for quantity, calibrator in model.methods["bll"].calibrators.items():
            assert f"{quantity:8s} {calibrator.describe()}" in text
        assert "mean z² 1.0" in text
        for symbol, z in (("H", 1), ("C", 6), ("O", 8)):
            assert f"{symbol} {model.edges.counts[z]}" in text

    def test_rare_elements_are_marked(self, model: UncertaintyModel):
        rare = dataclasses.replace(model, edges=dataclasses.replace(model.edges, inherited=(8,)))
        assert f"O {model.edges.counts[8]}*" in rare.summary()
        assert "(* too few: the edge of the others)" in rare.summary()
        said = " ".join(rare.summary().split())
        assert "For O there were too few calibration atoms to know where near ends." in said

    def test_formulas_are_details(self, model: UncertaintyModel):
        assert "·u^" not in model.summary()
        assert "versions" not in model.summary()
        assert all(c.describe() in model.summary(details=True) for c in model.methods["bll"].calibrators.values())

    def test_many_elements_are_a_table(self, model: UncertaintyModel):
        counts = {z: 10**6 + z for z in range(1, 75)}
        many = dataclasses.replace(model, edges=dataclasses.replace(model.edges, counts=counts, inherited=(74,)))
        assert max(map(len, many.summary().splitlines())) <= 120
        assert "of 74 elements (* too few: the edge of the others):" in many.summary()
        assert "W 1000074*" in many.summary()
        assert "74 elements" in repr(many)

    @pytest.mark.parametrize(
        ("scale", "part"),
        [
            (1.0, "the uncertainties are as large as the errors on average"),
            (2.0, "the errors are 50% smaller than the uncertainties say"),
            (0.5, "the errors are 100% larger than the uncertainties say"),
        ],
    )
    def test_it_ends_with_sentences(self, model: UncertaintyModel, scale: float, part: str):
        z2 = np.mean(model.record.error**2 / model.record.uncertainty**2)
        exact = scale * np.sqrt(z2) * model.record.uncertainty
        scaled = dataclasses.replace(model, record=dataclasses.replace(model.record, uncertainty=exact))
        said = " ".join(scaled.summary().split())
        assert part in said
        assert "Near the calibration frames (gamma up to 1)" in said
        assert "Next: `ase-uq evaluate` judges it on test frames that it has not seen;" in said
        assert "`ase-uq reference` makes the runs" in said
        runs = scaled.with_reference(ReferenceRuns((np.ones(3),), 1.0))
        assert "`ase-uq reference` makes the runs" not in " ".join(runs.summary().split())

    def test_numbers_for_programs(self, model: UncertaintyModel):
        numbers = json.loads(json.dumps(model.numbers()))
        assert numbers["mean_squared_z"] == pytest.approx(1, abs=0.1)
        assert numbers["calibration_frames"] == 60
        assert numbers["elements"].keys() == {"H", "C", "O"}
        assert numbers["readings"]["0.5"] == pytest.approx(model.threshold(Quantile(0.5)))


class TestThreshold:
    def test_a_number_is_itself(self, model: UncertaintyModel):
        assert model.threshold(0.3) == 0.3
        assert model.threshold(1) == 1.0
        assert model.threshold(np.float32(0.25)) == 0.25  # pyright: ignore
        assert isinstance(model.threshold(np.float64(0.3)), float)

    def test_a_quantile_is_that_of_the_readings(self, model: UncertaintyModel):
        readings = model.record.readings(Reduction("mean"))
        assert len(readings) == 60
        assert model.threshold(Quantile(0.8), Reduction("mean")) == np.quantile(readings, 0.8)
        assert model.threshold(Quantile(0.5)) == np.quantile(model.record.readings(Reduction("max")), 0.5)

    def test_readings_are_those_of_a_prediction(self, model: UncertaintyModel, calculator: ToyCalculator):
        predictor = Predictor(load_backend(calculator), model)
        frames = labelled_frames(60, seed=2)
        expected = [prediction.atom_uncertainty.max() for prediction in predictor.predict(frames)]
        # The record is kept in single precision.
        np.testing.assert_allclose(model.record.readings(Reduction()), expected, rtol=1e-6)

    def test_too_few_frames_for_a_quantile_are_refused(self, model: UncertaintyModel):
        with pytest.raises(ValueError, match=r"Quantile\(0\.99\) needs at least 100 calibration frames, .* has 60"):
            model.threshold(Quantile(0.99))

    def test_words_are_criteria(self, model: UncertaintyModel):
        assert model.threshold("q0.5") == model.threshold(Quantile(0.5))
        with pytest.raises(
            ValueError, match=r"'q5' is neither a number in eV/Å nor a criterion: a quantile lies between"
        ):
            model.threshold("q5")

    def test_a_meaning_that_is_none_is_refused(self, model: UncertaintyModel):
        with pytest.raises(TypeError, match=r"a threshold is a number in eV/Å or a criterion .* not '0\.3'"):
            model.threshold("0.3")  # pyright: ignore


class TestUnits:
    """Frames of a trajectory are counted by its blocks; those of other runs and compositions are kept apart."""

    @staticmethod
    def record(readings: np.ndarray, *, run: np.ndarray | None = None, numbers: tuple[int, ...] = (1, 8)):
        n_frames = len(readings)
        return CalibrationRecord(
            uncertainty=np.repeat(readings, 2).astype(np.float32),
            error=np.repeat(readings, 2).astype(np.float32),
            numbers=np.tile(np.array(numbers, np.uint8), n_frames),
            n_atoms_of_frame=np.full(n_frames, 2, np.int32),
            run=np.zeros(n_frames, np.int32) if run is None else run,
        )

    @staticmethod
    def walk(n: int) -> np.ndarray:
        """A slow series: a frame remembers those before it for about ten."""
        noise = np.random.default_rng(0).normal(size=n)
        return np.exp(0.3 * lfilter([1.0], [1.0, -0.9], noise))

    def test_a_trajectory_is_counted_by_blocks(self):
        slow = self.record(self.walk(200))
        assert len(np.unique(slow.groups)) < 60
        shuffled = self.record(np.random.default_rng(1).permutation(self.walk(200)))
        np.testing.assert_array_equal(shuffled.groups, np.arange(200))

    def test_the_slower_of_reading_and_error_decides(self):
        fast = self.record(np.random.default_rng(1).permutation(self.walk(200)))
        mixed = dataclasses.replace(fast, error=np.repeat(self.walk(200), 2).astype(np.float32))
        assert len(np.unique(mixed.groups)) < 60

    def test_blocks_end_with_their_run_and_with_a_change_of_composition(self):
        of_run = np.repeat([0, 1, 2], [50, 3, 50]).astype(np.int32)
        runs = self.record(self.walk(103), run=of_run)
        for unit in np.unique(runs.groups):
            assert len(np.unique(of_run[runs.groups == unit])) == 1
        water, peroxide = self.record(self.walk(50)), self.record(self.walk(50), numbers=(8, 8))
        columns = {
            field.name: np.concatenate([getattr(water, field.name), getattr(peroxide, field.name)])
            for field in dataclasses.fields(water)
        }
        groups = CalibrationRecord(**columns).groups
        assert set(groups[:50]).isdisjoint(groups[50:])

    def test_a_run_is_one_also_where_frames_of_another_stand_between(self):
        other = np.exp(np.roll(np.log(self.walk(200)), 77))
        mixed = np.stack([self.walk(200), other], 1).reshape(-1)
        of_run = np.tile([0, 1], 200).astype(np.int32)
        apart = self.record(np.concatenate([self.walk(200), other]), run=np.repeat([0, 1], 200).astype(np.int32))
        found = self.record(mixed, run=of_run).groups
        assert len(np.unique(found)) == len(np.unique(apart.groups)) < 120
        for unit in np.unique(found):
            assert len(np.unique(of_run[found == unit])) == 1

    def test_its_digest_is_that_of_what_it_says(self, model: UncertaintyModel, tmp_path: Path):
        model.save(tmp_path / "a.uq.safetensors")
        assert UncertaintyModel.load(tmp_path / "a.uq.safetensors").digest == model.digest
        assert model.with_reference(ReferenceRuns((np.ones(3),), 1.0)).digest == model.digest
        other = dataclasses.replace(model, record=dataclasses.replace(model.record, uncertainty=model.record.error))
        assert other.digest != model.digest

    def test_thresholds_say_how_many_units_they_had(self, model: UncertaintyModel):
        walking = dataclasses.replace(model, record=self.record(self.walk(200)))
        n_units = len(np.unique(walking.record.groups))
        assert walking.threshold(ErrorBound(0.3, confidence=0.9)).n_units == n_units  # pyright: ignore
        assert f"thresholds count {n_units} units, not 200 frames" in walking.summary()
        assert "thresholds count" not in model.summary()

    def test_a_number_for_each_element_is_not_one_number(self, model: UncertaintyModel):
        with pytest.raises(TypeError, match=r"PerElement\(Quantile\(0\.5\)\) is a number for each element, not one"):
            model.threshold(PerElement(Quantile(0.5)))  # type: ignore[arg-type]
        assert model.threshold(Quantile(0.5), Reduction(elements=("C",))) > 0

    def test_errors_are_the_largest_of_the_atoms_that_are_looked_at(self, model: UncertaintyModel):
        record = model.record
        frames = np.split(np.arange(len(record.error)), np.cumsum(record.n_atoms_of_frame)[:-1])
        for kind in ("mean", "max", 0.5):
            expected = [record.error[own].max() for own in frames]
            np.testing.assert_array_equal(record.errors(Reduction(kind)), expected)
        carbon = [record.error[own][record.numbers[own] == 6].max(initial=-np.inf) for own in frames]
        np.testing.assert_array_equal(record.errors(Reduction(elements=("C",))), carbon)

    def test_indices_of_different_systems_are_refused(self, model: UncertaintyModel):
        chosen = Reduction(indices=(0,))
        with pytest.raises(ValueError, match=r"chosen indices needs calibration frames of one system"):
            model.threshold(Quantile(0.5), chosen)
        one = dataclasses.replace(model, record=self.record(self.walk(50)))
        assert one.threshold(Quantile(0.5), chosen) > 0


class TestReference:
    RUNS = ReferenceRuns(
        tuple(np.random.default_rng(0).lognormal(size=(25, 40))), 0.5, Reduction("mean", ("C", "O")), "300 K"
    )

    def test_it_comes_back_from_the_file(self, model: UncertaintyModel, tmp_path: Path):
        model.with_reference(self.RUNS).save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a").reference
        assert again is not None
        assert (again.interval, again.reduction, again.conditions) == (0.5, self.RUNS.reduction, "300 K")
        assert len(again.readings) == 25
        for found, expected in zip(again.readings, self.RUNS.readings, strict=True):
            np.testing.assert_array_equal(found, expected.astype(np.float32))
        assert "reference      25 runs, 1000 readings every 0.5 fs, 300 K" in model.with_reference(self.RUNS).summary()

    def test_false_alarms_are_counted_on_it(self, model: UncertaintyModel):
        criterion = FalseAlarms(per_run=0.1, steps=40)
        with pytest.raises(ValueError, match=r"the uncertainty model has none"):
            model.threshold(criterion)
        found = model.with_reference(self.RUNS).threshold(criterion, self.RUNS.reduction)
        assert found == criterion.resolve(
            ThresholdData(np.ones(1), np.ones(1), np.ones(1), self.RUNS.reduction, self.RUNS)
        )
        with pytest.raises(ValueError, match=r"the reference runs were read with"):
            model.with_reference(self.RUNS).threshold(criterion)

    def test_the_model_it_was_added_to_stays_as_it_was(self, model: UncertaintyModel):
        assert model.with_reference(self.RUNS) is not model
        assert model.reference is None


class TestPerturbed:
    def test_nothing_but_thresholds_of_missed_frames_depends_on_them(
        self, model: UncertaintyModel, perturbed: UncertaintyModel
    ):
        assert dataclasses.replace(perturbed, perturbed=None).summary() == model.summary()
        np.testing.assert_array_equal(perturbed.record.uncertainty, model.record.uncertainty)
        assert perturbed.threshold(Quantile(0.9)) == model.threshold(Quantile(0.9))
        tolerance = float(np.sort(model.record.errors(Reduction()))[-5])
        with pytest.raises(ValueError, match=r"needs at least 9 .* has 4 "):
            model.threshold(MissRate(tolerance, 0.1))
        found = perturbed.threshold(MissRate(tolerance, 0.1))
        assert found.n_units > 9  # pyright: ignore

    def test_their_readings_and_errors_are_those_of_predictions(
        self, perturbed: UncertaintyModel, calculator: ToyCalculator
    ):
        frames = labelled_frames(30, seed=5, spread=(0.3, 0.5))
        predictions = Predictor(load_backend(calculator), perturbed).predict(frames)
        record = perturbed.perturbed
        assert record is not None
        expected = np.concatenate([p.atom_uncertainty for p in predictions])
        np.testing.assert_allclose(record.uncertainty, expected, rtol=1e-6)
        errors = [
            np.linalg.norm(atoms.arrays["REF_forces"] - p["forces"], axis=1)
            for atoms, p in zip(frames, predictions, strict=True)
        ]
        np.testing.assert_allclose(record.error, np.concatenate(errors), rtol=1e-5)

    def test_they_come_back_from_the_file(self, perturbed: UncertaintyModel, tmp_path: Path):
        perturbed.save(tmp_path / "a")
        again = UncertaintyModel.load(tmp_path / "a")
        assert again.perturbed is not None
        for field in dataclasses.fields(again.perturbed):
            np.testing.assert_array_equal(
                getattr(again.perturbed, field.name), getattr(perturbed.perturbed, field.name)
            )
        assert "perturbed      30 frames" in again.summary()

    def test_they_need_forces(self, calculator: ToyCalculator):
        bad = labelled_frames(12, seed=5)
        del bad[3].arrays["REF_forces"]
        with pytest.raises(LabelError, match=r"perturbed frame 3 has no reference forces"):
            fit(calculator, labelled_frames(20, seed=1), labelled_frames(20, seed=2), perturbed=bad, progress=False)


class TestIntervals:
    def test_atoms_of_each_element_are_covered_as_promised(self, calculator: ToyCalculator):
        covered: dict[int, list[float]] = {1: [], 6: [], 8: []}
        model = fit(
            calculator, labelled_frames(60, seed=1), labelled_frames(60, seed=2), methods=["bll"], progress=False
        )
        predictor = Predictor(load_backend(calculator), model)
        fresh = labelled_frames(400, seed=9)
        for atoms, p in zip(fresh, predictor.predict(fresh), strict=True):
            bounds = model.intervals(0.9)(torch.from_numpy(p["forces_uncertainty"]), torch.tensor(atoms.numbers))
            errors = np.linalg.norm(atoms.arrays["REF_forces"] - p["forces"], axis=1)
            for z in np.unique(atoms.numbers):
                covered[int(z)].append(float(np.mean((errors <= bounds.numpy())[atoms.numbers == z])))
        for shares in covered.values():
            assert len(shares) > 50
            # One calibration set of sixty frames: its coverage scatters by √(0.9·0.1/60).
            assert abs(np.mean(shares) - 0.9) < 3 * np.sqrt(0.09 / 60)

    def test_an_element_with_too_few_units_shares_the_factor_of_all(self, model: UncertaintyModel):
        record = model.record
        frame = np.repeat(np.arange(len(record.n_atoms_of_frame)), record.n_atoms_of_frame)
        rare = record.numbers.copy()
        rare[(rare == 8) & (frame > 5)] = 6
        table = dataclasses.replace(model, record=dataclasses.replace(record, numbers=rare)).intervals(0.9)
        scores = record.error / record.uncertainty
        assert float(table.factors[8]) == pytest.approx(conformal_quantile(scores, 0.1, frame), rel=1e-6)
        carbon = rare == 6
        expected = conformal_quantile(scores[carbon], 0.1, frame[carbon])
        assert float(table.factors[6]) == pytest.approx(expected, rel=1e-6)

    def test_an_element_never_seen_has_no_bound(self, model: UncertaintyModel):
        for uncertainty in (1.0, 0.0):
            bounds = model.intervals(0.9)(torch.full((2, 3), uncertainty), torch.tensor([6, 14]))
            assert bounds[0] < torch.inf
            assert bounds[1] == torch.inf

    @pytest.mark.parametrize("confidence", [0, 1, 90, float("nan")])
    def test_a_confidence_outside_0_and_1_is_refused(self, model: UncertaintyModel, confidence: float):
        with pytest.raises(ValueError, match=r"a confidence lies between 0 and 1, not at"):
            model.intervals(confidence)

    def test_too_few_units_are_refused(self, model: UncertaintyModel):
        with pytest.raises(ValueError, match=r"confidence 0\.99 needs at least 99 independent .* has 60\."):
            model.intervals(0.99)


class TestResults:
    def test_standard_deviations_are_positive_and_in_their_shapes(
        self, model: UncertaintyModel, calculator: ToyCalculator
    ):
        batch = forward_pass_of(load_backend(calculator), labelled_frames(5, seed=3))
        found = model.apply(batch)
        n_atoms = len(batch.numbers)
        shapes = {
            "forces_uncertainty": (n_atoms, 3),
            "energy_uncertainty": (5,),
            "energies_uncertainty": (n_atoms,),
            "gamma": (n_atoms,),
            "contact": (n_atoms,),
        }
        assert {key: tuple(value.shape) for key, value in found.items()} == shapes
        assert set(model.results) == set(shapes)
        assert all(bool((value > 0).all()) for value in found.values())

    def test_energy_uncertainty_is_that_of_the_total(self, model: UncertaintyModel, calculator: ToyCalculator):
        batch = forward_pass_of(load_backend(calculator), labelled_frames(5, seed=3))
        fitted, far_field = model.methods["bll"], model.far_field
        assert far_field is not None
        limit = far_field.energy_variance(far_field.variance(batch), batch)
        per_atom = fitted.calibrators["energy"].variance(fitted.head(batch).energy, limit).sqrt()
        torch.testing.assert_close(model.apply(batch)["energy_uncertainty"], per_atom * batch.n_atoms_of_frame)

    def test_an_isotropic_method_gives_three_equal_numbers(self):
        calculator = ToyCalculator(ELEMENTS)
        model = fit(
            calculator, labelled_frames(60, seed=1), labelled_frames(60, seed=2), methods=["bll"], progress=False
        )
        found = model.apply(forward_pass_of(load_backend(calculator), [molecule("CH3OH")]))["forces_uncertainty"]
        assert found.shape == (6, 3)
        assert torch.equal(found[:, 0], found[:, 2])

    def test_it_follows_the_dtype_of_nothing(self, model: UncertaintyModel):
        """A potential in single precision still has its uncertainties in double."""
        single = load_backend(ToyCalculator(ELEMENTS, direct=True, dtype="float32"))
        double = load_backend(ToyCalculator(ELEMENTS, direct=True))
        frames = labelled_frames(5, seed=3)
        found, expected = model.apply(forward_pass_of(single, frames)), model.apply(forward_pass_of(double, frames))
        for key, value in expected.items():
            assert found[key].dtype == torch.float64
            # Single-precision features, standardised, through a solve of condition number 1e9.
            torch.testing.assert_close(found[key], value, rtol=0.02, atol=0)


class TestOldFiles:
    """A file of each format is read and says the same for ever; see fitted/make_fitted.py."""

    @pytest.mark.parametrize(
        ("version", "methods"), [("v1", ()), *((version, SEVERAL) for version in ("v2", "v3", "v4", "v5", "v6", "v7"))]
    )
    def test_it_gives_the_numbers_of_the_day_it_was_written(self, version: str, methods: tuple[str, ...]):
        stored = load_file(FITTED / f"{version}_expected.safetensors")
        found = UncertaintyModel.load(FITTED / f"{version}.uq.safetensors").apply(_evaluation(stored))
        expected = {name.removeprefix("out/"): value for name, value in stored.items() if name.startswith("out/")}
        plain = {"forces_uncertainty", "energy_uncertainty", "energies_uncertainty"}
        if version in ("v6", "v7"):
            plain.add("stress_uncertainty")
        alone = {f"{key}_{method}" for key in plain for method in methods}
        contact = {"contact"} if version in ("v5", "v6", "v7") else set()
        assert set(found) == set(expected) == plain | alone | contact | {"gamma"}
        for key, value in expected.items():
            # Other versions of the linear algebra behind torch sum in another order.
            torch.testing.assert_close(found[key], value, rtol=1e-6, atol=0)

    def test_its_provenance_is_read(self):
        model = UncertaintyModel.load(FITTED / "v1.uq.safetensors")
        assert model.provenance["train"]["frames"] == 80
        assert model.provenance["train"]["elements"].keys() == {"H", "O"}
        assert model.methods["bll"].head.settings["features"] == BLL().features
        assert "fitted on      80 frames" in model.summary()
        assert model.threshold(Quantile(0.9)) == pytest.approx(1.4, abs=0.1)

    def test_what_came_later_is_not_in_it(self):
        for version in ("v1", "v2"):
            model = UncertaintyModel.load(FITTED / f"{version}.uq.safetensors")
            assert (model.perturbed, model.reference) == (None, None)
            assert set(model.record.run) == {0}

    def test_perturbed_frames_and_reference_runs_of_version_3_are_read(self):
        model = UncertaintyModel.load(FITTED / "v3.uq.safetensors")
        assert model.perturbed is not None
        assert model.reference is not None
        assert len(model.perturbed.run) == 20
        assert model.threshold(FalseAlarms(per_run=0.2, steps=20)) == pytest.approx(2, rel=1e-6)


def _evaluation(stored: dict[str, torch.Tensor]) -> ForwardPass:
    given = {name.removeprefix("in/"): value for name, value in stored.items() if name.startswith("in/")}

    def parts(prefix: str) -> dict[str, torch.Tensor]:
        return {name.removeprefix(prefix): value for name, value in given.items() if name.startswith(prefix)}

    edges: dict[str, Any] = parts("edges.")
    if "vector" not in edges:  # the first version knew no directions, and nothing in it asks for them
        distance = edges.pop("distance")
        edges["vector"] = distance[:, None] * torch.tensor([1, 0, 0], dtype=distance.dtype)
    edges["cutoff"] = float(edges.get("cutoff", torch.inf))
    force_layer = parts("force_layer.")
    return ForwardPass(
        **{name: value for name, value in given.items() if "." not in name},
        edges=Edges(**edges),
        energy_layer=EnergyLayer(**parts("energy_layer.")),
        force_layer=ForceLayer(**force_layer, force_free=True) if force_layer else None,
    )
