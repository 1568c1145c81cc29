"""Whether kernels between structures gain by higher cumulants of their atoms' features: to rank errors, to see drift.

    python benchmarks/structure_kernels.py [SET ...] [--data ../shared/data] [--models ../shared/models ...]
                                           [--frames 40] [--out benchmarks/results/structure_kernels]

A score of a structure is the posterior variance of a Gaussian process, given the training frames, at

    largest, mean     its atoms, by a kernel of atoms: the largest of them (what monitors watch), and their mean
    order n           the cumulants of its features over its atoms, up to order n (`numerics.cumulants`); order 1 is the
                      mean feature alone

with the kernels of the method `kernel`: rbf, by its default noise and length, and linear. It is judged by

    energies          Spearman's correlation with the error of the energy per atom, less the shift of calibration frames
    forces            Spearman's correlation with the largest force error of the frame
    drift             the share of frames of a kind that nothing was fitted on whose score is above 95 % of those of the
                      calibration frames: as many frames pass before the first alarm as one by this share

For every set, *picked* is the score with the largest mean on all other sets. Writes OUT.md.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from energy_ranks import evenly, rank
from far_field import stream
from quality import SETS, frames_of, known_to, spec_of

from ase_uq import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration.energy_shift import energy_shift
from ase_uq.methods.kernel import Kernel
from ase_uq.numerics.cumulants import HIGHEST, cumulants

DEFAULT = ("acac", "si", "ge", "malonaldehyde, MACE", "malonaldehyde, orb conservative", "malonaldehyde, orb direct")
SCORES = ("largest", "mean", *(f"order {n}" for n in range(1, HIGHEST + 1)))
KERNELS = ("rbf", "linear")
JUDGED = ("energies", "forces", "drift")
MOST_TRAINING_FRAMES, MOST_ROWS = 150, 600  # rows that the kernel of atoms is given
FALSE_ALARMS = 0.05
Ranks = dict[tuple[str, str, str], dict[str, float]]  # (kernel, what it is judged by, split): by score


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; by default {', '.join(DEFAULT)}")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=40, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/structure_kernels"))
    arguments = parser.parse_args()
    found: dict[str, Ranks] = {}
    for name in arguments.sets or DEFAULT:
        try:
            found[name] = ranks_of(name, arguments)
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    arguments.out.with_suffix(".md").write_text(text := markdown(found, arguments.frames))
    print(text)


@dataclass(frozen=True)
class Seen:
    """Frames, evaluated.

    Args:
        atoms: (n_atoms, d) features.
        frame: (n_atoms,) frame of each.
        counts: (n_frames,) atoms of each frame.
        numbers: (n_atoms,) atomic numbers.
        residuals: (n_frames,) missing energy per atom, eV.
        force_errors: (n_frames,) largest of a frame, eV/Å.
    """

    atoms: torch.Tensor
    frame: torch.Tensor
    counts: torch.Tensor
    numbers: torch.Tensor
    residuals: torch.Tensor
    force_errors: torch.Tensor

    def of_order(self, order: int) -> torch.Tensor:
        return cumulants(self.atoms, self.frame, self.counts, order)


def seen(backend: Backend, frames: Sequence, title: str) -> Seen:
    parts: list[tuple[torch.Tensor, ...]] = []
    n_frames = 0
    for found, targets in stream(backend, frames, title):
        assert targets.energy is not None
        assert targets.forces is not None
        assert found.forces is not None
        counts = found.n_atoms_of_frame
        errors = (targets.forces - found.forces.double()).norm(dim=1)
        largest = errors.new_zeros(len(counts)).scatter_reduce(0, found.frame_of_atom, errors, "amax")
        residuals = (targets.energy - found.energy.double()) / counts
        parts.append(
            (found.features.double(), found.frame_of_atom + n_frames, counts, found.numbers, residuals, largest)
        )
        n_frames += len(counts)
    return Seen(*(torch.cat(column).detach().cpu() for column in zip(*parts, strict=True)))


class Process:
    """Posterior variance of a Gaussian process, given rows: all of them, unlike the method, which takes landmarks."""

    def __init__(self, rows: torch.Tensor, kernel: str) -> None:
        self.kernel, self.centre = kernel, rows.mean(0)
        self.unit = float(torch.nn.functional.pdist(rows).median()) * Kernel.length
        if kernel == "linear":
            self.unit = float((rows - self.centre).square().sum(1).mean().sqrt())
        self.rows = (rows - self.centre) / self.unit
        gram = self.of(self.rows, self.rows)
        self.factor = torch.linalg.cholesky(gram + Kernel.noise * torch.eye(len(rows), dtype=rows.dtype))

    def of(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        return left @ right.T if self.kernel == "linear" else torch.exp(-torch.cdist(left, right).square() / 2)

    def variance(self, rows: torch.Tensor) -> torch.Tensor:
        rows = (rows - self.centre) / self.unit
        explained = torch.linalg.solve_triangular(self.factor, self.of(self.rows, rows), upper=False).square().sum(0)
        return (rows.square().sum(1) if self.kernel == "linear" else 1.0) - explained


def ranks_of(name: str, arguments: argparse.Namespace) -> Ranks:
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    backend = load_backend(spec_of(data.potential, arguments.models))
    train = seen(backend, evenly(frames.pop("train"), MOST_TRAINING_FRAMES), name)
    calibration = seen(backend, evenly(frames.pop("calib"), 2 * arguments.frames), name)
    splits = {
        split: seen(backend, usable, name)
        for split, labelled in frames.items()
        if (usable := evenly(known_to(backend, labelled), arguments.frames))
    }
    residuals, numbers, counts = (x.numpy() for x in (calibration.residuals, calibration.numbers, calibration.counts))
    shift = energy_shift(residuals, numbers, counts)
    ranks: Ranks = {}
    some = torch.from_numpy(np.random.default_rng(0).permutation(len(train.atoms))[:MOST_ROWS])
    for kernel in KERNELS:
        of_atoms = Process(train.atoms[some], kernel)
        of_order = {n: Process(train.of_order(n), kernel) for n in range(1, HIGHEST + 1)}

        def scores(
            of: Seen, of_atoms: Process = of_atoms, of_order: Mapping[int, Process] = of_order
        ) -> dict[str, np.ndarray]:
            atoms = of_atoms.variance(of.atoms)
            start = atoms.new_zeros(len(of.counts))
            largest = start.scatter_reduce(0, of.frame, atoms, "amax", include_self=False)
            mean = start.scatter_reduce(0, of.frame, atoms, "mean", include_self=False)
            orders = [process.variance(of.of_order(n)) for n, process in of_order.items()]
            return dict(zip(SCORES, (x.numpy() for x in (largest, mean, *orders)), strict=True))

        limits = {score: np.quantile(values, 1 - FALSE_ALARMS) for score, values in scores(calibration).items()}
        for split, of in splits.items():
            residuals, numbers, counts = (x.numpy() for x in (of.residuals, of.numbers, of.counts))
            errors = np.abs(residuals if shift is None else shift.taken_out(residuals, numbers, counts))
            found = scores(of)
            ranks[kernel, "energies", split] = {score: rank(errors, values) for score, values in found.items()}
            ranks[kernel, "forces", split] = {
                score: rank(of.force_errors.numpy(), values) for score, values in found.items()
            }
            ranks[kernel, "drift", split] = {s: float(np.mean(values > limits[s])) for s, values in found.items()}
    return ranks


def markdown(found: Mapping[str, Ranks], most: int) -> str:
    lines = [
        "# Kernels between structures, by cumulants of their atoms' features",
        "",
        f"`python benchmarks/structure_kernels.py --frames {most}`. In distribution, *drift* is the share of false "
        "alarms.",
    ]
    titles = {
        "energies": "Spearman's correlation with errors of energies",
        "forces": "Spearman's correlation with the largest force errors",
        "drift": "Drift: share of frames above 95 % of the calibration frames",
    }
    for kernel in KERNELS:
        for judged in JUDGED:
            lines += ["", f"## {titles[judged]}, {kernel} kernel", ""]
            lines += [f"| set | split | {' | '.join(SCORES)} | picked | with it |"]
            lines += ["|---|---|" + "---:|" * len(SCORES) + "---|---:|"]
            kinds: dict[bool, list[tuple[dict[str, float], float]]] = {False: [], True: []}
            for name, ranks in found.items():
                cells = {split: cell for (k, j, split), cell in ranks.items() if (k, j) == (kernel, judged)}
                others = [
                    cell
                    for other, others_ranks in found.items()
                    if other != name
                    for (k, j, split), cell in others_ranks.items()
                    if (k, j) == (kernel, judged) and split.startswith("ood")
                ]
                picked = max(
                    SCORES, key=lambda score: np.mean([cell[score] for cell in others or [dict.fromkeys(SCORES, 0.0)]])
                )
                for split, cell in cells.items():
                    kinds[split.startswith("ood")].append((cell, cell[picked]))
                    values = " | ".join(f"{cell[score]:.2f}" for score in SCORES)
                    lines.append(f"| {name} | {split} | {values} | {picked} | {cell[picked]:.2f} |")
            for outside, title in ((False, "in distribution"), (True, "out of distribution")):
                cells_of = kinds[outside]
                values = " | ".join(f"{np.mean([cell[score] for cell, _ in cells_of]):.2f}" for score in SCORES)
                with_it = np.mean([value for _, value in cells_of])
                lines.append(f"| mean | {title} ({len(cells_of)}) | {values} | | {with_it:.2f} |")
                if outside:
                    lines.append(f"| gain on `largest` | {title} | {gains(cells_of)} | | |")
    return "\n".join(lines) + "\n"


def gains(cells: Sequence[tuple[dict[str, float], float]]) -> str:
    """Mean difference from what monitors watch, ± its standard error over splits."""
    found = []
    for score in SCORES:
        apart = np.array([cell[score] - cell["largest"] for cell, _ in cells])
        found.append(f"{apart.mean():+.2f} ± {apart.std(ddof=1) / len(apart) ** 0.5:.2f}")
    return " | ".join(found)


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the potentials' packages
        main()
