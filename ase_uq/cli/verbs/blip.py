"""`ase-uq blip`: trains noise on the weights of a potential, and writes them to a file that a SPEC loads."""

from enum import StrEnum
from pathlib import Path
from shlex import quote
from typing import Annotated

import typer

from ase_uq.cli.options import Device, DType, EnergyKey, ForcesKey, Model, Seed, StressKey, label_keys
from ase_uq.cli.outputs import check_outputs


class Loss(StrEnum):
    """What is minimised."""

    elbo = "elbo"
    crps = "crps"


def blip(
    model: Model,
    train: Annotated[
        list[str],
        typer.Option(
            "--train",
            metavar="FILE",
            help="Labelled frames to train on, as a rule those of the potential; may be given several times.",
        ),
    ],
    validation: Annotated[
        list[str],
        typer.Option(
            "--validation",
            metavar="FILE",
            help="Labelled frames, not among them, that decide when to stop and which epoch is kept.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", metavar="FILE", help="Where to write the weights, for example my.blip.safetensors."),
    ],
    loss: Annotated[
        Loss, typer.Option("--loss", help="Minus the evidence lower bound, or the score of the members' spread.")
    ] = Loss.elbo,
    dropout: Annotated[
        float, typer.Option("--dropout", metavar="P", help="Dropout rate of the prior, and of the noise at the start.")
    ] = 1e-4,
    epochs: Annotated[int, typer.Option("--epochs", min=1, help="Largest number of epochs.")] = 30,
    members: Annotated[
        int, typer.Option("--members", min=2, max=1000, help="Number of members that are evaluated beside each pass.")
    ] = 8,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace the file if it exists.")] = False,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Train noise on the weights of a potential (BLIP), as a committee that is made of one potential.

    The weights are trained further, and how much noise each layer bears is learned with them. MODEL?blip=FILE loads
    the result, whose members `ase-uq fit --methods committee` calibrates. The same command goes on with a training
    that was killed, from OUT.training.

    [dim]ase-uq blip --model mace:my.model --train train.xyz --validation held_out.xyz --out my.blip.safetensors[/]
    """
    check_outputs(out, may_exist=overwrite)
    from ase_uq.cli.potential import load_potential, seed_all
    from ase_uq.fitting.blip import BlipTraining, train_blip

    seed_all(seed)
    try:
        made = train_blip(
            load_potential(model, device, dtype),
            train,
            validation,
            out=out,
            training=BlipTraining(loss=loss.value, dropout=dropout, max_epochs=epochs, seed=seed),
            n_members=members,
            label_keys=label_keys(energy_key, forces_key, stress_key),
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        if Path(part := f"{out}.training").exists():
            typer.echo(
                f"stopped early: what was trained so far is in {part}; the same command goes on from there.", err=True
            )
        raise
    told = made.training or {}
    history = [held_out for _, held_out in told["history"]]
    best = min(history)
    kept = (
        f"{best:.4f} after the best (epoch {history.index(best) + 1})"
        if best == told["best_loss"]
        else f"{told['best_loss']:.4f} before it: no epoch was better, and the weights are the potential's own"
    )
    typer.echo(f"{told['epochs']} epochs; validation loss {history[0]:.4f} after the first, {kept}.")
    typer.echo(f"written to {out}; next: ase-uq fit --methods committee with --model {quote(f'{model}?blip={out}')}")
