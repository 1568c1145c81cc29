"""Reconstruction errors are those of scikit-matter, with the same rows for training and for the regularisation."""

import numpy as np
import pytest
import torch
from skmatter.linear_model import Ridge2FoldCV
from skmatter.metrics import (
    global_reconstruction_distortion,
    global_reconstruction_error,
    pointwise_global_reconstruction_error,
    pointwise_local_reconstruction_error,
)

from ase_uq.numerics.local_reconstruction import local_errors
from ase_uq.numerics.moments import Moments
from ase_uq.numerics.reconstruction import CUTOFFS, LinearMap, fitted_map

N_TRAIN, N_TEST = 240, 150
SOURCE, TARGET = slice(0, 6), slice(6, 15)
TRAIN, TEST = np.arange(N_TRAIN), np.arange(N_TRAIN, N_TRAIN + N_TEST)


def rows(seed: int = 0) -> torch.Tensor:
    """Joint rows: a source with a wide spectrum far from zero, and a target that is curved in it."""
    rng = np.random.default_rng(seed)
    source = rng.normal(size=(N_TRAIN + N_TEST, 6)) * np.geomspace(1, 1e-3, 6) + 20
    hidden = np.tanh((source - 20) @ rng.normal(size=(6, 9)) * 1.5)
    return torch.from_numpy(np.hstack([source, hidden + 0.05 * rng.normal(size=hidden.shape) - 3]))


def fit(data: torch.Tensor, source: slice = SOURCE, target: slice = TARGET) -> LinearMap:
    even, odd = (Moments.of(data[:N_TRAIN][start::2]) for start in (0, 1))
    return fitted_map((even, odd), source, target)


def ridge(n: int) -> Ridge2FoldCV:
    """With our cutoffs and folds, and squared errors for its score."""
    folds = [(np.arange(0, n, 2), np.arange(1, n, 2))]
    how = {"alpha_type": "relative", "regularization_method": "cutoff", "scoring": "neg_mean_squared_error"}
    return Ridge2FoldCV(alphas=CUTOFFS, cv=folds, **how)


@pytest.mark.parametrize("seed", range(4))
def test_the_global_errors_are_those_of_scikit_matter(seed: int):
    data = rows(seed)
    x, y = data[:, SOURCE].numpy(), data[:, TARGET].numpy()
    found, test = fit(data), Moments.of(data[N_TRAIN:])
    how = {"train_idx": TRAIN, "test_idx": TEST, "estimator": ridge(N_TRAIN)}
    assert found.mean_square(test) ** 0.5 == pytest.approx(global_reconstruction_error(x, y, **how), rel=1e-9)
    assert found.mean_square_distortion(test) ** 0.5 == pytest.approx(
        global_reconstruction_distortion(x, y, **how), rel=1e-6
    )
    np.testing.assert_allclose(
        found.errors(data[N_TRAIN:]), pointwise_global_reconstruction_error(x, y, **how), rtol=1e-8
    )


def test_the_error_of_all_rows_is_the_root_mean_square_of_the_errors_of_each():
    data = rows()
    found = fit(data)
    square = found.errors(data[N_TRAIN:]).square().mean()
    assert found.mean_square(Moments.of(data[N_TRAIN:])) == pytest.approx(float(square), rel=1e-10)


@pytest.mark.parametrize("n_neighbours", [5, 24])
def test_the_local_errors_are_those_of_scikit_matter(n_neighbours: int):
    data = rows()
    x, y = data[:, SOURCE].numpy(), data[:, TARGET].numpy()
    few = TEST[:20]  # each takes them many milliseconds
    found = local_errors(data[:N_TRAIN], data[few], SOURCE, TARGET, n_neighbours)
    how = {"train_idx": TRAIN, "test_idx": few, "estimator": ridge(n_neighbours)}
    np.testing.assert_allclose(found, pointwise_local_reconstruction_error(x, y, n_neighbours, **how), rtol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_linear_image_is_reconstructed_to_nothing(dtype: torch.dtype):
    source = rows()[:, :6].to(dtype)
    turn = torch.from_numpy(np.random.default_rng(1).normal(size=(6, 9))).to(dtype)
    image = source.double() @ turn.double() * 1e3 + 5
    data = torch.cat([source.double(), image], 1)
    test = Moments.of(data[N_TRAIN:])
    assert fit(data).mean_square(test) ** 0.5 < 1e-6
    assert fit(data, SOURCE, SOURCE).mean_square(test) ** 0.5 < 1e-6
    assert float(local_errors(data[:N_TRAIN], data[N_TRAIN:], SOURCE, TARGET, 20).max()) < 1e-6


def test_features_that_were_only_turned_are_not_distorted():
    source = rows()[:, :6]
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(1).normal(size=(6, 6))))[0]
    data = torch.cat([source, 7 * source @ turn], 1)
    found, test = fit(data, SOURCE, slice(6, 12)), Moments.of(data[N_TRAIN:])
    assert found.mean_square_distortion(test) ** 0.5 < 1e-6
    stretched = torch.cat([source, source * torch.arange(1.0, 7)], 1)
    assert fit(stretched, SOURCE, slice(6, 12)).mean_square_distortion(Moments.of(stretched[N_TRAIN:])) ** 0.5 > 0.1


def test_more_features_than_the_target_has_are_no_hindrance_to_the_distortion():
    data = rows()
    found = fit(data, TARGET, SOURCE)
    # Against the dense form, with the target continued with zeros.
    x = found.pair.features(data)[0].numpy()
    predicted = np.pad(x @ found.weights.numpy(), ((0, 0), (0, 3)))
    left, _, right = np.linalg.svd(x[:N_TRAIN].T @ predicted[:N_TRAIN])
    expected = np.sqrt(np.mean(np.sum((predicted - x @ left @ right)[N_TRAIN:] ** 2, axis=1)))
    assert found.mean_square_distortion(Moments.of(data[N_TRAIN:])) ** 0.5 == pytest.approx(expected, rel=1e-6)


def test_noise_is_not_reconstructed_and_its_error_is_about_one():
    rng = torch.Generator().manual_seed(0)
    data = torch.randn(N_TRAIN + N_TEST, 15, generator=rng, dtype=torch.float64)
    assert 0.95 < fit(data).mean_square(Moments.of(data[N_TRAIN:])) ** 0.5 < 1.15


def test_scales_and_turns_of_either_side_change_nothing():
    data = rows()
    turn = torch.linalg.qr(torch.from_numpy(np.random.default_rng(2).normal(size=(9, 9))))[0]
    other = torch.cat([data[:, SOURCE] * 30 - 1, data[:, TARGET] @ turn * 1e-4 + 2], 1)
    before, after = (fit(each).mean_square(Moments.of(each[N_TRAIN:])) for each in (data, other))
    assert after == pytest.approx(before, rel=1e-8)


def test_a_curved_path_is_followed_locally():
    angle = torch.linspace(0, 6, N_TRAIN + N_TEST, dtype=torch.float64)[torch.randperm(N_TRAIN + N_TEST)]
    data = torch.stack([angle, (3 * angle).sin(), (3 * angle).cos()], 1)
    found = fit(data, slice(0, 1), slice(1, 3)).mean_square(Moments.of(data[N_TRAIN:])) ** 0.5
    local = local_errors(data[:N_TRAIN], data[N_TRAIN:], slice(0, 1), slice(1, 3), 6).square().mean() ** 0.5
    assert found > 0.9
    assert local < 0.02


@pytest.mark.parametrize("which", [SOURCE, TARGET])
def test_features_that_do_not_vary_are_refused(which: slice):
    data = rows()
    data[:, which] = 3
    with pytest.raises(ValueError, match="the same for all atoms"):
        fit(data)
    with pytest.raises(ValueError, match="the same for all atoms"):
        local_errors(data[:N_TRAIN], data[N_TRAIN:], SOURCE, TARGET, 20)


@pytest.mark.parametrize("n_neighbours", [3, N_TRAIN + 1])
def test_as_many_neighbours_as_there_are(n_neighbours: int):
    data = rows()
    with pytest.raises(ValueError, match=f"n_neighbours is {n_neighbours}; at least 4 and at most the {N_TRAIN}"):
        local_errors(data[:N_TRAIN], data[N_TRAIN:], SOURCE, TARGET, n_neighbours)
