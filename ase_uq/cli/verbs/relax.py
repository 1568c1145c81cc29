"""`ase-uq relax`: a relaxation that stops where the potential no longer knows, and rates its result."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli.levels import told, watch_policy
from ase_uq.cli.options import (
    UQ,
    Before,
    Bonds,
    Device,
    DType,
    EachElement,
    Flag,
    FlaggedFrames,
    ForceProbes,
    Halt,
    Model,
    Quantity,
    Reduce,
    Seed,
    WatchedQuantity,
    check_before,
)
from ase_uq.cli.outputs import check_outputs, check_xyz_names, leave_list
from ase_uq.cli.running import HALTED
from ase_uq.io.files import check_distinct


class Optimizer(StrEnum):
    """The optimisers."""

    bfgs = "bfgs"
    lbfgs = "lbfgs"
    fire = "fire"


def relax(
    start: Annotated[Path, typer.Argument(metavar="START", help="Structure: the last frame of any file ASE reads.")],
    model: Model,
    out: Annotated[Path, typer.Option("--out", metavar="OUT.xyz", help="Extended XYZ file for the last structure.")],
    uq: UQ = None,
    fmax: Annotated[float, typer.Option("--fmax", help="Converged if no force is larger than this, eV/Å.")] = 0.05,
    steps: Annotated[int, typer.Option("--steps", min=1, help="Largest number of steps.")] = 500,
    optimizer: Annotated[Optimizer, typer.Option("--optimizer", help="Optimiser of ASE.")] = Optimizer.bfgs,
    cell: Annotated[bool, typer.Option("--cell", help="Relax the cell of a crystal too.")] = False,
    flag: Flag = None,
    halt: Halt = None,
    quantity: Quantity = WatchedQuantity.forces,
    element: EachElement = False,
    reduce: Reduce = "max",
    bonds: Bonds = False,
    frames: FlaggedFrames = None,
    before: Before = 0,
    trajectory: Annotated[
        Path | None, typer.Option("--trajectory", metavar="FILE", help="Extended XYZ file for all steps.")
    ] = None,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="CSV file for step, reading and level of each step.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT, --trajectory and --log if they exist.")
    ] = False,
    force_probes: ForceProbes = 0,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Relax a structure until its forces are small, or until the potential no longer knows.

    Exits with code 0 if it converged, 3 if the uncertainty reached --halt and 1 if it ran out of steps. In all three
    cases OUT has the last structure, from which you can go on, and the printed text says how far to trust it: a minimum
    is located only as well as its forces are known.

    LEVEL of --flag and --halt is a number in the unit of --quantity or a criterion, as for [bold]ase-uq md[/]; neither
    is needed.

    [dim]ase-uq relax start.xyz --model mace:my.model --uq my.uq.safetensors --out relaxed.xyz --fmax 0.02 --halt 0.5[/]
    """
    if not fmax > 0:
        raise typer.BadParameter(f"{fmax} is not positive.", param_hint="'--fmax'")
    check_before(before, frames)
    policy = watch_policy(flag, halt, quantity=quantity.value, each_element=element, bonds=bonds, reduce=reduce)
    check_xyz_names({"--out": out, "--trajectory": trajectory, "--frames": frames})
    check_distinct([start], trajectory, frames, log)
    check_distinct([], out, trajectory, frames, log)
    check_outputs(out, trajectory, log, may_exist=overwrite)

    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.cli.start import give_calculator, read_start
    from ase_uq.dynamics.relaxation import relax as relax_atoms
    from ase_uq.io.frames import write_frames
    from ase_uq.io.results import annotated

    seed_all(seed)
    atoms = read_start(start)
    calculator = load_calculator(model, uq, device, dtype, force_probes=force_probes)
    give_calculator(atoms, calculator)
    for line in told(policy, calculator, atoms.get_chemical_symbols()):
        typer.echo(line, err=True)
    for file in filter(None, (trajectory, log)):
        file.unlink(missing_ok=True)  # both are added to, step by step
    relaxation = relax_atoms(
        atoms,
        fmax=fmax,
        steps=steps,
        optimizer=optimizer.value,
        cell=cell,
        policy=policy,
        before=before,
        frames=frames,
        log=log,
        trajectory=trajectory,
        progress=True,
    )
    leave_list(frames)
    write_frames(out, [annotated(atoms, relax_status=relaxation.status, relax_steps=relaxation.n_steps)])
    typer.echo(relaxation.describe(), err=not relaxation.converged)
    further = {
        "converged": "",
        "uncertain": f"; to go on from there, start from {out} with a higher --halt or without",
        "unfinished": f"; to go on from there, start from {out}",
    }
    typer.echo(f"written to {out}{further[relaxation.status]}", err=not relaxation.converged)
    if not relaxation.converged:
        raise typer.Exit(HALTED if relaxation.status == "uncertain" else 1)
