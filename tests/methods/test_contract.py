"""The Bayesian last layer keeps the contract of a method, for conservative and for direct potentials."""

import pytest
import torch

from ase_uq.communicator import Communicator
from ase_uq.methods.bll import BLL
from ase_uq.testing.methods import MethodContract, on_ranks


class TestBLL(MethodContract):
    # Standardised features with a ridge of 1e-4 have a condition number of about 1e5.
    tolerance = 1e-10

    def make_method(self):
        return BLL(ridge=1e-4)


class TestBLLDefault(MethodContract):
    # The ridge of 1e-9 makes a condition number of 1e10: digits of directions that no training frame explored are
    # lost to rounding, and the random test structures look there.
    tolerance = 1e-5

    def make_method(self):
        return BLL()


class TestBLLLastLayer(TestBLL):
    def make_method(self):
        return BLL(features="last_layer", ridge=1e-4)


class TestBLLDirect(TestBLL):
    direct = True


def test_threads_stand_for_ranks():
    def run(ranks: Communicator) -> tuple[int, int, list[float]]:
        return ranks.rank, ranks.size, ranks.sum({"x": torch.tensor([1.0, ranks.rank])})["x"].tolist()

    assert on_ranks(3, run) == [(rank, 3, [3.0, 3.0]) for rank in range(3)]


def test_an_error_on_one_rank_ends_all():
    def run(ranks: Communicator) -> None:
        if ranks.rank == 1:
            raise ZeroDivisionError("rank one failed")
        ranks.sum({"x": torch.zeros(1)})

    with pytest.raises(ZeroDivisionError, match="rank one failed"):
        on_ranks(3, run)


def test_ranks_that_disagree_are_found():
    with pytest.raises(ValueError, match="different statistics"):
        on_ranks(2, lambda ranks: ranks.sum({"x": torch.zeros(ranks.rank + 1)}))
