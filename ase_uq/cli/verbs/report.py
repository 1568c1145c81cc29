"""`ase-uq report`: takes scored frames and writes one page for people."""

from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.levels import check_levels
from ase_uq.cli.options import UQ, BatchAtoms, Device, DType, EnergyKey, Flag, ForcesKey, Halt, Reduce, StressKey
from ase_uq.cli.options import label_keys as names_of_labels
from ase_uq.cli.outputs import check_inputs


def report(
    frames: Annotated[Path, typer.Argument(metavar="FRAMES", help="Frames that `ase-uq score` or `ase-uq md` wrote.")],
    uq: UQ = None,
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="HTML page to write; replaced if it exists.")
    ] = Path("report.html"),
    flag: Flag = None,
    halt: Halt = None,
    reduce: Reduce = "max",
    tolerance: Annotated[
        float, typer.Option("--tolerance", help="Force errors above this count as wrong, eV/Å; of frames with labels.")
    ] = 0.3,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="SPEC", help="The potential, for the latent map; a SPEC as in `ase-uq score`."),
    ] = None,
    train: Annotated[
        Path | None, typer.Option("--train", metavar="FILE", help="Training frames, for the latent map.")
    ] = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", metavar="FILE", help="Calibration frames, for the latent map.")
    ] = None,
    plots: Annotated[
        Path | None,
        typer.Option(
            "--plots", metavar="FOLDER", show_default="OUT_figures", help="Folder for PNG figures; created if missing."
        ),
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
) -> None:
    """Show at a glance where a potential can be trusted: one page that opens without a network, and its pictures.

    The page shows uncertainty, γ and temperature along the frames, the flagged frames, errors and calibration if the
    frames have reference labels, a table by element, the most uncertain frames as structures that can be turned, and
    the provenance. With --model, --train and --calibration it also maps where the frames lie among the known frames.

    [dim]ase-uq report scored.xyz --uq my.uq.safetensors --flag q0.99 --halt 0.5 --out report.html[/]
    """
    folder = _check_arguments(frames, uq, out, flag, halt, model, (train, calibration), plots)
    from ase_uq.report.page import write_report
    from ase_uq.thresholds.reduction import Reduction
    from ase_uq.uncertainty_model.model import UncertaintyModel

    backend = None
    if model is not None:
        from ase_uq.cli.potential import load_calculator

        predictor = load_calculator(model, uq, device, dtype).predictor
        backend, fitted = predictor.backend, predictor.uncertainty_model
    else:
        assert uq is not None
        fitted = UncertaintyModel.load(uq)
    sources = {"frames": frames, "uncertainty model": uq, "loaded as": model, "training": train}
    sources["calibration"] = calibration
    written = write_report(
        out,
        frames,
        fitted,
        flag=flag,
        halt=halt,
        reduction=Reduction(reduce),
        tolerance=tolerance,
        label_keys=names_of_labels(energy_key, forces_key, stress_key),
        backend=backend,
        train=train,
        calibration=calibration,
        pictures=folder,
        sources={name: str(source) for name, source in sources.items() if source is not None},
        batch_atoms=batch_atoms,
    )
    typer.echo(written.summary())


def _check_arguments(
    frames: Path,
    uq: Path | None,
    out: Path,
    flag: object,
    halt: object,
    model: str | None,
    known: tuple[Path | None, Path | None],
    plots: Path | None,
) -> Path:
    """Checks all that can be checked before seconds are spent on importing a potential; returns the folder."""
    if out.suffix not in (".html", ".htm"):
        raise typer.BadParameter(f"{out} is an HTML page: give a name that ends in .html.", param_hint="'--out'")
    if uq is None and model is None:
        raise typer.BadParameter("give the uncertainty model that the frames were scored with.", param_hint="'--uq'")
    for option, file in zip(("--train", "--calibration"), known, strict=True):
        if file is not None and model is None:
            raise typer.BadParameter("the latent map needs the potential: give --model too.", param_hint=f"'{option}'")
    check_levels(flag, halt)  # type: ignore[arg-type]
    check_inputs(frames)
    from ase_uq.report.output import check_outputs

    folder = out.with_name(f"{out.stem}_figures") if plots is None else plots
    check_outputs(out, folder)
    return folder
