"""The activation kernel against dense algebra and the Gaussian processes of scikit-learn."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import RBF, DotProduct
from sklearn.gaussian_process.kernels import Kernel as SklearnKernel
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import LabelError
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods._distance import raw_of_atoms
from ase_uq.methods.kernel import Kernel
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames, with_labels

NOISE = 1e-4


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator(ELEMENTS))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(30, seed=11)


@pytest.fixture(scope="module")
def train(backend: Backend, frames: list[Atoms]) -> ForwardPass:
    return forward_pass_of(backend, frames)


@pytest.fixture(scope="module")
def new(backend: Backend) -> ForwardPass:
    return forward_pass_of(backend, labelled_frames(6, seed=12))


def atoms_of(forward_pass: ForwardPass, features: str = "latent") -> np.ndarray:
    return (forward_pass.features if features == "latent" else forward_pass.energy_layer.features).numpy()


def pooled(forward_pass: ForwardPass, pooling: str, features: str = "latent") -> np.ndarray:
    rows = atoms_of(forward_pass, features)
    pool = np.mean if pooling == "mean" else np.sum
    return np.stack([pool(rows[forward_pass.frame_of_atom == k], axis=0) for k in range(forward_pass.n_frames)])


def normalised(train: np.ndarray, at: np.ndarray, normalisation: str) -> tuple[np.ndarray, np.ndarray]:
    """Rows as the kernel is to see them, with a mean square of 1 over the training rows."""
    if normalisation == "cosine":
        return tuple(rows / np.linalg.norm(rows, axis=1, keepdims=True) for rows in (train, at))
    centre = train.mean(0) if normalisation == "centred" else 0.0
    unit = np.sqrt(((train - centre) ** 2).sum(1).mean())
    return (train - centre) / unit, (at - centre) / unit


def posterior_variance(kernel: SklearnKernel, train: np.ndarray, at: np.ndarray, noise: float) -> np.ndarray:
    process = GaussianProcessRegressor(kernel, alpha=noise, optimizer=None).fit(train, np.zeros(len(train)))
    return process.predict(at, return_std=True)[1] ** 2


def linear() -> SklearnKernel:
    return DotProduct(sigma_0=0.0, sigma_0_bounds="fixed")


class TestLinear:
    @pytest.mark.parametrize("features", ["latent", "last_layer"])
    @pytest.mark.parametrize("normalisation", ["centred", "global", "cosine"])
    def test_distance_is_the_posterior_variance_of_a_gaussian_process(
        self,
        backend: Backend,
        frames: list[Atoms],
        train: ForwardPass,
        new: ForwardPass,
        features: str,
        normalisation: str,
    ):
        """K1."""
        head = fit_head(
            Kernel(kernel="linear", features=features, normalisation=normalisation, noise=NOISE),
            backend,
            frames,
            batch_atoms=20,
        )
        rows, at = normalised(atoms_of(train, features), atoms_of(new, features), normalisation)
        fitted, expected = (posterior_variance(linear(), rows, x, NOISE) for x in (rows, at))
        # Variances of 1e-4 are differences of numbers near 1 in the kernel form.
        np.testing.assert_allclose(head(new).distance, expected / fitted.mean(), rtol=1e-5, atol=1e-5)
        found = head.settings["atoms"]
        assert found["rows"] == len(rows)
        assert found["effective"] == pytest.approx(fitted.sum() / NOISE, rel=1e-5)

    @pytest.mark.parametrize("pooling", ["mean", "sum"])
    def test_structures_have_a_kernel_of_their_own(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass, new: ForwardPass, pooling: str
    ):
        head = fit_head(Kernel(kernel="linear", pooling=pooling, noise=NOISE), backend, frames)
        rows, at = normalised(pooled(train, pooling), pooled(new, pooling), "centred")
        fitted, expected = (posterior_variance(linear(), rows, x, NOISE) for x in (rows, at))
        if pooling == "sum":  # of the total energy, as a variance of the energy per atom
            expected = expected / new.n_atoms_of_frame.numpy() ** 2
        raw = head(new)
        np.testing.assert_allclose(raw.energy[:, 1], expected / fitted.mean(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(raw.stress, raw.energy)

    def test_first_scores_are_those_of_the_atoms(self, backend: Backend, frames: list[Atoms], new: ForwardPass):
        raw = fit_head(Kernel(kernel="linear", radii=(2.0, 3.0)), backend, frames)(new)
        expected = [float(raw.distance[new.frame_of_atom == k].mean()) for k in range(new.n_frames)]
        np.testing.assert_allclose(raw.energy[:, 0], expected, rtol=1e-12)
        assert torch.equal(raw.energies, raw.distance)
        assert torch.equal(raw.forces, raw_of_atoms(raw.distance, new, (2.0, 3.0)).forces)

    def test_data_lower_it_before_scaling(self, backend: Backend, frames: list[Atoms], new: ForwardPass):
        """K2; the settings hold what the variance was divided by."""
        found = []
        for count in (10, 30):
            head = fit_head(Kernel(kernel="linear", normalisation="cosine", noise=NOISE), backend, frames[:count])
            atoms = head.settings["atoms"]
            found.append(head(new).distance * atoms["effective"] * NOISE / atoms["rows"])
        assert bool((found[1] <= found[0] * (1 + 1e-9)).all())

    def test_fitted_atoms_have_less_than_the_noise(self, backend: Backend, frames: list[Atoms], train: ForwardPass):
        """K2."""
        head = fit_head(Kernel(kernel="linear", noise=NOISE), backend, frames)
        atoms = head.settings["atoms"]
        variance = head(train).distance * atoms["effective"] * NOISE / atoms["rows"]
        assert float(variance.max()) < NOISE

    def test_copies_of_the_training_set_change_only_what_the_noise_is_to_it(
        self, backend: Backend, frames: list[Atoms], new: ForwardPass
    ):
        once = fit_head(Kernel(kernel="linear", noise=NOISE), backend, frames)
        thrice = fit_head(Kernel(kernel="linear", noise=3 * NOISE), backend, frames * 3)
        torch.testing.assert_close(thrice(new).distance, once(new).distance, rtol=1e-9, atol=0)

    def test_an_atom_torn_off_is_far_about_the_centre_and_near_about_zero(self, backend: Backend, frames: list[Atoms]):
        """Its features vanish: the reason for the default."""
        apart = molecule("H2O")
        apart.positions *= 20
        batch = forward_pass_of(backend, [apart])
        centred = fit_head(Kernel(kernel="linear"), backend, frames)(batch).distance
        about_zero = fit_head(Kernel(kernel="linear", normalisation="global"), backend, frames)(batch).distance
        assert float(centred.min()) > 1
        assert float(about_zero.max()) == 0
        assert float(fit_head(Kernel(kernel="rbf"), backend, frames)(batch).distance.min()) > 1


class TestRBF:
    @pytest.mark.parametrize("normalisation", ["centred", "cosine"])
    def test_with_every_row_a_landmark_it_is_a_gaussian_process(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass, new: ForwardPass, normalisation: str
    ):
        """K1 of the non-linear kernel."""
        method = Kernel(kernel="rbf", normalisation=normalisation, noise=1e-3, length=1.0)
        head = fit_head(method, backend, frames, batch_atoms=20)
        rows, at = atoms_of(train), atoms_of(new)
        if normalisation == "cosine":
            rows, at = normalised(rows, at, "cosine")
        found = head.settings["atoms"]
        distances = np.linalg.norm(rows[:, None] - rows, axis=2)[np.triu_indices(len(rows), 1)]
        assert found["length"] == pytest.approx(np.median(distances), rel=1e-3)  # torch takes the lower of two
        kernel = RBF(found["length"], "fixed")
        fitted, expected = (posterior_variance(kernel, rows, x, 1e-3) for x in (rows, at))
        np.testing.assert_allclose(head(new).distance, expected / fitted.mean(), rtol=1e-4, atol=1e-5)
        rows, at = (pooled(forward_pass, "mean") for forward_pass in (train, new))
        if normalisation == "cosine":
            rows, at = normalised(rows, at, "cosine")
        kernel = RBF(head.settings["frames"]["length"], "fixed")
        fitted, expected = (posterior_variance(kernel, rows, x, 1e-3) for x in (rows, at))
        np.testing.assert_allclose(head(new).energy[:, 1], expected / fitted.mean(), rtol=1e-4, atol=1e-5)

    def test_far_away_everything_is_unknown(self, backend: Backend, frames: list[Atoms]):
        """Landmark features vanish there; the variance must not."""
        head = fit_head(Kernel(kernel="rbf", landmarks=5), backend, frames)
        far = head.atoms(1e6 * torch.ones(1, head.atoms.landmarks.shape[1], dtype=torch.float64))
        assert float(far * head.atoms.mean) == pytest.approx(1.0)

    def test_more_landmarks_never_raise_what_they_cannot_represent(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass
    ):
        """Noise far below it shows the first two terms alone."""
        found = []
        for landmarks in (30, 60):  # both keep all rows of the 138 atoms
            head = fit_head(Kernel(kernel="rbf", landmarks=landmarks, noise=1e-14), backend, frames)
            assert head.settings["atoms"]["landmarks"] == landmarks
            found.append(head(train).distance * head.atoms.mean)
        assert float((found[1] - found[0]).max()) < 1e-9

    def test_a_sample_is_as_large_as_it_may_be_and_stands_for_all(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass
    ):
        head = fit_head(Kernel(kernel="rbf", landmarks=8), backend, frames)
        found = head.settings["atoms"]
        assert (found["rows"], found["sample"], found["landmarks"]) == (len(train.numbers), 64, 8)
        assert len(head.atoms.landmarks) == 8
        assert float(head(train).distance.mean()) == pytest.approx(1.0, rel=0.3)

    def test_landmarks_are_training_rows(self, backend: Backend, frames: list[Atoms], train: ForwardPass):
        head = fit_head(Kernel(kernel="rbf", landmarks=8), backend, frames)
        landmarks = head.atoms.landmarks * head.atoms.length
        assert float(torch.cdist(landmarks, train.features).amin(1).max()) < 1e-7

    def test_frames_that_are_all_alike_have_no_length_scale(self, backend: Backend):
        alike = with_labels([molecule("H2O") for _ in range(12)])
        with pytest.raises(LabelError, match=r"all 36 training rows have the same features|all 12"):
            fit_head(Kernel(kernel="rbf"), backend, alike)


class TestFeatures:
    def test_inner_products_of_linear_ones_are_the_kernel(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass, new: ForwardPass
    ):
        head = fit_head(Kernel(kernel="linear"), backend, frames)
        centre = atoms_of(train).mean(0)
        np.testing.assert_allclose(head.features(new), atoms_of(new) - centre, rtol=1e-9, atol=1e-12)
        assert head.measures

    def test_inner_products_with_landmarks_are_the_rbf_kernel(
        self, backend: Backend, frames: list[Atoms], train: ForwardPass, new: ForwardPass
    ):
        """Landmarks are represented exactly: with every row one of them, so is any kernel with a training row."""
        head = fit_head(Kernel(kernel="rbf", length=1.0), backend, frames)
        assert head.settings["atoms"]["landmarks"] < len(atoms_of(train))  # copies have no pivot left
        fitted, at = head.features(train).numpy(), head.features(new).numpy()
        expected = RBF(head.settings["atoms"]["length"])(atoms_of(new), atoms_of(train))
        np.testing.assert_allclose(at @ fitted.T, expected, rtol=1e-4, atol=1e-4)


class TestRefusals:
    def test_frames_that_are_all_the_same_structure(self, backend: Backend):
        alike = with_labels([molecule("H2O") for _ in range(12)])
        with pytest.raises(LabelError, match="all training frames have the same features"):
            fit_head(Kernel(kernel="linear"), backend, alike)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"features": "first"}, "features is one of 'latent', 'last_layer', not 'first'"),
            ({"kernel": "matern"}, "kernel is one of 'linear', 'rbf', not 'matern'"),
            ({"normalisation": "none"}, "normalisation is one of 'centred', 'global', 'cosine', not 'none'"),
            ({"pooling": "max"}, "pooling is one of 'mean', 'sum', not 'max'"),
            ({"noise": 0.0}, "the noise is above 0 and at most 1, not 0.0"),
            ({"noise": float("nan")}, "the noise is above 0 and at most 1, not nan"),
            ({"length": 0.0}, "the length scale is above 0, not 0.0"),
            ({"landmarks": 0}, "at least 1 landmark is needed, not 0"),
            ({"radii": (0.0,)}, "radii are lengths in Å above 0"),
        ],
    )
    def test_options(self, options: dict, message: str):
        with pytest.raises(ValueError, match=message):
            Kernel(**options)


def test_one_forward_pass_is_all_it_takes():
    assert not Kernel.gradients
    assert not Kernel.forces


@pytest.mark.parametrize("kernel", ["linear", "rbf"])
def test_single_precision_potentials_are_fitted_in_double(frames: list[Atoms], kernel: str):
    backend = load_backend(ToyCalculator(ELEMENTS, dtype="float32"))
    head = fit_head(Kernel(kernel=kernel), backend, frames)
    assert all(tensor.dtype == torch.float64 for tensor in head.state_dict().values())
    distance: Tensor = head(forward_pass_of(backend, frames)).distance
    assert float(distance.mean()) == pytest.approx(1.0, rel=1e-5)
