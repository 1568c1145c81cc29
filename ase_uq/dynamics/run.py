"""Molecular dynamics under a monitor, with a trajectory from which another process can go on."""

from collections.abc import Callable

from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.restart import Restart
from ase_uq.errors import UncertaintyHalt
from ase_uq.sampling.ensembles import set_temperature


def run_md(
    dynamics: MolecularDynamics,
    monitor: UncertaintyMonitor,
    steps: int,
    *,
    restart: Restart | None = None,
    interval: int = 100,
    after_step: Callable[[], None] | None = None,
) -> bool:
    """Runs dynamics up to a step, or until the monitor halts it; the trajectory ends with the last step.

    Args:
        dynamics: The run, at its start or where `restart` has set it.
        monitor: Monitor made for this run, and not attached yet.
        steps: Number of steps of the whole run.
        restart: Writes the trajectory, with `step` and `time_fs`, and what the run needs to go on; None for no files.
        interval: Steps between frames of the trajectory.
        after_step: Function called after each step has been judged, including a step that halts.

    Returns:
        Whether the run was halted.
    """
    # The monitor comes first, so that the others see its reading; a step at which it raises is the last one anyway.
    dynamics.attach(monitor)
    if restart is not None:
        dynamics.attach(restart.write, interval, dynamics, monitor)
        dynamics.attach(restart.save, 1, dynamics, monitor, "running")
    if after_step is not None:
        dynamics.attach(after_step)
    halted = False
    try:
        dynamics.run(steps - dynamics.nsteps)
    except UncertaintyHalt:
        halted = True
        if after_step is not None:
            after_step()
    if restart is not None:
        restart.write(dynamics, monitor)
        restart.save(dynamics, monitor, "halted" if halted else "ended")
    return halted


def ramp(dynamics: MolecularDynamics, start: float, end: float, steps: int) -> Callable[[], None]:
    """An observer that changes the thermostat's temperature linearly from `start` to `end`, K, over `steps` steps."""

    def heat() -> None:
        set_temperature(dynamics, start + (end - start) * dynamics.nsteps / steps)

    return heat
