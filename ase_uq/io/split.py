"""Labelled frames, split into those to train on and those to calibrate on: by run or block, or as MACE did it."""

import os
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from ase import Atoms

from ase_uq.errors import LabelError
from ase_uq.io.frames import read_frames
from ase_uq.io.source import Frames


def split_frames(
    frames: Frames | Sequence[str | os.PathLike[str]],
    calibration: float = 0.2,
    *,
    by: str | int = "run",
    seed: int = 0,
) -> tuple[list[Atoms], list[Atoms]]:
    """Splits frames into training and calibration frames so that no run, or no block, stands on both sides.

    Neighbouring frames of a run are nearly equal: with one of them in the training frames, the other is none that the
    potential has never seen, and the uncertainties come out too small.

    Args:
        frames: All that `read_frames` takes.
        calibration: Share of the frames to calibrate on, met as closely as whole runs or blocks allow.
        by: Name of the entry in `info` that tells runs apart, such as `"run"` or `"config_type"`; or the number of
            consecutive frames of a block, which never holds frames of two runs. Blocks should be longer than
            frames remember each other.
        seed: Seed of the random choice of runs or blocks.

    Returns:
        Training frames and calibration frames, both in their order.

    Raises:
        LabelError: The frames cannot be read, or are of one run or block.
        ValueError: The share is not between 0 and 1, or a block has no frames.
    """
    if not 0 < calibration < 1:
        raise ValueError(f"calibration is {calibration!r}; a share of the frames between 0 and 1 was expected.")
    if not isinstance(by, str) and by < 1:
        raise ValueError(f"by is {by!r}; the name of an entry in info, or a number of frames from 1 on was expected.")
    read = read_frames(frames)
    groups = _runs(read, by) if isinstance(by, str) else _blocks(read, by)
    if len(groups) < 2:
        what = f"run (info[{by!r}] tells runs apart)" if isinstance(by, str) else f"block of {by}"
        raise LabelError(
            f"all {len(read)} frames are of one {what}, so none can be kept apart. Note the run of each frame in its "
            "info, or split by blocks of fewer frames, such as by=20."
        )
    held_out = _chosen(groups, calibration * len(read), np.random.default_rng(seed))
    return _both(read, held_out)


def split_as_mace(
    train: Frames | Sequence[str | os.PathLike[str]],
    valid_indices: str | os.PathLike[str],
    *,
    keep_isolated_atoms: bool = False,
) -> tuple[list[Atoms], list[Atoms]]:
    """Training and validation frames of `mace_run_train --valid_fraction`, which held the second ones out.

    MACE has chosen them frame by frame. Where frames are from runs, they are closer to the training frames than those
    of a new run will be, and uncertainties come out somewhat too small; a run of its own is the better calibration set.

    Args:
        train: The training file or files of MACE, in the same order.
        valid_indices: The file `*_valid_indices_SEED.txt` that MACE wrote.
        keep_isolated_atoms: Whether MACE ran with `--keep_isolated_atoms`; otherwise it counts no frames of one atom
            whose `config_type` is `IsolatedAtom`, and these are in neither list.

    Returns:
        Training frames and calibration frames, both in their order.

    Raises:
        LabelError: A file cannot be read, or the indices are not of these frames.
    """
    path = Path(valid_indices)
    read = [atoms for atoms in read_frames(train) if keep_isolated_atoms or not _is_isolated_atom(atoms)]
    try:
        indices = [int(line) for line in path.read_text().split()]
    except OSError as error:
        raise LabelError(
            f"the indices of the validation frames cannot be read from {path}: {error.strerror}."
        ) from error
    except ValueError as error:  # UnicodeDecodeError is one as well
        raise LabelError(
            f"{path} has other things than one index on each line ({error}): it is not a file of MACE."
        ) from error
    if not indices:
        raise LabelError(f"{path} has no indices.")
    held_out = set(indices)
    if len(held_out) < len(indices):
        raise LabelError(f"{path} names a frame twice: it is not a file of MACE.")
    if not (min(held_out) >= 0 and max(held_out) < len(read) and len(held_out) < len(read)):
        raise LabelError(
            f"{path} has {len(indices)} indices up to {max(held_out)}, and there are {len(read)} frames"
            f"{'' if keep_isolated_atoms else ' without isolated atoms'}: it was written for other training files."
        )
    return _both(read, held_out)


def _runs(frames: Sequence[Atoms], key: str) -> list[list[int]]:
    """The indices of the frames of each run; frames without the entry are one run, as in `fit`."""
    runs: dict[str, list[int]] = {}
    for index, atoms in enumerate(frames):
        runs.setdefault(str(atoms.info.get(key, "")), []).append(index)
    return list(runs.values())


def _blocks(frames: Sequence[Atoms], length: int) -> list[list[int]]:
    """The indices of the frames of each block."""
    blocks = []
    for _, run in groupby(range(len(frames)), key=lambda index: str(frames[index].info.get("run", ""))):
        indices = list(run)
        blocks += [indices[start : start + length] for start in range(0, len(indices), length)]
    return blocks


def _chosen(groups: Sequence[list[int]], wanted: float, rng: np.random.Generator) -> set[int]:
    """The frames of some of the groups, together as close to the wanted number as they allow; never all or none."""
    order = [groups[i] for i in rng.permutation(len(groups))]
    chosen: list[list[int]] = []
    n_chosen = 0
    for group in order:
        nearer = abs(n_chosen + len(group) - wanted) < abs(n_chosen - wanted)
        if nearer and len(chosen) < len(groups) - 1:
            chosen.append(group)
            n_chosen += len(group)
    return {index for group in chosen or [min(order, key=len)] for index in group}


def _both(frames: Sequence[Atoms], held_out: Iterable[int]) -> tuple[list[Atoms], list[Atoms]]:
    apart = set(held_out)
    train = [atoms for index, atoms in enumerate(frames) if index not in apart]
    return train, [atoms for index, atoms in enumerate(frames) if index in apart]


def _is_isolated_atom(atoms: Atoms) -> bool:
    return len(atoms) == 1 and atoms.info.get("config_type") == "IsolatedAtom"
