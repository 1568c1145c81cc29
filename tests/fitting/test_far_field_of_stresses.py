"""The far field of stresses: both ends by hand, and where there is none."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import PropertyNotImplementedError

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, evaluate, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.calibration import FarFieldCalibrator, Residuals, fit_far_field
from ase_uq.methods.bll.head import BLLHead
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames

# So few toy frames: errors of stresses that the distance does not order.
pytestmark = pytest.mark.filterwarnings("ignore:.* tells nothing about the:ase_uq.errors.UQWarning")


def frames(count: int, seed: int, **options: Any) -> list[Atoms]:
    return labelled_frames(count, seed=seed, cell=5.0, **options)


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    return fit(ToyCalculator(ELEMENTS), frames(20, 1), frames(20, 2), methods=["bll"], progress=False)


def calibrator_of(model: UncertaintyModel) -> FarFieldCalibrator:
    found = model.methods["bll"].calibrators["stress"]
    assert isinstance(found, FarFieldCalibrator)
    return found


def deviations(model: UncertaintyModel, calculator: ToyCalculator, score: float) -> tuple[Any, Any]:
    """σ of three structures with this stress score, and σ∞ of each."""
    batch = forward_pass_of(load_backend(calculator), frames(3, 5))
    far_field, fitted = model.far_field, model.methods["bll"]
    assert far_field is not None
    limits, raw = far_field.limits(batch), fitted.head(batch)
    assert limits.stress is not None
    found = fitted.standard_deviations(replace(raw, stress=torch.full_like(raw.stress, score)), limits, batch)
    return found["stress_uncertainty"].numpy(), limits.stress.sqrt().numpy()


def test_is_the_law_of_the_forces_for_rows_made_by_hand(calculator, model: UncertaintyModel):
    scores, squares, limits = [], [], []
    for atoms in frames(20, 2):
        batch = forward_pass_of(load_backend(calculator), [atoms])
        assert batch.stress is not None
        assert model.far_field is not None
        limit = model.far_field.limits(batch).stress
        assert limit is not None
        scores.append(model.methods["bll"].head(batch).stress[0].numpy())
        squares.append(np.sum((atoms.info["REF_stress"] - batch.stress[0].numpy()) ** 2))
        limits.append(float(limit))
    found = calibrator_of(model)
    rows = Residuals(np.array(scores), np.array(squares), 6, np.arange(len(squares)), np.array(limits))
    expected = fit_far_field(rows, np.array(found.far))
    assert expected is not None
    np.testing.assert_allclose(found.slopes, expected.slopes, rtol=1e-3)
    assert (found.constant, found.limit) == pytest.approx((expected.constant, expected.limit), rel=1e-4)


def test_at_the_near_end_it_is_that_of_the_calibration(calculator, model: UncertaintyModel):
    calibrator = calibrator_of(model)
    found, _ = deviations(model, calculator, float(np.exp(calibrator.near[0])))
    np.testing.assert_allclose(found, np.exp(calibrator.constant / 2), rtol=1e-6)


def test_beyond_the_far_end_it_is_what_the_far_field_says(calculator, model: UncertaintyModel):
    calibrator = calibrator_of(model)
    found, limits = deviations(model, calculator, float(np.exp(calibrator.far[0] + 300)))
    least = np.exp(calibrator.constant / 2)
    np.testing.assert_allclose(found, np.maximum(limits, least)[:, None].repeat(6, 1), rtol=1e-6)


def test_is_the_same_in_any_supercell(calculator, model: UncertaintyModel):
    for spread in (0.02, 0.3):  # near the calibration frames, and far from them
        cell = frames(1, 3, spread=(spread, spread))[0]
        one, four = (
            p["stress_uncertainty"] for p in Predictor(calculator, model).predict([cell, cell.repeat((2, 2, 1))])
        )
        np.testing.assert_allclose(four, one, rtol=1e-3)


def test_a_file_keeps_it(calculator, model: UncertaintyModel, tmp_path: Path):
    model.save(tmp_path / "a.uq.safetensors")
    again = UncertaintyModel.load(tmp_path / "a.uq.safetensors")
    far = frames(3, 4, spread=(0.5, 1.0))
    for before, after in zip(*(Predictor(calculator, m).predict(far) for m in (model, again)), strict=True):
        for key in ("stress_uncertainty", "energies_uncertainty"):
            np.testing.assert_array_equal(after[key], before[key])


def slab() -> Atoms:
    atoms = frames(1, 7)[0]
    atoms.pbc = (True, True, False)
    return atoms


def test_there_is_none_where_the_stress_is_not_that_of_the_cell(
    calculator, model: UncertaintyModel, monkeypatch: pytest.MonkeyPatch
):
    """In a slab the toy's is; MACE's is not."""
    crystal, free = frames(1, 6)[0], molecule("CH3OH")
    predictor = Predictor(calculator, model)
    before = predictor.predict([crystal, slab(), free])
    assert ["stress_uncertainty" in each.results for each in before] == [True, True, False]
    monkeypatch.setattr(ToyBackend, "_volume", lambda _, atoms: atoms.cell.volume * atoms.pbc.all())
    after = predictor.predict([crystal, slab(), free])
    assert ["stress_uncertainty" in each.results for each in after] == [True, False, False]
    for one, other in zip(before, after, strict=True):
        np.testing.assert_array_equal(one["stress"], other["stress"])
        np.testing.assert_array_equal(one["forces_uncertainty"], other["forces_uncertainty"])
    np.testing.assert_array_equal(before[0]["stress_uncertainty"], after[0]["stress_uncertainty"])
    # Of a slab alone, as in molecular dynamics, and by name.
    calc = UncertainCalculator(calculator, model)
    with pytest.raises(PropertyNotImplementedError):
        calc.get_property("stress_uncertainty", slab())


def test_labels_of_such_stresses_are_neither_calibrated_on_nor_judged(
    calculator, model: UncertaintyModel, monkeypatch: pytest.MonkeyPatch
):
    held_out = frames(20, 2)
    for atoms in held_out[10:]:
        atoms.pbc = (True, True, False)
    options = {"n_bootstrap": 0, "progress": False}
    assert len(evaluate(Predictor(calculator, model), held_out, **options).samples["bll", "stress"].frame) == 20
    monkeypatch.setattr(ToyBackend, "_volume", lambda _, atoms: atoms.cell.volume * atoms.pbc.all())
    assert len(evaluate(Predictor(calculator, model), held_out, **options).samples["bll", "stress"].frame) == 10
    held_out[0].pbc = (True, True, False)  # nine crystals are too few
    again = fit(calculator, frames(20, 1), held_out, methods=["bll"], progress=False)
    assert "stress_uncertainty" not in again.results


def test_labels_of_frames_without_a_volume_do_not_count(calculator):
    held_out = labelled_frames(20, seed=2)
    for atoms in held_out:
        atoms.info["REF_stress"] = np.ones(6)
    found = fit(calculator, labelled_frames(20, seed=1), held_out, methods=["bll"], progress=False)
    assert "stress" not in found.methods["bll"].calibrators


def test_that_of_a_method_that_need_not_grow_has_none(calculator, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BLLHead, "grows", False)
    model = fit(calculator, frames(20, 1), frames(20, 2), methods=["bll"], progress=False)
    assert not any(isinstance(c, FarFieldCalibrator) for c in model.methods["bll"].calibrators.values())
