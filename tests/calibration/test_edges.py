"""Gamma: distance in units of the edge of the calibration data, element by element."""

import numpy as np
import pytest
import torch

from ase_uq.calibration import fit_edges


def calibration(seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(seed)
    numbers = np.array([1] * 2000 + [6] * 1000 + [8] * 10)
    return random.chisquare(3, size=len(numbers)) * np.where(numbers == 6, 5.0, 1.0), numbers


def test_edge_is_the_quantile_of_the_elements_own_atoms():
    distance, numbers = calibration()
    table = fit_edges(distance, numbers, frozenset({1, 6}))
    for z in (1, 6):
        assert float(table.edges[z]) == np.quantile(distance[numbers == z], 0.999)
    assert table.counts == {1: 2000, 6: 1000}
    assert table.inherited == ()


def test_one_calibration_atom_in_a_thousand_lies_beyond():
    distance, numbers = calibration()
    table = fit_edges(distance, numbers, frozenset({1, 6}))
    gamma = table.grade(torch.from_numpy(distance), torch.from_numpy(numbers))[:2000]
    assert int((gamma > 1).sum()) == 2


def test_rare_elements_inherit_the_widest_edge():
    distance, numbers = calibration()
    table = fit_edges(distance, numbers, frozenset({1, 6, 8}))
    assert table.inherited == (8,)
    assert float(table.edges[8]) == float(table.edges[6]) > float(table.edges[1])
    assert table.counts[8] == 10


def test_an_element_that_was_fitted_but_never_calibrated_inherits_too():
    distance, numbers = calibration()
    table = fit_edges(distance, numbers, frozenset({1, 6, 7}))
    assert table.counts[7] == 0
    assert table.inherited == (7,)
    assert float(table.edges[7]) == float(table.edges[6])


def test_without_any_frequent_element_all_atoms_share_one_edge():
    distance, numbers = calibration()
    few = slice(0, 40)
    table = fit_edges(distance[few], numbers[few], frozenset({1, 6}))
    assert table.inherited == (1, 6)
    assert float(table.edges[1]) == float(table.edges[6]) == np.quantile(distance[few], 0.999)


def test_an_element_that_was_calibrated_but_never_fitted_has_no_edge():
    distance, numbers = calibration()
    table = fit_edges(distance, numbers, frozenset({1}))
    assert table.elements == {1}
    assert bool(torch.isnan(table.edges[6]))


def test_gamma_of_an_unseen_element_is_infinite():
    table = fit_edges(*calibration(), frozenset({1, 6}))
    distance = torch.tensor([0.0, 2.0, float("inf")], dtype=torch.float64)
    gamma = table.grade(distance, torch.tensor([14, 14, 1]))
    assert gamma.tolist() == [float("inf")] * 3


def test_a_distance_that_is_nan_stays_nan():
    table = fit_edges(*calibration(), frozenset({1, 6}))
    gamma = table.grade(torch.tensor([float("nan"), 2.0]), torch.tensor([1, 14]))
    assert bool(gamma[0].isnan())
    assert float(gamma[1]) == float("inf")
    assert gamma.dtype == torch.float32


@pytest.mark.parametrize("z", [1, 6])
def test_gamma_is_the_ratio_to_the_edge(z: int):
    table = fit_edges(*calibration(), frozenset({1, 6}))
    distance = torch.tensor([0.0, float(table.edges[z]), 3 * float(table.edges[z])], dtype=torch.float64)
    torch.testing.assert_close(
        table.grade(distance, torch.full((3,), z)), torch.tensor([0.0, 1.0, 3.0], dtype=torch.float64)
    )
