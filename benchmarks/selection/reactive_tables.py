"""The learning curves of benchmarks/selection/reactive.py as a table and a picture."""

import argparse
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from benchmarks.selection.rows import Row
from benchmarks.selection.tables import cell, points_of

FORCES = {"RMSE": "force RMSE, meV/Å", "median": "force median, meV/Å"}
MEASURE = FORCES["RMSE"]
CLOSED, TUNED = "closed form", "fine-tuned"
NEW, OLD = "malonaldehyde", "others"
STYLES = {
    "random": ("#000000", "o"),
    "default": ("#0072B2", "s"),
    "kernel, lcmd": ("#56B4E9", "D"),
    "kernel, maxdet": ("#E69F00", "^"),
    "ntk, lcmd": ("#D55E00", "v"),
    "ntk, maxdet": ("#882255", "<"),
    "combined": ("#CC79A7", "P"),
    "committee": ("#009E73", "X"),
    "soap": ("#8C8C8C", "*"),
}


def curve(rows: Sequence[Row], name: str, seed: int | None = None, measure: str = MEASURE) -> list[tuple[int, float]]:
    """(labels, error) in closed form of one seed, or means over seeds."""
    own = [row for row in rows if (row.strategy, row.measure, row.test) == (name, measure, NEW)]
    own = [row for row in own if row.learner == CLOSED and seed in (None, row.seed)]
    return [(n, float(np.mean([row.value for row in own if row.n == n]))) for n in sorted({row.n for row in own})]


def labels_to(found: Sequence[tuple[int, float]], target: float) -> float:
    """Labels at which a curve first falls to a target, between its points in logarithms of both; infinite beyond."""
    for (few, high), (many, low) in pairwise(found):
        if high <= target:
            return few
        if low <= target:
            return float(few * (many / few) ** (np.log(high / target) / np.log(high / low)))
    return np.inf


def needed(rows: Sequence[Row], name: str, target: float, measure: str) -> str:
    """Labels by the mean curve, and in brackets an interval that holds two thirds of resamples of the seeds."""
    seeds = sorted({row.seed for row in rows if row.strategy == name})
    of_seeds = np.array([[error for _, error in curve(rows, name, seed, measure)] for seed in seeds])
    sizes = [n for n, _ in curve(rows, name, measure=measure)]

    def to_target(errors: np.ndarray) -> float:
        return labels_to(list(zip(sizes, errors.mean(0).tolist(), strict=True)), target)

    rng = np.random.default_rng(0)
    resampled = [to_target(of_seeds[rng.integers(len(seeds), size=len(seeds))]) for _ in range(1000)]
    low, high = np.quantile(resampled, [1 / 6, 5 / 6], method="nearest")
    words = [f"{value:.0f}" if np.isfinite(value) else f"> {sizes[-1]}" for value in (to_target(of_seeds), low, high)]
    return f"{words[0]} ({words[1]} to {words[2]})"


def markdown(rows: Sequence[Row], arguments: argparse.Namespace) -> str:
    closed = [row for row in rows if row.learner == CLOSED]
    points, tuned = points_of(closed), points_of([row for row in rows if row.learner == TUNED])
    names = [name for name in STYLES if any(row.strategy == name for row in rows)]
    sizes = [n for n, _ in curve(closed, "random")]
    lines = [
        "# Labels to an error, on reactive chemistry with a pretrained potential",
        "",
        f"`python -m benchmarks.selection.reactive --seeds {arguments.seeds} --tuned {arguments.tuned}`",
        "",
        f"Trained on in closed form, means over {arguments.seeds} seeds; in brackets the change from random choice in "
        "%, paired by seed, ± its standard error. Labels to an error are of the mean curve, in brackets the interval "
        "of two thirds of resamples of the seeds; the errors are those that random choice has with "
        f"{sizes[-3]} and {sizes[-2]} labels.",
    ]
    for measure in FORCES.values():
        targets = [error for _, error in curve(closed, "random", measure=measure)[-3:-1]]
        for test in (NEW, OLD):
            own = [p for p in points if (p.measure, p.test) == (measure, test)]
            before = next(p.mean for p in own if p.strategy == "nothing")
            heads = [f"n = {n}" for n in sizes]
            heads += [f"labels to {target:.0f}" for target in targets] if test == NEW else []
            lines += ["", f"## {measure}, {test}", "", f"Pretrained: {before:.0f}.", "", f"| | {' | '.join(heads)} |"]
            lines.append("|---" * (len(heads) + 1) + "|")
            for name in names:
                cells = [cell(own, name, n) for n in sizes]
                cells += [needed(closed, name, target, measure) for target in targets] if test == NEW else []
                lines.append(f"| {name} | {' | '.join(cells)} |")
    kinds = dict.fromkeys(row.measure for row in rows if row.test == "chosen")
    lines += ["", f"## What was chosen, up to {sizes[-1]} labels", "", f"| | {' | '.join(kinds)} |"]
    lines.append("|---" * (len(kinds) + 1) + "|")
    for name in names:
        own = [np.mean([row.value for row in rows if (row.strategy, row.measure) == (name, kind)]) for kind in kinds]
        lines.append(f"| {name} | {' | '.join(f'{share:.0%}' for share in own)} |")
    if tuned:
        (n,) = {p.n for p in tuned}
        heads = list(dict.fromkeys((p.measure, p.test) for p in tuned))
        lines += ["", f"## All weights fine-tuned with {n} labels, seeds: {arguments.tuned}", ""]
        lines.append(f"| | {' | '.join(f'{measure}, {test}' for measure, test in heads)} |")
        lines.append("|---" * (len(heads) + 1) + "|")
        for name in dict.fromkeys(p.strategy for p in tuned):
            cells = [cell([p for p in tuned if (p.measure, p.test) == head], name, n) for head in heads]
            lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def draw(rows: Sequence[Row]) -> plt.Figure:
    closed = [row for row in rows if row.learner == CLOSED]
    points = [p for p in points_of(closed) if p.measure == MEASURE and p.n]
    figure, axes = plt.subplots(1, 3, figsize=(11, 4), sharex=True, layout="constrained")
    titles = (f"{MEASURE}, {NEW}", "change from random (%)", f"{MEASURE}, {OLD}")
    for place, (name, (colour, marker)) in enumerate(STYLES.items()):
        style = {"color": colour, "marker": marker, "ms": 4, "lw": 1.2, "elinewidth": 0.8, "label": name}
        for ax, test, value, error in zip(
            axes, (NEW, NEW, OLD), ("mean", "change", "mean"), ("error", "change_error", "error"), strict=True
        ):
            own = sorted((p for p in points if (p.strategy, p.test) == (name, test)), key=lambda p: p.n)
            sizes = [p.n * 1.02 ** (place - len(STYLES) / 2) for p in own]  # lest bars hide each other
            ax.errorbar(sizes, [getattr(p, value) for p in own], [getattr(p, error) for p in own], **style)
    ticks = sorted({p.n for p in points})
    for ax, title in zip(axes, titles, strict=True):
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(n) for n in ticks])
        ax.xaxis.set_minor_formatter(NullFormatter())
        ax.set(xlabel="labels", title=title)
        ax.grid(alpha=0.3)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter(ScalarFormatter())
    axes[0].yaxis.set_minor_formatter(ScalarFormatter())
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5, fontsize=9)
    return figure
