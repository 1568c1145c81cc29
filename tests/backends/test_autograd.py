"""Flags of a potential's parameters, which threads share."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from ase_uq.backends._autograd import in_the_graph


@pytest.fixture
def parameters() -> list[torch.nn.Parameter]:
    return [torch.nn.Parameter(torch.zeros(2), requires_grad=flag) for flag in (False, True)]


def test_passes_that_change_no_flag_overlap():
    together = threading.Barrier(2, timeout=30)

    def run(_: int) -> int:
        with in_the_graph([]), in_the_graph([]):
            return together.wait()

    with ThreadPoolExecutor(2) as pool:
        assert sorted(pool.map(run, range(2))) == [0, 1]


def test_flags_are_set_and_restored(parameters: list[torch.nn.Parameter]):
    with in_the_graph(parameters), in_the_graph(parameters[:1]), in_the_graph([]):
        assert [one.requires_grad for one in parameters] == [True, True]
    assert [one.requires_grad for one in parameters] == [False, True]


@pytest.mark.parametrize("first_changes", [True, False])
def test_whoever_changes_flags_is_alone(parameters: list[torch.nn.Parameter], first_changes: bool):
    inside, leave, order = threading.Event(), threading.Event(), []

    def first() -> None:
        with in_the_graph(parameters if first_changes else []):
            inside.set()
            leave.wait(30)
            order.append("first left")

    def second() -> None:
        inside.wait(30)
        with in_the_graph([] if first_changes else parameters):
            order.append("second entered")

    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(first), pool.submit(second)]
        inside.wait(30)
        assert not jobs[1].done()
        leave.set()
        for job in jobs:
            job.result(30)
    assert order == ["first left", "second entered"]


def test_an_error_leaves_nothing_behind(parameters: list[torch.nn.Parameter]):
    for some in (parameters, []):
        with pytest.raises(ZeroDivisionError), in_the_graph(some):
            _ = 1 // 0
    assert [one.requires_grad for one in parameters] == [False, True]

    def enter() -> None:
        with in_the_graph(parameters):
            pass

    with ThreadPoolExecutor(1) as pool:
        pool.submit(enter).result(30)
