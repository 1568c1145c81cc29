"""The monitor: reads the uncertainty of each step of a run, judges it, and acts."""

import os
import sys
import warnings
from collections import deque
from collections.abc import Mapping, Sequence
from copy import deepcopy
from dataclasses import replace
from numbers import Integral
from typing import Any, TextIO, Unpack

import numpy as np
from ase import units
from ase.md.md import MolecularDynamics
from ase.optimize.basin import BasinHopping
from ase.optimize.optimize import BaseDynamics

from ase_uq.dynamics.actions import Action, Event, Flag
from ase_uq.dynamics.checks import Snapshot
from ase_uq.dynamics.judging import Judge, Observation, Verdict, checked, symbols_looked_at
from ase_uq.dynamics.policy import Watch, WatchOptions, WatchPolicy, actions_of_levels, as_policy, counted_alarms
from ase_uq.dynamics.rules import Level, Rule
from ase_uq.dynamics.structures import Structure, results_of, structures_of
from ase_uq.errors import UQWarning
from ase_uq.io.results import annotated


class UncertaintyMonitor:
    """Watches the uncertainty of a run; flags, halts, logs or calls your function. It never changes the dynamics.

        dyn.attach(UncertaintyMonitor(dyn, halt=0.5, flag=0.3, frames="flagged.xyz"))

    At each step it takes the standard deviations of the forces that the calculator has just computed (without another
    model call), reduces ε_i = sqrt(Σ_c σ_ic²) over the atoms to one reading, and gives it to the rules. An atom of an
    element that the uncertainty model has never seen, with infinite `gamma`, has infinite ε_i. A reading at or above a
    threshold reaches that level; NaN reaches both levels. Fixed atoms count like all others; leave them out with
    `indices`. With `quantity="gamma"`, `"energy"` or `"stress"` these are read instead; with a `log` and neither `flag`
    nor `halt` it only logs.

    It works in every ASE molecular dynamics and optimiser, also on cell filters, with constraints, in a dimer, and on
    the images of a NEB. A step is judged once, even if `run()` shows it again; if the calculator skipped its
    uncertainty, only the checks judge it. Observers attached after the monitor do not see a step at which it raises.
    A resumed run is judged as before, so it halts again at its next step above the threshold unless the cause is gone.
    A new `atoms.calc` is noticed, and turns criteria into its own thresholds.

    On a path every image between the ends is read. The rules judge the largest reading, so they have one memory for
    the whole path; checks remember each image. The first image's calculator turns criteria into numbers. Images may
    share a calculator, and so may the ends and the centre of a dimer, if it remembers several structures, as
    `UncertainCalculator` does. Another calculator has lost the results by then, and the monitor raises an error rather
    than computing them again. `BasinHopping` shows each new lowest minimum. For the steps in between, and for searches
    that are not ASE dynamics, such as `AutoNEB`, `MinimaHopping` or `Vibrations`, use a `WatchedCalculator`.

    Args:
        dynamics: The run that it will be attached to.
        policy: What to watch for; if None, it is made from the `options`.
        before: Number of frames to keep from before an alarm, of the last judged steps. They go to `frames` ahead of
            the flagged or halting frame, oldest first, with `flag_level="before"`, and are never written twice.
        frames: Extended XYZ file to which every flagged or halting frame is appended, as by `Flag`.
        log: File, stream or `"-"` that gets one line for every judged step, as by `Log`.
        on_halt: Action or actions at the halt level; None for `Halt()`, which raises `UncertaintyHalt`.
        on_flag: Action or actions at the flag level; None for nothing more than `frames`.
        options: Fields of `WatchPolicy`, such as `halt` and `flag`, instead of a `policy`.

    Attributes:
        policy: What is watched for.
        last: The `Event` of the last judged step; None before.
        n_flagged: Number of steps that reached the flag level but not the halt level.
        n_halted: Number of steps that reached the halt level.

    Raises:
        ValueError: `WatchPolicy` raises it, there is nothing to watch for, the levels are in the wrong order, there is
            no atom to look at, the calculator has no uncertainties, a file cannot be written, a rule needs simulated
            time but the run has none, or `before` is given without `frames`.
        TypeError: A threshold, check or action has the wrong type, or both a policy and options are given.
    """

    def __init__(
        self,
        dynamics: BaseDynamics,
        *,
        policy: WatchPolicy | None = None,
        before: int = 0,
        frames: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | TextIO | None = None,
        on_halt: Action | Sequence[Action] | None = None,
        on_flag: Action | Sequence[Action] | None = None,
        **options: Unpack[WatchOptions],
    ) -> None:
        self.dynamics = dynamics
        self._structures = structures_of(dynamics)
        self.policy = as_policy(policy, **options)
        self._judge = Judge(self.policy, logs=log is not None)
        self._counts: dict[Level, int] = {"ok": 0, "flag": 0, "halt": 0}
        self._step_offset = 0
        self._time_offset = 0.0
        self._judged_step: int | None = None
        self._judged_positions: np.ndarray | None = None
        self._own_steps = 0
        self._seen = dynamics.nsteps, self._positions()
        self._n_strange = 0
        self.last: Event | None = None
        self._prepare()
        if not isinstance(before, Integral) or before < 0:
            raise ValueError(f"before is a number of frames, 0 or more, not {before!r}.")
        if before and frames is None:
            raise ValueError(f"before={before} frames have nowhere to go. Give frames too, such as 'flagged.xyz'.")
        self._actions = actions_of_levels(self.policy.levels, frames, log, on_halt, on_flag)
        self._keep = None if frames is None else Flag(frames)
        self._recent: deque[Event] = deque(maxlen=int(before))

    @property
    def watches(self) -> dict[Level, tuple[Watch, ...]]:
        """The rules of each level with their numbers and reductions: one rule, or one per element."""
        return dict(self._judge.watches)

    @property
    def halt(self) -> Rule | None:
        """The rule of the halt level, with its threshold as a number; None without that level.

        If elements have rules of their own, the one with the lowest threshold.
        """
        return self._lowest("halt")

    @property
    def flag(self) -> Rule | None:
        """The rule of the flag level, chosen as in `halt`."""
        return self._lowest("flag")

    @property
    def n_flagged(self) -> int:
        return self._counts["flag"]

    @property
    def n_halted(self) -> int:
        return self._counts["halt"]

    def __call__(self) -> None:
        """Judges the current step. ASE calls it; in a loop of your own over `dynamics.step()`, call it after each step.

        ASE counts no steps in such a loop, so each call at which the structure has moved counts as one.

        Raises:
            UncertaintyHalt: Raised by the action `Halt`.
            ValueError: The calculator has no uncertainties or has lost the results, or the monitor is attached twice
                or to another run.
        """
        attached = self._attached()
        if len(attached) > 1:
            raise ValueError(
                f"this monitor is attached to its {type(self.dynamics).__name__} more than once. Attach it once, at "
                "one interval; to watch for something else as well, make another UncertaintyMonitor."
            )
        if not attached:
            self._count_own_step()
        step = self._step()
        if self._was_judged(step):
            return
        if any(s.atoms.calc is not known for s, known in zip(self._structures, self._calculators, strict=True)):
            self._prepare()
        results = [results_of(structure) for structure in self._structures]
        time = self.time_fs
        verdict = self._judge(
            [self._observation(*pair, time) for pair in zip(self._structures, results, strict=True)], time
        )
        if not any(self._counts.values()):
            self._check_first(step, results)
            self._check_interval()
        if verdict is None:
            return
        event = self._event(verdict, step, time, results)
        # Set before the actions: one of them may raise, but the step counts as judged.
        self._judged_step, self._judged_positions = step, self._positions()
        self._counts[event.level] += 1
        self.last = event
        self._keep_before(event)
        for action in self._actions[event.level]:
            action(event)

    def state(self) -> dict[str, Any]:
        """What `restore` needs to go on in another process, as JSON values."""
        return {
            "step": self._step(),
            "time_fs": self.time_fs,
            "judged_step": self._judged_step,
            "counts": dict(self._counts),
            "recent": [event.as_json() for event in self._recent],
            **self._judge.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state: the dynamics now stands at the step where `state()` was taken.

        Steps and time count on from there, also in a new dynamics whose own count begins at 0, and the last judged
        step is neither judged nor written again. A rule or check that has changed, for example to a higher number,
        begins anew.

        Args:
            state: Return value of `state()` of a monitor with the same levels.

        Raises:
            ValueError: It is not such a state, has other levels, or was taken with another uncertainty model.
        """
        missing = [key for key in self.state() if key not in state]
        if missing:
            raise ValueError(f"this is not a state of an UncertaintyMonitor: it lacks {missing[0]!r}.")
        self._judge.restore(state)
        self._counts = dict(state["counts"])
        self._recent.clear()
        self._recent.extend(Event.from_json(kept, self.dynamics) for kept in state["recent"])
        self._step_offset += state["step"] - self._step()
        time = self.time_fs
        if time is not None and state["time_fs"] is not None:
            self._time_offset += state["time_fs"] - time
        self._judged_step, self._judged_positions = state["judged_step"], None
        self._seen = self.dynamics.nsteps, self._positions()

    def _prepare(self) -> None:
        """Turns criteria into numbers with the current calculators."""
        quantity = self.policy.watched if self.policy.reads else None
        self._calculators = tuple(checked(structure.atoms.calc, quantity) for structure in self._structures)
        symbols = symbols_looked_at(self.policy.reduction, self._structures[0].atoms)
        self._judge.settle(self._calculators[0], symbols, self.time_fs)

    def _lowest(self, level: Level) -> Rule | None:
        rules = [watch.rule for watch in self._judge.watches.get(level, ())]
        return min(rules, key=lambda rule: rule.threshold, default=None)

    def _step(self) -> int:
        # Basin hopping counts no steps; each minimum that it shows counts as one.
        counted = sum(self._counts.values()) if isinstance(self.dynamics, BasinHopping) else self.dynamics.nsteps
        return counted + self._own_steps + self._step_offset

    @property
    def time_fs(self) -> float | None:
        """Simulated time of the current step, fs; None if the run has none."""
        # FIRE and MDMin have a `dt` too, but it is not a simulated time.
        if not isinstance(self.dynamics, MolecularDynamics):
            return None
        time = self.dynamics.get_time() + self._own_steps * self.dynamics.dt
        return float(time / units.fs + self._time_offset)

    def _positions(self) -> np.ndarray:
        return np.concatenate([structure.atoms.positions for structure in self._structures])

    def _was_judged(self, step: int) -> bool:
        # ASE shows step 0 again when a run that was halted there is resumed. Positions tell whether the structure was
        # changed in between; they are unknown after `restore`.
        if step != self._judged_step:
            return False
        before = self._judged_positions
        return before is None or np.array_equal(before, self._positions(), equal_nan=True)

    def _attached(self) -> list[int]:
        """Intervals at which the monitor is attached to its own run."""
        intervals = []
        for function, interval, *_ in self.dynamics.observers:
            if function is self or getattr(function, "__self__", None) is self:
                intervals.append(int(interval))
        return intervals

    def _count_own_step(self) -> None:
        """Counts a step that `dynamics.step()` made, without ASE's own count.

        Raises:
            ValueError: Another run calls while this one stands still.
        """
        if isinstance(self.dynamics, BasinHopping):
            return
        nsteps, before = self._seen
        self._seen = self.dynamics.nsteps, self._positions()
        if self.dynamics.nsteps != nsteps:
            self._n_strange = 0
            return
        caller = _calling_run()
        if caller is None:
            self._own_steps += not np.array_equal(before, self._seen[1], equal_nan=True)
        elif caller is not self.dynamics and isinstance(self.dynamics, MolecularDynamics):
            self._n_strange += 1
            if self._n_strange < 3:
                return
            name = type(self.dynamics).__name__
            raise ValueError(
                f"this monitor was made for a {name} that stands at step {self._step()} while the monitor is called "
                "again and again, so it sees neither steps nor time. Attach it to the run that it was made with, or "
                "make another UncertaintyMonitor for the run that calls it."
            )

    def _check_interval(self) -> None:
        """Warns if false alarms were counted on less frequent readings than those of this run."""
        runs = getattr(getattr(self._calculators[0], "uncertainty_model", None), "reference", None)
        if runs is None or not isinstance(self.dynamics, MolecularDynamics):
            return
        every = getattr(self._calculators[0], "every", 1) * min(self._attached(), default=1)
        between = self.dynamics.dt / units.fs * every
        counted = {
            str(criterion)
            for watches in self.watches.values()
            for watch in watches
            for criterion in counted_alarms(watch.asked)
        }
        if counted and between < (1 - 1e-6) * runs.interval:
            warnings.warn(
                f"{' and '.join(sorted(counted))} was counted on readings every {runs.interval:.4g} fs, but this run "
                f"is read every {between:.4g} fs: there will be more false alarms than allowed. Make reference runs "
                f"with readings every {between:.4g} fs.",
                UQWarning,
                stacklevel=2,
            )

    def _check_first(self, step: int, results: Sequence[Mapping[str, Any] | None]) -> None:
        """Raises ValueError if nothing, or not every structure, will ever be judged: no later step would raise."""
        for structure, structure_results in zip(self._structures, results, strict=True):
            calculator = type(structure.atoms.calc).__name__
            what = "the structure" if structure.image is None else f"image {structure.image}"
            if structure_results is None:
                raise ValueError(
                    f"{calculator} no longer has the results of {what} at step {step}: other structures share "
                    "it, and it keeps the results of one at a time. Use UncertainCalculator, which remembers several, "
                    "or give each image a calculator of its own."
                )
            every = getattr(structure.atoms.calc, "every", 1)
            quantity = self.policy.watched
            if self.policy.reads and every == 1 and quantity.values(structure.atoms, structure_results) is None:
                raise ValueError(
                    f"{calculator} promises {quantity.key} but its results of {what} at step {step} lack it. "
                    "Request it when making the calculator."
                )

        every = max(getattr(calculator, "every", 1) for calculator in self._calculators)
        if every > 1 and len({id(calculator) for calculator in self._calculators}) < len(self._structures):
            warnings.warn(
                f"images share a calculator with every={every}, which counts their calculations together: the same "
                "images may always be the ones with uncertainties. Give it every=1, or each image its own calculator.",
                UQWarning,
                stacklevel=2,
            )

    def _observation(self, structure: Structure, results: Mapping[str, Any] | None, time: float | None) -> Observation:
        known = results or {}
        snapshot = Snapshot(structure.atoms, known.get("energy"), known.get("forces"), time, known.get("contact"))
        values = self.policy.watched.values(structure.atoms, known) if self.policy.reads else None
        return Observation(snapshot, values, structure.image)

    def _event(
        self, verdict: Verdict, step: int, time: float | None, results: Sequence[Mapping[str, Any] | None]
    ) -> Event:
        chosen = max(range(len(results)), key=lambda number: self._structures[number].image == verdict.image)
        structure, atoms = self._structures[chosen], self._structures[chosen].atoms
        assert atoms.calc is not None
        if not structure.alone and atoms.calc.check_state(atoms):
            atoms = annotated(atoms, results[chosen])
        return Event(
            level=verdict.level,
            step=step,
            time_fs=time,
            reading=verdict.reading,
            threshold=verdict.threshold,
            reason=verdict.reason,
            atoms=atoms,
            dynamics=self.dynamics,
            image=verdict.image,
        )

    def _keep_before(self, event: Event) -> None:
        """Remembers the frame of a step without an alarm; at an alarm, writes the remembered frames."""
        if not self._recent.maxlen:
            return
        if event.level == "ok":
            # Some calculators write their next results into the same arrays.
            self._recent.append(replace(event, atoms=deepcopy(annotated(event.atoms))))
        elif self._recent:
            assert self._keep is not None
            self._keep.before(self._recent, event)
            self._recent.clear()


def _calling_run() -> Any:
    """The ASE run whose observers are being called; None outside of all runs."""
    frame = sys._getframe()
    while frame is not None:
        if frame.f_code is BaseDynamics.call_observers.__code__:
            return frame.f_locals["self"]
        frame = frame.f_back
    return None
