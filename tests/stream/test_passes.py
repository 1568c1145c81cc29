"""The one loop over frames: every user of it survives a full device, learns what was left out, and can be sharded."""

from collections.abc import Callable, Iterator
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
