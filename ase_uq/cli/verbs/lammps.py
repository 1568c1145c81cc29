"""`ase-uq lammps`: a user's own LAMMPS script, with a potential's forces and a halt where it no longer knows."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

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
    given_options,
)
from ase_uq.cli.outputs import check_inputs, check_outputs, check_xyz_names, leave_list
from ase_uq.cli.running import HALTED, flagged, halt_message, progress
from ase_uq.errors import InputError, UncertaintyHalt
from ase_uq.io.files import check_distinct

if TYPE_CHECKING:
    from collections.abc import Sequence

    from ase_uq.dynamics import UncertaintyMonitor
    from ase_uq.dynamics.monitor_state import MonitorState
    from ase_uq.engines.lammps import LammpsDynamics


def lammps(
    context: typer.Context,
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
    state: Annotated[
        Path | None,
        typer.Option(
            "--state", metavar="FILE", help="File for the rules of the run, from which the next process goes on."
        ),
    ] = None,
    append: Annotated[
        bool, typer.Option("--append", help="Go on with the run of --state after a halt, or with other options.")
    ] = False,
    charge: Annotated[
        int | None, typer.Option("--charge", help="Total charge in e, for a potential that reads it.")
    ] = None,
    spin: Annotated[
        int | None,
        typer.Option("--spin", min=1, help="Spin multiplicity, 1 for closed shells, for a potential that reads it."),
    ] = None,
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

    With --state the rules go on as well, where the script of the next process begins with read_restart: with what they
    remember, and with --log and --frames, where rows and frames of steps that are made again are dropped. It is saved
    at the end and every few seconds, and its last two steps at which a restart N of the script writes a file stay in
    it. To go on after a halt, or with other options, add --append.

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
    check_distinct([script], frames, log, state)
    check_outputs(log, may_exist=state is not None and state.exists(), otherwise="remove it")
    check_outputs(state)

    from ase_uq.cli.potential import info_of, load_calculator
    from ase_uq.display.progress import progress_bar
    from ase_uq.dynamics.saved_run import monitored
    from ase_uq.engines.lammps import LammpsDynamics, open_lammps
    from ase_uq.engines.lammps.script import execute_rest, its_own_errors, make_box

    saved = _saved(context, script, state, append)
    calculator = load_calculator(model, uq, device, dtype, every, force_probes=force_probes)
    info = info_of(calculator, {"charge": charge, "spin": spin})
    watches: list[UncertaintyMonitor] = []
    halted = False
    with its_own_errors(), open_lammps("-screen", "none") as instance:
        rest = make_box(instance, script)
        symbols = [symbol.strip() for symbol in elements.split(",")]
        dynamics = LammpsDynamics(instance, calculator, symbols, info=info)
        stopwatch = Stopwatch(calculator)
        dynamics.attach(stopwatch.stop)
        bar = progress_bar(initial=dynamics.nsteps, desc="lammps", unit="step")

        def watch() -> None:
            """Attaches the others at the first step: before it there may be no atoms."""
            if watches:
                return
            monitor = monitored(dynamics, saved, policy=policy, before=before, frames=frames, log=log)
            watches.append(monitor)
            dynamics.attach(monitor)
            _attach_saved(saved, monitor)
            dynamics.attach(progress(bar, dynamics, monitor, stopwatch))
            for line in told(policy, calculator, dynamics.atoms.get_chemical_symbols()):
                typer.echo(line, err=True)

        dynamics.attach(watch)
        with saved or nullcontext(), ends_with_its_step(dynamics) as interruption, bar:
            try:
                with _going_on(saved, dynamics, watches):
                    execute_rest(dynamics.execute_file, rest)
            except UncertaintyHalt:
                halted = True
    if not watches:
        raise InputError(f"{script} has no command that moves atoms, such as run.")
    leave_list(frames)
    (monitor,) = watches
    if interruption.number is not None and not halted:
        and_then = "" if state is None else f"; a script with read_restart goes on from there with --state {state}"
        typer.echo(f"interrupted at step {dynamics.nsteps}{and_then}", err=True)
        raise typer.Exit(interruption.exit_code)
    if every > 1:
        typer.echo(stopwatch.saved(every), err=halted)
    if halted:
        typer.echo(halt_message(monitor, frames, before), err=True)
        if state is not None:
            typer.echo(
                f"  {state} has the rules of this step; to go on from here, give --append and a higher --halt or a "
                "lower temperature",
                err=True,
            )
        raise typer.Exit(HALTED)
    typer.echo(f"done: step {dynamics.nsteps}, {monitor.time_fs:.6g} fs; {flagged(monitor, frames)}")


def _saved(context: typer.Context, script: Path, state: Path | None, append: bool) -> "MonitorState | None":
    """What the rules go on from, if they are to go on."""
    if state is None:
        if append:
            raise typer.BadParameter("it goes on with the run of --state: give that too.", param_hint="'--append'")
        return None
    from ase_uq.dynamics.monitor_state import MonitorState
    from ase_uq.engines.lammps.script import check_steps_rise, steps_between_restarts

    check_steps_rise(script)
    command = given_options(context, but=("--state", "--frames", "--log", "--append", "--device"))
    return MonitorState(state, command, append=append, intervals=steps_between_restarts(script))


@contextmanager
def _going_on(
    saved: "MonitorState | None", dynamics: "LammpsDynamics", watches: "Sequence[UncertaintyMonitor]"
) -> Iterator[None]:
    """Goes on at the step at which LAMMPS stands, before its script does anything else; at the end saves the last one.

    Args:
        saved: What the rules go on from; None for nothing.
        dynamics: The run, none of whose steps was made yet.
        watches: The monitor, once there is one.
    """
    if saved is None:
        yield
        return
    saved.go_to(dynamics.nsteps)
    calculator: Any = dynamics.atoms.calc
    calculator.n_calculated = saved.n_calculated
    status = "failed"
    try:
        yield
        status = "ended"
    except UncertaintyHalt:
        status = "halted"
        raise
    finally:
        # Not a step that failed, whose structure no script should go on from.
        if watches and (status == "halted" or saved.last == dynamics.nsteps):
            saved.save(dynamics, watches[0], status)


def _attach_saved(saved: "MonitorState | None", monitor: "UncertaintyMonitor") -> None:
    """Saves each step behind the monitor."""
    if saved is None:
        return
    if saved.goes_on:
        typer.echo(f"going on from step {saved.step}", err=True)
    dynamics: Any = monitor.dynamics
    dynamics.attach(saved.save, 1, dynamics, monitor, "running")
