"""A survey of scored frames in one pass: readings, atoms, errors of labelled frames, and the worst frames."""

import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

import numpy as np
from ase import Atoms

from ase_uq.calibration.energy_shift import EnergyShift
from ase_uq.diagnostics.samples import Sample, without_energy_shift
from ase_uq.display.representation import Brief
from ase_uq.errors import InputError
from ase_uq.io.frames import Frames
from ase_uq.io.labels import LABEL_KEYS, refuse_own_forces
from ase_uq.io.results import told_of_another_model
from ase_uq.io.source import Source, Unreadable
from ase_uq.report.frame_values import Warned, flag_reason, label, result, source_frame, structure, temperature
from ase_uq.thresholds.reduction import Reduction, atom_norms


@dataclass(frozen=True, repr=False)
class ScoredFrame(Brief):
    """A frame that is kept for pictures.

    Args:
        place: Number of the frame, as in the `place` of the survey.
        reading: Reading of the frame, eV/Å.
        atoms: Structure, with the notes of the frame in `info`.
        uncertainty: (n_atoms,) ε_i, eV/Å.
        time: Time, fs; NaN if the frame has none.
    """

    place: int
    reading: float
    atoms: Atoms
    uncertainty: np.ndarray
    time: float

    @property
    def rank(self) -> float:
        """The reading, but infinity for NaN, so that it ranks above all numbers."""
        return np.inf if np.isnan(self.reading) else self.reading

    @property
    def worst_atom(self) -> int:
        """Index of its most uncertain atom."""
        return int(np.nan_to_num(self.uncertainty, nan=np.inf).argmax())

    @property
    def is_finite(self) -> bool:
        """Whether all positions and the cell are finite."""
        return bool(np.isfinite(self.atoms.positions).all() and np.isfinite(self.atoms.cell.array).all())


@dataclass(frozen=True, repr=False)
class Survey(Brief):
    """Readings, atoms, errors and worst frames of scored frames.

    Args:
        place: (n_frames,) number of each frame, from 0. It counts the frames of the trajectory that was scored, if all
            frames have that number (`source_frame`) and it grows; else the frames that were read.
        counts_source: Whether `place` counts the frames of the trajectory that was scored.
        n_missing: How many numbers up to the largest belong to no frame that was read.
        time: (n_frames,) times, fs; None if a frame has no time, or times do not grow.
        temperature: (n_frames,) temperatures of the velocities, K; NaN if the frame has none.
        reading: (n_frames,) readings, eV/Å.
        error: (n_frames,) true errors, reduced as the readings are, eV/Å; NaN without reference forces.
        reason: Why a monitor kept each frame; empty if none did.
        numbers: (n_atoms,) atomic numbers of all frames.
        uncertainty: (n_atoms,) ε_i, eV/Å.
        gamma: (n_atoms,) γ; NaN if the frame does not have it.
        n_atoms_of_frame: (n_frames,) number of atoms of each frame.
        compositions: Number of frames by chemical formula.
        n_without: Number of frames without uncertainties, which were left out.
        samples: Residuals and standard deviations of labelled frames, `forces` and `energy_per_atom`. Their
            `frame` counts frames with uncertainties.
        predicted: Predicted values of the same rows, by quantity.
        energy_offset: Offset of the calibration frames' energies that was taken out, in words; empty for none.
        kept: The worst frame of each stretch of consecutive frames, in their order.
        stretch: Number of frames in a stretch.
    """

    place: np.ndarray
    counts_source: bool
    n_missing: int
    time: np.ndarray | None
    temperature: np.ndarray
    reading: np.ndarray
    error: np.ndarray
    reason: tuple[str, ...]
    numbers: np.ndarray
    uncertainty: np.ndarray
    gamma: np.ndarray
    n_atoms_of_frame: np.ndarray
    compositions: Mapping[str, int]
    n_without: int
    samples: Mapping[str, Sample]
    predicted: Mapping[str, np.ndarray]
    energy_offset: str
    kept: tuple[ScoredFrame, ...]
    stretch: int

    @property
    def n_frames(self) -> int:
        """Number of frames with uncertainties."""
        return len(self.place)

    @cached_property
    def gamma_of_frame(self) -> np.ndarray:
        """(n_frames,) largest γ of each frame; NaN if it does not have it."""
        starts = np.cumsum(self.n_atoms_of_frame) - self.n_atoms_of_frame
        return np.fmax.reduceat(self.gamma, starts)

    @property
    def n_beyond(self) -> int:
        """Number of frames with an atom beyond the edge of the calibration data, γ > 1."""
        return int((self.gamma_of_frame > 1).sum())

    def above(self, level: float) -> np.ndarray:
        """(n_frames,) whether each reading is at or above a level, or is NaN."""
        return ~(self.reading < level)

    @property
    def along(self) -> np.ndarray:
        """(n_frames,) times, fs, or the numbers of the frames if there are no times."""
        return self.place if self.time is None else self.time

    @property
    def gap(self) -> float:
        """A hundredth of the range of `along`, in one digit: frames nearer than this show the same event."""
        return float(f"{float(self.along[-1] - self.along[0]) / 100:.1g}")

    def worst(self, n: int = 6) -> list[ScoredFrame]:
        """The frames with the largest readings, worst first, without frames within `gap` of a worse one."""
        where = dict(zip(self.place.tolist(), self.along.tolist(), strict=True))
        chosen: list[ScoredFrame] = []
        for frame in sorted(self.kept, key=lambda frame: -frame.rank):
            if len(chosen) < n and all(abs(where[frame.place] - where[c.place]) > self.gap for c in chosen):
                chosen.append(frame)
        return chosen


def survey(
    frames: Frames | Iterable[Atoms],
    *,
    reduction: Reduction | None = None,
    label_keys: tuple[str, str, str] | None = None,
    energy_shift: EnergyShift | None = None,
    scored_with: str = "",
    keep: int = 500,
) -> Survey:
    """Reads scored frames once, one by one; only numbers and at most 2 · `keep` structures stay in memory.

    Args:
        frames: Frames written by `ase-uq score` or a monitor, as a file or an iterable. Frames without uncertainties
            are counted and left out. Frames of a file that cannot be read, and labels and notes that are not finite or
            have another shape than expected, are left out with a warning.
        reduction: How a frame becomes a reading; the largest ε_i by default.
        label_keys: Names of energy, forces and stress of the reference; by default `REF_energy`, `REF_forces` and
            `REF_stress`, since `energy` and `forces` of scored frames are the potential's.
        energy_shift: The offset of the calibration frames, which is taken out of the reference energies.
        scored_with: Name of the uncertainty model that the frames are reported on with (`UncertaintyModel.name`); empty
            to take those of any.
        keep: Number of structures to keep for pictures.

    Raises:
        InputError: There are no frames, none has uncertainties, uncertainties have another shape than their frame, or
            a frame has no atoms or was scored with another uncertainty model.
        LabelError: The labels are the potential's own forces.
    """
    gathered = _Gathered(
        reduction or Reduction(), label_keys or LABEL_KEYS[0], energy_shift, _Stretches(keep), scored_with
    )
    for place, atoms in _numbered(frames, gathered.warn):
        gathered.add(place, atoms)
    if not gathered.n_read:
        raise InputError("there are no frames to report on.")
    if not gathered.place:
        raise InputError(
            f"none of the {gathered.n_read} frames carries forces_uncertainty, so there is nothing to report. Score "
            "them first: ase-uq score FRAMES --model SPEC --uq FILE --out SCORED.xyz, and give SCORED.xyz here."
        )
    return gathered.survey()


def _numbered(frames: Frames | Iterable[Atoms], warn: Warned) -> Iterator[tuple[int, Atoms]]:
    if not isinstance(frames, str | os.PathLike):
        yield from enumerate(frames)
        return
    for number, frame in Source(frames).read():
        if isinstance(frame, Unreadable):
            warn("that cannot be read", f"frame {number} of {os.fspath(frames)} is left out: {frame.reason}")
        else:
            yield number, frame


@dataclass
class _Stretches:
    """Keeps the worst frame of every stretch; stretches grow with the number of frames, so that few are kept."""

    keep: int
    length: int = 1
    kept: list[ScoredFrame] = field(default_factory=list)

    def add(self, frame: ScoredFrame) -> None:
        last = self.kept[-1] if self.kept else None
        if last is not None and last.place // self.length == frame.place // self.length:
            if frame.rank > last.rank:
                self.kept[-1] = frame
            return
        self.kept.append(frame)
        if len(self.kept) > 2 * self.keep:
            self.length *= 2
            shorter, self.kept = self.kept, []
            for worst in shorter:
                self.add(worst)


@dataclass
class _Gathered:
    """The data of the frames that were read so far."""

    reduction: Reduction
    keys: tuple[str, str, str]
    shift: EnergyShift | None
    stretches: _Stretches
    scored_with: str
    warn: Warned = field(default_factory=Warned)
    place: list[int] = field(default_factory=list)
    source: list[int | None] = field(default_factory=list)  # number in the trajectory that was scored
    without: list[tuple[int, int | None]] = field(default_factory=list)  # place, source: frames without uncertainties
    time: list[float] = field(default_factory=list)
    temperature: list[float] = field(default_factory=list)
    reason: list[str] = field(default_factory=list)
    error: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    uncertainty: list[np.ndarray] = field(default_factory=list)
    gamma: list[np.ndarray] = field(default_factory=list)
    compositions: Counter[str] = field(default_factory=Counter)
    # By quantity: index, predictions, residuals, standard deviations of each labelled frame; one row per atom or frame.
    labelled: dict[str, list[tuple[int, np.ndarray, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    squared_forces: float = 0.0

    @property
    def n_read(self) -> int:
        return len(self.place) + len(self.without)

    def add(self, place: int, atoms: Atoms) -> None:
        source, std = source_frame(atoms), result(atoms, "forces_uncertainty")
        if std is None:
            self.without.append((place, source))
            return
        which = f"frame {place}" if source in (None, place) else f"frame {place} (source_frame {source})"
        if np.shape(std) != (len(atoms), 3):
            raise InputError(
                f"forces_uncertainty of {which} has shape {np.shape(std)}; its {len(atoms)} atoms need "
                f"({len(atoms)}, 3). Score the frame again with `ase-uq score`."
            )
        if not len(atoms):
            raise InputError(f"{which} has no atoms.")
        if self.scored_with and (other := told_of_another_model(atoms, self.scored_with, which)):
            raise InputError(f"{other}.")
        norms = atom_norms(std)
        gamma = self.warn.checked(which, "gamma", result(atoms, "gamma"), (len(atoms),), finite=False)
        self.place.append(place)
        self.source.append(source)
        self.time.append(self.warn.time(which, atoms))
        self.temperature.append(temperature(atoms))
        self.reason.append(flag_reason(atoms))
        self.reading.append(self.reduction(norms, atoms.numbers))
        self.numbers.append(atoms.numbers.astype(np.uint8))
        self.uncertainty.append(norms.astype(np.float32))
        self.gamma.append(np.full(len(atoms), np.nan, np.float32) if gamma is None else gamma.astype(np.float32))
        self.compositions[atoms.get_chemical_formula()] += 1
        self._add_labels(which, atoms, np.asarray(std, float))
        self.stretches.add(ScoredFrame(place, self.reading[-1], structure(atoms), norms, self.time[-1]))

    def _add_labels(self, which: str, atoms: Atoms, std: np.ndarray) -> None:
        index = len(self.place) - 1

        def reference_of(key: str, shape: tuple[int, ...]) -> np.ndarray | None:
            return self.warn.checked(which, key, label(atoms, key), shape)

        def predicted(key: str, shape: tuple[int, ...]) -> np.ndarray | None:
            return self.warn.checked(which, key, result(atoms, key), shape, finite=False)

        reference = reference_of(self.keys[1], std.shape)
        forces = None if reference is None else predicted("forces", std.shape)
        self.error.append(np.nan)
        if reference is not None and forces is not None:
            self.error[-1] = self.reduction(atom_norms(reference - forces), atoms.numbers)
            self.squared_forces += float(np.sum(reference**2))
            self.labelled.setdefault("forces", []).append((index, forces, reference - forces, std))
        reference = reference_of(self.keys[0], ())
        energy, energy_std = (None if reference is None else predicted(k, ()) for k in ("energy", "energy_uncertainty"))
        if reference is not None and energy is not None and energy_std is not None:
            values = (energy, reference - energy, energy_std)
            energy, residual, std = ((value / len(atoms)).reshape(1, 1) for value in values)
            self.labelled.setdefault("energy_per_atom", []).append((index, energy, residual, std))

    def survey(self) -> Survey:
        found = {q: self._sample(q) for q in ("forces", "energy_per_atom")}
        usable = {quantity: sample for quantity, (sample, _) in found.items() if len(sample.frame)}
        if "forces" in usable:
            error, size = float(np.linalg.norm(usable["forces"].residuals)), self.squared_forces**0.5
            refuse_own_forces(f"the labels ({self.keys[1]})", error, size, purpose="to show")
        energies = {q: sample for q, sample in usable.items() if q == "energy_per_atom"}
        usable |= without_energy_shift(energies, dict(enumerate(self.numbers)), self.shift)
        time = np.array(self.time)
        known = [number for number in self.source if number is not None]
        counts_source = len(known) == len(self.place) and bool((np.diff(known) > 0).all())
        place = np.array(known if counts_source else self.place)
        present = {*place.tolist(), *(numbers[counts_source] for numbers in self.without)} - {None}
        shown = dict(zip(self.place, place.tolist(), strict=True))
        return Survey(
            place=place,
            counts_source=counts_source,
            n_missing=max(present) + 1 - len(present),
            time=time if len(time) > 1 and (np.diff(time) > 0).all() else None,
            temperature=np.array(self.temperature),
            reading=np.array(self.reading),
            error=np.array(self.error),
            reason=tuple(self.reason),
            numbers=np.concatenate(self.numbers).astype(int),
            uncertainty=np.concatenate(self.uncertainty).astype(float),
            gamma=np.concatenate(self.gamma).astype(float),
            n_atoms_of_frame=np.array([len(numbers) for numbers in self.numbers]),
            compositions=dict(self.compositions.most_common()),
            n_without=len(self.without),
            samples=usable,
            predicted={quantity: found[quantity][1] for quantity in usable},
            energy_offset="" if self.shift is None else self.shift.describe(),
            kept=tuple(replace(frame, place=shown[frame.place]) for frame in self.stretches.kept),
            stretch=self.stretches.length,
        )

    def _sample(self, quantity: str) -> tuple[Sample, np.ndarray]:
        """Rows with finite residuals and finite, positive standard deviations, and their predictions."""
        rows = self.labelled.get(quantity)
        if not rows:
            return Sample(np.empty((0, 1)), np.empty((0, 1)), np.empty(0, int)), np.empty((0, 1))
        indices, predicted, residuals, std = zip(*rows, strict=True)
        numbers = np.concatenate([self.numbers[i] for i in indices]).astype(int) if quantity == "forces" else None
        frame = np.repeat(indices, [len(r) for r in residuals])
        sample = Sample(np.concatenate(residuals), np.concatenate(std), frame, numbers)
        usable = np.isfinite(sample.residuals).all(1) & (np.isfinite(sample.std) & (sample.std > 0)).all(1)
        return sample.only(usable), np.concatenate(predicted)[usable]
