"""Keeps the process unchanged, though potentials' packages change it while they are imported, build models or run."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ase.calculators.calculator import BaseCalculator

_SWITCH = "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"


@contextmanager
def preserved_process(silenced: str = "", *, loading: bool = True) -> Iterator[None]:
    """Undoes the changes that potentials' packages make to the whole process.

    Restored are torch's default dtype, random state, precision of float32 products and safe loading, and the list of
    properties of ASE's base class.

    Args:
        silenced: Regular expression for the beginning of the warnings to silence, which are meant for the authors of
            these packages, not for our users; by default all warnings.
        loading: Whether safe loading is restored.
    """
    switch = os.environ.get(_SWITCH)
    properties = list(BaseCalculator.implemented_properties)
    default_dtype = torch.get_default_dtype()
    random_state = torch.random.get_rng_state()
    precision = torch.get_float32_matmul_precision()
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", silenced)
            yield
    finally:
        BaseCalculator.implemented_properties[:] = properties
        torch.set_default_dtype(default_dtype)
        torch.random.set_rng_state(random_state)  # new weights, which are soon overwritten, have drawn from it
        torch.set_float32_matmul_precision(precision)
        if loading:
            os.environ.pop(_SWITCH, None)
            if switch is not None:
                os.environ[_SWITCH] = switch


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Sets torch's default dtype within the context, for the whole process."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
