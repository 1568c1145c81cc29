"""Ctrl-C in a run: the step that is under way is finished, so that what is written is whole and can be gone on from."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ase.md.md import MolecularDynamics

INTERRUPTED = 130  # exit code, as of a program that Ctrl-C ended at once


class Interruption:
    """Whether Ctrl-C was pressed."""

    asked = False


@contextmanager
def ends_with_its_step(dynamics: "MolecularDynamics") -> Iterator[Interruption]:
    """Lets the first Ctrl-C end a run after its present step; the second ends it at once."""
    found = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield found  # only the main thread hears of it
        return
    before = signal.getsignal(signal.SIGINT)

    def stop(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        found.asked = True
        dynamics.max_steps = dynamics.nsteps
        typer.echo("\ninterrupted: ending with this step; Ctrl-C again ends at once", err=True)

    signal.signal(signal.SIGINT, stop)
    try:
        yield found
    finally:
        signal.signal(signal.SIGINT, before)
