"""`ase-uq reference`: runs in which the potential is trusted, for thresholds that count false alarms."""

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
        Path, typer.Option("--out", metavar="FILE", help="Uncertainty model with these runs; may be the one of --uq.")
    ],
    uq: UQ = None,
    runs: Annotated[
        int, typer.Option("--runs", min=1, help="Independent runs; 19 guarantee 5 %, 9 guarantee 10 %.")
    ] = 20,
    ps: Annotated[float, typer.Option("--ps", help="Length of each run.")] = 5.0,
    timestep: Annotated[float, typer.Option("--timestep", help="fs.")] = 0.5,
    friction: Annotated[float, typer.Option("--friction", help="Of the Langevin thermostat, 1/fs.")] = 0.01,
    equilibration: Annotated[float, typer.Option("--equilibration", min=0, help="Before each run, ps.")] = 1.0,
    interval: Annotated[int, typer.Option("--interval", min=1, help="Steps between readings.")] = 1,
    reduce: Reduce = "max",
    add: Annotated[bool, typer.Option("--add", help="Add to the runs that --uq carries already.")] = False,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Watch the uncertainty in runs where the potential is trusted, so that false alarms can be counted.

    Independent Langevin runs from START; no labels are needed. Their readings go into the uncertainty model, and then
    --halt alarms=0.05@100ps of `ase-uq md` is a threshold that at most 5 % of such runs of 100 ps reach. Ctrl-C keeps
    the runs that are whole; --add makes more.

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
    found = reference_runs(
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
        seed=seed,
    )
    fitted = calculator.uncertainty_model.with_reference(found)
    fitted.save(out)
    typer.echo(f"{len(found.readings)} runs of {len(found.readings[0])} readings, {found.conditions}; written to {out}")
    for share in (0.05, 0.1):
        criterion = FalseAlarms(per_run=share, ps=ps)
        try:
            typer.echo(criterion.resolve(fitted.threshold_data(found.reduction)).describe())
        except ValueError as error:
            typer.echo(str(error))
