"""i-PI (ipi 3.3): the potential as its client, with the uncertainties of every bead among i-PI's extras.

    DRIVER=$(python -c "import ase_uq.engines.ipi_driver; print(ase_uq.engines.ipi_driver.__file__)")
    i-pi-py_driver -u -a NAME -m custom -P "$DRIVER" -o template=start.xyz,model=mace:my.model,uq=my.uq.safetensors

i-PI loads the file under its own name, so it cannot be called `ipi.py`: that would take the place of i-PI itself.
"""

import json
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.stress import voigt_6_to_full_3x3_stress

from ase_uq.dynamics.actions import Event
from ase_uq.dynamics.checks import Snapshot
from ase_uq.dynamics.judging import Judge, Observation, symbols_looked_at
from ase_uq.dynamics.policy import Asked, WatchPolicy, actions_of_levels
from ase_uq.engines.ase.base import Calibrated
from ase_uq.errors import InputError, MissingDependency, UQWarning
from ase_uq.io.frames import read_frames
from ase_uq.io.results import annotated
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor
from ase_uq.properties import UNCERTAINTIES

try:
    from ipi.pes import Dummy_driver
    from ipi.utils.units import unit_to_internal
except ModuleNotFoundError as error:
    raise MissingDependency(
        f"ase_uq.engines.ipi_driver needs i-PI, and {error.name} is not installed. Run: pip install ipi"
    ) from error

__all__ = ["UncertainDriver"]

# i-PI reads these two names to find the class.
__DRIVER_NAME__ = "ase_uq"
__DRIVER_CLASS__ = "UncertainDriver"

# Å, eV and eV/Å in atomic units.
_LENGTH = unit_to_internal("length", "angstrom", 1.0)
_ENERGY = unit_to_internal("energy", "electronvolt", 1.0)
_FORCE = unit_to_internal("force", "ev/ang", 1.0)

# Energy, forces (n_atoms, 3), virial (3, 3) in atomic units, and the extras as JSON.
Answer = tuple[float, np.ndarray, np.ndarray, str]


class UncertainDriver(Calibrated, Dummy_driver):
    """A potential and its uncertainty model as a PES of i-PI, from the command line or in a `<ffdirect>`.

    Energy, forces and virial are those of `UncertainCalculator`, in i-PI's atomic units. The extras are JSON with the
    keys, shapes and ASE units (eV, eV/Å, eV/Å³) of the calculator's results: `energy_uncertainty`,
    `forces_uncertainty`, `gamma` and so on. The results of each method are left out: they would make the extras many
    times as long. i-PI does not convert extras, so its files have them in these units.

    Beads that i-PI sends together (`batch_size`) take one forward pass, or one each if a method needs derivatives. A
    bead whose results are not finite is named in a warning, and the others have the numbers that they have alone.

    With `halt` the largest force uncertainty of the beads, or that of their centroid, ends i-PI by the file that it
    looks for, EXIT, which has the reason in it. i-PI ends with this step. Should it look in the midst of the step,
    which it does once a second, it takes the step back; in both cases its RESTART goes on, once EXIT is removed. The
    file must be where i-PI runs, so a client in another folder needs `exit`.

    Args:
        template: File with the elements in i-PI's order, and with the charge, spin and periodicity to use. Without
            periodicity i-PI's cell is ignored and the virial is zero, as it also is for a potential without a stress,
            and with a warning where only some directions are periodic: potentials disagree on the volume that their
            stress belongs to there.
        model: SPEC of the potential, such as `mace:my.model`.
        uq: File of its uncertainty model.
        ensemble: Number of samples of the energy, which are among the extras as `energy_ensemble` in eV and as i-PI's
            own `committee_pot` in atomic units, for `i-pi-committee-reweight`; 0 for none.
        halt: Threshold of ε_i, eV/Å, or a criterion such as `q0.999`, at which i-PI is ended.
        flag: Threshold at which the worst bead is kept in `frames`, given in the same way; below `halt`.
        frames: Extended XYZ file to which every flagged or halting structure is appended, with all results; its
            `flag_step` counts evaluations from 0, its `flag_image` is the number of the bead among those that were
            sent together, from 1.
        centroid: Number of beads, which i-PI must send together (`batch_size`), to judge their centroid and not each of
            them; it is one more structure in their forward pass. 0 to judge the beads.
        exit: Path of the file that ends i-PI.
        verbose: Argument of i-PI's drivers; unused.
        verbosity: Argument of i-PI's drivers; unused.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a complete, unaltered uncertainty model.
        FileExistsError: EXIT is there already.
        ValueError: A level cannot be used, or there are `frames` or a `centroid` without one.
    """

    def __init__(
        self,
        template: str,
        model: str,
        uq: str,
        ensemble: int = 0,
        halt: Asked | None = None,
        flag: Asked | None = None,
        frames: str | None = None,
        centroid: int = 0,
        exit: str = "EXIT",
        verbose: bool = False,
        verbosity: Any = None,
    ) -> None:
        self._template = read_frames(template, name="template")[-1]
        if self._template.pbc.any() and not self._template.pbc.all():
            warnings.warn(
                "the template is periodic in some directions only, where the volume that a stress belongs to is not "
                "known: the virial that i-PI gets is zero, and so is the potential's part of its pressure. With a "
                "barostat, give a template that is periodic in all directions, with vacuum in its cell.",
                UQWarning,
                stacklevel=2,
            )
        self.predictor = Predictor(model, uq, ensemble=int(ensemble))
        watched = halt is not None or flag is not None or frames is not None or centroid
        self._centroid = int(centroid)
        self._watch = _Watch(self, self._template, halt, flag, frames, Path(exit)) if watched else None
        super().__init__(verbose)

    def compute(self, cell: Any, pos: Any) -> Answer | list[Answer]:
        """Evaluates one structure, or each of a list.

        Args:
            cell: (3, 3) cell in bohr with the vectors as columns, or a list of cells.
            pos: (n_atoms, 3) positions in bohr, or a list of positions.

        Returns:
            Energy, forces (n_atoms, 3) and virial (3, 3) in atomic units, and the extras as JSON; a list for a list.

        Raises:
            InputError: The number of atoms is not that of the template.
        """
        if isinstance(pos, list):
            return self._answers(cell, pos)
        return self._answers([cell], [pos])[0]

    def _answers(self, cells: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> list[Answer]:
        frames = [self._structure(cell, pos) for cell, pos in zip(cells, positions, strict=True)]
        looked_at = frames + ([self._mean(cells, positions)] if self._centroid else [])
        predictions = self.predictor.predict(looked_at)
        if self._watch is not None:
            self._watch(
                looked_at[-1:] if self._centroid else looked_at, predictions[-1:] if self._centroid else predictions
            )
        return [_answer(atoms, prediction) for atoms, prediction in zip(frames, predictions, strict=False)]

    def _mean(self, cells: Sequence[np.ndarray], positions: Sequence[np.ndarray]) -> Atoms:
        """The centroid of all beads."""
        if len(positions) != self._centroid:
            raise InputError(
                f"i-PI sent {len(positions)} bead{'s' * (len(positions) != 1)} together, and the centroid is one of "
                f"{self._centroid}. Give centroid= the number of beads, and the forcefield the same batch_size."
            )
        return self._structure(cells[0], np.mean(positions, axis=0))

    def _structure(self, cell: np.ndarray, positions: np.ndarray) -> Atoms:
        atoms = self._template.copy()
        if len(positions) != len(atoms):
            raise InputError(
                f"i-PI sent {len(positions)} atoms and the template has {len(atoms)}. Give template= the structure "
                "that i-PI starts from, with its atoms in the same order."
            )
        atoms.positions = positions / _LENGTH
        if atoms.pbc.any():
            atoms.cell = cell.T / _LENGTH
        return atoms


class _Watch:
    """Judges the structures of each evaluation.

    Args:
        driver: Turns criteria into numbers.
        template: Structure with the elements.
        halt: As in `UncertainDriver`.
        flag: As in `UncertainDriver`.
        frames: As in `UncertainDriver`.
        exit: As in `UncertainDriver`.
    """

    def __init__(
        self,
        driver: Calibrated,
        template: Atoms,
        halt: Asked | None,
        flag: Asked | None,
        frames: str | None,
        exit: Path,
    ) -> None:
        if exit.exists():
            raise FileExistsError(f"{exit} is there, at which i-PI would end at once. Remove it first.")
        self._policy = WatchPolicy(halt=halt, flag=flag)
        self._judge = Judge(self._policy)
        # Only the calibration data of the calculator are read, and the driver has them as well.
        symbols = symbols_looked_at(self._policy.reduction, template)
        self._judge.settle(cast(BaseCalculator, driver), symbols, None)
        end = None if halt is None else self._end
        self._actions = actions_of_levels(self._policy.levels, frames, None, end, None)
        self._exit, self._n_evaluations, self._ended = exit, 0, False

    def __call__(self, structures: Sequence[Atoms], predictions: Sequence[Prediction]) -> None:
        """Judges the beads that were evaluated together, or the centroid; the first halt is the last judgement."""
        if self._ended:
            return
        observations = []
        for number, (atoms, prediction) in enumerate(zip(structures, predictions, strict=True), 1):
            results = prediction.results
            snapshot = Snapshot(atoms, results["energy"], results["forces"], None, results.get("contact"))
            values = self._policy.watched.values(atoms, results)
            observations.append(Observation(snapshot, values, number if len(structures) > 1 else None))
        verdict = self._judge(observations, None)
        assert verdict is not None  # there are always uncertainties
        worst = (verdict.image or 1) - 1
        event = Event(
            level=verdict.level,
            step=self._n_evaluations,
            time_fs=None,
            reading=verdict.reading,
            threshold=verdict.threshold,
            reason=verdict.reason,
            atoms=annotated(structures[worst], predictions[worst].results),
            dynamics=None,
            image=verdict.image,
        )
        self._n_evaluations += 1
        for action in self._actions[verdict.level]:
            action(event)

    def _end(self, event: Event) -> None:
        self._ended = True
        self._exit.write_text(f"{event.reason}\n")
        warnings.warn(f"i-PI is ended at evaluation {event.step}: {event.reason}", UQWarning, stacklevel=2)


def _answer(atoms: Atoms, prediction: Prediction) -> Answer:
    results = prediction.results
    virial = np.zeros((3, 3))
    if atoms.pbc.all() and "stress" in results:
        virial = -atoms.get_volume() * voigt_6_to_full_3x3_stress(np.asarray(results["stress"], float))
    extras = {key: np.asarray(results[key], float).tolist() for key in UNCERTAINTIES if key in results}
    if "energy_ensemble" in results:
        extras["committee_pot"] = (np.asarray(results["energy_ensemble"], float) * _ENERGY).tolist()
    forces = np.asarray(results["forces"], float)
    return results["energy"] * _ENERGY, forces * _FORCE, virial * _ENERGY, json.dumps(extras)
