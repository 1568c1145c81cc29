"""The confidence head in eV/Å: by hand, by sampling, and where it saturates."""

import numpy as np
import pytest
import torch
from ase import Atoms
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError
from ase_uq.forward_pass import ConfidenceBins
from ase_uq.methods.confidence import Confidence, ConfidenceHead, expected_variance
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

from .builders import ToyWithConfidence


@pytest.fixture(scope="module")
def confident() -> Backend:
    return ToyWithConfidence()


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(12, seed=11)


def certain(bins: list[int]) -> ConfidenceBins:
    """Atoms whose head is sure of a bin."""
    edges = torch.tensor([0.0, 0.1, 0.3, 0.4])
    return ConfidenceBins(torch.eye(3)[bins], edges)


def test_by_hand():
    """1.2533 times the centre of the bin, squared; and of the mean of two centres between two bins."""
    variance = expected_variance(certain([0, 1, 2]))
    np.testing.assert_allclose(variance.sqrt(), 1.25331414 * np.array([0.05, 0.2, 0.35]), rtol=1e-7)
    between = ConfidenceBins(torch.tensor([[0.5, 0.0, 0.5]]), certain([0]).edges)
    assert float(expected_variance(between).sqrt()) == pytest.approx(1.25331414 * 0.2, rel=1e-6)


def test_normal_errors_get_their_standard_deviation_back():
    """Errors of σ per component, sorted into the bins by the mean absolute value of the three components."""
    random = np.random.default_rng(0)
    sigma = 0.08
    observed = np.abs(random.normal(scale=sigma, size=(200_000, 3))).mean(1)
    edges = np.linspace(0, 0.4, 51)
    shares = np.histogram(observed, edges)[0] / len(observed)
    found = expected_variance(ConfidenceBins(torch.from_numpy(shares)[None], torch.from_numpy(edges)))
    assert float(found.sqrt()) == pytest.approx(sigma, rel=3e-3)


def test_it_saturates_and_the_tail_goes_on(confident: Backend, frames: list[Atoms]):
    head = fit_head(Confidence(), confident, frames)
    forward_pass = forward_pass_of(confident, frames[:1])
    n_atoms = len(forward_pass.numbers)

    def at(probabilities: Tensor) -> tuple[float, float]:
        object.__setattr__(
            forward_pass, "confidence", ConfidenceBins(probabilities.expand(n_atoms, 3), certain([0]).edges)
        )
        return tuple(head(forward_pass).forces[0, 0].tolist())

    sure, worst = at(torch.tensor([1.0, 0.0, 0.0])), at(torch.tensor([0.0, 0.0, 1.0]))
    assert worst[0] == pytest.approx((1.25331414 * 0.35) ** 2, rel=1e-6)
    assert sure[1] == pytest.approx(1e-3)
    assert worst[1] == pytest.approx(1.001)


def test_energy_and_stress_are_the_mean_over_the_structure(confident: Backend, frames: list[Atoms]):
    head = fit_head(Confidence(), confident, frames, batch_atoms=20)
    forward_pass = forward_pass_of(confident, frames)
    raw = head(forward_pass)
    assert head.settings["mean_square"] == pytest.approx(float(raw.forces[:, 0, 0].mean()), rel=1e-12)
    torch.testing.assert_close(raw.distance, raw.forces[:, 0, 0] / raw.forces[:, 0, 0].mean())
    expected = [float(raw.distance[forward_pass.frame_of_atom == k].mean()) for k in range(len(frames))]
    np.testing.assert_allclose(raw.energy[:, 0], expected, rtol=1e-12)
    assert torch.equal(raw.stress, raw.energy)
    assert torch.equal(raw.energies, raw.distance)


def test_a_potential_without_one_is_told_who_has_one(frames: list[Atoms]):
    without = load_backend(ToyCalculator(ELEMENTS))
    wanted = "needs a potential with a confidence head, and this one has none. orb-v3 models have one"
    with pytest.raises(InputError, match=wanted):
        fit_head(Confidence(), without, frames)
    with pytest.raises(InputError, match=wanted):
        ConfidenceHead({"mean_square": 1.0}, {})(forward_pass_of(without, frames))
