"""How good uncertainties are on systems that nobody tuned them to: one table of cells, a set and a split each.

    python benchmarks/quality.py [SET ...] [--data ../shared/data] [--models ../shared/models ...] [--frames 100]
                                 [--methods bll pdrum kernel] [--predictions FOLDER] [--out benchmarks/results/quality]
                                 [--keep]

Every set has training, calibration, test and out-of-distribution frames with reference forces, and a potential that was
trained on the first. An uncertainty model is fitted on the training frames, calibrated on the calibration frames, and
judged on all others; where there are equals of the potential, a committee of them is calibrated and judged beside it.
Sets whose potential is in no folder of --models are named and left out: benchmarks/train_committee.py trains it.

Other estimators enter the same table: a method of a plugin by its name in --methods, and anything else by its numbers:
--predictions FOLDER has SET/SPLIT.xyz with the arrays `forces`, `forces_uncertainty` (n_atoms, 3) and `REF_forces`.
docs/benchmark.md says how.

The cell of an estimator has the negative log-likelihood of force components above that of the best constant told the
truth (the root mean square error of that split, which nobody knows beforehand), mean z², Spearman's correlation with
the force error, of atoms and of the largest of each frame, AUROC of frames with an error above 0.3 eV/Å, and CRPS.
Writes OUT.md, OUT.csv. With --keep a set takes the place of its own rows only, so that a table grows set by set.
"""

import argparse
import csv
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import get_type_hints

import numpy as np
from ase import Atoms
from ase.io import read
from quality_of_set import Committee, splits_of
from scipy.stats import spearmanr

from ase_uq import Predictor, UQWarning, fit, load_backend, metrics
from ase_uq.backends.base import Backend
from ase_uq.diagnostics.evaluate import evaluate
from ase_uq.diagnostics.samples import Sample, largest_of_frames

TOLERANCE = 0.3  # eV/Å
# (lowest, highest) mean z² of a calibrated cell, and the largest NLL above that of the truthful constant
CALIBRATED, NEAR = (0.5, 2.0), 0.3
EQUAL = 0.02  # nats, or of a correlation: estimators that differ by less are as good as each other


@dataclass(frozen=True)
class DataSet:
    """A set of frames with a potential.

    Args:
        folder: Of its frames, in --data; `embedded` are the package's own.
        potential: A file in --models, or a SPEC.
        committee: Pattern of the files of its equals, itself included; empty for none.
    """

    folder: str
    potential: str
    committee: str = ""


SETS = {
    "acac": DataSet("acac", "mace_acac.model"),
    "acac, 64 epochs": DataSet("acac", "mace_acac_committee_2.model", "mace_acac_committee_*.model"),
    "si": DataSet("si_mlearn", "mace_si.model"),
    "si, 60 epochs": DataSet("si_mlearn", "si_mlearn_2.model", "si_mlearn_*.model"),
    "ge": DataSet("ge_mlearn", "mace_ge.model", "mace_ge*.model"),
    "rmd17": DataSet("rmd17_crossmol", "rmd17_crossmol_1.model"),
    "MoNbTaW": DataSet("MoNbTaW", "MoNbTaW_1.model"),
    "mp_pbe": DataSet("mp_pbe", "sevennet:7net-0"),
    "malonaldehyde, MACE": DataSet("embedded", "embedded:mace"),
    "malonaldehyde, orb conservative": DataSet("embedded", "embedded:orb-conservative"),
    "malonaldehyde, orb direct": DataSet("embedded", "embedded:orb-direct"),
}
EMBEDDED = {
    "train": "train_300K",
    "calib": "calibration_300K",
    "test_300K": "test_300K",
    "ood_900K": "test_900K",
    "ood_perturbed": "perturbed",
}


@dataclass(frozen=True)
class Cell:
    """What one estimator is worth on one split."""

    set: str
    split: str
    estimator: str
    n_frames: int
    rmse: float
    above_constant: float
    z2: float
    spearman: float
    spearman_frames: float
    auroc: float
    crps: float

    @property
    def out_of_distribution(self) -> bool:
        return self.split.startswith("ood")

    @property
    def calibrated(self) -> bool:
        return CALIBRATED[0] <= self.z2 <= CALIBRATED[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=100, help="most frames of a split, evenly spread over it")
    parser.add_argument("--methods", nargs="+", default=["bll", "pdrum", "kernel"])
    parser.add_argument("--predictions", type=Path)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/quality"))
    parser.add_argument("--keep", action="store_true", help="rows of OUT.csv of other sets, of the same options, stay")
    parser.add_argument("--device", default="")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.sets if name not in SETS]:
        parser.error(f"there is no set {unknown[0]!r}. There are: {', '.join(SETS)}.")
    asked = arguments.sets or list(SETS)
    by_set = cells_in(arguments.out.with_suffix(".csv")) if arguments.keep else {}
    reasons = dict.fromkeys(SETS if arguments.keep else asked, "not run")
    for name in asked:
        try:
            by_set[name] = list(cells_of(name, SETS[name], arguments))
        except FileNotFoundError as error:
            reasons[name] = str(error)
            print(f"{name}: {error}", file=sys.stderr)
            continue
        for cell in by_set[name]:
            print(cell, flush=True)
        cells = [cell for of_set in SETS for cell in by_set.get(of_set, [])]
        left_out = [f"{of_set}: {reason}" for of_set, reason in reasons.items() if of_set not in by_set]
        write(arguments.out, cells, left_out, arguments)  # what an interrupted run has found stays
    print(arguments.out.with_suffix(".md").read_text())


def cells_of(name: str, data: DataSet, arguments: argparse.Namespace) -> Iterator[Cell]:
    """The cells of all estimators on all splits of one set.

    Raises:
        FileNotFoundError: The potential or the frames are not there.
    """
    splits = frames_of(data.folder, arguments.data)
    backend = load_backend(spec_of(data.potential, arguments.models), device=arguments.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # that a method says nothing is what the table is for
        model = fit(backend, splits.pop("train"), calibration := splits.pop("calib"), methods=arguments.methods)
    committee = None
    if data.committee:
        pattern = str(found_in(arguments.models, data.potential).parent / data.committee)
        committee = Committee(pattern, backend, calibration)
    predictor = Predictor(backend, model)
    for split, frames in splits.items():
        usable = known_to(backend, frames)
        usable = usable[:: max(1, -(-len(usable) // arguments.frames))]
        if not usable:
            continue
        assessed = evaluate(predictor, usable, n_bootstrap=0, progress=False)
        samples = {method: sample for (method, quantity), sample in assessed.samples.items() if quantity == "forces"}
        if committee is not None:
            samples["committee"], _ = committee.sample(backend, usable)
        if arguments.predictions and (path := arguments.predictions / name / f"{split}.xyz").exists():
            samples["predictions"] = sample_in(path)
        for estimator, sample in samples.items():
            yield cell_of(name, split, estimator, sample)


def frames_of(folder: str, data: Path) -> dict[str, list[Atoms]]:
    """Labelled frames by split; `train` and `calib` are what is fitted and calibrated on."""
    if folder == "embedded":
        from ase_uq import embedded

        return {split: read(embedded.path(f"{name}.xyz"), ":") for split, name in EMBEDDED.items()}
    if not (data / folder).is_dir():
        raise FileNotFoundError(f"there is no folder {data / folder}")
    return splits_of(data / folder)


def spec_of(potential: str, folders: Sequence[Path]) -> str:
    return f"mace:{found_in(folders, potential)}" if potential.endswith(".model") else potential


def found_in(folders: Sequence[Path], name: str) -> Path:
    for folder in folders:
        if (folder / name).exists():
            return folder / name
    raise FileNotFoundError(f"{name} is in none of {', '.join(map(str, folders))}")


def known_to(backend: Backend, frames: Sequence[Atoms]) -> list[Atoms]:
    """Frames whose elements the potential knows."""
    return [atoms for atoms in frames if set(atoms.numbers.tolist()) <= backend.elements]


def sample_in(path: Path) -> Sample:
    """Somebody's own predictions, one frame after the other."""
    frames: list[Atoms] = read(path, ":")  # pyright: ignore[reportAssignmentType]
    residuals = np.concatenate([atoms.arrays["REF_forces"] - atoms.get_forces() for atoms in frames])
    std = np.concatenate([atoms.arrays["forces_uncertainty"] for atoms in frames])
    owner = np.repeat(np.arange(len(frames)), [len(atoms) for atoms in frames])
    return Sample(residuals, std, owner, np.concatenate([atoms.numbers for atoms in frames]))


def cell_of(name: str, split: str, estimator: str, sample: Sample) -> Cell:
    residuals, std = sample.residuals, np.broadcast_to(sample.std, sample.residuals.shape)
    rmse = float(np.sqrt(np.mean(residuals**2)))
    zero = np.zeros(residuals.size)
    nll, crps = (measure(residuals.ravel(), zero, std.ravel()) for measure in (metrics.nll, metrics.crps))
    frames = largest_of_frames(sample)
    largest, said = frames.residuals[:, 0], frames.std[:, 0]
    return Cell(
        set=name,
        split=split,
        estimator=estimator,
        n_frames=len(largest),
        rmse=rmse,
        above_constant=nll - 0.5 * float(np.log(2 * np.pi * rmse**2) + 1),
        z2=float(np.mean(residuals**2 / std**2)),
        spearman=float(spearmanr(np.linalg.norm(residuals, axis=1), np.linalg.norm(std, axis=1))[0]),
        spearman_frames=float(spearmanr(largest, said)[0]),
        auroc=metrics.auroc(largest, said, tolerance=TOLERANCE),
        crps=crps,
    )


def cells_in(path: Path) -> dict[str, list[Cell]]:
    """Cells of an earlier run, by set."""
    found: dict[str, list[Cell]] = {}
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                cell = Cell(**{name: kind(row[name]) for name, kind in get_type_hints(Cell).items()})
                found.setdefault(cell.set, []).append(cell)
    return found


def write(out: Path, cells: Sequence[Cell], left_out: Sequence[str], arguments: argparse.Namespace) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    with open(out.with_suffix(".csv"), "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([field.name for field in fields(Cell)])
        for cell in cells:
            writer.writerow([f"{x:.6g}" if isinstance(x, float) else x for x in asdict(cell).values()])
    out.with_suffix(".md").write_text(markdown(cells, left_out, arguments))


def markdown(cells: Sequence[Cell], left_out: Sequence[str], arguments: argparse.Namespace) -> str:
    shown = [e for e in ("combined", arguments.methods[0], "committee", "predictions") if any_of(cells, e)]
    lines = [
        "# Quality of force uncertainties, all sets",
        "",
        f"`python benchmarks/quality.py --methods {' '.join(arguments.methods)} --frames {arguments.frames}`: NLL of "
        "force components above the best constant told the truth, mean z², Spearman of atoms / of the largest of each "
        f"frame, AUROC of frames with an error above {TOLERANCE:g} eV/Å, CRPS in meV/Å. Splits that begin with ood are "
        "out of distribution; nothing was fitted to them or calibrated on them.",
        "",
        f"| set | split | frames | RMSE, meV/Å | {' | '.join(shown)} |",
        "|---|---|---:|---:|" + "---|" * len(shown),
    ]
    for name, split in dict.fromkeys((cell.set, cell.split) for cell in cells):
        row = {cell.estimator: cell for cell in cells if (cell.set, cell.split) == (name, split)}
        first = next(iter(row.values()))
        texts = [text_of(row[e]) if e in row else "" for e in shown]
        lines.append(f"| {name} | {split} | {first.n_frames} | {1e3 * first.rmse:.0f} | {' | '.join(texts)} |")
    lines += ["", *summary(cells)]
    if any_of(cells, "committee"):
        lines += ["", *beside_committees(cells)]
    lines += [f"\nLeft out: {text}." for text in left_out]
    return "\n".join(lines) + "\n"


def any_of(cells: Sequence[Cell], estimator: str) -> bool:
    return any(cell.estimator == estimator for cell in cells)


def text_of(cell: Cell) -> str:
    ranks = f"{cell.spearman:.2f} / {cell.spearman_frames:.2f}"
    return f"{cell.above_constant:+.2f}, {cell.z2:.2f}, {ranks}, {cell.auroc:.2f}, {1e3 * cell.crps:.0f}"


def summary(cells: Sequence[Cell]) -> list[str]:
    """One line an estimator: shares of the cells out of distribution, and means."""
    lines = [
        f"| estimator | cells out of distribution | z² in {CALIBRATED[0]:g} to {CALIBRATED[1]:g} | z² in 0.33 to 3 "
        f"| NLL within {NEAR:g} of the truthful constant | Spearman, atoms | frames | AUROC | CRPS, meV/Å "
        "| in distribution: NLL above the constant | Spearman, atoms |",
        "|---|" + "---:|" * 10,
    ]
    for estimator in dict.fromkeys(cell.estimator for cell in cells):
        of_one = [cell for cell in cells if cell.estimator == estimator]
        far = [cell for cell in of_one if cell.out_of_distribution]
        near = [cell for cell in of_one if not cell.out_of_distribution]
        if not far:
            continue

        def mean(what: str, among: Sequence[Cell]) -> float:
            return float(np.nanmean([getattr(cell, what) for cell in among])) if among else float("nan")

        lines.append(
            f"| {estimator} | {len(far)} | {sum(cell.calibrated for cell in far)} | "
            f"{sum(0.33 <= cell.z2 <= 3 for cell in far)} | {sum(cell.above_constant <= NEAR for cell in far)} | "
            f"{mean('spearman', far):.2f} | {mean('spearman_frames', far):.2f} | {mean('auroc', far):.2f} | "
            f"{1e3 * mean('crps', far):.0f} | {mean('above_constant', near):+.2f} | {mean('spearman', near):.2f} |"
        )
    return lines


def beside_committees(cells: Sequence[Cell]) -> list[str]:
    """One line an estimator: in how many of the cells with a committee it is better, or worse by a hair's breadth."""
    committee = {(cell.set, cell.split): cell for cell in cells if cell.estimator == "committee"}
    lines = [
        f"Better than a committee, or worse by at most {EQUAL:g}, in cells in and out of distribution:",
        "",
        "| estimator | cells | NLL | Spearman, atoms | frames | z² in 0.5 to 2 | z² of the committee |",
        "|---|" + "---:|" * 6,
    ]
    for estimator in dict.fromkeys(cell.estimator for cell in cells if cell.estimator != "committee"):
        pairs = [
            (cell, committee[cell.set, cell.split])
            for cell in cells
            if cell.estimator == estimator and (cell.set, cell.split) in committee
        ]
        likelier = sum(cell.above_constant <= other.above_constant + EQUAL for cell, other in pairs)
        ranks = [
            sum(getattr(cell, name) >= getattr(other, name) - EQUAL for cell, other in pairs)
            for name in ("spearman", "spearman_frames")
        ]
        calibrated = [sum(pair[k].calibrated for pair in pairs) for k in (0, 1)]
        lines.append(f"| {estimator} | {len(pairs)} | {' | '.join(map(str, [likelier, *ranks, *calibrated]))} |")
    return lines


if __name__ == "__main__":
    main()
