"""Checks find frames that are wrong, whatever their uncertainty.

Like rules they are pure: what a check must remember between two frames is a state that it receives and returns. Its
messages are plain ASCII, since they go into files that other programs read.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
from ase import Atoms
from ase.geometry import find_mic
from ase.neighborlist import natural_cutoffs, neighbor_list

# Bonds are the pairs closer than this many times the sum of their covalent radii. H-H across a CH2 group is at 2.9
# times and C-C over two bonds at 1.7 times, while thermal stretching stays within 1.2.
_BONDED = 1.3

# A window of fewer samples has no meaningful spread; a spread below this share of the energy (or of 1 eV) is rounding
# in single precision, or a relaxation that has come to rest.
_FEWEST_SAMPLES = 20
_ROUNDING = 1e-6


@dataclass(frozen=True, eq=False)
class Snapshot:
    """One frame, as checks look at it.

    Args:
        atoms: The structure; never changed.
        energy: Energy, eV; None if unknown.
        forces: (n_atoms, 3) forces, eV/Å; None if unknown.
        time: Simulated time, fs; None if there is none, as in an optimiser.
        contact: (n_atoms,) distance of each atom's closest neighbour, as a share of the shortest distance of the two
            elements in the training frames; None if unknown.
    """

    atoms: Atoms
    energy: float | None
    forces: np.ndarray | None
    time: float | None
    contact: np.ndarray | None = None


class Check(ABC):
    """Base of all checks. Subclasses are frozen dataclasses; a state is None at first and always a JSON value."""

    @abstractmethod
    def inspect(self, state: Any, snapshot: Snapshot) -> tuple[Any, str]:
        """Inspects one frame; a pure function.

        Args:
            state: State that the frame before returned; None at the first frame.
            snapshot: The frame.

        Returns:
            The state for the next frame, and what is wrong with this one, in words; empty if nothing is.
        """


@dataclass(frozen=True)
class Finite(Check):
    """Finds positions, an energy or forces that are NaN or infinite."""

    def inspect(self, state: Any, snapshot: Snapshot) -> tuple[None, str]:
        atoms, energy = snapshot.atoms, snapshot.energy
        complaints = [_not_finite("position", atoms.positions, atoms)]
        if energy is not None and not math.isfinite(energy):
            complaints.append(f"energy is {energy:g} eV")
        if snapshot.forces is not None:
            complaints.append(_not_finite("force", snapshot.forces, atoms))
        return None, "; ".join(filter(None, complaints))


@dataclass(frozen=True)
class MaxTemperature(Check):
    """Finds a kinetic temperature above a limit.

    The temperature of a single frame fluctuates by sqrt(2/f) of itself, with f degrees of freedom: 9 % for 83 atoms,
    a third for 7. Leave room for six times that: a limit little above the thermostat's temperature for a large cell,
    three times it for a small molecule. Atoms that cannot move have no temperature, so they pass.

    Args:
        kelvin: The limit, K.

    Raises:
        ValueError: `kelvin` is not positive.
    """

    kelvin: float

    def __post_init__(self) -> None:
        _check_positive("the highest temperature", self.kelvin, "K")

    def inspect(self, state: Any, snapshot: Snapshot) -> tuple[None, str]:
        if snapshot.atoms.get_number_of_degrees_of_freedom() <= 0:
            return None, ""
        temperature = snapshot.atoms.get_temperature()
        if temperature <= self.kelvin:
            return None, ""
        return None, f"temperature is {temperature:.4g} K, more than {self.kelvin:g} K"


@dataclass(frozen=True)
class Bonds(Check):
    """Finds bonds of the first frame that have broken, and atoms that have come too close.

    Bonds are the pairs of the first frame within 1.3 times the sum of their covalent radii, at their nearest periodic
    images. This is for molecules and solids that should stay what they are: where atoms change partners, as ions in a
    liquid do, give `longest=math.inf` to look for fused atoms alone. A frame with other atoms, as after an exchange
    with a reservoir, counts as the first one again.

    Args:
        longest: A bond is broken when longer than this many times its length in the first frame; above 1.
        shortest: Two atoms are fused when closer than this many times the sum of their covalent radii, unless they
            were that close in the first frame; between 0 and 1.

    Raises:
        ValueError: A parameter is outside its range.
    """

    longest: float = 1.5
    shortest: float = 0.6

    def __post_init__(self) -> None:
        if not self.longest > 1:
            raise ValueError(f"longest is above 1, in units of the first length of a bond, not {self.longest!r}.")
        if not 0 < self.shortest < 1:
            raise ValueError(
                f"shortest lies between 0 and 1, in units of the sum of covalent radii, not at {self.shortest!r}."
            )

    def inspect(self, state: dict[str, list] | None, snapshot: Snapshot) -> tuple[dict[str, list] | None, str]:
        atoms = snapshot.atoms
        if not (np.isfinite(atoms.positions).all() and np.isfinite(atoms.cell.array).all()):
            return state, "bonds cannot be measured: positions or cell are not finite"
        close = _pairs_within(atoms, self.shortest)
        numbers = atoms.numbers.tolist()
        if state is not None and state.get("numbers", numbers) != numbers:
            state = None  # an older state does not say of which atoms it is
        if state is None:
            pairs = _pairs_within(atoms, _BONDED)
            bonds = [[i, j, length] for (i, j), length in pairs.items() if i != j]
            return {"bonds": bonds, "close": [list(pair) for pair in close], "numbers": numbers}, ""
        fused = {pair: length for pair, length in close.items() if list(pair) not in state["close"]}
        complaints = [self._broken(state["bonds"], atoms), self._fused(fused, atoms)]
        return state, "; ".join(filter(None, complaints))

    def _broken(self, bonds: Sequence[Sequence[float]], atoms: Atoms) -> str:
        if not bonds:
            return ""
        table = np.asarray(bonds, float)
        pairs, first = table[:, :2].astype(int), table[:, 2]
        vectors = atoms.positions[pairs[:, 1]] - atoms.positions[pairs[:, 0]]
        _, lengths = find_mic(vectors, atoms.cell, cast(Any, atoms.pbc))  # ASE's annotation allows only one bool
        ratios = lengths / first
        n_broken = int(np.count_nonzero(ratios > self.longest))
        if not n_broken:
            return ""
        worst = int(np.argmax(ratios))
        i, j = pairs[worst]
        return (
            f"bond of {_name(atoms, i)} and {_name(atoms, j)} is broken: {lengths[worst]:.3g} A, more than "
            f"{self.longest:g} times the {first[worst]:.3g} A of the first frame{_others(n_broken, 'bond')}"
        )

    def _fused(self, fused: dict[tuple[int, int], float], atoms: Atoms) -> str:
        if not fused:
            return ""
        i, j = min(fused, key=lambda pair: fused[pair])
        radii = natural_cutoffs(atoms)
        return (
            f"{_name(atoms, i)} and {_name(atoms, j)} are fused: {fused[i, j]:.3g} A apart, less than "
            f"{self.shortest:g} times the {radii[i] + radii[j]:.3g} A of their covalent radii"
            f"{_others(len(fused), 'pair')}"
        )


@dataclass(frozen=True)
class EnergySpike(Check):
    """Finds an energy that jumps: far from the samples before it, in units of their spread.

    The potential energy per atom is compared with mean and standard deviation of the window of samples before it; the
    sample itself is not among them, since it would widen the spread that it is measured with. Nothing is found before
    there are 20 samples. A standard deviation below a millionth of the energy is rounding and counts as that much. A
    jump enters the window like any other sample, so an energy that stays at its new level is found once.

    Args:
        sd: Distance from the mean, in standard deviations, at or above which it is a jump.
        window: Number of samples to look back on, at least 20.
        rises_only: Whether to ignore falls, which a relaxation should have.

    Raises:
        ValueError: `sd` is not positive, or `window` is below 20.
    """

    sd: float = 10.0
    window: int = 100
    rises_only: bool = False

    def __post_init__(self) -> None:
        _check_positive("the sd of an energy spike", self.sd, "standard deviations")
        if self.window < _FEWEST_SAMPLES:
            raise ValueError(
                f"the window of an energy spike has at least {_FEWEST_SAMPLES} samples, not {self.window}."
            )

    def inspect(self, state: list[float] | None, snapshot: Snapshot) -> tuple[list[float], str]:
        before = [] if state is None else state
        if snapshot.energy is None:
            return before, ""
        energy = snapshot.energy / len(snapshot.atoms)
        if not math.isfinite(energy):
            # Not kept in the window, where it would hide all later jumps.
            return before, f"energy is {snapshot.energy:g} eV"
        after = [*before, energy][-self.window :]
        if len(before) < _FEWEST_SAMPLES:
            return after, ""
        mean = float(np.mean(before))
        spread = max(float(np.std(before)), _ROUNDING * max(1.0, abs(mean)))
        jump = (energy - mean) / spread
        if (jump if self.rises_only else abs(jump)) < self.sd:
            return after, ""
        change = f"{'rose' if jump > 0 else 'fell'} by {abs(energy - mean):.3g} eV per atom"
        return after, (
            f"energy {change}, {abs(jump):.3g} standard deviations of the {len(before)} samples before it "
            f"(limit {self.sd:g})"
        )


def _pairs_within(atoms: Atoms, times: float) -> dict[tuple[int, int], float]:
    """Distances of pairs i ≤ j closer than `times` the sum of their covalent radii, at their nearest images."""
    first, second, distances = neighbor_list("ijd", atoms, times * np.array(natural_cutoffs(atoms)))
    nearest: dict[tuple[int, int], float] = {}
    for i, j, distance in zip(first.tolist(), second.tolist(), distances.tolist(), strict=True):
        if i <= j:
            nearest[i, j] = min(distance, nearest.get((i, j), math.inf))
    return nearest


def _not_finite(what: str, rows: np.ndarray, atoms: Atoms) -> str:
    (bad,) = np.nonzero(~np.isfinite(rows).all(1))
    if not len(bad):
        return ""
    return f"{what} of {_name(atoms, bad[0])} is not finite{_others(len(bad), 'atom')}"


def _name(atoms: Atoms, index: int) -> str:
    return f"atom {index} ({atoms.symbols[index]})"


def _others(n: int, noun: str) -> str:
    """Text for the others beside the one that was named."""
    return "" if n == 1 else f", and {n - 1} more {noun}{'s' if n > 2 else ''}"


def _check_positive(name: str, value: float, unit: str) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name} is a positive number in {unit}, not {value!r}.")
