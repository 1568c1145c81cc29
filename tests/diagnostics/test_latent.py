import numpy as np
import pytest
from ase.build import molecule

from ase_uq.backends import load_backend
from ase_uq.diagnostics.latent import evenly, frame_features, principal_plane


def test_features_of_a_frame_are_the_mean_over_its_atoms_whatever_the_batch():
    backend = load_backend("toy:")
    frames = [molecule(name) for name in ("H2O", "CH3CH2OH", "CH4")]
    expected = [backend.forward(backend.collate([atoms])).features.mean(0).numpy() for atoms in frames]
    for batch_atoms in (1, 12, 1000):
        np.testing.assert_allclose(frame_features(backend, frames, batch_atoms=batch_atoms), expected)


def test_the_plane_is_that_of_scikit_learn():
    decomposition = pytest.importorskip("sklearn.decomposition")
    rows = np.random.default_rng(0).normal(size=(200, 6)) * [5, 0.1, 3, 0.2, 1, 0.1] + 7
    plane = principal_plane({"all": rows})
    oracle = decomposition.PCA(2).fit(rows)
    np.testing.assert_allclose(np.abs(plane.coordinates["all"]), np.abs(oracle.transform(rows)), atol=1e-9)
    np.testing.assert_allclose(plane.explained, oracle.explained_variance_ratio_)


def test_a_group_weighs_the_same_however_many_frames_it_has():
    rng = np.random.default_rng(0)
    few, many = rng.normal(size=(20, 4)) * [9, 1, 1, 1], rng.normal(size=(30, 4))
    once = principal_plane({"a": few, "b": many})
    often = principal_plane({"a": few, "b": np.tile(many, (50, 1))})
    np.testing.assert_allclose(once.coordinates["a"], often.coordinates["a"], atol=1e-9)
    np.testing.assert_allclose(once.explained, often.explained)


def test_one_frame_and_one_feature_have_a_plane():
    plane = principal_plane({"a": np.ones((1, 1)), "b": np.zeros((1, 1))})
    np.testing.assert_allclose(plane.coordinates["a"], [[0.5, 0]])
    np.testing.assert_allclose(principal_plane({"a": np.ones((1, 3))}).coordinates["a"], [[0, 0]])


@pytest.mark.parametrize("groups", [{}, {"a": np.ones((0, 3))}])
def test_no_frames_are_no_map(groups):
    with pytest.raises(ValueError, match="at least one group, and frames in each"):
        principal_plane(groups)


def test_evenly_spaced_frames():
    frames = list(range(1000))
    assert evenly(frames, 5) == [0, 250, 500, 749, 999]
    assert evenly(frames[:3], 5) == [0, 1, 2]
