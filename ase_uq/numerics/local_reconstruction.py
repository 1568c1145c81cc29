"""How well some features follow others on a curved path: the local reconstruction error, with a map for each row.

The map of a row is fitted on its nearest training rows in the source alone, about their means, so that it needs not
be linear over the whole: with x̄, x̄' the means of the neighbours,

    LFRE = sqrt( mean ‖x' - x̄' - (x - x̄) P_i‖² )

(Goscinski, Fraux, Imbalzano and Ceriotti 2021; the conventions are those of scikit-matter.) Only inner products
between neighbours enter, so that the cost hardly depends on the number of features.
"""

import torch
from torch import Tensor

from ase_uq.numerics.reconstruction import CUTOFFS, SAME_EVERYWHERE, leading_squares

_TOGETHER = 32  # rows whose neighbours are gathered at once


def local_errors(train: Tensor, test: Tensor, source: slice, target: slice, n_neighbours: int) -> Tensor:
    """(n_test,) ‖x' - x̄' - (x - x̄) P_i‖ of each test row, as a share of the root of the target's total variance.

    Singular values of the neighbours below a share of the largest are left out: the one of `CUTOFFS` with which the
    neighbours of odd and of even rank predict each other best.

    Args:
        train: (n_train, d) joint rows of source and target.
        test: (n_test, d) joint rows.
        source: Columns of the source.
        target: Columns of the target.
        n_neighbours: Number of nearest training rows, at most n_train.

    Raises:
        ValueError: There are fewer training rows than neighbours, or features do not vary over them.
    """
    if not 4 <= n_neighbours <= len(train):
        raise ValueError(
            f"n_neighbours is {n_neighbours}; at least 4 and at most the {len(train)} training rows can be used."
        )
    train, test = train.double(), test.double()
    both = []
    for columns in (source, target):
        mean = train[:, columns].mean(0)
        centred = train[:, columns] - mean
        scale = (centred.square().sum() / len(train)).sqrt()
        if not float(scale) > 0:
            raise ValueError(SAME_EVERYWHERE)
        both.append((centred / scale, (test[:, columns] - mean) / scale))
    (x, x_test), (y, y_test) = both
    squares = []
    for first in range(0, len(test), _TOGETHER):
        rows = slice(first, first + _TOGETHER)
        near = torch.cdist(x_test[rows], x, compute_mode="donot_use_mm_for_euclid_dist").topk(
            n_neighbours, largest=False
        )[1]
        squares.append(_squares(x[near], x_test[rows], y[near], y_test[rows]))
    return torch.cat(squares).clamp(min=0).sqrt()


def _squares(x: Tensor, x_test: Tensor, y: Tensor, y_test: Tensor) -> Tensor:
    """(b, k, p) and (b, k, p') neighbours of b rows, and the rows → (b,) squared errors."""
    x, x_test = x - x.mean(1, keepdim=True), x_test - x.mean(1)
    y, y_test = y - y.mean(1, keepdim=True), y_test - y.mean(1)
    of_x, of_y = x @ x.mT, y @ y.mT
    cutoff = _cutoff(of_x, of_y)
    values, vectors = torch.linalg.eigh(of_x)
    inverse = torch.where(values.clamp(min=0).sqrt() > cutoff[:, None], 1 / values, 0.0)
    towards = (x @ x_test[:, :, None])[:, :, 0]
    weights = torch.einsum("bkr,br,bjr,bj->bk", vectors, inverse, vectors, towards)
    linear = (weights * (y @ y_test[:, :, None])[:, :, 0]).sum(1)
    quadratic = torch.einsum("bk,bkj,bj->b", weights, of_y, weights)
    return y_test.square().sum(1) - 2 * linear + quadratic


def _cutoff(of_x: Tensor, of_y: Tensor) -> Tensor:
    """(b, k, k) inner products of source and target between neighbours → (b,) smallest singular value to use."""
    folds = [slice(0, None, 2), slice(1, None, 2)]
    spectra = [torch.linalg.eigh(of_x[:, fold, fold]) for fold in folds]
    roots = [values.clamp(min=0).sqrt().flip(1) for values, _ in spectra]
    largest = torch.maximum(roots[0][:, 0], roots[1][:, 0])
    cutoffs = largest[:, None] * torch.as_tensor(CUTOFFS, device=of_x.device)
    loss = torch.zeros_like(cutoffs)
    for here, there in ((0, 1), (1, 0)):
        root, basis = roots[here], spectra[here][1].flip(2)
        basis = basis * torch.where(root > cutoffs[:, :1], 1 / root, 0.0)[:, None]  # U / s
        scores = of_x[:, folds[there], folds[here]] @ basis
        linear = (scores * (of_y[:, folds[there], folds[here]] @ basis)).sum(1)
        quadratic = (scores.mT @ scores) * (basis.mT @ of_y[:, folds[here], folds[here]] @ basis)
        total = of_y[:, folds[there], folds[there]].diagonal(dim1=1, dim2=2).sum(1)
        squares = leading_squares(total, linear, quadratic)
        kept = (root[:, None] > cutoffs[:, :, None]).sum(2)
        loss += squares.gather(1, kept) / len(range(*folds[there].indices(of_x.shape[1])))
    return cutoffs.gather(1, loss.argmin(1, keepdim=True))[:, 0]
