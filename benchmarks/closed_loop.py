"""Whether the closed loop learns, and whether it matters which frames are labelled: the example, repeated.

    python benchmarks/closed_loop.py FOLDER [--seeds 3] [--out benchmarks/results/closed_loop]

Runs `examples/06_active_learning.py` with frames chosen by LCMD and at random, once with each seed, into
FOLDER/seed_N; what FOLDER has already is kept, so that an interrupted benchmark goes on where it was.

The example heats other runs in every round, a few each. So the first potential and the last ones also heat runs of the
same starts and random numbers, of which they learn nothing: when would the uncertainty have halted each, and when was
the first true error of that size? Writes OUT.csv (a line a round), OUT_reach.csv (a line a run), OUT.md and OUT.png.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "2")  # nine atoms: more threads would wait for each other

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import CalculationFailed
from ase.io import read
from ase.md.langevin import Langevin
from matplotlib import pyplot as plt
from tblite.ase import TBLite
from tqdm import tqdm

from ase_uq import UncertainCalculator, embedded
from ase_uq.errors import InputError
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.thresholds.reduction import atom_norms

EXAMPLE = Path(__file__).resolve().parents[1] / "examples" / "06_active_learning.py"
STRATEGIES = {"lcmd": (), "random": ("--random",)}
COLOURS = {"lcmd": "#0072B2", "random": "#D55E00"}
# Column: title, decimals.
COLUMNS = {
    "fs": ("MD got to (fs)", 0),
    "halted": ("runs halted", 1),
    "right_until": ("error below 0.4 eV/Å until (fs)", 0),
    "at_end": ("largest error at the end (eV/Å)", 2),
    "median_300": ("300 K: median frame (meV/Å)", 0),
    "rmse_300": ("RMSE", 0),
    "median_900": ("900 K: median frame (meV/Å)", 0),
    "rmse_900": ("RMSE", 0),
    "z2_900": ("z²", 2),
}
# The heating of the example, on runs of other seeds than its own.
COLD, HOT, STEPS, TIMESTEP, HALT = 300, 2000, 1000, 0.5, 0.4  # K, K, -, fs, eV/Å
CHECK = 10  # steps between true errors
FIRST_SEED = 1000
Row = dict[str, Any]


def run(folder: Path, seeds: int) -> list[Row]:
    """A row for each strategy, seed and round; what is there already is not run again."""
    rows = []
    for seed in range(seeds):
        for strategy, switch in STRATEGIES.items():
            out = folder / f"seed_{seed}"
            file = out / f"{strategy}.json"
            if not file.exists():
                subprocess.run([sys.executable, EXAMPLE, *switch, f"--seed={seed}", f"--out={out}"], check=True)
            rows += [
                {"strategy": strategy, "seed": seed, "round": number} | flat(found)
                for number, found in enumerate(json.loads(file.read_text()))
            ]
    return rows


def flat(found: dict) -> Row:
    """The numbers of one round, means over its MD runs."""
    row = {name: found[name] for name in ("labels", "halted")}
    row |= {name: float(np.mean(found[name])) for name in ("fs", "kelvin", "right_until", "at_end")}
    for kelvin, scores in found["tests"].items():
        row |= {f"{name}_{kelvin}": value for name, value in scores.items()}
    return row


def reaches(folder: Path, seeds: int, n_runs: int) -> list[Row]:
    """A row for each run of the first potential and of the last of each strategy and seed."""
    last = [
        (strategy, seed, max(folder.glob(f"seed_{seed}/{strategy}_[0-9].model")))
        for seed in range(seeds)
        for strategy in STRATEGIES
    ]
    cases = [("nothing", 0, folder / "seed_0" / "lcmd_0.model"), *last]
    file = folder / "reach.json"
    done = {tuple(key): row for key, row in json.loads(file.read_text())} if file.exists() else {}
    for strategy, seed, model in tqdm(cases, desc="potentials on the same runs"):
        calculator = UncertainCalculator(f"mace:{model}", model.with_suffix(".uq.safetensors"))
        for number in range(n_runs):
            if (strategy, seed, number) not in done:
                done[strategy, seed, number] = reach(calculator, FIRST_SEED + number)
                file.write_text(json.dumps(list(done.items())))
    return [
        {"strategy": strategy, "seed": seed, "run": number} | done[strategy, seed, number]
        for strategy, seed, _ in cases
        for number in range(n_runs)
    ]


def reach(calculator: UncertainCalculator, seed: int) -> Row:
    """When the uncertainty of a heated run first reaches HALT, and when its true error does; at the latest its end."""
    rng = np.random.default_rng(seed)
    start = read(embedded.path("malonaldehyde.xyz"))
    atoms = Atoms(start.numbers, start.positions, calculator=calculator)
    set_thermal_momenta(atoms, COLD, rng)
    dyn = Langevin(atoms, TIMESTEP * units.fs, temperature_K=COLD, friction=0.02 / units.fs, fixcm=False, rng=rng)
    end = STEPS * TIMESTEP
    found = {"fs": end, "right_until": end}
    reference = TBLite(method="GFN2-xTB", verbosity=0)
    for step in range(STEPS + 1):
        if step and atom_norms(calculator.results["forces_uncertainty"]).max() >= HALT:
            found["fs"] = min(found["fs"], step * TIMESTEP)
        if step % CHECK == 0 and true_error(atoms, reference) >= HALT:
            found["right_until"] = min(found["right_until"], step * TIMESTEP)
        if max(found.values()) < end:
            break
        dyn.set_temperature(temperature_K=COLD + (HOT - COLD) * step / STEPS)
        try:
            dyn.run(1)
        except InputError:  # it flew apart
            return {name: min(value, step * TIMESTEP) for name, value in found.items()}
    return found


def true_error(atoms: Atoms, reference: TBLite) -> float:
    """Largest error of a force, eV/Å; infinite where the reference does not converge, on broken molecules."""
    copy = Atoms(atoms.numbers, atoms.positions, calculator=reference)
    try:
        return float(atom_norms(atoms.get_forces() - copy.get_forces()).max())
    except CalculationFailed:
        return np.inf


def reach_table(rows: Sequence[Row]) -> str:
    """Means over runs and seeds; what labels changed, run by run, with standard errors over runs."""
    before = {row["run"]: row for row in rows if row["strategy"] == "nothing"}
    lines = [
        "| labels chosen by | halted at (fs) | change (fs) | true error below 0.4 eV/Å until (fs) | change (fs) |",
        "|---|---:|---:|---:|---:|",
    ]
    for strategy in ("nothing", *STRATEGIES):
        cells = []
        for column in ("fs", "right_until"):
            of_run = {
                run: np.mean([row[column] for row in rows if row["strategy"] == strategy and row["run"] == run])
                for run in before
            }
            change = np.array([of_run[run] - before[run][column] for run in before])
            error = change.std(ddof=1) / np.sqrt(len(change))
            cells += [f"{np.mean(list(of_run.values())):.0f}"]
            cells += ["" if strategy == "nothing" else f"{change.mean():+.0f} ± {error:.0f}"]
        lines.append(f"| {strategy} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def written(rows: Sequence[Row], path: Path) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows({name: f"{v:.4g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows)


def over_seeds(rows: Sequence[Row], strategy: str, column: str) -> tuple[list[int], np.ndarray, np.ndarray]:
    """Labels, mean and standard deviation over seeds in every round that all seeds got to."""
    own = [row for row in rows if row["strategy"] == strategy]
    seeds = {row["seed"] for row in own}
    rounds = dict.fromkeys(row["round"] for row in own)
    of_round = [[row for row in own if row["round"] == number] for number in rounds]
    whole = [found for found in of_round if len(found) == len(seeds)]
    values = np.array([[row[column] for row in found] for found in whole])
    spread = values.std(axis=1, ddof=1) if len(seeds) > 1 else np.full(len(values), np.nan)
    return [round(np.mean([row["labels"] for row in found])) for found in whole], values.mean(axis=1), spread


def table(rows: Sequence[Row]) -> str:
    lines = [
        "| labels | chosen by | " + " | ".join(title for title, _ in COLUMNS.values()) + " |",
        "|" + "---|" * (len(COLUMNS) + 2),
    ]
    cells = {(strategy, column): over_seeds(rows, strategy, column) for strategy in STRATEGIES for column in COLUMNS}
    for number in range(max(len(labels) for labels, _, _ in cells.values())):
        for strategy in STRATEGIES:
            labels = cells[strategy, "fs"][0]
            if number >= len(labels):
                continue
            texts = []
            for column, (_, digits) in COLUMNS.items():
                _, mean, spread = cells[strategy, column]
                texts.append(f"{mean[number]:.{digits}f}")
                if np.isfinite(spread[number]):
                    texts[-1] += f" ± {spread[number]:.{digits}f}"
            lines.append(f"| {labels[number]} | {strategy} | " + " | ".join(texts) + " |")
    return "\n".join(lines) + "\n"


def picture(rows: Sequence[Row], file: Path) -> None:
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), layout="constrained")
    titles = (
        "MD until the halt (fs)",
        "true errors below 0.4 eV/Å until (fs)",
        "force RMSE, median test frame (meV/Å)",
    )
    panels = ({"fs": "-"}, {"right_until": "-"}, {"median_900": "-", "median_300": ":"})
    for ax, title, columns in zip(axes, titles, panels, strict=True):
        for strategy, colour in COLOURS.items():
            for column, line in columns.items():
                labels, mean, spread = over_seeds(rows, strategy, column)
                name = strategy if len(columns) == 1 else f"{strategy}, {column.split('_')[1]} K"
                ax.errorbar(labels, mean, spread, fmt=f"o{line}", color=colour, capsize=3, label=name)
        ax.set(xlabel="labels", ylabel=title, ylim=(0, None))
        ax.legend(frameon=False)
    figure.savefig(file, dpi=150)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="for everything the runs write; what is there is kept")
    parser.add_argument("--seeds", type=int, default=3, help="how often each strategy runs")
    parser.add_argument("--runs", type=int, default=12, help="fresh ones, on which potentials are compared")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/closed_loop"), help="results, no suffix")
    options = parser.parse_args(arguments)
    rows = run(options.folder, options.seeds)
    written(rows, options.out.with_suffix(".csv"))
    picture(rows, options.out.with_suffix(".png"))
    of_runs = reaches(options.folder, options.seeds, options.runs)
    written(of_runs, options.out.with_name(options.out.name + "_reach.csv"))
    text = (
        f"# The closed loop\n\n`python benchmarks/closed_loop.py FOLDER --seeds {options.seeds} --runs {options.runs}`"
        f"\n\nMeans over {options.seeds} seeds, ± standard deviations:\n\n{table(rows)}\n"
        f"The first potential and the last ones, of {options.seeds} seeds, on {options.runs} fresh runs of the same "
        f"starts and noise; changes run by run, ± standard errors over runs:\n\n{reach_table(of_runs)}"
    )
    options.out.with_suffix(".md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
