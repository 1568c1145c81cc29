"""Rules: when the readings of a run mean that a level is reached.

A rule holds hyper-parameters only. Whatever it must remember between two steps is a state that it is handed and
hands back, so that the same readings give the same alarms and a run can be restarted from a JSON file.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol, SupportsFloat, runtime_checkable

import numpy as np
from ase.calculators.calculator import BaseCalculator

from ase_uq.readings import Reduction

Level = Literal["ok", "flag", "halt"]

# Times are step numbers times a step that is not a round binary number: 40 steps of 0.5 fs must count as 20 fs.
_TIME_TOLERANCE = 1e-6


@runtime_checkable
class Meaning(Protocol):
    """A threshold that the calibration data turn into a number, such as `Quantile(0.99)`."""

    def resolve(self, readings: np.ndarray) -> float:
        """(n_frames,) readings of the calibration frames → the threshold, both in eV/Å."""
        ...


@runtime_checkable
class _Calibrated(Protocol):
    """A calculator that knows its calibration data, as `UncertainCalculator` does."""

    def threshold(self, meaning: Meaning, reduction: Reduction) -> float: ...


class Rule(ABC):
    """Base of all rules. Subclasses are frozen dataclasses; a state is None at first and always JSON-able."""

    @property
    @abstractmethod
    def threshold(self) -> float:
        """The number in eV/Å that readings are compared with."""

    @abstractmethod
    def resolved(self, resolve: Callable[[Meaning], float]) -> "Rule":
        """The same rule with every meaning replaced by its number in eV/Å."""

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
class Threshold(Rule):
    """Triggers at every step whose reading is at or above a threshold, or NaN.

    Args:
        value: Positive number in eV/Å, or a meaning such as `Quantile(0.99)`. Infinity is allowed: it triggers
            only for NaN and for elements the uncertainty model has never seen.

    Raises:
        ValueError: `value` is zero, negative or NaN.
        TypeError: `value` is neither a number nor a meaning.
    """

    value: float | Meaning

    def __post_init__(self) -> None:
        _check(self.value)

    @property
    def threshold(self) -> float:
        return _number(self)

    def resolved(self, resolve: Callable[[Meaning], float]) -> "Threshold":
        return replace(self, value=resolve(self.value)) if isinstance(self.value, Meaning) else self

    def judge(self, state: Any, reading: float, time: float | None) -> tuple[None, bool]:
        return None, _reaches(reading, self.threshold)

    def __str__(self) -> str:
        return f"a threshold of {self.value}"


@dataclass(frozen=True)
class Patience(Rule):
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

    value: float | Meaning
    fs: float

    def __post_init__(self) -> None:
        _check(self.value)
        if not 0 < self.fs < math.inf:
            raise ValueError(f"patience is a positive time in fs, not {self.fs!r}. Use Threshold to trigger at once.")

    def __str__(self) -> str:
        return f"a threshold of {self.value} for {self.fs:g} fs"

    @property
    def threshold(self) -> float:
        return _number(self)

    def resolved(self, resolve: Callable[[Meaning], float]) -> "Patience":
        return replace(self, value=resolve(self.value)) if isinstance(self.value, Meaning) else self

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


def as_rule(level: float | Meaning | Rule) -> Rule:
    """A rule as it is; a number in eV/Å or a meaning as a `Threshold`."""
    return level if isinstance(level, Rule) else Threshold(level)


def rules_of_levels(
    halt: float | Meaning | Rule | None, flag: float | Meaning | Rule | None, patience: float | None
) -> dict[Level, Rule]:
    """The rules as the user gave them, flag before halt.

    Raises:
        ValueError: Neither level is given, or `patience` has no plain `halt` to belong to.
    """
    if halt is None and flag is None:
        raise ValueError("the monitor has nothing to watch for. Give halt, flag or both, for example halt=0.5 (eV/Å).")
    asked: dict[Level, Rule] = {}
    if flag is not None:
        asked["flag"] = as_rule(flag)
    if halt is not None:
        asked["halt"] = as_rule(halt)
    if patience is not None:
        if halt is None:
            raise ValueError("patience belongs to halt, which is not given. For a flag give flag=Patience(value, fs).")
        if isinstance(halt, Rule):
            raise ValueError(f"halt is already a rule, {halt}. Leave patience out, or give halt as a number.")
        asked["halt"] = Patience(halt, patience)
    return asked


def settled(
    asked: Mapping[Level, Rule], calculator: BaseCalculator, reduction: Reduction, time: float | None
) -> dict[Level, Rule]:
    """The rules with numbers in place of meanings, by the calibration data of a calculator.

    Args:
        asked: Rules of the levels.
        calculator: Asked for `threshold(meaning, reduction)`.
        reduction: How readings are made.
        time: Time of the run now, fs; None if it has none.

    Raises:
        ValueError: The calculator cannot say what a meaning means, the flag is not below the halt, or a rule needs
            a time that the run does not have.
    """

    def resolve(meaning: Meaning) -> float:
        if not isinstance(calculator, _Calibrated):
            raise ValueError(
                f"{type(calculator).__name__} knows no calibration data to turn {meaning} into a number. "
                "Use UncertainCalculator, or give the threshold in eV/Å."
            )
        return float(calculator.threshold(meaning, reduction))

    rules: dict[Level, Rule] = {level: rule.resolved(resolve) for level, rule in asked.items()}
    if len(rules) == 2 and rules["flag"].threshold >= rules["halt"].threshold:
        raise ValueError(
            f"flag is {rules['flag'].threshold:.4g} eV/Å and halt is {rules['halt'].threshold:.4g} eV/Å, so no frame "
            "could be flagged before the run is halted. Give a flag below the halt."
        )
    for rule in rules.values():
        # Rules are pure, so this costs nothing; one that needs a time says so now, not hours from now.
        rule.judge(None, 0.0, time)
    return rules


def _reaches(reading: float, threshold: float) -> bool:
    return math.isnan(reading) or reading >= threshold


def _check(value: Any) -> None:
    if isinstance(value, Meaning):
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


def _number(rule: Threshold | Patience) -> float:
    if isinstance(rule.value, Meaning):
        raise ValueError(
            f"{rule} has no number yet: {rule.value} depends on the calibration data. UncertaintyMonitor asks the "
            "calculator for it; elsewhere use rule.resolved(calc.threshold)."
        )
    return float(rule.value)
