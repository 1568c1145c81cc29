"""TorchSim: outputs are the ASE calculator's, and each replica is halted on its own."""

import functools
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch_sim as ts
from ase import Atoms, units
from ase.build import molecule
from ase.constraints import FixAtoms, FixBondLength, FixedPlane
from ase.io import read
from ase.stress import voigt_6_to_full_3x3_stress
from torch_sim.models.interface import validate_model_outputs

from ase_uq import (
    MaxTemperature,
    Patience,
    PerElement,
    Quantile,
    Reduction,
    Threshold,
    UncertainCalculator,
    UncertaintyModel,
    WatchPolicy,
    embedded,
    fit,
    read_frames,
)
from ase_uq.backends.toy import ToyCalculator
from ase_uq.engines.torchsim import ReplicaMonitor, UncertainModel
from ase_uq.errors import InputError, PotentialMismatch, UQWarning
from ase_uq.properties import find_property
from ase_uq.testing.backends import count_forwards
from ase_uq.testing.methods import ELEMENTS, labelled_frames
from ase_uq.thresholds.reduction import atom_norms

pytestmark = [
    pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning"),
    # ts.integrate, of as many replicas as steps.
    pytest.mark.filterwarnings("ignore:n_systems is equal to n_steps:UserWarning"),
]

EMBEDDED = {"embedded:mace": "mace.uq.safetensors", "embedded:orb-direct": "orb_direct.uq.safetensors"}
KELVIN = (100, 300, 500, 700, 900, 1500, 2500, 5000)
STEP = 0.0005  # ps
N_STEPS = 24


@pytest.fixture(scope="module", params=EMBEDDED)
def spec(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def fitted() -> UncertaintyModel:
    train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    return fit(ToyCalculator(ELEMENTS), train, held_out, methods=["bll"], progress=False)


@pytest.fixture(scope="module")
def model(fitted: UncertaintyModel) -> UncertainModel:
    return UncertainModel(ToyCalculator(ELEMENTS), fitted)


@pytest.fixture
def calculator(fitted: UncertaintyModel) -> UncertainCalculator:
    return UncertainCalculator(ToyCalculator(ELEMENTS), fitted)


@functools.cache  # to build a potential takes longer than to use it here
def of_embedded(spec: str) -> UncertainModel:
    if "orb" in spec:
        pytest.importorskip("orb_models", reason="orb-models is not installed; newer versions of TorchSim refuse it")
    return UncertainModel(spec, embedded.path(EMBEDDED[spec]))


@pytest.fixture(scope="module")
def mace() -> UncertainModel:
    return of_embedded("embedded:mace")


def state_of(frames: Atoms | Sequence[Atoms], model: UncertainModel, seed: int = 0) -> ts.SimState:
    state = ts.initialize_state(list(frames), model.device, model.dtype)
    state.rng = seed
    return state


def copies(count: int = len(KELVIN), seed: int = 5) -> list[Atoms]:
    """Molecules of several sizes, slightly off equilibrium."""
    return [Atoms(a.numbers, a.positions) for a in labelled_frames(count, seed=seed, spread=(0.01, 0.02))]


def mixed(periodic: bool) -> list[Atoms]:
    """Structures of 9, 3 and 72 atoms and one of a single atom, in an order that is none."""
    frames = read(embedded.path("test_300K.xyz"), ":3")
    small = [Atoms(a.numbers, a.positions) for a in frames]
    water = molecule("H2O")
    water.rattle(0.05, seed=1)
    single = Atoms("C", [(0.1, 0.2, 0.3)])
    if not periodic:
        pair = small[1] + Atoms(small[2].numbers, small[2].positions + np.array([3.5, 0.3, 0.1]))
        return [small[0], water, pair, single]
    for atoms, edge in ((small[0], 8.0), (small[1], 9.0), (water, 6.0), (single, 5.0)):
        atoms.set_cell(np.diag([edge, edge + 0.5, edge + 1.0]) + np.array([[0, 0, 0], [0.7, 0, 0], [0.2, -0.4, 0]]))
        atoms.pbc = True
    large = small[1].repeat((2, 2, 2))
    large.rattle(0.02, seed=2)
    return [water, large, small[0], single]


def assert_same(outputs: dict[str, torch.Tensor], frames: list[Atoms], expected: list[dict], **tolerance: float):
    ends = np.cumsum([len(atoms) for atoms in frames])
    assert outputs.keys() == expected[0].keys() - {"free_energy"}
    for number, (atoms, results) in enumerate(zip(frames, expected, strict=True)):
        for key, value in outputs.items():
            entry = find_property(key)
            per_atom = entry is None or entry.per_atom
            found = value[ends[number] - len(atoms) : ends[number]] if per_atom else value[number]
            wanted = voigt_6_to_full_3x3_stress(results[key]) if key == "stress" else np.asarray(results[key])
            assert found.shape == wanted.shape, key
            np.testing.assert_allclose(found.numpy(), wanted, err_msg=key, **tolerance)


# ---------------------------------------------------------------- the model


@pytest.mark.filterwarnings("ignore:the uncertainty model was fitted without:ase_uq.errors.UQWarning")
@pytest.mark.parametrize("periodic", [False, True], ids=["molecular", "periodic"])
def test_outputs_of_mixed_sizes_in_any_order_are_those_of_the_calculator(spec: str, periodic: bool):
    model, frames = of_embedded(spec), mixed(periodic)
    calculator = UncertainCalculator(model.predictor.backend, embedded.path(EMBEDDED[spec]))
    expected = []
    for atoms in frames:
        calculator.calculate(atoms)
        expected.append(calculator.results)
    # Sums over a batch are taken in another order. In float64 uncertainties lose half of the digits to a square root
    # of a difference, in float32 the energies of some thousands of eV all but four decimals.
    tolerance = {"embedded:mace": {"rtol": 1e-7, "atol": 1e-9}, "embedded:orb-direct": {"rtol": 2e-4, "atol": 2e-5}}
    for order in ([0, 1, 2, 3], [2, 0, 3, 1]):
        chosen = [frames[number] for number in order]
        outputs = model(state_of(chosen, model))
        assert_same(outputs, chosen, [expected[number] for number in order], **tolerance[spec])


def test_outputs_of_one_system_are_those_of_the_calculator_bit_for_bit():
    spec, (atoms, *_) = "embedded:mace", mixed(periodic=False)
    model = of_embedded(spec)
    calculator = UncertainCalculator(model.predictor.backend, embedded.path(EMBEDDED[spec]))
    calculator.calculate(atoms)
    assert_same(model(state_of([atoms], model)), [atoms], [calculator.results], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:the uncertainty model was fitted without:ase_uq.errors.UQWarning")
def test_torchsim_itself_takes_it_for_a_model():
    calculator = ToyCalculator((*ELEMENTS, "Mg", "Si", "Fe"))
    train, held_out = labelled_frames(30, seed=1), labelled_frames(30, seed=2)
    model = UncertainModel(calculator, fit(calculator, train, held_out, methods=["bll"], progress=False))
    validate_model_outputs(model, model.device, model.dtype, check_detached=True)


def test_outputs_are_detached_in_the_dtype_of_the_model_and_the_state_stays(spec: str):
    model = of_embedded(spec)
    assert model.dtype == {"embedded:mace": torch.float64, "embedded:orb-direct": torch.float32}[spec]
    assert model.device == torch.device("cpu")
    state = state_of(mixed(periodic=False)[:3], model)
    before = state.clone()
    for key, value in model(state).items():
        assert value.dtype == model.dtype, key
        assert not value.requires_grad, key
    for name in ("positions", "cell", "atomic_numbers", "system_idx", "masses"):
        assert torch.equal(getattr(state, name), getattr(before, name))
    assert not state.system_extras
    assert not state.atom_extras


def test_a_batch_costs_one_forward_pass():
    model = of_embedded("embedded:mace")
    with count_forwards(model.predictor.backend.calculator.models) as n_forwards:
        model(state_of(mixed(periodic=False), model))
    assert n_forwards() == 1


def test_the_interval_is_that_of_the_calculator(fitted: UncertaintyModel):
    model = UncertainModel(ToyCalculator(ELEMENTS), fitted, interval=0.8)
    calculator = UncertainCalculator(ToyCalculator(ELEMENTS), fitted, interval=0.8)
    atoms = copies(1)[0]
    calculator.calculate(atoms)
    found = model(state_of([atoms], model))["forces_interval"]
    np.testing.assert_allclose(found.numpy(), calculator.results["forces_interval"], rtol=1e-12)


def test_static_runs_and_states_carry_the_uncertainties(model: UncertainModel):
    frames = copies(3)
    outputs = model(state_of(frames, model))
    for number, properties in enumerate(ts.static(frames, model)):
        assert properties["energy_uncertainty"] == outputs["energy_uncertainty"][number]
        assert properties["forces_uncertainty"].shape == (len(frames[number]), 3)
    state = ts.integrate(frames, model, integrator=ts.Integrator.nve, n_steps=2, temperature=300, timestep=STEP)
    again = model(state)
    assert torch.equal(state.forces_uncertainty, again["forces_uncertainty"])
    assert torch.equal(state.energy_uncertainty, again["energy_uncertainty"])


def test_charge_and_spin_are_read_from_the_state(model: UncertainModel, monkeypatch: pytest.MonkeyPatch):
    backend, seen = model.predictor.backend, []
    monkeypatch.setattr(backend, "info_keys", ("charge", "spin"))
    monkeypatch.setattr(backend, "required_info_keys", ("charge",))
    monkeypatch.setattr(
        backend, "_collate", lambda frames, inner=backend._collate: seen.extend(frames) or inner(frames)
    )
    frames = copies(2)
    with pytest.raises(InputError, match=r"the state has no charge.*system_extras_map=\{'charge': 'charge'\}"):
        model(state_of(frames, model))
    for charge, atoms in enumerate(frames):
        atoms.info["charge"] = charge
    names: Any = {"charge": "charge"}
    model(ts.io.atoms_to_state(frames, model.device, model.dtype, system_extras_map=names))
    assert [atoms.info for atoms in seen] == [{"charge": 0}, {"charge": 1}]


def test_another_dtype_is_refused(model: UncertainModel):
    state = ts.initialize_state(copies(1), model.device, torch.float32)
    with pytest.raises(TypeError, match=r"the state is in torch.float32 and the potential in torch.float64\. Make"):
        model(state)


def test_another_device_is_refused(fitted: UncertaintyModel):
    model = UncertainModel(ToyCalculator(ELEMENTS), fitted)
    state = state_of(copies(1), model)
    model._device = torch.device("cuda:1")
    with pytest.raises(ValueError, match="the state is on cpu and the potential on cuda:1"):
        model(state)


def test_an_element_that_the_potential_does_not_know_is_refused(model: UncertainModel):
    frames = [*copies(1), molecule("NH3")]
    with pytest.raises(InputError, match=r"structure 1 \(H3N\) contains N, which the potential does not know"):
        model(state_of(frames, model))
    with pytest.raises(InputError, match=r"system 1 \(H3N\) contains N, which the potential does not know"):
        ReplicaMonitor(model, halt=1.0).integrate(
            frames, integrator=ts.Integrator.nve, n_steps=1, temperature=300, timestep=STEP
        )


def test_another_potential_is_refused(fitted: UncertaintyModel):
    with pytest.raises(PotentialMismatch):
        UncertainModel(ToyCalculator(ELEMENTS, seed=1), fitted)


def test_without_torchsim_the_pip_line_is_given_and_the_package_does_not_need_it():
    code = "import sys; sys.modules['torch_sim'] = None; import ase_uq; import ase_uq.engines.torchsim"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ase_uq.errors.MissingDependency: ase_uq.engines.torchsim needs TorchSim")
    assert last.endswith('Run: pip install "ase-uq[torchsim]"')


# ---------------------------------------------------------------- dynamics


def run(
    monitor: ReplicaMonitor | None,
    model: UncertainModel,
    frames: Sequence[Atoms],
    integrator: Any = ts.Integrator.nve,
    n_steps: int = N_STEPS,
    **options: Any,
) -> Any:
    arguments = {"temperature": KELVIN[: len(frames)], "timestep": STEP, "n_steps": n_steps, **options}
    state = state_of(frames, model)
    if monitor is None:
        return ts.integrate(state, model, integrator=integrator, **arguments)
    return monitor.integrate(state, integrator=integrator, **arguments)


def readings_of(model: UncertainModel, frames: list[Atoms], calculator: UncertainCalculator, n_steps: int = N_STEPS):
    """(n_steps + 1, n_replicas) eV/Å of an unwatched run, by the ASE calculator, and its structures."""
    history: list[list[Atoms]] = []
    init, step = ts.INTEGRATOR_REGISTRY[ts.Integrator.nve]

    def first(**options: Any) -> Any:
        state = init(**options)
        history.append(state.to_atoms())
        return state

    def then(**options: Any) -> Any:
        state = step(**options)
        history.append(state.to_atoms())
        return state

    run(None, model, frames, (first, then), n_steps)
    return np.array([[reading_of(calculator, atoms) for atoms in row] for row in history]), history


def reading_of(calculator: UncertainCalculator, atoms: Atoms) -> float:
    return float(atom_norms(calculator.get_property("forces_uncertainty", atoms)).max())


@pytest.fixture(scope="module")
def unwatched(model: UncertainModel, fitted: UncertaintyModel) -> tuple[np.ndarray, list[list[Atoms]]]:
    return readings_of(model, copies(), UncertainCalculator(ToyCalculator(ELEMENTS), fitted))


def level_between(readings: np.ndarray) -> float:
    """A threshold that about half of the replicas reach, none at the first step."""
    level = float(np.median(readings.max(0)))
    assert readings[0].max() < level
    return level


def test_only_the_offending_replicas_stop_at_the_step_where_they_should(
    model: UncertainModel, unwatched: tuple[np.ndarray, list[list[Atoms]]]
):
    readings, history = unwatched
    level = level_between(readings)
    monitor = ReplicaMonitor(model, halt=level)
    final = run(monitor, model, copies())
    n_halted = 0
    for number, (replica, atoms) in enumerate(zip(monitor.replicas, final.to_atoms(), strict=True)):
        above = readings[:, number] >= level
        expected = int(np.argmax(above)) if above.any() else N_STEPS
        n_halted += above.any()
        assert (replica.number, replica.halted, replica.step) == (number, above.any(), expected)
        assert replica.time_fs == pytest.approx(0.5 * expected, rel=1e-5)
        assert replica.reading == pytest.approx(readings[expected, number], rel=1e-6)
        assert replica.formula == atoms.get_chemical_formula()
        assert replica.reason.startswith("force uncertainty (max)") == above.any()
        # Also of the others: nothing of their dynamics depends on who was halted.
        np.testing.assert_allclose(atoms.positions, history[expected][number].positions, atol=1e-9)
    assert 0 < n_halted < len(KELVIN)


INTEGRATORS = [
    (integrator, {"external_pressure": 0.0} if integrator.startswith("npt") else {}) for integrator in ts.Integrator
]


@pytest.mark.parametrize(("integrator", "options"), INTEGRATORS, ids=[str(name) for name, _ in INTEGRATORS])
def test_in_every_ensemble_the_halted_stay_and_the_others_go_on_as_without_them(
    model: UncertainModel, integrator: ts.Integrator, options: dict[str, float]
):
    frames, level = crystals_with_a_bad_one(model)
    monitor = ReplicaMonitor(model, halt=level)
    final = run(monitor, model, frames, integrator, 6, temperature=50, **options)
    without = run(None, model, frames, integrator, 6, temperature=50, **options)
    assert [(replica.halted, replica.step) for replica in monitor.replicas] == [(False, 6)] * 2 + [
        (True, 0),
        (False, 6),
    ]
    start = state_of(frames, model)
    for name in ("positions", "momenta", "forces", "cell", "energy", "forces_uncertainty", "energy_uncertainty"):
        found, expected = getattr(final, name), getattr(without, name)
        own = (final.system_idx if len(found) == final.n_atoms else torch.arange(4)) == 2
        torch.testing.assert_close(found[~own], expected[~own], rtol=1e-9, atol=1e-9)
        if hasattr(start, name):
            assert torch.equal(found[own], getattr(start, name)[own])
            assert name == "cell" or not torch.equal(expected[own], found[own])
    again = model(final[2])
    torch.testing.assert_close(final[2].forces, again["forces"])
    torch.testing.assert_close(final[2].energy_uncertainty, again["energy_uncertainty"])


def with_a_bad_one(mace: UncertainModel) -> tuple[list[Atoms], float]:
    """Four structures of 9, 18, 9 and 9 atoms, and a threshold that only number 2 reaches."""
    frame = read(embedded.path("malonaldehyde.xyz"))
    frames = [Atoms(frame.numbers, frame.positions) for _ in range(4)]
    frames[1] += Atoms(frame.numbers, frame.positions + np.array([0.0, 0.0, 6.0]))
    for number, spread in enumerate((0.02, 0.01, 0.12, 0.01)):
        frames[number].rattle(spread, seed=number)
    return frames, level_of_the_bad_one(mace, frames)


def crystals_with_a_bad_one(model: UncertainModel) -> tuple[list[Atoms], float]:
    """Four molecules of several sizes in periodic cells, and a threshold that only number 2 reaches."""
    frames = copies(4)
    frames[2].rattle(0.25, seed=2)
    for atoms in frames:
        atoms.set_cell([9.0, 10.0, 12.0])
        atoms.pbc = True
    return frames, level_of_the_bad_one(model, frames)


def level_of_the_bad_one(model: UncertainModel, frames: list[Atoms]) -> float:
    sizes = [len(atoms) for atoms in frames]
    readings = model(state_of(frames, model))["forces_uncertainty"].norm(dim=1).split(sizes)
    others, own = max(float(readings[number].max()) for number in (0, 1, 3)), float(readings[2].max())
    assert own > 2.5 * others
    return 0.8 * own


def test_a_halted_replica_is_not_evaluated_any_more_and_nothing_is_when_all_are(mace: UncertainModel):
    model, (frames, level) = mace, with_a_bad_one(mace)
    sizes = []
    outcomes = model.predictor.outcomes

    def counting(frames: Sequence[Atoms], **options: Any) -> Any:
        sizes.append(len(frames))
        return outcomes(frames, **options)

    model.predictor.outcomes = counting  # pyright: ignore[reportAttributeAccessIssue]
    try:
        run(ReplicaMonitor(model, halt=level), model, frames, n_steps=3, temperature=50)
        assert sizes == [4, 3, 3, 3]
        sizes.clear()
        run(ReplicaMonitor(model, halt=1e-6), model, frames, n_steps=3, temperature=50)
        assert sizes == [4]
    finally:
        del model.predictor.outcomes


def test_patience_is_that_of_the_rule_on_the_readings_of_each_replica(
    model: UncertainModel, unwatched: tuple[np.ndarray, list[list[Atoms]]]
):
    readings, _ = unwatched
    level = level_between(readings)
    monitor = ReplicaMonitor(model, halt=level, patience=2.0)
    run(monitor, model, copies())
    rule, halts = Patience(level, fs=2.0), []
    for replica in monitor.replicas:
        memory, expected = None, None
        for step, reading in enumerate(readings[:, replica.number]):
            memory, triggered = rule.judge(memory, reading, 0.5 * step)
            if triggered:
                expected = step
                break
        halts.append(expected)
        assert (replica.halted, replica.step) == (expected is not None, N_STEPS if expected is None else expected)
    at_once = ReplicaMonitor(model, halt=level)
    run(at_once, model, copies())
    first = [replica.step if replica.halted else None for replica in at_once.replicas]
    assert halts != first
    assert any(step is not None for step in halts)


def test_flagged_frames_carry_what_the_calculator_gives_for_them(
    model: UncertainModel, calculator: UncertainCalculator, unwatched: Any, tmp_path: Path
):
    readings, history = unwatched
    level = level_between(readings)
    monitor = ReplicaMonitor(model, halt=level, flag=0.6 * level, frames=tmp_path / "flagged.xyz")
    run(monitor, model, copies())
    frames = read_frames(tmp_path / "flagged.xyz")
    assert len(frames) == sum(replica.n_flagged + replica.halted for replica in monitor.replicas)
    for replica in monitor.replicas:
        own = [atoms for atoms in frames if atoms.info["replica"] == replica.number]
        until = readings[: replica.step + 1, replica.number]
        assert [atoms.info["flag_step"] for atoms in own] == np.flatnonzero(until >= 0.6 * level).tolist()
        assert sum(atoms.info["flag_level"] == "halt" for atoms in own) == replica.halted
    for atoms in frames[:: max(1, len(frames) // 5)]:
        there = history[atoms.info["flag_step"]][atoms.info["replica"]]
        np.testing.assert_allclose(atoms.positions, there.positions, atol=1e-7)
        calculator.calculate(atoms)
        for key in ("energy", "forces", "forces_uncertainty", "energy_uncertainty", "gamma"):
            # extxyz keeps eight decimals.
            np.testing.assert_allclose(
                atoms.calc.results[key], calculator.results[key], rtol=1e-5, atol=1e-6, err_msg=key
            )
        assert atoms.info["flag_reading"] == pytest.approx(reading_of(calculator, atoms), rel=1e-5)
        assert atoms.info["flag_time_fs"] == pytest.approx(0.5 * atoms.info["flag_step"], rel=1e-5)
        assert atoms.get_kinetic_energy() > 0


def test_meanings_are_asked_of_the_calibration_data(model: UncertainModel, tmp_path: Path):
    reduction = Reduction(elements=("O",))
    monitor = ReplicaMonitor(model, halt=Quantile(0.5), elements=["O"], frames=tmp_path / "flagged.xyz")
    frames = [atoms for atoms in copies(12) if "O" in atoms.symbols]
    run(monitor, model, frames, n_steps=60, temperature=2000)
    halting = read_frames(tmp_path / "flagged.xyz")
    assert halting
    for atoms in halting:
        assert atoms.info["flag_threshold"] == pytest.approx(model.threshold(Quantile(0.5), reduction))
        assert "by a threshold of" in atoms.info["flag_reason"]
        assert "(O, " in atoms.info["flag_reason"]


def test_each_element_may_have_its_own_threshold_in_replicas_of_different_elements(model: UncertainModel):
    frames = [molecule("H2O"), molecule("CH4"), molecule("CO2")]
    monitor = ReplicaMonitor(model, halt=PerElement(Quantile(0.9)))
    run(monitor, model, frames, n_steps=2, temperature=10)
    watched = [[watch.reduction.elements for watch in judge.watches["halt"]] for judge in monitor._judges]
    assert watched == [[("H",), ("O",)], [("C",), ("H",)], [("C",), ("O",)]]


def test_a_policy_and_its_fields_are_the_same(
    model: UncertainModel, unwatched: tuple[np.ndarray, list[list[Atoms]]], tmp_path: Path
):
    level = level_between(unwatched[0])
    fields: dict[str, Any] = {
        "halt": level,
        "flag": 0.6 * level,
        "patience": 2.0,
        "at_once": 5 * level,
        "refractory": 5.0,
    }
    ends = []
    for name, options in (("fields", fields), ("policy", {"policy": WatchPolicy(**fields)})):
        monitor = ReplicaMonitor(model, frames=tmp_path / f"{name}.xyz", **options)
        run(monitor, model, copies())
        ends.append((monitor.policy, monitor.replicas, (tmp_path / f"{name}.xyz").read_text()))
    assert ends[0] == ends[1]
    assert any(replica.n_flagged for replica in monitor.replicas)


def test_checks_halt_a_replica_as_well(model: UncertainModel):
    monitor = ReplicaMonitor(model, checks=MaxTemperature(1000))
    run(monitor, model, copies(3), n_steps=4, temperature=[50, 5000, 50])
    assert [replica.halted for replica in monitor.replicas] == [False, True, False]
    assert "MaxTemperature: temperature is" in monitor.replicas[1].reason


def test_the_temperature_is_that_of_the_masses_and_momenta_of_the_state(model: UncertainModel, tmp_path: Path):
    state = state_of([molecule("H2O"), molecule("H2O")], model)
    heavy = (state.system_idx == 1) & (state.atomic_numbers == 1)
    state.masses = torch.where(heavy, 2.014, state.masses)
    state = ts.nve_init(state, model, kT=torch.tensor([800.0, 800.0]) * units.kB)
    monitor = ReplicaMonitor(model, checks=MaxTemperature(1.0), frames=tmp_path / "flagged.xyz")
    monitor.integrate(state, integrator=ts.Integrator.nve, n_steps=1, temperature=800, timestep=STEP)
    light, deuterated = read_frames(tmp_path / "flagged.xyz")
    np.testing.assert_allclose(deuterated.get_masses(), [15.999, 2.014, 2.014], rtol=1e-6)
    assert not light.has("masses")
    for number, atoms in enumerate((light, deuterated)):
        np.testing.assert_allclose(atoms.get_momenta(), state[number].momenta.numpy(), atol=1e-7)
        kinetic = ts.calc_kinetic_energy(masses=state[number].masses, momenta=state[number].momenta)
        assert atoms.get_kinetic_energy() == pytest.approx(float(kinetic), rel=1e-6)


def test_an_element_that_was_never_fitted_halts_its_replica_at_once():
    model = of_embedded("embedded:orb-direct")
    monitor = ReplicaMonitor(model, halt=1e6)
    with pytest.warns(UQWarning, match="fitted without N"):
        run(monitor, model, [molecule("CH4"), molecule("NH3")], n_steps=3, temperature=10)
    assert [(replica.halted, replica.step) for replica in monitor.replicas] == [(False, 3), (True, 0)]
    assert monitor.replicas[1].reading == np.inf


def test_a_replica_that_blows_up_does_not_take_the_others_with_it(model: UncertainModel):
    begin, move = ts.INTEGRATOR_REGISTRY[ts.Integrator.nve]
    steps = []

    def blowing_up(state: Any, **options: Any) -> Any:
        steps.append(state.positions.clone())
        if len(steps) == 3:
            state.momenta = torch.where((state.system_idx == 1)[:, None], torch.nan, state.momenta)
        return move(state=state, **options)

    monitor = ReplicaMonitor(model, halt=1e3)
    final = run(monitor, model, copies(3), (begin, blowing_up), 6, temperature=50)
    assert [(replica.halted, replica.step) for replica in monitor.replicas] == [(False, 6), (True, 3), (False, 6)]
    assert "positions or cell are no longer finite at step 3" in monitor.replicas[1].reason
    own = final.system_idx == 1
    assert torch.equal(final.positions[own], steps[2][own])
    without = run(None, model, copies(3), n_steps=6, temperature=50)
    torch.testing.assert_close(final.positions[~own], without.positions[~own], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["nan", "error"])
def test_a_replica_that_cannot_be_evaluated_halts_alone(kind: str, model: UncertainModel, monkeypatch):
    backend = type(model.predictor.backend)
    real = backend._forward

    def forward(self, batch, forces: bool, gradients: bool):
        found = real(self, batch, forces, gradients)
        if any(np.ptp(atoms.positions) < 0.1 for atoms in batch.frames):
            if kind == "error":
                raise ValueError("too dense")
            found = replace(found, energy=found.energy * np.nan, forces=found.forces * np.nan)
            found = replace(found, features=found.features * np.nan)
        return found

    monkeypatch.setattr(backend, "_forward", forward)
    systems = copies(3)
    systems[1].positions *= 0.001
    monitor = ReplicaMonitor(model, halt=1e3)
    final = run(monitor, model, systems, n_steps=3, temperature=50)
    assert [(replica.halted, replica.step) for replica in monitor.replicas] == [(False, 3), (True, 0), (False, 3)]
    if kind == "error":
        wanted = "the potential cannot evaluate it (ValueError: too dense) at step 0"
        assert monitor.replicas[1].reason == wanted
    own = final.system_idx == 1
    without = run(None, model, [systems[0], copies(3)[1], systems[2]], n_steps=3, temperature=50)
    torch.testing.assert_close(final.positions[~own], without.positions[~own], rtol=1e-9, atol=1e-9)


def test_batches_of_an_autobatcher_halt_the_same_replicas(model: UncertainModel, unwatched: Any):
    readings, history = unwatched
    level = level_between(readings)
    # Momenta of the first step of the unwatched run: each batch would draw its own.
    first = state_of(history[0], model)
    momenta = ts.nve_init(state_of(copies(), model), model, kT=torch.tensor(KELVIN) * units.kB).momenta
    starts = ts.integrators.MDState.from_state(
        first, momenta=momenta, energy=first.positions.new_zeros(8), forces=torch.zeros_like(momenta)
    )
    batcher = ts.BinningAutoBatcher(model, memory_scales_with="n_atoms", max_memory_scaler=16)
    monitor = ReplicaMonitor(model, halt=level)
    final = monitor.integrate(
        starts,
        integrator=ts.Integrator.nve,
        n_steps=N_STEPS,
        temperature=KELVIN,
        timestep=STEP,
        autobatcher=batcher,
    )
    assert len(batcher.index_bins) > 2
    for replica, atoms in zip(monitor.replicas, final.to_atoms(), strict=True):
        above = readings[:, replica.number] >= level
        assert (replica.halted, replica.step) == (above.any(), int(np.argmax(above)) if above.any() else N_STEPS)
        np.testing.assert_allclose(atoms.positions, history[replica.step][replica.number].positions, atol=1e-6)


def test_a_reporter_writes_each_replica_up_to_its_halt(model: UncertainModel, unwatched: Any, tmp_path: Path):
    readings, _ = unwatched
    files = [tmp_path / f"{number}.h5" for number in range(len(KELVIN))]
    reporter = ts.TrajectoryReporter(
        files, state_frequency=1, prop_calculators={1: {"gamma": lambda state: state.gamma[None]}}
    )
    monitor = ReplicaMonitor(model, halt=level_between(readings))
    run(monitor, model, copies(), trajectory_reporter=reporter)
    assert {replica.halted for replica in monitor.replicas} == {True, False}
    for replica, file in zip(monitor.replicas, files, strict=True):
        with ts.TorchSimTrajectory(file, mode="r") as trajectory:
            assert trajectory.last_step == replica.step
            assert len(trajectory.get_array("positions")) == replica.step + 1
            assert len(trajectory.get_array("gamma")) == replica.step + 1
    assert not {"report", "report_final_frame"} & set(vars(reporter))


def test_a_run_goes_on_from_its_final_state(model: UncertainModel, unwatched: Any):
    readings, _ = unwatched
    level = level_between(readings)
    monitor = ReplicaMonitor(model, halt=level)
    state = run(monitor, model, copies())
    halted = [replica.halted for replica in monitor.replicas]
    assert not state.has_extras("replica")
    monitor.integrate(state, integrator=ts.Integrator.nve, n_steps=2, temperature=300, timestep=STEP)
    assert [replica.halted and replica.step == 0 for replica in monitor.replicas] == halted
    others = state[[number for number, stopped in enumerate(halted) if not stopped]]
    monitor = ReplicaMonitor(model, halt=10 * level)
    monitor.integrate(others, integrator=ts.Integrator.nve, n_steps=2, temperature=300, timestep=STEP)
    assert [(replica.halted, replica.step) for replica in monitor.replicas] == [(False, 2)] * (8 - sum(halted))


# ---------------------------------------------------------------- relaxations


@pytest.mark.filterwarnings("ignore:All systems have reached the maximum number of steps:UserWarning")
@pytest.mark.parametrize("filtered", [False, True], ids=["positions", "cell"])
@pytest.mark.parametrize("optimizer", list(ts.Optimizer))
def test_in_a_relaxation_only_the_uncertain_replica_stops(
    model: UncertainModel, optimizer: ts.Optimizer, filtered: bool
):
    frames, level = crystals_with_a_bad_one(model)
    first: dict[str, Any] = {"step_size": 0.02} if optimizer == ts.Optimizer.lbfgs else {}
    if filtered:
        first["cell_filter"] = ts.CellFilter.frechet
    options: dict[str, Any] = {"max_steps": 12, "init_kwargs": first}
    without = ts.optimize(state_of(frames, model), model, optimizer=optimizer, **options)
    monitor = ReplicaMonitor(model, halt=level)
    final = monitor.optimize(state_of(frames, model), optimizer=optimizer, **options)
    assert [replica.halted for replica in monitor.replicas] == [False, False, True, False]
    assert monitor.replicas[2].step == 0
    assert monitor.replicas[2].time_fs is None
    own = final.system_idx == 2
    assert torch.equal(final.positions[own], state_of(frames, model).positions[own])
    torch.testing.assert_close(final.positions[~own], without.positions[~own], rtol=1e-7, atol=1e-7)
    assert not torch.equal(final.positions[own], without.positions[own])


def test_a_halted_replica_makes_room_for_the_next(mace: UncertainModel, tmp_path: Path):
    model, (frames, level) = mace, with_a_bad_one(mace)
    files = [tmp_path / f"{number}.h5" for number in range(4)]
    batcher = ts.InFlightAutoBatcher(model, memory_scales_with="n_atoms", max_memory_scaler=20)
    monitor = ReplicaMonitor(model, halt=level)
    final = monitor.optimize(
        frames,
        optimizer=ts.Optimizer.fire,
        convergence_fn=ts.generate_force_convergence_fn(0.1),
        max_steps=300,
        autobatcher=batcher,
        trajectory_reporter=ts.TrajectoryReporter(files, state_frequency=1),
    )
    assert [replica.halted for replica in monitor.replicas] == [False, False, True, False]
    ends = np.cumsum([len(atoms) for atoms in frames])
    for number, atoms in enumerate(final.to_atoms()):
        np.testing.assert_array_equal(atoms.numbers, frames[number].numbers)
        force = final.forces[ends[number] - len(atoms) : ends[number]].norm(dim=1).max()
        assert (force < 0.1) == (number != 2)
    # Of five steps each: the halted one leaves at the first occasion, the others when they have converged.
    swaps = [max(1, replica.step // 5) for replica in monitor.replicas]
    assert list(batcher.iteration_count) == swaps
    for file, replica in zip(files, monitor.replicas, strict=True):
        with ts.TorchSimTrajectory(file, mode="r") as trajectory:
            assert trajectory.last_step == replica.step


# ---------------------------------------------------------------- bad input


def test_a_patience_in_a_relaxation_is_refused(model: UncertainModel):
    monitor = ReplicaMonitor(model, halt=0.5, patience=10)
    with pytest.raises(ValueError, match="waits for simulated time in fs, and an optimiser has none"):
        monitor.optimize(copies(1), optimizer=ts.Optimizer.fire)


def test_a_policy_and_fields_are_refused(model: UncertainModel):
    with pytest.raises(TypeError, match="a policy and flag were given"):
        ReplicaMonitor(model, policy=WatchPolicy(halt=0.5), flag=0.3)


def test_nothing_to_watch_for_is_refused(model: UncertainModel):
    with pytest.raises(ValueError, match="nothing to watch for"):
        ReplicaMonitor(model)


def test_levels_in_the_wrong_order_are_refused_before_the_first_forward_pass(model: UncertainModel):
    monitor = ReplicaMonitor(model, flag=Threshold(2.0), halt=1.0)
    with pytest.raises(ValueError, match="Give a flag below the halt"):
        run(monitor, model, copies(1), n_steps=1, temperature=10)


def test_a_replica_without_an_atom_to_look_at_is_refused(model: UncertainModel):
    monitor = ReplicaMonitor(model, halt=1.0, elements="O")
    with pytest.raises(ValueError, match=r"no atom of CH4 is looked at with elements=\['O'\]"):
        run(monitor, model, [molecule("H2O"), molecule("CH4")], n_steps=1, temperature=10)


def test_a_reporter_that_is_a_dictionary_is_refused(model: UncertainModel):
    reporter: Any = {"filenames": ["a.h5"]}
    with pytest.raises(TypeError, match=r"trajectory_reporter is a dict; a ts.TrajectoryReporter was expected"):
        run(ReplicaMonitor(model, halt=1.0), model, copies(1), trajectory_reporter=reporter)


@pytest.mark.parametrize("wrong", ["leapfrog", (ts.nve_init,), None])
def test_what_is_no_integrator_or_optimizer_is_refused(model: UncertainModel, wrong: Any):
    monitor = ReplicaMonitor(model, halt=1.0)
    with pytest.raises(TypeError, match=r"is not an integrator\. Give one of nve, nvt_vrescale"):
        run(monitor, model, copies(1), wrong)
    with pytest.raises(TypeError, match=r"is not an optimizer\. Give one of gradient_descent, fire"):
        monitor.optimize(copies(1), optimizer=wrong)


def test_frames_that_cannot_be_written_are_refused_at_once(model: UncertainModel, tmp_path: Path):
    with pytest.raises(ValueError, match="cannot be written"):
        ReplicaMonitor(model, halt=1.0, frames=tmp_path / "nowhere" / "flagged.xyz")


class TestConstraints:
    """TorchSim drops those of ASE when it makes a state."""

    def frames(self, *constraints: Any) -> list[Atoms]:
        frames = copies(3)
        for atoms, constraint in zip(frames, constraints, strict=True):
            atoms.set_constraint(constraint)
        return frames

    def test_fixed_atoms_stay(self, model: UncertainModel):
        frames = self.frames(FixAtoms([0, -1]), [], [FixAtoms([1]), FixAtoms([1])])
        final = ReplicaMonitor(model, halt=1e9).integrate(
            frames,
            integrator=ts.Integrator.nvt_langevin,
            n_steps=5,
            temperature=300,
            timestep=STEP,
        )
        for number, (before, after) in enumerate(zip(frames, final.to_atoms(), strict=True)):
            moved = np.abs(after.positions - before.positions).max(1) > 0
            still = {0: [0, len(before) - 1], 1: [], 2: [1]}[number]
            assert np.nonzero(~moved)[0].tolist() == still

    @pytest.mark.filterwarnings("ignore:All systems have reached the maximum:UserWarning")
    def test_fixed_atoms_stay_in_a_relaxation(self, model: UncertainModel):
        (atoms, *_) = self.frames(FixAtoms([0]), [], [])
        atoms.rattle(0.1, seed=1)
        final = ReplicaMonitor(model, halt=1e9).optimize(atoms, optimizer=ts.Optimizer.fire, max_steps=5)
        moved = np.abs(final.positions.numpy() - atoms.positions).max(1) > 0
        assert np.nonzero(~moved)[0].tolist() == [0]

    def test_other_constraints_are_told(self, model: UncertainModel):
        frames = self.frames(FixBondLength(0, 1), [FixAtoms([0]), FixedPlane(1, [0, 0, 1])], [])
        with pytest.warns(UQWarning, match=r"TorchSim has no constraints FixBondLengths, FixedPlane: .* run in ASE\."):
            ReplicaMonitor(model, halt=1e9).integrate(
                frames, integrator=ts.Integrator.nve, n_steps=1, temperature=300, timestep=STEP
            )

    def test_a_state_keeps_its_own(self, model: UncertainModel):
        state = state_of(copies(2), model)
        state.constraints = [ts.constraints.FixAtoms(atom_idx=[0])]
        final = ReplicaMonitor(model, halt=1e9).integrate(
            state, integrator=ts.Integrator.nve, n_steps=3, temperature=300, timestep=STEP
        )
        assert torch.equal(final.positions[0], state.positions[0])


@pytest.mark.parametrize(("quantity", "unit"), [("gamma", ""), ("energy", "eV")])
def test_each_quantity_halts_replicas(model: UncertainModel, quantity: str, unit: str):
    monitor = ReplicaMonitor(model, quantity=quantity, halt=1e-9)
    run(monitor, model, copies(2), n_steps=2, temperature=10)
    assert all(replica.halted and replica.step == 0 for replica in monitor.replicas)
    assert f"reached halt at 1e-09 {unit}".rstrip() in monitor.replicas[0].reason
    monitor = ReplicaMonitor(model, quantity=quantity, halt=1e9)
    run(monitor, model, copies(2), n_steps=2, temperature=10)
    assert not any(replica.halted for replica in monitor.replicas)


def test_a_quantity_that_a_replica_does_not_have_is_refused(model: UncertainModel):
    def watch() -> None:
        run(ReplicaMonitor(model, quantity="stress", halt=1.0), model, [molecule("H2O")], n_steps=1, temperature=10)

    with pytest.raises(ValueError, match="stress_uncertainty"):
        watch()
