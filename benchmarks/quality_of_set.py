"""How good every method is on a data set, in and out of distribution, beside a committee: one table.

    python benchmarks/quality_of_set.py ../shared/data/acac POTENTIAL.model [--committee 'MEMBERS_*.model']
                                 [--out benchmarks/results/quality_acac] [--block 5] [--tolerance 0.3]

The folder holds train*.xyz (or ref*.xyz), calib*.xyz, test*.xyz and ood*.xyz, labelled. Everything is fitted on the
first, calibrated on the second, and only looked at on the others. POTENTIAL is a MACE .model file, or a SPEC.

The committee is judged on the errors of POTENTIAL, which should be one of its members: the standard deviation over
the members is calibrated like everything else. What its mean would gain in accuracy stands in a line of its own.
Splits with elements that POTENTIAL does not know are named and skipped. Writes OUT.md, OUT.csv and OUT.png.
"""

import argparse
import csv
import sys
import time
import warnings
from collections.abc import Sequence
from dataclasses import astuple, fields
from pathlib import Path

import numpy as np
import torch
from ase import Atoms
from matplotlib import pyplot as plt
from matplotlib.ticker import NullFormatter, ScalarFormatter

from ase_uq import Predictor, UncertaintyModel, UQWarning, fit, load_backend, read_frames
from ase_uq.backends.base import Backend
from ase_uq.calibration import Calibrator, Residuals, fit_calibrator
from ase_uq.communicator import Serial
from ase_uq.diagnostics.assessment import Assessment
from ase_uq.diagnostics.evaluate import assess, evaluate
from ase_uq.diagnostics.samples import Sample, largest_of_frames
from ase_uq.diagnostics.table import MetricValue
from ase_uq.errors import InputError
from ase_uq.io.labels import labels_of
from ase_uq.stream.labelled import LabelledStream

DEFAULT = ("bll", "pdrum", "kernel")
OTHERS = ("mahalanobis", "knn", "gmm", "pops")
COMMITTEE = "committee"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("potential")
    parser.add_argument("--committee", default="", help="pattern of the members' files, in quotes")
    parser.add_argument("--others", nargs="*", default=list(OTHERS), help="methods beside the default ones")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--block", type=int, default=5, help="frames that are resampled together")
    parser.add_argument("--tolerance", type=float, default=0.3, help="eV/Å; a larger force error is bad")
    parser.add_argument("--device", default="")
    arguments = parser.parse_args()
    out = arguments.out or Path("benchmarks/results") / f"quality_{arguments.data.name}"
    torch.manual_seed(0)
    spec = f"mace:{arguments.potential}" if arguments.potential.endswith(".model") else arguments.potential
    backend = load_backend(spec, device=arguments.device)
    splits = splits_of(arguments.data)
    models, seconds = fit_all(backend, splits["train"], splits["calib"], arguments.others)
    committee = Committee(arguments.committee, backend, splits["calib"]) if arguments.committee else None
    tests, skipped = {}, []
    for name, frames in splits.items():
        if name in ("train", "calib"):
            continue
        try:
            tests[name] = assessment(backend, models, committee, frames, arguments.block, arguments.tolerance)
        except InputError as error:
            skipped.append(f"{name} was skipped: {error}")
    text = markdown(arguments.data.name, tests, models, committee, seconds, skipped, arguments)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.with_suffix(".md").write_text(text)
    write_csv(out.with_suffix(".csv"), tests)
    draw(tests).savefig(out.with_suffix(".png"), dpi=150)
    print(text)


def splits_of(folder: Path) -> dict[str, list[Atoms]]:
    """Labelled frames by the name of their file; several training or calibration files are one."""
    found: dict[str, list[Atoms]] = {}
    for prefix in ("train", "ref", "calib", "test", "ood"):
        for path in sorted(folder.glob(f"{prefix}*.xyz")):
            frames = [atoms for atoms in read_frames(path) if labels_of(atoms).forces is not None]
            name = {"train": "train", "ref": "train", "calib": "calib"}.get(prefix, path.stem)
            if frames:
                found.setdefault(name, []).extend(frames)
    missing = {"train", "calib"} - found.keys()
    if missing:
        sys.exit(f"{folder} has no {' and no '.join(sorted(missing))}*.xyz with forces.")
    return found


def fit_all(
    backend: Backend, train: list[Atoms], calibration: list[Atoms], others: Sequence[str]
) -> tuple[list[UncertaintyModel], dict[str, float]]:
    """The default fit, the other methods each alone, and the seconds of the former beside those of a plain pass."""
    start = time.perf_counter()
    for _ in LabelledStream(backend, [*train, *calibration], Serial(), batch_atoms=1000, forces=True, title="plain"):
        pass
    plain = time.perf_counter() - start
    start = time.perf_counter()
    models = [fit(backend, train, calibration, methods=DEFAULT)]
    seconds = {"plain pass": plain, "default fit": time.perf_counter() - start}
    start = time.perf_counter()
    fit(backend, train, calibration, methods=[name for name in DEFAULT if name != "pdrum"])
    seconds["without pdrum"] = time.perf_counter() - start
    for name in others:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UQWarning)  # that a method says nothing is what the table is for
            models.append(fit(backend, train, calibration, methods=[name]))
    return models, seconds


class Committee:
    """The standard deviation over members, calibrated for the errors of one potential.

    Args:
        pattern: Of the members' files.
        backend: Of the potential.
        calibration: Frames.
    """

    def __init__(self, pattern: str, backend: Backend, calibration: list[Atoms]) -> None:
        self._members = load_backend(f"mace:{pattern}", device=str(backend.device))
        self.n_members = self._members.calculator.num_models
        residuals, variance, _, frame = self._observe(backend, calibration)
        self.calibrator: Calibrator = fit_calibrator(
            Residuals(variance[:, None], (residuals**2).sum(1), 3, frame)
        ).calibrator

    def sample(self, backend: Backend, frames: list[Atoms]) -> tuple[Sample, float]:
        """Residuals of the potential beside the committee's standard deviations, and the RMSE of its mean."""
        residuals, variance, own, frame = self._observe(backend, frames)
        std = self.calibrator.variance(torch.from_numpy(variance[:, None])).sqrt().numpy()
        numbers = np.concatenate([atoms.numbers for atoms in frames])
        std = np.repeat(std[:, None], 3, axis=1)
        return Sample(residuals, std, frame, numbers), float(np.sqrt(np.mean(own**2)))

    def _observe(self, backend: Backend, frames: list[Atoms]) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
        """Residuals of the potential, variance of a component over the members, residuals of their mean, frames."""
        parts, n_frames = [], 0
        streams = [
            LabelledStream(who, frames, Serial(), batch_atoms=1000, forces=True, title=title)
            for who, title in ((backend, ""), (self._members, "committee"))
        ]
        for (own, targets), (found, _) in zip(*streams, strict=True):
            assert own.forces is not None
            assert found.forces is not None
            assert found.members is not None
            assert found.members.forces is not None
            assert targets.forces is not None
            columns = (
                targets.forces - own.forces.double(),
                found.members.forces.double().var(0).mean(1),
                targets.forces - found.forces.double(),
                own.frame_of_atom + n_frames,
            )
            parts.append([column.cpu().numpy() for column in columns])
            n_frames += own.n_frames
        residuals, variance, of_mean, owner = (np.concatenate(column) for column in zip(*parts, strict=True))
        return residuals, variance, of_mean, owner


def assessment(
    backend: Backend,
    models: Sequence[UncertaintyModel],
    committee: Committee | None,
    frames: list[Atoms],
    block: int,
    tolerance: float,
) -> tuple[Assessment, float | None]:
    """All methods on one split, and the RMSE of the committee's mean."""
    samples: dict[tuple[str, str], Sample] = {}
    for model in models:
        found = evaluate(Predictor(backend, model), frames, n_bootstrap=0, progress=False)
        samples |= dict(found.samples)
    mean_rmse = None
    if committee is not None:
        sample, mean_rmse = committee.sample(backend, frames)
        samples |= {(COMMITTEE, "forces"): sample, (COMMITTEE, "forces_max"): largest_of_frames(sample)}
    return assess(samples, len(frames), tolerance=tolerance, block=block, progress=False), mean_rmse


def markdown(
    name: str,
    tests: dict[str, tuple[Assessment, float | None]],
    models: Sequence[UncertaintyModel],
    committee: Committee | None,
    seconds: dict[str, float],
    skipped: Sequence[str],
    arguments: argparse.Namespace,
) -> str:
    lines = [
        f"# Quality on {name}",
        "",
        f"`python benchmarks/quality_of_set.py {arguments.data.name} {Path(arguments.potential).name}"
        + (f" --committee ...` ({committee.n_members} members)" if committee else "`"),
        "",
        "Spearman of the uncertainty with the force error, of atoms and of the largest of each frame; AUROC for",
        f"largest errors above {arguments.tolerance:g} eV/Å; NLL and mean z² of force components. In brackets 95 %",
        f"intervals by bootstrap over blocks of {arguments.block} frames.",
    ]
    for split, (found, mean_rmse) in tests.items():
        rmse = found.select(method=found.methods[0], quantity="forces", element="all", metric="rmse")[0].value
        title = f"{split}: {found.n_frames} frames, force RMSE {1e3 * rmse:.1f} meV/Å"
        if mean_rmse is not None:
            title += f" (mean of the committee {1e3 * mean_rmse:.1f})"
        lines += ["", f"## {title}", "", "| method | Spearman, atoms | Spearman, frames | AUROC | NLL | z² | 90 % |"]
        lines.append("|---|---|---|---|---|---|---|")
        for method in found.methods:
            cells = [
                cell(found, method, "forces", "spearman", 3),
                cell(found, method, "forces_max", "spearman", 2),
                cell(found, method, "forces_max", "auroc", 2),
                cell(found, method, "forces", "nll", 2),
                cell(found, method, "forces", "mean_squared_z", 2),
                cell(found, method, "forces", "coverage_90", 2, interval=False),
            ]
            lines.append(f"| {method} | {' | '.join(cells)} |")
    ratio = seconds["default fit"] / seconds["plain pass"]
    lines += [
        "",
        f"Fitting {', '.join(DEFAULT)} and their combination took {ratio:.2f} times one plain energy and force pass",
        f"over the same frames ({seconds['plain pass']:.0f} s), networks included; without pdrum "
        f"{seconds['without pdrum'] / seconds['plain pass']:.2f} times.",
        *[f"\n{line}" for line in skipped],
        "",
        "```",
        models[0].summary(),
        "```",
        "",
    ]
    return "\n".join(lines)


def cell(found: Assessment, method: str, quantity: str, metric: str, digits: int, *, interval: bool = True) -> str:
    scores = found.select(method=method, quantity=quantity, element="all", metric=metric)
    if not scores or np.isnan(scores[0].value):
        return "-"
    text = f"{scores[0].value:.{digits}f}"
    if interval and np.isfinite(scores[0].low):
        text += f" ({scores[0].low:.{digits}f} to {scores[0].high:.{digits}f})"
    return text


def write_csv(path: Path, tests: dict[str, tuple[Assessment, float | None]]) -> None:
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["split", *(field.name for field in fields(MetricValue))])
        for split, (found, _) in tests.items():
            for score in found.scores:
                if score.element == "all":
                    row = astuple(score)
                    writer.writerow([split, *(f"{x:.6g}" if isinstance(x, float) else x for x in row)])


def draw(tests: dict[str, tuple[Assessment, float | None]]) -> plt.Figure:
    """A column a metric, a row a method, a colour a split."""
    columns = (("forces", "spearman", "Spearman, atoms"), ("forces_max", "auroc", "AUROC, frames"))
    columns += (("forces", "nll", "NLL"), ("forces", "mean_squared_z", "z² (1 if calibrated)"))
    methods = next(iter(tests.values()))[0].methods
    figure, axes = plt.subplots(1, 4, figsize=(13, 0.42 * len(methods) + 1.8), sharey=True, layout="constrained")
    colours = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
    for ax, (quantity, metric, title) in zip(axes, columns, strict=True):
        for place, (split, (found, _)) in enumerate(tests.items()):
            for row, method in enumerate(methods):
                for score in found.select(method=method, quantity=quantity, element="all", metric=metric):
                    height = row + 0.12 * (place - (len(tests) - 1) / 2)
                    error = [[max(score.value - score.low, 0)], [max(score.high - score.value, 0)]]
                    bars = error if np.isfinite(score.low) else None
                    label = split if row == 0 else None
                    ax.errorbar(score.value, height, xerr=bars, fmt="o", ms=4, color=colours[place % 6], label=label)
        ax.set(title=title, yticks=range(len(methods)), yticklabels=methods)
        ax.grid(axis="x", alpha=0.3)
    axes[0].invert_yaxis()
    worst = axes[2].get_xlim()[1]
    if worst > 10:  # the others would be one dot
        axes[2].set_xscale("symlog", linthresh=5)
        axes[2].set_xticks([-4, -2, 0, 2, 4, *(x for x in (10, 100, 1000) if x < worst)])
    axes[3].set_xscale("log")
    low, high = axes[3].get_xlim()
    axes[3].set_xticks([x for x in (0.1, 0.2, 0.5, 1, 2, 5, 10, 100, 1000) if low < x < high])
    for ax in axes[2:]:
        ax.xaxis.set_major_formatter(ScalarFormatter())
        ax.xaxis.set_minor_formatter(NullFormatter())
    axes[3].axvline(1, color="#8C8C8C", lw=1)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=6, fontsize=8)
    return figure


if __name__ == "__main__":
    main()
