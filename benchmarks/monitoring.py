"""Whether thresholds with a criterion hold what they promise, with the reference method beside every run.

    python benchmarks/monitoring.py simulate FOLDER                     (about half an hour on one core)
    python benchmarks/monitoring.py committee FOLDER 'MEMBERS_*.model'  (about as long; may be left out)
    python benchmarks/monitoring.py report FOLDER [--out benchmarks/results/monitoring]

The embedded MACE of malonaldehyde was trained on GFN2-xTB at 300 K, and GFN2-xTB is fast enough to say of its runs
how wrong the forces were. `simulate` makes, labels and stores: reference runs at 300 K and perturbed frames, of which
all thresholds are made; fresh ones of both, on which promises are checked; runs that are heated and runs from
perturbed starts, in which the potential fails. `committee` reads the stored positions with the members that
`benchmarks/train_committee.py malonaldehyde` trains. `report` replays the readings through the rules, in a minute,
and writes OUT.md, OUT.csv and OUT_*.png. An ensemble that FOLDER has already is kept.
"""

import argparse
import csv
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from pathlib import Path

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.data import atomic_numbers, covalent_radii
from matplotlib import pyplot as plt
from scipy.stats import betabinom
from tqdm import tqdm

from ase_uq import Predictor, UncertaintyModel, embedded, load_backend, read_frames
from ase_uq.demo import ACCEPTOR, DONOR, PROTON
from ase_uq.dynamics import Cusum, Patience, Rule, Threshold
from ase_uq.sampling.perturbed import KINDS, perturb_frames
from ase_uq.thresholds.conformal import binomial_band, pac_rank
from ase_uq.thresholds.criteria import ErrorBound, FalseAlarms, MissRate, Quantile, extremes
from ase_uq.thresholds.data import ReferenceRuns, ThresholdData, exchangeable_groups
from ase_uq.thresholds.reduction import Reduction, atom_norms

METHODS = ("combined", "bll", "pdrum", "kernel")
GAMMA, COMMITTEE = "gamma", "committee"
READINGS = (*METHODS, GAMMA, COMMITTEE)

TIMESTEP, FRICTION = 0.5, 0.02  # fs, 1/fs
COLD, HOT = 300.0, 2000.0  # K
RUN = 2000  # steps of a run at 300 K, and of the heating
WARM_UP = 100  # steps with new momenta before anything is written down
BATCH = 40  # replicas evaluated together
AFTER = 100  # steps that a run goes on after it has failed, so that late alarms are seen
KEEP = 8  # steps between stored positions, those that the committee reads
# What a failure is: a bond 1.5 times as long as the covalent radii say or 0.6 times, atoms fused to less than 1.25
# times, an energy this far below the minimum, a temperature that no thermostat made, or useless forces.
LONGEST, SHORTEST, FUSED = 1.5, 0.6, 1.25
HOLE, BOILING, USELESS = 1.0, 5000.0, 5.0  # eV, K, eV/Å
HOT_STEPS = 100  # of the run that makes a hot frame
LOST = 50.0  # Å from the origin; beyond, a molecule has flown apart

TOLERANCES = (0.3, 1.0)  # eV/Å
PROMISES = (0.05, 0.1, 0.2)  # false alarms a run
TYPED = (0.1, 0.3)  # eV/Å, what people type
PATIENCE = 10.0  # fs
FRAMES_A_RUN = 10  # labelled frames of a run at 300 K that count as calibration frames
NEAR = 100.0  # fs; an alarm longer before the event is a false one, one so much later is not too late for all
RESAMPLES = 200
MAXIMA = "run maxima"


@dataclass(frozen=True)
class Run:
    """One run, or one frame.

    Args:
        readings: (n_steps, n_methods) largest ε_i, eV/Å, and largest gamma.
        energy: (n_steps,) of the potential above that of the relaxed molecule, eV.
        temperature: (n_steps,) K.
        bonds: (n_steps,) whether a bond is broken or atoms are fused.
        labelled: (n_labels,) steps at which the reference was asked.
        norms: (n_labels, n_atoms, n_methods) ε_i and gamma there.
        errors: (n_labels, n_atoms) ‖F_ref - F‖, eV/Å; infinite where the reference did not converge.
        kept: (n_kept,) steps whose positions are stored.
        positions: (n_kept, n_atoms, 3) Å.
    """

    readings: np.ndarray
    energy: np.ndarray
    temperature: np.ndarray
    bonds: np.ndarray
    labelled: np.ndarray
    norms: np.ndarray
    errors: np.ndarray
    kept: np.ndarray
    positions: np.ndarray

    def failure(self, *, useless: bool) -> int | None:
        """The first step at which a bond has broken, atoms have fused or the energy has diverged.

        Args:
            useless: Whether forces that are no good at all, or no reference, count too.
        """
        failed = self.bonds.astype(bool) | (self.energy < -HOLE) | (self.temperature > BOILING)
        if useless:
            failed[self.labelled[self.errors.max(1, initial=0.0) > USELESS]] = True
        return first(failed)

    def event(self, tolerance: float) -> int | None:
        """The first labelled step whose largest force error exceeds a tolerance."""
        found = first(self.errors.max(1) > tolerance)
        return None if found is None else int(self.labelled[found])


@dataclass(frozen=True)
class Plan:
    """What an ensemble is.

    Args:
        n_runs: Independent runs, or frames where `steps` is 0.
        steps: Of a run.
        hot: Whether the thermostat goes from COLD to HOT within RUN steps.
        perturbed: Kinds of perturbed frames that runs start from, as many of each; empty for thermal ones.
        label_every: Steps between labels.
    """

    n_runs: int
    steps: int
    hot: bool = False
    perturbed: tuple[str, ...] = ()
    label_every: int = 2

    @property
    def conditions(self) -> str:
        length = f"{self.steps * TIMESTEP / 1000:g} ps"
        start = "perturbed starts" if self.perturbed else "thermal starts"
        heat = f", heated to {HOT:.0f} K within {RUN * TIMESTEP / 1000:g} ps and held" if self.hot else ""
        return (
            f"{self.n_runs} runs of {length} at most, {start}, {COLD:.0f} K{heat}"
            if self.steps
            else f"{self.n_runs} frames"
        )


# A seed an ensemble: its place in this table. Thresholds see only the first two.
ENSEMBLES = {
    "reference": Plan(40, RUN, label_every=16),
    "calibration": Plan(200, 0, perturbed=KINDS),
    "test": Plan(100, RUN, label_every=16),
    "fresh": Plan(200, 0, perturbed=KINDS),
    "heating": Plan(40, 2 * RUN, hot=True),
    "strained": Plan(39, RUN, perturbed=("rattled", "strained", "compressed")),
}
PERTURBED = ("calibration", "fresh", "strained")


def first(condition: np.ndarray) -> int | None:
    """Place of the first true entry."""
    return int(condition.argmax()) if condition.any() else None


# ---------------------------------------------------------------------------------------------------- simulate


class Truth:
    """Forces of GFN2-xTB, each from a new guess, so that a frame's label does not depend on the one before."""

    def __init__(self, numbers: np.ndarray, positions: np.ndarray) -> None:
        from tblite.interface import Calculator

        self._calculator = Calculator("GFN2-xTB", numbers, positions / units.Bohr)
        self._calculator.set("verbosity", 0)

    def forces(self, positions: np.ndarray) -> np.ndarray | None:
        """(n_atoms, 3) eV/Å; None where the self-consistency does not converge, as on many a broken molecule."""
        try:
            self._calculator.update(positions=positions / units.Bohr)
            return -self._calculator.singlepoint()["gradient"] * units.Hartree / units.Bohr
        except RuntimeError:
            return None


class Topology:
    """The bonds of a molecule; those of its proton may be with either oxygen."""

    def __init__(self, relaxed: Atoms) -> None:
        self._first, self._second = np.triu_indices(len(relaxed), 1)
        radii = covalent_radii[relaxed.numbers]
        self._radii = radii[self._first] + radii[self._second]
        ratio = self._ratios(relaxed.positions[None])[0]
        self._shared = np.array([{i, j} in ({PROTON, DONOR}, {PROTON, ACCEPTOR}) for i, j in self._pairs])
        self._bonded = (ratio < FUSED) & ~self._shared
        self._apart = (ratio >= FUSED) & ~self._shared

    @property
    def _pairs(self) -> Iterator[tuple[int, int]]:
        return zip(self._first.tolist(), self._second.tolist(), strict=True)

    def _ratios(self, positions: np.ndarray) -> np.ndarray:
        return np.linalg.norm(positions[:, self._first] - positions[:, self._second], axis=-1) / self._radii

    def broken(self, positions: np.ndarray) -> np.ndarray:
        """(n_frames,) whether a bond of the frames, (n_frames, n_atoms, 3), is broken, or atoms are fused."""
        ratio = self._ratios(positions)
        bonded, proton = ratio[:, self._bonded], ratio[:, self._shared]
        torn = (bonded > LONGEST).any(1) | (proton.min(1) > LONGEST)
        crushed = (bonded < SHORTEST).any(1) | (proton.min(1) < SHORTEST)
        return torn | crushed | (ratio[:, self._apart] < FUSED).any(1)


class Simulator:
    """Langevin dynamics of many replicas, one batch a step, with a label now and then."""

    def __init__(self) -> None:
        backend = load_backend("embedded:mace", device="cpu", dtype="float32")
        self.calculator: BaseCalculator = backend.calculator
        self._predictor = Predictor(backend, UncertaintyModel.load(embedded.path("mace.uq.safetensors")))
        (self.relaxed,) = read_frames(embedded.path("malonaldehyde.xyz"))
        self._topology = Topology(self.relaxed)
        self._truth = Truth(self.relaxed.numbers, self.relaxed.positions)
        self._minimum = self._predictor.predict([self.relaxed])[0]["energy"]
        self._masses = self.relaxed.get_masses()[:, None]

    def runs(self, plan: Plan, starts: np.ndarray, seed: int, title: str) -> list[Run]:
        """All runs of an ensemble; `starts` (n_runs, n_atoms, 3) Å."""
        found: list[Run] = []
        for number, first_run in enumerate(range(0, len(starts), BATCH)):
            part, rng = starts[first_run : first_run + BATCH], np.random.default_rng([1, seed, number])
            found += self._batch(plan, part, rng, f"{title} {first_run + 1}-{first_run + len(part)} of {len(starts)}")
        return found

    def _batch(self, plan: Plan, positions: np.ndarray, rng: np.random.Generator, title: str) -> list[Run]:
        positions = positions.copy()
        thermal = np.sqrt(units.kB / self._masses)
        velocities = np.sqrt(COLD) * thermal * rng.standard_normal(positions.shape)
        logs = [_Log() for _ in positions]
        active = np.arange(len(positions))
        warm_up = 0 if plan.perturbed else WARM_UP
        forces = self._observe(plan, logs, active, positions, velocities, -warm_up)
        half, decay = TIMESTEP * units.fs / 2, np.exp(-FRICTION * TIMESTEP)
        for step in tqdm(range(1 - warm_up, plan.steps), desc=title, unit="step", leave=False):
            if not len(active):
                break
            kelvin = COLD + (HOT - COLD) * min(1.0, max(0, step) / RUN) if plan.hot else COLD
            # BAOAB; the noise of all replicas is drawn, so that no run depends on when others end.
            noise = rng.standard_normal(positions.shape)[active]
            v = velocities[active] + half * forces / self._masses
            x = positions[active] + half * v
            v = decay * v + np.sqrt((1 - decay**2) * kelvin) * thermal * noise
            positions[active], velocities[active] = x + half * v, v
            inside = (np.abs(positions[active]) < LOST).all((1, 2))  # NaN is not
            active = active[inside]
            if not len(active):
                break
            forces = self._observe(plan, logs, active, positions, velocities, step, half)
            alive = np.array([not logs[replica].is_over(step) for replica in active])
            active, forces = active[alive], forces[alive]
        return [log.run() for log in logs]

    def _observe(
        self,
        plan: Plan,
        logs: "Sequence[_Log]",
        active: np.ndarray,
        positions: np.ndarray,
        velocities: np.ndarray,
        step: int,
        half: float = 0.0,
    ) -> np.ndarray:
        """Forces of the active replicas; completes their velocities and writes everything down."""
        numbers = self.relaxed.numbers
        predictions = self._predictor.predict([Atoms(numbers, positions[replica]) for replica in active])
        forces = np.array([prediction["forces"] for prediction in predictions], float)
        velocities[active] += half * forces / self._masses
        if step < 0:
            return forces
        kelvin = (self._masses * velocities[active] ** 2).sum((1, 2)) / (3 * len(numbers) * units.kB)
        broken = self._topology.broken(positions[active])
        for place, (replica, prediction) in enumerate(zip(active, predictions, strict=True)):
            norms = np.stack([_norms(prediction.results, method) for method in (*METHODS, GAMMA)], axis=1)
            log = logs[replica]
            log.steps.append((norms.max(0), prediction["energy"] - self._minimum, kelvin[place], broken[place]))
            error = None
            if step % max(1, plan.label_every) == 0:
                truth = self._truth.forces(positions[replica])
                missing = np.full(len(numbers), np.inf)
                error = missing if truth is None else np.linalg.norm(truth - forces[place], axis=1)
                log.labels.append((step, norms, error))
            if step % KEEP == 0:
                log.kept.append((step, positions[replica].copy()))
            useless = error is not None and error.max() > USELESS
            if log.failed is None and (useless or broken[place] or log.steps[-1][1] < -HOLE or kelvin[place] > BOILING):
                log.failed = step
        return forces


class _Log:
    """What is written down of one replica."""

    def __init__(self) -> None:
        self.steps: list[tuple[np.ndarray, float, float, bool]] = []
        self.labels: list[tuple[int, np.ndarray, np.ndarray]] = []
        self.kept: list[tuple[int, np.ndarray]] = []
        self.failed: int | None = None

    def is_over(self, step: int) -> bool:
        return self.failed is not None and step - self.failed >= AFTER

    def run(self) -> Run:
        columns = [*zip(*self.steps, strict=True), *zip(*self.labels, strict=True), *zip(*self.kept, strict=True)]
        whole = {0: np.float32, 1: np.float32, 2: np.float32, 3: bool, 4: np.int32, 7: np.int32}
        return Run(*(np.array(column, whole.get(place, np.float32)) for place, column in enumerate(columns)))


def _norms(results: dict, method: str) -> np.ndarray:
    if method == GAMMA:
        return results["gamma"]
    return atom_norms(results["forces_uncertainty" if method == "combined" else f"forces_uncertainty_{method}"])


def starts_of(plan: Plan, name: str, calculator: BaseCalculator) -> np.ndarray:
    """(n_runs, n_atoms, 3) first positions, Å: thermal frames of the reference method, or perturbed ones."""
    seed = list(ENSEMBLES).index(name)
    if not plan.perturbed:
        parents = read_frames(embedded.path("test_300K.xyz"))
        places = np.random.default_rng([0, seed]).integers(len(parents), size=plan.n_runs)
        return np.array([parents[place].positions for place in places])
    parents = [
        frame for file in ("calibration_300K.xyz", "test_300K.xyz") for frame in read_frames(embedded.path(file))
    ]
    # One shuffle for all, so that calibration, fresh and strained have parents of their own, of the same kind.
    shares = np.array_split(np.random.default_rng(0).permutation(len(parents)), len(PERTURBED))
    own = [parents[place] for place in shares[PERTURBED.index(name)]]
    per_kind = plan.n_runs // len(plan.perturbed)
    frames = perturb_frames(
        own, kinds=plan.perturbed, per_kind=per_kind, calculator=calculator, steps=HOT_STEPS, seed=seed, progress=True
    )
    return np.array([frame.positions for frame in frames])


def simulate(folder: Path, only: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    simulator = Simulator()
    for seed, (name, plan) in enumerate(ENSEMBLES.items()):
        target = folder / f"{name}.npz"
        if target.exists() or name not in only:
            continue
        starts = starts_of(plan, name, simulator.calculator)
        runs = simulator.runs(replace(plan, steps=max(1, plan.steps)), starts, seed, name)
        save(target, runs)
        print(f"wrote {target}: {len(runs)} runs, {sum(len(run.energy) for run in runs)} steps", flush=True)


def save(path: Path, runs: Sequence[Run]) -> None:
    arrays = {}
    for field in fields(Run):
        parts = [getattr(run, field.name) for run in runs]
        arrays[field.name] = np.concatenate(parts)
        arrays[f"{field.name}_lengths"] = np.array([len(part) for part in parts])
    np.savez_compressed(path, **arrays)


def load(path: Path) -> list[Run]:
    with np.load(path) as stored:
        columns = [
            np.split(stored[field.name], np.cumsum(stored[f"{field.name}_lengths"])[:-1]) for field in fields(Run)
        ]
    return [Run(*parts) for parts in zip(*columns, strict=True)]


# --------------------------------------------------------------------------------------------------- committee


def read_committee(folder: Path, pattern: str) -> None:
    """Spread of the members' forces at the stored positions, (n_kept, n_atoms) eV/Å a run, not calibrated."""
    backend = load_backend(f"mace:{pattern}", device="cpu", dtype="float32")
    (relaxed,) = read_frames(embedded.path("malonaldehyde.xyz"))
    for name in ENSEMBLES:
        target = folder / f"{COMMITTEE}_{name}.npz"
        if target.exists():
            continue
        runs = load(folder / f"{name}.npz")
        positions = np.concatenate([run.positions for run in runs])
        spreads = []
        for start in tqdm(range(0, len(positions), BATCH), desc=f"{COMMITTEE} {name}", unit="batch", leave=False):
            frames = [Atoms(relaxed.numbers, frame) for frame in positions[start : start + BATCH].astype(float)]
            members = backend.forward(backend.collate(frames)).members
            assert members is not None
            assert members.forces is not None
            spread = members.forces.double().var(0).sum(1).sqrt()
            spreads.append(spread.reshape(len(frames), -1).numpy())
        np.savez_compressed(target, spread=np.concatenate(spreads), n_members=len(members.forces))
        print(f"wrote {target}: {len(positions)} frames", flush=True)


# ------------------------------------------------------------------------------------------------------ report


class Data:
    """What `simulate` and `committee` stored, as series of readings and as evidence.

    Args:
        folder: Of both.
    """

    def __init__(self, folder: Path) -> None:
        missing = [name for name in ENSEMBLES if not (folder / f"{name}.npz").exists()]
        if missing:
            sys.exit(f"{folder} has no {', '.join(missing)}. Run `python benchmarks/monitoring.py simulate {folder}`.")
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


THERMAL, CALIBRATION = ("reference",), ("reference", "calibration")
THERMAL_FRESH, FRESH = ("test",), ("test", "fresh")
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


# ------------------------------------------------------------------------------ first table: false alarms at 300 K


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


# ------------------------------------------------------------------------------------ second table: runs that fail


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


# ------------------------------------------------------------------------------------- third table: the guarantees


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


# ------------------------------------------------------------------------------------------------- words, pictures


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
        "`python benchmarks/monitoring.py simulate FOLDER`, `committee FOLDER MEMBERS`, `report FOLDER`, 2 CPU cores.",
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


def report(folder: Path, out: Path) -> None:
    data = Data(folder)
    alarms = false_alarms(data)
    failing, leads = failing_runs(data)
    rows = [*alarms, *failing, *guarantees(data)]
    out.parent.mkdir(parents=True, exist_ok=True)
    text = markdown(data, rows, out)
    out.with_suffix(".md").write_text(text)
    write_csv(out.with_suffix(".csv"), rows)
    figures = (draw_example(data), draw_false_alarms(data, rows), draw_lead_times(data, leads))
    for what, figure in zip(PICTURES, figures, strict=True):
        figure.savefig(out.with_name(f"{out.name}_{what}.png"), dpi=150)
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(dest="stage", required=True)
    for stage in ("simulate", COMMITTEE, "report"):
        stages.add_parser(stage).add_argument("folder", type=Path)
    stages.choices["simulate"].add_argument("--only", nargs="+", choices=ENSEMBLES, default=list(ENSEMBLES))
    stages.choices[COMMITTEE].add_argument("members", help="pattern of the members' files, in quotes")
    stages.choices["report"].add_argument("--out", type=Path, default=Path("benchmarks/results/monitoring"))
    arguments = parser.parse_args()
    torch.manual_seed(0)
    match arguments.stage:
        case "simulate":
            simulate(arguments.folder, arguments.only)
        case "committee":
            read_committee(arguments.folder, arguments.members)
        case _:
            report(arguments.folder, arguments.out)


if __name__ == "__main__":
    main()
