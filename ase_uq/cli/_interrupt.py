"""Ctrl-C in a run: the current step is finished, so that the files are complete and the run can be resumed."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ase.md.md import MolecularDynamics

INTERRUPTED = 130  # the exit code of a program that was ended by Ctrl-C


class Interruption:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def ends_with_its_step(dynamics: "MolecularDynamics") -> Iterator[Interruption]:
    """Lets the first Ctrl-C end a run after its current step; the second ends it at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread receives signals
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        interruption.asked = True
        dynamics.max_steps = dynamics.nsteps
        typer.echo("\ninterrupted: ending with this step; Ctrl-C again ends at once", err=True)

    signal.signal(signal.SIGINT, stop)
    try:
        yield interruption
    finally:
        signal.signal(signal.SIGINT, before)
