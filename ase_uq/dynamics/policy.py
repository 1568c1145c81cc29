"""What to watch for: the levels, their rules and actions, and the reduction of the atoms to one reading."""

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Integral
from typing import Protocol, TextIO, TypedDict, Unpack, runtime_checkable

import numpy as np
from ase.calculators.calculator import BaseCalculator

from ase_uq.dynamics.actions import Action, Flag, Halt, Log
from ase_uq.dynamics.checks import Check
from ase_uq.dynamics.quantities import QUANTITIES, Quantity
from ase_uq.dynamics.rules import AnyOf, Level, Patience, Refractory, Rule, Threshold, _OfValue, _Several
from ase_uq.errors import did_you_mean
from ase_uq.thresholds.criteria import Criterion, FalseAlarms, PerElement
from ase_uq.thresholds.data import ThresholdData
from ase_uq.thresholds.levels import as_level
from ase_uq.thresholds.reduction import Reduction

type Asked = float | str | Criterion | PerElement | Rule


@runtime_checkable
class _Calibrated(Protocol):
    """A calculator that has calibration data, as `UncertainCalculator` does."""

    def threshold_data(self, reduction: Reduction) -> ThresholdData: ...


@dataclass(frozen=True)
class Watch:
    """One rule of a level and the reading that it judges.

    Args:
        asked: The rule as the user gave it.
        rule: The same rule with numbers instead of criteria.
        reduction: Reduction of the atoms to its reading.
    """

    asked: Rule
    rule: Rule
    reduction: Reduction


class WatchOptions(TypedDict, total=False):
    """The fields of a `WatchPolicy` as keywords."""

    halt: Asked | None
    flag: Asked | None
    patience: float | None
    at_once: float | str | Criterion | None
    refractory: float | None
    quantity: str
    reduce: str | float
    elements: Sequence[str] | None
    indices: Sequence[int] | None
    checks: Check | Sequence[Check]
    every: int


@dataclass(frozen=True, kw_only=True)
class WatchPolicy:
    """What to watch for, as one object for `UncertaintyMonitor`, `WatchedCalculator`, `relax` and `ReplicaMonitor`.

        policy = WatchPolicy(halt=0.5, flag=Quantile(0.99), patience=20)
        dyn.attach(UncertaintyMonitor(dyn, policy=policy, frames="flagged.xyz"))

    All of them also take its fields as keywords, instead of a policy.

    Args:
        halt: Threshold at which the run is halted: a number in the unit of the `quantity`, a criterion such as
            `Quantile(0.999)`, or `"q0.999"` as on the command line, or a rule.
        flag: Threshold at which frames are kept, given in the same way; below `halt`.
        patience: Time in fs that the reading must stay above `halt` before the run is halted. `flag` never waits: the
            frames during the wait are worth keeping. For a flag that waits give `flag=Patience(0.3, fs=20)`.
        at_once: Number or criterion above `halt` at which the run is halted without patience.
        refractory: Time in fs after a flag in which no other frame is flagged.
        quantity: What is compared with the thresholds: `"forces"`, ε_i of the atoms, eV/Å; `"gamma"` of the atoms, 1 at
            the edge of the calibration data; `"energy"`, the standard deviation of the total energy, eV; or
            `"stress"`, the largest of its six components, eV/Å³. Criteria are made for forces alone.
        reduce: `"max"`, `"mean"`, `"top3"`, or a quantile of the atoms in (0, 1); for forces and gamma.
        elements: Chemical symbols to look at; None for all.
        indices: Atom indices to look at; None for all.
        checks: Checks that halt the run for other reasons: `Finite()`, `MaxTemperature(2000)`, `Bonds()`. They need no
            uncertainty, so with them `halt` and `flag` may be left out.
        every: Number of steps from one uncertainty to the next. The calculator decides which steps have them, so make
            it with the same number, `UncertainCalculator(..., every=policy.every)`; checks look at every step.

    Attributes:
        rules: The rules of the levels as the user gave them, flag before halt.
        reduction: Reduction of the atoms of a structure to one reading.

    Raises:
        ValueError: A threshold is not positive, `patience` is given without a plain `halt`, `at_once` without
            `patience` or not above `halt`, `refractory` without `flag`, `every` is not a whole number of 1 or more,
            `reduce` is not a reduction, or `quantity` is not a quantity or has no atoms or criteria.
        TypeError: A threshold or check has the wrong type, or `indices` is a mask.
    """

    halt: Asked | None = None
    flag: Asked | None = None
    patience: float | None = None
    at_once: float | str | Criterion | None = None
    refractory: float | None = None
    quantity: str = "forces"
    reduce: str | float = "max"
    elements: Sequence[str] | None = None
    indices: Sequence[int] | None = None
    checks: Check | Sequence[Check] = ()
    every: int = 1
    rules: Mapping[Level, Rule] = field(init=False, repr=False, compare=False)
    reduction: Reduction = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if not isinstance(self.every, Integral) or self.every < 1:
            raise ValueError(f"every is a number of steps, 1 or more, not {self.every!r}.")
        _check_quantity(self)
        reduction = _reduction(self)
        fields = {
            "elements": reduction.elements,
            "indices": reduction.indices,
            "checks": as_checks(self.checks),
            "rules": _rules(self),
            "reduction": reduction,
        }
        for name, value in fields.items():
            object.__setattr__(self, name, value)

    @property
    def watched(self) -> Quantity:
        """The quantity that is compared with the thresholds."""
        return QUANTITIES[self.quantity]

    @property
    def reads(self) -> bool:
        """Whether uncertainties are read: for a rule, or to be logged; checks alone need none."""
        return bool(self.rules) or not self.checks

    @property
    def levels(self) -> tuple[Level, ...]:
        """Levels that can be reached; empty if there is nothing to watch for."""
        return (*self.rules, "halt") if self.checks else tuple(self.rules)

    def settled(
        self, calculator: BaseCalculator, symbols: Sequence[str], time: float | None
    ) -> dict[Level, tuple[Watch, ...]]:
        """The rules with numbers instead of criteria, from the calibration data of a calculator.

        A rule with `PerElement` becomes one rule per element, which reads only the atoms of that element.

        Args:
            calculator: Calculator, which must have `threshold_data(reduction)` if a rule has a criterion.
            symbols: Chemical symbols of the atoms that are looked at, in any order and number.
            time: Current time of the run, fs; None if it has none.

        Raises:
            ValueError: The calculator cannot turn a criterion into a number, the flag is not below the halt, or a rule
                needs a time that the run does not have.
        """
        elements = [s for s in dict.fromkeys(symbols) if self.elements is None or s in self.elements]

        @functools.cache
        def threshold_data(reduction: Reduction) -> ThresholdData:
            assert isinstance(calculator, _Calibrated)
            return calculator.threshold_data(reduction)

        def watches(rule: Rule) -> tuple[Watch, ...]:
            if not rule.criteria:
                return (Watch(rule, rule, self.reduction),)
            if not isinstance(calculator, _Calibrated):
                raise ValueError(
                    f"{type(calculator).__name__} has no calibration data to turn {rule.criteria[0]} into a number. "
                    "Use UncertainCalculator, or give the threshold in eV/Å."
                )
            if not any(isinstance(criterion, PerElement) for criterion in rule.criteria):
                return (Watch(rule, rule.resolved(threshold_data(self.reduction)), self.reduction),)
            each = [replace(self.reduction, elements=(element,)) for element in elements]
            return tuple(
                Watch(rule, rule.resolved(threshold_data(self.reduction), threshold_data(one)), one) for one in each
            )

        by_level: dict[Level, tuple[Watch, ...]] = {level: watches(rule) for level, rule in self.rules.items()}
        for flag in by_level.get("flag", ()):
            for halt in by_level.get("halt", ()):
                _check_order_of_watches(flag, halt, self.watched)
        for watch in (watch for several in by_level.values() for watch in several):
            # Rules are pure, so this changes nothing; a rule that needs a time raises now, not hours later.
            watch.rule.judge(None, 0.0, time)
        return by_level


def as_policy(policy: WatchPolicy | None, **options: Unpack[WatchOptions]) -> WatchPolicy:
    """The policy that was given, or one made from the keywords.

    Raises:
        TypeError: Both were given, or a keyword is not a field of a policy.
        ValueError: As for `WatchPolicy`.
    """
    if policy is None:
        return WatchPolicy(**options)
    if options:
        raise TypeError(
            f"a policy and {' and '.join(options)} were given, but both say what to watch for. Give the policy "
            f"alone; to change it, use dataclasses.replace(policy, {next(iter(options))}=...)."
        )
    return policy


def check_order(
    flag: float, halt: float, of: str = "", advice: str = "", quantity: Quantity = QUANTITIES["forces"]
) -> None:
    """Raises ValueError if a flag is not below the halt; the message ends with `advice`."""
    if not flag < halt:
        raise ValueError(
            f"flag is {quantity.number(flag)} and halt is {quantity.number(halt)}{of}, so no frame lies between "
            f"them. Give a flag below the halt.{advice}"
        )


def counted_alarms(rule: Rule) -> tuple[FalseAlarms, ...]:
    """The criteria of a rule that count false alarms per reading, so that the time between readings matters."""
    match rule:
        case _OfValue(value=FalseAlarms() as criterion):
            return (criterion,)
        case _Several(rules=rules):
            return tuple(criterion for inner in rules for criterion in counted_alarms(inner))
        case Refractory(rule=inner):
            return counted_alarms(inner)
    return ()


def as_rule(level: Asked) -> Rule:
    """A rule unchanged; a number in eV/Å or a criterion as a `Threshold`."""
    return level if isinstance(level, Rule) else Threshold(as_level(level))


def as_checks(checks: Check | Sequence[Check]) -> tuple[Check, ...]:
    """One check or several as a tuple; raises TypeError for anything else."""
    several = (checks,) if isinstance(checks, Check) else tuple(checks)
    for check in several:
        if not isinstance(check, Check):
            raise TypeError(f"checks are objects such as Finite() or MaxTemperature(2000), not {check!r}.")
    return several


def as_actions(actions: Action | Sequence[Action] | None) -> tuple[Action, ...]:
    """One action, several or None as a tuple; raises TypeError for what cannot be called."""
    chosen = () if actions is None else (actions,) if callable(actions) else tuple(actions)
    for action in chosen:
        if not callable(action):
            raise TypeError(
                f"an action is a callable that takes one Event, such as Halt() or Log('log.csv'), not {action!r}."
            )
    return chosen


def actions_of_levels(
    levels: Collection[Level],
    frames: str | os.PathLike[str] | None,
    log: str | os.PathLike[str] | TextIO | None,
    on_halt: Action | Sequence[Action] | None,
    on_flag: Action | Sequence[Action] | None,
) -> dict[Level, tuple[Action, ...]]:
    """The actions of each level, in order: the log, the frame, and the user's actions.

    Args:
        levels: Levels that can be reached.
        frames: File for flagged and halting frames; None for no file.
        log: File, stream or `"-"` for every judged step; None for no log.
        on_halt: Actions at the halt level; None for `Halt()`.
        on_flag: Actions at the flag level; None for nothing more.

    Raises:
        ValueError: An action could never run, or a file cannot be written.
        TypeError: An action cannot be called.
    """
    for level, actions in (("halt", on_halt), ("flag", on_flag)):
        if actions is not None and level not in levels:
            raise ValueError(f"on_{level} is given but {level} is not, so it would never run. Give {level} too.")
    keep = () if frames is None else (Flag(frames),)
    always = () if log is None else (Log(log),)
    return {
        "ok": always,
        "flag": (*always, *keep, *as_actions(on_flag)),
        "halt": (*always, *keep, *(as_actions(on_halt) if on_halt is not None else (Halt(),))),
    }


def _rules(policy: WatchPolicy) -> dict[Level, Rule]:
    halt, flag, at_once = map(as_level, (policy.halt, policy.flag, policy.at_once))
    patience = policy.patience
    rules: dict[Level, Rule] = {}
    if flag is not None:
        rules["flag"] = as_rule(flag) if policy.refractory is None else Refractory(as_rule(flag), policy.refractory)
    elif policy.refractory is not None:
        raise ValueError("refractory belongs to flag, which is not given. Give flag too, for example flag=0.3 (eV/Å).")
    if halt is not None:
        rules["halt"] = as_rule(halt)
    if patience is not None:
        if halt is None:
            raise ValueError("patience belongs to halt, which is not given. For a flag give flag=Patience(value, fs).")
        if isinstance(halt, Rule):
            raise ValueError(f"halt is already a rule, {halt}. Leave patience out, or give halt as a number.")
        waiting = Patience(halt, patience)
        rules["halt"] = waiting if at_once is None else AnyOf(waiting, Threshold(at_once))
    elif at_once is not None:
        raise ValueError(
            f"at_once is the threshold of a halt without patience, but patience is not given. Give patience in fs, or "
            f"halt={at_once} alone."
        )
    return rules


def _check_quantity(policy: WatchPolicy) -> None:
    """Raises ValueError for a quantity that is unknown, or has no atoms or criteria where such are given."""
    name = policy.quantity
    if name not in QUANTITIES:
        raise ValueError(
            f"thresholds are set on {', '.join(QUANTITIES)}, not on {name!r}.{did_you_mean(str(name), QUANTITIES)}"
        )
    quantity = QUANTITIES[name]
    numbers = f"in {quantity.unit}" if quantity.unit else "such as 1, the edge of the calibration data"
    if not quantity.per_atom and (policy.elements is not None or policy.indices is not None or policy.reduce != "max"):
        raise ValueError(
            f"quantity={name!r} is one number of the whole structure, so there are no atoms to choose or to reduce. "
            "Leave reduce, elements and indices out, or take the quantity 'forces' or 'gamma'."
        )
    for level in (policy.halt, policy.flag, policy.at_once):
        criteria = () if level is None else as_rule(level).criteria
        if criteria and name != "forces":
            raise ValueError(
                f"{criteria[0]} is made from the force uncertainties of the calibration frames, so it is no threshold "
                f"of {name}. Give a number {numbers}."
            )


def _reduction(policy: WatchPolicy) -> Reduction:
    elements, indices = policy.elements, policy.indices
    if indices is not None and np.asarray(indices).dtype == bool:
        raise TypeError(
            "indices are numbers of atoms, not a mask: True would be read as atom 1. Give np.flatnonzero(mask)."
        )
    return Reduction(
        policy.reduce,
        None if elements is None else (elements,) if isinstance(elements, str) else tuple(elements),
        None if indices is None else tuple(int(index) for index in indices),
    )


def _check_order_of_watches(flag: Watch, halt: Watch, quantity: Quantity) -> None:
    """Raises ValueError if a flag could never come before a halt on the same atoms."""
    flagged, halted = flag.reduction.elements, halt.reduction.elements
    if flagged is not None and halted is not None and not set(flagged) & set(halted):
        return
    # While a rule waits, frames at its threshold can be flagged, but a flag above the threshold is still a mistake.
    waits = halt.rule.at_once == math.inf and isinstance(halt.rule, Patience)
    halts = math.nextafter(halt.rule.threshold, math.inf) if waits else halt.rule.at_once
    criteria = [criterion for watch in (flag, halt) for criterion in watch.asked.criteria]
    per_element = any(isinstance(criterion, PerElement) for criterion in criteria)
    check_order(
        flag.rule.threshold,
        halts,
        f" for {' '.join(flagged or halted or ())}" if per_element else "",
        # Users do not know the number that a criterion becomes, and may not know which of two is the lower.
        f" Here flag is {flag.asked} and halt {halt.asked}: exchange them, or leave one out." if criteria else "",
        quantity,
    )
