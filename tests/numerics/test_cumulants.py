"""Cumulants are those of scipy's moments, and have the laws of cumulants."""

import numpy as np
import pytest
import torch
from scipy.stats import moment

from ase_uq.numerics.cumulants import cumulants


def grouped(sizes: tuple[int, ...], width: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    counts = torch.tensor(sizes)
    rows = torch.from_numpy(np.random.default_rng(seed).gamma(2.0, size=(sum(sizes), width)))
    return rows, torch.repeat_interleave(counts), counts


def of_one(rows: np.ndarray, order: int = 4) -> np.ndarray:
    """(order, d) cumulants of one group."""
    group = torch.zeros(len(rows), dtype=torch.long)
    found = cumulants(torch.from_numpy(rows), group, torch.tensor([len(rows)]), order)
    return found.numpy().reshape(order, -1)


def power(roots: np.ndarray) -> np.ndarray:
    """The cumulants themselves."""
    orders = np.arange(1, len(roots) + 1)[:, None]
    return np.sign(roots) * np.abs(roots) ** orders


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_they_are_scipys_moments_of_each_group(order: int):
    rows, group, counts = grouped((5, 1, 12))
    found = cumulants(rows, group, counts, order).numpy().reshape(3, order, 3)
    for number in range(3):
        mine = rows[group == number].numpy()
        second, third, fourth = (moment(mine, k) for k in (2, 3, 4))
        kappa = fourth - 3 * second**2
        expected = [mine.mean(0), np.sqrt(second), np.cbrt(third), np.sign(kappa) * np.abs(kappa) ** 0.25]
        np.testing.assert_allclose(found[number], np.array(expected)[:order], atol=1e-6)


def test_those_of_an_independent_sum_add_up():
    rng = np.random.default_rng(0)
    one, other = rng.gamma(1.0, size=(7, 2)), rng.normal(size=(5, 2)) ** 3
    every = (one[:, None] + other).reshape(-1, 2)
    np.testing.assert_allclose(power(of_one(every)), power(of_one(one)) + power(of_one(other)), rtol=1e-10)


def test_of_a_normal_sample_the_third_and_fourth_vanish():
    third, fourth = power(of_one(np.random.default_rng(0).normal(size=(200_000, 1))))[2:]
    assert abs(third[0]) < 0.03
    assert abs(fourth[0]) < 0.06


def test_order_and_repetition_of_the_rows_do_not_matter():
    rows = np.random.default_rng(0).gamma(2.0, size=(9, 4))
    np.testing.assert_allclose(of_one(np.tile(rows[::-1], (8, 1))), of_one(rows), rtol=1e-9)


def test_they_scale_as_the_rows_and_only_the_mean_moves():
    rows = np.random.default_rng(0).gamma(2.0, size=(9, 4))
    np.testing.assert_allclose(
        of_one(-3 * rows) * [[-1], [1], [-1], [1]], 3 * of_one(rows) * [[1], [1], [1], [1]], rtol=1e-9
    )
    np.testing.assert_allclose(of_one(rows + 5)[1:], of_one(rows)[1:], rtol=1e-8)


@pytest.mark.parametrize("order", [0, 5])
def test_other_orders_are_refused(order: int):
    with pytest.raises(ValueError, match=rf"order of the cumulants is {order}; 1 \(means\) to 4"):
        cumulants(*grouped((3,)), order)
