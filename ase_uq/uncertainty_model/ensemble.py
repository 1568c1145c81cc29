"""Samples of the energy: one potential as a committee of any size, at no cost.

    E^(m)(x) = E(x) + σ_E(x)·g_m(x),    g_m = a(x)·z_m / |a(x)|,    z_m ~ N(0, 1) a component

The rows a(x) are those whose products are the posterior covariances of energies: of the last layer's weights, R of the
structure's mean features and the intercept. A member is one draw z_m of all weights, the same for all structures, so
energies of members have the correlation of the posterior, and differences, barriers and averages have error bars that
know of it: errors that two structures share cancel. Their spread is the calibrated σ_E of each structure, which the
posterior alone does not give far from the training frames.

The members of each structure are centred and scaled, so that their mean is the energy of the potential and their
standard deviation σ_E exactly, whatever their number. Source: sampling last layers, Bigi et al. 2024 and Kellner and
Ceriotti 2024; the scale by the calibrated σ of each structure is our own.
"""

from numbers import Integral

import torch
from torch import Tensor

from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass
from ase_uq.uncertainty_model.model import UncertaintyModel

_SEED = 0
_FEWEST = 4


class EnergyEnsemble:
    """Draws of a fitted posterior.

    Args:
        model: The uncertainty model; a method of it must have a posterior of energies, as `bll` has.
        n_members: Number of draws M.

    Raises:
        ValueError: `n_members` is not a whole number of 4 or more.
        InputError: No method has such a posterior, or energies were not calibrated.
    """

    def __init__(self, model: UncertaintyModel, n_members: int) -> None:
        if not isinstance(n_members, Integral) or isinstance(n_members, bool) or n_members < _FEWEST:
            raise ValueError(
                f"ensemble={n_members!r} is not a whole number of {_FEWEST} or more. Give ensemble=64 for 64 members, "
                "which cost no more than few."
            )
        correlated = [name for name in (model.leading, *model.methods) if model.methods[name].head.correlates]
        if not correlated or "energy_uncertainty" not in model.results:
            raise InputError(
                f"an ensemble of energies needs a posterior of the energy, and none of {', '.join(model.methods)} has "
                "one with calibrated energies. Fit 'bll', with energies among the training and calibration labels."
            )
        self._head = model.methods[correlated[0]].head
        self._n_members = int(n_members)
        self._draws: Tensor | None = None

    def __call__(self, forward_pass: ForwardPass, std: Tensor) -> Tensor:
        """(n_frames, n_members) energies, eV.

        Args:
            forward_pass: The batch.
            std: (n_frames,) calibrated standard deviation of the energy, eV.
        """
        with torch.no_grad():
            rows = self._head.energy_rows(forward_pass)
        if self._draws is None:
            generator = torch.Generator().manual_seed(_SEED)
            draws = torch.randn(rows.shape[1], self._n_members, generator=generator, dtype=torch.float64)
            self._draws = draws.to(rows.device)
        deviations = rows @ self._draws
        deviations = deviations - deviations.mean(1, keepdim=True)
        unit = deviations.square().mean(1, keepdim=True).sqrt()
        return forward_pass.energy.double()[:, None] + std.double()[:, None] * deviations / unit
