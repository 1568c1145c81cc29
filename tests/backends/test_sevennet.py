"""SevenNet-0, as the wheel of sevenn carries it, and small variants of its architecture keep the contract."""

import contextlib
import copy
import functools
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import add_adsorbate, fcc111, molecule
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import SumCalculator

pytest.importorskip("sevenn", reason='sevenn is not installed; pip install "ase-uq[sevennet]" brings it')

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.sevennet import SevenNetCalculator, load
from ase_uq.errors import PotentialMismatch
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends import BackendContract, PassLaws, gradients, process_state, standard_frames
from ase_uq.testing.backends.last_layers import LastLayerLaws
from ase_uq.testing.backends.means import MeanLaws
from ase_uq.testing.backends.under_test import BackendUnderTest

from .builders import built, compiled, default_dtype, quiet, twin, water

# isort: split
from sevenn import _const, model_build, util  # after ase_uq.backends.sevennet, with which torch lets e3nn read its file
from sevenn import _keys as key
from sevenn.nn.force_output import ForceOutput


def make_sevennet(**settings: Any) -> torch.nn.Module:
    """A model of sevenn with two interactions and random weights, in float32; equal settings give equal weights."""
    return built(sevennet, **settings)


def sevennet(
    seed: int = 0, elements: tuple[str, ...] = ("H", "C", "O", "Cu"), is_compiled: bool = False, **settings: Any
) -> torch.nn.Module:
    config = _const.DEFAULT_E3_EQUIVARIANT_MODEL_CONFIG | util.chemical_species_preprocess(list(elements))
    config |= {
        key.CUTOFF: 4.0,
        key.NUM_CONVOLUTION: 2,
        key.NODE_FEATURE_MULTIPLICITY: 8,
        key.CONVOLUTION_WEIGHT_NN_HIDDEN_NEURONS: [8],
        key.CONV_DENOMINATOR: 5.0,
        key.SHIFT: [-1.0, -2.0, -3.0, -4.0][: len(elements)],
        key.SCALE: [0.5, 0.7, 0.9, 1.1][: len(elements)],
    } | settings
    with quiet(), torch.random.fork_rng(), compiled() if is_compiled else contextlib.nullcontext():
        torch.manual_seed(seed)
        model = model_build.build_E3_equivariant_model(config)
        assert isinstance(model, torch.nn.Module)
        for name, weight in model.named_parameters():
            if name.endswith("linear.bias"):  # 0 in a new model
                torch.nn.init.normal_(weight)
    return model


def calculator_of(**settings: Any) -> SevenNetCalculator:
    """A calculator with a model of its own; equal arguments give equal weights."""
    return SevenNetCalculator(make_sevennet(**settings), device="cpu")  # pyright: ignore[reportArgumentType]


def evaluate(backend: Backend, *frames: Atoms) -> ForwardPass:
    return backend.forward(backend.collate(frames))


class OfSevenNet(BackendUnderTest):
    dtype = "float32"
    dtypes = ("float32",)  # sevenn builds graphs and one-hot codes of no other precision

    def last_layer(self, calculator):
        model = calculator.model
        return [model.reduce_input_to_hidden.linear.weight, model.reduce_hidden_to_energy.linear.weight]

    def forward_modules(self, backend):
        return [backend.calculator.model.edge_embedding]  # layers are called one by one, not the model


class SmallSevenNet(OfSevenNet, PassLaws):
    """What the variants share: all are made by `calculator_of` with `settings`."""

    settings: dict[str, Any] = {}  # noqa: RUF012

    def make_calculator(self, dtype="float32"):
        return calculator_of(**self.settings)

    def test_gradients_of_features(self, backend, frames, monkeypatch):
        # Some norms are so close to 0 that they are curved within the step of the law.
        monkeypatch.setattr(gradients, "DIFFERENCES", {torch.float32: (3e-4, 3e-2)})
        super().test_gradients_of_features(backend, frames)


class SevenNetContract(SmallSevenNet, BackendContract):
    pass


@functools.cache
def sevennet_0() -> SevenNetCalculator:
    """The foundation model in the wheel, compiled as e3nn does it unless it is told otherwise."""
    with compiled():
        calculator = load("sevennet", "7net-0", "cpu", "float32")
    assert isinstance(calculator, SevenNetCalculator)
    return calculator


class TestSevenNet0(OfSevenNet, MeanLaws, LastLayerLaws):
    """Trained weights; the other laws are of the architecture, which is that of `TestNoParity`."""

    def make_calculator(self, dtype="float32"):
        calculator = copy.copy(sevennet_0())
        calculator.model = twin(calculator.model)
        return calculator

    def make_frames(self):
        methanol, water, _, oxygen, hydrogen = standard_frames()
        return [methanol, water[:3], oxygen, hydrogen]


class TestSmall(SevenNetContract):
    settings = {key.LMAX: 2}  # noqa: RUF012


class TestSlabs(SmallSevenNet):
    """Structures that are periodic in two directions, with and without a third cell vector."""

    def make_frames(self):
        slab = fcc111("Cu", (2, 2, 2), vacuum=4.0)
        add_adsorbate(slab, molecule("CO"), 2.0)
        slab.rattle(0.05, seed=3)
        flat = slab.copy()
        flat.cell[2] = 0
        return [*standard_frames(), slab, flat]


class TestNoParity(SevenNetContract):
    """The architecture of SevenNet-0: vectors are taken for pseudo-vectors, but are none in the first layer.

    And compiled, as it is.
    """

    settings = {  # noqa: RUF012
        "is_compiled": True,
        key.LMAX: 2,
        key.IS_PARITY: False,
        key.SELF_CONNECTION_TYPE: "linear",
        key.CUTOFF_FUNCTION: {key.CUTOFF_FUNCTION_NAME: "XPLOR", "cutoff_on": 3.5},
    }


class TestBiases(SmallSevenNet):
    """And one shift and scale for all elements."""

    settings = {key.USE_BIAS_IN_LINEAR: True, key.SHIFT: -1.5, key.SCALE: 0.8}  # noqa: RUF012

    def last_layer(self, calculator):
        return super().last_layer(calculator)[:1]  # the second one also multiplies the bias of the first


class TestOneInteraction(SmallSevenNet):
    settings = {key.NUM_CONVOLUTION: 1}  # noqa: RUF012

    def test_there_are_no_vectors(self, backend, frames):
        assert evaluate(backend, *frames).vectors is None


@pytest.mark.parametrize("name", ["SevenNet-0_22May2024", "7net-l3i5"])
def test_the_other_models_that_sevenn_carries(name: str):
    before = process_state()
    with default_dtype(torch.float64):  # the dtype that new weights have
        backend = load_backend(f"sevennet:{name}", device="cpu")
    assert process_state() == before
    assert backend.dtype == torch.float32
    found = evaluate(backend, water())
    np.testing.assert_array_equal(found.forces, backend.calculator.get_property("forces", water()))
    own = load_backend(sevennet_0())
    with pytest.raises(PotentialMismatch, match=r"fitted on (another potential|other weights)"):
        own.check_identity(backend.identity)


def test_a_checkpoint_is_loaded_by_its_path(tmp_path: Path):
    path = shutil.copy(util.pretrained_name_to_path("7net-0"), tmp_path / "mine.pth")
    backend = load_backend(f"sevennet:{path}", device="cpu", dtype="float32")
    assert backend.identity.fingerprint == load_backend(sevennet_0()).identity.fingerprint


@pytest.mark.parametrize("target", ["7net-O", "mine.pth", ""])
def test_models_that_sevenn_does_not_carry(target: str):
    with pytest.raises(
        ValueError, match=rf"sevenn carries no model '{target}', and there is no checkpoint .* It carries 7net-0, "
    ):
        load_backend(f"sevennet:{target}")


def test_a_misspelt_name_is_recognised():
    with pytest.raises(ValueError, match="Did you mean 7net-l3i5"):
        load_backend("sevennet:7net-l3i6")


def test_there_is_no_float64():
    with pytest.raises(ValueError, match=r"SevenNet potentials run in float32 only.* Leave dtype out"):
        load_backend("sevennet:7net-0", dtype="float64")


def test_models_that_are_no_checkpoints_are_refused():
    calculator = calculator_of()
    with quiet():
        calculator.model = torch.jit.trace(torch.nn.Linear(1, 1), torch.zeros(1))  # pyright: ignore
    with pytest.raises(TypeError, match=r"TorchScript SevenNet models are not supported\. Use the checkpoint"):
        load_backend(calculator)


def test_readouts_that_are_not_linear_are_refused():
    readout = {
        key.READOUT_AS_FCN: True, key.READOUT_FCN_ACTIVATION: "silu", key.READOUT_FCN_HIDDEN_NEURONS: [4]
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"with a readout_as_fcn are not supported: their energy is not linear"):
        load_backend(calculator_of(**readout))


def test_forces_of_another_origin_are_refused():
    calculator = calculator_of()
    calculator.model.replace_module("force_output", ForceOutput())
    with pytest.raises(TypeError, match=r"SevenNet models with a ForceOutput are not supported: their forces"):
        load_backend(calculator)


def test_a_last_layer_that_is_not_understood_is_refused():
    calculator = calculator_of()
    rescale: Any = calculator.model.rescale_atomic_energy
    inner = rescale.forward

    def shifted(data: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        data = inner(data)
        data[key.ATOMIC_ENERGY] = data[key.ATOMIC_ENERGY] + 0.1
        return data

    rescale.forward = shifted
    with pytest.raises(PotentialMismatch, match=r"last layer of this SevenNet model is not understood: .* by 1\.0e-01"):
        load_backend(calculator)


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({key.CUTOFF: 3.9}, "cutoff was 4.0, here it is 3.9"),
        ({key._NORMALIZE_SPH: False}, "edges was .*, normalized: True', here it is .*, normalized: False'"),
        ({key.CUTOFF_FUNCTION: {key.CUTOFF_FUNCTION_NAME: "poly_cut", "poly_cut_p_value": 5}}, "envelope was .* 6"),
        ({"elements": ("H", "O", "C", "Ag")}, "fitted for H, C, O, Cu, this potential is for H, C, O, Ag"),
    ],
)
def test_what_is_not_in_the_weights_is_part_of_the_identity(settings: dict[str, Any], match: str):
    with pytest.raises(PotentialMismatch, match=match):
        load_backend(calculator_of(**settings)).check_identity(load_backend(calculator_of()).identity)


def test_vectors_of_two_atoms_point_along_their_bond():
    """Components are x, y, z, whatever the order of the library that made them."""
    bond = np.array([0.3, 0.5, 0.9])
    atoms = Atoms("CO", [np.zeros(3), 1.1 * bond / np.linalg.norm(bond)])
    for settings in ({}, {key.IS_PARITY: False}):
        vectors = evaluate(load_backend(calculator_of(**settings)), atoms).vectors
        assert vectors is not None
        assert float(vectors.abs().max()) > 1e-3
        np.testing.assert_allclose(np.cross(vectors.mT, bond), 0, atol=1e-6)


def test_a_correction_may_be_added():
    calculator, correction = calculator_of(), LennardJones(epsilon=0.01)
    e = evaluate(load_backend(SumCalculator([calculator, correction])), water())
    expected = calculator.get_property("forces", water()) + correction.get_property("forces", water())
    np.testing.assert_allclose(e.forces, expected, atol=1e-4)


def test_threads_may_share_a_potential():
    """One structure and several take different ways through the same modules."""
    calculator = calculator_of()
    backend = load_backend(calculator)
    frames = standard_frames()
    expected = [evaluate(backend, *frames), evaluate(backend, frames[1])]

    def check(index: int) -> None:
        found = evaluate(backend, *frames) if index % 2 == 0 else evaluate(backend, frames[1])
        for name in ("energy", "forces", "stress"):
            assert torch.equal(getattr(found, name), getattr(expected[index % 2], name)), name

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(check, range(40)))
    np.testing.assert_array_equal(calculator.get_property("forces", frames[1]), expected[1].forces)
