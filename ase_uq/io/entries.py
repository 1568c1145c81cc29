"""The entries of a file, each checked as it is read: what no reader could use is refused by name.

A file may be whole and yet hold other things than its settings imply: a tool has edited it. Whoever reads an entry says
here what it must be, before anything is made from it.
"""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

# Bounds of what may be divided by and of what may be squared and summed: float64 holds the results.
SMALLEST, LARGEST = 1e-60, 1e60
LARGEST_NUMBER = 118  # of an element

_REPR = reprlib.Repr(maxlevel=2, maxdict=2, maxstring=60)


class WrongEntry(ValueError):
    """An entry of a file is missing, is not expected, or is not what was expected."""


class Entries:
    """A JSON object of a file.

    Args:
        value: What should be an object.
        name: Where it is in the file.

    Raises:
        WrongEntry: It is none. All methods raise it for an entry that is missing or wrong.
    """

    def __init__(self, value: Any, name: str) -> None:
        if not isinstance(value, dict):
            raise WrongEntry(f"{name} is {_short(value)}, an object was expected")
        self.value: dict[str, Any] = value
        self.name = name

    def __contains__(self, key: str) -> bool:
        return key in self.value

    def __getitem__(self, key: str) -> Any:
        if key not in self.value:
            raise WrongEntry(f"{self.name} has no {key!r}")
        return self.value[key]

    def wrong(self, key: str, expected: str) -> WrongEntry:
        """The error for an entry that is something else than expected."""
        return WrongEntry(f"{self.name}.{key} is {_short(self.value.get(key))}, {expected} was expected")

    def under(self, key: str) -> "Entries":
        """An entry that is an object."""
        return Entries(self[key], f"{self.name}.{key}")

    def keys(self, known: Sequence[str]) -> tuple[str, ...]:
        """The keys, all of which must be known."""
        if unknown := [key for key in self.value if key not in known]:
            raise WrongEntry(f"{self.name} has {_short(unknown[0])}, but only {', '.join(known)} are known")
        return tuple(self.value)

    def number(self, key: str, low: float = -LARGEST, high: float = LARGEST) -> float:
        """An entry that is a number between two bounds, which are included."""
        if not _is_number(self[key], low, high):
            raise self.wrong(key, f"a number from {low:g} to {high:g}")
        return self[key]

    def positive(self, key: str) -> float:
        """An entry that is a number above zero."""
        return self.number(key, 1e-300)

    def whole(self, key: str, low: int = 0, high: int = 10**15) -> int:
        """An entry that is a whole number between two bounds, which are included."""
        if not _is_whole(self[key], low, high):
            raise self.wrong(key, f"a whole number from {low:g} to {high:g}")
        return self[key]

    def text(self, key: str, choices: Sequence[str] = ()) -> str:
        """An entry that is text, one of the choices if there are some."""
        value = self[key]
        if not isinstance(value, str) or (choices and value not in choices):
            raise self.wrong(key, f"one of {', '.join(map(repr, choices))}" if choices else "text")
        return value

    def numbers(self, key: str, low: float = -LARGEST, high: float = LARGEST, length: int | None = None) -> list[float]:
        """An entry that is a list of numbers between two bounds: so many, or at least one."""
        values = self._list(key, length, f"numbers from {low:g} to {high:g}")
        if not all(_is_number(value, low, high) for value in values):
            raise self.wrong(key, f"a list of numbers from {low:g} to {high:g}")
        return values

    def wholes(self, key: str, low: int = 0, high: int = 10**15, *, length: int | None = None) -> list[int]:
        """An entry that is a list of whole numbers between two bounds: so many, or at least one."""
        values = self._list(key, length, f"whole numbers from {low:g} to {high:g}")
        if not all(_is_whole(value, low, high) for value in values):
            raise self.wrong(key, f"a list of whole numbers from {low:g} to {high:g}")
        return values

    def any_numbers(self) -> dict[str, float]:
        """All entries, which are numbers of any value, infinite ones too: such as only people read."""
        for key, value in self.value.items():
            if not isinstance(value, int | float) or isinstance(value, bool):
                raise self.wrong(key, "a number")
        return self.value

    def elements(self, key: str) -> list[int]:
        """An entry that is a list of different atomic numbers, ascending."""
        values = self.wholes(key, 0, LARGEST_NUMBER)
        if values != sorted(set(values)):
            raise self.wrong(key, "a list of ascending atomic numbers")
        return values

    def of_elements(self) -> dict[int, str]:
        """The key of each element, for an object whose keys are atomic numbers."""
        known = {str(number): number for number in range(LARGEST_NUMBER + 1)}
        for key in self.value:
            if key not in known:
                raise WrongEntry(f"{self.name} has {_short(key)}, atomic numbers were expected")
        return {known[key]: key for key in self.value}

    def names(self, key: str, known: Sequence[str]) -> list[str]:
        """An entry that is a list of different names, all of them known; it may be empty."""
        values = self[key]
        texts = isinstance(values, list) and all(isinstance(value, str) and value in known for value in values)
        if not texts or len(set(values)) != len(values):
            raise self.wrong(key, f"a list of some of {', '.join(map(repr, known)) or 'no names'}")
        return values

    def _list(self, key: str, length: int | None, of: str) -> list[Any]:
        values = self[key]
        if not isinstance(values, list) or (length is not None and len(values) != length) or not values:
            raise self.wrong(key, f"a list of {'' if length is None else f'{length} '}{of}")
        return values


class StoredTensors:
    """Tensors of a file by name.

    Args:
        tensors: All tensors of the file, or of a part of it.
        prefix: With which the names begin in the file.
    """

    def __init__(self, tensors: Mapping[str, Tensor], prefix: str = "") -> None:
        self.tensors = dict(tensors)
        self.prefix = prefix
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def under(self, prefix: str) -> "StoredTensors":
        """Those whose names begin with a prefix, by the rest of their names; they count as taken here."""
        names = [name for name in self.tensors if name.startswith(prefix)]
        self._taken.update(names)
        part = {name.removeprefix(prefix): self.tensors[name] for name in names}
        return StoredTensors(part, self.prefix + prefix)

    def take(
        self,
        name: str,
        *shape: int | None,
        dtype: torch.dtype = torch.float64,
        low: float = -LARGEST,
        high: float = LARGEST,
        nan: bool = False,
    ) -> Tensor:
        """A tensor of a shape and dtype, with values between two bounds, which are included.

        Args:
            name: Its name.
            shape: Size of each dimension; None for any size from 1.
            dtype: Its dtype.
            low: Smallest value.
            high: Largest value.
            nan: Whether a value may be NaN.

        Raises:
            WrongEntry: There is no such tensor, or it is another one.
        """
        if name not in self.tensors:
            raise WrongEntry(f"there is no tensor {self.prefix}{name}")
        self._taken.add(name)
        tensor = self.tensors[name]
        sizes = tuple(tensor.shape)
        fits = len(sizes) == len(shape) and all(
            n == m if m is not None else n >= 1 for n, m in zip(sizes, shape, strict=True)
        )
        if not fits or tensor.dtype != dtype:
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise WrongEntry(
                f"the tensor {self.prefix}{name} is {tensor.dtype} of shape {sizes}, {dtype} of shape ({wanted}) was "
                "expected"
            )
        values = tensor[~tensor.isnan()] if nan else tensor
        if values.numel():
            smallest, largest = (bound.item() for bound in torch.aminmax(values))
            if not (low <= smallest and largest <= high):  # NaN is neither
                bad = smallest if not low <= smallest else largest
                raise WrongEntry(
                    f"the tensor {self.prefix}{name} holds {bad:g}, values from {low:g} to {high:g} were expected"
                )
        return tensor

    def elements(self, name: str) -> Tensor:
        """A tensor of different atomic numbers, ascending."""
        values = self.take(name, None, dtype=torch.int64, low=0, high=LARGEST_NUMBER)
        if not bool((values.diff() > 0).all()):
            raise WrongEntry(f"the tensor {self.prefix}{name} is {values.tolist()}, ascending numbers were expected")
        return values

    def finite(self) -> None:
        """Takes all that are left, whatever they are; those of floating-point numbers must be finite."""
        for name in self.tensors.keys() - self._taken:
            tensor = self.tensors[name]
            if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
                raise WrongEntry(f"the tensor {self.prefix}{name} holds values that are not finite")
        self._taken.update(self.tensors)

    def nothing_else(self) -> None:
        """Refuses tensors that nobody has taken."""
        if left := sorted(self.tensors.keys() - self._taken):
            raise WrongEntry(f"the tensor {self.prefix}{left[0]} is not one that the settings ask for")


def _is_number(value: Any, low: float, high: float) -> bool:
    # NaN is between no bounds; torch takes no larger whole numbers.
    if isinstance(value, bool) or (isinstance(value, int) and abs(value) > 2**53):
        return False
    return isinstance(value, int | float) and low <= value <= high


def _is_whole(value: Any, low: int, high: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _short(value: Any) -> str:
    return _REPR.repr(value)
