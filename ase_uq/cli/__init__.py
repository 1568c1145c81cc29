"""The command line: `ase-uq VERB`. A verb turns its arguments into one library call and prints the result.

Exit codes: 0 success, 1 failure (one line on stderr says why), 2 wrong usage, 3 a run was halted by its
uncertainty.
"""

from collections.abc import Sequence
from typing import Annotated

import typer

from ase_uq.cli.console import ErrorsAsLines
from ase_uq.cli.options import Verb
from ase_uq.cli.verbs.average import average
from ase_uq.cli.verbs.blip import blip
from ase_uq.cli.verbs.compare import compare
from ase_uq.cli.verbs.demo import demo
from ase_uq.cli.verbs.evaluate import evaluate
from ase_uq.cli.verbs.fit import fit
from ase_uq.cli.verbs.info import info
from ase_uq.cli.verbs.lammps import lammps
from ase_uq.cli.verbs.md import md
from ase_uq.cli.verbs.merge import merge
from ase_uq.cli.verbs.perturb_frames import perturb_frames
from ase_uq.cli.verbs.reference import reference
from ase_uq.cli.verbs.refit import refit
from ase_uq.cli.verbs.relax import relax
from ase_uq.cli.verbs.report import report
from ase_uq.cli.verbs.score import score
from ase_uq.cli.verbs.select import select

app = typer.Typer(cls=ErrorsAsLines, no_args_is_help=True, add_completion=False, rich_markup_mode="rich")
VERBS = (
    fit,
    refit,
    info,
    evaluate,
    score,
    merge,
    average,
    select,
    perturb_frames,
    reference,
    md,
    lammps,
    relax,
    report,
    compare,
    blip,
    demo,
)
for verb in VERBS:
    app.command(cls=Verb)(verb)


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line and exits.

    Args:
        arguments: Words after `ase-uq`; by default the arguments of the process.

    Raises:
        SystemExit: Always, with the exit code.
    """
    app(None if arguments is None else list(arguments), prog_name="ase-uq")


def _version(asked: bool) -> None:
    if asked:
        from ase_uq import __version__

        typer.echo(f"ase-uq {__version__}")
        raise typer.Exit


@app.callback()
def _(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Calibrated uncertainties for MACE, orb and SevenNet potentials, from the same forward pass as the forces.

    First [bold]fit[/] an uncertainty model once, to frames with reference labels ([bold]refit[/] makes it into one of
    a potential that was trained further); [bold]info[/] shows its contents, and [bold]evaluate[/] how good it is on
    labelled test frames. Then [bold]md[/], [bold]lammps[/] and [bold]relax[/] stop where the potential no longer knows,
    [bold]score[/] gives finished frames their uncertainties ([bold]merge[/] joins what several machines scored),
    [bold]average[/] observables their error bars, and [bold]select[/] picks frames worth labelling. For thresholds from
    criteria, [bold]perturb-frames[/] makes bad frames to label, and [bold]reference[/] makes runs on which false alarms
    are counted. [bold]compare[/] shows what several potentials see of the same frames. [bold]blip[/] trains noise on
    the weights of a potential, as a committee that is made of one.

    New here? [bold]ase-uq demo[/] shows everything on a small molecule in under a minute.
    """
