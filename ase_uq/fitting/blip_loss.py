"""The loss of a structure under drawn weights: minus the evidence lower bound, or the score of a sample."""

from collections.abc import Callable

import torch
from torch import Tensor

from ase_uq.backends.stochastic import Drawn
from ase_uq.forward_pass import Targets, residuals_of
from ase_uq.numerics.variational import fair_crps, gaussian_nll


def losses(
    drawn: Drawn,
    targets: Targets,
    counts: Tensor,
    log_std: Tensor,
    loss: str,
    relative: Callable[[Tensor], Tensor],
) -> Tensor:
    """(n_frames,) losses of the structures of a batch.

    Args:
        drawn: Predictions of the draws.
        targets: Reference values; NaN where there is none.
        counts: (n_frames,) number of atoms of each structure.
        log_std: (2,) ln σ of a force component, eV/Å, and of the energy per atom, eV.
        loss: `elbo` or `crps`.
        relative: (n_frames, n_groups) α → (n_frames,) the part of the KL divergence that belongs to a structure.
    """
    assert drawn.forces is not None
    frame_of_atom = torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts)
    assert targets.forces is not None
    assert targets.energy is not None
    reference = [targets.forces, targets.energy / counts]
    predicted = [drawn.forces.double(), (drawn.energy / counts).double()]
    total = torch.zeros(len(counts), dtype=torch.float64, device=counts.device)
    for truth, found, level in zip(reference, predicted, log_std, strict=True):
        known = torch.isfinite(truth)
        # Not a number times zero would be one in the gradient: what is unknown is replaced before it is used.
        truth = torch.where(known, truth, found[0].detach())
        if loss == "elbo":
            values = gaussian_nll(residuals_of(truth, found), level).mean(0)
        else:
            # Units, which are not trained: larger ones would be a smaller loss.
            values = fair_crps(found, truth) / level.detach().exp()
        values = torch.where(known, values, 0.0)
        total = total + values if values.dim() == 1 else total.index_add(0, frame_of_atom, values.sum(1))
    return total + relative(drawn.rates) if loss == "elbo" else total
