"""Finished trajectories: every frame with its uncertainties, batched, streamed to disk, and taken up after a kill."""

import hashlib
import io
import os
import tempfile
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.data import chemical_symbols
from ase.io import write
from ase.io.extxyz import output_column_format
from ase.stress import voigt_6_to_full_3x3_stress
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist
from tqdm import tqdm

from ase_uq.backends.base import Backend, probe_structure
from ase_uq.errors import InputError, UQWarning
from ase_uq.frames import Frames, annotated
from ase_uq.journal import NUMBER_KEY, FrameScore, Journal
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor, as_predictor
from ase_uq.properties import STANDARD, find_property
from ase_uq.source import Source, Unreadable
from ase_uq.stream import BatchLimit
from ase_uq.uncertainty_model import UncertaintyModel

_property = cache(find_property)  # it is asked for every key of every frame
# On a CPU small batches stay in its caches, a GPU wants many atoms.
BATCH_ATOMS = {"cpu": 300}
BATCH_ATOMS_ELSEWHERE = 8000
_NAMED = 10  # frames left out that are warned of one by one


@dataclass
class ScoredTrajectory:
    """What became of a trajectory, without holding it.

    Attributes:
        out: Extended XYZ file with the frames.
        n_frames: Frames scored, those of interrupted runs too.
        n_atoms: Their atoms.
        n_beyond: Those with an atom beyond the calibration data: gamma above 1, or not a number.
        n_left_out: Frames that could not be read or evaluated.
        worst: Numbers of the frame with the largest force uncertainty; None before the first.
        first_left_out: Numbers of the first frame that was left out.
        n_resumed: Frames that an interrupted run had scored.
        seconds: Of this run.
    """

    out: Path
    n_frames: int = 0
    n_atoms: int = 0
    n_beyond: int = 0
    n_left_out: int = 0
    worst: FrameScore | None = None
    first_left_out: FrameScore | None = None
    n_resumed: int = 0
    seconds: float = 0.0

    def add(self, row: FrameScore) -> None:
        """Counts a frame."""
        if row.problem:
            self.n_left_out += 1
            self.first_left_out = self.first_left_out or row
            return
        self.n_frames += 1
        self.n_atoms += row.n_atoms
        self.n_beyond += not row.gamma_max <= 1  # NaN counts
        if self.worst is None or not row.force_uncertainty_max <= self.worst.force_uncertainty_max:
            self.worst = row

    def summary(self) -> str:
        """One line for people."""
        assert self.worst is not None
        worst = self.worst
        parts = [
            f"{self.n_frames} frames, {self.n_atoms} atoms in {self.seconds:.1f} s, written to {self.out}: "
            f"largest force uncertainty {worst.force_uncertainty_max:.3g} eV/Å in frame {worst.frame}, atom "
            f"{worst.worst_atom} ({worst.worst_element})",
            f"{self.n_beyond} frames have an atom beyond the calibration data (gamma > 1)",
        ]
        if self.n_resumed:
            parts.append(f"{self.n_resumed} of them were there from an interrupted run")
        if self.n_left_out:
            parts.append(f"{self.n_left_out} frames were left out")
        return "; ".join(parts)


def score(
    frames: Frames,
    calculator: BaseCalculator | Predictor | Backend | str,
    uncertainty_model: UncertaintyModel | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    csv: str | os.PathLike[str] | None = None,
    batch_atoms: int | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ScoredTrajectory:
    """Scores every frame of a trajectory and writes it, with results and uncertainties, as extended XYZ.

    Memory does not grow with the trajectory. Killed at any instant, the same call goes on after the last frame that
    was written; `out` appears when all frames are there. Frames that cannot be read or evaluated are left out, with a
    warning that names them. `source_frame` in a frame's info is its number in the trajectory, from 0.

    Args:
        frames: A path in any format that ASE reads, or a list of structures.
        calculator: An `UncertainCalculator` or `Predictor`; or, with an uncertainty model, a bare potential: an ASE
            calculator of MACE or orb, or a SPEC string.
        uncertainty_model: What `fit` made for a bare potential: a model or the path of its file.
        out: Extended XYZ file.
        csv: A CSV file of the numbers of each frame, those left out too; None for none. See `FrameScore`.
        batch_atoms: Most atoms evaluated together, and sixty times as many edges; by default 300 on a CPU and 8000
            elsewhere. Where the device runs out of memory the batches become smaller, and later larger again.
        overwrite: Whether existing files are replaced.
        progress: Whether to show a progress bar.

    Raises:
        InputError: The file is missing, or none of its frames can be read and evaluated; a single frame that does
            not fit into the device's memory.
        FileExistsError: `out` or `csv` exists.
        ArtefactError: They cannot be written, for example because the disk is full; or what an interrupted run left
            was made from another trajectory, potential or uncertainty model.
        TypeError: A bare potential without an uncertainty model, or the other way round.
    """
    if batch_atoms is not None and batch_atoms < 1:
        raise ValueError(f"batch_atoms is {batch_atoms}; 1 or more was expected.")
    start = time.perf_counter()
    predictor = as_predictor(calculator, uncertainty_model)
    source = Source(frames)
    device = predictor.backend.device.type
    limit = BatchLimit(batch_atoms or BATCH_ATOMS.get(device, BATCH_ATOMS_ELSEWHERE))
    csv_file = None if csv is None else Path(csv)
    with Journal(Path(out), csv_file, _origin(source, predictor), overwrite=overwrite) as journal:
        scored = ScoredTrajectory(Path(out), n_resumed=journal.n_resumed)
        for row in journal.rows():
            scored.add(row)
        if not journal.is_complete:
            _score_rest(source, predictor, limit, journal, scored, progress)
        if not scored.n_frames:
            journal.discard()
            first = scored.first_left_out
            raise InputError(
                f"{source.name} has no frames."
                if first is None
                else f"none of the {scored.n_left_out} frames of {source.name} could be scored. Frame {first.frame}: "
                f"{first.problem}"
            )
        journal.finish()
    scored.seconds = time.perf_counter() - start
    return scored


@dataclass
class _Batch:
    """Frames that are evaluated together, and the rows of those among them that cannot be."""

    numbers: list[int] = field(default_factory=list)
    frames: list[Atoms] = field(default_factory=list)
    left_out: list[FrameScore] = field(default_factory=list)
    n_atoms: int = 0
    n_edges: float = 0.0


def _score_rest(
    source: Source,
    predictor: Predictor,
    limit: BatchLimit,
    journal: Journal,
    scored: ScoredTrajectory,
    progress: bool,
) -> None:
    """Everything that is not in the journal yet. One thread reads ahead and writes behind the device."""
    cutoff = _cutoff(predictor.backend)
    batches = _batches(source.read(journal.next_frame), limit, cutoff)
    total = source.total() if progress else None
    bar = tqdm(total=total, initial=journal.next_frame, desc="score", unit="frame", disable=not progress)
    with bar, ThreadPoolExecutor(1, "frames of ase_uq") as beside:
        ahead: Future[_Batch | None] = beside.submit(next, batches, None)
        behind: Future[None] | None = None
        while (batch := ahead.result()) is not None:
            ahead = beside.submit(next, batches, None)
            predicted = _predict(predictor, batch, limit, cutoff)
            rows = [_row(*each) for each in predicted]
            if behind is not None:
                behind.result()
            _warn_of(batch.left_out, scored.n_left_out)
            rows = sorted([*rows, *batch.left_out], key=lambda row: row.frame)
            for row in rows:
                scored.add(row)
            behind = beside.submit(_write, journal, rows, predicted)
            if scored.worst is not None:
                bar.set_postfix_str(f"largest {scored.worst.force_uncertainty_max:.3g} eV/Å", refresh=False)
            bar.update(len(rows))
        if behind is not None:
            behind.result()


def _batches(frames: Iterator[tuple[int, Atoms | Unreadable]], limit: BatchLimit, cutoff: float) -> Iterator[_Batch]:
    batch = _Batch()
    for number, atoms in frames:
        if isinstance(atoms, Unreadable):
            batch.left_out.append(FrameScore(number, problem=atoms.reason))
            continue
        n_edges = count_edges(atoms, cutoff)
        if batch.frames and not limit.fits(batch.n_atoms + len(atoms), batch.n_edges + n_edges):
            yield batch
            batch = _Batch()
        batch.numbers.append(number)
        batch.frames.append(atoms)
        batch.n_atoms += len(atoms)
        batch.n_edges += n_edges
    if batch.frames or batch.left_out:
        yield batch


def count_edges(atoms: Atoms, cutoff: float) -> float:
    """About how many neighbours closer than the cutoff (Å) all atoms have together, without a neighbour list.

    Exact without periodic boundaries; with them it is what the mean density of the cell gives, if that is more.
    """
    if not np.isfinite(atoms.positions).all():
        return 0.0  # the potential will refuse it
    if not np.isfinite(cutoff):
        return float(len(atoms)) ** 2
    if len(atoms) < 200:  # a tree takes longer to build
        n_open = 2.0 * np.count_nonzero(pdist(atoms.positions) < cutoff)
    else:
        tree = KDTree(atoms.positions)
        n_open = float(tree.count_neighbors(tree, cutoff)) - len(atoms)
    if not atoms.pbc.any():
        return n_open
    volume = abs(np.linalg.det(atoms.cell.complete().array))
    return max(n_open, len(atoms) ** 2 / max(volume, 1e-9) * 4 / 3 * np.pi * cutoff**3)


def _cutoff(backend: Backend) -> float:
    probe = probe_structure(backend.elements, backend.required_info_keys)
    return backend.evaluate(backend.collate([probe]), forces=False).edges.cutoff


_Predicted = list[tuple[int, Atoms, Prediction]]


def _predict(predictor: Predictor, batch: _Batch, limit: BatchLimit, cutoff: float) -> _Predicted:
    """Predictions of a batch, in parts where it does not fit; frames that are refused go to `batch.left_out`."""
    found: _Predicted = []
    waiting = [(batch.numbers, batch.frames)]
    while waiting:
        numbers, frames = waiting.pop()
        if not frames:
            continue
        problem = _try(predictor, numbers, frames, found)
        if problem is None:
            limit.count_success()
            continue
        if isinstance(problem, torch.OutOfMemoryError):
            if len(frames) == 1:
                raise InputError(
                    f"frame {numbers[0]} with its {len(frames[0])} atoms alone does not fit into the memory of "
                    f"{predictor.backend.device}. What was scored is kept; go on on another device."
                )
            limit.halve(sum(map(len, frames)), sum(count_edges(atoms, cutoff) for atoms in frames))
            if predictor.backend.device.type == "cuda":
                torch.cuda.empty_cache()
        elif len(frames) == 1:
            batch.left_out.append(FrameScore(numbers[0], len(frames[0]), problem=str(problem)))
            continue
        middle = len(frames) // 2
        waiting += [(numbers[middle:], frames[middle:]), (numbers[:middle], frames[:middle])]
    return found


def _try(
    predictor: Predictor, numbers: Sequence[int], frames: Sequence[Atoms], found: _Predicted
) -> InputError | torch.OutOfMemoryError | None:
    try:
        predictions = predictor.predict(frames, first=numbers[0])
    except (InputError, torch.OutOfMemoryError) as error:
        # Without the traceback, which holds on to the tensors of the pass that failed.
        return error.with_traceback(None)
    found += zip(numbers, frames, predictions, strict=True)
    return None


def _row(number: int, atoms: Atoms, prediction: Prediction) -> FrameScore:
    norms = prediction.atom_uncertainty
    worst = int(norms.argmax())
    return FrameScore(
        frame=number,
        n_atoms=len(atoms),
        energy=float(prediction["energy"]),
        energy_uncertainty=float(prediction.results.get("energy_uncertainty", np.nan)),
        force_uncertainty_max=float(norms[worst]),
        force_uncertainty_mean=float(norms.mean()),
        worst_atom=worst,
        worst_element=chemical_symbols[atoms.numbers[worst]],
        gamma_max=float(prediction["gamma"].max()),
    )


def _write(journal: Journal, rows: Sequence[FrameScore], predicted: _Predicted) -> None:
    journal.append(rows, [extxyz_text(atoms, p.results, **{NUMBER_KEY: n}) for n, atoms, p in predicted])


def extxyz_text(atoms: Atoms, results: Mapping[str, Any], **info: Any) -> str:
    """What `write_frames` writes of a structure with these results, in a third of the time.

    ASE formats a number at a time; here a frame is one format string.
    """
    if atoms.constraints:  # ASE knows how to write them
        buffer = io.StringIO()
        frame = annotated(atoms, results, **info)
        frame.calc = SinglePointCalculator(frame, **{k: v for k, v in results.items() if k in STANDARD})
        write(buffer, frame, format="extxyz")
        return buffer.getvalue()
    frame = atoms.copy()
    for store in (frame.info, frame.arrays):
        for key in [key for key in store if _property(key) is not None]:
            del store[key]  # of an earlier calculation
    for key, value in results.items():
        entry = _property(key)
        if entry is None:
            continue
        if entry.per_atom:
            frame.arrays[key] = value
        else:
            frame.info[key] = voigt_6_to_full_3x3_stress(value) if key == "stress" else value
    frame.info.update(info)
    names = [name for name in frame.arrays if name not in ("numbers", "positions")]
    columns = {"symbols": np.array(list(frame.symbols)), "positions": frame.positions}
    columns |= {name: frame.arrays[name] for name in names}
    comment, widths, _, row_format = output_column_format(frame, list(columns), columns, True)
    cells = [c.reshape(len(frame), width).tolist() for c, width in zip(columns.values(), widths, strict=True)]
    flat = [cell for rows in zip(*cells, strict=True) for row in rows for cell in row]
    return f"{len(frame)}\n{comment}\n" + row_format * len(frame) % tuple(flat)


def _warn_of(left_out: Sequence[FrameScore], before: int) -> None:
    for count, row in enumerate(left_out, before):
        if count < _NAMED:
            warnings.warn(f"frame {row.frame} was left out: {row.problem}", UQWarning, stacklevel=4)
        elif count == _NAMED:
            warnings.warn("further frames that are left out are not named.", UQWarning, stacklevel=4)


def _origin(source: Source, predictor: Predictor) -> dict[str, Any]:
    """What decides the results, in the order in which a difference is told."""
    return {
        "trajectory": source.digest(),
        "potential": predictor.backend.identity.fingerprint,
        "precision": str(predictor.backend.dtype).removeprefix("torch."),
        "uncertainty_model": _digest(predictor.uncertainty_model),
        "set_of_results": " ".join(predictor.results),
    }


def _digest(model: UncertaintyModel) -> str:
    """sha256 of its file: nothing that could change a result is forgotten."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        model.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
