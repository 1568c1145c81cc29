"""Calibration: turns raw scores of held-out frames into standard deviations, given their residuals."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.calibration import (
    Calibrator,
    Choice,
    Residuals,
    far_field_choice,
    fit_affine,
    fit_calibrator,
    fit_far_field,
)
from ase_uq.calibration.energy_shift import EnergyShift, energy_shift
from ase_uq.communicator import Communicator, Serial, gather
from ase_uq.errors import UQWarning
from ase_uq.fitting.checks import FEWEST_FRAMES, tell_zero_forces
from ase_uq.fitting.provenance import runs_of
from ase_uq.forward_pass import ForwardPass, Targets, residuals_of
from ase_uq.methods.base import Head, Raw
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.far_field import FarField, Limits
from ase_uq.uncertainty_model.fitted_method import FittedMethod
from ase_uq.uncertainty_model.model import UncertaintyModel
from ase_uq.uncertainty_model.record import CalibrationRecord


def with_perturbed(
    model: UncertaintyModel, backend: Backend, frames: list[Atoms], progress: bool, options: Mapping[str, Any]
) -> UncertaintyModel:
    """The model with a record of its uncertainties and errors on deliberately bad frames."""
    title = "perturbed" if progress else ""
    how = {"forces": True, "gradients": model.gradients, "title": title, "name": "perturbed frame", **options}
    stream = LabelledStream(backend, frames, Serial(), **how)
    uncertainty, error, numbers, counts = [], [], [], []
    for forward_pass, targets in tell_zero_forces("perturbed", stream, Serial()):
        assert forward_pass.forces is not None
        uncertainty.append(model.apply(forward_pass)["forces_uncertainty"].norm(dim=1))
        error.append(residuals_of(targets.forces, forward_pass.forces).norm(dim=1))
        numbers.append(forward_pass.numbers)
        counts.append(forward_pass.n_atoms_of_frame)
    record = CalibrationRecord(
        uncertainty=_column(uncertainty, np.float32),
        error=_column(error, np.float32),
        numbers=_column(numbers, np.uint8),
        n_atoms_of_frame=_column(counts, np.int32),
        run=runs_of(frames),
    )
    return replace(model, perturbed=record)


def _column(parts: Sequence[torch.Tensor], dtype: type) -> np.ndarray:
    """Joins the parts of all batches into one array."""
    return torch.cat(list(parts)).cpu().numpy().astype(dtype)


@dataclass(frozen=True)
class _RawArrays:
    """`Raw` of all calibration frames as float64 arrays."""

    forces: np.ndarray
    energy: np.ndarray
    energies: np.ndarray
    stress: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class Observed:
    """Raw scores of every head on the calibration frames, and the residuals.

    Args:
        raw: Raw scores by method.
        forces: (n_atoms, 3) residuals, eV/Å.
        energy: (n_frames, 1) residuals per atom, eV, without a shift; NaN for frames without a label.
        energy_shift: What was taken out of them; None for nothing.
        stress: (n_frames, 6) residuals, eV/Å³; NaN for frames without a label, None for a potential without stress.
        numbers: (n_atoms,) atomic numbers.
        n_atoms_of_frame: (n_frames,) number of atoms of each frame.
        limit: (n_atoms,) σ∞² of the forces, (eV/Å)²; None without a far field.
        energy_limit: (n_frames,) σ∞² of the energies per atom, eV², likewise.
        stress_limit: (n_frames,) σ∞² of the stresses, (eV/Å³)²; None without a far field or without stress.
    """

    raw: dict[str, _RawArrays]
    forces: np.ndarray
    energy: np.ndarray
    stress: np.ndarray | None
    numbers: np.ndarray
    n_atoms_of_frame: np.ndarray
    limit: np.ndarray | None
    energy_limit: np.ndarray | None
    stress_limit: np.ndarray | None
    energy_shift: EnergyShift | None = None

    @property
    def frame_of_atom(self) -> np.ndarray:
        """(n_atoms,) index of the frame of each atom."""
        return np.repeat(np.arange(len(self.n_atoms_of_frame)), self.n_atoms_of_frame)

    def variance(self, name: str, fitted: FittedMethod) -> np.ndarray:
        """(n_atoms, n_components) calibrated force variances of one method, (eV/Å)²."""
        limit = None if self.limit is None else torch.from_numpy(self.limit)[:, None]
        scores, numbers = torch.from_numpy(self.raw[name].forces), torch.from_numpy(self.numbers)[:, None]
        return fitted.calibrators["forces"].variance(scores, limit, numbers).numpy()

    def record(self, variance: np.ndarray, runs: np.ndarray) -> CalibrationRecord:
        """The record that thresholds are made from.

        Args:
            variance: (n_atoms, n_components) force variances of the primary estimator, (eV/Å)².
            runs: (n_frames,) number of the run of each frame.
        """
        norms = np.sqrt(np.broadcast_to(variance, self.forces.shape).sum(1))
        errors = np.linalg.norm(self.forces, axis=1)
        counts = self.n_atoms_of_frame.astype(np.int32)
        return CalibrationRecord(
            norms.astype(np.float32), errors.astype(np.float32), self.numbers.astype(np.uint8), counts, runs
        )


def observe(
    heads: dict[str, Head],
    far_field: FarField | None,
    stream: LabelledStream,
    communicator: Communicator,
    *,
    keep: bool,
) -> tuple[Observed, list[tuple[ForwardPass, dict[str, Raw], Targets]]]:
    """Scores and residuals of all ranks' calibration frames and, if they are to be kept, the batches of this one."""
    raws: dict[str, list[Raw]] = {name: [] for name in heads}
    batches = []
    forces, energy, stress, numbers, counts = [], [], [], [], []
    limits: list[Limits] = []
    frames: list[torch.Tensor] = []
    for forward_pass, targets in tell_zero_forces("calibration", stream, communicator):
        assert forward_pass.forces is not None
        assert targets.forces is not None
        with torch.no_grad():
            scores = {name: head(forward_pass) for name, head in heads.items()}
        for name, raw in scores.items():
            raws[name].append(raw)
        if keep:
            batches.append((replace(forward_pass, gradients=None, members=None), scores, targets))
        forces.append(targets.forces - forward_pass.forces.double())
        energy.append(residuals_of(targets.energy, forward_pass.energy) / forward_pass.n_atoms_of_frame)
        if forward_pass.stress is not None:
            residuals = residuals_of(targets.stress, forward_pass.stress)
            if forward_pass.volumes is not None:  # without a volume there is no stress
                residuals = residuals.where(forward_pass.volumes[:, None] > 0, torch.nan)
            stress.append(residuals)
        numbers.append(forward_pass.numbers)
        counts.append(forward_pass.n_atoms_of_frame)
        frames.append(targets.frames)
        if far_field is not None:
            limits.append(far_field.limits(forward_pass))

    rows = _InOrder(frames, counts, communicator)
    observed = Observed(
        raw={
            name: _RawArrays(
                forces=rows.of_atoms([of_batch.forces for of_batch in raw]),
                energy=rows.of_frames([of_batch.energy for of_batch in raw]),
                energies=rows.of_atoms([of_batch.energies for of_batch in raw]),
                stress=rows.of_frames([of_batch.stress for of_batch in raw]),
                distance=rows.of_atoms([of_batch.distance for of_batch in raw]),
            )
            for name, raw in raws.items()
        },
        forces=rows.of_atoms(forces),
        energy=rows.of_frames(energy)[:, None],
        stress=rows.of_some_frames(stress),
        numbers=rows.of_atoms(numbers).astype(np.int64),
        n_atoms_of_frame=rows.n_atoms,
        limit=None if far_field is None else rows.of_atoms([of_batch.forces for of_batch in limits]),
        energy_limit=None if far_field is None else rows.of_frames([of_batch.energy for of_batch in limits]),
        stress_limit=rows.of_some_frames([of_batch.stress for of_batch in limits if of_batch.stress is not None]),
    )
    return without_shift(observed), batches


class _InOrder:
    """Rows of the frames of all ranks, in the order in which one process would have them.

    Args:
        frames: (n_frames,) numbers of the frames of each batch of this rank.
        counts: (n_frames,) number of atoms of each of them.
        communicator: The ranks.

    Attributes:
        n_atoms: (n_frames,) number of atoms of each frame of all ranks.
    """

    def __init__(self, frames: list[torch.Tensor], counts: list[torch.Tensor], communicator: Communicator) -> None:
        self._communicator = communicator
        numbers, n_atoms = (self._gathered(parts) for parts in (frames, counts))
        assert numbers is not None
        assert n_atoms is not None
        self._frames = np.argsort(numbers, kind="stable")
        self._atoms = np.argsort(np.repeat(numbers, n_atoms.astype(int)), kind="stable")
        self.n_atoms = n_atoms[self._frames].astype(np.int64)

    def of_atoms(self, parts: list[torch.Tensor]) -> np.ndarray:
        """(n_atoms, ...) from the (n, ...) parts of this rank's batches."""
        found = self._gathered(parts)
        assert found is not None
        return found[self._atoms]

    def of_frames(self, parts: list[torch.Tensor]) -> np.ndarray:
        """(n_frames, ...), likewise."""
        found = self.of_some_frames(parts)
        assert found is not None
        return found

    def of_some_frames(self, parts: list[torch.Tensor]) -> np.ndarray | None:
        """The same; None if no rank has any."""
        found = self._gathered(parts)
        return None if found is None else found[self._frames]

    def _gathered(self, parts: list[torch.Tensor]) -> np.ndarray | None:
        found = gather(torch.cat(parts) if parts else None, self._communicator)
        return None if found is None else found.cpu().numpy()


def without_shift(observed: Observed) -> Observed:
    """The same without a constant shift of the energies, which a warning names."""
    energies = (observed.energy[:, 0], observed.numbers, observed.n_atoms_of_frame)
    shift = energy_shift(*energies)
    if shift is None:
        return observed
    warnings.warn(
        f"the energies of the calibration frames have an offset of {shift.describe()}: another E0 or functional, or a "
        "constant that was left out. It is not taken for uncertainty, so energy_uncertainty is that of differences of "
        "energies. Label with the reference that the potential was trained on.",
        UQWarning,
        stacklevel=3,
    )
    # As large as those of frames that the constants were not fitted to.
    left = shift.inflation * shift.taken_out(*energies)
    return replace(observed, energy=left[:, None], energy_shift=shift)


def calibrated_method(
    name: str, head: Head, observed: Observed, far: Mapping[str, np.ndarray] | None
) -> tuple[FittedMethod, np.ndarray]:
    """Calibrates a head, separately for forces, energy and stress.

    Args:
        name: Name of the method.
        head: The fitted head.
        observed: Scores and residuals of the calibration frames.
        far: (n_scores,) logarithms of its scores of `forces`, `energy`, `energies` and `stress` where the potential
            knows nothing; None if its scores do not grow with the distance from the training frames.

    Returns:
        The calibrated method, and the (n_folds,) negative log-likelihood of a force component in each fold of the
        calibration frames, by a calibrator of the others.
    """
    raw = observed.raw[name]
    forces = _force_residuals(raw.forces, observed)
    far = far or {}
    choices = {"forces": _choice(forces, far.get("forces"))}
    calibrators = {"forces": choices["forces"].calibrator}
    if (rows := _frame_residuals(raw.energy, observed.energy, observed.energy_limit)) is not None:
        choices["energy"] = _choice(rows, far.get("energy"))
        calibrators["energy"] = choices["energy"].calibrator
        calibrators["energies"] = _of_each_atom(rows, raw.distance, observed, far.get("energies"))
    if observed.stress is not None:
        rows = _frame_residuals(raw.stress, observed.stress, observed.stress_limit)
        if rows is not None:
            choices["stress"] = _choice(rows, far.get("stress"))
            calibrators["stress"] = choices["stress"].calibrator
    for quantity, choice in choices.items():
        _warn_at_boundaries(name, quantity, choice)
    likelihoods = {q: {**choice.nll, "constant": choice.constant_nll} for q, choice in choices.items()}
    return FittedMethod(head, calibrators, likelihoods), choices["forces"].of_folds


def _choice(residuals: Residuals, far: np.ndarray | None) -> Choice:
    """The law that ends where the potential knows nothing; without such an end, the better of the other forms."""
    return (None if far is None else far_field_choice(residuals, far)) or fit_calibrator(residuals)


def _of_each_atom(rows: Residuals, distance: np.ndarray, observed: Observed, far: np.ndarray | None) -> Calibrator:
    """The calibrator of the energies of atoms: on the scale of the energy per atom, as atoms have no reference energy.

    Where all atoms of a structure are alike, each has the σ that the structure has per atom.

    Args:
        rows: Of the energies per atom.
        distance: (n_atoms,) distance of each atom, the score that their energies have in the law with a far end. Scores
            of their energies are not used there: that of a posterior about the mean of structures is far from it for
            every atom of a molecule.
        observed: What they were made from.
        far: (1,) logarithm of the mean distance of a frame that the potential knows nothing of; None for no far end.
    """
    if far is not None:
        mean = np.bincount(observed.frame_of_atom, distance) / observed.n_atoms_of_frame
        calibrator = fit_far_field(replace(rows, scores=mean[rows.groups, None]), far)
        if calibrator is not None:
            return calibrator
    return fit_affine(rows, column=0)


def _force_residuals(scores: np.ndarray, observed: Observed) -> Residuals:
    """One row per atom for isotropic scores, else one row per component."""
    squares, limit = observed.forces**2, observed.limit
    if scores.shape[1] == 1:
        return Residuals(scores[:, 0], squares.sum(1), 3, observed.frame_of_atom, limit, observed.numbers)
    groups, numbers = np.repeat(observed.frame_of_atom, 3), np.repeat(observed.numbers, 3)
    limits = None if limit is None else np.repeat(limit, 3)
    return Residuals(scores.reshape(-1, scores.shape[2]), squares.reshape(-1), 1, groups, limits, numbers)


def _frame_residuals(scores: np.ndarray, residuals: np.ndarray, limit: np.ndarray | None = None) -> Residuals | None:
    """One row per labelled frame; None if there are too few to calibrate on, or none of them has an error."""
    (labelled,) = np.nonzero(np.isfinite(residuals).all(1))
    if len(labelled) < FEWEST_FRAMES or not residuals[labelled].any():
        return None
    limits = None if limit is None else limit[labelled]
    return Residuals(scores[labelled], (residuals[labelled] ** 2).sum(1), residuals.shape[1], labelled, limits)


def _warn_at_boundaries(name: str, quantity: str, choice: Choice) -> None:
    boundary = choice.calibrator.settings.get("boundary", "")
    if boundary == "useless" or min(choice.nll.values()) >= choice.constant_nll:
        warnings.warn(
            f"{name} tells nothing about the {quantity} errors of the calibration frames: a constant standard "
            "deviation does as well. Calibrate on frames whose errors differ more.",
            UQWarning,
            stacklevel=5,
        )
    elif boundary == "bare":
        warnings.warn(
            f"{name}: the calibrated {quantity} variance has no floor (a = 0), so it vanishes as the distance from the "
            "training frames does. Calibrate on more, or more varied, frames to determine the floor.",
            UQWarning,
            stacklevel=5,
        )
