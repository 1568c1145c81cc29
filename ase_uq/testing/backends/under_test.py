"""The base of all laws: how the backend under test is made."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends.comparing import forward
from ase_uq.testing.backends.structures import standard_frames


class BackendUnderTest:
    """What a subclass of `BackendContract` defines, and the fixtures that the laws use.

    Attributes:
        dtype: Precision of the calculator under test.
        dtypes: Precisions in which the potential is available; its fingerprint is the same in all of them.
        mean_tolerance: Largest difference between the mean and the calculator's own results (eV, eV/Å); 0 is bit
            equality.
        conservative: Whether forces are the gradient of the energy.
        is_equivariant: Whether rotating a structure rotates its forces and leaves its features unchanged.
        symmetric_edges: Whether the neighbour list holds every pair of neighbours in both directions.
        n_forwards: Number of model forwards per call: one, or one per member of a committee.
    """

    dtype: str = "float64"
    dtypes: tuple[str, ...] = ("float32", "float64")
    mean_tolerance: float = 0.0
    conservative: bool = True
    is_equivariant: bool = True
    symmetric_edges: bool = True
    n_forwards: int = 1

    # What a subclass defines.

    def make_calculator(self, dtype: str = "float64") -> BaseCalculator:
        """A new calculator, equal at every call, that shares no weights with earlier ones."""
        raise NotImplementedError("say in make_calculator how the calculator under test is made")

    def last_layer(self, calculator: Any) -> Sequence[Tensor]:
        """The trained tensors of a calculator that determine `weights` of the last layers and nothing else."""
        raise NotImplementedError("say in last_layer which of the calculator's parameters the last layers hold")

    def make_frames(self) -> list[Atoms]:
        """Structures to test with: first a molecule, of another size than the others; at least one is periodic."""
        return standard_frames()

    def forward_modules(self, backend: Backend) -> Sequence[torch.nn.Module]:
        """The modules that are called exactly once in each forward pass of the potential."""
        return backend._modules()

    # Fixtures that the laws use.

    @pytest.fixture
    def frames(self) -> list[Atoms]:
        return self.make_frames()

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return load_backend(cls().make_calculator(cls.dtype))

    @pytest.fixture(scope="class")
    @classmethod
    def evaluated(cls, backend: Backend) -> ForwardPass:
        """One forward pass over the frames, for all laws that only look at one."""
        return forward(backend, cls().make_frames())

    @pytest.fixture(scope="class")
    @classmethod
    def spare(cls) -> BaseCalculator:
        """A second copy of the calculator, whose weights a law may change within `changed`."""
        return cls().make_calculator(cls.dtype)
