"""`ase-uq md`: molecular dynamics that stops where the potential no longer knows."""

import math
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

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
    Seed,
    StepLog,
    WatchedQuantity,
    check_before,
    given_options,
)
from ase_uq.cli.outputs import check_outputs, check_xyz_names, leave_list
from ase_uq.cli.running import HALTED, counted, flagged, halt_message, progress
from ase_uq.io.files import check_distinct
from ase_uq.sampling.ensembles import BAROSTAT_TIME, FRICTION, THERMOSTAT_TIME, MDEnsemble

if TYPE_CHECKING:
    from ase import Atoms

    from ase_uq.dynamics.restart import Restart

# Options that only some ensembles have.
_BELONG: dict[str, tuple[MDEnsemble, ...]] = {
    "--temperature-end": (MDEnsemble.langevin, MDEnsemble.bussi),
    "--friction": (MDEnsemble.langevin,),
    "--thermostat-time": (MDEnsemble.bussi, MDEnsemble.npt),
    "--barostat-time": (MDEnsemble.npt,),
    "--pressure": (MDEnsemble.npt,),
}


def md(
    context: typer.Context,
    start: Annotated[
        Path,
        typer.Argument(
            metavar="START", help="Structure: the last frame of any file ASE reads. Its velocities are used."
        ),
    ],
    model: Model,
    temperature: Annotated[
        float,
        typer.Option(
            "--temperature", min=0, help="Temperature, K. In nve: only for initial velocities, if START has none."
        ),
    ],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Number of steps of the whole run.")],
    uq: UQ = None,
    ensemble: Annotated[
        MDEnsemble,
        typer.Option("--ensemble", help="NVT by langevin or bussi, nve, or npt (isotropic MTK, no constraints)."),
    ] = MDEnsemble.langevin,
    temperature_end: Annotated[
        float | None,
        typer.Option(
            "--temperature-end", min=0, help="Temperature at the last step, K: heat or cool evenly (NVT only)."
        ),
    ] = None,
    timestep: Annotated[float, typer.Option("--timestep", help="Time step, fs.")] = 0.5,
    friction: Annotated[
        float | None, typer.Option("--friction", show_default=f"{FRICTION:g}", help="Friction of langevin, 1/fs.")
    ] = None,
    thermostat_time: Annotated[
        float | None,
        typer.Option(
            "--thermostat-time", show_default=f"{THERMOSTAT_TIME:g}", help="Time constant of bussi and npt, fs."
        ),
    ] = None,
    barostat_time: Annotated[
        float | None,
        typer.Option("--barostat-time", show_default=f"{BAROSTAT_TIME:g}", help="Time constant of npt, fs."),
    ] = None,
    pressure: Annotated[
        float | None, typer.Option("--pressure", show_default="0", help="Pressure of npt, GPa; 1 bar is 0.0001 GPa.")
    ] = None,
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
        float | None, typer.Option("--max-temperature", help="Halt if the atoms are hotter than this, K.")
    ] = None,
    bonds: Bonds = False,
    frames: FlaggedFrames = None,
    before: Before = 0,
    trajectory: Annotated[
        Path | None,
        typer.Option("--trajectory", metavar="FILE", help="Extended XYZ file for the run, including its last frame."),
    ] = None,
    interval: Annotated[int, typer.Option("--interval", min=1, help="Steps between frames of --trajectory.")] = 100,
    log: StepLog = None,
    append: Annotated[
        bool,
        typer.Option("--append", help="Go on with the run of --trajectory after a halt, or with other options."),
    ] = False,
    force_probes: ForceProbes = 0,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Run molecular dynamics that saves frames, and halts, when the uncertainty of the forces is too large.

    At each step the largest force uncertainty of an atom, or what --quantity names, is compared with --flag and --halt;
    without them it is written to --log. LEVEL is a number, for forces in eV/Å, or a criterion that the calibration data
    turn into one: q0.99, which 99 % of the calibration frames stay below; miss=0.1@0.3, which misses at most 0.1 of the
    frames with an error above 0.3 eV/Å (miss=0.1@0.3/0.9 with confidence 0.9); bound=0.95@0.3, below which errors stay
    within 0.3 eV/Å with confidence 0.95; alarms=0.05@100ps or alarms=0.05@20000, which disturbs at most 0.05 of good
    runs of 100 ps or of 20000 readings ([bold]ase-uq reference[/] makes the runs for it).

    Frames that reach --flag are added to --frames at once, ready to be labelled. A halted run exits with code 3; the
    last frame of --trajectory is then the frame that halted it, with its velocities.

    With --trajectory a run that ended early, however it ended, goes on where it was when the same command is given
    again: --steps and --temperature-end are of the whole run. What it needs for that is in FILE.restart, which is saved
    every few seconds; rows and frames that were written after it are made again. To go on after a halt, or with other
    options, add --append: raise --halt or lower --temperature, or the next step is likely to halt as well.

    [dim]ase-uq md --model mace:my.model --uq my.uq.safetensors start.xyz --temperature 300 --temperature-end 1500
    --steps 20000 --flag q0.99 --halt 0.5 --frames flagged.xyz --trajectory run.xyz[/]
    """
    belonging = {
        "--temperature-end": temperature_end,
        "--friction": friction,
        "--thermostat-time": thermostat_time,
        "--barostat-time": barostat_time,
        "--pressure": pressure,
    }
    _check_belong(ensemble, belonging)
    numbers = {name: value for name, value in belonging.items() if name not in ("--temperature-end", "--pressure")}
    _check_positive(numbers | {"--timestep": timestep, "--max-temperature": max_temperature})
    _check_finite({"--temperature": temperature, "--temperature-end": temperature_end})
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
    check_xyz_names({"--frames": frames, "--trajectory": trajectory})
    check_distinct([], frames, trajectory, log)
    check_distinct([start], frames, log)
    goes_on = trajectory is not None and trajectory.with_name(trajectory.name + ".restart").exists()
    check_outputs(log, may_exist=goes_on, otherwise="remove it")
    check_outputs(trajectory)

    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.cli.start import give_calculator
    from ase_uq.display.progress import progress_bar
    from ase_uq.dynamics.run import ramp, run_md
    from ase_uq.dynamics.saved_run import monitored
    from ase_uq.sampling.ensembles import make_dynamics
    from ase_uq.sampling.momenta import set_thermal_momenta

    rng = seed_all(seed)
    restart, atoms = _restart(context, start, trajectory, steps, append)
    with restart or nullcontext():
        if not atoms.has("momenta"):
            set_thermal_momenta(atoms, temperature, rng)
        calculator = load_calculator(model, uq, device, dtype, policy.every, force_probes=force_probes)
        give_calculator(atoms, calculator)
        dynamics = make_dynamics(
            ensemble,
            atoms,
            timestep=timestep,
            temperature=temperature,
            friction=FRICTION if friction is None else friction,
            thermostat_time=THERMOSTAT_TIME if thermostat_time is None else thermostat_time,
            barostat_time=BAROSTAT_TIME if barostat_time is None else barostat_time,
            pressure=pressure or 0.0,
            rng=rng,
        )
        monitor = monitored(dynamics, restart, policy=policy, before=before, frames=frames, log=log)
        if dynamics.nsteps:
            typer.echo(f"going on from step {dynamics.nsteps} of {steps}", err=True)
        for line in told(policy, calculator, atoms.get_chemical_symbols()):
            typer.echo(line, err=True)
        if temperature_end is not None:
            heat = ramp(dynamics, temperature, temperature_end, steps)
            heat()  # a run that goes on shows its first step to no observer
            dynamics.attach(heat)
        stopwatch = Stopwatch(calculator)
        dynamics.insert_observer(stopwatch.stop)
        bar = progress_bar(total=steps, initial=dynamics.nsteps, desc="md", unit="step")
        with ends_with_its_step(dynamics) as interruption, bar:
            halted = run_md(
                dynamics,
                monitor,
                steps,
                restart=restart,
                interval=interval,
                after_step=progress(bar, dynamics, monitor, stopwatch),
            )
    leave_list(frames)
    if interruption.number is not None and not halted and dynamics.nsteps < steps:
        and_then = "" if trajectory is None else "; the same command goes on from there"
        typer.echo(f"interrupted at step {dynamics.nsteps}{and_then}", err=True)
        raise typer.Exit(interruption.exit_code)
    if every > 1:
        typer.echo(stopwatch.saved(every), err=halted)
    if halted:
        typer.echo(halt_message(monitor, frames, before), err=True)
        if trajectory is not None:
            typer.echo(
                f"  {trajectory} ends with this step and its velocities; to go on from here, give --append and a "
                "higher --halt or a lower --temperature",
                err=True,
            )
        raise typer.Exit(HALTED)
    typer.echo(f"done: {counted(steps, 'step')}, {monitor.time_fs:.6g} fs; {flagged(monitor, frames)}")


def _restart(
    context: typer.Context, start: Path, trajectory: Path | None, steps: int, append: bool
) -> "tuple[Restart | None, Atoms]":
    """What the run of a trajectory goes on from, if it has one, and the structure that it begins or goes on with."""
    from ase_uq.cli.start import read_start
    from ase_uq.dynamics.restart import Restart, digest_of

    if trajectory is None:
        return None, read_start(start)
    command = given_options(context, but=("--trajectory", "--frames", "--log", "--append", "--device"))
    if trajectory.exists() and start.exists() and trajectory.samefile(start):
        restart = Restart(trajectory, steps, command, append=append)
        assert restart.atoms is not None  # a trajectory without a run is refused
        atoms = restart.atoms
    else:
        atoms = read_start(start)
        restart = Restart(trajectory, steps, command | {"START": digest_of(atoms)}, append=append)
    return restart, atoms if restart.atoms is None else restart.atoms


def _check_belong(ensemble: MDEnsemble, given: dict[str, float | None]) -> None:
    """Refuses options that an ensemble has no use for; `given` has None for those that were not given."""
    for option, value in given.items():
        if value is not None and ensemble not in _BELONG[option]:
            raise typer.BadParameter(
                f"it belongs to --ensemble {' and '.join(_BELONG[option])}, not to {ensemble}. Leave it out.",
                param_hint=f"'{option}'",
            )


def _check_positive(numbers: dict[str, float | None]) -> None:
    for name, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise typer.BadParameter(f"{value} is not a positive number.", param_hint=f"'{name}'")


def _check_finite(temperatures: dict[str, float | None]) -> None:
    for name, value in temperatures.items():
        if value == math.inf:
            raise typer.BadParameter("inf is not a temperature.", param_hint=f"'{name}'")
