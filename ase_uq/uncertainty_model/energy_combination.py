"""The energy uncertainty if several methods are fitted: corrected near the calibration frames, as that of forces is.

    log σ² = A + f·(c + Σ_k s_k·t_k),    0 ≤ s_k ≤ 1,    f = 1 - t/ρ between 0 and 1

It is the law of `uncertainty_model.combination` with a row for each structure: σ is that of its energy per atom, A and
the way t are those of the anchor's calibrator of energies, and t_k, |t_k| ≤ 1, is the bounded difference between the
calibrated log σ² of another method and A. There are no networks, since there are as few rows as frames. Beyond ρ, and
where the calibration frames support no correction, σ is that of the anchor to the bit.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.calibration import Calibrator, FarFieldCalibrator
from ase_uq.calibration.base import LARGEST_LOG, SMALLEST_LOG
from ase_uq.io.entries import Entries
from ase_uq.uncertainty_model.corrections import LARGEST_CORRECTION, bounded, check_weights, floored, in_words


@dataclass(frozen=True)
class EnergyFeatures:
    """What the combination of energies reads from a batch, (n_frames,) each.

    Args:
        base: log σ² of the anchor, of the energy per atom in eV.
        way: t of the anchor: 0 at the calibration frames, 1 where nothing is known.
        others: log σ² of the other methods, by name.
    """

    base: Tensor
    way: Tensor
    others: Mapping[str, Tensor]

    @classmethod
    def of(
        cls, anchor: str, calibrators: Mapping[str, Calibrator], scores: Mapping[str, Tensor], limit: Tensor | None
    ) -> "EnergyFeatures":
        """From raw scores.

        Args:
            anchor: Name of the anchor.
            calibrators: Calibrator of energies by method; that of the anchor has a far end.
            scores: (n_frames, n_scores) of the energy, by method.
            limit: (n_frames,) σ∞² of the energy per atom, eV².
        """
        calibrator = calibrators[anchor]
        assert isinstance(calibrator, FarFieldCalibrator)
        logs = {name: c.variance(scores[name], limit).clamp(min=1e-300).log() for name, c in calibrators.items()}
        return cls(logs.pop(anchor), calibrator.way(scores[anchor]), logs)

    def corrections(self, limit: float = LARGEST_CORRECTION) -> dict[str, Tensor]:
        """(n_frames,) t_k by method."""
        return {name: bounded(value - self.base, limit) for name, value in self.others.items()}

    def fade(self, end: float) -> Tensor:
        """(n_frames,) f, for corrections that end at this way."""
        return (1 - self.way / end).clamp(0, 1)


@dataclass(frozen=True)
class EnergyCombination:
    """The fitted corrections of energy uncertainties.

    Args:
        end: ρ, the way at which no correction is left, at most 1.
        floor: Log σ² below which corrections do not lead: the median of the anchor over the calibration frames.
        constant: c.
        weights: s_k by method; corrections that were not kept are absent.
        likelihoods: Cross-validated mean negative log-likelihood of energies per atom, for each variant that was tried.
        bound: Largest correction of log σ² by a method.
    """

    end: float
    floor: float
    constant: float
    weights: dict[str, float]
    likelihoods: dict[str, float]
    bound: float = LARGEST_CORRECTION

    def __call__(self, features: EnergyFeatures) -> Tensor:
        """(n_frames,) what is added to the log σ² of the anchor, which is exactly 0 beyond the end."""
        corrections, fade = features.corrections(self.bound), features.fade(self.end)
        total = sum((weight * corrections[name] for name, weight in self.weights.items()), self.constant)
        added = floored(features.base + fade * total, features.base, self.floor) - features.base
        return torch.where(fade > 0, added, 0)

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values from which it is made again, by name of its arguments."""
        return asdict(self)

    @staticmethod
    def check(settings: Entries, others: Sequence[str]) -> None:
        """Refuses settings of a file that are not those of corrections by these methods.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        settings.keys(("end", "floor", "constant", "weights", "likelihoods", "bound"))
        settings.number("end", 1e-3, 1)
        settings.number("floor", SMALLEST_LOG, LARGEST_LOG)
        settings.number("bound", 1e-3, LARGEST_LOG)
        check_weights(settings, others)

    def describe(self, anchor: str) -> list[str]:
        """A few lines that say what was kept and how much each correction weighs."""
        return in_words(anchor, self.end, self.constant, self.weights, self.likelihoods)
