"""The ASE calculator: the potential's own numbers, recomputed exactly when an input changes, wherever ASE takes one."""

import copy
import io
import os
import pickle
import subprocess
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators import calculator as ase_calculator
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from ase.constraints import FixAtoms
from ase.db import connect
from ase.filters import FrechetCellFilter
from ase.io import Trajectory, read, write
from ase.md.langevin import Langevin
from ase.md.nptberendsen import NPTBerendsen
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB, DimerControl, MinModeAtoms, MinModeTranslate
from ase.optimize import BFGS

from ase_uq import (
    Quantile,
    Reduction,
    UncertainCalculator,
    UncertaintyModel,
    UncertaintyMonitor,
    fit,
    read_frames,
    write_frames,
)
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.engines.ase import memory
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch, UQWarning
from ase_uq.methods import make_method
from ase_uq.properties import PROPERTIES
from ase_uq.testing.backends import count_forwards
from ase_uq.testing.methods import ELEMENTS, labelled_frames

from ..backends.builders import make_omol_like

pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")

CELL = 4.5


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1, cell=CELL), labelled_frames(30, seed=2, cell=CELL)
    return fit(ToyCalculator(ELEMENTS), train, held_out, methods=["bll"], progress=False)


@pytest.fixture
def calculator(model: UncertaintyModel) -> UncertainCalculator:
    return UncertainCalculator(ToyCalculator(ELEMENTS), model)


@pytest.fixture
def evaluations(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Structures of every forward pass so far."""
    seen: list[int] = []
    original = ToyBackend._forward

    def counted(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        seen.append(len(batch.frames))
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_forward", counted)
    return seen


@pytest.fixture
def structures(monkeypatch: pytest.MonkeyPatch) -> list[bytes]:
    """Positions of every structure that the potential was called for so far."""
    seen: list[bytes] = []
    original = ToyBackend._forward

    def noted(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        seen.extend(atoms.positions.tobytes() for atoms in batch.frames)
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_forward", noted)
    return seen


@pytest.fixture
def applications(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Atoms of every batch that the methods were applied to so far."""
    seen: list[int] = []
    original = UncertaintyModel.apply

    def counted(self: UncertaintyModel, forward_pass: Any):
        seen.append(len(forward_pass.numbers))
        return original(self, forward_pass)

    monkeypatch.setattr(UncertaintyModel, "apply", counted)
    return seen


def shared_band(calculator: BaseCalculator) -> tuple[list[Atoms], NEB]:
    start = box()
    end = start.copy()
    end.rattle(0.1, seed=3)
    images = [start, *(start.copy() for _ in range(3)), end]
    for image in images:
        image.calc = calculator
    band = NEB(images, allow_shared_calculator=True, method="improvedtangent")
    band.interpolate()
    return images, band


def displaced_dimer(atoms: Atoms) -> MinModeAtoms:
    # With None for a file it would open one and leave it so.
    files = {"logfile": io.StringIO(), "eigenmode_logfile": io.StringIO()}
    control = DimerControl(initial_eigenmode_method="displacement", displacement_method="vector", **files)
    dimer = MinModeAtoms(atoms, control, random_seed=1)
    dimer.displace(displacement_vector=0.1 * np.eye(len(atoms), 3), mask=[True] * len(atoms))
    return dimer


def box(calculator: BaseCalculator | None = None, seed: int = 1) -> Atoms:
    atoms = molecule("CH3OH", cell=[CELL] * 3, pbc=True, calculator=calculator)
    atoms.rattle(0.05, seed=seed)
    return atoms


def langevin(atoms: Atoms) -> Langevin:
    """With the same random numbers each time."""
    return Langevin(
        atoms,
        0.5 * units.fs,
        temperature_K=300,
        friction=0.01 / units.fs,
        rng=np.random.default_rng(1),
        fixcm=False,
    )


class TestResults:
    def test_the_potentials_own_are_unchanged(self, calculator: UncertainCalculator):
        ours, bare = box(calculator), box(ToyCalculator(ELEMENTS))
        assert ours.get_potential_energy() == bare.get_potential_energy()
        np.testing.assert_array_equal(ours.get_forces(), bare.get_forces())
        np.testing.assert_array_equal(ours.get_stress(), bare.get_stress())
        np.testing.assert_array_equal(ours.get_potential_energies(), bare.get_potential_energies())

    def test_every_implemented_property_can_be_asked_for(self, calculator: UncertainCalculator):
        atoms = box()
        assert {"energy", "forces", "stress", "forces_uncertainty", "energy_uncertainty", "gamma"} <= set(
            calculator.implemented_properties
        )
        for key in calculator.implemented_properties:
            value = calculator.get_property(key, atoms)
            entry = PROPERTIES[key]
            assert np.shape(value) == ((len(atoms), *entry.shape) if entry.per_atom else entry.shape), key

    def test_they_are_the_predictions(self, calculator: UncertainCalculator):
        atoms = box(calculator)
        atoms.get_forces()
        (prediction,) = calculator.predictor.predict([atoms])
        assert calculator.results.keys() == prediction.results.keys()
        for key, value in prediction.results.items():
            np.testing.assert_array_equal(calculator.results[key], value, err_msg=key)

    def test_what_it_does_not_have_is_refused(self, calculator: UncertainCalculator):
        with pytest.raises(PropertyNotImplementedError, match="dipole property not implemented"):
            calculator.get_property("dipole", box())

    def test_implemented_properties_are_its_own_list(self, model: UncertaintyModel):
        before = list(ase_calculator.all_properties), list(BaseCalculator.implemented_properties)
        one, two = (UncertainCalculator(ToyCalculator(ELEMENTS), model) for _ in range(2))
        assert one.implemented_properties is not two.implemented_properties
        assert one.implemented_properties == two.implemented_properties
        assert len(set(one.implemented_properties)) == len(one.implemented_properties)
        one.implemented_properties.append("something")
        assert "something" not in two.implemented_properties
        assert (list(ase_calculator.all_properties), list(BaseCalculator.implemented_properties)) == before
        assert "implemented_properties" not in vars(UncertainCalculator)

    def test_a_direct_potential_has_no_stress(self):
        calculator = ToyCalculator(ELEMENTS, direct=True)
        train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
        ours = UncertainCalculator(calculator, fit(calculator, train, held_out, methods=["bll"], progress=False))
        assert "stress" not in ours.implemented_properties
        uncertainty = ours.get_property("forces_uncertainty", molecule("CH3OH"))
        assert not np.allclose(uncertainty[:, 0], uncertainty[:, 1])

    def test_thresholds_are_those_of_the_model(self, calculator: UncertainCalculator, model: UncertaintyModel):
        assert calculator.threshold(0.2) == 0.2
        assert calculator.threshold(Quantile(0.9)) == model.threshold(Quantile(0.9))

    def test_so_is_the_evidence_for_them(self, calculator: UncertainCalculator, model: UncertaintyModel):
        reduction = Reduction("mean", elements=("O",))
        ours, theirs = calculator.threshold_data(reduction), model.threshold_data(reduction)
        assert ours.reduction == theirs.reduction == reduction
        np.testing.assert_array_equal(ours.readings, theirs.readings)
        np.testing.assert_array_equal(ours.errors, theirs.errors)
        assert calculator.threshold_data().reduction == Reduction()


class TestConstruction:
    def test_from_a_file_and_a_spec(self, tmp_path: Path):
        train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
        model = fit("toy:", train, held_out, methods=["bll"], progress=False)
        model.save(tmp_path / "toy.uq.safetensors")
        atoms = molecule("CH3OH")
        expected = UncertainCalculator("toy:", model).get_property("forces_uncertainty", atoms)
        for path in (tmp_path / "toy.uq.safetensors", str(tmp_path / "toy.uq.safetensors")):
            found = UncertainCalculator(ToyCalculator(), path).get_property("forces_uncertainty", atoms)
            np.testing.assert_array_equal(found, expected)

    def test_another_potential_is_refused(self, model: UncertaintyModel):
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            UncertainCalculator(ToyCalculator(ELEMENTS, seed=3), model)

    def test_a_missing_file_is_refused(self, tmp_path: Path):
        with pytest.raises(ArtefactError, match="there is no file"):
            UncertainCalculator(ToyCalculator(ELEMENTS), tmp_path / "nowhere")

    def test_a_calculator_that_no_backend_knows_is_refused(self, model: UncertaintyModel):
        from ase.calculators.emt import EMT

        with pytest.raises(TypeError, match="no backend knows EMT"):
            UncertainCalculator(EMT(), model)


class TestCache:
    def test_all_results_come_from_one_evaluation(self, calculator: UncertainCalculator, evaluations: list[int]):
        atoms = box(calculator)
        atoms.get_forces()
        atoms.get_potential_energy()
        atoms.get_stress()
        for key in calculator.implemented_properties:
            calculator.get_property(key, atoms)
        assert evaluations == [1]

    def test_the_same_atoms_again_cost_nothing(self, calculator: UncertainCalculator, evaluations: list[int]):
        atoms = box(calculator)
        atoms.get_forces()
        atoms.get_forces()
        calculator.get_forces(atoms.copy())
        assert len(evaluations) == 1

    def test_notes_in_info_and_arrays_cost_nothing(self, calculator: UncertainCalculator, evaluations: list[int]):
        atoms = box(calculator)
        atoms.get_forces()
        atoms.info["step"] = 17
        atoms.set_array("mark", np.arange(len(atoms)))
        atoms.set_velocities(np.ones((len(atoms), 3)))
        atoms.get_forces()
        assert len(evaluations) == 1

    @pytest.mark.parametrize(
        "change",
        [
            lambda atoms: atoms.positions.__setitem__((0, 0), atoms.positions[0, 0] + 1e-9),
            lambda atoms: atoms.set_cell(atoms.cell * 1.001),
            lambda atoms: atoms.numbers.__setitem__(0, 8),
            lambda atoms: atoms.set_pbc(False),
            lambda atoms: atoms.pop(),
        ],
        ids=["positions", "cell", "numbers", "pbc", "one atom less"],
    )
    def test_an_input_of_the_potential_costs_an_evaluation(
        self, calculator: UncertainCalculator, evaluations: list[int], change
    ):
        atoms = box(calculator)
        atoms.get_forces()
        change(atoms)
        forces = atoms.get_forces()
        assert len(evaluations) == 2
        bare = atoms.copy()
        bare.calc = ToyCalculator(ELEMENTS)
        np.testing.assert_array_equal(forces, bare.get_forces())

    def test_what_the_potential_reads_from_info_counts(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(calculator.predictor.backend, "info_keys", ("charge", "spin"))
        atoms = box(calculator)
        counts = []
        for charge in (None, 0, 0, 0.0, 1, np.array([1, 2]), np.array([1, 2]), np.array([1, 3])):
            if charge is not None:
                atoms.info["charge"] = charge
            atoms.get_forces()
            counts.append(len(evaluations))
        assert counts == [1, 2, 2, 2, 3, 4, 4, 5]
        calculator.reset()  # or the structure without a charge would be remembered
        del atoms.info["charge"]
        atoms.get_forces()
        assert len(evaluations) == 6

    def test_changing_info_in_place_counts_too(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(calculator.predictor.backend, "info_keys", ("field",))
        atoms = box(calculator)
        atoms.info["field"] = np.zeros(3)
        atoms.get_forces()
        atoms.info["field"][0] = 1.0
        atoms.get_forces()
        assert len(evaluations) == 2

    def test_after_an_error_nothing_stale_is_left(self, calculator: UncertainCalculator, evaluations: list[int]):
        atoms = box(calculator)
        good = atoms.get_forces()
        kept = atoms.positions[0].copy()
        atoms.positions[0] = np.nan
        for _ in range(2):
            with pytest.raises(InputError, match=r"positions of structure 0 .* are not finite"):
                atoms.get_forces()
        assert calculator.results == {}
        atoms.positions[0] = kept
        np.testing.assert_array_equal(atoms.get_forces(), good)

    def test_a_failed_calculation_leaves_no_older_results(self, calculator: UncertainCalculator):
        box(calculator).get_potential_energy()
        atoms = bulk("Si", cubic=True)
        with pytest.raises(InputError, match="contains Si"):
            calculator.calculate(atoms)
        atoms.calc = calculator
        with pytest.raises(InputError, match="contains Si"):
            atoms.get_potential_energy()

    def test_an_unknown_element_is_refused_every_time(self, calculator: UncertainCalculator):
        atoms = bulk("Si", cubic=True)
        atoms.calc = calculator
        for _ in range(2):
            with pytest.raises(InputError, match="contains Si, which the potential does not know"):
                atoms.get_forces()


class TestMemory:
    """Structures that were calculated lately, and come again."""

    def test_two_structures_in_turns_cost_one_evaluation_each(
        self, calculator: UncertainCalculator, evaluations: list[int]
    ):
        one, other = box(calculator, seed=1), box(calculator, seed=2)
        first = [(atoms.get_forces(), calculator.get_property("forces_uncertainty", atoms)) for atoms in (one, other)]
        assert not np.array_equal(first[0][0], first[1][0])
        for _ in range(3):
            for atoms, (forces, uncertainty) in zip((one, other), first, strict=True):
                np.testing.assert_array_equal(atoms.get_forces(), forces)
                np.testing.assert_array_equal(calculator.get_property("forces_uncertainty", atoms), uncertainty)
                assert calculator.results.keys() == set(calculator.implemented_properties)
                assert not calculator.check_state(atoms)
        assert evaluations == [1, 1]

    @pytest.mark.parametrize(
        "change",
        [
            lambda atoms: atoms.positions.__setitem__((0, 0), np.nextafter(atoms.positions[0, 0], 9)),
            lambda atoms: atoms.set_cell(atoms.cell * 1.001),
            lambda atoms: atoms.numbers.__setitem__(0, 8),
            lambda atoms: atoms.set_pbc(False),
            lambda atoms: atoms.set_pbc((True, True, False)),
            lambda atoms: atoms.set_initial_charges([1] * len(atoms)),
            lambda atoms: atoms.set_initial_magnetic_moments([1] * len(atoms)),
            lambda atoms: atoms.info.__setitem__("charge", 1),
            lambda atoms: atoms.info.__setitem__("head", "b"),
            lambda atoms: atoms.info.pop("charge"),
            lambda atoms: atoms.pop(),
        ],
        ids=["positions", "cell", "numbers", "pbc", "pbc of c", "charges", "moments", "info", "text", "none", "fewer"],
    )
    def test_another_input_is_another_structure(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch, change
    ):
        monkeypatch.setattr(calculator.predictor.backend, "info_keys", ("charge", "head"))
        atoms = box()
        atoms.info |= {"charge": 0, "head": "a"}
        changed = atoms.copy()
        change(changed)
        calculator.calculate(atoms)
        calculator.calculate(changed)
        assert len(evaluations) == 2
        bare = changed.copy()
        bare.calc = ToyCalculator(ELEMENTS)
        np.testing.assert_array_equal(calculator.results["forces"], bare.get_forces())
        calculator.calculate(atoms)
        calculator.calculate(changed)
        assert len(evaluations) == 2

    @pytest.mark.parametrize(
        "change",
        [
            lambda atoms: atoms.arrays.__setitem__("numbers", atoms.numbers.astype(np.int32)),
            lambda atoms: atoms.info.__setitem__("charge", np.float32(0)),
            lambda atoms: atoms.info.__setitem__("note", "another"),
            lambda atoms: atoms.set_velocities(np.ones((len(atoms), 3))),
            lambda atoms: atoms.set_tags(1),
        ],
        ids=["precision of numbers", "precision of info", "notes", "velocities", "tags"],
    )
    def test_what_is_the_same_to_the_potential_is_the_same_structure(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch, change
    ):
        monkeypatch.setattr(calculator.predictor.backend, "info_keys", ("charge",))
        atoms = box()
        atoms.info["charge"] = 0
        changed = atoms.copy()
        change(changed)
        for structure in (atoms, box(seed=2), changed):
            calculator.calculate(structure)
        assert len(evaluations) == 2

    @pytest.mark.parametrize("value", [np.nan, np.array([0.0, np.nan]), {"a": 1}, 1j], ids=str)
    def test_what_cannot_be_compared_is_calculated_each_time(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch, value
    ):
        monkeypatch.setattr(calculator.predictor.backend, "info_keys", ("field",))
        atoms = box()
        atoms.info["field"] = value
        for structure in (atoms, box(seed=2), atoms):
            calculator.calculate(structure)
        assert len(evaluations) == 3

    def test_positions_that_are_not_finite_fail_each_time(self, calculator: UncertainCalculator):
        broken = box()
        broken.positions[0, 0] = np.nan
        for _ in range(2):
            with pytest.raises(InputError, match="are not finite"):
                calculator.calculate(broken)
            calculator.calculate(box())

    @pytest.mark.parametrize("repeats", [0, 1])
    def test_who_writes_into_results_does_not_change_what_is_remembered(
        self, calculator: UncertainCalculator, evaluations: list[int], repeats: int
    ):
        one, other = box(calculator, seed=1), box(calculator, seed=2)
        calculator.calculate(one)
        expected = copy.deepcopy(calculator.results)
        for _ in range(repeats):  # also what was itself remembered
            calculator.calculate(other)
            calculator.calculate(one)
        for key, value in calculator.results.items():
            if isinstance(value, np.ndarray):
                value[...] = -17
            else:
                calculator.results[key] = -17
        calculator.calculate(other)
        calculator.calculate(one)
        assert calculator.results.keys() == expected.keys()
        for key, value in expected.items():
            np.testing.assert_array_equal(calculator.results[key], value, err_msg=key)
        assert len(evaluations) == 2

    def test_the_structure_not_used_for_the_longest_time_is_forgotten(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(memory, "_MOST_STRUCTURES", 2)
        a, b, c = (box(seed=seed) for seed in range(3))
        counts = []
        for atoms in (a, b, a, c, a, b):
            calculator.calculate(atoms)
            counts.append(len(evaluations))
        assert counts == [1, 2, 2, 3, 3, 4]

    def test_large_structures_are_kept_up_to_a_number_of_atoms(
        self, calculator: UncertainCalculator, evaluations: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(memory, "_MOST_ATOMS", 2 * len(box()))
        a, b, large = box(seed=0), box(seed=1), box(seed=2).repeat((3, 1, 1))
        counts = []
        for atoms in (a, b, a, b, large, large, a, b, a, b):
            calculator.calculate(atoms)
            counts.append(len(evaluations))
        # The last one is always kept, whatever its size.
        assert counts == [1, 2, 2, 2, 3, 3, 4, 5, 5, 5]

    def test_reset_forgets(self, calculator: UncertainCalculator, evaluations: list[int]):
        calculator.calculate(box(seed=1))
        calculator.calculate(box(seed=2))
        calculator.reset()
        assert calculator.results == {}
        calculator.calculate(box(seed=1))
        assert len(evaluations) == 3

    @pytest.mark.parametrize("copied", [lambda c: pickle.loads(pickle.dumps(c)), copy.deepcopy], ids=["pickle", "copy"])
    def test_copies_carry_the_last_results_and_no_memory(
        self, calculator: UncertainCalculator, evaluations: list[int], copied
    ):
        calculator.calculate(box(seed=0))
        size = len(pickle.dumps(calculator))
        for seed in range(1, 5):
            calculator.calculate(box(seed=seed))
        assert len(pickle.dumps(calculator)) == size
        again = copied(calculator)
        np.testing.assert_array_equal(
            again.get_property("forces", box(seed=4)), calculator.get_property("forces", box(seed=4))
        )
        assert len(evaluations) == 5
        again.calculate(box(seed=3))
        assert len(evaluations) == 6
        # The original still remembers, and what the copy learns is its own.
        calculator.calculate(box(seed=3))
        assert len(evaluations) == 6
        again.calculate(box(seed=9))
        calculator.calculate(box(seed=9))
        assert len(evaluations) == 8


class TestEvery:
    """Uncertainties at every Nth calculation only."""

    def steps_with_uncertainties(self, calculator: UncertainCalculator, steps: int = 20) -> list[int]:
        atoms = box(calculator)
        dynamics, found = langevin(atoms), []
        dynamics.attach(lambda: found.append("forces_uncertainty" in calculator.results))
        dynamics.run(steps)
        return [step for step, there in enumerate(found) if there]

    def test_a_run_is_bit_for_bit_the_same(
        self, model: UncertaintyModel, evaluations: list[int], applications: list[int]
    ):
        trajectories, passes, applied = [], [], []
        bare = ToyCalculator(ELEMENTS)
        for calculator in (bare, *(UncertainCalculator(bare, model, every=every) for every in (1, 5, 7))):
            evaluations.clear()
            applications.clear()
            atoms = box(calculator)
            atoms.set_momenta(np.random.default_rng(0).normal(scale=0.5, size=(len(atoms), 3)))
            dynamics, positions = langevin(atoms), []
            dynamics.attach(lambda atoms=atoms, positions=positions: positions.append(atoms.positions.copy()))
            dynamics.run(20)
            trajectories.append(np.array(positions))
            passes.append(len(evaluations))
            applied.append(len(applications))
        for other in trajectories[1:]:
            np.testing.assert_array_equal(other, trajectories[0])
        assert np.abs(trajectories[0][-1] - trajectories[0][0]).max() > 1e-3
        assert passes == [0, 21, 21, 21]
        assert applied == [0, 21, 5, 3]

    @pytest.mark.parametrize(("every", "expected"), [(1, [*range(21)]), (5, [0, 5, 10, 15, 20]), (30, [0])])
    def test_results_have_them_at_those_steps_only(self, model: UncertaintyModel, every: int, expected: list[int]):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=every)
        assert self.steps_with_uncertainties(calculator) == expected
        assert calculator.every == every

    def test_a_skipped_step_has_all_of_the_potential_and_none_of_ours(self, model: UncertaintyModel):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=np.int64(2), interval=0.5)
        calculator.calculate(box(seed=1))
        assert calculator.results.keys() == set(calculator.implemented_properties)
        calculator.calculate(box(seed=2))
        assert calculator.results.keys() == set(ToyCalculator(ELEMENTS).implemented_properties)
        assert "forces_uncertainty" in calculator.implemented_properties

    @pytest.mark.parametrize("key", ["forces_uncertainty", "gamma", "forces_interval"])
    def test_an_uncertainty_that_is_asked_for_is_there_after_all(
        self, model: UncertaintyModel, evaluations: list[int], key: str
    ):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=3, interval=0.5)
        each = UncertainCalculator(ToyCalculator(ELEMENTS), model, interval=0.5)
        with_uncertainties = []
        for seed in range(7):
            atoms = box(calculator, seed=seed)
            forces = atoms.get_forces()
            with_uncertainties.append(key in calculator.results)
            if seed == 1:
                evaluations.clear()
                assert calculator.get_property(key, atoms, allow_calculation=False) is None
                assert evaluations == []
                found = calculator.get_property(key, atoms)
                assert evaluations == [1]
                np.testing.assert_array_equal(found, each.get_property(key, atoms))
                np.testing.assert_array_equal(calculator.results["forces"], forces)
                evaluations.clear()
                calculator.get_property(key, atoms)
                assert evaluations == []
        # It took no other step's turn.
        assert with_uncertainties == [True, False, False, True, False, False, True]

    def test_what_was_handed_out_for_a_structure_stands(self, model: UncertaintyModel, monkeypatch: pytest.MonkeyPatch):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2)
        calculator.calculate(box(seed=1))
        atoms = box(calculator, seed=2)
        forces, energy = atoms.get_forces(), atoms.get_potential_energy()
        predict = type(calculator.predictor).predict

        def wavering(self, frames, **options):
            # As a GPU does, which adds in any order.
            (prediction,) = predict(self, frames, **options)
            prediction["forces"][:] += 1e-7
            prediction.results["energy"] += 1e-7
            return [prediction]

        monkeypatch.setattr(type(calculator.predictor), "predict", wavering)
        calculator.get_property("forces_uncertainty", atoms)
        np.testing.assert_array_equal(atoms.get_forces(), forces)
        assert atoms.get_potential_energy() == energy

    def test_a_remembered_structure_takes_no_turn_and_is_calculated_again_for_an_uncertainty(
        self, model: UncertaintyModel, evaluations: list[int]
    ):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2)
        evaluations.clear()
        a, b, c = (box(seed=seed) for seed in range(3))
        found = []
        for atoms in (a, b, a, b, c):
            calculator.calculate(atoms)
            found.append("gamma" in calculator.results)
        assert len(evaluations) == 3
        assert found == [True, False, True, False, True]
        calculator.calculate(b, ["gamma"])
        assert len(evaluations) == 4
        calculator.calculate(c)
        calculator.calculate(b)
        assert "gamma" in calculator.results
        assert len(evaluations) == 4

    def test_a_structure_calculated_again_takes_no_second_place_in_memory(
        self, model: UncertaintyModel, evaluations: list[int], monkeypatch: pytest.MonkeyPatch
    ):
        monkeypatch.setattr(memory, "_MOST_ATOMS", 2 * len(box()))
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2)
        calculator.calculate(box(seed=1))
        calculator.calculate(box(seed=2))
        calculator.calculate(box(seed=2), ["gamma"])
        evaluations.clear()
        calculator.calculate(box(seed=1))
        calculator.calculate(box(seed=2))
        assert evaluations == []

    def test_a_failed_calculation_takes_no_turn(self, model: UncertaintyModel):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2)
        calculator.calculate(box(seed=1))
        with pytest.raises(InputError, match="contains Si"):
            calculator.calculate(bulk("Si", cubic=True))
        calculator.calculate(box(seed=2))
        assert "gamma" not in calculator.results
        calculator.calculate(box(seed=3))
        assert "gamma" in calculator.results

    def test_after_a_reset_the_next_calculation_has_them(self, model: UncertaintyModel):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=5)
        calculator.calculate(box(seed=1))
        calculator.reset()
        calculator.calculate(box(seed=2))
        assert "gamma" in calculator.results

    def test_a_copy_goes_on_with_the_count(self, model: UncertaintyModel):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=3)
        calculator.calculate(box(seed=0))
        calculator.calculate(box(seed=1))
        again = pickle.loads(pickle.dumps(calculator))
        found = []
        for seed in (2, 3):
            again.calculate(box(seed=seed))
            found.append("gamma" in again.results)
        assert found == [False, True]

    def test_a_monitor_judges_the_steps_that_have_them_at_no_further_cost(
        self, model: UncertaintyModel, evaluations: list[int], applications: list[int]
    ):
        readings = {}
        for every in (1, 5):
            atoms = box(UncertainCalculator(ToyCalculator(ELEMENTS), model, every=every))
            evaluations.clear()
            applications.clear()
            dynamics, log = langevin(atoms), io.StringIO()
            dynamics.attach(UncertaintyMonitor(dynamics, flag=1e-6, log=log))
            dynamics.run(20)
            assert len(evaluations) == 21
            assert len(applications) == len(range(0, 21, every))
            readings[every] = [line.split(",") for line in log.getvalue().splitlines()[1:]]
        assert [int(row[0]) for row in readings[5]] == [0, 5, 10, 15, 20]
        assert readings[5] == readings[1][::5]

    def test_a_frame_of_a_skipped_step_is_written_without_them(self, model: UncertaintyModel, tmp_path: Path):
        atoms = box(UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2))
        for _ in range(2):
            atoms.get_forces()
            write_frames(tmp_path / "run.xyz", [atoms], append=True)
            atoms.rattle(0.01, seed=5)
        first, second = read_frames(tmp_path / "run.xyz")
        assert first.calc is not None
        assert second.calc is not None
        assert "forces_uncertainty" in first.calc.results
        assert second.calc.results.keys() == {"energy", "free_energy", "energies", "forces", "stress"}

    @pytest.mark.parametrize("every", [0, -1, 2.5, 5.0, "5", None], ids=repr)
    def test_what_is_no_whole_number_of_calculations_is_refused(self, model: UncertaintyModel, every: Any):
        with pytest.raises(ValueError, match=r"every=.* is not a whole number of 1 or more\. Give every=1 for"):
            UncertainCalculator(ToyCalculator(ELEMENTS), model, every=every)


class TestInterval:
    """A bound of each atom's force error."""

    def test_it_is_a_result_like_any_other(self, model: UncertaintyModel, evaluations: list[int]):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, interval=0.8)
        plain = UncertainCalculator(ToyCalculator(ELEMENTS), model)
        evaluations.clear()
        atoms = box(calculator)
        assert calculator.implemented_properties == [*plain.implemented_properties, "forces_interval"]
        atoms.get_forces()
        interval = calculator.get_property("forces_interval", atoms)
        assert evaluations == [1]
        assert interval.shape == (len(atoms),)
        norms = np.linalg.norm(calculator.results["forces_uncertainty"], axis=1)
        factors = model.intervals(0.8).factors.numpy()
        np.testing.assert_allclose(interval, factors[atoms.numbers] * norms, rtol=1e-12)
        assert (interval > 0).all()

    def test_without_it_there_is_none(self, calculator: UncertainCalculator):
        assert "forces_interval" not in calculator.implemented_properties
        with pytest.raises(PropertyNotImplementedError, match="forces_interval property not implemented"):
            calculator.get_property("forces_interval", box())
        calculator.calculate(box())
        assert "forces_interval" not in calculator.results

    def test_it_comes_back_from_a_file(self, model: UncertaintyModel, tmp_path: Path):
        atoms = box(UncertainCalculator(ToyCalculator(ELEMENTS), model, interval=0.8))
        atoms.get_forces()
        write_frames(tmp_path / "a.xyz", [atoms])
        (again,) = read_frames(tmp_path / "a.xyz")
        assert again.calc is not None
        assert atoms.calc is not None
        np.testing.assert_allclose(
            again.calc.results["forces_interval"], atoms.calc.results["forces_interval"], atol=1e-7
        )
        assert again.calc.results["forces_interval"].shape == (len(atoms),)

    @pytest.mark.parametrize("confidence", [0, 1, -0.5, 90, np.nan])
    def test_what_is_no_confidence_is_refused(self, model: UncertaintyModel, confidence: float):
        with pytest.raises(ValueError, match="a confidence lies between 0 and 1, not at"):
            UncertainCalculator(ToyCalculator(ELEMENTS), model, interval=confidence)

    def test_too_few_calibration_frames_are_refused_when_it_is_made(self, model: UncertaintyModel):
        with pytest.raises(ValueError, match=r"confidence 0\.99 needs at least 99 independent calibration units"):
            UncertainCalculator(ToyCalculator(ELEMENTS), model, interval=0.99)


class TestDynamics:
    """Uncertainty changes nothing about a run."""

    def both(self, calculator: UncertainCalculator, start: Atoms, run) -> tuple[np.ndarray, np.ndarray]:
        trajectories = []
        for calc in (calculator, ToyCalculator(ELEMENTS)):
            atoms = start.copy()
            atoms.calc = calc
            atoms.set_momenta(np.random.default_rng(0).normal(scale=0.5, size=(len(atoms), 3)))
            positions: list[np.ndarray] = []
            run(atoms, lambda atoms=atoms, positions=positions: positions.append(atoms.positions.copy()))
            trajectories.append(np.array(positions))
        return trajectories[0], trajectories[1]

    def test_nve_is_the_bare_trajectory_bit_for_bit(self, calculator: UncertainCalculator, evaluations: list[int]):
        def run(atoms: Atoms, note) -> None:
            dynamics = VelocityVerlet(atoms, 0.5 * units.fs)
            dynamics.attach(note)
            dynamics.run(20)

        ours, bare = self.both(calculator, molecule("CH3OH"), run)
        np.testing.assert_array_equal(ours, bare)
        assert len(ours) == 21
        assert len(evaluations) == 21  # one a step, and the bare run has none of the backend's

    def test_langevin_with_the_same_seed_is_the_bare_trajectory(self, calculator: UncertainCalculator):
        def run(atoms: Atoms, note) -> None:
            dynamics = langevin(atoms)
            dynamics.attach(note)
            dynamics.run(20)

        ours, bare = self.both(calculator, box(), run)
        np.testing.assert_array_equal(ours, bare)

    def test_constant_pressure_uses_the_same_stress(self, calculator: UncertainCalculator):
        def run(atoms: Atoms, note) -> None:
            dynamics = NPTBerendsen(
                atoms, 0.5 * units.fs, temperature_K=300, pressure_au=0.0, compressibility_au=4.6e-5 / units.bar
            )
            dynamics.attach(note)
            dynamics.run(10)
            assert abs(atoms.cell[0, 0] - CELL) > 1e-6

        ours, bare = self.both(calculator, box(), run)
        np.testing.assert_array_equal(ours, bare)

    def test_a_trajectory_file_of_a_run_is_written_and_read(self, calculator: UncertainCalculator, tmp_path: Path):
        atoms = box(calculator)
        dynamics = VelocityVerlet(atoms, 0.5 * units.fs, trajectory=str(tmp_path / "run.traj"))
        dynamics.run(3)
        frames = read(tmp_path / "run.traj", ":")
        assert len(frames) == 4
        np.testing.assert_array_equal(frames[-1].get_forces(), atoms.get_forces())


class TestOptimisers:
    def test_constraints_hold(self, calculator: UncertainCalculator):
        atoms = molecule("CH3OH", calculator=calculator)
        atoms.rattle(0.05, seed=0)
        atoms.set_constraint(FixAtoms([0, 1]))
        start = atoms.positions.copy()
        assert BFGS(atoms, logfile=None).run(fmax=0.05, steps=100)
        np.testing.assert_array_equal(atoms.positions[:2], start[:2])
        assert np.abs(atoms.positions[2:] - start[2:]).max() > 0.01
        # Uncertainties are of the potential's forces, whatever is held.
        assert (calculator.results["forces_uncertainty"] > 0).all()
        assert np.abs(atoms.get_forces(apply_constraint=False)[:2]).max() > 0

    def test_cell_filters_work_and_follow_the_bare_potential(self, calculator: UncertainCalculator):
        relaxed = []
        for calc in (calculator, ToyCalculator(ELEMENTS)):
            atoms = box(calc)
            BFGS(FrechetCellFilter(atoms), logfile=None).run(fmax=0.05, steps=10)
            relaxed.append(atoms)
        np.testing.assert_array_equal(relaxed[0].cell.array, relaxed[1].cell.array)
        np.testing.assert_array_equal(relaxed[0].positions, relaxed[1].positions)

    def test_images_of_a_path_share_it(self, calculator: UncertainCalculator):
        paths = []
        for calc in (calculator, ToyCalculator(ELEMENTS)):
            start = molecule("CH3OH")
            end = start.copy()
            end.rattle(0.2, seed=3)
            images = [start, *(start.copy() for _ in range(3)), end]
            for image in images:
                image.calc = calc
            neb = NEB(images, allow_shared_calculator=True, method="improvedtangent")
            neb.interpolate()
            BFGS(neb, logfile=None).run(fmax=0.01, steps=5)
            paths.append([image.positions for image in images])
        np.testing.assert_array_equal(paths[0], paths[1])

    @pytest.mark.parametrize("every", [1, 4])
    def test_images_that_share_it_cost_one_evaluation_a_structure_and_the_ends_one_for_the_whole_run(
        self, model: UncertaintyModel, structures: list[bytes], every: int
    ):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=every)
        structures.clear()
        images, neb = shared_band(calculator)
        BFGS(neb, logfile=None).run(fmax=1e-9, steps=5)
        assert len(structures) == len(set(structures)) == 2 + 3 * 6
        # Each image's results can be asked for although the calculator has seen others since.
        for image in images:
            image.get_forces()
            image.get_potential_energy()
            if every == 1:
                assert calculator.get_property("forces_uncertainty", image).shape == (len(image), 3)
        assert len(structures) == 20

    @pytest.mark.parametrize("every", [1, 4])
    def test_a_monitor_reads_every_image_without_another_forward_pass(
        self, model: UncertaintyModel, structures: list[bytes], every: int
    ):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=every)
        structures.clear()
        images, neb = shared_band(calculator)
        optimizer = BFGS(neb, logfile=None)
        log = io.StringIO()
        monitor = UncertaintyMonitor(optimizer, halt=1e6, log=log)
        optimizer.attach(monitor)
        told = pytest.warns(UQWarning, match="share a calculator with every=4") if every > 1 else nullcontext()
        with told:
            optimizer.run(fmax=1e-9, steps=5)
        assert len(structures) == len(set(structures)) == 2 + 3 * 6
        if every == 1:
            assert len(log.getvalue().splitlines()) == 1 + 6
            norms = [np.linalg.norm(calculator.get_property("forces_uncertainty", i), axis=1) for i in images[1:-1]]
            assert monitor.last is not None
            assert monitor.last.reading == max(norm.max() for norm in norms)

    def test_a_monitor_reads_the_centre_of_a_dimer(self, model: UncertaintyModel, structures: list[bytes]):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model)
        atoms = box(calculator)
        optimizer = MinModeTranslate(displaced_dimer(atoms), logfile=None)
        monitor = UncertaintyMonitor(optimizer, halt=1e6)
        optimizer.attach(monitor)
        structures.clear()
        optimizer.run(fmax=1e-3, steps=3)
        assert len(structures) == len(set(structures))
        assert monitor.last is not None
        expected = np.linalg.norm(calculator.get_property("forces_uncertainty", atoms), axis=1).max()
        assert monitor.last.reading == expected

    def test_what_is_remembered_is_not_required(self, model: UncertaintyModel):
        calculator = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2)
        first, second = box(), box()
        second.rattle(0.1, seed=1)
        assert calculator.calculation_required(first, ["forces"])
        for atoms in (first, second):
            calculator.get_property("forces", atoms)
        assert not calculator.calculation_required(first, ["forces", "forces_uncertainty"])
        assert not calculator.calculation_required(second, ["energy"])
        # The second calculation was skipped by `every`.
        assert calculator.calculation_required(second, ["forces_uncertainty"])

    def test_a_dimer_finds_the_same_saddle_without_calculating_a_structure_twice(
        self, model: UncertaintyModel, structures: list[bytes]
    ):
        ends, ours = [], UncertainCalculator(ToyCalculator(ELEMENTS), model)
        structures.clear()
        for calculator in (ours, ToyCalculator(ELEMENTS)):
            atoms = box(calculator)
            dimer = displaced_dimer(atoms)
            MinModeTranslate(dimer, logfile=None).run(fmax=1e-3, steps=5)
            ends.append(atoms.positions)
        np.testing.assert_array_equal(ends[0], ends[1])
        assert len(structures) == len(set(structures)) > 10


class TestMACE:
    """The same with a small MACE of random weights that reads charge and spin."""

    @pytest.fixture(scope="class")
    @classmethod
    def mace(cls) -> Any:
        from ase_uq.backends.mace.backend import MACECalculator

        return MACECalculator(models=make_omol_like(), device="cpu", default_dtype="float64")

    @pytest.fixture
    def ours(self, mace: Any) -> UncertainCalculator:
        parts = []
        for seed in (1, 2):
            frames = labelled_frames(12, seed=seed)
            for atoms in frames:
                atoms.info |= {"charge": 0, "spin": 1}
            # Random weights have forces of their own size: labels scattered about them.
            random = np.random.default_rng(seed)
            for atoms in frames:
                atoms.arrays["REF_forces"] = mace.get_property("forces", atoms) + random.normal(size=(len(atoms), 3))
            parts.append(frames)
        with pytest.warns(UQWarning):
            model = fit(mace, *parts, methods=["bll"], progress=False)
        return UncertainCalculator(mace, model)

    def test_a_run_is_the_bare_one_bit_for_bit_and_charge_counts(self, mace: Any, ours: UncertainCalculator):
        positions = []
        for calc in (ours, mace):
            atoms = molecule("CH3OH", calculator=calc, info={"charge": 0, "spin": 1})
            VelocityVerlet(atoms, 0.5 * units.fs).run(3)
            positions.append(atoms.positions)
        np.testing.assert_array_equal(positions[0], positions[1])
        ours.reset()  # or the start of the run would be remembered
        atoms = molecule("CH3OH", calculator=ours, info={"charge": 0, "spin": 1})
        with count_forwards(ours.predictor.backend._modules()) as count:
            neutral = atoms.get_potential_energy()
            atoms.get_forces()
            atoms.info["note"] = "kept"
            atoms.get_forces()
            assert count() == 1
            atoms.info["charge"] = 1
            charged = atoms.get_potential_energy()
            assert count() == 2
            atoms.info["charge"] = 0
            assert atoms.get_potential_energy() == neutral
            assert count() == 2
        atoms.info["charge"] = 1
        assert charged != neutral
        bare = molecule("CH3OH", calculator=mace, info={"charge": 1, "spin": 1})
        assert charged == bare.get_potential_energy()
        assert (ours.results["forces_uncertainty"] > 0).all()


WORKER = """
import pickle, sys
import numpy as np
with open(sys.argv[1], "rb") as file:
    atoms = pickle.load(file)
forces = atoms.get_forces()
np.savez(sys.argv[2], forces=forces, **{k: v for k, v in atoms.calc.results.items() if "uncertainty" in k})
"""


class TestPickling:
    def test_a_copy_gives_the_same_bits(self, calculator: UncertainCalculator):
        atoms = box(calculator)
        expected = {key: calculator.get_property(key, atoms) for key in calculator.implemented_properties}
        again = pickle.loads(pickle.dumps(calculator))
        again.reset()
        for key, value in expected.items():
            np.testing.assert_array_equal(again.get_property(key, atoms), value, err_msg=key)

    def test_another_process_gives_the_same_bits(
        self, calculator: UncertainCalculator, preloaded_bin: Path, tmp_path: Path
    ):
        atoms = box(calculator)
        (tmp_path / "atoms.pickle").write_bytes(pickle.dumps(atoms))
        command = [
            preloaded_bin / "python",
            "-c",
            WORKER,
            str(tmp_path / "atoms.pickle"),
            str(tmp_path / "results.npz"),
        ]
        subprocess.run(command, check=True, timeout=120, env={**os.environ, "OMP_NUM_THREADS": "1"})
        found = np.load(tmp_path / "results.npz")
        atoms.get_forces()
        assert "forces_uncertainty" in found
        for key in found.files:
            np.testing.assert_allclose(found[key], calculator.results[key], rtol=1e-12, err_msg=key)


class TestWriters:
    """ASE's own writers never stumble over our keys, and ours keeps them."""

    @pytest.mark.parametrize("name", ["a.xyz", "a.extxyz", "a.traj", "a.json", "a.xsf"])
    def test_ases_formats(self, calculator: UncertainCalculator, tmp_path: Path, name: str):
        atoms = box(calculator)
        atoms.get_forces()
        write(tmp_path / name, atoms)
        again = read(tmp_path / name)
        assert isinstance(again, Atoms)
        np.testing.assert_allclose(again.positions, atoms.positions, atol=1e-5)

    @pytest.mark.parametrize("name", ["a.xyz", "a.traj"])
    def test_energy_and_forces_are_in_the_file(self, calculator: UncertainCalculator, tmp_path: Path, name: str):
        atoms = box(calculator)
        atoms.get_forces()
        write(tmp_path / name, [atoms])
        (again,) = read(tmp_path / name, ":")
        assert again.get_potential_energy() == pytest.approx(atoms.get_potential_energy(), abs=1e-7)
        np.testing.assert_allclose(again.get_forces(), atoms.get_forces(), atol=1e-7)

    def test_a_database_row(self, calculator: UncertainCalculator, tmp_path: Path):
        atoms = box(calculator)
        atoms.get_forces()
        with connect(tmp_path / "rows.json") as rows:
            rows.write(atoms, label="one")
            row = rows.get(label="one")
        assert row.energy == pytest.approx(atoms.get_potential_energy())
        np.testing.assert_allclose(row.forces, atoms.get_forces())

    def test_a_trajectory_writer(self, calculator: UncertainCalculator, tmp_path: Path):
        atoms = box(calculator)
        with Trajectory(tmp_path / "a.traj", "w") as trajectory:
            for _ in range(2):
                atoms.rattle(0.01)
                atoms.get_forces()
                trajectory.write(atoms)
        assert len(read(tmp_path / "a.traj", ":")) == 2

    def test_uncertainties_come_back_through_our_own(self, calculator: UncertainCalculator, tmp_path: Path):
        atoms = box(calculator)
        atoms.get_forces()
        write_frames(tmp_path / "a.xyz", [atoms])
        (again,) = read_frames(tmp_path / "a.xyz")
        assert again.calc is not None
        for key in calculator.implemented_properties:
            np.testing.assert_allclose(again.calc.results[key], calculator.results[key], atol=1e-7, err_msg=key)

    def test_printing_and_comparing_work(self, calculator: UncertainCalculator):
        atoms = box(calculator)
        atoms.get_forces()
        assert "UncertainCalculator" in repr(atoms)
        stream = io.StringIO()
        write(stream, atoms, format="extxyz")
        assert "forces" in stream.getvalue()


@pytest.mark.filterwarnings("ignore:ntk tells nothing about the:ase_uq.errors.UQWarning")
def test_what_is_too_dear_for_dynamics_says_so(monkeypatch: pytest.MonkeyPatch):
    train, held_out = labelled_frames(12, seed=1), labelled_frames(12, seed=2)
    model = fit(ToyCalculator(ELEMENTS), train, held_out, methods=[make_method("ntk", tangents=1)], progress=False)
    with pytest.warns(UQWarning, match=r"ntk takes further backward passes at every step.* every=N"):
        UncertainCalculator(ToyCalculator(ELEMENTS), model)
    # At some steps only it is the user's choice, and costs nothing at the others.
    calculator, bare = UncertainCalculator(ToyCalculator(ELEMENTS), model, every=2), ToyCalculator(ELEMENTS)
    graphs = []
    original = ToyBackend._forward

    def noted(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        graphs.append(gradients)
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_forward", noted)
    for seed in range(4):
        atoms = box(seed=seed)
        np.testing.assert_array_equal(calculator.get_property("forces", atoms), bare.get_property("forces", atoms))
    assert graphs == [True, False, True, False]
