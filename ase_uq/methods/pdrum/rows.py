"""Features and residuals of all training atoms, in the order of the data set, whatever the batches and ranks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ase_uq.calibration.energy_shift import energy_shift
from ase_uq.communicator import Communicator, gather
from ase_uq.forward_pass import ForwardPass, Targets, residuals_of


@dataclass(frozen=True)
class Rows:
    """Training atoms and frames; residuals are label minus prediction, and NaN without a label.

    Args:
        frame_of_atom: (n_atoms,) number of the frame in the data set, ascending.
        residuals: (n_atoms, 3) ΔF, eV/Å.
        features: (n_atoms, n_features).
        numbers: (n_atoms,) atomic numbers.
        vectors: (n_atoms, 3, width) further vectors of each atom that the method needs; width may be 0.
        frames: (n_frames,) numbers in the data set, ascending.
        energy: (n_frames,) ΔE, eV.
    """

    frame_of_atom: Tensor
    residuals: Tensor
    features: Tensor
    numbers: Tensor
    vectors: Tensor
    frames: Tensor
    energy: Tensor

    def with_forces(self) -> "Rows":
        """Rows of the atoms that have a force label."""
        return self._of_atoms(self.residuals.isfinite().all(1))

    def with_energy(self) -> "Rows":
        """Rows of the frames that have an energy label, without a constant shift of these labels."""
        labelled = self.energy.isfinite()
        rows = self._of_atoms(torch.isin(self.frame_of_atom, self.frames[labelled]))
        rows = replace(rows, frames=self.frames[labelled], energy=self.energy[labelled])
        numbers, counts = rows.numbers.cpu().numpy(), torch.bincount(rows.place_of_frame).cpu().numpy()
        residuals = rows.energy.cpu().numpy() / counts
        shift = energy_shift(residuals, numbers, counts)
        if shift is None:
            return rows
        left = shift.taken_out(residuals, numbers, counts) * counts
        return replace(rows, energy=torch.from_numpy(left).to(rows.energy))

    @property
    def place_of_frame(self) -> Tensor:
        """(n_atoms,) index into `frames` of the frame that each atom belongs to."""
        return torch.searchsorted(self.frames, self.frame_of_atom)

    def _of_atoms(self, chosen: Tensor) -> "Rows":
        names = ("frame_of_atom", "residuals", "features", "numbers", "vectors")
        return replace(self, **{name: getattr(self, name)[chosen] for name in names})


class RowStore:
    """Collects batches; atoms are kept in float32."""

    def __init__(self) -> None:
        self._atoms: list[Tensor] = []
        self._frames: list[Tensor] = []
        self._n_features = 0

    def add(self, forward_pass: ForwardPass, targets: Targets, vectors: Tensor | None = None) -> None:
        """Takes a batch with its forces, and the method's (n_atoms, 3, width) vectors if it has any."""
        if forward_pass.forces is None:
            raise ValueError("residuals of forces need the potential's forces: evaluate the training frames with them.")
        residuals = residuals_of(targets.forces, forward_pass.forces)
        columns = [residuals, forward_pass.numbers[:, None], forward_pass.features]
        if vectors is not None:
            columns.append(vectors.flatten(1))
        self._atoms.append(torch.cat([column.float() for column in columns], 1))
        energy = residuals_of(targets.energy, forward_pass.energy)
        counts = forward_pass.n_atoms_of_frame.double()
        self._frames.append(torch.stack([targets.frames.double(), counts, energy], 1))
        self._n_features = forward_pass.features.shape[1]

    def finish(self, communicator: Communicator) -> Rows:
        """The rows of all ranks; at least one rank has had a batch."""
        # A rank without frames learns the widths from the others.
        width = torch.tensor([float(bool(self._atoms)), self._n_features], dtype=torch.float64)
        ranks, widths = communicator.sum({"widths": width})["widths"].tolist()
        frames = gather(torch.cat(self._frames) if self._frames else None, communicator)
        atoms = gather(torch.cat(self._atoms) if self._atoms else None, communicator)
        assert atoms is not None
        assert frames is not None
        frame, counts, energy = frames.T
        frame_of_atom = torch.repeat_interleave(frame, counts.long())
        # Frames are never split between batches, so a stable sort keeps the order of their atoms.
        order, frame_order = torch.argsort(frame_of_atom, stable=True), torch.argsort(frame, stable=True)
        first, last = 4, 4 + round(widths / ranks)
        atoms = atoms[order]
        return Rows(
            frame_of_atom=frame_of_atom[order].long(),
            residuals=atoms[:, :3],
            features=atoms[:, first:last],
            numbers=atoms[:, 3].long(),
            vectors=atoms[:, last:].reshape(len(atoms), 3, (atoms.shape[1] - last) // 3),
            frames=frame[frame_order].long(),
            energy=energy[frame_order],
        )
