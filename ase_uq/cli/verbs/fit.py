"""`ase-uq fit`: takes labelled frames and writes an uncertainty model."""

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
    Methods,
    Model,
    Seed,
    StressKey,
    label_keys,
)
from ase_uq.cli.outputs import check_outputs
from ase_uq.cli.ranks import ranks


def fit(
    model: Model,
    train: Annotated[
        list[str],
        typer.Option(
            "--train",
            metavar="FILE",
            help="Frames that the potential was trained on, or frames like them; may be given several times. "
            "FILE@:100 takes a part of a file, FILE.db@QUERY of a database.",
        ),
    ],
    calibration: Annotated[
        list[str],
        typer.Option(
            "--calibration",
            metavar="FILE",
            help="Labelled frames that the potential has never seen, from separate runs: they set the scale.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option(
            "--out", metavar="FILE", help="Where to write, for example my.uq.safetensors; replaced if it exists."
        ),
    ],
    perturbed: Annotated[
        Path | None,
        typer.Option(
            "--perturbed",
            metavar="FILE",
            help="Labelled bad frames, made with `ase-uq perturb-frames`, for thresholds such as miss=0.1@0.3.",
        ),
    ] = None,
    methods: Methods = "bll,pdrum,kernel",
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="METHOD.OPTION=VALUE",
            help="An option of a method, such as kernel.landmarks=512, bll.radii=2.5,5 or "
            "pdrum.training.max_epochs=50; may be given several times. --set METHOD lists what a method has, with "
            "the defaults.",
        ),
    ] = None,
    energy_key: EnergyKey = None,
    forces_key: ForcesKey = None,
    stress_key: StressKey = None,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
    seed: Seed = 0,
) -> None:
    """Fit the uncertainty model of a potential, once, and write it to one small file.

    Training frames show what the potential has seen; calibration frames, which it has not seen, turn that into eV and
    eV/Å. A few hundred of each are good. Energies and stresses are calibrated if the frames have them.

    Several processes share the work where torchrun or SLURM's srun starts them: each evaluates a part of the frames,
    and the first one writes the file.

    [dim]ase-uq fit --model mace:my.model --train train.xyz --calibration held_out.xyz --out my.uq.safetensors[/]
    """
    with ranks(device) as (communicator, device):
        check_outputs(out)
        from ase_uq.cli.potential import load_potential, seed_all
        from ase_uq.fitting.fit import fit as fit_model
        from ase_uq.io.frames import read_frames
        from ase_uq.methods.options import make_methods

        makers = make_methods([name.strip() for name in methods.split(",") if name.strip()], settings or ())
        train_frames = read_frames(train, name="training frames")
        calibration_frames = read_frames(calibration, name="calibration frames")
        perturbed_frames = None if perturbed is None else read_frames(perturbed, name="perturbed frames")
        seed_all(seed)
        fitted = fit_model(
            load_potential(model, device, dtype),
            train_frames,
            calibration_frames,
            perturbed=perturbed_frames,
            methods=makers,
            label_keys=label_keys(energy_key, forces_key, stress_key),
            batch_atoms=batch_atoms,
            communicator=communicator,
        )
        if communicator is None or communicator.rank == 0:
            fitted.save(out)
            typer.echo(fitted.summary())
            typer.echo(f"written to {out}; next: ase-uq score or ase-uq md with --model {quote(model)} --uq {out}")
