"""Runs made with the embedded MACE, labelled by GFN2-xTB, and read by a committee."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.data import covalent_radii
from tqdm import tqdm

from ase_uq import Predictor, UncertaintyModel, embedded, load_backend, read_frames
from ase_uq.demo import ACCEPTOR, DONOR, PROTON
from ase_uq.sampling.perturbed import perturb_frames
from ase_uq.thresholds.reduction import atom_norms
from benchmarks.monitoring.runs import (
    AFTER,
    BATCH,
    BOILING,
    COLD,
    COMMITTEE,
    ENSEMBLES,
    FRICTION,
    FUSED,
    GAMMA,
    HOLE,
    HOT,
    HOT_STEPS,
    KEEP,
    LONGEST,
    LOST,
    METHODS,
    PERTURBED,
    RUN,
    SHORTEST,
    TIMESTEP,
    USELESS,
    WARM_UP,
    Plan,
    Run,
    load,
    save,
)


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
