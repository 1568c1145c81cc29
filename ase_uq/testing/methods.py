"""`MethodContract`: laws that every method must obey, with the frames and ranks that its tests need."""

import copy
import functools
import json
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.calculator import BaseCalculator
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Communicator, Serial
from ase_uq.errors import LabelError
from ase_uq.fitting.fit import fit
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods import method_class
from ase_uq.methods.base import Head, Method, Raw
from ase_uq.stream.labelled import LabelledStream
from ase_uq.uncertainty_model.model import UncertaintyModel

ELEMENTS = ("H", "C", "O")
RAW_FIELDS = ("forces", "energy", "energies", "stress", "distance")


class MethodContract:
    """Laws of a method.

    Subclass it in a test file and define how the method is made:

        class TestMyMethod(MethodContract):
            def make_method(self):
                return MyMethod(width=32)

    Attributes:
        direct: Whether the potential has a direct force head.
        tolerance: Largest change of raw uncertainties, relative to the largest value, when the training frames are
            batched, ordered or shared between ranks differently. A fit that solves a linear system of condition
            number κ cannot do better than about κ times 1e-16.
    """

    direct: bool = False
    tolerance: float = 1e-10

    # What a subclass defines.

    def make_method(self) -> Method:
        """The method under test, with hyper-parameters that suit a hundred small molecules."""
        raise NotImplementedError("say in make_method how the method under test is made")

    def make_calculator(self) -> BaseCalculator:
        """The potential that the method is fitted for; it must know H, C and O."""
        return ToyCalculator(ELEMENTS, direct=self.direct)

    def make_frames(self) -> list[Atoms]:
        """Labelled training frames of several sizes."""
        return labelled_frames(24, seed=1)

    # The laws.

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        return load_backend(cls().make_calculator())

    @pytest.fixture(scope="class")
    @classmethod
    def frames(cls) -> list[Atoms]:
        return cls().make_frames()

    @pytest.fixture(scope="class")
    @classmethod
    def head(cls, backend: Backend, frames: list[Atoms]) -> Head:
        return fit_head(cls().make_method(), backend, frames)

    @pytest.fixture(scope="class")
    @classmethod
    def unseen(cls, backend: Backend) -> ForwardPass:
        """A batch of structures that were not fitted, from one atom to a periodic box."""
        frames = [*labelled_frames(6, seed=2), Atoms("O", [(0.1, 0.2, 0.3)]), *labelled_frames(1, seed=3, cell=5.0)]
        return forward_pass_of(backend, frames, gradients=cls().make_method().gradients)

    def test_name_finds_the_method(self):
        method = self.make_method()
        assert method_class(method.name) is type(method)

    def test_raw_uncertainties_have_their_shapes_and_are_not_negative(self, head: Head, unseen: ForwardPass):
        raw = head(unseen)
        n_atoms, n_frames = len(unseen.numbers), unseen.n_frames
        assert raw.forces.ndim == 3
        assert raw.forces.shape[:2] in ((n_atoms, 1), (n_atoms, 3))
        assert raw.energy.ndim == raw.stress.ndim == 2
        assert len(raw.energy) == len(raw.stress) == n_frames
        assert raw.energies.shape == raw.distance.shape == (n_atoms,)
        for name in RAW_FIELDS:
            values = getattr(raw, name)
            assert bool(torch.isfinite(values).all()), name
            assert bool((values >= 0).all()), name
            assert values.dtype == torch.float64, name
            assert not values.requires_grad, name

    def test_distance_is_one_on_average_over_the_fitted_atoms(self, head: Head, backend: Backend, frames: list[Atoms]):
        distance = head(self._forward(backend, frames)).distance
        # The tolerance allows for rounding in a solve that scales up features that hardly vary.
        assert float(distance.mean()) == pytest.approx(1.0, rel=1e-5)

    def test_uncertainty_is_larger_far_from_the_training_frames(
        self, head: Head, backend: Backend, frames: list[Atoms]
    ):
        near = head(self._forward(backend, frames))
        far = head(self._forward(backend, [_torn(atoms) for atoms in frames if len(atoms) > 2]))
        for name in RAW_FIELDS:
            nearby, away = getattr(near, name), getattr(far, name)
            scores = nearby.shape[-1] if nearby.ndim > 1 else 1
            for k in range(scores):
                closer, further = (x.reshape(-1, scores)[:, k].mean() for x in (nearby, away))
                assert float(further) > 2 * float(closer), f"score {k} of {name}"

    def test_batch_equals_singles(self, head: Head, backend: Backend, frames: list[Atoms]):
        some = frames[:5]
        together = head(self._forward(backend, some))
        alone = [head(self._forward(backend, [atoms])) for atoms in some]
        for name in RAW_FIELDS:
            joined = torch.cat([getattr(raw, name) for raw in alone])
            # Features and matrix products are summed in a different order.
            _assert_close(getattr(together, name), joined, 1e-8, name)

    @pytest.mark.parametrize("batch_atoms", [1, 17])
    def test_batches_of_any_size_and_order_give_the_same_head(
        self, head: Head, backend: Backend, frames: list[Atoms], unseen: ForwardPass, batch_atoms: int
    ):
        shuffled = [frames[i] for i in np.random.default_rng(batch_atoms).permutation(len(frames))]
        other = fit_head(self.make_method(), backend, shuffled, batch_atoms=batch_atoms)
        self._assert_same(head(unseen), other(unseen))

    def test_labels_that_some_frames_lack_do_not_depend_on_the_batches(
        self, backend: Backend, frames: list[Atoms], unseen: ForwardPass
    ):
        partly = [atoms.copy() for atoms in frames]
        for atoms in partly[::3]:
            del atoms.info["REF_energy"]
        one, other = (fit_head(self.make_method(), backend, partly, batch_atoms=size) for size in (1, 10_000))
        self._assert_same(one(unseen), other(unseen))

    def test_ranks_give_the_head_of_one_process(
        self, head: Head, backend: Backend, frames: list[Atoms], unseen: ForwardPass
    ):
        """Of three ranks the last has no frames: they make two batches."""
        size = 2 * sum(map(len, frames)) // 3
        heads = on_ranks(
            3, lambda ranks: fit_head(self.make_method(), backend, frames, batch_atoms=size, communicator=ranks)
        )
        for other in heads:
            self._assert_same(head(unseen), other(unseen))
            assert other.settings.keys() == head.settings.keys()

    @pytest.mark.parametrize("size", [1, 2])
    def test_no_training_frames_are_refused(self, size: int):
        with pytest.raises(LabelError, match="there are no training frames"):
            on_ranks(size, lambda ranks: self.make_method().fit([], ranks))

    def test_settings_and_buffers_are_all_of_a_head(self, head: Head, unseen: ForwardPass):
        assert not list(head.parameters())
        settings = json.loads(json.dumps(head.settings))
        again = type(self.make_method()).load(settings, dict(head.state_dict()))
        for name in RAW_FIELDS:
            assert torch.equal(getattr(again(unseen), name), getattr(head(unseen), name)), name

    def test_all_tensors_move_with_the_head(self, head: Head):
        moved = copy.deepcopy(head).to("meta")
        for module in moved.modules():
            for name, value in vars(module).items():
                assert not isinstance(value, Tensor), f"{name} is a tensor but not a buffer: .to leaves it behind"
            assert all(buffer.is_meta for buffer in module.buffers())

    def test_the_evaluation_is_not_changed(self, head: Head, unseen: ForwardPass):
        before = {name: value.clone() for name, value in _tensors(unseen)}
        head(unseen)
        after = dict(_tensors(unseen))
        assert after.keys() == before.keys()
        for name, value in before.items():
            assert torch.equal(after[name], value), name

    def test_the_same_batch_gives_the_same_bits(self, head: Head, unseen: ForwardPass):
        first, second = head(unseen), head(unseen)
        for name in RAW_FIELDS:
            assert torch.equal(getattr(first, name), getattr(second, name)), name

    # There may be too few frames.
    @pytest.mark.filterwarnings("ignore:.*(tells nothing about|has no floor):ase_uq.errors.UQWarning")
    def test_a_saved_model_gives_the_same_bits(self, frames: list[Atoms], unseen: ForwardPass, tmp_path: Path):
        calibration = labelled_frames(10, seed=4)
        model = fit(self.make_calculator(), frames, calibration, methods=[self.make_method()], progress=False)
        model.save(tmp_path / "a.uq.safetensors")
        again = UncertaintyModel.load(tmp_path / "a.uq.safetensors")
        loaded, expected = again.apply(unseen), model.apply(unseen)
        assert set(loaded) == set(expected) == set(model.results)
        for key, value in expected.items():
            assert torch.equal(loaded[key], value), key

    def _forward(self, backend: Backend, frames: Sequence[Atoms]) -> ForwardPass:
        return forward_pass_of(backend, frames, gradients=self.make_method().gradients)

    def _assert_same(self, actual: Raw, expected: Raw) -> None:
        for name in RAW_FIELDS:
            _assert_close(getattr(actual, name), getattr(expected, name), self.tolerance, name)


def labelled_frames(
    count: int, *, seed: int = 0, cell: float | None = None, spread: tuple[float, float] = (0.02, 0.12)
) -> list[Atoms]:
    """Labelled small molecules of H, C and O, displaced from equilibrium; errors grow with the displacements.

    Args:
        count: Number of frames.
        seed: Seed of the choice of molecules, of their displacements and of the noise on their labels.
        cell: Edge of a periodic cubic cell in Å, for labels with a stress; None for free molecules.
        spread: Range in Å from which every frame draws the standard deviation of its displacements.

    Returns:
        Frames with `REF_energy`, `REF_forces` and, in a cell, `REF_stress`.
    """
    return copy.deepcopy(_labelled_frames(count, seed, cell, spread))


@functools.cache
def _labelled_frames(count: int, seed: int, cell: float | None, spread: tuple[float, float]) -> list[Atoms]:
    random = np.random.default_rng(seed)
    frames, noise = [], []
    for _ in range(count):
        atoms = molecule(str(random.choice(["H2O", "CH3OH", "CO2", "C2H4"])))
        scale = random.uniform(*spread)
        atoms.positions += random.normal(scale=scale, size=(len(atoms), 3))
        if cell is not None:
            atoms.set_cell([cell] * 3)
            atoms.pbc = True
            atoms.center()
        frames.append(atoms)
        noise.append(4 * scale)
    return with_labels(frames, noise=noise, seed=seed)


def with_labels(frames: Sequence[Atoms], *, noise: Sequence[float] | float = 0.1, seed: int = 0) -> list[Atoms]:
    """The same frame objects, with labels from a toy potential with other weights, plus noise.

    Without noise the labels would be exactly linear in the last layer's features, which no real reference is.

    Args:
        frames: Structures of H, C and O.
        noise: Standard deviation of the noise on a force component in eV/Å, one per frame or one for all. The energy
            per atom gets a tenth of it, in eV, and the stress a hundredth, in eV/Å³.
        seed: Seed of the noise.
    """
    random = np.random.default_rng(seed)
    forward_pass = forward_pass_of(load_backend(ToyCalculator(ELEMENTS, seed=1)), list(frames))
    assert forward_pass.forces is not None
    assert forward_pass.stress is not None
    energies, forces, stresses = (x.numpy() for x in (forward_pass.energy, forward_pass.forces, forward_pass.stress))
    for index, (atoms, scale) in enumerate(zip(frames, np.broadcast_to(noise, len(frames)), strict=True)):
        exact = forces[forward_pass.frame_of_atom == index]
        atoms.info["REF_energy"] = float(energies[index] + random.normal(scale=0.1 * scale * len(atoms)))
        atoms.set_array("REF_forces", exact + random.normal(scale=scale, size=exact.shape))
        if atoms.cell.rank == 3:
            atoms.info["REF_stress"] = stresses[index] + random.normal(scale=0.01 * scale, size=6)
    return list(frames)


def forward_pass_of(backend: Backend, frames: Sequence[Atoms], *, gradients: bool = False) -> ForwardPass:
    """One forward pass over structures, with forces."""
    return backend.forward(backend.collate(frames), gradients=gradients)


def fit_head(
    method: Method,
    backend: Backend,
    frames: Sequence[Atoms],
    *,
    batch_atoms: int = 1000,
    communicator: Communicator | None = None,
) -> Head:
    """A method fitted on labelled frames, without calibration."""
    communicator = communicator or Serial()
    stream = LabelledStream(
        backend, frames, communicator, batch_atoms=batch_atoms, forces=method.forces, gradients=method.gradients
    )
    return method.fit(stream, communicator)


class ThreadRank:
    """A communicator whose ranks are threads of one process; created by `on_ranks`."""

    def __init__(self, rank: int, barrier: threading.Barrier, messages: list[Mapping[str, Tensor]]) -> None:
        self.rank = rank
        self.size = barrier.parties
        self._barrier = barrier
        self._messages = messages

    def sum(self, statistics: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The sum over all ranks; every rank must call it equally often, with the same names and shapes of tensors.

        Raises:
            ValueError: The ranks sent different names or shapes.
        """
        self._messages[self.rank] = statistics
        self._barrier.wait()
        shapes = [{name: value.shape for name, value in message.items()} for message in self._messages]
        if any(other != shapes[0] for other in shapes):
            raise ValueError(f"the ranks sent different statistics: {shapes}.")
        summed = {name: torch.stack([message[name] for message in self._messages]).sum(0) for name in statistics}
        self._barrier.wait()
        return summed


def on_ranks[T](size: int, run: Callable[[Communicator], T]) -> list[T]:
    """The values that a function returns on each of several ranks, which run as threads and can sum over all ranks."""
    barrier = threading.Barrier(size, timeout=60)
    messages: list[Mapping[str, Tensor]] = [{} for _ in range(size)]

    def one(rank: int) -> T:
        try:
            return run(ThreadRank(rank, barrier, messages))
        except BaseException:
            barrier.abort()  # otherwise the other ranks would wait for ever
            raise

    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(one, rank) for rank in range(size)]
    errors = [error for future in futures if (error := future.exception()) is not None]
    first = [error for error in errors if not isinstance(error, threading.BrokenBarrierError)] or errors
    if first:
        raise first[0]
    return [future.result() for future in futures]


def _torn(atoms: Atoms) -> Atoms:
    """A copy far outside the training frames: all atoms are displaced by about half an Å."""
    torn = atoms.copy()
    torn.positions += np.random.default_rng(0).normal(scale=0.5, size=torn.positions.shape)
    return torn


def _assert_close(actual: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert actual.shape == expected.shape, what
    deviation = float((actual - expected).abs().max())
    largest = float(expected.abs().max())
    assert deviation <= tolerance * largest, f"{what} differ by {deviation}, {deviation / largest:.0e} of the largest"


def _tensors(value: Any, prefix: str = "") -> list[tuple[str, Tensor]]:
    """Every tensor of a forward pass with its dotted name."""
    named = []
    for entry in fields(value):
        inner = getattr(value, entry.name)
        if isinstance(inner, Tensor):
            named.append((prefix + entry.name, inner))
        elif is_dataclass(inner):
            named += _tensors(inner, f"{prefix}{entry.name}.")
    return named
