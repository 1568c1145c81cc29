"""Reference runs: the uncertainty in runs where the potential is trusted, so that false alarms can be counted."""

import warnings
from numbers import Integral

import numpy as np
from ase import Atoms
from ase.md.langevin import Langevin
from tqdm import tqdm

from ase_uq.errors import UQWarning
from ase_uq.progress import progress_bar
from ase_uq.sampling.ensembles import langevin
from ase_uq.sampling.momenta import set_thermal_momenta
from ase_uq.sampling.reach import Reach
from ase_uq.thresholds.data import ReferenceRuns
from ase_uq.thresholds.reduction import Reduction, atom_norms

_KEY = "forces_uncertainty"


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
) -> ReferenceRuns:
    """Makes independent Langevin runs under conditions in which the potential is trusted; no labels are needed.

        model = model.with_reference(reference_runs(atoms, temperature=300))
        model.threshold(FalseAlarms(per_run=0.05, ps=5))

    Each run starts at the structure with newly drawn momenta and is equilibrated before readings are taken. A threshold
    for false alarms is only as good as these runs are like the later ones: same system, temperature and ensemble.

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
    calculator = atoms.calc
    if calculator is None or _KEY not in calculator.implemented_properties:
        raise ValueError(
            f"reference runs need a structure whose calculator gives {_KEY}. "
            "Set atoms.calc = UncertainCalculator(calculator, uncertainty_model)."
        )
    reduction = reduction or Reduction()
    waiting, steps = round(1000 * equilibration / timestep), round(1000 * ps / timestep)
    conditions = f"{atoms.get_chemical_formula()}, Langevin {temperature:g} K"
    made = _made_before(before, timestep * interval, reduction, conditions)
    reach = Reach.of(calculator, atoms, reduction)
    for readings in made:
        reach.add(readings)
    numbers = range(len(made), len(made) + n_runs)
    with progress_bar(total=n_runs * (waiting + steps), desc="reference", unit="step", show=progress) as bar:
        try:
            for number in numbers:
                rng = np.random.default_rng([seed, number])
                copy = atoms.copy()
                copy.calc = calculator
                set_thermal_momenta(copy, temperature, rng)
                dynamics = langevin(copy, timestep=timestep, temperature=temperature, friction=friction, rng=rng)
                readings = _readings(dynamics, waiting, steps, interval, reach, bar)
                if not np.isfinite(readings).all():
                    lost = timestep * interval * int(np.argmin(np.isfinite(readings)))
                    raise ValueError(
                        f"reference run {number} has no finite uncertainty after {lost:g} fs: at {temperature:g} K "
                        "the potential cannot be trusted. Use a lower temperature."
                    )
                made.append(readings)
                reach.add(readings)
                reach.judge(beyond, conditions)
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


def _readings(dynamics: Langevin, waiting: int, steps: int, interval: int, reach: Reach, bar: tqdm) -> np.ndarray:
    """(n_readings,) readings, eV/Å, at every `interval`-th step after the equilibration."""
    atoms, readings = dynamics.atoms, []
    assert atoms.calc is not None
    for step, _ in enumerate(dynamics.irun(waiting + steps)):
        bar.update(1 if step else 0)
        if step > waiting and (step - waiting) % interval == 0:
            norms = atom_norms(atoms.calc.get_property(_KEY, atoms))
            readings.append(reach.reduction(norms, atoms.numbers))
            if "gamma" in atoms.calc.results:
                reach.add_grades(atoms.calc.results["gamma"], atoms.numbers)
    return np.array(readings)


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
