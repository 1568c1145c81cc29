"""Builds the ASE calculator that a SPEC names, such as `mace:my.model`."""

import importlib
import importlib.util
import inspect
import sys
from pathlib import Path
from types import ModuleType

import torch
from ase.calculators.calculator import BaseCalculator

from ase_uq import embedded
from ase_uq.backends.registry import EMBEDDED, import_backend, is_importable, loaders
from ase_uq.errors import did_you_mean


def calculator_from_spec(spec: str, *, device: str = "", dtype: str = "") -> BaseCalculator:
    """The ASE calculator that a SPEC names.

    Args:
        spec: `mace:PATH`, `mace-mp:NAME`, `mace-off:NAME`, `mace-omol:NAME`, `orb:FUNCTION[@WEIGHTS]`,
            `orb:PATH.safetensors`, `sevennet:NAME`, `sevennet:PATH`, `toy:`, `embedded:NAME`, a plugin's `PREFIX:...`,
            or `FILE.py:FUNCTION` or `package.module:FUNCTION`, a function that returns an ASE calculator. `?head=NAME`
            at its end names one head of a potential that has several. The path of a `.model` file alone is that of a
            MACE.
        device: Device, as in `load_backend`.
        dtype: Precision, as in `load_backend`.

    Raises:
        ValueError: The SPEC names something that does not exist, or device or dtype cannot be used.
        FileNotFoundError: A file in the SPEC does not exist.
        TypeError: The function of the SPEC does not return a calculator.
        MissingDependency: The package of the potential is not installed.
    """
    spec, head = _without_head(spec)
    asked = {"device": device, "dtype": dtype, "head": head}
    device, dtype = _checked_device(device), _checked_dtype(dtype)
    prefix, colon, target = spec.partition(":")
    if not colon and spec.endswith(".model") and Path(spec).is_file():
        prefix, colon, target = "mace", ":", spec
    if not colon:
        raise ValueError(f"{spec!r} has no colon. A SPEC is PREFIX:TARGET, for example '{_suggestion(spec)}'.")
    if prefix == "embedded":
        prefix, target = _embedded(target)
    known = loaders()
    if prefix in known:
        load = import_backend(known[prefix]).load
        if not head:
            return load(prefix, target, device, dtype)
        if "head" not in inspect.signature(load).parameters:
            raise ValueError(f"{spec!r} with ?head={head}: potentials of {prefix} have no heads. Leave ?head= out.")
        return load(prefix, target, device, dtype, head=head)
    place, _, function = spec.rpartition(":")
    if place.endswith(".py"):
        return _call(_run_file(Path(place)), function, spec, asked)
    if is_importable(place):
        return _call(importlib.import_module(place), function, spec, asked)
    raise ValueError(
        f"{prefix!r} in {spec!r} is neither a SPEC prefix nor an importable module."
        f"{did_you_mean(prefix, [*known, 'embedded'])} Prefixes here: {', '.join(sorted([*known, 'embedded']))}."
    )


def without_blip(spec: str) -> tuple[str, str]:
    """The SPEC without the file of stochastic weights that its end names, and that file; empty if it names none.

    Raises:
        ValueError: It ends where the name of the file should be, or a head comes after it.
    """
    rest, found, file = spec.rpartition("?blip=")
    if found and not file:
        raise ValueError(f"{spec!r} names no file after ?blip=. Write its name there, or leave ?blip= out.")
    if found and "?head=" in file:
        raise ValueError(f"{spec!r} has a ?head= after ?blip=. Write the head first, and ?blip=FILE at the end.")
    return (rest, file) if found else (spec, "")


def _without_head(spec: str) -> tuple[str, str]:
    """The SPEC without the head that its end names, and that head; empty if it names none."""
    rest, found, head = spec.rpartition("?head=")
    if found and not head:
        raise ValueError(f"{spec!r} names no head after ?head=. Write its name there, or leave ?head= out.")
    return (rest, head) if found else (spec, "")


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
    if name not in EMBEDDED:
        raise ValueError(
            f"there is no embedded potential {name!r}.{did_you_mean(name, EMBEDDED)} "
            f"The package carries {', '.join(EMBEDDED)}."
        )
    prefix, file = EMBEDDED[name]
    try:
        return prefix, str(embedded.path(file))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"this installation lacks {file} of embedded:{name}. Install ase-uq again.") from error


def _suggestion(spec: str) -> str:
    if spec in EMBEDDED:
        return f"embedded:{spec}"
    if spec.endswith(".py"):
        return f"{spec}:FUNCTION"
    if spec.endswith(".safetensors"):
        return f"mace:{spec}' or 'orb:{spec}"
    if spec.replace("-", "_").startswith("orb_"):
        return f"orb:{spec}"
    if spec.lower().startswith(("7net-", "sevennet-")):
        return f"sevennet:{spec}"
    return f"mace:{spec}"


def _run_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {path} to take a calculator from.")
    name = f"ase_uq_spec_{path.stem}"
    description = importlib.util.spec_from_file_location(name, path)
    assert description is not None
    assert description.loader is not None
    module = importlib.util.module_from_spec(description)
    sys.modules[name] = module  # dataclasses and pickles in the file look up their module there
    description.loader.exec_module(module)
    return module


def _call(module: ModuleType, name: str, spec: str, asked: dict[str, str]) -> BaseCalculator:
    """Calls the function of a SPEC; a requested device, dtype or head is passed to the parameter of that name."""
    function = getattr(module, name, None)
    if not callable(function):
        callables = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise ValueError(
            f"{spec!r}: there is no function {name!r} in that module.{did_you_mean(name, callables)} "
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
