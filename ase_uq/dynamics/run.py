"""Molecular dynamics that goes on where an earlier run ended: steps, times and the trajectory count on."""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from ase import Atoms, units
from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import write_frames
from ase_uq.io.results import annotated


@dataclass(frozen=True)
class Origin:
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

    @classmethod
    def at_end_of(cls, last: Atoms) -> "Origin":
        """The place of the last frame of a trajectory; the beginning where no run of ours has written it."""
        if not {"step", "time_fs"} <= last.info.keys():
            return cls(written=True)
        return cls(int(last.info["step"]), float(last.info["time_fs"]), written=True, judged=True)


def run(
    dynamics: MolecularDynamics,
    monitor: UncertaintyMonitor,
    steps: int,
    *,
    trajectory: str | os.PathLike[str] | None = None,
    interval: int = 100,
    origin: Origin | None = None,
    observers: Sequence[Callable[[], None]] = (),
) -> bool:
    """Runs so many steps, or until a halt, with a trajectory that ends with the last step whatever it is.

    Args:
        dynamics: What runs.
        monitor: What may halt it.
        steps: Most steps.
        trajectory: Extended XYZ file to which frames are added, with `step` and `time_fs` in info; None for none.
        interval: Steps between two frames.
        origin: Where the run begins to count; by default at step 0.
        observers: What else is called at each step, after the monitor.

    Returns:
        Whether it was halted.
    """
    origin = origin or Origin()
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
    for observer in observers:
        dynamics.attach(observer)
    try:
        dynamics.run(steps)
    except UncertaintyHalt:
        halted = True
    else:
        halted = False
    write()
    return halted
