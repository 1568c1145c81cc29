"""What the uncertainties of atomic energies are worth: their mean over a structure against its error per atom.

    python benchmarks/far_field_atoms.py [SET ...] [--data ../shared/data] [--models ../shared/models ...]
                                         [--methods bll kernel] [--frames 30]
                                         [--out benchmarks/results/far_field_atoms]

Atoms have no reference energies. What can be asked of their uncertainties is that they are on the scale of those of
structures: if errors of atoms had the same sign, mean_i σ_i would be the uncertainty of the energy per atom.

    affine      σ² = a + b·u of the first score of energies, as before: for `bll` that of a posterior
    far field   the law of `ase_uq.calibration.far_field`; the score is the distance of the atom, and σ∞ what its force
                may be wrong by, times the length that atoms were moved by

Writes OUT.md.
"""

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from far_field import fitted, streams
from far_field_energies import Cell, text_of
from quality import SETS, frames_of, spec_of
from scipy.stats import spearmanr

from ase_uq import load_backend
from ase_uq.calibration import Calibrator, Residuals, fit_affine, fit_far_field
from ase_uq.calibration.energy_shift import EnergyShift, energy_shift
from ase_uq.methods.base import Head
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.far_field import FarField

DEFAULT = ("malonaldehyde, MACE", "acac", "si", "ge")


@dataclass(frozen=True)
class Frames:
    """Frames of a split.

    Args:
        residuals: (n_frames,) errors of the energy per atom, eV.
        limits: (n_frames,) σ∞² of the energy per atom, eV².
        first: (n_frames,) first score of the energy.
        n_atoms: (n_frames,) number of atoms.
        numbers: (n_atoms,) elements.
        scores: (n_atoms,) scores of the energies of atoms.
        distances: (n_atoms,) distances of atoms.
        limits_of_atoms: (n_atoms,) σ∞² of the energies of atoms, eV².
    """

    residuals: np.ndarray
    limits: np.ndarray
    first: np.ndarray
    n_atoms: np.ndarray
    numbers: np.ndarray
    scores: np.ndarray
    distances: np.ndarray
    limits_of_atoms: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """(n_atoms,) → (n_frames,)"""
        return np.bincount(np.repeat(np.arange(len(self.n_atoms)), self.n_atoms), values) / self.n_atoms

    def without(self, shift: EnergyShift | None) -> np.ndarray:
        return self.residuals if shift is None else shift.taken_out(self.residuals, self.numbers, self.n_atoms)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; by default {', '.join(DEFAULT)}")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--methods", nargs="+", default=["bll", "kernel"])
    parser.add_argument("--frames", type=int, default=30, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/far_field_atoms"))
    arguments = parser.parse_args()
    rows: list[tuple[str, str, Cell, Cell]] = []
    for name in arguments.sets or DEFAULT:
        try:
            rows += [(name, *row) for row in rows_of(name, arguments)]
        except (FileNotFoundError, ValueError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(rows, arguments))
    print(text)


def rows_of(name: str, arguments: argparse.Namespace) -> Iterator[tuple[str, Cell, Cell]]:
    """Method, cell before and cell after of each split."""
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    backend = load_backend(spec_of(data.potential, arguments.models))
    heads, nothing = fitted(backend, arguments.methods, frames.pop("train"), name)
    splits = {
        split: frames_in(heads, nothing.far_field, batches)
        for split, batches in streams(backend, frames, arguments.frames, name).items()
    }
    for method in heads:
        calibration = splits["calib"][method]
        shift = energy_shift(calibration.residuals, calibration.numbers, calibration.n_atoms)
        affine, far_field = calibrated(calibration, shift, nothing.scores[method]["energies"])
        for split, by_method in splits.items():
            if split == "calib":
                continue
            of_split = by_method[method]
            before = affine.variance(torch.from_numpy(of_split.scores[:, None]))
            limits = torch.from_numpy(of_split.limits_of_atoms)
            after = far_field.variance(torch.from_numpy(of_split.distances[:, None]), limits)
            yield method, *(judged(split, of_split, shift, variance.numpy()) for variance in (before, after))


def frames_in(heads: Mapping[str, Head], far_field: FarField, batches: LabelledStream) -> dict[str, Frames]:
    parts: dict[str, list[list[torch.Tensor]]] = {name: [] for name in heads}
    for forward_pass, targets in batches:
        assert targets.energy is not None
        counts, limits = forward_pass.n_atoms_of_frame, far_field.limits(forward_pass)
        residuals = (targets.energy - forward_pass.energy.double()) / counts
        for name, head in heads.items():
            with torch.no_grad():
                raw = head(forward_pass)
            of_frames = [residuals, limits.energy, raw.energy[:, 0], counts]
            parts[name].append([*of_frames, forward_pass.numbers, raw.energies, raw.distance, limits.energies])
    return {
        name: Frames(*(torch.cat(column).detach().cpu().numpy() for column in zip(*of_head, strict=True)))
        for name, of_head in parts.items()
    }


def calibrated(frames: Frames, shift: EnergyShift | None, far: np.ndarray) -> tuple[Calibrator, Calibrator]:
    """As before, and with a far end."""
    squares = (frames.without(shift) * (1.0 if shift is None else shift.inflation)) ** 2
    groups = np.arange(len(squares))
    affine = fit_affine(Residuals(frames.first[:, None], squares, 1, groups))
    mean = frames.mean(frames.distances)[:, None]
    far_field = fit_far_field(Residuals(mean, squares, 1, groups, frames.limits), far)
    assert far_field is not None
    return affine, far_field


def judged(split: str, frames: Frames, shift: EnergyShift | None, variance: np.ndarray) -> Cell:
    """The mean σ of the atoms of each frame as the uncertainty of its energy per atom."""
    of_frames, squares = frames.mean(np.sqrt(variance)) ** 2, frames.without(shift) ** 2
    nll = 0.5 * np.mean(np.log(of_frames) + squares / of_frames)
    constant = 0.5 * (np.log(squares.mean()) + 1)
    rank = float(spearmanr(squares, of_frames)[0])
    rmse = float(np.sqrt(squares.mean()))
    return Cell(split, rmse, float(nll - constant), float((squares / of_frames).mean()), rank)


def markdown(rows: Sequence[tuple[str, str, Cell, Cell]], arguments: argparse.Namespace) -> str:
    lines = [
        "# The far field of atomic energies",
        "",
        f"`python benchmarks/far_field_atoms.py --frames {arguments.frames}`: mean_i σ_i of a structure as the "
        "uncertainty of its energy per atom, without the shift of the calibration frames. In a cell NLL above the best "
        "constant told the truth, mean z² and Spearman of frames.",
        "",
        "| set | split | method | RMSE, meV per atom | affine (before) | far field (after) |",
        "|---|---|---|---:|---|---|",
    ]
    for name, method, before, after in rows:
        texts = f"{text_of(before)} | {text_of(after)}"
        lines.append(f"| {name} | {before.split} | {method} | {1e3 * before.rmse:.2f} | {texts} |")
    lines += ["", "| cells | calibrated by | number | z² in 0.33 to 3 | mean NLL above the truthful constant |"]
    lines.append("|---|---|---:|---:|---:|")
    for out in (False, True):
        for title, place in (("affine (before)", 2), ("far field (after)", 3)):
            cells = [
                cell for *_, before, after in rows if (cell := (before, after)[place - 2]).out_of_distribution == out
            ]
            if cells:
                near = sum(0.33 <= cell.z2 <= 3 for cell in cells)
                above = np.mean([cell.above_constant for cell in cells])
                where = "out of distribution" if out else "in distribution"
                lines.append(f"| {where} | {title} | {len(cells)} | {near} | {above:+.2f} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
