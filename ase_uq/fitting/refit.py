"""Uncertainty models for potentials that were trained further: calibrated again, or fitted again where that is better.

    found = refit("my.uq.safetensors", "mace:fine_tuned.model", "calibration.xyz", train="train.xyz")
    found.model.save("fine_tuned.uq.safetensors")

Heads of the old model read the features of the new potential, which have moved. Calibrated on frames with labels they
are as large as errors again; whether they still tell atoms apart is another question, which the likelihood of left-out
calibration frames answers if there are training frames to fit new heads on. Without these, the old heads themselves say
how far features moved: by how far along the way from the old calibration frames to where nothing is known
(`calibration.far_field`) the new calibration frames lie.
"""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import FarFieldCalibrator
from ase_uq.communicator import Communicator, Serial
from ase_uq.display.representation import Brief
from ase_uq.errors import LabelError, PotentialMismatch, UQWarning
from ase_uq.fitting.calibrate import Observed
from ase_uq.fitting.checks import Files, Sets
from ase_uq.fitting.combination import is_earned
from ase_uq.fitting.fit import made
from ase_uq.fitting.know_nothing import ShortestDistances
from ase_uq.fitting.provenance import described
from ase_uq.fitting.stages import Calibrated, Trained, Work, calibrated, trained
from ase_uq.methods.base import Method
from ase_uq.uncertainty_model.model import UncertaintyModel

RECALIBRATED: Literal["recalibrated"] = "recalibrated"
FITTED_AGAIN: Literal["fitted again"] = "fitted again"
# Of the way to where nothing is known. In benchmarks/results/refit.md and refit_acac.md (at 0.35) old heads that see
# calibration frames farther out than that are worse than new ones on frames of a kind that was not calibrated on:
# little of the way is left for them.
FAR_WAY = 0.25


@dataclass(frozen=True, repr=False)
class Refit(Brief):
    """An uncertainty model for the new potential, and how it was come by.

    Args:
        model: The uncertainty model; `.save(path)` writes it.
        kept: Whether its heads are those of the old model, `recalibrated`, or new ones, `fitted again`.
        way: How far along the way to where nothing is known the calibration frames lie on average, as the old model
            sees them: 0 for frames like its own calibration frames in the old potential, 1 for all that it does not
            know. None for a model that was fitted without a far field, and where old heads cannot read the frames.
        likelihoods: Mean negative log-likelihood of a force component (forces in eV/Å) on left-out calibration frames,
            for what was tried; the lower, the better.
        lost: What the old model had and this one has not.
        unseen: Elements of the calibration frames that the old heads do not know, for which they were fitted again.
    """

    model: UncertaintyModel
    kept: Literal["recalibrated", "fitted again"]
    way: float | None
    likelihoods: Mapping[str, float]
    lost: tuple[str, ...] = ()
    unseen: tuple[str, ...] = ()

    @property
    def advised(self) -> bool:
        """Whether a new fit should be tried: without training frames none was, and features moved far."""
        return len(self.likelihoods) == 1 and self.kept == RECALIBRATED and _is_far(self.way)

    def describe(self) -> str:
        """What was kept and why, how far features moved, and what is left to do: a line for each."""
        told = []
        if self.way is not None:
            told.append(
                f"To the old heads the calibration frames lie {self.way:.2f} of the way from their own ones to where "
                "nothing is known."
            )
        of_each = {name: f"{value:.3f}" for name, value in self.likelihoods.items()}
        left_out = "a force component's negative log-likelihood on left-out calibration frames"
        if self.unseen:
            told.append(f"Fitted again, since the old heads do not know {' '.join(self.unseen)}.")
        elif len(of_each) == 1:
            told.append(
                f"Recalibrated: {left_out} is {of_each[RECALIBRATED]}; there were no training frames to fit on."
            )
        elif self.kept == FITTED_AGAIN:
            told.append(
                f"Fitted again: {left_out} is {of_each[FITTED_AGAIN]}, and {of_each[RECALIBRATED]} with old heads that "
                "are calibrated again."
            )
            if _is_far(self.way):
                told.append("Old heads that see them so far out are kept only where they are clearly better.")
        else:
            told.append(
                f"Recalibrated: {left_out} is {of_each[RECALIBRATED]}, and {of_each[FITTED_AGAIN]} after a new fit, "
                f"which is {'clearly more' if _is_far(self.way) else 'not clearly less'}."
            )
        if self.advised:
            told.append(
                "That is so far that little is left to tell frames that are farther out: give training frames, to try "
                "a new fit."
            )
        if self.lost:
            told.append(f"Not taken over, as they were made with the old one: {', '.join(self.lost)}.")
        return "\n".join(told)


def refit(
    old: UncertaintyModel | str | os.PathLike[str],
    calculator: BaseCalculator | Backend | str | os.PathLike[str],
    calibration: Files,
    *,
    train: Files | None = None,
    perturbed: Files | None = None,
    methods: Sequence[str | Method] | None = None,
    label_keys: tuple[str, str, str] | None = None,
    batch_atoms: int | None = None,
    communicator: Communicator | None = None,
    progress: bool = True,
) -> Refit:
    """Makes the uncertainty model of a potential into one of the potential that was trained from it.

    The heads of the old model are calibrated on the calibration frames of the new potential, as `fit` calibrates new
    ones: calibrators, the far field, the combination and the edges of `gamma` are made afresh. With training frames new
    heads are fitted too, and what has the lower negative log-likelihood on left-out calibration frames is kept. Where
    the difference is within its standard error over the folds, the old heads are, unless they see the calibration
    frames beyond `FAR_WAY`.

    Args:
        old: The uncertainty model of the potential before, or the path of its file.
        calculator: The potential that was trained further, as in `fit`.
        calibration: Labelled frames, as in `fit`, that neither the old nor the new potential was trained on, and no
            training frames of the old uncertainty model. Include frames of the kind for which it was trained further:
            on these uncertainties must be right too.
        train: Frames to fit new heads on, as in `fit`; None to calibrate only. Their pairs and their rattled copies
            also say where nothing is known; without them the calibration frames and the old model do.
        perturbed: As in `fit`.
        methods: Methods of the new fit, as in `fit`; None for those of the old model, with the default options.
        label_keys: As in `fit`.
        batch_atoms: As in `fit`.
        communicator: As in `fit`.
        progress: As in `fit`.

    Raises:
        ArtefactError: As in `UncertaintyModel.load`.
        PotentialMismatch: The new potential is of another architecture than the old one, or knows none of the elements
            that the uncertainty model was fitted on.
        LabelError: As in `fit`; also if the calibration frames are the training frames of the old model, or have
            elements that it does not know and there are no training frames.
        ValueError: As in `fit`; also if methods were given and no training frames.
        InputError: As in `fit`.
    """
    if not isinstance(old, UncertaintyModel):
        old = UncertaintyModel.load(old)
    if methods is not None and train is None:
        raise ValueError("methods are those of a new fit, which needs training frames: give train too, or no methods.")
    communicator = communicator or Serial()
    makers = [] if train is None else made(list(old.methods) if methods is None else methods)
    backend = load_backend(calculator)
    _check_kin(old, backend)
    sets = Sets.read(train, calibration, perturbed)
    sets.check(backend, makers, label_keys, batch_atoms, communicator)
    _refuse_old_training_frames(old, sets)
    unseen = _unseen(old, sets)
    if train is not None and methods is None:
        _tell_other_options(old, makers)
    work = Work(backend, label_keys, batch_atoms, communicator, progress and communicator.rank == 0)
    new = None
    if sets.train is not None:
        new = trained(makers, sets.train, work, keep=max(len(makers), len(old.methods)) > 1)
    tried: dict[str, Calibrated] = {}
    if not unseen:
        origin = _of_old_heads(old, new, sets, work)
        tried[RECALIBRATED] = calibrated(origin, old.provenance["train"], sets.calibration, work)
    if new is not None:
        assert sets.train is not None
        tried[FITTED_AGAIN] = calibrated(new, described(sets.train), sets.calibration, work)
    way = None if unseen else _way(old, tried[RECALIBRATED].observed)
    kept = RECALIBRATED if new is None else FITTED_AGAIN
    if len(tried) == 2:
        kept = better(tried[RECALIBRATED].of_folds - tried[FITTED_AGAIN].of_folds, way)
    likelihoods = {name: each.nll for name, each in tried.items()}
    model = _with_origin(tried[kept].model, old, kept, way, likelihoods)
    if sets.perturbed is not None:
        model = work.with_perturbed(model, sets.perturbed)
    return Refit(model, kept, way, likelihoods, _lost(old, model), unseen)


def _check_kin(old: UncertaintyModel, backend: Backend) -> None:
    """Refuses a potential that is not the old one after further training, as far as the old model can tell."""
    fitted = old.edges.elements
    if not fitted & backend.elements:
        named = ", ".join(chemical_symbols[z] for z in sorted(fitted))
        raise PotentialMismatch(
            f"the uncertainty model was fitted on {named}, and the new potential knows none of these elements. Give "
            "the potential that was trained from the old one."
        )
    backend.check_architecture(old.identity)


def _refuse_old_training_frames(old: UncertaintyModel, sets: Sets) -> None:
    if described(sets.calibration)["digest"] == old.provenance["train"].get("digest"):
        raise LabelError(
            "the calibration frames are the training frames of the old uncertainty model, on which its scores are too "
            "small to calibrate: hold frames out."
        )


def _unseen(old: UncertaintyModel, sets: Sets) -> tuple[str, ...]:
    """Symbols of elements of the calibration frames that the old heads do not know.

    Raises:
        LabelError: There are some, and no training frames.
    """
    present = {int(z) for atoms in sets.calibration for z in atoms.numbers}
    unseen = tuple(chemical_symbols[z] for z in sorted(present - old.edges.elements))
    if unseen and sets.train is None:
        raise LabelError(
            f"the calibration frames contain {' '.join(unseen)}, which the old uncertainty model was not fitted on, so "
            "calibrating again is not enough. Give training frames with them (train, --train) for a new fit."
        )
    return unseen


def _tell_other_options(old: UncertaintyModel, makers: Sequence[Method]) -> None:
    """Warns where a method of the old model had other options than the new fit takes."""
    for maker in makers:
        settings = old.methods[maker.name].head.settings
        for field in fields(maker) if is_dataclass(maker) else ():
            before, now = settings.get(field.name), getattr(maker, field.name)
            now = list(now) if isinstance(now, tuple) else now
            if isinstance(before, int | float | str | list) and type(before) is type(now) and before != now:
                warnings.warn(
                    f"the new fit of {maker.name} takes {field.name}={now}, the old one took {before}. Set it as then "
                    f"(methods, --set {maker.name}.{field.name}=...) if it was chosen.",
                    UQWarning,
                    stacklevel=3,
                )


def _of_old_heads(old: UncertaintyModel, new: Trained | None, sets: Sets, work: Work) -> Trained:
    """The old heads on the device of the new potential, with what is known of training frames."""
    model = old.to(work.backend.device)
    heads = {name: model.methods[name].head for name in sorted(model.methods, key=lambda name: name != old.leading)}
    frames = sets.calibration if sets.train is None else sets.train
    return Trained(
        heads, old.edges.elements, _shortest(old, new, sets, work), frames, () if new is None else new.batches
    )


def _shortest(old: UncertaintyModel, new: Trained | None, sets: Sets, work: Work) -> Tensor:
    """(n_elements, n_elements) shortest distances of the old heads' elements in all training frames that are known."""
    elements = sorted(old.edges.elements)
    known = [] if new is None else [(sorted(new.elements), new.shortest)]
    if old.far_field is not None:
        known.append((list(old.far_field.elements), old.far_field.shortest))
    if not known:  # a file of before the far field, and no training frames
        collected = ShortestDistances()
        for forward_pass, _ in work.stream(sets.calibration, "calibration", "distances", forces=False):
            collected.add(forward_pass)
        return collected.finish(elements, work.communicator)
    table = torch.full((119, 119), torch.nan, dtype=torch.float64)
    for numbers, shortest in known:
        z = torch.tensor(numbers)
        table[z[:, None], z] = torch.fmin(table[z[:, None], z], shortest.cpu())
    z = torch.tensor(elements)
    return table[z[:, None], z]


def better(gains: np.ndarray, way: float | None) -> Literal["recalibrated", "fitted again"]:
    """What to keep.

    Args:
        gains: (n_folds,) by how much a new fit lowers the negative log-likelihood in each fold.
        way: As in `Refit`.
    """
    if _is_far(way):
        return RECALIBRATED if is_earned(-gains) else FITTED_AGAIN
    return FITTED_AGAIN if is_earned(gains) else RECALIBRATED


def _is_far(way: float | None) -> bool:
    return way is not None and way > FAR_WAY


def _way(old: UncertaintyModel, observed: Observed) -> float | None:
    """Mean of t over the calibration atoms, by the old calibrator of the head that leads."""
    calibrator = old.methods[old.leading].calibrators["forces"]
    if not isinstance(calibrator, FarFieldCalibrator):
        return None
    return float(calibrator.way(torch.from_numpy(observed.raw[old.leading].forces)).mean())


def _with_origin(
    model: UncertaintyModel, old: UncertaintyModel, kept: str, way: float | None, likelihoods: Mapping[str, float]
) -> UncertaintyModel:
    """The model, which says what it was made from."""
    before = old.provenance.get("refit", {}).get("heads", old.identity.fingerprint)
    heads = before if kept == RECALIBRATED else model.identity.fingerprint
    told: dict[str, Any] = {
        "from": old.identity.fingerprint,
        "heads": heads,
        "kept": kept,
        "way": way,
        "likelihoods": dict(likelihoods),
    }
    return replace(model, provenance={**model.provenance, "refit": told})


def _lost(old: UncertaintyModel, model: UncertaintyModel) -> tuple[str, ...]:
    parts = {
        "the perturbed frames (--perturbed)": (old.perturbed, model.perturbed),
        "the reference runs (`ase-uq reference`)": (old.reference, model.reference),
    }
    return tuple(name for name, (had, has) in parts.items() if had is not None and has is None)
