"""`BackendContract`: what a backend must do, whoever wrote it."""

import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, is_dataclass
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators import calculator as ase_calculator
from ase.calculators.calculator import BaseCalculator
from ase.neighborlist import neighbor_list
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.errors import InputError, PotentialMismatch
from ase_uq.forward_pass import ForceLayer, ForwardPass

# Rounding of one forward pass in another order of summation, relative to the largest value.
ROUNDING = {torch.float32: 2e-4, torch.float64: 1e-9}
# Step in Å (and in strain) of finite differences, and how far they may be off, relative to the largest value.
DIFFERENCES = {torch.float32: (3e-3, 3e-2), torch.float64: (1e-4, 1e-5)}


class BackendContract:
    """Laws of a backend.

    Subclass it in a test file and say how the calculator is made:

        class TestMyBackend(BackendContract):
            def make_calculator(self, dtype="float64"):
                return MyCalculator(seed=0, dtype=dtype)

            def last_layer(self, calculator):
                return [calculator.model.readout.weight]

    Attributes:
        dtype: Precision of the calculator under test.
        dtypes: Precisions that the potential can be had in; its fingerprint is the same in all.
        mean_tolerance: By how much the mean may differ from the calculator's own (eV, eV/Å); 0 is bit equality.
        conservative: Whether forces are the gradient of the energy.
        is_equivariant: Whether turning a structure leaves its features as they are and turns the forces.
        symmetric_edges: Whether the neighbour list holds every pair of neighbours in both directions.
        n_forwards: Model forwards a call: one, or one a member of a committee.
    """

    dtype: str = "float64"
    dtypes: tuple[str, ...] = ("float32", "float64")
    mean_tolerance: float = 0.0
    conservative: bool = True
    is_equivariant: bool = True
    symmetric_edges: bool = True
    n_forwards: int = 1

    # What a subclass says.

    def make_calculator(self, dtype: str = "float64") -> BaseCalculator:
        """A new calculator, the same at every call, that shares no weights with an earlier one."""
        raise NotImplementedError("say in make_calculator how the calculator under test is made")

    def last_layer(self, calculator: Any) -> Sequence[Tensor]:
        """The trained tensors of a calculator that enter `weights` of the last layers and nothing else."""
        raise NotImplementedError("say in last_layer which of the calculator's parameters the last layers hold")

    def make_frames(self) -> list[Atoms]:
        """Structures to test with: a molecule first, of another size than the others, one of them periodic."""
        return standard_frames()

    def forward_modules(self, backend: Backend) -> Sequence[torch.nn.Module]:
        """The modules each of which is called once in a forward pass of the potential."""
        return backend._modules()

    # The laws.

    @pytest.fixture
    def frames(self) -> list[Atoms]:
        return self.make_frames()

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return load_backend(cls().make_calculator(cls.dtype))

    def test_mean_is_the_calculators_own(self, backend: Backend, frames: list[Atoms]):
        calculator = self.make_calculator(self.dtype)
        assert set(backend.results) <= set(calculator.implemented_properties)
        for atoms in frames:
            forward_pass = _forward(backend, [atoms])
            for key in backend.results:
                own = np.asarray(calculator.get_property(key, atoms.copy()))
                found = getattr(forward_pass, "energy" if key == "free_energy" else key)
                found = found.cpu().numpy().reshape(own.shape)
                np.testing.assert_allclose(found, own, rtol=0, atol=self.mean_tolerance, err_msg=f"{key} of {atoms}")

    def test_results_are_those_it_claims(self, backend: Backend, frames: list[Atoms]):
        forward_pass = _forward(backend, frames)
        assert {"energy", "free_energy"} <= set(backend.results)
        for key in ("energies", "forces", "stress"):
            assert (getattr(forward_pass, key) is not None) == (key in backend.results), key
        assert (forward_pass.force_layer is None) == self.conservative
        assert backend.direct == (not self.conservative)

    def test_shapes_of_a_mixed_batch(self, backend: Backend, frames: list[Atoms]):
        e = _forward(backend, frames)
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

    def test_batch_equals_singles_in_any_order(self, backend: Backend, frames: list[Atoms]):
        batch = _forward(backend, frames)
        order = np.roll(np.arange(len(frames))[::-1], 1)
        shuffled = _forward(backend, [frames[i] for i in order])
        for index, atoms in enumerate(frames):
            single = _forward(backend, [atoms])
            expected = _frame(single, 0, atoms)
            _assert_same(_frame(batch, index, atoms), expected, backend)
            _assert_same(_frame(shuffled, order.tolist().index(index), atoms), expected, backend)

    def test_what_another_process_collates_is_the_same_batch(self, backend: Backend, frames: list[Atoms]):
        if backend.collator is None:
            return  # structures are collated where the potential is
        for group in (frames, frames[:1]):
            collator, sent = pickle.loads(pickle.dumps((backend.collator, group)))
            data = pickle.loads(pickle.dumps(collator(sent)))
            found = dict(_meaningful(backend.forward(backend.received(group, data)), group))
            for name, value in _meaningful(_forward(backend, group), group):
                assert torch.equal(value, found[name]), name
        with pytest.raises(InputError, match=r"structure 0 \(empty\) has no atoms"):
            collator([Atoms()])

    def test_same_structure_twice_gives_the_same_bits(self, backend: Backend, frames: list[Atoms]):
        second = dict(_meaningful(_forward(backend, frames), frames))
        for name, value in _meaningful(_forward(backend, frames), frames):
            assert torch.equal(value, second[name]), name

    def test_one_forward_a_call(self, backend: Backend, frames: list[Atoms]):
        modules = self.forward_modules(backend)
        for forces in (True, False):
            batch = backend.collate(frames)
            with count_forwards(modules) as count:
                e = backend.forward(batch, forces=forces)
            assert count() == self.n_forwards
            assert e.gradients is None, "their graph costs memory; it is kept where it was asked for"

    def test_no_hook_is_left_on_the_model(self, backend: Backend, frames: list[Atoms]):
        _forward(backend, frames)
        for root in backend._modules():
            for module in root.modules():
                assert not module._forward_hooks
                assert not module._forward_pre_hooks

    def test_without_forces_the_rest_is_the_same(self, backend: Backend, frames: list[Atoms]):
        full = _forward(backend, frames)
        short = backend.forward(backend.collate(frames), forces=False)
        assert short.forces is None
        for name in ("energy", "features", "energy_layer.features", "energy_layer.base", "edges.vector"):
            _assert_close(dict(_tensors(short))[name], dict(_tensors(full))[name], backend, name)

    def test_forces_are_the_gradient_of_the_energy(self, backend: Backend, frames: list[Atoms]):
        if not self.conservative or "forces" not in backend.results:
            return  # a direct head; test_forces_are_those_of_the_last_layer is its law
        step, tolerance = DIFFERENCES[backend.dtype]
        random = np.random.default_rng(0)
        for atoms in (frames[0], _periodic(frames)):
            directions = random.normal(size=(3, len(atoms), 3))
            moved = []
            for direction in directions:
                for sign in (1, -1):
                    moved.append(atoms.copy())
                    moved[-1].positions += sign * step * direction
            energies = _forward(backend, moved).energy.cpu().double().numpy().reshape(3, 2)
            forces = _array(_forward(backend, [atoms]).forces)
            differences = -(energies[:, 0] - energies[:, 1]) / (2 * step)
            expected = (directions * forces).sum((1, 2))
            atol = tolerance * _scale(expected, forces) + _noise(energies, backend) / step
            np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)

    def test_stress_is_the_derivative_by_strain(self, backend: Backend, frames: list[Atoms]):
        if not self.conservative or "stress" not in backend.results:
            return  # a direct head predicts it like anything else
        step, tolerance = DIFFERENCES[backend.dtype]
        atoms = _periodic(frames)
        strains, moved = [], []
        for x, y in ((0, 0), (1, 1), (2, 2), (1, 2), (0, 2), (0, 1)):
            for sign in (1, -1):
                strain = np.zeros((3, 3))
                strain[x, y] += sign * step / 2
                strain[y, x] += sign * step / 2
                moved.append(atoms.copy())
                moved[-1].set_cell(atoms.cell.array @ (np.eye(3) + strain), scale_atoms=True)
                strains.append(strain)
        energies = _forward(backend, moved).energy.cpu().double().numpy().reshape(6, 2)
        # d/dε of ε (e_x e_yᵀ + e_y e_xᵀ) / 2 is the stress component itself.
        differences = (energies[:, 0] - energies[:, 1]) / (2 * step * atoms.get_volume())
        stress = _array(_forward(backend, [atoms]).stress)[0]
        atol = tolerance * _scale(stress) + _noise(energies, backend) / (step * atoms.get_volume())
        np.testing.assert_allclose(differences, stress, rtol=0, atol=atol)

    def test_energy_is_that_of_the_last_layer(self, backend: Backend, frames: list[Atoms]):
        e = _forward(backend, frames)
        layer = e.energy_layer
        summed = e.sum_over_atoms(layer.features.double() @ layer.weights.double()) + layer.base
        _assert_close(summed, e.energy, backend, "w·Σφ + base")

    def test_forces_are_those_of_the_last_layer(self, backend: Backend, frames: list[Atoms]):
        e = _forward(backend, frames)
        if e.force_layer is None:
            return  # conservative; test_forces_are_the_gradient_of_the_energy is its law
        layer = e.force_layer
        projected = _project(layer.features.double() @ layer.weights.double(), layer, e)
        _assert_close(projected + layer.base, e.forces, backend, "P(φB) + base")

    def test_last_layers_are_linear_in_the_trained_weights(self, backend: Backend, frames: list[Atoms]):
        """Other last-layer weights w' change the energy by exactly (w' - w)·Σφ and the forces by P(φ(B' - B))."""
        calculator = self.make_calculator(self.dtype)
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for weight in self.last_layer(calculator):
                noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
                weight += 0.1 * noise.to(weight) * weight.abs().mean()
        other = _forward(load_backend(calculator), frames)
        own = _forward(backend, frames)
        change = (other.energy_layer.weights - own.energy_layer.weights).double()
        assert float(change.abs().max()) > 0, "last_layer names tensors that the weights do not hold"
        _assert_close(other.energy_layer.features, own.energy_layer.features, backend, "features")
        moved = own.sum_over_atoms(own.energy_layer.features.double() @ change)
        size = torch.cat([own.energy, other.energy]).abs().max().double()
        _assert_close(other.energy - own.energy, moved, backend, "change of the energy", size)
        if own.force_layer is not None and other.force_layer is not None:
            layer = own.force_layer
            moved = layer.features.double() @ (other.force_layer.weights - layer.weights).double()
            assert own.forces is not None
            assert other.forces is not None
            _assert_close(other.forces - own.forces, _project(moved, layer, own), backend, "change of the forces")

    def test_moving_a_structure_changes_nothing(self, backend: Backend, frames: list[Atoms]):
        moved = [atoms.copy() for atoms in frames]
        for atoms in moved:
            atoms.positions += (1.3, -0.7, 0.4)
        before, after = _forward(backend, frames), _forward(backend, moved)
        for index, atoms in enumerate(frames):
            _assert_same(_frame(after, index, atoms), _frame(before, index, atoms), backend)

    def test_order_of_atoms_does_not_matter(self, backend: Backend, frames: list[Atoms]):
        orders = [np.random.default_rng(1).permutation(len(atoms)) for atoms in frames]
        before = _forward(backend, frames)
        after = _forward(backend, [atoms[order] for atoms, order in zip(frames, orders, strict=True)])
        for index, order in enumerate(orders):
            expected = _frame(before, index, frames[index])
            for key in PER_ATOM:
                expected[key] = None if expected[key] is None else expected[key][order]
            _assert_same(_frame(after, index, frames[index]), expected, backend)

    def test_turning_a_structure_turns_its_forces(self, backend: Backend, frames: list[Atoms]):
        if not self.is_equivariant:
            return
        rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        turned = [atoms.copy() for atoms in frames]
        for atoms in turned:
            atoms.set_cell(atoms.cell.array @ rotation.T)
            atoms.positions = atoms.positions @ rotation.T
        before, after = _forward(backend, frames), _forward(backend, turned)
        for index, atoms in enumerate(frames):
            expected = _frame(before, index, atoms) | {"stress": None}
            if expected["forces"] is not None:
                expected["forces"] = expected["forces"] @ rotation.T
            if expected["vectors"] is not None:
                expected["vectors"] = rotation @ expected["vectors"]
            _assert_same(_frame(after, index, atoms) | {"stress": None}, expected, backend)

    def test_vectors_are_polar(self, backend: Backend, frames: list[Atoms]):
        """Inversion of a structure turns them about, whatever else the potential does not respect."""
        vectors = _forward(backend, frames).vectors
        if vectors is None:
            return
        inverted = [atoms.copy() for atoms in frames]
        for atoms in inverted:
            atoms.set_cell(-atoms.cell.array)
            atoms.positions = -atoms.positions
        assert float(vectors.abs().max()) > 0
        found = _forward(backend, inverted).vectors
        assert found is not None
        _assert_close(found, -vectors, backend, "vectors of inverted structures")

    def test_members_have_the_prediction_as_their_mean(self, backend: Backend, frames: list[Atoms]):
        for forces in (True, False):
            e = backend.forward(backend.collate(frames), forces=forces)
            if e.members is None:
                return
            with_volume = torch.tensor([atoms.cell.rank == 3 for atoms in frames])
            for name, rows in (("energy", slice(None)), ("forces", slice(None)), ("stress", with_volume)):
                mean, members = getattr(e, name), getattr(e.members, name)
                assert (mean is None) == (members is None), name
                if mean is not None:
                    _assert_close(members.mean(0)[rows], mean[rows], backend, f"mean of the members' {name}")
                    assert float(members[:, rows].std(0).max()) > 0, f"{name} of all members is the same"

    def test_confidence_is_a_probability(self, backend: Backend, frames: list[Atoms]):
        confidence = _forward(backend, frames).confidence
        if confidence is None:
            return
        assert bool((confidence.probabilities >= 0).all())
        total = confidence.probabilities.sum(1)
        _assert_close(total, torch.ones_like(total), backend, "sum of the probabilities")
        assert float(confidence.edges[0]) == 0
        assert bool((confidence.edges.diff() > 0).all())

    def test_inputs_are_not_changed(self, backend: Backend, frames: list[Atoms]):
        for atoms in frames:
            atoms.info["note"] = "kept"
            atoms.set_array("mark", np.arange(len(atoms)))
        before = [_state(atoms) for atoms in frames]
        _forward(backend, frames)
        _forward(backend, frames[:1])
        for atoms, state in zip(frames, before, strict=True):
            now = _state(atoms)
            assert now.keys() == state.keys()
            for key, value in state.items():
                np.testing.assert_array_equal(now[key], value, err_msg=key)

    def test_outputs_are_detached_finite_and_on_the_device(self, backend: Backend, frames: list[Atoms]):
        for name, value in _meaningful(_forward(backend, frames), frames):
            assert not value.requires_grad, name
            assert value.device.type == backend.device.type, name
            assert bool(torch.isfinite(value).all()), name

    def test_outputs_live_on_after_the_next_call(self, backend: Backend, frames: list[Atoms]):
        first = dict(_meaningful(_forward(backend, frames[:1]), frames[:1]))
        kept = {name: value.clone() for name, value in first.items()}
        moved = frames[0].copy()
        moved.positions *= 1.05
        _forward(backend, [moved])
        for name, value in first.items():
            assert torch.equal(value, kept[name]), name

    def test_edges_are_neighbours(self, backend: Backend, frames: list[Atoms]):
        e = _forward(backend, frames)
        source, target, distance = (_array(x) for x in (e.edges.source, e.edges.target, e.edges.distance))
        vector, positions = _array(e.edges.vector), _array(e.positions)
        assert distance.max() < e.edges.cutoff + 1e-3
        frame = _array(e.frame_of_atom)
        assert ((source >= 0) & (source < len(frame)) & (target >= 0) & (target < len(frame))).all()
        assert (frame[source] == frame[target]).all()
        edges = sorted(zip(target, source, np.round(distance, 2), strict=True))
        if self.symmetric_edges:
            assert edges == sorted(zip(source, target, np.round(distance, 2), strict=True))
        start = 0
        for index, atoms in enumerate(frames):
            mine = frame[source] == index
            if mine.any():
                # What is left between the end of a vector and its neighbour is a vector of the lattice.
                gap = positions[target[mine]] + vector[mine] - positions[source[mine]]
                lattice = atoms.cell.array * atoms.pbc[:, None]
                steps = np.rint(gap @ np.linalg.pinv(lattice)) if atoms.pbc.any() else np.zeros_like(gap)
                np.testing.assert_allclose(gap - steps @ lattice, 0, atol=1e-3, err_msg=str(atoms))
                i, j, d = neighbor_list("ijD", atoms, float(distance[mine].max()) + 0.01)
                for a, b, found in zip(target[mine] - start, source[mine] - start, vector[mine], strict=True):
                    assert np.abs(d[(i == a) & (j == b)] - found).max(1).min() < 1e-3, (atoms, a, b, found)
            start += len(atoms)

    def test_gradients_are_of_the_same_pass(self, backend: Backend, frames: list[Atoms]):
        module = backend._modules()[0]
        n_parameters = sum(parameter.numel() for parameter in module.parameters())
        random = torch.Generator().manual_seed(0)
        for forces in (True, False):
            batch = backend.collate(frames)
            plain, before = backend.forward(batch, forces=forces), _parameters(backend)
            with count_forwards(self.forward_modules(backend)) as count:
                e = backend.forward(batch, forces=forces, gradients=True)
                assert e.gradients is not None
                assert count() == self.n_forwards
                cotangent = torch.randn(e.features.shape, generator=random).to(e.features)
                with torch.no_grad():  # whatever the caller has switched off
                    rows = list(e.gradients.of_energies())
                    of_features = e.gradients.of_features(cotangent)
                assert count() <= self.n_forwards + 1, "gradients took more than one further forward"
            assert [row.shape for row in rows] == [(n_parameters,)] * len(frames)
            assert of_features.shape == e.positions.shape
            for value in (*rows, of_features):
                assert not value.requires_grad
                assert bool(torch.isfinite(value).all())
            found = dict(_meaningful(e, frames))
            for name, value in _meaningful(plain, frames):
                assert not found[name].requires_grad, name
                _assert_close(found[name], value, backend, name)
            for now, then in zip(_parameters(backend), before, strict=True):
                assert now.keys() == then.keys()
                for key, value in then.items():
                    same = torch.equal(now[key], value) if isinstance(value, Tensor) else now[key] == value
                    assert same, f"{key} of the potential is not what it was"
            after = dict(_meaningful(backend.forward(batch, forces=forces), frames))
            for name, value in _meaningful(plain, frames):
                assert torch.equal(after[name], value), f"{name} is another after gradients were taken"

    def test_gradients_of_features(self, backend: Backend, frames: list[Atoms]):
        step, tolerance = DIFFERENCES[backend.dtype]
        random = np.random.default_rng(3)
        # The norm of a vector that is 0 by symmetry has no derivative.
        frames = _moved(frames, 0.05 * random.normal(size=(sum(map(len, frames)), 3)))
        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        cotangent = torch.as_tensor(random.normal(size=tuple(e.features.shape))).to(e.features)
        last = e.energy_layer.features
        own = (
            torch.as_tensor(random.normal(size=tuple(last.shape))).to(last)
            * _scale(_array(e.features))
            / _scale(_array(last))
        )
        gradient = _array(e.gradients.of_features(cotangent, own)).astype(float)
        direction = random.normal(size=gradient.shape)
        values = []
        for sign in (1, -1):
            moved = _forward(backend, _moved(frames, sign * step * direction))
            terms = [cotangent.double() * moved.features.double(), own.double() * moved.energy_layer.features.double()]
            values.append(_array(moved.sum_over_atoms(torch.cat(terms, 1))).sum(1))
        differences = -(values[0] - values[1]) / (2 * step)
        starts = np.cumsum([0, *map(len, frames[:-1])])
        expected = np.add.reduceat((direction * gradient).sum(1), starts)
        size = _scale(_array(cotangent * e.features), _array(own * last))
        noise = 10 * torch.finfo(backend.dtype).eps * size * len(direction)
        atol = tolerance * _scale(expected, gradient) + noise / step
        np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)

    def test_gradients_of_energies(self, backend: Backend, frames: list[Atoms]):
        def energies(e: ForwardPass) -> np.ndarray:
            return _array(e.energy if e.members is None else e.members.energy[0])

        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        rows = np.stack([_array(row) for row in e.gradients.of_energies()])
        for index in (0, len(frames) - 1):
            single = backend.forward(backend.collate([frames[index]]), gradients=True)
            assert single.gradients is not None
            (row,) = single.gradients.of_energies()
            _assert_close(torch.as_tensor(rows[index]), row.cpu(), backend, "gradient of one frame of a batch")
        self._check_by_parameters(backend, frames, rows, energies)

    def test_gradients_of_forces(self, backend: Backend, frames: list[Atoms]):
        e = backend.forward(backend.collate(frames), gradients=True)
        assert e.gradients is not None
        random = np.random.default_rng(4)
        tangents = torch.as_tensor(random.normal(size=tuple(e.positions.shape))).to(e.positions)

        def work(e: ForwardPass) -> np.ndarray:
            forces = e.forces if e.members is None or e.members.forces is None else e.members.forces[0]
            assert forces is not None
            return _array(e.sum_over_atoms((tangents * forces).sum(1)))

        rows = np.stack([_array(row) for row in e.gradients.of_forces(tangents)])
        again = backend.forward(backend.collate(frames), forces=False, gradients=True)
        assert again.gradients is not None
        for row, other in zip(rows, again.gradients.of_forces(tangents), strict=True):
            _assert_close(other.cpu(), torch.as_tensor(row), backend, "gradient where forces were not asked for")
        self._check_by_parameters(backend, frames, rows, work)

    def _check_by_parameters(
        self, backend: Backend, frames: list[Atoms], rows: np.ndarray, values: Callable[[ForwardPass], np.ndarray]
    ) -> None:
        """Compares with differences of the values, one a frame, of potentials whose parameters lie close by."""
        step, tolerance = DIFFERENCES[backend.dtype]
        generator = torch.Generator().manual_seed(5)
        other = load_backend(self.make_calculator(self.dtype))
        parameters = list(other._modules()[0].parameters())
        directions = []
        for parameter in parameters:
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            directions.append(noise.to(parameter) * (parameter.detach().abs().mean() + 0.01))
        found = []
        for steps in (step, -2 * step):
            with torch.no_grad():
                for parameter, direction in zip(parameters, directions, strict=True):
                    parameter += steps * direction
            found.append(values(_forward(other, frames)))
        differences = (found[0] - found[1]) / (2 * step)
        expected = rows @ torch.cat([direction.flatten() for direction in directions]).cpu().numpy()
        atol = tolerance * _scale(expected) + 10 * _noise(found[0], backend) / step
        np.testing.assert_allclose(differences, expected, rtol=0, atol=atol)

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

    def test_bad_structures_are_refused(self, backend: Backend, frames: list[Atoms]):
        def refused(change: Callable[[Atoms], Any], match: str) -> None:
            original = _periodic(frames).copy()
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

    def test_the_process_stays_as_it_was(self, frames: list[Atoms]):
        calculator = self.make_calculator(self.dtype)
        before = process_state()
        backend = load_backend(calculator)
        _forward(backend, frames)
        assert backend.identity.fingerprint
        assert process_state() == before

    def test_torchs_default_dtype_does_not_matter(self, backend: Backend, frames: list[Atoms]):
        expected = dict(_meaningful(_forward(backend, frames), frames))
        for dtype in (torch.float32, torch.float64):
            with _default_dtype(dtype):
                found = _forward(backend, frames)
            for name, value in _meaningful(found, frames):
                assert value.dtype == expected[name].dtype, name
                _assert_close(value, expected[name], backend, name)

    def test_callers_switch_for_gradients_does_not_matter(self, backend: Backend, frames: list[Atoms]):
        expected = dict(_meaningful(_forward(backend, frames), frames))
        with torch.no_grad():
            for name, value in _meaningful(_forward(backend, frames), frames):
                assert torch.equal(value, expected[name]), name

    def _with_other_weights(self) -> BaseCalculator:
        calculator = self.make_calculator(self.dtype)
        with torch.no_grad():
            for module in load_backend(calculator)._modules():
                for weight in module.parameters():
                    weight *= 1.1
        return calculator


# Tensors of one structure that count its atoms; the others count structures.
PER_ATOM = ("numbers", "forces", "energies", "features", "phi", "force_phi", "vectors", "confidence")


def standard_frames() -> list[Atoms]:
    """A methanol molecule, a box of water, linear CO2, an oxygen atom and a periodic hydrogen; H, C and O."""
    methanol = molecule("CH3OH")
    methanol.rattle(0.05, seed=1)
    water = molecule("H2O", cell=[3.1] * 3, pbc=True)
    water.center()
    water = water.repeat((2, 2, 1))
    water.rattle(0.05, seed=2)
    oxygen = Atoms("O", [(0.3, 0.2, 0.1)])
    hydrogen = Atoms("H", [(0.1, 0.2, 0.3)], cell=np.diag([2.9, 3.1, 3.3]) + 0.2, pbc=True)
    return [methanol, water, molecule("CO2"), oxygen, hydrogen]


@contextmanager
def count_forwards(modules: Sequence[torch.nn.Module]) -> Iterator[Callable[[], int]]:
    """Counts the calls of the modules' forward; the context gives a function that returns the count so far."""
    count = 0

    def counted(forward: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            return forward(*arguments, **options)

        return call

    try:
        for module in modules:
            module.forward = counted(module.forward)  # shadows the class's, on this object only
        yield lambda: count
    finally:
        for module in modules:
            del module.forward


def process_state() -> dict[str, Any]:
    """What the whole process shares and a backend must leave alone."""
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
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def _forward(backend: Backend, frames: Sequence[Atoms]) -> ForwardPass:
    return backend.forward(backend.collate(frames))


def _moved(frames: Sequence[Atoms], displacements: np.ndarray) -> list[Atoms]:
    """Copies with (n_atoms, 3) displacements in Å."""
    moved = [atoms.copy() for atoms in frames]
    rows = np.split(displacements, np.cumsum([len(atoms) for atoms in moved])[:-1])
    for atoms, own in zip(moved, rows, strict=True):
        atoms.positions += own
    return moved


def _parameters(backend: Backend) -> list[dict[str, Any]]:
    """What of each parameter, and of each module, is the user's."""
    found: list[dict[str, Any]] = []
    for root in backend._modules():
        for name, parameter in root.named_parameters():
            has = {"gradient": parameter.grad is not None, "requires_grad": parameter.requires_grad}
            found.append({"name": name, "values": parameter.detach().clone()} | has)
        found += [{"name": name, "training": module.training} for name, module in root.named_modules()]
    return found


def _array(value: Tensor | None) -> np.ndarray:
    assert value is not None
    return value.cpu().numpy()


def _periodic(frames: Sequence[Atoms]) -> Atoms:
    return next(atoms for atoms in frames if atoms.pbc.all() and len(atoms) > 1)


def _scale(*values: Any) -> float:
    return max(float(np.abs(value).max()) for value in values) + 1e-12


def _noise(energies: np.ndarray, backend: Backend) -> float:
    """Rounding of an energy, eV."""
    return 2 * torch.finfo(backend.dtype).eps * _scale(energies)


def _tensors(value: Any, prefix: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a forward pass with its dotted name."""
    for entry in fields(value):
        inner = getattr(value, entry.name)
        if isinstance(inner, Tensor):
            yield prefix + entry.name, inner
        elif is_dataclass(inner):
            yield from _tensors(inner, f"{prefix}{entry.name}.")
        elif isinstance(inner, dict):
            yield from ((f"{prefix}{entry.name}.{key}", tensor) for key, tensor in inner.items())


def _meaningful(e: ForwardPass, frames: Sequence[Atoms]) -> Iterator[tuple[str, Tensor]]:
    """Every tensor with its name, without the stress of structures that have no volume: packages give anything."""
    with_volume = torch.tensor([atoms.cell.rank == 3 for atoms in frames])
    for name, value in _tensors(e):
        rows = with_volume.to(value.device)
        yield name, value[..., rows, :] if name in ("stress", "members.stress") else value


def _frame(e: ForwardPass, index: int, atoms: Atoms) -> dict[str, Any]:
    """What a batch says about one of its structures, as float64 arrays; None for what it has not."""
    own = (e.frame_of_atom == index).cpu()
    per_atom = {
        "numbers": e.numbers,
        "forces": e.forces,
        "energies": e.energies,
        "features": e.features,
        "phi": e.energy_layer.features,
        "force_phi": None if e.force_layer is None else e.force_layer.features,
        "vectors": e.vectors,
        "confidence": None if e.confidence is None else e.confidence.probabilities,
    }
    per_frame = {
        "energy": e.energy,
        "stress": None if atoms.cell.rank < 3 else e.stress,
        "base": e.energy_layer.base,
        "torque_free": None if e.force_layer is None else e.force_layer.torque_free,
        "members": None if e.members is None else e.members.energy.T,
    }
    edges = own[e.edges.target.cpu()]
    found = {key: None if value is None else value.cpu()[own].double().numpy() for key, value in per_atom.items()}
    found |= {key: None if value is None else value[index].cpu().double().numpy() for key, value in per_frame.items()}
    return found | {"distances": np.sort(e.edges.distance.cpu()[edges].double().numpy())}


def _assert_same(found: dict[str, Any], expected: dict[str, Any], backend: Backend) -> None:
    for key, value in expected.items():
        if value is None:
            assert found[key] is None, key
            continue
        assert found[key].shape == value.shape, key
        if value.size:
            atol = ROUNDING[backend.dtype] * max(1.0, _scale(value))
            np.testing.assert_allclose(found[key], value, rtol=0, atol=atol, err_msg=key)


def _assert_close(
    found: Tensor, expected: Tensor | None, backend: Backend, what: str, size: Tensor | None = None
) -> None:
    assert expected is not None
    assert found.shape == expected.shape, what
    if expected.numel():
        largest = float((expected if size is None else size).double().abs().max())
        deviation = float((found.double() - expected.double()).abs().max())
        assert deviation <= ROUNDING[backend.dtype] * max(1.0, largest), f"{what} is off by {deviation}"


def _project(forces: Tensor, layer: ForceLayer, e: ForwardPass) -> Tensor:
    """P by its definition: the least-squares remainder after rigid motions."""
    remainder = forces.clone()
    for index, torque_free in enumerate(layer.torque_free.tolist()):
        own = e.frame_of_atom == index
        x = e.positions[own].double()
        x = x - x.mean(0)
        n_atoms = len(x)
        shifts = torch.eye(3, dtype=x.dtype).repeat(n_atoms, 1)  # (3 n_atoms, 3)
        turns = torch.stack([torch.linalg.cross(axis.expand_as(x), x).reshape(-1) for axis in torch.eye(3).to(x)], 1)
        modes = [shifts] * layer.force_free + [turns] * torque_free
        if modes:
            span = torch.cat([mode.to(x) for mode in modes], 1)
            left, values, _ = torch.linalg.svd(span, full_matrices=False)
            left = left[:, values > 1e-6 * values.max()]  # a linear molecule has one rotation less
            flat = remainder[own].reshape(-1)
            remainder[own] = (flat - left @ (left.T @ flat)).reshape(-1, 3)
    return remainder


def _state(atoms: Atoms) -> dict[str, Any]:
    arrays = {f"array {key}": value.copy() for key, value in atoms.arrays.items()}
    info = {f"info {key}": np.array(value) for key, value in atoms.info.items()}
    return {"cell": atoms.cell.array.copy(), "pbc": atoms.pbc.copy(), **arrays, **info}
