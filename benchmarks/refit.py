"""What becomes of an uncertainty model when its potential is trained further: left, calibrated again, fitted again.

    python benchmarks/refit.py [--combined 1 3] [--out benchmarks/results/refit]

The embedded MACE of malonaldehyde is trained further on frames of 900 K, as in benchmarks/compare.py, by several rates
and numbers of epochs. An uncertainty model that was fitted before, on frames of 300 K, is then

    left          used as it was, which ase_uq refuses otherwise
    recalibrated  what `ase_uq.fitting.refit.refit` makes of it without training frames
    again         what `fit` makes, on the old training frames and those of 900 K that the potential was trained on

and judged on frames that nothing was trained or calibrated on, of 300 K and of 900 K: negative log-likelihood of a
force component (forces in eV/Å), mean z², Spearman's correlation of uncertainty and force error. Calibration frames are
of 300 K, or of both temperatures. Which one `refit` keeps with training frames is marked. Writes OUT.md.
"""

import argparse
import copy
import sys
import warnings
from collections.abc import Mapping, Sequence
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
    "| training | calibrated on | moved within elements | way | uncertainties | NLL 300 K | NLL 900 K | z² 300 K "
    "| z² 900 K | Spearman 300 K | Spearman 900 K |\n|---|---|---:|---:|---|---:|---:|---:|---:|---:|---:|"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--combined", type=int, nargs="*", default=[1, 3], help="trainings to do with all methods")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/refit"))
    arguments = parser.parse_args()
    lines: dict[str, list[str]] = {}
    every = {"bll": range(len(TRAININGS)), "bll, pdrum and kernel, combined": arguments.combined}
    for title, chosen in every.items():
        methods = ["bll"] if title == "bll" else ["bll", "pdrum", "kernel"]
        lines[title] = [HEAD]
        for number in chosen:
            for row in rows(number, methods):
                lines[title].append(row)
                print(row, file=sys.stderr)
            write(arguments.out, lines)
    print(arguments.out.with_suffix(".md").read_text())


def write(out: Path, lines: Mapping[str, Sequence[str]]) -> None:
    text = [
        "# Uncertainty models of a potential that was trained further",
        "",
        "`python benchmarks/refit.py`: the embedded MACE, trained further on 120 frames of 900 K. *Moved within "
        "elements*, and *way*, how far to where nothing is known the old heads see them, are of the calibration "
        "frames. Bold: what `refit` keeps if it has the training frames; the likelihoods that it decides by, in "
        "brackets, are of left-out calibration frames.",
    ]
    for title, rows_of in lines.items():
        text += ["", f"## {title}", "", *rows_of]
    out.with_suffix(".md").write_text("\n".join(text) + "\n")


def rows(number: int, methods: list[str]) -> list[str]:
    """The rows of one training."""
    from mace.calculators import MACECalculator

    rate, epochs, n_old = TRAININGS[number]
    name = f"rate {rate:g}, {epochs} epoch{'s' * (epochs > 1)}{', half old frames' if n_old else ''}"
    cold, hot = (read_frames(embedded.path(file)) for file in ("train_300K.xyz", "test_900K.xyz"))
    calibration = read_frames(embedded.path("calibration_300K.xyz"))[::2]
    sets = {"300 K": calibration, "300 and 900 K": calibration + hot[N_NEW:-120]}
    held_out = {"300 K": read_frames(embedded.path("test_300K.xyz"))[::3], "900 K": hot[-120:]}
    old = load_backend("embedded:mace")
    left = fit(old, cold[::3], calibration, methods=methods, progress=False)
    model = copy.deepcopy(old.calculator.models[0])
    fine_tune(model, hot[:N_NEW] + (some(cold, n_old) if n_old else []), rate, epochs)
    new = load_backend(MACECalculator(models=[model], device="cpu", default_dtype="float64"))
    found = []
    for kind, frames in sets.items():
        train = cold[::3] + hot[:N_NEW]
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
            found.append(f"| {' | '.join([*told, word, *worth(new, each, held_out)])} |")
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
