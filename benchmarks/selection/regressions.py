"""Learners that cost seconds: regressions on the features of a potential."""

import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from tqdm import tqdm

from ase_uq import Predictor, fit, load_backend, read_frames, select
from ase_uq.backends.base import Backend, Batch
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.labels import labels_of
from ase_uq.methods.base import Head
from benchmarks.selection.rows import SHARE, STRATEGIES, Row, read_csv, write_csv

SIZES = (25, 50, 100, 200)
KNOWN = 50  # frames
POOLS = {"half new": 500, "tenth new": 50}  # frames of extra*.xyz, beside 450 like the known ones
DRAWS = 5  # random choices a seed, averaged


class Remembered(Backend):
    """A potential that evaluates a frame once, however often fits and choices ask for it, in batches of one frame."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[bytes, ForwardPass] = {}
        self.name, self.calculator, self.results = backend.name, backend.calculator, backend.results
        self.elements, self.direct = backend.elements, backend.direct
        self.info_keys, self.required_info_keys = backend.info_keys, backend.required_info_keys
        self._probed = backend.identity, backend.cutoff

    @property
    def device(self) -> torch.device:
        return self._backend.device

    @property
    def dtype(self) -> torch.dtype:
        return self._backend.dtype

    def of(self, atoms: Atoms) -> ForwardPass:
        key = atoms.numbers.tobytes() + atoms.positions.tobytes()
        if key not in self._known:
            self._known[key] = self._backend.forward(self._backend.collate([atoms]))
        return self._known[key]

    def _collate(self, frames: Sequence[Atoms]) -> None:
        return None

    def _forward(self, batch: Batch, forces: bool, gradients: bool) -> ForwardPass:
        if len(batch.frames) > 1:  # the few frames that a fit looks at first
            return self._backend.forward(self._backend.collate(batch.frames), forces=forces, gradients=gradients)
        return self.of(batch.frames[0])

    def _settings(self) -> dict[str, Any]:
        return self._backend._settings()

    def _modules(self) -> Sequence[torch.nn.Module]:
        return self._backend._modules()


def splits_of(folder: Path) -> dict[str, list[Atoms]]:
    """Frames with forces: those of train*.xyz, extra*.xyz and calib*.xyz, and of every test*.xyz and ood*.xyz."""
    found: dict[str, list[Atoms]] = {}
    for prefix in ("train", "extra", "calib", "test", "ood"):
        for path in sorted(folder.glob(f"{prefix}*.xyz")):
            frames = [atoms for atoms in read_frames(path) if labels_of(atoms).forces is not None]
            if frames:
                found.setdefault(path.stem if prefix in ("test", "ood") else prefix, []).extend(frames)
    if missing := {"train", "extra", "calib"} - found.keys():
        sys.exit(f"{folder} has no {' and no '.join(sorted(missing))}*.xyz with forces.")
    return found


def regressions(spec: str, data: Path, n_seeds: int, done: Path) -> list[Row]:
    """Both regressions for every pool and seed; those in the file are not done again."""
    rows = read_csv(done)
    finished = {(row.pool, row.seed) for row in rows}
    pools = {f"{data.name}, {name}": n_extra for name, n_extra in POOLS.items()}
    todo = [(name, seed) for seed in range(n_seeds) for name in pools if (name, seed) not in finished]
    if todo:
        splits, backend = splits_of(data), Remembered(load_backend(spec))
        for name, seed in tqdm(todo, desc="regressions", unit="split"):
            rows += regressed(backend, splits, name, pools[name], seed)
            write_csv(done, rows)
    return [row for row in rows if row.pool in pools and row.seed < n_seeds]


def regressed(
    backend: Remembered, splits: dict[str, list[Atoms]], pool_name: str, n_extra: int, seed: int
) -> list[Row]:
    """Errors of both regressions on known and chosen frames, for every strategy and size."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(splits["train"]))
    extra = [splits["extra"][i] for i in rng.permutation(len(splits["extra"]))[:n_extra]]
    known = [splits["train"][i] for i in order[:KNOWN]]
    pool = [splits["train"][i] for i in order[KNOWN:]] + extra
    predictor = Predictor(backend, fit(backend, known, splits["calib"], methods=["bll"], batch_atoms=1, progress=False))
    head = predictor.uncertainty_model.methods["bll"].head
    tests = {name: frames for name, frames in splits.items() if name not in ("train", "extra", "calib")}
    of_known, of_pool = described(backend, head, known), described(backend, head, pool)
    of_tests = {name: described(backend, head, frames) for name, frames in tests.items()}
    rows = []

    def judge(strategy: str, n: int, draws: Sequence[np.ndarray]) -> None:
        for learner in LEARNERS:
            found = [errors_of(learner, of_known, of_pool.part(chosen), of_tests) for chosen in draws]
            for test in tests:
                value = float(np.mean([errors[test] for errors in found]))
                rows.append(Row(pool_name, learner, "energy RMSE, meV/atom", test, strategy, n, seed, value))
        if n:
            share = float(np.mean([np.mean(chosen >= len(pool) - len(extra)) for chosen in draws]))
            rows.append(Row(pool_name, "", SHARE, "chosen", strategy, n, seed, share))

    judge("nothing", 0, [np.array([], int)])
    for name, options in STRATEGIES.items():
        draws = []
        for draw in range(DRAWS if name in ("random", "bands") else 1):
            common = {"train": known, "batch_atoms": 1, "seed": 100 * seed + draw, "progress": False}
            draws.append(select(pool, SIZES[-1], calculator=predictor, **common, **options).indices)
        for n in SIZES:
            if n <= len(draws[0]):  # the bands may hold fewer
                judge(name, n, [draw[:n] for draw in draws])
    return rows


@dataclass(frozen=True)
class Described:
    """Frames as the regressions see them.

    Args:
        latent: (n_frames, n_features) features in which distances are measured, means over atoms.
        last: (n_frames, n_last) features of the last layer, likewise.
        energies: (n_frames,) what the last layer is to give, eV an atom.
    """

    latent: torch.Tensor
    last: torch.Tensor
    energies: torch.Tensor

    def part(self, numbers: np.ndarray) -> "Described":
        return Described(self.latent[numbers], self.last[numbers], self.energies[numbers])


def described(backend: Remembered, head: Head, frames: Iterable[Atoms]) -> Described:
    latent, last, energies = [], [], []
    for atoms in frames:
        forward_pass = backend.of(atoms)
        latent.append(head.features(forward_pass).mean(0))
        last.append(forward_pass.energy_layer.features.double().mean(0))
        energies.append((labels_of(atoms).energy - float(forward_pass.energy_layer.base)) / len(atoms))
    return Described(torch.stack(latent), torch.stack(last), torch.tensor(energies, dtype=torch.float64))


def errors_of(learner: str, known: Described, chosen: Described, tests: dict[str, Described]) -> dict[str, float]:
    """RMSE of energies on each test, meV an atom."""
    learn, space = LEARNERS[learner]
    rows = torch.cat([getattr(known, space), getattr(chosen, space)])
    predict = learn(rows, torch.cat([known.energies, chosen.energies]))
    return {
        name: 1e3 * float((predict(getattr(test, space)) - test.energies).square().mean().sqrt())
        for name, test in tests.items()
    }


Predict = Callable[[torch.Tensor], torch.Tensor]


def kernel_regression(rows: torch.Tensor, targets: torch.Tensor) -> Predict:
    """Gaussian kernel; width and noise of the least mean squared left-out error, which has a closed form."""
    squares = torch.cdist(rows, rows).square()
    typical, mean = squares[squares > 0].median(), targets.mean()
    best, width, weights = np.inf, typical, targets
    for wider in (1, 3, 10, 30):
        values, vectors = torch.linalg.eigh(torch.exp(-squares / (2 * wider * typical)))
        for noise in 10.0 ** np.arange(-9, -1):
            inverse = vectors / (values.clamp(min=0) + noise) @ vectors.T
            found = inverse @ (targets - mean)
            left_out = float((found / inverse.diagonal()).square().mean())
            if left_out < best:
                best, width, weights = left_out, wider * typical, found
    return lambda new: mean + torch.exp(-torch.cdist(new, rows).square() / (2 * width)) @ weights


def ridge_regression(rows: torch.Tensor, targets: torch.Tensor) -> Predict:
    """Linear with an intercept: the posterior mean of the last layer; ridge of the least left-out error."""
    centre, mean = rows.mean(0), targets.mean()
    left, values, right = torch.linalg.svd(rows - centre, full_matrices=False)
    best, weights = np.inf, right[0]
    for ridge in 10.0 ** np.arange(-12, 2) * float(values[0]) ** 2:
        kept = values**2 / (values**2 + ridge)
        along = left.T @ (targets - mean)
        leverage = (left.square() * kept).sum(1) + 1 / len(rows)
        left_out = float(((targets - mean - left @ (kept * along)) / (1 - leverage)).square().mean())
        if left_out < best:
            best, weights = left_out, right.T @ (kept / values.clamp(min=1e-300) * along)
    return lambda new: mean + (new - centre) @ weights


LEARNERS = {"kernel": (kernel_regression, "latent"), "bll mean": (ridge_regression, "last")}
