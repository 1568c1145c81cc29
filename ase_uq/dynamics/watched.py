"""A calculator that judges every calculation, for algorithms that move atoms without being an ASE dynamics."""

import os
from collections.abc import Sequence
from copy import deepcopy
from typing import NamedTuple, TextIO, Unpack

from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes
from ase.outputs import Properties

from ase_uq.dynamics.actions import Action, Event
from ase_uq.dynamics.checks import Snapshot
from ase_uq.dynamics.judging import Judge, Observation, checked, symbols_looked_at
from ase_uq.dynamics.policy import Watch, WatchOptions, WatchPolicy, actions_of_levels, as_policy
from ase_uq.dynamics.rules import Level
from ase_uq.properties import known_to_ase


class Record(NamedTuple):
    """One judged calculation.

    Attributes:
        step: Number of the calculation, from 0 on.
        reading: Reduced force uncertainty, eV/Å, or that of another quantity; NaN without one.
        level: `"ok"`, `"flag"` or `"halt"`.
    """

    step: int
    reading: float
    level: Level


class WatchedCalculator(Calculator):
    """Wraps a calculator, and judges each of its calculations as a monitor judges a step.

    For vibrations, phonons, elastic constants, equations of state, the steps of basin or minima hopping and the
    images of an AutoNEB: everything that uses a calculator without showing its steps to an observer.

        atoms.calc = WatchedCalculator(UncertainCalculator(...), halt=0.5, flag=0.3, frames="flagged.xyz")
        Vibrations(atoms).run()
        max(atoms.calc.records, key=lambda record: record.reading)  # the worst displacement

    Results are those of the wrapped calculator, bit for bit, and none is computed twice. The step of an event is the
    number of the calculation. There is no simulated time between calculations, so rules that need it are refused. A
    halt always raises `UncertaintyHalt` in the code that asked for the results. The results are kept: asking again for
    the same structure gives them without a second halt.

    The interrupted algorithm is not cleaned up: `Vibrations` leaves the atom displaced and an empty file, so set the
    positions back and call `clean(empty_files=True)` before calling its `run()` again.

    Args:
        calculator: Calculator with uncertainties, such as an `UncertainCalculator`.
        policy: What to watch for; if None, it is made from the `options`.
        frames: As in `UncertaintyMonitor`.
        log: As in `UncertaintyMonitor`.
        on_halt: As in `UncertaintyMonitor`.
        on_flag: As in `UncertaintyMonitor`.
        options: Fields of `WatchPolicy`, such as `halt` and `flag`, instead of a `policy`.

    Attributes:
        policy: What is watched for.
        calculator: The wrapped calculator.
        implemented_properties: Properties of the wrapped calculator; a list of this instance.
        last: The `Event` of the last judged calculation; None before.
        records: A `Record` of every judged calculation, in order.

    Raises:
        ValueError: As for `UncertaintyMonitor`, or if a rule needs time.
        TypeError: As for `UncertaintyMonitor`.
    """

    def __init__(
        self,
        calculator: BaseCalculator,
        *,
        policy: WatchPolicy | None = None,
        frames: str | os.PathLike[str] | None = None,
        log: str | os.PathLike[str] | TextIO | None = None,
        on_halt: Action | Sequence[Action] | None = None,
        on_flag: Action | Sequence[Action] | None = None,
        **options: Unpack[WatchOptions],
    ) -> None:
        super().__init__()
        self.policy = as_policy(policy, **options)
        self._judge = Judge(self.policy, logs=log is not None)
        self.calculator = checked(calculator, self.policy.watched if self.policy.reads else None)
        self.implemented_properties = list(calculator.implemented_properties)
        self._settle([])  # raises mistakes now, not at the first calculation
        self._symbols: list[str] | None = None
        self._actions = actions_of_levels(self.policy.levels, frames, log, on_halt, on_flag)
        self._n_calculations = 0
        self._is_judged = False
        self.last: Event | None = None
        self.records: list[Record] = []

    @property
    def watches(self) -> dict[Level, tuple[Watch, ...]]:
        """The rules of each level with their numbers and reductions: one rule, or one per element."""
        return dict(self._judge.watches)

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation, including inputs that only the wrapped calculator reads."""
        return super().check_state(atoms, tol=tol) or list(self.calculator.check_state(atoms, tol=tol))

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """Runs the wrapped calculator, and judges a new structure.

        Raises:
            UncertaintyHalt: Raised by the action `Halt`.
        """
        self.results = {}
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        for name in properties:
            self.calculator.get_property(name, self.atoms)
        # Some calculators write their next results into the same arrays.
        self.results = deepcopy(dict(self.calculator.results))
        if system_changes:
            self._n_calculations += 1
            self._is_judged = False
        if not self._is_judged:
            self._judge_now()

    def export_properties(self) -> Properties:
        """Results for `atoms.get_properties`: those that ASE has a name for."""
        return known_to_ase(self.results)

    def _judge_now(self) -> None:
        atoms = self.atoms
        assert atoms is not None
        symbols = symbols_looked_at(self.policy.reduction, atoms)
        if symbols != self._symbols:
            self._settle(symbols)
            self._symbols = symbols
        energy, forces, contact = (self.results.get(key) for key in ("energy", "forces", "contact"))
        snapshot = Snapshot(atoms, energy, forces, None, contact)
        values = self.policy.watched.values(atoms, self.results) if self.policy.reads else None
        verdict = self._judge([Observation(snapshot, values)], None)
        if verdict is None:
            return
        self._is_judged = True
        shown = atoms.copy()
        shown.calc = self
        self.last = Event(
            level=verdict.level,
            step=self._n_calculations - 1,
            time_fs=None,
            reading=verdict.reading,
            threshold=verdict.threshold,
            reason=verdict.reason,
            atoms=shown,
            dynamics=None,
        )
        self.records.append(Record(self.last.step, verdict.reading, verdict.level))
        for action in self._actions[verdict.level]:
            action(self.last)

    def _settle(self, symbols: Sequence[str]) -> None:
        # With a time all rules can be settled; a rule that cannot judge without one is then named below.
        self._judge.settle(self.calculator, symbols, 0.0)
        for watch in (watch for watches in self._judge.watches.values() for watch in watches):
            try:
                watch.rule.judge(None, 0.0, None)
            except ValueError as error:
                raise ValueError(
                    f"{watch.asked} needs simulated time, and there is none between the calculations of a "
                    "WatchedCalculator. Use a threshold, or an UncertaintyMonitor on the dynamics."
                ) from error
