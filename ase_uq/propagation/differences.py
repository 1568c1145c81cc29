"""Error bars of energy differences and barriers: the standard deviation over members that all structures share.

    Δ = Σ_k c_k E_k,    σ_Δ² = mean over m of (Δ^(m) - Δ)²,    Δ^(m) = Σ_k c_k E_k^(m)

If the errors of the energies were independent, σ_Δ² would be Σ_k c_k² σ_k². Errors of similar structures are not: what
the potential has wrong in both cancels.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from ase import Atoms

from ase_uq.propagation.members import energies_of


@dataclass(frozen=True)
class Propagated:
    """A number made of energies, and its error bar.

    Args:
        value: From the potential's own energies, eV.
        std: Standard deviation over the members, eV.
        independent: Standard deviation if errors of different structures were independent, eV.
        members: (n_members,) the number from each member, eV.
    """

    value: float
    std: float
    independent: float
    members: np.ndarray

    def __str__(self) -> str:
        return f"{self.value:.4f} ± {self.std:.4f} eV ({self.independent:.4f} if errors were independent)"


def difference(*terms: tuple[float, Atoms]) -> Propagated:
    """Σ_k c_k E_k with its error bar: a reaction, an adsorption, a defect.

        difference((1, adsorbed), (-1, slab), (-1, molecule))

    Args:
        terms: Coefficients and calculated structures, at least two.

    Raises:
        ValueError: There are fewer than two terms, or a coefficient is not finite.
        InputError: A structure has no `energy_ensemble`, or those of two structures have other numbers of members.
    """
    if len(terms) < 2:
        raise ValueError(
            f"a difference has two terms or more, and {len(terms)} was given: difference((1, b), (-1, a))."
        )
    coefficients = np.array([coefficient for coefficient, _ in terms], float)
    if not np.isfinite(coefficients).all():
        raise ValueError(f"coefficients are finite numbers, not {coefficients.tolist()}.")
    energies, members = energies_of([atoms for _, atoms in terms])
    spread = members.std(1)
    return _propagated(
        value=float(coefficients @ energies),
        members=coefficients @ members,
        independent=float(np.sqrt(np.square(coefficients * spread).sum())),
    )


def barrier(images: Sequence[Atoms]) -> Propagated:
    """Energy of the highest image of a path above the first, with its error bar; every member has its own highest.

    Args:
        images: Calculated structures along the path, at least three, as of a converged band.

    Raises:
        ValueError: There are fewer than three images.
        InputError: As in `difference`.
    """
    if len(images) < 3:
        raise ValueError(f"a barrier is read from three images or more, and {len(images)} were given.")
    energies, members = energies_of(images)
    top = int(energies.argmax())
    spread = members.std(1)
    return _propagated(
        value=float(energies[top] - energies[0]),
        members=members.max(0) - members[0],
        independent=float(np.hypot(spread[top], spread[0])) if top else 0.0,
    )


def _propagated(value: float, members: np.ndarray, independent: float) -> Propagated:
    # About the value, not about their mean: the highest of noisy energies lies higher on average.
    return Propagated(value, float(np.sqrt(np.square(members - value).mean())), independent, members)
