"""Chooses frames of a pool that are worth labelling: one pass over the pool, then `strategies` on its features."""

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends.base import Backend
from ase_uq.display.progress import progress_bar
from ase_uq.display.representation import Brief
from ase_uq.dynamics.policy import check_order
from ase_uq.errors import UQWarning
from ase_uq.io.frames import Frames
from ase_uq.io.results import annotated, drop_uncertainties
from ase_uq.io.several import source_of
from ase_uq.methods.base import Head
from ase_uq.numerics.cumulants import HIGHEST
from ase_uq.predictor import Predictor, as_predictor
from ase_uq.selection.points import Per, Scan
from ase_uq.selection.strategies import (
    Determinant,
    Farthest,
    Highest,
    Known,
    LargestCluster,
    Pick,
    Points,
    Space,
    Strategy,
    choose,
    resolution,
    typical_distance,
)
from ase_uq.thresholds.criteria import Criterion
from ase_uq.uncertainty_model.model import UncertaintyModel

StrategyName = Literal["lcmd", "maxdet", "maxdist", "top", "bands", "random"]


@dataclass(frozen=True)
class Chosen:
    """A frame that was chosen, and why.

    Args:
        frame: Index of the frame in the pool.
        atom: Index of the atom for which it was chosen, if environments were compared; else None.
        uncertainty: Its reading, the largest ε_i of its atoms, eV/Å.
        distance: Distance from the nearest training or previously chosen frame, in units of the typical distance
            between two frames of the pool; for environments that of its atom, among atoms of its element. Infinite if
            there was nothing to compare it with, NaN if distances were not measured.
        score: What the strategy maximised; see `Pick` in `strategies`.
        reason: Why it was chosen, in words.
    """

    frame: int
    atom: int | None
    uncertainty: float
    distance: float
    score: float
    reason: str


@dataclass(frozen=True)
class Bands:
    """Numbers of frames of a pool by their readings, counted as in DP-GEN.

    Args:
        flag: Lower threshold, eV/Å.
        halt: Upper threshold, eV/Å.
        trusted: Number of frames below `flag`.
        candidate: Number of frames from `flag` to below `halt`.
        failed: Number of frames at or above `halt`, or whose reading is not a number.
    """

    flag: float
    halt: float
    trusted: int
    candidate: int
    failed: int

    def describe(self) -> str:
        """The counts in words, in one line."""
        total = self.trusted + self.candidate + self.failed
        counts = ", ".join(
            f"{name} {count} ({count / total:.1%})"
            for name, count in (("trusted", self.trusted), ("candidate", self.candidate), ("failed", self.failed))
        )
        return f"bands at {self.flag:.3g} and {self.halt:.3g} eV/Å: {counts}"


@dataclass(frozen=True, repr=False)
class Selection(Brief):
    """The frames chosen from a pool.

    Args:
        chosen: Chosen frames with their reasons, in the order of choice.
        n_pool: Number of frames in the pool, including those left out.
        near_duplicates: Number of frames that were not chosen because all their points are within a small share of the
            typical distance from training points or chosen ones.
        bands: Counts by readings; None without thresholds.
        strategy: Strategy of the choice.
        method: Fitted method between whose features distances were measured; empty if they were not.
        uncertainties: (n_pool,) readings of all frames, eV/Å; NaN for those left out.
        left_out: Index of each frame that cannot be read or evaluated, and why.
    """

    chosen: tuple[Chosen, ...]
    n_pool: int
    near_duplicates: int
    bands: Bands | None
    strategy: StrategyName
    method: str
    uncertainties: np.ndarray
    left_out: Mapping[int, str]

    @property
    def indices(self) -> np.ndarray:
        """(n_chosen,) indices in the pool, in the order of choice; the first k are the choice of k frames."""
        return np.array([one.frame for one in self.chosen], int)

    def frames(self, pool: Frames | Sequence[str | os.PathLike[str]]) -> list[Atoms]:
        """Copies of the chosen frames, in the order of choice, to be labelled.

        They carry `selected_rank` (from 1), `source_index` in the pool, `selected_uncertainty`, and, where they were
        measured, `selected_distance` and `selected_atom` in info. Results of a calculator are removed, because those of
        the potential would be taken for labels. Labels such as `REF_energy` stay.

        Args:
            pool: The pool that was chosen from; files are read again.
        """
        wanted = {one.frame: (rank, one) for rank, one in enumerate(self.chosen, 1)}
        copies = {}
        for index, atoms in source_of(pool).read():
            if index in wanted and isinstance(atoms, Atoms):
                rank, one = wanted[index]
                info = {"selected_rank": rank, "source_index": index, "selected_uncertainty": one.uncertainty}
                info |= {"selected_distance": one.distance} if self.method else {}
                info |= {} if one.atom is None else {"selected_atom": one.atom}
                copies[rank] = annotated(atoms, {}, **info)
                drop_uncertainties(copies[rank])
        return [copies[rank] for rank in sorted(copies)]


def select(
    pool: Frames | Sequence[str | os.PathLike[str]],
    n: int,
    *,
    calculator: BaseCalculator | Predictor | Backend | str,
    uncertainty_model: UncertaintyModel | str | os.PathLike[str] | None = None,
    train: Frames | None = None,
    strategy: StrategyName = "lcmd",
    method: str | None = None,
    per: Per = "structure",
    cumulants: int = 1,
    flag: float | str | Criterion | None = None,
    halt: float | str | Criterion | None = None,
    duplicates: float = 1e-3,
    noise: float = 1e-6,
    batch_atoms: int | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Selection:
    """Chooses the frames of a pool that are worth labelling.

    Distances are measured between the features of a fitted method. A structure has the mean over its atoms: with their
    sum the largest structures, whose labels cost most, would be the farthest. A mean hides what is new in one atom of
    many. To find that, compare environments: each atom is a point, only atoms of one element are compared, and a frame
    is chosen for one of its atoms.

    Frames of the pool that cannot be read or evaluated are left out, with a warning that names them.

    The pool is evaluated once. A file is read frame by frame; only the features of each structure or each atom stay in
    memory, 4 bytes per number. To the time of the evaluation comes one proportional to (n + training points) times
    points of the pool: hours, if the environments of 10^5 frames are compared with those of 10^5 others.

    Args:
        pool: Frames without labels: path, paths or list.
        n: Number of frames to choose; the first k of them are the choice of k frames. If the pool has fewer, these are
            the candidates, with a warning.
        calculator: An `UncertainCalculator` or `Predictor`; or, with an uncertainty model, a bare potential: an ASE
            calculator of MACE, orb or SevenNet, or a SPEC string.
        uncertainty_model: What `fit` made for a bare potential: a model or the path of its file.
        train: Frames that are labelled already: path or list. Frames close to them are not chosen.
        strategy: `"lcmd"`, dense regions count as much as outliers; `"maxdet"`, largest determinant of the posterior
            covariance; `"maxdist"`, the farthest, outliers first; `"top"`, the most uncertain; `"bands"`, at random
            between `flag` and `halt`, as DP-GEN does; `"random"`.
        method: Fitted method whose features are compared; by default the first one that has features, such as `"bll"`.
        per: What is compared: `"structure"` or `"environment"`.
        cumulants: Highest order of the cumulants over its atoms that a structure has: 1 for the mean alone, up to 4;
            see `ase_uq.numerics.cumulants.cumulants`.
        flag: Threshold, in eV/Å or as a criterion: frames with a lower reading are trusted and never chosen.
        halt: Threshold likewise: frames with this reading or a higher one have failed and are never chosen.
        duplicates: Share of the typical distance between frames of the pool below which two frames are the same. A
            rotated copy is recognised if the potential's features are invariant, as those of MACE but not of orb.
        noise: σ² of `"maxdet"`, relative to the mean square of the features.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        seed: Seed of the random draws of `"bands"` and `"random"`.
        progress: Whether to show progress bars.

    Raises:
        ValueError: The uncertainty model has no method with features, or an option
            is out of range.
        InputError: No frame of the pool can be read and evaluated, or a training frame cannot.
        TypeError: A bare potential has no uncertainty model, or one is given for a calculator that already has one.
    """
    check_options(n, strategy, flag, halt)
    _check_points(per, cumulants, duplicates)
    predictor = as_predictor(calculator, uncertainty_model)
    name, head = _measuring(predictor.uncertainty_model, method)
    levels = levels_of(predictor.uncertainty_model, flag, halt)
    scan = Scan(predictor, head, per, batch_atoms, cumulants)
    points, readings, numbers, left_out = scan.pool(pool, "pool" if progress else "")
    n = capped(n, len(numbers), bool(left_out))
    known = None if train is None else scan.train(train, "train" if progress else "")
    bands, allowed = bands_of(readings, levels)
    unit = typical_distance(points)
    floor = max(duplicates * unit, resolution(points))
    rule = _strategy(strategy, points, known, readings, noise, seed)
    space = Space(points, known)
    picks = choose(space, n, rule, allowed=allowed, floor=floor)
    picks = list(progress_bar(picks, desc="select", total=n, unit="frame", show=progress, leave=False))
    taken = torch.zeros(points.n_candidates, dtype=torch.bool)
    taken[[pick.candidate for pick in picks]] = True
    near = int((~taken & allowed & (space.farthest_of_candidates() <= floor**2)).sum())
    if len(picks) < n:
        warnings.warn(_why_fewer(len(picks), n, near, bands), UQWarning, stacklevel=2)
    chosen = tuple(_chosen(pick, points, readings, numbers, unit or 1.0, strategy, per) for pick in picks)
    everywhere = np.full(len(numbers) + len(left_out), np.nan)
    everywhere[numbers] = readings
    return Selection(chosen, len(everywhere), near, bands, strategy, name, everywhere, left_out)


def check_options(
    n: int, strategy: str, flag: float | str | Criterion | None, halt: float | str | Criterion | None
) -> None:
    """Refuses a number of frames below 1, an unknown strategy, and bands without thresholds.

    Raises:
        ValueError: One of them was given.
    """
    if not n >= 1:
        raise ValueError(f"{n} frames were asked for; 1 or more was expected.")
    _check_choice("strategy", strategy, get_args(StrategyName))
    if strategy == "bands" and (flag is None or halt is None):
        raise ValueError("the strategy 'bands' chooses between two thresholds: give flag and halt.")


def _check_choice(option: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ValueError(f"{option} must be one of {', '.join(map(repr, choices))}, not {value!r}.")


def _check_points(per: str, order: int, duplicates: float) -> None:
    _check_choice("per", per, get_args(Per))
    if not 0 <= duplicates < 1:
        raise ValueError(f"duplicates must be a share of the typical distance from 0 to below 1, not {duplicates!r}.")
    if not 1 <= order <= HIGHEST:
        raise ValueError(f"cumulants is {order}; the highest order of 1 (means alone) to {HIGHEST} was expected.")
    if order > 1 and per == "environment":
        raise ValueError(f"cumulants is {order}, but an environment is one atom: they are for structures.")


def capped(n: int, n_candidates: int, some_left_out: bool) -> int:
    """The number of frames that can be chosen, with a warning if it is smaller than `n`."""
    if n_candidates < n:
        which = " that can be evaluated" if some_left_out else ""
        warnings.warn(
            f"{n} frames were asked for and the pool has {n_candidates}{which}: no more than these can be chosen.",
            UQWarning,
            stacklevel=3,
        )
    return min(n, n_candidates)


def _measuring(model: UncertaintyModel, method: str | None) -> tuple[str, Head]:
    """The name of the method whose features are compared, and the method."""
    featured = [name for name, fitted in model.methods.items() if fitted.head.measures]
    if method is not None and method not in model.methods:
        raise ValueError(f"the uncertainty model has no method {method!r}. It has {', '.join(model.methods)}.")
    if method is not None and method not in featured:
        others = f"take {' or '.join(map(repr, featured))}" if featured else "fit 'bll' or 'kernel' as well"
        raise ValueError(f"the method {method!r} has no features to measure distances in: {others}.")
    if not featured:
        raise ValueError(
            f"none of the fitted methods, {', '.join(model.methods)}, has features to measure distances in: fit 'bll' "
            "or 'kernel' as well."
        )
    name = method or featured[0]
    return name, model.methods[name].head


def levels_of(
    model: UncertaintyModel, flag: float | str | Criterion | None, halt: float | str | Criterion | None
) -> tuple[float, float] | None:
    """The two thresholds, eV/Å; None if none was given.

    Raises:
        ValueError: They are in the wrong order, or the calibration data cannot support one.
    """
    if flag is None and halt is None:
        return None
    low = -np.inf if flag is None else float(model.threshold(flag))
    high = np.inf if halt is None else float(model.threshold(halt))
    check_order(low, high)
    return low, high


def bands_of(readings: np.ndarray, levels: tuple[float, float] | None) -> tuple[Bands | None, Tensor]:
    """Counts by two thresholds, None without them, and the (n_frames,) candidates."""
    if levels is None:
        return None, torch.ones(len(readings), dtype=torch.bool)
    trusted, candidate = readings < levels[0], (levels[0] <= readings) & (readings < levels[1])
    n_trusted, n_candidate = int(trusted.sum()), int(candidate.sum())
    bands = Bands(*levels, n_trusted, n_candidate, len(readings) - n_trusted - n_candidate)
    return bands, torch.from_numpy(candidate)


def _strategy(
    strategy: StrategyName, points: Points, train: Points | None, readings: np.ndarray, noise: float, seed: int
) -> Strategy:
    match strategy:
        case "lcmd":
            return LargestCluster()
        case "maxdist":
            return Farthest()
        case "maxdet":
            return Determinant(points, train, noise=noise)
        case _:
            return Highest(torch.from_numpy(scores_of(strategy, readings, seed)))


def scores_of(strategy: StrategyName, readings: np.ndarray, seed: int) -> np.ndarray:
    """(n_frames,) what a strategy that reads no features goes by, the highest first: readings, or a random order."""
    if strategy == "top":
        return np.where(np.isnan(readings), np.inf, readings)
    return -np.random.default_rng(seed).permutation(len(readings)).astype(float)


def reason_of(strategy: StrategyName) -> str:
    """Why a strategy that reads no features chooses a frame, in words."""
    return "most uncertain" if strategy == "top" else "drawn at random"


def _chosen(
    pick: Pick,
    points: Points,
    readings: np.ndarray,
    numbers: Sequence[int],
    unit: float,
    strategy: StrategyName,
    per: Per,
) -> Chosen:
    uncertainty = float(readings[pick.candidate])
    match pick.nearest:
        case None:
            where = ""
        case Known(trained=True, number=number):
            where = f"training frame {number}"
        case Known(number=number):
            where = f"frame {numbers[number]}"
    first = int((points.owner == pick.candidate).nonzero()[0])
    match strategy:
        case "top" | "bands" | "random":
            reason = reason_of(strategy)
        case "maxdet":
            reason = "largest variance left"
        case _ if not where:
            reason = "nothing like it is known"
        case "lcmd":
            reason = f"farthest around {where}, {pick.score:.0%} of what is left"
        case _:
            reason = f"farthest, nearest is {where}"
    return Chosen(
        frame=numbers[pick.candidate],
        atom=pick.point - first if per == "environment" else None,
        uncertainty=uncertainty,
        distance=pick.distance / unit,
        score=pick.score,
        reason=reason,
    )


def _why_fewer(n_chosen: int, n: int, near: int, bands: Bands | None) -> str:
    within = "" if bands is None else f" of the {bands.candidate} between {bands.flag:.3g} and {bands.halt:.3g} eV/Å"
    return (
        f"{n_chosen} of the {n} frames asked for were chosen: {near}{within} are near-duplicates of these or of "
        "training frames, and nothing else is left to choose."
    )
