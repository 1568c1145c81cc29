"""From the shared options to the calculator of a verb. Imports the heavy packages silently."""

import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

import typer

from ase_uq.cli.console import silence

if TYPE_CHECKING:
    from numpy.random import Generator

    from ase_uq.backends.base import Backend
    from ase_uq.engines.ase.calculator import UncertainCalculator


def seed_all(seed: int) -> "Generator":
    """A generator for the random numbers of a verb; also seeds numpy and torch, for calculators of users."""
    import numpy as np
    import torch

    np.random.seed(seed)  # noqa: NPY002 (the global generator is the point)
    torch.manual_seed(seed)
    return np.random.default_rng(seed)


def import_silently(name: str) -> None:
    """Imports the package of a potential, of a plugin too, without its banners and warnings.

    Args:
        name: A SPEC, or the name of an embedded potential.
    """
    from ase_uq.backends.registry import EMBEDDED, import_backend, loaders

    prefix = EMBEDDED[name][0] if name in EMBEDDED else name.partition(":")[0]
    if prefix in (known := loaders()):
        # If this fails, loading fails again, with the message that helps.
        with silence(), suppress(Exception):
            import_backend(known[prefix])
    warp: Any = sys.modules.get("warp")  # of orb: prints a line for every kernel that it loads
    if warp is not None:
        warp.config.quiet = True
        warp.config.log_level = getattr(warp, "LOG_WARNING", None)  # newer versions of warp read this instead


def load_potential(model: str, device: str, dtype: str) -> "Backend":
    """The backend that `--model`, `--device` and `--dtype` name.

    Raises:
        ValueError: As in `load_backend`; also if the function of a SPEC does not return a known calculator.
    """
    from ase_uq.backends import load_backend

    import_silently(model.removeprefix("embedded:").partition("?")[0])
    try:
        return load_backend(model, device=device, dtype=dtype)
    except TypeError as error:
        raise ValueError(str(error)) from error


def load_calculator(
    model: str, uq: Path | None, device: str, dtype: str, every: int = 1, ensemble: int = 0, force_probes: int = 0
) -> "UncertainCalculator":
    """The potential with the uncertainty model of `--uq`, or with that of an embedded potential."""
    from ase_uq.engines.ase.calculator import UncertainCalculator
    from ase_uq.uncertainty_model.model import UncertaintyModel

    embedded_name = model.removeprefix("embedded:").partition("?")[0] if model.startswith("embedded:") else ""
    if uq is None and not embedded_name:
        raise typer.BadParameter("give the file that `ase-uq fit` made for this potential.", param_hint="'--uq'")
    # Loaded before the potential, which takes seconds, so that a wrong file name is reported at once.
    fitted = None if uq is None else UncertaintyModel.load(uq)
    backend = load_potential(model, device, dtype)
    if fitted is None:
        from ase_uq import embedded

        fitted = UncertaintyModel.load(embedded.path(f"{embedded_name.replace('-', '_')}.uq.safetensors"))
    return UncertainCalculator(backend, fitted, every=every, ensemble=ensemble, force_probes=force_probes)


def info_of(calculator: "UncertainCalculator", given: Mapping[str, int | None]) -> dict[str, int]:
    """Entries of `atoms.info` from options of the same names, for structures that cannot bring their own.

    Args:
        calculator: Calculator of the potential, which says what it reads.
        given: Values by name; None for one that was not given.

    Raises:
        BadParameter: The potential does not read one that was given, or needs one that was not.
    """
    backend = calculator.predictor.backend
    for name, value in given.items():
        if value is not None and name not in backend.info_keys:
            raise typer.BadParameter(f"this potential does not read a {name}. Leave it out.", param_hint=f"'--{name}'")
    missing = [name for name, value in given.items() if value is None and name in backend.required_info_keys]
    if missing:
        read = " and ".join(name for name in given if name in backend.required_info_keys)
        options = " and ".join(f"--{name}" for name in missing)
        raise typer.BadParameter(f"this potential reads {read}. Give {options}.", param_hint=f"'--{missing[0]}'")
    return {name: value for name, value in given.items() if value is not None}
