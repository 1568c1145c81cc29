"""The one loop over frames: it batches by atoms and edges, collates ahead, evaluates, and halves what does not fit.

Fits, evaluations, scores, selections, the latent map and the report all evaluate their frames here, and replicas and
beads, which come as a batch, in parts of it that can be evaluated. None of them fails because a batch does not fit into
the device's memory, and each learns which frames cannot be used, and why. A frame that a potential's package refuses
with any error, or gives numbers that are not finite, changes nothing for the others.
"""

from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from ase import Atoms

from ase_uq.backends.base import Backend, Batch
from ase_uq.communicator import Communicator, Serial
from ase_uq.display.progress import progress_bar
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.stream.failures import (
    is_fatal,
    is_out_of_memory,
    named,
    not_finite,
    reason_of_error,
    reason_of_not_finite,
)
from ase_uq.stream.limits import FILLS_A_CPU, BatchLimit, default_batch_atoms
from ase_uq.stream.preparation import Preparation, Prepared, count_edges
from ase_uq.stream.streams import Streams, default_streams


@dataclass(frozen=True)
class Pass[T]:
    """Frames that were evaluated together.

    Args:
        numbers: Numbers of the frames in their source.
        frames: Structures.
        value: What `use` returned for their forward pass.
    """

    numbers: list[int]
    frames: list[Atoms]
    value: T


@dataclass(frozen=True)
class LeftOut:
    """A frame that cannot be read or evaluated.

    Args:
        number: Number of the frame in its source.
        reason: What is wrong with it, in words.
        n_atoms: Number of its atoms; 0 if it cannot be read.
    """

    number: int
    reason: str
    n_atoms: int = 0


def passes[T](
    backend: Backend,
    source: Source,
    use: Callable[[ForwardPass], T],
    *,
    batch_atoms: int | None,
    start: int = 0,
    forces: bool = True,
    gradients: bool = False,
    communicator: Communicator | None = None,
    n_workers: int = 0,
    title: str = "",
) -> Generator[Pass[T] | LeftOut]:
    """Evaluates this rank's frames, in their order.

    A batch that does not fit into the device's memory is halved, and the next ones are smaller; later they grow again.
    A batch with a frame that is refused, at which the potential's package raises any error, or whose results are not
    finite is halved until that frame is alone. A frame that is left out is yielded before the first batch with a later
    frame.

    Args:
        backend: The potential.
        source: Frames of all ranks.
        use: Takes what is needed from a forward pass. It is called again for parts of a batch that did not fit, and
            by several threads on a CPU, so it must keep no state; it may raise `InputError` to refuse a frame. The
            forward pass is freed before the next one of its thread.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device. The limit for edges
            is sixty times as high. On a CPU several batches are evaluated at a time, unless a frame fills it.
        start: Number of the first frame to evaluate.
        forces: Whether forces and stress are needed.
        gradients: Whether `ForwardPass.gradients` are needed. A derivative of one structure runs through the graph of
            its whole batch, so each structure is then evaluated alone.
        communicator: Decides which frames belong to this rank; one process by default.
        n_workers: Number of processes that parse and collate while the device evaluates; 0 for none.
        title: Title of the progress bar; empty for none.

    Yields:
        The batches that were evaluated, and the frames that were left out.

    Raises:
        InputError: A single frame does not fit into the device's memory.
    """
    communicator = communicator or Serial()
    if batch_atoms is None:
        batch_atoms = default_batch_atoms(backend.device.type)
    limit = BatchLimit(1 if gradients else batch_atoms)
    collator = None if gradients else backend.collator
    loop = _Loop(backend, use, forces, gradients, limit)
    total = source.total() if title else None
    # Which frames are whose is counted from the first one, wherever this rank begins.
    items = source.unparsed(start if communicator.size == 1 else 0)
    preparation = Preparation(items, limit, backend.cutoff, collator, n_workers, communicator, start)
    streams = Streams(1 if gradients or not backend.is_concurrent else default_streams(backend.device.type))
    with (
        preparation,
        streams,
        progress_bar(
            total=None if total is None else -(-total // communicator.size),
            desc=title,
            unit="frame",
            show=bool(title) and communicator.rank == 0,
            leave=False,
        ) as bar,
    ):
        for prepared, attempt in streams.in_order(preparation, loop.first_attempt):
            for event in loop.evaluated(prepared, attempt):
                yield event
                bar.update(1 if isinstance(event, LeftOut) else len(event.frames))


def in_parts[T](
    backend: Backend,
    frames: Sequence[Atoms],
    use: Callable[[ForwardPass], T],
    *,
    first: int = 0,
    gradients: bool = False,
) -> Iterator[Pass[T] | LeftOut]:
    """Evaluates structures that belong together, such as replicas: as one batch, or in parts where that fails.

    Args:
        backend: The potential.
        frames: Structures.
        use: As for `passes`.
        first: Number of the first structure, for messages.
        gradients: As for `passes`.

    Yields:
        As `passes`, but a structure whose results are not finite is evaluated alone and not left out.

    Raises:
        InputError: A single structure does not fit into the device's memory.
    """
    n_atoms = 1 if gradients else max(1, sum(map(len, frames)))
    loop = _Loop(backend, use, True, gradients, BatchLimit(n_atoms), keeps_not_finite=True)
    for batch in [frames[i : i + 1] for i in range(len(frames))] if gradients else [frames]:
        yield from loop.evaluated(Prepared(list(range(first, first + len(batch))), list(batch)))
        first += len(batch)


def complete[T](events: Iterable[Pass[T] | LeftOut], name: str = "frame") -> Iterator[Pass[T]]:
    """The passes alone, if no frame may be left out.

    Args:
        events: What `passes` yields.
        name: Word for a frame in messages.

    Raises:
        InputError: A frame was left out.
    """
    for event in events:
        if isinstance(event, LeftOut):
            raise InputError(f"{name} {event.number} cannot be used: {event.reason}")
        yield event


@dataclass(frozen=True)
class _Loop[T]:
    """Evaluates prepared batches, in parts if they do not fit."""

    backend: Backend
    use: Callable[[ForwardPass], T]
    forces: bool
    gradients: bool
    limit: BatchLimit
    keeps_not_finite: bool = False  # where it is alone, a structure whose results are not finite is not left out

    def first_attempt(self, prepared: Prepared) -> Callable[[], Pass[T] | str | None] | None:
        """What another thread has to do for a batch; None if this one evaluates it, as `evaluated` then does.

        Without memory, which batches of the other threads may hold, the batch is left to this one as well.
        """
        n_atoms = sum(map(len, prepared.frames))
        if not prepared.frames or n_atoms > max(self.limit.n_atoms, FILLS_A_CPU) or self.limit.is_reduced:
            return None
        # Not in that thread: potentials' packages switch torch's default precision while they collate, and two of them
        # would leave it switched.
        numbers, frames = prepared.numbers, prepared.frames
        batch = self._collated(numbers, frames, prepared.data)
        if isinstance(batch, str):
            return lambda: batch or None
        return lambda: self._evaluated(numbers, frames, batch) or None

    def evaluated(self, prepared: Prepared, attempt: Pass[T] | str | None = None) -> Iterator[Pass[T] | LeftOut]:
        """Evaluates a batch, or the rest of it after a first attempt in another thread."""
        left_out = [LeftOut(number, reason) for number, reason in prepared.unreadable]
        waiting = [(prepared.numbers, prepared.frames, prepared.data)] if prepared.frames else []
        while waiting:
            numbers, frames, data = waiting.pop()
            if attempt is None:
                if len(frames) > 1 and self.limit.is_reduced and not self.limit.fits(*self._size(frames)):
                    waiting += _halves(numbers, frames)  # it was made before the limit shrank
                    continue
                attempt = self._attempt(numbers, frames, data)
            if isinstance(attempt, Pass):
                self.limit.count_success()
                before = [one for one in left_out if one.number < numbers[-1]]
                left_out = left_out[len(before) :]
                yield from before
                yield attempt
            elif len(frames) == 1:
                left_out = sorted([*left_out, LeftOut(numbers[0], attempt, len(frames[0]))], key=lambda one: one.number)
            else:
                waiting += _halves(numbers, frames)
            attempt = None
        yield from left_out

    def _attempt(self, numbers: list[int], frames: list[Atoms], data: Any) -> Pass[T] | str:
        """The batch's pass, or why it cannot be evaluated as a whole."""
        batch = self._collated(numbers, frames, data)
        found = batch if isinstance(batch, str) else self._evaluated(numbers, frames, batch)
        # No error is kept by now: its traceback would hold on to the tensors of the failed pass.
        return found or self._without_memory(numbers, frames)

    def _collated(self, numbers: list[int], frames: list[Atoms], data: Any) -> Batch | str:
        """The batch as the potential takes it, or why it cannot be made; empty if there is no memory for it."""
        try:
            backend = self.backend
            return backend.collate(frames, first=numbers[0]) if data is None else backend.received(frames, data)
        except Exception as error:  # potentials' packages raise anything
            return _reason_of(error, numbers, frames)

    def _evaluated(self, numbers: list[int], frames: list[Atoms], batch: Batch) -> Pass[T] | str:
        """The batch's pass, or why there is none; empty if there is no memory for it."""
        evaluated = False
        try:
            forward_pass = self.backend.forward(batch, forces=self.forces, gradients=self.gradients)
            evaluated = True
            # One such structure may make the whole batch NaN, in the potential or in what is made of the pass.
            alone = len(frames) == 1
            if not (alone and self.keeps_not_finite) and (name := not_finite(forward_pass)):
                return reason_of_not_finite(name, frames[0]) if alone else f"its {name} are not finite"
            return Pass(numbers, frames, self.use(forward_pass))
        except Exception as error:
            if evaluated and not isinstance(error, InputError) and not is_out_of_memory(error):
                raise
            return _reason_of(error, numbers, frames)

    def _without_memory(self, numbers: list[int], frames: list[Atoms]) -> str:
        """Halves the limit."""
        if len(frames) == 1:
            raise InputError(
                f"frame {numbers[0]} with its {len(frames[0])} atoms alone does not fit into the memory of "
                f"{self.backend.device}. Use a device with more memory."
            )
        self.limit.halve(*self._size(frames))
        if self.backend.device.type == "cuda":
            torch.cuda.empty_cache()
        return "it does not fit into the memory of the device"

    def _size(self, frames: Sequence[Atoms]) -> tuple[int, float]:
        return sum(map(len, frames)), sum(count_edges(atoms, self.backend.cutoff) for atoms in frames)


def _reason_of(error: Exception, numbers: list[int], frames: list[Atoms]) -> str:
    """Why a batch cannot be evaluated as a whole; empty if the device has run out of memory.

    Raises an error after which nothing else can be evaluated.
    """
    if isinstance(error, InputError):
        return str(error)
    if is_out_of_memory(error):
        return ""
    if is_fatal(error):
        error.add_note(f"It was raised at {named(frames, numbers[0])}. Start a new process to go on.")
        raise error
    return reason_of_error(error)


def _halves(numbers: list[int], frames: list[Atoms]) -> list[tuple[list[int], list[Atoms], Any]]:
    """The second half, then the first: the last entry is taken next."""
    middle = len(frames) // 2
    return [(numbers[middle:], frames[middle:], None), (numbers[:middle], frames[:middle], None)]
