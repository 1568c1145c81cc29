"""Rules decide when the readings of a run reach a level.

A rule holds hyper-parameters only. Whatever it must remember between two steps is a state that it receives and
returns, so that the same readings give the same alarms and a run can be restarted from a JSON file.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Self, SupportsFloat

from ase_uq.thresholds.criteria import Criterion, PerElement
from ase_uq.thresholds.data import ThresholdData
from ase_uq.thresholds.levels import as_level

Level = Literal["ok", "flag", "halt"]

# Times are step numbers times a time step with a rounding error: 40 steps of 0.5 fs must count as 20 fs.
_TIME_TOLERANCE = 1e-6


class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses; a state is None at first and always a JSON value."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The number in eV/Å that readings are compared with."""

    @property
    def at_once(self) -> float:
        """Reading, eV/Å, from which on it triggers without waiting; infinity for a rule that always waits."""
        return self.threshold

    @property
    def criteria(self) -> tuple[Criterion | PerElement, ...]:
        """Criteria that calibration data must turn into numbers; empty for a rule with numbers."""
        return ()

    @abstractmethod
    def resolved(self, threshold_data: ThresholdData, element: ThresholdData | None = None) -> "Rule":
        """The same rule with every criterion replaced by its number in eV/Å.

        Args:
            threshold_data: Data of all atoms that are looked at.
            element: Data of the atoms of one element, for `PerElement`; if None or too few, all atoms count.

        Raises:
            ValueError: The data cannot support a criterion.
        """

    @abstractmethod
    def judge(self, state: Any, reading: float, time: float | None) -> tuple[Any, bool]:
        """Judges one step; a pure function.

        Args:
            state: State that the step before returned; None at the first step.
            reading: Reduced force uncertainty of this step, eV/Å; NaN always triggers.
            time: Simulated time, fs; None if the dynamics has no time, as in an optimiser.

        Returns:
            The state for the next step, and whether the rule triggers now.
        """


@dataclass(frozen=True)
class _OfValue(Rule):
    """A rule that compares readings with one value."""

    value: float | Criterion | PerElement

    def __post_init__(self) -> None:
        object.__setattr__(self, "value", as_level(self.value))
        _check(self.value)

    @property
    def threshold(self) -> float:
        if isinstance(self.value, Criterion | PerElement):
            raise ValueError(
                f"{self} has no number yet: {self.value} depends on the calibration data. UncertaintyMonitor asks the "
                "calculator for it; elsewhere use rule.resolved(calc.threshold_data(Reduction()))."
            )
        return float(self.value)

    @property
    def criteria(self) -> tuple[Criterion | PerElement, ...]:
        return (self.value,) if isinstance(self.value, Criterion | PerElement) else ()

    def resolved(self, threshold_data: ThresholdData, element: ThresholdData | None = None) -> Self:
        match self.value:
            case Criterion():
                return replace(self, value=self.value.resolve(threshold_data))
            case PerElement(criterion):
                if element is not None:
                    try:
                        return replace(self, value=criterion.resolve(element))
                    except ValueError:  # too few data of this element
                        return replace(self, value=criterion.resolve(threshold_data).shared())
                return replace(self, value=criterion.resolve(threshold_data))
        return self


@dataclass(frozen=True)
class Threshold(_OfValue):
    """Triggers at every step whose reading is at or above a threshold, or NaN.

    Args:
        value: Positive number in eV/Å, or a criterion such as `Quantile(0.99)`, in words `"q0.99"`, or
            `PerElement(Quantile(0.99))`.
            Infinity is allowed: it triggers only for NaN and for elements the uncertainty model has never seen.

    Raises:
        ValueError: `value` is zero, negative or NaN.
        TypeError: `value` is neither a number nor a criterion.
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
        value: Threshold, as for `Threshold`.
        fs: Simulated time that the reading must stay above, fs.

    Raises:
        ValueError: `value` is zero, negative or NaN; `fs` is not positive.
        TypeError: `value` is neither a number nor a criterion.
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
                f"{self} waits for simulated time in fs, and an optimiser has none. Use Threshold({self.value}) here."
            )
        if not _reaches(reading, self.threshold):
            return None, False
        # After the clock was set back, as by `dyn.nsteps = 0`, the rule must not wait until the old time is reached.
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
    def criteria(self) -> tuple[Criterion | PerElement, ...]:
        return tuple(criterion for rule in self.rules for criterion in rule.criteria)

    def resolved(self, threshold_data: ThresholdData, element: ThresholdData | None = None) -> Self:
        return type(self)(*(rule.resolved(threshold_data, element) for rule in self.rules))

    def _judgements(self, state: list | None, reading: float, time: float | None) -> tuple[list, list[bool]]:
        states = [None] * len(self.rules) if state is None else state
        judged = [rule.judge(before, reading, time) for rule, before in zip(self.rules, states, strict=True)]
        return [after for after, _ in judged], [triggered for _, triggered in judged]


class AnyOf(_Several):
    """Triggers when any of its rules does; its threshold is the lowest of theirs.

    Args:
        rules: Two or more rules.

    Raises:
        ValueError: There are fewer, or a `Threshold` is not above a `Patience` beside it, so that nothing ever waits.
        TypeError: One of them is not a rule.
    """

    def __init__(self, *rules: Rule) -> None:
        super().__init__(*rules)
        values = {kind: [r for r in rules if isinstance(r, kind) and not r.criteria] for kind in (Patience, Threshold)}
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


class AllOf(_Several):
    """Triggers when all of its rules do at the same step; its threshold is the highest of theirs.

    Args:
        rules: Two or more rules.

    Raises:
        ValueError: There are fewer.
        TypeError: One of them is not a rule.
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
        rule: Rule that triggers.
        fs: Length of the silence in simulated time, fs.

    Raises:
        ValueError: `fs` is not positive.
        TypeError: `rule` is not a rule.
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
    def criteria(self) -> tuple[Criterion | PerElement, ...]:
        return self.rule.criteria

    def resolved(self, threshold_data: ThresholdData, element: ThresholdData | None = None) -> "Refractory":
        return replace(self, rule=self.rule.resolved(threshold_data, element))

    def judge(self, state: Sequence | None, reading: float, time: float | None) -> tuple[list, bool]:
        if time is None:
            raise ValueError(
                f"a refractory time of {self.fs:g} fs needs simulated time, and an optimiser has none. Use "
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


def _reaches(reading: float, threshold: float) -> bool:
    return math.isnan(reading) or reading >= threshold


def _check(value: Any) -> None:
    if isinstance(value, Criterion | PerElement):
        return
    if not isinstance(value, SupportsFloat):
        raise TypeError(
            f"a threshold is a number in eV/Å or a criterion such as Quantile(0.99) or 'q0.99', not {value!r} "
            f"({type(value).__name__})."
        )
    if not float(value) > 0:
        raise ValueError(
            f"a threshold is a positive number in eV/Å, not {value!r}. Give the force uncertainty above which you "
            "no longer trust the run, or a criterion such as Quantile(0.99)."
        )
