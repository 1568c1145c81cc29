"""Chooses among frames that are scored already, by the readings that stand in them; nothing is evaluated."""

import os
import warnings
from collections.abc import Sequence

import numpy as np
from ase import Atoms

from ase_uq.display.progress import progress_bar
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.frames import Frames
from ase_uq.io.results import scored_results, with_results
from ase_uq.io.several import source_of
from ase_uq.io.source import Unreadable, warn_of_left_out
from ase_uq.properties import find_property
from ase_uq.selection.select import (
    Chosen,
    Selection,
    StrategyName,
    bands_of,
    capped,
    check_options,
    levels_of,
    reason_of,
    scores_of,
)
from ase_uq.thresholds.criteria import Criterion
from ase_uq.thresholds.reduction import Reduction, atom_norms
from ase_uq.uncertainty_model.model import UncertaintyModel

BY_READINGS: tuple[StrategyName, ...] = ("top", "bands", "random")


def select_scored(
    pool: Frames | Sequence[str | os.PathLike[str]],
    n: int,
    uncertainty_model: UncertaintyModel | str | os.PathLike[str],
    *,
    strategy: StrategyName = "top",
    flag: float | str | Criterion | None = None,
    halt: float | str | Criterion | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Chooses frames of a pool by the uncertainties that `score` wrote into them; no potential is needed.

    Scored frames hold no features, so distances are not measured: near-duplicates, and frames like the training frames,
    are not recognised. The most uncertain frames are often all alike. Memory holds one number for each frame.

    Args:
        pool: Path, paths (such as the shards of a trajectory) or list of scored frames. Indices count through all of
            them; `source_frame` in the info of a frame is its number in the trajectory that was scored.
        n: Number of frames to choose, as in `select`.
        uncertainty_model: The uncertainty model that they were scored with, or the path of its file. It turns criteria
            into numbers.
        strategy: `"top"`, the most uncertain; `"bands"`, at random between `flag` and `halt`; `"random"`. With the same
            seed the last two choose what `select` does, but for near-duplicates.
        flag: Threshold, in eV/Å or as a criterion: frames with a lower reading are trusted and never chosen.
        halt: Threshold likewise: frames with this reading or a higher one have failed and are never chosen.
        seed: Seed of the random draws.
        progress: Whether to show a progress bar.

    Returns:
        The frames, as of `select`; without a `method`, distances (NaN) and near-duplicates (0).

    Raises:
        ValueError: The strategy compares features, or an option is out of range.
        InputError: A file is missing, no frame can be read, or one lacks results that this uncertainty model gives, or
            was scored with another one.
    """
    check_options(n, strategy, flag, halt)
    if strategy not in BY_READINGS:
        raise ValueError(
            f"the strategy {strategy!r} compares features, and scored frames hold readings alone: name the potential "
            f"as well (--model, or select with a calculator), or take one of {', '.join(map(repr, BY_READINGS))}."
        )
    model = uncertainty_model
    model = model if isinstance(model, UncertaintyModel) else UncertaintyModel.load(model)
    levels = levels_of(model, flag, halt)
    readings, left_out = _readings(pool, model, progress)
    bands, allowed = bands_of(readings, levels)
    n = capped(n, len(readings), bool(left_out))
    numbers = np.setdiff1d(np.arange(len(readings) + len(left_out)), list(left_out))
    scores = scores_of(strategy, readings, seed)
    open_ones = np.flatnonzero(allowed.numpy())
    order = open_ones[np.argsort(-scores[open_ones], kind="stable")][:n]
    if len(order) < n:
        assert bands is not None  # else all are allowed
        warnings.warn(
            f"{len(order)} of the {n} frames asked for were chosen: no more of the pool lie from {bands.flag:.3g} to "
            f"below {bands.halt:.3g} eV/Å.",
            UQWarning,
            stacklevel=2,
        )
    chosen = tuple(
        Chosen(int(numbers[i]), None, float(readings[i]), float("nan"), float(scores[i]), reason_of(strategy))
        for i in order
    )
    everywhere = np.full(len(readings) + len(left_out), np.nan)
    everywhere[numbers] = readings
    return Selection(chosen, len(everywhere), 0, bands, strategy, "", everywhere, left_out)


def _readings(
    pool: Frames | Sequence[str | os.PathLike[str]], model: UncertaintyModel, progress: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """(n_readable,) readings, eV/Å, and the numbers of the other frames with what is wrong with each."""
    source, reduction = source_of(pool), Reduction()
    keys = [key for key in model.results if (entry := find_property(key)) and entry.name == "forces_uncertainty"]
    readings: list[float] = []
    left_out: dict[int, str] = {}
    frames = source.read()
    for number, atoms in progress_bar(frames, desc="pool", total=source.total(), unit="frame", show=progress):
        if isinstance(atoms, Unreadable):
            warn_of_left_out(number, atoms.reason, len(left_out))
            left_out[number] = atoms.reason
            continue
        readings.append(_reading(number, atoms, keys, model.name, reduction))
    if not readings:
        raise InputError(
            f"none of the {len(left_out)} frames of {source.name} can be read. Frame {next(iter(left_out))}: "
            f"{next(iter(left_out.values()))}"
            if left_out
            else "the pool has no frames."
        )
    return np.array(readings), left_out


def _reading(number: int, atoms: Atoms, keys: Sequence[str], scored_with: str, reduction: Reduction) -> float:
    results = scored_results(with_results(atoms), keys, scored_with, f"frame {number} of the pool")
    return reduction(atom_norms(results["forces_uncertainty"]), atoms.numbers)
