"""The monitor: reads the uncertainty of each step of a run, judges it, and acts."""

import math
import os
from collections.abc import Mapping, Sequence
from typing import Any, TextIO

import numpy as np
from ase import Atoms, units
from ase.filters import Filter
from ase.md.md import MolecularDynamics
from ase.optimize.optimize import BaseDynamics

from ase_uq.dynamics.actions import Action, Event, Flag, Halt, Log, as_actions
from ase_uq.dynamics.rules import Level, Meaning, Rule, rules_of_levels, settled
from ase_uq.readings import Reduction, atom_norms

_KEY = "forces_uncertainty"


class UncertaintyMonitor:
    """Watches the force uncertainty of a run; flags, halts, logs or calls you. It never changes the dynamics.

        dyn.attach(UncertaintyMonitor(dyn, halt=0.5, flag=0.3, frames="flagged.xyz"))

    Each step it is called at, it takes the standard deviations of the forces that the calculator has just computed
    (no model call is made for it), reduces ε_i = sqrt(Σ_c σ_ic²) over the atoms to one reading, and hands it to the
    rules. An atom whose `gamma` is infinite, of an element the uncertainty model has never seen, reads infinity.
    A reading at or above a threshold reaches that level; NaN reaches both. Fixed atoms count like all others; leave
    them out with `indices`.

    It works in every ASE molecular dynamics and optimiser, also on cell filters and with constraints. A step is
    judged once, also where `run()` shows it again, and not at all where the calculator skipped its uncertainty.
    Observers attached after the monitor do not see a step at which it raises. A resumed run is judged as before, so
    it halts again at its next step above the threshold unless the cause is gone; a new `atoms.calc` is picked up,
    with its own meaning of the thresholds.

    Args:
        dynamics: The run to attach it to.
        halt: Number in eV/Å, a meaning such as `Quantile(0.999)`, or a rule, above which the run is halted.
        flag: The same for frames to keep; below `halt`.
        reduce: `"max"`, `"mean"`, `"top3"`, or a quantile of the atoms in (0, 1).
        elements: Chemical symbols to look at; None for all.
        indices: Atom indices to look at; None for all.
        patience: fs that the reading must stay above `halt` before the run is halted. `flag` never waits: the frames
            of the wait are those worth keeping. For a flag that waits give `flag=Patience(0.3, fs=20)`.
        frames: Extended XYZ file to which every flagged frame and the halting one are appended, as by `Flag`.
        log: File, stream or `"-"` that gets one line for every judged step, as by `Log`.
        on_halt: Action or actions at the halt level; None for `Halt()`, which raises `UncertaintyHalt`.
        on_flag: Action or actions at the flag level; None for nothing more than `frames`.

    Attributes:
        last: The `Event` of the last judged step; None before.
        n_flagged: Steps that reached the flag level but not the halt level.
        n_halted: Steps that reached the halt level.

    Raises:
        ValueError: No level, levels in the wrong order, no atom to look at, a calculator without uncertainties, a
            file that cannot be written, or a rule that needs the time of a run that has none.
    """

    def __init__(
        self,
        dynamics: BaseDynamics,
        *,
        halt: float | Meaning | Rule | None = None,
        flag: float | Meaning | Rule | None = None,
        reduce: str | float = "max",
        elements: Sequence[str] | None = None,
        indices: Sequence[int] | None = None,
        patience: float | None = None,
        frames: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | TextIO | None = None,
        on_halt: Action | Sequence[Action] | None = None,
        on_flag: Action | Sequence[Action] | None = None,
    ) -> None:
        self.dynamics = dynamics
        self.atoms = _structure(dynamics)
        self.reduction = _reduction(reduce, elements, indices, self.atoms)
        self._asked = rules_of_levels(halt, flag, patience)
        for level, actions in (("halt", on_halt), ("flag", on_flag)):
            if actions is not None and level not in self._asked:
                raise ValueError(f"on_{level} is given but {level} is not, so it would never run. Give {level} too.")
        self._states: dict[Level, Any] = dict.fromkeys(self._asked)
        self._counts: dict[Level, int] = {"ok": 0, "flag": 0, "halt": 0}
        self._step_offset = 0
        self._time_offset = 0.0
        self._judged_step: int | None = None
        self._judged_positions: np.ndarray | None = None
        self.last: Event | None = None
        self._prepare()

        keep = () if frames is None else (Flag(frames),)
        self._actions: dict[Level, tuple[Action, ...]] = {
            "ok": (),
            "flag": (*keep, *as_actions(on_flag)),
            "halt": (*keep, *(as_actions(on_halt) if on_halt is not None else (Halt(),))),
        }
        self._log = () if log is None else (Log(log),)

    @property
    def halt(self) -> Rule | None:
        """The rule of the halt level, with its threshold as a number; None without that level."""
        return self._rules.get("halt")

    @property
    def flag(self) -> Rule | None:
        """The rule of the flag level, with its threshold as a number; None without that level."""
        return self._rules.get("flag")

    @property
    def n_flagged(self) -> int:
        return self._counts["flag"]

    @property
    def n_halted(self) -> int:
        return self._counts["halt"]

    def __call__(self) -> None:
        """Judges the present step. ASE calls it; call it yourself in a loop of your own.

        Raises:
            UncertaintyHalt: By the action `Halt`.
            ValueError: The calculator has no uncertainties.
        """
        step = self._step()
        if self._was_judged(step):
            return
        if self.atoms.calc is not self._calculator:
            self._prepare()
        norms = self._norms()
        if norms is None:
            return
        event = self._judge(step, norms)
        # Before the actions: one of them may raise, and the step is judged all the same.
        self._judged_step, self._judged_positions = step, self.atoms.positions.copy()
        self._counts[event.level] += 1
        self.last = event
        for action in (*self._log, *self._actions[event.level]):
            action(event)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on in another process; `json.dumps` takes it."""
        return {
            "step": self._step(),
            "time_fs": self._time(),
            "judged_step": self._judged_step,
            "counts": dict(self._counts),
            "rules": dict(self._states),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the dynamics now stands at the step where `state()` was taken.

        Steps and time count on from there, also in a new dynamics whose own count begins at 0, and the step that
        was judged last is not judged, or written, again.

        Args:
            state: What `state()` returned, of a monitor with the same levels.

        Raises:
            ValueError: It is not such a state, or has other levels.
        """
        missing = [key for key in self.state() if key not in state]
        if missing:
            raise ValueError(f"this is no state of an UncertaintyMonitor: it lacks {missing[0]!r}.")
        if set(state["rules"]) != set(self._rules):
            raise ValueError(
                f"the state has the levels {sorted(state['rules'])}, this monitor {sorted(self._rules)}. "
                "Make the monitor with the same levels as before."
            )
        self._step_offset += state["step"] - self._step()
        time = self._time()
        if time is not None and state["time_fs"] is not None:
            self._time_offset += state["time_fs"] - time
        self._judged_step, self._judged_positions = state["judged_step"], None
        self._counts = dict(state["counts"])
        self._states = dict(state["rules"])

    def _prepare(self) -> None:
        """Turns the asked rules into numbers by the present calculator."""
        calculator = self.atoms.calc
        if calculator is None:
            raise ValueError("the structure has no calculator. Set atoms.calc = UncertainCalculator(...) first.")
        if _KEY not in calculator.implemented_properties:
            raise ValueError(
                f"{type(calculator).__name__} gives no {_KEY}, so there is nothing to watch. Wrap it: "
                "atoms.calc = UncertainCalculator(calculator, uncertainty_model)."
            )
        self._rules = settled(self._asked, calculator, self.reduction, self._time())
        self._calculator = calculator

    def _step(self) -> int:
        return self.dynamics.nsteps + self._step_offset

    def _time(self) -> float | None:
        # FIRE and MDMin have a `dt` too, but theirs is not a time of anything.
        if not isinstance(self.dynamics, MolecularDynamics):
            return None
        return float(self.dynamics.nsteps * self.dynamics.dt / units.fs + self._time_offset)

    def _was_judged(self, step: int) -> bool:
        # ASE shows step 0 again when a run that was halted there is resumed. Positions tell it from a structure
        # that was changed in between; they are unknown after `restore`.
        if step != self._judged_step:
            return False
        before = self._judged_positions
        return before is None or np.array_equal(before, self.atoms.positions, equal_nan=True)

    def _norms(self) -> np.ndarray | None:
        """(n_atoms,) ε_i in eV/Å, or None where the calculator skipped the uncertainty of this step."""
        atoms, calculator = self.atoms, self._calculator
        if not np.isfinite(atoms.positions).all():
            # NaN differs from itself, so no cache would hold and the model would be called for nothing.
            return np.full(len(atoms), math.nan)
        if not calculator.check_state(atoms) and _KEY not in calculator.results:
            if not any(self._counts.values()):
                raise ValueError(
                    f"{type(calculator).__name__} promises {_KEY} but its results at step {self._step()} have none. "
                    "Ask for it where the calculator is made."
                )
            return None
        norms = atom_norms(calculator.get_property(_KEY, atoms))
        gamma = calculator.results.get("gamma")
        # NaN stays NaN: it triggers at once, where infinity may have to wait.
        return norms if gamma is None else np.where(np.isinf(gamma) & ~np.isnan(norms), math.inf, norms)

    def _judge(self, step: int, norms: np.ndarray) -> Event:
        reading = self.reduction(norms, self.atoms.numbers)
        time = self._time()
        level: Level = "ok"
        threshold = min(rule.threshold for rule in self._rules.values())
        for name, rule in self._rules.items():  # flag before halt, so that the higher level stands
            self._states[name], triggered = rule.judge(self._states[name], reading, time)
            if triggered:
                level, threshold = name, rule.threshold
        reason = "" if level == "ok" else self._reason(level, reading, norms)
        return Event(
            level=level,
            step=step,
            time_fs=time,
            reading=reading,
            threshold=threshold,
            reason=reason,
            atoms=self.atoms,
            dynamics=self.dynamics,
        )

    def _reason(self, level: Level, reading: float, norms: np.ndarray) -> str:
        # Plain ASCII: it goes into files that other programs read.
        chosen = _looked_at(self.reduction, self.atoms)
        worst = chosen[np.argmax(norms[chosen])]
        return (
            f"force uncertainty ({self.reduction.kind}) {reading:.4g} eV/A reached {level} at "
            f"{self._rules[level].threshold:.4g} eV/A by {self._asked[level]}; "
            f"worst atom {worst} ({self.atoms[worst].symbol}, {norms[worst]:.4g} eV/A)"
        )


def _structure(dynamics: BaseDynamics) -> Atoms:
    """The atoms of a run, also from under a cell filter."""
    atoms = dynamics.atoms
    while isinstance(atoms, Filter):
        atoms = atoms.atoms
    if not isinstance(atoms, Atoms):
        raise ValueError(
            f"{type(dynamics).__name__} moves a {type(atoms).__name__}, not one structure. A monitor watches molecular "
            "dynamics and relaxations of one structure; score the frames of others afterwards."
        )
    return atoms


def _reduction(
    kind: str | float, elements: Sequence[str] | None, indices: Sequence[int] | None, atoms: Atoms
) -> Reduction:
    reduction = Reduction(
        kind,
        None if elements is None else (elements,) if isinstance(elements, str) else tuple(elements),
        None if indices is None else tuple(int(index) for index in indices),
    )
    if reduction(np.zeros(len(atoms)), atoms.numbers) == -math.inf:
        raise ValueError(
            f"no atom of {atoms.get_chemical_formula()} is looked at with elements={elements!r} and "
            f"indices={indices!r}, so the monitor could never trigger."
        )
    return reduction


def _looked_at(reduction: Reduction, atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that a reduction looks at."""
    indices = np.arange(len(atoms)) if reduction.indices is None else np.arange(len(atoms))[list(reduction.indices)]
    if reduction.elements is None:
        return indices
    return indices[np.isin(np.array(atoms.get_chemical_symbols())[indices], reduction.elements)]
