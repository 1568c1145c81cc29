"""Bayesian last layer: how far the training frames leave the weights of the last layer undetermined.

The leverage of an atom, u_i = φ_i Λ_n⁻¹ φ_iᵀ, is the posterior variance of a linear layer in units of its noise.
It needs only features, no backward pass. The fit stores and returns the scale-free ũ = u·N/γ, with mean 1 over the N
training rows (Σ u = γ, the effective number of parameters), which does not depend on the size of the data set.

    direct force heads    exact: matrix-normal posterior of the force head, with the prior from closed-form evidence
                          and the variance taken through the projection that removes net force and torque
    conservative forces   `"sites"`, zero-backward: F_j = -Σ_i ∂e_i/∂R_j belongs to the sites around the atom, so ũ
                          is summed over them with cosine weights at several radii; the calibrator combines the radii;
                          `"exact"`: the posterior from energies and forces together (see `exact`)
    energy                exact posterior of the energy layer from structure energies, with an intercept for the
                          error of the base: without it the variance would vanish with the features, as it would
                          when a structure falls apart

The mean of the potential is never changed. Sources: MacKay 1992 (evidence), Chong et al. 2023 (prediction
rigidity of atoms), Bigi et al. 2024 (last-layer rigidity); the site sums and the projection are our own derivations.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import InputError, LabelError, UQWarning
from ase_uq.forward_pass import ForwardPass, Targets
from ase_uq.methods._distance import REACH, units_of
from ase_uq.methods.base import Accumulator, Method
from ase_uq.methods.bll.exact import maximise_joint_evidence, moves_root, slopes_of
from ase_uq.methods.bll.head import CONSERVATIVE, COVARIANCES, FEATURES, BLLHead, atom_features
from ase_uq.methods.bll.projection import removed_mean
from ase_uq.methods.bll.regression import Statistics, maximise_evidence
from ase_uq.numerics.linalg import whitener
from ase_uq.numerics.moments import Moments, reduced
from ase_uq.numerics.sample import RowSample, labels_of_atoms
from ase_uq.numerics.sites import RADII

_MOST_ROWS = 20_000  # atoms, and frames, whose rows are kept for the covariance of moves
_FEWEST_LABELS = 3  # fewer energies have no noise about their mean


@dataclass(frozen=True)
class BLL(Method):
    """Fits a Bayesian last layer in one streaming pass.

    Args:
        features: Features that give the leverage of an atom: `"latent"`, invariants of all layers and norms of the
            equivariant channels, or `"last_layer"`, the exact features of the energy's last layer.
        ridge: Prior precision of the leverage, relative to the unit variance of the standardised features.
            Between 1e-3 and 1e-11, smaller values ranked force errors better on acetylacetone. It also bounds from
            below the priors of the last layers, which the evidence sets.
        radii: Radii in Å; leverage is summed over the sites within each of them, in addition to the atom's own.
        reach: Weight of the mean over the receptive field beside these sums.
        conservative: How forces that are slopes of the energy are scored: `"sites"`, by sums of leverages over the
            sites around an atom, or `"exact"`, by the posterior variance of each component as well, from labels of
            forces. That takes a backward pass for each weight of the last layer, at every training frame and at every
            step: it is for covariances and ensembles of forces, not for dynamics.
        covariance: That of the exact posterior of conservative forces: `"posterior"`, or `"pops"`, of the moves of the
            weights that would fit one energy or force component each, which does not shrink with the training frames.
    """

    name = "bll"
    head = BLLHead
    features: Literal["latent", "last_layer"] = "latent"
    ridge: float = 1e-9
    radii: tuple[float, ...] = RADII
    reach: float = REACH
    conservative: Literal["sites", "exact"] = "sites"
    covariance: Literal["posterior", "pops"] = "posterior"

    @property
    def gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether slopes of the last layer's features are needed."""
        return self.conservative == "exact"

    @property
    def forces(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the fit compares the potential's forces with labels."""
        return self.conservative == "exact"

    @property
    def labels(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there is no posterior without labels of forces."""
        return self.conservative == "exact"

    def __post_init__(self) -> None:
        if self.conservative not in CONSERVATIVE:
            raise ValueError(f"conservative forces are scored by 'sites' or 'exact', not by {self.conservative!r}.")
        if self.covariance not in COVARIANCES:
            raise ValueError(f"the covariance is that of the 'posterior' or 'pops', not {self.covariance!r}.")
        if self.covariance == "pops" and self.conservative != "exact":
            raise ValueError("covariance='pops' is an option of conservative='exact'. Give both, or the method 'pops'.")
        if self.features not in FEATURES:
            raise ValueError(f"features are 'latent' or 'last_layer', not {self.features!r}.")
        if not 0 < self.ridge < 1:
            raise ValueError(f"the ridge lies between 0 and 1, not at {self.ridge!r}.")
        if not self.radii or not all(radius > 0 for radius in self.radii):
            raise ValueError(f"radii are lengths in Å above 0, not {self.radii!r}.")
        if not self.reach >= 0:
            raise ValueError(f"the reach is 0 or above, not {self.reach!r}.")

    def start(self) -> "BLLAccumulator":
        return BLLAccumulator(self)


class BLLAccumulator(Accumulator):
    """Collects moments of features and targets, all that the posteriors need; None if nothing was added."""

    def __init__(self, method: BLL) -> None:
        self.method = method
        self.atoms: Moments | None = None
        self.energy: Moments | None = None
        self.force: Moments | None = None
        self.slope: Moments | None = None
        self.rows_of_frames, self.rows_of_atoms = RowSample(_MOST_ROWS), RowSample(_MOST_ROWS)
        self._told = False

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.atoms = _added(self.atoms, atom_features(forward_pass, self.method.features))
        counts = forward_pass.n_atoms_of_frame.double()[:, None]
        psi = forward_pass.sum_over_atoms(forward_pass.energy_layer.features.double()) / counts
        if targets.energy is not None:
            target = (targets.energy.double() - forward_pass.energy_layer.base.double())[:, None] / counts
            self.energy = _added(self.energy, _labelled(psi, target))
            if self.method.covariance == "pops":
                error = (targets.energy.double() - forward_pass.energy.double())[:, None] / counts
                labels = torch.stack([targets.frames, torch.zeros_like(targets.frames)], 1)
                _keep(self.rows_of_frames, labels, psi, error)
        if forward_pass.force_layer is not None and targets.forces is not None:
            layer = forward_pass.force_layer
            target = targets.forces.double() - layer.base.double()
            self.force = _added(self.force, _labelled(removed_mean(layer, forward_pass), target))
        if self.method.conservative == "exact":
            self._add_slopes(forward_pass, targets)

    def _add_slopes(self, forward_pass: ForwardPass, targets: Targets) -> None:
        if forward_pass.force_layer is not None:
            raise InputError(
                "conservative='exact', but the forces of this potential are no slopes of its energy: the posterior of "
                "their own last layer is exact already. Leave it out."
            )
        layer = forward_pass.energy_layer
        if not self._told:
            self._told = True
            warnings.warn(
                f"bll: the exact posterior of forces takes {len(layer.weights)} backward passes for every frame, here "
                "and wherever these uncertainties are calculated, unless fewer are asked for there (force_probes, "
                "--force-probes).",
                UQWarning,
                stacklevel=2,
            )
        if targets.forces is None:
            return
        assert forward_pass.forces is not None
        slopes = slopes_of(forward_pass, torch.eye(len(layer.weights)).to(layer.features)).forces
        base = forward_pass.forces.double() - slopes @ layer.weights.double()
        self.slope = _added(
            self.slope, _labelled(slopes.flatten(0, 1), (targets.forces.double() - base).reshape(-1, 1))
        )
        if self.method.covariance == "pops":
            error = targets.forces.double() - forward_pass.forces.double()
            _keep(self.rows_of_atoms, labels_of_atoms(forward_pass, targets), slopes.flatten(1), error)

    def _finish(self, communicator: Communicator) -> BLLHead:
        method = self.method
        atoms = reduced(self.atoms, communicator)
        assert atoms is not None  # at least one rank has had a batch
        settings: dict[str, Any] = {
            "features": method.features,
            "ridge": method.ridge,
            "radii": list(method.radii),
            "reach": method.reach,
        }
        tensors = {}
        scale = units_of(atoms.scatter.diagonal() / atoms.count)
        covariance = atoms.scatter / atoms.count / torch.outer(scale, scale)
        precision = covariance + method.ridge * torch.eye(len(scale), dtype=scale.dtype, device=scale.device)
        root, jitter = whitener(precision)
        effective = float((covariance * torch.linalg.inv(precision).T).sum())
        tensors["centre"] = atoms.mean
        tensors["atom_root"] = root / scale[:, None] / effective**0.5
        settings["atoms"] = {"rows": int(atoms.count), "effective": effective, "jitter": jitter}
        energy, force, slope = (reduced(of_rank, communicator) for of_rank in (self.energy, self.force, self.slope))
        if method.conservative == "exact":
            counts = [0 if moments is None else int(moments.count) for moments in (energy, slope)]
            if energy is None or slope is None or min(counts) < _FEWEST_LABELS:
                raise LabelError(
                    f"conservative='exact' needs reference energies and forces of training frames, and there are "
                    f"{counts[0]} energies and {counts[1]} force components: at least {_FEWEST_LABELS} of each. Leave "
                    "it out, or label more frames."
                )
            kept = None
            if method.covariance == "pops":
                settings["covariance"] = "pops"
                kept = [rows.finish(communicator) for rows in (self.rows_of_frames, self.rows_of_atoms)]
            roots, records = _joint_posterior(energy, slope, method.ridge, kept)
            return BLLHead(settings | records, tensors | roots)
        for name, moments in (("energy", energy), ("force", force)):
            if moments is not None:
                roots, settings[name] = _posterior(moments, name, method.ridge)
                tensors |= roots
        return BLLHead(settings, tensors)


def _added(moments: Moments | None, rows: Tensor) -> Moments:
    return Moments.of(rows) if moments is None else moments + Moments.of(rows)


def _labelled(features: Tensor, target: Tensor) -> Tensor:
    """Features followed by their targets, without the rows of frames that have no label."""
    return torch.cat([features, target], 1)[target.isfinite().all(1)]


def _keep(sample: RowSample, labels: Tensor, features: Tensor, errors: Tensor) -> None:
    """Adds features followed by errors, of what has labels."""
    labelled = errors.isfinite().all(1)
    sample.add(labels[labelled], torch.cat([features, errors], 1)[labelled])


def _statistics(joint: Tensor, scale: Tensor, count: float) -> Statistics:
    """Of features in units of `scale`, from the joint scatter of features and targets."""
    width = len(scale)
    return Statistics(
        gram=joint[:width, :width] / torch.outer(scale, scale),
        cross=joint[:width, width:] / scale[:, None],
        square=joint[width:, width:],
        count=count,
    )


def _posterior(moments: Moments, name: str, ridge: float) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Root of the scale-free posterior covariance, with the prior of largest evidence, and a record of the fit.

    Energies have an intercept with a flat prior: their features and targets are centred on their means, and the
    intercept adds one effective parameter. Direct forces have none, since the projection removes it.
    """
    outputs = 3 if name == "force" else 1
    width = len(moments.mean) - outputs
    joint = moments.scatter if name == "energy" else moments.about_zero()
    scale = units_of(joint.diagonal()[:width] / moments.count)
    statistics = _statistics(joint, scale, moments.count)
    evidence = maximise_evidence(statistics, smallest=ridge * moments.count)
    effective = evidence.effective + (1 if name == "energy" else 0)
    eye = torch.eye(width, dtype=scale.dtype, device=scale.device)
    root, jitter = whitener((statistics.gram + evidence.prior_precision * eye) / moments.count)
    record = {
        "rows": int(moments.count),
        "effective": effective,
        "prior_precision": evidence.prior_precision,
        "noise": evidence.noise**0.5,
        "boundary": evidence.boundary,
        "jitter": jitter,
    }
    # ũ = u·N/γ with u from Λ_n = N·Λ̄: the root of Λ̄ already contains N.
    tensors = {f"{name}_root": root / scale[:, None] / max(effective, 1e-300) ** 0.5}
    if name == "energy":
        tensors["energy_centre"] = moments.mean[:width]
    return tensors, record


def _joint_posterior(
    energy: Moments, slope: Moments, ridge: float, kept: list[Tensor | None] | None
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Roots of the scale-free covariance of energies and of force components, and records of the fit.

    Args:
        energy: Of features per atom and targets.
        slope: Of slopes and targets.
        ridge: Smallest prior, relative.
        kept: Features and errors of frames, and of atoms with three components each, for the covariance of moves; None
            for that of the posterior.
    """
    width = len(energy.mean) - 1
    energies, slopes = energy.scatter, slope.about_zero()
    scale = units_of(energies.diagonal()[:width] / energy.count + slopes.diagonal()[:width] / slope.count)
    # The intercept of the energies takes one of them.
    parts = _statistics(energies, scale, energy.count - 1), _statistics(slopes, scale, slope.count)
    found = maximise_joint_evidence(*parts, smallest=ridge)
    if kept is None:
        root, jitter = whitener(found.precision)
    else:
        assert kept[0] is not None
        assert kept[1] is not None
        # The intercept takes the mean of all errors of energies, as it takes that of the features.
        of_energies = kept[0] - torch.cat([energy.mean[:width], kept[0][:, width:].mean(0)])
        of_forces = torch.cat([kept[1][:, : 3 * width].reshape(-1, width), kept[1][:, 3 * width :].reshape(-1, 1)], 1)
        both = torch.cat([of_energies * found.energy**0.5, of_forces * found.force**0.5])
        root, jitter = moves_root(both[:, :width] / scale, both[:, width], found.precision)
    shared = {"prior_precision": found.prior, "jitter": jitter}
    tensors, records = {"energy_centre": energy.mean[:width]}, {}
    for name, part, rows, noise, effective in (
        ("energy", parts[0], energy.count, found.energy, found.energy_effective + 1),
        ("slope", parts[1], slope.count, found.force, found.force_effective),
    ):
        effective = max(effective, 1e-300)
        unit = effective / (noise * rows)
        if kept is not None:  # the moves are as large as errors, and their scores 1 on average over the fitted rows too
            unit = max(float((root * (part.gram @ root)).sum()) / rows, 1e-300)
        tensors[f"{name}_root"] = root / scale[:, None] / unit**0.5
        records[name] = {"rows": int(rows), "effective": effective, "noise": noise**-0.5, **shared}
    return tensors, records
