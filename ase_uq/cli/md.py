"""`ase-uq md`: molecular dynamics that stops where the potential no longer knows."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ase_uq.cli.options import UQ, Device, DType, Model, Seed, check_xyz_name

if TYPE_CHECKING:
    from ase import Atoms
    from ase.md.langevin import Langevin

    from ase_uq.dynamics import UncertaintyMonitor
    from ase_uq.thresholds import Quantile

HALTED = 3  # exit code

# Anything else that START carries, reference forces above all, would stand beside later positions as if it were theirs.
_KEPT_ARRAYS = {"numbers", "positions", "momenta", "masses", "tags", "initial_charges", "initial_magmoms"}


@dataclass(frozen=True)
class _Origin:
    """Where a run begins to count.

    Args:
        step: Step of its first structure.
        time_fs: Time of that step, fs.
        written: Whether its frame is in the trajectory already.
        judged: Whether an earlier run has judged that step.
    """

    step: int = 0
    time_fs: float = 0.0
    written: bool = False
    judged: bool = False


def _threshold(text: str) -> "float | Quantile":
    """`0.5` is eV/Å, `q0.99` the reading that 99 % of the calibration frames stay below."""
    from ase_uq.thresholds import Quantile

    try:
        level = Quantile(float(text[1:])) if text.startswith("q") else float(text)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is neither a number in eV/Å, like 0.5, nor a quantile of the calibration frames, like q0.99."
        ) from error
    if isinstance(level, float) and not level > 0:
        raise typer.BadParameter(f"a threshold is a positive number in eV/Å, not {text}.")
    return level


def _reduction(text: str) -> str | float:
    from ase_uq.readings import Reduction

    try:
        kind = float(text) if text[:1] in "0." else text
        Reduction(kind)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is none of max, mean and top3, nor a quantile of the atoms between 0 and 1, like 0.9."
        ) from error
    return kind


_LEVEL: dict[str, Any] = {"metavar": "X|qQ", "parser": _threshold}


def md(
    start: Annotated[
        Path,
        typer.Argument(
            metavar="START", help="Structure: the last frame of any file ASE reads. Its velocities are used."
        ),
    ],
    model: Model,
    temperature: Annotated[float, typer.Option("--temperature", min=0, help="K.")],
    steps: Annotated[int, typer.Option("--steps", min=1, help="Steps to run.")],
    uq: UQ = None,
    temperature_end: Annotated[
        float | None,
        typer.Option("--temperature-end", min=0, help="K at the last step of this command: heat or cool evenly."),
    ] = None,
    timestep: Annotated[float, typer.Option("--timestep", help="fs.")] = 0.5,
    friction: Annotated[float, typer.Option("--friction", help="Of the Langevin thermostat, 1/fs.")] = 0.01,
    flag: Annotated[Any, typer.Option("--flag", help="Keep frames from this uncertainty on.", **_LEVEL)] = None,
    halt: Annotated[Any, typer.Option("--halt", help="Halt the run at this uncertainty.", **_LEVEL)] = None,
    patience: Annotated[
        float | None, typer.Option("--patience", help="Halt only after this long above --halt without a break, fs.")
    ] = None,
    reduce: Annotated[
        Any,
        typer.Option(
            "--reduce",
            metavar="max|mean|top3|Q",
            parser=_reduction,
            help="How atoms become one reading: max, mean, top3, or a quantile like 0.9.",
        ),
    ] = "max",
    frames: Annotated[
        Path | None, typer.Option("--frames", metavar="FILE", help="Flagged frames are added to this .xyz file.")
    ] = None,
    trajectory: Annotated[
        Path | None, typer.Option("--trajectory", metavar="FILE", help=".xyz file of the run, with its last frame.")
    ] = None,
    interval: Annotated[int, typer.Option("--interval", min=1, help="Steps between frames of --trajectory.")] = 100,
    log: Annotated[
        Path | None, typer.Option("--log", metavar="FILE", help="CSV file: step, time, reading and level of each step.")
    ] = None,
    append: Annotated[bool, typer.Option("--append", help="Add to --trajectory and --log where they exist.")] = False,
    device: Device = "",
    dtype: DType = "",
    seed: Seed = 0,
) -> None:
    """Run NVT Langevin dynamics that flag and halt themselves by the uncertainty of the forces.

    At each step the largest force uncertainty of an atom is compared with --flag and --halt: numbers in eV/Å, or
    quantiles of the calibration frames such as q0.99. Frames above --flag go to --frames at once, ready to be
    labelled. A halted run exits with code 3; its last frame, with velocities, ends --trajectory.

    To go on from there, give that file as START and as --trajectory, with --append: steps and times count on, and
    the frame it starts from is neither judged nor written again. Raise --halt or lower --temperature, or the next
    step is likely to halt as well.

    [dim]ase-uq md --model mace:my.model --uq my.uq.safetensors start.xyz --temperature 300 --temperature-end 1500
    --steps 20000 --flag q0.99 --halt 0.5 --frames flagged.xyz --trajectory run.xyz[/]
    """
    _check_arguments(flag, halt, {"--timestep": timestep, "--friction": friction}, frames, trajectory, log, append)
    import numpy as np
    from ase import units
    from ase.md.langevin import Langevin

    from ase_uq.cli.potential import load_calculator, seed_all
    from ase_uq.dynamics import UncertaintyMonitor

    rng = seed_all(seed)
    atoms = _start(start, temperature, rng)
    origin = _Origin()
    if trajectory is not None and trajectory.exists() and trajectory.samefile(start):
        origin = _end_of_run(atoms)
        # From the seed alone, it would be the noise of the first steps once more.
        rng = np.random.default_rng([seed, origin.step])
    calculator = load_calculator(model, uq, device, dtype)
    atoms.info = {key: atoms.info[key] for key in calculator.predictor.backend.info_keys if key in atoms.info}
    atoms.calc = calculator
    # With `fixcm` the centre of mass would stand still and small systems be sampled at a wrong temperature.
    dynamics = Langevin(
        atoms, timestep * units.fs, temperature_K=temperature, friction=friction / units.fs, fixcm=False, rng=rng
    )
    monitor = UncertaintyMonitor(
        dynamics, flag=flag, halt=halt, patience=patience, reduce=reduce, frames=frames, log=log
    )
    if origin.judged:
        place = {"step": origin.step, "time_fs": origin.time_fs, "judged_step": origin.step}
        monitor.restore(monitor.state() | place)
    if temperature_end is not None:
        dynamics.attach(_ramp(dynamics, temperature, temperature_end, steps))
    if _run(dynamics, monitor, steps, trajectory, interval, origin):
        typer.echo(_halt_message(monitor, frames, trajectory), err=True)
        raise typer.Exit(HALTED)
    typer.echo(
        f"done: {_counted(steps, 'step')}, {steps * timestep:.6g} fs; {_counted(monitor.n_flagged, 'frame')} flagged"
        + (f", added to {frames}" if frames and monitor.n_flagged else "")
    )


def _check_arguments(
    flag: object,
    halt: object,
    positive: dict[str, float],
    frames: Path | None,
    trajectory: Path | None,
    log: Path | None,
    append: bool,
) -> None:
    """Everything that can be refused before seconds are spent on importing a potential."""
    if flag is None and halt is None:
        raise typer.BadParameter(
            "give one of them or both, for example --halt 0.5 (eV/Å) or --flag q0.99 (of the calibration frames).",
            param_hint="'--flag' / '--halt'",
        )
    if isinstance(flag, float) and isinstance(halt, float) and flag >= halt:
        raise typer.BadParameter(
            f"{flag:g} eV/Å is not below --halt, {halt:g} eV/Å: no frame could be flagged before the run is halted.",
            param_hint="'--flag'",
        )
    for name, value in positive.items():
        if not value > 0:
            raise typer.BadParameter(f"{value} is not positive.", param_hint=f"'{name}'")
    for name, file in (("--frames", frames), ("--trajectory", trajectory)):
        if file is not None:
            check_xyz_name(file, name)
    from ase_uq.artefact import check_writable

    for file in filter(None, (trajectory, log)):
        if file.exists() and not append:
            raise FileExistsError(f"{file} exists. Give another name, or --append to add this run to it.")
        check_writable(file)


def _start(path: Path, temperature: float, rng: Any) -> "Atoms":
    """The last frame of a file, with its own velocities or those of a temperature."""
    from ase_uq.dynamics.momenta import set_thermal_momenta
    from ase_uq.frames import read_frames

    atoms = read_frames(path, name="START")[-1]
    for name in set(atoms.arrays) - _KEPT_ARRAYS:
        del atoms.arrays[name]
    if not atoms.has("momenta"):
        set_thermal_momenta(atoms, temperature, rng)
    return atoms


def _end_of_run(atoms: "Atoms") -> _Origin:
    """The place of the last frame of a trajectory; the beginning where no run has written it."""
    if not {"step", "time_fs"} <= atoms.info.keys():
        return _Origin(written=True)
    return _Origin(int(atoms.info["step"]), float(atoms.info["time_fs"]), written=True, judged=True)


def _ramp(dynamics: "Langevin", start: float, end: float, steps: int) -> Callable[[], None]:
    def heat() -> None:
        dynamics.set_temperature(temperature_K=start + (end - start) * dynamics.nsteps / steps)

    return heat


def _run(
    dynamics: "Langevin",
    monitor: "UncertaintyMonitor",
    steps: int,
    trajectory: Path | None,
    interval: int,
    origin: _Origin,
) -> bool:
    """Runs with a progress bar and a trajectory that ends with the last step; returns whether it was halted."""
    from ase import units
    from tqdm import tqdm

    from ase_uq.errors import UncertaintyHalt
    from ase_uq.frames import annotated, write_frames

    written = origin.step if origin.written else -1

    def write() -> None:
        nonlocal written
        step = origin.step + dynamics.nsteps
        if trajectory is not None and step > written:
            written = step
            info = {"step": step, "time_fs": origin.time_fs + dynamics.get_time() / units.fs}
            write_frames(trajectory, [annotated(dynamics.atoms, **info)], append=True)

    started = perf_counter()

    def show() -> None:
        days = (perf_counter() - started) / 86400
        speed = dynamics.get_time() / (1000 * 1000 * units.fs) / days
        reading = monitor.last.reading if monitor.last else float("nan")
        kelvin = dynamics.atoms.get_temperature()
        bar.set_postfix_str(f"{reading:.3f} eV/Å, {kelvin:.0f} K, {speed:.2g} ns/day", refresh=False)
        bar.update(dynamics.nsteps - bar.n)

    # The monitor comes first so that the bar shows its reading; a step at which it raises is the last one anyway.
    dynamics.attach(monitor)
    dynamics.attach(write, interval=interval)
    halted = False
    with tqdm(total=steps, desc="md", unit="step") as bar:
        dynamics.attach(show)
        try:
            dynamics.run(steps)
        except UncertaintyHalt:
            halted = True
            show()
    write()
    return halted


def _halt_message(monitor: "UncertaintyMonitor", frames: Path | None, trajectory: Path | None) -> str:
    last = monitor.last
    assert last is not None
    lines = [f"halted at step {last.step}, {last.time_fs:.6g} fs: {last.reason}"]
    if frames is not None:
        lines.append(f"  {_counted(monitor.n_flagged + monitor.n_halted, 'frame')} added to {frames}")
    if trajectory is not None:
        lines.append(
            f"  {trajectory} ends with this step and its velocities; to go on from here, start from it with "
            f"--trajectory {trajectory} --append and a higher --halt or a lower --temperature"
        )
    return "\n".join(lines)


def _counted(number: int, what: str) -> str:
    return f"{number} {what}" + "s" * (number != 1)
