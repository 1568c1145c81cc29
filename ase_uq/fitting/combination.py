"""Fits the combination of several methods: finds which corrections the calibration frames support."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.calibration import FarFieldCalibrator
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
    Fade,
    corrections_of_methods,
)
from ase_uq.uncertainty_model.corrections import bounded, floored
from ase_uq.uncertainty_model.far_field import FarField
from ase_uq.uncertainty_model.fitted_method import FittedMethod

_MOST_KEPT_ATOMS = 20_000  # atoms of training frames for the residual model
_LARGEST_WEIGHT = 1.0
_FOLDS = 5
_END_QUANTILE, _SMALLEST_END = 0.8, 0.1  # of the way of the calibration rows: where corrections end
FLOOR_QUANTILE = 0.5  # of log σ² of the anchor over the calibration rows
_FRAMES_OF_ANCHOR = 3  # weight, in frames, of the anchor alone beside the corrections that the frames ask for
_TRAINING = Training(hidden=(32, 32), batch=512, max_epochs=150, patience=30)


@dataclass(frozen=True)
class Fitted:
    """A combination, and its variances for the calibration atoms, from networks that have not seen them.

    Args:
        combination: The fitted combination.
        variance: (n_atoms, n_components) force variances of the calibration atoms, (eV/Å)², networks out of fold.
        of_folds: (n_folds,) negative log-likelihood of a component in each fold, with weights of the others.
    """

    combination: Combination
    variance: np.ndarray
    of_folds: np.ndarray


def fit_combination(
    inputs: CombinationInputs,
    training: tuple[CombinationFeatures, Tensor, Tensor] | None,
    calibration: tuple[CombinationFeatures, Tensor, Tensor],
    *,
    title: str = "",
) -> Fitted:
    """Tries the anchor alone, with the other methods, with the residual model, and with all; keeps the likeliest.

    Args:
        inputs: How features are made from a batch.
        training: For the training atoms: the features that the combination reads, the (n_atoms, n_components) squared
            residuals in (eV/Å)² (their mean if the anchor has one component; NaN without a label), and the (n_atoms,)
            number of each atom's frame. None if no training frame has forces.
        calibration: The same for the calibration atoms.
        title: Title of the progress bar; empty for no bar.
    """
    features, squares, frames = calibration
    corrections = corrections_of_methods(features, inputs.others)
    ensemble, predicted = _residual_model(training, calibration, title)
    corrections[RESIDUAL] = bounded(predicted)
    fade = _fade(inputs.span, features)
    faded = fade(features).expand_as(features.base)
    table = {name: (faded * value).expand_as(features.base).cpu().numpy() for name, value in corrections.items()}
    tried = {"anchor": (), "methods": inputs.others, RESIDUAL: (RESIDUAL,), "all": (*inputs.others, RESIDUAL)}
    candidates = {name: columns for name, columns in tried.items() if inputs.others or name in ("anchor", RESIDUAL)}
    floor = float(features.base.quantile(FLOOR_QUANTILE))
    rows = Likelihood(features.base.cpu().numpy(), faded.cpu().numpy(), squares.cpu().numpy(), table, floor)
    found = earned(rows, candidates, frames.cpu().numpy())
    kept = ensemble if RESIDUAL in found.weights else None
    combination = Combination(inputs, fade, floor, kept, found.constant, found.weights, found.likelihoods)
    corrected = rows.log_variance(list(found.weights), found.constant, np.array(list(found.weights.values())))
    return Fitted(combination, np.exp(rows.floored(corrected)), found.of_folds)


@dataclass(frozen=True)
class Earned:
    """Corrections that the calibration frames support.

    Args:
        constant: c; 0 without corrections.
        weights: s_k by name.
        likelihoods: Cross-validated mean negative log-likelihood of a component, of each variant that was tried.
        of_folds: (n_folds,) that of the variant that was kept, in each fold.
    """

    constant: float
    weights: dict[str, float]
    likelihoods: dict[str, float]
    of_folds: np.ndarray


def earned(rows: "Likelihood", tried: Mapping[str, Sequence[str]], frames: np.ndarray) -> Earned:
    """The likeliest of several variants on left-out frames, or the anchor alone if the gain may be chance.

    Args:
        rows: Calibration rows.
        tried: Names of the corrections of each variant; `anchor` has none.
        frames: (n_rows,) number of the frame of each row.
    """
    fold = contiguous_folds(frames)
    of_folds = {name: rows.cross_validated(columns, fold) for name, columns in tried.items()}
    likelihoods = {name: float(values.mean()) for name, values in of_folds.items()}
    best = min(likelihoods, key=lambda name: likelihoods[name])
    if not is_earned(of_folds["anchor"] - of_folds[best]):
        best = "anchor"
    constant, fitted = rows.fitted(tried[best])
    # What few frames ask for is partly chance.
    share = (n_frames := len(np.unique(frames))) / (n_frames + _FRAMES_OF_ANCHOR)
    constant, fitted = share * constant, share * fitted
    # A correction with next to no weight would cost an evaluation without effect.
    weights = {name: weight for name, weight in zip(tried[best], fitted.tolist(), strict=True) if weight > 1e-3}
    return Earned(constant if weights else 0.0, weights, likelihoods, of_folds[best])


def _fade(span: float, features: CombinationFeatures) -> Fade:
    """Where corrections count, from the features of the calibration atoms."""
    fade = Fade(float(features.field.mean()), span)
    return replace(fade, end=end_of(fade.way(features).cpu().numpy()))


def end_of(way: np.ndarray) -> float:
    """ρ, where corrections end, from the way of the calibration rows."""
    return min(max(float(np.quantile(way, _END_QUANTILE)), _SMALLEST_END), 1.0)


def is_earned(gains: np.ndarray) -> bool:
    """Whether the mean gain of the folds is above its standard error: by chance, few frames seem to favour anything."""
    return float(gains.mean()) > float(gains.std(ddof=1)) / len(gains) ** 0.5


def _residual_model(
    training: tuple[CombinationFeatures, Tensor, Tensor] | None,
    calibration: tuple[CombinationFeatures, Tensor, Tensor],
    title: str,
) -> tuple[MLPEnsemble, Tensor]:
    """The networks, and for each calibration atom the unbounded output of the network that has not seen its frame."""
    features, squares, frames = calibration
    rows, ratios = features.network_inputs, squares * torch.exp(-features.base)
    if training is not None:
        trained, trained_squares, trained_frames = training
        trained_ratios = trained_squares * torch.exp(-trained.base)
        # A potential errs less on the frames it was trained on, so their mean error must not be learned. If they have
        # no errors at all, as with its own forces for labels, the ratios are NaN and nothing is learned from them.
        rows, ratios = (
            torch.cat([trained.network_inputs, rows]),
            torch.cat([trained_ratios / trained_ratios.nanmean(), ratios]),
        )
        frames = _interleaved(trained_frames, frames)
    ensemble = cross_fit(rows, ratios, frames, training=_TRAINING, loss=_nll, folds=_FOLDS, n_outputs=1, title=title)
    predicted = out_of_fold(ensemble, rows, folds_of(frames, _FOLDS))
    return ensemble, predicted[len(rows) - len(features.network_inputs) :]


def _interleaved(first: Tensor, second: Tensor) -> Tensor:
    """Renumbers the frames of two data sets so that they alternate in proportion, each set in its own order.

    Folds are made of consecutive frames. A few calibration frames after many training frames would all be in one fold;
    if the training frames have no labels, nothing would be left to train the network of that fold on.
    """
    one, two = (frames.unique(return_inverse=True)[1] for frames in (first, second))
    n_one, n_two = (len(frames.unique()) for frames in (first, second))
    # Even and odd numbers, so that no frame of one set is taken for a frame of the other.
    return torch.cat([2 * n_two * one, 2 * n_one * two + 1])


def _nll(predictions: Tensor, ratios: Tensor) -> Tensor:
    """Negative log-likelihood per component, without terms that do not depend on the networks.

    Args:
        predictions: Unbounded logarithms of the correction of σ².
        ratios: r²/σ² with the σ of the anchor.
    """
    correction = bounded(predictions)
    return 0.5 * (correction + ratios * torch.exp(-correction)).mean(-1)


def contiguous_folds(frames: np.ndarray) -> np.ndarray:
    """(n_atoms,) fold of each atom, by consecutive frames: neighbours in a trajectory are not independent."""
    groups, place = np.unique(frames, return_inverse=True)
    return place * _FOLDS // len(groups)


@dataclass(frozen=True)
class Likelihood:
    """Likelihood of the components of the calibration atoms; all arrays are (n_atoms, n_components).

    Args:
        base: log σ² of the anchor.
        fade: Share of the corrections that counts, in [0, 1].
        squares: Squared residuals, (eV/Å)².
        corrections: Corrections of log σ² times that share, by name.
        floor: Log σ² below which corrections do not lead.
    """

    base: np.ndarray
    fade: np.ndarray
    squares: np.ndarray
    corrections: dict[str, np.ndarray]
    floor: float

    def log_variance(self, columns: Sequence[str], constant: float, weights: np.ndarray) -> np.ndarray:
        """The sum base + fade · c + Σ_k s_k · correction_k over the columns."""
        total = self.base + self.fade * constant
        for name, weight in zip(columns, weights, strict=True):
            total = total + weight * self.corrections[name]
        return total

    def floored(self, log_variance: np.ndarray) -> np.ndarray:
        """The log σ² that counts."""
        return floored(torch.from_numpy(log_variance), torch.from_numpy(self.base), self.floor).numpy()

    def nll(self, log_variance: np.ndarray) -> float:
        """Mean Gaussian negative log-likelihood of a component."""
        log_variance = self.floored(log_variance)
        return float(0.5 * np.mean(np.log(2 * np.pi) + log_variance + self.squares * np.exp(-log_variance)))

    def only(self, chosen: np.ndarray) -> "Likelihood":
        corrections = {name: value[chosen] for name, value in self.corrections.items()}
        return replace(
            self,
            base=self.base[chosen],
            fade=self.fade[chosen],
            squares=self.squares[chosen],
            corrections=corrections,
        )

    def fitted(self, columns: Sequence[str]) -> tuple[float, np.ndarray]:
        """(c, s) of largest likelihood with s ≥ 0, a convex problem. Without corrections the constant is 0."""
        if not columns:
            return 0.0, np.zeros(0)
        design = np.stack([self.fade, *(self.corrections[name] for name in columns)])
        axes = tuple(range(1, design.ndim))

        def loss(x: np.ndarray) -> tuple[float, np.ndarray]:
            eta = self.base + np.tensordot(x, design, 1)
            ratio = self.squares * np.exp(-eta)
            return float(np.mean(0.5 * (eta + ratio))), (design * (0.5 * (1 - ratio))).mean(axes)

        start = np.zeros(len(design))
        bounds = [(None, None)] + [(0.0, _LARGEST_WEIGHT)] * len(columns)
        options = {"ftol": 1e-14, "gtol": 1e-9, "maxiter": 500}
        solution = minimize(loss, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x
        return float(solution[0]), solution[1:]

    def cross_validated(self, columns: Sequence[str], fold: np.ndarray) -> np.ndarray:
        """(n_folds,) mean negative log-likelihood of a component of each fold, with weights fitted on the others."""
        parts = []
        for k in range(_FOLDS):
            left_out = self.only(fold == k)
            parts.append(left_out.nll(left_out.log_variance(columns, *self.only(fold != k).fitted(columns))))
        return np.array(parts)


class KeptBatches:
    """Keeps evaluated training frames for the residual model of the combination: evenly spread, and not too many.

    Which batches are kept does not depend on the rank that evaluated them.

    Args:
        n_atoms_of_frame: Number of atoms of each frame, for the frames of all ranks.
    """

    def __init__(self, n_atoms_of_frame: Sequence[int]) -> None:
        self._before = np.cumsum([0, *n_atoms_of_frame]).tolist()
        self.batches: list[tuple[ForwardPass, Targets]] = []

    def add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        """Keeps the batch if its place is among the chosen ones and it has forces."""
        if targets.forces is None:
            return
        total, in_batch = self._before[-1], len(forward_pass.numbers)
        start = self._before[int(targets.frames[0])]

        def n_kept(n_atoms: int) -> int:
            # Number of batches to keep among the first n_atoms, if all batches were as large as this one. Rounded up,
            # so that the first batch is always kept.
            return -(-n_atoms * min(_MOST_KEPT_ATOMS, total) // (total * in_batch))

        if n_kept(start + in_batch) > n_kept(start):
            self.batches.append((replace(forward_pass, gradients=None, members=None), targets))


def inputs_of(fitted: Mapping[str, FittedMethod], elements: frozenset[int]) -> CombinationInputs | None:
    """How the combination reads a batch; None, with a warning, if no method can be its anchor.

    Args:
        fitted: The calibrated methods by name.
        elements: Atomic numbers of the training frames.
    """
    anchors = [name for name, method in fitted.items() if isinstance(method.calibrators["forces"], FarFieldCalibrator)]
    if not anchors:
        warnings.warn(
            f"none of {', '.join(fitted)} measures a distance that grows towards frames that the potential knows "
            "nothing of, so they are not combined and the first is the primary estimator. Fit 'bll' with them.",
            UQWarning,
            stacklevel=4,
        )
        return None
    # Training frames are kept without gradients, so methods that need these cannot be evaluated on them.
    kept = [name for name in anchors if not fitted[name].head.gradients]
    anchor = (kept or anchors)[0]
    return CombinationInputs(
        anchor=anchor,
        others=tuple(name for name in fitted if name != anchor),
        distances=tuple(name for name in kept if name != anchor),
        elements=tuple(sorted(elements)),
        methods=fitted,
    )


def combine(
    inputs: CombinationInputs,
    far_field: FarField | None,
    heads: Mapping[str, Head],
    training: Sequence[tuple[ForwardPass, Targets]],
    calibration: Sequence[tuple[ForwardPass, dict[str, Raw], Targets]],
    communicator: Communicator,
    progress: bool,
) -> Fitted:
    """Fits the combination of fitted methods.

    Args:
        inputs: How the combination reads a batch.
        far_field: What forces may be wrong by where the potential knows nothing.
        heads: Heads by method.
        training: Kept training batches of this rank.
        calibration: Calibration batches of this rank with their raw scores.
        communicator: Ranks whose batches are gathered.
        progress: Whether to show a progress bar.
    """
    read = {name: heads[name] for name in (inputs.anchor, *inputs.distances)}
    only = replace(inputs, others=())  # on training frames the scores of the other methods mean nothing
    if heads[inputs.anchor].gradients:
        training = ()  # they were kept without gradients
    with torch.no_grad():
        trained = [_rows(only, far_field, e, {name: head(e) for name, head in read.items()}, t) for e, t in training]
        held_out = [_rows(inputs, far_field, e, raws, t) for e, raws, t in calibration]
    device = next(heads[inputs.anchor].buffers()).device
    gathered = [_gathered(_joined_rows(rows) if rows else None, device, communicator) for rows in (trained, held_out)]
    assert gathered[1] is not None
    return fit_combination(inputs, gathered[0], gathered[1], title="combine" if progress else "")


AtomRows = tuple[CombinationFeatures, torch.Tensor, torch.Tensor]


def _rows(
    inputs: CombinationInputs,
    far_field: FarField | None,
    forward_pass: ForwardPass,
    raws: Mapping[str, Raw],
    targets: Targets,
) -> AtomRows:
    """Features, squared residuals and frame numbers of the atoms of a batch."""
    assert forward_pass.forces is not None
    squares = (residuals_of(targets.forces, forward_pass.forces)) ** 2
    limit = None if far_field is None else far_field.variance(forward_pass)
    features = inputs.features(forward_pass, raws, limit)
    if features.base.shape[1] == 1:
        squares = squares.mean(1, keepdim=True)
    return features, squares, targets.frames[forward_pass.frame_of_atom]


def _joined_rows(rows: Sequence[AtomRows]) -> AtomRows:
    batches, squares, frames = zip(*rows, strict=True)
    return CombinationFeatures.joined(batches), torch.cat(squares), torch.cat(frames)


def _gathered(rows: AtomRows | None, device: torch.device, communicator: Communicator) -> AtomRows | None:
    """Rows of all ranks in the order of their frames, on the device; None if there are none."""
    names = CombinationFeatures.__dataclass_fields__
    features, squares, frames = rows or (None, None, None)
    found = [
        gather(part, communicator)
        for part in (frames, squares, *(None if features is None else getattr(features, name) for name in names))
    ]
    if found[0] is None:
        return None
    order = found[0].sort(stable=True).indices
    frames, squares, *parts = (part[order].to(device) for part in found if part is not None)
    return CombinationFeatures(*parts), squares, frames.long()
