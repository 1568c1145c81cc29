"""`ase-uq lammps`: a user's own LAMMPS script, with a potential's forces and a halt where it no longer knows."""

from pathlib import Path
from typing import Annotated

import typer

from ase_uq.cli._interrupt import ends_with_its_step
from ase_uq.cli._stopwatch import Stopwatch
from ase_uq.cli.levels import check_watches, told, watch_policy
from ase_uq.cli.options import (
    UQ,
    AtOnce,
    Before,
    Bonds,
    Device,
    DType,
    EachElement,
    Every,
    Flag,
    FlaggedFrames,
    ForceProbes,
    Halt,
    Model,
    Patience,
    Quantity,
    Reduce,
    Refractory,
    StepLog,
    WatchedQuantity,
    check_before,
)
from ase_uq.cli.outputs import check_inputs, check_outputs, check_xyz_names, leave_list
from ase_uq.cli.running import HALTED, flagged, halt_message, progress
from ase_uq.io.files import check_distinct


def lammps(
    script: Annotated[
        Path, typer.Argument(metavar="IN", help="Script of LAMMPS in units metal, with pair_style zero.")
    ],
    model: Model,
    elements: Annotated[
        str,
        typer.Option(
            "--elements", metavar="SYMBOLS", help="Element of each atom type, in their order, with commas between."
        ),
    ],
    uq: UQ = None,
    every: Every = 1,
    flag: Flag = None,
    halt: Halt = None,
    patience: Patience = None,
    at_once: AtOnce = None,
    refractory: Refractory = None,
    quantity: Quantity = WatchedQuantity.forces,
    element: EachElement = False,
    reduce: Reduce = "max",
    max_temperature: Annotated[
        float | None, typer.Option("--max-temperature", min=0, help="Halt if the atoms are hotter than this, K.")
    ] = None,
    bonds: Bonds = False,
    frames: FlaggedFrames = None,
    before: Before = 0,
    log: StepLog = None,
    force_probes: ForceProbes = 0,
    device: Device = "",
    dtype: DType = "",
) -> None:
    """Run a script of LAMMPS that saves frames, and halts, when the uncertainty of the forces is too large.

    The script stays as it is: it moves the atoms, and writes what it writes. Forces, energy and virial of the potential
    come in behind the command that makes the box, so that later ones may use d_force_uq, d_energy_uq and d_gamma of
    each atom (a dump, a compute) and f_uq[1] to f_uq[4] (thermo_style, a variable): the largest and the mean force
    uncertainty, that of the energy, and the largest gamma.

    LEVEL of --flag and --halt is a number or a criterion, as for [bold]ase-uq md[/]. A halted run exits with code 3.
    The commands that follow it, but for further runs, are executed: with write_restart at its end, a script leaves what
    another one can go on from.

    [dim]ase-uq lammps in.melt --model mace:my.model --uq my.uq.safetensors --elements Si,O --flag q0.99 --halt 0.5
    --frames flagged.xyz[/]
    """
    check_watches(flag, halt, log)
    check_before(before, frames)
    policy = watch_policy(
        flag,
        halt,
        quantity=quantity.value,
        each_element=element,
        bonds=bonds,
        max_temperature=max_temperature,
        patience=patience,
        at_once=at_once,
        refractory=refractory,
        reduce=reduce,
        every=every,
    )
    check_xyz_names({"--frames": frames})
    check_inputs(script)
    check_distinct([script], frames, log)
    check_outputs(log, may_exist=False, otherwise="remove it")

    from ase_uq.cli.potential import load_calculator
    from ase_uq.display.progress import progress_bar
    from ase_uq.dynamics import UncertaintyMonitor
    from ase_uq.engines.lammps import LammpsDynamics, open_lammps
    from ase_uq.engines.lammps.script import execute_rest, its_own_errors, make_box
    from ase_uq.errors import InputError, UncertaintyHalt

    calculator = load_calculator(model, uq, device, dtype, every, force_probes=force_probes)
    watches: list[UncertaintyMonitor] = []
    halted = False
    with its_own_errors(), open_lammps("-screen", "none") as instance:
        rest = make_box(instance, script)
        dynamics = LammpsDynamics(instance, calculator, [symbol.strip() for symbol in elements.split(",")])
        stopwatch = Stopwatch(calculator)
        dynamics.attach(stopwatch.stop)

        def watch() -> None:
            """Attaches the others at the first step: before it there may be no atoms."""
            if watches:
                return
            watches.append(UncertaintyMonitor(dynamics, policy=policy, before=before, frames=frames, log=log))
            dynamics.attach(watches[0])
            dynamics.attach(progress(bar, dynamics, watches[0], stopwatch))
            for line in told(policy, calculator, dynamics.atoms.get_chemical_symbols()):
                typer.echo(line, err=True)

        dynamics.attach(watch)
        bar = progress_bar(initial=dynamics.nsteps, desc="lammps", unit="step")
        with ends_with_its_step(dynamics) as interruption, bar:
            try:
                execute_rest(dynamics.execute_file, rest)
            except UncertaintyHalt:
                halted = True
    if not watches:
        raise InputError(f"{script} has no command that moves atoms, such as run.")
    leave_list(frames)
    (monitor,) = watches
    if interruption.number is not None and not halted:
        typer.echo(f"interrupted at step {dynamics.nsteps}", err=True)
        raise typer.Exit(interruption.exit_code)
    if every > 1:
        typer.echo(stopwatch.saved(every), err=halted)
    if halted:
        typer.echo(halt_message(monitor, frames, before), err=True)
        raise typer.Exit(HALTED)
    typer.echo(f"done: step {dynamics.nsteps}, {monitor.time_fs:.6g} fs; {flagged(monitor, frames)}")
