"""`ase-uq score`: takes finished frames and writes them with results and uncertainties."""

from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.options import UQ, BatchAtoms, Device, DType, ForceProbes, Model, Seed
from ase_uq.cli.outputs import check_inputs, check_outputs, check_scored_name
from ase_uq.io.files import check_distinct, file_of


def score(
    frames: Annotated[
        list[str],
        typer.Argument(
            metavar="IN...",
            help="Frames in any format that ASE reads; several files follow one another. FILE@:100 takes a part of a "
            "file, FILE.db@QUERY of a database.",
        ),
    ],
    model: Model,
    out: Annotated[
        Path, typer.Option("--out", metavar="OUT", help="File to write: extended XYZ (.xyz) or HDF5 (.h5).")
    ],
    uq: UQ = None,
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the numbers, one row per frame.")
    ] = None,
    ensemble: Annotated[
        int,
        typer.Option(
            "--ensemble",
            metavar="M",
            help="Also write energy_ensemble, M samples of the energy that know which errors structures share, for "
            "error bars of differences and of averages (ase-uq average); 64, for example.",
        ),
    ] = 0,
    force_probes: ForceProbes = 0,
    shard: Annotated[
        str | None,
        typer.Option(
            "--shard",
            metavar="I/N",
            help="Score one of N equal parts of the frames, on a machine of its own; `ase-uq merge` makes one file of "
            "all.",
        ),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
    device: Device = "",
    dtype: DType = "",
    batch_atoms: BatchAtoms = None,
    workers: Annotated[
        int | None,
        typer.Option(
            "--workers",
            min=0,
            show_default="0 on a CPU, else up to 8",
            help="Processes that parse frames and make neighbour lists while the device works.",
        ),
    ] = None,
    seed: Seed = 0,
) -> None:
    """Score finished frames: every energy and force with its calibrated standard deviation.

    OUT has the frames of IN with the results of the potential, with forces_uncertainty and gamma of every atom in
    arrays, and with energy_uncertainty and source_frame (the number of the frame among those of IN) in info. Labels
    under ASE's names become REF_energy and REF_forces. Memory use does not grow with the file. OUT appears when it is
    complete; after an interruption the same command goes on where it stopped. Frames that cannot be read or evaluated
    are reported and left out.

    [dim]ase-uq score --model mace:my.model --uq my.uq.safetensors run.traj --out scored.xyz --csv scored.csv[/]
    """
    part, one_of_several = out.with_name(out.name + ".part"), None
    if shard is not None:
        from ase_uq.scoring.shards import Shard

        one_of_several = Shard.parse(shard)
    check_scored_name(out)
    check_inputs(*map(file_of, frames))
    check_distinct(frames, out, csv)
    # A run that was killed while it finished has files of both kinds.
    interrupted = part.with_name(part.name + ".json").exists()
    check_outputs(out, csv, may_exist=overwrite or interrupted)
    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.scoring.score import score as score_frames

    seed_all(seed)
    calculator = load_calculator(model, uq, device, dtype, ensemble=ensemble, force_probes=force_probes)
    try:
        scored = score_frames(
            frames,
            calculator,
            out=out,
            csv=csv,
            batch_atoms=batch_atoms,
            workers=workers,
            shard=one_of_several,
            overwrite=overwrite,
        )
    except KeyboardInterrupt:
        if part.exists():
            typer.echo(
                f"stopped early: the frames scored so far are in {part}; the same command goes on from there.", err=True
            )
        raise
    typer.echo(scored.summary())
