"""Learning curves as tables and pictures."""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.selection.rows import SHARE, Row

STYLES = {
    "random": ("#000000", "o"),
    "lcmd": ("#0072B2", "s"),
    "lcmd of atoms": ("#56B4E9", "D"),
    "maxdist": ("#E69F00", "^"),
    "maxdet": ("#D55E00", "v"),
    "top": ("#CC79A7", "P"),
    "bands": ("#009E73", "X"),
}
DRAWN = ("energy RMSE", "force median", "force RMSE")  # measures that have a place in the figures


@dataclass(frozen=True)
class Point:
    """A point of a learning curve: means over seeds with their standard errors.

    Args:
        mean: In the unit that `measure` names.
        error: Of the mean.
        change: Of the value from random's of the same seed, %; NaN where it has none.
        change_error: Of the mean change.
    """

    pool: str
    learner: str
    measure: str
    test: str
    strategy: str
    n: int
    n_seeds: int
    mean: float
    error: float
    change: float
    change_error: float


def points_of(rows: Sequence[Row]) -> list[Point]:
    groups: dict[tuple[str, str, str, str, str, int], dict[int, float]] = {}
    for row in rows:
        key = (row.pool, row.learner, row.measure, row.test, row.strategy, row.n)
        groups.setdefault(key, {})[row.seed] = row.value
    points = []
    for key, values in groups.items():
        random = groups.get((*key[:4], "random", key[5]), {})
        changes = [100 * (value / random[seed] - 1) for seed, value in values.items() if seed in random]
        points.append(Point(*key, len(values), *mean_and_error(list(values.values())), *mean_and_error(changes)))
    return points


def mean_and_error(values: Sequence[float]) -> tuple[float, float]:
    if not values:
        return np.nan, np.nan
    return float(np.mean(values)), float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else np.nan


def markdown(points: Sequence[Point], arguments: argparse.Namespace) -> str:
    lines = [
        "# Learning curves of selection",
        "",
        f"`python -m benchmarks.selection {arguments.data.name} {Path(arguments.potential).name}`",
        "",
        "Mean over seeds, and in brackets the change from random choice in %, paired by seed, ± its standard error:",
        "below 0 the choice saves labels. The last column is how many random labels give the error that the strategy",
        "has with the number named there, by interpolation of the logarithm of the mean errors.",
    ]
    for pool, learner, measure in dict.fromkeys((p.pool, p.learner, p.measure) for p in points if p.learner):
        own = [p for p in points if (p.pool, p.learner, p.measure) == (pool, learner, measure)]
        for test in dict.fromkeys(p.test for p in own):
            of_test = [p for p in own if p.test == test]
            sizes = sorted({p.n for p in of_test} - {0})
            at, first = sizes[-2], next(p for p in of_test if not p.n)
            lines += ["", f"## {learner}, {pool}: {measure} on {test}", ""]
            lines.append(f"Nothing chosen: {first.mean:.3g}. {max(p.n_seeds for p in of_test)} seeds.")
            lines += [
                "",
                f"| | {' | '.join(f'n = {n}' for n in sizes)} | random needs for n = {at} |",
                "|---" * (len(sizes) + 2) + "|",
            ]
            for name in dict.fromkeys(p.strategy for p in of_test if p.n):
                cells = [cell(of_test, name, n) for n in sizes]
                lines.append(f"| {name} | {' | '.join(cells)} | {labels_needed(of_test, name, at)} |")
    lines += ["", "## Share of frames in the choice that are hotter than what was known", ""]
    for pool in dict.fromkeys(p.pool for p in points):
        own = [p for p in points if p.pool == pool and p.measure == SHARE and p.n]
        sizes = sorted({p.n for p in own})
        lines += ["", f"| {pool} | {' | '.join(f'n = {n}' for n in sizes)} |", "|---" * (len(sizes) + 1) + "|"]
        for name in dict.fromkeys(p.strategy for p in own):
            found = {p.n: f"{p.mean:.0%}" for p in own if p.strategy == name}
            lines.append(f"| {name} | {' | '.join(found.get(n, '-') for n in sizes)} |")
    return "\n".join([*lines, ""])


def cell(points: Sequence[Point], strategy: str, n: int) -> str:
    found = [p for p in points if (p.strategy, p.n) == (strategy, n)]
    if not found:
        return "-"
    (point,) = found
    if strategy == "random":
        return f"{point.mean:.3g}"
    error = "" if np.isnan(point.change_error) else f" ± {point.change_error:.0f}"  # one seed has none
    return f"{point.mean:.3g} ({point.change:+.0f}{error})"


def labels_needed(points: Sequence[Point], strategy: str, n: int) -> str:
    """How many random labels reach what a strategy reaches with `n`."""
    found = [p.mean for p in points if (p.strategy, p.n) == (strategy, n)]
    curve = sorted((p.n, p.mean) for p in points if p.strategy in ("random", "nothing"))
    if not found or strategy == "random":
        return "-"
    sizes, errors = np.array(curve).T
    if found[0] > errors[0]:
        return "worse than nothing"
    if found[0] < errors.min():
        return f"> {sizes[-1]:.0f}"
    # The first crossing: a curve of few seeds need not fall everywhere.
    after = int(np.argmax(errors <= found[0]))
    if not after:
        return "0"
    low, high, here = np.log([errors[after - 1], errors[after], found[0]])
    return f"{sizes[after - 1] + (low - here) / (low - high) * (sizes[after] - sizes[after - 1]):.0f}"


def draw(points: Sequence[Point], title: str) -> plt.Figure:
    """A column a measure: errors above, changes from random choice below."""
    columns = list(dict.fromkeys((p.learner, p.measure, p.test) for p in points))
    figure, axes = plt.subplots(2, len(columns), figsize=(3.3 * len(columns), 6), sharex=True, layout="constrained")
    for (upper, lower), (learner, measure, test) in zip(axes.T, columns, strict=True):
        own = [p for p in points if (p.learner, p.measure, p.test) == (learner, measure, test)]
        names = [name for name in STYLES if any(p.strategy == name for p in own)]
        for place, name in enumerate(names):
            curve = sorted((p for p in own if p.strategy == name), key=lambda p: p.n)
            colour, marker = STYLES[name]
            # Side by side, lest error bars hide each other.
            sizes = [p.n * 1.03 ** (place - (len(names) - 1) / 2) for p in curve]
            style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2, "elinewidth": 0.8, "label": name}
            upper.errorbar(sizes, [p.mean for p in curve], [p.error for p in curve], **style)
            if name != "random":
                lower.errorbar(sizes, [p.change for p in curve], [p.change_error for p in curve], **style)
        first = next(p.mean for p in own if not p.n)
        upper.set_yscale("log")
        upper.yaxis.set_major_formatter(ScalarFormatter())
        upper.yaxis.set_minor_formatter(ScalarFormatter())
        upper.axhline(first, color="#8C8C8C", lw=1, ls=":")
        lower.axhline(0, color=STYLES["random"][0], lw=1.2)
        ticks = sorted({p.n for p in own} - {0})
        lower.set_xscale("log")
        lower.set_xticks(ticks, [str(n) for n in ticks])
        lower.xaxis.set_minor_formatter(NullFormatter())
        upper.set_title(f"{learner}, {test}", fontsize=9)
        upper.set_ylabel(measure, fontsize=9)
        lower.set_ylabel("change from random (%)", fontsize=9)
        lower.set_xlabel("chosen frames", fontsize=9)
        for ax in (upper, lower):
            ax.grid(alpha=0.3)
            ax.tick_params(labelsize=8)
    figure.suptitle(f"{title}; dotted: nothing chosen; bars: standard errors over seeds", fontsize=10)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=7, fontsize=9)
    return figure
