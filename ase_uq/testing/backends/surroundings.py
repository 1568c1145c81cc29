"""Laws of what a backend must leave unchanged (structures, hooks and the process) and what it must refuse."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.calculators.calculator import BaseCalculator

from ase_uq.backends import load_backend
from ase_uq.backends._process import default_dtype
from ase_uq.backends.base import Backend
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends.comparing import assert_close, forward, meaningful
from ase_uq.testing.backends.observing import process_state
from ase_uq.testing.backends.structures import periodic
from ase_uq.testing.backends.under_test import BackendUnderTest


class SurroundingsLaws(BackendUnderTest):
    """Laws of everything around a forward pass."""

    def test_inputs_are_not_changed(self, backend: Backend, frames: list[Atoms]):
        for atoms in frames:
            atoms.info["note"] = "kept"
            atoms.set_array("mark", np.arange(len(atoms)))
        before = [_state(atoms) for atoms in frames]
        forward(backend, frames)
        forward(backend, frames[:1])
        for atoms, state in zip(frames, before, strict=True):
            now = _state(atoms)
            assert now.keys() == state.keys()
            for key, value in state.items():
                np.testing.assert_array_equal(now[key], value, err_msg=key)

    def test_bad_structures_are_refused(self, backend: Backend, frames: list[Atoms]):
        def refused(change: Callable[[Atoms], Any], match: str) -> None:
            original = periodic(frames).copy()
            changed = change(original)
            bad = changed if isinstance(changed, Atoms) else original
            with pytest.raises(InputError, match=match):
                backend.collate([frames[0], bad])

        def unknown(atoms: Atoms) -> None:
            atoms.numbers[0] = min(set(range(119)) - backend.elements)

        refused(lambda atoms: atoms.positions.__setitem__((1, 2), np.nan), "positions of structure 1 .* not finite")
        refused(lambda atoms: atoms.cell.array.__setitem__((0, 0), np.inf), "cell of structure 1 .* not finite")
        refused(lambda atoms: atoms[:0], "structure 1 .* has no atoms")
        refused(lambda atoms: atoms.cell.array.__setitem__(2, atoms.cell.array[0]), "periodic in a cell without extent")
        refused(unknown, "the potential does not know")
        for key in backend.required_info_keys:
            refused(lambda atoms, key=key: atoms.info.pop(key), f"has no {key} in atoms.info")
        with pytest.raises(InputError, match="there is no structure"):
            backend.collate([])

    def test_no_hook_is_left_on_the_model(self, backend: Backend, frames: list[Atoms]):
        forward(backend, frames)
        for root in backend._modules():
            for module in root.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks

    def test_the_process_stays_as_it_was(self, spare: BaseCalculator, frames: list[Atoms]):
        before = process_state()
        backend = load_backend(spare)
        forward(backend, frames)
        assert backend.identity.fingerprint
        assert process_state() == before

    def test_torchs_default_dtype_does_not_matter(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        expected = dict(meaningful(evaluated, frames))
        for dtype in (torch.float32, torch.float64):
            with default_dtype(dtype):
                forward_pass = forward(backend, frames)
            for name, value in meaningful(forward_pass, frames):
                assert value.dtype == expected[name].dtype, name
                assert_close(value, expected[name], backend, name)

    def test_callers_switch_for_gradients_does_not_matter(
        self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]
    ):
        expected = dict(meaningful(evaluated, frames))
        with torch.no_grad():
            for name, value in meaningful(forward(backend, frames), frames):
                assert torch.equal(value, expected[name]), name


def _state(atoms: Atoms) -> dict[str, Any]:
    arrays = {f"array {key}": value.copy() for key, value in atoms.arrays.items()}
    info = {f"info {key}": np.array(value) for key, value in atoms.info.items()}
    return {"cell": atoms.cell.array.copy(), "pbc": atoms.pbc.copy(), **arrays, **info}
