"""What the forces of members cost: the time of an ASE step with 0, 4 and 16 of them, as ratios to the plain potential.

    python benchmarks/ensemble_forces.py [--device cpu|cuda] [--seconds 60] [--smallest 8] [--largest 64] [--out NAME]

Potentials, frames and timing are those of benchmarks/overhead.py: all sides take turns in one run. `bll` is the only
method. Writes OUT.md.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from overhead import POTENTIALS, SIZES, calculator, crystal, fitted, machine, times_in_turns
from tqdm import tqdm

from ase_uq import UncertainCalculator

MEMBERS = (0, 4, 16)


def row_of(name: str, repeat: int, arguments: argparse.Namespace) -> str:
    plain = calculator(name, arguments.device)
    model = fitted(plain, ["bll"])
    sides = [crystal(repeat) for _ in (None, *MEMBERS)]
    sides[0].calc = plain
    for atoms, n in zip(sides[1:], MEMBERS, strict=True):
        atoms.calc = UncertainCalculator(plain, model, ensemble=max(n, 16), ensemble_forces=n)
    times = times_in_turns(sides, arguments.seconds, fewest=6)
    cells = [name, str(len(sides[0])), f"{1e3 * np.median(times[:, 0]):.1f}"]
    for side in range(1, len(sides)):
        low, middle, high = np.quantile(times[:, side] / times[:, 0], [0.25, 0.5, 0.75])
        cells.append(f"{middle:.2f} ({low:.2f} to {high:.2f})")
    return f"| {' | '.join([*cells, str(len(times))])} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=60, help="least time a potential and size")
    parser.add_argument("--smallest", type=int, default=8, help="smallest number of atoms")
    parser.add_argument("--largest", type=int, default=64, help="largest number of atoms")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args()
    out = arguments.out or Path(f"benchmarks/results/ensemble_forces_{arguments.device}")
    lines = [
        "# Cost of the forces of members",
        "",
        f"{machine(arguments.device)}; `{' '.join(['python', *sys.argv])}`",
        "",
        "Time of a step over that of the plain potential, median and quartiles, with `ensemble=16` and the forces of",
        "that many members.",
        "",
        f"| potential | atoms | plain step (ms) | {' | '.join(f'{n} members' for n in MEMBERS)} | steps |",
        "|---|---:|---:|" + "---|" * len(MEMBERS) + "---:|",
    ]
    sizes = [repeat for atoms, repeat in SIZES.items() if arguments.smallest <= atoms <= arguments.largest]
    out.parent.mkdir(parents=True, exist_ok=True)
    for name, repeat in tqdm([(name, repeat) for name in POTENTIALS for repeat in sizes], unit="size"):
        lines.append(row_of(name, repeat, arguments))
        out.with_suffix(".md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
