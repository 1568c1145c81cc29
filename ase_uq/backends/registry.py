"""The available backends and their modules, which are imported on demand; importing this module imports no torch."""

import importlib
import importlib.util
from dataclasses import dataclass
from importlib.metadata import EntryPoint
from types import ModuleType
from typing import TYPE_CHECKING

from ase_uq.errors import MissingDependency
from ase_uq.plugins import plugins

if TYPE_CHECKING:
    from ase.calculators.calculator import BaseCalculator

GROUP = "ase_uq.backends"


@dataclass(frozen=True)
class _BuiltIn:
    """A backend of this package: its module, the package of its calculators' classes, and the forms of its SPECs."""

    name: str
    package: str
    specs: tuple[str, ...]

    @property
    def prefixes(self) -> set[str]:
        """Prefixes of its SPECs."""
        return {spec.partition(":")[0] for spec in self.specs}


_BUILT_IN = (
    _BuiltIn("mace", "mace", ("mace:PATH", "mace-mp:NAME", "mace-off:NAME", "mace-omol:NAME")),
    _BuiltIn("orb", "orb_models", ("orb:FUNCTION", "orb:FUNCTION@WEIGHTS")),
    _BuiltIn("sevennet", "sevenn", ("sevennet:NAME", "sevennet:PATH")),
    _BuiltIn("toy", "ase_uq.backends.toy", ("toy:",)),
    _BuiltIn("summed", "ase.calculators.mixing", ()),
)

# Potentials shipped with the package: name in the SPEC → (prefix that loads it, file).
EMBEDDED = {
    "mace": ("mace", "mace.safetensors"),
    "orb-direct": ("orb", "orb_direct.safetensors"),
    "orb-conservative": ("orb", "orb_conservative.safetensors"),
}


def available_backends() -> tuple[str, ...]:
    """Names of the backends whose packages are installed, plugins included. Imports none of them."""
    built_in = [entry.name for entry in _BUILT_IN if entry.specs and is_importable(entry.package.split(".")[0])]
    return tuple(sorted({*built_in, *plugins(GROUP)}))


def spec_forms() -> tuple[str, ...]:
    """Forms of the SPECs of all backends, plugins included, and of the embedded potentials."""
    built_in = [spec for entry in _BUILT_IN for spec in entry.specs]
    added = [f"{name}:TARGET" for name in plugins(GROUP)]
    return (*built_in, *added, *(f"embedded:{name}" for name in EMBEDDED))


def find_module(calculator: "BaseCalculator") -> ModuleType | None:
    """The backend module that accepts a calculator, or None. Imports only the backends that its classes suggest."""
    origins = {cls.__module__ for cls in type(calculator).__mro__}
    for entry in _BUILT_IN:
        if any(origin == entry.package or origin.startswith(entry.package + ".") for origin in origins):
            module = import_backend(entry)
            if module.accepts(calculator):
                return module
    for plugin in plugins(GROUP).values():
        try:
            module = import_backend(plugin)
        except MissingDependency:
            continue  # the error of load_backend names it if no other plugin takes the calculator
        if module.accepts(calculator):
            return module
    return None


def loaders() -> dict[str, _BuiltIn | EntryPoint]:
    """Sources of the backend modules by SPEC prefix; a plugin cannot take the prefix of a built-in backend."""
    return {**plugins(GROUP), **{prefix: entry for entry in _BUILT_IN for prefix in entry.prefixes}}


def import_backend(entry: _BuiltIn | EntryPoint) -> ModuleType:
    """The module of a backend.

    Raises:
        MissingDependency: A package that it needs is not installed.
    """
    built_in = isinstance(entry, _BuiltIn)
    try:
        return importlib.import_module(f"ase_uq.backends.{entry.name}") if built_in else entry.load()
    except ImportError as error:
        if built_in and not isinstance(error, ModuleNotFoundError):
            raise  # installed but broken: the original message is more informative
        distribution = "" if built_in or entry.dist is None else entry.dist.name
        line = f'pip install "ase-uq[{entry.name}]"' if built_in else f"pip install --upgrade {distribution}"
        raise MissingDependency(
            f"the {entry.name} backend cannot be imported ({error}): a package it needs is not installed. Run: {line}"
        ) from error


def broken_plugins() -> str:
    """The reasons why plugins could not be asked, to end an error message; empty if all could be asked."""
    broken = []
    for plugin in plugins(GROUP).values():
        try:
            import_backend(plugin)
        except MissingDependency as error:
            broken.append(str(error))
    return f" Plugins that could not be asked: {'; '.join(broken)}" if broken else ""


def is_importable(name: str) -> bool:
    """Whether there is a module of this name; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a missing parent package, or not a valid module name
        return False
