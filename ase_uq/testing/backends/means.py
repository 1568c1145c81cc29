"""Laws of the predictions: they are the calculator's own mean, in any batch, from one forward pass."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_uq.backends.base import Backend
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends.comparing import assert_close, assert_same, forward, meaningful, of_frame, tensors
from ase_uq.testing.backends.observing import count_forwards
from ase_uq.testing.backends.under_test import BackendUnderTest


class MeanLaws(BackendUnderTest):
    """Laws of one forward pass and its results."""

    def test_mean_is_the_calculators_own(self, backend: Backend, frames: list[Atoms]):
        calculator = self.make_calculator(self.dtype)
        assert set(backend.results) <= set(calculator.implemented_properties)
        for atoms in frames:
            forward_pass = forward(backend, [atoms])
            for key in backend.results:
                expected = np.asarray(calculator.get_property(key, atoms.copy()))
                mean = getattr(forward_pass, "energy" if key == "free_energy" else key)
                mean = mean.cpu().numpy().reshape(expected.shape)
                np.testing.assert_allclose(
                    mean, expected, rtol=0, atol=self.mean_tolerance, err_msg=f"{key} of {atoms}"
                )

    def test_results_are_those_it_claims(self, backend: Backend, evaluated: ForwardPass):
        assert {"energy", "free_energy"} <= set(backend.results)
        for key in ("energies", "forces", "stress"):
            assert (getattr(evaluated, key) is not None) == (key in backend.results), key
        assert (evaluated.force_layer is None) == self.conservative
        assert backend.direct == (not self.conservative)

    def test_shapes_of_a_mixed_batch(self, evaluated: ForwardPass, frames: list[Atoms]):
        e = evaluated
        counts = [len(atoms) for atoms in frames]
        assert 1 in counts, "make_frames should give a structure of one atom"
        assert any(atoms.pbc.all() for atoms in frames), "make_frames should give a periodic structure"
        assert not all(atoms.pbc.any() for atoms in frames), "make_frames should give one that is not periodic"
        assert e.n_frames == len(frames)
        assert e.n_atoms_of_frame.tolist() == counts
        assert e.frame_of_atom.tolist() == np.repeat(np.arange(len(frames)), counts).tolist()
        assert e.numbers.tolist() == np.concatenate([atoms.numbers for atoms in frames]).tolist()
        n_atoms, n_frames = sum(counts), len(frames)
        assert e.positions.shape == (n_atoms, 3)
        assert e.energy.shape == e.energy_layer.base.shape == (n_frames,)
        assert e.features.shape[0] == e.energy_layer.features.shape[0] == n_atoms
        assert e.features.ndim == e.energy_layer.features.ndim == 2
        assert e.energy_layer.weights.shape == e.energy_layer.features.shape[1:]
        if e.forces is not None:
            assert e.forces.shape == (n_atoms, 3)
        if e.stress is not None:
            assert e.stress.shape == (n_frames, 6)
        if e.energies is not None:
            assert e.energies.shape == (n_atoms,)
        if e.force_layer is not None:
            assert e.force_layer.features.shape[0] == n_atoms
            assert e.force_layer.weights.shape == (e.force_layer.features.shape[1], 3)
            assert e.force_layer.base.shape == (n_atoms, 3)
            assert e.force_layer.torque_free.shape == (n_frames,)
        if e.vectors is not None:
            assert e.vectors.shape[:2] == (n_atoms, 3)
        if e.members is not None:
            n_members = len(e.members.energy)
            assert e.members.energy.shape == (n_members, n_frames)
            assert e.members.forces is None or e.members.forces.shape == (n_members, n_atoms, 3)
            assert e.members.stress is None or e.members.stress.shape == (n_members, n_frames, 6)
        if e.confidence is not None:
            assert e.confidence.probabilities.shape == (n_atoms, len(e.confidence.edges) - 1)
        for name, values in e.extras.items():
            assert len(values) == n_atoms, name

    def test_batch_equals_singles_in_any_order(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        order = np.roll(np.arange(len(frames))[::-1], 1)
        shuffled = forward(backend, [frames[i] for i in order])
        for index, atoms in enumerate(frames):
            single = forward(backend, [atoms])
            expected = of_frame(single, 0, atoms)
            assert_same(of_frame(evaluated, index, atoms), expected, backend)
            assert_same(of_frame(shuffled, order.tolist().index(index), atoms), expected, backend)

    def test_what_another_process_collates_is_the_same_batch(
        self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]
    ):
        if backend.collator is None:
            pytest.skip("this backend collates structures only in the potential's process")
        for group, here in ((frames, evaluated), (frames[:1], forward(backend, frames[:1]))):
            collator, sent = pickle.loads(pickle.dumps((backend.collator, group)))
            data = pickle.loads(pickle.dumps(collator(sent)))
            received = dict(meaningful(backend.forward(backend.received(group, data)), group))
            for name, value in meaningful(here, group):
                assert torch.equal(value, received[name]), name
        with pytest.raises(InputError, match=r"structure 0 \(empty\) has no atoms"):
            collator([Atoms()])

    def test_same_structure_twice_gives_the_same_bits(
        self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]
    ):
        second = dict(meaningful(forward(backend, frames), frames))
        for name, value in meaningful(evaluated, frames):
            assert torch.equal(value, second[name]), name

    def test_threads_may_share_it(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        if not backend.is_concurrent:
            pytest.skip("one thread at a time may evaluate this potential")
        batches = [frames, frames[:1]]
        expected = [dict(meaningful(evaluated, frames)), dict(meaningful(forward(backend, frames[:1]), frames[:1]))]
        data = [backend.collate(batch) for batch in batches]

        def evaluate(number: int) -> dict[str, torch.Tensor]:
            return dict(meaningful(backend.forward(data[number % 2]), batches[number % 2]))

        with ThreadPoolExecutor(2) as pool:
            for number, found in enumerate(pool.map(evaluate, range(8))):
                for name, value in expected[number % 2].items():
                    assert torch.equal(value, found[name]), name

    def test_one_forward_a_call(self, backend: Backend, frames: list[Atoms]):
        modules = self.forward_modules(backend)
        for forces in (True, False):
            batch = backend.collate(frames)
            with count_forwards(modules) as count:
                e = backend.forward(batch, forces=forces)
            assert count() == self.n_forwards
            assert e.gradients is None, "the graph costs memory; it must be kept only on request"

    def test_without_forces_the_rest_is_the_same(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        short = backend.forward(backend.collate(frames), forces=False)
        assert short.forces is None
        for name in ("energy", "features", "energy_layer.features", "energy_layer.base", "edges.vector"):
            assert_close(dict(tensors(short))[name], dict(tensors(evaluated))[name], backend, name)

    def test_members_have_the_prediction_as_their_mean(
        self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]
    ):
        if evaluated.members is None:
            pytest.skip("the potential is no committee")
        for e in (evaluated, backend.forward(backend.collate(frames), forces=False)):
            assert e.members is not None
            with_volume = torch.tensor([atoms.cell.rank == 3 for atoms in frames])
            for name, rows in (("energy", slice(None)), ("forces", slice(None)), ("stress", with_volume)):
                mean, members = getattr(e, name), getattr(e.members, name)
                assert (mean is None) == (members is None), name
                if mean is not None:
                    assert_close(members.mean(0)[rows], mean[rows], backend, f"mean of the members' {name}")
                    assert float(members[:, rows].std(0).max()) > 0, f"{name} of all members is the same"

    def test_confidence_is_a_probability(self, backend: Backend, evaluated: ForwardPass):
        confidence = evaluated.confidence
        if confidence is None:
            pytest.skip("the potential has no confidence head")
        assert bool((confidence.probabilities >= 0).all())
        total = confidence.probabilities.sum(1)
        assert_close(total, torch.ones_like(total), backend, "sum of the probabilities")
        assert float(confidence.edges[0]) == 0
        assert bool((confidence.edges.diff() > 0).all())

    def test_outputs_are_detached_finite_and_on_the_device(
        self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]
    ):
        for name, value in meaningful(evaluated, frames):
            assert not value.requires_grad, name
            assert value.device.type == backend.device.type, name
            assert bool(torch.isfinite(value).all()), name

    def test_outputs_live_on_after_the_next_call(self, backend: Backend, frames: list[Atoms]):
        first = dict(meaningful(forward(backend, frames[:1]), frames[:1]))
        kept = {name: value.clone() for name, value in first.items()}
        moved = frames[0].copy()
        moved.positions *= 1.05
        forward(backend, [moved])
        for name, value in first.items():
            assert torch.equal(value, kept[name]), name
