"""Tools that count forward passes, record the state of the process, and change it temporarily."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from ase.calculators import calculator as ase_calculator
from ase.calculators.calculator import BaseCalculator
from torch import Tensor


@contextmanager
def count_forwards(modules: Sequence[torch.nn.Module]) -> Iterator[Callable[[], int]]:
    """Counts the calls of the modules' forward; the context manager gives a function that returns the count so far."""
    count = 0

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return forward(*arguments, **options)

        return call

    try:
        for module in modules:
            module.forward = counted(module.forward)  # shadows the method of the class, on this object only
        yield lambda: count
    finally:
        for module in modules:
            del module.forward


def process_state() -> dict[str, Any]:
    """The state shared by the whole process, which a backend must not change."""
    return {
        "default dtype": torch.get_default_dtype(),
        "matmul precision": torch.get_float32_matmul_precision(),
        "gradients": torch.is_grad_enabled(),
        "threads": torch.get_num_threads(),
        "random state": torch.random.get_rng_state().tolist(),
        "numpy's random state": str(np.random.get_state()),  # noqa: NPY002 (the global one is what must not change)
        "environment": dict(os.environ),
        "ASE's all_properties": list(ase_calculator.all_properties),
        "ASE's implemented_properties": list(BaseCalculator.implemented_properties),
    }


@contextmanager
def changed(weights: Sequence[Tensor], values: Sequence[Tensor]) -> Iterator[None]:
    """Gives weights of a potential other values within the context."""
    before = [weight.detach().clone() for weight in weights]

    def write(values: Sequence[Tensor]) -> None:
        with torch.no_grad():
            for weight, value in zip(weights, values, strict=True):
                weight.copy_(value)

    try:
        write(values)
        yield
    finally:
        write(before)
