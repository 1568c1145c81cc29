"""Samples of energies, forces and stresses: one potential as a committee of any size.

    E^(m)(x) = E(x) + σ_E(x)·g_m(x),    g_m = a(x)·z_m / |a(x)|,    z_m ~ N(0, 1) a component

The rows a(x) are those whose products are the posterior covariances of energies: of the last layer's weights, R of the
structure's mean features and the intercept. A member is one draw z_m of all weights, the same for all structures, so
energies of members have the correlation of the posterior, and differences, barriers and averages have error bars that
know of it: errors that two structures share cancel. Their spread is the calibrated σ_E of each structure, which the
posterior alone does not give far from the training frames.

    F^(m)(x) = F(x) + s(x)·d_m(x),    d_m = -∂/∂x Σ_i φ_i·R z_m

The forces of a member are of the same draw: the slope of what it adds to the energy before any scale, one backward
pass each, or the draw of a direct head's own last layer, which costs none. One scale s for all atoms of a structure
makes the mean square of all members' deviations that of `forces_uncertainty`, so that they keep the symmetries of
forces: no net force, and the covariances of the posterior up to this scale. Stresses of the same members come with the
same backward passes, as slopes by strain over the volume, on a scale that makes the mean square of all nine components
that of `stress_uncertainty`. Energies, forces and stresses are scaled apart, each by its own σ, so a member's forces
are not the slopes of its energies.

The members of each structure are centred and scaled, so that their mean is the result of the potential, whatever their
number. Source: sampling last layers, Bigi et al. 2024 and Kellner and Ceriotti 2024; the scale by the calibrated σ of
each structure is our own.
"""

from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor

from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.numerics.draws import Draws
from ase_uq.uncertainty_model.model import UncertaintyModel

_FEWEST = 4
_NINE = (1, 1, 1, 2, 2, 2)  # components of a stress that stand for each of six: a mean of nine turns with the crystal


class Ensemble:
    """Draws of a fitted posterior.

    Args:
        model: The uncertainty model; a method of it must have a posterior of energies, as `bll` has.
        n_members: Number of draws M.
        n_forces: Number of members, the first ones, that have forces too, and stresses where those are calibrated and
            slopes of the energy; 0 for none.

    Attributes:
        results: Results keys.
        n_members: Number of members of each.
        gradients: Whether it needs `ForwardPass.gradients`.

    Raises:
        ValueError: `n_members` or `n_forces` is not a whole number of 4 or more, or `n_forces` is the larger one.
        InputError: No method has such a posterior, or energies were not calibrated.
    """

    def __init__(self, model: UncertaintyModel, n_members: int, n_forces: int = 0) -> None:
        self._n_members = _checked("ensemble", n_members, "64 for 64 members, which cost no more than few")
        self._n_forces = 0
        if n_forces != 0:
            self._n_forces = _checked("ensemble_forces", n_forces, "16 for the forces of 16 members")
            if n_forces > n_members:
                raise ValueError(
                    f"ensemble_forces={n_forces}, but ensemble={n_members}: forces are those of the first members. "
                    f"Give ensemble={n_forces} or more."
                )
        correlated = [name for name in (model.leading, *model.methods) if model.methods[name].head.correlates]
        if not correlated or "energy_uncertainty" not in model.results:
            raise InputError(
                f"an ensemble of energies needs a posterior of the energy, and none of {', '.join(model.methods)} has "
                "one with calibrated energies. Fit 'bll', with energies among the training and calibration labels."
            )
        self._head = model.methods[correlated[0]].head
        self._draws = Draws(self._n_members)
        self.n_members = {"energy_ensemble": self._n_members}
        if self._n_forces:
            self.n_members["forces_ensemble"] = self._n_forces
            if self._head.strains and "stress_uncertainty" in model.results:
                self.n_members["stress_ensemble"] = self._n_forces
        self.results = tuple(self.n_members)
        self.gradients = bool(self._n_forces) and self._head.differentiates

    def __call__(self, forward_pass: ForwardPass, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`energy_ensemble` (n_frames, M) eV, `forces_ensemble` (n_atoms, 3, n_forces) eV/Å, `stress_ensemble`.

        The last is (n_frames, 6, n_forces) eV/Å³, Voigt, and NaN for a frame without a cell.

        Args:
            forward_pass: The batch, with `gradients` if this needs them.
            results: Calibrated standard deviations of the energy (eV), of the forces (eV/Å) and of the stress (eV/Å³).
        """
        with torch.no_grad():
            rows = self._head.energy_rows(forward_pass)
        deviations = _centred(rows @ self._draws("energy", rows.shape[1], rows.device))
        unit = deviations.square().mean(1, keepdim=True).sqrt()
        std = results["energy_uncertainty"].double()[:, None]
        members = {"energy_ensemble": forward_pass.energy.double()[:, None] + std * deviations / unit}
        if self._n_forces:
            found = self._head.deviations(forward_pass, self._draws, self._n_forces)
            members["forces_ensemble"] = _forces(forward_pass, found.forces, results["forces_uncertainty"])
            if "stress_ensemble" in self.n_members and found.stress is not None:
                members["stress_ensemble"] = _stress(forward_pass, found.stress, results["stress_uncertainty"])
        return members


def _forces(forward_pass: ForwardPass, deviations: Tensor, std: Tensor) -> Tensor:
    assert forward_pass.forces is not None
    deviations = _centred(deviations)
    of_frame = forward_pass.sum_over_atoms(deviations.square().mean((1, 2)))
    scale = _scale(of_frame, forward_pass.sum_over_atoms(std.double().square().mean(1)))
    return forward_pass.forces.double()[:, :, None] + scale[forward_pass.frame_of_atom, None, None] * deviations


def _stress(forward_pass: ForwardPass, deviations: Tensor, std: Tensor) -> Tensor:
    assert forward_pass.stress is not None
    assert forward_pass.volumes is not None
    has_cell = (forward_pass.volumes > 0)[:, None, None]
    deviations = _centred(torch.where(has_cell, deviations, 0))
    nine = torch.tensor(_NINE).to(deviations) / 9
    scale = _scale(deviations.square().mean(2) @ nine, std.double().square() @ nine)
    members = forward_pass.stress.double()[:, :, None] + scale[:, None, None] * deviations
    return torch.where(has_cell, members, torch.nan)


def _scale(found: Tensor, wanted: Tensor) -> Tensor:
    """What makes mean squares those that are wanted."""
    # An atom alone, and a crystal all of whose sites are centres, have no forces that a member could change.
    return torch.where(found > 0, wanted / found, 0).sqrt()


def _checked(name: str, number: int, for_example: str) -> int:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < _FEWEST:
        raise ValueError(f"{name}={number!r} is not a whole number of {_FEWEST} or more. Give {name}={for_example}.")
    return int(number)


def _centred(deviations: Tensor) -> Tensor:
    return deviations - deviations.mean(-1, keepdim=True)
