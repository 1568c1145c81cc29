"""The results as pictures."""

from collections.abc import Sequence

import numpy as np
from matplotlib import pyplot as plt

from ase_uq.thresholds.criteria import FalseAlarms, MissRate
from benchmarks.monitoring.judging import LENGTH, PROMISES, TOLERANCES, Data, Row
from benchmarks.monitoring.runs import CALIBRATION, COLD, COMMITTEE, HOT, METHODS, TIMESTEP

PICTURES = ("example", "false_alarms", "lead_times")
COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")


def draw_example(data: Data) -> plt.Figure:
    """A heated run: reading, true error, thresholds, temperature; the run whose event comes at the median time."""
    runs, tolerance = data.runs["heating"], TOLERANCES[0]
    events = [(run.event(tolerance), number) for number, run in enumerate(runs)]
    times = sorted((event, number) for event, number in events if event is not None)
    event, number = times[len(times) // 2]
    run, threshold_data = runs[number], data.threshold_data(CALIBRATION, METHODS[0])
    figure, (above, below) = plt.subplots(
        2, 1, figsize=(9, 5.4), sharex=True, height_ratios=(3, 1), layout="constrained"
    )
    time = np.arange(len(run.energy)) * TIMESTEP
    above.plot(run.labelled * TIMESTEP, run.errors.max(1), color="#8C8C8C", lw=0.8, label="true error (GFN2-xTB)")
    above.plot(time, run.readings[:, 0], color=COLOURS[0], lw=1.2, label=f"reading ({METHODS[0]})")
    thresholds = {
        f"FalseAlarms({PROMISES[0]:g}, ps={LENGTH:g})": FalseAlarms(PROMISES[0], ps=LENGTH).resolve(threshold_data),
        f"MissRate({tolerance:g}, 0.1)": MissRate(tolerance, 0.1).resolve(threshold_data),
    }
    for (label, value), colour in zip(thresholds.items(), COLOURS[1:], strict=False):
        above.axhline(float(value), color=colour, lw=1.2, ls="--", label=label)
    above.axhline(tolerance, color="k", lw=0.8, ls=":", label=f"tolerated error, {tolerance:g} eV/Å")
    above.axvline(event * TIMESTEP, color="k", lw=0.8, ls="-.", label="first worse error")
    above.set(yscale="log", ylabel="eV/Å", title=f"A run heated from {COLD:.0f} to {HOT:.0f} K")
    above.legend(fontsize=8, loc="lower right", ncols=2)
    below.plot(time, run.temperature, color="#8C8C8C", lw=0.8)
    below.set(xlabel="time (fs)", ylabel="temperature (K)")
    return figure


def draw_false_alarms(data: Data, rows: Sequence[Row]) -> plt.Figure:
    """A panel a method: promised and observed false alarms, a colour for each way to the threshold."""
    figure, axes = plt.subplots(1, len(data.methods), figsize=(2.5 * len(data.methods), 3.4), sharey=True)
    figure.set_layout_engine("constrained")
    own = [row for row in rows if row.table == "false alarms"]
    ways = list(dict.fromkeys(row.rule for row in own))
    for ax, method in zip(axes, data.methods, strict=True):
        ax.plot([0, 0.25], [0, 0.25], color="#8C8C8C", lw=1)
        for place, way in enumerate(ways):
            for row in own:
                if (row.method, row.rule) != (method, way) or np.isnan(row.value):
                    continue
                x = float(row.quantity) + 0.006 * (place - (len(ways) - 1) / 2)
                bars = [[row.value - row.low], [row.high - row.value]]
                label = way if row.quantity == f"{PROMISES[0]:g}" else None
                ax.errorbar(x, row.value, yerr=bars, fmt="o", ms=4, lw=1, color=COLOURS[place], label=label)
        ax.set(title=method, xlabel="promised", xticks=PROMISES)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("runs with a false alarm")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(ways), fontsize=8)
    return figure


def draw_lead_times(data: Data, leads: dict[tuple[str, str, str, float], np.ndarray]) -> plt.Figure:
    """Time from the alarm to the event in heated runs: a row a rule, a colour a method, a bar the median."""
    rules = list(dict.fromkeys(rule for _, _, rule, _ in leads))
    shown = [method for method in ("combined", "bll", "pdrum", "kernel", COMMITTEE) if method in data.methods]
    rules = [rule for rule in rules if ("heating", shown[0], rule, TOLERANCES[0]) in leads]
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.75 * len(rules) + 1.6), sharey=True, layout="constrained")
    rng = np.random.default_rng(0)
    for ax, tolerance in zip(axes, TOLERANCES, strict=True):
        for row, rule in enumerate(rules):
            for place, method in enumerate(shown):
                found = leads.get(("heating", method, rule, tolerance), np.array([]))
                if not len(found):
                    continue
                height = row + 0.15 * (place - (len(shown) - 1) / 2)
                ax.plot(
                    found, height + rng.uniform(-0.04, 0.04, len(found)), ".", ms=3, alpha=0.4, color=COLOURS[place]
                )
                label = method if row == 0 else None
                ax.plot(np.median(found), height, "|", ms=11, mew=2.5, color=COLOURS[place], label=label)
        ax.axvline(0, color="#8C8C8C", lw=1)
        ax.set(title=f"heated runs: from the alarm to the first error > {tolerance:g} eV/Å", xlabel="lead time (fs)")
        ax.set_xscale("symlog", linthresh=10)
        ax.set(yticks=range(len(rules)), yticklabels=rules)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(shown), fontsize=8)
    return figure
