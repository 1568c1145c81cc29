"""Spread of a committee: how far potentials differ that were trained on the same data from different starts.

    σ_i² = Σ_m ‖F_i^(m) - F̄_i‖² / (3 (M - 1))        of a force component
    σ_E² = Σ_m (E^(m) - Ē)² / (M - 1) / N²            of the energy per atom; a stress has the same form

The members are those of the calculator, or those of one potential whose weights are drawn (`backends/stochastic.py`),
and each costs a forward pass. The only thing fitted is the mean of σ_i², the unit of the distance; the calibrator adds
the scale and the floor that a committee of few members needs (its spread reflects the training, not the error). Source:
Seung, Opper and Sompolinsky 1992; for forces, DP-GEN (Zhang et al. 2020), whose model deviation is the same sum over M
instead of M - 1.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator
from ase_uq.errors import InputError
from ase_uq.forward_pass import ForwardPass, Members, Targets
from ase_uq.io.entries import Entries, StoredTensors
from ase_uq.methods._distance import MeanOverAtoms
from ase_uq.methods.base import Accumulator, Deviations, Head, Implied, Method, Raw
from ase_uq.numerics.draws import Draws

_AGREED = 1e-12  # eV per atom, far below what members differ by


class CommitteeHead(Head):
    """The variance over the members, in squared ASE units.

    Args:
        settings: `mean_square`, the mean variance of a force component over the fitted atoms, (eV/Å)².
    """

    grows = False
    correlates = True
    strains = True

    @classmethod
    def check(cls, settings: Entries, tensors: StoredTensors) -> Implied:
        settings.positive("mean_square")
        return Implied({"forces": 1, "energy": 1, "stress": 1})

    def forward(self, forward_pass: ForwardPass) -> Raw:
        members = _members_of(forward_pass)
        forces = force_variance(members)
        energy = (members.energy.double() / forward_pass.n_atoms_of_frame).var(0)
        # Without stresses, only the forces reveal a strained structure.
        counts = forward_pass.n_atoms_of_frame
        stress = forward_pass.sum_over_atoms(forces) / counts
        if members.stress is not None:
            stress = members.stress.double().var(0).mean(1)
        return Raw(
            forces=forces[:, None, None],
            energy=energy[:, None],
            # The members may have no energies of single atoms.
            energies=energy[forward_pass.frame_of_atom],
            stress=stress[:, None],
            distance=forces / self._settings["mean_square"],
        )

    def energy_rows(self, forward_pass: ForwardPass) -> Tensor:
        """(n_frames, n_members + 1) deviations of the members from their mean, per atom.

        Their covariances are the committee's. Samples drawn from them are combinations of members, of any number. The
        last column is next to nothing: what members that agree have wrong, all structures on which they agree share.
        """
        energies = _members_of(forward_pass).energy.double()
        rows = (energies - energies.mean(0)).T / forward_pass.n_atoms_of_frame.double()[:, None]
        return torch.cat([rows / (len(energies) - 1) ** 0.5, torch.full_like(rows[:, :1], _AGREED)], 1)

    def deviations(self, forward_pass: ForwardPass, draws: Draws, n_members: int) -> Deviations:
        """The same combinations of the members' forces and stresses."""
        members = _members_of(forward_pass)
        assert members.forces is not None, "the committee was evaluated without forces"
        numbers = draws("energy", len(members.forces) + 1, members.forces.device)[:-1, :n_members]

        def combined(values: Tensor) -> Tensor:
            rows = (values.double() - values.double().mean(0)) / (len(values) - 1) ** 0.5
            return torch.einsum("cja,cm->jam", rows, numbers)

        return Deviations(combined(members.forces), None if members.stress is None else combined(members.stress))


@dataclass(frozen=True)
class Committee(Method):
    """Takes the spread over the members of a committee; it has no hyper-parameters."""

    name = "committee"
    head = CommitteeHead
    forces = True  # the spread of the forces, averaged over the fitted atoms, is the unit of the distance

    def start(self) -> "CommitteeAccumulator":
        return CommitteeAccumulator()


def force_variance(members: Members) -> Tensor:
    """(n_atoms,) variance of the forces over the members, averaged over the three components, (eV/Å)²; float64."""
    assert members.forces is not None, "the committee was evaluated without forces"
    return members.forces.double().var(0).mean(1)


class CommitteeAccumulator(Accumulator):
    """Accumulates the mean variance over the atoms."""

    def __init__(self) -> None:
        self.mean = MeanOverAtoms()

    def _add(self, forward_pass: ForwardPass, targets: Targets) -> None:
        self.mean.add(force_variance(_members_of(forward_pass)))

    def _finish(self, communicator: Communicator) -> CommitteeHead:
        mean = self.mean.finish(communicator)
        if not mean:
            raise InputError(
                "the members of the committee agree exactly: they are one potential several times. Load potentials "
                "that were trained with different seeds."
            )
        return CommitteeHead({"mean_square": mean}, {})


def _members_of(forward_pass: ForwardPass) -> Members:
    if forward_pass.members is None or len(forward_pass.members.energy) < 2:
        raise InputError(
            "the committee method needs a potential with several members, and this one has one. Load several: "
            'MACECalculator(model_paths=["a.model", "b.model", ...]) or the SPEC "mace:committee_*.model"; or make '
            "members of one with `ase-uq blip`."
        )
    return forward_pass.members
