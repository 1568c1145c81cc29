"""Thresholds and reductions as words of the command line, what is watched by them, and what is told of it."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from ase_uq.dynamics.policy import WatchPolicy
    from ase_uq.engines.ase.calculator import UncertainCalculator
    from ase_uq.thresholds.criteria import Criterion, PerElement


def threshold(text: str) -> "float | Criterion":
    """A threshold from words, as `level_of` reads them.

    Raises:
        BadParameter: They are no threshold.
    """
    from ase_uq.thresholds.levels import level_of

    try:
        return level_of(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from error


def reduction(text: str) -> str | float:
    """A kind of `Reduction`: max, mean, top3 or a quantile of the atoms.

    Raises:
        BadParameter: The text is none of these.
    """
    from ase_uq.thresholds.reduction import Reduction

    try:
        kind = float(text) if text[:1] in "0." else text
        Reduction(kind)
    except ValueError as error:
        raise typer.BadParameter(
            f"{text!r} is not a reduction. Give max, mean, top3 or a quantile of the atoms between 0 and 1, like 0.9."
        ) from error
    return kind


def check_levels(flag: "float | Criterion | None", halt: "float | Criterion | None", quantity: str = "forces") -> None:
    """Refuses a flag at or above the halt, where both are numbers; criteria are compared once they are resolved."""
    if not (isinstance(flag, float) and isinstance(halt, float)):
        return
    from ase_uq.dynamics.policy import check_order
    from ase_uq.dynamics.quantities import QUANTITIES

    try:
        check_order(flag, halt, quantity=QUANTITIES[quantity])
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="'--flag'") from error


def check_watches(flag: "float | Criterion | None", halt: "float | Criterion | None", log: Path | None) -> None:
    """Refuses a run in which nobody would look at uncertainties."""
    if flag is None and halt is None and log is None:
        raise typer.BadParameter(
            "give one of them or both, for example --halt 0.5 (eV/Å) or --flag q0.99 (of the calibration frames), or "
            "--log alone to write down the uncertainties.",
            param_hint="'--flag' / '--halt'",
        )


def per_element(level: "float | Criterion | None", option: str) -> "PerElement | None":
    """The level with a separate threshold for each element.

    Raises:
        BadParameter: The level is a number, or a criterion that cannot be applied to single elements.
    """
    from ase_uq.thresholds.criteria import Criterion, PerElement

    if level is None:
        return None
    if not isinstance(level, Criterion):
        raise typer.BadParameter(
            f"--per-element needs a criterion such as q0.99, which calibration data turn into a number for each "
            f"element; {level:g} eV/Å would be the same for all.",
            param_hint=f"'{option}'",
        )
    try:
        return PerElement(level)
    except TypeError as error:
        raise typer.BadParameter(
            f"{level} counts alarms of whole runs, not of elements. Leave --per-element out, or give q0.99, "
            "miss=0.1@0.3 or bound=0.95@0.3.",
            param_hint=f"'{option}'",
        ) from error


def watch_policy(
    flag: "float | Criterion | None",
    halt: "float | Criterion | None",
    *,
    quantity: str,
    each_element: bool,
    bonds: bool,
    max_temperature: float | None = None,
    **fields: Any,
) -> "WatchPolicy":
    """What the options of a verb that moves atoms ask to watch for.

    Args:
        flag: Of `--flag`.
        halt: Of `--halt`.
        quantity: Of `--quantity`.
        each_element: Whether each element has thresholds of its own.
        bonds: Whether broken bonds and fused atoms halt.
        max_temperature: Hotter atoms halt, K; None for any.
        fields: The others of `WatchPolicy`.

    Raises:
        BadParameter: The flag is not below the halt, or a level that elements cannot have.
        ValueError: What `WatchPolicy` refuses.
    """
    check_levels(flag, halt, quantity)
    levels = {"flag": flag, "halt": halt}
    if each_element:
        levels = {name: per_element(level, f"--{name}") for name, level in levels.items()}
    from ase_uq.dynamics.checks import Bonds, MaxTemperature
    from ase_uq.dynamics.policy import WatchPolicy

    checks = [*([MaxTemperature(max_temperature)] if max_temperature else []), *([Bonds()] if bonds else [])]
    return WatchPolicy(**levels, quantity=quantity, checks=checks, **fields)


def told(policy: "WatchPolicy", calculator: "UncertainCalculator", symbols: "Sequence[str]") -> "Iterator[str]":
    """A line for each threshold that was given as a criterion: its number, what it promises and how sure that is.

    Raises:
        ValueError: The calibration data cannot support a criterion.
    """
    from ase_uq.dynamics.policy import WatchPolicy
    from ase_uq.dynamics.rules import Threshold
    from ase_uq.thresholds.resolved import ResolvedThreshold

    for name, level in {"flag": policy.flag, "halt": policy.halt, "at once": policy.at_once}.items():
        if level is None:
            continue
        for watch in WatchPolicy(halt=level, reduce=policy.reduce).settled(calculator, symbols, None)["halt"]:
            assert isinstance(watch.rule, Threshold)
            if isinstance(watch.rule.value, ResolvedThreshold):
                of = "" if not watch.reduction.elements else f" of {' and '.join(watch.reduction.elements)}"
                yield f"{name}{of}: {watch.rule.value.describe()}"
