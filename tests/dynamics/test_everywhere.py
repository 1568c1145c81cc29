"""Everywhere ASE moves atoms: halted at the right step, gone on from there, at no cost, and with no atom moved."""

import io
import itertools

import numpy as np
import pytest
from ase import Atoms, units
from ase.calculators.emt import EMT
from ase.calculators.singlepoint import SinglePointCalculator
from ase.constraints import FixAtoms, FixBondLengths, FixedPlane
from ase.filters import ExpCellFilter, FrechetCellFilter, StrainFilter, UnitCellFilter
from ase.md.andersen import Andersen
from ase.md.bussi import Bussi
from ase.md.contour_exploration import ContourExploration
from ase.md.langevin import Langevin
from ase.md.langevinbaoab import LangevinBAOAB
from ase.md.melchionna import MelchionnaNPT
from ase.md.nose_hoover_chain import MTKNPT, IsotropicMTKNPT, MaskedMTKNPT, NoseHooverChainNVT
from ase.md.nptberendsen import Inhomogeneous_NPTBerendsen, NPTBerendsen
from ase.md.nvtberendsen import NVTBerendsen
from ase.md.switch_langevin import SwitchLangevin
from ase.md.verlet import VelocityVerlet
from ase.mep import NEB, AutoNEB, DyNEB
from ase.mep.dimer import DimerControl, MinModeAtoms, MinModeTranslate
from ase.mep.neb import NEBOptimizer
from ase.optimize import (
    BFGS,
    FIRE,
    FIRE2,
    LBFGS,
    RFO,
    BFGSLineSearch,
    CellAwareBFGS,
    GoodOldQuasiNewton,
    GPMin,
    LBFGSLineSearch,
    MDMin,
    ODE12r,
    QuasiNewton,
)
from ase.optimize.basin import BasinHopping
from ase.optimize.precon import Exp, PreconFIRE, PreconLBFGS
from ase.units import fs

from ase_uq.dynamics import Bonds, Halt, MaxTemperature, UncertaintyMonitor, WatchedCalculator
from ase_uq.dynamics.relaxation import relax
from ase_uq.dynamics.restart import Restart
from ase_uq.dynamics.run import run_md
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import read_frames
from tests.dynamics.builders import Remembering, Uncertain, crystal, hop

LABELS = {
    "energy": ("info", -450.0),
    "free_energy": ("info", -450.0),
    "stress": ("info", np.full(6, 7.0)),
    "forces": ("arrays", np.full((4, 3), 7.0)),
    "energies": ("arrays", np.full(4, 7.0)),
}
PRESSURE = {"temperature_K": 600, "pressure_au": 0.0}


def rng():
    return np.random.default_rng(1)


def upright(atoms):
    """MelchionnaNPT wants an upper triangular cell."""
    atoms.set_cell(np.diag(atoms.cell.lengths()), scale_atoms=True)
    return atoms


MD = {
    "VelocityVerlet": lambda a: VelocityVerlet(a, fs),
    "Langevin": lambda a: Langevin(a, fs, temperature_K=600, friction=0.01 / fs, fixcm=False, rng=rng()),
    "LangevinBAOAB": lambda a: LangevinBAOAB(a, fs, temperature_K=600, T_tau=50 * fs, rng=rng()),
    "LangevinBAOAB NPT": lambda a: LangevinBAOAB(
        a, fs, temperature_K=600, externalstress=0.0, T_tau=50 * fs, P_tau=200 * fs, rng=rng()
    ),
    "Bussi": lambda a: Bussi(a, fs, temperature_K=600, taut=50 * fs, rng=np.random.RandomState(1)),
    "NoseHooverChainNVT": lambda a: NoseHooverChainNVT(a, fs, temperature_K=600, tdamp=50 * fs),
    "NVTBerendsen": lambda a: NVTBerendsen(a, fs, temperature_K=600, taut=50 * fs),
    "Andersen": lambda a: Andersen(a, fs, temperature_K=600, andersen_prob=0.05, rng=np.random.RandomState(1)),
    "NPTBerendsen": lambda a: NPTBerendsen(a, fs, **PRESSURE, compressibility_au=1.0),
    "Inhomogeneous_NPTBerendsen": lambda a: Inhomogeneous_NPTBerendsen(a, fs, **PRESSURE, compressibility_au=1.0),
    "IsotropicMTKNPT": lambda a: IsotropicMTKNPT(a, fs, **PRESSURE, tdamp=50 * fs, pdamp=200 * fs),
    "MTKNPT": lambda a: MTKNPT(a, fs, **PRESSURE, tdamp=50 * fs, pdamp=200 * fs),
    "MaskedMTKNPT": lambda a: MaskedMTKNPT(a, fs, **PRESSURE, tdamp=50 * fs, pdamp=200 * fs, mask=(True, True, False)),
    "MelchionnaNPT": lambda a: MelchionnaNPT(
        upright(a), fs, temperature_K=600, externalstress=0.0, ttime=50 * fs, pfactor=100.0
    ),
}
CONSTRAINTS = {
    "free": lambda: [],
    "FixAtoms": lambda: [FixAtoms([0])],
    "FixBondLengths": lambda: [FixBondLengths([[0, 1]])],
}
# Those that ASE itself lets run with a constraint.
CONSTRAINED = ["VelocityVerlet", "Langevin", "Bussi", "NVTBerendsen", "Andersen", "NPTBerendsen"]
ENSEMBLES = [(name, "free") for name in MD] + list(itertools.product(CONSTRAINED, ["FixAtoms", "FixBondLengths"]))

OPTIMISERS = {
    "BFGS": lambda a: BFGS(a, logfile=None),
    "LBFGS": lambda a: LBFGS(a, logfile=None),
    "FIRE": lambda a: FIRE(a, logfile=None),
    "FIRE2": lambda a: FIRE2(a, logfile=None),
    "MDMin": lambda a: MDMin(a, logfile=None),
    "RFO": lambda a: RFO(a, logfile=None),
    "QuasiNewton": lambda a: QuasiNewton(a, logfile=None),
    "BFGSLineSearch": lambda a: BFGSLineSearch(a, logfile=None),
    "LBFGSLineSearch": lambda a: LBFGSLineSearch(a, logfile=None),
    "GoodOldQuasiNewton": lambda a: GoodOldQuasiNewton(a, logfile=None),
    "GPMin": lambda a: GPMin(a, logfile=None),
    "ODE12r": lambda a: ODE12r(a, logfile=None),
    "PreconLBFGS": lambda a: PreconLBFGS(a, precon=Exp(A=3, mu=1.0), logfile=None),
    "PreconFIRE": lambda a: PreconFIRE(a, precon=Exp(A=3, mu=1.0), logfile=None),
    "FrechetCellFilter": lambda a: BFGS(FrechetCellFilter(a), logfile=None),
    "UnitCellFilter": lambda a: FIRE(UnitCellFilter(a), logfile=None),
    "ExpCellFilter": lambda a: LBFGS(ExpCellFilter(a), logfile=None),
    "StrainFilter": lambda a: BFGS(StrainFilter(a), logfile=None),
    "CellAwareBFGS": lambda a: CellAwareBFGS(FrechetCellFilter(a, exp_cell_factor=1.0), logfile=None),
}


def strained():
    """Away from its minimum in every way; σ grows from where it began, so it is larger at every step."""
    atoms = crystal()
    atoms.set_momenta(None)
    atoms.rattle(0.15, seed=1)
    atoms.set_cell(atoms.cell * 1.03, scale_atoms=True)
    atoms.calc = Uncertain(atoms)
    return atoms


def run(dynamics, steps):
    # A force limit of zero is never reached, so optimisers make all their steps too.
    return dynamics.run(fmax=0.0, steps=steps) if hasattr(dynamics, "fmax") else dynamics.run(steps)


def attached(dynamics, **options):
    monitor = UncertaintyMonitor(dynamics, **options)
    dynamics.attach(monitor)
    return monitor


def outcome(atoms, dynamics):
    return atoms.calc.n_calls, dynamics.nsteps, atoms.positions, atoms.cell.array, atoms.get_velocities()


def readings_of(make, steps, noise):
    """What every step of a run reads, and how the run ends, without and with a monitor."""
    ends, readings = [], []
    for watched in (False, True):
        atoms, dynamics = make()
        if watched:
            attached(dynamics, flag=1e-12, on_flag=lambda event: readings.append((event.step, event.reading)))
        run(dynamics, steps)
        ends.append(outcome(atoms, dynamics))
    for bare, watched in zip(*ends, strict=True):
        np.testing.assert_allclose(bare, watched, rtol=0, atol=noise)
    return dict(readings)


def check_halts(make, halts_at=4, steps=8, noise=0.0):
    """Halts at the first step that reaches what a step in the middle reads, both ways, and goes on to the end."""
    readings = readings_of(make, steps, noise)
    halt = readings[halts_at] - noise
    first = min(step for step, reading in readings.items() if reading >= halt)
    assert first > 0
    for mode in ("raise", "stop"):
        _, dynamics = make()
        monitor = attached(dynamics, halt=halt, on_halt=Halt(mode=mode))
        if mode == "raise":
            with pytest.raises(UncertaintyHalt, match=f"halted at step {first}"):
                run(dynamics, steps)
        else:
            run(dynamics, steps)
        assert (dynamics.nsteps, monitor.last.step, monitor.n_halted) == (first, first, 1)
        dynamics.observers.clear()
        run(dynamics, 3)
        assert dynamics.nsteps == first + 3


# --- one structure ---------------------------------------------------------------------------------


@pytest.mark.parametrize(("ensemble", "constraint"), ENSEMBLES)
@pytest.mark.filterwarnings("ignore:Using heuristic P_mass:UserWarning")
def test_every_ensemble_halts_at_the_right_step_and_goes_on(ensemble, constraint):
    def make():
        atoms = crystal()
        atoms.set_constraint(CONSTRAINTS[constraint]())
        atoms.set_momenta(0.2 * atoms.get_momenta())
        return atoms, MD[ensemble](atoms)

    check_halts(make)


def test_a_run_of_a_whole_ensemble_ends_where_the_unwatched_one_does_after_a_halt():
    # The thermostat's noise and chains must not notice that they were halted and resumed.
    for ensemble in ("Langevin", "NoseHooverChainNVT", "MTKNPT", "Bussi"):
        ends = []
        for watched in (False, True):
            atoms = crystal()
            dynamics = MD[ensemble](atoms)
            if watched:
                monitor = attached(dynamics, halt=0.01, on_halt=Halt(mode="stop"))
                while dynamics.nsteps < 12:
                    dynamics.run(12 - dynamics.nsteps)
                assert monitor.n_halted > 3
            else:
                dynamics.run(12)
            ends.append(outcome(atoms, dynamics))
        for bare, watched in zip(*ends, strict=True):
            np.testing.assert_array_equal(bare, watched)


def test_switching_potentials_raises_since_its_loop_cannot_be_told_to_stop():
    atoms = crystal()
    dynamics = SwitchLangevin(
        atoms, EMT(), EMT(), fs, temperature_K=600, friction=0.01 / fs, n_eq=5, n_switch=5, fixcm=False, rng=rng()
    )
    # The mixture of two calculators shows what both have, which is no uncertainty of ours: checks alone watch it.
    attached(dynamics, checks=MaxTemperature(100), on_halt=Halt(mode="stop"))
    with pytest.raises(UncertaintyHalt, match=r"halted at step 1 \(1 fs\): MaxTemperature: temperature is .* K"):
        dynamics.run()
    assert dynamics.nsteps == 1


def test_contour_exploration_is_watched_like_an_optimiser():
    def make():
        atoms = strained()
        atoms.get_potential_energy()
        return atoms, ContourExploration(atoms, maxstep=0.05, rng=np.random.RandomState(1))

    check_halts(make)


@pytest.mark.parametrize("optimiser", OPTIMISERS)
@pytest.mark.filterwarnings("ignore:Use FrechetCellFilter:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:.*precon:UserWarning")
def test_every_optimiser_halts_at_the_right_step_and_goes_on(optimiser):
    def make():
        atoms = strained()
        return atoms, OPTIMISERS[optimiser](atoms)

    # RFO does not repeat itself to the last bit, watched or not.
    check_halts(make, halts_at=3, steps=6, noise=1e-11 if optimiser == "RFO" else 0.0)


@pytest.mark.parametrize("constraint", [FixAtoms([0]), FixedPlane(1, [0, 0, 1]), FixBondLengths([[0, 1]])])
def test_constraints_are_no_obstacle_to_a_relaxation(constraint):
    def make():
        atoms = strained()
        atoms.set_constraint(constraint)
        return atoms, FIRE(atoms, logfile=None)

    check_halts(make, halts_at=3)


def test_atoms_wrapped_before_the_monitor_sees_them_cost_no_call():
    calls = []
    for watched in (False, True):
        atoms = crystal()
        dynamics = VelocityVerlet(atoms, fs)
        dynamics.attach(atoms.wrap)
        if watched:
            monitor = attached(dynamics, flag=1e-12)
        dynamics.run(20)
        calls.append(atoms.calc.n_calls)
    assert calls[0] == calls[1]
    assert monitor.n_flagged > 15


# --- paths -----------------------------------------------------------------------------------------


def path(shared, cls=NEB, ends=True, **options):
    """A band; σ is zero at the first image's positions, so it is largest for the last."""
    images = hop()
    calculator = Remembering(images[0])
    for image in images[1:-1]:
        image.calc = calculator if shared else Uncertain(images[0])
    for end in (images[0], images[-1]):
        end.calc = Uncertain(images[0]) if ends else EMT()
        if not ends:
            end.calc = SinglePointCalculator(end, energy=end.get_potential_energy(), forces=end.get_forces())
    method = options.pop("method", "improvedtangent")
    return cls(images, method=method, allow_shared_calculator=shared, **options)


def n_calls(band):
    return sum(calc.n_calls for calc in {image.calc for image in band.images} if isinstance(calc, Uncertain))


BANDS = {
    "NEB": lambda shared: path(shared),
    "climbing": lambda shared: path(shared, climb=True),
    "ends without uncertainty": lambda shared: path(shared, ends=False),
    "DyNEB": lambda shared: path(shared, DyNEB, fmax=0.05),
    "string": lambda shared: path(shared, method="string"),
    "aseneb": lambda shared: path(shared, method="aseneb"),
}
NEB_OPTIMISERS = {
    "BFGS": lambda band: BFGS(band, logfile=None),
    "FIRE": lambda band: FIRE(band, logfile=None),
    "NEBOptimizer ode": lambda band: NEBOptimizer(band, logfile=None),
    "NEBOptimizer static": lambda band: NEBOptimizer(band, method="static", logfile=None),
}


@pytest.mark.parametrize("shared", [False, True], ids=["own calculators", "a shared one"])
@pytest.mark.parametrize("make", BANDS.values(), ids=BANDS)
def test_watching_a_band_costs_no_call_and_moves_no_atom(make, shared, tmp_path):
    ends = []
    for watched in (False, True):
        band = make(shared)
        dynamics = BFGS(band, logfile=None)
        if watched:
            monitor = attached(dynamics, flag=1e-9, frames=tmp_path / "a.xyz", before=2, checks=[Bonds()])
        dynamics.run(fmax=0.0, steps=4)
        ends.append((n_calls(band), np.array([image.positions for image in band.images])))
    assert monitor.n_flagged == 5
    for bare, watched in zip(*ends, strict=True):
        np.testing.assert_array_equal(bare, watched)


@pytest.mark.parametrize("shared", [False, True], ids=["own calculators", "a shared one"])
@pytest.mark.parametrize("mode", ["raise", "stop"])
@pytest.mark.parametrize("optimiser", NEB_OPTIMISERS.values(), ids=NEB_OPTIMISERS)
def test_a_band_halts_at_the_worst_of_its_images_and_goes_on(optimiser, mode, shared, tmp_path):
    band = path(shared)
    dynamics = optimiser(band)
    # Of the images that move, the last is farthest from the first.
    attached(dynamics, flag=1e-9, halt=3.0, frames=tmp_path / "a.xyz")
    run(dynamics, 3)
    assert {frame.info["flag_image"] for frame in read_frames(tmp_path / "a.xyz")} == {3}
    for frame in read_frames(tmp_path / "a.xyz"):
        far = np.linalg.norm(frame.positions - band.images[0].positions, axis=1).max()
        assert frame.info["flag_reading"] == pytest.approx(far, abs=1e-6)  # σ is the distance
        np.testing.assert_allclose(
            frame.calc.results["forces_uncertainty"][-1], np.abs(frame.positions - hop()[0].positions)[-1], atol=1e-6
        )

    # The middle image becomes one of which nothing is known.
    before = dynamics.nsteps
    if shared:
        band.images[2].calc.memory.clear()
        band.images[2].calc.gamma = np.where(np.arange(len(band.images[2])) == 2, np.inf, 1.0)
    else:
        band.images[2].calc.gamma[2] = np.inf
    dynamics.observers.clear()
    monitor = attached(dynamics, halt=1e6, on_halt=Halt(mode=mode))
    raises = mode == "raise" or getattr(dynamics, "method", "") == "static"
    if raises:
        with pytest.raises(UncertaintyHalt, match=r"image \d: force uncertainty \(max\) inf.*worst atom 2 \(Al, inf"):
            run(dynamics, 3)
    else:
        assert not run(dynamics, 3)
    assert monitor.n_halted == 1
    assert monitor.last.image == (1 if shared else 2)
    assert dynamics.nsteps - before <= 1
    dynamics.observers.clear()
    run(dynamics, 3)
    assert dynamics.nsteps > before + 1


def test_a_calculator_without_memory_cannot_be_shared_and_is_not_called_again():
    calls = []
    for watched in (False, True):
        images = hop()
        calculator = Uncertain(images[0])
        for image in images:
            image.calc = calculator
        dynamics = BFGS(NEB(images, method="improvedtangent", allow_shared_calculator=True), logfile=None)
        if watched:
            attached(dynamics, halt=100.0)
            error, message = ValueError, r"no longer has the results of image 1 at step 0: other structures share it"
        else:
            dynamics.attach(lambda: 1 / 0)
            error, message = ZeroDivisionError, "division by zero"
        with pytest.raises(error, match=message):
            dynamics.run(fmax=0.0, steps=3)
        calls.append(calculator.n_calls)
    assert calls[0] == calls[1] > 0


def test_an_image_without_uncertainties_is_refused():
    band = path(False)
    band.images[2].calc = EMT()
    with pytest.raises(ValueError, match=r"EMT gives no forces_uncertainty"):
        UncertaintyMonitor(BFGS(band, logfile=None), halt=1.0)
    band.images[2].calc = None
    with pytest.raises(ValueError, match=r"the structure has no calculator"):
        UncertaintyMonitor(BFGS(band, logfile=None), halt=1.0)


def test_checks_remember_each_image_of_a_band():
    band = path(False)
    dynamics = BFGS(band, logfile=None)
    monitor = attached(dynamics, checks=[Bonds()])
    dynamics.run(fmax=0.0, steps=1)
    band.images[3].positions[-1, 2] += 3
    with pytest.raises(UncertaintyHalt, match=r"image 3: Bonds: bond of .* is broken"):
        dynamics.run(fmax=0.0, steps=2)
    assert monitor.last.image == 3


@pytest.mark.filterwarnings("ignore:The default method has changed:UserWarning")
@pytest.mark.filterwarnings("ignore:FixAtoms:UserWarning")
def test_a_growing_band_is_watched_where_its_optimisers_are_made(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    images = hop(2)
    monitors = []
    for number, end in enumerate(images):
        end.calc = EMT()
        end.get_potential_energy()
        end.write(f"path{number:03d}.traj")

    def give(moving):
        for image in moving:
            image.calc = Uncertain(images[0])

    def watched(band, **options):
        optimiser = FIRE(band, **options)
        monitors.append(attached(optimiser, flag=1e-9))
        return optimiser

    AutoNEB(
        give, "path", n_simul=1, n_max=4, fmax=0.5, maxsteps=3, climb=False, optimizer=watched, parallel=False,
        method="improvedtangent", interpolate_method="linear",
    ).run()  # fmt: skip
    assert len(monitors) >= 2
    assert all(monitor.n_flagged for monitor in monitors)


# --- dimer, basin hopping --------------------------------------------------------------------------


def dimer(calculator):
    atoms = hop()[1]
    atoms.calc = calculator(atoms)
    # With None for a file it would open one and leave it so.
    files = {"logfile": io.StringIO(), "eigenmode_logfile": io.StringIO()}
    modes = {"initial_eigenmode_method": "displacement", "displacement_method": "vector"}
    control = DimerControl(**modes, mask=[False] * 8 + [True], **files)
    searched = MinModeAtoms(atoms, control, random_seed=1)
    searched.displace(displacement_vector=np.array([[0.0, 0, 0]] * 8 + [[0.05, 0.02, 0.02]]))
    return atoms, MinModeTranslate(searched, logfile=None)


def test_a_dimer_is_judged_at_its_centre():
    def make():
        return dimer(Remembering)

    check_halts(make, halts_at=3, steps=6)


def test_a_dimer_needs_a_calculator_that_remembers_its_centre():
    _, dynamics = dimer(Uncertain)
    attached(dynamics, halt=1e6)
    with pytest.raises(ValueError, match=r"Uncertain no longer has the results of the structure at step 0"):
        dynamics.run(fmax=0.0, steps=2)


def hopping(**options):
    atoms = Atoms("Cu4", [[0, 0, 0], [2.6, 0, 0], [0, 2.6, 0], [0.4, 0.5, 2.9]])
    atoms.calc = Uncertain(atoms)
    np.random.seed(3)  # noqa: NPY002  (basin hopping takes its moves from there)
    names = {"logfile": None, "optimizer_logfile": None, "trajectory": None, "local_minima_trajectory": None}
    return atoms, BasinHopping(atoms, temperature=300 * units.kB, dr=0.5, fmax=0.3, **names, **options)


@pytest.mark.parametrize("mode", ["raise", "stop"])
def test_basin_hopping_halts_at_a_new_lowest_minimum_and_goes_on(mode):
    calls = []
    for watched in (False, True):
        atoms, dynamics = hopping()
        if watched:
            monitor = attached(dynamics, flag=1e-9)
        dynamics.run(6)
        calls.append(atoms.calc.n_calls)
    assert calls[0] == calls[1]
    assert monitor.n_flagged >= 2
    assert monitor.last.step == monitor.n_flagged - 1

    atoms, dynamics = hopping()
    monitor = attached(dynamics, halt=1e-9, on_halt=Halt(mode=mode))
    for step in (0, 1):
        # It has no count of its own that could be set to its end.
        with pytest.raises(UncertaintyHalt, match=rf"halted at step {step}"):
            dynamics.run(20)
    assert monitor.n_halted == 2


def test_the_relaxations_inside_basin_hopping_are_watched_where_they_are_made():
    monitors = []

    def watched(structure, **options):
        optimiser = FIRE(structure, **options)
        monitors.append(attached(optimiser, flag=1e-9))
        return optimiser

    _, dynamics = hopping(optimizer=watched)
    dynamics.run(3)
    assert len(monitors) >= 4
    assert all(monitor.last.step > 0 for monitor in monitors)


def _monitored(atoms, file):
    dynamics = VelocityVerlet(atoms, fs)
    dynamics.attach(UncertaintyMonitor(dynamics, flag=0.2, halt=0.5, frames=file, before=2))
    dynamics.run(5)


def _watched(atoms, file):
    atoms.calc = WatchedCalculator(atoms.calc, flag=0.2, halt=0.5, frames=file)
    for _ in range(5):
        atoms.rattle(0.01, rng=rng())
        atoms.get_forces()


def _written(atoms, file):
    dynamics = VelocityVerlet(atoms, fs)
    with Restart(file, 5) as restart:
        restart.begin(dynamics)
        assert run_md(dynamics, UncertaintyMonitor(dynamics, halt=0.5), 5, restart=restart, interval=1)
    raise UncertaintyHalt("", step=0, reading=0.0, threshold=0.0)


def _relaxed(atoms, file):
    atoms.rattle(0.05, rng=rng())
    assert relax(atoms, fmax=1e-4, halt=0.5, steps=5, trajectory=file).status == "uncertain"
    raise UncertaintyHalt("", step=0, reading=0.0, threshold=0.0)


@pytest.mark.parametrize("key", LABELS)
@pytest.mark.parametrize("run", [_monitored, _watched, _written, _relaxed])
def test_labels_by_the_names_of_results_end_no_run(tmp_path, run, key):
    """`labels_of` reads these names, so structures have them; the frames have the calculator's results instead."""
    store, value = LABELS[key]
    atoms = crystal([0.1, 0.3, 0.6])
    getattr(atoms, store)[key] = value
    with pytest.raises(UncertaintyHalt):
        run(atoms, tmp_path / "frames.xyz")
    frames = read_frames(tmp_path / "frames.xyz")
    assert len(frames) >= 2
    for frame in frames:
        assert key not in getattr(frame, store)
        assert key not in frame.calc.results or np.abs(frame.calc.results[key] - value).min() > 1e-3
    assert key in getattr(atoms, store)  # the running structure is the user's
