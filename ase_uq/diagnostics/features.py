"""Features of the same atoms in several potentials, chunk by chunk; each potential evaluates its own batches."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass

import torch
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.stream.passes import complete, passes

_KEPT = 2**26  # numbers that are kept for a second reading, 512 MiB; more are computed again


def latent(forward_pass: ForwardPass) -> Tensor:
    """(n_atoms, n_features) all features of a potential: invariants of all layers, norms of equivariant channels."""
    return forward_pass.features


def last_layer(forward_pass: ForwardPass) -> Tensor:
    """(n_atoms, n_last) the features of the energy's last layer."""
    return forward_pass.energy_layer.features


@dataclass(frozen=True)
class Latent:
    """Features that are compared.

    Args:
        backend: The potential.
        features: What of a forward pass: a row for each atom.
    """

    backend: Backend
    features: Callable[[ForwardPass], Tensor] = latent


Potential = BaseCalculator | Backend | Latent | str | os.PathLike[str]


def as_latent(potential: Potential) -> Latent:
    """The features of a potential that was given in any form.

    Raises:
        TypeError: As in `load_backend`.
    """
    return potential if isinstance(potential, Latent) else Latent(load_backend(potential))


@dataclass(frozen=True)
class Chunk:
    """Some frames, evaluated by all potentials.

    Args:
        labels: (n_atoms, 2) number of the frame of each atom, and place of the atom in it.
        elements: (n_atoms,) atomic numbers.
        rows: (n_atoms, d) features of all potentials beside each other, float64.
    """

    labels: Tensor
    elements: Tensor
    rows: Tensor


class LatentStream:
    """Features of the atoms of all frames; may be iterated again, which evaluates the frames again.

    Args:
        latents: What is compared, by name.
        source: Frames.
        batch_atoms: Largest number of atoms evaluated together; None for the default of the device.
        title: Title of the progress bar; empty for none.
        keep: Whether to keep what the first iteration finds for the next ones, up to half a gigabyte.

    Attributes:
        columns: The columns of each potential in the rows, once the first chunk is there.

    Raises:
        InputError: The potentials have no element in common; or, on iteration, one of them cannot evaluate a frame.
    """

    def __init__(
        self,
        latents: Mapping[str, Latent],
        source: Source,
        *,
        batch_atoms: int | None,
        title: str = "",
        keep: bool = False,
    ) -> None:
        self.columns: dict[str, slice] = {}
        self._latents, self._source, self._batch_atoms, self._title = latents, source, batch_atoms, title
        self._room = _KEPT if keep else 0
        self._kept: list[Chunk] | None = None
        known = {name: each.backend.elements for name, each in latents.items()}
        if not frozenset.intersection(*known.values()):
            named = "; ".join(f"{name}: {_symbols(elements)}" for name, elements in known.items())
            raise InputError(f"the potentials have no element in common, so no frame is for all of them. {named}.")

    def __iter__(self) -> Iterator[Chunk]:
        if self._kept is not None:
            yield from self._kept
            return
        kept: list[Chunk] | None = []
        room = self._room
        for chunk in self._evaluated():
            room -= chunk.rows.numel()
            if room < 0:
                kept = None
            if kept is not None:
                kept.append(chunk)
            yield chunk
        self._kept = kept

    def _evaluated(self) -> Iterator[Chunk]:
        device = next(iter(self._latents.values())).backend.device
        with ExitStack() as stack:
            streams = [
                stack.enter_context(closing(self._frames_of(name, self._title if number == 0 else "")))
                for number, name in enumerate(self._latents)
            ]
            waiting: list[deque[tuple[Tensor, Tensor]]] = [deque() for _ in streams]
            first = 0
            while True:
                for queue, stream in zip(waiting, streams, strict=True):
                    if not queue:
                        queue.extend(next(stream, ()))
                count = min(map(len, waiting))
                if not count:
                    return
                taken = [[queue.popleft() for _ in range(count)] for queue in waiting]
                elements = [of_frame for of_frame, _ in taken[0]]
                parts = [torch.cat([rows for _, rows in frames]).to(device).double() for frames in taken]
                self._name_columns([part.shape[1] for part in parts])
                labels = [
                    torch.stack([torch.full_like(place, number), place], 1)
                    for number, place in enumerate((torch.arange(len(each)) for each in elements), first)
                ]
                yield Chunk(torch.cat(labels).to(device), torch.cat(elements).to(device), torch.cat(parts, 1))
                first += count

    def _frames_of(self, name: str, title: str) -> Generator[list[tuple[Tensor, Tensor]]]:
        """Batch by batch, the elements and features of each frame in one potential."""
        each = self._latents[name]

        def use(forward_pass: ForwardPass) -> list[tuple[Tensor, Tensor]]:
            counts = forward_pass.n_atoms_of_frame.tolist()
            rows = each.features(forward_pass)
            return list(zip(forward_pass.numbers.split(counts), rows.split(counts), strict=True))

        events = passes(each.backend, self._source, use, batch_atoms=self._batch_atoms, forces=False, title=title)
        with closing(events):
            for batch in complete(events, f"{name}: frame"):
                yield batch.value

    def _name_columns(self, widths: list[int]) -> None:
        if not self.columns:
            first = 0
            for name, width in zip(self._latents, widths, strict=True):
                self.columns[name] = slice(first, first + width)
                first += width


def _symbols(elements: frozenset[int]) -> str:
    if len(elements) > 8:
        return f"{len(elements)} elements"
    return ", ".join(chemical_symbols[z] for z in sorted(elements))
