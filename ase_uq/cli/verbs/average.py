"""`ase-uq average`: a thermodynamic average over scored frames, with the error bar of the potential."""

import json
from enum import StrEnum
from typing import Annotated

import typer

from ase_uq.cli.options import JSON
from ase_uq.cli.outputs import check_inputs
from ase_uq.io.files import file_of


class By(StrEnum):
    """How `propagation.average` finds what a member would have sampled."""

    cumulant = "cumulant"
    reweighted = "reweighted"


def average(
    frames: Annotated[
        list[str], typer.Argument(metavar="SCORED...", help="Frames that `ase-uq score --ensemble M` wrote.")
    ],
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="K", help="Of the canonical run that the frames are of.")
    ],
    distance: Annotated[
        tuple[int, int] | None,
        typer.Option("--distance", metavar="I J", help="Average the distance of two atoms, Å (numbers from 0)."),
    ] = None,
    value: Annotated[
        str | None,
        typer.Option(
            "--value",
            metavar="KEY",
            help="Average a number in the info of each frame; energy is the potential energy, that of each member.",
        ),
    ] = None,
    by: Annotated[
        By, typer.Option("--by", help="Weigh frames as each member would, or take the first order of that.")
    ] = By.cumulant,
    as_json: JSON = False,
) -> None:
    """Average an observable over the frames of a run, with the error bar of what the potential has wrong.

    The error bar is the spread of what the average would be had each member of the ensemble driven the run. The
    statistical error of a short run comes on top. Where the members differ so much that fewer than 10 frames would
    count, no average is given.

    [dim]ase-uq average scored.xyz --temperature 300 --distance 0 1[/]
    """
    check_inputs(*map(file_of, frames))
    if (distance is None) == (value is None):
        raise typer.BadParameter("what to average is either --distance I J or --value KEY.", param_hint="'--distance'")
    from ase_uq import propagation
    from ase_uq.io.frames import read_frames
    from ase_uq.propagation.observables import distances_of, entries_of

    scored = read_frames(frames)
    if distance is not None:
        found = propagation.average(scored, distances_of(scored, *distance), temperature, by=by.value)
    else:
        values = "energy" if value == "energy" else entries_of(scored, value or "")
        found = propagation.average(scored, values, temperature, by=by.value)
    numbers = {
        "value": float(found.value),
        "std": float(found.std),
        "n_frames": len(scored),
        "effective_frames": found.effective_frames,
    }
    if as_json:
        typer.echo(json.dumps(numbers, indent=2))
        return
    name, unit = (
        (value, " eV" if value == "energy" else "")
        if distance is None
        else (f"distance of atoms {distance[0]} and {distance[1]}", " Å")
    )
    typer.echo(
        f"{name}: {numbers['value']:.6g} ± {numbers['std']:.2g}{unit} at {temperature:g} K; "
        f"{found.effective_frames:.0f} of {len(scored)} frames count for the farthest member"
    )
