"""Hyper-parameters set by strings: `kernel.landmarks=512` sets an option of any method, plugins included.

    make_methods(["bll", "pdrum"], ["bll.radii=2.5,5", "pdrum.training.max_epochs=50"])

The fields of a method's dataclass are its options, and their annotations determine how a value is read.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, Literal, get_args, get_origin, get_type_hints

from ase_uq.errors import did_you_mean
from ase_uq.methods import make_method
from ase_uq.methods.base import Method

_KINDS = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class _Option:
    annotation: Any
    default: Any


def make_methods(names: Iterable[str], assignments: Iterable[str] = ()) -> list[Method]:
    """Methods with their hyper-parameters.

    Args:
        names: Names of the methods.
        assignments: `METHOD.OPTION=VALUE`, or `METHOD.OPTION.OPTION=VALUE` where the option is itself a dataclass;
            the values of a tuple are separated by commas. If an option is set twice, the later value counts.

    Raises:
        ValueError: A method or option does not exist, the method is not among the names, or the option does not
            take the value.
    """
    names = list(names)
    methods = {name: make_method(name) for name in names}
    values: dict[str, dict[str, Any]] = {name: {} for name in names}
    for assignment in assignments:
        path, equals, word = assignment.partition("=")
        name, _, key = path.strip().partition(".")
        options = _options_of(methods.get(name) or make_method(name))
        if not (key and equals):
            raise ValueError(f"{assignment!r} sets nothing: write METHOD.OPTION=VALUE. {_listed(name, options)}")
        if key not in options:
            raise ValueError(f"{name} has no option {key!r}.{did_you_mean(key, options)} {_listed(name, options)}")
        if name not in methods:
            raise ValueError(
                f"{assignment!r} is for {name}, which is not among the methods {', '.join(names)}: add it to them."
            )
        values[name][key] = _value(path.strip(), word.strip(), options[key].annotation)
    return [_replaced(methods[name], values[name]) for name in names]


def _options_of(part: Any, prefix: str = "") -> dict[str, _Option]:
    """The options of a dataclass by name; options of dataclasses inside it have names with dots."""
    annotations = get_type_hints(type(part))
    options = {}
    for field in fields(part):
        name, value = prefix + field.name, getattr(part, field.name)
        if is_dataclass(value):
            options |= _options_of(value, f"{name}.")
        else:
            options[name] = _Option(annotations[field.name], value)
    return options


def _replaced(part: Any, values: Mapping[str, Any]) -> Any:
    """The dataclass with these values, set all at once, because some are allowed only together."""
    changes = {}
    for field in fields(part):
        prefix = f"{field.name}."
        inside = {key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)}
        if inside:
            changes[field.name] = _replaced(getattr(part, field.name), inside)
        elif field.name in values:
            changes[field.name] = values[field.name]
    return replace(part, **changes)


def _value(path: str, word: str, annotation: Any) -> Any:
    try:
        kind, read = _reader(annotation)
    except TypeError as error:
        raise ValueError(f"{path} cannot be set by a word: it is of type {annotation}.") from error
    try:
        return read(word)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} takes {kind}, not {word!r}.") from error


def _reader(annotation: Any) -> tuple[str, Callable[[str], Any]]:
    """The words for the values of a type, and a function that reads one; it fails on words that are no such value.

    Raises:
        TypeError: No word stands for a value of this type.
    """
    arguments = get_args(annotation)
    if get_origin(annotation) is Literal:
        return " or ".join(map(str, arguments)), {str(choice): choice for choice in arguments}.__getitem__
    if get_origin(annotation) is tuple and arguments[1:] == (...,):
        kind, read = _reader(arguments[0])
        return f"{kind}, or several with commas between", lambda words: tuple(map(read, words.split(",")))
    if annotation is bool:
        return "true or false", {"true": True, "false": False}.__getitem__
    if annotation in _KINDS:
        return _KINDS[annotation], annotation
    raise TypeError(annotation)


def _listed(name: str, options: Mapping[str, _Option]) -> str:
    """The options of a method with their defaults, in the form in which they are set."""
    if not options:
        return f"{name} has no options."
    return f"Options of {name} and their defaults: {' '.join(f'{k}={_written(o.default)}' for k, o in options.items())}"


def _written(value: Any) -> str:
    if isinstance(value, tuple):
        return ",".join(map(_written, value))
    return str(value).lower() if isinstance(value, bool) else str(value)
