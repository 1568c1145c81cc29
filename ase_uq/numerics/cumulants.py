"""Cumulants of the rows of each group, such as the atoms of a structure: how they spread, and not only their mean."""

import torch
from torch import Tensor

HIGHEST = 4


def cumulants(rows: Tensor, group: Tensor, counts: Tensor, order: int) -> Tensor:
    """Cumulants of orders 1 to `order` of each column, with their signed roots, so that all have the rows' unit.

    With the mean m and the central moments μ_k of the rows of a group, these are m, sqrt(μ₂), the cube root of μ₃ and
    sgn(κ₄) |κ₄|^¼ for κ₄ = μ₄ - 3 μ₂². They depend neither on the order of the rows nor on how often all of them are
    repeated, as in a supercell.

    Args:
        rows: (n, d) rows.
        group: (n,) index of the group of each row.
        counts: (n_groups,) number of rows of each group, at least 1.
        order: Highest order, 1 to 4.

    Returns:
        (n_groups, order * d) first the means, then each higher order.

    Raises:
        ValueError: The order is out of range.
    """
    if not 1 <= order <= HIGHEST:
        raise ValueError(f"the order of the cumulants is {order}; 1 (means) to {HIGHEST} was expected.")
    counts = counts.to(rows)[:, None]

    def mean(values: Tensor) -> Tensor:
        return values.new_zeros(len(counts), values.shape[1]).index_add_(0, group, values) / counts

    found = [mean(rows)]
    apart = rows - found[0][group]
    second = mean(apart**2) if order > 1 else found[0]
    if order > 1:
        found.append(second.sqrt())
    if order > 2:
        found.append(_signed_root(mean(apart**3), 3))
    if order > 3:
        found.append(_signed_root(mean(apart**4) - 3 * second**2, 4))
    return torch.cat(found, 1)


def _signed_root(values: Tensor, order: int) -> Tensor:
    return values.sign() * values.abs() ** (1 / order)
