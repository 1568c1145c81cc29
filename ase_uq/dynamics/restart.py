"""How a run of molecular dynamics goes on in another process, whatever ended it.

Beside the trajectory `RUN.xyz` lies `RUN.xyz.restart`, with the step that was saved last: structure, velocities, random
numbers and the state of the monitor, to the last bit. It is replaced, whole, every few seconds. A run that goes on
drops what was written after that step (rows of the log, flagged frames, frames of the trajectory) and makes it again.
"""

import json
import os
import time
from collections.abc import Iterator, Mapping
from hashlib import sha256
from io import BytesIO, FileIO, StringIO
from pathlib import Path
from typing import Any, Literal, Self, cast

from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict
from ase.io.jsonio import decode, encode
from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.errors import ArtefactError, InputError
from ase_uq.io.files import appending, lock
from ase_uq.io.frames import write_frames
from ase_uq.io.results import annotated
from ase_uq.sampling.ensembles import check_restartable, inner_variables, set_inner_variables

# A killed process loses the work of at most so many seconds, and of the steps that are longer.
SECONDS_AT_RISK = 5.0

_KEYS = {"command", "run", "status", "step", "written", "size", "log_start", "atoms", "inner", "monitor"}

Status = Literal["running", "halted", "ended"]


class Restart:
    """Writes a run's trajectory and what its next process needs; a context manager that holds both files.

        with Restart("run.xyz", 20000, {"--temperature": "300"}) as restart:
            atoms = restart.atoms or read("start.xyz")
            ...                                         # calculator and dynamics
            monitor = monitored(dynamics, restart, halt=0.5, log="log.csv", frames="flagged.xyz")
            run_md(dynamics, monitor, 20000, restart=restart)

    Args:
        trajectory: Extended XYZ file of the run.
        steps: Number of steps of the whole run.
        command: What the run is made from, by the names that messages give it; `"START"` is the structure. A run goes
            on only with the same.
        append: Whether to go on all the same: with another command, but for `"START"`, or after a halt.

    Attributes:
        trajectory: The trajectory.
        run: Name of the run, which tells its frames from those of other runs; made from the command.
        step: Step at which the run goes on; 0 for a new one.
        atoms: Structure of that step; None for a new run.
        written: Last step whose frame is in the trajectory; -1 for none.

    Raises:
        FileExistsError: There is a trajectory without anything to go on from.
        InputError: The run has all its steps, was halted, or was begun with another command.
        ArtefactError: A file was altered, or another process is writing it.
    """

    def __init__(
        self,
        trajectory: str | os.PathLike[str],
        steps: int,
        command: Mapping[str, str] | None = None,
        *,
        append: bool = False,
    ) -> None:
        self.trajectory = Path(trajectory)
        self.file = restart_file(self.trajectory)
        self._command = dict(command or {})
        self._found = self._read()
        self._append = append
        self._changed: list[str] = []
        self._log: Path | None = None
        self._log_start = 0  # bytes that were in the log before the run
        self._held: list[FileIO] = []
        self._saved = -1e9
        self.step, self.written, self.atoms = 0, -1, None
        if self._found is None:
            if self.trajectory.exists() and self.trajectory.stat().st_size:
                raise FileExistsError(
                    f"{self.trajectory} exists, and {self.file.name}, from which its run could go on, does not. Give "
                    "another trajectory; to go on from its last frame, give it as START."
                )
            name = sha256(json.dumps([str(self.trajectory), self._command]).encode()).hexdigest()
            self.run = f"md-{name[:8]}"  # with letters, so that no reader takes it for a number
            return
        self.run, self.step, self.written = self._found["run"], self._found["step"], self._found["written"]
        self._changed = [key for key, value in self._command.items() if self._found["command"].get(key) != value]
        self._check_command(steps)
        self.atoms = cast(Atoms, decode(self._found["atoms"]))

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
        """Sets dynamics to the saved step and drops what was written after it; saves the first step of a new run.

        Args:
            dynamics: The run, made for `atoms` and without a step yet.
            log: Log of the run, if it has one.
            frames: File of its flagged frames, if it has one. Frames of other runs in it are kept.

        Raises:
            ValueError: These dynamics could not go on as if nothing had happened.
        """
        check_restartable(dynamics)
        self._log = None if log is None else Path(log)
        if self._log is not None and self._log.exists():
            size = self._log.stat().st_size
            start = size if self._found is None else self._found["log_start"]
            self._log_start = start if start <= size else 0  # a log that was moved away is begun anew
        if self._found is None and frames is not None and Path(frames).exists():
            # The same command may have made frames in it before, in a run that has ended.
            size = Path(frames).stat().st_size
            self.run = f"md-{sha256(f'{self.run} {size}'.encode()).hexdigest()[:8]}" if size else self.run
        dynamics.atoms.info["run"] = self.run
        if self._found is None:
            self.save(dynamics, None, "running")
        if self._log is not None:
            self._hold(self._log)
        if self._found is None:
            return
        dynamics.nsteps = self.step
        set_inner_variables(dynamics, self._found["inner"])
        calculator: Any = dynamics.atoms.calc
        if hasattr(calculator, "n_calculated"):
            calculator.n_calculated = self.step  # one calculation a step: `every` counts on
        os.truncate(self.trajectory, self._found["size"])
        dynamics.atoms.get_forces()  # the results of this step, which an observer may want before the next one
        judged = -1 if self._found["monitor"] is None else self.step
        if self._log is not None:
            _cut_log(self._log, judged, self._log_start)
        if frames is not None and Path(frames).exists():
            _cut_frames(Path(frames), self.run, judged)

    def restore(self, monitor: UncertaintyMonitor) -> None:
        """Gives the monitor its state; with `append`, rules that are no longer the same begin anew.

        Raises:
            InputError: Without `append`, the uncertainty model or the potential is another one.
        """
        state = None if self._found is None else self._found["monitor"]
        if state is None:
            return
        try:
            monitor.restore(state)
        except ValueError as error:
            if not self._append:
                raise InputError(
                    f"{self.trajectory} was begun with another potential or uncertainty model under the same name. "
                    "Give another trajectory, or --append (append=True) to go on with this one."
                ) from error
            place = ("step", "time_fs", "judged_step", "counts", "recent")
            monitor.restore(monitor.state() | {key: state[key] for key in place})

    def write(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor) -> None:
        """Adds the frame of the current step to the trajectory, once."""
        if dynamics.nsteps > self.written:
            info = {"step": dynamics.nsteps, "time_fs": monitor.time_fs}
            write_frames(self.trajectory, [annotated(dynamics.atoms, **info)], append=True)
            self.written = dynamics.nsteps

    def save(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None, status: Status) -> None:
        """Saves the current step; while the run is `"running"`, every few seconds only."""
        if status == "running" and time.monotonic() - self._saved < SECONDS_AT_RISK:
            return
        if self._log is not None and self._log.exists():
            with open(self._log, "rb+") as file:
                os.fsync(file.fileno())
        content = {
            "command": (self._found or {}).get("command", {}) | self._command,
            "run": self.run,
            "status": status,
            "step": dynamics.nsteps,
            "written": self.written,
            "size": self.trajectory.stat().st_size,
            "log_start": self._log_start,
            "atoms": encode(dynamics.atoms),
            "inner": inner_variables(dynamics),
            "monitor": None if monitor is None else monitor.state(),
        }
        _replace(self.file, json.dumps(content).encode())
        self._saved = time.monotonic()

    def __enter__(self) -> Self:
        self._hold(self.trajectory)
        try:
            if self._found is not None:
                self._check_trajectory()
        except BaseException:
            self._let_go()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._let_go()
        if self._found is None and not self.trajectory.stat().st_size:  # the run did not begin
            self.trajectory.unlink()
            self.file.unlink(missing_ok=True)
            if self._log is not None and self._log.exists() and not self._log.stat().st_size:
                self._log.unlink()

    def _hold(self, path: Path) -> None:
        """Opens a file, which is created if it is missing, and locks it for this run."""
        file = FileIO(path, "ab")
        self._held.append(file)
        try:
            lock(file, path)
        except BaseException:
            self._let_go()
            raise

    def _let_go(self) -> None:
        while self._held:
            self._held.pop().close()

    def _read(self) -> dict[str, Any] | None:
        if not self.file.exists():
            return None
        try:
            found = json.loads(self.file.read_bytes())
            assert isinstance(found, dict)
            assert found.keys() == _KEYS
        except (ValueError, AssertionError):
            raise ArtefactError(
                f"{self.file} was not written by this version of ase_uq, or altered. Remove it and {self.trajectory} "
                "to begin anew, or give another trajectory."
            ) from None
        return found

    def _check_command(self, steps: int) -> None:
        """Raises InputError if the run must not go on with this command."""
        assert self._found is not None
        if "START" in self._changed:
            raise InputError(
                f"{self.trajectory} was begun from another structure than START. Give another trajectory, or the "
                "START of before."
            )
        if self.step >= steps and self._found["status"] != "running":
            raise InputError(
                f"{self.trajectory} is finished: its run has all {steps} steps. Give another trajectory; to make the "
                "run longer, give more steps and --append (append=True)."
            )
        if self._append:
            return
        if self._changed:
            name = self._changed[0]
            before, now = self._found["command"].get(name), self._command[name]
            raise InputError(
                f"{self.trajectory} was begun with another {name} ({_shown(before)}, now {_shown(now)}). Give the same "
                "as before, another trajectory, or --append (append=True) to go on with what is given now."
            )
        if self._found["status"] == "halted":
            raise InputError(
                f"{self.trajectory} was halted at step {self.step}. To go on from there, give --append (append=True), "
                "and a higher halt or a lower temperature, or the next step is likely to halt as well."
            )

    def _check_trajectory(self) -> None:
        """Raises ArtefactError if the trajectory is not as the run left it."""
        assert self._found is not None
        size = self.trajectory.stat().st_size
        if size < self._found["size"] or (size > self._found["size"] and self._found["status"] != "running"):
            raise ArtefactError(
                f"{self.trajectory} was altered since its run came to step {self.step}: it has {size} bytes, not "
                f"{self._found['size']}. Put it back, or give another trajectory."
            )


def monitored(
    dynamics: MolecularDynamics,
    restart: Restart | None,
    *,
    log: str | os.PathLike[str] | None = None,
    frames: str | os.PathLike[str] | None = None,
    **options: Any,
) -> UncertaintyMonitor:
    """The monitor of a run, which goes on where `restart` says.

    Args:
        dynamics: The run, without a step yet.
        restart: What the run goes on from, and is saved to; None for neither.
        log: As in `UncertaintyMonitor`.
        frames: As in `UncertaintyMonitor`.
        options: The others of `UncertaintyMonitor`.
    """
    if restart is None:
        return UncertaintyMonitor(dynamics, log=log, frames=frames, **options)
    if restart.goes_on:
        # Another uncertainty model is refused before anything is dropped from the files.
        without_files: dict[str, Any] = {**options, "before": 0}
        restart.restore(UncertaintyMonitor(dynamics, log=StringIO(), **without_files))
    restart.begin(dynamics, log=log, frames=frames)  # before the monitor opens its files
    monitor = UncertaintyMonitor(dynamics, log=log, frames=frames, **options)
    restart.restore(monitor)
    return monitor


def restart_file(trajectory: Path) -> Path:
    """The file from which the run of a trajectory goes on."""
    return trajectory.with_name(trajectory.name + ".restart")


def digest_of(atoms: Atoms) -> str:
    """A name for a structure, with its velocities and constraints, that tells it from every other."""
    return sha256(encode(atoms).encode()).hexdigest()[:16]


def _replace(path: Path, data: bytes) -> None:
    """Writes a file that is whole at any time, also after a power cut."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _cut_log(path: Path, step: int, start: int) -> None:
    """Drops the rows after a step, and one that was torn; those before byte `start` are of another run."""
    end = start
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            number = line.split(b",", 1)[0]  # of the first line: its name
            if not line.endswith(b"\n") or (number.isdigit() and int(number) > step):
                break
            end += len(line)
    os.truncate(path, end)


def _cut_frames(path: Path, run: str, step: int) -> None:
    """Drops the frames of a run that its alarms after a step left, those from before the alarms, and a torn one."""
    with appending(path) as file:  # other runs may add frames of theirs
        kept: list[bytes] = []
        waiting: list[int] = []  # places of frames from before an alarm, which stands after them
        dropped = False
        for text, entries in _frames_in(file):
            if entries is None:
                dropped = True
                continue
            kept.append(text)
            if str(entries.get("run")) != run:
                continue
            waiting.append(len(kept) - 1)
            if entries.get("flag_level") == "before":
                continue
            if int(entries.get("flag_step", -1)) > step:
                dropped = True
                for place in waiting:
                    kept[place] = b""
            waiting = []
        for place in waiting:
            dropped = True
            kept[place] = b""
        if dropped:
            _replace(path, b"".join(kept))


def _frames_in(file: FileIO) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The frames of an extended XYZ file as they stand there, and their entries of info; None for a torn frame."""
    file.seek(0)
    text = BytesIO(file.readall())
    while head := text.readline():
        if not head.strip().isdigit():  # a blank line, or something else than frames
            yield head + (text.read() if head.strip() else b""), {}
            continue
        lines = [head, *(text.readline() for _ in range(int(head) + 1))]
        if not lines[-1].endswith(b"\n"):
            yield b"".join(lines), None
            return
        yield b"".join(lines), key_val_str_to_dict(lines[1].decode())


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:40] + "…"
