"""Thresholds as words, such as "q0.99": one grammar for the command line and for Python."""

import re
from typing import Any

from ase_uq.thresholds.criteria import Criterion, ErrorBound, FalseAlarms, MissRate, Quantile

FORMS = (
    "0.5 (eV/Å, or the unit of the quantity); q0.99 (99 % of the calibration frames stay below it); "
    "miss=0.1@0.3 (misses at most 0.1 of the frames with an error above 0.3 eV/Å; with confidence 0.9: "
    "miss=0.1@0.3/0.9); bound=0.95@0.3 (below it, errors stay within 0.3 eV/Å with confidence 0.95); "
    "alarms=0.05@100ps or alarms=0.05@20000 (disturbs at most 0.05 of good runs of 100 ps, or of 20000 readings)"
)


def level_of(text: str) -> float | Criterion:
    """A threshold from text in one of `FORMS`: a number in eV/Å or a criterion.

    Raises:
        ValueError: The text has none of the forms, or a number in it is out of range.
    """
    try:
        level = _level(text)
    except ValueError as error:
        raise ValueError(
            f"{text!r} is neither a number in eV/Å nor a criterion: {str(error).rstrip('.')}. Give one of {FORMS}."
        ) from error
    if isinstance(level, float) and not level > 0:
        raise ValueError(f"a threshold is a positive number in eV/Å, not {text}.")
    return level


def as_level(level: Any) -> Any:
    """A criterion in place of its words; all else as it is, text that is no criterion included.

    Raises:
        ValueError: A number in the words of a criterion is out of range.
    """
    is_criterion = isinstance(level, str) and re.match(r"q[\d.]|(miss|bound|alarms)=", level)
    return level_of(level) if is_criterion else level


def _level(text: str) -> float | Criterion:
    match re.split("([=@/])", text):
        case [word] if word.startswith("q"):
            return Quantile(_number(word[1:]))
        case [word]:
            return _number(word)
        case ["miss", "=", share, "@", error]:
            return MissRate(_number(error), _number(share))
        case ["miss", "=", share, "@", error, "/", confidence]:
            return MissRate(_number(error), _number(share), _number(confidence))
        case ["bound", "=", confidence, "@", error]:
            return ErrorBound(_number(error), _number(confidence))
        case ["alarms", "=", share, "@", length] if length.endswith("ps"):
            return FalseAlarms(_number(share), ps=_number(length.removesuffix("ps")))
        case ["alarms", "=", share, "@", length]:
            if not length.isdecimal():
                raise ValueError(f"{length!r} is neither a time like 100ps nor a number of readings like 20000")
            return FalseAlarms(_number(share), steps=int(length))
        case _:
            raise ValueError("it has none of the known forms")


def _number(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError(f"{text!r} is not a number") from None
