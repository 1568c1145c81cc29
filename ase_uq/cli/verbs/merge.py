"""`ase-uq merge`: makes one file of the shards of a scored trajectory."""

from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.outputs import check_outputs, check_scored_name


def merge(
    shards: Annotated[
        list[Path], typer.Argument(metavar="SHARD...", help="What `ase-uq score --shard I/N` wrote, in any order.")
    ],
    out: Annotated[Path, typer.Option("--out", metavar="OUT", help="File to write, with the ending of the shards.")],
    csv: Annotated[
        Path | None, typer.Option("--csv", metavar="FILE", help="Also write the numbers, one row per frame.")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it exists.")] = False,
) -> None:
    """Make one file of all shards of a trajectory, the one that a run without shards would have written.

    All shards must be there, complete, and scored with the same trajectory, potential, uncertainty model and options.
    They stay as they are. Memory use does not grow with the trajectory.

    [dim]ase-uq merge scored_*.xyz --out scored.xyz --csv scored.csv[/]
    """
    check_scored_name(out)
    check_outputs(out, csv, may_exist=overwrite)
    from ase_uq.scoring.shards import merge_shards

    typer.echo(merge_shards(shards, out=out, csv=csv, overwrite=overwrite).summary())
