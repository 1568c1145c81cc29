# /// script
# requires-python = ">=3.12"
# dependencies = ["ase-uq[all]"]
# ///
"""The closed loop: heat until the potential no longer knows, label what it flagged, fine-tune, fit again, heat again.

    python examples/06_active_learning.py             three rounds, a few minutes
    python examples/06_active_learning.py --random    three rounds with frames chosen at random, to compare with
    python examples/06_active_learning.py --quick     one small round, to see that everything is installed

The folder --out (default: loop) receives the labelled frames, the potential and the uncertainty model of each round,
the numbers as JSON, and active_learning.png, which shows both ways of choosing once both were run. A single run of
either is an anecdote: benchmarks/closed_loop.py repeats them with several seeds.
"""

# %% What is known at first: a potential that has only seen 300 K, and its frames
import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "2")  # nine atoms: more threads would wait for each other

import numpy as np
import torch
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.md.langevin import Langevin
from mace.calculators import MACECalculator
from mace.data import AtomicData, KeySpecification, config_from_atoms
from mace.tools import AtomicNumberTable
from mace.tools.torch_geometric.dataloader import DataLoader
from mace.tools.torch_tools import default_dtype
from matplotlib import pyplot as plt
from tblite.ase import TBLite
from torch_ema import ExponentialMovingAverage

from ase_uq import (
    Predictor,
    UncertainCalculator,
    UncertaintyHalt,
    UncertaintyMonitor,
    embedded,
    fit,
    load_backend,
    metrics,
    read_frames,
    select,
    write_frames,
)
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.thresholds.reduction import atom_norms

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--random", action="store_true", help="choose flagged frames at random instead of by LCMD")
parser.add_argument("--quick", action="store_true", help="one round of a few steps")
parser.add_argument("--seed", type=int, default=0, help="seed of the MD, the training and the random choice")
parser.add_argument("--out", type=Path, default=Path("loop"), help="folder for everything that is made")
arguments = parser.parse_args()

QUICK = arguments.quick
STRATEGY = "random" if arguments.random else "lcmd"
ROUNDS, RUNS, STEPS = (1, 2, 50) if QUICK else (3, 4, 1000)
LABELS, SPARE = (6, 2) if QUICK else (30, 10)  # per round, to train on and to calibrate with
EPOCHS, OLD = (3, 16) if QUICK else (16, 120)  # old frames are trained on again, lest the potential forget them
FLAG, HALT = 0.15, 0.4  # eV/Å, the same in every round, so that rounds can be compared
COLD, HOT = (1200 if QUICK else 300), 2000  # K
TIMESTEP = 0.5  # fs
CHECK = 20  # steps between frames whose true error is computed; these are not counted as labels

start = read_frames(embedded.path("malonaldehyde.xyz"))[0]
old = read_frames(embedded.path("train_300K.xyz"))[:: 10 if QUICK else 1]
# Not all of them: they would outnumber the few frames that say how wrong the potential is when it is hot.
old_calibration = read_frames(embedded.path("calibration_300K.xyz"))[:: 16 if QUICK else 4]
tests = {kelvin: read_frames(embedded.path(f"test_{kelvin}K.xyz"))[:: 10 if QUICK else 2] for kelvin in (300, 900)}
out = arguments.out
out.mkdir(parents=True, exist_ok=True)
reference = TBLite(method="GFN2-xTB", verbosity=0)
began = time.perf_counter()


# %% The four steps of a round
@dataclass(frozen=True)
class Run:
    fs: float
    halted: bool
    frames: list[Atoms]  # one every CHECK steps, and the last one
    flagged: list[Atoms]  # including the frame that halted the run

    @property
    def kelvin(self):
        return kelvin_at(self.fs / TIMESTEP)


def heat(calculator, round_number):
    """Several runs of MD, each heated until the uncertainty halts it."""
    runs = []
    for run in range(RUNS):
        flagged = out / f"flagged_{STRATEGY}_{round_number}_{run}.xyz"
        flagged.unlink(missing_ok=True)
        rng = np.random.default_rng([arguments.seed, round_number, run])
        atoms = Atoms(start.numbers, start.positions, calculator=calculator)
        set_thermal_momenta(atoms, COLD, rng)
        dyn = Langevin(atoms, TIMESTEP * units.fs, temperature_K=COLD, friction=0.02 / units.fs, fixcm=False, rng=rng)
        frames = []
        dyn.attach(lambda dyn=dyn: dyn.set_temperature(temperature_K=kelvin_at(dyn.nsteps)))
        dyn.attach(keep, CHECK, dyn, frames)
        dyn.attach(UncertaintyMonitor(dyn, flag=FLAG, halt=HALT, frames=flagged))
        halted = False
        try:
            dyn.run(STEPS)
        except UncertaintyHalt:
            halted = True
        keep(dyn, frames)
        runs.append(Run(dyn.nsteps * TIMESTEP, halted, frames, read_frames(flagged) if flagged.exists() else []))
    return runs


def keep(dyn, frames):
    frames.append(dyn.atoms.copy())
    frames[-1].info["fs"] = dyn.nsteps * TIMESTEP


def kelvin_at(step):
    return COLD + (HOT - COLD) * step / STEPS


def label(frames):
    """Copies of the frames with energies and forces of the reference; any ASE calculator will do."""
    labelled = []
    for frame in frames:
        atoms = frame.copy()
        atoms.calc = reference
        try:
            # Of fixed atoms too: their forces are 0 only to those who move them.
            energy, forces = atoms.get_potential_energy(), atoms.get_forces(apply_constraint=False)
        except CalculationFailed:
            continue  # the self-consistency cycle does not converge for every broken molecule
        atoms.calc = None
        atoms.info["REF_energy"] = energy
        atoms.set_array("REF_forces", forces)
        labelled.append(atoms)
    return labelled


def fine_tune(model, frames, seed):
    """Continues the training of the MACE in place, on energies and forces: Adam, falling rate, averaged weights."""
    dtype = next(model.parameters()).dtype
    keys = KeySpecification(info_keys={"energy": "REF_energy"}, arrays_keys={"forces": "REF_forces"})
    table = AtomicNumberTable([int(z) for z in model.atomic_numbers])
    with default_dtype(dtype):
        data = [
            AtomicData.from_config(config_from_atoms(atoms, keys), z_table=table, cutoff=float(model.r_max))
            for atoms in frames
        ]
    torch.manual_seed(seed)
    loader = DataLoader(data, batch_size=5, shuffle=True)
    model.requires_grad_(True)
    optimizer = torch.optim.Adam(model.parameters(), amsgrad=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=0.01, total_steps=EPOCHS * len(loader), pct_start=0.05, cycle_momentum=False
    )
    average = ExponentialMovingAverage(model.parameters(), decay=0.99)
    for _ in range(EPOCHS):
        for batch in loader:
            predicted = model(batch.to_dict(), training=True)
            counts = batch.ptr[1:] - batch.ptr[:-1]
            energy_error = (predicted["energy"] - batch.energy) / counts
            loss = (predicted["forces"] - batch.forces).square().mean() + 10 * energy_error.square().mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 10)
            optimizer.step()
            schedule.step()
            average.update()
    average.copy_to()
    model.requires_grad_(False)


def refit(model, train, calibration):
    """The backend of the potential as it is now, and its uncertainty model."""
    backend = load_backend(MACECalculator(models=[model], device="cpu", default_dtype="float64"))
    return backend, fit(backend, train, calibration, methods=["bll"], progress=False)


def truth(predictor, run):
    """How long the largest true force error stayed below HALT (fs), and its value at the end (eV/Å)."""
    errors = []
    for frame, prediction in zip(run.frames, predictor.predict(run.frames), strict=True):
        labelled = label([frame])
        true = labelled[0].arrays["REF_forces"] if labelled else np.inf  # no label: the molecule is broken
        errors.append(atom_norms(true - prediction["forces"]).max())
    wrong = [atoms.info["fs"] for atoms, error in zip(run.frames, errors, strict=True) if error >= HALT]
    return min(wrong, default=run.fs), errors[-1]


def judge(predictor, frames):
    """Force errors in meV/Å (over all frames, and of the median frame) and mean z² of labelled frames."""
    predictions = predictor.predict(frames)
    true = np.stack([atoms.arrays["REF_forces"] for atoms in frames])
    forces, std = (np.stack([p[key] for p in predictions]) for key in ("forces", "forces_uncertainty"))
    of_frames = np.sqrt(np.square(true - forces).mean((1, 2)))
    return {
        "rmse": 1000 * metrics.rmse(true, forces),
        "median": 1000 * float(np.median(of_frames)),
        "z2": metrics.mean_squared_z(true, forces, std),
    }


# %% The loop: the last potential is heated and judged too, but not trained any more
rng = np.random.default_rng(arguments.seed)
model = load_backend("embedded:mace", device="cpu").calculator.models[0]
new, new_calibration, rows = [], [], []
print(f"{RUNS} runs heated from {COLD} to {HOT} K in {STEPS * TIMESTEP:.0f} fs, flag {FLAG} and halt {HALT} eV/Å")
print(f"right until: the largest true error of a force stayed below {HALT} eV/Å; chosen by {STRATEGY}\n")
print("              MD, means of runs                largest true     test frames: RMSE, median (meV/Å), z²")
print("round labels  got to         halted right until error at the end  300 K               900 K" + 19 * " " + "time")
for number in range(ROUNDS + 1):
    train, calibration = old + new, old_calibration + new_calibration
    backend, uncertainty = refit(model, train, calibration)
    predictor = Predictor(backend, uncertainty)
    runs = heat(UncertainCalculator(backend, uncertainty), number)
    right_until, at_end = zip(*(truth(predictor, run) for run in runs), strict=True)
    row = {
        "labels": len(new) + len(new_calibration),
        "fs": [run.fs for run in runs],
        "kelvin": [run.kelvin for run in runs],
        "halted": sum(run.halted for run in runs),
        "right_until": right_until,
        "at_end": at_end,
        "tests": {kelvin: judge(predictor, frames) for kelvin, frames in tests.items()},
        "seconds": time.perf_counter() - began,
    }
    rows.append(row)
    print(
        f"{number:5d}{row['labels']:7d}{np.mean(row['fs']):6.0f} fs{np.mean(row['kelvin']):6.0f} K"
        f"{row['halted']:5d}/{RUNS}{np.mean(right_until):10.0f} fs{np.mean(at_end):12.2f} eV/Å"
        + "".join(f"{t['rmse']:7.0f}{t['median']:6.0f}{t['z2']:7.2f}" for t in row["tests"].values())
        + f"{row['seconds']:7.0f} s",
        flush=True,
    )
    torch.save(model, out / f"{STRATEGY}_{number}.model")
    uncertainty.save(out / f"{STRATEGY}_{number}.uq.safetensors")
    if number == ROUNDS:
        break
    # Calibration frames are drawn at random from a separate run: frames of one run are half a femtosecond apart, frames
    # that the potential was trained on cannot tell how wrong it is, and chosen frames are worse than ordinary ones.
    pool, spare = [atoms for run in runs[:-1] for atoms in run.flagged], runs[-1].flagged
    if len(pool) < LABELS:
        print(f"      only {len(pool)} frames were flagged: these runs have too little left to teach")
        break
    options = {"calculator": predictor, "train": train, "seed": arguments.seed, "progress": False}
    new += label(select(pool, LABELS, strategy=STRATEGY, **options).frames(pool))
    new_calibration += label([spare[i] for i in rng.permutation(len(spare))[:SPARE]])
    write_frames(out / f"labelled_{STRATEGY}_{number}.xyz", new + new_calibration)
    fine_tune(model, new + [old[i] for i in rng.choice(len(old), OLD, replace=False)], arguments.seed)

# %% The picture, which includes the other way of choosing if its results are in the same folder
(out / f"{STRATEGY}.json").write_text(json.dumps(rows))
figure, (left, middle, right) = plt.subplots(1, 3, figsize=(11, 3.2), layout="constrained")
for strategy, colour in (("lcmd", "C0"), ("random", "C1")):
    file = out / f"{strategy}.json"
    if not file.exists():
        continue
    finished = json.loads(file.read_text())
    labels = [row["labels"] for row in finished]
    left.plot(labels, [np.mean(row["fs"]) for row in finished], "o-", color=colour, label=strategy)
    for row in finished:
        left.plot([row["labels"]] * len(row["fs"]), row["fs"], ".", color=colour, alpha=0.4)
    middle.plot(labels, [np.mean(row["right_until"]) for row in finished], "o-", color=colour, label=strategy)
    for kelvin, line in (("900", "o-"), ("300", "o:")):
        medians = [row["tests"][kelvin]["median"] for row in finished]
        right.plot(labels, medians, line, color=colour, label=f"{strategy}, {kelvin} K")
left.axhline(STEPS * TIMESTEP, color="grey", lw=0.8)
left.set(ylabel="MD until the halt (fs)")
middle.set(ylabel=f"true errors below {HALT} eV/Å until (fs)")
right.set(ylabel="force RMSE, median test frame (meV/Å)")
for ax in (left, middle, right):
    ax.set(xlabel="labels", ylim=(0, None))
    ax.legend()
figure.savefig(out / "active_learning.png", dpi=150)
print(f"\n{out / 'active_learning.png'}; the last potential: mace:{out / f'{STRATEGY}_{number}.model'}")
