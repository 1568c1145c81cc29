"""Frames on their way to the device: parsed, counted, checked and collated beside it, in a thread or in processes."""

import os
import signal
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from threading import Thread
from typing import Any

import numpy as np
import torch
from ase import Atoms
from loky import ProcessPoolExecutor
from scipy.spatial import KDTree
from scipy.spatial.distance import pdist

from ase_uq.backends.base import Collator
from ase_uq.communicator import Communicator, Serial, shard
from ase_uq.errors import InputError, UQWarning
from ase_uq.io.source import Item, Unparsed, Unreadable
from ase_uq.stream.limits import BatchLimit

_Chunk = list[tuple[int, Item]]


@dataclass
class Prepared:
    """Frames to be evaluated together, and those among them that cannot be read.

    Args:
        numbers: Of the frames in the source.
        frames: Structures.
        unreadable: Number of each frame that could not be read, and why.
        n_atoms: Atoms of all frames.
        n_edges: About how many neighbours they have; see `count_edges`.
        data: What the collator made of the frames; None where that is left to the potential.
    """

    numbers: list[int] = field(default_factory=list)
    frames: list[Atoms] = field(default_factory=list)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    n_atoms: int = 0
    n_edges: float = 0.0
    data: Any = None


class Preparation:
    """Makes batches ahead of the device, in order; a context manager.

    A thread reads. It also parses and counts, until worker processes have started, which takes seconds; from then on
    they do, and collate as well. Should one of them die, the thread goes on alone.

    Args:
        items: Frames and their numbers, parsed or not.
        limit: How much is evaluated together.
        cutoff: Of the potential's neighbours, Å.
        collator: The potential's; None leaves collating to it.
        n_workers: Processes beside this one; 0 for none.
        communicator: Decides which chunks of the items are this rank's; one process by default.
    """

    def __init__(
        self,
        items: Iterator[tuple[int, Item]],
        limit: BatchLimit,
        cutoff: float,
        collator: Collator | None = None,
        n_workers: int = 0,
        communicator: Communicator | None = None,
    ) -> None:
        # Cut to the size of the start, however small batches become: all ranks must cut alike.
        self._chunks = shard(chunks_of(items, limit.n_atoms), communicator or Serial())
        self._limit, self._cutoff, self._collator, self._n_workers = limit, cutoff, collator, n_workers
        self._open = ExitStack()
        self._processes: ProcessPoolExecutor | None = None
        self._starting: list[Future] = []
        if n_workers:
            # No forks: the device's runtime and its threads do not survive them.
            self._processes = ProcessPoolExecutor(
                n_workers, initializer=_begin_worker, initargs=(os.getpid(),), env={"OMP_NUM_THREADS": "1"}
            )
            self._open.callback(self._processes.shutdown, wait=True, kill_workers=True)
            # What unpickles the collator has imported the potential's package.
            self._starting = [self._processes.submit(_started, collator) for _ in range(n_workers)]
        self._thread = ThreadPoolExecutor(1, "frames of ase_uq")
        self._open.callback(self._thread.shutdown, wait=True, cancel_futures=True)

    def __iter__(self) -> Iterator[Prepared]:
        ahead: deque[Future] = deque()
        while True:
            while len(ahead) < (2 * self._n_workers if self._has_started() else 1):
                ahead.append(self._thread.submit(self._next))
            chunk, work = ahead.popleft().result()
            # The next chunk is read while this one is prepared or evaluated.
            ahead.append(self._thread.submit(self._next))
            if chunk is None:
                return
            yield from self._outcome(chunk, work)

    def _has_started(self) -> bool:
        return self._processes is not None and all(future.done() for future in self._starting)

    def _next(self) -> tuple[_Chunk | None, "list[Prepared] | Future[list[Prepared]] | None"]:
        """The next chunk, and its batches or who is making them."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return None, None
        processes = self._processes  # the other thread may give them up at any time
        if processes is not None and self._has_started():
            try:
                return chunk, processes.submit(prepare, _portable(chunk), *self._how(), self._collator)
            except RuntimeError as error:  # the processes have broken down since
                self._go_on_alone(error)
        return chunk, prepare(chunk, *self._how())

    def _how(self) -> tuple[float, float, float]:
        return self._limit.n_atoms, self._limit.n_edges, self._cutoff

    def _outcome(self, chunk: _Chunk, work: Any) -> list[Prepared]:
        if not isinstance(work, Future):
            return work
        try:
            return work.result()
        except Exception as error:  # a process was killed, or frames hold what cannot be sent to one
            self._go_on_alone(error)
            return prepare(chunk, *self._how())

    def _go_on_alone(self, error: Exception) -> None:
        if self._processes is None:
            return
        self._processes = None
        warnings.warn(
            f"going on without worker processes, with the same results ({type(error).__name__}: "
            f"{' '.join(str(error).split())[:200]}).",
            UQWarning,
            stacklevel=2,
        )

    def __enter__(self) -> "Preparation":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()


def chunks_of(items: Iterable[tuple[int, Item]], n_atoms: float) -> Iterator[_Chunk]:
    """Consecutive items of at most so many atoms; a larger one stands alone."""
    chunk: _Chunk = []
    filled = 0
    for number, item in items:
        size = 0 if isinstance(item, Unreadable) else item.n_atoms if isinstance(item, Unparsed) else len(item)
        size = max(1, size)  # however many have no atoms, a chunk of them ends
        if chunk and filled + size > n_atoms:
            yield chunk
            chunk, filled = [], 0
        chunk.append((number, item))
        filled += size
    if chunk:
        yield chunk


def prepare(
    chunk: _Chunk, n_atoms: float, n_edges: float, cutoff: float, collator: Collator | None = None
) -> list[Prepared]:
    """Batches of a chunk: one, or more where its structures are dense.

    Args:
        chunk: Frames and their numbers.
        n_atoms: Most atoms of a batch.
        n_edges: Most edges of a batch.
        cutoff: Of the potential's neighbours, Å.
        collator: The potential's; None leaves collating to it, as do structures that it refuses.
    """
    batch = Prepared()
    batches = [batch]
    for number, item in chunk:
        atoms = item.parse() if isinstance(item, Unparsed) else item
        if isinstance(atoms, Unreadable):
            batch.unreadable.append((number, atoms.reason))
            continue
        count = count_edges(atoms, cutoff)
        if batch.frames and (batch.n_atoms + len(atoms) > n_atoms or batch.n_edges + count > n_edges):
            batch = Prepared()
            batches.append(batch)
        batch.numbers.append(number)
        batch.frames.append(atoms)
        batch.n_atoms += len(atoms)
        batch.n_edges += count
    if collator is not None:
        for batch in batches:
            batch.data = _collated(batch.frames, collator)
    return batches


def _collated(frames: Sequence[Atoms], collator: Collator) -> Any:
    try:
        return collator(frames) if frames else None
    except InputError:  # the potential will find out which one it is
        return None


def count_edges(atoms: Atoms, cutoff: float) -> float:
    """About how many neighbours closer than the cutoff (Å) all atoms have together, without a neighbour list.

    Exact without periodic boundaries; with them it is what the mean density of the cell gives, if that is more.
    """
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return 0.0  # the potential will refuse it
    if not np.isfinite(cutoff):
        return float(len(atoms)) ** 2
    if len(atoms) < 200:  # a tree takes longer to build
        n_open = 2.0 * np.count_nonzero(pdist(atoms.positions) < cutoff)
    else:
        tree = KDTree(atoms.positions)
        n_open = float(tree.count_neighbors(tree, cutoff)) - len(atoms)
    if not atoms.pbc.any():
        return n_open
    if np.linalg.matrix_rank(atoms.cell.array[atoms.pbc]) < atoms.pbc.sum():
        return n_open  # the potential will refuse it
    volume = abs(np.linalg.det(atoms.cell.complete().array))
    return max(n_open, len(atoms) ** 2 / max(volume, 1e-9) * 4 / 3 * np.pi * cutoff**3)


def _portable(chunk: _Chunk) -> _Chunk:
    """Without calculators, which may hold a potential."""
    return [(number, item.copy() if isinstance(item, Atoms) else item) for number, item in chunk]


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    torch.set_num_threads(1)
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process after its parent, which may be killed without a word."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _started(collator: Collator | None) -> None:
    """Nothing: the argument is what matters."""
