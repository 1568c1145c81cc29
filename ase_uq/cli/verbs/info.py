"""`ase-uq info`: prints what is in an uncertainty model."""

import json
from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.options import JSON


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Uncertainty model that `ase-uq fit` wrote.")],
    details: Annotated[
        bool, typer.Option("--details", help="Also print its name, the formula of each calibrator, and the versions.")
    ] = False,
    as_json: JSON = False,
) -> None:
    """Show what an uncertainty model was fitted on, how good it is, how far it reaches, and what to do next.

    The potential is not needed. Quantiles of the calibration frames are good first thresholds for
    [bold]ase-uq md[/], which also takes them directly, as in --halt q0.99.

    [dim]ase-uq info my.uq.safetensors[/]
    """
    from ase_uq.uncertainty_model.model import UncertaintyModel

    model = UncertaintyModel.load(file)
    typer.echo(json.dumps(model.numbers(), indent=2) if as_json else model.summary(details=details))
