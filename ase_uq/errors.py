"""The exceptions a caller may want to catch. All other errors are a `ValueError` or a `TypeError`.

UQError
 ├─ MissingDependency      the package of a potential is not installed; the message has the pip line
 ├─ ArtefactError          a file was not written by this package, or is newer than it, truncated or altered
 ├─ PotentialMismatch      an uncertainty model is used with a potential it was not fitted on
 ├─ LabelError             frames have no labels, labels that are not finite, or there are too few of them
 ├─ InputError             atoms that no potential can take: no atoms, NaN positions, a missing charge
 └─ UncertaintyHalt        raised by `Halt` to end a run; carries the step, the reading and the threshold
"""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of a sentence about a name that is not known: the names that it resembles, or nothing."""
    found = difflib.get_close_matches(name, list(known), n=2)
    return f" Did you mean {' or '.join(found)}?" if found else ""


class UQWarning(UserWarning):
    """Something the user should look at, although the work continued."""


class UQError(Exception):
    """Base of the error classes that `ase_uq` defines."""


class MissingDependency(UQError, ImportError):
    """The package of a potential is not installed."""


class ArtefactError(UQError):
    """A file cannot be read as what it should be."""


class PotentialMismatch(UQError):
    """An uncertainty model was fitted on another potential."""


class LabelError(UQError, ValueError):
    """Frames cannot serve for fitting or calibration."""


class InputError(UQError, ValueError):
    """Atoms cannot be evaluated."""


class UncertaintyHalt(UQError):
    """A run was halted because the uncertainty passed its threshold.

    Args:
        message: What happened, in words.
        step: Step of the run at which it was halted.
        reading: The reduced force uncertainty of that step, eV/Å.
        threshold: The halting threshold, eV/Å.
    """

    def __init__(self, message: str, *, step: int, reading: float, threshold: float) -> None:
        super().__init__(message)
        self.step = step
        self.reading = reading
        self.threshold = threshold

    def __reduce__(self):
        # Without this, pickling would lose the keyword-only fields on the way back from a worker process.
        arguments = {"step": self.step, "reading": self.reading, "threshold": self.threshold}
        return _halt_from, (self.args[0], arguments)


def _halt_from(message: str, arguments: dict) -> UncertaintyHalt:
    return UncertaintyHalt(message, **arguments)
