"""Ensembles of small networks, trained together by cross-fitting: each member is trained without one fold.

    ensemble = cross_fit(inputs, targets, groups, training=Training(seed=1), output="softplus", title="forces")
    ensemble(new_inputs)                                                # mean over the members
    out_of_fold(ensemble, inputs, folds_of(groups, 5))                  # each row by the member that has not seen it

All members are one stack of weights: a training step is one batched product for all of them, but each member has its
own learning rate, validation loss and early stop. Random numbers come from a generator of the fit, so the same data
and seed give the same networks, and the random state of torch is not changed.
"""

import itertools
from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor

from ase_uq.errors import LabelError
from ase_uq.io.entries import LARGEST, SMALLEST, Entries, StoredTensors
from ase_uq.numerics.buffers import Fitted

Loss = Callable[[Tensor, Tensor], Tensor]
Output = Literal["linear", "softplus"]

BLOCKS_A_FOLD = 4
_EVALUATED_TOGETHER = 2048
_LOG_FLOOR = 1e-3  # of the root mean square; smaller errors hardly differ from none


class MLPEnsemble(Fitted):
    """Multilayer perceptrons with the same inputs.

    Args:
        settings: `sizes` of the layers from inputs to outputs, `output` of the last layer, and the epochs and loss of
            the training.
        tensors: `weights` (n_members, n_weights), those of all layers of a member in one row, as trained in float32;
            `centre` and `spread` (n_inputs,) of the inputs, and `shift` and `unit` (n_outputs,), all float64: outputs
            are shift + unit · last layer.
    """

    weights: Tensor
    centre: Tensor
    spread: Tensor
    shift: Tensor
    unit: Tensor

    @staticmethod
    def check(settings: Entries, tensors: StoredTensors, output: Output, n_outputs: int | None) -> tuple[int, int]:
        """Refuses wrong entries of a file, of networks with this output; returns how many inputs and outputs they have.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        settings.text("output", (output,))
        sizes = settings.wholes("sizes", 1)
        if len(sizes) < 2 or n_outputs not in (None, sizes[-1]):
            raise settings.wrong("sizes", f"layers from the inputs to {n_outputs or 'the'} outputs")
        tensors.take("weights", None, _n_weights(sizes), dtype=torch.float32)
        for name, size, low in (
            ("centre", sizes[0], -LARGEST),
            ("spread", sizes[0], SMALLEST),
            ("shift", sizes[-1], -LARGEST),
            ("unit", sizes[-1], SMALLEST),
        ):
            tensors.take(name, size, low=low)
        tensors.nothing_else()
        return sizes[0], sizes[-1]

    def members(self, inputs: Tensor) -> Tensor:
        """(n, n_inputs) → (n_members, n, n_outputs), float64: the prediction of each member."""
        # float64, since a row must not depend on the others of its batch, and in float32 products it does, by 1e-7.
        rows = ((inputs.double() - self.centre) / self.spread).expand(len(self.weights), -1, -1)
        return self.shift + self.unit * _outputs(self.weights.double(), rows, self._settings)

    def forward(self, inputs: Tensor) -> Tensor:
        """(n, n_inputs) → (n, n_outputs), float64: the mean over the members."""
        return self.members(inputs).mean(0)


def _n_weights(sizes: list[int]) -> int:
    return sum((fan_in + 1) * fan_out for fan_in, fan_out in itertools.pairwise(sizes))


def squared_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared error, averaged over the components; its minimum is the conditional mean."""
    return (predictions - targets).square().mean(-1)


def squared_log_error(predictions: Tensor, targets: Tensor) -> Tensor:
    """Squared difference of the logarithms of two magnitudes; robust against a few large ones."""
    return (torch.log(predictions + _LOG_FLOOR) - torch.log(targets + _LOG_FLOOR)).square().mean(-1)


def pinball(quantile: float) -> Loss:
    """The pinball loss, whose minimum is a conditional quantile (Koenker and Bassett 1978)."""
    if not 0 < quantile < 1:
        raise ValueError(f"a quantile lies between 0 and 1, not at {quantile!r}.")

    def loss(predictions: Tensor, targets: Tensor) -> Tensor:
        short = targets - predictions
        return torch.maximum(quantile * short, (quantile - 1) * short).mean(-1)

    return loss


def folds_of(groups: Tensor, n_folds: int) -> Tensor:
    """(n,) group of each row → (n,) fold of each row.

    Consecutive groups form blocks, and the blocks are dealt out to the folds: neighbours in a trajectory
    mostly share a fold, and every fold has blocks from all parts of the data set.

    Raises:
        ValueError: There are fewer than two folds.
        LabelError: There are fewer than two groups per fold.
    """
    if n_folds < 2:
        raise ValueError(f"cross-fitting needs 2 folds or more, not {n_folds}.")
    n_groups = len(groups.unique())
    if n_groups < 2 * n_folds:
        raise LabelError(
            f"{n_folds}-fold cross-fitting needs {2 * n_folds} labelled training frames, but there are {n_groups}. "
            "Add frames, or ask for fewer folds."
        )
    return _dealt(groups, n_folds)


def _dealt(groups: Tensor, n_folds: int) -> Tensor:
    unique, place = groups.unique(return_inverse=True)
    n_blocks = min(BLOCKS_A_FOLD, len(unique) // n_folds) * n_folds
    return place * n_blocks // len(unique) % n_folds


def out_of_fold(ensemble: MLPEnsemble, inputs: Tensor, fold_of_row: Tensor) -> Tensor:
    """(n, n_outputs) predictions for the training rows, each from the member that has not seen its fold.

    Args:
        ensemble: Ensemble made by `cross_fit`.
        inputs: (n, n_inputs) rows it was fitted on.
        fold_of_row: (n,) folds made by `folds_of`; the rows of a structure have the fold of the structure.
    """
    predictions = inputs.new_zeros((len(inputs), len(ensemble.shift)), dtype=torch.float64)
    for fold, weights in enumerate(ensemble.weights):
        member = MLPEnsemble(ensemble.settings, {**dict(ensemble.named_buffers()), "weights": weights[None]})
        for rows in torch.nonzero(fold_of_row == fold)[:, 0].split(_EVALUATED_TOGETHER):
            predictions[rows] = member(inputs[rows])
    return predictions


def _outputs(weights: Tensor, rows: Tensor, settings: dict[str, Any]) -> Tensor:
    """(n_members, n_weights), (n_members, n, n_inputs) → (n_members, n, n_outputs): one ReLU network per member."""
    sizes = settings["sizes"]
    shapes = list(itertools.pairwise(sizes))
    # A single split, so that the backward pass joins the layers once.
    parts = weights.split([size for fan_in, fan_out in shapes for size in (fan_in * fan_out, fan_out)], 1)
    for layer, (fan_in, fan_out) in enumerate(shapes):
        matrix = parts[2 * layer].unflatten(1, (fan_in, fan_out))
        rows = torch.baddbmm(parts[2 * layer + 1][:, None], rows, matrix)
        if layer + 1 < len(shapes):
            rows = torch.relu(rows)
    return torch.nn.functional.softplus(rows) if settings["output"] == "softplus" else rows
