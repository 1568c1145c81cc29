"""Readings replayed through the rules: false alarms, and how long before a failure each rule speaks."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np
from ase.data import atomic_numbers
from scipy.stats import betabinom
from tqdm import tqdm

from ase_uq import embedded, read_frames
from ase_uq.dynamics import Cusum, Patience, Rule, Threshold
from ase_uq.thresholds.conformal import binomial_band
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, Quantile
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData, exchangeable_groups
from ase_uq.thresholds.reduction import Reduction
from benchmarks.monitoring.runs import (
    CALIBRATION,
    COMMITTEE,
    ENSEMBLES,
    GAMMA,
    KEEP,
    READINGS,
    RUN,
    THERMAL,
    TIMESTEP,
    load,
)

MAXIMA = "run maxima"
TOLERANCES = (0.3, 1.0)  # eV/Å
PROMISES = (0.05, 0.1, 0.2)  # false alarms a run
TYPED = (0.1, 0.3)  # eV/Å, what people type
PATIENCE = 10.0  # fs
FRAMES_A_RUN = 10  # labelled frames of a run at 300 K that count as calibration frames
NEAR = 100.0  # fs; an alarm longer before the event is a false one, one so much later is not too late for all


class Data:
    """What `simulate` and `committee` stored, as series of readings and as evidence.

    Args:
        folder: Of both.
    """

    def __init__(self, folder: Path) -> None:
        missing = [name for name in ENSEMBLES if not (folder / f"{name}.npz").exists()]
        if missing:
            sys.exit(f"{folder} has no {', '.join(missing)}. Run `python -m benchmarks.monitoring simulate {folder}`.")
        self.runs = {name: load(folder / f"{name}.npz") for name in ENSEMBLES}
        self.spreads: dict[str, list[np.ndarray]] = {}
        self.n_members = 0
        for name, runs in self.runs.items():
            path = folder / f"{COMMITTEE}_{name}.npz"
            if path.exists():
                with np.load(path) as stored:
                    ends = np.cumsum([len(run.kept) for run in runs])[:-1]
                    self.spreads[name], self.n_members = np.split(stored["spread"], ends), int(stored["n_members"])
        self.methods = [method for method in READINGS if method != COMMITTEE or len(self.spreads) == len(ENSEMBLES)]
        if COMMITTEE in self.methods:
            self._calibrate_committee()

    def _calibrate_committee(self) -> None:
        """One scale, that of most likelihood for Gaussian errors of the labelled frames at 300 K."""
        ratios = []
        for run, spread in zip(self.runs["reference"], self.spreads["reference"], strict=True):
            at = np.searchsorted(run.kept, run.labelled)
            ratios.append((run.errors / spread[at]) ** 2)
        self.scale = float(np.sqrt(np.mean(np.concatenate(ratios))))
        self.spreads = {name: [self.scale * run for run in runs] for name, runs in self.spreads.items()}

    def interval(self, method: str) -> float:
        """Time between two readings, fs."""
        return TIMESTEP * (KEEP if method == COMMITTEE else 1)

    def series(self, name: str, method: str) -> list[np.ndarray]:
        """Readings of every run."""
        if method == COMMITTEE:
            return [spread.max(1).astype(float) for spread in self.spreads[name]]
        return [run.readings[:, READINGS.index(method)].astype(float) for run in self.runs[name]]

    @cache  # noqa: B019 - there is one Data a process
    def threshold_data(self, names: tuple[str, ...], method: str, element: str = "") -> ThresholdData:
        """Labelled frames of some ensembles: FRAMES_A_RUN of each run, all that the reference could label."""
        (relaxed,) = read_frames(embedded.path("malonaldehyde.xyz"))
        chosen = np.isin(relaxed.numbers, atomic_numbers[element]) if element else np.full(len(relaxed), True)
        readings, errors, groups, count = [], [], [], 0
        for name in names:
            own = [self._labelled(name, number, method, chosen) for number in range(len(self.runs[name]))]
            lengths = [len(found) for found, _ in own]
            both = [np.concatenate(part) for part in zip(*own, strict=True)]
            segments = np.repeat(np.arange(len(own)), lengths)
            readings.append(both[0])
            errors.append(both[1])
            groups.append(count + exchangeable_groups(both, segments))
            count = int(groups[-1].max()) + 1
        runs = None if element else self.reference(method)
        reduction = Reduction("max", (element,) if element else None)
        return ThresholdData(*(np.concatenate(part) for part in (readings, errors, groups)), reduction, runs)

    def _labelled(self, name: str, number: int, method: str, atoms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Readings and errors of labelled frames of one run, by the atoms chosen."""
        run = self.runs[name][number]
        places = np.flatnonzero(run.labelled % KEEP == 0)  # those that the committee has read too
        places = places[:: max(1, len(places) // FRAMES_A_RUN)][:FRAMES_A_RUN]
        places = places[np.isfinite(run.errors[places]).all(1)]
        if method == COMMITTEE:
            norms = self.spreads[name][number][np.searchsorted(run.kept, run.labelled[places])]
        else:
            norms = run.norms[places, :, READINGS.index(method)]
        return norms[:, atoms].max(1).astype(float), run.errors[places][:, atoms].max(1).astype(float)

    def reference(self, method: str) -> ReferenceRuns:
        """All reference runs."""
        return ReferenceRuns(tuple(self.series("reference", method)), self.interval(method))

    def halves(self, method: str) -> ReferenceRuns:
        """Half of each reference run: too short for maxima of whole runs, so that only the tail is left."""
        runs = self.series("reference", method)
        return ReferenceRuns(tuple(run[: len(run) // 2] for run in runs), self.interval(method))


LENGTH = RUN * TIMESTEP / 1000  # ps


def replay(rule: Rule, readings: np.ndarray, interval: float) -> float | None:
    """Time of the first alarm, fs."""
    state = None
    for step, reading in enumerate(readings.tolist()):
        state, triggered = rule.judge(state, reading, step * interval)
        if triggered:
            return step * interval
    return None


@dataclass(frozen=True)
class Row:
    """A line of the csv file."""

    table: str
    ensemble: str
    method: str
    rule: str
    quantity: str
    value: float
    low: float = np.nan
    high: float = np.nan
    n: int = 0
    note: str = ""


def share_row(table: str, ensemble: str, method: str, rule: str, quantity: str, k: int, n: int, note: str = "") -> Row:
    """A share with its exact 90 % band."""
    low, high = binomial_band(k, n) if n else (np.nan, np.nan)
    return Row(table, ensemble, method, rule, quantity, k / n if n else np.nan, low, high, n, note)


def false_alarms(data: Data) -> list[Row]:
    """Alarms in fresh runs at 300 K against the promise, a way of making the threshold and a method at a time."""
    rows = []
    for method in tqdm(data.methods, desc="false alarms", leave=False):
        threshold_data = data.threshold_data(CALIBRATION, method)
        interval, tests = data.interval(method), data.series("test", method)
        n_readings = round(1000 * LENGTH / interval)
        pooled = np.concatenate(data.series("reference", method))
        for promise in PROMISES:
            criterion = FalseAlarms(promise, ps=LENGTH)
            independent = float(np.quantile(pooled, (1 - promise) ** (1 / n_readings)))
            ways: dict[str, tuple[Rule, ThresholdData]] = {
                MAXIMA: (Threshold(criterion), threshold_data),
                "tail of half runs": (Threshold(criterion), replace(threshold_data, runs=data.halves(method))),
                f"{MAXIMA}, {PATIENCE:g} fs patience": (Patience(criterion, PATIENCE), threshold_data),
                "Cusum": (Cusum(criterion), threshold_data),
                "frames as if independent": (Threshold(independent), threshold_data),
            }
            for way, (asked, known) in ways.items():
                try:
                    rule = asked.resolved(known)
                except ValueError as refusal:
                    rows.append(Row("false alarms", "test", method, way, f"{promise:g}", np.nan, note=str(refusal)))
                    continue
                alarms = sum(replay(rule, readings, interval) is not None for readings in tests)
                expected = ""
                if way == MAXIMA:
                    low, high = predicted_counts(promise, len(data.runs["reference"]), len(tests))
                    expected = f"{low}-{high}"
                note = f"threshold={rule.threshold:.5g};expected={expected}"
                if way == MAXIMA:
                    p = float(np.mean(np.concatenate(tests) >= rule.threshold))
                    note += f";naive={-np.expm1(n_readings * np.log1p(-p)):.3f}"
                rows.append(share_row("false alarms", "test", method, way, f"{promise:g}", alarms, len(tests), note))
    return rows


def predicted_counts(promise: float, n_reference: int, n_tests: int) -> tuple[int, int]:
    """90 % of the counts of alarms in fresh runs, where the threshold is a conformal quantile of so many maxima."""
    above = n_reference + 1 - int(np.ceil((1 - promise) * (n_reference + 1) - 1e-9))
    counts = betabinom(n_tests, above, n_reference + 1 - above)
    return int(counts.ppf(0.05)), int(counts.ppf(0.95))


def failing_rules(tolerance: float, method: str) -> dict[str, tuple[tuple[str, ...], Rule]]:
    """Rules by name, each with the ensembles whose labelled frames it is made of."""
    alarms = FalseAlarms(PROMISES[0], ps=LENGTH)
    typed = (1.0,) if method == GAMMA else TYPED
    unit = "" if method == GAMMA else " eV/Å"
    return {
        f"FalseAlarms {100 * PROMISES[0]:g} %": (CALIBRATION, Threshold(alarms)),
        f"FalseAlarms {100 * PROMISES[0]:g} %, {PATIENCE:g} fs patience": (CALIBRATION, Patience(alarms, PATIENCE)),
        f"Cusum {100 * PROMISES[0]:g} %": (CALIBRATION, Cusum(alarms)),
        "MissRate 10 %": (CALIBRATION, Threshold(MissRate(tolerance, 0.1))),
        "MissRate 10 %, 90 % sure": (CALIBRATION, Threshold(MissRate(tolerance, 0.1, confidence=0.9))),
        "ErrorBound 95 %": (CALIBRATION, Threshold(ErrorBound(tolerance, confidence=0.95))),
        "Quantile 99 % at 300 K": (THERMAL, Threshold(Quantile(0.99))),
        **{f"{value:g}{unit} typed in": (THERMAL, Threshold(value)) for value in typed},
    }


@dataclass(frozen=True)
class Outcome:
    """What a rule did in one run; times in fs, None where it did not happen."""

    alarm: float | None
    event: float | None
    failure: float | None
    end: float


def outcomes(data: Data, name: str, method: str, rule: Rule, tolerance: float) -> list[Outcome]:
    def time(step: int | None) -> float | None:
        return None if step is None else step * TIMESTEP

    interval = data.interval(method)
    return [
        Outcome(
            replay(rule, readings, interval),
            time(run.event(tolerance)),
            time(run.failure(useless=False)),
            len(run.energy) * TIMESTEP,
        )
        for run, readings in zip(data.runs[name], data.series(name, method), strict=True)
    ]


def lead_times(found: Sequence[Outcome]) -> np.ndarray:
    """(n,) fs from the alarm to the event, of runs that have both; negative where the alarm is late."""
    return np.array([run.event - run.alarm for run in found if run.event is not None and run.alarm is not None])


def failing_runs(data: Data) -> tuple[list[Row], dict[tuple[str, str, str, float], np.ndarray]]:
    """Recall, lead time, share halted in time and false alarms of each rule and method; and all lead times."""
    rows: list[Row] = []
    leads: dict[tuple[str, str, str, float], np.ndarray] = {}
    cases = [(name, t, method) for name in ("heating", "strained") for t in TOLERANCES for method in data.methods]
    for name, tolerance, method in tqdm(cases, desc="failing runs", leave=False):
        for label, (ensembles, asked) in failing_rules(tolerance, method).items():
            table = f"events > {tolerance:g}"
            try:
                rule = asked.resolved(data.threshold_data(ensembles, method))
            except ValueError as refusal:
                rows.append(Row(table, name, method, label, "refused", np.nan, note=str(refusal)))
                continue
            found = outcomes(data, name, method, rule, tolerance)
            events = [run for run in found if run.event is not None]
            caught = sum(run.alarm is not None and run.alarm <= run.event for run in events)
            soon = sum(run.alarm is not None and run.alarm <= run.event + NEAR for run in events)
            failures = [run for run in found if run.failure]  # those that started broken cannot be saved
            saved = sum(run.alarm is not None and run.alarm < run.failure for run in failures)
            lead = leads[name, method, label, tolerance] = lead_times(found)
            false, exposure = too_early(found)
            low, middle, high = np.quantile(lead, [0.25, 0.5, 0.75]) if len(lead) else [np.nan] * 3
            key = (table, name, method, label)
            rows += [
                Row(*key, "threshold", rule.threshold),
                share_row(*key, "recall", caught, len(events)),
                share_row(*key, "recall or soon", soon, len(events)),
                Row(*key, "lead", middle, low, high, len(lead)),
                share_row(*key, "halted before failure", saved, len(failures)),
                Row(*key, "false alarms per ns", 1e6 * false / exposure if exposure else np.nan, n=false),
            ]
    return rows, leads


def too_early(found: Sequence[Outcome]) -> tuple[int, float]:
    """Alarms long before the event, or without one, and the time in fs in which one could have come."""
    false, exposure = 0, 0.0
    for run in found:
        quiet = run.end if run.event is None else max(0.0, run.event - NEAR)
        is_false = run.alarm is not None and run.alarm < quiet
        false += is_false
        exposure += run.alarm if is_false and run.alarm is not None else quiet
    return false, exposure
