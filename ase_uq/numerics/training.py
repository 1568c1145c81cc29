"""How ensembles of networks are trained: every fold leaves rows out, every member stops where its own get worse."""

import itertools
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ase_uq.display.progress import progress_bar
from ase_uq.errors import LabelError
from ase_uq.numerics.networks import (
    _EVALUATED_TOGETHER,
    Loss,
    MLPEnsemble,
    Output,
    _dealt,
    _outputs,
    folds_of,
    squared_error,
)

_INNER_FOLDS = 8  # one of them stops the training of a member
_FEWEST_A_BATCH = 16  # structures, however large they are
_SMALLEST_RATE = 1e-7
_BETAS = (0.9, 0.999)
_TRAINS = threading.Lock()


@dataclass(frozen=True)
class Training:
    """How an ensemble is trained: AdamW, halved rate on a plateau, early stop on rows held out for it.

    Args:
        hidden: Widths of the hidden layers.
        learning_rate: Learning rate at the start.
        weight_decay: Weight decay of AdamW.
        batch: Rows per step; with targets of whole structures, at least 16 structures.
        max_epochs: Largest number of epochs.
        patience: Number of epochs without a better validation loss after which a member stops.
        plateau: Number of epochs without a better validation loss after which the rate of a member is halved.
        epoch_rows: Largest number of rows per epoch; from larger sets, each epoch draws a new selection.
        seed: Seed of initial weights and batches.
    """

    hidden: tuple[int, ...] = (128, 128)
    learning_rate: float = 1e-3
    weight_decay: float = 1e-2
    batch: int = 256
    max_epochs: int = 300
    patience: int = 40
    plateau: int = 10
    epoch_rows: int = 20_000
    seed: int = 0

    def __post_init__(self) -> None:
        numbers = (*self.hidden, self.batch, self.max_epochs, self.patience, self.plateau, self.epoch_rows)
        if not all(number >= 1 for number in numbers) or not self.learning_rate > 0 or not self.weight_decay >= 0:
            raise ValueError(f"widths, batches, epochs and the learning rate must be above 0, but this is {self!r}.")


def cross_fit(
    inputs: Tensor,
    targets: Tensor,
    groups: Tensor,
    *,
    training: Training,
    loss: Loss = squared_error,
    folds: int = 5,
    output: Output = "linear",
    n_outputs: int | None = None,
    segments: Tensor | None = None,
    title: str = "",
) -> MLPEnsemble:
    """Trains one network per fold, each without its fold.

    Of the groups that a member may see, one eighth (again in consecutive blocks) is held out to decide when to halve
    its rate and when to stop it. Inputs are standardised, and targets scaled, by the statistics of all rows.

    Args:
        inputs: (n_rows, n_inputs) inputs.
        targets: (n_targets, n_columns) targets; a target with a NaN is left out.
        groups: (n_targets,) integers; targets that belong together, such as the rows of a frame, have the same one.
            Groups with close numbers are taken as neighbours.
        training: How the networks are trained.
        loss: (n_members, n, n_outputs) predictions and (n_members, n, n_columns) targets → (n_members, n).
        folds: Number of folds, and of members.
        output: `"softplus"` for magnitudes.
        n_outputs: Number of outputs, if the loss does not compare outputs and targets column by column. Targets are
            then not scaled.
        segments: (n_rows,) the target that each row contributes to: predictions are then sums over rows. By default
            every row has its own target.
        title: Title of the progress bar; empty for no bar.

    Raises:
        LabelError: There are too few groups for the folds.
    """
    data = _Data(inputs, targets, output, n_outputs, segments)
    settings = {"sizes": [inputs.shape[1], *training.hidden, data.n_outputs], "output": output}
    trained, held_out = _targets_of_members(data.labelled, groups, folds_of(groups, folds))
    generator = torch.Generator().manual_seed(training.seed)
    weights = _initial_weights(settings["sizes"], folds, generator).to(inputs.device)

    def losses(weights: Tensor, chosen: Tensor) -> Tensor:
        return data.losses(weights, settings, chosen, loss)

    descent = _Descent(weights, training)
    with (
        _one_thread(),
        progress_bar(total=training.max_epochs, desc=title, unit="epoch", show=bool(title), leave=False) as bar,
    ):
        for _ in range(training.max_epochs):
            for chosen in _batches([trained[k] for k in descent.active], data.rows_a_target, training, generator):
                descent.step(losses, chosen)
            descent.judge(losses, torch.stack([held_out[k] for k in descent.active]))
            bar.set_postfix(loss=f"{float(descent.best_loss.mean()):.4g}", refresh=False)
            bar.update()
            if not descent.active:
                break
    settings |= {"epochs": descent.epochs, "loss": descent.best_loss.tolist()}
    return MLPEnsemble(settings, {"weights": descent.best, **data.scales})


@contextmanager
def _one_thread() -> Iterator[None]:
    """Keeps the products of torch on one CPU thread, and other Python threads from training meanwhile.

    The products are small: threads gain little, take thirty times as long if they have to wait for a busy core, and
    change the order of the sums.
    """
    with _TRAINS:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


class _Data:
    """Standardised rows and scaled targets of a fit in float32; the arguments are those of `cross_fit`."""

    def __init__(
        self, inputs: Tensor, targets: Tensor, output: Output, n_outputs: int | None, segments: Tensor | None
    ) -> None:
        targets = targets.double()
        self.labelled = targets.isfinite().all(1)
        self.n_outputs = n_outputs or targets.shape[1]
        self._summed = segments is not None
        counts = torch.ones(len(targets), dtype=torch.long, device=inputs.device)
        if segments is not None:
            inputs = inputs[torch.argsort(segments, stable=True)]
            counts = torch.bincount(segments, minlength=len(targets))
        self._counts, self._starts = counts, counts.cumsum(0) - counts
        centre = inputs.double().mean(0)
        spread = inputs.double().std(0, correction=0)
        # An input that never varied in training gets the largest spread, so that a change in it does not explode.
        largest = spread.max().clamp(min=1e-300)
        spread = torch.where(spread > 1e-6 * largest, spread, largest)
        shift = torch.zeros(self.n_outputs, dtype=torch.float64, device=inputs.device)
        unit = torch.ones_like(shift)
        if n_outputs is None:
            shift, unit = _scales(targets[self.labelled], counts[self.labelled].double(), output)
            targets = targets / unit
        self.scales = {"centre": centre, "spread": spread, "shift": shift, "unit": unit}
        self._offset = (shift / unit).float()
        self._rows = ((inputs.double() - centre) / spread).float()
        self._targets = targets.float()

    @property
    def rows_a_target(self) -> float:
        """Average number of rows per target."""
        return len(self._rows) / len(self._targets)

    def losses(self, weights: Tensor, settings: dict[str, Any], chosen: Tensor, loss: Loss) -> Tensor:
        """(n_members, n) losses of the chosen (n_members, n) targets."""
        rows, lengths = self._rows_of(chosen) if self._summed else (chosen, None)
        outputs = self._offset + _outputs(weights, self._rows[rows], settings)
        if lengths is not None:
            width = outputs.shape[2]
            # Unlike index_add, this gives the same bits on a GPU every time.
            outputs = torch.segment_reduce(outputs.reshape(-1, width), "sum", lengths=lengths.flatten(), unsafe=True)
            outputs = outputs.reshape(*lengths.shape, width)[:, :-1]
        return loss(outputs, self._targets[chosen])

    def _rows_of(self, chosen: Tensor) -> tuple[Tensor, Tensor]:
        """(n_members, n_rows) rows of the chosen structures, and (n_members, n + 1) the number of rows of each.

        Members have different numbers of rows: the last entry counts the rows that are only padding.
        """
        counts = self._counts[chosen]
        total = counts.sum(1, keepdim=True)
        width = int(total.max())
        lengths = torch.cat([counts, width - total], 1)
        first = torch.cat([self._starts[chosen], torch.zeros_like(total)], 1)
        flat = lengths.flatten()
        before = flat.cumsum(0) - flat
        place = torch.arange(len(chosen) * width, device=chosen.device)
        return (place + torch.repeat_interleave(first.flatten() - before, flat)).reshape(-1, width), lengths


class _Descent:
    """AdamW for a stack of networks, each with its own rate, plateau and stop.

    Args:
        weights: (n_members, n_weights) initial weights.
        training: How the networks are trained.

    Attributes:
        active: Members that are still being trained.
        best: (n_members, n_weights) weights with the lowest validation loss.
        best_loss: (n_members,) lowest validation loss of each member.
        epochs: Number of epochs of each member.
    """

    def __init__(self, weights: Tensor, training: Training) -> None:
        self._training = training
        self._weights = weights
        self._mean, self._square = torch.zeros_like(weights), torch.zeros_like(weights)
        self._rate = weights.new_full((len(weights), 1), training.learning_rate)
        self._steps = 0
        self._waited = [0] * len(weights)
        self.active = list(range(len(weights)))
        self.best = weights.clone()
        self.best_loss = weights.new_full((len(weights),), torch.inf)
        self.epochs = [0] * len(weights)

    def step(self, losses: Callable[[Tensor, Tensor], Tensor], chosen: Tensor) -> None:
        """One step on the (n_active, n) chosen targets."""
        with torch.enable_grad():
            weights = self._weights.requires_grad_()
            (gradient,) = torch.autograd.grad(losses(weights, chosen).mean(1).sum(), weights)
        self._steps += 1
        first, second = _BETAS
        with torch.no_grad():
            weights = self._weights.detach()
            self._mean.lerp_(gradient, 1 - first)
            self._square.mul_(second).addcmul_(gradient, gradient, value=1 - second)
            size = (self._square / (1 - second**self._steps)).sqrt_().add_(1e-8)
            weights.mul_(1 - self._rate * self._training.weight_decay)
            weights.sub_(self._rate / (1 - first**self._steps) * self._mean / size)
        self._weights = weights

    def judge(self, losses: Callable[[Tensor, Tensor], Tensor], held_out: Tensor) -> None:
        """Validates on (n_active, n) targets; keeps the better weights, lowers rates, and stops members."""
        with torch.no_grad():
            parts = [losses(self._weights, part).sum(1) for part in held_out.split(_EVALUATED_TOGETHER, 1)]
        validation = torch.stack(parts).sum(0) / held_out.shape[1]
        goes_on = []
        for place, (member, value) in enumerate(zip(self.active, validation.tolist(), strict=True)):
            self.epochs[member] += 1
            self._waited[member] += 1
            if value < float(self.best_loss[member]):
                self.best[member], self.best_loss[member] = self._weights[place], validation[place]
                self._waited[member] = 0
            elif self._waited[member] % self._training.plateau == 0:
                self._rate[place] = (self._rate[place] / 2).clamp(min=_SMALLEST_RATE)
            if self._waited[member] < self._training.patience:
                goes_on.append(place)
        if len(goes_on) < len(self.active):
            self.active = [self.active[place] for place in goes_on]
            for name in ("_weights", "_mean", "_square", "_rate"):
                setattr(self, name, getattr(self, name)[goes_on])


def _scales(targets: Tensor, counts: Tensor, output: Output) -> tuple[Tensor, Tensor]:
    """(n_outputs,) shift and unit of the output of a row: its mean, and the spread that is left to explain.

    The rows of a structure add up: a target with `counts` rows contains the shift counts times, and its unit is divided
    by the number of rows.
    """
    shift = torch.zeros_like(targets[0])
    if output == "linear":
        shift = (targets * counts[:, None]).sum(0) / counts.square().sum()
    left = targets - shift * counts[:, None]
    # One unit for all columns: the components of a force have the same scale.
    unit = (left.square().mean().sqrt() / counts.mean()).expand_as(shift)
    return shift, torch.where(unit > 0, unit, 1.0)


def _targets_of_members(labelled: Tensor, groups: Tensor, fold: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """For each member the targets that it is trained on, and the held-out targets that decide when it stops.

    All members have the same number of held-out targets, since these are evaluated together.
    """
    trained, held_out = [], []
    for member in range(int(fold.max()) + 1):
        visible = torch.nonzero(labelled & (fold != member))[:, 0]
        n_groups = len(groups[visible].unique())
        if n_groups < 2:
            raise LabelError(
                "nearly all labelled training frames are in one block of consecutive frames. Label more of the others."
            )
        n_folds = min(_INNER_FOLDS, n_groups)
        stops = _dealt(groups[visible], n_folds) == member % n_folds
        trained.append(visible[~stops])
        held_out.append(visible[stops])
    fewest = min(map(len, held_out))
    spread = [torch.arange(fewest, device=rows.device) * len(rows) // fewest for rows in held_out]
    return trained, [rows[chosen] for rows, chosen in zip(held_out, spread, strict=True)]


def _batches(
    targets: list[Tensor], rows_a_target: float, training: Training, generator: torch.Generator
) -> Iterator[Tensor]:
    """The steps of an epoch: (n_members, n) targets each, in random order and without repetition.

    All members take the same number of targets: a member that has more leaves a random rest out.
    """
    length = min(min(map(len, targets)), math.ceil(training.epoch_rows / rows_a_target))
    orders = [torch.randperm(len(rows), generator=generator)[:length].to(rows.device) for rows in targets]
    chosen = torch.stack([rows[order] for rows, order in zip(targets, orders, strict=True)])
    batch = max(round(training.batch / rows_a_target), _FEWEST_A_BATCH)
    yield from chosen.split(batch, 1)


def _initial_weights(sizes: list[int], n_members: int, generator: torch.Generator) -> Tensor:
    """(n_members, n_weights) weights, uniform within 1/√fan-in as in the linear layers of torch; float32."""
    layers = []
    for fan_in, fan_out in itertools.pairwise(sizes):
        draw = torch.rand(n_members, (fan_in + 1) * fan_out, generator=generator, dtype=torch.float32)
        layers.append((2 * draw - 1) / fan_in**0.5)
    return torch.cat(layers, 1)
