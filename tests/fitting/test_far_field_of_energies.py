"""The far field of energies: both ends by hand, size consistency, and which methods have one."""

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk

from ase_uq import Predictor, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.calibration import FarFieldCalibrator, Residuals, fit_far_field
from ase_uq.methods.bll.head import BLLHead
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames

# So few toy frames: errors of energies that the distance does not order.
pytestmark = pytest.mark.filterwarnings("ignore:.* tells nothing about the:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


@pytest.fixture
def held_out() -> list[Atoms]:
    return labelled_frames(20, seed=2)


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    frames = [labelled_frames(20, seed=seed) for seed in (1, 2)]
    return fit(ToyCalculator(ELEMENTS), *frames, methods=["bll"], progress=False)


def deviations(model: UncertaintyModel, calculator: ToyCalculator, scores: Any) -> tuple[Any, Any]:
    """σ per atom of three structures with these logarithms of their energy scores, and σ∞ by hand."""
    batch = forward_pass_of(load_backend(calculator), labelled_frames(3, seed=5))
    far_field, (fitted,) = model.far_field, model.methods.values()
    assert far_field is not None
    limits = far_field.limits(batch)
    raw = replace(fitted.head(batch), energy=torch.from_numpy(np.tile(np.exp(scores), (3, 1))))
    found = fitted.standard_deviations(raw, limits, batch)
    of_atoms = np.split(limits.forces.sqrt().numpy(), np.cumsum(batch.n_atoms_of_frame.numpy())[:-1])
    by_hand = [far_field.length * of_frame.mean() for of_frame in of_atoms]
    return found["energy_uncertainty"] / batch.n_atoms_of_frame, by_hand


def test_is_the_law_of_the_forces_for_rows_made_by_hand(calculator, model: UncertaintyModel, held_out):
    far_field, (fitted,) = model.far_field, model.methods.values()
    assert far_field is not None
    scores, errors, limits = [], [], []
    for atoms in held_out:
        batch = forward_pass_of(load_backend(calculator), [atoms])
        scores.append(fitted.head(batch).energy[0].numpy())
        errors.append((atoms.info["REF_energy"] - float(batch.energy)) / len(atoms))
        limits.append(far_field.length**2 * float(far_field.variance(batch).sqrt().mean()) ** 2)
    found = fitted.calibrators["energy"]
    assert isinstance(found, FarFieldCalibrator)
    rows = Residuals(np.array(scores), np.square(errors), 1, np.arange(len(errors)), np.array(limits))
    expected = fit_far_field(rows, np.array(found.far))
    assert expected is not None
    np.testing.assert_allclose(found.slopes, expected.slopes, rtol=1e-3, atol=1e-6)
    assert (found.constant, found.limit) == pytest.approx((expected.constant, expected.limit), rel=1e-4)
    assert found.elements == {}


def test_at_the_near_end_they_are_those_of_the_calibration(calculator, model: UncertaintyModel):
    calibrator = model.methods["bll"].calibrators["energy"]
    assert isinstance(calibrator, FarFieldCalibrator)
    found, _ = deviations(model, calculator, calibrator.near)
    np.testing.assert_allclose(found, np.exp(calibrator.constant / 2), rtol=1e-6)


@pytest.mark.parametrize("beyond", [10.0, 100.0])
def test_beyond_the_far_end_they_are_those_of_the_forces_times_a_length(
    calculator, model: UncertaintyModel, beyond: float
):
    calibrator = model.methods["bll"].calibrators["energy"]
    assert isinstance(calibrator, FarFieldCalibrator)
    found, by_hand = deviations(model, calculator, np.array(calibrator.far) + beyond)
    np.testing.assert_allclose(found, by_hand, rtol=1e-6)


def test_are_the_same_per_atom_in_any_supercell(calculator, model: UncertaintyModel):
    for spread in (0.02, 0.3):  # near the calibration frames, and far from them
        cell = labelled_frames(1, seed=3, spread=(spread, spread))[0]
        cell.set_cell([6.0, 7.0, 8.0])
        cell.pbc = True
        predictions = Predictor(load_backend(calculator), model).predict([cell, cell.repeat((2, 2, 1))])
        one, four = (float(p["energy_uncertainty"]) for p in predictions)
        assert four == pytest.approx(4 * one, rel=1e-3)


class TestOfAtoms:
    def deviations(self, model: UncertaintyModel, calculator: ToyCalculator, distance: float) -> tuple[Any, Any]:
        """σ of each atom at this distance, and σ∞ of its force by hand."""
        batch = forward_pass_of(load_backend(calculator), labelled_frames(3, seed=5))
        far_field, (fitted,) = model.far_field, model.methods.values()
        assert far_field is not None
        raw = fitted.head(batch)
        raw = replace(raw, distance=torch.full_like(raw.distance, distance))
        found = fitted.standard_deviations(raw, far_field.limits(batch), batch)
        return found["energies_uncertainty"].numpy(), far_field.variance(batch).sqrt().numpy()

    def test_are_the_law_of_energies_per_atom_with_the_mean_distance_of_structures(
        self, calculator, model: UncertaintyModel, held_out
    ):
        far_field, (fitted,) = model.far_field, model.methods.values()
        assert far_field is not None
        distances, errors, limits = [], [], []
        for atoms in held_out:
            batch = forward_pass_of(load_backend(calculator), [atoms])
            distances.append([float(fitted.head(batch).distance.mean())])
            errors.append((atoms.info["REF_energy"] - float(batch.energy)) / len(atoms))
            limits.append(float(far_field.limits(batch).energy))
        found = fitted.calibrators["energies"]
        assert isinstance(found, FarFieldCalibrator)
        rows = Residuals(np.array(distances), np.square(errors), 1, np.arange(len(errors)), np.array(limits))
        expected = fit_far_field(rows, np.array(found.far))
        assert expected is not None
        np.testing.assert_allclose(found.slopes, expected.slopes, rtol=1e-3)
        assert (found.constant, found.limit) == pytest.approx((expected.constant, expected.limit), rel=1e-4)

    def test_end_where_the_calibration_is_and_at_the_force_times_a_length(self, calculator, model: UncertaintyModel):
        calibrator, far_field = model.methods["bll"].calibrators["energies"], model.far_field
        assert far_field is not None
        assert isinstance(calibrator, FarFieldCalibrator)
        near, _ = self.deviations(model, calculator, np.exp(calibrator.near[0]))
        np.testing.assert_allclose(near, np.exp(calibrator.constant / 2), rtol=1e-6)
        for beyond in (100.0, 300.0):
            far, force = self.deviations(model, calculator, np.exp(calibrator.far[0] + beyond))
            np.testing.assert_allclose(far, far_field.length * force, rtol=1e-6)

    def test_that_are_all_alike_have_the_energy_per_atom_of_their_structure(self, calculator, model: UncertaintyModel):
        """Not as it is predicted from all scores of a structure, but by the same law from the mean distance."""
        diamond = bulk("C", "diamond", a=3.2)
        far_field, (fitted,) = model.far_field, model.methods.values()
        assert far_field is not None
        batch = forward_pass_of(load_backend(calculator), [diamond, diamond.repeat(2)])
        raw, limits = fitted.head(batch), far_field.limits(batch)
        found = fitted.standard_deviations(raw, limits, batch)["energies_uncertainty"].numpy()
        per_atom = fitted.calibrators["energies"].variance(raw.mean_distance(batch), limits.energy).sqrt().numpy()
        np.testing.assert_allclose(found, np.repeat(per_atom, [2, 16]), rtol=1e-3)

    def test_are_bounded_by_what_forces_are_wrong_by(self, calculator, model: UncertaintyModel):
        apart = labelled_frames(1, seed=3, spread=(2.0, 2.0))
        batch = forward_pass_of(load_backend(calculator), apart)
        found = model.apply(batch)["energies_uncertainty"]
        far_field, calibrator = model.far_field, model.methods["bll"].calibrators["energies"]
        assert far_field is not None
        assert isinstance(calibrator, FarFieldCalibrator)
        bound = far_field.limits(batch).energies.sqrt().clamp(min=np.exp(calibrator.constant / 2))
        assert bool((found <= bound * (1 + 1e-6)).all())


def test_those_of_a_method_that_need_not_grow_have_none(calculator, held_out, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(BLLHead, "grows", False)
    model = fit(calculator, labelled_frames(20, seed=1), held_out, methods=["bll"], progress=False)
    assert not any(isinstance(c, FarFieldCalibrator) for c in model.methods["bll"].calibrators.values())


def test_summary_says_where_they_end(model: UncertaintyModel):
    far = model.far_field
    assert far is not None
    assert f"σ from {far.force:.3g} eV/Å, {far.force * far.length:.2g} eV/atom" in model.summary()
    assert re.search(r"energy +σ from .* to σ∞ as u\[", model.summary(details=True))
