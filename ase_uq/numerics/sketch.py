"""Random projections of long vectors."""

from typing import Self

import torch
from torch import Tensor

from ase_uq.errors import PotentialMismatch
from ase_uq.numerics.hashing import random_bits, random_normal, substream

_BUCKETS = 2**13


class Sketch(torch.nn.Module):
    """Random projection of a long vector that keeps inner products: ⟨Sg, Sh⟩ = ⟨g, h⟩ ± ‖g‖‖h‖/√size.

    It has two stages, since a Gaussian matrix for millions of parameters would take gigabytes: a count-sketch (every
    entry is added to one of 2¹³ buckets with a random sign; Charikar, Chen and Farach-Colton 2002), then a Gaussian
    matrix with entries N(0, 1/size). A vector that is not longer than the sketch is left as it is.

    Scores from sketches rank rows as scores from the vectors do, but their values differ once there are about as many
    rows as entries. Never compare scores from sketches of different sizes or seeds.

    Args:
        length: Number of entries of the vectors.
        size: Number of entries of a sketch.
        seed: Seed of the hash and of the Gaussian matrix; both are made again from it wherever they are needed.
    """

    bucket: Tensor | None
    gaussian: Tensor

    def __init__(self, length: int, size: int, seed: int) -> None:
        super().__init__()
        self.length = length
        self.size = min(size, length)
        self._seed = seed
        if self.size == length:
            return
        gaussian = random_normal(_BUCKETS * size, substream(seed, 1)).reshape(_BUCKETS, size) / size**0.5
        # Made beside the first vector: what a file says of its length may be wrong by any number.
        self.register_buffer("bucket", None, persistent=False)
        self.register_buffer("gaussian", gaussian, persistent=False)

    def forward(self, vector: Tensor) -> Tensor:
        """(length,) → (size,) float64.

        Raises:
            PotentialMismatch: The vector has another length.
        """
        if vector.shape != (self.length,):
            raise PotentialMismatch(
                f"the kernel was fitted for a potential with {self.length} parameters, but this one has "
                f"{vector.numel()}."
            )
        vector = vector.double()
        if self.size == self.length:
            return vector
        if self.bucket is None:
            self.bucket = self._buckets().to(vector.device)
        buckets = vector.new_zeros(2 * _BUCKETS).index_add_(0, self.bucket, vector)
        return (buckets[:_BUCKETS] - buckets[_BUCKETS:]) @ self.gaussian

    def _buckets(self) -> Tensor:
        # The upper half of the buckets is subtracted, so the number of a bucket also holds the sign.
        bits = random_bits(torch.arange(self.length), substream(self._seed, 0))
        return (bits & (2 * _BUCKETS - 1)).int()

    @classmethod
    def like(cls, vector: Tensor, size: int, seed: int) -> Self:
        """A sketch of vectors like this one, on its device."""
        return cls(len(vector), size, seed).to(vector.device)
