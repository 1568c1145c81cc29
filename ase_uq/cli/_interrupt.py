"""Ctrl-C or SIGTERM in a run: the current step is finished, so that the files are complete and the run can go on."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from ase.md.md import MolecularDynamics


class Interruption:
    """The signal that ended a run; None while there was none."""

    number: int | None = None

    @property
    def exit_code(self) -> int:
        """The exit code of a program that was ended by this signal."""
        assert self.number is not None
        return 128 + self.number


@contextmanager
def ends_with_its_step(dynamics: "MolecularDynamics") -> Iterator[Interruption]:
    """Lets the first Ctrl-C or SIGTERM end a run after its current step; the second ends it at once."""
    interruption = Interruption()
    if threading.current_thread() is not threading.main_thread():
        yield interruption  # only the main thread receives signals
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def as_before() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    def stop(number: int, frame: object) -> None:
        as_before()
        interruption.number = number
        dynamics.max_steps = dynamics.nsteps
        typer.echo("\ninterrupted: ending with this step; a second signal (Ctrl-C) ends at once", err=True)

    for number in before:
        signal.signal(number, stop)
    try:
        yield interruption
    finally:
        as_before()
