"""Rules: when the readings of a run mean that a level is reached.

A rule holds hyper-parameters only. Whatever it must remember between two steps is a state that it is handed and
hands back, so that the same readings give the same alarms and a run can be restarted from a JSON file.
"""

import functools
import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, Self, SupportsFloat, runtime_checkable

from ase.calculators.calculator import BaseCalculator

from ase_uq.thresholds.meanings import Evidence, FalseAlarms, Meaning, PerElement
from ase_uq.thresholds.reduction import Reduction

Level = Literal["ok", "flag", "halt"]

# Times are step numbers times a step that is not a round binary number: 40 steps of 0.5 fs must count as 20 fs.
_TIME_TOLERANCE = 1e-6


@runtime_checkable
class _Calibrated(Protocol):
    """A calculator that knows its calibration data, as `UncertainCalculator` does."""

    def evidence(self, reduction: Reduction) -> Evidence: ...


class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses; a state is None at first and always JSON-able."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The number in eV/Å that readings are compared with."""

    @property
    def at_once(self) -> float:
        """From this reading on, eV/Å, it triggers at the first step; infinity for a rule that always waits."""
        return self.threshold

    @property
    def meanings(self) -> tuple[Meaning | PerElement, ...]:
        """What the calibration data must turn into numbers; empty for a rule of numbers."""
        return ()

    @abstractmethod
    def resolved(self, evidence: Evidence, element: Evidence | None = None) -> "Rule":
        """The same rule with every meaning replaced by its number in eV/Å.

        Args:
            evidence: Of all atoms that are looked at.
            element: Of those of one element, for `PerElement`; where it is too little, or None, `evidence` counts.

        Raises:
            ValueError: The data cannot support a meaning.
        """

    @abstractmethod
    def judge(self, state: Any, reading: float, time: float | None) -> tuple[Any, bool]:
        """Judges one step; a pure function.

        Args:
            state: What the step before handed back; None at the first step.
            reading: Reduced force uncertainty of this step, eV/Å; NaN always triggers.
            time: Simulated time, fs; None where the dynamics has no time, as in an optimiser.

        Returns:
            The state for the next step, and whether the rule triggers now.
        """


@dataclass(frozen=True)
class _OfValue(Rule):
    """A rule that compares readings with one value."""

    value: float | Meaning | PerElement

    def __post_init__(self) -> None:
        _check(self.value)

    @property
    def threshold(self) -> float:
        if isinstance(self.value, Meaning | PerElement):
            raise ValueError(
                f"{self} has no number yet: {self.value} depends on the calibration data. UncertaintyMonitor asks the "
                "calculator for it; elsewhere use rule.resolved(calc.evidence(Reduction()))."
            )
        return float(self.value)

    @property
    def meanings(self) -> tuple[Meaning | PerElement, ...]:
        return (self.value,) if isinstance(self.value, Meaning | PerElement) else ()

    def resolved(self, evidence: Evidence, element: Evidence | None = None) -> Self:
        match self.value:
            case Meaning():
                return replace(self, value=self.value.resolve(evidence))
            case PerElement(meaning):
                if element is not None:
                    try:
                        return replace(self, value=meaning.resolve(element))
                    except ValueError:  # too few data of this element
                        return replace(self, value=meaning.resolve(evidence).shared())
                return replace(self, value=meaning.resolve(evidence))
        return self


@dataclass(frozen=True)
class Threshold(_OfValue):
    """Triggers at every step whose reading is at or above a threshold, or NaN.

    Args:
        value: Positive number in eV/Å, or a meaning such as `Quantile(0.99)` or `PerElement(Quantile(0.99))`.
            Infinity is allowed: it triggers only for NaN and for elements the uncertainty model has never seen.

    Raises:
        ValueError: `value` is zero, negative or NaN.
        TypeError: `value` is neither a number nor a meaning.
    """

    def judge(self, state: Any, reading: float, time: float | None) -> tuple[None, bool]:
        return None, _reaches(reading, self.threshold)

    def __str__(self) -> str:
        return f"a threshold of {self.value}"


@dataclass(frozen=True)
class Patience(_OfValue):
    """Triggers once the reading has been at or above a threshold for a while without a break.

    The clock starts at the first step above, so a single spike never triggers. NaN triggers at once: a model
    that has broken does not recover.

    Args:
        value: As for `Threshold`.
        fs: Simulated time that the reading must stay above, fs.

    Raises:
        ValueError: `value` is zero, negative or NaN; `fs` is not positive.
        TypeError: `value` is neither a number nor a meaning.
    """

    fs: float

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.fs < math.inf:
            raise ValueError(f"patience is a positive time in fs, not {self.fs!r}. Use Threshold to trigger at once.")

    def __str__(self) -> str:
        return f"a threshold of {self.value} for {self.fs:g} fs"

    @property
    def at_once(self) -> float:
        return math.inf

    def judge(self, state: float | None, reading: float, time: float | None) -> tuple[float | None, bool]:
        if time is None:
            raise ValueError(
                f"{self} waits in fs of simulated time, and an optimiser has none. Use Threshold({self.value}) here."
            )
        if not _reaches(reading, self.threshold):
            return None, False
        # A clock that was set back, as `dyn.nsteps = 0` does, must not make the rule wait for the old time.
        since = time if state is None else min(state, time)
        return since, math.isnan(reading) or time - since > self.fs - _TIME_TOLERANCE


@dataclass(frozen=True, init=False)
class _Several(Rule):
    """A rule made of rules, all of which judge every step."""

    rules: tuple[Rule, ...]

    def __init__(self, *rules: Rule) -> None:
        for rule in rules:
            if not isinstance(rule, Rule):
                raise TypeError(f"{type(self).__name__} takes rules such as Threshold(0.5), not {rule!r}.")
        if len(rules) < 2:
            raise ValueError(f"{type(self).__name__} takes two rules or more, not {len(rules)}.")
        object.__setattr__(self, "rules", rules)

    @property
    def meanings(self) -> tuple[Meaning | PerElement, ...]:
        return tuple(meaning for rule in self.rules for meaning in rule.meanings)

    def resolved(self, evidence: Evidence, element: Evidence | None = None) -> Self:
        return type(self)(*(rule.resolved(evidence, element) for rule in self.rules))

    def _judgements(self, state: list | None, reading: float, time: float | None) -> tuple[list, list[bool]]:
        states = [None] * len(self.rules) if state is None else state
        judged = [rule.judge(own, reading, time) for rule, own in zip(self.rules, states, strict=True)]
        return [own for own, _ in judged], [triggered for _, triggered in judged]


@dataclass(frozen=True, init=False)
class AnyOf(_Several):
    """Triggers when any of its rules does; its threshold is the lowest of theirs.

    Args:
        rules: Two or more.

    Raises:
        ValueError: Fewer, or a `Patience` beside a `Threshold` that is not above it, so that nothing ever waits.
        TypeError: One is no rule.
    """

    def __init__(self, *rules: Rule) -> None:
        super().__init__(*rules)
        values = {kind: [r for r in rules if isinstance(r, kind) and not r.meanings] for kind in (Patience, Threshold)}
        if not all(values.values()):
            return
        at_once = min(rule.threshold for rule in values[Threshold])
        waiting = max(values[Patience], key=lambda rule: rule.threshold)
        if at_once <= waiting.threshold:
            raise ValueError(
                f"{at_once:.4g} eV/Å triggers at once and is not above {waiting.threshold:.4g} eV/Å, which has "
                "patience, so nothing would ever wait. Give at_once above halt."
            )

    def __str__(self) -> str:
        return " or ".join(map(str, self.rules))

    @property
    def threshold(self) -> float:
        return min(rule.threshold for rule in self.rules)

    @property
    def at_once(self) -> float:
        return min(rule.at_once for rule in self.rules)

    def judge(self, state: list | None, reading: float, time: float | None) -> tuple[list, bool]:
        states, triggered = self._judgements(state, reading, time)
        return states, any(triggered) or math.isnan(reading)


@dataclass(frozen=True, init=False)
class AllOf(_Several):
    """Triggers when all of its rules do at the same step; its threshold is the highest of theirs.

    Args:
        rules: Two or more.

    Raises:
        ValueError: Fewer.
        TypeError: One is no rule.
    """

    def __str__(self) -> str:
        return " and ".join(map(str, self.rules))

    @property
    def threshold(self) -> float:
        return max(rule.threshold for rule in self.rules)

    @property
    def at_once(self) -> float:
        return max(rule.at_once for rule in self.rules)

    def judge(self, state: list | None, reading: float, time: float | None) -> tuple[list, bool]:
        states, triggered = self._judgements(state, reading, time)
        return states, all(triggered) or math.isnan(reading)


@dataclass(frozen=True)
class Refractory(Rule):
    """Silent for a while after each alarm, so that one event is not reported at every step.

    After the silence its rule starts anew: a patience waits again, a CUSUM is back at zero. NaN and infinity always
    trigger; an alarm within the silence does not prolong it.

    Args:
        rule: What triggers.
        fs: Simulated time of the silence, fs.

    Raises:
        ValueError: `fs` is not positive.
        TypeError: `rule` is no rule.
    """

    rule: Rule
    fs: float

    def __post_init__(self) -> None:
        if not isinstance(self.rule, Rule):
            raise TypeError(f"Refractory takes a rule such as Threshold(0.3), not {self.rule!r}.")
        if not 0 < self.fs < math.inf:
            raise ValueError(f"a refractory time is a positive time in fs, not {self.fs!r}.")

    def __str__(self) -> str:
        return f"{self.rule}, silent for {self.fs:g} fs after it"

    @property
    def threshold(self) -> float:
        return self.rule.threshold

    @property
    def at_once(self) -> float:
        return self.rule.at_once

    @property
    def meanings(self) -> tuple[Meaning | PerElement, ...]:
        return self.rule.meanings

    def resolved(self, evidence: Evidence, element: Evidence | None = None) -> "Refractory":
        return replace(self, rule=self.rule.resolved(evidence, element))

    def judge(self, state: Sequence | None, reading: float, time: float | None) -> tuple[list, bool]:
        if time is None:
            raise ValueError(
                f"a refractory time is one of {self.fs:g} fs of simulated time, and an optimiser has none. Use "
                f"{self.rule} without it here."
            )
        inner, since = (None, None) if state is None else state
        if since is not None:
            since = min(since, time)  # as in Patience: a clock may be set back
            if time - since <= self.fs - _TIME_TOLERANCE:
                return [None, since], math.isnan(reading) or reading == math.inf
        inner, triggered = self.rule.judge(inner, reading, time)
        if triggered or reading == math.inf:
            return [None, time], True
        return [inner, None], False


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
        case _OfValue(value=FalseAlarms() as meaning):
            return (meaning,)
        case _Several(rules=rules):
            return tuple(meaning for own in rules for meaning in counted_alarms(own))
        case Refractory(rule=own):
            return counted_alarms(own)
    return ()


def as_rule(level: float | Meaning | PerElement | Rule) -> Rule:
    """A rule as it is; a number in eV/Å or a meaning as a `Threshold`."""
    return level if isinstance(level, Rule) else Threshold(level)


def rules_of_levels(
    halt: float | Meaning | PerElement | Rule | None,
    flag: float | Meaning | PerElement | Rule | None,
    patience: float | None = None,
    at_once: float | Meaning | None = None,
    refractory: float | None = None,
) -> dict[Level, Rule]:
    """The rules as the user gave them, flag before halt.

    Args:
        halt: Number, meaning or rule of the halt level.
        flag: The same of the flag level.
        patience: fs that readings must stay above a plain `halt`.
        at_once: Number or meaning above `halt` at which there is no patience.
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
    """The rules with numbers in place of meanings, by the calibration data of a calculator.

    A rule with `PerElement` becomes one for each element, on readings of the atoms of that element alone.

    Args:
        asked: Rules of the levels.
        calculator: Asked for `evidence(reduction)` where a rule has a meaning.
        reduction: How readings are made.
        symbols: Chemical symbols of the atoms that are looked at, in any order and number.
        time: Time of the run now, fs; None if it has none.

    Raises:
        ValueError: The calculator cannot say what a meaning means, the flag is not below the halt, or a rule needs
            a time that the run does not have.
    """
    elements = [s for s in dict.fromkeys(symbols) if reduction.elements is None or s in reduction.elements]

    @functools.cache
    def evidence(reduction: Reduction) -> Evidence:
        assert isinstance(calculator, _Calibrated)
        return calculator.evidence(reduction)

    def watches(rule: Rule) -> tuple[Watch, ...]:
        if not rule.meanings:
            return (Watch(rule, rule, reduction),)
        if not isinstance(calculator, _Calibrated):
            raise ValueError(
                f"{type(calculator).__name__} knows no calibration data to turn {rule.meanings[0]} into a number. "
                "Use UncertainCalculator, or give the threshold in eV/Å."
            )
        if not any(isinstance(meaning, PerElement) for meaning in rule.meanings):
            return (Watch(rule, rule.resolved(evidence(reduction)), reduction),)
        own = [replace(reduction, elements=(element,)) for element in elements]
        return tuple(Watch(rule, rule.resolved(evidence(reduction), evidence(each)), each) for each in own)

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
        meanings = [m for watch in (flag, halt) for m in watch.asked.meanings]
        per_element = [m for m in meanings if isinstance(m, PerElement)]
        scope = f" for {' '.join(flagged or halted or ())}" if per_element else ""
        # What a meaning comes to is news to its user, who may not know which of two is the lower.
        asked = (
            f" Here flag is {flag.asked} and halt {halt.asked}: exchange them, or leave one out." if meanings else ""
        )
        raise ValueError(
            f"flag is {flag.rule.threshold:.4g} eV/Å and halt is {halts:.4g} eV/Å{scope}, so no frame could "
            f"be flagged before the run is halted. Give a flag below the halt.{asked}"
        )


def _reaches(reading: float, threshold: float) -> bool:
    return math.isnan(reading) or reading >= threshold


def _check(value: Any) -> None:
    if isinstance(value, Meaning | PerElement):
        return
    if not isinstance(value, SupportsFloat):
        raise TypeError(
            f"a threshold is a number in eV/Å or a meaning such as Quantile(0.99), not {value!r} "
            f"({type(value).__name__})."
        )
    if not float(value) > 0:
        raise ValueError(
            f"a threshold is a positive number in eV/Å, not {value!r}. Take the force uncertainty from which on "
            "you no longer trust the run, or a meaning such as Quantile(0.99)."
        )
