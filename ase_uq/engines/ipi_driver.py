"""i-PI (ipi 3.3): the potential as its client, with the uncertainties of every bead among i-PI's extras.

    DRIVER=$(python -c "import ase_uq.engines.ipi_driver; print(ase_uq.engines.ipi_driver.__file__)")
    i-pi-py_driver -u -a NAME -m custom -P "$DRIVER" -o template=start.xyz,model=mace:my.model,uq=my.uq.safetensors

i-PI loads the file under its own name, so it cannot be called `ipi.py`: that would take the place of i-PI itself.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
from ase import Atoms
from ase.stress import voigt_6_to_full_3x3_stress

from ase_uq.errors import InputError, MissingDependency
from ase_uq.io.frames import read_frames
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


class UncertainDriver(Dummy_driver):
    """A potential and its uncertainty model as a PES of i-PI, from the command line or in a `<ffdirect>`.

    Energy, forces and virial are those of `UncertainCalculator`, in i-PI's atomic units. The extras are JSON with the
    keys, shapes and ASE units (eV, eV/Å, eV/Å³) of the calculator's results: `energy_uncertainty`,
    `forces_uncertainty`, `gamma` and so on. The results of each method are left out: they would make the extras many
    times as long. i-PI does not convert extras, so its files have them in these units.

    Beads that i-PI sends together (`batch_size`) take one forward pass, or one each if a method needs derivatives. A
    bead whose results are not finite is named in a warning, and the others have the numbers that they have alone.

    Args:
        template: File with the elements in i-PI's order, and with the charge, spin and periodicity to use. Without
            periodicity i-PI's cell is ignored and the virial is zero, as it also is for a potential without a stress.
        model: SPEC of the potential, such as `mace:my.model`.
        uq: File of its uncertainty model.
        ensemble: Number of samples of the energy, which are among the extras as `energy_ensemble` in eV and as i-PI's
            own `committee_pot` in atomic units, for `i-pi-committee-reweight`; 0 for none.
        verbose: Argument of i-PI's drivers; unused.
        verbosity: Argument of i-PI's drivers; unused.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a complete, unaltered uncertainty model.
    """

    def __init__(
        self, template: str, model: str, uq: str, ensemble: int = 0, verbose: bool = False, verbosity: Any = None
    ) -> None:
        self._template = read_frames(template, name="template")[-1]
        self._predictor = Predictor(model, uq, ensemble=int(ensemble))
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
        predictions = self._predictor.predict(frames)
        return [_answer(atoms, prediction) for atoms, prediction in zip(frames, predictions, strict=True)]

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


def _answer(atoms: Atoms, prediction: Prediction) -> Answer:
    results = prediction.results
    virial = np.zeros((3, 3))
    if atoms.pbc.any() and "stress" in results:
        virial = -atoms.get_volume() * voigt_6_to_full_3x3_stress(np.asarray(results["stress"], float))
    extras = {key: np.asarray(results[key], float).tolist() for key in UNCERTAINTIES if key in results}
    if "energy_ensemble" in results:
        extras["committee_pot"] = (np.asarray(results["energy_ensemble"], float) * _ENERGY).tolist()
    forces = np.asarray(results["forces"], float)
    return results["energy"] * _ENERGY, forces * _FORCE, virial * _ENERGY, json.dumps(extras)
