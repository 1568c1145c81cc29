"""The combination of several methods, fitted: which corrections the calibration frames support."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.calibration import Calibrator
from ase_uq.communicator import Communicator, gather
from ase_uq.errors import UQWarning
from ase_uq.forward_pass import ForwardPass, Targets, residuals_of
from ase_uq.methods.base import Head, Raw
from ase_uq.numerics.networks import MLPEnsemble, folds_of, out_of_fold
from ase_uq.numerics.training import Training, cross_fit
from ase_uq.uncertainty_model.combination import (
    RESIDUAL,
    Combination,
    CombinationFeatures,
    CombinationInputs,
    Gate,
    bounded,
    corrections_of_methods,
)
from ase_uq.uncertainty_model.fitted_method import FittedMethod

_MOST_KEPT_ATOMS = 20_000  # of the training frames, for the residual model
_LARGEST_WEIGHT = 1.0
_FOLDS = 5
_TRAINING = Training(hidden=(32, 32), batch=512, max_epochs=150, patience=30)


@dataclass(frozen=True)
class Fitted:
    """A combination, and the variances it gives the calibration atoms without having seen them.

    Args:
        combination: To be used from now on.
        variance: (n_atoms, n_components) of the calibration atoms, networks out of fold.
    """

    combination: Combination
    variance: np.ndarray


def fit_combination(
    inputs: CombinationInputs,
    training: tuple[CombinationFeatures, Tensor, Tensor] | None,
    calibration: tuple[CombinationFeatures, Tensor, Tensor],
    *,
    title: str = "",
) -> Fitted:
    """Tries the anchor alone, with the other methods, with the residual model, and with all; keeps the likeliest.

    Args:
        inputs: How features are made of a batch.
        training: What the combination reads of the training atoms, their (n_atoms, n_components) squared residuals in
            squared eV/Å (the mean over the components where there is one; NaN without a label), and the (n_atoms,)
            number of each atom's frame; None where no training frame has forces.
        calibration: The same of the calibration atoms.
        title: Of the progress bar; empty for none.
    """
    features, squares, frames = calibration
    corrections = corrections_of_methods(features, inputs.others)
    ensemble, seen = _residual_model(training, calibration, title)
    corrections[RESIDUAL] = bounded(seen)
    views = features.around if training is None else torch.cat([training[0].around, features.around])
    gate = Gate.fit(views, features.around)
    opened = gate(features.around)[:, None]
    table = {name: (opened * value).expand_as(features.base).cpu().numpy() for name, value in corrections.items()}
    tried = {"anchor": (), "methods": inputs.others, RESIDUAL: (RESIDUAL,), "all": (*inputs.others, RESIDUAL)}
    candidates = {name: columns for name, columns in tried.items() if inputs.others or name in ("anchor", RESIDUAL)}
    base = features.base + (1 - opened) * features.careful
    rows = _Likelihood(base.cpu().numpy(), opened.expand_as(features.base).cpu().numpy(), squares.cpu().numpy(), table)
    fold = _contiguous(frames.cpu().numpy())
    likelihoods = {name: rows.cross_validated(columns, fold) for name, columns in candidates.items()}
    best = min(likelihoods, key=lambda name: likelihoods[name])
    constant, found = rows.fitted(candidates[best])
    # A weight of zero costs an evaluation and says nothing.
    weights = {name: weight for name, weight in zip(candidates[best], found.tolist(), strict=True) if weight > 1e-3}
    kept = ensemble if RESIDUAL in weights else None
    combination = Combination(inputs, gate, kept, constant if weights else 0.0, weights, likelihoods)
    variance = np.exp(rows.log_variance(list(weights), combination.constant, np.array(list(weights.values()))))
    return Fitted(combination, variance)


def _residual_model(
    training: tuple[CombinationFeatures, Tensor, Tensor] | None,
    calibration: tuple[CombinationFeatures, Tensor, Tensor],
    title: str,
) -> tuple[MLPEnsemble, Tensor]:
    """The networks, and what each calibration atom reads from the one that has not seen its frame, before bounds."""
    features, squares, frames = calibration
    rows, ratios = features.network_inputs, squares * torch.exp(-features.base)
    if training is not None:
        seen, own_squares, own_frames = training
        own = own_squares * torch.exp(-seen.base)
        # A potential errs less on the frames it was trained on: their mean error is not what is to be learned. Where
        # there is none at all, as with its own forces for labels, nothing is.
        rows, ratios = (
            torch.cat([seen.network_inputs, rows]),
            torch.cat([own / own.nanmean(), ratios]),
        )
        frames = _interleaved(own_frames, frames)
    ensemble = cross_fit(rows, ratios, frames, training=_TRAINING, loss=_nll, folds=_FOLDS, n_outputs=1, title=title)
    found = out_of_fold(ensemble, rows, folds_of(frames, _FOLDS))
    return ensemble, found[len(rows) - len(features.network_inputs) :]


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Numbers the frames of two data sets anew, so that consecutive ones are as far into the one as into the other.

    Folds are made of consecutive frames. A few calibration frames after many training frames would all be in one, and
    where the training frames have no labels, none would be left to train a network on.
    """
    one, two = (frames.unique(return_inverse=True)[1] for frames in (first, second))
    n_one, n_two = (len(frames.unique()) for frames in (first, second))
    # Even numbers and odd ones: no frame of the one is taken for a frame of the other.
    return torch.cat([2 * n_two * one, 2 * n_one * two + 1])


def _nll(predictions: Tensor, ratios: Tensor) -> Tensor:
    """Negative log-likelihood of a component, less what does not depend on the networks; r²/σ² of the anchor."""
    correction = bounded(predictions)
    return 0.5 * (correction + ratios * torch.exp(-correction)).mean(-1)


def _contiguous(frames: np.ndarray) -> np.ndarray:
    """(n_atoms,) fold of each atom, by consecutive frames: neighbours of one trajectory tell nothing new."""
    groups, place = np.unique(frames, return_inverse=True)
    return place * _FOLDS // len(groups)


@dataclass(frozen=True)
class _Likelihood:
    """Calibration components: base, gate and squares (n_atoms, n_components), corrections times the gate by name."""

    base: np.ndarray
    gate: np.ndarray
    squares: np.ndarray
    corrections: dict[str, np.ndarray]

    def log_variance(self, columns: Sequence[str], constant: float, weights: np.ndarray) -> np.ndarray:
        found = self.base + self.gate * constant
        for name, weight in zip(columns, weights, strict=True):
            found = found + weight * self.corrections[name]
        return found

    def nll(self, log_variance: np.ndarray) -> float:
        return float(0.5 * np.mean(np.log(2 * np.pi) + log_variance + self.squares * np.exp(-log_variance)))

    def only(self, chosen: np.ndarray) -> "_Likelihood":
        corrections = {name: value[chosen] for name, value in self.corrections.items()}
        return _Likelihood(self.base[chosen], self.gate[chosen], self.squares[chosen], corrections)

    def fitted(self, columns: Sequence[str]) -> tuple[float, np.ndarray]:
        """(c, s) of largest likelihood with s ≥ 0; convex in both. Without corrections there is no constant."""
        if not columns:
            return 0.0, np.zeros(0)
        design = np.stack([self.gate, *(self.corrections[name] for name in columns)])
        axes = tuple(range(1, design.ndim))

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            eta = self.base + np.tensordot(x, design, 1)
            ratio = self.squares * np.exp(-eta)
            return float(np.mean(0.5 * (eta + ratio))), (design * (0.5 * (1 - ratio))).mean(axes)

        start = np.zeros(len(design))
        bounds = [(None, None)] + [(0.0, _LARGEST_WEIGHT)] * len(columns)
        options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500}
        found = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        return float(found[0]), found[1:]

    def cross_validated(self, columns: Sequence[str], fold: np.ndarray) -> float:
        total = 0.0
        for k in range(_FOLDS):
            left_out = self.only(fold == k)
            found = left_out.log_variance(columns, *self.only(fold != k).fitted(columns))
            total += left_out.nll(found) * left_out.base.size
        return total / self.base.size


class KeptBatches:
    """Evaluations of training frames for the residual model of the combination: evenly spread, and not too many.

    Which batches are kept does not depend on the rank that has them.

    Args:
        n_atoms_of_frame: Of all ranks' frames.
    """

    def __init__(self, n_atoms_of_frame: Sequence[int]) -> None:
        self._before = np.cumsum([0, *n_atoms_of_frame]).tolist()
        self.batches: list[tuple[ForwardPass, Targets]] = []

    def add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        """Keeps the batch where it is one of the chosen and has forces."""
        if targets.forces is None:
            return
        total, own = self._before[-1], len(forward_pass.numbers)
        start = self._before[int(targets.frames[0])]

        def chosen(n_atoms: int) -> int:
            # Of as many atoms in batches like this one; rounded up, so that the first batch is always there.
            return -(-n_atoms * min(_MOST_KEPT_ATOMS, total) // (total * own))

        if chosen(start + own) > chosen(start):
            self.batches.append((replace(forward_pass, gradients=None, members=None), targets))


def inputs_of(
    calibrated: Mapping[str, tuple[FittedMethod, Calibrator]], elements: frozenset[int]
) -> CombinationInputs | None:
    """How the combination reads a batch; None where no method can be its anchor."""
    fitted = {name: method for name, (method, _) in calibrated.items()}
    growing = [name for name, method in fitted.items() if method.head.grows]
    if not growing:
        warnings.warn(
            f"none of {', '.join(fitted)} measures a distance that a combination can fall back on: the first is the "
            "primary one. Fit 'bll' with them.",
            UQWarning,
            stacklevel=3,
        )
        return None
    # What costs passes of its own was not kept for the training frames.
    kept = [name for name in growing if not fitted[name].head.gradients]
    anchor = (kept or growing)[0]
    return CombinationInputs(
        anchor=anchor,
        others=tuple(name for name in fitted if name != anchor),
        distances=tuple(name for name in kept if name != anchor),
        elements=tuple(sorted(elements)),
        calibrators={name: method.calibrators["forces"] for name, method in fitted.items()},
        alternative=calibrated[anchor][1],
    )


def combine(
    inputs: CombinationInputs,
    heads: Mapping[str, Head],
    training: Sequence[tuple[ForwardPass, Targets]],
    calibration: Sequence[tuple[ForwardPass, dict[str, Raw], Targets]],
    communicator: Communicator,
    progress: bool,
) -> Fitted:
    """The combination of fitted methods, from kept training batches of all ranks and the calibration batches."""
    read = {name: heads[name] for name in (inputs.anchor, *inputs.distances)}
    only = replace(inputs, others=())  # the other methods' own scores of training frames mean nothing
    if heads[inputs.anchor].gradients:
        training = ()  # evaluated without them
    with torch.no_grad():
        seen = [_rows(only, e, {name: head(e) for name, head in read.items()}, t) for e, t in training]
        held_out = [_rows(inputs, e, raws, t) for e, raws, t in calibration]
    features = _gathered(_joined_rows(seen) if seen else None, held_out[0][0], communicator)
    return fit_combination(inputs, features, _joined_rows(held_out), title="combine" if progress else "")


AtomRows = tuple[CombinationFeatures, torch.Tensor, torch.Tensor]


def _rows(inputs: CombinationInputs, forward_pass: ForwardPass, raws: Mapping[str, Raw], targets: Targets) -> AtomRows:
    """CombinationFeatures, squared residuals and frames of the atoms of a batch."""
    assert forward_pass.forces is not None
    squares = (residuals_of(targets.forces, forward_pass.forces)) ** 2
    features = inputs.features(forward_pass, raws)
    if features.base.shape[1] == 1:
        squares = squares.mean(1, keepdim=True)
    return features, squares, targets.frames[forward_pass.frame_of_atom]


def _joined_rows(rows: Sequence[AtomRows]) -> AtomRows:
    batches, squares, frames = zip(*rows, strict=True)
    return CombinationFeatures.joined(batches), torch.cat(squares), torch.cat(frames)


def _gathered(rows: AtomRows | None, like: CombinationFeatures, communicator: Communicator) -> AtomRows | None:
    """Training rows of all ranks in the order of their frames; None where there are none."""
    widths = [
        like.base.shape[1],
        like.careful.shape[1],
        like.around.shape[1],
        like.network_inputs.shape[1],
        like.base.shape[1],
        1,
    ]
    flat = None
    if rows is not None:
        features, squares, frames = rows
        flat = torch.cat(
            [
                features.base,
                features.careful,
                features.around,
                features.network_inputs,
                squares,
                frames[:, None].double(),
            ],
            1,
        )
    flat = gather(flat, communicator)
    if flat is None:
        return None
    flat = flat.to(like.base.device)  # a rank without rows has them on the CPU
    base, careful, around, network_inputs, squares, frames = flat[flat[:, -1].sort(stable=True).indices].split(
        widths, 1
    )
    others = base.new_zeros((*base.shape, 0))
    return CombinationFeatures(base, careful, others, around, network_inputs), squares, frames[:, 0].long()
