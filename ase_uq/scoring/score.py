"""Scores finished trajectories: frames are batched and streamed to disk, and killed runs can be resumed."""

import hashlib
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols
from loky import cpu_count

from ase_uq.backends.base import Backend
from ase_uq.display.progress import progress_bar
from ase_uq.errors import InputError
from ase_uq.io.extxyz import warn_of_unwritable
from ase_uq.io.files import check_distinct, paths_of
from ase_uq.io.frames import Frames
from ase_uq.io.results import ENSEMBLE_KEY, SCORED_KEY
from ase_uq.io.several import source_of
from ase_uq.io.source import Source, warn_of_left_out
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor, as_predictor
from ase_uq.scoring.frame_score import FrameScore
from ase_uq.scoring.journal import Journal
from ase_uq.scoring.labels import with_labels
from ase_uq.scoring.scored import ScoredTrajectory
from ase_uq.scoring.shards import SHARD, Shard
from ase_uq.stream.limits import default_batch_atoms
from ase_uq.stream.passes import LeftOut, Pass, passes
from ase_uq.uncertainty_model.model import UncertaintyModel

# Starting processes takes seconds and pays off from this many frames on; one thread keeps up with this many processes.
_WORTH_WORKERS, _MOST_WORKERS = 2000, 8


def score(
    frames: Frames | Sequence[str | os.PathLike[str]],
    calculator: BaseCalculator | Predictor | Backend | str | os.PathLike[str],
    uncertainty_model: UncertaintyModel | str | os.PathLike[str] | None = None,
    *,
    out: str | os.PathLike[str],
    csv: str | os.PathLike[str] | None = None,
    batch_atoms: int | None = None,
    workers: int | None = None,
    shard: Shard | str | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ScoredTrajectory:
    """Scores every frame of a trajectory and writes it, with results and uncertainties.

    Memory does not grow with the trajectory. After a kill at any instant, the same call resumes after the last frame
    that was written; `out` appears when all frames are there. Frames that cannot be read or evaluated are left out,
    with a warning that names them. `source_frame` in a frame's info is its number among those given, from 0, and
    `scored_with` the name of the uncertainty model. Labels under ASE's names, whose place the results take, are written
    as `REF_energy`, `REF_forces` and `REF_stress`, unless they are the potential's own.

    Args:
        frames: A path in any format that ASE reads, with `@` and an index or a query of a database as ASE takes them
            (`run.xyz@:100`); several of them, one after the other; or a list of structures.
        calculator: An `UncertainCalculator` or `Predictor`; or, with an uncertainty model, a bare potential: an ASE
            calculator of MACE, orb or SevenNet, a SPEC, or the path of a `.model` file.
        uncertainty_model: What `fit` made for a bare potential: a model or the path of its file.
        out: File to write: extended XYZ (`.xyz`, `.extxyz`), or HDF5 in the layout of H5MD (`.h5`, `.h5md`), which is
            smaller, written and read faster, and rounds nothing. HDF5 takes twice its room on the disk while it is
            finished.
        csv: CSV file with the numbers of each frame, including those left out; None for none. See `FrameScore`.
        batch_atoms: Largest number of atoms evaluated together, by default 150 on a CPU and 8000 elsewhere; the limit
            for edges is sixty times as high. If the device runs out of memory, batches become smaller, and later
            larger again.
        workers: Number of processes that parse frames and make neighbour lists while the device evaluates; 0 for none.
            By default none on a CPU, which the potential keeps busy, or for short trajectories; else up to 8.
        shard: Which part of the frames to score, for `merge_shards`: I/N, from 1/N to N/N; None for all.
            `out` then has two files beside it, `OUT.shard.json` and `OUT.shard.csv`, and may be without any frame.
        overwrite: Whether existing files are replaced.
        progress: Whether to show a progress bar.

    Raises:
        InputError: The file is missing, none of its frames can be read and evaluated, or a single frame does not fit
            into the device's memory.
        FileExistsError: `out` or `csv` exists.
        ArtefactError: They cannot be written, for example because the disk is full; or an interrupted run to the same
            `out` was made from another trajectory, potential or uncertainty model.
        TypeError: A bare potential has no uncertainty model, or one is given for a calculator that already has one.
        MissingDependency: `out` is to be HDF5, and h5py is not installed.
        ValueError: Two of the trajectory, `out` and `csv` are the same file, `out` has the name of another format, or
            an option is out of range.
    """
    check_distinct(paths_of(frames), out, csv)
    if batch_atoms is not None and batch_atoms < 1:
        raise ValueError(f"batch_atoms is {batch_atoms}; 1 or more was expected.")
    if workers is not None and workers < 0:
        raise ValueError(f"workers is {workers}; 0 or more was expected.")
    part = Shard.parse(shard) if isinstance(shard, str) else shard
    start = time.perf_counter()
    predictor = as_predictor(calculator, uncertainty_model)
    source = source_of(frames)
    backend = predictor.backend
    csv_file = None if csv is None else Path(csv)
    origin = _origin(source, predictor)
    if part is not None:
        # Batches are those of a run without shards, so their size must be the same for all.
        origin |= {SHARD: str(part), "batch_atoms": batch_atoms or default_batch_atoms(backend.device.type)}
    with Journal(Path(out), csv_file, origin, overwrite=overwrite, is_shard=part is not None) as journal:
        scored = ScoredTrajectory(Path(out), n_resumed=journal.n_resumed)
        for row in journal.rows():
            scored.add(row)
        if not journal.is_complete:
            n_workers = _n_workers(backend, source) if workers is None else workers
            _score_rest(source, predictor, batch_atoms, journal, scored, progress, n_workers, part)
        if not scored.n_frames and part is None:
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


def _score_rest(
    source: Source,
    predictor: Predictor,
    batch_atoms: int | None,
    journal: Journal,
    scored: ScoredTrajectory,
    progress: bool,
    n_workers: int,
    part: Shard | None,
) -> None:
    """Scores all frames that are not in the journal yet; they are read ahead of the device and written behind it."""
    events = passes(
        predictor.backend,
        source,
        predictor.predictions,
        batch_atoms=batch_atoms,
        start=journal.next_frame,
        gradients=predictor.gradients,
        communicator=part,
        n_workers=n_workers,
    )
    # How many frames a shard has is known at its end.
    total, initial = (source.total(), journal.next_frame) if progress and part is None else (None, scored.n_resumed)
    with (
        progress_bar(
            total=total,
            initial=initial,
            desc="score",
            unit="frame",
            show=progress,
        ) as bar,
        ThreadPoolExecutor(1, "journal of ase_uq") as beside,
        closing(events),
    ):
        behind: Future[None] | None = None
        named: set[str] = set()
        model = predictor.uncertainty_model
        notes = {SCORED_KEY: model.name} | ({ENSEMBLE_KEY: model.name} if predictor.n_members else {})
        left_out: list[FrameScore] = []

        def write(batch: Pass[list[Prediction]]) -> Future[None]:
            predicted = list(zip(batch.numbers, batch.frames, batch.value, strict=True))
            # The journal keeps the order of the frames, so that work can be resumed after its last one.
            rows = sorted([*left_out, *(_row(*each) for each in predicted)], key=lambda row: row.frame)
            left_out.clear()
            for row in rows:
                scored.add(row)
            if scored.worst is not None:
                bar.set_postfix_str(f"largest {scored.worst.force_uncertainty_max:.3g} eV/Å", refresh=False)
            bar.update(len(rows))
            if behind is not None:
                behind.result()
            return beside.submit(_write, journal, rows, predicted, predictor.backend, named, notes)

        for event in events:
            if isinstance(event, LeftOut):
                # Why a frame cannot be read names its place already.
                place = source.place_of(event.number) if event.n_atoms else ""
                reason = f"{event.reason} ({place})" if place else event.reason
                warn_of_left_out(event.number, reason, scored.n_left_out + len(left_out))
                left_out.append(FrameScore(event.number, event.n_atoms, problem=reason))
            else:
                behind = write(event)
        write(Pass([], [], [])).result()


def _n_workers(backend: Backend, source: Source) -> int:
    # A CPU is busy with the potential, and processes take seconds to start.
    if backend.device.type == "cpu" or backend.collator is None or (source.total() or np.inf) < _WORTH_WORKERS:
        return 0
    return min(_MOST_WORKERS, max(1, cpu_count() - 2))


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


def _write(
    journal: Journal,
    rows: Sequence[FrameScore],
    predicted: Sequence[tuple[int, Atoms, Prediction]],
    backend: Backend,
    named: set[str],
    notes: Mapping[str, str],
) -> None:
    predicted = [(n, with_labels(n, atoms, p, backend, named), p) for n, atoms, p in predicted]
    encoded = [journal.file.encode(n, atoms, p.results, notes) for n, atoms, p in predicted]
    odd = {name for _, names in encoded for name in names}
    warn_of_unwritable(odd - named, journal.file.name)
    named |= odd
    journal.append(rows, [data for data, _ in encoded])


def _origin(source: Source, predictor: Predictor) -> dict[str, Any]:
    """Everything that determines the results, in the order in which differences are reported."""
    return {
        "trajectory": source.digest(predictor.backend.info_keys),
        "potential": predictor.backend.identity.fingerprint,
        "precision": str(predictor.backend.dtype).removeprefix("torch."),
        "uncertainty_model": _digest(predictor.uncertainty_model),
        "set_of_results": " ".join(predictor.results),
        "number_of_members": " ".join(f"{key}: {n}" for key, n in predictor.n_members.items()),
        "number_of_force_probes": predictor.force_probes,
    }


def _digest(model: UncertaintyModel) -> str:
    """sha256 of the model's file, which holds everything that could change a result."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        model.save(path)
        return hashlib.sha256(path.read_bytes()).hexdigest()
