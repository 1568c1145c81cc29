"""A Gaussian mixture over the features of the training atoms.

    p(x) = Σ_k π_k N(x; μ_k, Σ_k),    score = max(0, 2 [max_k log p(μ_k) - log p(x)])

With one mixture component the score is the squared Mahalanobis distance; with several it is the drop of the log density
from its highest peak, in the same units. The features are standardised and reduced to their leading principal
components, where a full covariance has few enough entries to be determined; an atom that is unusual only in the
discarded ones is not detected. The number of mixture components is the one with the lowest BIC (Schwarz 1978).
Source: Zhu, Batzner, Musaelian and Kozinsky 2023.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.methods._distance import DistanceHead, units_of
from ase_uq.methods.base import Accumulator, Method
from ase_uq.numerics.sample import RowSample, labels_of_atoms

# Added to the variances of a component, relative to the unit variance of the whitened features: without it, atoms that
# are all alike, such as those of a rare kind, would form a component of zero width and unbounded likelihood.
_SMALLEST_VARIANCE = 1e-3
_SMALLEST_SHARE = 1e-6  # share of the largest variance below which a principal component is rounding error
_FLAT = 1e-7  # nats per atom: a mixture that gains less in one step has converged
_LARGEST_DENSITY = 1e6  # of its logarithm, far beyond that of any file
_STEPS = 300
_PATIENCE = 2  # number of successive component counts without a lower BIC after which the search stops


class GMMHead(DistanceHead):
    """The mixture, and the projection of the features into its space.

    Args:
        settings: `peak`, the highest log density at a mean, and `scale`, by which the score is divided.
        tensors: `centre` (n_features,), `projection` (n_features, d), and the tensors of the `Mixture`.
    """

    centre: Tensor
    projection: Tensor
    log_weights: Tensor
    means: Tensor
    roots: Tensor

    @classmethod
    def check_distance(cls, settings: Entries, tensors: StoredTensors) -> tuple[int, None]:
        settings.number("peak", -_LARGEST_DENSITY, _LARGEST_DENSITY)
        settings.positive("scale")
        width = len(tensors.take("centre", None))
        dimensions = tensors.take("projection", width, None).shape[1]
        components = len(tensors.take("log_weights", None, low=-_LARGEST_DENSITY, high=_LARGEST_DENSITY))
        tensors.take("means", components, dimensions)
        roots = tensors.take("roots", components, dimensions, dimensions)
        if not bool((roots.diagonal(dim1=1, dim2=2) > 0).all()):
            raise WrongEntry(f"the diagonal of the tensor {tensors.prefix}roots is not above zero")
        return width, None

    def distance(self, forward_pass: ForwardPass) -> Tensor:
        rows = (forward_pass.features.double() - self.centre) @ self.projection
        mixture = Mixture(self.log_weights, self.means, self.roots)
        return depth(mixture, rows, self._settings["peak"]) / self._settings["scale"]


@dataclass(frozen=True)
class GMM(Method):
    """Fits a mixture of normal distributions with full covariances.

    Args:
        dimensions: Maximum number of principal components of the features to use. Of 8, 16 and 32, larger numbers
            ranked force errors better on acetylacetone.
        components: Maximum number of components of the mixture.
        rows: Maximum number of atoms in the fit; if there are more, a pseudo-random sample of them. The head does not
            hold them.
        seed: Seed of the random start.
    """

    name = "gmm"
    head = GMMHead
    dimensions: int = 32
    components: int = 16
    rows: int = 10_000
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("dimensions", "components", "rows"):
            if not getattr(self, name) >= 1:
                raise ValueError(f"{name} is a number from 1, not {getattr(self, name)!r}.")

    def start(self) -> "GMMAccumulator":
        return GMMAccumulator(self)


@dataclass(frozen=True)
class Mixture:
    """A mixture of normal distributions.

    Args:
        log_weights: (k,) log π.
        means: (k, d) μ.
        roots: (k, d, d) lower triangular W with Σ⁻¹ = WᵀW.
    """

    log_weights: Tensor
    means: Tensor
    roots: Tensor

    def log_parts(self, rows: Tensor) -> Tensor:
        """(n, d) → (n, k): log π_k N(x; μ_k, Σ_k)."""
        constant = self.means.shape[1] * math.log(2 * math.pi)
        # One component at a time: all differences at once would fill the memory.
        squares = torch.stack(
            [((rows - mean) @ root.T).square().sum(1) for mean, root in zip(self.means, self.roots, strict=True)], 1
        )
        heights = self.log_weights + self.roots.diagonal(dim1=1, dim2=2).log().sum(1) - constant / 2
        return heights - squares / 2

    def log_density(self, rows: Tensor) -> Tensor:
        """(n, d) → (n,): log p."""
        return self.log_parts(rows).logsumexp(1)

    @property
    def n_parameters(self) -> int:
        """Number of free parameters: weights that sum to one, means, and symmetric covariances."""
        k, d = self.means.shape
        return k - 1 + k * d + k * d * (d + 1) // 2


def depth(mixture: Mixture, rows: Tensor, peak: float) -> Tensor:
    """(n,) twice the drop of the log density from the peak, or 0 where a mixture is higher between its means."""
    return 2 * (peak - mixture.log_density(rows)).clamp(min=0)


def fit_mixture(rows: Tensor, components: int, seed: int) -> tuple[Mixture, float]:
    """The mixture that EM finds from a k-means++ start, and its mean log-likelihood per row.

    Source: Dempster, Laird and Rubin 1977; the start of Arthur and Vassilvitskii 2007.

    Args:
        rows: (n, d).
        components: Number of components, at most the number of rows.
        seed: Seed of the start.
    """
    nearest = torch.cdist(rows, _far_apart(rows, components, seed)).argmin(1)
    mixture = _mixture_of(rows, torch.nn.functional.one_hot(nearest, components).to(rows))
    likelihood = -torch.inf
    for _ in range(_STEPS):
        parts = mixture.log_parts(rows)
        density = parts.logsumexp(1)
        before, likelihood = likelihood, float(density.mean())
        if likelihood - before < _FLAT:
            break
        mixture = _mixture_of(rows, (parts - density[:, None]).exp())
    return mixture, float(mixture.log_density(rows).mean())


def fit_mixture_by_bic(rows: Tensor, most: int, seed: int) -> tuple[Mixture, dict[int, float]]:
    """The mixture with the lowest BIC, and the BIC per row for every number of components that was tried."""
    tried: dict[int, float] = {}
    best, mixture = 0, None
    for components in range(1, min(most, len(rows)) + 1):
        candidate, likelihood = fit_mixture(rows, components, seed)
        penalty = candidate.n_parameters * math.log(len(rows)) / len(rows)
        tried[components] = penalty - 2 * likelihood
        if mixture is None or tried[components] < tried[best]:
            best, mixture = components, candidate
        if components - best >= _PATIENCE:
            break
    assert mixture is not None  # there is at least one row
    return mixture, tried


class GMMAccumulator(Accumulator):
    """Collects a bounded sample of the atoms' features."""

    def __init__(self, method: GMM) -> None:
        self.method = method
        self.sample = RowSample(method.rows)

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.sample.add(labels_of_atoms(forward_pass, targets), forward_pass.features)

    def _finish(self, communicator: Communicator) -> GMMHead:
        method = self.method
        features = self.sample.finish(communicator)
        assert features is not None  # at least one rank has had a batch
        centre = features.mean(0)
        units = units_of((features - centre).square().mean(0))
        standardised = (features - centre) / units
        values, vectors = torch.linalg.eigh(standardised.T @ standardised / len(features))
        kept = min(method.dimensions, int((values > _SMALLEST_SHARE * values[-1]).sum()))
        whitening = vectors[:, -kept:] / values[-kept:].sqrt()
        rows = standardised @ whitening
        # The random start depends on the order of the rows: sorted, it does not depend on the order of the frames.
        rows = rows[rows.norm(dim=1).argsort()]
        mixture, tried = fit_mixture_by_bic(rows, method.components, method.seed)
        peak = float(mixture.log_density(mixture.means).max())
        settings = {
            "atoms": len(rows),
            "explained": float(values[-kept:].sum() / values.sum()),
            "bic": {str(components): bic for components, bic in tried.items()},
            "peak": peak,
            "scale": max(float(depth(mixture, rows, peak).mean()), 1e-300),
        }
        tensors = {"centre": centre, "projection": whitening / units[:, None], **vars(mixture)}
        return GMMHead(settings, tensors)


def _mixture_of(rows: Tensor, shares: Tensor) -> Mixture:
    """The mixture of largest likelihood, given the (n, k) shares of the components in each row."""
    counts = shares.sum(0).clamp(min=1e-10)  # a start may leave a component without rows
    means = (shares.T @ rows) / counts[:, None]
    eye = torch.eye(rows.shape[1], dtype=rows.dtype, device=rows.device)
    roots = []
    for share, mean, count in zip(shares.T, means, counts, strict=True):
        centred = rows - mean
        covariance = (share[:, None] * centred).T @ centred / count + _SMALLEST_VARIANCE * eye
        roots.append(torch.linalg.solve_triangular(torch.linalg.cholesky(covariance), eye, upper=False))
    return Mixture((counts / len(rows)).log(), means, torch.stack(roots))


def _far_apart(rows: Tensor, count: int, seed: int) -> Tensor:
    """(count, d) rows, drawn one by one with probability proportional to the squared distance from earlier draws."""
    draws = torch.rand(count, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).tolist()
    squares = torch.ones_like(rows[:, 0])
    centres: list[Tensor] = []
    for draw in draws:
        cumulative = squares.cumsum(0)
        centres.append(rows[int((cumulative < draw * cumulative[-1]).sum())])
        new = (rows - centres[-1]).square().sum(1)
        squares = new if len(centres) == 1 else torch.minimum(squares, new)
    return torch.stack(centres)
