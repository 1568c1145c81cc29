"""One pass over frames: the features that selections compare, and the readings of their force uncertainties."""

import os
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.errors import InputError, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.frames import Frames
from ase_uq.io.several import source_of
from ase_uq.io.source import Source, warn_of_left_out
from ase_uq.methods.base import Head
from ase_uq.numerics.cumulants import cumulants
from ase_uq.predictor import Predictor
from ase_uq.selection.strategies import Points
from ase_uq.stream.passes import LeftOut, Pass, passes
from ase_uq.thresholds.reduction import Reduction, readings_of

Per = Literal["structure", "environment"]


class Scan:
    """Evaluates frames for their features.

    Args:
        predictor: The potential and its uncertainty model.
        head: Fitted method whose features are compared.
        per: What a point is: a `"structure"`, the mean over its atoms, or an `"environment"`, one atom.
        batch_atoms: Largest number of atoms evaluated together.
        order: Highest order of the cumulants over its atoms that a structure has; 1 for the mean alone.
    """

    def __init__(self, predictor: Predictor, head: Head, per: Per, batch_atoms: int | None, order: int = 1) -> None:
        self._backend = predictor.backend
        self._model = predictor.uncertainty_model
        self._head = head
        self._per = per
        self._batch_atoms = batch_atoms
        self._order = order

    def pool(
        self, frames: Frames | Sequence[str | os.PathLike[str]], title: str
    ) -> tuple[Points, np.ndarray, list[int], dict[int, str]]:
        """Points of candidates, and the readings and numbers that their choice needs.

        Args:
            frames: Path, paths or list.
            title: Title of the progress bar; empty for none.

        Returns:
            Points of the frames that can be evaluated, their (n_candidates,) readings, eV/Å, and their numbers among
            `frames`; and the numbers of the other frames, with what is wrong with each.

        Raises:
            InputError: The file is missing or empty, or none of its frames can be evaluated.
        """
        source = source_of(frames)
        numbers: list[int] = []
        left_out: dict[int, str] = {}
        parts: list[_Part] = []
        for event in self._passes(source, title, with_readings=True):
            if isinstance(event, LeftOut):
                warn_of_left_out(event.number, event.reason, len(left_out))
                left_out[event.number] = event.reason
            else:
                numbers += event.numbers
                parts.append(event.value)
        if not parts:
            raise InputError(
                f"none of the {len(left_out)} frames of {source.name} can be evaluated. Frame {next(iter(left_out))}: "
                f"{next(iter(left_out.values()))}"
                if left_out
                else "the pool has no frames."
            )
        self._warn_of_unseen(parts)
        return _joined(parts), np.concatenate([part.readings for part in parts]), numbers, left_out

    def train(self, frames: Frames, title: str) -> Points:
        """Points of training frames.

        Args:
            frames: Path or list.
            title: Title of the progress bar; empty for none.

        Raises:
            InputError: The file is missing or empty, or one of its frames cannot be read and evaluated.
        """
        source = Source(frames)
        parts: list[_Part] = []
        for event in self._passes(source, title, with_readings=False):
            if isinstance(event, LeftOut):
                problem = "evaluated" if event.n_atoms else "read"
                raise InputError(f"training frame {event.number} of {source.name} cannot be {problem}: {event.reason}")
            parts.append(event.value)
        if not parts:
            raise InputError("there are no training frames.")
        return _joined(parts)

    def _passes(self, source: Source, title: str, *, with_readings: bool) -> "Iterator[Pass[_Part] | LeftOut]":
        return passes(
            self._backend,
            source,
            partial(self._part, with_readings=with_readings),
            batch_atoms=self._batch_atoms,
            forces=with_readings,
            gradients=with_readings and self._model.gradients,
            title=title,
        )

    def _part(self, forward_pass: ForwardPass, *, with_readings: bool) -> "_Part":
        with torch.no_grad():
            rows, owners, kinds = self._of_batch(forward_pass)
        if not torch.isfinite(rows).all():
            raise InputError("its features are not finite: its atoms are probably on top of each other.")
        elements, counts = forward_pass.numbers.cpu().numpy(), forward_pass.n_atoms_of_frame.cpu().numpy()
        readings, unseen = np.zeros(0), Counter[int]()
        if with_readings:
            norms = self._model.apply(forward_pass)["forces_uncertainty"].norm(dim=1).cpu().numpy()
            readings = readings_of(norms, elements, counts, Reduction())
            for atoms in np.split(elements, np.cumsum(counts)[:-1]):
                unseen.update(set(atoms.tolist()) - self._model.edges.elements)
        # Single precision is enough: its rounding is far below the distance of near-duplicates.
        return _Part(rows.float().cpu(), owners.cpu(), kinds.cpu(), forward_pass.n_frames, readings, unseen)

    def _warn_of_unseen(self, parts: Sequence["_Part"]) -> None:
        unseen = sum((part.unseen for part in parts), Counter[int]())
        for z, count in sorted(unseen.items()):
            warnings.warn(
                f"{count} frames of the pool contain {chemical_symbols[z]}, which the uncertainty model was fitted "
                "without: their uncertainties and their distances from other frames are a guess.",
                UQWarning,
                stacklevel=4,
            )

    def _of_batch(self, forward_pass: ForwardPass) -> tuple[Tensor, Tensor, Tensor]:
        features = self._head.features(forward_pass)
        if self._per == "environment":
            return features, forward_pass.frame_of_atom, forward_pass.numbers
        numbers = torch.arange(forward_pass.n_frames, device=features.device)
        rows = cumulants(features, forward_pass.frame_of_atom, forward_pass.n_atoms_of_frame, self._order)
        return rows, numbers, torch.zeros_like(numbers)


@dataclass(frozen=True)
class _Part:
    """The data kept of one batch.

    Args:
        rows: (n_points, n_features) features.
        owners: (n_points,) index of the frame of each point within the batch.
        kinds: (n_points,) kind of each point; only points of one kind are compared.
        n_frames: Frames of the batch.
        readings: (n_frames,) readings, eV/Å; empty if they were not asked for.
        unseen: Number of frames with each element that the uncertainty model was fitted without.
    """

    rows: Tensor
    owners: Tensor
    kinds: Tensor
    n_frames: int
    readings: np.ndarray
    unseen: Counter[int]


def _joined(parts: Sequence[_Part]) -> Points:
    firsts = np.cumsum([0, *(part.n_frames for part in parts)]).tolist()
    owners = [part.owners + first for part, first in zip(parts, firsts, strict=False)]
    return Points(
        torch.cat([part.rows for part in parts]), torch.cat(owners), torch.cat([part.kinds for part in parts])
    )
