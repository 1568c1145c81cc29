"""The protocol of a backend: structures in; mean, features and exact last-layer features out, in one forward."""

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, final

import torch
from ase import Atoms

from ase_uq.backends.identity import PROBE_TOLERANCE, Identity, probe_structure, relative_deviation, weights_hash
from ase_uq.backends.structures import check_structures
from ase_uq.errors import PotentialMismatch
from ase_uq.forward_pass import ForwardPass


@dataclass(frozen=True)
class Batch:
    """Structures in the form a backend evaluates.

    Args:
        frames: The structures, untouched.
        data: What the potential's package makes of them.
    """

    frames: tuple[Atoms, ...]
    data: Any


@dataclass(frozen=True)
class Collator:
    """Builds what a batch consists of in another process: picklable, without the weights, on the CPU.

    Args:
        elements: Atomic numbers the potential knows.
        required_info_keys: Entries of `atoms.info` without which it cannot run.
        build: Structures that were checked → what the potential's package makes of them, also picklable.
    """

    elements: frozenset[int]
    required_info_keys: tuple[str, ...]
    build: Callable[[Sequence[Atoms]], Any]

    def __call__(self, frames: Sequence[Atoms]) -> Any:
        """What `Backend.received` wants.

        Raises:
            InputError: Those of `Backend.collate`.
        """
        check_structures(frames, self.elements, self.required_info_keys)
        return self.build(frames)


class Backend(ABC):
    """A potential, wrapped: one forward pass gives means and features.

    A subclass is final and lives in one file, `backends/<name>.py`, beside three functions that
    `ase_uq.backends` calls: `accepts(calculator)`, `wrap(calculator)` and `load(prefix, target, ...)`.

    Attributes:
        name: Name of the backend.
        calculator: The user's own ASE calculator.
        info_keys: Entries of `atoms.info` that the potential reads.
        required_info_keys: Those of them without which it cannot run.
        elements: Atomic numbers the potential knows.
        results: ASE's standard results that it gives.
        direct: Whether forces come from a head of their own, whose fit needs reference forces.
    """

    name: str
    calculator: Any  # of the package's own class
    info_keys: tuple[str, ...] = ()
    required_info_keys: tuple[str, ...] = ()
    elements: frozenset[int]
    results: tuple[str, ...]
    direct: bool = False

    @abstractmethod
    def _collate(self, frames: Sequence[Atoms]) -> Any:
        """The structures as the potential's package wants them; `frames` have been checked."""

    @abstractmethod
    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        """One forward pass, one a member where the wrapped calculator is a committee."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """What the weights do not hold and predictions or features depend on; JSON values."""

    @abstractmethod
    def _modules(self) -> Sequence[torch.nn.Module]:
        """The modules whose weights are the potential."""

    def _build(self) -> Callable[[Sequence[Atoms]], Any] | None:
        """What `Collator` wants, for a potential whose neighbour lists are made on the CPU; None for others."""
        return None

    def _placed(self, data: Any) -> Any:
        """What `_build` made, on the device of the potential."""
        raise NotImplementedError("a backend that has _build says in _placed how its data gets to the device")

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Its precision."""

    @final
    def collate(self, frames: Sequence[Atoms], *, first: int = 0) -> Batch:
        """Checks structures and turns them into a batch; the structures are not changed.

        Args:
            frames: Structures.
            first: Number of the first structure, for messages.

        Raises:
            InputError: No structure, no atoms, positions or cell that are not finite, a periodic cell
                without extent, an element the potential does not know, or a missing entry of `atoms.info`.
        """
        self.check(frames, first=first)
        return Batch(tuple(frames), self._collate(frames))

    @property
    @final
    def collator(self) -> Collator | None:
        """Collates in another process; None where only this one can, or its device does it faster."""
        build = self._build()
        return None if build is None else Collator(self.elements, self.required_info_keys, build)

    @final
    def received(self, frames: Sequence[Atoms], data: Any) -> Batch:
        """The batch of structures that `collator` has collated."""
        return Batch(tuple(frames), self._placed(data))

    @final
    def check(self, frames: Sequence[Atoms], *, first: int = 0, name: str = "structure") -> None:
        """Raises the `InputError` that `collate` would, without building a batch.

        Args:
            frames: Structures.
            first: Number of the first structure, for messages.
            name: What messages call a structure.
        """
        check_structures(frames, self.elements, self.required_info_keys, first=first, name=name)

    @final
    def forward(self, batch: Batch, *, forces: bool = True, gradients: bool = False) -> ForwardPass:
        """One forward pass over a batch.

        Args:
            batch: From `collate` of this backend.
            forces: Whether forces and stress are wanted; without them a conservative potential saves
                its backward pass.
            gradients: Whether `ForwardPass.gradients` are wanted: the graph of the pass is kept for them.

        Raises:
            InputError: Gradients were asked for, and this potential cannot give them as it was loaded.
        """
        # A conservative potential takes gradients, whatever the caller has switched off.
        with torch.enable_grad():
            return self._forward(batch, forces, gradients)

    @property
    def identity(self) -> Identity:
        """What an uncertainty model is bound to. The first call evaluates the probe structure."""
        return self._probed[0]

    @property
    def cutoff(self) -> float:
        """Distance in Å beyond which no neighbour is listed. The first call evaluates the probe structure."""
        return self._probed[1]

    @cached_property
    def _probed(self) -> tuple[Identity, float]:
        batch = self.collate([probe_structure(self.elements, self.required_info_keys)])
        forward_pass = self.forward(batch)
        columns = [forward_pass.features]
        # The features do not change with the last layers, the predictions do.
        for layer in (forward_pass.energy_layer, forward_pass.force_layer):
            if layer is not None:
                columns.append((layer.features @ layer.weights).reshape(len(columns[0]), -1))
        identity = Identity(self._settings(), weights_hash(self._modules()), torch.cat(columns, 1).float().cpu())
        return identity, forward_pass.edges.cutoff

    @final
    def check_identity(self, fitted: Identity) -> str | None:
        """Compares the potential with the one an uncertainty model was fitted on.

        Returns:
            None where they are the same; a warning where the weights are stored differently but the
            probe structure has the same features (other kernels, converted layouts).

        Raises:
            PotentialMismatch: They differ; the message names the setting, or the deviation of the probe.
        """
        here = self.identity
        advice = "Load the potential it was fitted on, or fit again with `ase-uq fit`."
        for key in sorted(fitted.settings.keys() | here.settings.keys()):
            then, now = fitted.settings.get(key), here.settings.get(key)
            if json.dumps(then, sort_keys=True) != json.dumps(now, sort_keys=True):
                raise PotentialMismatch(
                    f"the uncertainty model was fitted on another potential: {key} was {then!r}, here it is "
                    f"{now!r}. {advice}"
                )
        if fitted.weights == here.weights:
            return None
        deviation = relative_deviation(here.probe, fitted.probe)
        if deviation > PROBE_TOLERANCE:
            raise PotentialMismatch(
                f"the uncertainty model was fitted on other weights: features of the probe structure differ by "
                f"{deviation:.1e} (relative; at most {PROBE_TOLERANCE:.0e} is the same potential). {advice}"
            )
        return (
            "the potential's weights are stored differently from when the uncertainty model was fitted, but its "
            f"features agree to {deviation:.0e}: taken as the same potential in another form"
        )
