"""Batch selection against brute force, dense determinants and scikit-matter."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from ase_uq.selection import strategies as selection
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
    nearest_of,
    typical_distance,
)


def random_rows(n: int, width: int = 5, seed: int = 0) -> Tensor:
    rows = torch.randn(n, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows * torch.logspace(0, -1, width, dtype=torch.float64)


def picks_of(rows: Tensor, n: int, rule: Strategy, train: Tensor | None = None, **options) -> list[Pick]:
    space = Space(Points.single(rows), None if train is None else Points.single(train))
    return list(choose(space, n, rule, **options))


def numbers_of(picks: list[Pick]) -> list[int]:
    return [pick.candidate for pick in picks]


def brute_force_lcmd(pool: np.ndarray, n: int, train: np.ndarray) -> list[int]:
    """From the definition, everything anew for every choice."""
    chosen: list[int] = []
    for _ in range(n):
        centres = np.concatenate([train, pool[chosen]])
        if not len(centres):
            chosen.append(int(np.argmax((pool**2).sum(1))))
            continue
        squares = ((pool[:, None] - centres[None]) ** 2).sum(2)
        nearest, cluster = squares.min(1), squares.argmin(1)
        sums = [nearest[cluster == k].sum() for k in range(len(centres))]
        inside = np.where(cluster == int(np.argmax(sums)), nearest, -1.0)
        inside[chosen] = -1.0
        chosen.append(int(inside.argmax()))
    return chosen


class TestLargestCluster:
    @pytest.mark.parametrize("n_train", [0, 1, 12])
    @pytest.mark.parametrize("seed", range(5))
    def test_it_is_what_the_definition_says(self, n_train: int, seed: int):
        pool, train = random_rows(60, seed=seed), random_rows(n_train, seed=seed + 100)
        found = picks_of(pool, 25, LargestCluster(), train if n_train else None)
        assert numbers_of(found) == brute_force_lcmd(pool.numpy(), 25, train.numpy())

    def test_a_crowd_comes_before_an_outlier_which_farthest_points_begin_with(self):
        crowd = torch.stack([torch.linspace(1.0, 2.0, 50, dtype=torch.float64), torch.zeros(50)], 1)
        pool = torch.cat([torch.tensor([[0.0, 3.0]]), crowd]).double()
        train = torch.tensor([[0.0, 0.0], [0.0, 0.5]], dtype=torch.float64)
        (first,) = picks_of(pool, 1, LargestCluster(), train)
        assert first.candidate == 50
        assert first.nearest == Known(0, trained=True)
        assert first.distance == pytest.approx(2.0)
        sums = float((crowd**2).sum()), 2.5**2
        assert first.score == pytest.approx(sums[0] / sum(sums))
        assert numbers_of(picks_of(pool, 1, Farthest(), train)) == [0]

    def test_what_was_chosen_becomes_a_centre(self):
        pool = torch.tensor([[10.0], [9.0], [1.0]], dtype=torch.float64)
        _, _, last = picks_of(pool, 3, LargestCluster(), torch.zeros(1, 1))
        assert (last.candidate, last.distance, last.nearest) == (1, 1.0, Known(0, trained=False))


class TestFarthest:
    @pytest.mark.parametrize("seed", range(3))
    def test_it_is_the_farthest_point_sampling_of_scikit_matter(self, seed: int):
        skmatter = pytest.importorskip("skmatter.sample_selection")
        pool = random_rows(80, seed=seed)
        start = int(pool.square().sum(1).argmax())
        oracle = skmatter.FPS(n_to_select=30, initialize=start).fit(pool.numpy())
        assert numbers_of(picks_of(pool, 30, Farthest())) == oracle.selected_idx_.tolist()

    @pytest.mark.parametrize("seed", range(3))
    def test_each_is_the_farthest_from_all_before(self, seed: int):
        pool, train = random_rows(50, seed=seed), random_rows(7, seed=seed + 9)
        known = train
        for pick in picks_of(pool, 20, Farthest(), train):
            distances = (pool[:, None] - known[None]).norm(dim=2).amin(1)
            assert pick.candidate == int(distances.argmax())
            assert pick.distance == pick.score == pytest.approx(float(distances.max()), rel=1e-12)
            known = torch.cat([known, pool[pick.candidate][None]])


class TestDeterminant:
    @pytest.mark.parametrize("n_train", [0, 4, 30])
    def test_each_makes_the_determinant_of_the_posterior_covariance_largest(self, n_train: int):
        pool, train = random_rows(40), random_rows(n_train, seed=1)
        points, known = Points.single(pool), Points.single(train) if n_train else None
        rule = Determinant(points, known, noise=1e-3)
        everything = torch.cat([train, pool])
        noise = 1e-3 * float(everything.square().sum(1).mean())
        # Kernel form: condition the joint covariance on the training rows.
        cross, among = pool @ train.T, train @ train.T + noise * torch.eye(n_train, dtype=torch.float64)
        posterior = pool @ pool.T - cross @ torch.linalg.solve(among, cross.T) + noise * torch.eye(40).double()
        chosen: list[int] = []
        picks = list(choose(Space(points, known), 12, rule))
        for pick in picks:
            logs = torch.full((40,), -torch.inf, dtype=torch.float64)
            for j in set(range(40)) - set(chosen):
                block = [*chosen, j]
                logs[j] = torch.linalg.slogdet(posterior[block][:, block]).logabsdet
            assert pick.candidate == int(logs.argmax())
            chosen.append(pick.candidate)
        product = float(np.sum(np.log([pick.score for pick in picks])))
        expected = float(torch.linalg.slogdet(posterior[chosen][:, chosen]).logabsdet)
        assert product == pytest.approx(expected, rel=1e-8)

    def test_training_rows_are_as_if_they_had_been_chosen_first(self):
        pool, train = random_rows(30), random_rows(6, seed=3)
        given = Determinant(Points.single(pool), Points.single(train), noise=1e-4)
        together = Points.single(torch.cat([pool, train]))
        rule = Determinant(together, noise=1e-4)
        space = Space(together)
        for number in range(30, 36):
            space.add(number)
        allowed = torch.arange(36) < 30
        expected = list(choose(space, 10, rule, allowed=allowed))
        found = list(choose(Space(Points.single(pool)), 10, given))
        assert numbers_of(found) == numbers_of(expected)
        assert [p.score for p in found] == pytest.approx([p.score for p in expected], rel=1e-6)

    def test_pivots_fall(self):
        rows = random_rows(40)
        scores = [pick.score for pick in picks_of(rows, 30, Determinant(Points.single(rows)))]
        assert scores == sorted(scores, reverse=True)

    def test_directions_without_variance_end_it(self):
        """With so little noise three directions hold three choices; the rest is known up to rounding."""
        rows = torch.zeros(20, 5, dtype=torch.float64)
        rows[:, :3] = random_rows(20, 3)
        assert len(picks_of(rows, 10, Determinant(Points.single(rows), noise=1e-15))) == 3

    def test_rows_without_any_variance_are_never_chosen(self):
        rows = torch.zeros(4, 2, dtype=torch.float64)
        rows[2] = 1.0
        assert numbers_of(picks_of(rows, 4, Determinant(Points.single(rows)))) == [2]

    def test_noise_is_above_zero(self):
        with pytest.raises(ValueError, match=r"the noise is 0\.0; a number above 0 was expected"):
            Determinant(Points.single(random_rows(3)), noise=0.0)


def test_highest_scores_come_first_and_ties_in_order():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0, torch.inf])
    assert numbers_of(picks_of(random_rows(5), 4, Highest(scores))) == [4, 1, 3, 2]


RULES = {
    "lcmd": lambda points, train: LargestCluster(),
    "maxdist": lambda points, train: Farthest(),
    "maxdet": lambda points, train: Determinant(points, train),
    "highest": lambda points, train: Highest(torch.arange(points.n_candidates) % 17),
}


@pytest.fixture(params=RULES)
def rule(request: pytest.FixtureRequest):
    return RULES[request.param]


class TestEveryRule:
    def test_none_is_chosen_twice_and_few_are_the_first_of_many(self, rule):
        points = Points.single(random_rows(30))
        many = numbers_of(list(choose(Space(points), 30, rule(points, None))))
        assert sorted(many) == list(range(30))
        assert numbers_of(list(choose(Space(points), 8, rule(points, None)))) == many[:8]

    @pytest.mark.parametrize("name", ["lcmd", "maxdist", "maxdet"])
    def test_rotated_features_and_another_order_give_the_same_choice(self, name: str):
        """K6."""
        rows, train = random_rows(50), random_rows(5, seed=1)
        turn = torch.linalg.qr(random_rows(5, seed=2)).Q
        order = torch.randperm(50, generator=torch.Generator().manual_seed(3))
        expected = None
        for pool, known in ((rows, train), (rows @ turn, train @ turn), (rows[order], train)):
            points, own = Points.single(pool), Points.single(known)
            found = numbers_of(list(choose(Space(points, own), 15, RULES[name](points, own))))
            expected = expected or found
            assert (order[found].tolist() if pool is not rows and known is train else found) == expected

    def test_copies_are_not_chosen_twice(self, rule):
        """K7: a floor above their distance leaves the copies, and what is in the training set, out."""
        rows = random_rows(10)
        pool = torch.cat([rows, rows, rows + 1e-7])
        train = rows[:3]
        points, known = Points.single(pool), Points.single(train)
        found = numbers_of(list(choose(Space(points, known), 30, rule(points, known), floor=1e-4)))
        assert sorted(number % 10 for number in found) == list(range(3, 10))

    def test_ties_go_to_the_first(self):
        rows = torch.tensor([[0.5], [-1.0], [1.0], [-1.0]], dtype=torch.float64)
        for rule in (LargestCluster(), Farthest(), Determinant(Points.single(rows))):
            assert numbers_of(picks_of(rows, 1, rule, torch.zeros(1, 1))) == [1]

    def test_only_the_allowed_are_chosen(self, rule):
        points = Points.single(random_rows(20))
        allowed = torch.arange(20) % 3 == 0
        found = numbers_of(list(choose(Space(points), 20, rule(points, None), allowed=allowed)))
        assert sorted(found) == [0, 3, 6, 9, 12, 15, 18]

    def test_nothing_allowed_is_nothing_chosen(self, rule):
        points = Points.single(random_rows(5))
        assert not list(choose(Space(points), 5, rule(points, None), allowed=torch.zeros(5, dtype=torch.bool)))

    def test_chunks_change_nothing(self, rule, monkeypatch: pytest.MonkeyPatch):
        points, known = Points.single(random_rows(60)), Points.single(random_rows(20, seed=1))
        expected = list(choose(Space(points, known), 20, rule(points, known)))
        monkeypatch.setattr(selection, "_CHUNK", 35)  # one row of the pool beside the training rows, seven of width 5
        found = list(choose(Space(points, known), 20, rule(points, known)))
        assert numbers_of(found) == numbers_of(expected)
        for name in ("score", "distance"):
            assert [getattr(p, name) for p in found] == pytest.approx([getattr(p, name) for p in expected], rel=1e-9)

    def test_single_precision_rows_are_measured_in_double(self, rule):
        rows = random_rows(40).float()
        points, exact = Points.single(rows), Points.single(rows.double())
        found, expected = (list(choose(Space(p), 20, rule(p, None))) for p in (points, exact))
        assert found == expected

    @pytest.mark.parametrize("name", ["lcmd", "maxdist", "maxdet"])
    def test_kinds_are_apart(self, name: str):
        """Points of another kind may lie anywhere: each kind is chosen as if it were alone."""
        rule, rows = RULES[name], random_rows(40)
        kind = torch.arange(40) % 2
        points = Points(rows, torch.arange(40), kind)
        found = numbers_of(list(choose(Space(points), 40, rule(points, None))))
        for k in (0, 1):
            own = torch.nonzero(kind == k)[:, 0]
            alone = Points.single(rows[own])
            lonely = list(choose(Space(alone), 20, _noise_of_all(rule, alone, points)))
            expected = own[numbers_of(lonely)].tolist()
            assert [number for number in found if number % 2 == k] == expected


def _noise_of_all(rule, alone: Points, points: Points) -> Strategy:
    made = rule(alone, None)
    if isinstance(made, Determinant):
        made.noise = 1e-6 * float(points.rows.square().sum(1).mean())
    return made


class TestEnvironments:
    """Candidates of several points."""

    @pytest.fixture
    def points(self) -> Points:
        rows = torch.tensor([[0.0], [5.0], [0.1], [4.0], [0.2], [0.3]], dtype=torch.float64)
        return Points(rows, torch.tensor([0, 0, 1, 1, 2, 2]), torch.ones(6, dtype=torch.long))

    def test_a_candidate_is_chosen_for_one_point_and_brings_all(self, points: Points):
        train = Points(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
        first, second, third = choose(Space(points, train), 5, Farthest(), floor=0.01)
        assert (first.candidate, first.point, first.distance) == (0, 1, 5.0)
        assert (second.candidate, second.point, second.distance) == (1, 3, 1.0)
        assert (third.candidate, third.point) == (2, 5)
        assert third.nearest == Known(1, trained=False)

    def test_a_candidate_is_a_near_duplicate_only_if_all_its_points_are(self, points: Points):
        train = Points(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
        assert numbers_of(list(choose(Space(points, train), 5, Farthest(), floor=0.35))) == [0, 1]

    def test_a_kind_that_the_training_set_lacks_comes_first(self, points: Points):
        kind = torch.tensor([1, 1, 1, 1, 1, 9])
        train = Points(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.ones(1, dtype=torch.long))
        apart = Points(points.rows, points.owner, kind)
        for rule in (LargestCluster(), Farthest()):
            first, second = list(choose(Space(apart, train), 2, rule))
            assert (first.candidate, first.distance, first.score, first.nearest) == (2, np.inf, np.inf, None)
            assert second.candidate == 0

    def test_training_points_of_a_kind_that_no_candidate_has_are_no_matter(self, points: Points):
        train = Points(torch.zeros(1, 1), torch.zeros(1, dtype=torch.long), torch.full((1,), 7))
        (first,) = choose(Space(points, train), 1, LargestCluster())
        assert (first.candidate, first.nearest) == (0, None)

    def test_variance_is_taken_by_every_point_of_a_candidate(self, points: Points):
        rows = torch.tensor([[2.0, 0.0], [0.0, 1.9], [0.0, 1.95], [0.5, 0.5]], dtype=torch.float64)
        pool = Points(rows, torch.tensor([0, 0, 1, 2]), torch.zeros(4, dtype=torch.long))
        rule = Determinant(pool, noise=1e-4)
        list(choose(Space(pool), 1, rule))
        rule._take([0, 1])
        noise = rule.noise
        taken = rows[:2]
        among = taken @ taken.T + noise * torch.eye(2).double()
        expected = rows.square().sum(1) - ((rows @ taken.T) @ torch.linalg.inv(among) * (rows @ taken.T)).sum(1)
        torch.testing.assert_close(rule.variance, expected, rtol=1e-9, atol=1e-12)


def test_small_distances_keep_their_digits_far_from_the_origin():
    centres = 1e6 + random_rows(40)
    squares, place = nearest_of(centres + 1e-4, centres)
    assert place.tolist() == list(range(40))
    np.testing.assert_allclose(squares, 5e-8, rtol=1e-5)


def test_the_typical_distance_is_the_median_within_kinds_without_copies():
    rows = torch.tensor([[0.0], [1.0], [1.0], [100.0], [103.0]], dtype=torch.float64)
    points = Points(rows, torch.arange(5), torch.tensor([1, 1, 1, 2, 2]))
    assert typical_distance(points) == 1.0  # of 1, 1 and 3
    assert typical_distance(Points.single(torch.ones(4, 2))) == 0.0


def test_memory_does_not_grow_with_the_number_of_pairs():
    """40 000 candidates and 2 000 training rows: all distances would be 640 MB."""
    code = """
import resource, torch
from ase_uq.selection.strategies import *
def peak(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
torch.cdist(torch.ones(30, 4), torch.ones(30, 4))
pool, train = Points.single(torch.randn(40_000, 16)), Points.single(torch.randn(2_000, 16))
before = peak()
assert len(list(choose(Space(pool, train), 5, LargestCluster()))) == 5
list(choose(Space(pool), 5, Determinant(pool, train)))
print(peak() - before)
"""
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(out.stdout) < 200
