"""Whether higher cumulants over the atoms of a structure help: to learn energies from few frames, and to choose them.

    python -m benchmarks.selection.cumulants ../shared/data/acac POTENTIAL.model [--seeds 3]
                                             [--out benchmarks/results/selection_cumulants]

As `python -m benchmarks.selection`, with the kernel as the only learner and fewer frames. First, the error of energies
that are learned from the means of features alone, and from cumulants up to order 2, 3 and 4, on frames chosen at
random. Then, the error of energies learned from means on frames that were chosen by each. Writes OUT.md.
"""

import argparse
import warnings
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from tqdm import tqdm

from ase_uq import Predictor, UQWarning, fit, load_backend, select
from ase_uq.methods.base import Head
from ase_uq.numerics.cumulants import HIGHEST, cumulants
from benchmarks.selection.regressions import KNOWN, POOLS, Remembered, described, kernel_regression, splits_of

SIZES = (25, 50, 100)
ORDERS = range(1, HIGHEST + 1)
DRAWS = 3
STRATEGIES = ("lcmd", "maxdist")
FEWER = 3  # of test and calibration frames, one in as many


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("potential")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection_cumulants"))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore", UQWarning)
    spec = f"mace:{arguments.potential}" if arguments.potential.endswith(".model") else arguments.potential
    splits = splits_of(arguments.data)
    splits = {name: each if name in ("train", "extra") else each[::FEWER] for name, each in splits.items()}
    backend = Remembered(load_backend(spec))
    found = [errors_of_seed(backend, splits, seed) for seed in tqdm(range(arguments.seeds), desc="seeds")]
    arguments.out.with_suffix(".md").write_text(text := markdown(found, arguments))
    print(text)


def errors_of_seed(
    backend: Remembered, splits: dict[str, list[Atoms]], seed: int
) -> dict[tuple[str, str, int, int], float]:
    """RMSE of energies, meV an atom, by (what was done, test, highest order, number of frames)."""
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(splits["train"]))
    extra = [splits["extra"][i] for i in rng.permutation(len(splits["extra"]))[: POOLS["half new"]]]
    known = [splits["train"][i] for i in order[:KNOWN]]
    pool = [splits["train"][i] for i in order[KNOWN:]] + extra
    model = fit(backend, known, splits["calib"], methods=["bll"], batch_atoms=1, progress=False)
    head = model.methods["bll"].head
    tests = {name: frames for name, frames in splits.items() if name not in ("train", "extra", "calib")}
    groups = {"known": known, "pool": pool, **tests}
    energies = {name: described(backend, head, frames).energies for name, frames in groups.items()}
    rows = {n: {name: rows_of(backend, head, frames, n) for name, frames in groups.items()} for n in ORDERS}

    def errors(chosen: Sequence[int], highest: int) -> dict[str, float]:
        of = rows[highest]
        targets = torch.cat([energies["known"], energies["pool"][chosen]])
        predict = kernel_regression(torch.cat([of["known"], of["pool"][chosen]]), targets)
        return {name: 1e3 * float((predict(of[name]) - energies[name]).square().mean().sqrt()) for name in tests}

    found: dict[tuple[str, str, int, int], float] = {}
    draws = [rng.permutation(len(pool)) for _ in range(DRAWS)]
    for highest in ORDERS:
        for n in SIZES:
            for name in tests:
                found["learned", name, highest, n] = float(
                    np.mean([errors(d[:n].tolist(), highest)[name] for d in draws])
                )
    for strategy in STRATEGIES:
        for highest in ORDERS:
            how = {"train": known, "strategy": strategy, "cumulants": highest, "batch_atoms": 1, "progress": False}
            chosen = select(pool, SIZES[-1], calculator=Predictor(backend, model), **how).indices.tolist()
            for n in SIZES:
                found |= {(strategy, name, highest, n): error for name, error in errors(chosen[:n], 1).items()}
    return found


def rows_of(backend: Remembered, head: Head, frames: Sequence[Atoms], highest: int) -> torch.Tensor:
    """(n_frames, n) cumulants of the features in which distances are measured."""
    found = []
    for atoms in frames:
        forward_pass = backend.of(atoms)
        rows = head.features(forward_pass)
        found.append(cumulants(rows, forward_pass.frame_of_atom, forward_pass.n_atoms_of_frame, highest)[0])
    return torch.stack(found)


def markdown(found: Sequence[dict[tuple[str, str, int, int], float]], arguments: argparse.Namespace) -> str:
    lines = [
        "# Higher cumulants of features, to learn energies and to choose frames",
        "",
        f"`python -m benchmarks.selection.cumulants {arguments.data.name} {Path(arguments.potential).name} "
        f"--seeds {arguments.seeds}`",
        "",
        f"Energy RMSE in meV/atom of a kernel on {KNOWN} known and n more frames, mean over {len(found)} seeds; in "
        "brackets the change from the means alone (order 1) in %, paired by seed, ± its standard error. *learned*: "
        f"from cumulants up to this order, of frames at random ({DRAWS} draws). *lcmd*, *maxdist*: frames chosen in "
        "the space of these cumulants, energies learned from means.",
    ]
    for what in ("learned", *STRATEGIES):
        for test in dict.fromkeys(key[1] for key in found[0] if key[0] == what):
            lines += ["", f"## {what}, {test}", "", f"| order up to | {' | '.join(f'n = {n}' for n in SIZES)} |"]
            lines.append(f"|---|{'---|' * len(SIZES)}")
            for highest in ORDERS:
                cells = [cell(found, what, test, highest, n) for n in SIZES]
                lines.append(f"| {highest} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def cell(found: Sequence[dict[tuple[str, str, int, int], float]], what: str, test: str, highest: int, n: int) -> str:
    values, means = (np.array([seed[what, test, order, n] for seed in found]) for order in (highest, 1))
    if highest == 1:
        return f"{values.mean():.3g}"
    changes = 100 * (values / means - 1)
    error = changes.std(ddof=1) / len(changes) ** 0.5 if len(changes) > 1 else np.nan
    return f"{values.mean():.3g} ({changes.mean():+.0f} ± {error:.0f})"


if __name__ == "__main__":
    main()
