"""ASE's `SumCalculator` and similar classes: a potential that has a backend, plus corrections that have none.

`mace_mp(dispersion=True)` returns such a sum. The corrections (D3, a pair potential, a delta calculator) count as
exact for the uncertainty: their contributions are added to the mean and to the `base` of the last layers.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, PropertyNotImplementedError
from ase.calculators.mixing import LinearCombinationCalculator
from ase.stress import full_3x3_to_voigt_6_stress
from torch import Tensor

from ase_uq.backends.base import Backend, Batch
from ase_uq.backends.identity import Identity
from ase_uq.backends.registry import find_module
from ase_uq.forward_pass import ConfidenceBins, EnergyLayer, ForceLayer, ForwardPass, Gradients, Members, Slopes
from ase_uq.properties import STANDARD


class SummedBackend(Backend):
    """A linear combination of calculators, one of which has a backend.

    Args:
        calculator: A `SumCalculator`, or another calculator of `ase.calculators.mixing`.

    Raises:
        TypeError: None of the calculators has a backend, several have one, or not all of them give an energy.
    """

    name = "summed"

    def __init__(self, calculator: LinearCombinationCalculator) -> None:
        self.calculator = calculator
        members = calculator.mixer.calcs
        known = [index for index, member in enumerate(members) if find_module(member) is not None]
        names = ", ".join(type(member).__name__ for member in members)
        if not known:
            raise TypeError(f"none of the calculators in this {type(calculator).__name__} has a backend: {names}.")
        if len(known) > 1:
            raise TypeError(
                f"{len(known)} of the calculators in this {type(calculator).__name__} ({names}) have a backend of "
                "their own; one is supported. For a committee, give MACECalculator several models."
            )
        self._known = known[0]
        module = find_module(members[self._known])
        assert module is not None
        self._inner: Backend = module.wrap(members[self._known])
        self.info_keys, self.required_info_keys = self._inner.info_keys, self._inner.required_info_keys
        self.elements, self.direct = self._inner.elements, self._inner.direct
        self.heads, self.head = self._inner.heads, self._inner.head
        common = set(self._inner.results).intersection(*(c.implemented_properties for _, c in self._corrections()))
        self.results = tuple(key for key in STANDARD if key in common)
        if "energy" not in common:
            raise TypeError(f"the calculators in this {type(calculator).__name__} ({names}) have no energy in common.")

    @property
    def device(self) -> torch.device:
        return self._inner.device

    @property
    def dtype(self) -> torch.dtype:
        return self._inner.dtype

    @cached_property
    def _probed(self) -> tuple[Identity, float]:
        # The corrections may fail on the probe structure: their names and parameters are in the settings instead.
        inner = self._inner.identity
        return Identity(self._settings(), inner.weights, inner.probe), self._inner.cutoff

    def _modules(self) -> Sequence[torch.nn.Module]:
        return self._inner._modules()

    def _settings(self) -> dict[str, Any]:
        corrections = [
            [weight, type(calculator).__name__, _plain_parameters(calculator)]
            for weight, calculator in self._corrections()
        ]
        return {**self._inner._settings(), "weight_in_sum": self._weight, "added": sorted(corrections, key=str)}

    @property
    def _exact_settings(self) -> tuple[str, ...]:
        return ("weight_in_sum", "added") if self._weight == 1 else ()  # else σ of the potential alone is another

    @property
    def _trained_settings(self) -> tuple[str, ...]:
        return self._inner._trained_settings

    @property
    def _weight(self) -> float:
        return float(self.calculator.mixer.weights[self._known])

    def _corrections(self) -> list[tuple[float, BaseCalculator]]:
        mixer = self.calculator.mixer
        pairs = zip(mixer.weights, mixer.calcs, strict=True)
        return [(float(weight), member) for index, (weight, member) in enumerate(pairs) if index != self._known]

    def _collate(self, frames: Sequence[Atoms]) -> Any:
        return self._inner._collate(frames)

    def _build(self) -> Callable[[Sequence[Atoms]], Any] | None:
        return self._inner._build()

    def _placed(self, data: Any) -> Any:
        return self._inner._placed(data)

    def _volume(self, atoms: Atoms) -> float:
        # Corrections disagree on what a stress is where only some directions are periodic.
        return self._inner._volume(atoms) if atoms.pbc.all() else 0.0

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        inner = self._inner._forward(batch, forces, gradients)
        added = {key: self._added(key, inner, batch) for key in self.results if forces or key in ("energy", "energies")}
        weight = self._weight

        def total(key: str) -> Tensor | None:
            value = getattr(inner, key)
            return None if value is None or key not in added else weight * value + added[key]

        energy, energy_layer = total("energy"), inner.energy_layer
        assert energy is not None
        return replace(
            inner,
            energy=energy,
            energies=total("energies"),
            forces=total("forces"),
            stress=total("stress"),
            energy_layer=EnergyLayer(
                weight * energy_layer.features, energy_layer.weights, weight * energy_layer.base + added["energy"]
            ),
            force_layer=_shifted(inner.force_layer, weight, added.get("forces")),
            members=_members(inner.members, weight, added),
            confidence=_scaled(inner.confidence, weight),
            gradients=None if inner.gradients is None else _ScaledGradients(inner.gradients, weight),
        )

    def _added(self, key: str, inner: ForwardPass, batch: Batch) -> Tensor:
        """Contribution of the corrections to one result of the batch."""
        rows = []
        for atoms in batch.frames:
            copy = atoms.copy()  # a calculator may keep or change the structure that it is given
            try:
                rows.append(sum(w * _plain(key, member.get_property(key, copy)) for w, member in self._corrections()))
            except PropertyNotImplementedError:
                if key != "stress":
                    raise
                rows.append(np.full(6, np.nan))  # without a cell many corrections have no stress, so the sum has none
        joined = np.concatenate(rows) if key in ("energies", "forces") else np.stack(rows)
        # Energies of many atoms need double precision, as in the potentials' own reference energies.
        dtype = inner.energy.dtype if key == "energy" else self.dtype
        return torch.as_tensor(joined, dtype=dtype, device=self.device)


class _ScaledGradients(Gradients):
    """Gradients of the potential in the sum: the corrections have no features and no parameters."""

    def __init__(self, inner: Gradients, weight: float) -> None:
        self._inner, self._weight = inner, weight

    def of_features(self, cotangent: Tensor, energy_cotangent: Tensor | None = None) -> Tensor:
        # The last layer's features of the sum are those of the potential times the weight.
        scaled = None if energy_cotangent is None else self._weight * energy_cotangent
        return self._inner.of_features(cotangent, scaled)

    def of_energy_layer(self, weights: Tensor) -> Slopes:
        return self._inner.of_energy_layer(self._weight * weights)

    def of_energies(self) -> Iterator[Tensor]:
        return (self._weight * gradient for gradient in self._inner.of_energies())

    def of_forces(self, tangents: Tensor) -> Iterator[Tensor]:
        return (self._weight * gradient for gradient in self._inner.of_forces(tangents))


def accepts(calculator: BaseCalculator) -> bool:
    """Whether this backend wraps the calculator."""
    return isinstance(calculator, LinearCombinationCalculator)


def wrap(calculator: BaseCalculator) -> SummedBackend:
    """The backend of a `SumCalculator`."""
    assert isinstance(calculator, LinearCombinationCalculator)
    return SummedBackend(calculator)


def _plain_parameters(calculator: BaseCalculator) -> dict[str, Any]:
    """The parameters that are JSON values; arrays, devices and other objects are left out."""
    parameters = getattr(calculator, "parameters", None) or {}
    plain = {key: value for key, value in sorted(parameters.items()) if isinstance(value, int | float | str)}
    # 1 and 1.0 are the same parameter, but not the same JSON.
    return {key: value if isinstance(value, bool | str) else float(value) for key, value in plain.items()}


def _plain(key: str, value: Any) -> np.ndarray:
    array = np.asarray(value, float)
    return full_3x3_to_voigt_6_stress(array) if key == "stress" and array.shape == (3, 3) else array


def _shifted(layer: ForceLayer | None, weight: float, added: Tensor | None) -> ForceLayer | None:
    if layer is None:
        return None
    base = weight * layer.base
    return replace(layer, features=weight * layer.features, base=base if added is None else base + added)


def _members(members: Members | None, weight: float, added: dict[str, Tensor]) -> Members | None:
    if members is None:
        return None

    def each(key: str) -> Tensor | None:
        value = getattr(members, key)
        return None if value is None or key not in added else weight * value + added[key]

    return Members(weight * members.energy + added["energy"], each("forces"), each("stress"))


def _scaled(confidence: ConfidenceBins | None, weight: float) -> ConfidenceBins | None:
    """The corrections count as exact: the error of the sum is the error of the potential times its weight."""
    if confidence is None:
        return None
    return ConfidenceBins(confidence.probabilities, abs(weight) * confidence.edges)
