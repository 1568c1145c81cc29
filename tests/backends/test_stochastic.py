"""Drawn weights: each member is a copy of the potential whose weights were perturbed by hand, and keeps its laws."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_uq.backends import load_backend, stochastic
from ase_uq.backends.base import Backend
from ase_uq.backends.stochastic import Drawn
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.errors import InputError
from ase_uq.numerics.variational import Rates, noise_of
from ase_uq.testing.backends import PassLaws, standard_frames

from .builders import make_mace, twin, water
from .drawn import MACECalculator, blip_of, mace_backend, rates_of, toy_backend

CONSTANT = 0.01


def drawn(backend: Backend, frames: list[Atoms], rates: Rates, n_members: int = 3) -> Drawn:
    model = backend.stochastic()
    found = model.draw(backend.collate(frames), rates, model.noise(n_members, 5))
    return replace(found, energy=found.energy.detach(), rates=found.rates.detach())


@pytest.fixture(scope="module", params=["mace", "toy"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return mace_backend() if request.param == "mace" else toy_backend()


class TestLawsOfToy(PassLaws):
    n_forwards = 2  # a plain pass, and one of all members

    def make_calculator(self, dtype="float64"):
        return ToyCalculator(dtype=dtype)

    def last_layer(self, calculator):
        return [calculator.potential.weights]

    @pytest.fixture(scope="class")
    @classmethod
    def backend(cls) -> Backend:
        own = load_backend(cls().make_calculator(cls.dtype))
        return own.with_blip(blip_of(own))


class TestLawsOfMACE(TestLawsOfToy):
    n_forwards = 1  # members are those of shells around the model, whose own forward is called once

    def make_calculator(self, dtype="float64"):
        model = make_mace(order=0, correlation=1, channels=4)
        return MACECalculator(models=model, device="cpu", default_dtype=dtype)

    def last_layer(self, calculator):
        return [calculator.models[0].readouts[0].linear.weight, calculator.models[0].readouts[-1].linear_2.weight]


@pytest.mark.parametrize("kind", ["residual", "mh-1"])
def test_members_of_a_mace_are_models_with_weights_perturbed_by_hand(kind: str):
    """Also where α depends on the structure: energies of a structure are those of weights made for it."""
    own = mace_backend(kind)
    model, frames = own.stochastic(), standard_frames()
    rates = rates_of(own)
    found = model.draw(own.collate(frames), rates, model.noise(2, 5))
    flat = model.draw(own.collate(frames), rates_of(own, CONSTANT), model.noise(2, 5))
    alphas = rates(model.invariants(own.collate(frames)))
    torch.testing.assert_close(found.rates, alphas)
    assert float(alphas.std(0).min()) > 1e-4
    noise = model.noise(2, 5)
    start = 0
    for frame, atoms in enumerate(frames):
        if frame not in (0, 1, 3):
            start += len(atoms)
            continue
        for member in range(2):
            for alpha, result in ((dict(zip(rates.groups, alphas[frame], strict=True)), found), (None, flat)):
                perturbed = _perturbed_by_hand(own, model, [one[member] for one in noise], alpha)
                expected = perturbed.forward(perturbed.collate([atoms]))
                assert float(result.energy[member, frame].detach()) == pytest.approx(float(expected.energy), abs=1e-9)
                if alpha is None:
                    rows = slice(start, start + len(atoms))
                    torch.testing.assert_close(result.forces[member, rows], expected.forces, atol=1e-9, rtol=0)
                    torch.testing.assert_close(result.stress[member, frame], expected.stress[0], atol=1e-9, rtol=0)
        start += len(atoms)


def _perturbed_by_hand(own: Any, model: Any, noise: list, alpha: Any) -> Any:
    """The potential whose weights were multiplied by 1 + √α ε, in place."""
    changed = twin(own.calculator.models[0])
    for (path, group, _), epsilon in zip(model._found, noise, strict=True):
        weight = changed.get_submodule(path).weight
        scale = (CONSTANT if alpha is None else float(alpha[group])) ** 0.5
        with torch.no_grad():
            weight *= 1 + scale * epsilon.reshape(weight.shape)
    calculator = object.__new__(type(own.calculator))
    vars(calculator).update(vars(own.calculator), models=[changed])
    return load_backend(calculator)


@pytest.mark.parametrize("outputs", ["2x0e + 3x1o", "3x0e + 1x1o + 2x2e"])  # no path leads to 2e
def test_a_linear_map_applied_with_other_weights_is_that_of_e3nn(outputs: str):
    from e3nn import o3

    from ase_uq.backends.mace.stochastic import _applied

    linear = o3.Linear("4x0e + 2x0e + 3x1o", outputs).double()
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(3, linear.weight_numel, generator=generator, dtype=torch.float64)
    rows = torch.randn(3, 5, linear.irreps_in.dim, generator=generator, dtype=torch.float64)
    expected = torch.stack([linear(one, own) for one, own in zip(rows, weights, strict=True)])
    torch.testing.assert_close(_applied(linear, rows, weights), expected)


def test_noise_on_the_weights_of_a_vector_map_has_the_full_covariance_of_its_channels():
    """That of the local reparametrisation, Σ_c θ_c² v_c v_cᵀ for α = 1: it turns with the vectors."""
    from e3nn import o3

    from ase_uq.backends.mace.stochastic import _applied

    linear = o3.Linear("3x1o", "1x1o").double()
    vectors = torch.randn(3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    (noise,) = noise_of([3 * 5000], 4, seed=2)
    weights = linear.weight.detach() * noise.reshape(-1, 3)
    drawn = _applied(linear, vectors.flatten().expand(len(weights), 1, 9), weights)[:, 0]
    theta = linear.weight.detach() * linear.instructions[0].path_weight
    expected = torch.einsum("c,ca,cb->ab", theta**2, vectors, vectors)
    scale = float(expected.diagonal().max())
    torch.testing.assert_close(torch.cov(drawn.T), expected, rtol=0, atol=0.05 * scale)
    assert float((expected - torch.diag(expected.diagonal())).abs().max()) > 0.2 * scale


def test_members_of_a_toy_have_weights_perturbed_by_hand():
    own = toy_backend()
    model, frames = own.stochastic(), standard_frames()
    rates = rates_of(own)
    found = model.draw(own.collate(frames), rates, model.noise(2, 5))
    for frame, atoms in enumerate(frames):
        alpha = float(rates(model.invariants(own.collate([atoms]))))
        for member in range(2):
            calculator = ToyCalculator()
            calculator.potential.weights *= 1 + alpha**0.5 * model.noise(2, 5)[0][member]
            expected = load_backend(calculator)
            energy = expected.forward(expected.collate([atoms])).energy
            assert float(found.energy[member, frame].detach()) == pytest.approx(float(energy), abs=1e-10)


def test_forces_and_stresses_are_derivatives_of_each_members_energy(backend: Backend):
    """By central differences: α moves with the atoms, and its part of the force is in the force."""
    rates = rates_of(backend)
    frames = [standard_frames()[1], water()]
    found = drawn(backend, frames, rates)
    step, start = 1e-4, 0
    for frame, atoms in enumerate(frames):
        rng = np.random.default_rng(frame)
        direction = rng.normal(size=(len(atoms), 3))
        moved = [atoms.copy(), atoms.copy()]
        for copy, sign in zip(moved, (1, -1), strict=True):
            copy.positions += sign * step * direction
        energies = drawn(backend, moved, rates).energy
        slope = (energies[:, 0] - energies[:, 1]) / (2 * step)
        forces = found.forces[:, start : start + len(atoms)]
        expected = -(forces * torch.from_numpy(direction)).sum((1, 2))
        torch.testing.assert_close(slope, expected, rtol=1e-5, atol=1e-6)
        start += len(atoms)
    strain = 1e-4 * np.array([[1, 0.3, 0], [0.3, -0.5, 0.2], [0, 0.2, 0.4]])
    strained = [frames[0].copy(), frames[0].copy()]
    for copy, sign in zip(strained, (1, -1), strict=True):
        copy.set_cell(copy.cell.array @ (np.eye(3) + sign * strain), scale_atoms=True)
    energies = drawn(backend, strained, rates).energy
    voigt = torch.tensor(
        [strain[0, 0], strain[1, 1], strain[2, 2], 2 * strain[1, 2], 2 * strain[0, 2], 2 * strain[0, 1]]
    )
    expected = (found.stress[:, 0] * voigt).sum(1) * frames[0].get_volume()
    torch.testing.assert_close((energies[:, 0] - energies[:, 1]) / 2, expected, rtol=1e-5, atol=1e-8)


def test_each_member_is_equivariant_and_knows_no_order_of_atoms(backend: Backend):
    rates = rates_of(backend)
    atoms = standard_frames()[0]
    rotation = np.linalg.qr(np.random.default_rng(0).normal(size=(3, 3)))[0]  # may be a reflection, too
    rotated, order = atoms.copy(), np.random.default_rng(1).permutation(len(atoms))
    rotated.positions = atoms.positions @ rotation.T + [3.0, -2.0, 1.0]
    own, other, mixed = (drawn(backend, [one], rates) for one in (atoms, rotated, atoms[order]))
    for found in (other, mixed):
        torch.testing.assert_close(found.energy, own.energy, rtol=0, atol=1e-9)
        torch.testing.assert_close(found.rates, own.rates, rtol=1e-9, atol=0)
    assert float(own.energy.std(0)) > 1e-4
    torch.testing.assert_close(other.forces, own.forces @ torch.from_numpy(rotation.T), rtol=0, atol=1e-9)
    torch.testing.assert_close(mixed.forces, own.forces[:, order], rtol=0, atol=1e-9)


def test_members_do_not_depend_on_the_batch(backend: Backend, monkeypatch: pytest.MonkeyPatch):
    frames = standard_frames()
    both = [backend.with_blip(blip_of(backend, n_members=5))]
    monkeypatch.setattr(stochastic, "_ATOMS_TOGETHER", {"cpu": 2 * sum(map(len, frames))})
    both.append(backend.with_blip(blip_of(backend, n_members=5)))  # five members in parts of two
    whole, parts = (one.forward(one.collate(frames)).members for one in both)
    for name in ("energy", "forces", "stress"):
        torch.testing.assert_close(getattr(whole, name), getattr(parts, name), rtol=0, atol=1e-9)
    start = 0
    for number, atoms in enumerate(frames):
        alone = both[0].forward(both[0].collate([atoms])).members
        torch.testing.assert_close(alone.energy[:, 0], whole.energy[:, number], rtol=0, atol=1e-9)
        torch.testing.assert_close(alone.forces, whole.forces[:, start : start + len(atoms)], rtol=0, atol=1e-9)
        start += len(atoms)


def test_repeated_calls_agree_to_the_last_bit_and_without_forces_there_are_none(backend: Backend):
    one = backend.with_blip(blip_of(backend))
    batch = one.collate([water()])
    first, second, bare = one.forward(batch), one.forward(batch), one.forward(batch, forces=False)
    assert torch.equal(first.members.energy, second.members.energy)
    assert torch.equal(first.members.forces, second.members.forces)
    assert (bare.members.forces, bare.members.stress) == (None, None)
    torch.testing.assert_close(bare.members.energy, first.members.energy, rtol=0, atol=1e-9)
    assert not first.members.energy.requires_grad


def test_the_prediction_is_that_of_the_plain_potential_bit_for_bit(backend: Backend):
    """The mean weights predict, whatever the noise; without noise all members do."""
    plain = backend.forward(backend.collate(standard_frames()))
    for constant in (0.0, 0.04):
        one = backend.with_blip(blip_of(backend, constant))
        found = one.forward(one.collate(standard_frames()))
        for name in ("energy", "energies", "forces", "stress", "features"):
            assert torch.equal(getattr(found, name), getattr(plain, name)), name
        spread = float((found.members.forces - plain.forces).abs().max())
        assert spread > 1e-3 if constant else spread < 1e-12
    assert plain.members is None


def test_small_rates_spread_in_proportion_to_their_root(backend: Backend):
    """To first order members are linear in √α, and their mean over many is the prediction."""
    spreads = []
    for constant in (1e-8, 4e-8):
        one = backend.with_blip(blip_of(backend, constant))
        spreads.append(one.forward(one.collate([water()])).members.forces.std(0))
    torch.testing.assert_close(spreads[1], 2 * spreads[0], rtol=1e-3, atol=1e-9)


def test_members_of_a_linear_potential_have_its_closed_moments():
    """Those of Σ_k w_k (1 + √α ε_k) ψ_k; they are moved onto the prediction by no more than the error of their mean."""
    own = toy_backend()
    one = own.with_blip(blip_of(own, CONSTANT, n_members=1000))
    batch = one.collate([water()])
    found, model = one.forward(batch, forces=False), own.stochastic()
    spread = CONSTANT**0.5 * float((found.energy_layer.features.sum(0) * found.energy_layer.weights).norm())
    assert float(found.members.energy.std(0)) == pytest.approx(spread, rel=0.1)
    drawn = model.draw(batch, rates_of(own, CONSTANT), model.noise(1000, 5), forces=False).energy.detach()
    moved = found.members.energy - drawn
    assert float(moved.std()) < 1e-10
    assert 0 < float(moved.mean().abs()) < 4 * spread / 1000**0.5
    assert float(found.members.energy.mean(0)) == pytest.approx(float(found.energy), abs=1e-9)


def test_a_trained_model_as_mace_saves_it(trained_models: Path):
    own = load_backend(f"mace:{trained_models / 'mace_acac.model'}", device="cpu")
    before = [weight.detach().clone() for weight in own.calculator.models[0].parameters()]
    one = own.with_blip(blip_of(own, 1e-4))
    assert dict(one._members.model.groups) == {
        "messages 0": 13312, "updates 0": 2048, "messages 1": 32768, "updates 1": 1024
    }  # fmt: skip
    members = one.forward(one.collate([water()])).members
    assert float(members.forces.std(0).mean()) > 1e-4
    for weight, old in zip(own.calculator.models[0].parameters(), before, strict=True):
        assert torch.equal(weight, old)


def test_potentials_whose_weights_cannot_be_drawn():
    direct = load_backend(ToyCalculator(direct=True))
    with pytest.raises(InputError, match="weights of a direct force head cannot be drawn"):
        direct.stochastic()
    models = [make_mace(seed=seed) for seed in (0, 1)]
    several = load_backend(MACECalculator(models=models, device="cpu", default_dtype="float64"))
    with pytest.raises(InputError, match=r"these are 2 MACE models, .*Give one \.model file"):
        several.stochastic()
    other = mace_backend()
    for block in (*other.calculator.models[0].interactions, *other.calculator.models[0].products):
        for name in [name for name, _ in block.named_children() if "linear" in name]:
            setattr(block, name, torch.nn.Identity())
    with pytest.raises(InputError, match="no linear maps of e3nn whose weights could be drawn"):
        other.stochastic()
    compiled = mace_backend()
    vars(compiled.calculator.models[0])["_orig_mod"] = torch.nn.Identity()  # as torch.compile leaves it
    with pytest.raises(InputError, match="compiled, and its weights cannot be drawn"):
        compiled.stochastic()


def test_backends_without_stochastic_weights_say_so():
    class Bare(ToyBackend):
        name = "bare"
        stochastic = Backend.stochastic

    bare = Bare(ToyCalculator())
    with pytest.raises(InputError, match="weights of bare potentials cannot be drawn; those of mace and toy can"):
        bare.with_blip(blip_of(toy_backend()))
