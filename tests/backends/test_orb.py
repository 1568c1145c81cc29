"""Every variant of the orb-v3 architecture keeps the contract."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import LinearCombinationCalculator, SumCalculator
from ase.io import read, write
from orb_models.forcefield import pretrained
from orb_models.forcefield.forcefield_adapter import ForcefieldAtomsAdapter
from orb_models.forcefield.inference.calculator import ORBCalculator
from orb_models.forcefield.inference.d3_model import AlchemiDFTD3, D3SumModel

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.mace.loading import save_potential as save_mace
from ase_uq.backends.orb.loading import save_potential
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends import BackendContract, PassLaws, process_state, standard_frames
from ase_uq.testing.backends.last_layers import LastLayerLaws
from ase_uq.testing.backends.means import MeanLaws
from ase_uq.testing.backends.under_test import BackendUnderTest

from .builders import ORB_SIZES, charged_frames, default_dtype, make_mace, make_orb, water


def calculator_of(
    kind: str = "direct", dtype: str = "float32", settings: dict[str, Any] | None = None, **arguments: Any
) -> ORBCalculator:
    """A calculator with a model of its own; equal arguments give equal weights."""
    adapter = ForcefieldAtomsAdapter(radius=6.0, max_num_neighbors=120)
    return ORBCalculator(make_orb(kind, dtype, **arguments), adapter, device="cpu", **(settings or {}))


def evaluate(backend: Backend, *frames: Atoms) -> ForwardPass:
    return backend.forward(backend.collate(frames))


class OfOrb(BackendUnderTest):
    """What the variants share: all are made by `calculator_of`."""

    dtype = "float32"
    is_equivariant = False
    kind = "direct"
    arguments: dict[str, Any] = {}  # noqa: RUF012

    def make_calculator(self, dtype="float32"):
        return calculator_of(self.kind, dtype, **self.arguments)

    def last_layer(self, calculator):
        model = getattr(calculator.model, "xc_model", calculator.model)
        heads = [model.heads[name] for name in ("energy", "forces") if name in model.heads]
        return [head.mlp[-2].weight for head in heads]

    def forward_modules(self, backend):
        return [backend._model.model]


class Direct(OfOrb):
    conservative = False


class Conservative(OfOrb):
    kind = "conservative"


class InFloat64(OfOrb):
    dtype = "float64"


class WithChargeAndSpin(OfOrb):
    arguments = {"has_charge_spin_cond": True}  # noqa: RUF012

    def make_frames(self):
        return charged_frames()


class TestDirect(Direct, BackendContract):
    pass


class TestConservative(Conservative, BackendContract):
    pass


class InFloat64Contract(InFloat64, WithChargeAndSpin, BackendContract):
    # ORBCalculator builds its graphs in torch's default dtype: the bare one needs that to be float64.
    def test_mean_is_the_calculators_own(self, backend, frames):
        with default_dtype(torch.float64):
            super().test_mean_is_the_calculators_own(backend, frames)


class TestDirectFloat64WithChargeAndSpin(Direct, InFloat64Contract):
    pass


class TestConservativeFloat64WithChargeAndSpin(Conservative, InFloat64Contract):
    pass


# warp, on which the Coulomb sum of orb-models runs.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
class TestElectrostatics(Conservative, WithChargeAndSpin, BackendContract):
    """The make of orbmol-v2: an energy head that sums over atoms, conditioned on latent charges."""

    arguments = {"has_electrostatics": True}  # noqa: RUF012

    def test_gradients_of_forces(self, backend, spare, frames):
        super().test_gradients_of_forces(backend, spare, [atoms for atoms in frames if not atoms.pbc.any()])
        e = backend.forward(backend.collate(frames), gradients=True)
        with pytest.raises(InputError, match=r"electrostatics of periodic structures .* Use the energies, or"):
            e.gradients.of_forces(e.forces)


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
class TestElectrostaticsWithSpins(Conservative, WithChargeAndSpin, MeanLaws, LastLayerLaws):
    """Its gradients are those of `TestElectrostatics`."""

    arguments = {"has_electrostatics": True, "use_per_atom_spins": True}  # noqa: RUF012


class WithDispersion(OfOrb):
    """D3 of orb-models itself, a sum of two models in one calculator."""

    def make_calculator(self, dtype="float32"):
        calculator = calculator_of(self.kind, dtype)
        return ORBCalculator(D3SumModel(calculator.model, AlchemiDFTD3()), calculator.adapter, device="cpu")


class TestDirectWithDispersion(WithDispersion, Direct, BackendContract):
    pass


class TestConservativeWithDispersion(WithDispersion, Conservative, PassLaws):
    pass


def test_a_correction_may_be_added():
    orb = calculator_of()
    total = SumCalculator([LennardJones(epsilon=0.01), orb])
    backend = load_backend(total)
    e = evaluate(backend, water())
    np.testing.assert_allclose(e.forces, total.get_property("forces", water()), atol=1e-6)
    assert "confidence" in e.extras


def test_confidence_is_of_the_potential_and_its_weight_in_a_sum():
    orb = calculator_of()
    own, halved = (
        evaluate(load_backend(calculator), water()).confidence
        for calculator in (orb, LinearCombinationCalculator([orb, LennardJones()], [0.5, 1.0]))
    )
    assert own is not None
    assert halved is not None
    np.testing.assert_array_equal(halved.probabilities, own.probabilities)
    np.testing.assert_array_equal(halved.edges, 0.5 * own.edges)


@pytest.mark.parametrize("kind", ["direct", "conservative"])
def test_linear_molecules_and_atoms(kind: str):
    calculator = calculator_of(kind)
    backend = load_backend(calculator)
    for name in ("CO2", "H2", "H"):
        atoms = molecule(name)
        e = evaluate(backend, atoms)
        np.testing.assert_array_equal(e.forces, calculator.get_property("forces", atoms))
        if kind == "direct":
            np.testing.assert_allclose(np.cross(atoms.positions, e.forces).sum(0), 0, atol=1e-5)
    assert float(evaluate(backend, molecule("H")).forces.abs().max()) == 0


def test_confidence_is_kept():
    calculator = calculator_of()
    e = evaluate(load_backend(calculator), water())
    np.testing.assert_array_equal(e.extras["confidence"], calculator.get_property("confidence", water()))
    assert e.confidence is not None
    assert torch.equal(e.confidence.probabilities, e.extras["confidence"])


def test_bins_of_the_confidence_are_the_models():
    calculator = calculator_of()
    head: Any = calculator.model.heads["confidence"]
    confidence = evaluate(load_backend(calculator), water()).confidence
    assert confidence is not None
    np.testing.assert_allclose(confidence.edges, np.linspace(0, head.max_error, head.num_bins + 1), rtol=1e-6)
    head.bin_edges *= 2
    other = evaluate(load_backend(calculator), water()).confidence
    assert other is not None
    np.testing.assert_array_equal(other.edges, 2 * confidence.edges)


def test_vectors_are_not_of_orb():
    assert evaluate(load_backend(calculator_of()), water()).vectors is None


def test_charges_from_extxyz(tmp_path: Path):
    """ASE gives numbers back as numpy's, which ORBCalculator refuses."""
    backend = load_backend(calculator_of(has_charge_spin_cond=True))
    plain = water()
    plain.info.update(charge=1, spin=2)
    write(tmp_path / "frames.xyz", plain)
    read_back = read(tmp_path / "frames.xyz")
    assert isinstance(read_back, Atoms)
    assert isinstance(read_back.info["charge"], np.integer)
    found = evaluate(backend, read_back)
    np.testing.assert_allclose(found.energy, evaluate(backend, plain).energy, rtol=1e-6)
    other = plain.copy()
    other.info["charge"] = -1
    assert float((evaluate(backend, other).energy - found.energy).abs()) > 1e-6
    assert isinstance(read_back.info["charge"], np.integer)


@pytest.mark.parametrize("value", ["one", np.nan, [1, 2], None])
def test_charges_that_are_no_number(value: Any):
    backend = load_backend(calculator_of(has_charge_spin_cond=True))
    atoms = water()
    atoms.info.update(charge=value, spin=1)
    with pytest.raises(InputError, match=r"info\['charge'\] is .*; orb wants one finite number"):
        backend.collate([atoms])


def test_no_charges_where_none_are_read():
    """Charges of another origin in the frames are nothing to a model that does not read them."""
    backend = load_backend(calculator_of())
    frames = [water(), water()]
    frames[0].info["charge"] = 1
    e = evaluate(backend, *frames)
    np.testing.assert_allclose(e.energy[0], e.energy[1], rtol=1e-6)


def test_number_of_neighbours_is_honoured_and_part_of_the_identity():
    calculator = calculator_of(settings={"max_num_neighbors": 5})
    backend, other = load_backend(calculator), load_backend(calculator_of())
    atoms = standard_frames()[1]
    e = evaluate(backend, atoms)
    np.testing.assert_array_equal(e.forces, calculator.get_property("forces", atoms))
    assert len(e.edges.distance) <= 5 * len(atoms) < len(evaluate(other, atoms).edges.distance)
    with pytest.raises(PotentialMismatch, match="max_num_neighbors was 120, here it is 5"):
        backend.check_identity(other.identity)


@pytest.mark.filterwarnings("ignore:knn_brute_force is deprecated:DeprecationWarning")
def test_edge_method_is_honoured_and_changes_nothing(monkeypatch: pytest.MonkeyPatch):
    calculator = calculator_of(settings={"edge_method": "knn_brute_force"})
    backend, other = load_backend(calculator), load_backend(calculator_of())
    asked = []
    build = calculator.adapter.from_ase_atoms
    monkeypatch.setattr(
        calculator.adapter, "from_ase_atoms", lambda *a, **k: asked.append(k["edge_method"]) or build(*a, **k)
    )
    found = evaluate(backend, water())
    assert asked == ["knn_brute_force"]
    np.testing.assert_allclose(found.features, evaluate(other, water()).features, atol=1e-4)
    assert backend.check_identity(other.identity) is None


# dynamo looks at the gradients of what goes into a graph.
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf Tensor:UserWarning")
def test_a_compiled_backbone_stays_compiled():
    graphs = []

    def compiler(module: Any, inputs: Any) -> Any:
        graphs.append(len(inputs))
        return module.forward

    calculator = calculator_of("conservative")
    calculator.model.model.compile(backend=compiler, dynamic=True)
    try:
        atoms = standard_frames()[1]
        expected = calculator.get_property("forces", atoms)
        bare = len(graphs)
        assert bare > 0
        backend = load_backend(calculator)
        wrapped = len(graphs)
        e = evaluate(backend, atoms)
        np.testing.assert_allclose(e.forces, expected, atol=1e-6)
        assert len(graphs) == wrapped, "a structure already compiled for was compiled again"
        assert wrapped - bare <= 1, "only the number of atoms and edges is new in the probe structure"
        with pytest.raises(InputError, match=r"this orb model is compiled, .* Load it with compile=False"):
            backend.forward(backend.collate([atoms]), gradients=True)
        assert not any(weight.requires_grad for weight in calculator.model.parameters())
    finally:
        torch._dynamo.reset()


def test_heads_that_are_not_understood_are_refused():
    calculator = calculator_of()
    head: Any = calculator.model.heads["forces"]
    inner = head.predict
    head.predict = lambda nodes, graph: inner(nodes, graph) + 1.0
    with pytest.raises(PotentialMismatch, match=r"last layers of this orb model are not understood: .* eV or eV/Å"):
        load_backend(calculator)


@pytest.mark.parametrize("kind", ["direct", "conservative"])
def test_stored_potential_round_trip(kind: str, tmp_path: Path):
    model = make_orb(kind)
    path = tmp_path / "potential.safetensors"
    description = {
        "architecture": f"orb_v3_{kind}_architecture",
        "arguments": ORB_SIZES,
        "adapter": {"radius": 6.0, "max_num_neighbors": 120},
    }
    save_potential(model, path, description)
    before = process_state()
    stored = load_backend(f"orb:{path}", device="cpu")
    assert process_state() == before
    own = load_backend(calculator_of(kind))
    assert own.identity.fingerprint == stored.identity.fingerprint
    np.testing.assert_array_equal(evaluate(own, water()).forces, evaluate(stored, water()).forces)
    assert load_backend(f"orb:{path}", device="cpu", dtype="float64").dtype == torch.float64
    save_potential(model, path, description | {"architecture": "system"})
    with pytest.raises(ArtefactError, match="names the architecture 'system', which is not one of orb-v3's"):
        load_backend(f"orb:{path}")


@pytest.mark.parametrize("name", ["orb_v3_direct_20_omat", "orb-v3-conservative-inf-omat"])
def test_loaders_of_pretrained_models_take_a_checkpoint(name: str, tmp_path: Path):
    """Full-size models; the checkpoint is one of random weights."""
    build = {
        "direct": pretrained.orb_v3_direct_architecture,
        "conservative": pretrained.orb_v3_conservative_architecture,
    }
    checkpoint = tmp_path / "weights.ckpt"
    with torch.random.fork_rng():
        torch.save(build["direct" if "direct" in name else "conservative"](device="cpu").state_dict(), checkpoint)
    before = process_state()
    backend = load_backend(f"orb:{name}@{checkpoint}", device="cpu")
    assert process_state() == before
    atoms = water()
    atoms.set_cell([4.0] * 3)
    atoms.pbc = True
    e = evaluate(backend, atoms)
    assert e.features.shape == (3, 256)
    np.testing.assert_array_equal(e.forces, backend.calculator.get_property("forces", atoms))
    assert backend.identity.settings["max_num_neighbors"] == (20 if "20" in name else 120)


def test_stored_potential_of_another_package(tmp_path: Path):
    save_mace(make_mace(), tmp_path / "mace.safetensors")
    with pytest.raises(ArtefactError, match="an ase_uq MACE potential; an ase_uq orb potential was expected"):
        load_backend(f"orb:{tmp_path / 'mace.safetensors'}")


def test_unknown_loader():
    with pytest.raises(ValueError, match=r"no loader 'orb_v3_direkt_20_omat'\. Did you mean orb_v3_direct_20_omat"):
        load_backend("orb:orb-v3-direkt-20-omat")


def test_missing_checkpoint_and_missing_file():
    with pytest.raises(FileNotFoundError, match=r"there is no orb checkpoint my\.ckpt"):
        load_backend("orb:orb_v3_direct_20_omat@my.ckpt")
    with pytest.raises(ArtefactError, match=r"there is no file my\.safetensors"):
        load_backend("orb:my.safetensors")
