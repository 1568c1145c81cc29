"""How much is evaluated together."""

import math

from ase_uq.stream.limits import BatchLimit


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
