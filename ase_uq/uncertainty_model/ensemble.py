"""Samples of energies and forces: one potential as a committee of any size.

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
forces: no net force, and the covariances of the posterior up to this scale. Energies and forces are scaled apart, each
by its own σ, so a member's forces are not the slopes of its energies.

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


class Ensemble:
    """Draws of a fitted posterior.

    Args:
        model: The uncertainty model; a method of it must have a posterior of energies, as `bll` has.
        n_members: Number of draws M.
        n_forces: Number of members, the first ones, that have forces too; 0 for none.

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
        self.results = tuple(self.n_members)
        self.gradients = bool(self._n_forces) and self._head.differentiates

    def __call__(self, forward_pass: ForwardPass, results: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """`energy_ensemble`, (n_frames, M) eV, and `forces_ensemble`, (n_atoms, 3, n_forces) eV/Å.

        Args:
            forward_pass: The batch, with `gradients` if this needs them.
            results: Calibrated standard deviations of the energy (eV) and of the forces (eV/Å).
        """
        with torch.no_grad():
            rows = self._head.energy_rows(forward_pass)
        deviations = _centred(rows @ self._draws("energy", rows.shape[1], rows.device))
        unit = deviations.square().mean(1, keepdim=True).sqrt()
        std = results["energy_uncertainty"].double()[:, None]
        members = {"energy_ensemble": forward_pass.energy.double()[:, None] + std * deviations / unit}
        if self._n_forces:
            members["forces_ensemble"] = self._forces(forward_pass, results["forces_uncertainty"])
        return members

    def _forces(self, forward_pass: ForwardPass, std: Tensor) -> Tensor:
        assert forward_pass.forces is not None
        deviations = _centred(self._head.force_deviations(forward_pass, self._draws, self._n_forces))
        of_frame = forward_pass.sum_over_atoms(deviations.square().mean((1, 2)))
        wanted = forward_pass.sum_over_atoms(std.double().square().mean(1))
        # An atom alone, and a crystal all of whose sites are centres, have no forces that a member could change.
        scale = torch.where(of_frame > 0, wanted / of_frame, 0).sqrt()
        return forward_pass.forces.double()[:, :, None] + scale[forward_pass.frame_of_atom, None, None] * deviations


def _checked(name: str, number: int, for_example: str) -> int:
    if not isinstance(number, Integral) or isinstance(number, bool) or number < _FEWEST:
        raise ValueError(f"{name}={number!r} is not a whole number of {_FEWEST} or more. Give {name}={for_example}.")
    return int(number)


def _centred(deviations: Tensor) -> Tensor:
    return deviations - deviations.mean(-1, keepdim=True)
