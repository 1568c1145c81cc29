"""What every run that goes on in another process has: the same command, one state of its monitor, nothing twice.

`restart.py` has the runs of ASE, whose file holds everything, `monitor_state.py` those whose atoms another program
keeps. Both drop what was written after the saved step (rows of the log, flagged frames), which is made again.
"""

import json
import os
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping
from hashlib import sha256
from io import FileIO, StringIO
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.outputs import drop_frames, drop_rows
from ase_uq.errors import ArtefactError, InputError
from ase_uq.io.files import is_at, lock, write_whole

# A killed process loses the work of at most so many seconds, and of the steps that are longer.
SECONDS_AT_RISK = 5.0

Status = Literal["running", "failed", "halted", "ended"]


class SavedRun(ABC):
    """Base of what a run is saved to and goes on from; a context manager that holds its files.

    Args:
        file: File that the next process reads.
        known_by: The file that a user knows the run by, for messages.
        command: What the run is made from, by the names that messages give it. A run goes on only with the same.
        append: Whether to go on all the same: with another command, or after a halt.

    Attributes:
        file: File that the next process reads.
        run: Name of the run, which tells its frames from those of other runs; made from the command.
        step: Step at which the run goes on; 0 for a new one.

    Raises:
        ArtefactError: The file was altered.
    """

    _prefix: ClassVar[str]
    _keys: ClassVar[frozenset[str]]
    _another: ClassVar[str]  # what may be given in place of `known_by`

    def __init__(
        self, file: Path, known_by: Path, command: Mapping[str, str] | None = None, *, append: bool = False
    ) -> None:
        self.file = file
        self.step = 0
        self._known_by = known_by
        self._command = dict(command or {})
        self._append = append
        self._log: Path | None = None
        self._log_start = 0  # bytes that were in the log before the run
        self._held: dict[Path, FileIO] = {}
        self._saved = -1e9
        self._changed: list[str] = []
        self._found = self._read()
        if self._found is None:
            name = sha256(json.dumps([str(known_by), self._command]).encode()).hexdigest()
            self.run = f"{self._prefix}-{name[:8]}"  # with letters, so that no reader takes it for a number
            return
        self.run = self._found["run"]
        self._changed = [key for key, value in self._command.items() if self._found["command"].get(key) != value]

    @property
    def goes_on(self) -> bool:
        """Whether there is a run to go on with."""
        return self._found is not None

    def begin(
        self,
        dynamics: MolecularDynamics,
        *,
        log: str | os.PathLike[str] | None = None,
        frames: str | os.PathLike[str] | None = None,
    ) -> None:
        """Has dynamics at the saved step and drops what was written after it; saves the first step of a new run.

        Args:
            dynamics: The run, none of whose steps was judged yet.
            log: Log of the run, if it has one.
            frames: File of its flagged frames, if it has one. Frames of other runs in it are kept.

        Raises:
            ValueError: These dynamics could not go on as if nothing had happened.
        """
        self._check_dynamics(dynamics)
        self._log = None if log is None else Path(log)
        if self._log is not None and self._log.exists():
            size = self._log.stat().st_size
            start = size if self._found is None else self._found["log_start"]
            self._log_start = start if start <= size else 0  # a log that was moved away is begun anew
        if self._found is None and frames is not None and Path(frames).exists():
            # The same command may have made frames in it before, in a run that has ended.
            size = Path(frames).stat().st_size
            self.run = f"{self._prefix}-{sha256(f'{self.run} {size}'.encode()).hexdigest()[:8]}" if size else self.run
        dynamics.atoms.info["run"] = self.run
        if self._found is None:
            self.save(dynamics, None, "running")
        if self._log is not None:
            self._hold(self._log)
        if self._found is None:
            return
        self._go_to_saved_step(dynamics)
        state = self._monitor_state()
        judged = -1 if state is None or state["judged_step"] is None else state["judged_step"]
        if self._log is not None:
            drop_rows(self._log, judged, self._log_start)
        if frames is not None and Path(frames).exists():
            drop_frames(Path(frames), self.run, judged)

    def restore(self, monitor: UncertaintyMonitor) -> None:
        """Gives the monitor its state; with `append`, rules that are no longer the same begin anew.

        Raises:
            InputError: Without `append`, the uncertainty model or the potential is another one.
        """
        if (state := self._monitor_state()) is None:
            return
        try:
            monitor.restore(state)
        except ValueError as error:
            if not self._append:
                raise InputError(
                    f"{self._known_by} was begun with another potential or uncertainty model under the same name. "
                    f"Give {self._another}, or --append (append=True) to go on with this one."
                ) from error
            place = ("step", "time_fs", "judged_step", "counts", "recent")
            monitor.restore(monitor.state() | {key: state[key] for key in place})

    def save(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None, status: Status) -> None:
        """Saves the current step; while the run is `"running"`, every few seconds only."""
        if status == "running" and not self._is_due(dynamics):
            return
        if self._log is not None and self._log.exists():
            with open(self._log, "rb+") as file:
                os.fsync(file.fileno())
        content = {
            "command": (self._found or {}).get("command", {}) | self._command,
            "run": self.run,
            "status": status,
            "log_start": self._log_start,
            **self._content(dynamics, monitor),
        }
        write_whole(self.file, json.dumps(content).encode())
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        try:
            self._take_hold()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        if self._found is None and not self._was_begun():
            self._remove()
            if self._log is not None and self._log.exists() and not self._log.stat().st_size:
                self._log.unlink()

    # ---------------------------------------------------------------- what kinds of runs differ in

    @abstractmethod
    def _monitor_state(self) -> dict[str, Any] | None:
        """State of the monitor at `step`; None if there is none."""

    @abstractmethod
    def _content(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None) -> dict[str, Any]:
        """Entries of the file that other kinds of runs do not have."""

    @abstractmethod
    def _go_to_saved_step(self, dynamics: MolecularDynamics) -> None:
        """Has dynamics at `step`."""

    @abstractmethod
    def _take_hold(self) -> None:
        """Locks what belongs to this run alone, and looks whether it is as it was left."""

    @abstractmethod
    def _was_begun(self) -> bool:
        """Whether a new run has come to its first step."""

    @abstractmethod
    def _remove(self) -> None:
        """Removes the files of a run that did not begin."""

    @abstractmethod
    def _check_dynamics(self, dynamics: MolecularDynamics) -> None:
        """Raises ValueError if dynamics cannot go on later, or is not where the run is."""

    def _is_there(self) -> bool:
        """Whether there is a file to go on from."""
        return self.file.exists()

    def _is_whole(self, found: Mapping[str, Any]) -> bool:
        """Whether the entries of a file, all of which are there, are as they were written."""
        return True

    def _is_due(self, dynamics: MolecularDynamics) -> bool:
        """Whether a step is to be saved while the run goes on."""
        return time.monotonic() - self._saved >= SECONDS_AT_RISK

    # ---------------------------------------------------------------- what they share

    def _hold(self, path: Path) -> None:
        """Opens a file, which is created if it is missing, and locks it for this run."""
        before = self._held.get(path)
        if before is not None and is_at(path, before):
            return
        file = FileIO(path, "ab")
        try:
            lock(file, path)
        except BaseException:
            file.close()
            self._let_go()
            raise
        if before is not None:
            before.close()
        self._held[path] = file

    def _let_go(self) -> None:
        while self._held:
            self._held.popitem()[1].close()

    def _read(self) -> dict[str, Any] | None:
        if not self._is_there():
            return None
        try:
            found = json.loads(self.file.read_bytes())
            assert isinstance(found, dict)
            assert found.keys() == self._keys | {"command", "run", "status", "log_start"}
            assert self._is_whole(found)
        except (ValueError, AssertionError):
            remove = "it" if self.file == self._known_by else f"it and {self._known_by}"
            raise ArtefactError(
                f"{self.file} was not written by this version of ase_uq, or altered. Remove {remove} to begin anew, or "
                f"give {self._another}."
            ) from None
        return found

    def _check_command(self) -> None:
        """Raises InputError if the run must not go on with this command."""
        assert self._found is not None
        if self._append:
            return
        if self._changed:
            name = self._changed[0]
            before, now = self._found["command"].get(name), self._command[name]
            raise InputError(
                f"{self._known_by} was begun with another {name} ({_shown(before)}, now {_shown(now)}). Give the same "
                f"as before, {self._another}, or --append (append=True) to go on with what is given now."
            )
        if self._found["status"] == "halted":
            raise InputError(
                f"{self._known_by} was halted at step {self.step}. To go on from there, give --append (append=True), "
                "and a higher halt or a lower temperature, or the next step is likely to halt as well."
            )


def monitored(
    dynamics: MolecularDynamics,
    saved: SavedRun | None,
    *,
    log: str | os.PathLike[str] | None = None,
    frames: str | os.PathLike[str] | None = None,
    **options: Any,
) -> UncertaintyMonitor:
    """The monitor of a run, which goes on where `saved` says.

    Args:
        dynamics: The run, none of whose steps was judged yet.
        saved: What the run goes on from, and is saved to; None for neither.
        log: As in `UncertaintyMonitor`.
        frames: As in `UncertaintyMonitor`.
        options: The others of `UncertaintyMonitor`.
    """
    if saved is None:
        return UncertaintyMonitor(dynamics, log=log, frames=frames, **options)
    if saved.goes_on:
        # Another uncertainty model is refused before anything is dropped from the files.
        without_files: dict[str, Any] = {**options, "before": 0}
        saved.restore(UncertaintyMonitor(dynamics, log=StringIO(), **without_files))
    saved.begin(dynamics, log=log, frames=frames)  # before the monitor opens its files
    monitor = UncertaintyMonitor(dynamics, log=log, frames=frames, **options)
    saved.restore(monitor)
    return monitor


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "…"
