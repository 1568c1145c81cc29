"""log σ² between two ends: calibration frames, and where the potential knows nothing. Our own derivation.

    log σ² = c + (log σ∞² - c)·t,    t = min(1, τ Σ_k w_k t_k),    t_k = (log u_k - ū_k)/(log u∞_k - ū_k)

The known end is where the calibration frames are: t = 0 at their mean ū_k of each log score, and σ² = e^c. The far end
is σ∞², what a potential is wrong by where it knows nothing (`uncertainty_model.far_field`), reached at the scores u∞_k
of training frames that were rattled until the potential knew nothing of them. In between log σ² is linear in the
logarithms of the scores. On the near side of the calibration frames, t < 0, σ∞² is its geometric mean over them: a
larger limit must not make σ smaller. Nor does σ fall on the way: where σ∞ is below e^(c/2), it stays there.

Calibration frames say how the scores share the way (w ≥ 0, Σ w = 1), and hardly how far it goes: over the small range
of their scores errors may grow faster or more slowly than on the whole way, which must end at σ∞². So τ ≤ 1 has a prior
at 1, as narrow as the part of the way is long that the calibration frames do not reach.

Elements differ in how large their errors are. Each has a c of its own, shrunk towards that of all by the number of its
frames.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.calibration.base import LARGEST_LOG, SMALLEST_LOG, SMALLEST_SCORE, Calibrator, Residuals
from ase_uq.io.entries import Entries

_REACH_QUANTILE, _SHORTEST_REST = 0.99, 0.05  # of t: how far calibration frames reach; least share that is left
SHORTEST_SPAN = 0.7  # of log u from the calibration frames to where nothing is known; a shorter way is mostly noise
_SMALLEST_SHARE = 1e-3
_LARGEST_NUMBER = 118
_LARGEST_SCORE = 700.0  # of log u: float64 ends there
_LARGEST_SLOPE = 10.0  # spans are not that short
_FRAMES_OF_ALL = 20  # weight, in frames, of the c of all elements beside that of one


@dataclass(frozen=True)
class SlopePrior:
    """The prior of τ, log-normal, if the calibration frames reach none of the way.

    benchmarks/far_field.py tries others, by leaving one set out.
    """

    centre: float = 1.0
    width: float = 0.05


@dataclass(frozen=True)
class FarFieldCalibrator(Calibrator):
    """log σ² = c + (log σ∞² - c)·min(1, Σ_k slope_k·(log u_k - near_k)).

    Args:
        constant: c, in the logarithm of squared ASE units.
        slopes: τ w_k/(log u∞_k - ū_k) ≥ 0 of each score; 0 for one that is not used.
        near: ū_k, mean of log u_k over the calibration rows.
        far: log u∞_k, median over the frames that the potential knows nothing of.
        limit: Mean of log σ∞² over the calibration rows.
        floors: Smallest score among the calibration rows; a smaller score counts as this one, since no calibration row
            shows that errors keep falling below it.
    """

    constant: float
    slopes: tuple[float, ...]
    near: tuple[float, ...]
    far: tuple[float, ...]
    limit: float
    floors: tuple[float, ...]
    elements: Mapping[int, float] = field(default_factory=dict)

    @property
    def settings(self) -> dict[str, Any]:
        return {
            "kind": "far_field",
            "constant": self.constant,
            "slopes": list(self.slopes),
            "near": list(self.near),
            "far": list(self.far),
            "limit": self.limit,
            "floors": list(self.floors),
            "elements": {str(number): offset for number, offset in self.elements.items()},
        }

    @classmethod
    def load(cls, settings: dict[str, Any]) -> "FarFieldCalibrator":
        slopes, near, far, floors = (tuple(settings[key]) for key in ("slopes", "near", "far", "floors"))
        elements = {int(number): offset for number, offset in settings["elements"].items()}
        return cls(settings["constant"], slopes, near, far, settings["limit"], floors, elements)

    @classmethod
    def check(cls, settings: Entries) -> None:
        settings.keys(("kind", "constant", "slopes", "near", "far", "limit", "floors", "elements"))
        constant = settings.number("constant", SMALLEST_LOG, LARGEST_LOG)
        limit = settings.number("limit", SMALLEST_LOG, LARGEST_LOG)
        slopes = settings.numbers("slopes", 0, _LARGEST_SLOPE)
        near = settings.numbers("near", -_LARGEST_SCORE, _LARGEST_SCORE, len(slopes))
        settings.numbers("far", -_LARGEST_SCORE, _LARGEST_SCORE, len(slopes))
        floors = settings.numbers("floors", SMALLEST_SCORE, length=len(slopes))
        least = float((np.log(floors) - near) @ slopes)
        offsets = settings.under("elements")
        for key in offsets.of_elements().values():
            offsets.number(key, -LARGEST_LOG, LARGEST_LOG)
        for offset in (0.0, *offsets.value.values()):
            if not SMALLEST_LOG <= constant + offset + (limit - constant - offset) * min(least, 0) <= LARGEST_LOG:
                raise settings.wrong("constant", "one with a possible variance at the floors of the scores")

    def combines(self, n_scores: int) -> bool:
        return len(self.slopes) == n_scores

    @cached_property
    def _law(self) -> Tensor:
        """(3, n_scores) slopes, near ends and floors."""
        return torch.tensor([self.slopes, self.near, self.floors], dtype=torch.float64)

    @cached_property
    def _offset_of_number(self) -> Tensor:
        """(119,) what the constant is more for an element."""
        offsets = [self.elements.get(number, 0.0) for number in range(_LARGEST_NUMBER + 1)]
        return torch.tensor(offsets, dtype=torch.float64)

    def way(self, scores: Tensor) -> Tensor:
        """(..., n_scores) → (...): t, at most 1; 0 at the calibration frames, 1 where nothing is known."""
        slopes, near, floors = self._law.to(scores)
        return ((torch.maximum(scores, floors).log() - near) @ slopes).clamp(max=1)

    def variance(self, scores: Tensor, limit: Tensor | None = None, numbers: Tensor | None = None) -> Tensor:
        if limit is None:
            raise ValueError("a far-field calibrator needs σ∞² of each row.")
        constant: Tensor | float = self.constant
        if self.elements and numbers is not None:
            constant = constant + self._offset_of_number.to(scores)[numbers]
        return torch.exp(_log_variance(constant, self.way(scores), limit.log(), self.limit))

    def describe(self) -> str:
        shares = [slope * (far - near) for slope, near, far in zip(self.slopes, self.near, self.far, strict=True)]
        used = ", ".join(
            f"u[{k}] from {np.exp(near):.3g} to {np.exp(far):.3g} ({share:.2f})"
            for k, (share, near, far) in enumerate(zip(shares, self.near, self.far, strict=True))
            if share > _SMALLEST_SHARE
        )
        return f"σ from {np.exp(self.constant / 2):.3g} to σ∞ as {used}"


def fit_far_field(
    residuals: Residuals,
    far: np.ndarray,
    prior: SlopePrior = SlopePrior(),
    like: FarFieldCalibrator | None = None,
) -> FarFieldCalibrator | None:
    """The most likely c, τ and w, given the prior of τ; None if no score differs between rows.

    The likelihood is weighted by the number of frames (`groups`), not of rows: rows of one frame are not independent.

    Args:
        residuals: Calibration rows, with their `limits`.
        far: (n_scores,) log u∞ of each score.
        prior: Of τ.
        like: The calibrator of nearly the same rows, from which the search begins; None to begin from several places.
    """
    if residuals.limits is None:
        raise ValueError("the far field needs σ∞² of every calibration row.")
    floors = np.maximum(residuals.scores.min(0), SMALLEST_SCORE)
    logs = np.log(np.maximum(residuals.scores, floors))
    near = logs.mean(0)
    # Nothing is known only beyond what the calibration frames reach: if they reach that far, their errors say what is.
    far = np.maximum(far, np.quantile(logs, _REACH_QUANTILE, axis=0))
    span = far - near
    (used,) = np.nonzero(span > (SHORTEST_SPAN if (span > SHORTEST_SPAN).any() else 0))
    if not len(used):
        return None
    span = np.maximum(span, SHORTEST_SPAN)[used]
    ways = (logs[:, used] - near[used]) / span
    reach = float(np.quantile(ways.mean(1), _REACH_QUANTILE))
    loss = _Loss(
        ways=ways,
        squares=residuals.squares / residuals.components,
        limits=np.log(residuals.limits),
        n_groups=len(np.unique(residuals.groups)),
        centre=float(np.log(prior.centre)),
        width=prior.width / max(1 - reach**2, _SHORTEST_REST),
    )
    if like is None:
        # Rows beyond the far end do not say in which direction they would like to have it moved: several τ are tried.
        starts = [np.concatenate([[0.0, np.log(slope)], np.zeros(len(used))]) for slope in (1.0, 0.5, 0.2)]
        if len(used) > 1:
            starts += [np.concatenate([[0.0, 0.0], 3.0 * row]) for row in np.eye(len(used))]
    else:
        shares = np.maximum(np.array(like.slopes)[used] * span, _SMALLEST_SHARE)
        starts = [
            np.array([like.constant - loss.start, min(np.log(shares.sum()), 0.0), *np.log(shares / shares.sum())])
        ]
    options = {"maxiter": 1000, "gtol": 1e-8}
    found = min((minimize(loss, x, jac=True, method="L-BFGS-B", options=options) for x in starts), key=lambda r: r.fun)
    slopes = np.zeros(len(near))
    slopes[used] = min(np.exp(found.x[1]), 1) * _softmax(found.x[2:]) / span
    calibrator = FarFieldCalibrator(
        constant=loss.start + float(found.x[0]),
        slopes=tuple(slopes.tolist()),
        near=tuple(near.tolist()),
        far=tuple(far.tolist()),
        limit=loss.mean_limit,
        floors=tuple(floors.tolist()),
    )
    return replace(calibrator, elements=_offsets(calibrator, residuals))


@dataclass(frozen=True)
class _Loss:
    """Negative logarithm of the posterior, and its slope, of x = (c - start, log τ, logits of w).

    Args:
        ways: (n, n_used) t_k of every row.
        squares: (n,) mean squared residual of a component.
        limits: (n,) log σ∞².
        n_groups: Number of frames, the weight of the mean likelihood.
        centre: Of log τ.
        width: Of log τ.
    """

    ways: np.ndarray
    squares: np.ndarray
    limits: np.ndarray
    n_groups: int
    centre: float
    width: float

    @cached_property
    def start(self) -> float:
        """The constant c if no row were on any way."""
        return float(np.log(max(self.squares.mean(), 1e-300)))

    @cached_property
    def mean_limit(self) -> float:
        return float(self.limits.mean())

    def __call__(self, x: np.ndarray) -> tuple[float, np.ndarray]:
        constant, shares = self.start + x[0], _softmax(x[2:])
        slope = min(np.exp(x[1]), 1.0)
        raw = slope * (self.ways @ shares)
        way = np.minimum(raw, 1)
        rise = np.maximum(np.where(way > 0, self.limits, self.mean_limit) - constant, 0)
        log_variance = constant + rise * way
        ratio = self.squares * np.exp(-log_variance)
        deviation = (x[1] - self.centre) / self.width
        value = self.n_groups * 0.5 * np.mean(log_variance + ratio)
        value += 0.5 * deviation**2 - np.mean(np.log(shares + _SMALLEST_SHARE))
        # Of the likelihood with respect to log σ², then through c and t.
        of_row = self.n_groups * 0.5 * (1 - ratio) / len(ratio)
        of_way = of_row * rise * (raw <= 1)
        of_shares = slope * (of_way @ self.ways) - 1 / (shares + _SMALLEST_SHARE) / len(shares)
        of_slope = float(of_way @ raw) * (x[1] <= 0) + deviation / self.width
        of_logits = shares * (of_shares - of_shares @ shares)
        return float(value), np.concatenate([[of_row @ (1 - way * (rise > 0)), of_slope], of_logits])


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def _offsets(calibrator: FarFieldCalibrator, residuals: Residuals) -> dict[int, float]:
    """Logarithm of the mean of r²/σ² of each element, shrunk towards 0 by the number of frames that have it."""
    if residuals.numbers is None or residuals.limits is None:
        return {}
    variance = calibrator.variance(torch.from_numpy(residuals.scores), torch.from_numpy(residuals.limits)).numpy()
    ratios = residuals.squares / residuals.components / variance
    offsets = {}
    for number in np.unique(residuals.numbers):
        of_element = residuals.numbers == number
        n_frames = len(np.unique(residuals.groups[of_element]))
        mean = (_FRAMES_OF_ALL + n_frames * ratios[of_element].mean()) / (_FRAMES_OF_ALL + n_frames)
        offsets[int(number)] = float(np.log(mean))
    return offsets


def _log_variance(constant: Tensor | float, way: Tensor, limits: Tensor, limit: float) -> Tensor:
    """The law, from t and log σ∞² of every row; `limit` is the mean of the latter over the calibration rows."""
    return constant + (torch.where(way > 0, limits, limit) - constant).clamp(min=0) * way
