"""`ase-uq refit`: takes an uncertainty model and writes one for the potential that was trained further."""

from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ase_uq.cli.options import (
    BatchAtoms,
    Device,
    DType,
    EnergyKey,
    ForcesKey,
    Model,
    Seed,
    StressKey,
    label_keys,
)
from ase_uq.cli.outputs import check_outputs
from ase_uq.cli.ranks import ranks


def refit(
    uq: Annotated[Path, typer.Argument(metavar="OLD", help="Uncertainty model of the potential before.")],
    model: Model,
    calibration: Annotated[
        list[str],
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Labelled frames that neither potential was trained on, of the kinds that it will meet; may be given "
            "several times, as for `ase-uq fit`.",
        ),
    ],
    out: Annotated[
        Path, typer.Option("--out", metavar="FILE", help="Where to write the new model; replaced if it exists.")
    ],
    train: Annotated[
        list[str] | None,
        typer.Option(
            "--train",
            metavar="FILE",
            help="Frames that the new potential was trained on, or frames like them, to try a new fit on.",
        ),
    ] = None,
    perturbed: Annotated[
        Path | None,
        typer.Option("--perturbed", metavar="FILE", help="Labelled bad frames, as for `ase-uq fit`."),
    ] = None,
    old: Annotated[
        str | None,
        typer.Option(
            "--old", metavar="SPEC", help="The potential before, as in --model, to say how far features moved from it."
        ),
    ] = None,
    methods: Annotated[
        str | None,
        typer.Option(
            "--methods",
            metavar="NAMES",
            show_default="those of OLD",
            help="Methods of the new fit, with commas between.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="METHOD.OPTION=VALUE", help="An option of a method of the new fit."),
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
    seed: Seed = 0,
) -> None:
    """Make the uncertainty model of a potential into one of the potential that was trained from it.

    What was fitted is calibrated again with the new potential. With training frames it is fitted again as well, and
    what predicts the errors of left-out calibration frames better is kept. It says which and why.

    [dim]ase-uq refit old.uq.safetensors --model mace:new.model --calibration held_out.xyz --out new.uq.safetensors[/]
    """
    if (methods or settings) and not train:
        raise typer.BadParameter("these are of a new fit: give --train too.", param_hint="'--methods', '--set'")
    with ranks(device) as (communicator, device):
        check_outputs(out)
        if out.exists() and uq.exists() and out.samefile(uq):
            raise typer.BadParameter(
                f"{out} is the old model, which the old potential needs: give another name.", param_hint="'--out'"
            )
        from ase_uq.cli.potential import load_potential, seed_all
        from ase_uq.fitting.refit import refit as made_again
        from ase_uq.io.frames import read_frames
        from ase_uq.methods.options import make_methods
        from ase_uq.uncertainty_model.model import UncertaintyModel

        before = UncertaintyModel.load(uq)
        makers = None
        if methods or settings:
            names = list(before.methods) if methods is None else [name.strip() for name in methods.split(",")]
            makers = make_methods([name for name in names if name], settings or ())
        calibration_frames = read_frames(calibration, name="calibration frames")
        train_frames = read_frames(train, name="training frames") if train else None
        perturbed_frames = None if perturbed is None else read_frames(perturbed, name="perturbed frames")
        seed_all(seed)
        potential = load_potential(model, device, dtype)
        first = communicator is None or communicator.rank == 0
        moved = None
        if old is not None and first:
            from ase_uq.diagnostics.drift import drift

            moved = drift(load_potential(old, device, dtype), potential, calibration_frames, batch_atoms=batch_atoms)
        found = made_again(
            before,
            potential,
            calibration_frames,
            train=train_frames,
            perturbed=perturbed_frames,
            methods=makers,
            label_keys=label_keys(energy_key, forces_key, stress_key),
            batch_atoms=batch_atoms,
            communicator=communicator,
        )
        if first:
            found.model.save(out)
            typer.echo(f"{found.model.summary()}\n\n{found.describe()}")
            if moved is not None:
                typer.echo(f"From {old} to {model}: {moved.describe()}")
            typer.echo(f"written to {out}; next: ase-uq evaluate with --model {quote(model)} --uq {out}")
