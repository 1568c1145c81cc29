"""What the exact posterior of conservative forces is worth beside sums of leverages over sites.

    python benchmarks/exact_posterior.py [SET ...] [--data ../shared/data] [--models ../shared/models ...]
                                         [--train 40] [--frames 20] [--out benchmarks/results/exact_posterior]

Three fits of `bll` to the same frames, with the scores of sites alone, with `conservative="exact"`, which is also asked
with 16 and 4 probes, and with `covariance="pops"` beside it. Every frame costs a backward pass for each weight, so sets
are small. Writes OUT.md.
"""

import argparse
import warnings
from pathlib import Path

from energy_ranks import evenly
from quality import SETS, Cell, cell_of, frames_of, known_to, spec_of

from ase_uq import Predictor, UQWarning, evaluate, fit, load_backend
from ase_uq.methods.bll import BLL

PROBES = {"exact": 0, "16 probes": 16, "4 probes": 4}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", default=["malonaldehyde, MACE", "acac"])
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--train", type=int, default=40, help="most frames to fit on, and to calibrate on")
    parser.add_argument("--frames", type=int, default=20, help="most frames of a split")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/exact_posterior"))
    arguments = parser.parse_args()
    lines = [
        "# The exact posterior of conservative forces",
        "",
        f"`python benchmarks/exact_posterior.py --train {arguments.train} --frames {arguments.frames}`: NLL of force "
        "components above the best constant told the truth, mean z², Spearman of atoms and of the largest of each "
        "frame; passes are backward passes a frame beside that of the forces.",
        "",
        "| set | split | estimator | NLL above constant | z² | Spearman, atoms | frames | passes |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.sets:
        for cell, passes in cells_of(name, arguments):
            values = (cell.above_constant, cell.z2, cell.spearman, cell.spearman_frames)
            numbers = " | ".join(f"{value:.2f}" for value in values)
            lines.append(f"| {cell.set} | {cell.split} | {cell.estimator} | {numbers} | {passes} |")
        arguments.out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def cells_of(name: str, arguments: argparse.Namespace) -> list[tuple[Cell, int]]:
    """Cells of all splits, with the number of backward passes of each."""
    data = SETS[name]
    splits = frames_of(data.folder, arguments.data)
    backend = load_backend(spec_of(data.potential, arguments.models))
    train, calibration = (evenly(splits.pop(split), arguments.train) for split in ("train", "calib"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # what it costs is what the table is for
        ways = (BLL(), BLL(conservative="exact"), BLL(conservative="exact", covariance="pops"))
        sites, exact, moves = (fit(backend, train, calibration, methods=[way]) for way in ways)
    width = len(exact.methods["bll"].head.slope_root)
    passes = {"sites": 0, "pops": width} | {title: n or width for title, n in PROBES.items()}
    predictors = {"sites": Predictor(backend, sites), "pops": Predictor(backend, moves)}
    predictors |= {title: Predictor(backend, exact, force_probes=n) for title, n in PROBES.items()}
    cells = []
    for split, frames in splits.items():
        usable = evenly(known_to(backend, frames), arguments.frames)
        for title, predictor in predictors.items():
            assessed = evaluate(predictor, usable, n_bootstrap=0)
            cells.append((cell_of(name, split, title, assessed.samples["bll", "forces"]), passes[title]))
    return cells


if __name__ == "__main__":
    main()
