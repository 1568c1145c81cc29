"""Reference runs: the uncertainty in runs where the potential is trusted, so that false alarms can be counted."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Integral
from time import perf_counter
from typing import Any, Protocol, runtime_checkable

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.md.langevin import Langevin

from ase_uq.display.progress import progress_bar
from ase_uq.errors import UQWarning
from ase_uq.sampling.ensembles import langevin
from ase_uq.sampling.lockstep import Lockstep
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.sampling.reach import Reach
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.thresholds.reduction import Reduction, atom_norms

_KEY = "forces_uncertainty"


@runtime_checkable
class _Several(Protocol):
    """A calculator that evaluates several structures at once, as `UncertainCalculator` does."""

    implemented_properties: list[str]

    def together(self, n_atoms: int) -> int: ...

    def results_of(self, frames: list[Atoms]) -> Sequence[Mapping[str, Any]]: ...


def reference_runs(
    atoms: Atoms,
    *,
    temperature: float,
    n_runs: int = 20,
    ps: float = 5.0,
    timestep: float = 0.5,
    friction: float = 0.01,
    equilibration: float = 1.0,
    interval: int = 1,
    reduction: Reduction | None = None,
    before: ReferenceRuns | None = None,
    beyond: float = 0.2,
    seed: int = 0,
    progress: bool = True,
    announce: Callable[[float, int], object] | None = None,
) -> ReferenceRuns:
    """Makes independent Langevin runs under conditions in which the potential is trusted; no labels are needed.

        model = model.with_reference(reference_runs(atoms, temperature=300))
        model.threshold(FalseAlarms(per_run=0.05, ps=5))

    Each run starts at the structure with newly drawn momenta and is equilibrated before readings are taken. A threshold
    for false alarms is only as good as these runs are like the later ones: same system, temperature and ensemble.
    With an `UncertainCalculator`, several runs of a small structure are evaluated together.

    Args:
        atoms: Structure with an `UncertainCalculator`; it is not changed.
        temperature: Temperature of the runs, K.
        n_runs: Number of runs; 19 can guarantee 5 % false alarms for runs of their length, 9 can guarantee 10 %.
        ps: Length of each run after its equilibration, ps.
        timestep: Time step, fs.
        friction: Friction of the thermostat, 1/fs.
        equilibration: Length of the equilibration before each run, ps.
        interval: Steps between two readings; use the interval at which later runs are watched.
        reduction: How the atoms of a frame become a reading; by default the largest ε_i.
        before: Runs made earlier in the same way, to which these are added; none is repeated.
        beyond: Largest share of readings that may be beyond the calibration data: above the reading that 99 % of its
            frames stay below, or with an atom of gamma above 1. Those that frames like the calibration frames have are
            not counted. From 0.05 on a warning tells.
        seed: Seed of momenta and thermostat.
        progress: Whether to show a progress bar.
        announce: Function that is told, before the runs begin, how many seconds they take by a measurement, and how
            many are evaluated together.

    Raises:
        ValueError: A number is not positive, the calculator of the structure gives no uncertainties, the uncertainties
            of a run did not stay finite, or too many readings are beyond the calibration data.
    """
    _check_positive(temperature=temperature, n_runs=n_runs, ps=ps, timestep=timestep, interval=interval)
    _check_not_negative(friction=friction, equilibration=equilibration)
    _check_whole(n_runs=n_runs, interval=interval)
    if not 0 <= beyond <= 1:
        raise ValueError(f"beyond is a share of the readings of reference runs, between 0 and 1, not {beyond!r}.")
    if round(1000 * ps / timestep) < interval:
        raise ValueError(
            f"reference runs of {ps:g} ps are shorter than the {timestep * interval:g} fs from one reading to the "
            "next. Make them longer."
        )
    calculator = _calculator_of(atoms)
    reduction = reduction or Reduction()
    waiting, steps = round(1000 * equilibration / timestep), round(1000 * ps / timestep)
    conditions = f"{atoms.get_chemical_formula()}, Langevin {temperature:g} K"
    made = _made_before(before, timestep * interval, reduction, conditions)
    reach = Reach.of(calculator, atoms, reduction)
    for readings in made:
        reach.add(readings)
    numbers = range(len(made), len(made) + n_runs)
    together = min(n_runs, _together(calculator, len(atoms)))
    if announce is not None:
        announce(_seconds(atoms, together) * -(-n_runs // together) * (waiting + steps), together)

    def prepared(number: int, calculator: BaseCalculator) -> Langevin:
        rng = np.random.default_rng([seed, number])
        copy = atoms.copy()
        copy.calc = calculator
        set_thermal_momenta(copy, temperature, rng)
        return langevin(copy, timestep=timestep, temperature=temperature, friction=friction, rng=rng)

    with progress_bar(total=n_runs * (waiting + steps), desc="reference", unit="step", show=progress) as bar:
        try:
            for first in range(numbers.start, numbers.stop, together):
                group = numbers[first - numbers.start :][:together]
                read = partial(_readings, waiting=waiting, steps=steps, interval=interval, reach=reach)
                runs = _moved(calculator, group, prepared, read, bar.update)
                for number, readings in zip(group, runs, strict=True):
                    _check_finite(number, readings, timestep * interval, temperature)
                    reach.add(readings)
                reach.judge(beyond, conditions)
                made.extend(runs)
        except KeyboardInterrupt:
            if not made:
                raise
            warnings.warn(
                f"interrupted: {len(made)} of {numbers.stop} reference runs are complete and are kept.",
                UQWarning,
                stacklevel=2,
            )
    reach.tell(conditions)
    return ReferenceRuns(tuple(made), timestep * interval, reduction, conditions)


def _calculator_of(atoms: Atoms) -> BaseCalculator:
    calculator = atoms.calc
    if calculator is None or _KEY not in calculator.implemented_properties:
        raise ValueError(
            f"reference runs need a structure whose calculator gives {_KEY}. "
            "Set atoms.calc = UncertainCalculator(calculator, uncertainty_model)."
        )
    return calculator


def _check_finite(number: int, readings: np.ndarray, interval: float, temperature: float) -> None:
    if not np.isfinite(readings).all():
        lost = interval * int(np.argmin(np.isfinite(readings)))
        raise ValueError(
            f"reference run {number} has no finite uncertainty after {lost:g} fs: at {temperature:g} K the potential "
            "cannot be trusted. Use a lower temperature."
        )


def _readings(
    dynamics: Langevin, waiting: int, steps: int, interval: int, reach: Reach, told: Callable[[int], object] | None
) -> np.ndarray:
    """(n_readings,) readings, eV/Å, at every `interval`-th step after the equilibration; `told` hears of each step."""
    atoms, readings = dynamics.atoms, []
    assert atoms.calc is not None
    for step, _ in enumerate(dynamics.irun(waiting + steps)):
        if step and told is not None:
            told(1)
        if step > waiting and (step - waiting) % interval == 0:
            norms = atom_norms(atoms.calc.get_property(_KEY, atoms))
            readings.append(reach.reduction(norms, atoms.numbers))
            if "gamma" in atoms.calc.results:
                reach.add_grades(atoms.calc.results["gamma"], atoms.numbers)
    return np.array(readings)


def _together(calculator: BaseCalculator, n_atoms: int) -> int:
    return calculator.together(n_atoms) if isinstance(calculator, _Several) else 1


def _moved(
    calculator: BaseCalculator,
    group: Sequence[int],
    prepared: Callable[[int, BaseCalculator], Langevin],
    read: Callable[..., np.ndarray],
    told: Callable[[int], object],
) -> list[np.ndarray]:
    """The readings of a group of runs, which go forward together if there are several."""
    if not isinstance(calculator, _Several) or len(group) == 1:
        return [read(prepared(number, calculator), told=told) for number in group]
    lockstep = Lockstep(calculator.results_of, len(group))
    asking = [lockstep.calculator(n, calculator.implemented_properties) for n in range(len(group))]
    first, *others = [prepared(*pair) for pair in zip(group, asking, strict=True)]
    counted = partial(read, first, told=partial(_times, told, len(group)))
    return lockstep.run([counted, *(partial(read, other, told=None) for other in others)])


def _times(told: Callable[[int], object], n_runs: int, n: int) -> None:
    told(n_runs * n)


def _seconds(atoms: Atoms, together: int) -> float:
    """Time of one step of so many runs, s, measured on the structure."""
    calculator = atoms.calc
    times = []
    for turn in range(3):  # the first includes what is done once
        frames = [atoms.copy() for _ in range(together)]
        for number, frame in enumerate(frames):
            frame.positions += 1e-4 * (1 + turn + number)  # not remembered
        start = perf_counter()
        if isinstance(calculator, _Several):
            calculator.results_of(frames)
        else:
            assert calculator is not None
            calculator.get_property(_KEY, frames[0])
        times.append(perf_counter() - start)
    return min(times[1:])


def _made_before(
    before: ReferenceRuns | None, interval: float, reduction: Reduction, conditions: str
) -> list[np.ndarray]:
    if before is None:
        return []
    for what, then, now in (
        ("the time between readings (fs)", before.interval, interval),
        ("the reduction", before.reduction, reduction),
        ("the description of conditions", before.conditions, conditions),
    ):
        if then != now:
            raise ValueError(
                f"these runs cannot be added to those made before: {what} was {then} then and is {now} now. Make them "
                "in the same way, or leave out the earlier runs."
            )
    return list(before.readings)


def _check_positive(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} of reference runs must be a positive number, not {value!r}.")


def _check_not_negative(**numbers: float) -> None:
    for name, value in numbers.items():
        if not 0 <= value < np.inf:
            raise ValueError(f"{name} of reference runs must be 0 or more, not {value!r}.")


def _check_whole(**numbers: float) -> None:
    for name, value in numbers.items():
        if not isinstance(value, Integral):
            raise ValueError(f"{name} of reference runs must be a whole number, not {value!r}.")
