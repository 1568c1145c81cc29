"""Batches made beside the device: the same ones whoever makes them, in order, whatever happens to the helpers."""

import itertools
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase import Atoms
from ase.build import bulk, molecule
from ase.io import write
from ase.neighborlist import neighbor_list
from loky import wrap_non_picklable_objects

from ase_uq.backends import load_backend
from ase_uq.backends.base import Collator
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.source import Item, Source, Unreadable
from ase_uq.stream.limits import BatchLimit
from ase_uq.stream.preparation import Preparation, Prepared, chunks_of, count_edges, prepare
from ase_uq.testing.methods import labelled_frames

ELEMENTS = frozenset({1, 6, 8})
WATER = molecule("H2O")


def collator(build: Callable[[Sequence[Atoms]], Any]) -> Collator:
    """Worker processes cannot import a test file: what is sent to them holds its own code."""
    return Collator(ELEMENTS, (), wrap_non_picklable_objects(build, keep_wrapper=False))


def naming() -> Collator:
    """Gives the number of the process that collates."""
    return collator(lambda frames: os.getpid())


def is_there(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True


def slowly(atoms: Atoms) -> Iterator[tuple[int, Item]]:
    """The same frame again and again, at a pace that leaves the processor to the process that is starting."""
    for number in itertools.count():
        yield number, atoms
        time.sleep(0.02)


class AtOnce:
    """Stands for worker processes that have started; what they do, this process does."""

    def __init__(self, n_workers: int, **_: Any) -> None:
        pass

    def submit(self, work: Callable[..., Any], *arguments: Any) -> Future:
        future = Future()
        try:
            future.set_result(work(*arguments))
        except MemoryError as error:
            future.set_exception(error)
        return future

    def shutdown(self, **_: bool) -> None:
        pass


class TestWorkers:
    def stream(self, batches: list[Prepared], enough: int, atoms: Atoms = WATER) -> Iterator[tuple[int, Item]]:
        """Frames until so many batches came from another process."""
        return itertools.takewhile(lambda _: sum(batch.data is not None for batch in batches) < enough, slowly(atoms))

    def test_they_collate_once_they_have_started_in_order_without_calculators_and_not_what_cannot_be_sent(self):
        atoms, unsendable = WATER.copy(), WATER.copy()
        atoms.calc = load_backend("toy:").calculator
        atoms.calc.unsendable = threading.Lock()
        unsendable.info["lock"] = threading.Lock()
        batches: list[Prepared] = []  # grows batch by batch

        def items() -> Iterator[tuple[int, Item]]:
            yield from self.stream(batches, 5, atoms)
            for number in range(10**6, 10**6 + 4):
                yield number, unsendable

        preparation = Preparation(items(), BatchLimit(6), 5.0, naming(), n_workers=1)
        with preparation, pytest.warns(UQWarning, match="going on without worker processes, with the same results"):
            batches.extend(preparation)
        *numbers, one, two, three, four = (n for batch in batches for n in batch.numbers)
        assert numbers == list(range(len(numbers)))
        assert [one, two, three, four] == list(range(10**6, 10**6 + 4))
        assert batches[0].data is None, "the device does not wait for processes to start"
        sent = [batch for batch in batches if batch.data is not None]
        assert len(sent) >= 5
        assert len({batch.data for batch in sent} - {os.getpid()}) == len({batch.data for batch in sent}) == 1
        assert sent[-1].frames[0].calc is None

    def run_until_it_complains(self, build: Callable[[Sequence[Atoms]], Any]) -> tuple[list[Prepared], str]:
        """All batches of such a run, and what it said."""

        def complaints() -> list[str]:
            return [str(one.message) for one in caught if one.category is UQWarning]

        items = itertools.takewhile(lambda _: not complaints(), slowly(WATER))
        with (
            warnings.catch_warnings(record=True) as caught,
            Preparation(items, BatchLimit(6), 5.0, collator(build), n_workers=1) as preparation,
        ):
            warnings.simplefilter("always")
            batches = list(preparation)
        (complaint,) = complaints()
        assert all(batch.data is None for batch in batches)
        numbers = [n for batch in batches for n in batch.numbers]
        assert numbers == list(range(len(numbers)))
        return batches, complaint

    def test_should_one_die_the_thread_goes_on_alone(self):
        survivor = os.getpid()

        def deadly(_: Sequence[Atoms]) -> None:
            if os.getpid() != survivor:
                os.kill(os.getpid(), signal.SIGKILL)

        batches, complaint = self.run_until_it_complains(deadly)
        assert batches
        assert complaint.startswith("going on without worker processes, with the same results (")

    def test_an_error_without_a_message_is_told(self, monkeypatch: pytest.MonkeyPatch):
        def wordless(_: Sequence[Atoms]) -> None:
            raise MemoryError

        monkeypatch.setattr("ase_uq.stream.preparation.ProcessPoolExecutor", AtOnce)
        _, complaint = self.run_until_it_complains(wordless)
        assert complaint == "going on without worker processes, with the same results (MemoryError: )."

    def test_they_do_not_outlive_a_killed_run(self):
        script = """
import os
import time
from itertools import count
from ase import Atoms
from ase_uq.backends.base import Collator
from ase_uq.stream.preparation import Preparation
from ase_uq.stream.limits import (BatchLimit)
items = ((number, Atoms("H")) for number in count())
collator = Collator(frozenset({1}), (), lambda frames: os.getpid())
for batch in Preparation(items, BatchLimit(1), 5.0, collator, n_workers=1):
    time.sleep(0.02)
    if batch.data is not None:
        print(batch.data, flush=True)
"""
        run = subprocess.Popen([sys.executable, "-W", "ignore", "-c", script], stdout=subprocess.PIPE, text=True)
        with run:
            assert run.stdout is not None
            worker = int(run.stdout.readline())
            assert is_there(worker)
            run.kill()
        deadline = time.monotonic() + 60
        while is_there(worker) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not is_there(worker)

    @pytest.mark.parametrize(
        "error", [InputError("no"), AssertionError(), IndexError("list index"), RuntimeError("no")]
    )
    def test_a_structure_at_which_the_package_fails_is_left_to_the_potential(self, error: Exception):
        def build(_: Sequence[Atoms]) -> None:
            raise error

        (batch,) = prepare([(0, WATER)], 100, 1e6, 5.0, Collator(ELEMENTS, (), build))
        assert (batch.numbers, batch.data) == ([0], None)


class TestChunks:
    @pytest.mark.parametrize("most", [1, 9, 40, 10**6])
    def test_are_the_frames_in_order_and_no_larger_than_told(self, tmp_path: Path, most: int):
        frames = labelled_frames(12, seed=3)
        write(tmp_path / "in.xyz", frames)
        chunks = list(chunks_of(Source(tmp_path / "in.xyz").unparsed(), most))
        assert [number for chunk in chunks for number, _ in chunk] == list(range(12))
        for chunk in chunks:
            assert len(chunk) == 1 or sum(len(frames[number]) for number, _ in chunk) <= most
        assert (len(chunks) == 1) == (most == 10**6)

    @pytest.mark.parametrize("name", ["in.xyz", "in.traj", "XDATCAR"])
    def test_parsed_anywhere_they_are_the_frames(self, tmp_path: Path, name: str):
        frames = [bulk("Si", cubic=True).repeat((1, 1, n)) for n in (1, 1, 1)]
        for seed, atoms in enumerate(frames):
            atoms.rattle(0.1, seed=seed)
        write(tmp_path / name, frames)
        source = Source(tmp_path / name)
        (chunk,) = chunks_of(source.unparsed(), 100)
        (batch,) = prepare(chunk, 100, 1e9, 5.0)
        assert [n for n, _ in source.read()] == batch.numbers == [0, 1, 2]
        for found, atoms in zip(batch.frames, frames, strict=True):
            np.testing.assert_allclose(found.positions, atoms.positions, atol=1e-6)

    def test_frames_without_atoms_fill_a_chunk_too(self):
        chunks = chunks_of(((n, Unreadable("torn")) for n in range(100)), 30)
        assert [len(chunk) for chunk in chunks] == [30, 30, 30, 10]


class TestPrepare:
    def test_what_the_collator_refuses_is_left_to_the_potential(self):
        good, bad = WATER, molecule("NH3")
        (batch,) = prepare([(0, good), (1, bad)], 100, 1e9, 5.0, naming())
        assert (batch.numbers, batch.data) == ([0, 1], None)
        (batch,) = prepare([(0, good)], 100, 1e9, 5.0, naming())
        assert batch.data == os.getpid()

    def test_dense_structures_stand_in_smaller_batches(self):
        dense = bulk("C", "diamond", a=1.6, cubic=True)
        one = count_edges(dense, 5.0)
        batches = prepare([(n, dense) for n in range(6)], 1e9, 2.5 * one, 5.0)
        assert [batch.numbers for batch in batches] == [[0, 1], [2, 3], [4, 5]]
        assert batches[0].n_edges == 2 * one

    def test_unreadable_frames_are_handed_on_with_their_reason(self):
        (batch,) = prepare([(3, Unreadable("torn")), (4, WATER)], 100, 1e9, 5.0)
        assert (batch.unreadable, batch.numbers, batch.n_atoms) == ([(3, "torn")], [4], 3)


@pytest.mark.parametrize(
    ("atoms", "exact"),
    [
        (molecule("CH3CH2OH"), True),
        (Atoms("H"), True),
        (bulk("C").repeat(5), False),
        (Atoms("Ar300", np.random.default_rng(0).uniform(0, 9, (300, 3))), True),
        (bulk("Si"), False),
    ],
    ids=["molecule", "atom", "cell", "cluster", "primitive cell"],
)
def test_edges_are_counted_as_a_neighbour_list_would(atoms: Atoms, exact: bool):
    expected = len(neighbor_list("i", atoms, 5.0))
    assert count_edges(atoms, 5.0) == pytest.approx(expected, rel=0 if exact else 0.3)
