"""Learning curves: which way of choosing frames saves labels.

    python -m benchmarks.selection ../shared/data/acac POTENTIAL.model [--seeds 8] [--folder selection]
                                   [--out benchmarks/results/selection]

`ase_uq.select` chooses frames of a pool in which some are hotter than all that is known, and what was learned from
the known and the chosen ones together is judged on frames of other runs, at either temperature. Three learners:

    kernel      energies by a Gaussian kernel on the features in which distances are measured, averaged over atoms
    bll mean    energies by the last layer of the potential, fitted again
    fine-tuned  the embedded MACE of malonaldehyde, trained on: the real thing

The first two learn from frames of DATA, a folder with train*.xyz, extra*.xyz, calib*.xyz, test*.xyz and ood*.xyz,
labelled. For each seed 50 frames of train*.xyz are known, an uncertainty model is fitted on them, and the others are
the pool, with all of extra*.xyz or with 50. Width and ridge are those of the least left-out error. POTENTIAL, a MACE
.model file or a SPEC, was trained before: where it has seen frames of the pool, its features have as well.

For the third the pool is labelled by GFN2-xTB along MD at 300 K and 900 K. Regressions take ten minutes of a core,
fine-tunings a quarter of an hour. Set OMP_NUM_THREADS=1: molecules are too small for more. What FOLDER has already is
not done again. Writes OUT.md, OUT.csv and a figure for each pool.
"""

import argparse
import warnings
from pathlib import Path

from ase_uq import UQWarning
from benchmarks.selection.fine_tuning import fine_tunings
from benchmarks.selection.regressions import regressions
from benchmarks.selection.rows import write_csv
from benchmarks.selection.tables import DRAWN, draw, markdown, points_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("potential")
    parser.add_argument("--seeds", type=int, default=8, help="of the regressions")
    parser.add_argument("--folder", type=Path, default=Path("selection"), help="keeps what was finished")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UQWarning)  # that the bands hold few frames is what the table says
    spec = f"mace:{arguments.potential}" if arguments.potential.endswith(".model") else arguments.potential
    arguments.folder.mkdir(parents=True, exist_ok=True)
    done = arguments.folder / f"regressions_{arguments.data.name}_{Path(arguments.potential).stem}.csv"
    rows = regressions(spec, arguments.data, arguments.seeds, done)
    points = points_of(rows + fine_tunings(arguments.folder))
    text = markdown(points, arguments)
    out = arguments.out
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    write_csv(out.with_suffix(".csv"), points)
    for pool in dict.fromkeys(p.pool for p in points):
        own = [p for p in points if p.pool == pool and p.measure.startswith(DRAWN)]
        draw(own, pool).savefig(out.with_name(f"{out.name}_{pool.replace(', ', '_').replace(' ', '_')}.png"), dpi=120)
    print(text)


if __name__ == "__main__":
    main()
