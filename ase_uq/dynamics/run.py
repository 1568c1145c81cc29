"""Molecular dynamics under a monitor, with a trajectory from which another process can go on."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

from ase import Atoms, units
from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import write_frames
from ase_uq.io.results import annotated
from ase_uq.sampling.ensembles import set_temperature


@dataclass(frozen=True)
class Origin:
    """Step and time at which a run begins to count.

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

    @classmethod
    def at_end_of(cls, last: Atoms) -> Self:
        """The origin at the last frame of a trajectory; step 0 if no run has written that frame."""
        if not {"step", "time_fs"} <= last.info.keys():
            return cls(written=True)
        return cls(int(last.info["step"]), float(last.info["time_fs"]), written=True, judged=True)


_BEGINNING = Origin()


def run_md(
    dynamics: MolecularDynamics,
    monitor: UncertaintyMonitor,
    steps: int,
    *,
    trajectory: str | os.PathLike[str] | None = None,
    interval: int = 100,
    origin: Origin = _BEGINNING,
    after_step: Callable[[], None] | None = None,
) -> bool:
    """Runs dynamics for a number of steps, or until the monitor halts it; the trajectory ends with the last step.

    Args:
        dynamics: The run, at its start.
        monitor: Monitor made for this run, and not attached yet.
        steps: Number of steps to run.
        trajectory: Extended XYZ file to which frames are added, with `step` and `time_fs`; None for no file.
        interval: Steps between frames of the trajectory.
        origin: Place of the first structure, if an earlier run has written it.
        after_step: Function called after each step has been judged, including a step that halts.

    Returns:
        Whether the run was halted.
    """
    if origin.judged:
        place = {"step": origin.step, "time_fs": origin.time_fs, "judged_step": origin.step}
        monitor.restore(monitor.state() | place)
    written = origin.step if origin.written else -1

    def write() -> None:
        nonlocal written
        step = origin.step + dynamics.nsteps
        if trajectory is not None and step > written:
            written = step
            info = {"step": step, "time_fs": origin.time_fs + dynamics.get_time() / units.fs}
            write_frames(trajectory, [annotated(dynamics.atoms, **info)], append=True)

    # The monitor comes first, so that the others see its reading; a step at which it raises is the last one anyway.
    dynamics.attach(monitor)
    dynamics.attach(write, interval=interval)
    if after_step is not None:
        dynamics.attach(after_step)
    halted = False
    try:
        dynamics.run(steps)
    except UncertaintyHalt:
        halted = True
        if after_step is not None:
            after_step()
    write()
    return halted


def ramp(dynamics: MolecularDynamics, start: float, end: float, steps: int) -> Callable[[], None]:
    """An observer that changes the thermostat's temperature linearly from `start` to `end`, K, over `steps` steps."""

    def heat() -> None:
        set_temperature(dynamics, start + (end - start) * dynamics.nsteps / steps)

    return heat
