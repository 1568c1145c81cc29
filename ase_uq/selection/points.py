"""One pass over frames: the features in which selections compare them, and what their forces' uncertainties read."""

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols
from torch import Tensor
from tqdm import tqdm

from ase_uq.errors import InputError, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.frames import Frames
from ase_uq.io.source import Source, Unreadable, warn_of_left_out
from ase_uq.methods.base import Head
from ase_uq.predictor import Predictor
from ase_uq.selection.strategies import Points
from ase_uq.stream.limits import batches_of
from ase_uq.thresholds.reduction import Reduction, readings_of

Per = Literal["structure", "environment"]


class Scan:
    """Evaluates frames for their features.

    Args:
        predictor: The potential, and what was fitted for it.
        head: Fitted method whose features are wanted.
        per: What a point is: a `"structure"`, the mean over its atoms, or an `"environment"`, an atom.
        batch_atoms: Most atoms evaluated together.
    """

    def __init__(self, predictor: Predictor, head: Head, per: Per, batch_atoms: int) -> None:
        self._backend = predictor.backend
        self._model = predictor.uncertainty_model
        self._head = head
        self._per = per
        self._batch_atoms = batch_atoms

    def pool(self, frames: Frames, title: str) -> tuple[Points, np.ndarray, list[int], dict[int, str]]:
        """Points of candidates, and what else their choice needs.

        Args:
            frames: Path or list.
            title: What the progress bar says; empty for none.

        Returns:
            Points of the frames that can be evaluated, (n_candidates,) their readings in eV/Å and their numbers among
            `frames`; and the numbers of the others, with what is wrong with them.

        Raises:
            InputError: The file is missing or empty, or none of its frames can be evaluated.
        """
        source = Source(frames)
        numbers: list[int] = []
        left_out: dict[int, str] = {}
        readings, unseen = [], {}
        gradients = self._model.gradients

        def usable() -> Iterator[Atoms]:
            for number, item in _read(source, title):
                problem = item.reason if isinstance(item, Unreadable) else self._refusal(item, number)
                if problem:
                    warn_of_left_out(number, problem, len(left_out))
                    left_out[number] = problem
                elif isinstance(item, Atoms):
                    numbers.append(number)
                    yield item

        def read(forward_pass: ForwardPass) -> None:
            norms = self._model.apply(forward_pass)["forces_uncertainty"].norm(dim=1).cpu().numpy()
            kinds, counts = forward_pass.numbers.cpu().numpy(), forward_pass.n_atoms_of_frame.cpu().numpy()
            readings.append(readings_of(norms, kinds, counts, Reduction()))
            for z in set(np.unique(kinds).tolist()) - self._model.edges.elements:
                holders = forward_pass.frame_of_atom[forward_pass.numbers == z]
                unseen[z] = unseen.get(z, 0) + len(holders.unique())

        def leave_out(index: int, problem: str) -> None:
            number = numbers.pop(index)
            warn_of_left_out(number, problem, len(left_out))
            left_out[number] = problem

        # A derivative of one structure runs through the graph of its whole batch.
        batches = batches_of(usable(), 1 if gradients else self._batch_atoms)
        points = self._points(batches, leave_out, read, gradients)
        if points is None:
            raise InputError(
                f"none of the {len(left_out)} frames of {source.name} can be evaluated. Frame {next(iter(left_out))}: "
                f"{next(iter(left_out.values()))}"
                if left_out
                else "the pool has no frames."
            )
        for z, count in sorted(unseen.items()):
            warnings.warn(
                f"{count} frames of the pool contain {chemical_symbols[z]}, which the uncertainty model was fitted "
                "without: how uncertain and how far from the others they are is a guess.",
                UQWarning,
                stacklevel=3,
            )
        return points, np.concatenate(readings), numbers, left_out

    def train(self, frames: Frames, title: str) -> Points:
        """Points of frames that are known.

        Args:
            frames: Path or list.
            title: What the progress bar says; empty for none.

        Raises:
            InputError: The file is missing or empty, or one of its frames cannot be read and evaluated.
        """
        source = Source(frames)

        def whole() -> Iterator[Atoms]:
            for number, item in _read(source, title):
                if isinstance(item, Unreadable):
                    raise InputError(f"training frame {number} of {source.name} cannot be read: {item.reason}.")
                self._backend.check([item], first=number, name="training frame")
                yield item

        def refuse(index: int, problem: str) -> None:
            raise InputError(f"training frame {index} of {source.name} cannot be evaluated: {problem}")

        points = self._points(batches_of(whole(), self._batch_atoms), refuse, None, False)
        if points is None:
            raise InputError("there are no training frames.")
        return points

    def _refusal(self, atoms: Atoms, number: int) -> str:
        try:
            self._backend.check([atoms], first=number)
        except InputError as error:
            return str(error)
        return ""

    def _points(
        self,
        batches: Iterable[list[Atoms]],
        refused: Callable[[int, str], None],
        read: Callable[[ForwardPass], None] | None,
        gradients: bool,
    ) -> Points | None:
        """Points of all frames but those that `refused` is told of, by their index among those that are left."""
        rows, owners, kinds, done = [], [], [], 0
        for batch in batches:
            forward_pass, points = self._evaluated(batch, done, refused, read is not None, gradients)
            if forward_pass is None or points is None:
                continue
            if read is not None:
                read(forward_pass)
            # Held in single precision: rounding is then far below what counts as a duplicate.
            rows.append(points[0].float().cpu())
            owners.append(points[1].cpu() + done)
            kinds.append(points[2].cpu())
            done += forward_pass.n_frames
        return Points(torch.cat(rows), torch.cat(owners), torch.cat(kinds)) if rows else None

    def _evaluated(
        self, batch: list[Atoms], done: int, refused: Callable[[int, str], None], forces: bool, gradients: bool
    ) -> tuple[ForwardPass | None, tuple[Tensor, Tensor, Tensor] | None]:
        """The frames of a batch that can be evaluated: as often as it takes to find out which."""
        while batch:
            try:
                collated = self._backend.collate(batch)
            except InputError:
                batch = self._without(batch, done, refused, [self._problem(atoms) for atoms in batch])
                continue
            forward_pass = self._backend.forward(collated, forces=forces, gradients=gradients)
            with torch.no_grad():
                points = self._of_batch(forward_pass)
            bad = set(points[1][~torch.isfinite(points[0]).all(1)].tolist())
            if not bad:
                return forward_pass, points
            reason = "its features are not finite: its atoms are probably on one another."
            batch = self._without(batch, done, refused, [reason if i in bad else "" for i in range(len(batch))])
        return None, None

    def _problem(self, atoms: Atoms) -> str:
        try:
            self._backend.collate([atoms])
        except InputError as error:
            return str(error)
        return ""

    @staticmethod
    def _without(
        batch: list[Atoms], done: int, refused: Callable[[int, str], None], problems: Sequence[str]
    ) -> list[Atoms]:
        for index in reversed(range(len(batch))):  # from behind, so that indices before stay what they are
            if problems[index]:
                refused(done + index, problems[index])
        return [atoms for atoms, problem in zip(batch, problems, strict=True) if not problem]

    def _of_batch(self, forward_pass: ForwardPass) -> tuple[Tensor, Tensor, Tensor]:
        features = self._head.features(forward_pass)
        if self._per == "environment":
            return features, forward_pass.frame_of_atom, forward_pass.numbers
        counts = forward_pass.n_atoms_of_frame.to(features)[:, None]
        numbers = torch.arange(forward_pass.n_frames, device=features.device)
        return forward_pass.sum_over_atoms(features) / counts, numbers, torch.zeros_like(numbers)


def _read(source: Source, title: str) -> Iterator[tuple[int, Atoms | Unreadable]]:
    total = source.total() if title else None
    yield from tqdm(source.read(), desc=title, total=total, unit="frame", disable=not title, leave=False)
