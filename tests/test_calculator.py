"""The ASE calculator: the potential's own numbers, recomputed exactly when an input changes, wherever ASE takes one."""

import io
import os
import pickle
import subprocess
import sys
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
from ase.mep import NEB
from ase.optimize import BFGS

from ase_uq import Quantile, UncertainCalculator, UncertaintyModel, fit, read_frames, write_frames
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch, UQWarning
from ase_uq.methods import make_method
from ase_uq.properties import PROPERTIES
from ase_uq.testing.backends import count_forwards
from ase_uq.testing.methods import ELEMENTS, labelled_frames

from .backends.builders import make_omol_like

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
    original = ToyBackend._evaluate

    def counted(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        seen.append(len(batch.frames))
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_evaluate", counted)
    return seen


def box(calculator: BaseCalculator | None = None) -> Atoms:
    atoms = molecule("CH3OH", cell=[CELL] * 3, pbc=True, calculator=calculator)
    atoms.rattle(0.05, seed=1)
    return atoms


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
        with pytest.raises(ArtefactError, match="is no file that exists"):
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
            rng = np.random.default_rng(1)
            dynamics = Langevin(
                atoms, 0.5 * units.fs, temperature_K=300, friction=0.01 / units.fs, rng=rng, fixcm=False
            )
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


class TestMACE:
    """The same with a small MACE of random weights that reads charge and spin."""

    @pytest.fixture(scope="class")
    @classmethod
    def mace(cls) -> Any:
        from ase_uq.backends.mace import MACECalculator

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

    def test_another_process_gives_the_same_bits(self, calculator: UncertainCalculator, tmp_path: Path):
        atoms = box(calculator)
        (tmp_path / "atoms.pickle").write_bytes(pickle.dumps(atoms))
        command = [sys.executable, "-c", WORKER, str(tmp_path / "atoms.pickle"), str(tmp_path / "results.npz")]
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
def test_what_is_too_dear_for_dynamics_says_so():
    train, held_out = labelled_frames(12, seed=1), labelled_frames(12, seed=2)
    model = fit(ToyCalculator(ELEMENTS), train, held_out, methods=[make_method("ntk", tangents=1)], progress=False)
    with pytest.warns(UQWarning, match="ntk takes further backward passes at every step"):
        UncertainCalculator(ToyCalculator(ELEMENTS), model)
