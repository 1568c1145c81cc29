"""Reconstruction errors between potentials: known answers, those of scikit-matter, and what is wrong with input."""

import math
import re
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import bulk, molecule
from skmatter.linear_model import Ridge2FoldCV
from skmatter.metrics import pointwise_global_reconstruction_error

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.diagnostics import features
from ase_uq.diagnostics.features import Latent, LatentStream, last_layer
from ase_uq.diagnostics.reconstruction import gather, gfrd, gfre, lfre, pointwise_errors, quarter_of
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.source import Source
from ase_uq.numerics.local_reconstruction import local_errors
from ase_uq.numerics.reconstruction import CUTOFFS

SHAPE = torch.randn(48, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def shaken(n_frames: int, seed: int = 0, *names: str) -> list[Atoms]:
    rng = np.random.default_rng(seed)
    frames = []
    for number in range(n_frames):
        atoms = molecule((names or ("H2O", "CH3OH"))[number % max(1, len(names) or 2)])
        atoms.positions += 0.1 * rng.normal(size=(len(atoms), 3))
        frames.append(atoms)
    return frames


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(("H", "C", "O")))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return shaken(140)


def some(forward_pass: ForwardPass) -> torch.Tensor:
    """Nine mixtures of the features."""
    return forward_pass.features[:, :48] @ SHAPE[: min(48, forward_pass.features.shape[1])]


def curved(forward_pass: ForwardPass) -> torch.Tensor:
    return torch.tanh(some(forward_pass))


def rows_of(latent: Latent, frames: Sequence[Atoms]) -> np.ndarray:
    passes = [latent.backend.forward(latent.backend.collate([atoms])) for atoms in frames]
    return torch.cat([latent.features(each) for each in passes]).numpy()


def stream(backend: Backend, frames: Sequence[Atoms], **how) -> LatentStream:
    pair = {"first": Latent(backend, some), "second": Latent(backend, curved)}
    return LatentStream(pair, Source(frames), **({"batch_atoms": None} | how))


def test_a_potential_has_itself_and_its_linear_images(backend: Backend, frames: list[Atoms]):
    there, back = gfre(backend, Latent(backend, some), frames, progress=False)
    assert there < 1e-6  # nothing of nine mixtures is new
    assert back > 0.1  # but they are not all
    assert max(gfre(backend, backend, frames, progress=False)) < 1e-6
    one = Latent(backend, some)
    assert max(value for value, _, _ in lfre(one, one, frames, n_neighbours=60, progress=False)) < 1e-6


def test_features_that_are_turned_have_no_distortion(backend: Backend, frames: list[Atoms]):
    turn = torch.linalg.qr(torch.randn(9, 9, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    turned = Latent(backend, lambda forward_pass: 3 * some(forward_pass) @ turn)
    assert max(gfrd(Latent(backend, some), turned, frames, progress=False)) < 1e-6
    assert min(gfrd(Latent(backend, some), Latent(backend, curved), frames, progress=False)) > 0.1


def test_both_halves_are_judged_as_scikit_matter_does(backend: Backend, frames: list[Atoms]):
    one, other = Latent(backend, some), Latent(backend, curved)
    frames = frames[:40]
    found = pointwise_errors(one, other, frames, progress=False)
    quarter = quarter_of(torch.from_numpy(found.frame), 1).numpy()
    for pair in ((one, other), (other, one)):
        x, y = (rows_of(each, frames) for each in pair)
        expected = np.zeros(len(x))
        for train in (0, 1):
            rows, test = np.flatnonzero(quarter // 2 == train), np.flatnonzero(quarter // 2 != train)
            folds = [tuple(np.flatnonzero(quarter[rows] == 2 * train + fold) for fold in (0, 1))]
            how = {"alpha_type": "relative", "regularization_method": "cutoff", "scoring": "neg_mean_squared_error"}
            estimator = Ridge2FoldCV(alphas=CUTOFFS, cv=folds, **how)
            expected[test] = pointwise_global_reconstruction_error(
                x, y, train_idx=rows, test_idx=test, estimator=estimator
            )
        names = ("first", "second") if pair[0] is one else ("second", "first")
        np.testing.assert_allclose(found.errors[names], expected, rtol=1e-5)
        total = gfre(one, other, frames, progress=False)[names == ("second", "first")]
        assert total == pytest.approx(np.sqrt(np.mean(expected**2)), rel=1e-6)


def test_atoms_are_named(backend: Backend, frames: list[Atoms]):
    found = pointwise_errors(Latent(backend, some), Latent(backend, curved), frames, progress=False)
    assert found.numbers.tolist() == [z for atoms in frames for z in atoms.numbers]
    assert found.frame.tolist() == [n for n, atoms in enumerate(frames) for _ in atoms]
    assert found.place.tolist() == [place for atoms in frames for place in range(len(atoms))]


def test_errors_are_set_beside_the_spread_within_elements(backend: Backend, frames: list[Atoms]):
    one = Latent(backend, some)
    blind = Latent(backend, lambda forward_pass: (forward_pass.numbers[:, None] == torch.tensor([1, 6, 8])).double())
    found = pointwise_errors(one, blind, frames, progress=False)
    y = rows_of(one, frames)
    scale = np.sqrt(y.var(0).sum())
    for z in (1, 6, 8):
        mine = found.numbers == z
        expected = np.linalg.norm(y[mine] - y[mine].mean(0), axis=1) / scale
        np.testing.assert_allclose(found.spreads["first"][mine], expected, rtol=0.1)  # the scale is that of a half
        assert found.beyond_elements(("second", "first"), mine) == pytest.approx(1, abs=0.05)
    assert found.beyond_elements(("second", "first")) == pytest.approx(1, abs=0.03)
    assert math.isnan(found.beyond_elements(("first", "second")))  # which has no spread within elements


@pytest.mark.parametrize("batch_atoms", [1, 17])
def test_batches_change_nothing(batch_atoms: int, backend: Backend, frames: list[Atoms]):
    pair, frames = (Latent(backend, some), Latent(backend, curved)), frames[:40]
    how = {"progress": False}
    assert gfre(*pair, frames, batch_atoms=batch_atoms, **how) == pytest.approx(gfre(*pair, frames, **how), rel=1e-8)
    one, all_ = (pointwise_errors(*pair, frames, batch_atoms=n, **how).errors for n in (batch_atoms, None))
    np.testing.assert_allclose(one["first", "second"], all_["first", "second"], rtol=1e-5)


def test_potentials_whose_batches_differ_stay_in_step(monkeypatch: pytest.MonkeyPatch, frames: list[Atoms]):
    """One of the two cannot take more than a molecule at a time."""
    fast, slow = (load_backend(ToyCalculator(("H", "C", "O"))) for _ in range(2))
    forward = slow._forward

    def narrow(batch, *arguments):
        if len(batch.frames) > 1:
            raise torch.OutOfMemoryError("out of memory")
        return forward(batch, *arguments)

    monkeypatch.setattr(slow, "_forward", narrow)
    assert max(gfre(fast, slow, frames, batch_atoms=1500, progress=False)) < 1e-6


@pytest.mark.parametrize("room", [2**20, 100])
def test_what_does_not_fit_is_evaluated_again(room: int, monkeypatch: pytest.MonkeyPatch, frames: list[Atoms]):
    backend = load_backend(ToyCalculator(("H", "C", "O")))
    forward, calls = backend._forward, []

    def counted(*arguments):
        calls.append(1)
        return forward(*arguments)

    monkeypatch.setattr(backend, "_forward", counted)
    monkeypatch.setattr(features, "_KEPT", room)
    found = pointwise_errors(Latent(backend, some), Latent(backend, curved), frames, batch_atoms=45, progress=False)
    n_of_one = len(calls)
    assert len(found.frame) == sum(map(len, frames))
    gather(stream(backend, frames, batch_atoms=45), 1)
    once = len(calls) - n_of_one
    assert n_of_one == pytest.approx(once if room > 1000 else 2 * once, abs=1)  # and the probe for the cutoff


def test_local_errors_are_of_a_sample_of_each_half(backend: Backend, frames: list[Atoms]):
    pair, frames = (Latent(backend, some), Latent(backend, curved)), frames[:80]
    how = {"n_neighbours": 20, "progress": False}
    there, _ = lfre(*pair, frames, **how)
    x, y = (rows_of(each, frames) for each in pair)
    rows = torch.from_numpy(np.hstack([x, y]))
    frame = torch.repeat_interleave(torch.tensor([len(atoms) for atoms in frames]))
    half = quarter_of(frame, 1) // 2
    columns = slice(0, 9), slice(9, 18)
    errors = [local_errors(rows[half != each], rows[half == each], *columns, 20) for each in (0, 1)]
    assert there.value == pytest.approx(float(torch.cat(errors).square().mean() ** 0.5), rel=1e-9)
    assert there.low < there.value < there.high
    assert there.value < gfre(*pair, frames, progress=False)[0]  # the path is smooth
    again, _ = lfre(*pair, frames, **how)
    assert again == there
    few, _ = lfre(*pair, frames, n_sampled=100, **how)
    assert few.low < there.value * 1.5
    assert few != there
    assert math.isnan(lfre(*pair, frames, n_bootstrap=0, **how)[1].low)


def test_of_any_four_blocks_each_quarter_has_one_and_there_is_no_period():
    frames = torch.arange(4000)
    for block in (1, 5):
        found = quarter_of(frames, block).reshape(-1, block)
        assert bool((found == found[:, :1]).all())
        fours = found[:, 0].reshape(-1, 4)
        assert bool((fours.sort(1).values == torch.arange(4)).all())
        assert len({tuple(row) for row in fours.tolist()}) == 24


def test_layers_of_a_potential_are_compared(backend: Backend, frames: list[Atoms]):
    all_features, last = gfre(backend, Latent(backend, last_layer), frames, progress=False)
    assert all_features < 1e-6
    assert last > 1e-4  # the norm of the directions is not in the last layer


@pytest.mark.usefixtures("terminal")
def test_a_bar_is_shown(backend: Backend, frames: list[Atoms], capsys: pytest.CaptureFixture):
    gfre(Latent(backend, some), Latent(backend, curved), frames)
    assert re.search(r"features: +\d+%.*/140", capsys.readouterr().err)


class TestRefusals:
    def test_no_element_in_common(self):
        one, other = ToyCalculator(("H", "O")), ToyCalculator(("Si",))
        with pytest.raises(InputError, match=r"no element in common.*first: H, O; second: Si"):
            gfre(one, other, shaken(8), progress=False)

    def test_a_frame_that_one_cannot_evaluate(self, backend: Backend):
        small = load_backend(ToyCalculator(("H", "O")))
        with pytest.raises(InputError, match=r"second: frame 1 cannot be used: .*C"):
            gfre(backend, small, shaken(8), progress=False)

    def test_fewer_atoms_than_features(self, backend: Backend):
        n = rows_of(Latent(backend), shaken(1)).shape[1]
        with pytest.raises(InputError, match=rf"first has {n} features, but a half .* only 15 atoms.*at least {n + 1}"):
            gfre(backend, backend, shaken(8), progress=False)
        frames = math.ceil(2 * (n + 1) * 8 / 36)
        with pytest.raises(InputError, match=f"about {frames} frames like these 8"):
            gfre(backend, backend, shaken(8), progress=False)

    def test_too_few_frames(self, backend: Backend):
        with pytest.raises(InputError, match="there are 3 frames; with blocks of 1, at least 4"):
            gfre(backend, backend, shaken(3), progress=False)
        with pytest.raises(InputError, match="there are 0 frames"):
            gfre(backend, backend, [], progress=False)
        with pytest.raises(InputError, match="there are 8 frames; with blocks of 5, at least 20"):
            gfre(backend, backend, shaken(8), block=5, progress=False)

    def test_features_that_do_not_vary(self, backend: Backend, frames: list[Atoms]):
        flat = Latent(backend, lambda forward_pass: torch.ones(len(forward_pass.numbers), 3))
        with pytest.raises(InputError, match="first to second: the features are the same for all atoms"):
            gfre(backend, flat, frames, progress=False)

    def test_numbers_out_of_range(self, backend: Backend, frames: list[Atoms]):
        pair = Latent(backend, some), Latent(backend, curved)
        with pytest.raises(ValueError, match="block is 0, at least 1"):
            gfre(*pair, frames, block=0, progress=False)
        with pytest.raises(ValueError, match="n_sampled is -1, at least 0"):
            lfre(*pair, frames, n_sampled=-1, progress=False)
        with pytest.raises(ValueError, match="n_bootstrap is -2"):
            lfre(*pair, frames, n_bootstrap=-2, n_neighbours=20, progress=False)
        with pytest.raises(ValueError, match="n_neighbours is 2; at least 4"):
            lfre(*pair, frames, n_neighbours=2, progress=False)

    def test_more_neighbours_than_atoms(self, backend: Backend, frames: list[Atoms]):
        pair = Latent(backend, some), Latent(backend, curved)
        with pytest.raises(InputError, match="n_neighbours is 90, but a half of the frames has only 50 sampled"):
            lfre(*pair, frames, n_neighbours=90, n_sampled=50, progress=False)

    def test_what_no_backend_knows(self, frames: list[Atoms]):
        with pytest.raises(TypeError, match="no backend knows"):
            gfre(bulk("Si"), "toy:", frames, progress=False)  # pyright: ignore[reportArgumentType]
