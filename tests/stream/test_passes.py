"""The one loop over frames: every user of it survives a full device, learns what was left out, and can be sharded."""

import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

from ase_uq import UncertaintyModel, evaluate, fit, score, select
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyBackend
from ase_uq.communicator import Serial
from ase_uq.diagnostics.latent import frame_features
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.stream.failures import not_finite, reason_of_not_finite
from ase_uq.stream.passes import LeftOut, Pass, complete, passes
from ase_uq.testing.methods import labelled_frames

TRAIN, CALIBRATION, TEST = (labelled_frames(20, seed=seed) for seed in (1, 2, 3))


class Rank:
    """One rank of several, which sums nothing."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, statistics: dict) -> dict:
        return dict(statistics)


# Twenty frames are few to calibrate on; what matters here is which of them are evaluated.
pytestmark = pytest.mark.filterwarnings("ignore::ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    return fitted()


def fitted() -> UncertaintyModel:
    return fit("toy:", TRAIN, CALIBRATION, methods=["bll", "mahalanobis"], perturbed=TEST, progress=False)


def energies(frames: list[Atoms], **options) -> list[Pass | LeftOut]:
    options = {"batch_atoms": 40, "forces": False} | options
    return list(passes(load_backend("toy:"), Source(frames), lambda e: e.energy.tolist(), **options))


@pytest.fixture(params=[1, 2], ids=["one batch at a time", "two"])
def at_a_time(request: pytest.FixtureRequest) -> Iterator[int]:
    """How many batches are evaluated at a time: as many as torch has threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.fixture
def small_device(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], list[int]]:
    """Makes the potential run out of memory above so many atoms; returns the sizes of all batches that are tried."""

    def make(most: int) -> list[int]:
        real, tried = ToyBackend._forward, []

        def forward(self: ToyBackend, batch, forces: bool, gradients: bool) -> ForwardPass:
            tried.append(sum(map(len, batch.frames)))
            if tried[-1] > most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            return real(self, batch, forces, gradients)

        monkeypatch.setattr(ToyBackend, "_forward", forward)
        return tried

    return make


class TestAFullDevice:
    """Each user gives what it gives on a device on which everything fits."""

    @pytest.fixture(autouse=True)
    def expected(self, model: UncertaintyModel, tmp_path: Path) -> None:
        self.model, self.folder = model, tmp_path

    def fit(self) -> np.ndarray:
        made = fitted()
        assert made.perturbed is not None
        return np.concatenate([made.record.uncertainty, made.perturbed.uncertainty])

    def evaluate(self) -> np.ndarray:
        judged = evaluate("toy:", TEST, self.model, n_bootstrap=0, progress=False)
        return np.array([value.value for value in judged.scores])

    def score(self) -> np.ndarray:
        out = self.folder / f"{len(list(self.folder.iterdir()))}.xyz"
        score(TEST, "toy:", self.model, out=out, batch_atoms=1000, progress=False)
        frames = read(out, ":")
        assert [atoms.info["source_frame"] for atoms in frames] == list(range(len(TEST)))
        return np.concatenate([atoms.arrays["forces_uncertainty"] for atoms in frames])

    def select(self) -> np.ndarray:
        found = select(TEST, 5, calculator="toy:", uncertainty_model=self.model, train=TRAIN, progress=False)
        return np.concatenate([found.indices, found.uncertainties])

    def latent(self) -> np.ndarray:
        return frame_features(load_backend("toy:"), TEST)

    @pytest.mark.parametrize("user", ["fit", "evaluate", "score", "select", "latent"])
    def test_changes_nothing_but_the_batches(self, user: str, small_device: Callable[[int], list[int]]):
        expected = getattr(self, user)()
        tried = small_device(30)
        found = getattr(self, user)()
        assert max(tried) > 30, "the device was never full"
        # Sums in another order.
        np.testing.assert_allclose(found, expected, rtol=1e-5 if user == "fit" else 1e-6, atol=1e-9)

    def test_report_survives_it_too(self, small_device: Callable[[int], list[int]]):
        report = pytest.importorskip("ase_uq.report.page")
        tried = small_device(30)
        score(TEST, "toy:", self.model, out=self.folder / "scored.xyz", progress=False)
        tried.clear()
        assert report.frame_features is frame_features
        frame_features(load_backend("toy:"), read(self.folder / "scored.xyz", ":"))
        assert max(tried) > 30

    @pytest.mark.parametrize("user", ["fit", "evaluate", "score", "select", "latent"])
    def test_a_single_frame_that_does_not_fit_is_named(self, user: str, small_device: Callable[[int], list[int]]):
        # The probe structure of five atoms, by which a potential is known, fits.
        small_device(5)
        with pytest.raises(InputError, match=r"frame \d+ with its \d+ atoms alone does not fit into the memory of cpu"):
            getattr(self, user)()


@pytest.mark.usefixtures("at_a_time")
class TestLeftOut:
    def test_a_bad_frame_stands_alone_and_before_what_reaches_beyond_it(self):
        frames = [atoms.copy() for atoms in TEST[:10]]
        for number in (3, 4, 9):
            frames[number].positions[0] = np.nan
        events = energies(frames, batch_atoms=1000)
        left_out = [event for event in events if isinstance(event, LeftOut)]
        assert [event.number for event in left_out] == [3, 4, 9]
        assert left_out[0].reason.startswith("positions of structure 3 (")
        assert left_out[0].n_atoms == len(frames[3])
        assert sorted(n for event in events if isinstance(event, Pass) for n in event.numbers) == [0, 1, 2, 5, 6, 7, 8]
        reached = -1
        for event in events:
            if isinstance(event, Pass):
                reached = event.numbers[-1]
            else:
                assert event.number > reached, "a resumed run would not come back to it"

    def test_the_others_have_the_numbers_that_they_have_alone(self):
        frames = [atoms.copy() for atoms in TEST[:6]]
        frames[2].numbers[0] = 79
        found = dict(
            pair
            for event in energies(frames, batch_atoms=1000)
            if isinstance(event, Pass)
            for pair in zip(event.numbers, event.value, strict=True)
        )
        for number, energy in found.items():
            (alone,) = energies([frames[number]])
            assert isinstance(alone, Pass)
            assert energy == pytest.approx(alone.value[0], rel=1e-12)

    def test_what_is_made_of_a_pass_may_refuse_frames(self):
        def use(forward_pass: ForwardPass) -> int:
            if forward_pass.energy.max() > worst:
                raise InputError("too much energy.")
            return forward_pass.n_frames

        every = [e for event in complete(iter(energies(TEST))) for e in event.value]
        worst = sorted(every)[-2]
        events = list(passes(load_backend("toy:"), Source(TEST), use, batch_atoms=1000))
        assert [(e.number, e.reason) for e in events if isinstance(e, LeftOut)] == [
            (int(np.argmax(every)), "too much energy.")
        ]

    def test_where_none_may_be_left_out_the_first_ends_it(self):
        frames = [atoms.copy() for atoms in TEST[:4]]
        frames[1].positions[0] = np.inf
        with pytest.raises(InputError, match="positions of structure 1 "):
            list(complete(iter(energies(frames))))


# What packages raise where memory cannot be had, and what they raise at a structure.
OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB."),
    MemoryError(),
    MemoryError("Unable to allocate 3.64 TiB for an array with shape (707106, 707106) and data type float64"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:124] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("Failed to allocate 1073741824 bytes on device 'cuda:0'"),
    RuntimeError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 8589934592 bytes."),
    RuntimeError("std::bad_alloc"),
]
ERRORS = [
    AssertionError(),
    IndexError("list index out of range"),
    KeyError("spin"),
    NotImplementedError("mixed boundaries"),
    OverflowError("too many neighbours"),
    RuntimeError("The size of tensor a (3) must match the size of tensor b (2)"),
    TypeError("unhashable type"),
    ValueError("pbc along all three vectors or none"),
    ZeroDivisionError("float division by zero"),
]


def spoilt(frames: list[Atoms], number: int = 3) -> list[Atoms]:
    """Copies with their labels, one of which the potential cannot evaluate."""
    copies = [atoms.copy() for atoms in frames]
    for new, old in zip(copies, frames, strict=True):
        new.calc = old.calc
    copies[number].info["bad"] = True
    return copies


@pytest.fixture
def bad(monkeypatch: pytest.MonkeyPatch) -> Callable[[Exception | None], None]:
    """Makes the potential raise an error for each batch with a marked frame, or make NaN of all of its frames."""

    def make(error: Exception | None) -> None:
        real = ToyBackend._forward

        def forward(self: ToyBackend, batch, forces: bool, gradients: bool) -> ForwardPass:
            found = real(self, batch, forces, gradients)
            if not any("bad" in atoms.info for atoms in batch.frames):
                return found
            if error is not None:
                raise error
            return replace(
                found,
                energy=found.energy * np.nan,
                features=found.features * np.nan,
                forces=None if found.forces is None else found.forces * np.nan,
            )

        monkeypatch.setattr(ToyBackend, "_forward", forward)

    return make


class TestOneBadFrame:
    """It is named, and the others have the numbers that they have alone, whoever evaluates them."""

    @pytest.mark.usefixtures("at_a_time")
    @pytest.mark.parametrize("error", [None, *ERRORS], ids=lambda error: type(error).__name__)
    def test_is_left_out_alone(self, error: Exception | None, bad: Callable[[Exception | None], None]):
        expected = [e for event in complete(iter(energies(TEST))) for e in event.value]
        bad(error)
        events = energies(spoilt(TEST), batch_atoms=1000)
        (left_out,) = [event for event in events if isinstance(event, LeftOut)]
        assert left_out.number == 3
        wanted = "numbers that are not finite: its energy" if error is None else f"({type(error).__name__}: {error}"
        assert wanted.replace("'", "") in left_out.reason.replace("'", "")
        found = dict(pair for e in events if isinstance(e, Pass) for pair in zip(e.numbers, e.value, strict=True))
        assert found == pytest.approx({n: value for n, value in enumerate(expected) if n != 3}, rel=1e-12)

    @pytest.mark.parametrize("error", [None, ValueError("no")], ids=["nan", "error"])
    def test_score_and_select_leave_it_out(
        self, error: Exception | None, bad: Callable, model: UncertaintyModel, tmp_path: Path
    ):
        bad(error)
        scored = score(spoilt(TEST), "toy:", model, out=tmp_path / "out.xyz", progress=False)
        assert (scored.n_frames, scored.n_left_out) == (len(TEST) - 1, 1)
        assert all(np.isfinite(atoms.arrays["forces_uncertainty"]).all() for atoms in read(tmp_path / "out.xyz", ":"))
        found = select(spoilt(TEST), 5, calculator="toy:", uncertainty_model=model, progress=False)
        assert list(found.left_out) == [3]
        with pytest.raises(InputError, match=r"training frame 3 "):
            select(TEST, 5, calculator="toy:", uncertainty_model=model, train=spoilt(TRAIN), progress=False)

    @pytest.mark.parametrize("error", [None, ValueError("no")], ids=["nan", "error"])
    def test_fit_and_evaluate_refuse_it(self, error: Exception | None, bad: Callable, model: UncertaintyModel):
        bad(error)
        parts = {"training": TRAIN, "calibration": CALIBRATION, "perturbed": TEST}
        for name in parts:
            train, calibration, perturbed = (
                spoilt(frames, 13) if part == name else frames for part, frames in parts.items()
            )
            with pytest.raises(InputError, match=f"{name} frame 13 cannot be used: the potential"):
                fit("toy:", train, calibration, perturbed=perturbed, methods=["bll"], progress=False)
        with pytest.raises(InputError, match="labelled test frame 13 cannot be used: the potential"):
            evaluate("toy:", spoilt(TEST, 13), model, progress=False)

    @pytest.mark.usefixtures("at_a_time")
    @pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=str)
    def test_memory_of_any_kind_makes_batches_smaller(self, error: Exception, monkeypatch: pytest.MonkeyPatch):
        expected = [e for event in complete(iter(energies(TEST))) for e in event.value]
        real = ToyBackend._forward

        def forward(self: ToyBackend, batch, forces: bool, gradients: bool) -> ForwardPass:
            if sum(map(len, batch.frames)) > 30:
                raise error
            return real(self, batch, forces, gradients)

        monkeypatch.setattr(ToyBackend, "_forward", forward)
        found = [e for event in complete(iter(energies(TEST, batch_atoms=1000))) for e in event.value]
        assert found == pytest.approx(expected, rel=1e-12)

    @pytest.mark.usefixtures("at_a_time")
    def test_a_device_that_is_lost_ends_the_loop(self, bad: Callable[[Exception | None], None]):
        bad(RuntimeError("CUDA error: device-side assert triggered"))
        with pytest.raises(RuntimeError, match="device-side assert") as caught:
            energies(spoilt(TEST), batch_atoms=1000)
        assert caught.value.__notes__ == ["It was raised at frames 0 to 19. Start a new process to go on."]

    def test_errors_of_what_is_made_of_a_pass_are_not_the_frames(self):
        with pytest.raises(ZeroDivisionError):
            list(passes(load_backend("toy:"), Source(TEST), lambda _: 1 // 0, batch_atoms=40))

    def test_atoms_on_one_another_are_named(self):
        atoms = Atoms("H2O", [(0, 0, 0), (0, 0, 0.9), (0, 0.001, 0.9)])
        assert reason_of_not_finite("forces", atoms) == (
            "the potential gives numbers that are not finite: its forces. Atoms 1 and 2 are 0.001 Å apart."
        )
        assert "Look at its positions" in reason_of_not_finite("forces", TEST[0])

    def test_a_stress_that_there_is_not_is_no_fault(self):
        events = passes(load_backend("toy:"), Source(TEST[:2]), lambda forward_pass: forward_pass, batch_atoms=40)
        (event,) = complete(events)
        stress = event.value.stress
        assert stress is not None
        stress[0] = torch.nan
        assert not_finite(event.value) == ""
        stress[1, 2] = torch.inf
        assert not_finite(event.value) == "stress"


class TestSeveralAtATime:
    """Threads have a batch each, where the potential allows it."""

    @pytest.fixture(autouse=True)
    def two_threads(self) -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(2)
        yield
        torch.set_num_threads(before)

    def test_give_the_same_in_the_same_order(self):
        frames = [TEST[0].copy() for _ in range(4)]
        for number, atoms in enumerate(frames):
            atoms.rattle(0.05, seed=number)
        (alone,) = complete(iter(energies(frames, batch_atoms=1000)))
        together = threading.Barrier(2, timeout=30)  # breaks unless two passes are used at a time

        def use(forward_pass: ForwardPass) -> float:
            together.wait()
            return float(forward_pass.energy)

        found = list(
            complete(passes(load_backend("toy:"), Source(frames), use, batch_atoms=len(frames[0]), forces=False))
        )
        assert [event.numbers for event in found] == [[0], [1], [2], [3]]
        assert [event.value for event in found] == pytest.approx(alone.value, rel=1e-12)

    def test_large_frames_are_alone(self, monkeypatch: pytest.MonkeyPatch):
        """They would fill the memory, and are large enough for all threads to share."""
        monkeypatch.setattr("ase_uq.stream.passes.FILLS_A_CPU", 2)
        at_work = threading.Lock()

        def use(forward_pass: ForwardPass) -> int:
            assert at_work.acquire(blocking=False), "two at a time"
            time.sleep(0.01)
            at_work.release()
            return torch.get_num_threads()

        events = passes(load_backend("toy:"), Source(TEST[:4]), use, batch_atoms=2, forces=False)
        assert [event.value for event in complete(events)] == [2] * 4

    def test_memory_that_other_batches_hold_ends_nothing(self):
        """A frame that does not fit beside another one is evaluated again, alone."""
        at_work = threading.Lock()

        def use(forward_pass: ForwardPass) -> int:
            if not at_work.acquire(blocking=False):
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB.")
            time.sleep(0.02)
            at_work.release()
            return forward_pass.n_frames

        events = passes(load_backend("toy:"), Source(TEST[:6]), use, batch_atoms=1, forces=False)
        assert [event.value for event in complete(events)] == [1] * 6

    @pytest.mark.parametrize("why", ["the potential does not allow it", "gradients"])
    def test_one_at_a_time(self, why: str, monkeypatch: pytest.MonkeyPatch):
        if why != "gradients":
            monkeypatch.setattr(ToyBackend, "is_concurrent", False)
        events = passes(
            load_backend("toy:"),
            Source(TEST[:4]),
            lambda _: threading.current_thread().name,
            batch_atoms=1000,
            gradients=why == "gradients",
        )
        assert {event.value for event in complete(events)} == {threading.current_thread().name}

    def test_an_error_ends_all_and_restores_the_threads(self):
        with pytest.raises(ZeroDivisionError):
            list(passes(load_backend("toy:"), Source(TEST), lambda _: 1 // 0, batch_atoms=40))
        assert torch.get_num_threads() == 2


class TestShards:
    def numbers(self, communicators: Iterator[Rank], **options) -> list[list[int]]:
        return [
            [
                number
                for event in complete(iter(energies(TEST, communicator=one, **options)))
                for number in event.numbers
            ]
            for one in communicators
        ]

    @pytest.mark.parametrize("size", [2, 7, 40])
    def test_of_all_ranks_are_all_frames_once(self, size: int):
        found = self.numbers(Rank(rank, size) for rank in range(size))
        assert sorted(number for part in found for number in part) == list(range(len(TEST)))
        if size == 40:
            assert [] in found, "a rank may have none"

    def test_do_not_depend_on_how_full_a_device_is(self, small_device: Callable[[int], list[int]]):
        alone = self.numbers(Rank(rank, 2) for rank in range(2))
        small_device(20)
        assert self.numbers(Rank(rank, 2) for rank in range(2)) == alone


def test_with_gradients_each_structure_stands_alone():
    events = energies(TEST[:5], gradients=True, communicator=Serial())
    assert [len(event.frames) for event in complete(iter(events))] == [1] * 5
