"""σ² = a + b·u, with (a, b) from an exact one-dimensional optimisation."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import minimize_scalar
from torch import Tensor

from ase_uq.calibration.base import LARGEST_LOG, SMALLEST_LOG, Calibrator, Residuals
from ase_uq.io.entries import Entries

# The floor of a, as a share of the mean square: with zero variance at u = 0, one exact row would outweigh all others.
_SMALLEST_SHARE = 1e-6
_LOG_RATIO = (np.log(1e-3), np.log(1e6))


@dataclass(frozen=True)
class AffineCalibrator(Calibrator):
    """σ² = intercept + slope · score[column].

    Args:
        intercept: a > 0, squared ASE units.
        slope: b ≥ 0, squared ASE units.
        column: Index of the score that is used.
        boundary: `"useless"` if the likelihood is largest at b = 0, `"bare"` if it is largest at a = 0, else empty.
    """

    intercept: float
    slope: float
    column: int = 0
    boundary: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "kind": "affine",
            "intercept": self.intercept,
            "slope": self.slope,
            "column": self.column,
            "boundary": self.boundary,
        }

    @classmethod
    def load(cls, settings: dict[str, Any]) -> "AffineCalibrator":
        return cls(**{key: value for key, value in settings.items() if key != "kind"})

    @classmethod
    def check(cls, settings: Entries) -> None:
        settings.keys(("kind", "intercept", "slope", "column", "boundary"))
        settings.number("intercept", np.exp(SMALLEST_LOG), np.exp(LARGEST_LOG))
        settings.number("slope", 0)
        if "column" in settings:
            settings.whole("column")
        if "boundary" in settings:
            settings.text("boundary", ("", "useless", "bare"))

    def combines(self, n_scores: int) -> bool:
        return self.column < n_scores

    def variance(self, scores: Tensor, limit: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        return self.intercept + self.slope * scores[..., self.column]

    def describe(self) -> str:
        return f"σ² = {self.intercept:.3g} + {self.slope:.3g}·u[{self.column}]"


def fit_affine(residuals: Residuals, column: int = 0) -> AffineCalibrator:
    """The maximum-likelihood (a, b) of σ² = a + b·u.

    With b = ρa the likelihood is maximised over a in closed form, a(ρ) = mean[q/(1 + ρu)]/K, which leaves a bounded
    search over log ρ; at the optimum mean[q/(a + bu)] = K exactly. Derived here and checked against Nelder-Mead.

    Args:
        residuals: Calibration rows; q is `squares`, K is `components`.
        column: Index of the score to use as u.
    """
    u, q, components = residuals.scores[:, column], residuals.squares, residuals.components
    mean_u = max(float(u.mean()), 1e-300)

    def profile(log_ratio: float) -> float:
        growth = 1 + np.exp(log_ratio) / mean_u * u
        a = np.mean(q / growth) / components
        # Mean over rows of K/2·[log σ² + (q/K)/σ²]; at the profiled a the mean of the second term is 1.
        return float(components / 2 * (np.log(max(a, 1e-300)) + np.mean(np.log(growth)) + 1))

    grid = np.linspace(*_LOG_RATIO, 40)
    values = [profile(x) for x in grid]
    best = int(np.argmin(values))
    bounds = (grid[max(best - 1, 0)], grid[min(best + 1, len(grid) - 1)])
    optimum = minimize_scalar(profile, bounds=bounds, method="bounded", options={"xatol": 1e-10})
    log_ratio = float(optimum.x)
    boundary = "useless" if log_ratio < _LOG_RATIO[0] + 0.1 else "bare" if log_ratio > _LOG_RATIO[1] - 0.1 else ""
    ratio = np.exp(log_ratio) / mean_u
    a = float(np.mean(q / (1 + ratio * u)) / components)
    floor = _SMALLEST_SHARE * float(q.mean()) / components
    return AffineCalibrator(max(a, floor), float(ratio) * a, column, boundary)
