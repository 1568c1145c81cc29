"""Learning curves: which way of choosing frames saves labels.

    python benchmarks/selection.py ../shared/data/acac POTENTIAL.model [--seeds 8] [--folder selection]
                                   [--out benchmarks/results/selection]

`ase_uq.select` chooses frames of a pool in which some are hotter than all that is known, and what was learned from
the known and the chosen ones together is judged on frames of other runs, at either temperature. Three learners:

    kernel      energies by a Gaussian kernel on the features in which distances are measured, averaged over atoms
    bll mean    energies by the last layer of the potential, fitted again
    fine-tuned  the embedded MACE of malonaldehyde, trained on: the real thing

The first two learn from frames of DATA, a folder with train*.xyz, extra*.xyz, calib*.xyz, test*.xyz and ood*.xyz,
labelled. For each seed 50 frames of train*.xyz are known, an uncertainty model is fitted on them, and the others are
the pool, with all of extra*.xyz or with 50. Width and ridge are those of the least left-out error. POTENTIAL, a MACE
.model file or a SPEC, was trained before: where it has seen frames of the pool, its features have as well.

For the third the pool is labelled by GFN2-xTB along MD at 300 K and 900 K. Regressions take ten minutes of a core,
fine-tunings a quarter of an hour. Set OMP_NUM_THREADS=1: molecules are too small for more. What FOLDER has already is
not done again. Writes OUT.md, OUT.csv and a figure for each pool.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.io import write
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric import Batch as Batches
from mace.tools.torch_geometric.dataloader import DataLoader
from mace.tools.torch_tools import default_dtype
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter
from tqdm import tqdm

from ase_uq import Predictor, Quantile, UncertaintyModel, UQWarning, embedded, fit, load_backend, read_frames, select
from ase_uq.backends.base import Backend, Batch
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.labels import labels_of
from ase_uq.methods.base import Head

STRATEGIES: dict[str, dict[str, Any]] = {
    "random": {"strategy": "random"},
    "lcmd": {"strategy": "lcmd"},
    "lcmd of atoms": {"strategy": "lcmd", "per": "environment"},
    "maxdist": {"strategy": "maxdist"},
    "maxdet": {"strategy": "maxdet"},
    "top": {"strategy": "top"},
    # More uncertain than nine calibration frames in ten, and short of 1 eV/Å.
    "bands": {"strategy": "bands", "flag": Quantile(0.9), "halt": 1.0},
}
STYLES = {
    "random": ("#000000", "o"),
    "lcmd": ("#0072B2", "s"),
    "lcmd of atoms": ("#56B4E9", "D"),
    "maxdist": ("#E69F00", "^"),
    "maxdet": ("#D55E00", "v"),
    "top": ("#CC79A7", "P"),
    "bands": ("#009E73", "X"),
}
SIZES = (25, 50, 100, 200)
KNOWN = 50  # frames
POOLS = {"half new": 500, "tenth new": 50}  # frames of extra*.xyz, beside 450 like the known ones
DRAWS = 5  # random choices a seed, averaged
SHARE = "share of new frames"

# Of the fine-tuning. Its recipe was picked by errors on the test frames; docs/selection.md says of how many.
TUNED_NAME = "malonaldehyde, half new"
TUNED = ("random", "lcmd", "maxdist", "top")
TUNED_SIZES = (25, 100)
TUNED_SEEDS = 3
TUNED_POOL = 400  # of 600 frames, another part for each seed
N_NEW, N_OLD = 2, 6  # frames a batch: of fewer old ones the potential forgets what it knew
STEPS, RATE, DECAY, ENERGY_WEIGHT = 300, 1e-2, 0.99, 3.0  # Å in the weight of an energy an atom
DRAWN = ("energy RMSE", "force median", "force RMSE")  # measures that have a place in the figures


@dataclass(frozen=True)
class Row:
    """One number.

    Args:
        pool: Which one frames were chosen from.
        learner: What learned from the frames.
        measure: Of its error.
        test: Frames it was judged on.
        strategy: How frames were chosen.
        n: How many of them.
        seed: Of the start and the pool.
        value: In the unit that `measure` names.
    """

    pool: str
    learner: str
    measure: str
    test: str
    strategy: str
    n: int
    seed: int
    value: float


class Remembered(Backend):
    """A potential that evaluates a frame once, however often fits and choices ask for it, in batches of one frame."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._known: dict[bytes, ForwardPass] = {}
        self.name, self.calculator, self.results = backend.name, backend.calculator, backend.results
        self.elements, self.direct = backend.elements, backend.direct
        self.info_keys, self.required_info_keys = backend.info_keys, backend.required_info_keys
        self.identity = backend.identity

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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("potential")
    parser.add_argument("--seeds", type=int, default=8, help="of the regressions")
    parser.add_argument("--folder", type=Path, default=Path("selection"), help="keeps what was finished")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UQWarning)  # that the bands hold few frames is what the table says
    spec = f"mace:{arguments.potential}" if arguments.potential.endswith(".model") else arguments.potential
    arguments.folder.mkdir(parents=True, exist_ok=True)
    done = arguments.folder / f"regressions_{arguments.data.name}_{Path(arguments.potential).stem}.csv"
    rows = regressions(spec, arguments.data, arguments.seeds, done)
    points = points_of(rows + fine_tunings(arguments.folder))
    text = markdown(points, arguments)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    write_csv(out.with_suffix(".csv"), points)
    for pool in dict.fromkeys(p.pool for p in points):
        own = [p for p in points if p.pool == pool and p.measure.startswith(DRAWN)]
        draw(own, pool).savefig(out.with_name(f"{out.name}_{pool.replace(', ', '_').replace(' ', '_')}.png"), dpi=120)
    print(text)


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


def fine_tunings(folder: Path) -> list[Row]:
    """The embedded MACE, trained on with chosen frames; what the folder has already is not done again."""
    done = folder / "fine_tunings.csv"
    rows = read_csv(done)
    finished = {(row.strategy, row.n, row.seed) for row in rows}
    todo = [
        (seed, n, strategy)
        for seed in range(TUNED_SEEDS)
        for n in TUNED_SIZES
        for strategy in TUNED
        if (strategy, n, seed) not in finished
    ]
    if not todo:
        return rows
    tests = {name: read_frames(embedded.path(f"{name}.xyz")) for name in ("test_300K", "test_900K")}
    old = read_frames(embedded.path("train_300K.xyz"))
    both = reference_pool(folder)
    backend = Remembered(load_backend("embedded:mace", device="cpu"))
    predictor = Predictor(backend, UncertaintyModel.load(embedded.path("mace.uq.safetensors")))
    if not rows:
        rows += judged(backend.calculator.models[0], tests, "nothing", 0, 0)
    for seed, n, strategy in tqdm(todo, desc="fine-tunings", unit="model"):
        pool = [both[i] for i in np.random.default_rng(seed).permutation(len(both))[:TUNED_POOL]]
        chosen = select(
            pool, n, calculator=predictor, train=old, batch_atoms=1, seed=seed, progress=False, **STRATEGIES[strategy]
        )
        new = [pool[i] for i in chosen.indices]
        rows += judged(fine_tuned(new, old, seed), tests, strategy, n, seed)
        hot = float(np.mean([atoms.info["temperature_K"] > 300 for atoms in new]))
        rows.append(Row(TUNED_NAME, "", SHARE, "chosen", strategy, n, seed, hot))
        write_csv(done, rows)
    return rows


def reference_pool(folder: Path) -> list[Atoms]:
    """Frames of GFN2-xTB runs at 300 K and 900 K, made as those of the package were, with seeds of their own."""
    sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "potentials"))
    from label import sample  # not part of the package; tblite is only wanted here

    frames = []
    for seed, kelvin in enumerate((300, 900), 10):
        path = folder / f"pool_{kelvin}K.xyz"
        if not path.exists():
            write(path, sample(path.stem, kelvin, n_runs=6, n_frames=50, seed=seed))
        frames += read_frames(path)
    return frames


def fine_tuned(new: Sequence[Atoms], old: Sequence[Atoms], seed: int) -> torch.nn.Module:
    """The embedded MACE, trained on with new and old frames: Adam on the norms of force errors and on energies.

    Norms and not their squares, which hot frames would rule. The rate rises and falls to zero, and an average over
    the last steps is what is returned.
    """
    model = load_backend("embedded:mace", device="cpu", dtype="float32").calculator.models[0]
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    sources = [(mace_data(model, new), N_NEW), (mace_data(model, old), N_OLD)]
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(parameters, lr=RATE, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.05)
    for _ in range(STEPS):
        drawn = [data[i] for data, count in sources for i in rng.choice(len(data), count, replace=False)]
        batch = Batches.from_data_list(drawn)
        found = model(batch.to_dict(), training=True)
        energy_error = (found["energy"] - batch.energy) / (batch.ptr[1:] - batch.ptr[:-1])
        # A norm has no derivative at zero.
        force_error = ((found["forces"] - batch.forces).square().sum(1) + 1e-6).sqrt()
        loss = force_error.mean() + ENERGY_WEIGHT * energy_error.abs().mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 10)
        optimizer.step()
        schedule.step()
        with torch.no_grad():
            for mean, parameter in zip(average, parameters, strict=True):
                mean.lerp_(parameter, 1 - DECAY)
    with torch.no_grad():
        for mean, parameter in zip(average, parameters, strict=True):
            parameter.copy_(mean).requires_grad_(False)
    return model


def mace_data(model: torch.nn.Module, frames: Sequence[Atoms]) -> list[AtomicData]:
    keys = KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    with default_dtype(next(model.parameters()).dtype):
        return [
            AtomicData.from_config(config_from_atoms(atoms, keys), z_table=table, cutoff=float(model.r_max))
            for atoms in frames
        ]


def judged(model: torch.nn.Module, tests: dict[str, list[Atoms]], strategy: str, n: int, seed: int) -> list[Row]:
    """Force errors: MAE and RMSE of components, and the median over frames of the RMSE of one."""
    rows = []
    for name, frames in tests.items():
        batches = DataLoader(mace_data(model, frames), batch_size=50, shuffle=False)
        forces = [model(batch.to_dict(), training=False)["forces"].detach().double().numpy() for batch in batches]
        errors = 1e3 * (np.concatenate(forces) - np.concatenate([atoms.arrays["REF_forces"] for atoms in frames]))
        of_frames = np.sqrt((errors**2).reshape(len(frames), -1).mean(1))
        values = {"MAE": np.abs(errors).mean(), "RMSE": np.sqrt((errors**2).mean()), "median": np.median(of_frames)}
        for measure, value in values.items():
            rows.append(Row(TUNED_NAME, "fine-tuned", f"force {measure}, meV/Å", name, strategy, n, seed, float(value)))
    return rows


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
        f"`python benchmarks/selection.py {arguments.data.name} {Path(arguments.potential).name}`",
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
    change = "" if strategy == "random" else f" ({point.change:+.0f} ± {point.change_error:.0f})"
    return f"{point.mean:.3g}{change}"


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


def read_csv(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with open(path, newline="", encoding="utf-8") as file:
        return [
            Row(**(entry | {"n": int(entry["n"]), "seed": int(entry["seed"]), "value": float(entry["value"])}))
            for entry in csv.DictReader(file)
        ]


def write_csv(path: Path, rows: Sequence[Row] | Sequence[Point]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(rows[0])])
        for row in rows:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in astuple(row)])


if __name__ == "__main__":
    main()
