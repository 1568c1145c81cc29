"""What a scored trajectory was, in a few numbers."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ase_uq.scoring.frame_score import FrameScore


@dataclass
class ScoredTrajectory:
    """Summary of a scored trajectory, without its frames.

    Attributes:
        out: File with the frames.
        n_frames: Number of scored frames, including those of interrupted runs.
        n_atoms: Number of their atoms.
        n_beyond: Number of scored frames with an atom beyond the calibration data: gamma above 1, or not a number.
        n_left_out: Number of frames that could not be read or evaluated.
        worst: Row of the frame with the largest force uncertainty; None before the first.
        first_left_out: Row of the first frame that was left out; None if there is none.
        n_resumed: Number of frames that an interrupted run had scored.
        seconds: Duration of this run, s.
    """

    out: Path
    n_frames: int = 0
    n_atoms: int = 0
    n_beyond: int = 0
    n_left_out: int = 0
    worst: FrameScore | None = None
    first_left_out: FrameScore | None = None
    n_resumed: int = 0
    seconds: float = 0.0

    def add(self, row: FrameScore) -> None:
        """Counts a frame."""
        if row.problem:
            self.n_left_out += 1
            self.first_left_out = self.first_left_out or row
            return
        self.n_frames += 1
        self.n_atoms += row.n_atoms
        self.n_beyond += not row.gamma_max <= 1  # NaN counts
        if self.worst is None or _rank(row) > _rank(self.worst):
            self.worst = row

    def summary(self) -> str:
        """The summary in words, in one line."""
        worst = self.worst
        parts = (
            [f"no frames in {self.seconds:.1f} s, written to {self.out}"]
            if worst is None
            else [
                f"{self.n_frames} frames, {self.n_atoms} atoms in {self.seconds:.1f} s, written to {self.out}: "
                f"largest force uncertainty {worst.force_uncertainty_max:.3g} eV/Å in frame {worst.frame}, atom "
                f"{worst.worst_atom} ({worst.worst_element})",
                f"{self.n_beyond} frames have an atom beyond the calibration data (gamma > 1)",
            ]
        )
        if self.n_resumed:
            parts.append(f"{self.n_resumed} frames were scored by an interrupted run")
        if self.n_left_out:
            parts.append(f"{self.n_left_out} frame{'s were' if self.n_left_out > 1 else ' was'} left out")
        return "; ".join(parts)


def _rank(row: FrameScore) -> float:
    # NaN is worse than any number.
    return np.inf if np.isnan(row.force_uncertainty_max) else row.force_uncertainty_max
