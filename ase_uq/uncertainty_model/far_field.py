"""What a potential may be wrong by where it knows nothing: the far end of calibrated uncertainties.

Far from all labelled frames no calibration says how large errors are. Three things that are known without labels do:

    σ∞² = F_train² + F_local² + F_close²

    F_train   root mean square component of the forces of training frames, as predicted: a potential that knows
              nothing of a structure is wrong by as much as forces usually are
    F_local   the same of the predicted forces on the atom and around it: where these are far larger than in training,
              so may the errors be; around it, since a wrong force on an atom comes with wrong forces on its neighbours
    F_close   pairs that are closer than any in the training frames repel each other as nuclei do (ZBL), whether the
              potential has learned it or not: the excess over the repulsion at the shortest distance of training

All are local and change smoothly as neighbours come and go, so an atom has the same σ∞ beside a distant slab.

An energy is the work of forces, so an energy per atom is wrong by what the forces are wrong by along the way to where
nothing is known:

    σ∞ of E/N = ℓ · mean_i σ∞,i          σ∞ of e_i = ℓ · σ∞,i

    ℓ         root mean square displacement of a component of the training frames that were rattled until the potential
              knew nothing of them (`fitting.know_nothing`)

A stress is the work of forces under strain, which moves neighbours by their distance. If the wrong forces of an atom's
neighbours act along bonds of length d and know nothing of each other, so that their squares add up, a component of its
virial ½ Σ_j d·f_j is wrong by d/√10 times what a component of its force is wrong by (½·√3·√(2/15), where 2/15 is the
mean square of the six products of the components of a direction). Virials of atoms are wrong with the same sign: those
of the images of an atom are, so only this sum is the same in every supercell.

    σ∞² of stress = (Σ_i σ∞,i d_i / √10 V)² + S²

    d_i       distance of the nearest neighbour
    S         root mean square component of the predicted stress: forces of a compressed crystal vanish by symmetry,
              its stress does not
"""

from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from ase.data import covalent_radii
from torch import Tensor

from ase_uq.forward_pass import Edges, ForwardPass
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.numerics.repulsion import zbl_force
from ase_uq.numerics.sites import mean_around

# Of the sum of covalent radii: the shortest distance of two elements that never meet in the training frames.
_UNSEEN = 0.8


# What a file may hold: eV/Å, and Å.
_SMALLEST_FORCE, _LARGEST_FORCE = 1e-6, 1e20
_SHORTEST, _LONGEST = 1e-6, 1e3
_SMALLEST_STRESS = 1e-10  # eV/Å³; without a cell and without neighbours there is none, and its logarithm is taken


@dataclass(frozen=True)
class Limits:
    """σ∞² of a batch, in squared ASE units.

    Args:
        forces: (n_atoms,) of a force component.
        energy: (n_frames,) of the energy per atom.
        energies: (n_atoms,) of the energy of an atom.
        stress: (n_frames,) of a component of the stress; next to nothing without a cell, None without any stress.
    """

    forces: Tensor
    energy: Tensor
    energies: Tensor
    stress: Tensor | None = None


@dataclass(frozen=True)
class FarField:
    """The know-nothing end of uncertainties.

    Args:
        elements: Atomic numbers of the training frames, ascending.
        shortest: (n_elements, n_elements) shortest distance of two elements in the training frames, Å; `nan` if the
            two never are neighbours there.
        force: F_train, eV/Å.
        fractions: Displacements that training frames were rattled by, as shares of each atom's distance to its nearest
            neighbour, ascending.
        median_forces: Median predicted force of the frames rattled by each of these, eV/Å.
        fraction: The one that was chosen: where the median force stops growing, the potential has left what it knows.
        length: ℓ, root mean square displacement of a component of the frames rattled by this fraction, Å.
    """

    elements: tuple[int, ...]
    shortest: Tensor
    force: float
    fractions: tuple[float, ...]
    median_forces: tuple[float, ...]
    fraction: float
    length: float

    @property
    def settings(self) -> dict[str, Any]:
        """JSON values from which, with the shortest distances, `load` restores it."""
        return {
            "elements": list(self.elements),
            "force": self.force,
            "fractions": list(self.fractions),
            "median_forces": list(self.median_forces),
            "fraction": self.fraction,
            "length": self.length,
        }

    @staticmethod
    def check(settings: Entries, tensors: StoredTensors, elements: list[int]) -> None:
        """Refuses settings and tensors of a file that are not those of a far field for these elements.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        if settings.elements("elements") != elements:
            raise settings.wrong("elements", f"{elements}, as in header.edges.counts,")
        settings.number("force", _SMALLEST_FORCE, _LARGEST_FORCE)
        fractions = settings.numbers("fractions", _SMALLEST_FORCE, 10)
        settings.numbers("median_forces", 0, _LARGEST_FORCE, len(fractions))
        settings.number("fraction", _SMALLEST_FORCE, 10)
        settings.number("length", _SHORTEST, _LONGEST)
        tensors.take("shortest", len(elements), len(elements), low=_SHORTEST, high=_LONGEST, nan=True)

    @classmethod
    def load(cls, settings: dict[str, Any], shortest: Tensor) -> "FarField":
        """The far field with these settings."""
        elements, fractions, medians = (tuple(settings[key]) for key in ("elements", "fractions", "median_forces"))
        fraction, length = settings["fraction"], settings["length"]
        return cls(elements, shortest, float(settings["force"]), fractions, medians, fraction, length)

    def to(self, device: torch.device) -> "FarField":
        """A copy on a device."""
        return replace(self, shortest=self.shortest.to(device))

    @cached_property
    def _table(self) -> Tensor:
        """(119, 119) shortest distance of any two elements, Å."""
        radii = torch.from_numpy(np.where(covalent_radii > 0, covalent_radii, 0.2))
        table = _UNSEEN * (radii[:, None] + radii[None, :])
        known = torch.tensor(self.elements)
        seen = self.shortest.cpu()
        table[known[:, None], known[None, :]] = torch.where(seen.isnan(), table[known[:, None], known[None, :]], seen)
        return table.to(self.shortest.device)

    def variance(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms,) σ∞² of a force component, (eV/Å)²; the batch must have forces."""
        assert forward_pass.forces is not None
        edges = forward_pass.edges
        squares = forward_pass.forces.double().square().mean(1, keepdim=True)
        local = mean_around(squares, edges, edges.cutoff)[:, 0]
        return self.force**2 + local + self._repulsion(edges, forward_pass.numbers)

    def limits(self, forward_pass: ForwardPass) -> Limits:
        """σ∞² of all quantities of a batch, which must have forces."""
        forces = self.variance(forward_pass)
        energy, stress = self.energy_variance(forces, forward_pass), stress_variance(forces, forward_pass)
        return Limits(forces, energy, self.length**2 * forces, stress)

    def energy_variance(self, limit: Tensor, forward_pass: ForwardPass) -> Tensor:
        """(n_frames,) σ∞² of the energy per atom, eV², from the (n_atoms,) σ∞² of the forces."""
        counts = forward_pass.n_atoms_of_frame
        total = torch.zeros(len(counts), dtype=limit.dtype, device=limit.device)
        total = total.index_add(0, forward_pass.frame_of_atom, limit.sqrt())
        return (self.length * total / counts).square()

    def contact(self, forward_pass: ForwardPass) -> Tensor:
        """(n_atoms,) smallest distance of a neighbour, as a share of the shortest distance of training; `inf` alone."""
        edges, numbers = forward_pass.edges, forward_pass.numbers
        shares = edges.distance.double() / self._shortest(edges, numbers)
        closest = torch.full((len(numbers),), torch.inf, dtype=shares.dtype, device=shares.device)
        return closest.scatter_reduce(0, edges.target, shares, "amin")

    @cached_property
    def _repulsion_at_shortest(self) -> Tensor:
        """(119, 119) repulsion at the shortest distance of any two elements, eV/Å."""
        numbers = torch.arange(len(self._table), device=self._table.device)
        first, second = numbers[:, None].expand(self._table.shape), numbers[None, :].expand(self._table.shape)
        forces = zbl_force(self._table.flatten(), first.flatten(), second.flatten())
        return forces.reshape(self._table.shape)

    def _shortest(self, edges: Edges, numbers: Tensor) -> Tensor:
        return self._table[numbers[edges.target], numbers[edges.source]]

    def _repulsion(self, edges: Edges, numbers: Tensor) -> Tensor:
        """(n_atoms,) mean square component of the repulsion of too close neighbours, beyond that of training."""
        shortest = self._shortest(edges, numbers)
        pair = numbers[edges.target], numbers[edges.source]
        # A pair at exactly one place has no finite repulsion; a hundredth of a bond is far beyond any threshold.
        distance = torch.minimum(edges.distance.double(), shortest).maximum(0.01 * shortest)
        excess = zbl_force(distance, *pair) - self._repulsion_at_shortest[pair]
        total = torch.zeros(len(numbers), dtype=excess.dtype, device=excess.device)
        return total.index_add(0, edges.target, excess.square()) / 3


def stress_variance(limit: Tensor, forward_pass: ForwardPass) -> Tensor | None:
    """(n_frames,) σ∞² of a component of the stress, (eV/Å³)², from the (n_atoms,) σ∞² of the forces.

    Next to nothing for a frame without a cell, None for a batch without stress.
    """
    stress, volumes = forward_pass.stress, forward_pass.volumes
    if stress is None or volumes is None:
        return None
    edges = forward_pass.edges
    nearest = torch.full_like(limit, torch.inf)
    nearest = nearest.scatter_reduce(0, edges.target, edges.distance.to(limit.dtype), "amin")
    nearest = nearest.where(nearest.isfinite(), 0)  # an atom alone has no virial
    virial = forward_pass.sum_over_atoms(limit.sqrt() * nearest) / 10**0.5
    variance = (virial / volumes).square() + stress.to(limit.dtype).square().mean(1)
    return variance.where(volumes > 0, 0).clamp(min=_SMALLEST_STRESS**2)
