"""What is watched: the levels, their rules and actions, and how atoms become one reading."""

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from numbers import Integral
from typing import Protocol, TextIO, TypedDict, runtime_checkable

import numpy as np
from ase.calculators.calculator import BaseCalculator

from ase_uq.dynamics.actions import Action, Flag, Halt, Log
from ase_uq.dynamics.checks import Check
from ase_uq.dynamics.rules import AnyOf, Level, Patience, Refractory, Rule, Threshold, _OfValue, _Several
from ase_uq.thresholds.criteria import Criterion, FalseAlarms, PerElement
from ase_uq.thresholds.data import ThresholdData
from ase_uq.thresholds.reduction import Reduction

# What a level may be given as.
Limit = float | Criterion | PerElement | Rule


@runtime_checkable
class _Calibrated(Protocol):
    """A calculator that knows its calibration data, as `UncertainCalculator` does."""

    def threshold_data(self, reduction: Reduction) -> ThresholdData: ...


@dataclass(frozen=True)
class Watch:
    """One rule of a level and the reading that it judges.

    Args:
        asked: The rule as the user gave it.
        rule: The same with numbers.
        reduction: How the atoms become its reading.
    """

    asked: Rule
    rule: Rule
    reduction: Reduction


def counted_alarms(rule: Rule) -> tuple[FalseAlarms, ...]:
    """The false alarms of a rule that are counted a reading, for which it matters how often readings are taken."""
    match rule:
        case _OfValue(value=FalseAlarms() as criterion):
            return (criterion,)
        case _Several(rules=rules):
            return tuple(criterion for own in rules for criterion in counted_alarms(own))
        case Refractory(rule=own):
            return counted_alarms(own)
    return ()


def as_rule(level: float | Criterion | PerElement | Rule) -> Rule:
    """A rule as it is; a number in eV/Å or a criterion as a `Threshold`."""
    return level if isinstance(level, Rule) else Threshold(level)


class WatchOptions(TypedDict, total=False):
    """The fields of a `WatchPolicy` as keywords, for whatever takes either."""

    halt: Limit | None
    flag: Limit | None
    patience: float | None
    at_once: float | Criterion | None
    refractory: float | None
    reduce: str | float
    elements: Sequence[str] | None
    indices: Sequence[int] | None
    checks: Check | Sequence[Check]
    every: int


@dataclass(frozen=True, kw_only=True)
class WatchPolicy:
    """What is watched in a run, and from where on it is flagged or halted: made once, used wherever atoms move.

        policy = WatchPolicy(halt=Quantile(0.999), flag=0.3, checks=Bonds())
        dyn.attach(UncertaintyMonitor(dyn, policy, frames="flagged.xyz"))
        relax(atoms, policy)

    Args:
        halt: Number in eV/Å, a criterion such as `Quantile(0.999)`, or a rule, above which the run is halted.
        flag: Number, criterion or rule for frames to keep; below `halt`.
        patience: fs that the reading must stay above `halt` before the run is halted. `flag` never waits: the frames
            of the wait are those worth keeping. For a flag that waits give `flag=Patience(0.3, fs=20)`.
        at_once: Number or criterion above `halt` at which the run is halted without patience.
        refractory: fs after a flag for which no other frame is flagged.
        reduce: `"max"`, `"mean"`, `"top3"`, or a quantile of the atoms in (0, 1).
        elements: Chemical symbols to look at; None for all.
        indices: Atom indices to look at; None for all.
        checks: What halts the run beside the uncertainty: `Finite()`, `MaxTemperature(2000)`, `Bonds()`. They need
            no uncertainty, so with them `halt` and `flag` may be left out.
        every: Uncertainties are wanted once in so many steps; a calculator for this policy is
            `UncertainCalculator(..., every=policy.every)`. Checks look at every step.

    Raises:
        ValueError: There is nothing to watch for, a level or time out of range, an option without the level that it
            belongs to, or an unknown reduction.
        TypeError: A threshold or a check that is none, or a mask in place of indices.
    """

    halt: Limit | None = None
    flag: Limit | None = None
    patience: float | None = None
    at_once: float | Criterion | None = None
    refractory: float | None = None
    reduce: str | float = "max"
    elements: Sequence[str] | None = None
    indices: Sequence[int] | None = None
    checks: Check | Sequence[Check] = ()
    every: int = 1

    def __post_init__(self) -> None:
        _ = self.rules, self.reduction
        checks = (self.checks,) if isinstance(self.checks, Check) else tuple(self.checks)
        for check in checks:
            if not isinstance(check, Check):
                raise TypeError(f"checks are objects such as Finite() or MaxTemperature(2000), not {check!r}.")
        object.__setattr__(self, "checks", checks)
        if not isinstance(self.every, Integral) or self.every < 1:
            raise ValueError(f"every is a number of steps, 1 or more, not {self.every!r}.")

    @classmethod
    def of(cls, policy: "WatchPolicy | None", options: WatchOptions) -> "WatchPolicy":
        """The policy that was given, or the one that its fields as keywords make.

        Raises:
            TypeError: Both were given.
        """
        if policy is None:
            return cls(**options)
        if options:
            raise TypeError(
                f"what is watched was given twice, as a policy and as {', '.join(options)}. Leave one out, or give "
                "dataclasses.replace(policy, ...)."
            )
        return policy

    @cached_property
    def rules(self) -> dict[Level, Rule]:
        """The rule of each level as the user gave it, flag before halt."""
        levels = (self.halt, self.flag, self.patience, self.at_once, self.refractory)
        # Checks alone are enough to watch for.
        if self.checks and levels.count(None) == len(levels):
            return {}
        if self.halt is None and self.flag is None:
            raise ValueError(
                "the monitor has nothing to watch for. Give halt, flag or both, for example halt=0.5 (eV/Å)."
            )
        rules: dict[Level, Rule] = {}
        if self.flag is not None:
            flag = as_rule(self.flag)
            rules["flag"] = flag if self.refractory is None else Refractory(flag, self.refractory)
        elif self.refractory is not None:
            raise ValueError(
                "refractory belongs to flag, which is not given. Give flag too, for example flag=0.3 (eV/Å)."
            )
        if self.halt is not None:
            rules["halt"] = as_rule(self.halt)
        if self.patience is not None:
            rules["halt"] = self._waiting(self.patience)
        elif self.at_once is not None:
            raise ValueError(
                f"at_once is where the run halts without patience, and no patience is given. Give patience in fs, or "
                f"halt={self.at_once} alone."
            )
        return rules

    def _waiting(self, patience: float) -> Rule:
        if self.halt is None:
            raise ValueError("patience belongs to halt, which is not given. For a flag give flag=Patience(value, fs).")
        if isinstance(self.halt, Rule):
            raise ValueError(f"halt is already a rule, {self.halt}. Leave patience out, or give halt as a number.")
        waiting = Patience(self.halt, patience)
        return waiting if self.at_once is None else AnyOf(waiting, Threshold(self.at_once))

    @cached_property
    def reduction(self) -> Reduction:
        """How the atoms of a structure become one reading."""
        if self.indices is not None and np.asarray(self.indices).dtype == bool:
            raise TypeError(
                "indices are numbers of atoms, not a mask, in which True would be atom 1. Give np.flatnonzero(mask)."
            )
        elements = (self.elements,) if isinstance(self.elements, str) else self.elements
        return Reduction(
            self.reduce,
            None if elements is None else tuple(elements),
            None if self.indices is None else tuple(int(index) for index in self.indices),
        )


def settled(
    asked: Mapping[Level, Rule],
    calculator: BaseCalculator,
    reduction: Reduction,
    symbols: Sequence[str],
    time: float | None,
) -> dict[Level, tuple[Watch, ...]]:
    """The rules with numbers in place of criteria, by the calibration data of a calculator.

    A rule with `PerElement` becomes one for each element, on readings of the atoms of that element alone.

    Args:
        asked: Rules of the levels.
        calculator: Asked for `evidence(reduction)` where a rule has a criterion.
        reduction: How readings are made.
        symbols: Chemical symbols of the atoms that are looked at, in any order and number.
        time: Time of the run now, fs; None if it has none.

    Raises:
        ValueError: The calculator cannot say what a criterion means, the flag is not below the halt, or a rule needs
            a time that the run does not have.
    """
    elements = [s for s in dict.fromkeys(symbols) if reduction.elements is None or s in reduction.elements]

    @functools.cache
    def threshold_data(reduction: Reduction) -> ThresholdData:
        assert isinstance(calculator, _Calibrated)
        return calculator.threshold_data(reduction)

    def watches(rule: Rule) -> tuple[Watch, ...]:
        if not rule.criteria:
            return (Watch(rule, rule, reduction),)
        if not isinstance(calculator, _Calibrated):
            raise ValueError(
                f"{type(calculator).__name__} knows no calibration data to turn {rule.criteria[0]} into a number. "
                "Use UncertainCalculator, or give the threshold in eV/Å."
            )
        if not any(isinstance(criterion, PerElement) for criterion in rule.criteria):
            return (Watch(rule, rule.resolved(threshold_data(reduction)), reduction),)
        own = [replace(reduction, elements=(element,)) for element in elements]
        return tuple(Watch(rule, rule.resolved(threshold_data(reduction), threshold_data(each)), each) for each in own)

    found: dict[Level, tuple[Watch, ...]] = {level: watches(rule) for level, rule in asked.items()}
    for flag in found.get("flag", ()):
        for halt in found.get("halt", ()):
            _check_order(flag, halt)
    for watch in (watch for level in found.values() for watch in level):
        # Rules are pure, so this costs nothing; one that needs a time says so now, not hours from now.
        watch.rule.judge(None, 0.0, time)
    return found


def check_flag_below_halt(flag: float, halt: float, where: str = "", hint: str = "") -> None:
    """Refuses levels between which no frame lies.

    Args:
        flag: eV/Å.
        halt: eV/Å.
        where: What atoms this is about, for the message; empty for all.
        hint: What else the user may want to know.

    Raises:
        ValueError: The flag is not below the halt.
    """
    if not flag < halt:
        raise ValueError(
            f"flag is {flag:.4g} eV/Å and halt is {halt:.4g} eV/Å{where}, so no frame could be flagged. Give a flag "
            f"below the halt.{hint}"
        )


def _check_order(flag: Watch, halt: Watch) -> None:
    """Raises ValueError where a flag could never come before a halt on the same atoms."""
    flagged, halted = flag.reduction.elements, halt.reduction.elements
    if flagged is not None and halted is not None and not set(flagged) & set(halted):
        return
    # A rule that waits lets frames at its threshold be flagged, but a flag above it is a mistake all the same.
    waits = halt.rule.at_once == math.inf and isinstance(halt.rule, Patience)
    halts = math.nextafter(halt.rule.threshold, math.inf) if waits else halt.rule.at_once
    criteria = [criterion for watch in (flag, halt) for criterion in watch.asked.criteria]
    per_element = any(isinstance(criterion, PerElement) for criterion in criteria)
    check_flag_below_halt(
        flag.rule.threshold,
        halts,
        f" for {' '.join(flagged or halted or ())}" if per_element else "",
        # What a criterion comes to is news to its user, who may not know which of two is the lower.
        f" Here flag is {flag.asked} and halt {halt.asked}: exchange them, or leave one out." if criteria else "",
    )


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
    """What is done at each level, in order: the log, the frame, and the user's actions.

    Args:
        levels: Those that can be reached.
        frames: File of flagged and halting frames; None for none.
        log: File, stream or `"-"` for every judged step; None for none.
        on_halt: At the halt level; None for `Halt()`.
        on_flag: At the flag level; None for nothing more.

    Raises:
        ValueError: An action that could never run, or a file that cannot be written.
        TypeError: An action that cannot be called.
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
