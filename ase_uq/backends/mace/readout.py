"""The columns and weights that form the last layer of a MACE model."""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from mace.modules.wrapper_ops import get_layout
from torch import Tensor


@dataclass(frozen=True)
class Readout:
    """How to compute the last-layer features from the node features: slices and modules, resolved once.

    It holds plain integers instead of e3nn objects, so that it also works with compiled models.
    """

    layer_dims: list[int]
    n_scalars: int
    vectors: slice | None  # columns of the polar vectors (1o) in the first layer
    hidden: tuple[tuple[torch.nn.Module, int], ...]  # non-linear readouts, each with the layer that it reads
    linear: tuple[int, ...]  # layers read by a linear readout
    kept: tuple[slice, ...]  # columns of each non-linear readout that belong to the head
    weights: Tensor
    intercept: float
    scale: float
    shift: float
    head: int
    n_heads: int
    components_first: bool  # cuEquivariance kernels order (2l+1, channels), e3nn (channels, 2l+1)


def plain_module(model: Any) -> Any:
    """The module behind `torch.compile`."""
    return getattr(model, "_orig_mod", model)


def rounded(value: float) -> float:
    """The number rounded to float32, so that it is the same in every precision of the model."""
    return float(np.float32(value))


def hidden_activations(block: Any, features: Tensor, readout: Readout) -> Tensor:
    """Input of the last linear map of a non-linear readout."""
    hidden = block.non_linearity(block.linear_1(features))
    if hasattr(block, "linear_mid"):
        hidden = _masked(hidden, readout)
        hidden = block.non_linearity(block.linear_mid(hidden))
    return hidden


def _masked(hidden: Tensor, readout: Readout) -> Tensor:
    if readout.n_heads == 1:
        return hidden
    kept = torch.zeros_like(hidden)
    columns = _head_columns(hidden.shape[1], readout.head, readout.n_heads)
    kept[:, columns] = hidden[:, columns]
    return kept


def _head_columns(width: int, head: int, n_heads: int) -> slice:
    step = width // n_heads
    return slice(head * step, (head + 1) * step)


def resolve_readout(model: Any, head_name: str) -> Readout:
    """Resolves how the last-layer features of one head follow from the node features of a model."""
    heads = list(getattr(model, "heads", None) or ["Default"])
    head = heads.index(head_name) if head_name in heads else 0
    dims = [product.linear.irreps_out.dim for product in model.products]
    n_scalars = model.products[-1].linear.irreps_out.count("0e")
    readouts = list(model.readouts)
    layers = list(range(len(dims) - len(readouts), len(dims)))
    linear, hidden, kept, intercept = [], [], [], 0.0
    linear_weights, hidden_weights = [], []
    for block, layer in zip(readouts, layers, strict=True):
        last = block.linear_2 if hasattr(block, "linear_1") else block.linear
        matrix, offset = _effective_weights(last)
        intercept += float(offset[head])
        if hasattr(block, "linear_1"):
            columns = _head_columns(len(matrix), head, len(heads))
            hidden.append((block, layer))
            kept.append(columns)
            hidden_weights.append(matrix[columns, head])
        else:
            linear.append(layer)
            linear_weights.append(matrix[:n_scalars, head])
    has_scale = hasattr(model, "scale_shift")
    scale = float(torch.atleast_1d(model.scale_shift.scale)[head]) if has_scale else 1.0
    shift = float(torch.atleast_1d(model.scale_shift.shift)[head]) if has_scale else 0.0
    weights = torch.cat([*linear_weights, *hidden_weights]).detach().clone()
    return Readout(
        layer_dims=dims,
        n_scalars=n_scalars,
        vectors=vector_columns(model.products[0].linear.irreps_out),
        hidden=tuple(hidden),
        linear=tuple(linear),
        kept=tuple(kept),
        weights=weights,
        intercept=intercept,
        scale=scale,
        shift=shift,
        head=head,
        n_heads=len(heads),
        components_first=get_layout(getattr(model.products[0], "cueq_config", None)) == "ir_mul",
    )


def vector_columns(irreps: Any) -> slice | None:
    """Columns of the polar vectors in the features of a layer; None if it has none."""
    start = 0
    for multiplicity, kind in irreps:
        width = multiplicity * kind.dim
        if str(kind) == "1o":  # 1e are pseudo-vectors
            return slice(start, start + width)
        start += width
    return None


def _effective_weights(linear: Any) -> tuple[Tensor, Tensor]:
    """(n_in, n_out) matrix and offset of a linear map, including the path normalisation, which its weights lack."""
    weight = next(linear.parameters())
    width = linear.irreps_in.dim
    with torch.no_grad():
        offset = linear(torch.zeros(1, width, dtype=weight.dtype, device=weight.device))
        matrix = linear(torch.eye(width, dtype=weight.dtype, device=weight.device)) - offset
    return matrix, offset[0]
