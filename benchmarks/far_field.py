"""How σ must grow on the way to where a potential knows nothing: choices made by leaving one set out, and the picture.

    python benchmarks/far_field.py [SET ...] [--data ../shared/data] [--models ../shared/models ...] [--frames 60]
                                   [--out benchmarks/results/far_field]

The law of `ase_uq.calibration.far_field` has three choices: how much training frames are rattled, and the centre and
width of the prior of τ. For every set, the choice that does best on all other sets is reported on this one: the largest
number of cells (splits out of distribution) with mean z² within 0.5 to 2, and of equals the smallest mean NLL. Scores
are those of the Bayesian last layer alone. Writes OUT.md, and OUT.png: errors against the way, with both ends.
"""

import argparse
import itertools
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from matplotlib import pyplot as plt
from quality import CALIBRATED, NEAR, SETS, frames_of, known_to, spec_of
from scipy.stats import spearmanr

from ase_uq import load_backend
from ase_uq.backends.base import Backend
from ase_uq.calibration import FarFieldCalibrator, Residuals, fit_far_field
from ase_uq.calibration.far_field import SlopePrior
from ase_uq.communicator import Serial
from ase_uq.fitting.know_nothing import FRACTIONS, KnowNothing, ShortestDistances, know_nothing, parents_of
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.methods import make_method
from ase_uq.methods.base import Head
from ase_uq.stream.labelled import LabelledStream
from ase_uq.stream.passes import Pass, passes
from ase_uq.uncertainty_model.far_field import FarField

BATCH_ATOMS = 150
RULE = 0.0  # stands for the fraction that the rule finds


@dataclass(frozen=True)
class Choice:
    """One way to fit the law."""

    fraction: float
    centre: float
    width: float

    def __str__(self) -> str:
        return f"{'rule' if self.fraction == RULE else f'{self.fraction:g}'}, τ {self.centre:g} ± {self.width:g}"


CHOICES = [
    Choice(*values) for values in itertools.product((RULE, 0.08, 0.10, 0.12, 0.15), (0.8, 0.9, 1.0), (0.05, 0.2))
]
DEFAULT = Choice(RULE, SlopePrior().centre, SlopePrior().width)


@dataclass(frozen=True)
class Rows:
    """Atoms of a split: raw scores, σ∞², residuals, frame and element of each."""

    scores: np.ndarray
    limits: np.ndarray
    residuals: np.ndarray
    frame: np.ndarray
    numbers: np.ndarray

    def calibration(self) -> Residuals:
        squares = self.residuals**2
        if self.scores.shape[1] == 1:
            return Residuals(self.scores[:, 0], squares.sum(1), 3, self.frame, self.limits, self.numbers)
        flat = self.scores.reshape(-1, self.scores.shape[2])
        others = (np.repeat(values, 3) for values in (self.frame, self.limits, self.numbers))
        return Residuals(flat, squares.reshape(-1), 1, *others)


@dataclass(frozen=True)
class Observed:
    """All that the law reads of a set: splits, and log u∞ by the fraction that training frames are rattled by."""

    splits: Mapping[str, Rows]
    far: Mapping[float, np.ndarray]
    rule: float

    def fitted(self, choice: Choice) -> FarFieldCalibrator:
        prior = SlopePrior(choice.centre, choice.width)
        calibrator = fit_far_field(self.splits["calib"].calibration(), self.far[choice.fraction], prior)
        assert calibrator is not None
        return calibrator


@dataclass(frozen=True)
class Cell:
    """A split under one choice."""

    split: str
    above_constant: float
    z2: float
    spearman: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=60, help="most frames of a split, evenly spread over it")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/far_field"))
    arguments = parser.parse_args()
    observed: dict[str, Observed] = {}
    for name in arguments.sets or SETS:
        try:
            observed[name] = observe(name, arguments)
        except (FileNotFoundError, ValueError) as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    cells = {name: {choice: judged(of_set, choice) for choice in CHOICES} for name, of_set in observed.items()}
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(observed, cells, arguments))
    draw(observed).savefig(arguments.out.with_suffix(".png"), dpi=150)
    print(text)


def observe(name: str, arguments: argparse.Namespace) -> Observed:
    data = SETS[name]
    frames = frames_of(data.folder, arguments.data)
    backend = load_backend(spec_of(data.potential, arguments.models))
    heads, nothing = fitted(backend, ["bll"], train := frames.pop("train"), name)
    head = heads["bll"]
    splits = {
        split: rows_of(head, nothing.far_field, batches)
        for split, batches in streams(backend, frames, arguments.frames, name).items()
    }
    parents = parents_of(train, backend.cutoff)
    far = {RULE: nothing.scores["bll"]["forces"]}
    for fraction in FRACTIONS:
        rattled = [parent.rattled(fraction) for parent in parents]
        far[fraction] = np.median(log_scores(backend, head, rattled), 0)
    return Observed(splits, far, nothing.far_field.fraction)


def fitted(
    backend: Backend, methods: Sequence[str], train: Sequence[Atoms], title: str
) -> tuple[dict[str, Head], KnowNothing]:
    """Methods fitted on training frames, and what they say of them when they are rattled."""
    accumulators, shortest = {method: make_method(method).start() for method in methods}, ShortestDistances()
    for forward_pass, targets in stream(backend, train, f"{title}: train"):
        for accumulator in accumulators.values():
            accumulator.add(forward_pass, targets)
        shortest.add(forward_pass)
    heads = {method: accumulator.finish(Serial()) for method, accumulator in accumulators.items()}
    elements = sorted({int(z) for atoms in train for z in atoms.numbers})
    nothing = know_nothing(backend, heads, train, shortest.finish(elements, Serial()), batch_atoms=BATCH_ATOMS)
    assert nothing is not None
    return heads, nothing


def streams(
    backend: Backend, frames: Mapping[str, Sequence[Atoms]], most: int, title: str
) -> dict[str, LabelledStream]:
    """The frames of each split that the potential knows; of all but the calibration frames at most so many."""
    found = {}
    for split, atoms in frames.items():
        usable = known_to(backend, atoms)
        if split != "calib":
            usable = usable[:: max(1, -(-len(usable) // most))]
        if usable:
            found[split] = stream(backend, usable, f"{title}: {split}")
    return found


def stream(backend: Backend, frames: Sequence[Atoms], title: str) -> LabelledStream:
    return LabelledStream(backend, frames, Serial(), batch_atoms=BATCH_ATOMS, forces=True, title=title)


def rows_of(head: Head, far_field: FarField, batches: LabelledStream) -> Rows:
    parts = []
    for forward_pass, targets in batches:
        assert forward_pass.forces is not None
        assert targets.forces is not None
        with torch.no_grad():
            scores = head(forward_pass).forces
        residuals = targets.forces - forward_pass.forces.double()
        frame = targets.frames[forward_pass.frame_of_atom]
        parts.append([scores, far_field.variance(forward_pass), residuals, frame, forward_pass.numbers])
    return Rows(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))


def log_scores(backend: Backend, head: Head, frames: list[Atoms]) -> np.ndarray:
    def scores(forward_pass: ForwardPass) -> torch.Tensor:
        with torch.no_grad():
            return head(forward_pass).forces.flatten(0, 1).cpu()

    events = passes(backend, Source(frames), scores, batch_atoms=BATCH_ATOMS)
    found = [event.value for event in events if isinstance(event, Pass)]
    return torch.cat(found).clamp(min=1e-12).log().numpy()


def variance_of(calibrator: FarFieldCalibrator, rows: Rows) -> np.ndarray:
    """(n_atoms, 3) (eV/Å)²."""
    limits, numbers = torch.from_numpy(rows.limits)[:, None], torch.from_numpy(rows.numbers)[:, None]
    variance = calibrator.variance(torch.from_numpy(rows.scores), limits, numbers).numpy()
    return np.broadcast_to(variance, rows.residuals.shape)


def judged(observed: Observed, choice: Choice) -> list[Cell]:
    """The splits out of distribution."""
    calibrator, cells = observed.fitted(choice), []
    for split, rows in observed.splits.items():
        if not split.startswith("ood"):
            continue
        variance, squares = variance_of(calibrator, rows), rows.residuals**2
        nll = 0.5 * np.mean(np.log(variance) + squares / variance)
        constant = 0.5 * (np.log(squares.mean()) + 1)
        rank = spearmanr(squares.sum(1), variance.sum(1))[0]
        cells.append(Cell(split, float(nll - constant), float((squares / variance).mean()), float(rank)))
    return cells


def worth(cells: Sequence[Cell]) -> tuple[int, float]:
    """What choices are compared by; larger is better."""
    return count(cells)[0], -float(np.mean([cell.above_constant for cell in cells]))


def count(cells: Sequence[Cell]) -> tuple[int, int, int]:
    """Cells within 0.5 to 2, within 0.33 to 3, and near the truthful constant."""
    return (
        sum(CALIBRATED[0] <= cell.z2 <= CALIBRATED[1] for cell in cells),
        sum(0.33 <= cell.z2 <= 3 for cell in cells),
        sum(cell.above_constant <= NEAR for cell in cells),
    )


def markdown(
    observed: Mapping[str, Observed],
    cells: Mapping[str, Mapping[Choice, Sequence[Cell]]],
    arguments: argparse.Namespace,
) -> str:
    lines = [
        "# The far field: choices by leaving one set out",
        "",
        f"`python benchmarks/far_field.py --frames {arguments.frames}`. Choices: the fraction that training frames are "
        "rattled by (`rule`: where the median predicted force stops growing), and the prior of τ. For each set, the "
        "choice that is best on the others; in a cell NLL above the best constant told the truth, mean z² and Spearman "
        f"of atoms, of the Bayesian last layer alone. The default is {DEFAULT}.",
        "",
        "| set | rule's fraction | split | default | choice by the other sets | with it |",
        "|---|---:|---|---|---|---|",
    ]
    left_out: list[Cell] = []
    for name, by_choice in cells.items():
        others = [other for other in cells if other != name]
        chosen = (
            max(CHOICES, key=lambda choice: worth([cell for other in others for cell in cells[other][choice]] or []))
            if others
            else DEFAULT
        )
        for default, cell in zip(by_choice[DEFAULT], by_choice[chosen], strict=True):
            left_out.append(cell)
            lines.append(
                f"| {name} | {observed[name].rule:g} | {cell.split} | {text_of(default)} | {chosen} | {text_of(cell)} |"
            )
    lines += ["", "| choice | cells | z² in 0.5 to 2 | z² in 0.33 to 3 | within 0.3 of the truthful constant |"]
    lines.append("|---|---:|---:|---:|---:|")
    rows: dict[str, Sequence[Cell]] = {"picked on the other sets": left_out}
    for choice in CHOICES:
        rows[f"{choice}{' (default)' if choice == DEFAULT else ''}"] = [
            cell for by_choice in cells.values() for cell in by_choice[choice]
        ]
    lines += [f"| {title} | {len(among)} | {' | '.join(map(str, count(among)))} |" for title, among in rows.items()]
    return "\n".join(lines) + "\n"


def text_of(cell: Cell) -> str:
    return f"{cell.above_constant:+.2f}, {cell.z2:.2f}, {cell.spearman:.2f}"


def draw(observed: Mapping[str, Observed]) -> plt.Figure:
    """Errors of atoms against the way, with the medians of σ and both ends; one panel a set."""
    columns = min(3, len(observed))
    n_rows = -(-len(observed) // columns)
    figure, axes = plt.subplots(
        n_rows, columns, figsize=(4.4 * columns, 3.4 * n_rows), layout="constrained", squeeze=False
    )
    colours = {"calib": "#8C8C8C", "test": "#0072B2", "ood": "#D55E00"}
    for ax, (name, of_set) in zip(axes.flat, observed.items(), strict=False):
        calibrator = of_set.fitted(DEFAULT)
        ways, sigmas = [], []
        for split, rows in sorted(of_set.splits.items(), key=lambda item: item[0] != "calib"):
            way = raw_way(calibrator, rows)
            sigma = np.sqrt(variance_of(calibrator, rows).mean(1))
            error = np.sqrt((rows.residuals**2).mean(1))
            ways.append(way)
            sigmas.append(sigma)
            kind = split.split("_")[0]
            shown = np.random.default_rng(0).permutation(len(way))[:1500]
            ax.plot(way[shown], error[shown], ".", ms=1.5, alpha=0.35, color=colours[kind], rasterized=True)
        way, sigma = np.concatenate(ways), np.concatenate(sigmas)
        edges = np.linspace(way.min(), way.max(), 25)
        place = np.digitize(way, edges)
        full = [k for k in range(1, len(edges)) if (place == k).sum() > 3]
        centres = [float(np.median(way[place == k])) for k in full]
        ax.plot(centres, [float(np.median(sigma[place == k])) for k in full], "-", color="black", lw=1.8)
        far = float(np.exp(calibrator.limit / 2))
        for x, y, text, side in (
            (0.0, np.exp(calibrator.constant / 2), "known", "left"),
            (1.0, far, "nothing known", "right"),
        ):
            ax.axvline(x, color="#B0B0B0", lw=0.8, zorder=0)
            ax.plot([x], [y], "o", ms=7, mfc="white", mec="black", mew=1.5)
            shift = (6, -14) if side == "left" else (-6, 8)
            ax.annotate(text, (x, y), textcoords="offset points", xytext=shift, ha=side, fontsize=8)
        positive = np.concatenate([np.sqrt((rows.residuals**2).mean(1)) for rows in of_set.splits.values()])
        ax.set(yscale="log", title=name, ylim=(max(1e-4, np.quantile(positive, 0.01)), 3 * max(positive.max(), far)))
        ax.set(xlabel="way t (log u)", ylabel="force error, σ (eV/Å)")
    for ax in axes.flat[len(observed) :]:
        ax.set_axis_off()
    handles = [plt.Line2D([], [], marker="o", ls="", color=c, label=k) for k, c in colours.items()]
    handles.append(plt.Line2D([], [], color="black", label="median σ"))
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9)
    return figure


def raw_way(calibrator: FarFieldCalibrator, rows: Rows) -> np.ndarray:
    """(n_atoms,) t without its limit of 1, of the mean over components."""
    logs = np.log(np.maximum(rows.scores, calibrator.floors))
    return ((logs - calibrator.near) @ np.array(calibrator.slopes)).mean(1)


if __name__ == "__main__":
    main()
