"""Several batches at a time on a CPU, whose cores do more with a batch each than with shares of one."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from contextlib import ExitStack

import torch

# Each holds the graph of a batch; with more cores, several of them share a batch.
_MOST = 4


def default_streams(device: str) -> int:
    """How many batches a kind of device, `"cpu"` or `"cuda"`, evaluates at a time with torch's number of threads."""
    return min(_MOST, torch.get_num_threads()) if device == "cpu" else 1


class Streams:
    """Threads that evaluate a batch each, with their share of torch's threads; a context manager.

    torch lets threads share an operation. Operations on a few hundred atoms are too short for that, and what Python
    does between them keeps one core busy; torch works without Python's lock, so threads with a batch each do not wait.

    Args:
        n: Number of threads; with 1 there are none, and nothing is evaluated ahead.
    """

    def __init__(self, n: int) -> None:
        self._n, self._all = n, torch.get_num_threads()
        self._share = max(1, self._all // n)
        self._grad = torch.is_grad_enabled()  # new threads would begin with gradients
        self._open = ExitStack()
        if n > 1:
            self._pool = ThreadPoolExecutor(n, "streams of ase_uq")
            self._open.callback(torch.set_num_threads, self._all)  # threads to come start with the last number set
            self._open.callback(self._pool.shutdown, wait=True, cancel_futures=True)

    def in_order[A, B](
        self, items: Iterable[A], job: Callable[[A], Callable[[], B | None] | None]
    ) -> Iterator[tuple[A, B | None]]:
        """The items in their order, each with what its job returned.

        Args:
            items: Items; as many as there are threads, and one more, are taken ahead.
            job: Called with an item, returns what a thread has to do; None for an item without a job, which is handed
                over when no thread is at work, and with all of torch's threads. So is one whose job returned None.
        """
        if self._n == 1:
            yield from ((item, None) for item in items)
            return
        waiting: deque[tuple[A, Future[B | None]]] = deque()

        def down_to(most: int) -> Iterator[tuple[A, B | None]]:
            while len(waiting) > most:
                item, future = waiting.popleft()
                outcome = future.result()
                if outcome is None:
                    wait([future for _, future in waiting])
                    torch.set_num_threads(self._all)
                yield item, outcome

        for item in items:
            if (work := job(item)) is not None:
                waiting.append((item, self._pool.submit(self._run, work)))
                yield from down_to(self._n)
            else:
                yield from down_to(0)
                torch.set_num_threads(self._all)
                yield item, None
        yield from down_to(0)

    def _run[B](self, work: Callable[[], B]) -> B:
        torch.set_num_threads(self._share)
        with torch.set_grad_enabled(self._grad):
            return work()

    def __enter__(self) -> "Streams":
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()
