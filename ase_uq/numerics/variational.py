"""Weights that are drawn, with a relative variance that depends on the structure: rates, noise and losses.

    ω = θ · (1 + √α(G) ε),   ε ~ N(0, 1),        prior ω ~ N(θ, α₀ θ²),   α₀ = p / (1 - p)
    KL = ½ [α/α₀ - 1 - ln(α/α₀)]  a weight,      0 where α = α₀, whatever θ

p is a dropout rate: with α = α₀ everywhere these are the weights of Gaussian dropout (Srivastava et al. 2014; Kingma,
Salimans and Welling 2015). With α(G) from a small network of invariants of the structure, they are those of BLIP
(Bayesian learned interatomic potentials; Coscia, de Haan and Welling 2025).
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ase_uq.io.entries import LARGEST, SMALLEST, Entries, StoredTensors
from ase_uq.numerics.buffers import Fitted
from ase_uq.numerics.hashing import random_normal, substream

# Bounds of α. Weights of a trained potential with noise of a tenth of a percent still predict; with noise as large as
# themselves they predict nothing.
SMALLEST_RATE, LARGEST_RATE = 1e-8, 1.0
HIDDEN = 32


class Rates(Fitted):
    """α of each group of weights, for each structure: constants, or a network of invariants of the structure.

    ln α goes smoothly from that of `SMALLEST_RATE` to that of `LARGEST_RATE`, so that forces have no kinks.

    Args:
        settings: `groups`, the names of the groups, and `alpha`, their constants, or None for a network.
        tensors: Of a network, all float64: `centre` and `spread` (n_inputs,) of the invariants, `inner`
            (n_inputs, n_hidden), `inner_bias`, `outer` (n_hidden, n_groups) and `outer_bias`.
    """

    @classmethod
    def constant(cls, groups: Sequence[str], alpha: float) -> "Rates":
        """The same α for all groups and structures; 0 for weights that are not drawn.

        Raises:
            ValueError: α is negative or not finite.
        """
        if not 0 <= alpha < math.inf:
            raise ValueError(f"alpha is {alpha!r}; 0 or a positive number was expected.")
        return cls({"groups": list(groups), "alpha": [float(alpha)] * len(groups)}, {})

    @classmethod
    def network(cls, groups: Sequence[str], invariants: Tensor, alpha: float, seed: int) -> "Rates":
        """A network that has not been trained: α of all groups and structures is the one that is given.

        Args:
            groups: Names of the groups.
            invariants: (n, n_inputs) those of training frames, by which the inputs are standardised.
            alpha: α at the start.
            seed: Seed of the inner layer.

        Raises:
            ValueError: α is not between the bounds.
        """
        if not SMALLEST_RATE < alpha < LARGEST_RATE:
            raise ValueError(
                f"alpha is {alpha!r}; a number between {SMALLEST_RATE:g} and {LARGEST_RATE:g} was expected."
            )
        rows = invariants.detach().double()
        n_inputs = rows.shape[1]
        spread = rows.std(0, correction=0)
        # An invariant that never varied gets the largest spread, so that a change in it does not explode; if none did,
        # as with copies of one structure, their size.
        size = rows.abs().max().clamp(min=1e-12)
        largest = spread.max() if spread.max() > 1e-9 * size else size
        inner = random_normal(n_inputs * HIDDEN, seed).reshape(n_inputs, HIDDEN).to(rows) / n_inputs**0.5
        share = math.log(alpha / SMALLEST_RATE) / math.log(LARGEST_RATE / SMALLEST_RATE)
        tensors = {
            "centre": rows.mean(0),
            "spread": torch.where(spread > 1e-6 * largest, spread, largest),
            "inner": inner,
            "inner_bias": torch.zeros(HIDDEN).to(rows),
            "outer": torch.zeros(HIDDEN, len(groups)).to(rows),
            "outer_bias": torch.full((len(groups),), math.log(share / (1 - share))).to(rows),
        }
        return cls({"groups": list(groups), "alpha": None}, tensors)

    @staticmethod
    def check(settings: Entries, tensors: StoredTensors) -> None:
        """Refuses wrong entries of a file.

        Raises:
            WrongEntry: An entry is missing or wrong.
        """
        settings.keys(("groups", "alpha"))
        groups = settings["groups"]
        if not isinstance(groups, list) or not groups or not all(isinstance(name, str) for name in groups):
            raise settings.wrong("groups", "a list of names")
        if settings["alpha"] is not None:
            settings.numbers("alpha", 0, length=len(groups))
        else:
            width = len(tensors.take("centre", None))
            tensors.take("spread", width, low=SMALLEST)
            n_hidden = tensors.take("inner", width, None).shape[1]
            tensors.take("inner_bias", n_hidden)
            tensors.take("outer", n_hidden, len(groups))
            tensors.take("outer_bias", len(groups), low=-LARGEST)
        tensors.nothing_else()

    @property
    def groups(self) -> tuple[str, ...]:
        """Names of the groups of weights."""
        return tuple(self._settings["groups"])

    @property
    def trainable(self) -> list[Tensor]:
        """Tensors that a training changes; none of constants."""
        names = ("inner", "inner_bias", "outer", "outer_bias")
        return [tensor for name, tensor in self.named_buffers() if name in names]

    def forward(self, invariants: Tensor) -> Tensor:
        """(n_frames, n_inputs) → (n_frames, n_groups), float64: α."""
        if self._settings["alpha"] is not None:
            constants = torch.tensor(self._settings["alpha"], dtype=torch.float64, device=invariants.device)
            return constants.expand(len(invariants), -1)
        held = dict(self.named_buffers())
        rows = (invariants.double() - held["centre"]) / held["spread"]
        # A smooth activation: α is differentiated by positions.
        hidden = torch.nn.functional.silu(rows @ held["inner"] + held["inner_bias"])
        share = torch.sigmoid(hidden @ held["outer"] + held["outer_bias"])
        return SMALLEST_RATE * torch.exp(share * math.log(LARGEST_RATE / SMALLEST_RATE))


def prior_rate(dropout: float) -> float:
    """α₀ = p / (1 - p), the relative variance that dropout of rate p gives a weight.

    Raises:
        ValueError: p is not in [0, 1).
    """
    if not 0 <= dropout < 1:
        raise ValueError(f"dropout is {dropout!r}; a number from 0 to below 1 was expected.")
    return dropout / (1 - dropout)


def relative_entropy(rate: Tensor, prior: float) -> Tensor:
    """KL of N(θ, αθ²) from N(θ, α₀θ²) for one weight, elementwise in α; nats."""
    ratio = rate / prior
    return (ratio - 1 - ratio.log()) / 2


def noise_of(sizes: Sequence[int], n_members: int, seed: int) -> list[Tensor]:
    """One (n_members, size) tensor a layer of standard normal numbers, float64.

    They are a hash of seed, layer and member: the first members are the same however many there are.
    """
    return [
        torch.stack([random_normal(size, substream(substream(seed, layer), k)) for k in range(n_members)])
        for layer, size in enumerate(sizes)
    ]


def gaussian_nll(residuals: Tensor, log_std: Tensor) -> Tensor:
    """-ln N(residual; 0, σ²), elementwise, with ln σ."""
    return (residuals * torch.exp(-log_std)).square() / 2 + log_std + 0.5 * math.log(2 * math.pi)


def fair_crps(draws: Tensor, reference: Tensor) -> Tensor:
    """(n_draws, ...), (...) → (...): continuous ranked probability score of a sample, without bias in its size.

        CRPS = 1/n Σ_t |y_t - y| - 1/(2 n (n - 1)) Σ_ts |y_t - y_s|

    Source: Ferro, Q. J. R. Meteorol. Soc. 140, 1917 (2014).

    Raises:
        ValueError: There are fewer than two draws.
    """
    count = len(draws)
    if count < 2:
        raise ValueError(f"the CRPS of {count} draw has no spread: 2 draws or more were expected.")
    apart = sum(((draws[t] - draws[:t]).abs().sum(0) for t in range(1, count)), torch.zeros_like(reference))
    return (draws - reference).abs().mean(0) - apart / (count * (count - 1))
