"""Whether energies need a far field, and where it ends: cells of energies per atom, before and after.

    python benchmarks/far_field_energies.py [SET ...] [--data ../shared/data] [--models ../shared/models ...]
                                            [--method bll] [--frames 30] [--out benchmarks/results/far_field_energies]

Three ways to calibrate the energy scores of one method:

    affine or power   the better of the two on left-out calibration frames, which says nothing of what is far away
    energies          the law of `ase_uq.calibration.far_field`; σ∞ is the root mean square change of the predicted
                      energy per atom, where training frames are rattled until the potential knows nothing
    forces            the same law; σ∞ is what the forces may be wrong by, times the length that atoms were moved by

Both ends are tried with factors. For every set, the end and factor whose mean NLL is the smallest on all other sets is
reported on this one. Splits without forces (`*_energyonly.xyz`) are judged as well. Writes OUT.md.
"""

import argparse
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from ase.io import read
from far_field import BATCH_ATOMS, fitted, streams
from quality import CALIBRATED, NEAR, SETS, frames_of, spec_of
from scipy.stats import spearmanr

from ase_uq import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import Calibrator, Residuals, fit_calibrator, fit_far_field
from ase_uq.calibration.energy_shift import EnergyShift, energy_shift
from ase_uq.fitting.know_nothing import parents_of
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.methods.base import Head
from ase_uq.stream.labelled import LabelledStream
from ase_uq.stream.passes import Pass, passes
from ase_uq.uncertainty_model.far_field import FarField


@dataclass(frozen=True)
class Choice:
    """One way to calibrate energies."""

    end: str = ""
    factor: float = 1.0

    def __str__(self) -> str:
        return f"{self.end} × {self.factor:g}" if self.end else "affine or power"


BEFORE = Choice()
CHOICES = [Choice(end, factor) for end in ("energies", "forces") for factor in (1.4, 1.0, 0.7, 0.5, 0.35)]
DEFAULT = Choice("forces")


@dataclass(frozen=True)
class Frames:
    """Frames of a split: energy scores, σ∞² of energies per atom by forces (eV²), residuals (eV per atom), elements."""

    scores: np.ndarray
    limits: np.ndarray
    residuals: np.ndarray
    numbers: np.ndarray
    n_atoms: np.ndarray

    def without(self, shift: EnergyShift | None) -> np.ndarray:
        """Residuals without the shift of the calibration frames."""
        return self.residuals if shift is None else shift.taken_out(self.residuals, self.numbers, self.n_atoms)


@dataclass(frozen=True)
class Observed:
    """All that is read of a set: splits, log u∞ of the energy scores, and σ∞² by energies of rattled frames, eV²."""

    splits: Mapping[str, Frames]
    far: np.ndarray
    rattled: float

    @property
    def shift(self) -> EnergyShift | None:
        calibration = self.splits["calib"]
        return energy_shift(calibration.residuals, calibration.numbers, calibration.n_atoms)

    def limits(self, frames: Frames, choice: Choice) -> np.ndarray:
        end = np.full(len(frames.limits), self.rattled) if choice.end == "energies" else frames.limits
        return choice.factor**2 * end

    def calibrated(self, choice: Choice) -> Calibrator:
        frames, shift = self.splits["calib"], self.shift
        residuals = frames.without(shift) * (1.0 if shift is None else shift.inflation)
        groups, limits = np.arange(len(residuals)), self.limits(frames, choice)
        rows = Residuals(frames.scores, residuals**2, 1, groups, limits)
        calibrator = fit_far_field(rows, self.far) if choice.end else fit_calibrator(rows).calibrator
        assert calibrator is not None
        return calibrator


@dataclass(frozen=True)
class Cell:
    """A split under one choice."""

    split: str
    rmse: float
    above_constant: float
    z2: float
    spearman: float

    @property
    def out_of_distribution(self) -> bool:
        return self.split.startswith("ood")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--method", default="bll")
    parser.add_argument("--frames", type=int, default=30, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/far_field_energies"))
    arguments = parser.parse_args()
    cells: dict[str, dict[Choice, list[Cell]]] = {}
    for name in arguments.sets or SETS:
        try:
            observed = observe(name, arguments)
        except (FileNotFoundError, ValueError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
            continue
        cells[name] = {choice: judged(observed, choice) for choice in (BEFORE, *CHOICES)}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(cells, arguments))
    print(text)


def observe(name: str, arguments: argparse.Namespace) -> Observed:
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    for path in sorted((arguments.data / data.folder).glob("ood*_energyonly.xyz")):
        frames[path.stem] = read(path, ":")
    backend = load_backend(spec_of(data.potential, arguments.models))
    heads, nothing = fitted(backend, [arguments.method], train := frames.pop("train"), name)
    head = heads[arguments.method]
    splits = {
        split: frames_in(head, nothing.far_field, batches)
        for split, batches in streams(backend, frames, arguments.frames, name).items()
    }
    parents = parents_of(train, backend.cutoff)
    rattled = energies(backend, [parent.rattled(nothing.far_field.fraction) for parent in parents])
    change = rattled - energies(backend, [parent.atoms for parent in parents])
    return Observed(splits, nothing.scores[arguments.method]["energy"], float(np.mean(change**2)))


def frames_in(head: Head, far_field: FarField, batches: LabelledStream) -> Frames:
    parts = []
    for forward_pass, targets in batches:
        assert targets.energy is not None
        with torch.no_grad():
            scores = head(forward_pass).energy
        counts = forward_pass.n_atoms_of_frame
        limit = far_field.energy_variance(far_field.variance(forward_pass), forward_pass)
        residuals = (targets.energy - forward_pass.energy.double()) / counts
        parts.append([scores, limit, residuals, forward_pass.numbers, counts])
    return Frames(*(torch.cat(column).detach().cpu().numpy() for column in zip(*parts, strict=True)))


def energies(backend: Backend, frames: Sequence[Atoms]) -> np.ndarray:
    """(n_frames,) predicted energies per atom, eV."""

    def per_atom(forward_pass: ForwardPass) -> torch.Tensor:
        return (forward_pass.energy.double() / forward_pass.n_atoms_of_frame).detach().cpu()

    events = passes(backend, Source(list(frames)), per_atom, batch_atoms=BATCH_ATOMS)
    return torch.cat([event.value for event in events if isinstance(event, Pass)]).numpy()


def judged(observed: Observed, choice: Choice) -> list[Cell]:
    """All splits but the calibration frames."""
    calibrator, shift, cells = observed.calibrated(choice), observed.shift, []
    for split, frames in observed.splits.items():
        if split == "calib":
            continue
        limits = torch.from_numpy(observed.limits(frames, choice))
        variance = calibrator.variance(torch.from_numpy(frames.scores), limits).numpy()
        squares = frames.without(shift) ** 2
        nll = 0.5 * np.mean(np.log(variance) + squares / variance)
        constant = 0.5 * (np.log(squares.mean()) + 1)
        differs = len(np.unique(variance)) > 1
        rank = float(spearmanr(squares, variance)[0]) if differs else float("nan")
        z2 = float((squares / variance).mean())
        cells.append(Cell(split, float(np.sqrt(squares.mean())), float(nll - constant), z2, rank))
    return cells


def markdown(cells: Mapping[str, Mapping[Choice, Sequence[Cell]]], arguments: argparse.Namespace) -> str:
    lines = [
        "# The far field of energies",
        "",
        f"`python benchmarks/far_field_energies.py --method {arguments.method} --frames {arguments.frames}`: energies "
        "per atom without the shift of the calibration frames. In a cell NLL above the best constant told the truth, "
        f"mean z² and Spearman of frames. The default is {DEFAULT}; `picked` is the end and factor with the smallest "
        "mean NLL on the other sets.",
        "",
        "| set | split | RMSE, meV per atom | affine or power | far field (default) | picked | with it |",
        "|---|---|---:|---|---|---|---|",
    ]
    rows: dict[str, list[Cell]] = {"picked on the other sets": []}
    for name, by_choice in cells.items():
        others = [other for other in cells if other != name]
        picked = (
            min(CHOICES, key=lambda choice: excess([cells[other][choice] for other in others])) if others else DEFAULT
        )
        for before, default, cell in zip(by_choice[BEFORE], by_choice[DEFAULT], by_choice[picked], strict=True):
            rows["picked on the other sets"].append(cell)
            texts = f"{text_of(before)} | {text_of(default)} | {picked} | {text_of(cell)}"
            lines.append(f"| {name} | {cell.split} | {1e3 * cell.rmse:.2f} | {texts} |")
    for choice in (BEFORE, *CHOICES):
        title = f"{choice}{' (default)' if choice == DEFAULT else ''}"
        rows[title] = [cell for by_choice in cells.values() for cell in by_choice[choice]]
    lines += [
        "",
        f"| calibrated by | cells out of distribution | z² in {CALIBRATED[0]:g} to {CALIBRATED[1]:g} | z² in 0.33 to 3 "
        f"| within {NEAR:g} of the truthful constant | mean NLL above it | largest | in distribution |",
        "|---|" + "---:|" * 7,
    ]
    return "\n".join(lines + [summary(title, among) for title, among in rows.items()]) + "\n"


def excess(by_set: Sequence[Sequence[Cell]]) -> float:
    """Mean NLL above the truthful constant, of cells out of distribution."""
    return float(np.mean([cell.above_constant for cells in by_set for cell in cells if cell.out_of_distribution]))


def summary(title: str, cells: Sequence[Cell]) -> str:
    far = [cell for cell in cells if cell.out_of_distribution]
    near = [cell.above_constant for cell in cells if not cell.out_of_distribution]
    calibrated = sum(CALIBRATED[0] <= cell.z2 <= CALIBRATED[1] for cell in far)
    nearly = sum(0.33 <= cell.z2 <= 3 for cell in far)
    above = np.array([cell.above_constant for cell in far])
    counts = f"{len(far)} | {calibrated} | {nearly} | {int((above <= NEAR).sum())}"
    return f"| {title} | {counts} | {above.mean():+.2f} | {above.max():+.2f} | {np.mean(near):+.2f} |"


def text_of(cell: Cell) -> str:
    return f"{cell.above_constant:+.2f}, {cell.z2:.2f}, {cell.spearman:.2f}"


if __name__ == "__main__":
    main()
