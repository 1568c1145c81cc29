"""Every variant of the MACE architecture keeps the contract, and trained models give the calculator's own bits."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.io import read

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.mace.backend import MACECalculator
from ase_uq.backends.mace.loading import load_potential, save_potential
from ase_uq.backends.specs import calculator_from_spec
from ase_uq.errors import ArtefactError, InputError, PotentialMismatch
from ase_uq.forward_pass import ForwardPass
from ase_uq.io.tensor_file import read_tensor_file, write_tensor_file
from ase_uq.testing.backends import BackendContract, PassLaws, process_state, standard_frames
from ase_uq.testing.backends.under_test import BackendUnderTest

from .builders import charged_frames, make_mace, make_mh1_like, make_omol_like, quiet, water


def calculator_of(
    build: Callable[..., torch.nn.Module] = make_mace, dtype: str = "float64", head: str = "", **arguments: Any
) -> MACECalculator:
    """A calculator with a model of its own; equal arguments give equal weights."""
    model = build(**arguments)
    return MACECalculator(models=model, device="cpu", default_dtype=dtype, **({"head": head} if head else {}))


class OfMACE(BackendUnderTest):
    """What the variants share: all are made by `calculator_of` with `arguments`."""

    arguments: dict[str, Any] = {}  # noqa: RUF012

    def make_calculator(self, dtype="float64"):
        return calculator_of(dtype=dtype, **self.arguments)

    def last_layer(self, calculator):
        return [next((r.linear_2 if hasattr(r, "linear_1") else r.linear).parameters()) for r in readouts(calculator)]


class MACEContract(OfMACE, BackendContract):
    pass


class MACEVariant(OfMACE, PassLaws):
    """Another architecture in the same calculator."""


def readouts(calculator: MACECalculator) -> list[Any]:
    model: Any = calculator.models[0]
    return list(model.readouts)


class TestMACE(MACEContract):
    pass


class TestMACEFloat32(MACEContract):
    dtype = "float32"


class TestRepulsionAndLastReadoutOnly(MACEVariant):
    arguments = {"repulsion": True, "use_last_readout_only": True}  # noqa: RUF012


class TestOneLayerOfScalars(MACEVariant):
    arguments = {"layers": 1, "order": 0}  # noqa: RUF012

    def test_there_are_no_vectors(self, backend, frames):
        assert evaluate(backend, *frames).vectors is None


class TestThreeLayersOfOrderTwo(MACEVariant):
    arguments = {"layers": 3, "order": 2, "correlation": 1}  # noqa: RUF012


class TestSecondOfThreeHeads(MACEContract):
    arguments = {"heads": ("one", "two", "three"), "head": "two"}  # noqa: RUF012


class TestMH1Like(MACEVariant):
    arguments = {"build": make_mh1_like, "head": "omol"}  # noqa: RUF012


class TestOMolLike(MACEVariant):
    arguments = {"build": make_omol_like}  # noqa: RUF012

    def make_frames(self):
        return charged_frames()


class TestCommittee(MACEContract):
    n_forwards = 2

    def make_calculator(self, dtype="float64"):
        models = [make_mace(correlation=1, seed=seed) for seed in range(2)]
        return MACECalculator(models=models, device="cpu", default_dtype=dtype)

    def test_members_are_the_models(self, backend, frames):
        members = evaluate(backend, *frames).members
        for index in range(2):
            single = evaluate(load_backend(calculator_of(correlation=1, seed=index)), *frames)
            assert single.members is None
            for name in ("energy", "forces", "stress"):
                assert torch.equal(getattr(members, name)[index], getattr(single, name)), name

    # The energy is the committee's, the last layer the first member's.
    test_last_layers_are_linear_in_the_trained_weights = None
    test_identity_depends_on_the_last_layer = None


def evaluate(backend: Backend, *frames: Atoms) -> ForwardPass:
    return backend.forward(backend.collate(frames))


def test_a_stress_is_that_of_the_cell_in_crystals_alone():
    """Elsewhere it is the virial over the volume of a cell of MACE's own; the calculator gives it as well."""
    calculator = calculator_of()
    backend = load_backend(calculator)
    crystal = standard_frames()[1]
    slab, molecule = crystal.copy(), crystal.copy()
    slab.pbc, molecule.pbc = (True, True, False), False
    forward_pass = evaluate(backend, crystal, slab, molecule)
    assert forward_pass.volumes is not None
    assert forward_pass.volumes.tolist() == [pytest.approx(crystal.get_volume()), 0, 0]
    step, energies = 1e-4, []
    for sign in (1, -1):
        moved = slab.copy()
        moved.set_cell(slab.cell.array * [1 + sign * step, 1, 1], scale_atoms=True)
        energies.append(float(evaluate(backend, moved).energy[0]))
    virial = (energies[0] - energies[1]) / (2 * step)
    for atoms in (crystal, slab, molecule):
        bare = atoms.copy()
        bare.calc = calculator
        stress = evaluate(backend, atoms).stress
        assert stress is not None
        np.testing.assert_array_equal(stress[0], bare.get_stress())
        if atoms is slab:
            assert abs(float(stress[0, 0])) < 0.5 * abs(virial) / slab.get_volume()


class TestTrained:
    """A trained model, scripted as MACE saves it."""

    @pytest.fixture(scope="class")
    @classmethod
    def calculator(cls, trained_models: Path) -> MACECalculator:
        calculator = calculator_from_spec(f"mace:{trained_models / 'mace_acac.model'}", device="cpu")
        assert isinstance(calculator, MACECalculator)
        return calculator

    @pytest.fixture(scope="class")
    @classmethod
    def frames(cls, shared_data: Path) -> list[Atoms]:
        return read(shared_data / "acac" / "test_id_300K.xyz", ":3")  # pyright: ignore[reportReturnType]

    def test_bits_are_the_calculators(self, calculator: MACECalculator, frames: list[Atoms]):
        backend = load_backend(calculator)
        for atoms in frames:
            e = evaluate(backend, atoms)
            bare = atoms.copy()
            bare.calc = calculator
            assert float(e.energy[0]) == bare.get_potential_energy()
            np.testing.assert_array_equal(e.forces, bare.get_forces())
            np.testing.assert_array_equal(e.stress[0], bare.get_stress())
            np.testing.assert_array_equal(e.energies, bare.get_potential_energies())

    def test_features_explain_the_energies_of_atoms(self, calculator: MACECalculator, frames: list[Atoms]):
        """Across frames e_i - w·φ_i is one constant an element: E0 and the shift."""
        e = evaluate(load_backend(calculator), *frames)
        rest = e.energies - e.energy_layer.features @ e.energy_layer.weights
        for number in e.numbers.unique():
            assert float(rest[e.numbers == number].std()) < 1e-9

    def test_stored_potential_is_the_same_potential(
        self, calculator: MACECalculator, frames: list[Atoms], tmp_path: Path
    ):
        path = tmp_path / "acac.safetensors"
        save_potential(calculator.models[0], path)
        stored = load_backend(f"mace:{path}", device="cpu", dtype="float64")
        own = load_backend(calculator)
        assert own.check_identity(stored.identity) is None
        # Weights are stored in float32.
        np.testing.assert_allclose(evaluate(stored, *frames).forces, evaluate(own, *frames).forces, atol=1e-5)

    def test_committee_of_a_pattern_is_sorted(self, trained_models: Path, frames: list[Atoms]):
        backend = load_backend(f"mace:{trained_models / 'mace_acac_committee_[23].model'}", device="cpu")
        assert backend.identity.settings["members"] == 2
        bare = frames[0].copy()
        bare.calc = backend.calculator
        assert float(evaluate(backend, frames[0]).energy[0]) == bare.get_potential_energy()
        first = load_backend(f"mace:{trained_models / 'mace_acac_committee_2.model'}", device="cpu")
        features = evaluate(backend, frames[0]).features
        np.testing.assert_array_equal(features, evaluate(first, frames[0]).features)

    def test_loading_leaves_the_process_alone(self, trained_models: Path):
        before = process_state()
        load_backend(f"mace:{trained_models / 'mace_si.model'}", device="cpu")
        assert process_state() == before

    @pytest.mark.parametrize("prefix", ["mace-mp", "mace-off", "mace-omol"])
    def test_loaders_of_pretrained_models_take_a_file(self, prefix: str, trained_models: Path, capsys, tmp_path: Path):
        model = trained_models / "mace_acac.model"
        if prefix == "mace-omol":  # its loader asks for the head of that name
            model = tmp_path / "omol.model"
            with quiet():
                torch.save(make_mace(heads=("omol",)), model)
        before = process_state()
        backend = load_backend(f"{prefix}:{model}", device="cpu", dtype="float32")
        assert process_state() == before
        assert backend.dtype == torch.float32
        assert float(evaluate(backend, water()).energy) < 0
        assert capsys.readouterr().out == ""


@pytest.mark.parametrize(("prefix", "close"), [("mace-mp", "medium"), ("mace-off", "medium"), ("mace-omol", "extra_")])
def test_unknown_name_of_a_pretrained_model(prefix: str, close: str):
    with pytest.raises(ValueError, match=rf"{prefix} has no model .*Did you mean .*{close}"):
        load_backend(f"{prefix}:{close}m")


def test_missing_file():
    with pytest.raises(FileNotFoundError, match=r"there is no MACE model file my\.model"):
        load_backend("mace:my.model")


@pytest.mark.parametrize("head", ["two", "three", 3])
@pytest.mark.parametrize("heads", [("one", "two"), ("Default",)])
def test_notes_under_head_do_not_change_what_is_predicted(heads: tuple[str, ...], head: object):
    calculator = calculator_of(heads=heads, head=heads[0], order=0, correlation=1)
    noted = water()
    noted.info["head"] = head
    backend = load_backend(calculator)
    expected = calculator.get_property("forces", noted.copy())
    for frames in ([noted], [noted, water()]):
        found = evaluate(backend, *frames).forces
        assert found is not None
        np.testing.assert_allclose(found[: len(noted)], expected, atol=1e-12)


@pytest.fixture(scope="module")
def two_heads(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("heads") / "two.model"
    with quiet():
        torch.save(make_mace(heads=("one", "two"), order=0, correlation=1), path)
    return path


class TestHeadsInASpec:
    @pytest.mark.parametrize("prefix", ["mace", "mace-mp", "mace-off"])
    @pytest.mark.parametrize("head", ["one", "two"])
    def test_the_named_head_predicts(self, two_heads: Path, prefix: str, head: str):
        backend = load_backend(f"{prefix}:{two_heads}?head={head}", device="cpu", dtype="float64")
        assert (backend.heads, backend.head) == (("one", "two"), head)
        found, expected = (
            evaluate(b, water())
            for b in (
                backend,
                load_backend(calculator_of(heads=("one", "two"), head=head, order=0, correlation=1)),
            )
        )
        np.testing.assert_allclose(found.energy, expected.energy, atol=1e-9)

    def test_a_path_alone_is_that_of_a_mace(self, two_heads: Path):
        for path in (f"{two_heads}?head=two", Path(f"{two_heads}?head=two")):
            assert load_backend(path, device="cpu").head == "two"

    def test_a_pattern_may_have_a_question_mark_too(self, two_heads: Path):
        assert load_backend(f"mace:{two_heads.with_name('t?o.model')}?head=two", device="cpu").head == "two"

    @pytest.mark.parametrize("prefix", ["mace", "mace-mp"])
    def test_a_head_that_is_not_there(self, two_heads: Path, prefix: str):
        with pytest.raises(ValueError, match=r"the model has no head 'tow'\. Did you mean two\? It has one, two\."):
            load_backend(f"{prefix}:{two_heads}?head=tow", device="cpu")

    def test_several_heads_and_none_named(self, two_heads: Path):
        with pytest.raises(ValueError, match=r"several heads, and the SPEC names none: add \?head=NAME .*one.*two"):
            load_backend(f"mace:{two_heads}", device="cpu")

    def test_the_one_head_of_the_embedded_potential(self):
        assert load_backend("embedded:mace?head=Default", device="cpu").head == "Default"


def test_heads_are_different_potentials():
    backends = [load_backend(calculator_of(heads=("one", "two"), head=head)) for head in ("one", "two")]
    with pytest.raises(PotentialMismatch, match="head was 'two', here it is 'one'"):
        backends[0].check_identity(backends[1].identity)
    phis = [evaluate(backend, water()).energy_layer.features for backend in backends]
    assert not torch.allclose(phis[0], phis[1])


@pytest.mark.parametrize("head", ["one", "two", "three"])
@pytest.mark.parametrize("readout", ["NonLinearReadoutBlock", "NonLinearBiasReadoutBlock"])
def test_every_head_has_its_own_last_layer(head: str, readout: str):
    calculator = calculator_of(heads=("one", "two", "three"), head=head, readout=readout, order=0, correlation=1)
    e = evaluate(load_backend(calculator), water())
    np.testing.assert_array_equal(e.energies, calculator.get_property("energies", water()))
    rest = e.energies - e.energy_layer.features @ e.energy_layer.weights
    assert float(rest[1]) == pytest.approx(float(rest[2]), abs=1e-12), "what is left is one constant an element"


def test_padding_of_the_user_is_cut_off():
    calculator, plain = calculator_of(), load_backend(calculator_of())
    calculator.pad_num_atoms, calculator.pad_num_edges, calculator._padding_initialized = 20, 400, True
    backend = load_backend(calculator)
    found, expected = evaluate(backend, water()), evaluate(plain, water())
    for name in ("energy", "forces", "stress", "energies", "features", "numbers", "positions", "frame_of_atom"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=1e-12, err_msg=name)
    np.testing.assert_allclose(found.edges.distance, expected.edges.distance, atol=1e-12)
    pair = [b.forward(b.collate([water()]), gradients=True).gradients for b in (backend, plain)]
    rows = [[*g.of_energies(), *g.of_forces(found.positions), g.of_features(found.features)] for g in pair if g]
    assert len(rows[0]) == 3
    for own, other in zip(*rows, strict=True):
        np.testing.assert_allclose(own, other, atol=1e-10)
    assert calculator.pad_num_atoms == 20


def test_settings_outside_the_weights_are_part_of_the_identity():
    own, other = calculator_of(), calculator_of()
    other.models[0].interactions[0].avg_num_neighbors = 12.0
    with pytest.raises(PotentialMismatch, match="avg_num_neighbors was"):
        load_backend(own).check_identity(load_backend(other).identity)


def test_missing_charge_and_spin():
    backend = load_backend(calculator_of(make_omol_like))
    with pytest.raises(InputError, match=r"has no charge and spin in atoms\.info"):
        backend.collate([water()])
    atoms = water()
    atoms.info.update(charge=np.int64(1), spin=np.int64(2))
    charged = evaluate(backend, atoms)
    atoms.info.update(charge=0, spin=1)
    assert float((charged.energy - evaluate(backend, atoms).energy).abs()) > 1e-6


def test_other_units_scale_energies_and_forces():
    calculator, plain = calculator_of(), load_backend(calculator_of())
    calculator.energy_units_to_eV, calculator.length_units_to_A = 0.0434, 0.529
    backend = load_backend(calculator)
    atoms = standard_frames()[1]
    found, expected = evaluate(backend, atoms), evaluate(plain, atoms)
    assert float(found.energy) == calculator.get_property("energy", atoms)
    np.testing.assert_array_equal(found.forces, calculator.get_property("forces", atoms))
    np.testing.assert_allclose(found.stress[0], calculator.get_property("stress", atoms), rtol=1e-12)
    np.testing.assert_allclose(found.energy_layer.features, 0.0434 * expected.energy_layer.features, rtol=1e-12)
    np.testing.assert_allclose(found.edges.distance, 0.529 * expected.edges.distance, rtol=1e-12)
    layer = found.energy_layer
    np.testing.assert_allclose((layer.features @ layer.weights).sum() + layer.base, found.energy, rtol=1e-12)
    with pytest.raises(PotentialMismatch, match="units was"):
        plain.check_identity(backend.identity)


def test_gradients_are_in_other_units_too():
    calculator, plain = calculator_of(), load_backend(calculator_of())
    calculator.energy_units_to_eV, calculator.length_units_to_A = 0.0434, 0.529
    backend = load_backend(calculator)
    atoms = standard_frames()[1]
    found, expected = (b.forward(b.collate([atoms]), gradients=True) for b in (backend, plain))
    assert found.gradients is not None
    assert expected.gradients is not None
    ones = torch.ones_like(found.features)
    np.testing.assert_allclose(
        found.gradients.of_features(ones), expected.gradients.of_features(ones) / 0.529, rtol=1e-9, atol=1e-12
    )
    for factor, pair in (
        (0.0434, [g.of_energies() for g in (found.gradients, expected.gradients)]),
        (0.0434 / 0.529, [g.of_forces(found.positions) for g in (found.gradients, expected.gradients)]),
    ):
        rows = [next(row) for row in pair]
        np.testing.assert_allclose(rows[0], factor * rows[1], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("irreps", "columns"), [("4x0e + 2x1o", slice(4, 10)), ("4x0e + 2x1e + 3x1o", slice(10, 19)), ("4x0e + 2x1e", None)]
)
def test_pseudo_vectors_are_no_vectors(irreps: str, columns: slice | None):
    from e3nn import o3

    from ase_uq.backends.mace.readout import vector_columns

    assert vector_columns(o3.Irreps(irreps)) == columns


def test_gradients_of_a_trained_scripted_model(trained_models: Path, shared_data: Path):
    """Scripted parts, as MACE saves them, are differentiated twice."""
    backend = load_backend(f"mace:{trained_models / 'mace_acac.model'}", device="cpu")
    atoms = read(shared_data / "acac" / "test_id_300K.xyz")
    assert isinstance(atoms, Atoms)
    e = backend.forward(backend.collate([atoms]), gradients=True)
    assert e.gradients is not None
    tangents = torch.as_tensor(np.random.default_rng(0).normal(size=(len(atoms), 3)))
    (found,) = e.gradients.of_forces(tangents)
    # The sum of tangents · F is minus the derivative of the energy along the tangents, at any parameters.
    rows = []
    for step in (1e-4, -1e-4):
        moved = atoms.copy()
        moved.positions += step * tangents.numpy()
        gradients = backend.forward(backend.collate([moved]), gradients=True).gradients
        assert gradients is not None
        rows += list(gradients.of_energies())
    expected = -(rows[0] - rows[1]) / 2e-4
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def test_models_without_an_energy_readout_are_refused():
    calculator = calculator_of()
    calculator.model_type = "DipoleMACE"
    with pytest.raises(TypeError, match="'DipoleMACE' are not supported"):
        load_backend(calculator)


def test_a_readout_that_is_not_understood_is_refused():
    calculator = calculator_of()
    block: Any = calculator.models[0].readouts[-1]
    block.non_linearity = torch.nn.Tanh()
    inner = block.forward
    block.forward = lambda x, heads=None: inner(x, heads) + 0.1 * x[:, :1] ** 2
    with pytest.raises(PotentialMismatch, match=r"last layer of this MACE model is not understood: .* eV"):
        load_backend(calculator)


def test_stored_potential_round_trip(tmp_path: Path):
    model = make_mace(repulsion=True)
    path = tmp_path / "potential.safetensors"
    save_potential(model, path)
    before = process_state()
    loaded = load_potential(path)
    assert process_state() == before
    own = load_backend(MACECalculator(models=model, device="cpu", default_dtype="float32"))
    stored = load_backend(MACECalculator(models=loaded, device="cpu", default_dtype="float32"))
    assert own.identity.fingerprint == stored.identity.fingerprint
    np.testing.assert_allclose(evaluate(own, water()).forces, evaluate(stored, water()).forces, atol=1e-6)


def test_stored_potential_of_another_architecture(tmp_path: Path):
    path = tmp_path / "potential.safetensors"
    save_potential(make_mace(), path)
    header, tensors = read_tensor_file(path, "MACE potential", 1)
    tensors.pop(next(iter(tensors)))
    write_tensor_file(path, "MACE potential", 1, header, tensors)
    with pytest.raises(ArtefactError, match="does not hold the weights of the architecture in its hea"):
        load_potential(path)


def test_only_what_can_be_rebuilt_is_stored(tmp_path: Path):
    with pytest.raises(TypeError, match="only ScaleShiftMACE models can be stored"):
        save_potential(torch.nn.Linear(1, 1), tmp_path / "x.safetensors")


class TestCompiled:
    """`torch.compile` as MACECalculator does it, with a backend that compiles nothing.

    One calculator for all: to trace the model takes seconds, each time.
    """

    arguments = {"order": 0, "correlation": 1}  # noqa: RUF012

    @pytest.fixture(scope="class")
    @classmethod
    def graphs(cls) -> list[int]:
        return []

    @pytest.fixture(scope="class")
    @classmethod
    def calculator(cls, graphs: list[int]) -> Iterator[MACECalculator]:
        from mace.tools.compile import configure_autograd_for_compile, prepare
        from mace.tools.scripts_utils import extract_model

        def backend(module: Any, inputs: Any) -> Any:
            graphs.append(len(inputs))
            return module.forward

        with quiet(), torch._dynamo.config.patch():  # pyright: ignore[reportAttributeAccessIssue]
            configure_autograd_for_compile(allow_autograd=True)
            # MACE builds the copy in torch's default dtype.
            torch.set_default_dtype(torch.float64)
            try:
                model = prepare(extract_model)(model=make_mace(**cls.arguments), map_location="cpu")
            finally:
                torch.set_default_dtype(torch.float32)
            calculator = MACECalculator(models=model, device="cpu", default_dtype="float64")
            calculator.models = [torch.compile(model, backend=backend, fullgraph=True)]
            calculator.use_compile = True
            yield calculator
        torch._dynamo.reset()

    def test_same_numbers_without_padding_rows(self, calculator: MACECalculator, graphs: list[int]):
        backend, eager = load_backend(calculator), load_backend(calculator_of(**self.arguments))
        assert graphs == [], "wrapping compiled the probe structure"
        assert not calculator._padding_initialized
        assert backend.identity.fingerprint == eager.identity.fingerprint
        atoms = standard_frames()[1]
        for shift in (0.0, 0.01):
            atoms.positions[0, 0] += shift
            found, expected = evaluate(backend, atoms), evaluate(eager, atoms)
            np.testing.assert_allclose(found.energy, expected.energy, atol=1e-9)
            np.testing.assert_allclose(found.forces, expected.forces, atol=1e-9)
            np.testing.assert_allclose(found.stress, expected.stress, atol=1e-9)
            np.testing.assert_allclose(found.energies, expected.energies, atol=1e-9)
            np.testing.assert_allclose(found.features, expected.features, atol=1e-9)
            np.testing.assert_allclose(found.energy_layer.features, expected.energy_layer.features, atol=1e-9)
            assert len(found.edges.distance) == len(expected.edges.distance)
        assert len(graphs) == 1, "a second step of the same structure compiled again"
        assert calculator.pad_num_edges > len(found.edges.distance)
        np.testing.assert_array_equal(found.forces, calculator.get_property("forces", atoms))

    def test_gradients_are_refused(self, calculator: MACECalculator, graphs: list[int]):
        backend, before, atoms = load_backend(calculator), len(graphs), standard_frames()[1]
        with pytest.raises(InputError, match=r"this MACE model is compiled, .* without compile_mode"):
            backend.forward(backend.collate([atoms]), gradients=True)
        assert len(graphs) == before
        assert backend.forward(backend.collate([atoms])).gradients is None

    def test_batches(self, calculator: MACECalculator):
        torch._dynamo.reset()  # or sizes become symbols, with which it takes longer
        backend, eager = load_backend(calculator), load_backend(calculator_of(**self.arguments))
        frames = standard_frames()[:3]
        found, expected = evaluate(backend, *frames), evaluate(eager, *frames)
        np.testing.assert_allclose(found.forces, expected.forces, atol=1e-9)
        np.testing.assert_allclose(found.features, expected.features, atol=1e-9)


def test_an_architecture_of_the_size_of_mace_mp_medium():
    """128 channels of order 0 and 1."""
    backend = load_backend(
        calculator_of(channels=128, elements=(1, 6, 8, 14), r_max=6.0, correlation=3, dtype="float32")
    )
    e = evaluate(backend, *standard_frames())
    assert e.energy_layer.features.shape[1] == 128 + 8
    assert e.features.shape[1] == 128 + 128 + 128
    assert bool(torch.isfinite(e.forces).all())
