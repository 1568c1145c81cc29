"""The interface of calibrators, and the likelihood that all of them are fitted by."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from ase_uq.io.entries import Entries

# Scores are means of squares, of order one on the training rows; anything smaller than this counts as zero.
SMALLEST_SCORE = 1e-12


@dataclass(frozen=True)
class Residuals:
    """Scores of calibration rows, with the residuals they should explain.

    Args:
        scores: (n, n_scores) raw scores, non-negative and variance-like.
        squares: (n,) Σ_c r_c² over the components of a row, in squared ASE units.
        components: Number of components of a row: 3 for an isotropic force score, 1 otherwise.
        groups: (n,) index of the frame (or block of frames) that a row belongs to; rows of one group are not
            independent.
        limits: (n,) σ∞² of each row, in squared ASE units; None where no calibrator needs it.
        numbers: (n,) atomic number of each row; None where rows are not atoms.
    """

    scores: np.ndarray
    squares: np.ndarray
    components: int
    groups: np.ndarray
    limits: np.ndarray | None = None
    numbers: np.ndarray | None = None

    def only(self, chosen: np.ndarray) -> "Residuals":
        """The chosen rows."""
        limits, numbers = (None if rows is None else rows[chosen] for rows in (self.limits, self.numbers))
        return Residuals(
            self.scores[chosen], self.squares[chosen], self.components, self.groups[chosen], limits, numbers
        )


# Of log σ², in squared ASE units: e^±600 is a number in float64, and nobody is wrong by e^50 eV/Å.
SMALLEST_LOG, LARGEST_LOG = -600.0, 100.0


class Calibrator(ABC):
    """Turns scores into variances. Immutable; `settings` describes it completely."""

    @property
    @abstractmethod
    def settings(self) -> dict[str, Any]:
        """JSON values from which `load` restores the calibrator."""

    @classmethod
    @abstractmethod
    def load(cls, settings: dict[str, Any]) -> "Calibrator":
        """The calibrator with these settings."""

    @classmethod
    @abstractmethod
    def check(cls, settings: Entries) -> None:
        """Refuses settings of a file that are not those of a calibrator, or whose variance is no positive number.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """

    @abstractmethod
    def combines(self, n_scores: int) -> bool:
        """Whether it is made for so many scores."""

    @abstractmethod
    def variance(self, scores: Tensor, limit: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        """The variance of each component, in squared ASE units.

        Args:
            scores: (..., n_scores).
            limit: σ∞², what the variance is where nothing is known; only the form with a far field reads it.
            numbers: Atomic numbers; read by the same form. Both have a shape that broadcasts to (...).
        """

    @abstractmethod
    def describe(self) -> str:
        """The formula with its numbers, as text."""


def mean_nll(variance: np.ndarray, residuals: Residuals) -> float:
    """Mean negative log-likelihood of a component: ½[log 2πσ² + (Σ_c r_c²/K)/σ²], natural logarithm."""
    mean_square = residuals.squares / residuals.components
    return float(np.mean(0.5 * (np.log(2 * np.pi * variance) + mean_square / variance)))
