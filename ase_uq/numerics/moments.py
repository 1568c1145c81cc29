"""Count, mean and scatter of rows, accumulated over batches and ranks."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ase_uq.communicator import Communicator


@dataclass
class Moments:
    """Count, mean and scatter matrix of rows, accumulated batch by batch.

    Batches are merged by the rule of Chan, Golub and LeVeque (1979), which keeps the scatter about the mean
    accurate where the plain sum of squares would lose it to cancellation: features with a large common part have
    a mean a thousand times their spread.

    Args:
        count: Number of rows.
        mean: (d,) float64.
        scatter: (d, d) Σ (z - mean)(z - mean)ᵀ, float64.
    """

    count: float
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> "Moments":
        """The moments of (n, d) rows."""
        rows = rows.double()
        if not len(rows):
            return cls.empty(rows.shape[1], rows.device)
        mean = rows.mean(0)
        centred = rows - mean
        return cls(float(len(rows)), mean, centred.T @ centred)

    @classmethod
    def empty(cls, width: int, device: torch.device) -> "Moments":
        """The moments of no rows."""
        zeros = torch.zeros(width, dtype=torch.float64, device=device)
        return cls(0.0, zeros, torch.outer(zeros, zeros))

    def __add__(self, other: "Moments") -> "Moments":
        count = self.count + other.count
        if count == 0:
            return self
        step = other.mean - self.mean
        mean = self.mean + step * (other.count / count)
        scatter = self.scatter + other.scatter + torch.outer(step, step) * (self.count * other.count / count)
        return Moments(count, mean, scatter)

    def reduced(self, communicator: Communicator) -> "Moments":
        """The moments of the rows of all ranks."""
        count = torch.tensor([self.count], dtype=torch.float64, device=self.mean.device)
        first = communicator.sum({"count": count, "sum": self.count * self.mean})
        total = float(first["count"])
        mean = first["sum"] / max(total, 1.0)
        # Each rank moves its scatter to the common mean before the scatters are summed.
        step = self.mean - mean
        moved = self.scatter + self.count * torch.outer(step, step)
        return Moments(total, mean, communicator.sum({"scatter": moved})["scatter"])

    def about(self, centre: Tensor) -> Tensor:
        """(d, d) Σ (z - centre)(z - centre)ᵀ."""
        step = self.mean - centre
        return self.scatter + self.count * torch.outer(step, step)

    def about_zero(self) -> Tensor:
        """(d, d) Σ z zᵀ."""
        return self.about(torch.zeros_like(self.mean))


def reduced(moments: Moments | None, communicator: Communicator) -> Moments | None:
    """The moments of the rows of all ranks, or None if no rank has any.

    A rank without rows takes part with None and learns their width from the others.
    """
    width = 0 if moments is None or not moments.count else len(moments.mean)
    device = torch.device("cpu") if moments is None else moments.mean.device
    message = torch.tensor([float(width), float(width > 0)], dtype=torch.float64, device=device)
    widths, ranks = communicator.sum({"width": message})["width"].tolist()
    if not ranks:
        return None
    if moments is None or not width:
        moments = Moments.empty(round(widths / ranks), device)
    return moments.reduced(communicator)
