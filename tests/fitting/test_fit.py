"""From labelled frames to an uncertainty model: what comes out is calibrated, and bad input is found first."""

import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import read, write

from ase_uq import Predictor, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.communicator import Communicator, Serial
from ase_uq.errors import InputError, LabelError, UQWarning
from ase_uq.fitting import combination
from ase_uq.methods.base import Head
from ase_uq.methods.bll import BLL
from ase_uq.methods.mahalanobis import Mahalanobis, MahalanobisAccumulator
from ase_uq.numerics.training import Training
from ase_uq.stream.labelled import LabelledStream
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames, on_ranks, with_labels
from ase_uq.uncertainty_model.combination import RESIDUAL, Combination

# So few toy frames: errors of energies and of stresses that the distance does not order.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* tells nothing about the:ase_uq.errors.UQWarning"),
    pytest.mark.filterwarnings("ignore:.* variance has no floor:ase_uq.errors.UQWarning"),
]

Change = Callable[[Atoms], Any]


@pytest.fixture(scope="module")
def calculator() -> ToyCalculator:
    return ToyCalculator(ELEMENTS)


@pytest.fixture
def train() -> list[Atoms]:
    return labelled_frames(20, seed=1)


@pytest.fixture
def held_out() -> list[Atoms]:
    return labelled_frames(20, seed=2)


@pytest.fixture
def evaluations(train: list[Atoms], held_out: list[Atoms], monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Frames of every forward pass of the toy potential since the labels were made."""
    seen: list[int] = []
    original = ToyBackend._forward

    def counted(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        seen.append(len(batch.frames))
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_forward", counted)
    return seen


def quick(calculator: Any, train: Any, calibration: Any, **options: Any) -> UncertaintyModel:
    return fit(calculator, train, calibration, **{"methods": ["bll"], "progress": False, **options})


class TestCalibration:
    @pytest.mark.parametrize("direct", [False, True])
    def test_scores_on_exchangeable_frames_have_unit_variance(self, direct: bool):
        calculator = ToyCalculator(ELEMENTS, direct=direct)
        model = quick(calculator, labelled_frames(100, seed=1), labelled_frames(200, seed=2))
        fresh = labelled_frames(200, seed=3)
        predictions = Predictor(load_backend(calculator), model).predict(fresh)
        z_forces = [
            (atoms.arrays["REF_forces"] - p["forces"]) / p["forces_uncertainty"]
            for atoms, p in zip(fresh, predictions, strict=True)
        ]
        z_energy = [
            (atoms.info["REF_energy"] - p["energy"]) / p["energy_uncertainty"]
            for atoms, p in zip(fresh, predictions, strict=True)
        ]
        # The relative spread of a mean of squares over 200 frames is sqrt(2/200) = 0.1 for fit and test each if a
        # frame counts as one observation; three of their sum for energies, less for three numbers an atom.
        assert np.mean(np.concatenate(z_forces) ** 2) == pytest.approx(1, abs=0.3)
        assert np.mean(np.square(z_energy)) == pytest.approx(1, abs=0.45)

    def test_scores_on_the_calibration_frames_have_unit_variance(self, calculator, train, held_out):
        model = quick(calculator, train, held_out)
        ratio = model.record.error**2 / model.record.uncertainty**2
        # The likelihood is largest near there, but not exactly: σ∞ is not fitted.
        assert ratio.mean() == pytest.approx(1, abs=0.05)

    def test_uncertainty_grows_where_errors_do(self):
        calculator = ToyCalculator(ELEMENTS, direct=True)
        model = quick(calculator, labelled_frames(60, seed=1), labelled_frames(100, seed=2))
        predictor = Predictor(load_backend(calculator), model)
        quiet, torn = (
            np.mean([p.atom_uncertainty.mean() for p in predictor.predict(labelled_frames(30, seed=4, spread=spread))])
            for spread in ((0.02, 0.03), (0.25, 0.3))
        )
        assert torn > 2 * quiet

    def test_record_holds_the_calibration_atoms(self, calculator, train, held_out):
        record = quick(calculator, train, held_out).record
        assert record.n_atoms_of_frame.tolist() == [len(atoms) for atoms in held_out]
        assert record.numbers.tolist() == np.concatenate([atoms.numbers for atoms in held_out]).tolist()
        forces = forward_pass_of(load_backend(calculator), held_out).forces
        assert forces is not None
        labels = np.concatenate([atoms.arrays["REF_forces"] for atoms in held_out])
        np.testing.assert_allclose(record.error, np.linalg.norm(labels - forces.numpy(), axis=1), rtol=1e-5)

    def test_several_ranks_give_the_model_of_one(self, calculator, train, held_out):
        serial = quick(calculator, train, held_out, batch_atoms=20)
        batch = forward_pass_of(load_backend(calculator), labelled_frames(3, seed=5))
        expected = serial.apply(batch)
        models = on_ranks(2, lambda ranks: quick(calculator, train, held_out, batch_atoms=20, communicator=ranks))
        for model in models:
            for key, value in model.apply(batch).items():
                # A ridge of 1e-9 loses nine digits of sixteen in directions that no frame explored.
                np.testing.assert_allclose(value, expected[key], rtol=1e-4, err_msg=key)


class TestRanks:
    """Each sees its own part of the frames, and all must see the same files."""

    @pytest.mark.parametrize("change", ["positions", "forces", "energy", "stress", "order"])
    def test_other_frames_or_labels_are_refused(self, calculator, train, held_out, change: str):
        other = [atoms.copy() for atoms in held_out]
        if change == "positions":
            other[4].positions[0, 0] += 0.01
        elif change == "forces":
            other[4].arrays["REF_forces"][0, 0] += 0.01
        elif change == "order":
            other[4], other[5] = other[5], other[4]
        else:
            other[4].info[f"REF_{change}"] = 1.0 if change == "energy" else np.ones(6)
        with pytest.raises(LabelError, match=r"the calibration frames of rank 1 are not those of rank 0. Give all"):
            on_ranks(2, lambda ranks: quick(calculator, train, other if ranks.rank else held_out, communicator=ranks))

    def test_all_tell_of_labels_with_constraints_wherever_they_are(self, calculator, train, held_out):
        frames = [atoms.copy() for atoms in held_out]
        for number in (3, len(frames) - 2):
            frames[number].arrays["REF_forces"][0] = 0
        with pytest.warns(UQWarning, match="2 atoms of 2 calibration frames") as told:
            on_ranks(2, lambda ranks: quick(calculator, train, frames, batch_atoms=20, communicator=ranks))
        assert sum("reference forces of exactly 0" in str(one.message) for one in told) == 2


class TestHeads:
    """Frames that are labelled for another head of the potential: what two heads differ by is no error."""

    @pytest.fixture(autouse=True)
    def _heads(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(ToyBackend, "heads", ("dft", "pt"))
        monkeypatch.setattr(ToyBackend, "head", "dft")

    @pytest.mark.parametrize("which", ["training", "calibration", "perturbed"])
    def test_are_refused_by_number_wherever_they_are(self, calculator, which: str):
        frames = {
            name: labelled_frames(12, seed=seed) for seed, name in enumerate(("training", "calibration", "perturbed"))
        }
        for number in (3, 7):
            frames[which][number].info["head"] = "pt"
        with pytest.raises(
            LabelError,
            match=rf"{which} frame 3 is labelled for head 'pt' .* 'dft' here; so are 2 of 12 frames\..*\?head=pt",
        ):
            quick(calculator, frames["training"], frames["calibration"], perturbed=frames["perturbed"])

    def test_those_of_this_head_are_not(self, calculator, train, held_out):
        for atoms in (*train, *held_out):
            atoms.info["head"] = "dft"
        quick(calculator, train, held_out)

    def test_a_name_that_the_potential_does_not_have_is_told(self, calculator, train, held_out):
        held_out[5].info["head"] = "pbe"
        with pytest.warns(
            UQWarning, match="calibration frames name the head pbe, and this potential has dft, pt: .* dft"
        ):
            quick(calculator, train, held_out)

    def test_without_heads_the_name_is_a_note(self, calculator, train, held_out, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(ToyBackend, "heads", ())
        monkeypatch.setattr(ToyBackend, "head", "")
        held_out[5].info["head"] = "pt"
        quick(calculator, train, held_out)


class TestInputs:
    def test_paths_and_lists_give_the_same_model(self, calculator, train, held_out, tmp_path: Path):
        write(tmp_path / "train.xyz", train)
        write(tmp_path / "held_out.xyz", held_out)
        listed = quick(calculator, read(tmp_path / "train.xyz", ":"), read(tmp_path / "held_out.xyz", ":"))
        by_path = quick(calculator, tmp_path / "train.xyz", str(tmp_path / "held_out.xyz"))
        assert by_path.summary() == listed.summary()
        np.testing.assert_array_equal(by_path.record.uncertainty, listed.record.uncertainty)

    def test_a_spec_and_a_backend_give_the_same_model(self, train, held_out):
        one, two = (quick(x, train, held_out) for x in ("toy:", load_backend(ToyCalculator())))
        np.testing.assert_array_equal(one.record.uncertainty, two.record.uncertainty)

    def test_other_label_keys(self, calculator, train, held_out):
        def renamed(frames: list[Atoms]) -> list[Atoms]:
            copies = [atoms.copy() for atoms in frames]
            for atoms in copies:
                atoms.info["dft_energy"] = atoms.info.pop("REF_energy")
                atoms.set_array("dft_forces", atoms.arrays.pop("REF_forces"))
            return copies

        keys = ("dft_energy", "dft_forces", "dft_stress")
        found = quick(calculator, renamed(train), renamed(held_out), label_keys=keys)
        np.testing.assert_array_equal(found.record.error, quick(calculator, train, held_out).record.error)
        with pytest.raises(LabelError, match="training frame 0 has no reference energy or forces"):
            quick(calculator, renamed(train), renamed(held_out))

    def test_labels_on_an_attached_calculator(self, calculator, train, held_out):
        def attached(frames: list[Atoms]) -> list[Atoms]:
            copies = [atoms.copy() for atoms in frames]
            for atoms in copies:
                energy, forces = atoms.info.pop("REF_energy"), atoms.arrays.pop("REF_forces")
                atoms.calc = SinglePointCalculator(atoms, energy=energy, forces=forces)
            return copies

        found = quick(calculator, attached(train), attached(held_out))
        np.testing.assert_array_equal(found.record.error, quick(calculator, train, held_out).record.error)

    def test_isolated_atoms_are_skipped(self, calculator, train, held_out):
        lone = Atoms("O", info={"config_type": "IsolatedAtom", "REF_energy": -400.0})
        assert quick(calculator, [lone, *train], held_out).provenance["train"]["frames"] == 20

    def test_the_first_method_is_the_primary_one(self, calculator, train, held_out):
        model = quick(calculator, train, held_out, methods=[BLL(ridge=1e-3)])
        assert model.primary == "bll"
        assert model.methods["bll"].head.settings["ridge"] == 1e-3

    def test_inputs_are_not_changed(self, calculator, train, held_out):
        before = [atoms.copy() for atoms in train + held_out]
        quick(calculator, train, held_out)
        for atoms, copy in zip(train + held_out, before, strict=True):
            assert atoms == copy
            assert atoms.info == copy.info
            assert atoms.calc is None

    def test_provenance_counts_what_was_used(self, calculator, train, held_out):
        provenance = quick(calculator, train, held_out).provenance
        for part, frames in (("train", train), ("calibration", held_out)):
            assert provenance[part]["frames"] == len(frames)
            assert provenance[part]["atoms"] == sum(len(atoms) for atoms in frames)
            carbon = sum(int((atoms.numbers == 6).sum()) for atoms in frames)
            assert provenance[part]["elements"]["C"] == carbon
        assert provenance["train"]["digest"] != provenance["calibration"]["digest"]
        assert "ase" in provenance["versions"]

    @pytest.mark.parametrize("progress", [True, False])
    def test_progress_can_be_switched_off(self, calculator, train, held_out, progress: bool, terminal, capfd):
        fit(calculator, train, held_out, methods=["bll"], progress=progress)
        out, errors = capfd.readouterr()
        assert out == ""
        assert ("fit" in errors and "calibrate" in errors) == progress
        assert (errors == "") == (not progress)

    def test_a_frame_is_evaluated_once_for_its_part(self, calculator, train, held_out, evaluations: list[int]):
        backend = load_backend(calculator)
        assert backend.identity  # the probe
        evaluations.clear()
        model = quick(backend, train, held_out)
        assert sum(evaluations) == expected_evaluations(model)


def expected_evaluations(model: UncertaintyModel) -> int:
    """Four frames for the units, twenty for the fit and for the calibration; and for the far field twelve as they are,
    six of these rattled by each fraction, and the other six by the one that was chosen."""
    assert model.far_field is not None
    return 4 + 20 + 20 + 12 + 6 * len(model.far_field.fractions) + 6


class Shy(Mahalanobis):
    """A method whose scores, it says, need not grow with the distance."""

    name = "shy"

    def start(self) -> MahalanobisAccumulator:
        return _Marked(self, grows=False)


class Costly(Mahalanobis):
    """A method that, it says, needs passes of its own."""

    name = "costly"
    gradients = True

    def start(self) -> MahalanobisAccumulator:
        return _Marked(self, gradients=True)


class _Marked(MahalanobisAccumulator):
    def __init__(self, method: Mahalanobis, **marks: bool) -> None:
        super().__init__(method)
        self.marks = marks

    def _finish(self, communicator: Communicator) -> Head:
        head = super()._finish(communicator)
        for name, value in self.marks.items():
            setattr(head, name, value)
        if head.gradients:
            original = head.forward

            def forward(forward_pass: Any):
                assert forward_pass.gradients is not None, "asked for without gradients"
                return original(forward_pass)

            head.forward = forward
        return head


# Fewer digits are lost with a larger ridge.
PAIR = (BLL(ridge=1e-4), Mahalanobis(ridge=1e-4))


class TestSeveralMethods:
    @pytest.fixture(autouse=True)
    def hardly_trained(self, monkeypatch: pytest.MonkeyPatch) -> None:
        training = Training(hidden=(8,), learning_rate=1e-2, batch=64, max_epochs=4, patience=4)
        monkeypatch.setattr(combination, "_TRAINING", training)

    @pytest.mark.parametrize("direct", [False, True])
    def test_are_combined_and_stand_beside_it(self, train, held_out, direct: bool):
        calculator = ToyCalculator(ELEMENTS, direct=direct)
        model = quick(calculator, train, held_out, methods=PAIR)
        assert model.primary == "combined"
        assert model.combination is not None
        assert model.combination.inputs.anchor == "bll"
        assert model.combination.inputs.others == model.combination.inputs.distances == ("mahalanobis",)
        assert model.combination.inputs.elements == (1, 6, 8)
        assert list(model.combination.likelihoods) == ["anchor", "methods", RESIDUAL, "all"]
        batch = forward_pass_of(load_backend(calculator), labelled_frames(4, seed=3))
        found = model.apply(batch)
        quantities = [f"{quantity}_uncertainty" for quantity in ("forces", "energy", "energies")]
        alone = {f"{key}_{name}" for key in quantities for name in ("bll", "mahalanobis")}
        assert set(found) == set(model.results) == {*quantities, *alone, "gamma", "contact"}
        assert len(model.results) == len(set(model.results))
        for key, value in found.items():
            assert bool((value > 0).all()), key
            assert bool(value.isfinite().all()), key
        assert found["forces_uncertainty"].shape == (len(batch.numbers), 3)
        # What the combination does not give is its anchor's.
        np.testing.assert_array_equal(found["energies_uncertainty"], found["energies_uncertainty_bll"])
        assert isinstance(model.combination, Combination)
        assert model.combination.energy is not None
        assert list(model.combination.energy.likelihoods) == ["anchor", "mahalanobis"]
        prediction = Predictor(load_backend(calculator), model).predict(labelled_frames(1, seed=3))[0]
        assert {*quantities, *alone, "gamma", "contact"} <= set(prediction.results)

    def test_each_gives_what_it_gives_alone(self, calculator, train, held_out):
        both = quick(calculator, train, held_out, methods=PAIR)
        batch = forward_pass_of(load_backend(calculator), labelled_frames(4, seed=3))
        together = both.apply(batch)
        for method in PAIR:
            for key, value in quick(calculator, train, held_out, methods=[method]).apply(batch).items():
                if key not in ("gamma", "contact"):
                    np.testing.assert_array_equal(together[f"{key}_{method.name}"], value)

    def test_one_alone_is_not_combined(self, calculator, train, held_out):
        model = quick(calculator, train, held_out, methods=["mahalanobis"])
        assert model.primary == "mahalanobis"
        assert model.combination is None
        assert not [key for key in model.results if key.endswith("_mahalanobis")]

    def test_the_anchor_is_the_first_that_grows(self, calculator, train, held_out):
        model = quick(calculator, train, held_out, methods=[Shy(), Mahalanobis(), BLL()])
        assert model.combination is not None
        view = model.combination.inputs
        assert (view.anchor, view.others, view.distances) == ("mahalanobis", ("shy", "bll"), ("bll",))
        found = model.apply(forward_pass_of(load_backend(calculator), labelled_frames(4, seed=3)))
        np.testing.assert_array_equal(found["energies_uncertainty"], found["energies_uncertainty_mahalanobis"])

    def test_of_which_none_grows_are_not_combined(self, calculator, train, held_out):
        class Silent(Shy):
            name = "silent"

        with pytest.warns(UQWarning, match=r"none of shy, silent measures a distance .* Fit 'bll' with them") as caught:
            model = quick(calculator, train, held_out, methods=[Shy(), Silent()])
        (own,) = [warning for warning in caught if "measures a distance" in str(warning.message)]
        assert own.filename == __file__
        assert model.primary == "shy"
        assert model.combination is None
        found = model.apply(forward_pass_of(load_backend(calculator), labelled_frames(4, seed=3)))
        assert set(found) == set(model.results)
        np.testing.assert_array_equal(found["forces_uncertainty"], found["forces_uncertainty_shy"])

    def test_the_anchor_has_no_passes_of_its_own_if_possible(self, calculator, train, held_out):
        """Evaluations of training frames are kept without the graph, which the scores of such a method need."""
        model = quick(calculator, train, held_out, methods=[Costly(), Mahalanobis()])
        assert model.combination is not None
        view = model.combination.inputs
        assert (view.anchor, view.others, view.distances) == ("mahalanobis", ("costly",), ())

    def test_an_anchor_with_passes_of_its_own_is_enough(self, calculator, train, held_out):
        model = quick(calculator, train, held_out, methods=[Costly(), Shy()])
        assert model.combination is not None
        assert model.combination.inputs.anchor == "costly"

    def test_the_record_is_that_of_the_combination(self, calculator, train, held_out):
        model = quick(calculator, train, held_out, methods=PAIR)
        assert model.combination is not None
        alone = quick(calculator, train, held_out, methods=PAIR[:1])
        expected = alone.record.uncertainty
        if model.combination.weights:
            assert not np.allclose(model.record.uncertainty, expected)
        assert model.record.uncertainty.shape == expected.shape
        np.testing.assert_array_equal(model.record.error, alone.record.error)
        ratio = model.record.error**2 / model.record.uncertainty**2
        assert ratio.mean() == pytest.approx(1, abs=0.1)

    def test_calibration_without_energies(self, calculator, train, held_out):
        for atoms in held_out:
            del atoms.info["REF_energy"]
        model = quick(calculator, train, held_out, methods=PAIR)
        assert model.primary == "combined"
        alone = ("forces_uncertainty_bll", "forces_uncertainty_mahalanobis")
        expected = ("forces_uncertainty", "gamma", "contact", *alone)
        assert model.results == expected

    @pytest.mark.parametrize("labelled", [0, 1, 2])
    def test_training_frames_without_forces(self, calculator, held_out, labelled: int):
        """Two that have forces among a hundred must not leave a fold of the networks without any."""
        train = labelled_frames(100, seed=1)
        for atoms in train[labelled:]:
            del atoms.arrays["REF_forces"]
        model = quick(calculator, train, held_out, methods=PAIR, batch_atoms=20)
        assert model.primary == "combined"
        assert np.isfinite(model.record.uncertainty).all()

    def test_training_frames_with_labels_of_the_potential_itself(self, calculator, train, held_out):
        for atoms in train:
            atoms.calc = ToyCalculator(ELEMENTS)
            atoms.arrays["REF_forces"] = atoms.get_forces()
            atoms.calc = None
        model = quick(calculator, train, held_out, methods=PAIR)
        assert np.isfinite(model.record.uncertainty).all()

    def test_the_fewest_frames_are_enough(self, calculator, train, held_out):
        model = quick(calculator, train[:10], held_out[:10], methods=PAIR)
        assert np.isfinite(model.record.uncertainty).all()

    def test_lone_atoms_and_crystals_together(self):
        """Frames without neighbours, of one atom, and of a cell smaller than the cutoff."""
        calculator = ToyCalculator(ELEMENTS)

        def frames(seed: int) -> list[Atoms]:
            lone = with_labels([Atoms("O", [(0.1 * k, 0, 0)]) for k in range(seed, seed + 3)], seed=seed)
            return [*labelled_frames(15, seed=seed), *lone, *labelled_frames(3, seed=seed + 50, cell=4.5)]

        model = quick(calculator, frames(1), frames(20), methods=PAIR)
        for atoms in frames(40):
            (alone,) = Predictor(load_backend(calculator), model).predict([atoms])
            assert np.isfinite(alone["forces_uncertainty"]).all()

    @pytest.mark.parametrize("size", [2, 7])
    def test_several_ranks_give_the_model_of_one(self, calculator, train, held_out, size: int):
        options = {"methods": PAIR, "batch_atoms": 40}
        batch = forward_pass_of(load_backend(calculator), labelled_frames(3, seed=5))
        serial = quick(calculator, train, held_out, **options)
        assert serial.combination is not None
        models = on_ranks(size, lambda ranks: quick(calculator, train, held_out, communicator=ranks, **options))
        for model in models:
            assert model.combination is not None
            assert model.combination.likelihoods == pytest.approx(serial.combination.likelihoods, rel=1e-4)
            for key, value in serial.apply(batch).items():
                # Networks are trained in single precision, on inputs whose last digits differ.
                np.testing.assert_allclose(model.apply(batch)[key], value, rtol=1e-3, err_msg=key)

    def test_a_rank_without_frames_takes_part(self, calculator, train, held_out):
        models = on_ranks(3, lambda ranks: quick(calculator, train, held_out, methods=PAIR, communicator=ranks))
        summaries = {model.summary() for model in models}
        assert len(summaries) == 1

    def test_a_frame_is_evaluated_once_for_all_of_them(self, calculator, train, held_out, evaluations: list[int]):
        backend = load_backend(calculator)
        assert backend.identity  # the probe
        evaluations.clear()
        model = quick(backend, train, held_out, methods=[*PAIR, Shy()])
        assert sum(evaluations) == expected_evaluations(model)

    @pytest.mark.parametrize("progress", [True, False])
    def test_progress_can_be_switched_off(self, calculator, train, held_out, progress: bool, terminal, capfd):
        fit(calculator, train, held_out, methods=PAIR, progress=progress)
        out, errors = capfd.readouterr()
        assert out == ""
        assert ("combine" in errors) == progress
        assert (errors == "") == (not progress)

    def test_inputs_are_not_changed(self, calculator, train, held_out):
        methods = list(PAIR)
        before = [atoms.copy() for atoms in train + held_out]
        quick(calculator, train, held_out, methods=methods)
        assert methods == list(PAIR)
        for atoms, copy in zip(train + held_out, before, strict=True):
            assert atoms == copy
            assert atoms.info == copy.info


class TestKept:
    """Which training frames the residual model of a combination is made of."""

    @pytest.fixture
    def water(self) -> list[Atoms]:
        frames = [molecule("H2O") for _ in range(60)]
        for seed, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=seed)
        return with_labels(frames)

    def kept(self, frames: list[Atoms], communicator: Communicator | None = None, batch_atoms: int = 15) -> list[int]:
        """First frames of the batches that are kept."""
        backend = load_backend(ToyCalculator(ELEMENTS))
        stream = LabelledStream(backend, frames, communicator or Serial(), batch_atoms=batch_atoms, forces=True)
        kept = combination.KeptBatches([len(atoms) for atoms in frames])
        for forward_pass, targets in stream:
            kept.add(forward_pass, targets)
        return [int(targets.frames[0]) for _, targets in kept.batches]

    def test_all_where_they_are_few(self, water):
        assert self.kept(water) == list(range(0, 60, 5))
        assert self.kept(water, batch_atoms=3) == list(range(60))

    @pytest.mark.parametrize(("most", "expected"), [(60, [0, 15, 30, 45]), (90, list(range(0, 60, 10))), (1, [0])])
    def test_evenly_spread_where_they_are_many(self, water, monkeypatch, most: int, expected: list[int]):
        monkeypatch.setattr(combination, "_MOST_KEPT_ATOMS", most)
        assert self.kept(water) == expected

    def test_about_as_many_of_frames_of_all_sizes(self, monkeypatch):
        frames = labelled_frames(150, seed=1)
        monkeypatch.setattr(combination, "_MOST_KEPT_ATOMS", 200)
        found = self.kept(frames, batch_atoms=1)
        assert sum(len(frames[k]) for k in found) == pytest.approx(200, rel=0.2)
        # No third of them without its share.
        assert min(np.histogram(found, [0, 50, 100, 150])[0]) > 0.2 * len(found)

    @pytest.mark.parametrize("size", [2, 5])
    def test_the_same_whatever_the_ranks(self, water, monkeypatch, size: int):
        monkeypatch.setattr(combination, "_MOST_KEPT_ATOMS", 60)
        ranks = on_ranks(size, lambda communicator: self.kept(water, communicator))
        assert sorted(first for own in ranks for first in own) == [0, 15, 30, 45]

    def test_none_without_forces(self, water):
        for atoms in water[:30]:
            del atoms.arrays["REF_forces"]
        assert self.kept(water) == list(range(30, 60, 5))


class TestLabels:
    def test_calibration_without_energies_gives_no_energy(self, calculator, train, held_out):
        for atoms in held_out:
            del atoms.info["REF_energy"]
        model = quick(calculator, train, held_out)
        assert model.results == ("forces_uncertainty", "gamma", "contact")

    def test_energies_that_are_the_potentials_own_give_no_energy(self, calculator, train, held_out, tmp_path):
        """Their σ would be 0, and a file with it is refused."""
        for atoms in held_out:
            atoms.info["REF_energy"] = calculator.get_property("energy", atoms)
        model = quick(calculator, train, held_out)
        assert "energy_uncertainty" not in model.results
        model.save(tmp_path / "a.uq.safetensors")
        assert UncertaintyModel.load(tmp_path / "a.uq.safetensors").results == model.results

    def test_energies_of_some_calibration_frames_are_enough(self, calculator, train):
        calibration = labelled_frames(30, seed=2)
        for atoms in calibration[12:]:
            del atoms.info["REF_energy"]
        one, other = (quick(calculator, train, calibration, batch_atoms=size) for size in (10, 10_000))
        assert "energy_uncertainty" in one.results
        assert one.methods["bll"].likelihoods["energy"] == pytest.approx(other.methods["bll"].likelihoods["energy"])

    def test_training_without_energies_is_possible(self, calculator, train, held_out):
        for atoms in train:
            del atoms.info["REF_energy"]
        assert "energy_uncertainty" in quick(calculator, train, held_out).results

    def test_training_without_forces_is_possible(self, calculator, train, held_out):
        expected = quick(calculator, train, held_out)
        for atoms in train:
            del atoms.arrays["REF_forces"]
        found = quick(calculator, train, held_out)
        np.testing.assert_array_equal(found.record.uncertainty, expected.record.uncertainty)

    def test_a_direct_head_needs_training_forces(self, train, held_out, evaluations: list[int]):
        for atoms in train:
            del atoms.arrays["REF_forces"]
        with pytest.raises(LabelError, match="training frames have no forces, which the direct force head"):
            quick(ToyCalculator(ELEMENTS, direct=True), train, held_out)
        assert evaluations == []

    def test_a_direct_head_takes_the_forces_there_are(self, train, held_out):
        del train[0].arrays["REF_forces"]
        model = quick(ToyCalculator(ELEMENTS, direct=True), train, held_out)
        head = model.methods["bll"].head
        assert head.settings["force"]["rows"] == head.settings["atoms"]["rows"] - len(train[0])

    def test_stress_labels_give_a_stress_uncertainty(self, calculator):
        train, held_out = labelled_frames(20, seed=1, cell=4.5), labelled_frames(40, seed=2, cell=4.5)
        model = quick(calculator, train, held_out)
        assert "stress_uncertainty" in model.results
        fresh = labelled_frames(40, seed=3, cell=4.5)
        predictions = Predictor(load_backend(calculator), model).predict(fresh)
        z = [
            (atoms.info["REF_stress"] - p["stress"]) / p["stress_uncertainty"]
            for atoms, p in zip(fresh, predictions, strict=True)
        ]
        assert predictions[0]["stress_uncertainty"].shape == (6,)
        assert np.mean(np.square(z)) == pytest.approx(1, abs=0.6)  # 40 frames for fit and test: 3 × sqrt(2 · 2/40)

    def test_few_stress_labels_are_not_enough(self, calculator):
        train, held_out = labelled_frames(20, seed=1, cell=4.5), labelled_frames(20, seed=2, cell=4.5)
        for atoms in held_out[9:]:
            del atoms.info["REF_stress"]
        assert "stress_uncertainty" not in quick(calculator, train, held_out).results


class TestTrainingWithoutLabels:
    """Methods that learn nothing from errors need none."""

    @pytest.mark.parametrize("methods", [["bll"], ["kernel"], ["bll", "kernel"], ["mahalanobis", "knn"]])
    @pytest.mark.parametrize("direct", [False, True])
    def test_training_frames_without_any_label(self, held_out, methods: list[str], direct: bool):
        bare = [Atoms(atoms.numbers, atoms.positions) for atoms in labelled_frames(20, seed=1)]
        calculator = ToyCalculator(ELEMENTS, direct=direct)
        if direct:
            with pytest.raises(LabelError, match="training frames have no forces, which the direct force head of this"):
                quick(calculator, bare, held_out, methods=methods)
            return
        model = quick(calculator, bare, held_out, methods=methods)
        ratio = model.record.error**2 / model.record.uncertainty**2
        assert ratio.mean() == pytest.approx(1, rel=0.2)
        (prediction,) = Predictor(load_backend(calculator), model).predict(held_out[:1])
        assert prediction["energy_uncertainty"] > 0

    @pytest.mark.parametrize("method", ["pdrum", "pops"])
    def test_training_frames_without_labels_where_they_are_needed(self, calculator, held_out, method: str):
        bare = [Atoms(atoms.numbers, atoms.positions) for atoms in labelled_frames(20, seed=1)]
        with pytest.raises(
            LabelError, match=f"training frame 0 has no .* Without labels, fit without {method}, which need"
        ):
            quick(calculator, bare, held_out, methods=["bll", method])


class TestRefusals:
    """Every bad input is named before the first pass over the frames."""

    @pytest.fixture(autouse=True)
    def no_forward(self, evaluations: list[int]):
        yield
        assert sum(evaluations) <= 4 + 1, "frames were evaluated before the input was refused"

    def test_no_method(self, calculator, train, held_out):
        with pytest.raises(ValueError, match=r"no method was given\. There are: bll, .*, pops\."):
            quick(calculator, train, held_out, methods=())

    def test_an_unknown_method(self, calculator, train, held_out):
        with pytest.raises(ValueError, match="there is no method 'bl'"):
            quick(calculator, train, held_out, methods=("bl",))

    @pytest.mark.parametrize("methods", [("bll", "bll"), ("bll", "mahalanobis", BLL(ridge=1e-3))])
    def test_two_methods_of_one_name(self, calculator, train, held_out, methods):
        with pytest.raises(ValueError, match="the name of their method, and there are several 'bll': give"):
            quick(calculator, train, held_out, methods=methods)

    def test_an_empty_file(self, calculator, held_out, tmp_path: Path):
        (tmp_path / "train.xyz").write_text("")
        with pytest.raises(LabelError, match=r"training frames: the file .*train\.xyz is empty"):
            quick(calculator, tmp_path / "train.xyz", held_out)

    def test_a_missing_file(self, calculator, train, tmp_path: Path):
        with pytest.raises(LabelError, match=r"calibration frames: there is no file .*nowhere\.xyz"):
            quick(calculator, train, tmp_path / "nowhere.xyz")

    def test_a_truncated_file(self, calculator, train, held_out, tmp_path: Path):
        path = tmp_path / "held_out.xyz"
        write(path, held_out)
        path.write_text(path.read_text()[:-200])
        with pytest.raises(LabelError, match=r"calibration frames: .* cannot be read after structure 19"):
            quick(calculator, train, path)

    def test_empty_lists(self, calculator, train, held_out):
        with pytest.raises(LabelError, match="training frames: the list has no structures"):
            quick(calculator, [], held_out)
        with pytest.raises(LabelError, match="calibration frames: the list has no structures"):
            quick(calculator, train, [])

    @pytest.mark.parametrize("part", ["training", "calibration"])
    def test_too_few_frames(self, calculator, train, held_out, part: str):
        frames = (train[:9], held_out) if part == "training" else (train, held_out[:9])
        with pytest.raises(LabelError, match=f"there are 9 {part} frames; at least 10 are needed"):
            quick(calculator, *frames)

    def test_only_isolated_atoms(self, calculator, held_out):
        lone = [Atoms("O", info={"config_type": "IsolatedAtom", "REF_energy": -4.0})] * 20
        with pytest.raises(LabelError, match="there are 0 training frames"):
            quick(calculator, lone, held_out)

    def test_an_unlabelled_frame(self, calculator, train, held_out):
        train[7].info = {"source": "somewhere", "comment": ""}
        del train[7].arrays["REF_forces"]
        expected = (
            "training frame 7 has no reference energy or forces. Looked for REF_energy and REF_forces, or energy and "
            "forces; its info has ['comment', 'source'], its arrays have ['numbers', 'positions']."
        )
        with pytest.raises(LabelError, match=re.escape(expected)):
            quick(calculator, train, held_out)

    def test_a_calibration_frame_without_forces(self, calculator, train, held_out):
        del held_out[3].arrays["REF_forces"]
        with pytest.raises(LabelError, match="calibration frame 3 has no reference forces"):
            quick(calculator, train, held_out)

    @pytest.mark.parametrize("value", [np.nan, np.inf])
    @pytest.mark.parametrize("kind", ["energy", "forces", "stress"])
    def test_labels_that_are_not_finite(self, calculator, train, held_out, kind: str, value: float):
        if kind == "energy":
            train[4].info["REF_energy"] = value
        elif kind == "forces":
            train[4].arrays["REF_forces"][1, 2] = value
        else:
            train[4].info["REF_stress"] = np.array([0, 0, value, 0, 0, 0])
        with pytest.raises(LabelError, match=f"training frame 4 has non-finite values in its reference {kind}"):
            quick(calculator, train, held_out)

    def test_forces_of_another_shape(self, calculator, train, held_out):
        held_out[2].arrays["REF_forces"] = held_out[2].arrays["REF_forces"][:, :2]
        n_atoms = len(held_out[2])
        expected = (
            f"calibration frame 2 has forces of shape ({n_atoms}, 2), but its {n_atoms} atoms need ({n_atoms}, 3)"
        )
        with pytest.raises(LabelError, match=re.escape(expected)):
            quick(calculator, train, held_out)

    def test_calibration_frames_that_are_training_frames(self, calculator, train, held_out):
        with pytest.raises(LabelError, match=r"20 of 20 calibration frames are training frames \(the first is frame 0"):
            quick(calculator, train, train)
        with pytest.raises(LabelError, match=r"1 of 21 calibration frames .* \(the first is frame 20\)"):
            quick(calculator, train, [*held_out, train[3]])

    def test_training_frames_that_went_through_a_file(self, calculator, train, held_out, tmp_path: Path):
        """A thousand coordinates, of which files keep eight decimals: some lie where a rounding would split them."""
        large = molecule("CH3OH")
        large.rattle(0.1, seed=0)
        large.set_cell(np.diag([6.123456789, 6.2, 6.3]))
        large.pbc = True
        large = large.repeat((4, 4, 4))
        large.rattle(0.1, seed=1)
        large.info["REF_energy"] = 0.0
        large.set_array("REF_forces", np.zeros((len(large), 3)))
        write(tmp_path / "large.xyz", large)
        with pytest.raises(LabelError, match="1 of 21 calibration frames are training frames"):
            quick(calculator, [*train, large], [*held_out, read(tmp_path / "large.xyz")])

    @pytest.mark.parametrize("change", [1e-3, -1e-3])
    def test_neighbours_in_time_are_not_the_same_frame(self, calculator, train, held_out, change: float, evaluations):
        """A step of a run moves atoms by a thousandth of an Å: that is another frame, though a near one."""
        near = train[0].copy()
        near.positions[0, 0] += change
        quick(calculator, train, [*held_out, near])
        evaluations.clear()

    def test_an_element_that_the_potential_does_not_know(self, calculator, train, held_out, evaluations: list[int]):
        held_out[15].numbers[0] = 14
        with pytest.raises(
            InputError, match=r"calibration structure 15 .* contains Si, which the potential does not know"
        ):
            quick(calculator, train, held_out)
        assert evaluations == []

    def test_positions_that_are_not_finite(self, calculator, train, held_out, evaluations: list[int]):
        train[11].positions[0, 1] = np.nan
        with pytest.raises(InputError, match=r"positions of training structure 11 .* are not finite"):
            quick(calculator, train, held_out)
        assert evaluations == []

    def test_labels_that_are_the_potentials_own(self, calculator, train, held_out):
        for atoms in held_out:
            atoms.calc = ToyCalculator(ELEMENTS)
            atoms.arrays["REF_forces"] = atoms.get_forces()
            atoms.calc = None
        with pytest.raises(LabelError, match=r"calibration labels are the potential's own forces .* such as DFT"):
            quick(calculator, train, held_out)


class TestWarnings:
    @pytest.mark.parametrize(
        ("unit", "factor"),
        [("Hartree", 1 / 27.2), ("Hartree/Bohr", 0.529 / 27.2), ("kcal/mol", 23.06), ("meV", 1000.0)],
    )
    def test_labels_in_other_units(self, calculator, train, held_out, unit: str, factor: float):
        for atoms in held_out:
            atoms.arrays["REF_forces"] *= factor
        with pytest.warns(UQWarning, match=r"times the forces .* probably in other units than eV and Å"):
            quick(calculator, train, held_out)

    def test_labels_in_ev_do_not_warn_of_units(self, calculator, train, held_out):
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "force residuals")
            quick(calculator, train, held_out)

    @pytest.mark.parametrize("what", ["training", "calibration", "perturbed"])
    def test_labels_of_fixed_atoms_that_are_zero(self, calculator, train, held_out, what: str):
        """`get_forces()` applies constraints, so labels made with it are 0 where an atom is fixed."""
        perturbed = labelled_frames(12, seed=3)
        frames = {"training": train, "calibration": held_out, "perturbed": perturbed}[what]
        for atoms in frames[4:7]:
            atoms.arrays["REF_forces"][:2] = 0
        match = rf"^6 atoms of 3 {what} frames \(the first is frame 4\) .* exactly 0, .*\(apply_constraint=False\)\.$"
        with pytest.warns(UQWarning, match=match) as caught:
            quick(calculator, train, held_out, perturbed=perturbed, methods=[Mahalanobis(), BLL()])
        assert sum("exactly 0" in str(warning.message) for warning in caught) == 1

    def test_forces_that_symmetry_forbids_do_not_warn(self, calculator, train, held_out):
        for atoms in (train[0], held_out[0]):
            atoms.arrays["REF_forces"][:, 1] = 0  # a component alone, as in a plane
        with warnings.catch_warnings():
            warnings.filterwarnings("error", ".* exactly 0")
            quick(calculator, train, held_out)

    def test_errors_that_nothing_explains(self, calculator, train, held_out):
        random = np.random.default_rng(0)
        own = forward_pass_of(load_backend(calculator), held_out)
        assert own.forces is not None
        for k, atoms in enumerate(held_out):
            forces = own.forces[own.frame_of_atom == k].numpy()
            atoms.arrays["REF_forces"] = forces + random.normal(size=forces.shape)
        with pytest.warns(UQWarning, match="bll tells nothing about the forces errors of the calibration frames"):
            quick(calculator, train, held_out)


class TestUnseenElements:
    def test_gamma_is_infinite_and_one_warning_names_them(self, held_out):
        hydrocarbons = [a for a in labelled_frames(60, seed=1) if 8 not in a.numbers]
        assert len(hydrocarbons) >= 10
        calculator = ToyCalculator(ELEMENTS)
        predictor = Predictor(load_backend(calculator), quick(calculator, hydrocarbons, held_out))
        methanol = molecule("CH3OH")
        with pytest.warns(UQWarning, match="fitted without O: gamma is inf for these atoms") as caught:
            (prediction,) = predictor.predict([methanol])
        assert len(caught) == 1
        gamma = prediction["gamma"]
        assert np.isinf(gamma[methanol.numbers == 8]).all()
        assert np.isfinite(gamma[methanol.numbers != 8]).all()
        assert np.isfinite(prediction["forces_uncertainty"]).all()
        with warnings.catch_warnings():
            warnings.simplefilter("error", UQWarning)
            predictor.predict([methanol, molecule("H2O")])  # said once


def test_an_error_halfway_leaves_nothing_behind(
    calculator, train, held_out, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(tmp_path)
    original, count = ToyBackend._forward, iter(range(100))

    def failing(self: ToyBackend, batch: Any, forces: bool, gradients: bool):
        if next(count) >= 3:
            raise RuntimeError("broken")
        return original(self, batch, forces, gradients)

    monkeypatch.setattr(ToyBackend, "_forward", failing)
    with pytest.raises(InputError, match=r"training frame \d+ cannot be used: .* \(RuntimeError: broken\)"):
        quick(calculator, train, held_out, batch_atoms=20)
    assert os.listdir(tmp_path) == []
