"""What ranks errors of energies: scores of structures, alone and together, chosen by leaving one set out.

    python benchmarks/energy_ranks.py [SET ...] [--data ../shared/data] [--models ../shared/models ...] [--frames 40]
                                      [--out benchmarks/results/energy_ranks]

Every score is one number a structure, from methods that were fitted on the training frames:

    σ_E               calibrated: `bll` with its far field
    structure, mean   leverage of the energy's last layer for the whole structure, and the mean leverage of its atoms
    kernel            mean distance of the atoms
    E-norm, E-diff    residual networks of the energy (`pdrum`, and its variant that learns the signed error)
    forces            mean calibrated variance of the force components, of `combined`
    κ1, κ2            first and second cumulant of the features over the atoms: mean square deviation from the training
                      frames, in units of their spread there

and sums of logarithms of these. Errors are per atom, without the shift of the calibration frames. For every set, the
score with the largest mean Spearman correlation on all other sets is reported on this one. Writes OUT.md.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from far_field import stream
from quality import SETS, frames_of, known_to, spec_of
from scipy.stats import spearmanr

from ase_uq import UQWarning, fit, load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration.energy_shift import energy_shift
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods.pdrum import PDRUM
from ase_uq.uncertainty_model.model import UncertaintyModel

SCORES = ("σ_E", "structure", "mean", "kernel", "E-norm", "E-diff", "forces", "κ1", "κ2")
SUMS = (("structure", "E-norm"), ("structure", "κ1"), ("structure", "forces"), ("structure", "E-norm", "κ1"))
MOST_TRAINING_FRAMES = 200
TINY = 1e-300


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=40, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/energy_ranks"))
    arguments = parser.parse_args()
    ranks: dict[str, dict[str, dict[str, float]]] = {}
    for name in arguments.sets or SETS:
        try:
            ranks[name] = ranks_of(name, arguments)
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(ranks, arguments.frames))
    print(text)


def ranks_of(name: str, arguments: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Spearman correlation with the error of the energy per atom, by split and score."""
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    for path in sorted((arguments.data / data.folder).glob("ood*_energyonly.xyz")):
        frames[path.stem] = read(path, ":")  # pyright: ignore[reportArgumentType]
    backend = load_backend(spec_of(data.potential, arguments.models))
    train, calibration = frames.pop("train"), frames.pop("calib")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # that a method says nothing is what the table is for
        model = fit(backend, train, calibration, methods=("bll", "pdrum", "kernel"))
        diff = fit(backend, train, calibration, methods=(PDRUM("diff"),))
    scored = Scored(backend, model, diff, evenly(train, MOST_TRAINING_FRAMES), name)
    residuals, _, numbers, counts = scored.of(calibration)
    shift = energy_shift(residuals, numbers, counts)
    ranks = {}
    for split, labelled in frames.items():
        if not (usable := evenly(known_to(backend, labelled), arguments.frames)):
            continue
        residuals, scores, numbers, counts = scored.of(usable)
        errors = np.abs(residuals if shift is None else shift.taken_out(residuals, numbers, counts))
        ranks[split] = {score: rank(errors, values) for score, values in scores.items()}
    return ranks


def evenly(frames: Sequence[Atoms], most: int) -> list[Atoms]:
    return list(frames[:: max(1, -(-len(frames) // most))])


def rank(errors: np.ndarray, scores: np.ndarray) -> float:
    return float(spearmanr(errors, scores)[0]) if len(np.unique(scores)) > 1 else 0.0


class Scored:
    """Residuals and scores of frames.

    Args:
        backend: The potential.
        model: With `bll`, `pdrum` and `kernel`.
        diff: With the signed variant of `pdrum`.
        train: Frames whose cumulants are the known ones.
        name: Of the set, for the progress bars.
    """

    def __init__(
        self, backend: Backend, model: UncertaintyModel, diff: UncertaintyModel, train: Sequence[Atoms], name: str
    ) -> None:
        self.backend, self.model, self.diff, self.name = backend, model, diff, name
        known = [cumulants(forward_pass) for forward_pass, _ in stream(backend, train, name)]
        of_order = [torch.cat(values) for values in zip(*known, strict=True)]
        self.known = [(x.mean(0), x.std(0).clamp(min=1e-6 * float(x.abs().max().clamp(min=1e-12)))) for x in of_order]

    def of(self, frames: Sequence[Atoms]) -> tuple[np.ndarray, dict[str, np.ndarray], np.ndarray, np.ndarray]:
        """Residuals per atom (eV), scores, atomic numbers and numbers of atoms."""
        residuals, numbers, counts, scores = [], [], [], []
        for forward_pass, targets in stream(self.backend, frames, self.name):
            assert targets.energy is not None
            n_atoms = forward_pass.n_atoms_of_frame
            residuals.append((targets.energy - forward_pass.energy.double()) / n_atoms)
            numbers.append(forward_pass.numbers)
            counts.append(n_atoms)
            scores.append(self.scores(forward_pass))
        table = {key: torch.cat([of_batch[key] for of_batch in scores]).cpu().numpy() for key in SCORES}
        for parts in SUMS:
            table[" + ".join(parts)] = sum(np.log(np.maximum(table[part], TINY)) for part in parts)
        arrays = (torch.cat(parts).detach().cpu().numpy() for parts in (residuals, numbers, counts))
        residual, number, count = arrays
        return residual, table, number, count

    @torch.no_grad()
    def scores(self, forward_pass: ForwardPass) -> dict[str, torch.Tensor]:
        raws = {name: fitted.head(forward_pass) for name, fitted in self.model.methods.items()}
        results, counts = self.model.apply(forward_pass), forward_pass.n_atoms_of_frame
        variance = results["forces_uncertainty"].square().mean(1, keepdim=True)
        deviations = (
            (value - centre) / spread
            for value, (centre, spread) in zip(cumulants(forward_pass), self.known, strict=True)
        )
        first, second = (deviation.square().mean(1) for deviation in deviations)
        return {
            "σ_E": results["energy_uncertainty_bll"] / counts,
            "structure": raws["bll"].energy[:, 0],
            "mean": raws["bll"].energy[:, -1],
            "kernel": raws["kernel"].energy[:, 0],
            "E-norm": raws["pdrum"].energy[:, 0],
            "E-diff": self.diff.methods["pdrum"].head(forward_pass).energy[:, 0],
            "forces": forward_pass.sum_over_atoms(variance)[:, 0] / counts,
            "κ1": first,
            "κ2": second,
        }


def cumulants(forward_pass: ForwardPass) -> tuple[torch.Tensor, torch.Tensor]:
    """(n_frames, n_features) mean and variance of the features over the atoms of each structure."""
    features, counts = forward_pass.features.double(), forward_pass.n_atoms_of_frame.double()[:, None]
    mean = forward_pass.sum_over_atoms(features) / counts
    return mean, (forward_pass.sum_over_atoms(features.square()) / counts - mean.square()).clamp(min=0)


def markdown(ranks: Mapping[str, Mapping[str, Mapping[str, float]]], most: int) -> str:
    names = [*SCORES, *(" + ".join(parts) for parts in SUMS)]
    lines = [
        "# What ranks errors of energies",
        "",
        f"`python benchmarks/energy_ranks.py --frames {most}`: Spearman correlation of scores of structures with the "
        "error of the energy per atom, without the shift of the calibration frames. `picked` is the score with the "
        "largest mean on all other sets.",
        "",
        f"| set | split | {' | '.join(names)} | picked | with it |",
        "|---|---|" + "---:|" * len(names) + "---|---:|",
    ]
    picked_ranks: dict[str, float] = {}
    for name, of_set in ranks.items():
        others = [cell for other, cells in ranks.items() if other != name for cell in cells.values()]
        picked = max(names, key=lambda score: mean(others, score)) if others else names[0]
        for split, cell in of_set.items():
            picked_ranks[f"{name} {split}"] = cell[picked]
            values = " | ".join(f"{cell[score]:.2f}" for score in names)
            lines.append(f"| {name} | {split} | {values} | {picked} | {cell[picked]:.2f} |")
    for title, wanted in (("in distribution", False), ("out of distribution", True)):
        cells = [
            (cell, picked_ranks[f"{name} {split}"])
            for name, of_set in ranks.items()
            for split, cell in of_set.items()
            if split.startswith("ood") == wanted
        ]
        values = " | ".join(f"{mean([cell for cell, _ in cells], score):.2f}" for score in names)
        lines.append(f"| mean | {title} ({len(cells)}) | {values} | | {np.mean([rank for _, rank in cells]):.2f} |")
    return "\n".join(lines) + "\n"


def mean(cells: Sequence[Mapping[str, float]], score: str) -> float:
    return float(np.mean([cell[score] for cell in cells])) if cells else float("nan")


if __name__ == "__main__":
    main()
