"""Labelled frames in, uncertainty model out: fit on training frames, calibrate on held-out frames."""

import hashlib
import importlib.metadata
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import Calibrator, Choice, Residuals, fit_affine, fit_calibrator, fit_edges
from ase_uq.communicator import Communicator, Serial, gather
from ase_uq.errors import LabelError, UQWarning
from ase_uq.forward_pass import Evaluation, Targets, residuals_of
from ase_uq.io.frames import Frames, check_labels, labels_of, read_frames
from ase_uq.methods import Method, available_methods, make_method
from ase_uq.methods.base import Head, Raw
from ase_uq.stream.labelled import LabelledStream, targets_of
from ase_uq.uncertainty_model.combination import Fitted, Scene, View, fit_combination
from ase_uq.uncertainty_model.model import CalibrationRecord, FittedMethod, UncertaintyModel

_FEWEST_FRAMES = 10
_MOST_KEPT_ATOMS = 20_000  # of the training frames, for the residual model
# Residuals this many times the forces themselves mean other units, another potential or other atoms.
_SUSPICIOUS_RATIO = 10.0
# Residuals this small are rounding.
_OWN_RATIO = 1e-5


def fit(
    calculator: BaseCalculator | Backend | str,
    train: Frames,
    calibration: Frames,
    *,
    stressed: Frames | None = None,
    methods: Sequence[str | Method] = ("bll", "pdrum", "kernel"),
    label_keys: tuple[str, str, str] | None = None,
    batch_atoms: int = 1000,
    communicator: Communicator | None = None,
    progress: bool = True,
) -> UncertaintyModel:
    """Fits what a potential does not know.

    Args:
        calculator: The potential: an ASE calculator of MACE or orb, or a SPEC string.
        train: Frames the potential was trained on, or frames like them: path or list. Energies are used where
            they are labelled; direct force heads need forces.
        calibration: Frames the potential was *not* trained on, with forces: path or list. They set the scale. Frames
            of one trajectory follow each other in their order; `info["run"]` names the run of a frame, where there
            are several.
        stressed: Deliberately bad frames with forces, such as `stress_frames` makes: nothing is fitted to them or
            calibrated on them, but thresholds such as `MissRate` need frames with large errors.
        methods: Names or `Method` instances. Several are combined into the primary estimator; of one alone its own
            results are.
        label_keys: Names of energy, forces and stress in info and arrays; by default `REF_energy`,
            `REF_forces`, `REF_stress`, else the results of a calculator attached to the frames.
        batch_atoms: Most atoms evaluated together.
        communicator: Ranks to share the fit with; one process by default.
        progress: Whether to show progress bars.

    Returns:
        The uncertainty model; `.save(path)` writes it, `.summary()` describes it.

    Raises:
        LabelError: Empty files, frames without labels or with labels that are not finite, too few frames, or
            calibration frames that are training frames.
        ValueError: No method, one that is not known, or two of the same name.
        InputError: A frame that the potential cannot evaluate.
    """
    communicator = communicator or Serial()
    makers = [make_method(method) if isinstance(method, str) else method for method in methods]
    if not makers:
        raise ValueError(f"no method was given. There are: {', '.join(available_methods())}.")
    names = [method.name for method in makers]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ValueError(
            f"results are told apart by the name of their method, and there are several {twice[0]!r}: give it once."
        )
    combines = len(makers) > 1
    backend = load_backend(calculator)
    train_frames = _molecules(read_frames(train, name="training frames"))
    calibration_frames = _molecules(read_frames(calibration, name="calibration frames"))
    stressed_frames = None if stressed is None else _molecules(read_frames(stressed, name="stressed frames"))
    _check_labels("training", train_frames, label_keys, forces=False)
    _check_labels("calibration", calibration_frames, label_keys, forces=True)
    _refuse_overlap(train_frames, calibration_frames)
    if stressed_frames is not None:
        _check_labels("stressed", stressed_frames, label_keys, forces=True)
        backend.check(stressed_frames, name="stressed structure")
    _check_first_frames(backend, train_frames, calibration_frames, label_keys)
    options: dict[str, Any] = {"batch_atoms": batch_atoms, "keys": label_keys}
    stream = LabelledStream(
        backend,
        train_frames,
        communicator,
        forces=combines or any(method.forces for method in makers),
        gradients=any(method.gradients for method in makers),
        title="fit" if progress else "",
        **options,
    )
    # One pass for all methods: what the potential costs is paid once.
    accumulators = {method.name: method.start() for method in makers}
    for accumulator in accumulators.values():
        accumulator.progress = progress
    kept = _Kept(list(map(len, train_frames)))
    for evaluation, targets in stream:
        for accumulator in accumulators.values():
            accumulator.add(evaluation, targets)
        if combines:
            kept.add(evaluation, targets)
    heads = {name: a.finish(communicator).to(backend.device) for name, a in accumulators.items()}
    held_out = LabelledStream(
        backend,
        calibration_frames,
        Serial(),
        forces=True,
        gradients=any(head.gradients for head in heads.values()),
        title="calibrate" if progress else "",
        **options,
    )
    observed, batches = _observe(heads, held_out, keep=combines)
    calibrated = {name: _calibrated(name, head, observed) for name, head in heads.items()}
    fitted = {name: method for name, (method, _) in calibrated.items()}
    elements = frozenset(int(z) for atoms in train_frames for z in atoms.numbers)
    primary = leading = makers[0].name
    variance, combination = observed.variance(leading, fitted[leading]), None
    if combines and (view := _view(calibrated, elements)) is not None:
        primary, leading = "combined", view.anchor
        found = _combined(view, heads, kept.batches, batches, communicator, progress)
        variance, combination = found.variance, found.combination.to(backend.device)
    model = UncertaintyModel(
        identity=backend.identity,
        methods=fitted,
        primary=primary,
        edges=fit_edges(observed.raw[leading].distance, observed.numbers, elements),
        record=observed.record(variance, _runs_of(calibration_frames)),
        provenance=_provenance(train_frames, calibration_frames),
        combination=combination,
    )
    return model if stressed_frames is None else _with_stressed(model, backend, stressed_frames, progress, options)


def _with_stressed(
    model: UncertaintyModel, backend: Backend, frames: list[Atoms], progress: bool, options: Mapping[str, Any]
) -> UncertaintyModel:
    """The model with what it says of deliberately bad frames, beside their errors."""
    title = "stressed" if progress else ""
    stream = LabelledStream(backend, frames, Serial(), forces=True, gradients=model.gradients, title=title, **options)
    uncertainty, error, numbers, counts = [], [], [], []
    for evaluation, targets in stream:
        assert evaluation.forces is not None
        uncertainty.append(model.apply(evaluation)["forces_uncertainty"].norm(dim=1))
        error.append(residuals_of(targets.forces, evaluation.forces).norm(dim=1))
        numbers.append(evaluation.numbers)
        counts.append(evaluation.n_atoms_of_frame)
    record = CalibrationRecord(
        uncertainty=_column(uncertainty, np.float32),
        error=_column(error, np.float32),
        numbers=_column(numbers, np.uint8),
        n_atoms_of_frame=_column(counts, np.int32),
        run=_runs_of(frames),
    )
    return replace(model, stressed=record)


def _column(parts: Sequence[torch.Tensor], dtype: type) -> np.ndarray:
    return torch.cat(list(parts)).cpu().numpy().astype(dtype)


class _Kept:
    """Evaluations of training frames for the residual model of the combination: evenly spread, and not too many.

    Which batches are kept does not depend on the rank that has them.

    Args:
        n_atoms_of_frame: Of all ranks' frames.
    """

    def __init__(self, n_atoms_of_frame: Sequence[int]) -> None:
        self._before = np.cumsum([0, *n_atoms_of_frame]).tolist()
        self.batches: list[tuple[Evaluation, Targets]] = []

    def add(self, evaluation: Evaluation, targets: Targets) -> None:
        """Keeps the batch where it is one of the chosen and has forces."""
        if targets.forces is None:
            return
        total, own = self._before[-1], len(evaluation.numbers)
        start = self._before[int(targets.frames[0])]

        def chosen(n_atoms: int) -> int:
            # Of as many atoms in batches like this one; rounded up, so that the first batch is always there.
            return -(-n_atoms * min(_MOST_KEPT_ATOMS, total) // (total * own))

        if chosen(start + own) > chosen(start):
            self.batches.append((replace(evaluation, gradients=None, members=None), targets))


def _view(calibrated: Mapping[str, tuple[FittedMethod, Calibrator]], elements: frozenset[int]) -> View | None:
    """How the combination reads a batch; None where no method can be its anchor."""
    fitted = {name: method for name, (method, _) in calibrated.items()}
    growing = [name for name, method in fitted.items() if method.head.grows]
    if not growing:
        warnings.warn(
            f"none of {', '.join(fitted)} measures a distance that a combination can fall back on: the first is the "
            "primary one. Fit 'bll' with them.",
            UQWarning,
            stacklevel=3,
        )
        return None
    # What costs passes of its own was not kept for the training frames.
    kept = [name for name in growing if not fitted[name].head.gradients]
    anchor = (kept or growing)[0]
    return View(
        anchor=anchor,
        others=tuple(name for name in fitted if name != anchor),
        distances=tuple(name for name in kept if name != anchor),
        elements=tuple(sorted(elements)),
        calibrators={name: method.calibrators["forces"] for name, method in fitted.items()},
        alternative=calibrated[anchor][1],
    )


def _combined(
    view: View,
    heads: Mapping[str, Head],
    training: Sequence[tuple[Evaluation, Targets]],
    calibration: Sequence[tuple[Evaluation, dict[str, Raw], Targets]],
    communicator: Communicator,
    progress: bool,
) -> Fitted:
    read = {name: heads[name] for name in (view.anchor, *view.distances)}
    only = replace(view, others=())  # the other methods' own scores of training frames mean nothing
    if heads[view.anchor].gradients:
        training = ()  # evaluated without them
    with torch.no_grad():
        seen = [_rows(only, e, {name: head(e) for name, head in read.items()}, t) for e, t in training]
        held_out = [_rows(view, e, raws, t) for e, raws, t in calibration]
    scene = _gathered(_joined_rows(seen) if seen else None, held_out[0][0], communicator)
    return fit_combination(view, scene, _joined_rows(held_out), title="combine" if progress else "")


_Rows = tuple[Scene, torch.Tensor, torch.Tensor]


def _rows(view: View, evaluation: Evaluation, raws: Mapping[str, Raw], targets: Targets) -> _Rows:
    """Scene, squared residuals and frames of the atoms of a batch."""
    assert evaluation.forces is not None
    squares = (residuals_of(targets.forces, evaluation.forces)) ** 2
    scene = view.scene(evaluation, raws)
    if scene.base.shape[1] == 1:
        squares = squares.mean(1, keepdim=True)
    return scene, squares, targets.frames[evaluation.frame_of_atom]


def _joined_rows(rows: Sequence[_Rows]) -> _Rows:
    scenes, squares, frames = zip(*rows, strict=True)
    return Scene.joined(scenes), torch.cat(squares), torch.cat(frames)


def _gathered(rows: _Rows | None, like: Scene, communicator: Communicator) -> _Rows | None:
    """Training rows of all ranks in the order of their frames; None where there are none."""
    widths = [
        like.base.shape[1],
        like.careful.shape[1],
        like.around.shape[1],
        like.inputs.shape[1],
        like.base.shape[1],
        1,
    ]
    flat = None
    if rows is not None:
        scene, squares, frames = rows
        flat = torch.cat([scene.base, scene.careful, scene.around, scene.inputs, squares, frames[:, None].double()], 1)
    flat = gather(flat, communicator)
    if flat is None:
        return None
    flat = flat.to(like.base.device)  # a rank without rows has them on the CPU
    base, careful, around, inputs, squares, frames = flat[flat[:, -1].sort(stable=True).indices].split(widths, 1)
    others = base.new_zeros((*base.shape, 0))
    return Scene(base, careful, others, around, inputs), squares, frames[:, 0].long()


@dataclass(frozen=True)
class _RawArrays:
    """`Raw` of all calibration frames as float64 arrays."""

    forces: np.ndarray
    energy: np.ndarray
    energies: np.ndarray
    stress: np.ndarray
    distance: np.ndarray


@dataclass(frozen=True)
class _Observed:
    """Raw scores of every head on the calibration frames, beside the residuals.

    Args:
        raw: By method.
        forces: (n_atoms, 3) residuals, eV/Å.
        energy: (n_frames, 1) residuals per atom, eV; NaN for frames without a label.
        stress: (n_frames, 6) residuals, eV/Å³, likewise; None for a potential without stress.
        numbers: (n_atoms,).
        n_atoms_of_frame: (n_frames,).
    """

    raw: dict[str, _RawArrays]
    forces: np.ndarray
    energy: np.ndarray
    stress: np.ndarray | None
    numbers: np.ndarray
    n_atoms_of_frame: np.ndarray

    @property
    def frame_of_atom(self) -> np.ndarray:
        return np.repeat(np.arange(len(self.n_atoms_of_frame)), self.n_atoms_of_frame)

    def variance(self, name: str, fitted: FittedMethod) -> np.ndarray:
        """(n_atoms, n_components) squared eV/Å, of one method."""
        return fitted.calibrators["forces"].variance(torch.from_numpy(self.raw[name].forces)).numpy()

    def record(self, variance: np.ndarray, runs: np.ndarray) -> CalibrationRecord:
        """What thresholds are made of, from the variances of the primary estimator and the run of each frame."""
        norms = np.sqrt(np.broadcast_to(variance, self.forces.shape).sum(1))
        errors = np.linalg.norm(self.forces, axis=1)
        counts = self.n_atoms_of_frame.astype(np.int32)
        return CalibrationRecord(
            norms.astype(np.float32), errors.astype(np.float32), self.numbers.astype(np.uint8), counts, runs
        )


def _observe(
    heads: dict[str, Head], stream: LabelledStream, *, keep: bool
) -> tuple[_Observed, list[tuple[Evaluation, dict[str, Raw], Targets]]]:
    """Scores and residuals of the calibration frames; and, to be kept, the batches themselves."""
    raws: dict[str, list[Raw]] = {name: [] for name in heads}
    batches = []
    forces, energy, stress, numbers, counts = [], [], [], [], []
    for evaluation, targets in stream:
        assert evaluation.forces is not None
        assert targets.forces is not None
        with torch.no_grad():
            own = {name: head(evaluation) for name, head in heads.items()}
        for name, raw in own.items():
            raws[name].append(raw)
        if keep:
            batches.append((replace(evaluation, gradients=None, members=None), own, targets))
        forces.append(targets.forces - evaluation.forces.double())
        energy.append(residuals_of(targets.energy, evaluation.energy) / evaluation.n_atoms_of_frame)
        if evaluation.stress is not None:
            stress.append(residuals_of(targets.stress, evaluation.stress))
        numbers.append(evaluation.numbers)
        counts.append(evaluation.n_atoms_of_frame)

    def joined(parts: list[torch.Tensor]) -> np.ndarray:
        return torch.cat(parts).cpu().numpy()

    fields = ("forces", "energy", "energies", "stress", "distance")
    observed = _Observed(
        raw={name: _RawArrays(*(joined([getattr(r, f) for r in raw]) for f in fields)) for name, raw in raws.items()},
        forces=joined(forces),
        energy=joined(energy)[:, None],
        stress=joined(stress) if stress else None,
        numbers=joined(numbers),
        n_atoms_of_frame=joined(counts),
    )
    return observed, batches


def _calibrated(name: str, head: Head, observed: _Observed) -> tuple[FittedMethod, Calibrator]:
    """Calibrators of a head, separately for forces, energy and stress; and the other form of that of the forces."""
    raw = observed.raw[name]
    choices = {"forces": fit_calibrator(_force_residuals(raw.forces, observed))}
    calibrators = {"forces": choices["forces"].calibrator}
    if (rows := _frame_residuals(raw.energy, observed.energy)) is not None:
        choices["energy"] = fit_calibrator(rows)
        calibrators["energy"] = choices["energy"].calibrator
        # Atoms have no reference energies: theirs is the posterior variance on the scale of the total energy.
        calibrators["energies"] = fit_affine(rows, column=0)
    if observed.stress is not None and (rows := _frame_residuals(raw.stress, observed.stress)) is not None:
        choices["stress"] = fit_calibrator(rows)
        calibrators["stress"] = choices["stress"].calibrator
    for quantity, choice in choices.items():
        _warn_at_boundaries(name, quantity, choice)
    likelihoods = {q: {**choice.nll, "constant": choice.constant_nll} for q, choice in choices.items()}
    return FittedMethod(head, calibrators, likelihoods), choices["forces"].alternative


def _force_residuals(scores: np.ndarray, observed: _Observed) -> Residuals:
    squares = observed.forces**2
    if scores.shape[1] == 1:
        return Residuals(scores[:, 0], squares.sum(1), 3, observed.frame_of_atom)
    groups = np.repeat(observed.frame_of_atom, 3)
    return Residuals(scores.reshape(-1, scores.shape[2]), squares.reshape(-1), 1, groups)


def _frame_residuals(scores: np.ndarray, residuals: np.ndarray) -> Residuals | None:
    """Rows of the frames that have a label; None if they are too few to calibrate on."""
    (labelled,) = np.nonzero(np.isfinite(residuals).all(1))
    if len(labelled) < _FEWEST_FRAMES:
        return None
    return Residuals(scores[labelled], (residuals[labelled] ** 2).sum(1), residuals.shape[1], labelled)


def _warn_at_boundaries(name: str, quantity: str, choice: Choice) -> None:
    boundary = choice.calibrator.settings["boundary"]
    if boundary == "useless" or min(choice.nll.values()) >= choice.constant_nll:
        warnings.warn(
            f"{name} tells nothing about the {quantity} errors of the calibration frames: a constant standard "
            "deviation does as well. Calibrate on frames whose errors differ more.",
            UQWarning,
            stacklevel=4,
        )
    elif boundary == "bare":
        warnings.warn(
            f"{name}: the calibrated {quantity} variance has no floor (a = 0): it vanishes with the distance from "
            "the training frames. More or more varied calibration frames would settle it.",
            UQWarning,
            stacklevel=4,
        )


def _molecules(frames: list[Atoms]) -> list[Atoms]:
    """The frames without the isolated atoms that training sets carry for their energies."""
    return [atoms for atoms in frames if atoms.info.get("config_type") != "IsolatedAtom"]


def _check_labels(what: str, frames: list[Atoms], keys: tuple[str, str, str] | None, *, forces: bool) -> None:
    if len(frames) < _FEWEST_FRAMES:
        raise LabelError(
            f"there are {len(frames)} {what} frames; at least {_FEWEST_FRAMES} are needed, a few hundred are good."
        )
    for index, atoms in enumerate(frames):
        labels = labels_of(atoms, keys)
        if labels.forces is None and (forces or labels.energy is None):
            wanted = "forces" if forces else "energy or forces"
            names = ", ".join(keys) if keys else "REF_energy and REF_forces, or energy and forces"
            raise LabelError(
                f"{what} frame {index} has no reference {wanted}. Looked for {names}; its info has "
                f"{sorted(atoms.info)}, its arrays {sorted(atoms.arrays)}."
            )
        check_labels(f"{what} frame {index}", atoms, labels)


def _runs_of(frames: list[Atoms]) -> np.ndarray:
    """(n_frames,) number of the run in `info["run"]`, in the order of first appearance; those without are one run."""
    names = [str(atoms.info.get("run", "")) for atoms in frames]
    numbers = {name: number for number, name in enumerate(dict.fromkeys(names))}
    return np.array([numbers[name] for name in names], np.int32)


def _refuse_overlap(train: list[Atoms], calibration: list[Atoms]) -> None:
    seen = {_digest(atoms) for atoms in train}
    shared = [index for index, atoms in enumerate(calibration) if _digest(atoms) in seen]
    if shared:
        raise LabelError(
            f"{len(shared)} of {len(calibration)} calibration frames are training frames (the first is frame "
            f"{shared[0]}). Errors on training frames are too small to calibrate on: hold frames out."
        )


def _check_first_frames(
    backend: Backend, train: list[Atoms], calibration: list[Atoms], keys: tuple[str, str, str] | None
) -> None:
    """Finds bad structures and wrong units before minutes are spent on all frames."""
    backend.check(train, name="training structure")
    backend.check(calibration, name="calibration structure")
    first = calibration[:4]
    if backend.direct and all(labels_of(atoms, keys).forces is None for atoms in train):
        raise LabelError("training frames have no forces, which the direct force head of this potential needs.")
    evaluation = backend.evaluate(backend.collate(first))
    targets = targets_of([labels_of(atoms, keys) for atoms in first], evaluation)
    assert evaluation.forces is not None
    assert targets.forces is not None
    forces = evaluation.forces.double()
    residual = float((targets.forces - forces).square().mean().sqrt())
    smaller = min(float(targets.forces.square().mean().sqrt()), float(forces.square().mean().sqrt()))
    if residual < _OWN_RATIO * smaller:
        raise LabelError(
            f"the calibration labels are the potential's own forces (they agree to {residual / smaller:.0e}): there "
            "are no errors to calibrate on. Give the reference that the potential was trained on, such as DFT."
        )
    if residual > _SUSPICIOUS_RATIO * smaller:
        warnings.warn(
            f"force residuals ({residual:.3g} eV/Å RMS) are {residual / max(smaller, 1e-12):.0f} times the forces "
            f"({smaller:.3g} eV/Å): the labels are probably in other units than eV and Å, or belong to another "
            "potential.",
            UQWarning,
            stacklevel=3,
        )


def _digest(atoms: Atoms) -> str:
    # Files round coordinates to eight digits. Rounding each here, however coarsely, would cut some coordinate of a
    # large frame the other way than its file; three sums over all of them say the same and are cut very rarely.
    coordinates = np.concatenate([atoms.positions.ravel(), atoms.cell.array.ravel()])
    waves = np.cos(np.outer([1.0, 2.0, 3.0], np.arange(len(coordinates))))
    sums = (waves @ coordinates).round(4) + 0.0
    return hashlib.sha256(atoms.numbers.astype(np.int32).tobytes() + sums.tobytes()).hexdigest()


def _provenance(train: list[Atoms], calibration: list[Atoms]) -> dict[str, Any]:
    def described(frames: list[Atoms]) -> dict[str, Any]:
        numbers, counts = np.unique(np.concatenate([atoms.numbers for atoms in frames]), return_counts=True)
        elements = {chemical_symbols[int(z)]: int(n) for z, n in zip(numbers, counts, strict=True)}
        digest = hashlib.sha256("".join(sorted(_digest(atoms) for atoms in frames)).encode()).hexdigest()
        return {"frames": len(frames), "atoms": int(counts.sum()), "elements": elements, "digest": digest}

    packages = ("ase-uq", "ase", "torch", "mace-torch", "orb-models")
    installed = {d.name for d in importlib.metadata.distributions()}
    versions = {name: importlib.metadata.version(name) for name in packages if name in installed}
    return {"train": described(train), "calibration": described(calibration), "versions": versions}
