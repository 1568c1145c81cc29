"""What verbs show of molecular dynamics while it runs, and when it has ended."""

import math
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

from ase_uq.cli._stopwatch import Stopwatch

if TYPE_CHECKING:
    from ase.md.md import MolecularDynamics
    from tqdm import tqdm

    from ase_uq.dynamics import UncertaintyMonitor

HALTED = 3  # exit code


def progress(
    bar: "tqdm", dynamics: "MolecularDynamics", monitor: "UncertaintyMonitor", stopwatch: Stopwatch
) -> Callable[[], None]:
    """An observer that shows each step in a bar; the stopwatch, which is started last, does not count that."""
    from ase import units

    unit = monitor.policy.watched.unit or monitor.policy.quantity
    started, first = perf_counter(), dynamics.get_time()
    reading = math.nan

    def show() -> None:
        nonlocal reading
        days = (perf_counter() - started) / 86400
        speed = (dynamics.get_time() - first) / (1000 * 1000 * units.fs) / days
        if monitor.last and not math.isnan(monitor.last.reading):  # NaN at a step that --every skips
            reading = monitor.last.reading
        kelvin = dynamics.atoms.get_temperature()
        bar.set_postfix_str(f"{reading:.3f} {unit}, {kelvin:.0f} K, {speed:.2g} ns/day", refresh=False)
        bar.update(dynamics.nsteps - bar.n)
        stopwatch.start()

    return show


def halt_message(monitor: "UncertaintyMonitor", frames: Path | None, before: int) -> str:
    """Where a run was halted and why, and how many frames it left.

    Args:
        monitor: The monitor that has halted it.
        frames: Of `--frames`.
        before: Of `--before`.
    """
    last = monitor.last
    assert last is not None
    text = f"halted at step {last.step}, {last.time_fs:.6g} fs: {last.reason}"
    if frames is None:
        return text
    and_before = " (and those before them)" if before else ""
    return f"{text}\n  {counted(monitor.n_flagged + monitor.n_halted, 'frame')} added to {frames}{and_before}"


def flagged(monitor: "UncertaintyMonitor", frames: Path | None) -> str:
    """How many frames were flagged, and where they are."""
    added = f", added to {frames}" if frames and monitor.n_flagged else ""
    return f"{counted(monitor.n_flagged, 'frame')} flagged{added}"


def counted(number: int, what: str) -> str:
    """A number of things, in words."""
    return f"{number} {what}" + "s" * (number != 1)
