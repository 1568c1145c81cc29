"""Samples of the energy: calibrated, correlated as the posterior says, the same for all structures, for nothing."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.constraints import FixAtoms
from ase.io import write
from scipy import stats

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, fit, read_frames, write_frames
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.numerics.draws import Draws
from ase_uq.scoring.score import score
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames
from ase_uq.uncertainty_model.ensemble import Ensemble

pytestmark = pytest.mark.filterwarnings("ignore:.*tells nothing about the:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module", params=[False, True], ids=["conservative", "direct"])
def calculator(request: pytest.FixtureRequest) -> ToyCalculator:
    return ToyCalculator(ELEMENTS, direct=request.param)


@pytest.fixture(scope="module")
def model(calculator: ToyCalculator) -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    return fit(calculator, train, held_out, methods=["bll", "kernel"], progress=False)


@pytest.fixture
def frames() -> list[Atoms]:
    return [*labelled_frames(4, seed=3), Atoms("O", [(0.1, 0.2, 0.3)]), *labelled_frames(1, seed=4, cell=4.5)]


@pytest.mark.parametrize("n_members", [4, 64])
def test_their_mean_is_the_energy_and_their_deviation_the_uncertainty(
    calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms], n_members: int
):
    predictor = Predictor(calculator, model, ensemble=n_members)
    assert "energy_ensemble" in predictor.results
    for prediction in predictor.predict(frames):
        members = prediction["energy_ensemble"]
        assert members.shape == (n_members,)
        assert members.mean() == pytest.approx(prediction["energy"], rel=1e-12)
        assert members.std() == pytest.approx(prediction["energy_uncertainty"], rel=1e-6)


def test_rows_are_a_root_of_the_leverage_of_structures(
    calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms]
):
    forward_pass = forward_pass_of(load_backend(calculator), frames)
    head = model.methods["bll"].head
    rows = head.energy_rows(forward_pass)
    torch.testing.assert_close(rows.square().sum(1), head(forward_pass).energy[:, 0])


def test_correlations_are_those_of_the_posterior(
    calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms]
):
    rows = model.methods["bll"].head.energy_rows(forward_pass_of(load_backend(calculator), frames)).numpy()
    norms = np.linalg.norm(rows, axis=1)
    expected = rows @ rows.T / np.outer(norms, norms)
    many = Predictor(calculator, model, ensemble=40_000).predict(frames)
    found = np.corrcoef(np.stack([prediction["energy_ensemble"] for prediction in many]))
    assert np.abs(found - expected).max() < 0.02
    assert expected.min() < 0.9, "the structures differ"


def test_a_moved_structure_has_the_same_errors(calculator: ToyCalculator, model: UncertaintyModel):
    atoms = molecule("CH3OH")
    moved = atoms.copy()
    moved.rotate(70, (1, 2, 3))
    moved.translate((3, -1, 2))
    one, other = (p["energy_ensemble"] for p in Predictor(calculator, model, ensemble=32).predict([atoms, moved]))
    np.testing.assert_allclose(one, other, atol=1e-8)


def test_members_do_not_depend_on_the_batch_or_on_who_asks(
    calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms]
):
    together = Predictor(calculator, model, ensemble=16).predict(frames)
    asked = UncertainCalculator(calculator, model, ensemble=16)
    for atoms, prediction in zip(frames, together, strict=True):
        alone = asked.get_property("energy_ensemble", atoms.copy())
        np.testing.assert_allclose(alone, prediction["energy_ensemble"], rtol=0, atol=1e-9)


def test_nothing_else_is_changed_and_no_pass_is_added(
    calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms], monkeypatch: pytest.MonkeyPatch
):
    plain, sampled = Predictor(calculator, model), Predictor(calculator, model, ensemble=64)
    passes: list[int] = []
    forward = sampled.backend.forward
    monkeypatch.setattr(sampled.backend, "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    for atoms in frames:
        (expected,), (found,) = plain.predict([atoms]), sampled.predict([atoms])
        assert found.results.keys() - expected.results.keys() == {"energy_ensemble"}
        for key, value in expected.results.items():
            np.testing.assert_array_equal(found[key], value, err_msg=key)
    assert len(passes) == len(frames)


def test_they_stand_in_files(calculator: ToyCalculator, model: UncertaintyModel, tmp_path: Path):
    atoms = molecule("H2O")
    atoms.calc = UncertainCalculator(calculator, model, ensemble=8)
    atoms.get_potential_energy()
    assert "energy_ensemble" in atoms.calc.implemented_properties
    write_frames(tmp_path / "a.xyz", [atoms])
    (back,) = read_frames(tmp_path / "a.xyz")
    np.testing.assert_allclose(back.calc.results["energy_ensemble"], atoms.calc.results["energy_ensemble"], atol=1e-8)


@pytest.mark.parametrize("wrong", [1, 3, -1, True, 2.5, "64"])
def test_other_numbers_are_refused(calculator: ToyCalculator, model: UncertaintyModel, wrong: Any):
    with pytest.raises(ValueError, match=r"ensemble=.* is not a whole number of 4 or more\. Give ensemble=64"):
        UncertainCalculator(calculator, model, ensemble=wrong)


@pytest.mark.parametrize("cause", ["no such method", "no energies"])
def test_without_a_posterior_it_is_said_what_to_fit(calculator: ToyCalculator, cause: str):
    train, held_out = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
    if cause == "no energies":
        for atoms in (*train, *held_out):
            del atoms.info["REF_energy"]
    method = "kernel" if cause == "no such method" else "bll"
    model = fit(calculator, train, held_out, methods=[method], progress=False)
    with pytest.raises(InputError, match=rf"none of {method} has one with calibrated energies\. Fit 'bll'"):
        Predictor(calculator, model, ensemble=64)


def forces_of(calculator: ToyCalculator, model: UncertaintyModel, atoms: Atoms, n: int) -> np.ndarray:
    (prediction,) = Predictor(calculator, model, ensemble=n, ensemble_forces=n).predict([atoms])
    return prediction["forces_ensemble"]


def calculator_is_direct(model: UncertaintyModel) -> bool:
    return not model.methods["bll"].head.differentiates


@pytest.mark.filterwarnings("ignore:ensemble_forces takes:ase_uq.errors.UQWarning")
class TestForces:
    def test_their_mean_is_the_force_and_their_spread_the_uncertainty(
        self, calculator: ToyCalculator, model: UncertaintyModel, frames: list[Atoms]
    ):
        predictor = Predictor(calculator, model, ensemble=64, ensemble_forces=8)
        assert predictor.results[-2:] == ("energy_ensemble", "forces_ensemble")
        for atoms, prediction in zip(frames, predictor.predict(frames), strict=True):
            members = prediction["forces_ensemble"]
            assert members.shape == (len(atoms), 3, 8)
            np.testing.assert_allclose(members.mean(2), prediction["forces"], atol=1e-10)
            expected = np.square(prediction["forces_uncertainty"]).mean() if len(atoms) > 1 else 0
            assert members.var(2).mean() == pytest.approx(expected, rel=1e-6)

    def test_covariances_are_those_of_the_posterior(self, calculator: ToyCalculator, model: UncertaintyModel):
        """Many members against dense algebra, with slopes of the features by finite differences."""
        atoms = molecule("H2O")
        atoms.rattle(0.1, seed=3)
        head: Any = model.methods["bll"].head
        backend = load_backend(calculator)

        def rows(shift: np.ndarray) -> np.ndarray:
            moved = atoms.copy()
            moved.positions += shift.reshape(-1, 3)
            return head.energy_rows(forward_pass_of(backend, [moved])).numpy()[0]

        if not head.differentiates:
            layer = forward_pass_of(backend, [atoms]).force_layer
            assert layer is not None
            assert layer.force_free
            assert bool(layer.torque_free.all())
            shifts = [np.tile(axis, (3, 1)) for axis in np.eye(3)]
            turns = [np.cross(axis, atoms.positions - atoms.positions.mean(0)) for axis in np.eye(3)]
            rigid = np.linalg.qr(np.stack([*shifts, *turns]).reshape(6, 9).T)[0]
            projection = np.eye(9) - rigid @ rigid.T
            of_atoms = layer.features.numpy() @ head.force_root.numpy()
            expected = projection @ np.kron(of_atoms @ of_atoms.T, np.eye(3)) @ projection
        else:
            step = 1e-4
            slopes = np.array([rows(step * axis) - rows(-step * axis) for axis in np.eye(9)]) / (2 * step)
            expected = slopes @ slopes.T
        members = forces_of(calculator, model, atoms, 4000).reshape(9, -1)
        found = np.cov(members)
        found, expected = found / np.trace(found), expected / np.trace(expected)
        assert np.abs(found - expected).max() < 0.05 * np.abs(expected).max()

    def test_they_are_slopes_of_the_members_of_the_energy(self, model: UncertaintyModel, calculator: ToyCalculator):
        """On one scale: energies are scaled by their own uncertainty, forces by theirs."""
        if calculator_is_direct(model):
            pytest.skip("forces of a direct head are no slopes")
        atoms = molecule("CH3OH")
        atoms.rattle(0.05, seed=2)
        head, backend = model.methods["bll"].head, load_backend(calculator)
        draws = Draws(8)

        def energies(shift: np.ndarray) -> np.ndarray:
            moved = atoms.copy()
            moved.positions += shift
            rows = head.energy_rows(forward_pass_of(backend, [moved]))
            return len(atoms) * (rows @ draws("energy", rows.shape[1], rows.device)).numpy()[0]

        found = head.deviations(forward_pass_of(backend, [atoms], gradients=True), draws, 8).forces.numpy()
        direction = np.random.default_rng(1).normal(size=(len(atoms), 3))
        slope = (energies(1e-4 * direction) - energies(-1e-4 * direction)) / 2e-4
        np.testing.assert_allclose(-np.einsum("ia,iam->m", direction, found), slope, rtol=1e-5, atol=1e-7)

    def test_they_turn_with_the_structure_and_pull_it_nowhere(self, calculator: ToyCalculator, model: UncertaintyModel):
        if calculator_is_direct(model):
            pytest.skip("components of a direct head have draws of their own: covariances turn, members do not")
        atoms = molecule("CH3OH")
        atoms.rattle(0.05, seed=2)
        turned, order = atoms.copy(), np.random.default_rng(0).permutation(len(atoms))
        turned.rotate(50, (1, -2, 1), center=(0, 0, 0))
        rotation = np.linalg.lstsq(atoms.positions, turned.positions, rcond=None)[0]
        members = forces_of(calculator, model, atoms, 6)
        np.testing.assert_allclose(members.sum(0), 0, atol=1e-8)
        np.testing.assert_allclose(
            forces_of(calculator, model, turned, 6), np.einsum("iam,ab->ibm", members, rotation), atol=1e-7
        )
        np.testing.assert_allclose(forces_of(calculator, model, atoms[order], 6), members[order], atol=1e-7)

    def test_a_supercell_has_the_same_members(self, calculator: ToyCalculator, model: UncertaintyModel):
        (atoms,) = labelled_frames(1, seed=4, cell=4.5)
        members = forces_of(calculator, model, atoms, 4)
        np.testing.assert_allclose(
            forces_of(calculator, model, atoms.repeat((2, 1, 1)), 4), np.concatenate([members, members]), atol=1e-6
        )

    def test_the_first_members_are_the_same_whatever_their_number(
        self, calculator: ToyCalculator, model: UncertaintyModel
    ):
        one, other = Draws(8), Draws(30)
        cpu = torch.device("cpu")
        torch.testing.assert_close(one("forces", 5, cpu), other("forces", 5, cpu)[:, :8])
        assert not torch.equal(one("energy", 5, cpu), one("forces", 5, cpu))

    def test_costs_one_backward_pass_a_member_or_none(
        self, calculator: ToyCalculator, model: UncertaintyModel, monkeypatch: pytest.MonkeyPatch
    ):
        predictor, calls = Predictor(calculator, model, ensemble=8, ensemble_forces=7), []
        grad = torch.autograd.grad
        monkeypatch.setattr(torch.autograd, "grad", lambda *a, **k: calls.append(1) or grad(*a, **k))
        predictor.predict([molecule("H2O")])
        # One is that of the potential's own forces.
        assert len(calls) == 8 * model.methods["bll"].head.differentiates

    def test_they_stand_in_files(self, calculator: ToyCalculator, model: UncertaintyModel, tmp_path: Path):
        atoms = molecule("H2O")
        atoms.calc = UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=4)
        atoms.get_potential_energy()
        write_frames(tmp_path / "a.xyz", [atoms])
        (back,) = read_frames(tmp_path / "a.xyz")
        expected = atoms.calc.results["forces_ensemble"]
        np.testing.assert_allclose(back.calc.results["forces_ensemble"], expected, atol=1e-8)

    def test_scored_frames_have_them(self, calculator: ToyCalculator, model: UncertaintyModel, tmp_path: Path):
        frames = [*labelled_frames(3, seed=3), Atoms("O", [(0.1, 0.2, 0.3)])]
        frames[1].set_constraint(FixAtoms([0]))  # written by ASE then
        predictor = Predictor(calculator, model, ensemble=8, ensemble_forces=4)
        score(frames, predictor, out=tmp_path / "a.xyz", progress=False)
        for found, expected in zip(read_frames(tmp_path / "a.xyz"), predictor.predict(frames), strict=True):
            np.testing.assert_allclose(found.calc.results["forces_ensemble"], expected["forces_ensemble"], atol=1e-7)

    def test_a_column_of_this_name_that_is_somebody_elses_stays(self, tmp_path: Path):
        atoms = molecule("H2O")
        atoms.set_array("forces_ensemble", np.arange(12.0).reshape(3, 4))
        write(tmp_path / "a.xyz", atoms)
        (back,) = read_frames(tmp_path / "a.xyz")
        np.testing.assert_array_equal(back.arrays["forces_ensemble"], atoms.arrays["forces_ensemble"])

    def test_their_cost_at_each_step_is_told(self, calculator: ToyCalculator, model: UncertaintyModel):
        if calculator_is_direct(model):
            pytest.skip("they cost nothing")
        with pytest.warns(UQWarning, match="ensemble_forces takes further backward passes at every step"):
            UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=4)

    def test_wrong_numbers_are_refused(self, calculator: ToyCalculator, model: UncertaintyModel):
        with pytest.raises(ValueError, match=r"ensemble_forces=2 is not a whole number of 4 or more"):
            UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=2)
        with pytest.raises(ValueError, match=r"ensemble_forces=16, but ensemble=8: .* Give ensemble=16 or more"):
            UncertainCalculator(calculator, model, ensemble=8, ensemble_forces=16)
        with pytest.raises(ValueError, match=r"ensemble=0 is not a whole number of 4 or more"):
            UncertainCalculator(calculator, model, ensemble_forces=8)


class Known:
    """A head whose rows are given."""

    correlates = True
    differentiates = False

    def __init__(self, rows: np.ndarray) -> None:
        self.rows = torch.from_numpy(rows)

    def energy_rows(self, _: Any) -> torch.Tensor:
        return self.rows


@pytest.mark.parametrize("level", [0.68, 0.90, 0.95])
def test_where_the_truth_is_a_draw_differences_are_covered_as_promised(level: float):
    """A last layer that is drawn from its posterior is the truth of everything that is drawn from it."""
    rng = np.random.default_rng(5)
    inside, n_worlds = 0, 400
    for _ in range(n_worlds):
        rows = rng.normal(size=(2, 12)) + 2 * rng.normal(size=12)  # two structures that have much in common
        std = np.linalg.norm(rows, axis=1)
        truth = rows @ rng.normal(size=12)
        fake: Any = SimpleNamespace(leading="a", methods={"a": SimpleNamespace(head=Known(rows))})
        fake.results = ("energy_uncertainty",)
        energies: Any = SimpleNamespace(energy=torch.zeros(2, dtype=torch.float64))
        results = {"energy_uncertainty": torch.from_numpy(std)}
        members = Ensemble(fake, 256)(energies, results)["energy_ensemble"].numpy()
        half = stats.norm.ppf(0.5 + level / 2) * (members[1] - members[0]).std()
        inside += abs(truth[1] - truth[0]) <= half
    low, high = stats.binom.interval(0.999, n_worlds, level)
    assert low <= inside <= high
