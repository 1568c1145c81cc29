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
from ase_uq.backends.mace import loading  # before e3nn, which the mace package patches
from ase_uq.backends.stochastic import Blip, Drawn
from ase_uq.backends.toy import ToyBackend, ToyCalculator
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.numerics.variational import Rates
from ase_uq.testing.backends import PassLaws, standard_frames

from .builders import make_mace, make_mh1_like, twin, water

MACECalculator = loading.MACECalculator
CONSTANT = 0.01
BUILDERS = {"residual": make_mace, "mh-1": make_mh1_like}


def mace_backend(kind: str = "residual", **options: Any) -> Backend:
    model = BUILDERS[kind](**options)
    head = {"head": "omat"} if kind == "mh-1" else {}
    return load_backend(MACECalculator(models=model, device="cpu", default_dtype="float64", **head))


def toy_backend() -> Backend:
    return load_backend(ToyCalculator())


def rates_of(backend: Backend, constant: float | None = None) -> Rates:
    """Those of a network whose answer depends on the structure, or constant ones."""
    model = backend.stochastic()
    if constant is not None:
        return Rates.constant(list(model.groups), constant)
    rows = model.invariants(backend.collate(standard_frames()))
    made = Rates.network(list(model.groups), rows, 0.01, seed=0)
    held = dict(made.named_buffers())
    held["outer"] = 0.1 * torch.randn(
        held["outer"].shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    return Rates(made.settings, held)


def blip_of(backend: Backend, constant: float | None = None, n_members: int = 3) -> Blip:
    weights = {name: one.detach().clone() for name, one in backend.stochastic().parameters.items()}
    return Blip(backend.identity, weights, rates_of(backend, constant), n_members, seed=5)


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


class TestFile:
    def test_it_holds_all(self, backend: Backend, tmp_path: Path):
        blip = replace(blip_of(backend), training={"loss": "elbo"})
        blip.save(tmp_path / "a.st")
        loaded = Blip.load(tmp_path / "a.st")
        one, other = backend.with_blip(blip), backend.with_blip(loaded)
        assert one.identity.fingerprint == other.identity.fingerprint
        assert one.identity.fingerprint != backend.identity.fingerprint
        batch = one.collate([water()])
        assert torch.equal(one.forward(batch).members.forces, other.forward(batch).members.forces)
        assert (loaded.n_members, loaded.seed, loaded.training) == (3, 5, {"loss": "elbo"})
        assert "Blip(potential=Identity(" in repr(loaded)

    def test_the_spec_loads_it(self, tmp_path: Path):
        own = load_backend("embedded:mace", device="cpu", dtype="float64")
        blip_of(own).save(tmp_path / "a.st")
        found = load_backend(f"embedded:mace?blip={tmp_path / 'a.st'}", device="cpu", dtype="float64")
        assert found.forward(found.collate([water()])).members.energy.shape == (3, 1)
        assert found.name == "mace"
        both = load_backend(f"embedded:mace?head=Default?blip={tmp_path / 'a.st'}", device="cpu", dtype="float64")
        assert both.identity.fingerprint == found.identity.fingerprint

    def test_a_spec_that_names_no_file(self):
        with pytest.raises(ValueError, match=r"'toy:\?blip=' names no file after \?blip="):
            load_backend("toy:?blip=")
        with pytest.raises(ArtefactError, match=r"there is no file no\.st"):
            load_backend("toy:?blip=no.st")

    def test_members_and_seed_are_part_of_the_identity(self, backend: Backend):
        one = backend.with_blip(blip_of(backend))
        for change, message in (
            ({"n_members": 4}, "blip_members was 3, here it is 4"),
            ({"seed": 6}, "blip_seed was 5, here it is 6"),
            ({"rates": rates_of(backend, 0.1)}, "blip_rates was"),
        ):
            other = backend.with_blip(replace(blip_of(backend), **change))
            with pytest.raises(PotentialMismatch, match=message):
                other.check_identity(one.identity)
        with pytest.raises(PotentialMismatch, match="blip_members was None, here it is 3"):
            one.check_identity(backend.identity)

    def test_another_potential_is_refused(self, backend: Backend):
        blip = blip_of(backend)
        other = load_backend(ToyCalculator(seed=1)) if backend.name == "toy" else mace_backend(seed=1)
        advice = r"Load the potential that it was trained from, or train again with `ase-uq blip`\."
        with pytest.raises(PotentialMismatch, match=rf"of other weights: features .* differ by .* {advice}"):
            other.with_blip(blip)
        wrong = mace_backend() if backend.name == "toy" else toy_backend()
        with pytest.raises(PotentialMismatch, match=rf"trained from another potential: .* was .*, here .*{advice}"):
            wrong.with_blip(blip)

    def test_the_same_potential_in_another_precision_is_accepted(self):
        own, single = (load_backend("embedded:mace", device="cpu", dtype=dtype) for dtype in ("float64", "float32"))
        members = [b.with_blip(blip_of(own)).forward(b.collate([water()])).members for b in (own, single)]
        torch.testing.assert_close(members[1].forces.double(), members[0].forces, rtol=0, atol=1e-4)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"n_members": 1}, r"header.n_members is 1, a whole number from 2 to 1000 was expected"),
            ({"seed": "x"}, r"header.seed is 'x'"),
            ({"rates": {"groups": ["energy"]}}, r"has no 'alpha'"),
            ({"potential": []}, r"header.potential is \[\], an object was expected"),
        ],
    )
    def test_wrong_contents(self, change: dict, message: str, tmp_path: Path):
        own = toy_backend()
        blip_of(own).save(tmp_path / "a.st")
        header, tensors = read_tensor_file(tmp_path / "a.st", "stochastic weights", 1)
        write_tensor_file(tmp_path / "a.st", "stochastic weights", 1, header | change, tensors)
        with pytest.raises(
            ArtefactError, match=rf"a\.st is not what training writes: .*{message}.*Make the file again"
        ):
            Blip.load(tmp_path / "a.st")

    def test_another_kind_of_file(self, tmp_path: Path):
        loading.save_potential(make_mace(), tmp_path / "a.st")
        with pytest.raises(
            ArtefactError, match=r"is an ase_uq MACE potential; an ase_uq stochastic weights was expected"
        ):
            Blip.load(tmp_path / "a.st")

    def test_weights_of_another_architecture(self, backend: Backend):
        blip = blip_of(backend)
        name = next(iter(blip.weights))
        for weights in ({**blip.weights, name: torch.zeros(3)}, {**blip.weights, "more": torch.zeros(1)}):
            with pytest.raises(ArtefactError, match=r"the stochastic weights do not fit the potential: .* differs"):
                backend.with_blip(replace(blip, weights=weights))

    def test_a_full_disk(self, backend: Backend):
        if not Path("/dev/full").exists():
            pytest.skip("no /dev/full here")
        with pytest.raises(ArtefactError, match=r"cannot write /dev/full/a\.st"):
            blip_of(backend).save("/dev/full/a.st")


def test_too_few_members(backend: Backend):
    with pytest.raises(ValueError, match="n_members is 1; a number from 2 to 1000 was expected"):
        replace(blip_of(backend), n_members=1)


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
