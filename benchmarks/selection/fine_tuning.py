"""The learner that matters: the embedded MACE, trained on."""

import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import write
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric import Batch as Batches
from mace.tools.torch_geometric.dataloader import DataLoader
from mace.tools.torch_tools import default_dtype
from tqdm import tqdm

from ase_uq import Predictor, UncertaintyModel, embedded, load_backend, read_frames, select
from benchmarks.selection.regressions import Remembered
from benchmarks.selection.rows import SHARE, STRATEGIES, Row, read_csv, write_csv

# Of the fine-tuning. Its recipe was picked by errors on the test frames; docs/selection.md says of how many.
TUNED_NAME = "malonaldehyde, half new"
TUNED = ("random", "lcmd", "maxdist", "top")
TUNED_SIZES = (25, 100)
TUNED_SEEDS = 3
TUNED_POOL = 400  # of 600 frames, another part for each seed
N_NEW, N_OLD = 2, 6  # frames a batch: of fewer old ones the potential forgets what it knew
STEPS, RATE, DECAY, ENERGY_WEIGHT = 300, 1e-2, 0.99, 3.0  # Å in the weight of an energy an atom


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
    sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "potentials"))
    from label import sample  # not part of the package; tblite is only wanted here

    frames = []
    for seed, kelvin in enumerate((300, 900), 10):
        path = folder / f"pool_{kelvin}K.xyz"
        if not path.exists():
            write(path, sample(path.stem, kelvin, n_runs=6, n_frames=50, seed=seed))
        frames += read_frames(path)
    return frames


def fine_tuned(new: Sequence[Atoms], old: Sequence[Atoms], seed: int) -> torch.nn.Module:
    """The embedded MACE, trained on with new and old frames."""
    model = load_backend("embedded:mace", device="cpu", dtype="float32").calculator.models[0]
    return trained_on(model, [(new, N_NEW), (old, N_OLD)], seed, STEPS)


def trained_on(
    model: torch.nn.Module, mixture: Sequence[tuple[Sequence[Atoms], int]], seed: int, steps: int
) -> torch.nn.Module:
    """The model itself, trained on with Adam on the norms of force errors and on energies.

    Norms and not their squares, which hot frames would rule. The rate rises and falls to zero, and an average over
    the last steps is what is returned.

    Args:
        model: Changed in place.
        mixture: Frames, and how many of them are in each batch.
        seed: Of the batches.
        steps: Number of batches.
    """
    parameters = [parameter.requires_grad_(True) for parameter in model.parameters()]
    average = [parameter.detach().clone() for parameter in parameters]
    sources = [(mace_data(model, frames), count) for frames, count in mixture]
    rng = np.random.default_rng(seed)
    optimizer = torch.optim.Adam(parameters, lr=RATE, amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.05)
    for _ in range(steps):
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
        ends = np.cumsum([len(atoms) for atoms in frames])[:-1]
        of_frames = np.sqrt([(part**2).mean() for part in np.split(errors, ends)])
        values = {"MAE": np.abs(errors).mean(), "RMSE": np.sqrt((errors**2).mean()), "median": np.median(of_frames)}
        for measure, value in values.items():
            rows.append(Row(TUNED_NAME, "fine-tuned", f"force {measure}, meV/Å", name, strategy, n, seed, float(value)))
    return rows
