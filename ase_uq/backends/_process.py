"""The process as it was before a potential's package was imported or built something."""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from ase.calculators.calculator import BaseCalculator


@contextmanager
def preserved_process() -> Iterator[None]:
    """Undoes what mace does to the whole process: torch's safe loading off, ASE's base class extended."""
    switch = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD")
    properties = list(BaseCalculator.implemented_properties)
    default_dtype = torch.get_default_dtype()
    random_state = torch.random.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # e3nn and torch.jit speak to mace's authors, not to our users
            yield
    finally:
        BaseCalculator.implemented_properties[:] = properties
        torch.set_default_dtype(default_dtype)
        torch.random.set_rng_state(random_state)  # of which new weights, soon overwritten, have taken
        if switch is None:
            os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)
        else:
            os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = switch
