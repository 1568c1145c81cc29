"""P-DRUM: networks that predict the residual of a potential from its own features.

With D_i the features of an atom, r a network, and ΔE and ΔF_i the residuals (label minus prediction):

    norm               Σ_i r(D_i) → |ΔE|      r(D_i) → ‖ΔF_i‖                  r > 0
    diff               Σ_i r(D_i) → ΔE        Σ_c g_c(D_i) v_ic → ΔF_i         v_ic rotate with the structure
    diff_invariant     Σ_i r(D_i) → ΔE        r(D_i) → ΔF_i                    as published
    diff_conservative  Σ_i r(D_i) → ΔE        -∂/∂R_i Σ_j r(D_j) → ΔF_i        one more backward pass

norm learns how large the errors are, the other variants learn the average error; |prediction| is the score. The
published F-diff, `diff_invariant`, cannot be equivariant: the features do not rotate with the structure, but ΔF_i does.
Over all orientations Q of the same structure the best prediction is the mean of QΔF_i, which is zero: trained on
structures in random orientations, it predicts that there is no error. It is meaningful only for crystals in one
orientation.

Several networks are trained, each without one fold of the frames; a new structure gets the mean of their predictions.
The residuals of frames that the potential itself was trained on are smaller than those of other frames: the
calibration, on frames that it was not trained on, sets the scale.

Source: P-DRUM (arXiv 2509.02927), E-norm, E-diff, F-norm and F-diff; the quantile is that of Ho, Ortner and Wang 2025;
the logarithm, the equivariant F-diff and the conservative F-diff are our own derivations.
"""

import warnings
from dataclasses import asdict, dataclass, field
from typing import Any, get_args

import torch
from torch import Tensor

from ase_uq.communicator import Communicator, gather
from ase_uq.errors import LabelError, UQWarning
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.methods.base import Accumulator, Method
from ase_uq.methods.pdrum.conservative import force_features, functions_of, ridge_regression
from ase_uq.methods.pdrum.directions import directions, mixing_of
from ase_uq.methods.pdrum.head import PDRUMHead, Target, Variant
from ase_uq.methods.pdrum.rows import Rows, RowStore
from ase_uq.numerics.networks import Loss, MLPEnsemble, folds_of, out_of_fold, pinball, squared_error, squared_log_error
from ase_uq.numerics.training import Training, cross_fit

_EVALUATED_TOGETHER = 4096  # atoms
_SMALLEST = 1e-300  # avoids division by zero


@dataclass(frozen=True)
class PDRUM(Method):
    """Trains networks on force and energy residuals.

    Energies get a network of their own if enough training frames have energy labels; otherwise their uncertainty is
    the mean of the forces' uncertainty. The uncertainty of the stress is always this mean.

    Args:
        variant: Property of the residuals that is predicted; the module docstring lists the variants.
        target: Statistic of the magnitudes that `norm` predicts: the mean, as published; the mean of the logarithm,
            which a few large errors do not dominate; or a quantile.
        quantile: Quantile to predict, where `target` is a quantile.
        folds: Number of networks; each is trained without one fold of the frames.
        training: Training settings of the networks.
    """

    name = "pdrum"
    head = PDRUMHead
    forces = True
    labels = True
    variant: Variant = "norm"
    target: Target = "magnitude"
    quantile: float = 0.9
    folds: int = 5
    training: Training = field(default_factory=lambda: Training(hidden=(64, 64)))

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise ValueError(f"variants are {', '.join(get_args(Variant))}, not {self.variant!r}.")
        if self.target not in get_args(Target):
            raise ValueError(f"targets are {', '.join(get_args(Target))}, not {self.target!r}.")
        if self.target != "magnitude" and self.variant != "norm":
            raise ValueError(f"only the variant 'norm' has a {self.target} target, not {self.variant!r}.")
        if not 0 < self.quantile < 1:
            raise ValueError(f"a quantile lies between 0 and 1, not at {self.quantile!r}.")
        if self.folds < 2:
            raise ValueError(f"cross-fitting needs 2 folds or more, not {self.folds}.")

        # The potential keeps the graph of its forward pass for this variant only.
        object.__setattr__(self, "gradients", self.variant == "diff_conservative")

    def start(self) -> "PDRUMAccumulator":
        return PDRUMAccumulator(self)


class PDRUMAccumulator(Accumulator):
    """Collects the rows of all training atoms."""

    def __init__(self, method: PDRUM) -> None:
        self.method = method
        self.rows = RowStore()
        self.mixing: Tensor | None = None

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        vectors, seed, device = None, self.method.training.seed, forward_pass.features.device
        if self.method.variant == "diff":
            n_vectors = 0 if forward_pass.vectors is None else forward_pass.vectors.shape[2]
            self.mixing = mixing_of(n_vectors, seed).to(device)
            vectors = directions(forward_pass, self.mixing)
        elif self.method.variant == "diff_conservative":
            self.mixing = functions_of(forward_pass.features.shape[1], seed).to(device)
            vectors = force_features(forward_pass, self.mixing)
        self.rows.add(forward_pass, targets, vectors)

    def _finish(self, communicator: Communicator) -> PDRUMHead:
        method = self.method
        rows = self.rows.finish(communicator)
        labelled = len(rows.with_forces().frame_of_atom.unique())
        if labelled < 2 * method.folds:
            raise LabelError(
                f"P-DRUM learns from the errors of forces: its {method.folds} folds need {2 * method.folds} labelled "
                f"training frames, there are {labelled} with reference forces. Label more of them, or leave 'pdrum' "
                "out of the methods: 'bll' and 'kernel' need none."
            )
        if method.variant == "diff_invariant" and communicator.rank == 0:
            warnings.warn(
                "diff_invariant predicts forces from features that do not turn with the structure: it has a meaning "
                "only where all structures have one orientation. Use 'diff' otherwise.",
                UQWarning,
                stacklevel=2,
            )
        title = "pdrum" if communicator.rank == 0 and self.progress else ""
        settings: dict[str, Any] = asdict(method)
        tensors: dict[str, Tensor] = {}
        # If any rank has frames, the first one does.
        mixing = gather(self.mixing if communicator.rank == 0 else None, communicator)
        if mixing is not None:
            tensors["mixing"] = mixing
        _fit_energy(method, rows.with_energy(), settings, tensors, title and f"{title} energy")
        return _fit_forces(method, rows.with_forces(), settings, tensors, title and f"{title} forces")


def _fit_energy(method: PDRUM, rows: Rows, settings: dict[str, Any], tensors: dict[str, Tensor], title: str) -> None:
    """Adds an ensemble for the energy, if enough frames have energy labels."""
    if len(rows.frames) < 2 * method.folds:
        return
    targets, segments = rows.energy[:, None], rows.place_of_frame
    ensemble = cross_fit(
        rows.features,
        targets.abs() if method.variant == "norm" else targets,
        rows.frames,
        training=method.training,
        loss=_loss(method),
        folds=method.folds,
        output="softplus" if method.variant == "norm" else "linear",
        segments=segments,
        title=title,
    )
    fold = folds_of(rows.frames, method.folds)
    each = out_of_fold(ensemble, rows.features, fold[segments])[:, 0]
    sums = torch.zeros_like(rows.energy).index_add_(0, segments, each)
    settings["energy"] = ensemble.settings
    tensors |= {f"energy.{name}": buffer for name, buffer in ensemble.named_buffers()}
    scores = PDRUMHead(settings, tensors).energy_score(sums)
    settings["energy"]["out_of_fold"] = _ratio(rows.energy.square(), scores)


def _fit_forces(
    method: PDRUM, rows: Rows, settings: dict[str, Any], tensors: dict[str, Tensor], title: str
) -> PDRUMHead:
    """The head, including the networks or weights that predict the forces."""
    fold = folds_of(rows.frame_of_atom, method.folds)
    vectors = rows.vectors if "mixing" in tensors else None
    if vectors is not None:
        tensors["vector_units"] = _root_mean_square(vectors.flatten(0, 1))
        tensors["force_unit"] = _root_mean_square(rows.residuals.flatten())
    if vectors is not None and method.variant == "diff_conservative":
        weights = ridge_regression(vectors / tensors["vector_units"], rows.residuals / tensors["force_unit"], fold)
        tensors["weights"] = weights.mean(0)
        settings["forces"] = {}
        seen, unseen = tensors["weights"].expand(len(fold), -1), weights[fold]
    else:
        ensemble = _force_ensemble(method, rows, tensors, title)
        tensors |= {f"forces.{name}": buffer for name, buffer in ensemble.named_buffers()}
        settings["forces"] = ensemble.settings
        seen = torch.cat([ensemble(some) for some in rows.features.split(_EVALUATED_TOGETHER)])
        unseen = out_of_fold(ensemble, rows.features, fold)
    head = PDRUMHead(settings, tensors)
    settings["mean_score"] = max(float(head.force_score(seen, vectors).mean()), _SMALLEST)
    settings["forces"]["out_of_fold"] = _ratio(rows.residuals.square().mean(1), head.force_score(unseen, vectors))
    return head


def _force_ensemble(method: PDRUM, rows: Rows, tensors: dict[str, Tensor], title: str) -> MLPEnsemble:
    """Networks that predict magnitudes, forces, or weights of vectors."""
    targets, loss, width = rows.residuals, _loss(method), None
    if method.variant == "norm":
        targets = targets.norm(dim=1, keepdim=True)
    elif method.variant == "diff":
        scaled = (rows.vectors / tensors["vector_units"]).flatten(1)
        targets, loss = torch.cat([targets / tensors["force_unit"], scaled], 1), _error_of_combination
        width = rows.vectors.shape[2]
    return cross_fit(
        rows.features,
        targets,
        rows.frame_of_atom,
        training=method.training,
        loss=loss,
        folds=method.folds,
        output="softplus" if method.variant == "norm" else "linear",
        n_outputs=width,
        title=title,
    )


def _loss(method: PDRUM) -> Loss:
    if method.target == "quantile":
        return pinball(method.quantile)
    return squared_log_error if method.target == "log" else squared_error


def _error_of_combination(weights: Tensor, targets: Tensor) -> Tensor:
    """⅓‖Σ_c g_c v_c - ΔF‖²; a target is ΔF followed by its vectors, component by component."""
    vectors = targets[..., 3:].unflatten(-1, (3, -1))
    return squared_error(torch.einsum("mic,miac->mia", weights, vectors), targets[..., :3])


def _root_mean_square(values: Tensor) -> Tensor:
    """Root mean square over the first dimension; 1 where all values are zero."""
    root = values.square().mean(0).sqrt()
    return torch.where(root > 0, root, 1.0)


def _ratio(squares: Tensor, variances: Tensor) -> float:
    """Mean square over mean predicted variance; 1 if the variances are honest."""
    return float(squares.mean() / variances.mean().clamp(min=_SMALLEST))
