"""Numbers in words, as a page says them."""

import numpy as np

from ase_uq.thresholds.criteria import ResolvedThreshold


def counted(n: int, noun: str) -> str:
    """A number and a noun with a regular plural, such as "3 frames"."""
    return f"{n:,} {noun}" if n == 1 else f"{n:,} {noun}s"


def number(value: float) -> str:
    """A value with three significant digits; "undefined" for NaN."""
    return "undefined" if np.isnan(value) else f"{value:.3g}"


def told(level: float | None) -> str:
    """A threshold in words; empty if there is none."""
    if level is None:
        return ""
    return level.describe() if isinstance(level, ResolvedThreshold) else f"{level:g} eV/Å"


def quantile(values: np.ndarray, q: float) -> float:
    """Quantile of uncertainties; NaN counts as larger than all numbers."""
    known = np.nan_to_num(values, nan=np.inf, posinf=np.inf)
    # With an infinite value numpy's interpolation would give NaN, so the next higher value is taken.
    return float(np.quantile(known, q, method="linear" if np.isfinite(known).all() else "higher"))
