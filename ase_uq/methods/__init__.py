"""Methods: ways to fit uncertainty, found by name, also through the entry points `ase_uq.methods`.

A file or folder of this package defines one `Method`; `make_method("bll", features="last_layer")` builds it. Importing
this module imports no torch.
"""

import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING, Any

from ase_uq.errors import did_you_mean
from ase_uq.plugins import plugins

if TYPE_CHECKING:
    from ase_uq.methods.base import Method

__all__ = ["available_methods", "make_method", "method_class"]

_GROUP = "ase_uq.methods"
_NO_METHODS = ("base", "options")  # modules of this package that define no method


def available_methods() -> tuple[str, ...]:
    """Names that `fit(..., methods=...)` takes."""
    modules = [module.name for module in pkgutil.iter_modules(__path__)]
    built_in = [name for name in modules if name not in _NO_METHODS and not name.startswith("_")]
    return tuple(sorted({*built_in, *plugins(_GROUP)}))


def method_class(name: str) -> "type[Method]":
    """The class of a method.

    Raises:
        ValueError: No method has this name.
    """
    from ase_uq.methods.base import Method

    known = available_methods()
    if name not in known:
        raise ValueError(f"there is no method {name!r}.{did_you_mean(name, known)} There are: {', '.join(known)}.")
    points = plugins(_GROUP)
    module = points[name].load() if name in points else importlib.import_module(f"{__name__}.{name}")
    classes = {c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, Method)}
    (method,) = {c for c in classes if _is_named(c, name)}
    return method


def make_method(name: str, **hyper_parameters: Any) -> "Method":
    """A method with its hyper-parameters, which are the fields of its dataclass."""
    return method_class(name)(**hyper_parameters)


def _is_named(method: "type[Method]", name: str) -> bool:
    return getattr(method, "name", None) == name
