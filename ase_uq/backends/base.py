"""The protocol of a backend: one forward pass turns structures into mean, features and exact last-layer features."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, final

import numpy as np
import torch
from ase import Atoms
from ase.data import chemical_symbols

from ase_uq.backends.identity import (
    PROBE_TOLERANCE,
    Identity,
    differing,
    probe_structure,
    relative_deviation,
    weights_hash,
)
from ase_uq.backends.structures import check_structures
from ase_uq.errors import InputError, PotentialMismatch
from ase_uq.forward_pass import ForwardPass

if TYPE_CHECKING:
    from ase_uq.backends.stochastic import Blip, StochasticModel

_NAMED = 8  # elements that a message names


@dataclass(frozen=True)
class Batch:
    """Structures in the form a backend evaluates.

    Args:
        frames: The structures, unchanged.
        data: The structures as the potential's package represents them.
    """

    frames: tuple[Atoms, ...]
    data: Any


@dataclass(frozen=True)
class Collator:
    """Builds the data of a batch in another process: it can be pickled, needs no weights and runs on the CPU.

    Args:
        elements: Atomic numbers that the potential knows.
        required_info_keys: Entries of `atoms.info` without which it cannot run.
        build: Turns checked structures into the data of the potential's package, which can also be pickled.
    """

    elements: frozenset[int]
    required_info_keys: tuple[str, ...]
    build: Callable[[Sequence[Atoms]], Any]

    def __call__(self, frames: Sequence[Atoms]) -> Any:
        """The data that `Backend.received` takes.

        Raises:
            InputError: In the same cases as `Backend.collate`.
        """
        check_structures(frames, self.elements, self.required_info_keys)
        return self.build(frames)


class Backend(ABC):
    """A wrapped potential: one forward pass gives means and features.

    A subclass is final and lives in one file, `backends/<name>.py`, together with three functions that
    `ase_uq.backends` calls: `accepts(calculator)`, `wrap(calculator)` and `load(prefix, target, ...)`.

    Attributes:
        name: Name of the backend.
        calculator: The user's own ASE calculator.
        info_keys: Entries of `atoms.info` that the potential reads.
        required_info_keys: Those of the `info_keys` without which it cannot run.
        elements: Atomic numbers that the potential knows.
        heads: Names of the heads of a potential that was trained on several references; empty for other potentials.
        head: The one of them that predicts.
        results: The standard results of ASE that it gives.
        direct: Whether forces come from a separate head, whose fit needs reference forces.
    """

    name: str
    calculator: Any  # an instance of the package's own class
    info_keys: tuple[str, ...] = ()
    required_info_keys: tuple[str, ...] = ()
    elements: frozenset[int]
    heads: tuple[str, ...] = ()
    head: str = ""
    results: tuple[str, ...]
    direct: bool = False

    @abstractmethod
    def _collate(self, frames: Sequence[Atoms]) -> Any:
        """The structures in the form that the potential's package needs; `frames` have been checked."""

    @abstractmethod
    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        """One forward pass, or one per member if the wrapped calculator is a committee."""

    @abstractmethod
    def _settings(self) -> dict[str, Any]:
        """Everything outside the weights on which predictions or features depend, as JSON values."""

    @abstractmethod
    def _modules(self) -> Sequence[torch.nn.Module]:
        """The modules that hold the weights of the potential."""

    def _build(self) -> Callable[[Sequence[Atoms]], Any] | None:
        """The `build` function of `Collator`, if neighbour lists are made on the CPU; None for other potentials."""
        return None

    def _placed(self, data: Any) -> Any:
        """The data that `_build` made, moved to the device of the potential."""
        raise NotImplementedError("a backend that has _build says in _placed how its data gets to the device")

    def _volume(self, atoms: Atoms) -> float:
        """Volume of the cell, Å³, if the stress of a structure is that of its cell; else 0."""
        return abs(float(np.linalg.det(atoms.cell.array)))

    @property
    def _exact_settings(self) -> tuple[str, ...]:
        """Settings of exact additions to the potential, which an uncertainty model of the potential alone may lack."""
        return ()

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        """Settings that further training may change."""
        return ()

    @property
    def is_concurrent(self) -> bool:
        """Whether several threads may call `forward` at a time, with the same results."""
        return False

    @property
    @abstractmethod
    def device(self) -> torch.device:
        """Device on which the potential runs."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """Precision of the potential."""

    @final
    def collate(self, frames: Sequence[Atoms], *, first: int = 0) -> Batch:
        """Checks structures and turns them into a batch; the structures are not changed.

        Args:
            frames: Structures.
            first: Number of the first structure, for messages.

        Raises:
            InputError: There is no structure, or a structure has no atoms, positions or a cell that are not finite, a
                periodic cell without extent, an element that the potential does not know, or a missing entry in
                `atoms.info`.
        """
        self.check(frames, first=first)
        return Batch(tuple(frames), self._collate(frames))

    @property
    @final
    def collator(self) -> Collator | None:
        """Collates in another process; None if only this process can collate, or if the device does it faster."""
        build = self._build()
        return None if build is None else Collator(self.elements, self.required_info_keys, build)

    @final
    def received(self, frames: Sequence[Atoms], data: Any) -> Batch:
        """The batch, on the device, of structures that `collator` has collated."""
        return Batch(tuple(frames), self._placed(data))

    @final
    def check(self, frames: Sequence[Atoms], *, first: int = 0, name: str = "structure") -> None:
        """Raises the `InputError` that `collate` would raise, without building a batch.

        Args:
            frames: Structures.
            first: Number of the first structure, for messages.
            name: Word for a structure in messages.
        """
        check_structures(frames, self.elements, self.required_info_keys, first=first, name=name)

    @final
    def forward(self, batch: Batch, *, forces: bool = True, gradients: bool = False) -> ForwardPass:
        """One forward pass over a batch.

        Args:
            batch: Batch from `collate` of this backend.
            forces: Whether to give forces and stress; without them a conservative potential saves its backward pass.
            gradients: Whether to give `ForwardPass.gradients`, for which the graph of the pass is kept.

        Raises:
            InputError: Gradients were requested, but the potential cannot give them in the form in which it was loaded.
        """
        # A conservative potential needs gradients even if the caller has switched them off.
        with torch.enable_grad():
            forward_pass = self._forward(batch, forces, gradients)
        if forward_pass.stress is None:
            return forward_pass
        volumes = torch.tensor([self._volume(atoms) for atoms in batch.frames], dtype=torch.float64)
        return replace(forward_pass, volumes=volumes.to(forward_pass.stress.device))

    def stochastic(self) -> "StochasticModel":
        """A copy of the potential whose weights can be drawn and trained.

        Raises:
            InputError: Weights of this potential cannot be drawn.
        """
        raise InputError(f"weights of {self.name} potentials cannot be drawn; those of mace and toy can.")

    @final
    def with_blip(self, blip: "Blip") -> "Backend":
        """The potential with trained weights, and the predictions of members with drawn weights beside its own.

        Raises:
            PotentialMismatch: The weights were trained from another potential.
            ArtefactError: The weights do not fit the potential.
            InputError: Weights of this potential cannot be drawn.
        """
        self.stochastic()
        blip.check(self)
        return self._with_blip(blip)

    def _with_blip(self, blip: "Blip") -> "Backend":
        """The potential with trained weights; `blip` was made from this one, whose weights can be drawn."""
        raise NotImplementedError("a backend that has stochastic says in _with_blip how trained weights are put in")

    @property
    def architecture(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights by name; the same for potentials that differ in their training only."""
        return {
            f"{number}.{name.replace('_orig_mod.', '')}": tuple(weight.shape)
            for number, module in enumerate(self._modules())
            for name, weight in module.named_parameters()
        }

    @property
    def identity(self) -> Identity:
        """Identity to which an uncertainty model is bound. The first call evaluates the probe structure."""
        return self._probed[0]

    @property
    def cutoff(self) -> float:
        """Largest distance of neighbours in Å. The first call evaluates the probe structure."""
        return self._probed[1]

    @cached_property
    def _probed(self) -> tuple[Identity, float]:
        batch = self.collate([probe_structure(self.elements, self.required_info_keys)])
        forward_pass = self.forward(batch)
        columns = [forward_pass.features]
        # The features do not depend on the last layers, but the predictions do.
        for layer in (forward_pass.energy_layer, forward_pass.force_layer):
            if layer is not None:
                columns.append((layer.features @ layer.weights).reshape(len(columns[0]), -1))
        identity = Identity(self._settings(), weights_hash(self._modules()), torch.cat(columns, 1).float().cpu())
        return identity, forward_pass.edges.cutoff

    @final
    def check_identity(self, fitted: Identity) -> str | None:
        """Compares the potential with the one an uncertainty model was fitted on.

        Returns:
            None if both are the same; a warning if the weights are stored differently but the probe structure has the
            same features (other kernels, converted layouts), or if this one has corrections in addition.

        Raises:
            PotentialMismatch: The potentials differ; the message names the setting, or the deviation of the probe. Or
                the probe of one of them is not finite.
        """
        here = self.identity
        advice = "Load the potential it was fitted on, or fit again with `ase-uq fit`."
        then, now = (settings.get("elements") for settings in (fitted.settings, here.settings))
        if then is not None and now is not None and set(then) != set(now):
            raise PotentialMismatch(
                f"the uncertainty model was fitted for {_symbols(then, now)}, this potential is for "
                f"{_symbols(now, then)}: another potential. {advice}"
            )
        added = [key for key in sorted(here.settings.keys() - fitted.settings.keys()) if key in self._exact_settings]
        without = [f"{key}: {here.settings[key]!r}" for key in added]
        for key in differing(fitted, here):
            if key not in added:
                raise PotentialMismatch(
                    f"the uncertainty model was fitted on another potential: {key} was {fitted.settings.get(key)!r}, "
                    f"here it is {here.settings.get(key)!r}. {advice}"
                )
        for probe, whose in ((here.probe, "this potential"), (fitted.probe, "the uncertainty model")):
            if not torch.isfinite(probe).all():
                raise PotentialMismatch(
                    f"the probe structure's features in {whose} are not finite, so the two cannot be compared. Its "
                    f"weights or its file are damaged. {advice}"
                )
        exact = (
            f"the uncertainty model was fitted without corrections that this potential has ({'; '.join(without)}): "
            "they count as exact, so its calibration labels should not have included them"
        )
        if fitted.weights == here.weights:
            return exact if without else None
        deviation = relative_deviation(here.probe, fitted.probe)
        if not deviation <= PROBE_TOLERANCE:  # NaN is no agreement
            raise PotentialMismatch(
                f"the uncertainty model was fitted on other weights: features of the probe structure differ by "
                f"{deviation:.1e} (relative; at most {PROBE_TOLERANCE:.0e} is the same potential). {advice}"
            )
        return (
            "the potential's weights are stored differently from when the uncertainty model was fitted, but its "
            f"features agree to {deviation:.0e}: taken as the same potential in another form"
            + (f"; {exact}" if without else "")
        )

    @final
    def check_architecture(self, fitted: Identity) -> None:
        """Refuses a potential that no further training makes of the one an uncertainty model was fitted on.

        Shapes of weights are not compared, which no uncertainty model knows.

        Raises:
            PotentialMismatch: They differ in more than weights; the message names in what.
        """
        here = self.identity
        advice = "An uncertainty model reads the features of one architecture: fit a new one with `ase-uq fit`."
        exempt = {"elements", *self._trained_settings, *self._exact_settings}
        for key in sorted(differing(fitted, here), key=lambda key: key != "package"):
            if key not in exempt:
                raise PotentialMismatch(
                    f"the uncertainty model was fitted on a potential of another architecture: {key} was "
                    f"{fitted.settings.get(key)!r}, here it is {here.settings.get(key)!r}. {advice}"
                )
        if (before := fitted.probe.shape[1]) != (width := here.probe.shape[1]):
            raise PotentialMismatch(
                f"the uncertainty model was fitted on a potential of another architecture: that gives {before} numbers "
                f"of an atom, this one {width}. {advice}"
            )


def _symbols(elements: Sequence[int], others: Sequence[int]) -> str:
    """Elements by their symbols; of many, only those that `others` lack."""
    if len(elements) <= _NAMED:
        return ", ".join(chemical_symbols[z] for z in sorted(elements))
    alone = sorted(set(elements) - set(others))
    with_them = f" ({', '.join(chemical_symbols[z] for z in alone[:_NAMED])}{', …' * (len(alone) > _NAMED)} among them)"
    return f"{len(elements)} elements{with_them if alone else ''}"
