"""What thresholds promise, checked on fresh frames and on resampled calibrations."""

from dataclasses import replace

import numpy as np
from scipy.stats import betabinom
from tqdm import tqdm

from ase_uq import embedded, read_frames
from ase_uq.dynamics import Cusum
from ase_uq.thresholds.conformal import pac_rank
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, extremes
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData
from benchmarks.monitoring.judging import LENGTH, PROMISES, TOLERANCES, Data, Row, share_row
from benchmarks.monitoring.runs import CALIBRATION, FRESH, METHODS

RESAMPLES = 200


def guarantees(data: Data) -> list[Row]:
    """What each conformal guarantee promises of a frame, against frames that it has not seen."""
    rows: list[Row] = []
    for method in tqdm(data.methods, desc="guarantees", leave=False):
        for tolerance in TOLERANCES:
            for criterion in (
                ErrorBound(tolerance, confidence=0.95),
                MissRate(tolerance, 0.1),
                MissRate(tolerance, 0.1, confidence=0.9),
            ):
                rows += _frames(data, method, criterion)
        rows += _per_element(data, method) if method in METHODS else []
    rows += [row for method in METHODS for row in _resampled(data, method)]
    rows += [row for method in data.methods for row in _resampled_tail(data, method)]
    rows += [_resampled_cusum(data, method) for method in data.methods]
    return rows


def _frames(data: Data, method: str, criterion: ErrorBound | MissRate) -> list[Row]:
    key = ("guarantees", "fresh", method, str(criterion))
    try:
        threshold = float(criterion.resolve(data.threshold_data(CALIBRATION, method)))
    except ValueError as refusal:
        return [Row(*key, "refused", np.nan, note=str(refusal))]
    rows = []
    for ensemble, names in (("fresh", FRESH), ("heating", ("heating",)), ("strained", ("strained",))):
        fresh = data.threshold_data(names, method).finite
        key = ("guarantees", ensemble, method, str(criterion))
        bad = fresh.errors > criterion.error
        missed = int(np.count_nonzero(bad & (fresh.readings < threshold)))
        if isinstance(criterion, MissRate):
            rows.append(share_row(*key, "missed of bad", missed, int(bad.sum())))
            continue
        covered = int(np.count_nonzero(fresh.errors <= criterion.error / threshold * fresh.readings))
        rows.append(share_row(*key, "errors within bound", covered, len(bad)))
        rows.append(share_row(*key, "bad and not flagged", missed, len(bad)))
    return rows


def _per_element(data: Data, method: str) -> list[Row]:
    """Misses among bad atoms of each element, by the threshold of all atoms and by one of its own."""
    criterion = MissRate(TOLERANCES[0], 0.1)
    rows = []
    together = float(criterion.resolve(data.threshold_data(CALIBRATION, method)))
    (relaxed,) = read_frames(embedded.path("malonaldehyde.xyz"))
    for element in sorted(set(relaxed.get_chemical_symbols())):
        fresh = data.threshold_data(FRESH, method, element).finite
        bad = fresh.errors > criterion.error
        own = float(criterion.resolve(data.threshold_data(CALIBRATION, method, element)))
        for rule, threshold in ((str(criterion), together), (f"PerElement({criterion})", own)):
            missed = int(np.count_nonzero(bad & (fresh.readings < threshold)))
            rows.append(share_row("per element", "fresh", method, rule, element, missed, int(bad.sum())))
    return rows


def _resampled(data: Data, method: str) -> list[Row]:
    """Guarantees over many calibration sets: halves of the units, the other half being the fresh ones."""
    parts = [data.threshold_data(names, method).finite for names in (CALIBRATION, FRESH)]
    readings, errors = (np.concatenate([getattr(part, what) for part in parts]) for what in ("readings", "errors"))
    groups = np.concatenate([parts[0].groups, parts[0].groups.max() + 1 + parts[1].groups])
    rows, rng = [], np.random.default_rng(0)
    tolerance = TOLERANCES[0]
    for criterion in (ErrorBound(tolerance, confidence=0.95), MissRate(tolerance, 0.1), MissRate(tolerance, 0.1, 0.9)):
        shares, chances = [], []
        for _ in range(RESAMPLES):
            ids = np.unique(groups)
            chosen = np.isin(groups, rng.permutation(ids)[: len(ids) // 2])
            threshold = float(criterion.resolve(ThresholdData(readings[chosen], errors[chosen], groups[chosen])))
            r, e = readings[~chosen], errors[~chosen]
            if isinstance(criterion, ErrorBound):
                shares.append(float(np.mean(e <= tolerance / threshold * r)))
            else:
                n_bad, m_bad = int(np.sum(errors[chosen] > tolerance)), int(np.sum(e > tolerance))
                shares.append(float(np.mean(r[e > tolerance] < threshold)))
                chances.append(chance_of_keeping(criterion, n_bad, m_bad))
        key = ("resampled", "fresh", method, str(criterion))
        low, high = np.quantile(shares, [0.05, 0.95])
        rows.append(Row(*key, "mean", float(np.mean(shares)), low, high, RESAMPLES))
        if isinstance(criterion, MissRate):
            kept = float(np.mean(np.array(shares) <= criterion.at_most))
            note = f"expected={np.mean(chances):.3f}"
            rows.append(Row(*key, "share of calibration sets that keep it", kept, n=RESAMPLES, note=note))
    return rows


def chance_of_keeping(criterion: MissRate, n_bad: int, m_bad: int) -> float:
    """That at most the share promised is missed of m fresh bad frames, by exact theory of n independent bad ones."""
    if criterion.confidence is None:
        rank = int(criterion.at_most * (n_bad + 1) + 1e-9)
    else:
        rank = pac_rank(n_bad, criterion.at_most, 1 - criterion.confidence)
    return float(betabinom(m_bad, rank, n_bad + 1 - rank).cdf(int(criterion.at_most * m_bad + 1e-9)))


def _resampled_tail(data: Data, method: str) -> list[Row]:
    """False alarms by the tail of half runs, over many choices of these."""
    series = [run for name in ("reference", "test") for run in data.series(name, method)]
    length = round(1000 * LENGTH / data.interval(method))
    rows, rng = [], np.random.default_rng(0)
    drawn = [rng.permutation(len(series)) for _ in range(RESAMPLES)]
    n_runs = len(data.runs["reference"])
    tails = [extremes.fit_tail([series[i][: len(series[i]) // 2] for i in order[:n_runs]]) for order in drawn]
    maxima = np.array([run.max() for run in series])
    for promise in PROMISES:
        shares = [
            float(np.mean(maxima[order[n_runs:]] >= tail.return_level(promise, length)))
            for order, tail in zip(drawn, tails, strict=True)
        ]
        low, high = np.quantile(shares, [0.05, 0.95])
        rule = "FalseAlarms by the tail of half runs"
        rows.append(
            Row("resampled", "test", method, rule, f"{promise:g}", float(np.mean(shares)), low, high, RESAMPLES)
        )
    return rows


def _resampled_cusum(data: Data, method: str) -> Row:
    """False alarms of a CUSUM in the runs that it was not made of, over some choices of the others."""
    series = [run for name in ("reference", "test") for run in data.series(name, method)]
    n_runs, rng, shares = len(data.runs["reference"]), np.random.default_rng(0), []
    criterion = FalseAlarms(PROMISES[0], ps=LENGTH)
    for _ in range(RESAMPLES // 5):
        order = rng.permutation(len(series))
        runs = ReferenceRuns(tuple(series[i] for i in order[:n_runs]), data.interval(method))
        rule = Cusum(criterion).resolved(replace(data.threshold_data(CALIBRATION, method), runs=runs))
        assert rule.mean is not None
        assert rule.sd is not None
        assert rule.h is not None
        highest = []
        for i in order[n_runs:]:
            sums = np.cumsum((np.log(series[i]) - rule.mean) / rule.sd - rule.drift)
            highest.append((sums - np.minimum(np.minimum.accumulate(sums), 0)).max())
        shares.append(float(np.mean(np.array(highest) >= rule.h)))
    low, high = np.quantile(shares, [0.05, 0.95])
    key = ("resampled", "test", method, "Cusum by FalseAlarms", f"{PROMISES[0]:g}")
    return Row(*key, float(np.mean(shares)), low, high, len(shares))
