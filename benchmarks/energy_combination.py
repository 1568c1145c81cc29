"""Whether several methods together say more of errors of energies than the Bayesian last layer alone.

    python benchmarks/energy_combination.py [SET ...] [--data ../shared/data] [--models ../shared/models ...]
                                            [--frames 40] [--out benchmarks/results/energy_combination]

What `fit` makes of `bll`, `kernel` and `pdrum` (a residual network of the energy) is judged beside `bll` alone: the
calibrated log σ² of `bll` is corrected as `combined` does it for forces, with a row for each structure
(`ase_uq.fitting.energy_combination`). Nothing is chosen by the splits that are reported. Writes OUT.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase.io import read
from far_field import fitted, streams
from far_field_energies import Frames, frames_in
from quality import SETS, frames_of, spec_of
from scipy.stats import spearmanr

from ase_uq import load_backend
from ase_uq.calibration import Calibrator, Residuals, fit_calibrator, fit_far_field
from ase_uq.calibration.energy_shift import energy_shift
from ase_uq.fitting.energy_combination import fit_energy_combination
from ase_uq.uncertainty_model.energy_combination import EnergyFeatures

ANCHOR, OTHERS = "bll", ("kernel", "pdrum")


@dataclass(frozen=True)
class Cell:
    """A split, by the anchor and by the combination: NLL, mean z² and Spearman correlation."""

    split: str
    weights: str
    anchor: tuple[float, float, float]
    combined: tuple[float, float, float]


@dataclass(frozen=True)
class Observed:
    """Frames of each split by method, and log u∞ of each method that measures a distance."""

    splits: Mapping[str, Mapping[str, Frames]]
    far: Mapping[str, np.ndarray]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=40, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/energy_combination"))
    arguments = parser.parse_args()
    cells: dict[str, list[Cell]] = {}
    for name in arguments.sets or SETS:
        try:
            cells[name] = judged(observe(name, arguments))
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(cells, arguments.frames))
    print(text)


def observe(name: str, arguments: argparse.Namespace) -> Observed:
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    for path in sorted((arguments.data / data.folder).glob("ood*_energyonly.xyz")):
        frames[path.stem] = read(path, ":")
    backend = load_backend(spec_of(data.potential, arguments.models))
    heads, nothing = fitted(backend, [ANCHOR, *OTHERS], frames.pop("train"), name)
    splits = {}
    for split, batches in streams(backend, frames, arguments.frames, name).items():
        evaluated = list(batches)
        splits[split] = {method: frames_in(head, nothing.far_field, evaluated) for method, head in heads.items()}
    return Observed(splits, {method: scores["energy"] for method, scores in nothing.scores.items()})


def judged(observed: Observed) -> list[Cell]:
    """Every split but that of the calibration frames."""
    known = observed.splits["calib"]
    calibration = known[ANCHOR]
    shift = energy_shift(calibration.residuals, calibration.numbers, calibration.n_atoms)
    residuals = calibration.without(shift) * (1.0 if shift is None else shift.inflation)
    calibrators = {method: calibrated(known[method], residuals, observed.far.get(method)) for method in known}

    def features(split: Mapping[str, Frames]) -> EnergyFeatures:
        scores = {method: torch.from_numpy(frames.scores) for method, frames in split.items()}
        return EnergyFeatures.of(ANCHOR, calibrators, scores, torch.from_numpy(split[ANCHOR].limits))

    combination = fit_energy_combination(features(known), residuals)
    told = ", ".join(f"{weight:.2f} {method}" for method, weight in combination.weights.items()) or "none"
    cells = []
    for split, of_methods in observed.splits.items():
        left = of_methods[ANCHOR].without(shift)
        if split == "calib" or not np.isfinite(left).any():
            continue
        base, added = (here := features(of_methods)).base.numpy(), combination(here).numpy()
        cells.append(Cell(split, told, worth(left, base), worth(left, base + added)))
    return cells


def calibrated(frames: Frames, residuals: np.ndarray, far: np.ndarray | None) -> Calibrator:
    rows = Residuals(frames.scores, residuals**2, 1, np.arange(len(residuals)), frames.limits)
    found = None if far is None else fit_far_field(rows, far)
    return found or fit_calibrator(rows).calibrator


def worth(residuals: np.ndarray, log_variance: np.ndarray) -> tuple[float, float, float]:
    labelled = np.isfinite(residuals)
    squares, logs = residuals[labelled] ** 2, log_variance[labelled]
    ratios = squares * np.exp(-logs)
    rank = float(spearmanr(squares, logs)[0]) if len(np.unique(logs)) > 1 else 0.0
    return float(0.5 * np.mean(logs + ratios)), float(ratios.mean()), rank


def markdown(cells: Mapping[str, Sequence[Cell]], most: int) -> str:
    every = [cell for of_set in cells.values() for cell in of_set]
    gains = np.array([np.subtract(cell.combined, cell.anchor) for cell in every])
    lines = [
        "# Energies by several methods",
        "",
        f"`python benchmarks/energy_combination.py --frames {most}`: per structure, the calibrated σ² of `bll`, and "
        "the same corrected by `kernel` and `pdrum` as `combined` does for forces. NLL (without the constant ln 2π/2), "
        "mean z² and Spearman correlation of errors per atom, without the shift of the calibration frames.",
        "",
        f"Over {len(every)} cells the combination changes the NLL by {gains[:, 0].mean():+.3f} in the mean, by "
        f"{gains[:, 0].max():+.3f} at worst and {gains[:, 0].min():+.3f} at best, and the correlation by "
        f"{gains[:, 2].mean():+.3f} in the mean; in {int((np.abs(gains[:, 2]) > 0.05).sum())} cells by more than 0.05.",
        "",
        "| set | split | weights | NLL | combined | z² | combined | Spearman | combined |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    for name, of_set in cells.items():
        for cell in of_set:
            values = " | ".join(
                f"{value:.2f}" for pair in zip(cell.anchor, cell.combined, strict=True) for value in pair
            )
            lines.append(f"| {name} | {cell.split} | {cell.weights} | {values} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
