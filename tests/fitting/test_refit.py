"""Uncertainty models for potentials that were trained further: what is kept, why, and what is refused."""

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import write

from ase_uq import Predictor, UncertaintyModel, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Batch
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.calibration import Residuals, far_field_choice
from ase_uq.communicator import Serial
from ase_uq.errors import ArtefactError, InputError, LabelError, PotentialMismatch, UQWarning
from ase_uq.fitting import combination
from ase_uq.fitting.know_nothing import ShortestDistances, know_nothing
from ase_uq.fitting.refit import FAR_WAY, FITTED_AGAIN, RECALIBRATED, Refit, better, refit
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods.bll import BLL
from ase_uq.methods.mahalanobis import Mahalanobis
from ase_uq.numerics.training import Training
from ase_uq.testing.methods import ELEMENTS, forward_pass_of, labelled_frames, on_ranks
from ase_uq.thresholds.data import ReferenceRuns

pytestmark = [
    pytest.mark.filterwarnings("ignore:.* tells nothing about the:ase_uq.errors.UQWarning"),
    pytest.mark.filterwarnings("ignore:.* variance has no floor:ase_uq.errors.UQWarning"),
]

METHOD = BLL(ridge=1e-4)  # fewer digits are lost with a larger ridge
OLD, TRAIN, HELD_OUT = ToyCalculator(ELEMENTS), labelled_frames(20, seed=1), labelled_frames(30, seed=2)


def tuned() -> ToyCalculator:
    """Half of the way to the weights that the labels come from; its features are those of the old one."""
    new = ToyCalculator(ELEMENTS)
    new.potential.weights.data.lerp_(ToyCalculator(ELEMENTS, seed=1).potential.weights, 0.5)
    return new


class Mixed(ToyBackend):
    """The tuned potential with features that all follow from the old ones, mixed by chance."""

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        found = super()._forward(batch, forces, gradients)
        width = found.features.shape[1]
        mixture = torch.randn(width, width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        return replace(found, features=found.features @ torch.linalg.qr(mixture)[0])


@pytest.fixture(scope="module")
def old() -> UncertaintyModel:
    return fit(OLD, TRAIN, HELD_OUT, methods=[METHOD], progress=False)


def quick(old: Any, new: Any, calibration: Any = HELD_OUT, **options: Any) -> Refit:
    return refit(old, new, calibration, progress=False, **options)


def calibrators(model: UncertaintyModel) -> dict[str, Any]:
    return {name: {q: c.settings for q, c in m.calibrators.items()} for name, m in model.methods.items()}


class TestRecalibrated:
    def test_an_unchanged_potential_keeps_its_calibrators(self, old: UncertaintyModel):
        found = quick(old, OLD, train=TRAIN, methods=[METHOD])
        assert found.kept == RECALIBRATED
        assert found.likelihoods[RECALIBRATED] == found.likelihoods[FITTED_AGAIN]
        assert calibrators(found.model) == calibrators(old)
        assert found.way == pytest.approx(0, abs=0.02)  # but for atoms beyond the end, which count as there
        for name in ("uncertainty", "error", "run"):
            np.testing.assert_array_equal(getattr(found.model.record, name), getattr(old.record, name))
        torch.testing.assert_close(found.model.edges.edges, old.edges.edges, equal_nan=True, rtol=0, atol=0)

    def test_only_weights_that_changed_give_what_a_fit_gives(self, old: UncertaintyModel):
        """Features of the toy potential do not depend on its weights, so old and new heads of forces are the same."""
        new = tuned()
        found = quick(old, new, train=TRAIN, methods=[METHOD])
        assert found.kept == RECALIBRATED
        expected = fit(new, TRAIN, HELD_OUT, methods=[METHOD], progress=False)
        assert calibrators(found.model)["bll"]["forces"] == calibrators(expected)["bll"]["forces"]
        batch = forward_pass_of(load_backend(new), labelled_frames(4, seed=3))
        for key in ("forces_uncertainty", "gamma", "contact"):
            np.testing.assert_array_equal(found.model.apply(batch)[key], expected.apply(batch)[key])
        assert not np.allclose(found.model.record.uncertainty, old.record.uncertainty)

    def test_without_training_frames_it_is_calibration_by_hand(self, old: UncertaintyModel):
        backend = load_backend(tuned())
        found = quick(old, backend)
        head, elements = old.methods["bll"].head, (1, 6, 8)
        batch = forward_pass_of(backend, HELD_OUT)
        assert batch.forces is not None
        assert old.far_field is not None
        nothing = know_nothing(backend, {"bll": head}, HELD_OUT, old.far_field.shortest, batch_atoms=None)
        assert nothing is not None
        residuals = torch.from_numpy(np.concatenate([a.arrays["REF_forces"] for a in HELD_OUT])) - batch.forces
        rows = Residuals(
            scores=head(batch).forces[:, 0].numpy(),
            squares=residuals.square().sum(1).numpy(),
            components=3,
            groups=batch.frame_of_atom.numpy(),
            limits=nothing.far_field.variance(batch).numpy(),
            numbers=batch.numbers.numpy(),
        )
        choice = far_field_choice(rows, nothing.scores["bll"]["forces"])
        assert choice is not None
        kept, expected = calibrators(found.model)["bll"]["forces"], choice.calibrator.settings
        assert kept.pop("kind") == expected.pop("kind") == "far_field"
        for name, value in expected.items():
            assert kept[name] == pytest.approx(value, rel=1e-6, abs=1e-9), name
        assert found.likelihoods[RECALIBRATED] == pytest.approx(choice.of_folds.mean(), rel=1e-9)
        assert found.model.far_field is not None
        assert found.model.far_field.elements == elements
        torch.testing.assert_close(found.model.far_field.shortest, old.far_field.shortest, rtol=0, atol=0)
        z2 = found.model.record.error**2 / found.model.record.uncertainty**2
        assert z2.mean() == pytest.approx(1, abs=0.1)

    def test_of_several_methods_the_combination_is_fitted_afresh(self, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setattr(combination, "_TRAINING", Training(hidden=(4,), max_epochs=2))
        monkeypatch.setattr(combination, "is_earned", lambda _: True)
        pair = [METHOD, Mahalanobis(ridge=1e-4)]
        old = fit(OLD, TRAIN, HELD_OUT, methods=pair, progress=False)
        assert old.combination is not None
        new = tuned()
        found, expected = (
            quick(old, new, train=TRAIN, methods=pair),
            fit(new, TRAIN, HELD_OUT, methods=pair, progress=False),
        )
        assert found.model.combination is not None
        assert expected.combination is not None
        assert (found.kept, found.lost, found.model.primary) == (RECALIBRATED, (), "combined")
        assert found.model.combination.settings == expected.combination.settings
        assert found.likelihoods[RECALIBRATED] == pytest.approx(
            min(expected.combination.likelihoods.values()), rel=1e-9
        )
        alone = quick(old, new)  # networks learn from the calibration frames alone
        assert alone.model.primary == "combined"

    def test_a_model_of_before_the_far_field_gets_one(self, old: UncertaintyModel):
        earlier = replace(old, far_field=None)
        found = quick(earlier, tuned())
        collected = ShortestDistances()
        collected.add(forward_pass_of(load_backend(OLD), HELD_OUT))
        assert found.model.far_field is not None
        shortest = collected.finish([1, 6, 8], Serial())
        torch.testing.assert_close(found.model.far_field.shortest, shortest, equal_nan=True)

    def test_ranks_share_it(self, old: UncertaintyModel):
        alone = quick(old, tuned(), train=TRAIN, methods=[METHOD], batch_atoms=40)
        backends = [load_backend(tuned()) for _ in range(2)]
        for other in on_ranks(
            2,
            lambda ranks: quick(
                old, backends[ranks.rank], train=TRAIN, methods=[METHOD], batch_atoms=40, communicator=ranks
            ),
        ):
            assert other.kept == alone.kept
            assert other.likelihoods == pytest.approx(alone.likelihoods, rel=1e-4)


class TestFittedAgain:
    """The features moved: to the old heads all atoms are far out, and in no order."""

    @pytest.fixture(scope="class")
    @classmethod
    def both(cls, old: UncertaintyModel) -> tuple[Refit, Refit]:
        new = Mixed(tuned())
        return quick(old, new), quick(old, new, train=TRAIN, methods=[METHOD])

    def test_is_kept_where_it_is_likelier(self, both: tuple[Refit, Refit]):
        found = both[1]
        assert found.kept == FITTED_AGAIN
        assert found.likelihoods[FITTED_AGAIN] < found.likelihoods[RECALIBRATED]
        expected = fit(Mixed(tuned()), TRAIN, HELD_OUT, methods=[METHOD], progress=False)
        assert calibrators(found.model) == calibrators(expected)
        new, before = (f"{found.likelihoods[name]:.3f}" for name in (FITTED_AGAIN, RECALIBRATED))
        assert found.describe().startswith("To the old heads the calibration frames lie ")
        assert f"on left-out calibration frames is {new}, and {before} with old heads" in found.describe()
        assert not found.advised

    def test_is_advised_where_it_cannot_be_tried(self, both: tuple[Refit, Refit]):
        found = both[0]
        assert found.kept == RECALIBRATED
        assert found.way is not None
        assert found.way > FAR_WAY
        assert found.advised
        assert f"To the old heads the calibration frames lie {found.way:.2f} of the way" in found.describe()
        assert found.describe().endswith("give training frames, to try a new fit.")

    def test_is_not_advised_where_features_stayed(self, old: UncertaintyModel):
        found = quick(old, tuned())
        assert not found.advised
        assert "there were no training frames to fit on" in found.describe()
        assert "new fit" not in found.describe()


@pytest.mark.parametrize(
    ("gains", "way", "kept"),
    [
        ([0.1, 0.1, 0.2], 0.0, FITTED_AGAIN),
        ([0.1, -0.2, 0.2], 0.0, RECALIBRATED),
        ([0.0, 0.0, 0.0], None, RECALIBRATED),
        ([0.1, -0.2, 0.2], 2 * FAR_WAY, FITTED_AGAIN),
        ([-0.1, -0.1, -0.2], 2 * FAR_WAY, RECALIBRATED),
    ],
)
def test_what_is_clearly_better_is_kept_and_else_what_reaches_farther(gains: list[float], way: float, kept: str):
    assert better(np.array(gains), way) == kept
    likelihoods = {RECALIBRATED: 1.0, FITTED_AGAIN: 1.0 - np.mean(gains)}
    told = Refit(None, kept, way, likelihoods).describe()  # pyright: ignore
    if way == 2 * FAR_WAY:
        assert ("clearly more" if kept == RECALIBRATED else "kept only where they are clearly better") in told
    else:
        assert ("not clearly less" in told) == (kept == RECALIBRATED)


class TestFile:
    def test_says_what_it_was_made_from(self, old: UncertaintyModel, tmp_path: Path):
        new = load_backend(tuned())
        made = quick(old, new).model
        made.save(tmp_path / "new.uq.safetensors")
        loaded = UncertaintyModel.load(tmp_path / "new.uq.safetensors")
        told = loaded.provenance["refit"]
        assert told == loaded.numbers()["refit"] == made.provenance["refit"]
        assert (told["from"], told["heads"]) == (old.identity.fingerprint,) * 2
        assert loaded.provenance["train"] == old.provenance["train"]
        first = old.identity.fingerprint[:12]
        line = f"  refit          from that of potential {first}: recalibrated, heads fitted on potential {first}"
        assert line in loaded.summary().splitlines()
        assert "refit" not in old.summary()
        Predictor(new, loaded)
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            Predictor(OLD, loaded)

    def test_heads_keep_their_origin_over_several(self, old: UncertaintyModel, tmp_path: Path):
        once = quick(old, tuned()).model
        third = ToyCalculator(ELEMENTS, seed=1)
        third.potential.weights.data.lerp_(OLD.potential.weights, 0.3)
        twice = quick(once, third).model.provenance["refit"]
        assert (twice["from"], twice["heads"]) == (once.identity.fingerprint, old.identity.fingerprint)
        again = quick(old, Mixed(tuned()), train=TRAIN, methods=[METHOD]).model
        assert again.provenance["refit"]["heads"] == again.identity.fingerprint
        assert again.summary().count("fitted again") == 1

    def test_what_is_wrong_in_it_is_named(self, old: UncertaintyModel, tmp_path: Path):
        made = quick(old, tuned()).model
        for key, value in (("kept", 3), ("way", "far"), ("likelihoods", {"recalibrated": "x"})):
            provenance = copy.deepcopy(made.provenance)
            provenance["refit"][key] = value
            replace(made, provenance=provenance).save(tmp_path / "wrong.uq.safetensors")
            with pytest.raises(ArtefactError, match=f"header.provenance.refit.{key}"):
                UncertaintyModel.load(tmp_path / "wrong.uq.safetensors")

    def test_what_was_of_the_old_potential_is_not_taken_over(self, old: UncertaintyModel):
        runs = ReferenceRuns((np.linspace(1, 2, 5),) * 3, interval=0.5)
        full = replace(old, perturbed=old.record, reference=runs)
        found = quick(full, tuned())
        assert found.model.perturbed is None
        assert found.model.reference is None
        assert found.describe().endswith(
            "made with the old one: the perturbed frames (--perturbed), the reference runs (`ase-uq reference`)."
        )
        given = quick(full, tuned(), perturbed=labelled_frames(10, seed=5, spread=(0.3, 0.4)))
        assert given.model.perturbed is not None
        assert given.lost == ("the reference runs (`ase-uq reference`)",)


def silicon(count: int, seed: int) -> list[Atoms]:
    """Frames in which an oxygen is silicon."""
    frames = labelled_frames(count, seed=seed)
    for atoms in frames:
        if 8 in atoms.numbers:
            atoms.numbers[np.flatnonzero(atoms.numbers == 8)[0]] = 14
    return frames


class TestElements:
    @pytest.fixture(scope="class")
    @classmethod
    def wide(cls) -> UncertaintyModel:
        """Of a potential that knows silicon, fitted without it."""
        return fit("toy:", TRAIN, HELD_OUT, methods=[METHOD], progress=False)

    def test_that_the_old_heads_do_not_know_need_a_new_fit(self, wide: UncertaintyModel):
        frames = silicon(20, 1), silicon(30, 2)
        found = quick(wide, "toy:", frames[1], train=frames[0], methods=[METHOD])
        assert (found.kept, found.unseen, found.way) == (FITTED_AGAIN, ("Si",), None)
        assert found.describe() == "Fitted again, since the old heads do not know Si."
        with pytest.raises(LabelError, match=r"contain Si, which the old .* Give training frames with them"):
            quick(wide, "toy:", frames[1])

    def test_that_the_potentials_do_not_share(self, old: UncertaintyModel):
        with pytest.raises(PotentialMismatch, match="fitted on H, C, O, and the new potential knows none of these"):
            quick(old, ToyCalculator(("Si",)))


class TestRefused:
    @pytest.mark.parametrize(
        ("new", "message"),
        [
            (("H", "C", "N", "O"), "another architecture: that gives 56 numbers of an atom, this one 92"),
            ("direct", "another architecture: direct was False, here it is True"),
            ("other", "package was 'toy', here it is 'other'. An uncertainty model reads the features of one"),
        ],
    )
    def test_another_architecture(self, old: UncertaintyModel, new: Any, message: str, monkeypatch: pytest.MonkeyPatch):
        elements = new if isinstance(new, tuple) else ELEMENTS
        backend = load_backend(ToyCalculator(elements, direct=new == "direct"))
        if new == "other":
            monkeypatch.setattr(backend, "_settings", lambda: {"package": "other", "direct": True})
        with pytest.raises(PotentialMismatch, match=message):
            quick(old, backend)

    def test_training_frames_of_the_old_model(self, old: UncertaintyModel):
        with pytest.raises(LabelError, match="the calibration frames are the training frames of the old uncertainty"):
            quick(old, tuned(), TRAIN)
        with pytest.raises(LabelError, match="30 of 30 calibration frames are training frames"):
            quick(old, tuned(), train=HELD_OUT)

    def test_methods_without_training_frames(self, old: UncertaintyModel):
        with pytest.raises(ValueError, match="a new fit, which needs training frames: give train too"):
            quick(old, tuned(), methods=["bll"])

    @pytest.mark.parametrize("wrong", ["few", "none", "nan", "file", "empty", "element"])
    def test_frames_that_a_fit_refuses(self, old: UncertaintyModel, wrong: str, tmp_path: Path):
        frames: Any = [atoms.copy() for atoms in HELD_OUT]
        expected: tuple[type[Exception], str] = (LabelError, "calibration frame 7 has no reference forces")
        if wrong == "few":
            frames, expected = frames[:4], (LabelError, "there are 4 calibration frames; at least 10 are needed")
        elif wrong == "none":
            del frames[7].arrays["REF_forces"]
        elif wrong == "nan":
            frames[7].arrays["REF_forces"][0] = np.nan
            expected = (LabelError, "calibration frame 7")
        elif wrong == "file":
            frames, expected = tmp_path / "no.xyz", (LabelError, "no.xyz")
        elif wrong == "empty":
            write(frames := tmp_path / "empty.xyz", [])
            expected = (LabelError, "empty.xyz")
        else:
            frames[7].numbers[0] = 79
            expected = ((InputError, LabelError), "Au")  # pyright: ignore[reportAssignmentType]
        with pytest.raises(expected[0], match=expected[1]):
            quick(old, tuned(), frames)

    def test_other_options_are_told(self, old: UncertaintyModel):
        with pytest.warns(
            UQWarning, match=r"of bll takes ridge=1e-09, the old one took 0.0001. .*--set bll.ridge="
        ) as told:
            quick(old, tuned(), train=TRAIN)
        (own,) = [warning for warning in told if "takes ridge" in str(warning.message)]
        assert own.filename == __file__
