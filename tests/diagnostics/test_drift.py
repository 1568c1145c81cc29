"""Drift of a potential that was trained further: known answers, and what is not the same architecture."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics.comparison import compare
from ase_uq.diagnostics.drift import drift
from ase_uq.diagnostics.features import Latent
from ase_uq.diagnostics.reconstruction import gfre
from ase_uq.errors import InputError, PotentialMismatch
from ase_uq.forward_pass import ForwardPass

SHAPE = torch.randn(48, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    rng = np.random.default_rng(0)
    made = [molecule(("H2O", "CH3OH")[number % 2]) for number in range(80)]
    for atoms in made:
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
    return made


class Trained:
    """Features of a backend that were changed as training does; the same function for both."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.old, self.new = (load_backend(ToyCalculator(("H", "C", "O"))) for _ in range(2))
        self._patch = monkeypatch

    def changed(self, change) -> tuple[Latent, Latent]:
        for backend, what in ((self.old, lambda rows: rows), (self.new, change)):
            forward = backend._forward

            def altered(*arguments, forward=forward, what=what):
                found = forward(*arguments)
                object.__setattr__(found, "features", what(found.features[:, :48] @ SHAPE))
                return found

            self._patch.setattr(backend, "_forward", altered)
        return Latent(self.old), Latent(self.new)


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> Trained:
    return Trained(monkeypatch)


def rows_of(backend: Backend, frames: list[Atoms]) -> np.ndarray:
    return backend.forward(backend.collate(frames)).features.numpy()


def test_the_same_potential_did_not_move(frames: list[Atoms]):
    found = drift(*(ToyCalculator(("H", "C", "O")) for _ in range(2)), frames * 2, progress=False)
    assert max(found.gained, found.lost, found.moved, found.gained_within, found.moved_within) < 1e-4
    assert found.n_frames == 160


def test_features_that_turned_moved_but_lost_nothing(trained: Trained, frames: list[Atoms]):
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    old, new = trained.changed(lambda rows: rows @ turn)
    found = drift(old, new, frames, progress=False)
    assert max(found.gained, found.lost) < 1e-6
    x, y = (rows_of(each.backend, frames) for each in (old, new))
    moved = np.sqrt(np.mean(np.sum((y - x) ** 2, axis=1)))
    assert found.moved == pytest.approx(moved / np.sqrt(x.var(0).sum()), rel=1e-8)
    numbers = np.concatenate([atoms.numbers for atoms in frames])
    within = np.concatenate([x[numbers == z] - x[numbers == z].mean(0) for z in (1, 6, 8)])
    assert found.moved_within == pytest.approx(moved / np.sqrt(np.mean(np.sum(within**2, axis=1))), rel=0.05)


def test_features_that_were_forgotten_are_lost(trained: Trained, frames: list[Atoms]):
    keep = torch.cat([torch.ones(4), torch.zeros(5)])
    old, new = trained.changed(lambda rows: rows * keep)
    found = drift(old, new, frames, progress=False)
    assert found.gained < 1e-6
    assert found.lost > 0.1
    assert found.lost_within > found.lost
    assert found.lost == pytest.approx(gfre(old, new, frames, progress=False)[1], rel=1e-9)
    assert f"{found.lost:.3f} ({found.lost_within:.2f}) not from the new ones" in found.describe()


def test_a_comparison_has_the_drift_of_equal_architectures(trained: Trained, frames: list[Atoms]):
    old, new = trained.changed(lambda rows: torch.tanh(rows))
    other = Latent(load_backend(ToyCalculator(("H", "C", "O"), direct=True)), some)
    found = compare({"old": old, "new": new, "other": other}, frames, n_bootstrap=0, progress=False)
    assert list(found.drifts) == [("old", "new")]
    alone = drift(old, new, frames, progress=False)
    assert vars(found.drifts["old", "new"]) == pytest.approx(vars(alone), rel=1e-4)
    assert f"From old to new, which have the same architecture: {alone.describe()}" in found.table()
    assert found.numbers()["drifts"][0]["gained"] == pytest.approx(alone.gained)


def some(forward_pass: ForwardPass) -> torch.Tensor:
    return forward_pass.features[:, :48] @ SHAPE


def test_another_architecture_is_refused(frames: list[Atoms]):
    small, large = ToyCalculator(("H", "O")), ToyCalculator(("H", "C", "O"))
    with pytest.raises(
        PotentialMismatch, match=r"weights weights are 27 in the old potential, 54 in the new one.*ase-uq compare"
    ):
        drift(small, large, frames, progress=False)
    with pytest.raises(PotentialMismatch, match="weights force_weights are missing in the old potential, 162 × 3"):
        drift(large, ToyCalculator(("H", "C", "O"), direct=True), frames, progress=False)


def test_another_package_is_refused(monkeypatch: pytest.MonkeyPatch, frames: list[Atoms]):
    old, new = (load_backend(ToyCalculator(("H", "C", "O"))) for _ in range(2))
    monkeypatch.setattr(new, "name", "other")
    with pytest.raises(PotentialMismatch, match="the old potential is of toy, the new one of other"):
        drift(old, new, frames, progress=False)


def test_other_features_are_refused(frames: list[Atoms]):
    backend = load_backend(ToyCalculator(("H", "C", "O")))
    with pytest.raises(PotentialMismatch, match="other features of the new potential were chosen"):
        drift(backend, Latent(backend, some), frames, progress=False)


def test_too_few_atoms_are_refused(frames: list[Atoms]):
    with pytest.raises(InputError, match="old has 55 features"):
        drift(*(ToyCalculator(("H", "C", "O")) for _ in range(2)), frames[:8], progress=False)
