"""Streaming moments and solves."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ase_uq.communicator import Communicator, Serial
from ase_uq.numerics.linalg import JITTER_LADDER, cholesky, whitener
from ase_uq.numerics.moments import Moments, reduced
from ase_uq.testing.methods import on_ranks


def rows_of(seed: int, count: int = 60, width: int = 4, offset: float = 0.0) -> Tensor:
    return torch.randn(count, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + offset


def assert_same(found: Moments, expected: Moments, tolerance: float = 1e-10) -> None:
    assert found.count == expected.count
    torch.testing.assert_close(found.mean, expected.mean, rtol=tolerance, atol=tolerance)
    largest = float(expected.scatter.abs().max())
    torch.testing.assert_close(found.scatter, expected.scatter, rtol=0, atol=tolerance * max(largest, 1e-300))


class TestMoments:
    @given(seed=st.integers(0, 1000), cuts=st.lists(st.integers(0, 60), max_size=8), order=st.randoms())
    @settings(max_examples=40, deadline=None)
    def test_merged_in_any_pieces_and_order_they_are_the_covariance(self, seed: int, cuts: list[int], order):
        rows = rows_of(seed)
        edges = [0, *sorted(cuts), 60]
        pieces = [rows[a:b] for a, b in itertools.pairwise(edges)]  # some are empty
        order.shuffle(pieces)
        merged = Moments.empty(4, torch.device("cpu"))
        for piece in pieces:
            merged = merged + Moments.of(piece)
        assert merged.count == 60
        np.testing.assert_allclose(merged.mean, rows.mean(0), atol=1e-13)
        np.testing.assert_allclose(merged.scatter / 60, np.cov(rows.numpy().T, bias=True), atol=1e-10)
        np.testing.assert_allclose(merged.about_zero(), rows.T @ rows, atol=1e-10)

    def test_a_huge_common_part_costs_no_digits(self):
        """Spread 1 on a mean of 1e6: a plain sum of squares, of order 6e13, would keep three digits of it."""
        rows = rows_of(0, count=600, offset=1e6)
        merged = Moments.empty(4, torch.device("cpu"))
        for piece in rows.split(7):
            merged = merged + Moments.of(piece)
        exact = np.cov((rows - 1e6).numpy().T, bias=True)  # the subtraction is exact
        np.testing.assert_allclose(merged.scatter / 600, exact, atol=1e-8)
        plain = (rows.T @ rows) / 600 - torch.outer(rows.mean(0), rows.mean(0))
        assert np.abs(plain.numpy() - exact).max() > 1e-6

    def test_single_precision_rows_are_summed_in_double(self):
        rows = rows_of(0).float()
        assert Moments.of(rows).scatter.dtype == torch.float64
        assert_same(Moments.of(rows), Moments.of(rows.double()), 1e-15)

    def test_no_rows_change_nothing(self):
        full, none = Moments.of(rows_of(0)), Moments.empty(4, torch.device("cpu"))
        assert_same(full + none, full, 0)
        assert_same(none + full, full, 0)
        assert (none + none).count == 0

    @pytest.mark.parametrize("size", [1, 2, 7])
    def test_ranks_sum_to_the_moments_of_all_rows(self, size: int):
        rows = rows_of(3, offset=100.0)
        # Unequal shards; the last of seven ranks has none.
        cuts = {1: [0, 60], 2: [0, 13, 60], 7: [0, 1, 5, 20, 21, 59, 60, 60]}[size]

        def run(ranks: Communicator) -> Moments:
            own = rows[cuts[ranks.rank] : cuts[ranks.rank + 1]]
            return Moments.of(own).reduced(ranks)

        for found in on_ranks(size, run):
            assert_same(found, Moments.of(rows))

    def test_a_rank_that_never_saw_a_row_takes_part(self):
        rows = rows_of(3)

        def run(ranks: Communicator) -> Moments | None:
            return reduced(None if ranks.rank == 1 else Moments.of(rows[ranks.rank :: 2]), ranks)

        whole = Moments.of(rows[0::2]) + Moments.of(rows[2::2])
        for found in on_ranks(3, run):
            assert found is not None
            assert_same(found, whole)

    def test_no_rows_anywhere_are_none(self):
        assert reduced(None, Serial()) is None
        assert reduced(Moments.empty(4, torch.device("cpu")), Serial()) is None
        assert on_ranks(2, lambda ranks: reduced(None, ranks)) == [None, None]


class TestSolves:
    @given(seed=st.integers(0, 1000))
    @settings(max_examples=20, deadline=None)
    def test_whitener_squares_to_the_inverse(self, seed: int):
        rows = rows_of(seed)
        precision = rows.T @ rows + torch.eye(4, dtype=torch.float64)
        root, jitter = whitener(precision)
        at = rows_of(seed + 1)
        expected = torch.einsum("id,de,ie->i", at, torch.linalg.inv(precision), at)
        torch.testing.assert_close((at @ root).square().sum(1), expected, rtol=1e-10, atol=0)
        assert jitter == 0
        assert root.is_contiguous()  # as safetensors wants it

    def test_a_definite_matrix_takes_no_jitter(self):
        matrix = torch.tensor([[4.0, 2.0], [2.0, 3.0]], dtype=torch.float64)
        factor, jitter = cholesky(matrix)
        assert jitter == 0
        torch.testing.assert_close(factor @ factor.T, matrix)

    def test_only_the_symmetric_part_counts(self):
        matrix = torch.tensor([[4.0, 3.0], [1.0, 3.0]], dtype=torch.float64)
        factor, _ = cholesky(matrix)
        torch.testing.assert_close(factor @ factor.T, (matrix + matrix.T) / 2)

    @pytest.mark.parametrize("rung", range(1, len(JITTER_LADDER)))
    def test_the_first_jitter_that_is_enough_is_taken_and_declared(self, rung: int):
        # Smallest eigenvalue -0.5 of the step, largest 2: the mean diagonal, which the jitter is relative to, is 1.
        shortfall = 0.5 * JITTER_LADDER[rung]
        matrix = torch.diag(torch.tensor([2.0, -shortfall], dtype=torch.float64))
        factor, jitter = cholesky(matrix)
        assert jitter == JITTER_LADDER[rung]
        scale = float(matrix.diagonal().mean())
        torch.testing.assert_close(factor @ factor.T, matrix + jitter * scale * torch.eye(2, dtype=torch.float64))

    @pytest.mark.parametrize("entry", [-1.0, float("nan"), float("inf")])
    def test_a_matrix_beyond_jitter_is_refused(self, entry: float):
        matrix = torch.diag(torch.tensor([1.0, entry], dtype=torch.float64))
        with pytest.raises(ValueError, match=r"2 x 2 matrix is not positive definite .* jitter of 1e-06"):
            cholesky(matrix)
