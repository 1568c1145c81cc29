"""How much is evaluated together."""

import inspect
import math

import pytest
from ase import Atoms

from ase_uq import evaluate, fit, score, select
from ase_uq.backends import load_backend
from ase_uq.diagnostics.latent import frame_features
from ase_uq.io.source import Source
from ase_uq.report.page import write_report
from ase_uq.stream import limits
from ase_uq.stream.limits import BatchLimit, default_batch_atoms
from ase_uq.stream.passes import Pass, passes


def test_a_batch_is_limited_by_its_atoms_and_by_its_edges():
    limit = BatchLimit(100, 1000)
    assert limit.fits(100, 1000)
    assert not limit.fits(101, 10)
    assert not limit.fits(10, 1001)
    assert BatchLimit(10).fits(10, 600)


def test_what_did_not_fit_halves_the_next_batches():
    limit = BatchLimit(100, 1000)
    limit.halve(40, 200)  # the last batch of a file may be smaller than the limit
    assert (limit.n_atoms, limit.n_edges) == (20, 200)
    limit.halve(20, 10)
    assert limit.n_atoms == 10


def after(limit: BatchLimit, capacity: float, n_batches: int) -> list[bool]:
    """Whether batches as large as the limit fitted, on a device that holds `capacity` atoms."""
    fitted = []
    for _ in range(n_batches):
        fitted.append(limit.n_atoms <= capacity)
        if fitted[-1]:
            limit.count_success()
        else:
            limit.halve(limit.n_atoms, 0)
    return fitted


def test_it_grows_back_without_running_into_the_same_wall_each_time():
    limit = BatchLimit(1000)
    fitted = after(limit, 400, 1000)
    assert 200 < limit.n_atoms <= 400
    assert fitted[:3] == [False, False, True]
    assert fitted.count(False) < 0.01 * len(fitted)


def test_it_comes_back_to_the_start_when_the_device_is_free_again():
    limit = BatchLimit(1000)
    after(limit, 100, 100)
    assert limit.n_atoms <= 100
    assert all(after(limit, math.inf, 1000))
    assert limit.n_atoms == 1000
    after(limit, math.inf, 1000)
    assert limit.n_atoms == 1000


def test_the_default_is_that_of_the_device_and_stands_in_one_place():
    assert default_batch_atoms("cpu") < default_batch_atoms("cuda") == default_batch_atoms("mps")
    for function in (fit, evaluate, score, select, write_report, frame_features):
        assert inspect.signature(function).parameters["batch_atoms"].default is None, function.__name__


def test_batches_are_as_large_as_the_device_likes(monkeypatch: pytest.MonkeyPatch):
    frames = [Atoms("CO", [(0, 0, 0), (0, 0, 1.2)]) for _ in range(20)]
    monkeypatch.setattr(limits, "_BATCH_ATOMS", {"cpu": 10})
    for given, expected in ((None, 5), (40, 20), (2, 1)):
        sizes = passes(load_backend("toy:"), Source(frames), lambda p: p.n_frames, batch_atoms=given, forces=False)
        assert {event.value for event in sizes if isinstance(event, Pass)} == {expected}
