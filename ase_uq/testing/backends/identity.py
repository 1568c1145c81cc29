"""Laws of identity: equal weights are the same potential in any precision, different weights are not."""

from collections.abc import Sequence
from dataclasses import replace

import pytest
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.identity import Identity
from ase_uq.errors import PotentialMismatch
from ase_uq.testing.backends.observing import changed
from ase_uq.testing.backends.under_test import BackendUnderTest


class IdentityLaws(BackendUnderTest):
    """Laws of the identity that binds an uncertainty model to its potential."""

    def test_fingerprint_is_that_of_the_weights(self, backend: Backend, spare: BaseCalculator):
        fingerprint = backend.identity.fingerprint
        for dtype in self.dtypes:
            calculator = spare if dtype == self.dtype else self.make_calculator(dtype)
            assert load_backend(calculator).identity.fingerprint == fingerprint, dtype
        assert _with_larger(_all_weights(spare), spare).fingerprint != fingerprint

    def test_identity_accepts_itself_and_no_other(self, backend: Backend, spare: BaseCalculator):
        assert backend.check_identity(load_backend(spare).identity) is None
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            backend.check_identity(_with_larger(_all_weights(spare), spare))

    def test_identity_depends_on_the_last_layer(self, backend: Backend, spare: BaseCalculator):
        with pytest.raises(PotentialMismatch, match="fitted on other weights"):
            backend.check_identity(_with_larger(self.last_layer(spare), spare))

    def test_further_training_changes_weights_and_few_settings(self, backend: Backend):
        own = backend.identity
        trained = dict.fromkeys(backend._trained_settings, "of another training")
        assert trained.keys() <= own.settings.keys()
        backend.check_architecture(replace(own, settings=own.settings | trained, weights="others"))
        with pytest.raises(PotentialMismatch, match="another architecture: package was 'another'"):
            backend.check_architecture(replace(own, settings=own.settings | {"package": "another"}))
        with pytest.raises(PotentialMismatch, match=r"another architecture: that gives \d+ numbers of an atom"):
            backend.check_architecture(replace(own, probe=own.probe[:, 1:]))

    def test_nothing_that_is_not_finite_is_the_same(self, backend: Backend, spare: BaseCalculator):
        own = backend.identity
        for value in (float("nan"), float("inf")):
            probe = own.probe.clone()
            probe[-1, -1] = value
            for weights in (own.weights, "of another"):
                with pytest.raises(PotentialMismatch, match="features in the uncertainty model are not finite"):
                    backend.check_identity(replace(own, probe=probe, weights=weights))
        weights = _all_weights(spare)
        nan = [weight.detach() * float("nan") for weight in weights]
        # Some backends refuse such weights when they are made.
        with changed(weights, nan), pytest.raises(PotentialMismatch):
            load_backend(spare).check_identity(own)


def _all_weights(calculator: BaseCalculator) -> list[Tensor]:
    return [weight for module in load_backend(calculator)._modules() for weight in module.parameters()]


def _with_larger(weights: Sequence[Tensor], calculator: BaseCalculator) -> Identity:
    """The identity of the calculator after enlarging these of its weights."""
    with changed(weights, [1.1 * weight.detach() for weight in weights]):
        return load_backend(calculator).identity
