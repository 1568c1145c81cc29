"""What all figures share: axes without clutter, colours, and data that are checked before they are drawn."""

import numpy as np
from numpy.typing import ArrayLike

from ase_uq.errors import MissingDependency

try:
    from matplotlib import pyplot as plt
    from matplotlib.axes import Axes
    from matplotlib.ticker import FuncFormatter, LogFormatterMathtext, LogLocator, NullFormatter
except ImportError as error:
    raise MissingDependency(
        'figures need matplotlib, which is not installed. Run: pip install "ase-uq[report]"'
    ) from error

# Colours of Okabe and Ito, which colour-blind readers can tell apart, and which stay distinct in print.
BLUE, ORANGE, RED, GREY = "#0072B2", "#E69F00", "#D55E00", "#8C8C8C"


def axes_of(ax: Axes | None, size: tuple[float, float]) -> Axes:
    """The given axes, or those of a new figure of this size in inches, without a frame at the top and the right."""
    if ax is None:
        _, ax = plt.subplots(figsize=size, layout="constrained")
    ax.spines[["top", "right"]].set_visible(False)
    return ax


def equal(**named: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    """Two sequences as flat arrays of equal length."""
    (a, b), (name_a, name_b) = (np.asarray(values, float).ravel() for values in named.values()), named
    if a.shape != b.shape:
        raise ValueError(f"{name_a} has {len(a)} values, {name_b} {len(b)}; they must have the same length.")
    return a, b


def largest_of(values: np.ndarray) -> float:
    """The largest finite value; 1 if no finite value is above 0."""
    finite = values[np.isfinite(values)]
    return float(finite.max()) if len(finite) and finite.max() > 0 else 1.0


def clipped(values: np.ndarray, top: float) -> np.ndarray:
    """Values in [0, top]; NaN and inf become `top`."""
    return np.clip(np.nan_to_num(values, nan=top, posinf=top), 0, top)


def faint(n: int) -> float:
    """Opacity of one of `n` points, so that many of them do not become one patch."""
    return float(np.clip(300 / n, 0.05, 0.6))


def log_ticks(ax: Axes) -> None:
    """Ticks of two logarithmic axes that are labelled and do not overlap."""
    for axis, (start, end) in ((ax.xaxis, ax.get_xlim()), (ax.yaxis, ax.get_ylim())):
        # Over short ranges matplotlib labels 2 to 9, which overlap, and powers of ten alone say little.
        short = end / start < 100
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if short else (1,)))
        axis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}") if short else LogFormatterMathtext())
        axis.set_minor_formatter(NullFormatter())
