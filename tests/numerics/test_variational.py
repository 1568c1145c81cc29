"""Rates, noise and losses of drawn weights, against closed forms and other people's implementations."""

import math

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from ase_uq.io.entries import Entries, StoredTensors, WrongEntry
from ase_uq.numerics.variational import (
    LARGEST_RATE,
    SMALLEST_RATE,
    Rates,
    fair_crps,
    gaussian_nll,
    noise_of,
    prior_rate,
    relative_entropy,
)

GROUPS = ("messages 0", "updates 0")


@pytest.fixture
def network() -> Rates:
    rows = torch.randn(20, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    made = Rates.network(GROUPS, rows, 1e-3, seed=4)
    held = dict(made.named_buffers())
    held["outer"] = torch.randn(held["outer"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return Rates(made.settings, held)


@pytest.mark.parametrize("mean", [0.3, -2.0])
@pytest.mark.parametrize("rate", [1e-6, 0.01, 0.5])
def test_relative_entropy_is_that_of_two_normal_distributions(mean: float, rate: float):
    prior = 0.02
    own, other = (Normal(mean, math.sqrt(alpha) * abs(mean)) for alpha in (rate, prior))
    expected = float(kl_divergence(own, other))
    found = float(relative_entropy(torch.tensor(rate, dtype=torch.float64), prior))
    assert found == pytest.approx(expected, rel=1e-5)


def test_relative_entropy_is_zero_at_the_prior_and_positive_elsewhere():
    rates = torch.logspace(-6, 0, 61, dtype=torch.float64)
    found = relative_entropy(rates, float(rates[30]))
    assert float(found[30]) == 0
    assert bool((torch.cat([found[:30], found[31:]]) > 0).all())
    assert bool((found[:31].diff() < 0).all())
    assert bool((found[30:].diff() > 0).all())


def test_the_prior_of_dropout_has_its_variance():
    """A weight that is kept with probability 1 - p, and divided by it, has the relative variance p / (1 - p)."""
    p = 0.2
    kept = 1 / (1 - p)
    assert prior_rate(p) == pytest.approx((1 - p) * kept**2 - 1)
    assert prior_rate(0) == 0


@pytest.mark.parametrize("dropout", [-0.1, 1.0, float("nan")])
def test_no_dropout_rate(dropout: float):
    with pytest.raises(ValueError, match=r"dropout is .*; a number from 0 to below 1 was expected"):
        prior_rate(dropout)


def test_noise_is_standard_normal_and_the_first_members_are_always_the_same():
    few, many = noise_of([500, 40], 4, seed=3), noise_of([500, 40], 40, seed=3)
    assert [tuple(one.shape) for one in many] == [(40, 500), (40, 40)]
    for one, other in zip(few, many, strict=True):
        assert torch.equal(one, other[:4])
    values = many[0]
    assert float(values.mean()) == pytest.approx(0, abs=4 / values.numel() ** 0.5)
    assert float(values.var()) == pytest.approx(1, abs=4 * (2 / values.numel()) ** 0.5)
    # Members, layers and seeds are independent.
    correlations = torch.corrcoef(values) - torch.eye(40)
    assert float(correlations.abs().max()) < 5 / 500**0.5
    assert abs(float(torch.corrcoef(torch.stack([values[0, :40], many[1][0]]))[0, 1])) < 0.6
    assert not torch.equal(noise_of([500], 1, seed=4)[0], values[:1])


def test_drawn_weights_have_the_moments_of_their_distribution():
    """ω = θ(1 + √α ε): the output Wx has mean θx and variance α θ²x², as in the local reparametrisation."""
    weights, inputs = torch.tensor([0.5, -2.0, 1.0], dtype=torch.float64), torch.tensor([1.0, 0.3, -0.7]).double()
    alpha = 0.04
    (noise,) = noise_of([30_000], 4, seed=1)
    outputs = (weights * (1 + math.sqrt(alpha) * noise.reshape(40_000, 3))) @ inputs
    variance = alpha * float((weights**2 * inputs**2).sum())
    assert float(outputs.mean()) == pytest.approx(float(weights @ inputs), abs=5 * (variance / 40_000) ** 0.5)
    assert float(outputs.var()) == pytest.approx(variance, rel=0.04)


def test_gaussian_nll_is_that_of_scipy():
    from scipy.stats import norm

    residuals = torch.tensor([-0.3, 0.0, 2.0], dtype=torch.float64)
    found = gaussian_nll(residuals, torch.tensor(math.log(0.7)))
    np.testing.assert_allclose(found, -norm.logpdf(residuals, scale=0.7), rtol=1e-6)


def test_fair_crps_is_the_kernel_form_written_out_and_has_no_bias():
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(5, 7, generator=generator, dtype=torch.float64)
    truth = torch.randn(7, generator=generator, dtype=torch.float64)
    pairs = sum((draws[t] - draws[s]).abs() for t in range(5) for s in range(5))
    torch.testing.assert_close(fair_crps(draws, truth), (draws - truth).abs().mean(0) - pairs / (2 * 5 * 4))
    # CRPS of a standard normal forecast (Gneiting and Raftery 2007), from two draws each.
    y = 0.8
    many = fair_crps(torch.randn(2, 200_000, generator=generator, dtype=torch.float64), torch.full((200_000,), y))
    density, below = math.exp(-(y**2) / 2) / math.sqrt(2 * math.pi), 0.5 * (1 + math.erf(y / math.sqrt(2)))
    assert float(many.mean()) == pytest.approx(y * (2 * below - 1) + 2 * density - 1 / math.sqrt(math.pi), abs=0.006)


def test_the_crps_of_one_draw_is_refused():
    with pytest.raises(ValueError, match="the CRPS of 1 draw has no spread: 2 draws or more were expected"):
        fair_crps(torch.zeros(1, 3), torch.zeros(3))


def test_an_untrained_network_gives_the_rate_that_it_begins_with():
    made = Rates.network(GROUPS, torch.randn(10, 4), 1e-3, seed=0)
    found = made(torch.randn(6, 4))
    assert found.shape == (6, 2)
    torch.testing.assert_close(found, torch.full((6, 2), 1e-3, dtype=torch.float64))
    assert made.groups == GROUPS


def test_rates_stay_between_their_bounds_however_far_the_invariants_are(network: Rates):
    found = network(1e6 * torch.randn(50, 3, generator=torch.Generator().manual_seed(2), dtype=torch.float64))
    assert float(found.min()) >= SMALLEST_RATE * (1 - 1e-9)
    assert float(found.max()) <= LARGEST_RATE * (1 + 1e-9)


def test_rates_are_smooth_functions_of_the_invariants(network: Rates):
    rows = torch.randn(3, 3, generator=torch.Generator().manual_seed(5), dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(network, rows)


def test_an_invariant_that_never_varied_does_not_explode():
    rows = torch.tensor([[0.0, 1.0], [2.0, 1.0]])
    held = dict(Rates.network(GROUPS, rows, 1e-3, seed=0).named_buffers())
    assert held["spread"].tolist() == [1.0, 1.0]
    copies = torch.tensor([[0.3, -5.0]], dtype=torch.float64).repeat(7, 1)
    held = dict(Rates.network(GROUPS, copies, 1e-3, seed=0).named_buffers())
    assert held["spread"].tolist() == [5.0, 5.0]


def test_constant_rates():
    constant = Rates.constant(GROUPS, 0.25)
    assert constant(torch.zeros(3, 1)).tolist() == [[0.25, 0.25]] * 3
    assert constant.trainable == []
    with pytest.raises(ValueError, match=r"alpha is -1; 0 or a positive number was expected"):
        Rates.constant(GROUPS, -1)
    with pytest.raises(ValueError, match=r"alpha is 2; a number between 1e-08 and 1 was expected"):
        Rates.network(GROUPS, torch.zeros(2, 1), 2, seed=0)


@pytest.mark.parametrize(
    ("settings", "drop", "message"),
    [
        ({"groups": [], "alpha": None}, (), "groups is .*, a list of names was expected"),
        ({"groups": ["a"], "alpha": None}, (), r"outer is .* of shape \(32, 1\) was expected"),
        ({"groups": list(GROUPS), "alpha": [0.1]}, (), r"alpha is \[0.1\], a list of 2"),
        ({"groups": list(GROUPS), "alpha": [0.1, 0.1]}, (), "is not one that the settings ask for"),
        ({"groups": list(GROUPS), "alpha": None}, ("inner",), "there is no tensor inner"),
        ({"groups": list(GROUPS), "alpha": None, "more": 1}, (), "has 'more', but only groups, alpha are known"),
    ],
)
def test_wrong_entries_are_refused(network: Rates, settings: dict, drop: tuple[str, ...], message: str):
    held = {name: tensor for name, tensor in network.named_buffers() if name not in drop}
    with pytest.raises(WrongEntry, match=message):
        Rates.check(Entries(settings, "rates"), StoredTensors(held))


def test_entries_of_rates_that_were_made_are_accepted(network: Rates):
    for rates in (network, Rates.constant(GROUPS, 0.0)):
        Rates.check(Entries(rates.settings, "rates"), StoredTensors(dict(rates.named_buffers())))
