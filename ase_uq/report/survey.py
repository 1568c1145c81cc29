"""What scored frames say, gathered in one pass: readings, atoms, errors where labels are, and the worst frames."""

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator

from ase_uq.errors import InputError, LabelError
from ase_uq.frames import LABEL_KEYS, check_labels, labels_of
from ase_uq.readings import Reduction, atom_norms
from ase_uq.scoring import Sample

_TIME_KEYS = ("time_fs", "flag_time_fs")  # of trajectories and of flagged frames of `ase-uq md`
_OWN_RATIO = 1e-5  # residuals this small beside the forces are rounding


@dataclass(frozen=True)
class ScoredFrame:
    """A frame that is kept for pictures.

    Args:
        place: Its number in the file.
        reading: eV/Å.
        atoms: Structure, with the notes of the frame in `info`.
        uncertainty: (n_atoms,) ε_i, eV/Å.
    """

    place: int
    reading: float
    atoms: Atoms
    uncertainty: np.ndarray

    @property
    def rank(self) -> float:
        """The reading with NaN, about which nothing is known, above all numbers."""
        return np.inf if np.isnan(self.reading) else self.reading

    @property
    def worst_atom(self) -> int:
        """Index of its most uncertain atom."""
        return int(np.nan_to_num(self.uncertainty, nan=np.inf).argmax())


@dataclass(frozen=True)
class Survey:
    """What scored frames say.

    Args:
        place: (n_frames,) number of each frame in the file.
        time: (n_frames,) fs; None where not every frame knows its time, or it does not grow.
        reading: (n_frames,) eV/Å.
        numbers: (n_atoms,) atomic numbers of all frames.
        uncertainty: (n_atoms,) ε_i, eV/Å.
        gamma: (n_atoms,) NaN where the frames do not carry it.
        n_atoms_of_frame: (n_frames,).
        compositions: Number of frames by chemical formula.
        n_without: Frames that carry no uncertainties and were left out.
        samples: By quantity, `forces` and `energy_per_atom`: residuals of the labelled frames beside their standard
            deviations.
        kept: The worst frame of each stretch of consecutive frames, in their order.
        stretch: Frames in a stretch.
    """

    place: np.ndarray
    time: np.ndarray | None
    reading: np.ndarray
    numbers: np.ndarray
    uncertainty: np.ndarray
    gamma: np.ndarray
    n_atoms_of_frame: np.ndarray
    compositions: Mapping[str, int]
    n_without: int
    samples: Mapping[str, Sample]
    kept: tuple[ScoredFrame, ...]
    stretch: int

    @property
    def n_frames(self) -> int:
        return len(self.place)

    @cached_property
    def n_beyond(self) -> int:
        """Frames with an atom beyond the edge of the calibration data, γ > 1."""
        frame = np.repeat(np.arange(self.n_frames), self.n_atoms_of_frame)
        return len(np.unique(frame[self.gamma > 1]))

    def above(self, level: float) -> np.ndarray:
        """(n_frames,) whether the reading is at or above a level, or NaN."""
        return ~(self.reading < level)

    @property
    def along(self) -> np.ndarray:
        """(n_frames,) fs, or numbers of the frames where they do not know their time."""
        return self.place if self.time is None else self.time

    @property
    def gap(self) -> float:
        """A hundredth of all there is, in the unit of `along`: nearer frames of a trajectory show the same event."""
        return float(self.along[-1] - self.along[0]) / 100

    def worst(self, n: int = 6) -> list[ScoredFrame]:
        """The frames with the largest readings, worst first, without those nearer than `gap` to one among them."""
        where = dict(zip(self.place.tolist(), self.along.tolist(), strict=True))
        chosen: list[ScoredFrame] = []
        for frame in sorted(self.kept, key=lambda frame: -frame.rank):
            if len(chosen) < n and all(abs(where[frame.place] - where[c.place]) > self.gap for c in chosen):
                chosen.append(frame)
        return chosen


def survey(
    frames: Iterable[Atoms],
    *,
    reduction: Reduction | None = None,
    label_keys: tuple[str, str, str] | None = None,
    keep: int = 500,
) -> Survey:
    """Reads scored frames once, one by one; what it holds on to are numbers and at most 2 · `keep` structures.

    Args:
        frames: As `ase-uq predict` and the monitors write them. Those without uncertainties are counted and left out.
        reduction: How a frame becomes a reading; the largest ε_i by default.
        label_keys: Names of energy, forces and stress of the reference; by default `REF_energy`, `REF_forces` and
            `REF_stress`, since `energy` and `forces` of scored frames are the potential's.
        keep: Structures to keep for pictures.

    Raises:
        InputError: There are no frames, or none has uncertainties.
        LabelError: Labels that are not finite, have another shape than their frame, or are the potential's own.
    """
    gathered = _Gathered(reduction or Reduction(), label_keys or LABEL_KEYS[0], _Stretches(keep))
    place = -1
    for place, atoms in enumerate(frames):
        gathered.add(place, atoms)
    if place < 0:
        raise InputError("there are no frames to report on.")
    if not gathered.place:
        raise InputError(
            f"none of the {place + 1} frames carries forces_uncertainty, so there is nothing to report. Score them "
            "first: ase-uq predict FRAMES --model SPEC --uq FILE --out SCORED.xyz, and give SCORED.xyz here."
        )
    return gathered.survey()


@dataclass
class _Stretches:
    """Keeps the worst frame of every stretch; stretches grow as the file does, so that there are never many."""

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
            joined, self.kept = self.kept, []
            for one in joined:
                self.add(one)


@dataclass
class _Gathered:
    """What was read so far."""

    reduction: Reduction
    keys: tuple[str, str, str]
    stretches: _Stretches
    place: list[int] = field(default_factory=list)
    time: list[float] = field(default_factory=list)
    reading: list[float] = field(default_factory=list)
    numbers: list[np.ndarray] = field(default_factory=list)
    uncertainty: list[np.ndarray] = field(default_factory=list)
    gamma: list[np.ndarray] = field(default_factory=list)
    compositions: Counter[str] = field(default_factory=Counter)
    n_without: int = 0
    # By quantity: place, residuals, standard deviations and forces, a row an atom or frame.
    labelled: dict[str, list[tuple[int, np.ndarray, np.ndarray]]] = field(default_factory=dict)
    squared_forces: float = 0.0

    def add(self, place: int, atoms: Atoms) -> None:
        std = _result(atoms, "forces_uncertainty")
        if std is None:
            self.n_without += 1
            return
        if np.shape(std) != (len(atoms), 3):
            raise InputError(
                f"forces_uncertainty of frame {place} has shape {np.shape(std)}; its {len(atoms)} atoms want "
                f"({len(atoms)}, 3). Score the frame again with `ase-uq predict`."
            )
        if not len(atoms):
            raise InputError(f"frame {place} has no atoms.")
        norms = atom_norms(std)
        gamma = _result(atoms, "gamma")
        self.place.append(place)
        self.time.append(next((float(atoms.info[key]) for key in _TIME_KEYS if key in atoms.info), np.nan))
        self.reading.append(self.reduction(norms, atoms.numbers))
        self.numbers.append(atoms.numbers.astype(np.uint8))
        self.uncertainty.append(norms.astype(np.float32))
        self.gamma.append(np.full(len(atoms), np.nan, np.float32) if gamma is None else np.asarray(gamma, np.float32))
        self.compositions[atoms.get_chemical_formula()] += 1
        self._add_labels(place, atoms, std)
        self.stretches.add(ScoredFrame(place, self.reading[-1], _structure(atoms), norms))

    def _add_labels(self, place: int, atoms: Atoms, std: np.ndarray) -> None:
        labels = labels_of(atoms, self.keys)
        check_labels(f"frame {place}", atoms, labels)
        forces, energy = _result(atoms, "forces"), _result(atoms, "energy")
        if labels.forces is not None and forces is not None:
            self.squared_forces += float(np.sum(labels.forces**2))
            self.labelled.setdefault("forces", []).append((place, labels.forces - forces, np.asarray(std, float)))
        energy_std = _result(atoms, "energy_uncertainty")
        if labels.energy is not None and energy is not None and energy_std is not None:
            row = np.array([[labels.energy - energy]]) / len(atoms), np.array([[float(energy_std)]]) / len(atoms)
            self.labelled.setdefault("energy_per_atom", []).append((place, *row))

    def survey(self) -> Survey:
        samples = {quantity: self._sample(quantity) for quantity in ("forces", "energy_per_atom")}
        found = {quantity: sample for quantity, sample in samples.items() if sample is not None}
        if "forces" in found and np.sum(found["forces"].residuals ** 2) <= _OWN_RATIO**2 * self.squared_forces:
            raise LabelError(
                f"the labels ({self.keys[1]}) are the potential's own forces: there are no errors to show. Give the "
                "names of the reference labels, or leave them out."
            )
        time = np.array(self.time)
        return Survey(
            place=np.array(self.place),
            time=time if len(time) > 1 and (np.diff(time) > 0).all() else None,
            reading=np.array(self.reading),
            numbers=np.concatenate(self.numbers).astype(int),
            uncertainty=np.concatenate(self.uncertainty).astype(float),
            gamma=np.concatenate(self.gamma).astype(float),
            n_atoms_of_frame=np.array([len(numbers) for numbers in self.numbers]),
            compositions=dict(self.compositions.most_common()),
            n_without=self.n_without,
            samples=found,
            kept=tuple(self.stretches.kept),
            stretch=self.stretches.length,
        )

    def _sample(self, quantity: str) -> Sample | None:
        """Rows with a finite, positive standard deviation; None where there are none."""
        rows = self.labelled.get(quantity)
        if not rows:
            return None
        places, residuals, std = zip(*rows, strict=True)
        index = {place: number for number, place in enumerate(self.place)}
        numbers = np.concatenate([self.numbers[index[p]] for p in places]).astype(int) if quantity == "forces" else None
        frame = np.repeat(places, [len(r) for r in residuals])
        sample = Sample(np.concatenate(residuals), np.concatenate(std), frame, numbers)
        usable = np.isfinite(sample.residuals).all(1) & (np.isfinite(sample.std) & (sample.std > 0)).all(1)
        return sample.only(usable) if usable.any() else None


def _result(atoms: Atoms, key: str) -> Any:
    """A result from where files keep it: the calculator, the arrays or the notes; None where there is none."""
    results = atoms.calc.results if isinstance(atoms.calc, Calculator) else {}
    return results.get(key, atoms.arrays.get(key, atoms.info.get(key)))


def _structure(atoms: Atoms) -> Atoms:
    """The structure alone, with the notes a potential or a reader may want; results of many frames are much to hold."""
    notes = {key: value for key, value in atoms.info.items() if isinstance(value, str | int | float | np.number)}
    return Atoms(atoms.numbers, atoms.positions, cell=atoms.cell, pbc=atoms.pbc, info=notes)
