"""How well some features are a linear image of others: the global reconstruction error, from moments alone.

With rows x of source features and x' of target features, each centred and divided by the root of its total variance on
training rows, and P the matrix that minimises Σ ‖x' - x P‖² over these,

    GFRE = sqrt( mean ‖x' - x P‖² )         over other rows: 0 if the source has it all, about 1 if it has nothing of it
    GFRD = sqrt( mean ‖x P - x Ω‖² )        Ω the orthogonal matrix nearest to P: 0 if P only turns the source

(Goscinski, Fraux, Imbalzano and Ceriotti 2021; the conventions are those of scikit-matter.) A joint second moment of
both features is all that either needs, so that the number of rows does not matter.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from ase_uq.numerics.moments import Moments

# Singular values of the source below one of these shares of the largest are left out; which, is found by
# cross-validation. Squares of smaller shares cannot be told from the rounding of a second moment.
CUTOFFS = np.geomspace(1e-7, 0.9, 20)
SAME_EVERYWHERE = "the features are the same for all atoms, so there is nothing to reconstruct."


@dataclass(frozen=True)
class Pair:
    """Source and target in joint rows, and how they are centred and scaled.

    Args:
        source: Columns of the source.
        target: Columns of the target.
        centre: (d,) mean of the joint training rows.
        source_scale: Root of the total variance of the source in the training rows.
        target_scale: That of the target.
    """

    source: slice
    target: slice
    centre: Tensor
    source_scale: float
    target_scale: float

    @classmethod
    def of(cls, train: Moments, source: slice, target: slice) -> "Pair":
        """The pair of these columns.

        Raises:
            ValueError: Source or target do not vary over the training rows.
        """
        variances = train.scatter.diagonal() / train.count
        scales = [float(variances[columns].sum()) ** 0.5 for columns in (source, target)]
        if not min(scales) > 0:
            raise ValueError(SAME_EVERYWHERE)
        return cls(source, target, train.mean, scales[0], scales[1])

    def features(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """(n, d) joint rows → x and x', centred and scaled."""
        centred = rows.double() - self.centre
        return centred[:, self.source] / self.source_scale, centred[:, self.target] / self.target_scale

    def second_moments(self, moments: Moments) -> tuple[Tensor, Tensor, Tensor]:
        """Σ x xᵀ, Σ x x'ᵀ and Σ x' x'ᵀ."""
        joint = moments.about(self.centre)
        x, y, of_x, of_y = self.source, self.target, self.source_scale, self.target_scale
        return joint[x, x] / of_x**2, joint[x, y] / (of_x * of_y), joint[y, y] / of_y**2


@dataclass(frozen=True)
class LinearMap:
    """A linear map of source features onto target features, fitted on training rows.

    Args:
        pair: Source and target.
        weights: (n_source, n_target) P.
        covariance: (n_source, n_source) Σ x xᵀ over the training rows.
    """

    pair: Pair
    weights: Tensor
    covariance: Tensor

    def errors(self, rows: Tensor) -> Tensor:
        """(n, d) joint rows → (n,) ‖x' - x P‖, as a share of the root of the target's total variance."""
        source, target = self.pair.features(rows)
        return (target - source @ self.weights).norm(dim=1)

    def mean_square(self, test: Moments) -> float:
        """GFRE² on the joint rows with these moments."""
        xx, xy, yy = self.pair.second_moments(test)
        square = yy.trace() - 2 * (self.weights * xy).sum() + (self.weights * (xx @ self.weights)).sum()
        return max(float(square) / test.count, 0.0)

    def mean_square_distortion(self, test: Moments) -> float:
        """GFRD² on the joint rows with these moments."""
        xx, _, _ = self.pair.second_moments(test)
        difference = (_padded(self.weights) - self._orthogonal)[: len(xx)]
        return max(float((difference * (xx @ difference)).sum()) / test.count, 0.0)

    @cached_property
    def _orthogonal(self) -> Tensor:
        """(m, m) Ω for the larger number of features m; the smaller set is continued with zeros."""
        left, _, right = torch.linalg.svd(_padded(self.covariance @ self.weights))
        return left @ right


def fitted_map(folds: tuple[Moments, Moments], source: slice, target: slice) -> LinearMap:
    """The map with the lowest error of ordinary least squares on the singular vectors above a cutoff.

    The cutoff is the one among `CUTOFFS`, times the largest singular value, with which each fold predicts the other
    best; the map is then fitted on both.

    Args:
        folds: Moments of the joint rows of two parts of the training rows.
        source: Columns of the source.
        target: Columns of the target.

    Raises:
        ValueError: Source or target features do not vary over the training rows.
    """
    pair = Pair.of(folds[0] + folds[1], source, target)
    parts = [pair.second_moments(fold) for fold in folds]
    spectra = [torch.linalg.eigh(xx) for xx, _, _ in parts]
    roots = [values.clamp(min=0).sqrt().flip(0) for values, _ in spectra]
    cutoffs = torch.as_tensor(CUTOFFS, device=pair.centre.device) * max(float(root[0]) for root in roots)
    loss = torch.zeros(len(cutoffs), dtype=torch.float64, device=pair.centre.device)
    for here, there in ((0, 1), (1, 0)):
        basis = spectra[here][1].flip(1)
        coefficients = (basis.T @ parts[here][1]) / (roots[here] ** 2).clamp(min=torch.finfo(torch.float64).tiny)[
            :, None
        ]
        coefficients[roots[here] <= cutoffs[0]] = 0
        xx, xy, yy = parts[there]
        linear = (coefficients * (basis.T @ xy)).sum(1)
        quadratic = (basis.T @ xx @ basis) * (coefficients @ coefficients.T)
        squares = leading_squares(yy.trace(), linear, quadratic)
        loss += squares[(roots[here] > cutoffs[:, None]).sum(1)] / folds[there].count
    xx, xy, _ = (first + second for first, second in zip(*parts, strict=True))
    values, vectors = torch.linalg.eigh(xx)
    used = values.clamp(min=0).sqrt() > cutoffs[loss.argmin()]
    weights = (vectors[:, used] / values[used]) @ (vectors[:, used].T @ xy)
    return LinearMap(pair, weights, xx)


def leading_squares(total: Tensor, linear: Tensor, quadratic: Tensor) -> Tensor:
    """Squared errors of predictions from the first m of r directions, for all m at once.

    With coefficients B of the directions and scores C of the rows to predict, ‖Y - Σ_m C_m B_m‖² is
    total - 2 Σ_m linear_m + Σ_mn quadratic_mn over the first m of both.

    Args:
        total: (...) ‖Y‖².
        linear: (..., r) Σ_i C_im (Y_i · B_m).
        quadratic: (..., r, r) (Cᵀ C) ∘ (B Bᵀ).

    Returns:
        (..., r + 1) for m = 0 … r.
    """
    blocks = quadratic.cumsum(-1).cumsum(-2).diagonal(dim1=-2, dim2=-1)
    squares = total[..., None] - 2 * linear.cumsum(-1) + blocks
    return torch.cat([total[..., None], squares], -1)


def _padded(matrix: Tensor) -> Tensor:
    """The matrix continued with zeros to a square one."""
    size = max(matrix.shape)
    padded = matrix.new_zeros(size, size)
    padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    return padded
