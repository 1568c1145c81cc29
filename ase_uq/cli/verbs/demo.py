"""`ase-uq demo`: the whole story on an embedded potential."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.options import Seed


class Potential(StrEnum):
    """The embedded potentials."""

    mace = "mace"
    orb_direct = "orb-direct"
    orb_conservative = "orb-conservative"


def demo(
    out: Annotated[
        Path, typer.Option("--out", metavar="DIR", help="Folder for its files; those of an earlier demo are replaced.")
    ] = Path("ase_uq_demo"),
    potential: Annotated[Potential, typer.Option("--potential", help="Embedded potential to heat.")] = Potential.mace,
    seed: Seed = 0,
) -> None:
    """Heat a small molecule until its potential no longer knows, then ask the reference who was right.

    A potential trained at 300 K is heated towards 2000 K. The run halts itself. The frames it flagged are labelled with
    GFN2-xTB, and a table and DIR/demo.png show the predicted uncertainties beside the true errors. The demo runs
    offline and takes about half a minute.

    [dim]ase-uq demo --potential orb-conservative[/]
    """
    import torch

    from ase_uq.cli.potential import import_silently
    from ase_uq.demo import run_demo

    import_silently(potential.value)
    torch.set_num_threads(1)  # nine atoms: threads would only wait for each other
    run_demo(out, potential.value, seed=seed, tell=typer.echo)
