"""`ase-uq info`: prints what is in an uncertainty model."""

from pathlib import Path
from typing import Annotated

import typer


def info(
    file: Annotated[Path, typer.Argument(metavar="FILE", help="Uncertainty model that `ase-uq fit` wrote.")],
) -> None:
    """Show what an uncertainty model was fitted on, how well it is calibrated, and how far it reaches.

    The potential is not needed. Quantiles of the calibration frames are good first thresholds for
    [bold]ase-uq md[/], which also takes them directly, as in --halt q0.99.

    [dim]ase-uq info my.uq.safetensors[/]
    """
    from ase_uq.uncertainty_model.model import UncertaintyModel

    typer.echo(UncertaintyModel.load(file).summary())
