"""Error bars of thermodynamic averages: what an average over one trajectory would be in the ensemble of each member.

With h_m = (E^(m) - E)/kT of every frame,

    reweighted    ⟨a⟩_m = ⟨a e^(-h_m)⟩ / ⟨e^(-h_m)⟩
    cumulant      ⟨a⟩_m ≈ ⟨a⟩ - ⟨a h_m⟩ + ⟨a⟩⟨h_m⟩

and the error bar is the standard deviation over the members. In the limit of many members that of the second is
√(β² cᵀSc), where c = Cov(a, ψ) of the frames and S is the covariance of the weights of a linear energy w·ψ. The
second is the first order of the first: it has less noise, and is right where h_m differs little between frames. Where
it differs much, a few frames decide, and neither means anything: then the members would have sampled other structures.
The effective number of frames, (Σ w)²/Σ w² with w = e^(-h_m), tells.

Where the energy itself is averaged, each member has its own: a becomes E^(m), and the second form
⟨E^(m)⟩ - ⟨E h_m⟩ + ⟨E⟩⟨h_m⟩.

Source: Imbalzano et al. 2021; Kellner and Ceriotti 2024.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from ase import Atoms, units

from ase_uq.errors import InputError
from ase_uq.propagation.members import energies_of

FEWEST_EFFECTIVE = 10.0


@dataclass(frozen=True)
class Average:
    """A thermodynamic average, and its error bar for what the potential has wrong.

    The statistical error of a finite trajectory is not in it.

    Args:
        value: (...) average over the frames.
        std: (...) standard deviation over the members.
        members: (n_members, ...) the average in the ensemble of each member.
        effective_frames: Effective number of frames, of the member that has fewest.
    """

    value: np.ndarray
    std: np.ndarray
    members: np.ndarray
    effective_frames: float


def average(
    frames: Sequence[Atoms],
    values: np.ndarray | Sequence[float] | Literal["energy"],
    temperature: float,
    *,
    by: Literal["cumulant", "reweighted"] = "cumulant",
) -> Average:
    """The average of an observable over frames of a canonical trajectory, with its error bar.

        average(frames, [atoms.get_distance(0, 1) for atoms in frames], temperature=300)

    Args:
        frames: Frames with `energy_ensemble`, evenly spread over an equilibrated trajectory at constant temperature.
        values: (n_frames, ...) the observable of every frame, or `"energy"`, the potential energy: that of each member
            in its own ensemble.
        temperature: K.
        by: `"cumulant"` or `"reweighted"`.

    Raises:
        ValueError: The temperature is not above 0, the number of values is not that of the frames, a value is not
            finite, there are fewer than two frames, or `by` is none of the two.
        InputError: A frame has no `energy_ensemble`, or the members differ so much between frames that fewer than 10
            frames would count.
    """
    if not 0 < temperature < np.inf:
        raise ValueError(f"the temperature of a canonical average lies above 0 K, not at {temperature!r}.")
    if by not in ("cumulant", "reweighted"):
        raise ValueError(f"an average is taken by 'cumulant' or 'reweighted', not by {by!r}.")
    of_energy = isinstance(values, str)
    if of_energy and values != "energy":
        raise ValueError(f"values are numbers, or 'energy', not {values!r}.")
    a = np.empty(len(frames)) if of_energy else np.asarray(values, float)
    if len(frames) < 2 or a.ndim == 0 or len(a) != len(frames):
        raise ValueError(
            f"an average needs two frames or more and a value of each: {len(frames)} frames and values of shape "
            f"{a.shape} were given."
        )
    energies, members = energies_of(frames)
    a = energies if of_energy else a
    if not np.isfinite(a).all():
        raise ValueError(f"the value of frame {int(np.argwhere(~np.isfinite(a))[0, 0])} is not finite.")
    h = (members - energies[:, None]) / (units.kB * temperature)
    h = h - h.mean(0)  # a constant shift of a member changes no average
    weights = np.exp(-(h - h.min(0)))
    effective = float((weights.sum(0) ** 2 / np.square(weights).sum(0)).min())
    if effective < FEWEST_EFFECTIVE:
        raise InputError(
            f"the members differ by so much from frame to frame that {effective:.1f} of {len(frames)} frames would "
            f"count, and at least {FEWEST_EFFECTIVE:g} must: the potential is too uncertain here for an error bar of "
            "this average, or there are too few frames. Take more frames, a smaller cell or a better potential."
        )
    mean = a.mean(0)
    shares = weights / weights.sum(0)
    if by == "reweighted":
        of_members = (shares * members).sum(0) if of_energy else np.tensordot(shares, a, (0, 0))
    else:
        own = members.mean(0) if of_energy else mean
        of_members = own - np.tensordot(h, a, (0, 0)) / len(a)
    return Average(mean, np.sqrt(np.square(of_members - mean).mean(0)), of_members, effective)
