"""Meanings of a threshold that the calibration data turn into a number in eV/Å."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Quantile:
    """The reading that a fraction `q` of the calibration frames stay below.

    Args:
        q: Fraction in (0, 1), for example 0.99.

    Raises:
        ValueError: `q` is outside (0, 1).
    """

    q: float

    def __post_init__(self) -> None:
        if not 0 < self.q < 1:
            raise ValueError(f"a quantile lies between 0 and 1, not at {self.q!r}.")

    def __str__(self) -> str:
        return f"Quantile({self.q:g})"

    @property
    def needed(self) -> int:
        """Fewest calibration frames that know this quantile: one of them lies above it."""
        return int(np.ceil(1 / (1 - self.q) - 1e-9))

    def resolve(self, readings: np.ndarray) -> float:
        """The threshold in eV/Å.

        Args:
            readings: (n_frames,) readings of the calibration frames, eV/Å.

        Raises:
            ValueError: There are too few frames to know this quantile: fewer than 1/(1 - q) lie above it.
        """
        readings = readings[np.isfinite(readings)]
        if len(readings) < self.needed:
            raise ValueError(
                f"Quantile({self.q}) needs at least {self.needed} calibration frames, the uncertainty model has "
                f"{len(readings)}. Calibrate on more frames or ask for a lower quantile."
            )
        return float(np.quantile(readings, self.q))
