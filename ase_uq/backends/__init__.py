"""Wrapped potentials: `load_backend` finds the backend of a calculator, or builds the calculator that a SPEC names.

Importing this module imports neither torch nor the package of any potential. A calculator is recognised by the packages
that define its classes, a SPEC by its prefix. Third parties add backends through the entry-point group
`ase_uq.backends`: the name is the SPEC prefix, and the value is a module with the same three functions as `toy.py`:
`accepts`, `wrap` and `load`.
"""

import os
from typing import TYPE_CHECKING

from ase_uq.backends.registry import available_backends, broken_plugins, find_module

if TYPE_CHECKING:
    from ase.calculators.calculator import BaseCalculator

    from ase_uq.backends.base import Backend

__all__ = ["available_backends", "load_backend"]


def load_backend(
    calculator: "BaseCalculator | str | os.PathLike[str] | Backend", *, device: str = "", dtype: str = ""
) -> "Backend":
    """The backend of a calculator, or of the calculator that a SPEC names.

    Args:
        calculator: An ASE calculator (`MACECalculator`, `ORBCalculator`, `SevenNetCalculator`, a `SumCalculator` of one
            of them and corrections, or one that an installed plugin knows), a SPEC, the path of a `.model` file, or a
            backend, which is returned unchanged. `?blip=FILE` at the end of a SPEC loads stochastic weights that were
            trained from its potential.
        device: Device for a SPEC, for example `cpu` or `cuda:1`; if empty, a GPU if there is one.
        dtype: Precision for a SPEC, `float32` or `float64`; if empty, the default of the package.

    Raises:
        TypeError: No backend knows the calculator.
        ValueError: The SPEC, device or dtype cannot be used, or device or dtype were given with a calculator.
        MissingDependency: The package of the potential is not installed.
        ArtefactError: The file of stochastic weights cannot be read.
        PotentialMismatch: Its weights were trained from another potential.
    """
    from ase_uq.backends.base import Backend
    from ase_uq.backends.specs import calculator_from_spec, without_blip

    if isinstance(calculator, str | os.PathLike):
        spec, blip = without_blip(os.fspath(calculator))
        if blip:
            from ase_uq.backends.stochastic import Blip

            loaded = Blip.load(blip)
            return load_backend(spec, device=device, dtype=dtype).with_blip(loaded)
        calculator = calculator_from_spec(spec, device=device, dtype=dtype)
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
            f"{broken_plugins()}"
        )
    return module.wrap(calculator)
