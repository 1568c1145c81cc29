"""Judging one step: every rule and check on every structure, and the one verdict that results."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from ase_uq.dynamics.checks import Snapshot
from ase_uq.dynamics.policy import Watch, WatchPolicy, as_checks
from ase_uq.dynamics.quantities import QUANTITIES, Quantity
from ase_uq.dynamics.rules import Level
from ase_uq.dynamics.structures import too_close
from ase_uq.thresholds.reduction import Reduction

_RANKS: dict[Level, int] = {"ok": 0, "flag": 1, "halt": 2}


@dataclass(frozen=True, eq=False)
class Observation:
    """One structure of a step, with the values of the watched quantity.

    Args:
        snapshot: Snapshot for the checks.
        values: Values that rules judge, as `Quantity.values` gives them; None if there is no uncertainty.
        image: Number of the image on a path; None for the only structure.
    """

    snapshot: Snapshot
    values: np.ndarray | None
    image: int | None = None

    def reading(self, quantity: Quantity, reduction: Reduction) -> float:
        """The reading of this structure."""
        assert self.values is not None
        return quantity.reading(self.values, self.snapshot.atoms.numbers, reduction)

    def __str__(self) -> str:
        return "" if self.image is None else f"image {self.image}: "


@dataclass(frozen=True)
class Verdict:
    """The result of judging one step.

    Args:
        level: The highest level that was reached.
        reading: Reading of the watch that triggered, else of the one nearest to its threshold; NaN without any.
        threshold: Threshold of the same watch; NaN if a check triggered, or there is none.
        reason: What triggered, in words; empty at level `"ok"`.
        image: Number of the image that triggered; None for the only structure.
    """

    level: Level = "ok"
    reading: float = math.nan
    threshold: float = math.nan
    reason: str = ""
    image: int | None = None


class Judge:
    """The rules and checks of one run, and their states.

    With several images a rule judges the worst reading, with one state for the path; a check has a state per image.

    Args:
        policy: What to watch for.
        logs: Whether readings are logged, so that there need be no level.

    Raises:
        ValueError: There is nothing to watch for.
    """

    def __init__(self, policy: WatchPolicy, *, logs: bool = False) -> None:
        if not policy.levels and not logs:
            raise ValueError(
                "the monitor has nothing to watch for. Give halt, flag or both, for example halt=0.5 (eV/Å), or a log."
            )
        self.policy, self.checks = policy, as_checks(policy.checks)
        self.watches: dict[Level, tuple[Watch, ...]] = {}
        self._fingerprint: str | None = None
        self._model: str | None = None
        self._rules: dict[Level, list[Any]] = {}
        self._checks: list[dict[str, Any]] = [{} for _ in self.checks]

    def settle(self, calculator: BaseCalculator, symbols: Sequence[str], time: float | None) -> None:
        """Turns the criteria of the rules into numbers.

        Args:
            calculator: Calculator, which must have calibration data if a rule has a criterion.
            symbols: Chemical symbols of the atoms that are looked at.
            time: Current time of the run, fs; None if it has none.

        Raises:
            ValueError: A rule cannot be settled with this calculator.
        """
        self.watches = self.policy.settled(calculator, symbols, time)
        model = getattr(calculator, "uncertainty_model", None)
        self._fingerprint = getattr(getattr(model, "identity", None), "fingerprint", None)
        self._model = getattr(model, "digest", None)
        for level, watches in self.watches.items():
            if len(self._rules.get(level, ())) != len(watches):
                self._rules[level] = [None] * len(watches)

    def __call__(self, observations: Sequence[Observation], time: float | None) -> Verdict | None:
        """The verdict on a step; None if there is nothing to judge: no uncertainty and no checks.

        Args:
            observations: The structures of the step.
            time: Simulated time, fs; None if there is none.
        """
        uncertain = [observation for observation in observations if observation.values is not None]
        by_rules = self._by_rules(uncertain, time) if uncertain and self.policy.reads else None
        if by_rules is None and not self.checks:
            return None
        return self._by_checks(observations, by_rules or Verdict())

    def state(self) -> dict[str, Any]:
        """The states of rules and checks, and which uncertainty model they belong to, as JSON values."""
        return {
            "quantity": self.policy.quantity,
            "fingerprint": self._fingerprint,
            "uncertainty_model": self._model,
            "rules": {
                level: [
                    {"rule": _name(watch), "threshold": float(watch.rule.threshold), "state": state}
                    for watch, state in zip(watches, self._rules[level], strict=True)
                ]
                for level, watches in self.watches.items()
            },
            "checks": [
                {"check": str(check), "states": dict(states)}
                for check, states in zip(self.checks, self._checks, strict=True)
            ],
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; a rule or check that was not there before begins anew.

        Raises:
            ValueError: The state has other levels, another quantity, or another uncertainty model.
        """
        if set(state["rules"]) != set(self.watches):
            raise ValueError(
                f"the state has the levels {sorted(state['rules'])}, this monitor {sorted(self.watches)}. "
                "Make the monitor with the same levels as before."
            )
        if state["quantity"] != self.policy.quantity:
            raise ValueError(
                f"the state is one of {state['quantity']}, but this monitor watches {self.policy.quantity}. Make the "
                "monitor with the same quantity as before."
            )
        before = {(level, entry["rule"]): entry for level, entries in state["rules"].items() for entry in entries}
        self._check_model(state, before)
        for level, watches in self.watches.items():
            self._rules[level] = [before.get((level, _name(watch)), {}).get("state") for watch in watches]
        checked = {entry["check"]: entry["states"] for entry in state["checks"]}
        self._checks = [dict(checked.get(str(check), {})) for check in self.checks]

    def _by_rules(self, observations: Sequence[Observation], time: float | None) -> Verdict:
        quantity = self.policy.watched
        ranked: list[tuple[tuple[int, float], Verdict]] = []
        for name, watches in self.watches.items():
            for number, watch in enumerate(watches):
                readings = [observation.reading(quantity, watch.reduction) for observation in observations]
                worst = int(np.argmax(readings))  # the first NaN, if there is one
                reading, threshold = readings[worst], float(watch.rule.threshold)
                self._rules[name][number], triggered = watch.rule.judge(self._rules[name][number], reading, time)
                level: Level = name if triggered else "ok"
                reason = _reason(name, watch, quantity, observations[worst], reading) if triggered else ""
                verdict = Verdict(level, reading, threshold, reason, observations[worst].image)
                ranked.append(((_RANKS[level], _excess(reading, threshold)), verdict))
        if not ranked:  # nothing to compare with: the reading alone
            readings = [observation.reading(quantity, self.policy.reduction) for observation in observations]
            worst = int(np.argmax(readings))
            return Verdict(reading=readings[worst], image=observations[worst].image)
        return max(ranked, key=lambda entry: entry[0])[1]

    def _by_checks(self, observations: Sequence[Observation], verdict: Verdict) -> Verdict:
        complaints: list[tuple[str, int | None]] = []
        for check, states in zip(self.checks, self._checks, strict=True):
            for observation in observations:
                key = str(observation.image or 0)
                states[key], complaint = check.inspect(states.get(key), observation.snapshot)
                if complaint:
                    complaints.append((f"{observation}{type(check).__name__}: {complaint}", observation.image))
        if not complaints:
            return verdict
        text = "; ".join(complaint for complaint, _ in complaints)
        if verdict.level == "halt":
            return replace(verdict, reason=f"{verdict.reason}; {text}")
        return Verdict("halt", verdict.reading, math.nan, text, complaints[0][1])

    def _check_model(self, state: Mapping[str, Any], before: Mapping[tuple[str, str], Mapping[str, Any]]) -> None:
        """Raises ValueError if the potential or its fit has changed, or the same rules have other numbers."""
        changed = []
        for what, key, now in (
            ("potential", "fingerprint", self._fingerprint),
            ("fit", "uncertainty_model", self._model),
        ):
            if state[key] != now:
                changed.append(f"{what} {str(state[key])[:8]} then, {str(now)[:8]} now")
        for level, watches in self.watches.items():
            for watch in watches:
                now = float(watch.rule.threshold)
                then = before.get((level, _name(watch)), {}).get("threshold", now)
                if not math.isclose(then, now, rel_tol=1e-9):
                    number = self.policy.watched.number
                    changed.append(f"{level} by {_name(watch)} {number(then)} then, {number(now)} now")
        if changed:
            raise ValueError(
                f"this is a restart with another uncertainty model ({'; '.join(changed)}). Make the monitor with the "
                "calculator of the earlier run, or leave restore() out to begin anew with this one."
            )


def checked(calculator: BaseCalculator | None, quantity: Quantity | None = QUANTITIES["forces"]) -> BaseCalculator:
    """The same calculator; raises ValueError if there is none or it does not give the quantity, if any."""
    if calculator is None:
        raise ValueError("the structure has no calculator. Set atoms.calc = UncertainCalculator(...) first.")
    if quantity is not None and quantity.key not in calculator.implemented_properties:
        raise ValueError(
            f"{type(calculator).__name__} gives no {quantity.key}, so there is nothing to watch. Wrap it: "
            "atoms.calc = UncertainCalculator(calculator, uncertainty_model)."
        )
    return calculator


def symbols_looked_at(reduction: Reduction, atoms: Atoms) -> list[str]:
    """Chemical symbols of the atoms that a reduction looks at.

    Raises:
        ValueError: It looks at no atom, so that nothing could ever trigger.
        IndexError: An index lies beyond the structure.
    """
    if reduction(np.zeros(len(atoms)), atoms.numbers) == -math.inf:
        elements = None if reduction.elements is None else list(reduction.elements)
        raise ValueError(
            f"no atom of {atoms.get_chemical_formula()} is looked at with elements={elements} and "
            f"indices={reduction.indices}, so the monitor could never trigger. Give elements or "
            "indices that the structure has."
        )
    symbols = atoms.get_chemical_symbols()
    return [symbols[index] for index in _looked_at(reduction, atoms)]


def _looked_at(reduction: Reduction, atoms: Atoms) -> np.ndarray:
    """Indices of the atoms that a reduction looks at."""
    indices = np.arange(len(atoms)) if reduction.indices is None else np.arange(len(atoms))[list(reduction.indices)]
    if reduction.elements is None:
        return indices
    return indices[np.isin(np.array(atoms.get_chemical_symbols())[indices], reduction.elements)]


def _excess(reading: float, threshold: float) -> float:
    """Ratio of a reading to its threshold; infinity if the reading is NaN or infinite."""
    return math.inf if math.isnan(reading) or reading == math.inf else reading / threshold


def _reason(level: Level, watch: Watch, quantity: Quantity, observation: Observation, reading: float) -> str:
    # Plain ASCII: it goes into files that other programs read.
    assert observation.values is not None
    unit = quantity.unit.replace("Å", "A").replace("³", "^3")
    kind = f" ({watch.reduction.kind})" if quantity.per_atom else ""
    text = (
        f"{observation}{quantity.meaning}{kind} {quantity.number(reading, unit)} reached {level} at "
        f"{quantity.number(watch.rule.threshold, unit)} by {watch.asked}"
    )
    atoms = observation.snapshot.atoms
    closest = too_close(atoms, observation.snapshot.contact)
    closest = f"; {closest}" if closest else ""
    if not quantity.per_atom:
        return text + closest
    chosen = _looked_at(watch.reduction, atoms)
    worst = chosen[np.argmax(observation.values[chosen])]
    value = quantity.number(float(observation.values[worst]), unit)
    return f"{text}; worst atom {worst} ({atoms.symbols[worst]}, {value}){closest}"


def _name(watch: Watch) -> str:
    """A name that tells a watch from the others of its level, the same in every run."""
    elements = watch.reduction.elements
    return str(watch.asked) if elements is None else f"{watch.asked} of {' '.join(elements)}"
