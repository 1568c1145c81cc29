"""The one road from structures to numbers."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule

from ase_uq import Prediction, Predictor, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.properties import PROPERTIES, STANDARD
from ase_uq.testing.methods import ELEMENTS, labelled_frames

pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")


def made(direct: bool, dtype: str = "float64") -> Predictor:
    calculator = ToyCalculator(ELEMENTS, direct=direct, dtype=dtype)
    cell = None if direct else 4.5
    train, held_out = labelled_frames(30, seed=1, cell=cell), labelled_frames(30, seed=2, cell=cell)
    return Predictor(load_backend(calculator), fit(calculator, train, held_out, methods=["bll"], progress=False))


@pytest.fixture(scope="module", params=[False, True], ids=["conservative", "direct"])
def predictor(request: pytest.FixtureRequest) -> Predictor:
    return made(request.param)


@pytest.fixture
def frames() -> list[Atoms]:
    """Mixed sizes, one of a single atom, one periodic."""
    return [*labelled_frames(4, seed=3), Atoms("O", [(0.1, 0.2, 0.3)]), *labelled_frames(1, seed=4, cell=4.5)]


def keys_of(predictor: Predictor, atoms: Atoms) -> set[str]:
    """Those that are promised; without a cell there is no uncertainty of a stress."""
    return {key for key in predictor.results if atoms.cell.rank == 3 or key != "stress_uncertainty"}


def test_every_key_has_its_shape(predictor: Predictor, frames: list[Atoms]):
    for atoms, prediction in zip(frames, predictor.predict(frames), strict=True):
        assert set(prediction.results) == keys_of(predictor, atoms)
        for key, value in prediction.results.items():
            entry = PROPERTIES[key]
            shape = (len(atoms), *entry.shape) if entry.per_atom else entry.shape
            if shape == ():
                assert type(value) is float, key
            else:
                assert isinstance(value, np.ndarray)
                assert value.shape == shape, key
                assert value.flags.owndata, key


def test_mean_is_that_of_the_bare_calculator_bit_for_bit(predictor: Predictor, frames: list[Atoms]):
    bare = ToyCalculator(ELEMENTS, direct=predictor.backend.direct)
    for atoms in frames:
        (prediction,) = predictor.predict([atoms])
        for key in predictor.backend.results:
            np.testing.assert_array_equal(prediction[key], bare.get_property(key, atoms.copy()), err_msg=key)


def test_a_batch_of_mixed_sizes_is_its_singles(predictor: Predictor, frames: list[Atoms]):
    together = predictor.predict(frames)
    for atoms, prediction in zip(frames, together, strict=True):
        (alone,) = predictor.predict([atoms])
        for key, value in alone.results.items():
            # Other orders of summation, through a solve of condition number 1e9.
            np.testing.assert_allclose(prediction[key], value, rtol=1e-5, atol=1e-10, err_msg=key)


def test_predictions_come_in_the_order_of_the_frames(predictor: Predictor, frames: list[Atoms]):
    forwards, backwards = predictor.predict(frames), predictor.predict(frames[::-1])
    for one, other in zip(forwards, reversed(backwards), strict=True):
        np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-10)
        np.testing.assert_allclose(one["gamma"], other["gamma"], rtol=1e-5)


def test_frames_are_not_changed(predictor: Predictor, frames: list[Atoms]):
    before = [atoms.copy() for atoms in frames]
    predictor.predict(frames)
    for atoms, copy in zip(frames, before, strict=True):
        assert atoms == copy
        assert atoms.calc is None
        assert atoms.arrays.keys() == copy.arrays.keys()


def test_results_are_the_callers_own(predictor: Predictor, frames: list[Atoms]):
    first = predictor.predict(frames)
    for prediction in first:
        prediction["forces"][:] = 0
        prediction["forces_uncertainty"][:] = 0
    for prediction in predictor.predict(frames):
        assert prediction["forces_uncertainty"].all()


def test_single_precision_gives_the_same_to_its_digits():
    single, double = made(True, "float32"), made(True)
    atoms = molecule("CH3OH")
    (one,), (other,) = single.predict([atoms]), double.predict([atoms])
    assert one["forces"].dtype == np.float32
    np.testing.assert_allclose(one["forces"], other["forces"], atol=1e-4)
    # Fitted in single precision as well: features of seven digits, a ridge of 1e-9.
    np.testing.assert_allclose(one["forces_uncertainty"], other["forces_uncertainty"], rtol=0.05)


def test_without_uncertainties_there_is_the_potential_alone_bit_for_bit(
    predictor: Predictor, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch
):
    whole = [predictor.predict([atoms])[0] for atoms in frames]

    def refused(self, forward_pass):
        raise AssertionError("a method was applied")

    monkeypatch.setattr(UncertaintyModel, "apply", refused)
    for atoms, expected in zip(frames, whole, strict=True):
        (alone,) = predictor.predict([atoms], uncertainties=False)
        assert tuple(alone.results) == predictor.backend.results
        for key, value in alone.results.items():
            np.testing.assert_array_equal(value, expected[key], err_msg=key)


def test_an_element_never_seen_is_named_where_uncertainties_are_given():
    calculator = ToyCalculator((*ELEMENTS, "N"))
    frames = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    model = fit(calculator, *frames, methods=["bll"], progress=False)
    fresh = Predictor(load_backend(calculator), model, interval=0.8)
    ammonia = molecule("NH3")
    fresh.predict([ammonia], uncertainties=False)
    with pytest.warns(UQWarning, match="fitted without N"):
        (prediction,) = fresh.predict([ammonia])
    # Nor is anything promised of it.
    np.testing.assert_array_equal(np.isinf(prediction["forces_interval"]), ammonia.numbers == 7)


def test_an_interval_is_the_factor_of_the_element_times_the_norm(predictor: Predictor, frames: list[Atoms]):
    with_interval = Predictor(predictor.backend, predictor.uncertainty_model, interval=0.8)
    assert with_interval.results == (*predictor.results, "forces_interval")
    factors = predictor.uncertainty_model.intervals(0.8).factors.cpu().numpy()
    for atoms, prediction in zip(frames, with_interval.predict(frames), strict=True):
        assert set(prediction.results) == keys_of(with_interval, atoms)
        assert prediction["forces_interval"].shape == (len(atoms),)
        np.testing.assert_allclose(
            prediction["forces_interval"], factors[atoms.numbers] * prediction.atom_uncertainty, rtol=1e-12
        )


@pytest.mark.parametrize("confidence", [0.5, 0.9])
def test_errors_of_fresh_frames_stay_inside_their_interval_as_often_as_promised(confidence: float):
    calculator = ToyCalculator(ELEMENTS)
    model = fit(calculator, labelled_frames(60, seed=1), labelled_frames(200, seed=2), methods=["bll"], progress=False)
    predictor = Predictor(load_backend(calculator), model, interval=confidence)
    fresh = labelled_frames(200, seed=3)
    errors, bounds = [], []
    for atoms, prediction in zip(fresh, predictor.predict(fresh), strict=True):
        errors.append(np.linalg.norm(atoms.arrays["REF_forces"] - prediction["forces"], axis=1))
        bounds.append(prediction["forces_interval"])
    inside = np.concatenate(errors) <= np.concatenate(bounds)
    # Both samples have 200 units: the coverage scatters by sqrt(2 c (1 - c) / 200) at the most; four of those.
    assert abs(inside.mean() - confidence) < 4 * np.sqrt(2 * confidence * (1 - confidence) / 200)


def test_nothing_to_predict_is_an_error(predictor: Predictor):
    with pytest.raises(InputError, match="there is no structure to evaluate"):
        predictor.predict([])


def test_a_structure_that_cannot_be_evaluated_is_named(predictor: Predictor, frames: list[Atoms]):
    frames[2].positions[0] = np.nan
    with pytest.raises(InputError, match=r"positions of structure 2 .* are not finite"):
        predictor.predict(frames)


def test_messages_count_from_the_number_of_the_first_structure(predictor: Predictor, frames: list[Atoms]):
    frames[2].positions[0] = np.nan
    with pytest.raises(InputError, match=r"positions of structure 72 .* are not finite"):
        predictor.predict(frames, first=70)


def test_the_scalar_of_an_atom_is_the_norm(predictor: Predictor, frames: list[Atoms]):
    (prediction,) = predictor.predict(frames[:1])
    np.testing.assert_allclose(
        prediction.atom_uncertainty, np.sqrt((prediction["forces_uncertainty"] ** 2).sum(1)), rtol=1e-14
    )


def test_standard_results_are_those_that_ase_knows():
    prediction = Prediction({"energy": 1.0, "forces": np.zeros((1, 3)), "gamma": np.ones(1), "node_energy": np.ones(1)})
    assert prediction.standard().keys() == {"energy", "forces"}
    assert set(prediction.standard()) <= set(STANDARD)


def test_extras_of_the_wrapped_calculator_pass_through(predictor: Predictor, frames, monkeypatch: pytest.MonkeyPatch):
    import dataclasses

    evaluate = type(predictor.backend)._forward

    def with_extra(self, batch, forces, gradients):
        forward_pass = evaluate(self, batch, forces, gradients)
        return dataclasses.replace(forward_pass, extras={"charges": forward_pass.positions[:, 0] * 2})

    monkeypatch.setattr(type(predictor.backend), "_forward", with_extra)
    for atoms, prediction in zip(frames, predictor.predict(frames), strict=True):
        np.testing.assert_allclose(prediction["charges"], 2 * atoms.positions[:, 0])


def test_one_model_serves_two_predictors(predictor: Predictor, frames: list[Atoms]):
    model: UncertaintyModel = predictor.uncertainty_model
    other = Predictor(load_backend(ToyCalculator(ELEMENTS, direct=predictor.backend.direct)), model)
    for one, two in zip(predictor.predict(frames), other.predict(frames), strict=True):
        np.testing.assert_array_equal(one["forces_uncertainty"], two["forces_uncertainty"])


@pytest.fixture
def poisoned(predictor: Predictor, monkeypatch: pytest.MonkeyPatch) -> Predictor:
    """A potential that makes NaN of a whole batch with a marked structure, and raises an error at another mark."""
    real = type(predictor.backend)._forward

    def forward(self, batch, forces: bool, gradients: bool):
        found = real(self, batch, forces, gradients)
        if any("raises" in atoms.info for atoms in batch.frames):
            raise IndexError("of the package")
        if any("nan" in atoms.info for atoms in batch.frames):
            found = replace(found, energy=found.energy * np.nan, forces=found.forces * np.nan)
        return found

    monkeypatch.setattr(type(predictor.backend), "_forward", forward)
    return predictor


def test_a_structure_that_is_not_finite_is_named_and_changes_no_other(poisoned: Predictor, frames: list[Atoms]):
    alone = [poisoned.predict([atoms])[0] for atoms in frames]
    frames[2].info["nan"] = True
    with pytest.warns(UQWarning, match="structure 12: the potential's energy or forces are not finite"):
        together = poisoned.predict(frames, first=10)
    assert np.isnan(together[2]["forces"]).all()
    for number, (one, other) in enumerate(zip(alone, together, strict=True)):
        if number != 2:
            np.testing.assert_allclose(one["forces_uncertainty"], other["forces_uncertainty"], rtol=1e-9)
    assert np.isnan(poisoned.predict(frames[2:3])[0]["energy"])


def test_a_structure_at_which_the_package_fails_is_named(poisoned: Predictor, frames: list[Atoms]):
    frames[3].info["raises"] = True
    wanted = r"structure 13 cannot be evaluated: the potential cannot evaluate it \(IndexError: of the package\)"
    with pytest.raises(InputError, match=wanted):
        poisoned.predict(frames, first=10)
    found = poisoned.outcomes(frames)
    assert [isinstance(one, Prediction) for one in found] == [number != 3 for number in range(len(frames))]


@pytest.mark.parametrize("make", [lambda: "toy:", ToyCalculator, lambda: load_backend("toy:")])
def test_it_takes_what_all_others_take(make, tmp_path: Path):
    frames = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
    model = fit(make(), *frames, methods=["bll"], progress=False)
    model.save(tmp_path / "toy.uq.safetensors")
    expected = Predictor(load_backend("toy:"), model).predict(frames[0][:1])[0]
    for given in (model, tmp_path / "toy.uq.safetensors", str(tmp_path / "toy.uq.safetensors")):
        (found,) = Predictor(make(), given).predict(frames[0][:1])
        np.testing.assert_allclose(found["forces_uncertainty"], expected["forces_uncertainty"])
