"""How a run of molecular dynamics goes on in another process, whatever ended it.

Beside the trajectory `RUN.xyz` lies `RUN.xyz.restart`, with the step that was saved last: structure, velocities, random
numbers and the state of the monitor, to the last bit. It is replaced, whole, every few seconds. A run that goes on
drops what was written after that step (rows of the log, flagged frames, frames of the trajectory) and makes it again.
"""

import os
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

from ase import Atoms
from ase.io.jsonio import decode, encode
from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.saved_run import SavedRun
from ase_uq.errors import ArtefactError, InputError
from ase_uq.io.frames import write_frames
from ase_uq.io.results import annotated
from ase_uq.sampling.ensembles import check_restartable, inner_variables, set_inner_variables


class Restart(SavedRun):
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

    _prefix = "md"
    _keys = frozenset(("step", "written", "size", "atoms", "inner", "monitor"))
    _another = "another trajectory"

    def __init__(
        self,
        trajectory: str | os.PathLike[str],
        steps: int,
        command: Mapping[str, str] | None = None,
        *,
        append: bool = False,
    ) -> None:
        self.trajectory = Path(trajectory)
        super().__init__(restart_file(self.trajectory), self.trajectory, command, append=append)
        self.written, self.atoms = -1, None
        if self._found is None:
            if self.trajectory.exists() and self.trajectory.stat().st_size:
                raise FileExistsError(
                    f"{self.trajectory} exists, and {self.file.name}, from which its run could go on, does not. Give "
                    "another trajectory; to go on from its last frame, give it as START."
                )
            return
        self.step, self.written = self._found["step"], self._found["written"]
        self._check_steps(steps)
        self._check_command()
        self.atoms = cast(Atoms, decode(self._found["atoms"]))

    def write(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor) -> None:
        """Adds the frame of the current step to the trajectory, once."""
        if dynamics.nsteps > self.written:
            info = {"step": dynamics.nsteps, "time_fs": monitor.time_fs}
            write_frames(self.trajectory, [annotated(dynamics.atoms, **info)], append=True)
            self.written = dynamics.nsteps

    def _monitor_state(self) -> dict[str, Any] | None:
        return None if self._found is None else self._found["monitor"]

    def _content(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None) -> dict[str, Any]:
        return {
            "step": dynamics.nsteps,
            "written": self.written,
            "size": self.trajectory.stat().st_size,
            "atoms": encode(dynamics.atoms),
            "inner": inner_variables(dynamics),
            "monitor": None if monitor is None else monitor.state(),
        }

    def _go_to_saved_step(self, dynamics: MolecularDynamics) -> None:
        assert self._found is not None
        dynamics.nsteps = self.step
        set_inner_variables(dynamics, self._found["inner"])
        calculator: Any = dynamics.atoms.calc
        if hasattr(calculator, "n_calculated"):
            calculator.n_calculated = self.step  # one calculation a step: `every` counts on
        os.truncate(self.trajectory, self._found["size"])
        dynamics.atoms.get_forces()  # the results of this step, which an observer may want before the next one

    def _check_dynamics(self, dynamics: MolecularDynamics) -> None:
        check_restartable(dynamics)

    def _take_hold(self) -> None:
        self._hold(self.trajectory)
        if self._found is not None:
            self._check_trajectory(self._found)

    def _was_begun(self) -> bool:
        return self.trajectory.stat().st_size > 0

    def _remove(self) -> None:
        self.trajectory.unlink()
        self.file.unlink(missing_ok=True)

    def _check_steps(self, steps: int) -> None:
        """Raises InputError for another structure, or if there are no steps left, whatever else is asked for."""
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

    def _check_trajectory(self, found: Mapping[str, Any]) -> None:
        """Raises ArtefactError if the trajectory is not as the run left it."""
        size = self.trajectory.stat().st_size
        if size < found["size"] or (size > found["size"] and found["status"] != "running"):
            raise ArtefactError(
                f"{self.trajectory} was altered since its run came to step {self.step}: it has {size} bytes, not "
                f"{found['size']}. Put it back, or give another trajectory."
            )


def restart_file(trajectory: Path) -> Path:
    """The file from which the run of a trajectory goes on."""
    return trajectory.with_name(trajectory.name + ".restart")


def digest_of(atoms: Atoms) -> str:
    """A name for a structure, with its velocities and constraints, that tells it from every other."""
    return sha256(encode(atoms).encode()).hexdigest()[:16]
