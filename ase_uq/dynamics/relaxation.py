"""Relaxations that stop where the potential is no longer reliable, and say how far to trust their result.

They do not estimate how far atoms could still move: the only Hessian at hand is the optimiser's, which knows only the
few directions of its steps and takes soft directions for stiff ones. Estimates from it are up to ten times too small,
and the more so the closer a relaxation began to its minimum.
"""

import math
import os
from dataclasses import dataclass
from typing import Any, Literal, TextIO, Unpack, cast

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.constraints import FixAtoms
from ase.filters import Filter, FrechetCellFilter
from ase.optimize import BFGS, FIRE, LBFGS
from ase.optimize.optimize import Optimizer
from tqdm import tqdm

from ase_uq.display.progress import progress_bar
from ase_uq.dynamics.judging import checked
from ase_uq.dynamics.monitor import UncertaintyMonitor
from ase_uq.dynamics.policy import WatchOptions, WatchPolicy, as_policy
from ase_uq.dynamics.quantities import QUANTITIES
from ase_uq.errors import UncertaintyHalt
from ase_uq.io.frames import write_frames
from ase_uq.io.labels import drop_labels
from ase_uq.io.results import annotated
from ase_uq.thresholds.reduction import atom_norms

_KEY = QUANTITIES["forces"].key
OPTIMIZERS: dict[str, type[Optimizer]] = {"bfgs": BFGS, "lbfgs": LBFGS, "fire": FIRE}


@dataclass(frozen=True)
class Relaxation:
    """Result of a relaxation, and how far to trust it; `str()` describes it in words.

    All values describe the last structure, whatever the status. Uncertainties are standard deviations. The force
    uncertainty of an atom is ε_i = sqrt(Σ_c σ_ic²); the largest among the atoms that may move is given.

    Args:
        status: `"converged"`; `"uncertain"`, halted by a threshold or a check; or `"unfinished"`, all steps used.
        reason: Why it was halted; empty unless `status` is `"uncertain"`.
        n_steps: Number of steps of the optimiser.
        fmax: Largest force at which it counts as converged, eV/Å.
        largest_force: Largest force on an atom, or on the cell if that is relaxed too, eV/Å.
        forces_uncertainty: Largest ε_i, eV/Å.
        atom: Index of the atom with the largest ε_i.
        symbol: Element of that atom.
        gamma: Largest `gamma`; None if the calculator has none.
        energy: Energy, eV.
        energy_uncertainty: Uncertainty of the energy, eV; None if the calculator has none.
        start_energy: Energy of the first structure, eV.
        start_energy_uncertainty: Uncertainty of that energy, eV; None if the calculator has none.
        stress_uncertainty: Largest uncertainty of a stress component, eV/Å³; None unless the cell is relaxed.
    """

    status: Literal["converged", "uncertain", "unfinished"]
    reason: str
    n_steps: int
    fmax: float
    largest_force: float
    forces_uncertainty: float
    atom: int
    symbol: str
    gamma: float | None
    energy: float
    energy_uncertainty: float | None
    start_energy: float
    start_energy_uncertainty: float | None
    stress_uncertainty: float | None

    @property
    def converged(self) -> bool:
        return self.status == "converged"

    @property
    def is_located(self) -> bool:
        """Whether it converged, with a force uncertainty of at most `fmax` and a finite `gamma`."""
        return self.converged and self.forces_uncertainty <= self.fmax and self.gamma != math.inf

    @property
    def gain(self) -> float:
        """Energy that the relaxation gained, eV; positive if it went downhill."""
        return self.start_energy - self.energy

    @property
    def gain_uncertainty(self) -> float | None:
        """sqrt(σ_start² + σ_end²), eV, as if the errors at both ends were independent.

        Errors of similar structures are correlated, so it is rather too large. None if the calculator has no energy
        uncertainty.
        """
        if self.energy_uncertainty is None or self.start_energy_uncertainty is None:
            return None
        return math.hypot(self.energy_uncertainty, self.start_energy_uncertainty)

    def describe(self) -> str:
        """A few lines of text: how it ended, and how certain forces, energy and cell are there."""
        lines = [self._outcome(), self._forces(), self._energy()]
        if self.stress_uncertainty is not None:
            lines.append(f"the stress on the cell is uncertain by up to {self.stress_uncertainty / units.GPa:.2g} GPa")
        if self.gamma is not None and not self.gamma <= 1:
            lines.append(
                "an element here was never seen by the uncertainty model: no uncertainty can be believed"
                if self.gamma == math.inf
                else f"gamma is up to {self.gamma:.3g}: beyond the calibration data (1), uncertainties are a hint only"
            )
        return "\n  ".join(lines)

    def __str__(self) -> str:
        return self.describe()

    def _outcome(self) -> str:
        steps = f"{self.n_steps} step" + "s" * (self.n_steps != 1)
        force = f"largest force {self.largest_force:.3g} eV/Å, {self.fmax:g} asked for"
        match self.status:
            case "converged":
                return f"converged in {steps}: {force}"
            case "uncertain":
                return f"stopped after {steps}, since {self.reason}; {force}"
            case "unfinished":
                return f"not converged in {steps}: {force}"

    def _forces(self) -> str:
        line = f"forces are uncertain by up to {self.forces_uncertainty:.3g} eV/Å (atom {self.atom}, {self.symbol})"
        if not self.converged or self.gamma == math.inf:
            return line
        if self.is_located:
            return f"{line}: the minimum is located as well as was asked for"
        return f"{line}, more than {self.fmax:g}: the minimum is located only to that accuracy"

    def _energy(self) -> str:
        line = f"energy {self.energy:.6f} eV"
        if self.energy_uncertainty is not None:
            line += f", uncertain by {self.energy_uncertainty:.2g} eV"
        if not self.n_steps:
            return line
        line += f"; {abs(self.gain):.3g} eV {'below' if self.gain >= 0 else 'above'} the start"
        if self.gain_uncertainty is None:
            return line
        if abs(self.gain) <= self.gain_uncertainty:
            return f"{line}, no more than the uncertainty of that difference, at most {self.gain_uncertainty:.2g} eV"
        return f"{line}, uncertain by at most {self.gain_uncertainty:.2g} eV"


def relax(
    atoms: Atoms,
    *,
    fmax: float = 0.05,
    steps: int = 500,
    optimizer: str | type[Optimizer] = "bfgs",
    cell: bool = False,
    policy: WatchPolicy | None = None,
    before: int = 0,
    frames: str | os.PathLike[str] | None = None,
    log: str | os.PathLike[str] | TextIO | None = None,
    trajectory: str | os.PathLike[str] | None = None,
    progress: bool = False,
    **options: Unpack[WatchOptions],
) -> Relaxation:
    """Relaxes a structure until forces are small, or until the potential is no longer reliable.

        relaxation = relax(atoms, fmax=0.02, halt=Quantile(0.999))
        print(relaxation)

    `atoms` is left at the last structure. To go on from a halted relaxation, call `relax` again with a higher `halt` or
    none, since the first structure is judged too. There are no model calls beyond those of the optimiser, unless the
    calculator skipped the uncertainties of the first or last structure.

    Args:
        atoms: Structure with an `UncertainCalculator`; its constraints are kept.
        fmax: Largest force on an atom at which the relaxation counts as converged, eV/Å.
        steps: Largest number of steps.
        optimizer: `"bfgs"`, `"lbfgs"`, `"fire"` or an optimiser class of ASE.
        cell: Whether to relax the cell too, with `FrechetCellFilter`.
        policy: What to watch for, if anything; if None, it is made from the `options`.
        before: As in `UncertaintyMonitor`.
        frames: As in `UncertaintyMonitor`.
        log: As in `UncertaintyMonitor`.
        trajectory: Extended XYZ file to which every step is added, with its uncertainties.
        progress: Whether to show a progress bar.
        options: Fields of `WatchPolicy`, such as `halt`, instead of a `policy`.

    Raises:
        ValueError: A number is not positive, the optimiser is unknown, a cell to relax is not periodic or has no
            stress, the calculator has no uncertainties, or `UncertaintyMonitor` raises it.
        TypeError: `optimizer` is not an optimiser of ASE, or `UncertaintyMonitor` raises it.
    """
    for name, value in (("fmax", fmax), ("steps", steps)):
        if not 0 < value < math.inf:
            raise ValueError(f"{name} of a relaxation is a positive number, not {value!r}.")
    optimizer_class = _optimizer(optimizer)
    policy = as_policy(policy, **options)
    calculator = checked(atoms.calc)
    target = _cell(atoms, calculator) if cell else atoms
    start_energy, start_energy_uncertainty = _energy(atoms, calculator)
    run = optimizer_class(cast(Atoms, target), logfile=None)  # ASE's annotation leaves out filters
    if trajectory is not None:
        run.attach(_add_frame, 1, trajectory, atoms, run)
    monitor = None
    if policy.levels or before or frames is not None or log is not None:
        monitor = UncertaintyMonitor(run, policy=policy, before=before, frames=frames, log=log)
    reason = ""
    with progress_bar(total=steps, desc="relax", unit="step", show=progress) as bar:
        if progress:
            run.attach(_show, 1, bar, run, atoms)
        if monitor is not None:
            run.attach(monitor)  # last: observers after it miss a step at which it raises
        try:
            status = "converged" if run.run(fmax, steps) else "unfinished"
            if monitor is not None:
                # If the calculator skipped the uncertainty of the last structure, this structure is judged now.
                _read(atoms, calculator, _KEY)
                monitor()
        except UncertaintyHalt:
            if monitor is None or monitor.last is None or monitor.last.level != "halt":
                raise  # raised by the user's own watch
            status, reason = "uncertain", monitor.last.reason
    energy, energy_uncertainty = _energy(atoms, calculator)
    norms = _free_norms(atoms, calculator)
    worst = int(np.argmax(norms))
    gamma = calculator.results.get("gamma")
    return Relaxation(
        status=status,
        reason=reason,
        n_steps=run.nsteps,
        fmax=fmax,
        largest_force=_largest_force(target),
        forces_uncertainty=float(norms[worst]),
        atom=worst,
        symbol=str(atoms.symbols[worst]),
        gamma=None if gamma is None else float(np.max(gamma)),
        energy=energy,
        energy_uncertainty=energy_uncertainty,
        start_energy=start_energy,
        start_energy_uncertainty=start_energy_uncertainty,
        stress_uncertainty=_stress_uncertainty(atoms, calculator) if cell else None,
    )


def _optimizer(optimizer: str | type[Optimizer]) -> type[Optimizer]:
    if isinstance(optimizer, str):
        if optimizer.lower() not in OPTIMIZERS:
            raise ValueError(
                f"there is no optimiser {optimizer!r}; there are {', '.join(OPTIMIZERS)}. Give one of them or a class "
                "of ASE, such as ase.optimize.FIRE2."
            )
        return OPTIMIZERS[optimizer.lower()]
    if not (isinstance(optimizer, type) and issubclass(optimizer, Optimizer)):
        raise TypeError(
            f"an optimiser is one of {', '.join(OPTIMIZERS)} or an optimiser class of ASE, not {optimizer!r}."
        )
    return optimizer


def _cell(atoms: Atoms, calculator: BaseCalculator) -> Filter:
    if not atoms.pbc.all():
        missing = [name for name, periodic in zip("abc", atoms.pbc, strict=True) if not periodic]
        raise ValueError(
            f"cell=True relaxes the whole cell, but the structure is not periodic along {' and '.join(missing)}. "
            "Leave cell out, or set atoms.pbc = True if it is a crystal."
        )
    if "stress" not in calculator.implemented_properties:
        raise ValueError(f"{type(calculator).__name__} gives no stress, which cell=True needs. Leave cell out.")
    return FrechetCellFilter(atoms)


def _energy(atoms: Atoms, calculator: BaseCalculator) -> tuple[float, float | None]:
    """Energy and its uncertainty, eV."""
    energy = float(atoms.get_potential_energy())
    if "energy_uncertainty" not in calculator.implemented_properties:
        return energy, None
    return energy, float(_read(atoms, calculator, "energy_uncertainty"))


def _read(atoms: Atoms, calculator: BaseCalculator, key: str) -> Any:
    """A result, calculated now if the calculator skipped the uncertainties of this step."""
    return calculator.get_property(key, atoms)


def _stress_uncertainty(atoms: Atoms, calculator: BaseCalculator) -> float | None:
    if "stress_uncertainty" not in calculator.implemented_properties:
        return None
    return float(np.max(_read(atoms, calculator, "stress_uncertainty")))


def _free_norms(atoms: Atoms, calculator: BaseCalculator) -> np.ndarray:
    """(n_atoms,) ε_i, eV/Å; -inf for fixed atoms, whose forces do not matter, unless all are fixed."""
    norms = atom_norms(_read(atoms, calculator, _KEY))
    is_fixed = np.zeros(len(atoms), bool)
    for constraint in atoms.constraints:
        if isinstance(constraint, FixAtoms):
            is_fixed[constraint.get_indices()] = True
    return norms if is_fixed.all() else np.where(is_fixed, -math.inf, norms)


def _largest_force(target: Atoms | Filter) -> float:
    return float(np.linalg.norm(target.get_forces(), axis=1).max())


def _add_frame(path: str | os.PathLike[str], atoms: Atoms, run: Optimizer) -> None:
    frame = annotated(atoms, step=run.nsteps)
    drop_labels(frame)
    write_frames(path, [frame], append=True)


def _show(bar: tqdm, run: Optimizer, atoms: Atoms) -> None:
    assert atoms.calc is not None
    force = _largest_force(run.atoms)
    uncertainty = atoms.calc.results.get(_KEY)
    known = "" if uncertainty is None else f" ± {atom_norms(uncertainty).max():.3f}"
    bar.set_postfix_str(f"largest force {force:.3f}{known} eV/Å", refresh=False)
    bar.update(run.nsteps - bar.n)
