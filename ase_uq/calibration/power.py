"""σ² = e^c · Π_k u_k^p_k with p_k ≥ 0: a convex fit in (c, p)."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.calibration.base import LARGEST_LOG, SMALLEST_LOG, SMALLEST_SCORE, Calibrator, Residuals
from ase_uq.io.entries import Entries

_LARGEST_POWER = 20.0


@dataclass(frozen=True)
class PowerCalibrator(Calibrator):
    """log σ² = constant + Σ_k power_k · log score_k.

    Args:
        constant: c, in the logarithm of squared ASE units.
        powers: p_k ≥ 0. A single leverage with p = 1 is the Bayesian form without a floor; errors of trained
            potentials favour p < 1.
        floors: Smallest score_k among the calibration rows; a smaller score counts as this one, since no calibration
            row shows that errors keep falling below it.
        boundary: `"useless"` if all powers are zero, else empty.
    """

    constant: float
    powers: tuple[float, ...]
    floors: tuple[float, ...]
    boundary: str = ""

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "kind": "power",
            "constant": self.constant,
            "powers": list(self.powers),
            "floors": list(self.floors),
            "boundary": self.boundary,
        }

    @classmethod
    def load(cls, settings: dict[str, Any]) -> "PowerCalibrator":
        return cls(settings["constant"], tuple(settings["powers"]), tuple(settings["floors"]), settings["boundary"])

    @classmethod
    def check(cls, settings: Entries) -> None:
        settings.keys(("kind", "constant", "powers", "floors", "boundary"))
        constant = settings.number("constant")
        powers = settings.numbers("powers", 0, _LARGEST_POWER)
        floors = settings.numbers("floors", SMALLEST_SCORE, length=len(powers))
        least = constant + float(np.log(floors) @ powers)
        if not SMALLEST_LOG <= least <= LARGEST_LOG:
            raise settings.wrong("constant", "one with a possible variance at the floors of the scores")
        settings.text("boundary", ("", "useless"))

    def combines(self, n_scores: int) -> bool:
        return len(self.powers) == n_scores

    def variance(self, scores: Tensor, limit: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        powers, floors = torch.tensor([self.powers, self.floors], dtype=scores.dtype, device=scores.device)
        log_variance = self.constant + torch.maximum(scores, floors).log() @ powers
        return torch.exp(log_variance.clamp(max=-SMALLEST_LOG))  # far away it would be infinite

    def describe(self) -> str:
        powers = "·".join(f"u[{k}]^{p:.2f}" for k, p in enumerate(self.powers) if p > 1e-3)
        return f"σ² = {np.exp(self.constant):.3g}·{powers or '1'}"


# Of a loss of about 1, in a mean over many rows.
_ROUNDING = 1e-15


def fit_power(residuals: Residuals) -> PowerCalibrator:
    """The maximum-likelihood (c, p) with p ≥ 0.

    The mean of ½[η + (q/K)·e^(-η)] is convex in η = c + Σ p_k log u_k, hence in (c, p), so there is one optimum. There
    mean[(q/K)/σ²] = 1 exactly (derivative with respect to c).
    """
    floors = np.maximum(residuals.scores.min(0), SMALLEST_SCORE)
    logs = np.log(np.maximum(residuals.scores, floors))
    centre = logs.mean(0)
    logs = logs - centre
    mean_square = residuals.squares / residuals.components
    scale = max(float(mean_square.mean()), 1e-300)
    y = mean_square / scale
    design = np.column_stack([np.ones(len(y)), logs])

    def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
        eta = design @ x
        ratio = y * np.exp(-eta)
        return float(np.mean(0.5 * (eta + ratio))), design.T @ (0.5 * (1 - ratio)) / len(y)

    count = logs.shape[1]
    start = np.concatenate([[0.0], np.full(count, 1 / (2 * count))])
    bounds = [(None, None)] + [(0.0, _LARGEST_POWER)] * count
    found = minimize(
        loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options={"ftol": 1e-14, "gtol": 1e-9, "maxiter": 2000}
    )
    powers = _polished(found.x, loss, design, y)[1:]
    # The optimum over c alone is closed, so the first-order identity holds to rounding and not to `gtol`.
    constant = np.log(np.mean(y * np.exp(-(logs @ powers)))) + np.log(scale) - centre @ powers
    boundary = "useless" if powers.max() < 1e-3 else ""
    return PowerCalibrator(float(constant), tuple(powers.tolist()), tuple(floors.tolist()), boundary)


def _polished(
    x: np.ndarray, loss: Callable[[np.ndarray], tuple[float, np.ndarray]], design: np.ndarray, y: np.ndarray
) -> np.ndarray:
    """Newton's method from where L-BFGS stopped: the units of the residuals decide when it does, not what is best.

    Powers at a bound stay there. A step that leaves the bounds or makes the loss grow is not taken.
    """
    free = np.concatenate([[True], (x[1:] > 0) & (x[1:] < _LARGEST_POWER)])
    for _ in range(3):
        value, slope = loss(x)
        columns = design[:, free]
        curvature = columns.T @ (columns * (0.5 * y * np.exp(-design @ x))[:, None]) / len(y)
        step = np.zeros_like(x)
        step[free] = np.linalg.lstsq(curvature, slope[free])[0]
        nearer = x - step
        if (nearer[1:] < 0).any() or (nearer[1:] > _LARGEST_POWER).any() or not loss(nearer)[0] <= value + _ROUNDING:
            break
        x = nearer
    return x
