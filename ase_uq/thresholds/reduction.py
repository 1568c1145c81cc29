"""From the force uncertainties of the atoms to one number per frame: the reading that thresholds are compared with."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase.data import atomic_numbers


def atom_norms(forces_uncertainty: np.ndarray) -> np.ndarray:
    """(n_atoms, 3) → (n_atoms,): ε_i = sqrt(Σ_c σ_ic²), eV/Å, one number per atom."""
    return np.linalg.norm(np.asarray(forces_uncertainty, float), axis=-1)


@dataclass(frozen=True)
class Reduction:
    """How the atoms of a frame become one reading.

    Args:
        kind: `"max"`, `"mean"`, `"top3"` (mean of the three largest), or a quantile in (0, 1).
        elements: Chemical symbols of the atoms to look at; None for all.
        indices: Indices of the atoms to look at; None for all.

    Raises:
        ValueError: `kind` is none of these, or a symbol is not that of an element.
    """

    kind: str | float = "max"
    elements: tuple[str, ...] | None = None
    indices: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        is_quantile = isinstance(self.kind, int | float) and 0 < self.kind < 1
        if self.kind not in ("max", "mean", "top3") and not is_quantile:
            raise ValueError(f"a reduction is 'max', 'mean', 'top3' or a quantile between 0 and 1, not {self.kind!r}.")
        unknown = [symbol for symbol in self.elements or () if symbol not in atomic_numbers]
        if unknown:
            raise ValueError(f"{unknown[0]!r} is not a chemical symbol. Give elements like ('C', 'O').")

    def __call__(self, norms: np.ndarray, numbers: np.ndarray) -> float:
        """The reading of one frame.

        Args:
            norms: (n_atoms,) ε_i, eV/Å.
            numbers: (n_atoms,) atomic numbers.

        Returns:
            The reading, eV/Å; `-inf` if no atom of the frame is looked at, so that such a frame is never flagged.

        Raises:
            IndexError: An index is beyond the last atom of the frame.
        """
        chosen = np.ones(len(norms), bool)
        if self.indices is not None:
            if len(self.indices) and max(self.indices) >= len(norms):
                raise IndexError(f"atom index {max(self.indices)} is beyond the frame's {len(norms)} atoms.")
            chosen[:] = False
            chosen[list(self.indices)] = True
        if self.elements is not None:
            chosen &= np.isin(numbers, [atomic_numbers[symbol] for symbol in self.elements])
        values = np.asarray(norms)[chosen]
        if not len(values):
            return float("-inf")
        if self.kind == "max":
            return float(values.max())
        if self.kind == "mean":
            return float(values.mean())
        if self.kind == "top3":
            return float(np.sort(values)[-3:].mean())
        # With an infinite value numpy's interpolation would give NaN (inf · 0), so the next higher value is taken.
        method = "higher" if np.isinf(values).any() else "linear"
        return float(np.quantile(values, float(self.kind), method=method))


def readings_of(
    norms: np.ndarray, numbers: np.ndarray, n_atoms_of_frame: Sequence[int] | np.ndarray, reduction: Reduction
) -> np.ndarray:
    """(n_frames,) readings of frames whose atoms follow one another in flat arrays."""
    ends = np.cumsum(n_atoms_of_frame)
    starts = ends - n_atoms_of_frame
    return np.array([reduction(norms[a:b], numbers[a:b]) for a, b in zip(starts, ends, strict=True)])
