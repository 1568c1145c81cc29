"""`ase-uq evaluate`: takes labelled test frames and prints how good the uncertainties are."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ase_uq.cli.options import (
    JSON,
    UQ,
    BatchAtoms,
    Device,
    DType,
    EnergyKey,
    ForceProbes,
    ForcesKey,
    Seed,
    StressKey,
    label_keys,
)
from ase_uq.cli.outputs import check_outputs

if TYPE_CHECKING:
    from matplotlib.axes import Axes

    from ase_uq.diagnostics.assessment import Assessment
    from ase_uq.uncertainty_model.far_field import FarField


def evaluate(
    frames: Annotated[
        list[Path], typer.Argument(metavar="FRAMES...", help="Test frames with reference labels, in one file or more.")
    ],
    model: Annotated[
        str,
        typer.Option(
            "--model",
            metavar="SPEC",
            show_default="none: take what stands in the frames",
            help="The potential, as for fit. Not needed for frames that `ase-uq score` wrote, with --uq.",
        ),
    ] = "",
    uq: UQ = None,
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Force errors above this count as bad, eV/Å; for AUROC and AUPRC.")
    ] = 0.3,
    block: Annotated[
        int,
        typer.Option(
            "--block", min=1, help="Number of consecutive frames resampled together: as many as are correlated."
        ),
    ] = 1,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Where to write every number; replaced if it exists.")
    ] = None,
    plots: Annotated[
        Path | None, typer.Option("--plots", metavar="FOLDER", help="Folder for PNG figures; created if missing.")
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    as_json: JSON = False,
    device: Device = "",
    dtype: DType = "",
    force_probes: ForceProbes = 0,
    batch_atoms: BatchAtoms = None,
    seed: Seed = 0,
) -> None:
    """Judge uncertainties on labelled test frames: are they calibrated, and are they large where the errors are?

    Test frames should be neither training nor calibration frames. Neighbouring frames of a run are not independent:
    give with --block how many belong together, or the intervals come out too narrow.

    Frames that `ase-uq score` wrote, in shards too, are judged as they are, without the potential.

    [dim]ase-uq evaluate --model mace:my.model --uq my.uq.safetensors test.xyz --csv scores.csv --plots figures[/]
    """
    _check_outputs(csv, plots)
    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.diagnostics.evaluate import evaluate as assess
    from ase_uq.diagnostics.evaluate import evaluate_scored
    from ase_uq.io.frames import read_frames
    from ase_uq.uncertainty_model.model import UncertaintyModel

    if not model and uq is None:
        raise typer.BadParameter(
            "give the potential, or only --uq for frames that `ase-uq score` wrote with it.", param_hint="'--model'"
        )
    test_frames = read_frames(frames, name="test frames")
    seed_all(seed)
    options = {
        "label_keys": label_keys(energy_key, forces_key, stress_key),
        "tolerance": tolerance,
        "block": block,
        "seed": seed,
    }
    if model:
        predictor = load_calculator(model, uq, device, dtype, force_probes=force_probes).predictor
        fitted = predictor.uncertainty_model
        assessment = assess(predictor, test_frames, batch_atoms=batch_atoms, **options)
    else:
        assert uq is not None
        fitted = UncertaintyModel.load(uq)
        assessment = evaluate_scored(test_frames, fitted, **options)
    if csv is not None:
        assessment.to_csv(csv)
        typer.echo(f"{len(assessment.scores)} numbers written to {csv}", err=as_json)
    if plots is not None:
        written = _draw(assessment, plots)
        if (far := fitted.far_field) is not None:
            written.append(_draw_far_field(far, plots))
        typer.echo(f"figures written: {', '.join(map(str, written))}", err=as_json)
    in_words = f"{assessment.table()}\n\n{assessment.describe()}"
    typer.echo(json.dumps(assessment.numbers(), indent=2) if as_json else in_words)


def _check_outputs(csv: Path | None, plots: Path | None) -> None:
    """Everything that can be refused before seconds are spent on importing a potential."""
    check_outputs(csv)
    if plots is not None:
        from ase_uq.report import plots as _  # noqa: F401  (reports a missing matplotlib now)

        if plots.exists() and not plots.is_dir():
            raise FileExistsError(f"{plots} is a file. Give --plots a folder, which is created if it is missing.")
        plots.mkdir(parents=True, exist_ok=True)
        check_outputs(plots / "forces_reliability.png")


def _draw(assessment: "Assessment", folder: Path) -> list[Path]:
    """Draws two figures per quantity, each with all methods; returns their files."""
    from ase_uq.diagnostics.table import UNITS
    from ase_uq.report import plots

    written = []
    for quantity in assessment.quantities:
        samples = {m: s for m in assessment.methods if (s := assessment.samples.get((m, quantity))) is not None}
        samples = {method: sample for method, sample in samples.items() if sample.errors.any()}
        if not samples or quantity == "forces_max":  # largest errors are not Gaussian, whatever the uncertainties
            continue
        ax = None
        for method, sample in samples.items():
            ax = plots.reliability(sample.residuals, sample.std, label=method, ax=ax)
        pairs = {method: (sample.errors, sample.uncertainties) for method, sample in samples.items()}
        components = next(iter(samples.values())).residuals.shape[1]
        panels = plots.errors_side_by_side(pairs, components=components, unit=UNITS[quantity])
        for name, axes in (("reliability", ax), ("errors", panels[0])):
            assert axes is not None
            written.append(_saved(axes, folder / f"{quantity}_{name}.png"))
    return written


def _draw_far_field(far: "FarField", folder: Path) -> Path:
    """Draws where the potential was taken to know nothing; returns the file."""
    from ase_uq.report import plots

    ax = plots.know_nothing(far.fractions, far.median_forces, far.fraction)
    return _saved(ax, folder / "far_field.png")


def _saved(axes: "Axes", path: Path) -> Path:
    from matplotlib import pyplot as plt

    figure = axes.get_figure(root=True)
    assert figure is not None
    figure.savefig(path, dpi=200)
    plt.close(figure)
    return path
