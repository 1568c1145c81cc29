"""What is watched: the levels, their rules and actions, and how atoms become one reading."""

import functools
import math
import os
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Protocol, TextIO, runtime_checkable

import numpy as np
from ase.calculators.calculator import BaseCalculator

from ase_uq.dynamics.actions import Action, Flag, Halt, Log
from ase_uq.dynamics.rules import AnyOf, Level, Patience, Refractory, Rule, Threshold, _OfValue, _Several
from ase_uq.thresholds.criteria import Criterion, FalseAlarms, PerElement
from ase_uq.thresholds.data import ThresholdData
from ase_uq.thresholds.reduction import Reduction


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


def rules_of_levels(
    halt: float | Criterion | PerElement | Rule | None,
    flag: float | Criterion | PerElement | Rule | None,
    patience: float | None = None,
    at_once: float | Criterion | None = None,
    refractory: float | None = None,
) -> dict[Level, Rule]:
    """The rules as the user gave them, flag before halt.

    Args:
        halt: Number, criterion or rule of the halt level.
        flag: The same of the flag level.
        patience: fs that readings must stay above a plain `halt`.
        at_once: Number or criterion above `halt` at which there is no patience.
        refractory: fs for which `flag` is silent after it triggered.

    Raises:
        ValueError: Neither level is given, `patience` has no plain `halt` to belong to, `at_once` no `patience` or
            is not above `halt`, or `refractory` no `flag`.
    """
    if halt is None and flag is None:
        raise ValueError("the monitor has nothing to watch for. Give halt, flag or both, for example halt=0.5 (eV/Å).")
    asked: dict[Level, Rule] = {}
    if flag is not None:
        asked["flag"] = as_rule(flag) if refractory is None else Refractory(as_rule(flag), refractory)
    elif refractory is not None:
        raise ValueError("refractory belongs to flag, which is not given. Give flag too, for example flag=0.3 (eV/Å).")
    if halt is not None:
        asked["halt"] = as_rule(halt)
    if patience is not None:
        if halt is None:
            raise ValueError("patience belongs to halt, which is not given. For a flag give flag=Patience(value, fs).")
        if isinstance(halt, Rule):
            raise ValueError(f"halt is already a rule, {halt}. Leave patience out, or give halt as a number.")
        waiting = Patience(halt, patience)
        asked["halt"] = waiting if at_once is None else AnyOf(waiting, Threshold(at_once))
    elif at_once is not None:
        raise ValueError(
            f"at_once is where the run halts without patience, and no patience is given. Give patience in fs, or "
            f"halt={at_once} alone."
        )
    return asked


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


def _check_order(flag: Watch, halt: Watch) -> None:
    """Raises ValueError where a flag could never come before a halt on the same atoms."""
    flagged, halted = flag.reduction.elements, halt.reduction.elements
    if flagged is not None and halted is not None and not set(flagged) & set(halted):
        return
    # A rule that waits lets frames at its threshold be flagged, but a flag above it is a mistake all the same.
    waits = halt.rule.at_once == math.inf and isinstance(halt.rule, Patience)
    halts = math.nextafter(halt.rule.threshold, math.inf) if waits else halt.rule.at_once
    if flag.rule.threshold >= halts:
        criteria = [m for watch in (flag, halt) for m in watch.asked.criteria]
        per_element = [m for m in criteria if isinstance(m, PerElement)]
        scope = f" for {' '.join(flagged or halted or ())}" if per_element else ""
        # What a criterion comes to is news to its user, who may not know which of two is the lower.
        asked = (
            f" Here flag is {flag.asked} and halt {halt.asked}: exchange them, or leave one out." if criteria else ""
        )
        raise ValueError(
            f"flag is {flag.rule.threshold:.4g} eV/Å and halt is {halts:.4g} eV/Å{scope}, so no frame could "
            f"be flagged before the run is halted. Give a flag below the halt.{asked}"
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


def reduction_of(kind: str | float, elements: Sequence[str] | None, indices: Sequence[int] | None) -> Reduction:
    """The reduction that a user's arguments mean.

    Raises:
        TypeError: The indices are a mask.
    """
    if indices is not None and np.asarray(indices).dtype == bool:
        raise TypeError(
            "indices are numbers of atoms, not a mask, in which True would be atom 1. Give np.flatnonzero(mask)."
        )
    return Reduction(
        kind,
        None if elements is None else (elements,) if isinstance(elements, str) else tuple(elements),
        None if indices is None else tuple(int(index) for index in indices),
    )
