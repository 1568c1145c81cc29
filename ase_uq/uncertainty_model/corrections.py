"""Corrections of one method's log σ² by what others say: bounded, floored, checked in a file, and in words."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ase_uq.calibration.base import LARGEST_LOG
from ase_uq.io.entries import Entries

LARGEST_CORRECTION = 1.0  # of log σ²: a factor √e in σ
_LARGEST_WEIGHT = 10.0  # in a file; those of a fit are at most 1


def bounded(values: Tensor, limit: float = LARGEST_CORRECTION) -> Tensor:
    """Corrections of log σ², limited smoothly to ±`limit`; small ones are unchanged."""
    return limit * (values / limit).tanh()


def floored(log_variance: Tensor, base: Tensor, floor: float) -> Tensor:
    """Corrected log σ², at least `floor`, or the anchor's `base` where that is lower still."""
    return log_variance.maximum(base.clamp(max=floor))


def check_weights(settings: Entries, known: Sequence[str]) -> tuple[str, ...]:
    """Refuses a wrong `constant`, `weights` or `likelihoods`; returns the names of the corrections that were kept.

    Raises:
        WrongEntry: An entry is missing or wrong.
    """
    settings.number("constant", -LARGEST_LOG, LARGEST_LOG)
    weights = settings.under("weights")
    kept = weights.keys(known)
    for name in kept:
        weights.number(name, 0, _LARGEST_WEIGHT)
    if not settings.under("likelihoods").any_numbers():
        raise settings.wrong("likelihoods", "at least one number")
    return kept


def in_words(
    anchor: str, end: float, constant: float, weights: Mapping[str, float], likelihoods: Mapping[str, float]
) -> list[str]:
    """The law, and what left-out calibration frames said of all that were tried; a line each."""
    kept = " ".join(f"+ {weight:.2f}·{name}" for name, weight in weights.items())
    inside = f"{anchor} + f·({constant:+.2f} {kept}), f from 1 to 0 at t = {end:.2f}" if kept else anchor
    tried = ", ".join(f"{name} {value:.3f}" for name, value in likelihoods.items())
    return [f"log σ² = {inside}", f"cross-validated NLL: {tried}"]
