"""What kernel methods share: posterior variances in feature form, greedy pivots, random projections.

Nothing here draws from a generator with a state. Every random number is a hash of its place, so that it does not depend
on batches, ranks, devices or versions of torch, and need not be stored.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from ase_uq.errors import LabelError
from ase_uq.numerics.linalg import whitener

# splitmix64 (Steele, Lea and Flood 2014), as signed numbers: torch multiplies 64-bit integers modulo 2⁶⁴.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64

_BUCKETS = 2**13


# Random numbers by place.


def random_bits(places: Tensor, seed: int = 0) -> Tensor:
    """(...) int64 → (...) int64: 64 pseudo-random bits a place, those of splitmix64 started at the seed."""
    bits = seed + (places + 1) * _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def substream(seed: int, number: int) -> int:
    """The seed of the number-th of the independent streams that belong to one seed."""
    return int(random_bits(torch.tensor(number), seed))


def random_uniform(bits: Tensor) -> Tensor:
    """64 bits → float64 strictly between 0 and 1: different for bits that differ in the first 53."""
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def random_signs(places: Tensor, seed: int) -> Tensor:
    """(...) int64 → (...) float64: 1 or -1."""
    return torch.where(random_bits(places, seed) < 0, -1.0, 1.0).double()


def random_normal(count: int, seed: int) -> Tensor:
    """(count,) standard normal, by Box and Muller (1958); on the CPU, so that devices share them."""
    places = torch.arange(count)
    radius = (-2 * random_uniform(random_bits(2 * places, seed)).log()).sqrt()
    return radius * (2 * torch.pi * random_uniform(random_bits(2 * places + 1, seed))).cos()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right; that of torch would repeat the sign."""
    return (bits >> by) & (2 ** (64 - by) - 1)


# Posterior variance.


@dataclass(frozen=True)
class Residual:
    """Residual variance v(x) = ‖Φ(x) root‖², what a Gaussian process still does not know at x.

    Args:
        root: (d, d) float64.
        mean: Of v over the fitted rows.
        effective: Σ v / σ² over the fitted rows, the effective number of parameters.
        jitter: Relative jitter of the factorisation.
    """

    root: Tensor
    mean: float
    effective: float
    jitter: float


def residual(gram: Tensor, count: float, noise: float) -> Residual:
    """The residual variance in feature form: O(d²) a query, however many rows were fitted.

    v(x) = k(x, x) - k_xT (K_TT + σ²I)⁻¹ k_Tx = σ² Φ(x)ᵀ (Φ_TᵀΦ_T + σ²I)⁻¹ Φ(x),  k(x, y) = Φ(x)·Φ(y)

    The rows Φ root are the posterior features of bmdal (Holzmüller et al. 2023): their inner products are the
    posterior covariance.

    Args:
        gram: (d, d) Φ_TᵀΦ_T of the fitted rows.
        count: Number of them.
        noise: σ².
    """
    mean_gram = gram / count
    eye = torch.eye(len(gram), dtype=gram.dtype, device=gram.device)
    root, jitter = whitener(mean_gram + noise / count * eye)
    root = root * (noise / count) ** 0.5
    mean = float((root * (mean_gram @ root)).sum())
    return Residual(root, mean, mean * count / noise, jitter)


def mean_square(gram: Tensor, count: float, offset: float = 0.0) -> float:
    """Mean of ‖Φ‖² over the rows of a Gram matrix, the unit that the noise is relative to.

    Args:
        gram: (d, d) ΦᵀΦ.
        count: Number of rows.
        offset: ‖mean‖² where a mean was taken from the rows.

    Raises:
        LabelError: The rows are zero, or nothing but rounding is left of them.
    """
    square = float(gram.diagonal().sum()) / count
    if square <= 1e-28 * offset:
        raise LabelError("all training frames have the same features: they span nothing to measure distances by.")
    return square


@dataclass(frozen=True)
class Pivots:
    """A partial Cholesky factorisation of a kernel matrix K ≈ factor factorᵀ.

    Args:
        indices: Rows in the order in which they were taken; no row twice.
        factor: (n, rank); its rows at `indices` are lower triangular.
        values: (rank,) the pivots, descending: the variance that each had left when it was taken. Their product is
            the determinant of the block of K that was taken.
    """

    indices: list[int]
    factor: Tensor
    values: Tensor


def pivoted_cholesky(columns: Callable[[int], Tensor], diagonal: Tensor, rank: int, *, smallest: float = 0.0) -> Pivots:
    """Takes, one after the other, the row with the most variance given those taken before: greedy MaxDet.

    c = (k_j - L L_j)/√d_j,  d ← d - c²;  O(n·rank²), and one column of K a step.

    Args:
        columns: j → (n,) column of K.
        diagonal: (n,) of K.
        rank: Most rows to take.
        smallest: A pivot that is not larger ends it: the rest is known from the rows taken.
    """
    left = diagonal.double().clone()
    factor = torch.zeros(len(left), min(rank, len(left)), dtype=left.dtype, device=left.device)
    indices, values = [], []
    for step in range(factor.shape[1]):
        index = int(left.argmax())
        pivot = float(left[index])
        if pivot <= smallest:
            break
        column = columns(index).double() - factor[:, :step] @ factor[index, :step]
        # What rounding leaves on the rows taken before would be divided by small pivots later.
        column[indices] = 0.0
        factor[:, step] = column / pivot**0.5
        left = left - factor[:, step].square()
        indices.append(index)
        values.append(pivot)
        left[indices] = -torch.inf
    taken = torch.tensor(values, dtype=left.dtype, device=left.device)
    return Pivots(indices, factor[:, : len(indices)], taken)


# Random projection.


class Sketch(torch.nn.Module):
    """Random projection of a long vector that keeps inner products: ⟨Sg, Sh⟩ = ⟨g, h⟩ ± ‖g‖‖h‖/√size.

    Two stages, since a Gaussian matrix for millions of parameters would be gigabytes: count-sketch (every entry is
    added to one of 2¹³ buckets with a random sign; Charikar, Chen and Farach-Colton 2002), then a Gaussian matrix with
    entries N(0, 1/size). A vector that is no longer than the sketch is left as it is.

    Scores of sketches rank rows as those of the vectors do; their values are others once there are about as many rows
    as entries. Never compare scores of sketches of other sizes or seeds.

    Args:
        length: Entries of the vectors.
        size: Entries of a sketch.
        seed: Of the hash and of the Gaussian matrix, which the sketch is made from again wherever it is needed.
    """

    bucket: Tensor
    gaussian: Tensor

    def __init__(self, length: int, size: int, seed: int) -> None:
        super().__init__()
        self.length = length
        self.size = min(size, length)
        if self.size == length:
            return
        # The upper half of the buckets is subtracted: a bucket holds its sign.
        bucket = random_bits(torch.arange(length), substream(seed, 0)) & (2 * _BUCKETS - 1)
        gaussian = random_normal(_BUCKETS * size, substream(seed, 1)).reshape(_BUCKETS, size) / size**0.5
        self.register_buffer("bucket", bucket.int(), persistent=False)
        self.register_buffer("gaussian", gaussian, persistent=False)

    def forward(self, vector: Tensor) -> Tensor:
        """(length,) → (size,) float64.

        Raises:
            ValueError: The vector has another length.
        """
        if vector.shape != (self.length,):
            raise ValueError(
                f"the kernel was fitted for a potential of {self.length} parameters, this one has {vector.numel()}."
            )
        vector = vector.double()
        if self.size == self.length:
            return vector
        buckets = vector.new_zeros(2 * _BUCKETS).index_add_(0, self.bucket, vector)
        return (buckets[:_BUCKETS] - buckets[_BUCKETS:]) @ self.gaussian

    @classmethod
    def like(cls, vector: Tensor, size: int, seed: int) -> Self:
        """A sketch of vectors like this one, on its device."""
        return cls(len(vector), size, seed).to(vector.device)
