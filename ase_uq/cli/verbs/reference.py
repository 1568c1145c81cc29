"""`ase-uq reference`: runs in which the potential is trusted, for thresholds that count false alarms."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.options import UQ, Device, DType, Model, Reduce, Seed
from ase_uq.cli.outputs import check_outputs


def reference(
    start: Annotated[Path, typer.Argument(metavar="START", help="Structure: the last frame of any file ASE reads.")],
    model: Model,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="K at which the potential is trusted.")],
    out: Annotated[
        Path,
        typer.Option(
            "--out",
            metavar="FILE",
            help="Where to write the uncertainty model with these runs; may be the file of --uq.",
        ),
    ],
    uq: UQ = None,
    runs: Annotated[
        int,
        typer.Option(
            "--runs", min=1, help="Number of independent runs; 19 can guarantee 5 % false alarms, 9 can guarantee 10 %."
        ),
    ] = 20,
    ps: Annotated[float, typer.Option("--ps", help="Length of each run, ps.")] = 5.0,
    timestep: Annotated[float, typer.Option("--timestep", help="Time step, fs.")] = 0.5,
    friction: Annotated[float, typer.Option("--friction", help="Friction of the Langevin thermostat, 1/fs.")] = 0.01,
    equilibration: Annotated[
        float, typer.Option("--equilibration", min=0, help="Equilibration before each run, ps.")
    ] = 1.0,
    interval: Annotated[int, typer.Option("--interval", min=1, help="Steps between readings.")] = 1,
    reduce: Reduce = "max",
    beyond: Annotated[
        float,
        typer.Option(
            "--beyond",
            min=0,
            max=1,
            help="Largest share of readings that may be beyond the calibration data: refused above.",
        ),
    ] = 0.2,
    add: Annotated[bool, typer.Option("--add", help="Add to the runs that --uq already contains.")] = False,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Watch the uncertainty in runs where the potential is trusted, so that false alarms can be counted.

    Makes independent Langevin runs from START; no labels are needed. Their readings are stored in the uncertainty
    model. With --halt alarms=0.05@100ps, `ase-uq md` then has a threshold that at most 5 % of such runs of 100 ps
    reach. Runs that leave the calibration data are told of, and refused above --beyond. Ctrl-C keeps the runs that are
    complete; --add makes more.

    [dim]ase-uq reference --model mace:my.model --uq my.uq.safetensors start.xyz --temperature 300 --out
    my.uq.safetensors[/]
    """
    check_outputs(out)
    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.io.frames import read_frames
    from ase_uq.sampling.reference_runs import reference_runs
    from ase_uq.thresholds.criteria import FalseAlarms
    from ase_uq.thresholds.reduction import Reduction

    seed_all(seed)
    atoms = read_frames(start, name="START")[-1]
    atoms.calc = calculator = load_calculator(model, uq, device, dtype)
    made = reference_runs(
        atoms,
        temperature=temperature,
        n_runs=runs,
        ps=ps,
        timestep=timestep,
        friction=friction,
        equilibration=equilibration,
        interval=interval,
        reduction=Reduction(reduce),
        before=calculator.uncertainty_model.reference if add else None,
        beyond=beyond,
        seed=seed,
        announce=_announce(runs, round(1000 * (ps + equilibration) / timestep)),
    )
    fitted = calculator.uncertainty_model.with_reference(made)
    fitted.save(out)
    typer.echo(f"{len(made.readings)} runs of {len(made.readings[0])} readings, {made.conditions}; written to {out}")
    for share in (0.05, 0.1):
        criterion = FalseAlarms(per_run=share, ps=ps)
        try:
            typer.echo(criterion.resolve(fitted.threshold_data(made.reduction)).describe())
        except ValueError as error:
            typer.echo(str(error))


def _announce(runs: int, steps: int) -> Callable[[float, int], None]:
    """Says how long it will take, before it begins."""

    def announce(seconds: float, together: int) -> None:
        minutes = seconds / 60
        time = f"{max(1, seconds):.0f} s" if minutes < 2 else f"{minutes:.0f} min"
        if minutes > 120:
            time = f"{minutes / 60:.1f} h"
        what = f"{runs} runs of {steps} steps, {together} at a time"
        typer.echo(f"{what}: about {time}; fewer --runs or a shorter --ps take less", err=True)

    return announce
