"""Laws of identity: the same weights are the same potential in any precision, and no others are."""

import pytest
import torch
from ase.calculators.calculator import BaseCalculator

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.errors import PotentialMismatch
from ase_uq.testing.backends.under_test import BackendUnderTest


class IdentityLaws(BackendUnderTest):
    """Of the identity that binds an uncertainty model to its potential."""

    def test_fingerprint_is_that_of_the_weights(self, backend: Backend):
        own = backend.identity.fingerprint
        for dtype in self.dtypes:
            assert load_backend(self.make_calculator(dtype)).identity.fingerprint == own, dtype
        assert load_backend(self._with_other_weights()).identity.fingerprint != own

    def test_identity_accepts_itself_and_no_other(self, backend: Backend):
        assert backend.check_identity(load_backend(self.make_calculator(self.dtype)).identity) is None
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            backend.check_identity(load_backend(self._with_other_weights()).identity)

    def test_identity_depends_on_the_last_layer(self, backend: Backend):
        calculator = self.make_calculator(self.dtype)
        with torch.no_grad():
            for weight in self.last_layer(calculator):
                weight *= 1.1
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            backend.check_identity(load_backend(calculator).identity)

    def _with_other_weights(self) -> BaseCalculator:
        calculator = self.make_calculator(self.dtype)
        with torch.no_grad():
            for module in load_backend(calculator)._modules():
                for weight in module.parameters():
                    weight *= 1.1
        return calculator
