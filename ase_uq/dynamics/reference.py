"""Reference runs: what the uncertainty does where the potential is trusted, so that false alarms can be counted."""

import numpy as np
from ase import Atoms, units
from ase.md.langevin import Langevin
from tqdm import tqdm

from ase_uq.dynamics.momenta import set_thermal_momenta
from ase_uq.readings import Reduction, atom_norms
from ase_uq.thresholds import ReferenceRuns

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
    seed: int = 0,
    progress: bool = True,
) -> ReferenceRuns:
    """Independent Langevin runs under conditions in which the potential is trusted; no labels are needed.

        model = model.with_reference(reference_runs(atoms, temperature=300))
        model.threshold(FalseAlarms(per_run=0.05, ps=5))

    Each run begins at the structure with momenta of its own and is equilibrated before it counts. A threshold for
    false alarms is as good as these runs are like the later ones: the same system, temperature and ensemble.

    Args:
        atoms: Structure with an `UncertainCalculator`; it is not changed.
        temperature: K.
        n_runs: Runs; 19 give a guarantee of 5 % false alarms for runs of their length, 9 one of 10 %.
        ps: Length of each run that counts, ps.
        timestep: fs.
        friction: Of the thermostat, 1/fs.
        equilibration: Before each run, ps.
        interval: Steps between two readings; take that at which the later runs are watched.
        reduction: How atoms become a reading; by default the largest ε_i.
        seed: Of momenta and thermostat.
        progress: Whether to show a progress bar.

    Raises:
        ValueError: A number that is not positive, a structure whose calculator gives no uncertainties, or a run that
            left the realm of finite uncertainties.
    """
    positive = {"temperature": temperature, "n_runs": n_runs, "ps": ps, "timestep": timestep, "interval": interval}
    for name, value in positive.items():
        if not 0 < value < np.inf:
            raise ValueError(f"{name} of reference runs is a positive number, not {value!r}.")
    calculator = atoms.calc
    if calculator is None or _KEY not in calculator.implemented_properties:
        raise ValueError(
            f"reference runs need a structure whose calculator gives {_KEY}. "
            "Set atoms.calc = UncertainCalculator(calculator, uncertainty_model)."
        )
    reduction = reduction or Reduction()
    waiting, steps = round(1000 * equilibration / timestep), round(1000 * ps / timestep)
    runs = []
    with tqdm(total=n_runs * (waiting + steps), desc="reference", unit="step", disable=not progress) as bar:
        for run in range(n_runs):
            rng = np.random.default_rng([seed, run])
            copy = atoms.copy()
            copy.calc = calculator
            set_thermal_momenta(copy, temperature, rng)
            dynamics = Langevin(
                copy, timestep * units.fs, temperature_K=temperature, friction=friction / units.fs, fixcm=False, rng=rng
            )
            readings: list[float] = []
            for step, _ in enumerate(dynamics.irun(waiting + steps)):
                bar.update(1 if step else 0)
                if step > waiting and (step - waiting) % interval == 0:
                    norms = atom_norms(calculator.get_property(_KEY, copy))
                    readings.append(reduction(norms, copy.numbers))
            if not np.isfinite(readings).all():
                lost = timestep * interval * int(np.argmin(np.isfinite(readings)))
                raise ValueError(
                    f"reference run {run} has no finite uncertainty after {lost:g} fs: at {temperature:g} K the "
                    "potential is not to be trusted. Take a lower temperature."
                )
            runs.append(np.array(readings))
    conditions = f"{atoms.get_chemical_formula()}, Langevin {temperature:g} K"
    return ReferenceRuns(tuple(runs), timestep * interval, reduction, conditions)
