"""The Gaussian mixture against scikit-learn's."""

import numpy as np
import pytest
import torch
from scipy.stats import multivariate_normal
from sklearn.mixture import GaussianMixture
from torch import Tensor

from ase_uq.communicator import Serial
from ase_uq.methods import gmm
from ase_uq.methods.gmm import GMM, Mixture, fit_mixture, fit_mixture_by_bic

from .builders import batches_of, evaluation_of


def blobs(count: int = 900, seed: int = 0) -> Tensor:
    """Three normal distributions of different shapes, apart from one another."""
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, 2, generator=random, dtype=torch.float64)
    shapes = torch.tensor([[[1.0, 0.8], [0.0, 0.4]], [[0.3, 0.0], [0.0, 1.0]], [[0.7, -0.5], [0.0, 0.7]]]).double()
    centres = torch.tensor([[0.0, 0.0], [6.0, 1.0], [-2.0, 7.0]]).double()
    kind = torch.arange(count) % 3
    return torch.einsum("nd,nde->ne", rows, shapes[kind]) + centres[kind]


def of_sklearn(oracle: GaussianMixture) -> Mixture:
    tensor = torch.from_numpy
    # precisions_cholesky_ is upper triangular U with Σ⁻¹ = UUᵀ.
    return Mixture(tensor(np.log(oracle.weights_)), tensor(oracle.means_), tensor(oracle.precisions_cholesky_).mT)


class TestMixture:
    def test_density_is_that_of_scipy_and_scikit_learn(self):
        rows = blobs()
        oracle = GaussianMixture(3, random_state=0).fit(rows.numpy())
        mixture = of_sklearn(oracle)
        np.testing.assert_allclose(mixture.log_density(rows), oracle.score_samples(rows.numpy()), rtol=1e-10)
        first = multivariate_normal(oracle.means_[0], oracle.covariances_[0]).logpdf(rows.numpy())
        np.testing.assert_allclose(mixture.log_parts(rows)[:, 0] - mixture.log_weights[0], first, rtol=1e-9)

    def test_parameters_are_counted_as_scikit_learn_does(self):
        oracle = GaussianMixture(3, random_state=0).fit(blobs().numpy())
        assert of_sklearn(oracle).n_parameters == oracle._n_parameters()

    @pytest.mark.parametrize("components", [1, 2, 3, 5])
    def test_em_finds_the_likelihood_of_scikit_learn(self, components: int):
        rows = blobs()
        mixture, likelihood = fit_mixture(rows, components, seed=0)
        oracle = GaussianMixture(
            components, reg_covar=gmm._SMALLEST_VARIANCE, tol=1e-7, max_iter=500, n_init=5, random_state=0
        )
        oracle.fit(rows.numpy())
        assert likelihood == pytest.approx(float(mixture.log_density(rows).mean()), rel=1e-12)
        # Where there are more components than blobs, one start of ours meets the best of five of theirs.
        assert likelihood > oracle.score(rows.numpy()) - (1e-5 if components in (1, 3) else 0.02)

    def test_scikit_learn_has_nothing_to_improve(self):
        """Its EM, started at ours, stays there."""
        rows = blobs()
        mixture, likelihood = fit_mixture(rows, 3, seed=1)
        oracle = GaussianMixture(
            3,
            reg_covar=gmm._SMALLEST_VARIANCE,
            weights_init=mixture.log_weights.exp().numpy(),
            means_init=mixture.means.numpy(),
            precisions_init=(mixture.roots.mT @ mixture.roots).numpy(),
            tol=1e-9,
            max_iter=500,
        ).fit(rows.numpy())
        assert oracle.score(rows.numpy()) == pytest.approx(likelihood, abs=1e-5)

    def test_bic_is_that_of_scikit_learn_and_finds_the_blobs(self):
        rows = blobs()
        mixture, tried = fit_mixture_by_bic(rows, 16, seed=0)
        assert len(mixture.means) == 3
        assert sorted(tried) == [1, 2, 3, 4, 5]  # two more than the best, and no further
        oracle = GaussianMixture(3, reg_covar=gmm._SMALLEST_VARIANCE, tol=1e-7, max_iter=500, random_state=0).fit(
            rows.numpy()
        )
        assert tried[3] * len(rows) == pytest.approx(oracle.bic(rows.numpy()), rel=1e-6)

    def test_atoms_that_are_all_alike_make_no_component_of_no_width(self):
        rows = torch.cat([blobs(60), torch.full((20, 2), 4.0, dtype=torch.float64)])
        mixture, likelihood = fit_mixture(rows, 4, seed=0)
        assert np.isfinite(likelihood)
        assert float(mixture.roots.diagonal(dim1=1, dim2=2).max()) < 1.01 * gmm._SMALLEST_VARIANCE**-0.5

    def test_fewer_atoms_than_components_do_not_break_it(self):
        mixture, tried = fit_mixture_by_bic(blobs(3), 16, seed=0)
        assert max(tried) <= 3
        assert bool(torch.isfinite(mixture.log_density(blobs(3))).all())


class TestScore:
    def test_with_one_component_is_the_mahalanobis_distance(self):
        random = torch.Generator().manual_seed(3)
        x = torch.randn(500, 4, generator=random, dtype=torch.float64) @ torch.randn(4, 4, generator=random).double()
        head = GMM(components=1).fit(batches_of(x), Serial())
        found = head.distance(evaluation_of(x))
        centred = (x - x.mean(0)).numpy()
        expected = np.einsum("ni,ij,nj->n", centred, np.linalg.inv(np.cov(centred.T, bias=True)), centred)
        # Divided by its mean, 4, and the smallest variance drops out with it.
        np.testing.assert_allclose(found, expected / 4, rtol=1e-9)

    def test_is_the_drop_of_the_log_density(self):
        x = blobs()
        head = GMM().fit(batches_of(x), Serial())
        at = 8 * torch.randn(50, 2, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
        tensors = head.state_dict()
        mixture = Mixture(tensors["log_weights"], tensors["means"], tensors["roots"])
        assert len(mixture.means) == 3
        density = mixture.log_density((at - tensors["centre"]) @ tensors["projection"])
        peak = mixture.log_density(mixture.means).max()
        expected = (2 * (peak - density)).clamp(min=0) / head.settings["scale"]
        torch.testing.assert_close(head.distance(evaluation_of(at)), expected, rtol=1e-10, atol=0)

    def test_between_two_kinds_of_atoms_it_is_large_where_one_normal_distribution_is_content(self):
        x = blobs()
        gap = evaluation_of(x.mean(0, keepdim=True))
        one, several = (GMM(components=count).fit(batches_of(x), Serial()).distance(gap) for count in (1, 16))
        assert float(one) < 0.1
        assert float(several) > 2

    def test_only_the_leading_components_are_looked_at(self):
        random = torch.Generator().manual_seed(3)
        mixing = torch.randn(2, 6, generator=random, dtype=torch.float64)
        x = torch.randn(500, 2, generator=random, dtype=torch.float64) @ mixing
        head = GMM(dimensions=16).fit(batches_of(x + 1e-9 * torch.randn(500, 6, generator=random)), Serial())
        assert head.state_dict()["projection"].shape == (6, 2)
        assert head.settings["explained"] == pytest.approx(1.0)
        assert GMM(dimensions=1).fit(batches_of(x), Serial()).state_dict()["projection"].shape == (6, 1)

    def test_another_seed_starts_elsewhere_and_ends_close(self):
        x = blobs()
        one, other = (GMM(seed=seed).fit(batches_of(x), Serial()).distance(evaluation_of(x)) for seed in (0, 1))
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["dimensions", "components", "rows"])
def test_numbers_below_one_are_refused(name: str):
    with pytest.raises(ValueError, match=f"{name} is a number from 1, not 0"):
        GMM(**{name: 0})
