"""Stochastic weights (BLIP) beside the default fit, a committee and dropout: accuracy, ranking, likelihood and cost.

    python benchmarks/blip.py SET [--data ../shared/data] [--models ../shared/models] [--train 120] [--epochs 12]
                              [--batch 5] [--frames 40] [--members 8 32] [--work FOLDER] [--out FILE]

SET is malonaldehyde (the embedded MACE and its frames), acac, or si, whose potentials are those that
`benchmarks/train_committee.py si_mlearn FOLDER --seeds 2 3 4` trains. BLIP is trained from the potential on the first
`--train` of evenly spaced training frames, ten more being held out to stop; a training that was killed is taken up
from `--work`, and one that has ended is not repeated. Everything is fitted on at most `--frames` training frames,
calibrated on as many calibration frames and judged on as many test frames of each split, evenly spaced. All passes are
in float32.

Each row is judged on the errors of its own prediction: that of `combined` is the potential's, that of the committee the
mean of its members, that of BLIP the potential with the trained mean weights. Cost is the CPU time of a pass with
uncertainties over a plain one of the potential, in this run, on one frame of the test set as in molecular dynamics.
Writes OUT.md, by default benchmarks/results/blip_SET.md.
"""

import argparse
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from ase import Atoms

from ase_uq import Predictor, UQWarning, embedded, evaluate, fit, load_backend, read_frames
from ase_uq.backends.base import Backend
from ase_uq.backends.stochastic import Blip
from ase_uq.diagnostics.evaluate import assess
from ase_uq.fitting.blip import BlipTraining, mc_dropout, train_blip
from ase_uq.io.labels import labels_of

DROPOUTS = (1e-4, 1e-2)
HELD_OUT = 10


@dataclass(frozen=True)
class Set:
    potential: str
    train: Sequence[Atoms]
    calibration: Sequence[Atoms]
    tests: dict[str, Sequence[Atoms]]
    committee: str = ""


@dataclass(frozen=True)
class Row:
    estimator: str
    split: str
    rmse: float
    spearman: float
    spearman_frames: float
    above_constant: float
    z2: float
    cost: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("set", choices=("malonaldehyde", "acac", "si"))
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, default=Path("../shared/models"))
    parser.add_argument("--frames", type=int, default=40)
    parser.add_argument("--train", type=int, default=120, help="frames that BLIP is trained on")
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--batch", type=int, default=5, help="structures in a step")
    parser.add_argument("--members", type=int, nargs="*", default=[8, 32])
    parser.add_argument("--work", type=Path, default=Path("blip_trained"))
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.work.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    out = arguments.out or Path("benchmarks/results") / f"blip_{arguments.set}"

    def write(rows: Sequence[Row], told: Sequence[str]) -> None:
        """After each estimator, so that a run that is cut off leaves what it has found."""
        out.with_suffix(".md").write_text(markdown(rows, told, arguments))

    judge_all(set_of(arguments), arguments, write)
    print(out.with_suffix(".md").read_text())


def set_of(arguments: argparse.Namespace) -> Set:
    """Frames of a set, evenly spaced."""
    name = arguments.set

    def some(path: Path | str, most: int = arguments.frames) -> list[Atoms]:
        frames = [
            atoms
            for atoms in read_frames(path)
            if labels_of(atoms).forces is not None and atoms.info.get("config_type") != "IsolatedAtom"
        ]
        return [frames[place] for place in sorted(set(np.linspace(0, len(frames) - 1, most).astype(int)))]

    most = arguments.train + HELD_OUT
    folder, models = arguments.data / f"{name}{'_mlearn' if name == 'si' else ''}", arguments.models
    if name == "malonaldehyde":
        tests = {f"{kelvin} K": some(embedded.path(f"test_{kelvin}K.xyz")) for kelvin in (300, 900)}
        train, calibration = (embedded.path(f"{kind}_300K.xyz") for kind in ("train", "calibration"))
        return Set("embedded:mace", some(train, most), some(calibration), tests)
    if name == "acac":
        tests = {"300 K": some(folder / "test_id_300K.xyz"), "600 K": some(folder / "ood_md_600K.xyz")}
        return Set(
            f"mace:{models / 'mace_acac_committee_2.model'}",
            some(folder / "train_300K.xyz", most),
            some(folder / "calib_300K.xyz"),
            tests,
            f"mace:{models / 'mace_acac_committee_[234].model'}",
        )
    tests = {
        split: some(folder / f"{file}.xyz")
        for split, file in (
            ("in distribution", "test_id"),
            ("1518 K", "ood_aimd_1518K"),
            ("vacancy", "ood_vacancy_solid"),
            ("surface", "ood_surface"),
            ("melt", "ood_melt"),
        )
    }
    return Set(
        f"mace:{models / 'si_mlearn_2.model'}",
        some(folder / "train.xyz", most),
        some(folder / "calib.xyz"),
        tests,
        f"mace:{models / 'si_mlearn_[234].model'}",
    )


def judge_all(data: Set, arguments: argparse.Namespace, write: Callable[[list[Row], list[str]], None]) -> None:
    plain = load_backend(data.potential, device="cpu", dtype="float32")
    spaced = data.train[:: max(1, len(data.train) // arguments.frames)][: arguments.frames]
    one = next(iter(data.tests.values()))[0]
    rows: list[Row] = []
    told: list[str] = []

    def judge(backend: Backend, methods: Sequence[str], **estimators: str) -> None:
        """Rows of methods of one fit, by what they are called."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UQWarning)
            model = fit(backend, spaced, data.calibration, methods=list(methods), progress=False)
            predictor = Predictor(backend, model)
            cost = cost_of(predictor, plain, one)
            for split, frames in data.tests.items():
                samples = evaluate(predictor, list(frames), n_bootstrap=0, progress=False).samples
                for method, estimator in estimators.items():
                    rows.append(row(estimator, split, samples, method, len(frames), cost))
                    print(rows[-1], flush=True)
        write(rows, told)

    judge(plain, ("bll", "pdrum", "kernel"), combined="combined")
    if data.committee:
        judge(load_backend(data.committee, device="cpu", dtype="float32"), ["committee"], committee="committee of 3")
    for dropout in DROPOUTS:
        judge(plain.with_blip(mc_dropout(plain, dropout)), ["committee"], committee=f"dropout {dropout:g}, T = 8")
    for loss in ("elbo", "crps"):
        blip, line = trained(loss, plain, data, arguments)
        told.append(line)
        for count in arguments.members:
            backend, name = plain.with_blip(replace(blip, n_members=count)), f"BLIP, {loss}, T = {count}"
            if count == arguments.members[0]:
                judge(backend, ["bll", "committee"], committee=name, combined=f"{name}, with `bll`")
            else:
                judge(backend, ["committee"], committee=name)


def trained(loss: str, plain: Backend, data: Set, arguments: argparse.Namespace) -> tuple[Blip, str]:
    """Weights of a training, or those of an earlier run, and what is to be said of it."""
    path = arguments.work / f"{arguments.set}_{loss}.safetensors"
    # Held out are evenly spaced frames, too.
    step = len(data.train) // HELD_OUT
    held_out = list(data.train[::step])[:HELD_OUT]
    train = [atoms for place, atoms in enumerate(data.train) if place % step or place // step >= HELD_OUT]
    how = BlipTraining(loss=loss, max_epochs=arguments.epochs, batch=arguments.batch, dropout=1e-4)
    if not path.exists():
        train_blip(plain, train, held_out, out=path, training=how, progress=False)
    blip = Blip.load(path)
    if any((blip.training or {}).get(name) != value for name, value in asdict(how).items()):
        raise SystemExit(f"{path} was trained with other settings: remove it, or give another --work.")
    model = plain.stochastic()
    calm, wild = (
        blip.rates(model.invariants(plain.collate(list(frames)[:10]))).mean(0)
        for frames in list(data.tests.values())[:: len(data.tests) - 1]
    )
    told = blip.training or {}
    best = min(range(len(told["history"])), key=lambda epoch: told["history"][epoch][1])
    rates = ", ".join(
        f"{group} {a:.1e} / {b:.1e}"
        for group, a, b in zip(blip.rates.groups, calm.tolist(), wild.tolist(), strict=True)
    )
    return blip, (
        f"{loss}: {len(train)} frames, {told['epochs']} epochs, the best {best + 1}; validation loss "
        f"{told['history'][0][1]:.3f} after the first, {told['best_loss']:.3f} at best. Mean α of the first and of the "
        f"last split: {rates}."
    )


def cost_of(predictor: Predictor, plain: Backend, atoms: Atoms) -> float:
    """CPU time of a prediction over that of a plain pass, the least of several, taken in turns.

    The first ones, in which torch compiles, do not count.
    """
    found = []
    for _ in range(12):
        start = time.process_time()
        plain.forward(plain.collate([atoms]))
        middle = time.process_time()
        predictor.predict([atoms])
        found.append((middle - start, time.process_time() - middle))
    least, own = np.min(found[3:], axis=0)
    return float(own / least)


def row(estimator: str, split: str, samples: dict, method: str, n_frames: int, cost: float) -> Row:
    own = {key: sample for key, sample in samples.items() if key[0] == method}
    found = assess(own, n_frames, tolerance=0.3, n_bootstrap=0, progress=False)

    def value(metric: str, quantity: str = "forces") -> float:
        return found.select(method=method, quantity=quantity, element="all", metric=metric)[0].value

    rmse = value("rmse")
    constant = 0.5 * np.log(2 * np.pi * np.e * rmse**2)
    return Row(
        estimator,
        split,
        rmse,
        value("spearman"),
        value("spearman", "forces_max"),
        value("nll") - constant,
        value("mean_squared_z"),
        cost,
    )


def markdown(rows: Sequence[Row], told: Sequence[str], arguments: argparse.Namespace) -> str:
    lines = [
        f"# Stochastic weights on {arguments.set}",
        "",
        f"`python benchmarks/blip.py {arguments.set} --frames {arguments.frames} --train {arguments.train} "
        f"--epochs {arguments.epochs} --batch {arguments.batch} --members {' '.join(map(str, arguments.members))}`",
        "",
        "Force RMSE of the row's own prediction in meV/Å; Spearman of σ with the force error, of atoms and of the",
        "largest of each frame; NLL of force components above that of the best constant told the truth, so below 0 is",
        "better than knowing the RMSE of the split; mean z²; CPU time of a pass over a plain one. Short trainings of",
        "few frames, one seed a row.",
        "",
    ]
    for split in dict.fromkeys(row.split for row in rows):
        lines += [f"## {split}", "", "| estimator | RMSE | Spearman, atoms | frames | NLL above constant | z² | cost |"]
        lines.append("|---|" + "---:|" * 6)
        lines += [
            f"| {r.estimator} | {1e3 * r.rmse:.1f} | {r.spearman:.2f} | {r.spearman_frames:.2f} | "
            f"{r.above_constant:+.2f} | {r.z2:.2f} | {r.cost:.1f} |"
            for r in rows
            if r.split == split
        ]
        lines.append("")
    return "\n".join([*lines, *[f"- {line}" for line in told], ""])


if __name__ == "__main__":
    main()
