"""Which old frames to train on again, so that a fine-tuned potential forgets less.

    python -m benchmarks.selection.replay [--seeds 2] [--out benchmarks/results/selection_replay]

The embedded MACE is trained further on frames of 900 K by the recipe of `fine_tuning`: batches of two new and six old
frames, 300 steps. The old ones come from a few of its 600 training frames of 300 K:

    random         drawn at random
    forgotten      those whose old features follow worst from the features of a first potential, fine-tuned on the new
                   frames alone (`ase_uq.diagnostics.reconstruction.pointwise_errors`, root mean square over a frame)
    wrong          those on which this first potential makes the largest force errors: old frames have labels

and errors are judged at 300 K and 900 K on frames that nothing was trained on. Writes OUT.md.
"""

import argparse
import warnings
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from mace.calculators import MACECalculator
from tqdm import tqdm

from ase_uq import embedded, load_backend, read_frames
from ase_uq.backends.base import Backend
from ase_uq.diagnostics.reconstruction import pointwise_errors
from benchmarks.selection.fine_tuning import fine_tuned, judged

SIZES = (20, 80)
N_NEW, N_TEST = 100, 120
SETS = ("test_300K", "test_900K")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection_replay"))
    arguments = parser.parse_args()
    hot, old = (read_frames(embedded.path(f"{name}.xyz")) for name in ("test_900K", "train_300K"))
    tests = {"test_300K": read_frames(embedded.path("test_300K.xyz"))[::2], "test_900K": hot[-N_TEST:]}
    before = load_backend("embedded:mace", device="cpu", dtype="float32")
    found: dict[tuple[str, int], list[list[float]]] = {
        ("not trained further", 0): [errors(before.calculator.models[0], tests)]
    }
    steps = tqdm(total=arguments.seeds * (2 + 3 * len(SIZES)), desc="fine-tunings")
    for seed in range(arguments.seeds):
        rng = np.random.default_rng(seed)
        new = [hot[i] for i in rng.permutation(len(hot) - N_TEST)[:N_NEW]]
        first = fine_tuned(new, new, seed)
        steps.update()
        orders = {
            "random": rng.permutation(len(old)),
            "forgotten": np.argsort(-forgotten(before, backend_of(first), old)),
            "wrong": np.argsort(-wrong(backend_of(first), old)),
        }
        found.setdefault(("nothing", 0), []).append(errors(first, tests))
        for name, order in orders.items():
            for size in SIZES:
                replayed = [old[i] for i in order[:size]]
                found.setdefault((name, size), []).append(errors(fine_tuned(new, replayed, seed), tests))
                steps.update()
        found.setdefault(("all", len(old)), []).append(errors(fine_tuned(new, old, seed), tests))
        steps.update()
        arguments.out.with_suffix(".md").write_text(table(found, arguments.seeds))
    print(arguments.out.with_suffix(".md").read_text())


def backend_of(model: torch.nn.Module) -> Backend:
    return load_backend(MACECalculator(models=[model], device="cpu", default_dtype="float32"))


def forgotten(before: Backend, after: Backend, frames: list[Atoms]) -> np.ndarray:
    """(n_frames,) root mean square of what of the old features of a frame does not follow from the new ones."""
    found = pointwise_errors(after, before, frames, progress=False)
    squares = found.errors["first", "second"].astype(float) ** 2
    return np.sqrt(np.bincount(found.frame, squares) / np.bincount(found.frame))


def wrong(backend: Backend, frames: list[Atoms]) -> np.ndarray:
    """(n_frames,) root mean square force error."""
    forces = np.concatenate([backend.forward(backend.collate([atoms])).forces.numpy() for atoms in frames])  # pyright: ignore
    squares = ((forces - np.concatenate([atoms.arrays["REF_forces"] for atoms in frames])) ** 2).mean(1)
    return np.sqrt([part.mean() for part in np.split(squares, np.cumsum(list(map(len, frames)))[:-1])])


def errors(model: torch.nn.Module, tests: dict[str, list[Atoms]]) -> list[float]:
    rows = judged(model, tests, "", 0, 0)
    return [next(r.value for r in rows if r.test == name and "RMSE" in r.measure) for name in SETS]


def table(found: dict[tuple[str, int], list[list[float]]], seeds: int) -> str:
    lines = [
        "# Which old frames to train on again",
        "",
        f"`python -m benchmarks.selection.replay --seeds {seeds}`: root mean square error of force components in meV/Å "
        f"of the embedded MACE, trained further on {N_NEW} frames of 900 K; mean and spread over seeds.",
        "",
        "| old frames | number | 300 K | 900 K |",
        "|---|---:|---:|---:|",
    ]
    for (name, size), values in found.items():
        means, spreads = np.mean(values, 0), np.std(values, 0, ddof=1) if len(values) > 1 else (0, 0)
        cells = [
            f"{mean:.1f} ± {spread:.1f}" if spread else f"{mean:.1f}"
            for mean, spread in zip(means, spreads, strict=True)
        ]
        lines.append(f"| {name} | {size or ''} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the potentials' packages
        main()
