"""Whether error bars of energy differences are right: paths, pairs of frames, and defects, beside their true errors.

    python benchmarks/differences.py [SET ...] [--data ../shared/data] [--models ../shared/models ...] [--pairs 60]
                                     [--members 256] [--out benchmarks/results/differences]

    path      every image of a path above its first: of `*_energyonly.xyz`, and of the proton of malonaldehyde that goes
              to the other oxygen, and of its O-H group that turns away, by GFN2-xTB as are the embedded frames
    pairs     two frames of one split and composition, drawn at random
    defect    a frame of a vacancy, against as many atoms of a crystal of the test frames

Beside the error bar from shared members stand the one that takes errors of energies for independent, and the spread of
a committee of equals where there is one (not calibrated, at the cost of as many potentials). Uncertainties are those of
the Bayesian last layer, calibrated on frames in distribution. Writes OUT.md, and OUT.png: errors along the paths.
"""

import argparse
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from ase.io import read
from ase.mep import NEB
from matplotlib import pyplot as plt
from quality import SETS, found_in, frames_of, known_to, spec_of
from tblite.ase import TBLite

from ase_uq import Predictor, UQWarning, embedded, fit, load_backend, propagation
from ase_uq.backends.base import Backend
from ase_uq.io.results import annotated

Terms = list[tuple[float, int]]  # coefficients and numbers of frames
BULK = "test_id"


@dataclass(frozen=True)
class Case:
    """Differences of one kind: true errors and standard deviations, eV; the committee's are NaN without one."""

    set: str
    name: str
    errors: np.ndarray
    ours: np.ndarray
    independent: np.ndarray
    committee: np.ndarray

    def row(self) -> str:
        texts = [text_of(self.errors, std) for std in (self.ours, self.independent, self.committee)]
        return f"| {self.set} | {self.name} | {len(self.errors)} | {rms(self.errors):.1f} | {' | '.join(texts)} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sets", nargs="*", metavar="SET", help=f"of {', '.join(SETS)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--pairs", type=int, default=60, help="most differences of a split")
    parser.add_argument("--members", type=int, default=256)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/differences"))
    arguments = parser.parse_args()
    cases: list[Case] = []
    for name in arguments.sets or SETS:
        try:
            cases += cases_of(name, arguments)
        except FileNotFoundError as error:
            print(f"{name} is left out: {error}", file=sys.stderr)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.with_suffix(".md").write_text(text := markdown(cases, arguments))
    print(text)
    if paths := [case for case in cases if case.name.startswith("path")]:
        draw(paths).savefig(arguments.out.with_suffix(".png"), dpi=110)


def cases_of(name: str, arguments: argparse.Namespace) -> list[Case]:
    data = SETS[name]
    labelled = frames_of(data.folder, arguments.data)
    for path in sorted((arguments.data / data.folder).glob("ood*_energyonly.xyz")):
        labelled[path.stem] = read(path, ":")  # pyright: ignore[reportArgumentType]
    if data.folder == "embedded":
        labelled |= paths_of_malonaldehyde()
    backend = load_backend(spec_of(data.potential, arguments.models))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        model = fit(backend, labelled.pop("train"), labelled.pop("calib"), methods=["bll"])
    predictor = Predictor(backend, model, ensemble=arguments.members)
    equals = []
    if data.committee:
        files = sorted(found_in(arguments.models, data.potential).parent.glob(data.committee))
        equals = [load_backend(f"mace:{file}") for file in files]
    cases = []
    for title, frames, terms in kinds(labelled, backend, arguments.pairs):
        needed = sorted({frame for difference in terms for _, frame in difference})
        predictions = predictor.predict([frames[number] for number in needed])
        calculated = {
            n: annotated(frames[n], prediction.results) for n, prediction in zip(needed, predictions, strict=True)
        }
        energies = {n: energies_of(equals, frames[n]) for n in needed}
        errors, ours, independent, committee = [], [], [], []
        for difference in terms:
            found = propagation.difference(*((factor, calculated[number]) for factor, number in difference))
            true = sum(factor * frames[number].info["REF_energy"] for factor, number in difference)
            errors.append(found.value - true)
            ours.append(found.std)
            independent.append(found.independent)
            members = sum(factor * energies[number] for factor, number in difference)
            committee.append(np.std(members, ddof=1) if len(equals) > 1 else np.nan)
        cases.append(Case(name, title, *map(np.array, (errors, ours, independent, committee))))
    return cases


def paths_of_malonaldehyde() -> dict[str, list[Atoms]]:
    """Images from the embedded structure to two others, between them by IDPP, with energies of GFN2-xTB."""
    start = read(embedded.path("malonaldehyde.xyz"))
    assert isinstance(start, Atoms)
    start = Atoms(start.numbers, start.positions)
    mirrored, turned = start.copy(), start.copy()
    # Mirrored, each atom is where its partner was; only the proton, atom 5, has moved.
    mirrored.positions = (start.positions * [-1, 1, 1])[[4, 3, 2, 1, 0, 5, 8, 7, 6]]
    turned.rotate(180, start.positions[0] - start.positions[1], center=start.positions[0])
    turned.positions[:5], turned.positions[6:] = start.positions[:5], start.positions[6:]
    found = {}
    for name, end in (("proton transfer", mirrored), ("turning O-H", turned)):
        images = [start.copy(), *(start.copy() for _ in range(9)), end]
        NEB(images).interpolate("idpp")
        for image in images:
            image.info["REF_energy"] = TBLite(method="GFN2-xTB", verbosity=0).get_potential_energy(image)
        found[f"ood_{name}_energyonly"] = images
    return found


def kinds(
    splits: Mapping[str, Sequence[Atoms]], backend: Backend, most: int
) -> list[tuple[str, list[Atoms], list[Terms]]]:
    """Title, frames and differences of them, of every kind that a set has."""
    found = []
    rng = np.random.default_rng(0)
    for split, labelled in splits.items():
        frames = known_to(backend, labelled)
        if not frames:
            continue
        if split.endswith("energyonly"):
            title = f"path: {split.removeprefix('ood_').removesuffix('_energyonly')}"
            found.append((title, frames, [[(1.0, n), (-1.0, 0)] for n in range(1, len(frames))]))
            continue
        formulas = np.array([atoms.get_chemical_formula() for atoms in frames])
        pairs = [(i, j) for i in range(len(frames)) for j in range(i) if formulas[i] == formulas[j]]
        chosen = [pairs[k] for k in rng.permutation(len(pairs))[:most]]
        if chosen:
            found.append((f"pairs: {split}", frames, [[(1.0, i), (-1.0, j)] for i, j in chosen]))
        if "vacancy_solid" in split and BULK in splits:
            crystal = splits[BULK][0]
            bulk = [(1.0, n) for n in range(min(most, len(frames)))]
            terms = [[one, (-len(frames[one[1]]) / len(crystal), len(frames))] for one in bulk]
            found.append(("defect: vacancy", [*frames, crystal], terms))
    return found


def energies_of(equals: Sequence[Backend], atoms: Atoms) -> np.ndarray:
    """(n_members,) energies of the committee, eV."""
    return np.array([float(one.forward(one.collate([atoms])).energy) for one in equals])


def rms(values: np.ndarray) -> float:
    """meV"""
    return 1e3 * float(np.sqrt(np.mean(values**2)))


def text_of(errors: np.ndarray, std: np.ndarray) -> str:
    if np.isnan(std).any():
        return ""
    return f"{rms(std):.1f}, {np.mean(errors**2) / np.mean(std**2):.2f}, {np.mean(np.abs(errors) <= 1.96 * std):.2f}"


def markdown(cases: Sequence[Case], arguments: argparse.Namespace) -> str:
    lines = [
        "# Error bars of energy differences",
        "",
        f"`python benchmarks/differences.py --pairs {arguments.pairs} --members {arguments.members}`: root mean square "
        "of the true error and of the standard deviation in meV, the square of the first over that of the second, and "
        "the share of true errors within 1.96 standard deviations (0.95 if these are right).",
        "",
        "| set | differences | number | true error | shared members | as if independent | committee |",
        "|---|---|---:|---:|---|---|---|",
        *(case.row() for case in cases),
        "",
        "| error bar | cases out of distribution | ratio in 0.5 to 2 | in 0.33 to 3 | share within 1.96 σ, mean |",
        "|---|---:|---:|---:|---:|",
    ]
    far = [case for case in cases if not case.name.startswith("pairs: test")]
    for title, which in (("shared members", "ours"), ("as if independent", "independent"), ("committee", "committee")):
        known = [(case.errors, getattr(case, which)) for case in far if not np.isnan(getattr(case, which)).any()]
        if not known:
            continue
        ratios = np.array([np.mean(errors**2) / np.mean(std**2) for errors, std in known])
        share = np.mean([np.mean(np.abs(errors) <= 1.96 * std) for errors, std in known])
        inside = [int(((ratios >= low) & (ratios <= high)).sum()) for low, high in ((0.5, 2), (0.33, 3))]
        lines.append(f"| {title} | {len(known)} | {inside[0]} | {inside[1]} | {share:.2f} |")
    return "\n".join(lines) + "\n"


def draw(paths: Sequence[Case]) -> plt.Figure:
    """True errors along each path, within the error bars of shared members and of independent errors."""
    columns = min(4, len(paths))
    rows = -(-len(paths) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(3.6 * columns, 3.2 * rows), layout="constrained", squeeze=False)
    for ax in axes.flat[len(paths) :]:
        ax.set_axis_off()
    for ax, case in zip(axes.flat, paths, strict=False):
        image = np.arange(1, len(case.errors) + 1)
        for std, colour, label in ((case.independent, "C7", "as if independent"), (case.ours, "C0", "shared members")):
            ax.fill_between(image, -1960 * std, 1960 * std, color=colour, alpha=0.3, lw=0, label=label)
        ax.plot(image, 1e3 * case.errors, "k.-", lw=0.8, label="true error")
        ax.axhline(0, color="k", lw=0.5)
        ax.set(title=f"{case.set}\n{case.name}", xlabel="image", ylabel="error of E - E(first), meV")
    axes[0][0].legend(title="1.96 σ", fontsize="small")
    return figure


if __name__ == "__main__":
    main()
