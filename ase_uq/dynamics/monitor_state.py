"""How the rules of a run go on in another process where another program, such as LAMMPS, keeps the atoms itself."""

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from ase.md.md import MolecularDynamics

from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.saved_run import SavedRun, Status
from ase_uq.errors import InputError

_N_STAY = 2  # programs write to two files in turn, so that one is whole at any time


class MonitorState(SavedRun):
    """Writes the state of a run's monitor to a file of its own; a context manager that holds it.

        with MonitorState("heat.state", {"--halt": "0.5"}) as saved:
            calculator.n_calculated = saved.n_calculated
            ...                                         # the other program reads its own file; the dynamics of it
            monitor = monitored(dynamics, saved, halt=0.5, log="log.csv", frames="flagged.xyz")
            dynamics.attach(monitor)
            dynamics.attach(saved.save, 1, dynamics, monitor, "running")
            dynamics.run(1000)
            saved.save(dynamics, monitor, "ended")      # and the other program writes its file

    The file has the states of the steps that the other program may begin with next: the last one that was saved, the
    last two at which that program wrote a file of its own while it ran, and until the process ends the one that it
    began with.

    Args:
        file: The file, JSON.
        command: What the run is made from, by the names that messages give it. A run goes on only with the same.
        append: Whether to go on all the same: with another command, or after a halt.
        intervals: Numbers of steps between those at which the other program writes its files.

    Attributes:
        file: The file.
        run: Name of the run, which tells its frames from those of other runs; made from the command.
        step: Step at which the run goes on, the last one of the file until `go_to` has chosen; 0 for a new run.
        last: Last step that `save` was called at; -1 before.
        n_calculated: Number of calculations before that step, of which `every` of a calculator counts on.

    Raises:
        InputError: The run was halted, or was begun with another command; in `begin`, with other atoms.
        ArtefactError: The file was altered, or another process is writing it.
    """

    _prefix = "run"
    _keys = frozenset(("states", "formula"))
    _another = "another file"

    def __init__(
        self,
        file: str | os.PathLike[str],
        command: Mapping[str, str] | None = None,
        *,
        append: bool = False,
        intervals: Collection[int] = (),
    ) -> None:
        super().__init__(Path(file), Path(file), command, append=append)
        self.last, self.n_calculated = -1, 0
        self._begun, self._first = False, -1
        self._intervals = intervals
        self._states: list[dict[str, Any]] = [] if self._found is None else self._found["states"]
        if self._found is None:
            return
        self._choose(self._states[-1])
        self._check_command()

    def go_to(self, step: int) -> None:
        """Chooses the state of a step, at which the other program stands.

        Args:
            step: Number of the step.

        Raises:
            InputError: The file has no state of it.
        """
        self._first = step
        if not self.goes_on:
            return
        states = [state for state in self._states if state["step"] <= step]
        if not states or states[-1]["step"] != step:
            steps = ", ".join(str(state["step"]) for state in self._states)
            raise InputError(
                f"the run stands at step {step}, and {self.file} has its rules at step {steps}. Begin with what was "
                f"saved at such a step (in LAMMPS, read_restart of its file), or remove {self.file} to begin the rules "
                "anew."
            )
        self._states = states  # the steps that follow are made again
        self._choose(states[-1])

    def save(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None, status: Status) -> None:
        """Saves the current step; while the run is `"running"`, every few seconds and where files are written only.

        Raises:
            InputError: The run went back to an earlier step, so that its number would no longer tell which one it is.
        """
        if dynamics.nsteps < self.last:
            raise InputError(
                f"the run went back from step {self.last} to step {dynamics.nsteps}, and {self.file} knows steps by "
                "their number. Count on (in LAMMPS, leave reset_timestep out), or make two runs of it."
            )
        self.last, self._begun = dynamics.nsteps, monitor is not None
        if status in ("halted", "ended"):  # the other program writes what the next process begins with
            self._first = -1
        super().save(dynamics, monitor, status)
        self._hold(self.file)  # which may be another one now, put in the place of the last

    def _choose(self, state: Mapping[str, Any]) -> None:
        self.step, self.n_calculated = state["step"], state["n_calculated"]

    def _monitor_state(self) -> dict[str, Any] | None:
        return self._states[-1]["monitor"] if self.goes_on else None

    def _content(self, dynamics: MolecularDynamics, monitor: UncertaintyMonitor | None) -> dict[str, Any]:
        calculator: Any = dynamics.atoms.calc
        state = {
            "step": dynamics.nsteps,
            "stays": self._stays(dynamics.nsteps),
            "n_calculated": max(0, getattr(calculator, "n_calculated", 0) - 1),
            "monitor": None if monitor is None else monitor.state(),
        }
        earlier = [one for one in self._states if one["step"] < state["step"]]
        staying = {self._first, *[one["step"] for one in earlier if one["stays"]][-_N_STAY:]}
        self._states = [*(one for one in earlier if one["step"] in staying), state]
        return {"states": self._states, "formula": dynamics.atoms.get_chemical_formula()}

    def _stays(self, step: int) -> bool:
        """Whether the other program writes a file of its own at a step."""
        return any(step % interval == 0 for interval in self._intervals)

    def _is_due(self, dynamics: MolecularDynamics) -> bool:
        return self._stays(dynamics.nsteps) or super()._is_due(dynamics)

    def _check_dynamics(self, dynamics: MolecularDynamics) -> None:
        self.go_to(dynamics.nsteps)
        now = dynamics.atoms.get_chemical_formula()
        before = now if self._found is None else self._found["formula"]
        if now and before and now != before:  # another program may not have given its atoms yet
            raise InputError(
                f"{self.file} has the rules of a run of {before}, and this one is of {now}. Give the state of this "
                "run, or another file to begin the rules anew."
            )

    def _go_to_saved_step(self, dynamics: MolecularDynamics) -> None:
        """It stands there: the other program has made the structure of that step."""

    def _take_hold(self) -> None:
        self._hold(self.file)

    def _was_begun(self) -> bool:
        return self._begun

    def _remove(self) -> None:
        self.file.unlink(missing_ok=True)

    def _is_whole(self, found: Mapping[str, Any]) -> bool:
        return bool(found["states"])

    def _is_there(self) -> bool:
        return self.file.exists() and self.file.stat().st_size > 0  # an empty one is of a run that was killed before
