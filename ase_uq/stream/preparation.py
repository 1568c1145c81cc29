"""Prepares frames while the device evaluates: a thread or processes parse, count, check and collate them."""

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
from ase_uq.errors import UQWarning
from ase_uq.io.source import Item, Unparsed, Unreadable
from ase_uq.stream.limits import BatchLimit

_Chunk = list[tuple[int, Item]]


@dataclass
class Prepared:
    """Frames to be evaluated together, and the frames between them that cannot be read.

    Args:
        numbers: Numbers of the frames in the source.
        frames: Structures.
        unreadable: Number of each frame that could not be read, and why.
        n_atoms: Number of atoms in all frames.
        n_edges: Approximate number of neighbours of all atoms; see `count_edges`.
        data: What the collator returned for the frames; None if collating is left to the potential.
    """

    numbers: list[int] = field(default_factory=list)
    frames: list[Atoms] = field(default_factory=list)
    unreadable: list[tuple[int, str]] = field(default_factory=list)
    n_atoms: int = 0
    n_edges: float = 0.0
    data: Any = None


class Preparation:
    """Prepares batches ahead of the device, in order; a context manager.

    A thread reads. It also parses and counts until worker processes have started, which takes seconds; from then on
    they do so, and collate as well. If one of them dies, the thread goes on alone.

    Args:
        items: Frames and their numbers, parsed or not.
        limit: Largest allowed batch.
        cutoff: Cutoff of the potential's neighbours, Å.
        collator: Collator of the potential; None leaves collating to the potential.
        n_workers: Number of worker processes; 0 for none.
        communicator: Decides which chunks of the items belong to this rank; one process by default.
        start: Number of the first frame of them that is wanted.
    """

    def __init__(
        self,
        items: Iterator[tuple[int, Item]],
        limit: BatchLimit,
        cutoff: float,
        collator: Collator | None = None,
        n_workers: int = 0,
        communicator: Communicator | None = None,
        start: int = 0,
    ) -> None:
        # Chunks keep the size of the start, however small batches become, because all ranks must cut alike.
        chunks = shard(chunks_of(items, limit.n_atoms), communicator or Serial())
        self._chunks = (wanted for chunk in chunks if (wanted := [item for item in chunk if item[0] >= start]))
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
            # A process that unpickles the collator has imported the potential's package.
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
        """The next chunk, and its batches or the future that gives them; None and None at the end."""
        chunk = next(self._chunks, None)
        if chunk is None:
            return None, None
        processes = self._processes  # the other thread may drop the processes at any time
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
        except Exception as error:  # a process was killed, or frames cannot be pickled
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
    """Cuts items into consecutive chunks of at most `n_atoms` atoms; a larger item is a chunk of its own."""
    chunk: _Chunk = []
    filled = 0
    for number, item in items:
        size = 0 if isinstance(item, Unreadable) else item.n_atoms if isinstance(item, Unparsed) else len(item)
        size = max(1, size)  # ends a chunk even if its items have no atoms
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
    """Batches of a chunk: one, or more if its structures are dense.

    Args:
        chunk: Frames and their numbers.
        n_atoms: Largest number of atoms in a batch.
        n_edges: Largest number of edges in a batch.
        cutoff: Cutoff of the potential's neighbours, Å.
        collator: Collator of the potential; None leaves collating to the potential, as for batches that it refuses.
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
    except MemoryError:
        raise  # this process is short of it, and so are the others
    except Exception:  # packages raise anything; the potential will find out at which structure
        return None


def count_edges(atoms: Atoms, cutoff: float) -> float:
    """Approximate number of neighbours within the cutoff (Å), summed over all atoms, without a neighbour list.

    Exact without periodic boundaries. With them, what the mean density of the cell gives, N²/V·(4/3)πr³, if larger.
    """
    if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
        return 0.0  # the potential will refuse it
    if not np.isfinite(cutoff):
        return float(len(atoms)) ** 2
    if len(atoms) < 200:  # building a tree would take longer
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
    """The chunk without calculators, which may hold a potential."""
    return [(number, item.copy() if isinstance(item, Atoms) else item) for number, item in chunk]


def _begin_worker(parent: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that waits for this one
    torch.set_num_threads(1)
    Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    """Ends this process after its parent, which may be killed without notice."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)


def _started(collator: Collator | None) -> None:
    """Does nothing: unpickling the argument is what matters."""
