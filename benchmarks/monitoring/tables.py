"""The results as a page of tables and as CSV."""

import csv
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path

import numpy as np

from benchmarks.monitoring.figures import PICTURES
from benchmarks.monitoring.judging import LENGTH, NEAR, TOLERANCES, Data, Row
from benchmarks.monitoring.promises import RESAMPLES
from benchmarks.monitoring.runs import (
    AFTER,
    BOILING,
    COLD,
    COMMITTEE,
    ENSEMBLES,
    FRICTION,
    FUSED,
    HOLE,
    KEEP,
    LONGEST,
    SHORTEST,
    TIMESTEP,
    USELESS,
)


def markdown(data: Data, rows: Sequence[Row], out: Path) -> str:
    committee = "no committee"
    if data.n_members:
        committee = f"a committee of {data.n_members} (its spread times {data.scale:.2f}, calibrated at {COLD:.0f} K)"
    heading, n_tests = (
        "# Monitoring: whether thresholds with a criterion hold what they promise",
        len(data.runs["test"]),
    )
    lines = [
        heading,
        "",
        "`python -m benchmarks.monitoring simulate FOLDER`, `committee FOLDER MEMBERS`, `report FOLDER`, 2 CPU cores.",
        "",
        f"The embedded MACE of malonaldehyde, GFN2-xTB beside every run, {committee}. Langevin, {TIMESTEP:g} fs,",
        f"friction {FRICTION:g}/fs. A reading is the largest uncertainty of an atom, at every step; that of the",
        f"committee at every {KEEP}th. In brackets exact 90 % bands of shares, quartiles of times.",
        "",
        "| ensemble | what | steps | frames worse than "
        + " / ".join(f"{t:g}" for t in TOLERANCES)
        + " eV/Å | failed |",
        "|---|---|---:|---|---|",
        *_ensemble_lines(data),
        "",
        f"Thresholds are made of the first two only. A run has failed where a bond is over {LONGEST:g} or",
        f"under {SHORTEST:g} times as long as covalent radii say, atoms that were apart are within {FUSED:g} times,",
        f"the energy is more than {HOLE:g} eV below the minimum or the temperature above {BOILING:.0f} K. It ends",
        f"{AFTER * TIMESTEP:g} fs later, or that long after an error above {USELESS:g} eV/Å.",
        "",
        f"## False alarms at {COLD:.0f} K",
        "",
        f"{n_tests} fresh runs of {LENGTH:g} ps. *Expected*: where 90 % of such counts lie if the promise is exact,",
        f"since the threshold itself is made of {len(data.runs['reference'])} runs. *Naive*: what 1 - (1 - p)^n says",
        "of the same threshold, with p the share of test frames above it.",
        "",
        "| method | threshold made of | promised | threshold | observed | expected | naive | verdict |",
        "|---|---|---|---|---|---|---|---|",
        *_alarm_lines(rows),
    ]
    for name in ("heating", "strained"):
        for tolerance in TOLERANCES:
            lines += ["", f"## Runs that fail: {name}, event: true error above {tolerance:g} eV/Å", ""]
            if (name, tolerance) == ("heating", TOLERANCES[0]):
                lines += [
                    "*Recall*: of the runs with an event, those with an alarm at it or before; *within*: or so long",
                    "after it. *Lead*: median time from the alarm to the event, negative where late. *In time*: before",
                    "bonds break or the energy diverges. *False*: alarms earlier than that before the event, or",
                    "without one, by the time watched.",
                    "",
                ]
            lines += [
                f"| rule | method | threshold | recall | within {NEAR:g} fs | lead (fs) | in time | false per ns |",
                "|---|---|---|---|---|---|---|---|",
                *_failing_lines(data, rows, name, tolerance),
            ]
    elements = _elements(rows)
    lines += [
        "",
        "## Guarantees of single frames",
        "",
        "Calibrated on frames of the reference runs and on `perturb_frames`; measured on fresh ones of both kinds, and",
        "where nothing is promised, since they are of another kind: on frames of the heated and the strained runs.",
        "",
        "| guarantee | method | quantity | promised | fresh | heating | strained |",
        "|---|---|---|---|---|---|---|",
        *_guarantee_lines(rows),
        "",
        f"Missed bad atoms of each element, promised at most 10 %, tolerance {TOLERANCES[0]:g} eV/Å:",
        "",
        f"| method | threshold | {' | '.join(elements)} |",
        "|---|---|" + "---|" * len(elements),
        *_element_lines(rows, elements),
        "",
        f"Over {RESAMPLES} calibration sets, halves of all calibration and fresh frames, or as many of all runs at",
        f"{COLD:.0f} K as there are reference runs (for the tail half of each); in brackets 90 % of them:",
        "",
        "| guarantee | method | mean over calibration sets | sets that keep it, on so many fresh frames |",
        "|---|---|---|---|",
        *_resampled_lines(rows),
        "",
        f"Pictures: {', '.join(f'{out.name}_{what}.png' for what in PICTURES)}. All numbers: {out.name}.csv.",
        "",
    ]
    return "\n".join(lines)


def _ensemble_lines(data: Data) -> list[str]:
    lines = []
    for name, runs in data.runs.items():
        errors = np.concatenate([run.errors.max(1) for run in runs])
        bad = " / ".join(f"{np.mean(errors > tolerance):.1%}" for tolerance in TOLERANCES)
        lost = int(np.isinf(errors).sum())
        bad += f" ({lost} without a reference)" if lost else ""
        plan = replace(ENSEMBLES[name], n_runs=len(runs))
        failed = f"{sum(run.failure(useless=False) is not None for run in runs)} of {len(runs)}" if plan.steps else ""
        lines.append(f"| {name} | {plan.conditions} | {sum(len(run.energy) for run in runs)} | {bad} | {failed} |")
    return lines


def _alarm_lines(rows: Sequence[Row]) -> list[str]:
    lines = []
    for row in (row for row in rows if row.table == "false alarms"):
        promise = float(row.quantity)
        start = f"| {row.method} | {row.rule} | {promise:.0%} |"
        if np.isnan(row.value):
            lines.append(f"{start} refused: {row.note.partition('. ')[0]} | | | | |")
            continue
        notes = dict(part.split("=") for part in row.note.split(";"))
        count, expected = round(row.value * row.n), notes["expected"]
        least, most = map(int, expected.split("-")) if expected else (row.n * promise,) * 2
        # Where no range is known the promise itself must lie inside the band of what was observed.
        over, under = (count > most, count < least) if expected else (row.low > promise, row.high < promise)
        verdict = "broken" if over else "kept, with fewer" if under else "kept"
        naive = f"{float(notes['naive']):.0%}" if "naive" in notes else ""
        lines.append(
            f"{start} {float(notes['threshold']):.4f} | {_share(row)} | {expected.replace('-', ' to ')} | {naive} | "
            f"{verdict} |"
        )
    return lines


def _failing_lines(data: Data, rows: Sequence[Row], name: str, tolerance: float) -> list[str]:
    own = [row for row in rows if row.table == f"events > {tolerance:g}" and row.ensemble == name]
    shown = data.methods if tolerance == TOLERANCES[0] else [m for m in ("combined", COMMITTEE) if m in data.methods]
    lines = []
    for rule in dict.fromkeys(row.rule for row in own):
        for method in shown:
            cells = {row.quantity: row for row in own if (row.rule, row.method) == (rule, method)}
            if "refused" in cells:
                lines.append(f"| {rule} | {method} | refused: {cells['refused'].note.partition('. ')[0]} | | | | |")
            elif cells:
                lead, false = cells["lead"], cells["false alarms per ns"]
                middle, low, high = (
                    f"{value + 0.0:.0f}".replace("-0", "0") if abs(value) < 0.5 else f"{value:.0f}"
                    for value in (lead.value, lead.low, lead.high)
                )
                shares = " | ".join(_share(cells[what]) for what in ("recall", "recall or soon"))
                times = f"{middle} ({low} to {high})" if lead.n else "none"
                lines.append(
                    f"| {rule} | {method} | {cells['threshold'].value:.3f} | {shares} | {times} | "
                    f"{_share(cells['halted before failure'])} | {_per_ns(false)} |"
                )
    return lines


def _per_ns(row: Row) -> str:
    return "no time" if np.isnan(row.value) else f"{row.value:.0f}"


def _share(row: Row) -> str:
    if not row.n:
        return "none"
    return f"{round(row.value * row.n)}/{row.n} ({row.low:.0%} to {row.high:.0%})"


def _guarantee_lines(rows: Sequence[Row]) -> list[str]:
    own = [row for row in rows if row.table == "guarantees"]
    promises = {"errors within bound": "≥ 95 %", "bad and not flagged": "≤ 5 %", "missed of bad": "≤ 10 %"}
    lines = []
    for rule, quantity, method in dict.fromkeys((row.rule, row.quantity, row.method) for row in own):
        cells = {row.ensemble: row for row in own if (row.rule, row.quantity, row.method) == (rule, quantity, method)}
        if quantity == "refused":
            lines.append(f"| {rule} | {method} | refused: {cells['fresh'].note.partition('. ')[0]} | | | | |")
            continue
        shares = [f"{cells[e].value:.1%} ({cells[e].low:.1%} to {cells[e].high:.1%}, n={cells[e].n})" for e in cells]
        lines.append(f"| {rule} | {method} | {quantity} | {promises[quantity]} | {' | '.join(shares)} |")
    return lines


def _elements(rows: Sequence[Row]) -> list[str]:
    return list(dict.fromkeys(row.quantity for row in rows if row.table == "per element"))


def _element_lines(rows: Sequence[Row], elements: Sequence[str]) -> list[str]:
    own = [row for row in rows if row.table == "per element"]
    lines = []
    for method, rule in dict.fromkeys((row.method, row.rule) for row in own):
        cells = [row for row in own if (row.method, row.rule) == (method, rule)]
        shares = [_share(row) for element in elements for row in cells if row.quantity == element]
        lines.append(f"| {method} | {rule} | {' | '.join(shares)} |")
    return lines


def _resampled_lines(rows: Sequence[Row]) -> list[str]:
    own = [row for row in rows if row.table == "resampled"]
    kept = {(row.rule, row.method): row for row in own if row.quantity.startswith("share")}
    lines = []
    for row in own:
        if row.quantity.startswith("share"):
            continue
        rule = row.rule if row.quantity == "mean" else f"{row.rule}, promised {float(row.quantity):.0%}"
        share = kept.get((row.rule, row.method))
        sure = f"{share.value:.0%} (theory {float(share.note.partition('=')[2]):.0%})" if share else ""
        lines.append(f"| {rule} | {row.method} | {row.value:.1%} ({row.low:.1%} to {row.high:.1%}) | {sure} |")
    return lines


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Row)])
        for row in rows:
            values = [getattr(row, field.name) for field in fields(Row)]
            writer.writerow([f"{value:.6g}" if isinstance(value, float) else value for value in values])
