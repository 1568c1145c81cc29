"""Our figures beside published ones, on the same kind of data, with what differs.

    python benchmarks/published.py [CASE ...] [--data ../shared/data] [--models ../shared/models ...] [--frames 200]
                                   [--methods bll pdrum kernel] [--out benchmarks/results/published] [--device cpu]

A case is a potential with training and calibration frames: MACE for a molecule of rMD17, which
`benchmarks/train_committee.py rmd17_MOLECULE OUT_FOLDER --seeds 1` trains, and SevenNet-0 on frames of MPtrj. An
uncertainty model is fitted on the former, calibrated on the latter, and judged in distribution and, for molecules, on
all other molecules whose elements the potential knows.

Our figure is Spearman's correlation of the uncertainty of an atom with the norm of its force error. The papers are that
of P-DRUM (arXiv 2509.02927) and that of the Bayesian last layer (BLL) of orb-v3. The kind of data is the same;
potentials and splits are not, so that a difference of a few hundredths says nothing. Cases whose potential is in no
folder of --models are named and left out. Writes OUT.md.
"""

import argparse
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ase import Atoms
from quality import frames_of, known_to, spec_of

from ase_uq import Predictor, UQWarning, fit, load_backend, metrics
from ase_uq.diagnostics.evaluate import evaluate
from ase_uq.diagnostics.samples import Sample

ID, OTHERS = "in distribution", "all other molecules"


@dataclass(frozen=True)
class Published:
    """Figures of a paper.

    Args:
        table: Where they stand.
        spearman: By the paper's names of estimators.
        mae: Of a force component, eV/Å; NaN where the paper's is not known here.
        differs: What differs from ours.
    """

    table: str
    spearman: Mapping[str, float]
    differs: str
    mae: float = float("nan")

    @property
    def text(self) -> str:
        return f"{self.table}: " + ", ".join(f"{name} {value:g}" for name, value in self.spearman.items())


@dataclass(frozen=True)
class Case:
    """A potential, its frames, and what was published on such frames.

    Args:
        folder: Of the frames, in --data.
        potential: A file in --models, or a SPEC.
        published: By the split that it belongs to.
        molecule: The `config_type` of frames that are in distribution; empty for all.
    """

    folder: str
    potential: str
    published: Mapping[str, Sequence[Published]]
    molecule: str = ""


DRUM_NAMES = ("ensemble of 5", "MC dropout", "GMM", "kNN", "norm", "diff")
DRUM_DIFFERS = (
    "the same architecture, ours trained on 300 frames of rMD17 for 64 epochs with one seed; their frames, how many "
    "they are, and their errors are not known here; `pdrum` is our `norm`, calibrated as all of ours are, on 200 frames"
)
BLL_DIFFERS = (
    "MACE from scratch on 300 frames with one seed; theirs is orb-v3 direct, pretrained on OMat24, on the splits of "
    "index 1, a mean over five molecules and over seeds"
)


def rmd17(molecule: str, drum: Sequence[float]) -> Case:
    """A molecule of rMD17; `drum` are the force columns of the P-DRUM paper, if it has the molecule."""
    of_bll = {"BLL": 0.611, "GP-rbf": 0.538, "GP-5/2": 0.555, "LoRA ensemble": 0.611}
    of_others = {"BLL": 0.821, "GP-rbf": 0.581, "GP-5/2": 0.550, "LoRA ensemble": 0.702}
    table = "BLL, Table 2, rMD17"
    near = [Published(f"P-DRUM, {molecule}", dict(zip(DRUM_NAMES, drum, strict=True)), DRUM_DIFFERS)] if drum else []
    near.append(Published(f"{table} ID", of_bll, BLL_DIFFERS, 0.030))
    far = f"{BLL_DIFFERS}; the other molecules are ours as listed, theirs the other four of five"
    published = {ID: near, OTHERS: [Published(f"{table} OOD", of_others, far, 0.259)]}
    return Case("rmd17_crossmol", f"rmd17_{molecule}_1.model", published, molecule)


CASES = {
    "malonaldehyde": rmd17("malonaldehyde", (0.69, 0.27, 0.68, 0.65, 0.69, 0.57)),
    "uracil": rmd17("uracil", (0.68, 0.24, 0.58, 0.52, 0.67, 0.53)),
    "toluene": rmd17("toluene", ()),
    "MPtrj": Case(
        "mp_pbe",
        "sevennet:7net-0",
        {
            ID: [
                Published(
                    "BLL, Table 2, MPtrj ID",
                    {"BLL": 0.603, "BLIP": 0.504, "LoRA ensemble": 0.579, "SWAG": 0.329},
                    "SevenNet-0 as it is: it was trained on MPtrj, perhaps on our test frames too; 200 random frames "
                    "for the fit, 125 to calibrate and 125 to test. Theirs is orb-v3 direct, pretrained on OMat24, "
                    "trained on frames of MPtrj that are nearly relaxed, and tested on such of other materials",
                    0.038,
                )
            ]
        },
    ),
}
NO_COUNTERPART = "salicylic acid, Ni3Al and HME21 of P-DRUM, TM23 and Alexandria of BLL: no such frames here"


@dataclass(frozen=True)
class Row:
    """Our figures on one split."""

    case: str
    split: str
    n_frames: int
    n_atoms: int
    mae: float
    spearman: Mapping[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"of {', '.join(CASES)}; all by default")
    parser.add_argument("--data", type=Path, default=Path("../shared/data"))
    parser.add_argument("--models", type=Path, nargs="+", default=[Path("../shared/models")])
    parser.add_argument("--frames", type=int, default=200, help="most frames of a split, evenly spread over it")
    parser.add_argument("--methods", nargs="+", default=["bll", "pdrum", "kernel"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/published"))
    parser.add_argument("--device", default="")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.cases if name not in CASES]:
        parser.error(f"there is no case {unknown[0]!r}. There are: {', '.join(CASES)}.")
    rows: list[Row] = []
    left_out = [NO_COUNTERPART]
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    for name in arguments.cases or CASES:
        try:
            of_case = list(rows_of(name, CASES[name], arguments))
        except FileNotFoundError as error:
            left_out.append(f"{name}: {error}")
            print(left_out[-1], file=sys.stderr)
            continue
        rows += of_case
        for row in of_case:
            print(row, flush=True)
        arguments.out.with_suffix(".md").write_text(markdown(rows, left_out, arguments))  # what was found stays
    text = markdown(rows, left_out, arguments)
    arguments.out.with_suffix(".md").write_text(text)
    print(text)


def rows_of(name: str, case: Case, arguments: argparse.Namespace) -> Iterator[Row]:
    """Our figures on every split of one case.

    Raises:
        FileNotFoundError: The potential or the frames are not there.
    """
    splits = splits_of_case(case, arguments.data)
    backend = load_backend(spec_of(case.potential, arguments.models), device=arguments.device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # that a method says nothing is what the table is for
        model = fit(backend, splits.pop("train"), splits.pop("calib"), methods=arguments.methods)
        predictor = Predictor(backend, model)
        others: dict[str, list[Sample]] = {}
        for split, frames in splits.items():
            usable = evenly(known_to(backend, frames), arguments.frames)
            if not usable:
                continue
            samples = forces_of(predictor, usable)
            yield row_of(name, split, {method: [sample] for method, sample in samples.items()})
            if split != ID:
                for method, sample in samples.items():
                    others.setdefault(method, []).append(sample)
    if others:
        yield row_of(name, OTHERS, others)


def splits_of_case(case: Case, data: Path) -> dict[str, list[Atoms]]:
    """Frames by split: `train`, `calib`, in distribution, and every other molecule by its name."""
    found = frames_of(case.folder, data)
    tests = [atoms for split, frames in found.items() if split.startswith("test") for atoms in frames]
    if not case.molecule:
        return {"train": found["train"], "calib": found["calib"], ID: tests}
    own = {split: [a for a in found[split] if a.info["config_type"] == case.molecule] for split in ("train", "calib")}
    splits = {**own, ID: [atoms for atoms in tests if atoms.info["config_type"] == case.molecule]}
    far = [atoms for split, frames in found.items() if split.startswith("ood") for atoms in frames]
    for atoms in [*tests, *far]:
        if (molecule := atoms.info["config_type"]) != case.molecule:
            splits.setdefault(molecule, []).append(atoms)
    return splits


def evenly(frames: Sequence[Atoms], n_most: int) -> list[Atoms]:
    return list(frames[:: max(1, -(-len(frames) // n_most))])


def forces_of(predictor: Predictor, frames: list[Atoms]) -> dict[str, Sample]:
    """Residuals and standard deviations of forces by estimator."""
    assessed = evaluate(predictor, frames, n_bootstrap=0, progress=False)
    return {method: sample for (method, quantity), sample in assessed.samples.items() if quantity == "forces"}


def row_of(case: str, split: str, samples: Mapping[str, Sequence[Sample]]) -> Row:
    """Figures over all samples of an estimator together."""
    first = next(iter(samples.values()))
    residuals = np.concatenate([sample.residuals for sample in first])
    return Row(
        case=case,
        split=split,
        n_frames=sum(len(np.unique(sample.frame)) for sample in first),
        n_atoms=len(residuals),
        mae=metrics.mae(residuals, np.zeros_like(residuals)),
        spearman={method: spearman(parts) for method, parts in samples.items()},
    )


def spearman(parts: Sequence[Sample]) -> float:
    errors, said = (
        np.concatenate(values) for values in zip(*((p.errors, p.uncertainties) for p in parts), strict=True)
    )
    return metrics.spearman(errors, said)


def markdown(rows: Sequence[Row], left_out: Sequence[str], arguments: argparse.Namespace) -> str:
    estimators = list(dict.fromkeys(method for row in rows for method in row.spearman))
    lines = [
        "# Beside published figures",
        "",
        f"`python benchmarks/published.py --methods {' '.join(arguments.methods)} --frames {arguments.frames}`: "
        "Spearman of the uncertainty of an atom with the norm of its force error, and the mean absolute error of force "
        "components in meV/Å, ours and, where it is known, theirs. Nothing was calibrated on a split that is judged. "
        "Whether the papers rank atoms or components, and molecules together or one by one, is not known here.",
        "",
        f"| trained on | judged on | frames | atoms | MAE | {' | '.join(estimators)} | published | their MAE "
        "| what differs |",
        "|---|---|---:|---:|---:|" + "---:|" * len(estimators) + "---|---:|---|",
    ]
    for row in rows:
        ours = [row.case, row.split, f"{row.n_frames}", f"{row.n_atoms}", f"{1e3 * row.mae:.0f}"]
        ours += [f"{row.spearman[name]:.2f}" if name in row.spearman else "" for name in estimators]
        beside = CASES[row.case].published.get(row.split, [])
        for place, published in enumerate(beside or [None]):
            shown = ours if place == 0 else [""] * len(ours)
            lines.append(f"| {' | '.join([*shown, *theirs(published)])} |")
    lines += [f"\nLeft out: {text}." for text in left_out]
    return "\n".join(lines) + "\n"


def theirs(published: Published | None) -> list[str]:
    if published is None:
        return ["", "", ""]
    return [published.text, "" if np.isnan(published.mae) else f"{1e3 * published.mae:.0f}", published.differs]


if __name__ == "__main__":
    main()
