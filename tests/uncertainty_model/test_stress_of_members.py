"""Stresses of members: slopes of the members of the energy by strain, calibrated, where there is a cell."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.stress import full_3x3_to_voigt_6_stress

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, fit, propagation, read_frames, write_frames
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError
from ase_uq.forward_pass import Gradients
from ase_uq.io.results import annotated
from ase_uq.methods.base import Deviations
from ase_uq.numerics.draws import Draws
from ase_uq.scoring.score import score
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*tells nothing about the:ase_uq.errors.UQWarning"),
    pytest.mark.filterwarnings("ignore:ensemble_forces takes:ase_uq.errors.UQWarning"),
]


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


@pytest.fixture(scope="module")
def model(calculator: ToyCalculator) -> UncertaintyModel:
    train, held_out = (labelled_frames(20, seed=seed, cell=5.0) for seed in (1, 2))
    return fit(calculator, train, held_out, methods=["bll"], progress=False)


@pytest.fixture
def predictor(calculator: ToyCalculator, model: UncertaintyModel) -> Predictor:
    return Predictor(calculator, model, ensemble=16, ensemble_forces=8)


@pytest.fixture
def crystal() -> Atoms:
    (atoms,) = labelled_frames(1, seed=4, cell=4.5)
    return atoms


def strained(atoms: Atoms, strain: np.ndarray) -> Atoms:
    copy = atoms.copy()
    copy.set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
    return copy


def strains() -> Iterator[np.ndarray]:
    """Six, whose derivatives are the components of a stress in Voigt order."""
    for x, y in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
        strain = np.zeros((3, 3))
        strain[x, y] += 0.5
        strain[y, x] += 0.5
        yield strain


def test_their_mean_is_the_stress_and_their_spread_the_uncertainty(predictor: Predictor, crystal: Atoms):
    assert predictor.results[-1] == "stress_ensemble"
    assert predictor.n_members == {"energy_ensemble": 16, "forces_ensemble": 8, "stress_ensemble": 8}
    for prediction in predictor.predict([crystal, *labelled_frames(3, seed=9, cell=5.0)]):
        members = prediction["stress_ensemble"]
        assert members.shape == (6, 8)
        np.testing.assert_allclose(members.mean(1), prediction["stress"], atol=1e-12)
        spread, std = (x @ [1, 1, 1, 2, 2, 2] / 9 for x in (members.var(1), prediction["stress_uncertainty"] ** 2))
        assert spread == pytest.approx(std, rel=1e-6)


def test_they_are_slopes_of_the_members_of_the_energy_by_strain(
    model: UncertaintyModel, calculator: ToyCalculator, crystal: Atoms
):
    """On one scale: energies are scaled by their own uncertainty, stresses by theirs."""
    head, backend, draws, step = model.methods["bll"].head, load_backend(calculator), Draws(8), 1e-5

    def energies(atoms: Atoms) -> np.ndarray:
        rows = head.energy_rows(forward_pass_of(backend, [atoms]))
        return len(atoms) * (rows @ draws("energy", rows.shape[1], rows.device)).numpy()[0]

    found = head.deviations(forward_pass_of(backend, [crystal], gradients=True), draws, 8).stress
    assert found is not None
    slopes = [
        (energies(strained(crystal, step * strain)) - energies(strained(crystal, -step * strain))) / (2 * step)
        for strain in strains()
    ]
    np.testing.assert_allclose(found[0].numpy() * crystal.get_volume(), slopes, rtol=1e-5, atol=1e-6)


def full(members: np.ndarray) -> np.ndarray:
    """(6, M) → (M, 3, 3)."""
    return members.T[:, [0, 5, 4, 5, 1, 3, 4, 3, 2]].reshape(-1, 3, 3)


def test_they_turn_with_the_crystal_and_do_not_depend_on_the_cell(predictor: Predictor, crystal: Atoms):
    turned = crystal.copy()
    turned.rotate(50, (1, -2, 1), rotate_cell=True)
    rotation = np.linalg.solve(crystal.cell.array, turned.cell.array)
    expected, *found = (
        # Up to the calibrated σ, which gives each its scale.
        full((p["stress_ensemble"] - p["stress"][:, None]) / p["stress_uncertainty"][0])
        for p in predictor.predict([crystal, turned, crystal.repeat((1, 2, 1))])
    )
    np.testing.assert_allclose(found[0], rotation.T @ expected @ rotation, atol=1e-7)
    np.testing.assert_allclose(found[1], expected, atol=1e-7)


def test_molecules_have_none_among_crystals_that_do(predictor: Predictor, crystal: Atoms):
    alone, beside, free = predictor.predict([crystal, crystal, molecule("H2O")])
    assert "stress_ensemble" not in free.results
    assert "forces_ensemble" in free.results
    np.testing.assert_allclose(beside["stress_ensemble"], alone["stress_ensemble"])


def test_without_labels_of_stresses_there_are_none(calculator: ToyCalculator, crystal: Atoms):
    model = fit(calculator, labelled_frames(20, seed=1), labelled_frames(20, seed=2), methods=["bll"], progress=False)
    for atoms in (crystal, molecule("H2O")):
        calc = UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=4)
        assert "stress_ensemble" not in calc.implemented_properties
        assert "forces_ensemble" in calc.implemented_properties
        calc.calculate(atoms)
        assert "stress_ensemble" not in calc.results


def test_a_potential_without_slopes_by_strain_has_none(
    predictor: Predictor, crystal: Atoms, monkeypatch: pytest.MonkeyPatch
):
    head: Any = predictor.uncertainty_model.methods["bll"].head
    deviations = head.deviations
    monkeypatch.setattr(type(head), "deviations", lambda _, *args: Deviations(deviations(*args).forces))
    (prediction,) = predictor.predict([crystal])
    assert "forces_ensemble" in prediction.results
    assert "stress_ensemble" not in prediction.results


def test_they_stand_in_files(calculator: ToyCalculator, model: UncertaintyModel, crystal: Atoms, tmp_path: Path):
    crystal.calc = UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=4)
    crystal.get_potential_energy()
    expected = crystal.calc.results["stress_ensemble"]
    write_frames(tmp_path / "a.xyz", [crystal])
    score([crystal, molecule("H2O")], crystal.calc.predictor, out=tmp_path / "b.xyz", progress=False)
    for name in ("a.xyz", "b.xyz"):
        back = read_frames(tmp_path / name)
        np.testing.assert_allclose(back[0].calc.results["stress_ensemble"], expected, atol=1e-8)
        again = annotated(back[0])
        np.testing.assert_array_equal(again.calc.results["stress_ensemble"], back[0].calc.results["stress_ensemble"])
    assert "stress_ensemble" not in back[1].calc.results


def test_elastic_constants_have_error_bars(predictor: Predictor, crystal: Atoms):
    """Stresses over strains, by a fit of anybody's; those of the potential are the second slopes of its energy."""
    step = 1e-3
    steps = np.array([-2, -1, 1, 2]) * step
    frames = [strained(crystal, size * strain) for strain in strains() for size in steps]
    frames = [annotated(a, p.results) for a, p in zip(frames, predictor.predict(frames), strict=True)]

    def elastic(stresses: np.ndarray) -> np.ndarray:
        return np.array([np.polyfit(steps, of_strain, 1)[0] for of_strain in np.split(stresses, 6)])

    found = propagation.propagate(frames, elastic, of="stress")
    assert found.members.shape == (8, 6, 6)
    by_hand = [elastic(np.array([a.calc.results["stress_ensemble"][:, m] for a in frames])) for m in range(8)]
    np.testing.assert_allclose(found.members, by_hand)
    assert (np.diag(found.std) > 0).all()

    def energy(strain: np.ndarray) -> float:
        (prediction,) = predictor.predict([strained(crystal, strain)], uncertainties=False)
        return float(prediction["energy"])

    # V dE/dε'dε at no strain: work of the stress at ε, at which the volume is V (1 + tr ε).
    stress = predictor.predict([crystal])[0]["stress"]
    for k, strain in enumerate(strains()):
        if np.trace(strain):
            continue
        curvature = (energy(step * strain) - 2 * energy(0 * strain) + energy(-step * strain)) / step**2
        # The next strain deforms the strained crystal: (1 + a)(1 + a) = 1 + 2a + a², whose a² does work of its own.
        rows = full_3x3_to_voigt_6_stress(strain @ strain) * np.array([1, 1, 1, 2, 2, 2])
        expected = curvature / crystal.get_volume() + float(stress @ rows)
        assert found.value[k, k] == pytest.approx(expected, rel=1e-3, abs=1e-3)


def test_members_of_forces_need_a_graph_of_the_last_layer(predictor: Predictor, crystal: Atoms):
    """That of a backend of somebody else, which may keep none, or a forward pass that was not asked for one."""
    backend = load_backend(ToyCalculator(ELEMENTS))
    with pytest.raises(ValueError, match=r"slopes of features need gradients: evaluate with gradients=True"):
        predictor.predictions(backend.forward(backend.collate([crystal])))
    kept = backend.forward(backend.collate([crystal]), gradients=True)
    gradients: Any = kept.gradients
    gradients._energy_features = None
    with pytest.raises(InputError, match="keeps no graph of the last layer of its energy to differentiate"):
        predictor.predictions(kept)
    with pytest.raises(InputError, match="keeps no graph of the last layer of its energy to differentiate"):
        Gradients.of_energy_layer(gradients, kept.energy_layer.weights[:, None])
