"""Potentials, wrapped: `load_backend` finds the backend of a calculator, or builds the calculator a SPEC names.

Importing this module imports no potential's package. A calculator is recognised by the packages its classes come
from; a SPEC by its prefix. Third parties add backends through the entry-point group `ase_uq.backends`: the name is
the SPEC prefix, the value a module with the same three functions as `toy.py` has: `accepts`, `wrap`, `load`.
"""

import difflib
import importlib
import importlib.util
import inspect
import sys
from dataclasses import dataclass
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType

import torch
from ase.calculators.calculator import BaseCalculator

from ase_uq import embedded
from ase_uq.backends.base import Backend
from ase_uq.errors import MissingDependency

__all__ = ["Backend", "available_backends", "calculator_from_spec", "load_backend"]

_GROUP = "ase_uq.backends"


@dataclass(frozen=True)
class _BuiltIn:
    """A backend of this package: its module here, where its calculators' classes live, its SPEC prefixes."""

    name: str
    package: str
    prefixes: tuple[str, ...]


_BUILT_IN = (
    _BuiltIn("mace", "mace", ("mace", "mace-mp", "mace-off", "mace-omol")),
    _BuiltIn("orb", "orb_models", ("orb",)),
    _BuiltIn("toy", "ase_uq.backends.toy", ("toy",)),
    _BuiltIn("summed", "ase.calculators.mixing", ()),
)
# Potentials shipped with the package: SPEC name → (prefix that loads it, file).
_EMBEDDED = {
    "mace": ("mace", "mace.safetensors"),
    "orb-direct": ("orb", "orb_direct.safetensors"),
    "orb-conservative": ("orb", "orb_conservative.safetensors"),
}


def load_backend(calculator: BaseCalculator | str | Backend, *, device: str = "", dtype: str = "") -> Backend:
    """The backend of a calculator, or of the calculator that a SPEC names.

    Args:
        calculator: An ASE calculator (`MACECalculator`, `ORBCalculator`, a `SumCalculator` of one of them and
            corrections, or one that an installed plugin knows), a SPEC, or a backend, which is returned as it is.
        device: For a SPEC: where to run, for example `cpu` or `cuda:1`; empty takes a GPU if there is one.
        dtype: For a SPEC: `float32` or `float64`; empty takes the package's own default.

    Raises:
        TypeError: No backend knows the calculator.
        ValueError: The SPEC, device or dtype cannot be used, or device or dtype were given with a calculator.
        MissingDependency: The package of the potential is not installed.
    """
    if isinstance(calculator, str):
        calculator = calculator_from_spec(calculator, device=device, dtype=dtype)
    elif device or dtype:
        raise ValueError(
            f"device={device!r} and dtype={dtype!r} go with a SPEC; {type(calculator).__name__} already has its own. "
            "Leave them out, or set them where the calculator is made."
        )
    if isinstance(calculator, Backend):
        return calculator
    module = find_module(calculator)
    if module is None:
        raise TypeError(
            f"no backend knows {type(calculator).__name__} (of {type(calculator).__module__}). Backends here: "
            f"{', '.join(available_backends())}. To add one, see the docstring of ase_uq.backends.base.Backend."
            f"{_broken_plugins()}"
        )
    return module.wrap(calculator)


def calculator_from_spec(spec: str, *, device: str = "", dtype: str = "") -> BaseCalculator:
    """The ASE calculator that a SPEC names.

    Args:
        spec: `mace:PATH`, `mace-mp:NAME`, `mace-off:NAME`, `mace-omol:NAME`, `orb:FUNCTION[@WEIGHTS]`,
            `orb:PATH.safetensors`, `toy:`, `embedded:NAME`, a plugin's `PREFIX:...`, or `FILE.py:FUNCTION` or
            `package.module:FUNCTION`, a function that returns an ASE calculator.
        device: As in `load_backend`.
        dtype: As in `load_backend`.

    Raises:
        ValueError: The SPEC names nothing that exists, or device or dtype cannot be used.
        FileNotFoundError: A file in the SPEC does not exist.
        TypeError: The function of the SPEC does not return a calculator.
        MissingDependency: The package of the potential is not installed.
    """
    asked = {"device": device, "dtype": dtype}
    device, dtype = _checked_device(device), _checked_dtype(dtype)
    prefix, colon, target = spec.partition(":")
    if not colon:
        raise ValueError(f"{spec!r} has no colon. A SPEC is PREFIX:TARGET, for example {_suggestion(spec)!r}.")
    if prefix == "embedded":
        prefix, target = _embedded(target)
    loaders = _loaders()
    if prefix in loaders:
        return _import(loaders[prefix]).load(prefix, target, device, dtype)
    place, _, function = spec.rpartition(":")
    if place.endswith(".py"):
        return _call(_run_file(Path(place)), function, spec, asked)
    if _importable(place):
        return _call(importlib.import_module(place), function, spec, asked)
    raise ValueError(
        f"{prefix!r} in {spec!r} is neither a SPEC prefix nor an importable module."
        f"{_close(prefix, [*loaders, 'embedded'])} Prefixes here: {', '.join(sorted([*loaders, 'embedded']))}."
    )


def available_backends() -> tuple[str, ...]:
    """Names of the backends whose packages are installed, plugins included. Imports none of them."""
    built_in = [entry.name for entry in _BUILT_IN if entry.prefixes and _importable(entry.package.split(".")[0])]
    return tuple(sorted({*built_in, *(plugin.name for plugin in entry_points(group=_GROUP))}))


def find_module(calculator: BaseCalculator) -> ModuleType | None:
    """The backend module that accepts a calculator, or None. Imports only what the calculator's classes need."""
    origins = {cls.__module__ for cls in type(calculator).__mro__}
    for entry in _BUILT_IN:
        if any(origin == entry.package or origin.startswith(entry.package + ".") for origin in origins):
            module = _import(entry)
            if module.accepts(calculator):
                return module
    for plugin in entry_points(group=_GROUP):
        try:
            module = _import(plugin)
        except MissingDependency:
            continue  # named by the error of load_backend if no other plugin takes the calculator
        if module.accepts(calculator):
            return module
    return None


def _loaders() -> dict[str, _BuiltIn | EntryPoint]:
    """SPEC prefix → where its module is; a plugin cannot take the prefix of a built-in backend."""
    plugins = {plugin.name: plugin for plugin in entry_points(group=_GROUP)}
    return plugins | {prefix: entry for entry in _BUILT_IN for prefix in entry.prefixes}


def _import(entry: _BuiltIn | EntryPoint) -> ModuleType:
    built_in = isinstance(entry, _BuiltIn)
    try:
        return importlib.import_module(f"ase_uq.backends.{entry.name}") if built_in else entry.load()
    except ImportError as error:
        if built_in and not isinstance(error, ModuleNotFoundError):
            raise  # installed but broken: its own message says more
        distribution = "" if built_in or entry.dist is None else entry.dist.name
        line = f'pip install "ase-uq[{entry.name}]"' if built_in else f"pip install --upgrade {distribution}"
        raise MissingDependency(
            f"the {entry.name} backend cannot be imported ({error}): a package it needs is not installed. Run: {line}"
        ) from error


def _broken_plugins() -> str:
    broken = []
    for plugin in entry_points(group=_GROUP):
        try:
            _import(plugin)
        except MissingDependency as error:
            broken.append(str(error))
    return f" Plugins that could not be asked: {'; '.join(broken)}" if broken else ""


def _checked_device(device: str) -> str:
    if not device:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        kind = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}, which torch does not know. Use for example cpu or cuda:0.") from error
    if kind.type == "mps":
        raise ValueError(f"device is {device!r}, but the statistics are in float64, which MPS lacks. Use cpu.")
    if kind.type == "cuda" and (kind.index or 0) >= torch.cuda.device_count():
        raise ValueError(
            f"device is {device!r}, but torch sees {torch.cuda.device_count()} cuda devices on this machine. "
            "Use cpu, or leave device out to take what there is."
        )
    return device


def _checked_dtype(dtype: str) -> str:
    if dtype not in ("", "float32", "float64"):
        raise ValueError(f"dtype is {dtype!r}. Use float32 or float64, or leave it out for the potential's own.")
    return dtype


def _embedded(name: str) -> tuple[str, str]:
    if name not in _EMBEDDED:
        raise ValueError(
            f"there is no embedded potential {name!r}.{_close(name, list(_EMBEDDED))} "
            f"The package carries {', '.join(_EMBEDDED)}."
        )
    prefix, file = _EMBEDDED[name]
    try:
        return prefix, str(embedded.path(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"this installation lacks {file} of embedded:{name}. Install ase-uq again.") from error


def _suggestion(spec: str) -> str:
    if spec in _EMBEDDED:
        return f"embedded:{spec}"
    if spec.endswith(".py"):
        return f"{spec}:FUNCTION"
    if spec.replace("-", "_").startswith("orb_"):
        return f"orb:{spec}"
    return f"mace:{spec}"


def _close(name: str, known: list[str]) -> str:
    found = difflib.get_close_matches(name, known, n=2, cutoff=0.5)
    return f" Did you mean {' or '.join(found)}?" if found else ""


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):  # a missing parent package, or a name that is no module name
        return False


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to take a calculator from.")
    name = f"ase_uq_spec_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickles in the file look themselves up there
    description.loader.exec_module(module)
    return module


def _call(module: ModuleType, name: str, spec: str, asked: dict[str, str]) -> BaseCalculator:
    """Calls the function of a SPEC; a device and dtype that were asked for go to parameters of these names."""
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{spec!r}: there is no function {name!r} in that module.{_close(name, callables)} "
            "A function that returns an ASE calculator is expected."
        )
    arguments = {what: value for what, value in asked.items() if value}
    takes = inspect.signature(function).parameters
    for what, value in arguments.items():
        if what not in takes:
            raise ValueError(
                f"{spec!r} takes no {what}, but {value} was asked for. Give the function a parameter of that name, "
                "or leave it out."
            )
    calculator = function(**arguments)
    if not isinstance(calculator, BaseCalculator):
        raise TypeError(f"{spec!r} returned {type(calculator).__name__}; an ASE calculator was expected.")
    return calculator
