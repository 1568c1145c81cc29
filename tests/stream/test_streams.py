"""Streams evaluate several items at a time, and hand them over in their order."""

import threading
import time
from collections.abc import Iterator

import pytest
import torch

from ase_uq.stream.streams import Streams, default_streams


@pytest.fixture(autouse=True)
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def test_several_run_at_a_time_and_come_in_their_order():
    together = threading.Barrier(2, timeout=30)  # breaks unless two jobs run at a time

    def job(item: int):
        return lambda: (together.wait(), item**2)[1]

    with Streams(2) as streams:
        assert list(streams.in_order(range(6), job)) == [(item, item**2) for item in range(6)]


def test_each_has_its_share_of_torchs_threads():
    with Streams(2) as streams:
        assert {found for _, found in streams.in_order(range(4), lambda _: torch.get_num_threads)} == {2}
        assert torch.get_num_threads() == 4
    found = []
    thread = threading.Thread(target=lambda: found.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert (torch.get_num_threads(), found) == (4, [4])


def test_without_threads_nothing_is_taken_ahead():
    taken = []

    def items() -> Iterator[int]:
        for item in range(3):
            taken.append(item)
            yield item

    def no_job(item: int) -> None:
        raise AssertionError("asked for a job that no thread could do")

    with Streams(1) as streams:
        for item, outcome in streams.in_order(items(), no_job):
            assert (taken[-1], outcome) == (item, None)


def test_an_item_without_a_job_comes_when_no_thread_is_at_work():
    begun, done = [], []

    def job(item: int):
        if item == 2:
            return None

        def work() -> int:
            begun.append(item)
            done.append(item)
            return item

        return work

    with Streams(2) as streams:
        for item, outcome in streams.in_order(range(5), job):
            assert outcome == (None if item == 2 else item)
            if item == 2:
                assert sorted(begun) == sorted(done) == [0, 1]
                assert torch.get_num_threads() == 4


def test_an_item_whose_job_gives_up_comes_when_no_thread_is_at_work():
    at_work = set()

    def job(item: int):
        def work() -> int | None:
            at_work.add(item)
            time.sleep(0.001 if item == 1 else 0.05)
            at_work.remove(item)
            return None if item == 1 else item

        return work

    with Streams(2) as streams:
        for item, outcome in streams.in_order(range(5), job):
            assert outcome == (None if item == 1 else item)
            if item == 1:
                assert not at_work
                assert torch.get_num_threads() == 4


def test_gradients_are_switched_as_where_the_streams_were_made():
    with torch.no_grad(), Streams(2) as streams:
        assert {found for _, found in streams.in_order(range(3), lambda _: torch.is_grad_enabled)} == {False}
    with Streams(2) as streams:
        assert {found for _, found in streams.in_order(range(3), lambda _: torch.is_grad_enabled)} == {True}


def test_an_error_is_raised_at_its_item():
    def job(item: int):
        return lambda: 1 // (2 - item)

    with Streams(2) as streams:
        outcomes = streams.in_order(range(9), job)
        assert [next(outcomes) for _ in range(2)] == [(0, 0), (1, 1)]
        with pytest.raises(ZeroDivisionError):
            next(outcomes)


def test_a_cpu_evaluates_up_to_four_at_a_time_and_other_devices_one():
    assert [default_streams(device) for device in ("cpu", "cuda")] == [4, 1]
    torch.set_num_threads(1)
    assert default_streams("cpu") == 1
    torch.set_num_threads(64)
    assert default_streams("cpu") == 4
