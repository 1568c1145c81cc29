import gc
import warnings
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from ase import Atoms, units
from ase.build import bulk, molecule
from ase.calculators.calculator import PropertyNotImplementedError
from ase.calculators.emt import EMT
from ase.calculators.lj import LennardJones
from ase.calculators.mixing import LinearCombinationCalculator
from ase.io import read
from ase.md.langevin import Langevin
from scipy.spatial.transform import Rotation

from ase_uq import Quantile, UncertainCalculator, UncertaintyModel, embedded, fit
from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.engines.ase.bias import UncertaintyBias
from ase_uq.errors import InputError, UQWarning
from ase_uq.forward_pass import ForwardPass

# Å: the networks of pdrum and the neighbours of knn have kinks, and a longer step is likely to meet one. Rounding of a
# bias of 1 eV makes 1e-11 eV/Å; differences of the second order were off by 3e-8 of the forces.
STEP, TOLERANCE = 1e-5, 1e-6
POTENTIALS = ("mace", "orb-conservative", "orb-direct")


def biased(calculator: UncertainCalculator, height: float = 1.0, width: float = 0.02) -> UncertaintyBias:
    with pytest.warns(UQWarning, match="not physical dynamics"):
        return UncertaintyBias(calculator, height=height, width=width)


def labelled(n_frames: int, seed: int, calculator, energies: bool = True) -> list[Atoms]:
    """Shaken ethanol; the reference is the potential and an error that grows with the shaking."""
    rng = np.random.default_rng(seed)
    frames = []
    for _ in range(n_frames):
        atoms = molecule("CH3CH2OH")
        moves = 0.08 * rng.lognormal(sigma=0.5) * rng.normal(size=(len(atoms), 3))
        atoms.positions += moves
        error = np.linalg.norm(moves, axis=1, keepdims=True) * rng.normal(size=(len(atoms), 3))
        if energies:
            atoms.info["REF_energy"] = calculator.get_potential_energy(atoms) + np.linalg.norm(moves) * rng.normal()
        atoms.set_array("REF_forces", calculator.get_forces(atoms) + error)
        frames.append(atoms)
    return frames


def fitted(calculator, methods=("bll",), n_frames: int = 30, **options) -> UncertainCalculator:
    train, calibration = (labelled(n_frames, seed, calculator, **options) for seed in (1, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # invented errors need not follow any method's form; ntk is dear
        return UncertainCalculator(calculator, fit(calculator, train, calibration, methods=methods, progress=False))


@pytest.fixture(scope="module")
def toy() -> UncertainCalculator:
    return fitted(ToyCalculator())


@pytest.fixture(scope="module")
def shipped() -> Callable[[str], UncertainCalculator]:
    """An embedded potential in float64 with the uncertainty model that ships with it."""
    made: dict[str, UncertainCalculator] = {}

    def shipped(name: str) -> UncertainCalculator:
        if name not in made:
            model = UncertaintyModel.load(embedded.path(f"{name.replace('-', '_')}.uq.safetensors"))
            made[name] = UncertainCalculator(load_backend(f"embedded:{name}", dtype="float64"), model)
        return made[name]

    return shipped


@pytest.fixture(scope="module")
def malonaldehyde() -> Atoms:
    """One that is out of the plane and away from the training frames."""
    atoms = read(embedded.path("test_300K.xyz"), "2")
    atoms = Atoms(atoms.symbols, atoms.positions)
    atoms.positions += 0.05 * np.random.default_rng(0).standard_normal((9, 3))
    return atoms


def ethanol(seed: int = 7) -> Atoms:
    atoms = molecule("CH3CH2OH")
    atoms.positions += 0.1 * np.random.default_rng(seed).standard_normal((9, 3))
    return atoms


def check_by_differences(bias: UncertaintyBias, atoms: Atoms) -> None:
    """Bias forces are the slope of the bias energy in a direction of all atoms; and it is not flat there."""
    rng = np.random.default_rng(11)
    bias.calculate(atoms)
    forces = bias.results["bias_forces"]
    assert np.abs(forces).max() > 1e-3
    direction = rng.standard_normal(atoms.positions.shape)
    direction /= np.linalg.norm(direction)
    energies = []
    for sign in (1, -1):
        moved = atoms.copy()
        moved.positions += sign * STEP * direction
        bias.calculate(moved)
        energies.append(bias.results["bias_energy"])
    slope = -(energies[0] - energies[1]) / (2 * STEP)
    assert (direction * forces).sum() == pytest.approx(slope, abs=TOLERANCE * np.linalg.norm(forces))


def width_at_work(calculator: UncertainCalculator, atoms: Atoms) -> float:
    """A width with which the bias has gone part of its way."""
    return float(calculator.get_property("energy_uncertainty", atoms)) / len(atoms) ** 0.5


@pytest.mark.parametrize("method", ["bll", "kernel", "pdrum", "mahalanobis", "knn", "gmm", "pops"])
def test_bias_forces_are_the_slope_of_the_bias_energy_for_every_method(method):
    calculator = fitted(ToyCalculator(), methods=[method])
    check_by_differences(biased(calculator, width=width_at_work(calculator, ethanol())), ethanol())


def test_bias_forces_are_right_for_several_methods_combined():
    calculator = fitted(ToyCalculator(), methods=["bll", "kernel"])
    assert calculator.uncertainty_model.primary == "combined"
    check_by_differences(biased(calculator, width=width_at_work(calculator, ethanol())), ethanol())


def test_bias_forces_are_right_for_direct_forces_and_in_a_sum_of_calculators():
    direct = ToyCalculator(direct=True)
    summed = LinearCombinationCalculator([direct, LennardJones(sigma=1.0, epsilon=0.01)], [2.0, 1.0])
    for potential in (direct, summed):
        calculator = fitted(potential)
        check_by_differences(biased(calculator, width=width_at_work(calculator, ethanol())), ethanol())


def test_bias_forces_are_right_in_a_periodic_cell():
    def silicon(rng: np.random.Generator) -> Atoms:
        atoms = bulk("Si", cubic=True)
        atoms.positions += 0.1 * rng.standard_normal((8, 3))
        return atoms

    rng, potential, frames = np.random.default_rng(3), ToyCalculator(), []
    for _ in range(40):
        atoms = silicon(rng)
        atoms.info["REF_energy"] = potential.get_potential_energy(atoms) + 0.1 * rng.standard_normal()
        atoms.set_array("REF_forces", potential.get_forces(atoms) + 0.1 * rng.standard_normal((8, 3)))
        frames.append(atoms)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # errors that nothing explains
        model = fit(potential, frames[:20], frames[20:], methods=["bll"], progress=False)
    calculator = UncertainCalculator(potential, model)
    atoms = silicon(rng)
    atoms.positions[0] += 0.1  # further out nothing is known, and the bias is flat
    check_by_differences(biased(calculator, width=width_at_work(calculator, atoms)), atoms)


@pytest.mark.parametrize("name", POTENTIALS)
def test_bias_forces_are_the_slope_of_the_bias_energy_of_real_potentials(shipped, malonaldehyde, name):
    calculator = shipped(name)
    width = width_at_work(calculator, malonaldehyde)
    for method in ("as it is", *calculator.uncertainty_model.methods):
        model = calculator.uncertainty_model
        if method != "as it is":
            # Each method's energies: between them the calibrators read all that the last layer and the features say.
            model = replace(model, combination=None, primary=method)
        one = UncertainCalculator(calculator.predictor.backend, model)
        check_by_differences(biased(one, width=width), malonaldehyde)


@pytest.mark.parametrize("name", POTENTIALS)
def test_the_bias_has_its_closed_form(shipped, malonaldehyde, name):
    calculator, height, width = shipped(name), 0.7, 0.03
    bias = biased(calculator, height, width)
    bias.calculate(malonaldehyde)
    calculator.calculate(malonaldehyde)
    plain, found = calculator.results, bias.results
    std = deviation(calculator, malonaldehyde)
    assert std == pytest.approx(plain["energy_uncertainty_bll"], rel=0.5), "but for where the far end lies"
    assert found["bias_energy"] == pytest.approx(height * (np.exp(-(std**2) / (9 * width**2)) - 1), rel=1e-9)
    assert -height < found["bias_energy"] < 0
    assert found["energy"] == found["free_energy"] == found["unbiased_energy"] + found["bias_energy"]
    np.testing.assert_array_equal(found["forces"], found["unbiased_forces"] + found["bias_forces"])


def deviation(calculator: UncertainCalculator, atoms: Atoms) -> float:
    """σ_E, eV, with the mean far end of the calibration frames: the true one has no derivative here."""
    fitted, backend = calculator.uncertainty_model.methods["bll"], calculator.predictor.backend
    calibrator = fitted.calibrators["energy"]
    with torch.no_grad():
        scores = fitted.head(backend.forward(backend.collate([atoms]))).energy
    return len(atoms) * float(calibrator.variance(scores, scores.new_tensor([calibrator.limit]).exp()).sqrt())


def test_where_nothing_is_known_the_bias_is_flat(toy):
    """It has the far field of energies, with the mean end of the calibration frames."""
    calibrator = toy.uncertainty_model.methods["bll"].calibrators["energy"]
    atoms = ethanol()
    atoms.positions *= 0.5
    bias = biased(toy, width=0.1)
    bias.calculate(atoms)
    variance = 9**2 * np.exp(calibrator.limit)
    assert bias.results["bias_energy"] == pytest.approx(np.expm1(-variance / (9 * 0.1**2)), rel=1e-9)
    assert not bias.results["bias_forces"].any()


@pytest.mark.parametrize("name", POTENTIALS)
def test_what_is_not_biased_is_the_calculators(shipped, malonaldehyde, name):
    calculator = shipped(name)
    bias = biased(calculator)
    bias.calculate(malonaldehyde)
    calculator.calculate(malonaldehyde)
    assert bias.results["unbiased_energy"] == calculator.results["energy"]
    # A pass that keeps its graph takes other kernels for the slopes of activations.
    np.testing.assert_allclose(bias.results["unbiased_forces"], calculator.results["forces"], rtol=1e-10, atol=1e-12)
    for key in calculator.uncertainty_model.results:
        np.testing.assert_allclose(bias.results[key], calculator.results[key], rtol=1e-10, err_msg=key)


@pytest.mark.parametrize("name", POTENTIALS)
def test_without_height_it_is_the_plain_calculator_to_the_last_bit(shipped, malonaldehyde, name):
    calculator, one, other = shipped(name), malonaldehyde.copy(), malonaldehyde.copy()
    one.calc, other.calc = calculator, biased(calculator, height=0.0)
    assert one.get_potential_energy() == other.get_potential_energy()
    np.testing.assert_array_equal(one.get_forces(), other.get_forces())


def test_single_precision_gives_the_same_bias(shipped, malonaldehyde):
    double = shipped("mace")
    single = UncertainCalculator(load_backend("embedded:mace", dtype="float32"), double.uncertainty_model)
    results = []
    for calculator in (single, double):
        bias = biased(calculator)
        bias.calculate(malonaldehyde)
        results.append(bias.results["bias_forces"])
    np.testing.assert_allclose(results[0], results[1], rtol=0, atol=1e-3 * np.abs(results[1]).max())


@pytest.mark.parametrize("name", POTENTIALS)
def test_the_bias_does_not_push_the_whole(shipped, malonaldehyde, name):
    bias = biased(shipped(name), width=width_at_work(shipped(name), malonaldehyde))
    bias.calculate(malonaldehyde)
    forces = bias.results["bias_forces"]
    assert np.abs(forces).max() > 0.01
    np.testing.assert_allclose(forces.sum(0), 0, atol=1e-10)
    shifted = malonaldehyde.copy()
    shifted.positions += [3.0, -2.0, 1.0]
    bias.calculate(shifted)
    np.testing.assert_allclose(bias.results["bias_forces"], forces, atol=1e-9 * np.abs(forces).max())


def test_the_bias_turns_with_the_molecule(shipped, malonaldehyde):
    # Of the MACE; orb's features do not turn with it.
    bias = biased(shipped("mace"))
    bias.calculate(malonaldehyde)
    forces, torque = bias.results["bias_forces"], np.cross(malonaldehyde.positions, bias.results["bias_forces"]).sum(0)
    np.testing.assert_allclose(torque, 0, atol=1e-8)
    turn = Rotation.random(rng=np.random.default_rng(5)).as_matrix()
    turned = malonaldehyde.copy()
    turned.positions = turned.positions @ turn.T
    bias.calculate(turned)
    np.testing.assert_allclose(bias.results["bias_forces"], forces @ turn.T, atol=1e-8 * np.abs(forces).max())


@pytest.mark.parametrize("name", POTENTIALS)
def test_one_backward_pass_more_and_no_further_forward(shipped, malonaldehyde, name, monkeypatch):
    calculator = shipped(name)
    backend = calculator.predictor.backend
    (module,) = backend._modules()
    passes = {"forward": 0, "backward": 0}
    inner = torch.autograd.grad

    def grad(outputs, inputs, *arguments, **options):
        # Through the potential, and not through the heads alone, whose leaves are made from detached values.
        targets = [inputs] if torch.is_tensor(inputs) else list(inputs)
        passes["backward"] += len(targets) < 4
        return inner(outputs, inputs, *arguments, **options)

    def counted(calculate: Callable[[Atoms], None]) -> dict[str, int]:
        passes.update(forward=0, backward=0)
        moved = malonaldehyde.copy()
        moved.positions[0] += 1e-3 * (1 + len(counts))  # which nobody remembers
        calculate(moved)
        return dict(passes)

    def count(*_):
        passes["forward"] += 1

    counts: list[dict[str, int]] = []
    monkeypatch.setattr(torch.autograd, "grad", grad)
    handle = module.model.register_forward_hook(count) if name != "mace" else module.register_forward_hook(count)
    try:
        counts.append(counted(calculator.calculate))
        counts.append(counted(biased(calculator).calculate))
    finally:
        handle.remove()
    plain, with_bias = counts
    assert plain == {"forward": 1, "backward": 0 if backend.direct else 1}
    assert with_bias == {"forward": 1, "backward": plain["backward"] + 1}


def test_a_biased_run_visits_larger_uncertainties(shipped):
    """With the same noise: the second half of 30 fs at 300 K."""
    model = shipped("mace").uncertainty_model
    # The bias follows bll anyway; the others would cost time.
    model = replace(model, combination=None, primary="bll", methods={"bll": model.methods["bll"]})
    calculator = UncertainCalculator(shipped("mace").predictor.backend, model)
    start = read(embedded.path("malonaldehyde.xyz"))
    start = Atoms(start.symbols, start.positions)

    def visited(potential, seed: int) -> float:
        atoms, rng, readings = start.copy(), np.random.default_rng(seed), []
        atoms.calc = potential
        atoms.set_momenta(np.sqrt(atoms.get_masses() * units.kB * 300)[:, None] * rng.standard_normal((9, 3)))
        run = Langevin(atoms, units.fs, temperature_K=300, friction=0.02 / units.fs, fixcm=False, rng=rng)
        run.attach(lambda: readings.append(potential.results["energy_uncertainty"]))
        run.run(30)
        return float(np.mean(readings[15:]))

    # Half of the calibration frames are below 0.0021 eV, that is 0.0007 eV a root of nine atoms.
    bias = biased(calculator, height=0.3, width=0.0007)
    here, there = visited(calculator, seed=0), visited(bias, seed=0)
    assert there > 1.5 * here


def test_it_has_no_stress_and_no_energies_of_atoms(toy):
    atoms = ethanol()
    atoms.calc = bias = biased(toy)
    assert set(bias.results) <= set(bias.implemented_properties)
    atoms.get_forces()
    assert set(bias.results) == set(bias.implemented_properties)
    assert not {"stress", "energies"} & set(bias.results)
    with pytest.raises(PropertyNotImplementedError):
        atoms.get_stress()


def test_it_says_when_it_is_made_that_it_is_not_physical(toy):
    with pytest.warns(UQWarning, match=r"^UncertaintyBias is not physical dynamics: .* Use it to find frames to label"):
        UncertaintyBias(toy, height=1.0, width=0.1)
    assert "NOT physical dynamics" in str(UncertaintyBias.__doc__)


def test_thresholds_are_those_of_the_calculator(toy):
    bias = biased(toy)
    assert bias.threshold(Quantile(0.9)) == toy.threshold(Quantile(0.9)) > 0
    np.testing.assert_array_equal(bias.threshold_data().readings, toy.threshold_data().readings)
    assert bias.uncertainty_model is toy.uncertainty_model


def test_only_what_the_potential_reads_costs_a_calculation(shipped, malonaldehyde):
    atoms = malonaldehyde.copy()
    atoms.calc = bias = biased(shipped("mace"))
    key = shipped("mace").predictor.backend.info_keys[0]
    atoms.info[key] = 0.0
    atoms.get_forces()
    atoms.info["note"] = "mine"
    assert bias.check_state(atoms) == []
    atoms.info[key] = 1.0
    assert bias.check_state(atoms) == ["info"]
    del atoms.info[key]
    assert bias.check_state(atoms) == ["info"]


def test_a_failed_calculation_leaves_no_results(toy):
    atoms = ethanol()
    atoms.calc = bias = biased(toy)
    atoms.get_forces()
    atoms.positions[0] = np.nan
    with pytest.raises(InputError, match="are not finite"):
        atoms.get_forces()
    assert not bias.results


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"height": -1.0, "width": 0.1}, r"height is an energy in eV, 0 or above, not -1\.0"),
        ({"height": np.nan, "width": 0.1}, "height is an energy in eV, 0 or above, not nan"),
        ({"height": 1.0, "width": 0.0}, r"width is .* in eV per square root of the number of atoms, not 0\.0"),
        ({"height": 1.0, "width": np.inf}, "width is .* in eV per square root of the number of atoms, not inf"),
    ],
)
def test_bad_numbers(toy, arguments, message):
    with pytest.raises(ValueError, match=message):
        UncertaintyBias(toy, **arguments)


def test_another_calculator_is_refused():
    with pytest.raises(TypeError, match="follows the uncertainty of an UncertainCalculator, not of EMT"):
        UncertaintyBias(EMT(), height=1.0, width=0.1)  # type: ignore[arg-type]


def test_a_model_without_energies_is_refused():
    calculator = fitted(ToyCalculator(), n_frames=15, energies=False)
    with pytest.raises(ValueError, match="has no uncertainty of energies: its calibration frames had no energy lab"):
        UncertaintyBias(calculator, height=1.0, width=0.1)


def test_a_method_whose_uncertainty_has_no_derivative_is_refused():
    bias = biased(fitted(ToyCalculator(), methods=["ntk"], n_frames=15))
    message = r"uncertainty of energies by ntk is not a function of the potential's features.*methods=\['bll'\]"
    with pytest.raises(InputError, match=message):
        bias.calculate(ethanol())


class Masked(torch.nn.Module):
    """A head whose energies come from what has no route to the positions."""

    gradients = False
    estimates = False

    def __init__(self, head: torch.nn.Module) -> None:
        super().__init__()
        self.head = head

    def forward(self, forward_pass):
        raw = self.head(forward_pass)
        return replace(raw, energy=raw.energy + forward_pass.vectors.double().square().sum())


def test_a_method_that_reads_what_cannot_be_differentiated_is_refused(toy):
    model = toy.uncertainty_model
    masked = replace(model.methods["bll"], head=Masked(model.methods["bll"].head))
    bias = biased(UncertainCalculator(ToyCalculator(), replace(model, methods={"bll": masked})))
    with pytest.raises(InputError, match="uncertainty of energies by bll comes from its vectors, which has no deriv"):
        bias.calculate(ethanol())


def test_a_potential_that_cannot_differentiate_its_last_layer_is_refused(toy, monkeypatch):
    from ase_uq.backends import toy as module

    inner = module.GraphGradients
    monkeypatch.setattr(module, "GraphGradients", lambda **arguments: inner(**{**arguments, "energy_features": None}))
    with pytest.raises(InputError, match="keeps no graph of the last layer of its energy to differentiate"):
        biased(toy).calculate(ethanol())


def test_the_graph_goes_with_the_calculation(toy, monkeypatch):
    graphs = []
    forward = Backend.forward

    def watched(backend: Backend, *arguments: Any, **options: Any) -> ForwardPass:
        forward_pass = forward(backend, *arguments, **options)
        graphs.append(weakref.ref(forward_pass.gradients))
        return forward_pass

    monkeypatch.setattr(Backend, "forward", watched)
    bias = biased(toy)
    bias.calculate(ethanol())
    gc.collect()
    assert [graph() for graph in graphs] == [None]
