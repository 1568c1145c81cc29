"""How much of what one potential sees of atoms another sees as well: reconstruction errors between their features.

    there, back = gfre("embedded:mace", "embedded:orb-direct", "frames.xyz")

Frames are dealt out to two halves. Maps are fitted on one half, their regularisation included, and judged on the other,
and the same the other way round, so that every atom is judged once, by a map that has not seen its frame. An error of 0
says that the second potential's features are a linear (GFRE) or smooth (LFRE) image of the first's, an error of 1 that
the first potential says nothing of them. It says nothing of how good either potential is.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ase_uq import metrics
from ase_uq.communicator import Serial
from ase_uq.diagnostics.features import LatentStream, Potential, as_latent
from ase_uq.display.progress import progress_bar
from ase_uq.display.representation import Brief
from ase_uq.errors import InputError
from ase_uq.io.frames import Frames
from ase_uq.io.source import Source
from ase_uq.numerics.hashing import random_bits, random_uniform
from ase_uq.numerics.local_reconstruction import local_errors
from ase_uq.numerics.moments import Moments
from ase_uq.numerics.reconstruction import LinearMap, fitted_map
from ase_uq.numerics.sample import RowSample

N_SAMPLED = 1000  # atoms of each half on which local errors are computed
N_NEIGHBOURS = 100  # more than most potentials have features that matter nearby
LABELS = 3  # columns before the features of a sample: frame, place of the atom in it, atomic number


class Interval(NamedTuple):
    """A number with its 95 % interval; NaN where there is none."""

    value: float
    low: float
    high: float


@dataclass(frozen=True, repr=False)
class PointwiseErrors(Brief):
    """How far each atom's features in one potential are from what another potential says of them.

    Args:
        frame: (n_atoms,) number of the frame of each atom.
        place: (n_atoms,) place of the atom in its frame.
        numbers: (n_atoms,) atomic numbers.
        errors: By (from, to): (n_atoms,) errors, as a share of the spread of the features of the second over all atoms.
        spreads: By potential: (n_atoms,) distances from the mean features of the atom's element, in the same unit. An
            error that is as large says that nothing but the element of the atom is known.
    """

    frame: np.ndarray
    place: np.ndarray
    numbers: np.ndarray
    errors: Mapping[tuple[str, str], np.ndarray]
    spreads: Mapping[str, np.ndarray]

    def beyond_elements(self, pair: tuple[str, str], chosen: np.ndarray | slice = slice(None)) -> float:
        """Root mean square error of some atoms, as a share of that of someone who knows no more than their elements."""
        squares = [np.mean(values[chosen].astype(float) ** 2) for values in (self.errors[pair], self.spreads[pair[1]])]
        return float(np.sqrt(squares[0] / squares[1])) if squares[1] else math.nan


def gfre(
    first: Potential,
    second: Potential,
    frames: Frames,
    *,
    block: int = 1,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> tuple[float, float]:
    """The global feature reconstruction error: what a linear map of one potential's features misses of the other's.

    The number of atoms does not matter: only moments of the features are kept. `Pair`, `LinearMap` and `fitted_map` of
    `ase_uq.numerics.reconstruction` have the formula and its source.

    Args:
        first: An ASE calculator, a SPEC, a backend, or `Latent` for other features than all, such as one layer.
        second: The other one.
        frames: Path or list.
        block: Number of consecutive frames that stay in one half: about as many as are correlated.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        progress: Whether to show a progress bar.

    Returns:
        The error of the second from the first, and of the first from the second.

    Raises:
        InputError: The potentials have no element in common, one of them cannot evaluate a frame, its features do not
            vary, or there are fewer atoms than features.
        ValueError: `block` is below 1.
    """
    gathered = gather(_stream(first, second, frames, batch_atoms, progress), block)
    return gathered.gfre("first", "second"), gathered.gfre("second", "first")


def gfrd(
    first: Potential,
    second: Potential,
    frames: Frames,
    *,
    block: int = 1,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> tuple[float, float]:
    """The global feature reconstruction distortion: how far the best linear map is from one that only turns features.

    Arguments, order of results and errors are those of `gfre`.
    """
    gathered = gather(_stream(first, second, frames, batch_atoms, progress), block)
    return gathered.gfrd("first", "second"), gathered.gfrd("second", "first")


def lfre(
    first: Potential,
    second: Potential,
    frames: Frames,
    *,
    n_neighbours: int = N_NEIGHBOURS,
    n_sampled: int = N_SAMPLED,
    block: int = 1,
    n_bootstrap: int = 200,
    seed: int = 0,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> tuple[Interval, Interval]:
    """The local feature reconstruction error: what maps miss that are fitted around each atom on its neighbours alone.

    Neighbours are those in the features of the potential from which the other is reconstructed.

    Args:
        first: As in `gfre`.
        second: As in `gfre`.
        frames: As in `gfre`.
        n_neighbours: Number of neighbours of an atom, from the other half.
        n_sampled: Largest number of atoms of each half; more are sampled.
        block: As in `gfre`; of the intervals too.
        n_bootstrap: Number of resamples of frames for the intervals; 0 for none.
        seed: Seed of the resamples.
        batch_atoms: As in `gfre`.
        progress: As in `gfre`.

    Returns:
        The error of the second from the first, and of the first from the second, with 95 % intervals.

    Raises:
        InputError: As in `gfre`; also if there are fewer atoms in a half than neighbours.
        ValueError: A number is out of range.
    """
    gathered = gather(_stream(first, second, frames, batch_atoms, progress), block, n_sampled)
    how = {"n_neighbours": n_neighbours, "n_bootstrap": n_bootstrap, "seed": seed}
    return gathered.lfre("first", "second", **how), gathered.lfre("second", "first", **how)


def pointwise_errors(
    first: Potential,
    second: Potential,
    frames: Frames,
    *,
    block: int = 1,
    batch_atoms: int | None = None,
    progress: bool = True,
) -> PointwiseErrors:
    """The error of each atom, whose root mean square is the `gfre`; the keys are ("first", "second") and the reverse.

    Arguments and errors are those of `gfre`. Features that do not fit into half a gigabyte are computed twice.
    """
    stream = _stream(first, second, frames, batch_atoms, progress, keep=True)
    return gather(stream, block).pointwise(stream, [("first", "second"), ("second", "first")])


@dataclass(frozen=True)
class Gathered:
    """What one reading of the frames leaves of the features of several potentials.

    Args:
        columns: Columns of each potential in joint rows.
        quarters: Moments of the joint rows; the first two are one half of the frames, the last two the other.
        centres: (d,) mean of the joint rows of each element, by atomic number.
        samples: (n, 3 + d) of each half: frame, place and atomic number of atoms, and their joint rows.
        n_frames: Number of frames.
        block: Number of consecutive frames that stay in one half.
    """

    columns: Mapping[str, slice]
    quarters: tuple[Moments, Moments, Moments, Moments]
    centres: Mapping[int, Tensor]
    samples: tuple[Tensor, Tensor]
    n_frames: int
    block: int

    @property
    def halves(self) -> tuple[Moments, Moments]:
        """Moments of both halves."""
        one, two, three, four = self.quarters
        return one + two, three + four

    def maps(self, source: str, target: str) -> tuple[LinearMap, LinearMap]:
        """The map that was fitted on each half.

        Raises:
            InputError: Features are the same for all atoms.
        """
        folds = (self.quarters[:2], self.quarters[2:])
        try:
            first, second = (fitted_map(pair, self.columns[source], self.columns[target]) for pair in folds)  # pyright: ignore
        except ValueError as error:
            raise InputError(f"{source} to {target}: {error}") from error
        return first, second

    def gfre(self, source: str, target: str) -> float:
        """GFRE of each half by the map of the other half, together."""
        return self._rms(map_.mean_square(half) for map_, half in self._judged(source, target))

    def gfrd(self, source: str, target: str) -> float:
        """GFRD, likewise."""
        return self._rms(map_.mean_square_distortion(half) for map_, half in self._judged(source, target))

    def lfre(self, source: str, target: str, *, n_neighbours: int, n_bootstrap: int, seed: int) -> Interval:
        """LFRE of the sampled atoms of each half by those of the other half, together.

        Raises:
            InputError: A half has fewer sampled atoms than neighbours.
            ValueError: `n_neighbours` is below 4, or `n_bootstrap` negative.
        """
        fewest = min(map(len, self.samples))
        if fewest < n_neighbours:
            raise InputError(
                f"n_neighbours is {n_neighbours}, but a half of the frames has only {fewest} sampled atoms. Give more "
                "frames, sample more atoms, or use fewer neighbours."
            )
        if n_bootstrap < 0:
            raise ValueError(f"n_bootstrap is {n_bootstrap}; a number of resamples was expected, 0 for no interval.")
        rows = [sample[:, LABELS:] for sample in self.samples]
        columns = self.columns[source], self.columns[target]
        errors = [local_errors(rows[1 - half], rows[half], *columns, n_neighbours) for half in (0, 1)]
        squares = torch.cat(errors).square().cpu().numpy()
        frame = torch.cat([sample[:, 0] for sample in self.samples]).cpu().numpy().astype(int)
        value = float(np.sqrt(squares.mean()))
        if not n_bootstrap or len(np.unique(frame)) <= self.block:
            return Interval(value, math.nan, math.nan)
        low, high = metrics.bootstrap(
            lambda chosen: squares[chosen].mean() ** 0.5, frame, block=self.block, n_resamples=n_bootstrap, seed=seed
        )
        return Interval(value, float(low), float(high))

    def pointwise(self, stream: LatentStream, pairs: Iterable[tuple[str, str]], title: str = "") -> PointwiseErrors:
        """The error of each atom, by the map of the half that it is not in.

        Args:
            stream: The features, which are read again.
            pairs: Source and target of each map.
            title: Title of the progress bar; empty for none.
        """
        maps = {pair: self.maps(*pair) for pair in pairs}
        scales = {pair[1]: fitted[0].pair.target_scale for pair, fitted in maps.items()}
        labels: list[Tensor] = []
        errors: dict[tuple[str, str], list[np.ndarray]] = {pair: [] for pair in maps}
        spreads: dict[str, list[np.ndarray]] = {name: [] for name in scales}
        with progress_bar(total=self.n_frames, desc=title, unit="frame", show=bool(title), leave=False) as bar:
            for chunk in stream:
                half = quarter_of(chunk.labels[:, 0], self.block) // 2
                for pair, fitted in maps.items():
                    error = torch.where(half == 0, fitted[1].errors(chunk.rows), fitted[0].errors(chunk.rows))
                    errors[pair].append(error.float().cpu().numpy())
                apart = chunk.rows - torch.stack([self.centres[z] for z in chunk.elements.tolist()])
                for name, scale in scales.items():
                    spread = apart[:, self.columns[name]].norm(dim=1) / scale
                    spreads[name].append(spread.float().cpu().numpy())
                labels.append(torch.cat([chunk.labels, chunk.elements[:, None]], 1).cpu())
                bar.update(int(chunk.labels[-1, 0] - chunk.labels[0, 0]) + 1)
        frame, place, numbers = torch.cat(labels).T.numpy()
        of_pairs = {pair: np.concatenate(each) for pair, each in errors.items()}
        return PointwiseErrors(
            frame, place, numbers, of_pairs, {name: np.concatenate(each) for name, each in spreads.items()}
        )

    def _judged(self, source: str, target: str) -> Iterable[tuple[LinearMap, Moments]]:
        return zip(self.maps(source, target), self.halves[::-1], strict=True)

    def _rms(self, mean_squares: Iterable[float]) -> float:
        counts = [half.count for half in self.halves[::-1]]
        return (sum(n * square for n, square in zip(counts, mean_squares, strict=True)) / sum(counts)) ** 0.5


def gather(stream: LatentStream, block: int, n_sampled: int = 0) -> Gathered:
    """Reads all features once.

    Args:
        stream: The features.
        block: Number of consecutive frames that stay in one half.
        n_sampled: Largest number of atoms of each half that are kept.

    Raises:
        InputError: There are too few frames, or fewer atoms than features; or as the stream.
        ValueError: `block` is below 1, or `n_sampled` negative.
    """
    if block < 1 or n_sampled < 0:
        raise ValueError(f"block is {block}, at least 1 was expected; n_sampled is {n_sampled}, at least 0.")
    quarters: list[Moments | None] = [None] * 4
    sums: dict[int, tuple[int, Tensor]] = {}
    samples = [RowSample(n_sampled), RowSample(n_sampled)]
    n_frames = 0
    for chunk in stream:
        quarter = quarter_of(chunk.labels[:, 0], block)
        for number in quarter.unique().tolist():
            found, before = Moments.of(chunk.rows[quarter == number]), quarters[number]
            quarters[number] = found if before is None else before + found
        for z in chunk.elements.unique().tolist():
            rows = chunk.rows[chunk.elements == z]
            count, total = sums.get(z, (0, torch.zeros_like(rows[0])))
            sums[z] = count + len(rows), total + rows.sum(0)
        if n_sampled:
            rows = torch.cat([chunk.labels, chunk.elements[:, None], chunk.rows], 1)
            for half, sample in enumerate(samples):
                sample.add(chunk.labels[quarter // 2 == half], rows[quarter // 2 == half])
        n_frames = int(chunk.labels[-1, 0]) + 1
    one, two, three, four = quarters
    if one is None or two is None or three is None or four is None:
        raise InputError(
            f"there are {n_frames} frames; with blocks of {block}, at least {4 * block} are needed: each half is split "
            "again to find how much regularisation its map needs."
        )
    found = [sample.finish(Serial()) for sample in samples]
    empty = one.mean.new_zeros(0, LABELS + len(one.mean))
    kept = tuple(empty if rows is None else rows for rows in found)
    centres = {z: total / count for z, (count, total) in sums.items()}
    gathered = Gathered(stream.columns, (one, two, three, four), centres, (kept[0], kept[1]), n_frames, block)
    _check_atoms(gathered)
    return gathered


def quarter_of(frames: Tensor, block: int) -> Tensor:
    """(n,) numbers of frames → (n,) 0 to 3: of any four consecutive blocks, each quarter gets one, at random."""
    blocks = frames // block
    four = blocks[:, None] // 4 * 4 + torch.arange(4, device=frames.device)
    return (random_uniform(random_bits(four)) < random_uniform(random_bits(blocks))[:, None]).sum(1)


def _check_atoms(gathered: Gathered) -> None:
    fewest = int(min(half.count for half in gathered.halves))
    for name, columns in gathered.columns.items():
        needed = columns.stop - columns.start + 1
        if fewest < needed:
            total = sum(half.count for half in gathered.halves)
            frames = math.ceil(2 * needed * gathered.n_frames / total)
            raise InputError(
                f"{name} has {needed - 1} features, but a half of the frames has only {fewest} atoms. Each half needs "
                f"at least {needed}: give about {frames} frames like these {gathered.n_frames}."
            )


def _stream(
    first: Potential,
    second: Potential,
    frames: Frames,
    batch_atoms: int | None,
    progress: bool,
    keep: bool = False,
) -> LatentStream:
    latents = {"first": as_latent(first), "second": as_latent(second)}
    title = "features" if progress else ""
    return LatentStream(latents, Source(frames), batch_atoms=batch_atoms, title=title, keep=keep)
