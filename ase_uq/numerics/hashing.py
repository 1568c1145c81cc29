"""Random numbers that are a hash of a place and a seed.

There is no generator with a state, so they do not depend on batches, ranks, devices or versions of torch, and need not
be stored.
"""

import torch
from torch import Tensor

# Constants of splitmix64 (Steele, Lea and Flood 2014), as signed numbers: torch multiplies 64-bit integers modulo 2⁶⁴.
_GOLDEN = 0x9E3779B97F4A7C15 - 2**64
_FIRST = 0xBF58476D1CE4E5B9 - 2**64
_SECOND = 0x94D049BB133111EB - 2**64


def random_bits(places: Tensor, seed: int = 0) -> Tensor:
    """(...) int64 → (...) int64: 64 pseudo-random bits per place, those of splitmix64 started at the seed."""
    bits = seed + (places + 1) * _GOLDEN
    bits = (bits ^ _shifted(bits, 30)) * _FIRST
    bits = (bits ^ _shifted(bits, 27)) * _SECOND
    return bits ^ _shifted(bits, 31)


def substream(seed: int, number: int) -> int:
    """The seed of the number-th of the independent streams that belong to one seed."""
    return int(random_bits(torch.tensor(number), seed))


def random_uniform(bits: Tensor) -> Tensor:
    """64 bits → float64 strictly between 0 and 1; bits that differ in the first 53 give different numbers."""
    return (_shifted(bits, 11).double() + 0.5) * 2.0**-53


def random_signs(places: Tensor, seed: int) -> Tensor:
    """(...) int64 → (...) float64: a random sign, 1 or -1, per place."""
    return torch.where(random_bits(places, seed) < 0, -1.0, 1.0).double()


def random_normal(count: int, seed: int) -> Tensor:
    """(count,) standard normal numbers by Box and Muller (1958); made on the CPU, so that all devices share them."""
    places = torch.arange(count)
    radius = (-2 * random_uniform(random_bits(2 * places, seed)).log()).sqrt()
    return radius * (2 * torch.pi * random_uniform(random_bits(2 * places + 1, seed))).cos()


def _shifted(bits: Tensor, by: int) -> Tensor:
    """Logical shift to the right; the shift of torch would repeat the sign bit."""
    return (bits >> by) & (2 ** (64 - by) - 1)
