"""The fitted Bayesian last layer."""

from dataclasses import replace

import torch
from torch import Tensor

from ase_uq.forward_pass import ForwardPass
from ase_uq.io.entries import SMALLEST, Entries, StoredTensors
from ase_uq.methods._distance import raw_of_atoms
from ase_uq.methods.base import Deviations, Head, Implied, Raw
from ase_uq.methods.bll.exact import slopes_of
from ase_uq.methods.bll.projection import projected_leverage, removed_mean, without_torque
from ase_uq.numerics.draws import Draws

FEATURES = ("latent", "last_layer")
CONSERVATIVE = ("sites", "exact")
COVARIANCES = ("posterior", "pops")
_SMALLEST_UNIT = 1e-2  # smallest unit of `BLLHead.features`, relative to the largest


class BLLHead(Head):
    """A fitted Bayesian last layer.

    Args:
        settings: Hyper-parameters and results of the fit, as JSON values.
        tensors: Roots R with ũ = ‖φR‖²: `atom_root` about `centre`; `energy_root` about `energy_centre` if energies
            were labelled; `force_root` for direct heads; `slope_root` for slopes of the energy, if their posterior is
            exact; float64.
    """

    measures = True

    @property
    def gradients(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether forces are slopes of the energy with an exact posterior."""
        return "slope" in self._settings

    @property
    def estimates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether there are variances of forces that cost a backward pass for each weight."""
        return self.gradients

    @property
    def correlates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether energies were labelled, so that there is a posterior of their weights."""
        return "energy" in self._settings

    @property
    def differentiates(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether forces are slopes of the energy, and not of a head of their own."""
        return "force" not in self._settings

    @property
    def strains(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether stresses are slopes of the energy too: a direct head of them has features that no pass gives."""
        return self.differentiates

    centre: Tensor
    atom_root: Tensor
    energy_centre: Tensor
    energy_root: Tensor
    force_root: Tensor
    slope_root: Tensor

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        latent = settings.text("features", FEATURES) == "latent"
        settings.number("ridge", SMALLEST, 1)
        radii = settings.numbers("radii", SMALLEST)
        if "reach" in settings:  # since version 0.2
            settings.number("reach", 0)
        settings.under("atoms").positive("effective")
        width = len(tensors.take("centre", None))
        tensors.take("atom_root", width, width)
        scores = {"forces": 1 + len(radii), "energy": 1, "stress": 1}
        last = None if latent else width
        if "energy" in settings:
            # In the score of an energy 1/γ stands beside squares.
            settings.under("energy").number("effective", 1e-6)
            last = len(tensors.take("energy_centre", last))
            tensors.take("energy_root", last, last)
            scores["energy"] += 1
        if "force" in settings:
            size = len(tensors.take("force_root", None, None))
            tensors.take("force_root", size, size)
            scores["forces"] += 1
        if "slope" in settings:
            settings.under("slope").positive("effective")
            if "covariance" in settings:
                settings.text("covariance", COVARIANCES)
            if "energy" not in settings or "force" in settings:
                raise settings.wrong("slope", "one beside an entry of energy, and without one of force,")
            size = len(tensors.take("energy_centre", last))
            tensors.take("slope_root", size, size)
            scores["forces"] += 1
        return Implied(scores, width if latent else None)

    def forward(self, forward_pass: ForwardPass) -> Raw:
        features = atom_features(forward_pass, self._settings["features"])
        distance = ((features.double() - self.centre) @ self.atom_root).square().sum(1)
        # Heads fitted before version 0.2 have no `reach`.
        raw = raw_of_atoms(distance, forward_pass, self._settings["radii"], self._settings.get("reach", 0.0))
        exact = None
        if forward_pass.force_layer is not None:
            exact = projected_leverage(forward_pass.force_layer, self.force_root, forward_pass)
        elif self.gradients:
            directions = getattr(self, "directions", self.slope_root)
            exact = slopes_of(forward_pass, directions).forces.square().mean(2) * len(self.slope_root)
        if exact is not None:
            raw = replace(raw, forces=torch.cat([exact[:, :, None], raw.forces.expand(-1, 3, -1)], 2))
        if "energy" in self._settings:
            phi = forward_pass.energy_layer.features.double()
            counts = forward_pass.n_atoms_of_frame.double()[:, None]
            structure = self._energy_leverage(forward_pass.sum_over_atoms(phi) / counts)
            energy = torch.cat([structure[:, None], raw.energy], 1)
            raw = replace(raw, energy=energy, energies=self._energy_leverage(phi))
        return raw

    def estimate(self, n_probes: int) -> None:
        """From now on takes variances of exact posteriors from so many random directions of the weights; 0 for all.

        The estimate has no bias. Directions are orthogonal, which is better than independent ones and exact for all of
        them, and stay the same, so that it is a smooth function of the structure.
        """
        width, device = len(self.slope_root), self.slope_root.device
        directions = self.slope_root
        if 0 < n_probes < width:
            directions = directions @ torch.linalg.qr(Draws(width)("probes", width, device))[0][:, :n_probes]
        self.register_buffer("directions", directions, persistent=False)

    def features(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms, d) standardised features: about the training mean, in units of their spread in training.

        No unit is below a hundredth of the largest: otherwise features that hardly varied in training would dominate.
        """
        rows = atom_features(forward_pass, self._settings["features"]).double() - self.centre
        # The root R is triangular and holds the units s: (RRᵀ)⁻¹ = effective · s(C + ridge)s, where C has ones on its
        # diagonal.
        eye = torch.eye(len(self.atom_root), dtype=rows.dtype, device=rows.device)
        inverse = torch.linalg.solve_triangular(self.atom_root, eye, upper=True)
        squares = inverse.square().sum(0) / (self._settings["atoms"]["effective"] * (1 + self._settings["ridge"]))
        units = squares.sqrt()
        return rows / units.clamp(min=_SMALLEST_UNIT * float(units.max()))

    def energy_rows(self, forward_pass: ForwardPass) -> Tensor:
        """(n_frames, n_last + 1): R of the mean features about their training mean, and the share of the intercept.

        Their squares add up to the first score of the energy, the leverage of the structure.
        """
        counts = forward_pass.n_atoms_of_frame.double()[:, None]
        mean = forward_pass.sum_over_atoms(forward_pass.energy_layer.features.double()) / counts
        rows = (mean - self.energy_centre) @ self.energy_root
        intercept = torch.full_like(rows[:, :1], self._settings["energy"]["effective"] ** -0.5)
        return torch.cat([rows, intercept], 1)

    def deviations(self, forward_pass: ForwardPass, draws: Draws, n_members: int) -> Deviations:
        """Slopes of Σ_i φ_i·R z_m by positions and strain, or P(φ R z_m) with a z of its own for each component."""
        layer = forward_pass.force_layer
        if not self.differentiates:
            assert layer is not None
            width, device = len(self.force_root), self.force_root.device
            weights = self.force_root @ draws("forces", 3 * width, device)[:, :n_members].reshape(width, -1)
            changes = (removed_mean(layer, forward_pass) @ weights).reshape(-1, 3, n_members)
            return Deviations(without_torque(layer, changes, forward_pass))
        numbers = draws("energy", len(self.energy_root) + 1, self.energy_root.device)[:-1, :n_members]
        slopes, volumes = slopes_of(forward_pass, self.energy_root @ numbers), forward_pass.volumes
        if slopes.virials is None or volumes is None:
            return Deviations(slopes.forces)
        return Deviations(slopes.forces, slopes.virials / volumes[:, None, None])

    def _energy_leverage(self, rows: Tensor) -> Tensor:
        """(n, n_last) → (n,): ũ of energies per atom, including the contribution of the intercept."""
        squares = ((rows - self.energy_centre) @ self.energy_root).square().sum(1)
        return squares + 1 / self._settings["energy"]["effective"]


def atom_features(forward_pass: ForwardPass, features: str) -> Tensor:
    """(n_atoms, n_features) features from which leverages are computed."""
    return forward_pass.features if features == "latent" else forward_pass.energy_layer.features
