"""What the terminal shows: our errors and warnings as one line each, and no noise from other packages."""

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TextIO

import typer
from typer.core import TyperGroup


class ErrorsAsLines(TyperGroup):
    """The group of all verbs: errors of ours or of the file system become one line on stderr and exit code 1."""

    def invoke(self, ctx: Any) -> Any:
        """Runs the verb; unforeseen errors keep their traceback, for the bug report."""
        from ase_uq.errors import UQError

        with only_our_messages():
            try:
                return super().invoke(ctx)
            except (UQError, ValueError, OSError) as error:
                _stop(error)
            except RuntimeError as error:
                if type(error).__name__ != "OutOfMemoryError":  # torch's; torch may not be imported here
                    raise
                _stop(f"the device is out of memory. Give a smaller --batch-atoms. ({str(error).splitlines()[0]})")


@contextmanager
def only_our_messages() -> Iterator[None]:
    """Prints each of our warnings as one line on stderr; hides the warnings and log messages of other packages.

    Messages such as a default dtype that does not match a model concern the authors of these packages, not our users.
    """
    from ase_uq.errors import UQWarning

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        if issubclass(category, UQWarning):
            typer.echo(f"warning: {message}", err=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UQWarning)
        warnings.showwarning = show
        with _logging_disabled(logging.WARNING):
            yield


@contextmanager
def silence() -> Iterator[None]:
    """Swallows everything written to stdout and stderr, also by C++ code: banners of packages being imported."""
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    kept = [os.dup(number) for number in (1, 2)]
    streams = sys.stdout, sys.stderr
    try:
        with open(os.devnull, "w") as nowhere, _logging_disabled(logging.CRITICAL):
            for number in (1, 2):
                os.dup2(nowhere.fileno(), number)
            sys.stdout = sys.stderr = nowhere
            try:
                yield
            finally:
                sys.stdout, sys.stderr = streams
    finally:
        for number, copy in zip((1, 2), kept, strict=True):
            os.dup2(copy, number)
            os.close(copy)


@contextmanager
def _logging_disabled(level: int) -> Iterator[None]:
    """Drops records up to a level."""
    before = logging.root.manager.disable
    logging.disable(max(level, before))
    try:
        yield
    finally:
        logging.disable(before)


def _stop(error: object) -> None:
    typer.echo(f"error: {error}", err=True)
    raise typer.Exit(1)
