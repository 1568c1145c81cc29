"""What becomes of an uncertainty model when its potential is trained further: left, calibrated again, fitted again.

    python benchmarks/refit.py [--combined 1 3] [--out benchmarks/results/refit]
    python benchmarks/refit.py --acac ../shared --combined --out benchmarks/results/refit_acac

The embedded MACE of malonaldehyde is trained further on frames of 900 K, as in benchmarks/compare.py, by several rates
and numbers of epochs; with --acac, the MACE of acetylacetone of a folder with models/mace_acac.model and data/acac, on
frames of 600 K. An uncertainty model that was fitted before, on frames of 300 K, is then

    left          used as it was, which ase_uq refuses otherwise
    recalibrated  what `ase_uq.fitting.refit.refit` makes of it without training frames
    again         what `fit` makes, on the old training frames and the hot ones that the potential was trained on

and judged on frames that nothing was trained or calibrated on, of 300 K and of the hotter kind: negative
log-likelihood of a force component (forces in eV/Å), mean z², Spearman's correlation of uncertainty and force error.
Calibration frames are of 300 K, or of both temperatures (not for acetylacetone). Which one `refit` keeps with training
frames is marked. Writes OUT.md.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from compare import N_NEW, TRAININGS, fine_tune, some

from ase_uq import embedded, fit, load_backend, metrics, read_frames
from ase_uq.backends.base import Backend
from ase_uq.diagnostics.drift import drift
from ase_uq.fitting.refit import FITTED_AGAIN, RECALIBRATED, refit
from ase_uq.uncertainty_model.model import UncertaintyModel

HEAD = (
    "| training | calibrated on | moved within elements | way | uncertainties | NLL 300 K | NLL {0} K | z² 300 K "
    "| z² {0} K | Spearman 300 K | Spearman {0} K |\n|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)
# Rate, epochs, old frames, as in benchmarks/compare.py; its potential costs several times as much an epoch.
OF_ACETYLACETONE = ((1e-3, 1, 0), (1e-3, 2, 0))


@dataclass(frozen=True)
class System:
    """A potential, and its frames.

    Args:
        name: Of the potential, in a sentence.
        spec: The potential before it is trained further.
        kelvin: Of the hot frames; the cold ones are of 300 K.
        trainings: Rate, epochs and number of old frames of each.
        train: Frames of 300 K that it was trained on; every third one is fitted on.
        hot: Frames that it is trained further on.
        calibration: Frames of 300 K.
        hot_calibration: Hot frames, for calibration on both temperatures as well; none to leave that out.
        held_out: Test frames by their kind.
    """

    name: str
    spec: str
    kelvin: int
    trainings: tuple[tuple[float, int, int], ...]
    train: list[Atoms]
    hot: list[Atoms]
    calibration: list[Atoms]
    hot_calibration: list[Atoms]
    held_out: dict[str, list[Atoms]]


def malonaldehyde() -> System:
    cold, calibration, test, hot = (
        read_frames(embedded.path(f"{name}.xyz"))
        for name in ("train_300K", "calibration_300K", "test_300K", "test_900K")
    )
    return System(
        name="the embedded MACE",
        spec="embedded:mace",
        kelvin=900,
        trainings=TRAININGS,
        train=cold,
        hot=hot[:N_NEW],
        calibration=calibration[::2],
        hot_calibration=hot[N_NEW:-120],
        held_out={"300 K": test[::3], "900 K": hot[-120:]},
    )


def acetylacetone(shared: Path) -> System:
    cold, calibration, test, extra, hot = (
        read_frames(shared / "data" / "acac" / f"{name}.xyz")
        for name in ("train_300K", "calib_300K", "test_id_300K", "extra_train_600K", "ood_md_600K")
    )
    return System(
        name="the MACE of acetylacetone",
        spec=f"mace:{shared / 'models' / 'mace_acac.model'}",
        kelvin=600,
        trainings=OF_ACETYLACETONE,
        train=cold[::2],
        hot=extra[:N_NEW],
        calibration=calibration[::3],
        hot_calibration=[],
        held_out={"300 K": test[::5], "600 K": hot[::8]},
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--combined", type=int, nargs="*", default=[1, 3], help="trainings to do with all methods")
    parser.add_argument("--acac", type=Path, metavar="FOLDER", help="acetylacetone instead, from this folder")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refit"))
    arguments = parser.parse_args()
    system = malonaldehyde() if arguments.acac is None else acetylacetone(arguments.acac)
    lines: dict[str, list[str]] = {}
    every = {"bll": range(len(system.trainings)), "bll, pdrum and kernel, combined": arguments.combined}
    for title, chosen in every.items():
        methods = ["bll"] if title == "bll" else ["bll", "pdrum", "kernel"]
        if not chosen:
            continue
        lines[title] = [HEAD.format(system.kelvin)]
        old = load_backend(system.spec)
        left = fit(old, system.train[::3], system.calibration, methods=methods, progress=False)
        for number in chosen:
            for row in rows(system, number, old, left):
                lines[title].append(row)
                print(row, file=sys.stderr)
            write(arguments.out, system, lines, arguments.acac)
    print(arguments.out.with_suffix(".md").read_text())


def write(out: Path, system: System, lines: Mapping[str, Sequence[str]], shared: Path | None) -> None:
    command = "python benchmarks/refit.py" + ("" if shared is None else f" --acac {shared} --combined")
    text = [
        "# Uncertainty models of a potential that was trained further",
        "",
        f"`{command}`: {system.name}, trained further on {len(system.hot)} frames of {system.kelvin} K. *Moved within "
        "elements*, and *way*, how far to where nothing is known the old heads see them, are of the calibration "
        "frames. Bold: what `refit` keeps if it has the training frames; the likelihoods that it decides by, in "
        "brackets, are of left-out calibration frames.",
    ]
    for title, rows_of in lines.items():
        text += ["", f"## {title}", "", *rows_of]
    out.with_suffix(".md").write_text("\n".join(text) + "\n")


def rows(system: System, number: int, old: Backend, left: UncertaintyModel) -> list[str]:
    """The rows of one training: of a potential and its uncertainty model."""
    from mace.calculators import MACECalculator

    rate, epochs, n_old = system.trainings[number]
    name = f"rate {rate:g}, {epochs} epoch{'s' * (epochs > 1)}{', half old frames' if n_old else ''}"
    sets = {"300 K": system.calibration}
    if system.hot_calibration:
        sets[f"300 and {system.kelvin} K"] = system.calibration + system.hot_calibration
    methods = list(left.methods)
    model = copy.deepcopy(old.calculator.models[0])
    fine_tune(model, system.hot + (some(system.train, n_old) if n_old else []), rate, epochs)
    new = load_backend(MACECalculator(models=[model], device="cpu", default_dtype="float64"))
    found = []
    for kind, frames in sets.items():
        train = system.train[::3] + system.hot
        moved = drift(old, new, frames, progress=False)
        recalibrated = refit(left, new, frames, progress=False)
        both = refit(left, new, frames, train=train, methods=methods, progress=False)
        again = fit(new, train, frames, methods=methods, progress=False)
        told = [name, kind, f"{moved.moved_within:.2f}", f"{recalibrated.way:.2f}"]
        for what, each in (("left", left), (RECALIBRATED, recalibrated.model), (FITTED_AGAIN, again)):
            if what == "left" and kind != "300 K":
                continue
            word = f"**{what}**" if what == both.kept else what
            if what in both.likelihoods:
                word += f" ({both.likelihoods[what]:.3f})"
            found.append(f"| {' | '.join([*told, word, *worth(new, each, system.held_out)])} |")
            told = [""] * len(told)
    return found


def worth(backend: Backend, model: UncertaintyModel, frames: Mapping[str, Sequence[Atoms]]) -> list[str]:
    """NLL of each set, z² of each, Spearman's correlation of each."""
    found = []
    for each in frames.values():
        forward_pass = backend.forward(backend.collate(each))
        assert forward_pass.forces is not None
        std = model.apply(forward_pass)["forces_uncertainty"].cpu().numpy()
        errors = np.concatenate([atoms.arrays["REF_forces"] for atoms in each]) - forward_pass.forces.cpu().numpy()
        nll = 0.5 * np.mean(np.log(2 * np.pi * std**2) + (errors / std) ** 2)
        norms = (np.linalg.norm(values, axis=1) for values in (errors, std))
        found.append((nll, np.mean((errors / std) ** 2), metrics.spearman(*norms)))
    return [f"{of_set[which]:.2f}" for which in range(3) for of_set in found]


if __name__ == "__main__":
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the potentials' packages
        main()
