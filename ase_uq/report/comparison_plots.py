"""Figures of a comparison of potentials: errors of reconstruction as tables in colour, and the latent maps."""

from collections.abc import Mapping, Sequence
from textwrap import wrap

import numpy as np
from numpy.typing import ArrayLike

from ase_uq.report.axes import GREY, Axes, axes_of, plt
from ase_uq.report.plots import UNCERTAINTY_COLOURS

# Only now: `axes` says what to install where matplotlib is missing.
# isort: split
from matplotlib.colors import LinearSegmentedColormap

_COLOUR_MAP = LinearSegmentedColormap.from_list("error", UNCERTAINTY_COLOURS)
_MARKS = "os^Dvp*hP"


def error_table(
    values: ArrayLike, rows: Sequence[str], columns: Sequence[str], *, title: str = "", ax: Axes | None = None
) -> Axes:
    """Errors as a table, each cell coloured by its error: light for 0, dark for 1 and above.

    Args:
        values: (n_rows, n_columns) errors; NaN leaves a cell empty.
        rows: Names of the rows.
        columns: Names of the columns.
        title: What the errors are.
        ax: Axes to draw into; a new figure by default.

    Raises:
        ValueError: There are not as many values as names.
    """
    cells = np.asarray(values, float)
    if cells.shape != (len(rows), len(columns)):
        raise ValueError(f"there are values of shape {cells.shape} for {len(rows)} rows and {len(columns)} columns.")
    ax = axes_of(ax, (2.4 + 0.7 * len(columns), 1.1 + 0.4 * len(rows)))
    ax.imshow(np.clip(cells, 0, 1), cmap=_COLOUR_MAP, vmin=0, vmax=1, aspect="auto")
    for (row, column), value in np.ndenumerate(cells):
        if np.isfinite(value):
            ink = "white" if value > 0.55 else "black"
            ax.text(column, row, f"{value:.2f}", ha="center", va="center", color=ink, size=9)
    ax.set_xticks(range(len(columns)), [_folded(name) for name in columns], size=8)
    ax.set_yticks(range(len(rows)), [_folded(name, 30) for name in rows], size=8)
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    ax.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    ax.grid(which="minor", color="white", lw=2)
    ax.tick_params(which="minor", length=0)
    ax.set_title(title, fontsize=9)
    return ax


def reconstruction(matrices: Mapping[str, ArrayLike], names: Sequence[str]) -> Axes:
    """Errors from each potential to each, of several kinds, side by side.

    Args:
        matrices: By title: (n, n) errors, from rows to columns; NaN on the diagonal.
        names: The n potentials.

    Returns:
        The axes of the first.
    """
    width = 1.3 + 1.0 * len(names)
    size = (width * len(matrices), 1.3 + 0.6 * len(names))
    _, grid = plt.subplots(1, len(matrices), figsize=size, layout="constrained", sharey=True)
    axes = list(np.atleast_1d(grid))
    for ax, (title, values) in zip(axes, matrices.items(), strict=True):
        error_table(values, names, names, title=title, ax=ax)
        ax.set_xlabel("features of", fontsize=9)
    axes[0].set_ylabel("reconstructed from", fontsize=9)
    return axes[0]


def latent_maps(
    coordinates: Mapping[str, ArrayLike],
    errors: Mapping[str, ArrayLike],
    symbols: Sequence[str],
    *,
    explained: Mapping[str, ArrayLike],
    label: str,
) -> Axes:
    """Atoms along the two widest directions of each potential's features, coloured by their errors.

    Args:
        coordinates: By potential: (n_atoms, 2) coordinates.
        errors: By potential: (n_atoms,) errors.
        symbols: (n_atoms,) elements, which are told apart by their marks.
        explained: By potential: (2,) share of the variance along each direction.
        label: What the errors are.

    Returns:
        The axes of the first.
    """
    elements = sorted(set(symbols))
    of_atom = np.array(symbols)
    top = max(1e-12, float(np.quantile(np.concatenate([np.asarray(e, float) for e in errors.values()]), 0.99)))
    figure, grid = plt.subplots(
        1, len(coordinates), figsize=(3.7 * len(coordinates) + 0.6, 3.9), layout="constrained", squeeze=False
    )
    shown = None
    for ax, (name, points) in zip(grid[0], coordinates.items(), strict=True):
        points, values = np.asarray(points, float), np.asarray(errors[name], float)
        axes_of(ax, (0, 0))
        for number, element in enumerate(elements):
            mine = np.flatnonzero(of_atom == element)
            mine = mine[np.argsort(values[mine])]
            shown = ax.scatter(
                *points[mine].T,
                s=14,
                c=np.minimum(values[mine], top),
                cmap=_COLOUR_MAP,
                vmin=0,
                vmax=top,
                marker=_MARKS[number % len(_MARKS)],
                ec="black",
                lw=0.25,
                alpha=0.8,
                label=element,
                rasterized=True,
            )
        shares = [f"{share:.0%} of the variance" for share in np.asarray(explained[name])]
        ax.set(xlabel=f"component 1, {shares[0]}", ylabel=f"component 2, {shares[1]}", xticks=[], yticks=[])
        ax.set_title(_folded(name, 40), fontsize=9)
    first = grid[0][0]
    if len(elements) <= len(_MARKS):
        legend = first.legend(frameon=False, fontsize=8, handletextpad=0.2, loc="best")
        for handle in legend.legend_handles:
            handle.set(fc=GREY, alpha=1)  # pyright: ignore[reportOptionalMemberAccess]
    assert shown is not None
    bar = figure.colorbar(shown, ax=list(grid[0]), pad=0.01, label=label)
    bar.solids.set(alpha=1)  # pyright: ignore[reportOptionalMemberAccess]
    bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue]  (typed as a collection of spines)
    return first


def _folded(name: str, width: int = 14) -> str:
    """A name in lines of at most this many characters, cut where one of its words ends if it can be."""
    for mark in ":-_/":
        name = name.replace(mark, f"{mark} ")
    lines = wrap(name, width + 2)
    return "\n".join(line.replace(": ", ":").replace("- ", "-").replace("_ ", "_").replace("/ ", "/") for line in lines)
