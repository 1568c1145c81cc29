"""Runs that go forward together: what each would do alone, in fewer evaluations."""

import threading
import time
import warnings

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.calculators.emt import EMT
from ase.optimize import BFGS

from ase_uq import UncertainCalculator, UncertaintyModel, fit
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.sampling.lockstep import Lockstep
from ase_uq.sampling.reference_runs import reference_runs
from ase_uq.testing.methods import labelled_frames

SHORT = {"temperature": 300, "n_runs": 5, "ps": 0.005, "timestep": 0.5, "equilibration": 0.002, "progress": False}


def emt(sizes):
    def evaluate(frames):
        sizes.append(len(frames))
        results = []
        for atoms in frames:
            calculator = EMT()
            calculator.calculate(atoms)
            results.append({key: np.copy(value)[()] for key, value in calculator.results.items()})
        return results

    return evaluate


def relaxation(atoms):
    def work():
        run = BFGS(atoms, logfile=None)
        run.run(0.02, 40)
        return run.nsteps

    return work


def test_works_that_end_at_different_times_do_what_each_does_alone():
    frames = [Atoms("N2", [(0, 0, 0), (0, 0, 1.1 + 0.1 * n)]) for n in range(4)]
    alone = []
    for atoms in frames:
        copy = atoms.copy()
        copy.calc = EMT()
        alone.append((relaxation(copy)(), copy.positions))
    sizes: list[int] = []
    lockstep = Lockstep(emt(sizes), 4)
    for number, atoms in enumerate(frames):
        atoms.calc = lockstep.calculator(number, EMT.implemented_properties)
    steps = lockstep.run([relaxation(atoms) for atoms in frames])
    assert steps == [n for n, _ in alone]
    for atoms, (_, positions) in zip(frames, alone, strict=True):
        np.testing.assert_allclose(atoms.positions, positions, atol=1e-12)
    assert sizes[0] == 4
    assert sum(sizes) == sum(steps) + 4
    assert len(sizes) == max(steps) + 1


@pytest.mark.parametrize("error", [KeyboardInterrupt(), InputError("no"), RuntimeError("no")])
@pytest.mark.parametrize("where", ["evaluation", "work"])
def test_an_error_ends_all_and_leaves_no_thread(error, where):
    before = threading.active_count()
    calls = []

    def evaluate(frames):
        calls.append(len(frames))
        if where == "evaluation" and len(calls) == 3:
            raise error
        return emt([])(frames)

    lockstep = Lockstep(evaluate, 3)
    frames = [molecule("N2") for _ in range(3)]

    def work(number):
        def moving():
            for step in range(100):
                frames[number].positions[0, 2] += 0.01
                frames[number].get_forces()
                if where == "work" and number == 1 and step == 2:
                    raise error

        return moving

    for number, atoms in enumerate(frames):
        atoms.calc = lockstep.calculator(number, EMT.implemented_properties)
    with pytest.raises(type(error)):
        lockstep.run([work(number) for number in range(3)])
    assert len(calls) <= 4
    time.sleep(0.05)
    assert threading.active_count() == before


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    train, held_out = labelled_frames(20, seed=1), labelled_frames(30, seed=2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # made-up labels may make the fit complain
        return fit(ToyCalculator(), train, held_out, methods=["bll"], progress=False)


@pytest.fixture
def start(model: UncertaintyModel) -> Atoms:
    atoms = molecule("CH3OH")
    atoms.calc = UncertainCalculator(ToyCalculator(), model)
    return atoms


def test_reference_runs_are_the_same_one_by_one_and_together(start, monkeypatch):
    sizes = []
    real = UncertainCalculator.results_of
    monkeypatch.setattr(UncertainCalculator, "results_of", lambda s, f: sizes.append(len(f)) or real(s, f))
    together = reference_runs(start, **SHORT)
    assert sizes == [5] * 15
    for n in (1, 2):
        monkeypatch.setattr(UncertainCalculator, "together", lambda *_, n=n: n)
        fewer = reference_runs(start, **SHORT)
        np.testing.assert_allclose(fewer.readings, together.readings, rtol=1e-8)
    assert len({tuple(run) for run in together.readings}) == 5


def test_an_interruption_keeps_the_groups_that_are_whole(start, monkeypatch):
    calls = []
    real = UncertainCalculator.results_of

    def interrupted(calculator, frames):
        calls.append(1)
        if len(calls) == 20:
            raise KeyboardInterrupt
        return real(calculator, frames)

    monkeypatch.setattr(UncertainCalculator, "together", lambda *_: 2)
    monkeypatch.setattr(UncertainCalculator, "results_of", interrupted)
    with pytest.warns(match="interrupted: 2 of 5 reference runs are complete and are kept"):
        assert len(reference_runs(start, **SHORT).readings) == 2


def test_how_long_it_takes_is_told_before_it_begins(start):
    told = []
    begin = time.perf_counter()
    reference_runs(start, **SHORT, announce=lambda *what: told.append((*what, time.perf_counter() - begin)))
    took = time.perf_counter() - begin
    (seconds, together, when) = told[0]
    assert len(told) == 1
    assert together == 5
    assert when < took
    assert 0.05 * took < seconds < 20 * took
