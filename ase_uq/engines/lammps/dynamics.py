"""A run of LAMMPS as a run of ASE: a potential gives its forces, and observers see each of its steps."""

import os
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, cast

import numpy as np
from ase import Atoms, units
from ase.calculators.calculator import BaseCalculator
from ase.geometry import find_mic
from ase.md.md import MolecularDynamics
from ase.optimize.optimize import BaseDynamics

from ase_uq.dynamics.judging import checked
from ase_uq.engines.lammps.exchange import (
    PER_ATOM,
    Answer,
    answer_of,
    box_of,
    check_barostats,
    check_masses,
    fixes_of,
    has_virial,
    numbers_of_types,
)
from ase_uq.errors import InputError, UQWarning

_FIX = "uq"
_NO_END = sys.maxsize
_ROUNDING = 1e-6  # Å
_PS = 1000 * units.fs  # time in LAMMPS's units metal


class LammpsDynamics(MolecularDynamics):
    """The potential of a calculator and its uncertainties in LAMMPS, which moves the atoms.

    What ASE attaches to its dynamics can be attached to this one: an `UncertaintyMonitor` with its rules, its flagged
    frames and its halt, or any function. Observers are called once per step, when LAMMPS has its forces, and in a
    `minimize` for each structure that it tries, while time stands still; `atoms` is that structure, in the order of the
    atoms' IDs, with the calculator's results.

        dynamics = LammpsDynamics(lammps, UncertainCalculator("mace:my.model", "my.uq.safetensors"), ["Si", "O"])
        dynamics.attach(UncertaintyMonitor(dynamics, halt=0.5, flag=0.3, frames="flagged.xyz"))
        dynamics.run(100_000)

    Energies, forces and virial go to LAMMPS through `fix uq all external`, so they add to those of a pair style: take
    `pair_style zero` where there is to be no other. LAMMPS knows the uncertainties as `d_force_uq` (ε_i, eV/Å),
    `d_energy_uq` (eV) and `d_gamma` of each atom, for dumps, computes and variables, and as `f_uq[1]` to `f_uq[4]`: the
    largest and the mean ε_i (eV/Å), the standard deviation of the energy (eV), and the largest gamma. At a step that
    `every` skips they are those of the last step that had them.

    A step at which something is raised is completed, and the run ends: `fix halt` is not needed. Python code cannot
    raise through LAMMPS, so the exception is kept and raised by `run`, `execute` or `execute_file` when LAMMPS returns;
    `run` then goes on from that step. (If the calculator itself fails, its step has no forces: go back before it.)
    Started by `lammps.command("run 100")` a run ends as well, but nothing is raised.

    Velocities of `atoms` are those of the complete step, as velocity Verlet makes them from the forces of the potential
    alone. With several MPI ranks the atoms are gathered on the first, which alone evaluates them, has them in
    `atoms` and calls observers; what is raised there is raised on all.

    Args:
        lammps: An instance of LAMMPS in `units metal` that has its box, and no barostat yet: those that come later know
            of the virial in time. Its atoms may still be missing; `atoms` is empty until the first step then.
        calculator: Calculator with uncertainties, such as an `UncertainCalculator`; None on ranks other than the first.
        elements: Chemical symbol of each atom type, in their order.
        info: Entries of `atoms.info` that the potential reads, such as its charge.
        comm: Communicator of mpi4py that LAMMPS was opened with, where it has several ranks.

    Attributes:
        lammps: The instance of LAMMPS.
        atoms: The structure; positions are relative to the low corner of the box.
        nsteps: Number of the current step, as LAMMPS counts.
        dt: Time step, in ASE's unit.

    Raises:
        InputError: LAMMPS has other units, no box, a barostat already, or several ranks without `comm`, or the elements
            do not fit its atom types or the potential.
        ValueError: The calculator gives no uncertainties.
    """

    def __init__(
        self,
        lammps: Any,
        calculator: BaseCalculator | None,
        elements: Sequence[str],
        *,
        info: Mapping[str, Any] | None = None,
        comm: Any = None,
    ) -> None:
        self.lammps, self._comm = lammps, comm
        _check(lammps, comm)
        fixes, n_types = fixes_of(lammps), lammps.extract_setting("ntypes")
        self._by_first(lambda: check_barostats(fixes, _FIX))
        self._numbers = self._by_first(lambda: numbers_of_types(elements, n_types, checked(calculator)))
        # MolecularDynamics would ask for masses, which LAMMPS has.
        BaseDynamics.__init__(self, Atoms(info=dict(info or {}), calculator=calculator))
        self.max_steps = _NO_END
        self._at(lammps.extract_global("ntimestep"), takes_time=True)
        self._ids = np.empty(0, int)
        self._evaluated: int | None = None
        self._shown: tuple[int, np.ndarray] | None = None
        self._stopped = False
        self._error: BaseException | None = None
        self._declare(self._by_first(lambda: set(checked(calculator).implemented_properties)))
        if lammps.get_natoms():
            own = self._own(("id", "type", "x", "v"), lammps.extract_global("nlocal"))
            gathered = self._gathered(own)
            self._by_first(lambda: self._take(gathered))

    def run(self, steps: int = 50) -> bool:
        """Lets LAMMPS make steps.

        Args:
            steps: Number of steps.

        Returns:
            Whether all of them were made.

        Raises:
            UncertaintyHalt: Raised by a monitor. `run` goes on from its step.
        """
        first = self.lammps.extract_global("ntimestep")
        self.execute(f"run {steps}")
        return self.lammps.extract_global("ntimestep") - first == steps

    def execute(self, commands: str) -> None:
        """Gives LAMMPS commands, one per line; raises what was raised in their steps.

        A run that ended early skips the runs that follow it in the same commands; other commands are executed.

        Args:
            commands: Commands of LAMMPS.
        """
        self._raising(self.lammps.commands_string, commands)

    def execute_file(self, path: str | os.PathLike[str]) -> None:
        """Gives LAMMPS the commands of a file, as `execute`."""
        self._raising(self.lammps.file, str(path))

    def get_time(self) -> float:
        """Simulated time of the current step, in ASE's unit; it knows of changes of the time step."""
        return self._time

    def _raising(self, give: Callable[[str], None], what: str) -> None:
        if self._stopped:
            self.lammps.command("timer timeout off")  # or it would make no step
        self._stopped, self._error, self.max_steps = False, None, _NO_END
        try:
            give(what)
        except Exception:
            if self._error is None:
                raise
        if self._error is not None:
            raise self._error

    def _declare(self, properties: set[str]) -> None:
        """Makes the fixes by which LAMMPS asks for forces and has the uncertainties."""
        lammps, names = self.lammps, [name for name, key in PER_ATOM.items() if key in properties]
        for command in (
            f"fix {_FIX}_atom all property/atom {' '.join(names)}",
            f"fix {_FIX} all external pf/callback 1 1",
            f"fix_modify {_FIX} energy yes virial yes",
        ):
            lammps.command(command)
        lammps.fix_external_set_vector_length(_FIX, 4)
        lammps.set_fix_external_callback(_FIX, LammpsDynamics._forces_wanted, self)

    def _forces_wanted(self, step: int, n_own: int, ids: np.ndarray, positions: np.ndarray, forces: np.ndarray) -> None:
        """LAMMPS calls this at each step, on each rank, to have the forces of the rank's atoms filled in."""
        forces[:] = 0.0
        try:
            types, velocities = self._own(("type", "v"), n_own)
            gathered = self._gathered((ids, types, positions, velocities))
            answer = self._by_first(lambda: self._evaluate(step, gathered))
            self._give(answer, ids, forces)
            # The line search of a minimisation ends with its iteration, which the observers are to see nothing more of.
            if not self._stopped and self._by_first(self._observe):
                self._stop()
        except BaseException as error:  # ctypes would print and forget it
            self._error = error
            self._stop()

    def _own(self, names: Sequence[str], n_own: int) -> list[np.ndarray]:
        """Arrays of this rank's atoms, as LAMMPS has them."""
        return [self.lammps.numpy.extract_atom(name)[:n_own] for name in names]

    def _gathered(self, arrays: Sequence[np.ndarray]) -> Sequence[np.ndarray]:
        """The same arrays with the atoms of all ranks, on the first."""
        if self._comm is None:
            return arrays
        parts = [self._comm.gather(np.array(array), root=0) for array in arrays]
        return [np.concatenate(part) for part in parts] if self._comm.rank == 0 else arrays

    def _by_first[T](self, compute: Callable[[], T]) -> T:
        """What the first rank computes, or the exception that it raises, on all of them."""
        if self._comm is None:
            return compute()
        value, error = None, None
        if self._comm.rank == 0:
            try:
                value = compute()
            except BaseException as raised:
                error = raised
        value, error = self._comm.bcast((value, error), root=0)
        if error is not None:
            raise error
        return value

    def _evaluate(self, step: int, gathered: Sequence[np.ndarray]) -> Answer:
        """One call of the calculator, for the structure of a step."""
        self._at(step, takes_time=self.lammps.is_running)
        self._take(gathered)
        atoms = self.atoms
        forces = atoms.get_forces()
        assert atoms.calc is not None
        results = atoms.calc.results
        if self._evaluated is None:
            self._check_first(results)
        # Velocity Verlet asks for forces when velocities lack its second half kick, but for the first step of a run.
        if self.lammps.is_running and step - 1 == self._evaluated:
            atoms.arrays["momenta"] += 0.5 * self.dt * forces
        self._evaluated = step
        return answer_of(self._ids, atoms, results)

    def _at(self, step: int, takes_time: bool) -> None:
        """Takes over the number and the time of a step; those of a minimisation take none."""
        began, time, dt = map(self.lammps.extract_global, ("atimestep", "atime", "dt"))
        self.nsteps, self.dt = int(step), dt * _PS
        if takes_time:
            self._time = (time + (step - began) * dt) * _PS

    def _take(self, gathered: Sequence[np.ndarray]) -> None:
        """Makes `atoms` the structure that LAMMPS has."""
        ids, types, positions, velocities = gathered
        order = np.argsort(ids)
        atoms, ids, types = self.atoms, ids[order], types[order]
        if not len(atoms):
            self._ids = ids.copy()
            # The same object, which whoever watches it may hold.
            atoms.arrays = Atoms(self._numbers[types], momenta=np.zeros((len(ids), 3))).arrays
        elif not np.array_equal(ids, self._ids):
            raise self._other_atoms(ids)
        cell, low, atoms.pbc = box_of(self.lammps)
        atoms.cell.array[:] = cell
        atoms.numbers[:] = self._numbers[types]
        atoms.positions[:] = positions[order] - low
        self._masses = self.lammps.numpy.extract_atom("mass")[types]
        atoms.arrays["momenta"][:] = self._masses[:, None] * velocities[order] / _PS

    def _other_atoms(self, ids: np.ndarray) -> InputError:
        """The error for atoms that are not those of the beginning."""
        if len(ids) < self.lammps.get_natoms():  # which knows of atoms that were deleted, not of those that are lost
            lost = np.setdiff1d(self._ids, ids)
            return InputError(
                f"LAMMPS lost {len(lost)} of {len(self._ids)} atoms before step {self.nsteps}, the first with the ID "
                f"{lost[0]}: it left a box that is not periodic, or moved too far in one step. Go back before it, and "
                "give LAMMPS a shorter time step or --halt (halt) a lower level."
            )
        return InputError(
            f"LAMMPS has other atoms than at the beginning: {len(ids)}, where there were {len(self._ids)}, or with "
            "other IDs. Make another LammpsDynamics after atoms were added or removed."
        )

    def _check_first(self, results: Mapping[str, Any]) -> None:
        """What can only be looked at once LAMMPS has everything that its run needs."""
        check_masses(self._numbers, self.lammps.numpy.extract_atom("mass"))
        if (np.abs(self._masses - self.atoms.get_masses()) > 1e-3).any():
            self.atoms.set_masses(self._masses)
        if not has_virial(self.atoms, results):
            warnings.warn(
                "the pressure in LAMMPS lacks the part of the potential, so no barostat can be used: "
                + (
                    "the potential has no stress."
                    if self.atoms.pbc.all()
                    else "the box is periodic in some directions only. Give it vacuum and boundary p p p."
                ),
                UQWarning,
                stacklevel=2,
            )

    def _give(self, answer: Answer, ids: np.ndarray, forces: np.ndarray) -> None:
        """Fills in what LAMMPS wants for this rank's atoms."""
        lammps, rows = self.lammps, np.searchsorted(answer.ids, ids)
        forces[:] = answer.forces[rows]
        lammps.fix_external_set_energy_global(_FIX, answer.energy)
        lammps.fix_external_set_virial_global(_FIX, answer.virial.tolist())
        for name, values in answer.per_atom.items():
            lammps.numpy.extract_atom(name)[: len(ids)] = values[rows]
        for number, value in enumerate(answer.totals or (), 1):
            lammps.fix_external_set_vector(_FIX, number, value)

    def _observe(self) -> bool:
        """Calls the observers; returns whether one of them has asked for an end."""
        if not (self.lammps.is_running and self._is_shown()):
            self._shown = self.nsteps, self.atoms.positions.copy()
            self.call_observers()
        return self.max_steps <= self.nsteps

    def _is_shown(self) -> bool:
        """Whether the observers have seen this step: a run that goes on begins with the last one of the run before.

        LAMMPS may have put its atoms back into the box, which rounds them.
        """
        if self._shown is None or self._shown[0] != self.nsteps:
            return False
        moves, _ = find_mic(
            self.atoms.positions - self._shown[1],
            self.atoms.cell,
            cast(Any, self.atoms.pbc),  # ASE's annotation allows only one bool
        )
        return bool(np.abs(moves).max() < _ROUNDING)

    def _stop(self) -> None:
        self._stopped = True
        self.lammps.force_timeout()


def _check(lammps: Any, comm: Any) -> None:
    """Raises InputError for an instance of LAMMPS that cannot be used."""
    if (found := lammps.extract_global("units")) != "metal":
        raise InputError(f"LAMMPS has units {found}, and the potential eV, Å and ps: write `units metal` in its input.")
    if not lammps.extract_setting("box_exist"):
        raise InputError("LAMMPS has no box yet. Give it the commands that make one, such as read_data, before this.")
    ranks = lammps.extract_setting("world_size")
    if ranks > 1 and comm is None:
        raise InputError(
            f"LAMMPS runs on {ranks} ranks, so the atoms must be gathered: give comm=MPI.COMM_WORLD (mpi4py) to "
            "open_lammps and to LammpsDynamics, or start one process."
        )
