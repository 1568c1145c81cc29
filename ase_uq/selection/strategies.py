"""Batch selection: which of many candidates are worth labelling, given their features and the points that are known.

    lcmd      the farthest point of the cluster with the largest sum of squared distances; centres are the training
              points and what was chosen before (LCMD-TP of Holzmüller et al. 2023)
    maxdet    greedily the largest determinant of the posterior covariance: pivots of its Cholesky factorisation
    maxdist   the point farthest from all centres (farthest point sampling)
    highest   the highest score, which the caller gives: an uncertainty, or random numbers

All of them leave out near-duplicates of training and chosen points. A candidate is one point, or several
(the atoms of a frame): it is chosen for one of its points, and from then on all of them are known. Points of different
kinds are infinitely far apart.

Memory holds the rows and one chunk; time is O(points · (training points + chosen points) · width). Sums and distances
are in double precision, whatever the precision of the rows. Ties go to the first point.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

_CHUNK = 2**22  # numbers in memory at once: 32 MiB
_SAMPLE = 1000  # largest number of points of a kind that the typical distance is taken from
_ROUNDING = 1e-6  # share of the size of the rows, which may be float32, below which a distance is rounding error
_EXHAUSTED = 1e-12  # share of the largest variance below which the rest of a variance is rounding error


@dataclass(frozen=True)
class Points:
    """Points in a space of features, and the candidate that each belongs to.

    Args:
        rows: (n_points, width) features, float32 or float64.
        owner: (n_points,) candidate that a point belongs to, from 0; every candidate has a point.
        kind: (n_points,) kind of each point; points of different kinds are not compared.
    """

    rows: Tensor
    owner: Tensor
    kind: Tensor

    @classmethod
    def single(cls, rows: Tensor) -> "Points":
        """One point per candidate, all of one kind."""
        numbers = torch.arange(len(rows))
        return cls(rows, numbers, torch.zeros_like(numbers))

    @property
    def n_candidates(self) -> int:
        """Number of candidates."""
        return int(self.owner.max()) + 1 if len(self.owner) else 0


@dataclass(frozen=True)
class Known:
    """The candidate that a known point belongs to.

    Args:
        number: Number of the candidate.
        trained: Whether it is a training candidate; else it is one of the pool that was chosen before.
    """

    number: int
    trained: bool


@dataclass(frozen=True)
class Pick:
    """A candidate that was chosen.

    Args:
        candidate: Its number.
        point: The point it was chosen for.
        score: What the rule maximised: for `LargestCluster` the cluster's share of the sum of squared distances of all
            open points, for `Farthest` the distance, for `Determinant` the pivot, for `Highest` the given score;
            infinite for the first two if no point of its kind was known.
        distance: Distance of the point from the nearest known one; infinite if there was none.
        nearest: The candidate of that nearest point; None if there was none.
    """

    candidate: int
    point: int
    score: float
    distance: float
    nearest: Known | None


class Space:
    """Distances of all points from the nearest known ones, updated as points become known.

    Args:
        points: Points of the candidates.
        train: Points of the training candidates, which are known.

    Attributes:
        points: Points of the candidates.
        squares: (n_points,) squared distance to the nearest known point of the same kind; infinite without one.
        centre: (n_points,) number of that nearest point in the order in which points became known; -1 without one.
        n_centres: Number of known points.
        taken: Numbers of the candidates' points that are known, in the order in which they became known.
    """

    def __init__(self, points: Points, train: Points | None = None) -> None:
        self.points = points
        self.squares = torch.full((len(points.rows),), torch.inf, dtype=torch.float64)
        self.centre = torch.full((len(points.rows),), -1)
        self.n_centres = 0
        self.taken: list[int] = []
        self._known: list[Known] = []
        # Looked up once: to find the points of a kind again for every choice would cost as much as the distances.
        self._of_kind = {int(k): _where(points.kind == k) for k in points.kind.unique()}
        if train is not None:
            self._add(train.rows, train.kind, [Known(number, trained=True) for number in train.owner.tolist()])

    def add(self, candidate: int) -> None:
        """Makes the points of a candidate known."""
        numbers = _where(self.points.owner == candidate)
        known = [Known(candidate, trained=False)] * len(numbers)
        self._add(self.points.rows[numbers], self.points.kind[numbers], known)
        self.taken += numbers.tolist()

    def nearest(self, point: int) -> Known | None:
        """The candidate of the known point nearest to a point; None if there is none."""
        centre = int(self.centre[point])
        return None if centre < 0 else self._known[centre]

    def farthest_of_candidates(self) -> Tensor:
        """(n_candidates,) squared distance of each candidate's farthest point from the known points."""
        start = self.squares.new_zeros(self.points.n_candidates)
        return start.scatter_reduce(0, self.points.owner, self.squares, "amax")

    def _add(self, rows: Tensor, kinds: Tensor, known: list[Known]) -> None:
        for kind in kinds.unique().tolist():
            centres = _where(kinds == kind)
            if kind not in self._of_kind:
                continue
            for chunk in self._of_kind[kind].split(max(1, _CHUNK // max(rows.shape[1], len(centres)))):
                squares, place = nearest_of(self.points.rows[chunk], rows[centres])
                closer = squares < self.squares[chunk]
                self.squares[chunk[closer]] = squares[closer]
                self.centre[chunk[closer]] = self.n_centres + centres[place[closer]]
        self._known += known
        self.n_centres += len(rows)


class Strategy(ABC):
    """A rule that finds the next point."""

    @abstractmethod
    def best(self, space: Space, is_open: Tensor) -> tuple[int, float] | None:
        """The point to choose and its score; None if nothing is left to gain.

        Args:
            space: Points and their distances from the known ones.
            is_open: (n_points,) whether a point may be chosen; at least one may be.
        """


class LargestCluster(Strategy):
    """LCMD: the farthest point of the cluster with the largest sum of squared distances to its centre.

    A cluster holds the points that are nearer to one known point than to any other, so that a dense region counts as
    much as a few outliers. If nothing is known, the point of largest norm comes first, as in bmdal.
    """

    def best(self, space: Space, is_open: Tensor) -> tuple[int, float] | None:
        if (first := _first_of_its_kind(space, is_open)) is not None:
            return first, torch.inf
        squares = space.squares * is_open
        sums = squares.new_zeros(space.n_centres).index_add_(0, space.centre, squares)
        largest = int(sums.argmax())
        return _argmax(squares, is_open & (space.centre == largest)), float(sums[largest] / sums.sum())


class Farthest(Strategy):
    """MaxDist: the point farthest from all known ones; if nothing is known, the point of largest norm."""

    def best(self, space: Space, is_open: Tensor) -> tuple[int, float] | None:
        if (first := _first_of_its_kind(space, is_open)) is not None:
            return first, torch.inf
        point = _argmax(space.squares, is_open)
        return point, float(space.squares[point]) ** 0.5


class Highest(Strategy):
    """Top k: the candidates of highest score.

    Args:
        scores: (n_candidates,) scores without NaN.
    """

    def __init__(self, scores: Tensor) -> None:
        self._scores = scores.double()

    def best(self, space: Space, is_open: Tensor) -> tuple[int, float] | None:
        scores = self._scores[space.points.owner]
        point = _argmax(scores, is_open)
        return point, float(scores[point])


class Determinant(Strategy):
    """MaxDet: the largest pivot of the posterior covariance K + σ²I, so greedily the largest determinant.

    K = Φ S Φᵀ with S = σ² (Φ_TᵀΦ_T + σ²I)⁻¹ given the training points T. Taking a point φ is one step of a Cholesky
    factorisation, here of S, so that its columns need not be kept for all points:

        pivot = φ S φᵀ + σ²,    S ← S - (Sφᵀ)(Sφᵀ)ᵀ/pivot,    the variance of x falls by (x S φᵀ)²/pivot

    The product of the pivots is the determinant of the chosen block. Each kind has an S of its own.

    Args:
        points: Points of the candidates.
        train: Points of the training candidates.
        noise: σ² relative to the mean square of all rows.

    Raises:
        ValueError: The noise is not above 0.
    """

    def __init__(self, points: Points, train: Points | None = None, *, noise: float = 1e-6) -> None:
        if not noise > 0:
            raise ValueError(f"the noise is {noise!r}; a number above 0 was expected.")
        self._points = points
        self.noise = noise * _mean_square(points.rows if train is None else torch.cat([points.rows, train.rows]))
        self.variance = torch.zeros(len(points.rows), dtype=torch.float64)  # (n_points,) diagonal of K
        self._of_kind = {int(k): _where(points.kind == k) for k in points.kind.unique()}
        self._covariance = {}
        for kind, numbers in self._of_kind.items():
            covariance = self._prior(None if train is None else train.rows[train.kind == kind])
            self._covariance[kind] = covariance
            for chunk in self._chunks(numbers):
                rows = points.rows[chunk].double()
                self.variance[chunk] = (rows @ covariance * rows).sum(1)
        self._smallest = _EXHAUSTED * float(self.variance.max()) if len(self.variance) else 0.0
        self._n_taken = 0

    def best(self, space: Space, is_open: Tensor) -> tuple[int, float] | None:
        self._take(space.taken[self._n_taken :])
        point = _argmax(self.variance, is_open)
        variance = float(self.variance[point])
        return None if variance <= self._smallest else (point, variance + self.noise)

    def _take(self, numbers: Sequence[int]) -> None:
        self._n_taken += len(numbers)
        for number in numbers:
            kind = int(self._points.kind[number])
            covariance, row = self._covariance[kind], self._points.rows[number].double()
            column = covariance @ row
            pivot = float(row @ column) + self.noise
            for chunk in self._chunks(self._of_kind[kind]):
                self.variance[chunk] -= (self._points.rows[chunk].double() @ column).square() / pivot
            self._covariance[kind] = covariance - torch.outer(column, column) / pivot

    def _prior(self, train: Tensor | None) -> Tensor:
        eye = torch.eye(self._points.rows.shape[1], dtype=torch.float64)
        if train is None or not len(train):
            return eye
        gram = self.noise * eye
        for chunk in train.split(max(1, _CHUNK // train.shape[1])):
            gram += chunk.double().T @ chunk.double()
        return self.noise * torch.cholesky_inverse(torch.linalg.cholesky(gram))

    def _chunks(self, numbers: Tensor) -> Sequence[Tensor]:
        return numbers.split(max(1, _CHUNK // self._points.rows.shape[1]))


def choose(
    space: Space, n: int, rule: Strategy, *, allowed: Tensor | None = None, floor: float = 0.0
) -> Iterator[Pick]:
    """Chooses candidates one after the other; fewer than `n` if only near-duplicates are left, or nothing to gain.

    Args:
        space: Points of the candidates, and the points known at the start; it is changed in place.
        n: Largest number of candidates to choose.
        rule: Rule that finds the next point.
        allowed: (n_candidates,) whether a candidate may be chosen; all by default.
        floor: A candidate without a point farther than this from all known points is a near-duplicate.

    Yields:
        The chosen candidates, in the order of choice.
    """
    owner = space.points.owner
    remaining = torch.ones(space.points.n_candidates, dtype=torch.bool) if allowed is None else allowed.clone()
    for _ in range(n):
        is_open = (remaining & (space.farthest_of_candidates() > floor**2))[owner]
        best = rule.best(space, is_open) if bool(is_open.any()) else None
        if best is None:
            return
        point, score = best
        candidate = int(owner[point])
        pick = Pick(candidate, point, score, float(space.squares[point]) ** 0.5, space.nearest(point))
        remaining[candidate] = False
        space.add(candidate)
        yield pick


def typical_distance(points: Points) -> float:
    """Median distance between two points of the same kind, from an evenly spaced sample of them; 0 if all are alike."""
    distances_of_kinds = []
    for kind in points.kind.unique():
        numbers = _where(points.kind == kind)
        rows = points.rows[numbers[:: -(-len(numbers) // _SAMPLE)]].double()
        distances = torch.nn.functional.pdist(rows)
        distances_of_kinds.append(distances[distances > resolution(points)])
    distances = torch.cat(distances_of_kinds)
    return float(distances.median()) if len(distances) else 0.0


def resolution(points: Points) -> float:
    """Largest distance that rounding errors may give between equal points."""
    return _ROUNDING * _mean_square(points.rows) ** 0.5


def nearest_of(rows: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """(n,) squared distance of each row to the nearest centre, and (n,) index of that centre."""
    rows, centres = rows.double(), centres.double()
    if len(centres) == 1:
        place = torch.zeros(len(rows), dtype=torch.long)
    else:
        middle = centres.mean(0)
        place = torch.cdist(rows - middle, centres - middle).argmin(1)
    # cdist takes differences of large squares, which loses the digits of small distances.
    return (rows - centres[place]).square().sum(1), place


def _first_of_its_kind(space: Space, is_open: Tensor) -> int | None:
    """The open point of largest norm among those that have no known point of their kind; None if all have one."""
    alone = is_open & (space.centre < 0)
    if not bool(alone.any()):
        return None
    numbers = _where(alone)
    return int(numbers[space.points.rows[numbers].double().square().sum(1).argmax()])


def _argmax(values: Tensor, among: Tensor) -> int:
    """Index of the largest value among some of them; the first one if there are several."""
    numbers = _where(among)
    return int(numbers[values[numbers].argmax()])


def _where(mask: Tensor) -> Tensor:
    return torch.nonzero(mask)[:, 0]


def _mean_square(rows: Tensor) -> float:
    """Mean of ‖row‖²."""
    total = sum(float(chunk.double().square().sum()) for chunk in rows.split(max(1, _CHUNK // rows.shape[1])))
    return total / len(rows)
