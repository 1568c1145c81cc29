"""Actions: what happens when a level is reached.

An action is any callable that takes one `Event`. The actions here and your own functions can be mixed in a list; they
run in order, and an exception in one of them ends the run there.
"""

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self, TextIO, cast

from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.io.jsonio import decode, encode
from ase.mep.neb import NEBOptimizer
from ase.optimize.basin import BasinHopping
from ase.optimize.optimize import BaseDynamics
from ase.optimize.sciopt import (
    Converged,
    OptimizerConvergenceError,
    SciPyGradientlessOptimizer,
    SciPyOptimizer,
)

from ase_uq.dynamics.rules import Level
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.extxyz import check_xyz_name, without_unwritable
from ase_uq.io.files import check_appendable
from ase_uq.io.frames import write_frames
from ase_uq.io.labels import drop_labels
from ase_uq.io.results import StoredResults, annotated

_KEPT = ("level", "step", "time_fs", "reading", "threshold", "reason", "image")


@dataclass(frozen=True, kw_only=True, eq=False)
class Event:
    """One judged step of a run.

    Args:
        level: `"ok"`, `"flag"` or `"halt"`.
        step: Step number, which continues in a restored run. In a `WatchedCalculator` it is the number of the
            calculation, in basin hopping that of the judged minimum.
        time_fs: Simulated time, fs; None in an optimiser.
        reading: Reduced force uncertainty that triggered, or is nearest to its threshold, eV/Å; on a path, that of the
            worst image. Also NaN if there is none: in a monitor with only checks, or at a step that skipped it.
        threshold: Threshold of the same rule, eV/Å; NaN if a check triggered.
        reason: What triggered, in words: the rule, the worst atom and its element, or the check; empty at `"ok"`.
        atoms: The running structure itself, with its calculator; copy it to keep it. If the calculator already holds
            the results of another structure, a copy with its own results.
        dynamics: The run; None in a `WatchedCalculator`.
        image: Number of the image on a path, from 1 for the first that moves; None without a path.
    """

    level: Level
    step: int
    time_fs: float | None
    reading: float
    threshold: float
    reason: str
    atoms: Atoms
    dynamics: BaseDynamics | None
    image: int | None = None

    def as_json(self) -> dict[str, Any]:
        """The event as JSON values, with its frame and the results of it."""
        frame = without_unwritable(self.atoms)
        results = dict(frame.calc.results) if isinstance(frame.calc, Calculator) else {}
        return {key: getattr(self, key) for key in _KEPT} | {"atoms": encode(frame), "results": encode(results)}

    @classmethod
    def from_json(cls, values: Mapping[str, Any], dynamics: BaseDynamics | None) -> Self:
        """The event that `as_json` gave."""
        atoms = cast(Atoms, decode(values["atoms"]))
        if results := cast(dict[str, Any], decode(values["results"])):
            atoms.calc = StoredResults(atoms, results)
        return cls(atoms=atoms, dynamics=dynamics, **{key: values[key] for key in _KEPT})


Action = Callable[[Event], Any]


@dataclass(frozen=True)
class Halt:
    """Ends the run after this step is complete: `run()` goes on from it.

    Args:
        mode: `"raise"` raises `UncertaintyHalt` out of `run()`; `"stop"` lets `run()` return as if its steps were
            done. Loops that cannot be told to stop raise in either mode: SwitchLangevin, BasinHopping, a NEBOptimizer
            with the method "static", and everything that uses a `WatchedCalculator`. In a loop of your own over
            `step()`, "stop" has nothing to stop: look at `n_halted` of the monitor there.

    Raises:
        ValueError: `mode` is neither of the two.
    """

    mode: Literal["raise", "stop"] = "raise"

    def __post_init__(self) -> None:
        if self.mode not in ("raise", "stop"):
            raise ValueError(f"Halt knows the modes 'raise' and 'stop', not {self.mode!r}.")

    def __call__(self, event: Event) -> None:
        dynamics, error = event.dynamics, UncertaintyHalt
        if self.mode == "stop" and dynamics is not None:
            # The loop of these is in SciPy; ASE has this exception to leave it quietly.
            if isinstance(dynamics, SciPyOptimizer | SciPyGradientlessOptimizer):
                raise Converged
            if isinstance(dynamics, NEBOptimizer):
                error = _EndOfODE
            # Only a loop that ignores max_steps can have run past it; basin hopping does not even count steps.
            elif not isinstance(dynamics, BasinHopping) and dynamics.nsteps <= dynamics.max_steps:
                dynamics.max_steps = dynamics.nsteps
                return
        when = "" if event.time_fs is None else f" ({event.time_fs:.6g} fs)"
        if dynamics is None:
            where, then = f"calculation {event.step}", "Its results are kept: asking for them again does not halt"
        else:
            where, then = f"step {event.step}{when}", "run() goes on from this step"
        raise error(
            f"halted at {where}: {event.reason}. {then}.",
            step=event.step,
            reading=event.reading,
            threshold=event.threshold,
        )


class _EndOfODE(UncertaintyHalt, OptimizerConvergenceError):
    """The only exception that quietly ends NEBOptimizer's method "ode"; its method "static" lets it through."""


@dataclass(frozen=True)
class Flag:
    """Appends the frame to an extended XYZ file; it is on the disk before the run goes on.

    The frame has every result, and `flag_reason`, `flag_level`, `flag_step`, `flag_time_fs` (not in an
    optimiser), `flag_image` (on a path), `flag_reading` and `flag_threshold` in its info. `REF_*` labels of the
    structure that the run began with are left out, since they do not belong to this frame.

    Args:
        path: File to append to; the frames of earlier runs in it are kept.

    Raises:
        ValueError: The file cannot be written, or its name is that of another format.
    """

    path: str | os.PathLike[str]

    def __post_init__(self) -> None:
        check_xyz_name(self.path)
        check_appendable(self.path)

    def __call__(self, event: Event) -> None:
        write_frames(self.path, [_flagged(event, event.level, event.reason)], append=True)

    def before(self, events: Sequence[Event], alarm: Event) -> None:
        """Appends the frames that led to an alarm, with `flag_level="before"` and their own step and reading."""
        reason = f"before the {alarm.level} at step {alarm.step}"
        write_frames(self.path, [_flagged(event, "before", reason) for event in events], append=True)


@dataclass(frozen=True)
class Log:
    """Writes one line of CSV per event: step, time in fs, reading in eV/Å, level.

    Args:
        target: File to append to, an open text stream, or `"-"` for standard output.

    Raises:
        ValueError: The file cannot be written.
    """

    target: str | os.PathLike[str] | TextIO

    def __post_init__(self) -> None:
        if isinstance(self.target, str | os.PathLike) and self.target != "-":
            check_appendable(self.target)
            path = Path(self.target)
            if path.exists() and path.stat().st_size > 0:
                return
        self._write("step,time_fs,reading,level\n")

    def __call__(self, event: Event) -> None:
        time = "" if event.time_fs is None else f"{event.time_fs:.10g}"
        self._write(f"{event.step},{time},{event.reading:.6g},{event.level}\n")

    def _write(self, line: str) -> None:
        if self.target == "-":
            print(line, end="", file=sys.stdout, flush=True)
        elif isinstance(self.target, str | os.PathLike):
            with open(self.target, "a") as file:
                file.write(line)
        else:
            self.target.write(line)
            self.target.flush()


@dataclass(frozen=True)
class Call:
    """Calls a function with the event.

    Args:
        function: Function of one `Event`; its return value is ignored.

    Raises:
        TypeError: `function` cannot be called.
    """

    function: Callable[[Event], Any]

    def __post_init__(self) -> None:
        if not callable(self.function):
            raise TypeError(f"Call takes a function of one event, not {self.function!r}.")

    def __call__(self, event: Event) -> None:
        self.function(event)


def _flagged(event: Event, level: str, reason: str) -> Atoms:
    """The frame of an event as it is written to the file."""
    frame = annotated(
        event.atoms,
        flag_reason=reason,
        flag_level=level,
        flag_step=event.step,
        flag_time_fs=event.time_fs,
        flag_image=event.image,
        flag_reading=event.reading,
        flag_threshold=event.threshold,
    )
    for key in ("flag_time_fs", "flag_image"):
        if frame.info[key] is None:
            del frame.info[key]
    drop_labels(frame)
    return frame
