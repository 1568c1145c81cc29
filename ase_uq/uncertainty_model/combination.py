"""The primary estimator where several methods are fitted: learned where the calibration data support it.

    log σ² = A + g·(c + Σ_k s_k·t_k) + (1 - g)·t_A,    0 ≤ s_k ≤ 1

A is the anchor, the calibrated site sums of the first method that measures a distance (the Bayesian last layer by
default), if possible without passes of its own: it grows with the distance from the training frames, however far. The
t_k correct it:

    of a method      by what its own calibrated log σ² differs from the anchor's
    of the errors    an ensemble of small networks reads the features of an atom and the mean of those around it, its
                     element, the predicted force and the distances around it, and is trained for the likelihood of
                     errors about the anchor

and are bounded, |t_k| ≤ 2. The gate g, between 0 and 1, closes them off where nothing supports them: likelihood on
frames like the training frames picks corrections that are wrong by orders of magnitude elsewhere. It looks at the
distances at and around the atom. Their mean says how far; it may be large, while their pattern, near against far
sites, must be one of the calibration data: an atom deep in a slab looks like one of the bulk, but not those around it.

Beyond the gate the anchor itself is an extrapolation. Two forms of it were calibrated, an affine one and a power law;
out there the larger one counts: t_A ≥ 0 is what it is larger by than A, bounded as well.

Which corrections are kept is decided by the likelihood of left-out calibration frames. Networks are trained on
training and calibration frames, by cross-fitting: what a calibration frame reads here comes from a network that has
not seen it. Each network leaves out as large a share of the one as of the other.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from ase_uq.calibration import Calibrator, load_calibrator
from ase_uq.forward_pass import Evaluation
from ase_uq.methods.base import Raw
from ase_uq.numerics.networks import Ensemble, Training, cross_fit, folds_of, out_of_fold
from ase_uq.numerics.sites import RADII, around, mean_around

LARGEST_CORRECTION = 2.0  # of log σ²: a factor e in σ
_LARGEST_WEIGHT = 1.0
_FOLDS = 5
_TRAINING = Training(hidden=(32, 32), batch=512, max_epochs=150, patience=30)
_NEIGHBOURHOOD = RADII[1]
_SMALLEST = 1e-12
_FORCE_FLOOR = 1e-3  # eV/Å, beside which a predicted force is none
_PATTERN_RIDGE = 1e-3  # of the standardised pattern: directions that hardly vary decide nothing
_PATTERN_QUANTILE, _PATTERN_SLOPE = 0.999, 4.0
_LEVEL_QUANTILE, _LEVEL_SLOPE = 0.999, 2.0
RESIDUAL = "residual"  # how the correction by networks is called


@dataclass(frozen=True)
class Scene:
    """What the combination reads of a batch.

    Args:
        base: (n_atoms, n_components) the anchor's log σ².
        careful: (n_atoms, n_components) t_A ≥ 0.
        others: (n_atoms, n_components, n_others) log σ² of the other methods.
        around: (n_atoms, n_views) logarithms of the anchor's distance at the atom and around it.
        inputs: (n_atoms, n_inputs) of the networks.
    """

    base: Tensor
    careful: Tensor
    others: Tensor
    around: Tensor
    inputs: Tensor

    @classmethod
    def joined(cls, scenes: Sequence["Scene"]) -> "Scene":
        """The atoms of all batches, one after the other."""
        return cls(*(torch.cat([getattr(scene, name) for scene in scenes]) for name in cls.__dataclass_fields__))


@dataclass(frozen=True)
class View:
    """How a scene is made of a batch: which methods are read.

    Args:
        anchor: Name of the anchor.
        others: Names of the other methods.
        distances: Names of those among them whose distance is an input of the networks.
        elements: Atomic numbers told apart by the networks.
        calibrators: Of the forces, by method.
        alternative: Of the forces, the other form of the anchor's.
    """

    anchor: str
    others: tuple[str, ...]
    distances: tuple[str, ...]
    elements: tuple[int, ...]
    calibrators: Mapping[str, Calibrator]
    alternative: Calibrator

    def scene(self, evaluation: Evaluation, raws: Mapping[str, Raw]) -> Scene:
        """What the combination reads of a batch that has forces."""
        assert evaluation.forces is not None
        sites = around(raws[self.anchor].distance, evaluation.edges, RADII)
        views = torch.cat([sites.sums / sites.counts, sites.hops[:, 1:]], 1).clamp(min=_SMALLEST).log()
        base = _log_variance(self.calibrators[self.anchor], raws[self.anchor])
        careful = _log_variance(self.alternative, raws[self.anchor]) - base
        others = [
            _log_variance(self.calibrators[name], raws[name], base.shape[1]).expand_as(base) for name in self.others
        ]
        features = evaluation.features.double()
        kinds = torch.tensor(self.elements, device=evaluation.numbers.device)
        columns = [
            features,
            # Its neighbours pull at the atom, so their errors are in its force.
            mean_around(features, evaluation.edges, _NEIGHBOURHOOD),
            views,
            (evaluation.forces.double().norm(dim=1, keepdim=True) + _FORCE_FLOOR).log(),
            (evaluation.numbers[:, None] == kinds).double(),
            *(raws[name].distance.clamp(min=_SMALLEST).log()[:, None] for name in self.distances),
        ]
        return Scene(
            base=base,
            careful=_bounded(careful.clamp(min=0)),
            others=torch.stack(others, 2) if others else base.new_zeros((*base.shape, 0)),
            around=views,
            inputs=torch.cat(columns, 1),
        )


class Gate(torch.nn.Module):
    """1 where the distances at and around an atom are like those of the calibration data, falling to 0 elsewhere.

    Args:
        tensors: `centre`, `spread` (n_views - 1,) of the pattern, the views less the first; `precision`
            (n_views - 1, n_views - 1) of the standardised pattern; `edges` (2,) of the logarithm of its squared
            distance and of the mean view.
    """

    centre: Tensor
    spread: Tensor
    precision: Tensor
    edges: Tensor

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        super().__init__()
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)

    @classmethod
    def fit(cls, views: Tensor, calibration: Tensor) -> "Gate":
        """From the (n, n_views) of all atoms at hand, and those of the calibration atoms, which set its edges."""
        pattern = views[:, 1:] - views[:, :1]
        centre, spread = pattern.mean(0), pattern.std(0).clamp(min=1e-9)
        z = (pattern - centre) / spread
        eye = torch.eye(z.shape[1], dtype=z.dtype, device=z.device)
        # As files hold it: `inv` gives columns in a row, and products with it other bits.
        precision = torch.linalg.inv(z.T @ z / len(z) + _PATTERN_RIDGE * eye).contiguous()
        gate = cls({"centre": centre, "spread": spread, "precision": precision, "edges": z.new_zeros(2)})
        far, level = gate._far(calibration).cpu().numpy(), calibration.mean(1).cpu().numpy()
        edges = [np.quantile(far, _PATTERN_QUANTILE), np.quantile(level, _LEVEL_QUANTILE)]
        gate.edges = torch.tensor(edges, dtype=z.dtype, device=z.device)
        return gate

    def _far(self, views: Tensor) -> Tensor:
        z = (views[:, 1:] - views[:, :1] - self.centre) / self.spread
        return ((z @ self.precision) * z).sum(1).clamp(min=_SMALLEST).log()

    def forward(self, views: Tensor) -> Tensor:
        """(n, n_views) → (n,)."""
        pattern = torch.sigmoid(_PATTERN_SLOPE * (self.edges[0] - self._far(views)))
        return pattern * torch.sigmoid(_LEVEL_SLOPE * (self.edges[1] - views.mean(1)))


class Combination(torch.nn.Module):
    """The fitted estimator of forces.

    Args:
        view: How it reads a batch.
        gate: Where corrections count.
        ensemble: Networks of the residual model, or None where it was not kept.
        constant: c.
        weights: s_k by name of a method, and `residual`; those that were not kept are absent.
        likelihoods: Cross-validated mean negative log-likelihoods of a component by what was tried.
    """

    def __init__(
        self,
        view: View,
        gate: Gate,
        ensemble: Ensemble | None,
        constant: float,
        weights: dict[str, float],
        likelihoods: dict[str, float],
    ) -> None:
        super().__init__()
        self.view = view
        self.gate = gate
        self.ensemble = ensemble
        self.constant = constant
        self.weights = weights
        self.likelihoods = likelihoods

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values that, with the buffers and the calibrators of the methods, make it again."""
        return {
            "anchor": self.view.anchor,
            "others": list(self.view.others),
            "distances": list(self.view.distances),
            "elements": list(self.view.elements),
            "alternative": self.view.alternative.settings,
            "ensemble": None if self.ensemble is None else self.ensemble.settings,
            "constant": self.constant,
            "weights": self.weights,
            "likelihoods": self.likelihoods,
        }

    @classmethod
    def load(
        cls, settings: dict[str, Any], tensors: Mapping[str, Tensor], calibrators: Mapping[str, Calibrator]
    ) -> "Combination":
        """The combination with these settings and buffers, and the methods' calibrators of the forces."""
        parts: dict[str, dict[str, Tensor]] = {"gate": {}, "ensemble": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        view = View(
            anchor=settings["anchor"],
            others=tuple(settings["others"]),
            distances=tuple(settings["distances"]),
            elements=tuple(settings["elements"]),
            calibrators=calibrators,
            alternative=load_calibrator(settings["alternative"]),
        )
        ensemble = None if settings["ensemble"] is None else Ensemble(settings["ensemble"], parts["ensemble"])
        return cls(
            view,
            Gate(parts["gate"]),
            ensemble,
            settings["constant"],
            settings["weights"],
            settings["likelihoods"],
        )

    def forward(self, evaluation: Evaluation, raws: Mapping[str, Raw]) -> Tensor:
        """(n_atoms, n_components) variances of force components, squared eV/Å."""
        scene = self.view.scene(evaluation, raws)
        corrections = _of_methods(scene, self.view.others)
        if self.ensemble is not None:
            corrections[RESIDUAL] = _bounded(self.ensemble(scene.inputs))
        total = sum((weight * corrections[name] for name, weight in self.weights.items()), self.constant)
        gate = self.gate(scene.around)[:, None]
        return (scene.base + gate * total + (1 - gate) * scene.careful).exp()

    def describe(self) -> list[str]:
        """What was kept and what each correction weighs, for people; a few lines."""
        kept = " ".join(f"+ {weight:.2f}·{name}" for name, weight in self.weights.items())
        inside = f"{self.view.anchor} + gate·({self.constant:+.2f} {kept})" if kept else self.view.anchor
        tried = ", ".join(f"{name} {value:.3f}" for name, value in self.likelihoods.items())
        return [
            f"log σ² = {inside}; far from the data at least that of {self.view.alternative.describe()}",
            f"cross-validated NLL {min(self.likelihoods.values()):.3f} of {tried}",
        ]


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
    view: View,
    training: tuple[Scene, Tensor, Tensor] | None,
    calibration: tuple[Scene, Tensor, Tensor],
    *,
    title: str = "",
) -> Fitted:
    """Tries the anchor alone, with the other methods, with the residual model, and with all; keeps the likeliest.

    Args:
        view: How scenes were made.
        training: Scene of training atoms, their (n_atoms, n_components) squared residuals in squared eV/Å (the mean
            over the components where there is one; NaN without a label), and the (n_atoms,) number of each atom's
            frame; None where no training frame has forces.
        calibration: The same of the calibration atoms.
        title: Of the progress bar; empty for none.
    """
    scene, squares, frames = calibration
    corrections = _of_methods(scene, view.others)
    ensemble, seen = _residual_model(training, calibration, title)
    corrections[RESIDUAL] = _bounded(seen)
    views = scene.around if training is None else torch.cat([training[0].around, scene.around])
    gate = Gate.fit(views, scene.around)
    opened = gate(scene.around)[:, None]
    table = {name: (opened * value).expand_as(scene.base).cpu().numpy() for name, value in corrections.items()}
    tried = {"anchor": (), "methods": view.others, RESIDUAL: (RESIDUAL,), "all": (*view.others, RESIDUAL)}
    candidates = {name: columns for name, columns in tried.items() if view.others or name in ("anchor", RESIDUAL)}
    base = scene.base + (1 - opened) * scene.careful
    rows = _Rows(base.cpu().numpy(), opened.expand_as(scene.base).cpu().numpy(), squares.cpu().numpy(), table)
    fold = _contiguous(frames.cpu().numpy())
    likelihoods = {name: rows.cross_validated(columns, fold) for name, columns in candidates.items()}
    best = min(likelihoods, key=lambda name: likelihoods[name])
    constant, found = rows.fitted(candidates[best])
    # A weight of zero costs an evaluation and says nothing.
    weights = {name: weight for name, weight in zip(candidates[best], found.tolist(), strict=True) if weight > 1e-3}
    kept = ensemble if RESIDUAL in weights else None
    combination = Combination(view, gate, kept, constant if weights else 0.0, weights, likelihoods)
    variance = np.exp(rows.log_variance(list(weights), combination.constant, np.array(list(weights.values()))))
    return Fitted(combination, variance)


def _log_variance(calibrator: Calibrator, raw: Raw, n_components: int = 3) -> Tensor:
    variance = calibrator.variance(raw.forces)
    if n_components == 1:  # the anchor tells no components apart
        variance = variance.mean(1, keepdim=True)
    return variance.clamp(min=1e-300).log()


def _of_methods(scene: Scene, names: Sequence[str]) -> dict[str, Tensor]:
    """(n_atoms, n_components) corrections towards each of the other methods, bounded."""
    return {name: _bounded(scene.others[:, :, k] - scene.base) for k, name in enumerate(names)}


def _bounded(values: Tensor) -> Tensor:
    return LARGEST_CORRECTION * torch.tanh(values / LARGEST_CORRECTION)


def _residual_model(
    training: tuple[Scene, Tensor, Tensor] | None, calibration: tuple[Scene, Tensor, Tensor], title: str
) -> tuple[Ensemble, Tensor]:
    """The networks, and what each calibration atom reads from the one that has not seen its frame, before bounds."""
    scene, squares, frames = calibration
    inputs, ratios = scene.inputs, squares * torch.exp(-scene.base)
    if training is not None:
        seen, own_squares, own_frames = training
        own = own_squares * torch.exp(-seen.base)
        # A potential errs less on the frames it was trained on: their mean error is not what is to be learned. Where
        # there is none at all, as with its own forces for labels, nothing is.
        inputs, ratios = torch.cat([seen.inputs, inputs]), torch.cat([own / own.nanmean(), ratios])
        frames = _interleaved(own_frames, frames)
    ensemble = cross_fit(inputs, ratios, frames, training=_TRAINING, loss=_nll, folds=_FOLDS, n_outputs=1, title=title)
    found = out_of_fold(ensemble, inputs, folds_of(frames, _FOLDS))
    return ensemble, found[len(inputs) - len(scene.inputs) :]


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
    correction = _bounded(predictions)
    return 0.5 * (correction + ratios * torch.exp(-correction)).mean(-1)


def _contiguous(frames: np.ndarray) -> np.ndarray:
    """(n_atoms,) fold of each atom, by consecutive frames: neighbours of one trajectory tell nothing new."""
    groups, place = np.unique(frames, return_inverse=True)
    return place * _FOLDS // len(groups)


@dataclass(frozen=True)
class _Rows:
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

    def only(self, chosen: np.ndarray) -> "_Rows":
        corrections = {name: value[chosen] for name, value in self.corrections.items()}
        return _Rows(self.base[chosen], self.gate[chosen], self.squares[chosen], corrections)

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
