"""The claim of latent kernels: fewer labels to an error, for a pretrained potential on chemistry that is new to it.

    python -m benchmarks.selection.reactive [--data ../shared/data] [--folder reactive] [--seeds 16] [--tuned 1]
                                            [--out benchmarks/results/selection_reactive]

A MACE is trained on other molecules. The pool is malonaldehyde that is heated and whose proton is carried over, the
test frames are like it (`reactive_frames` has both; all labels are GFN2-xTB). From 10 random labels on, a round chooses
more, up to the next of SIZES, and trains the pretrained MACE on with all labelled frames and with frames of the other
molecules, so that these are not forgotten. What chooses:

    random              the next frames of a random order
    default             as `ase_uq.select` by default: LCMD on the features of the Bayesian last layer
    kernel, lcmd        LCMD on the latent features, averaged over atoms (activation kernel)
    kernel, maxdet      the largest determinant of the posterior covariance of this kernel
    ntk, lcmd           LCMD on the gradients of energies and forces by all weights, sketched (tangent kernel)
    ntk, maxdet         the largest determinant of the posterior covariance of that kernel
    combined            the largest uncertainties of the default methods, combined
    committee           the largest variance of forces among four trainings on resampled labels
    soap                farthest point sampling on mean SOAP vectors, which no potential makes

So many trainings are only affordable in closed form (`reactive_learner`): the potential changes linearly in its
weights, and its features stay those of the pretrained one. Uncertainties are fitted on pretraining frames, once. With
the first seeds, as many as --tuned says, all weights are also really fine-tuned with the first TUNED_AT labels, by the
recipe of `fine_tuning` but with STEPS steps.

Needs tblite and, for soap, dscribe, which are not installed with ase_uq: without dscribe soap is left out. Nothing of
the data is in the repository: FOLDER keeps what was made of DATA, and what was finished is not done again. Writes
OUT.md, OUT.csv and OUT.png.
"""

import argparse
import copy
import importlib.util
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from tqdm import tqdm

from ase_uq import Predictor, fit, load_backend
from ase_uq.methods.kernel import Kernel
from ase_uq.selection.points import Scan
from ase_uq.selection.strategies import Determinant, Farthest, LargestCluster, Points, Space, Strategy, choose
from benchmarks.selection.fine_tuning import judged, trained_on
from benchmarks.selection.reactive_frames import others, others_held_out, pretrained, reactive
from benchmarks.selection.reactive_learner import Equations, equations, force_errors, trained
from benchmarks.selection.reactive_tables import CLOSED, FORCES, NEW, OLD, TUNED, draw, markdown
from benchmarks.selection.rows import Row, read_csv, write_csv
from benchmarks.selection.tables import points_of

POOL_NAME = "malonaldehyde, reactive"
EVERY = 2  # one frame in as many, of the pool, as neighbours in time are alike, and of the other molecules' tests
SIZES = (10, 20, 40, 80, 120)  # labels: what is drawn at random first, and after each round
REPLAYED, FITTED = 30, 60  # pretraining frames: trained on again, and for uncertainties
MEMBERS = 4
NOISE = 1e-6  # of maxdet, in units of the mean square, as in `select`
TUNED_AT, STEPS, N_NEW, N_OLD = 40, 120, 4, 2  # labels, batches, frames a batch
TUNED_CHOICES = ("random", "default", "kernel, lcmd", "ntk, lcmd", "soap")


@dataclass(frozen=True)
class Choice:
    """What a round knows.

    Args:
        pool: All frames of the pool.
        labelled: Numbers of those with labels, in the order of choice.
        open: Numbers of the others, in the random order of this seed.
        n: Frames to choose.
        seed: Of what is random.
        features: (n_frames, width) rows of each method to compare: means over atoms, as in `select`, or gradients.
        readings: (n_frames,) largest uncertainties, eV/Å.
        of_pool: Equations of the pool.
        of_old: Equations of the frames that are trained on again.
    """

    pool: list[Atoms]
    labelled: list[int]
    open: list[int]
    n: int
    seed: int
    features: dict[str, torch.Tensor]
    readings: torch.Tensor
    of_pool: Equations
    of_old: Equations


def at_random(choice: Choice) -> list[int]:
    return choice.open[: choice.n]


def by_kernel(choice: Choice, method: str, strategy: str = "lcmd") -> list[int]:
    return by_rows(choice, choice.features[method], strategy)


def by_uncertainty(choice: Choice) -> list[int]:
    order = choice.readings[choice.open].argsort(descending=True)
    return [choice.open[i] for i in order[: choice.n].tolist()]


def of_tangents(of_pool: Equations) -> torch.Tensor:
    """(n_frames, n_frames) rows with the inner products of the gradients, which are much longer."""
    energy, forces = of_pool.common.chunk(2, dim=1)
    rows = torch.cat([of_unit_length(energy), of_unit_length(forces)], 1)
    values, vectors = torch.linalg.eigh(rows @ rows.T)
    return vectors * values.clamp(min=0).sqrt()


def of_unit_length(rows: torch.Tensor) -> torch.Tensor:
    """Rows in units of their root mean square length."""
    return rows / rows.square().sum(1).mean().sqrt()


def by_soap(choice: Choice) -> list[int]:
    from dscribe.descriptors import SOAP

    soap = SOAP(species=["H", "C", "O"], r_cut=5.0, n_max=6, l_max=4, average="outer")
    rows = torch.zeros(len(choice.pool), soap.get_number_of_features(), dtype=torch.float64)
    for i in choice.labelled + choice.open:
        rows[i] = torch.from_numpy(soap.create(choice.pool[i]))
    return by_rows(choice, rows, "maxdist")


def by_rows(choice: Choice, rows: torch.Tensor, strategy: str) -> list[int]:
    points, known = Points.single(rows[choice.open]), Points.single(rows[choice.labelled])
    rules: dict[str, Callable[[], Strategy]] = {
        "lcmd": LargestCluster,
        "maxdist": Farthest,
        "maxdet": partial(Determinant, points, known, noise=NOISE),
    }
    picks = choose(Space(points, known), choice.n, rules[strategy]())
    return [choice.open[pick.candidate] for pick in picks]


def by_committee(choice: Choice) -> list[int]:
    rng = np.random.default_rng(choice.seed)
    new, still = choice.of_pool.part(choice.labelled), choice.of_pool.part(choice.open)
    _, ridge = trained(new, choice.of_old)
    members = []
    for _ in range(MEMBERS):
        drawn = rng.integers(len(choice.labelled), size=len(choice.labelled)).tolist()
        members.append(force_errors(still, trained(new.part(drawn), choice.of_old, ridge)[0]))
    spread = torch.stack(members).var(0).mean(1)
    return [choice.open[i] for i in spread.argsort(descending=True)[: choice.n].tolist()]


CHOICES: dict[str, Callable[[Choice], list[int]]] = {
    "random": at_random,
    "default": partial(by_kernel, method="bll"),
    "kernel, lcmd": partial(by_kernel, method="kernel"),
    "kernel, maxdet": partial(by_kernel, method="kernel", strategy="maxdet"),
    "ntk, lcmd": partial(by_kernel, method="ntk"),
    "ntk, maxdet": partial(by_kernel, method="ntk", strategy="maxdet"),
    "combined": by_uncertainty,
    "committee": by_committee,
    "soap": by_soap,
}


def errors(tests: dict[str, Equations], weights: torch.Tensor, name: str, n: int, seed: int) -> list[Row]:
    """Root mean square force errors, over all and of the median frame, meV/Å."""
    rows = []
    for test, of_test in tests.items():
        squares = 1e6 * force_errors(of_test, weights).square()
        for measure, value in (("RMSE", squares.mean()), ("median", squares.mean(1).median())):
            rows.append(Row(POOL_NAME, CLOSED, FORCES[measure], test, name, n, seed, float(value.sqrt())))
    return rows


def learning_curve(name: str, first: Choice, tests: dict[str, Equations]) -> tuple[list[Row], list[int]]:
    """Errors after each round, and the numbers of the frames that were labelled, in the order of choice."""
    choice, rows = first, []
    for n in SIZES:
        if n > len(choice.labelled):
            found = CHOICES[name](replace(choice, n=n - len(choice.labelled)))
            still = [i for i in choice.open if i not in set(found)]
            choice = replace(choice, labelled=choice.labelled + found, open=still)
        weights, _ = trained(choice.of_pool.part(choice.labelled), choice.of_old)
        rows += errors(tests, weights, name, n, choice.seed)
    new = [choice.pool[i].info for i in choice.labelled[SIZES[0] :]]
    for kind in ("transfer", 1500):
        share = np.mean([kind in (info["config_type"], info.get("temperature_K")) for info in new])
        rows.append(Row(POOL_NAME, "", f"share of {kind}", "chosen", name, SIZES[-1], choice.seed, float(share)))
    return rows, choice.labelled


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--folder", type=Path, default=Path("reactive"), help="keeps what was made and finished")
    parser.add_argument("--seeds", type=int, default=16)
    parser.add_argument("--tuned", type=int, default=1, help="seeds with a real fine-tuning as well")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/selection_reactive"))
    arguments = parser.parse_args()
    folder, data = arguments.folder, arguments.data
    folder.mkdir(parents=True, exist_ok=True)
    spec = f"mace:{pretrained(data, folder)}"
    backend = load_backend(spec, device="cpu", dtype="float32")
    pool, old = reactive(folder, "pool")[::EVERY], others(data, folder)
    again = old[:: len(old) // REPLAYED][:REPLAYED]
    tests = {NEW: reactive(folder, "test"), OLD: others_held_out(data, folder, "test")[::EVERY]}
    of_pool = equations(backend, pool, folder / "pool.pt")
    of_old = equations(backend, again, folder / "old.pt")
    of_tests = {name: equations(backend, frames, folder / f"test_{name}.pt") for name, frames in tests.items()}
    held_out = others_held_out(data, folder, "calibration")
    methods = ["bll", "pdrum", Kernel(kernel="linear")]
    predictor = Predictor(backend, fit(backend, old[:: len(old) // FITTED], held_out, methods=methods))
    features, readings = {"ntk": of_tangents(of_pool)}, np.zeros(0)
    for method in ("bll", "kernel"):  # all features stay as they are: one pass is enough for every choice
        head = predictor.uncertainty_model.methods[method].head
        points, readings, _, _ = Scan(predictor, head, "structure", None).pool(pool, method)
        features[method] = points.rows
    names = [name for name in CHOICES if name != "soap" or importlib.util.find_spec("dscribe")]
    if len(names) < len(CHOICES):
        print("soap is left out: dscribe is not installed.", file=sys.stderr)
    rows = errors(of_tests, torch.zeros(of_pool.rows.shape[2], dtype=torch.float64), "nothing", 0, 0)
    chosen = {}
    for seed in tqdm(range(arguments.seeds), desc="closed form", unit="seed"):
        order = np.random.default_rng(seed).permutation(len(pool)).tolist()
        first = Choice(
            pool, order[: SIZES[0]], order[SIZES[0] :], 0, seed, features, torch.from_numpy(readings), of_pool, of_old
        )
        for name in names:
            found, chosen[name, seed] = learning_curve(name, first, of_tests)
            rows += found
    publish(rows, arguments)  # the fine-tunings take longer than all before
    done = folder / "fine_tunings.csv"
    fine_tunings = read_csv(done)
    todo = [(seed, name) for seed in range(arguments.tuned) for name in names if name in TUNED_CHOICES]
    for seed, name in tqdm(todo, desc="fine-tunings"):
        if (name, seed) not in {(row.strategy, row.seed) for row in fine_tunings}:
            start = copy.deepcopy(load_backend(spec, device="cpu", dtype="float32").calculator.models[0])
            new = [pool[i] for i in chosen[name, seed][:TUNED_AT]]
            tuned = trained_on(start, [(new, N_NEW), (old, N_OLD)], seed, STEPS)
            found = judged(tuned, tests, name, TUNED_AT, seed)
            fine_tunings += [replace(row, pool=POOL_NAME, learner=TUNED) for row in found]
            write_csv(done, fine_tunings)
    rows += [row for row in fine_tunings if row.seed < arguments.tuned]
    publish(rows, arguments)
    print(arguments.out.with_suffix(".md").read_text())


def publish(rows: list[Row], arguments: argparse.Namespace) -> None:
    points = [point for kind in (CLOSED, TUNED) for point in points_of([row for row in rows if row.learner == kind])]
    write_csv(arguments.out.with_suffix(".csv"), points)
    draw(rows).savefig(arguments.out.with_suffix(".png"), dpi=120)
    arguments.out.with_suffix(".md").write_text(markdown(rows, arguments))


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the potentials' packages, and of few calibration frames
        main()
