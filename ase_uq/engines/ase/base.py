"""Base classes of calculators with uncertainties: thresholds from the uncertainty model, and the inputs they read."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.outputs import Properties

from ase_uq.io.results import drop_uncertainties
from ase_uq.predictor import Predictor
from ase_uq.properties import known_to_ase
from ase_uq.thresholds.criteria import Criterion
from ase_uq.thresholds.data import ThresholdData
from ase_uq.thresholds.reduction import Reduction
from ase_uq.uncertainty_model.model import UncertaintyModel


class Calibrated:
    """Base of classes with a predictor, which can turn criteria into thresholds."""

    predictor: Predictor

    @property
    def uncertainty_model(self) -> UncertaintyModel:
        """The uncertainty model that was fitted for the potential."""
        return self.predictor.uncertainty_model

    def threshold(self, criterion: float | str | Criterion, reduction: Reduction | None = None) -> float:
        """A threshold in eV/Å from its criterion; see `UncertaintyModel.threshold`."""
        return self.uncertainty_model.threshold(criterion, reduction)

    def threshold_data(self, reduction: Reduction | None = None) -> ThresholdData:
        """Data for thresholds; see `UncertaintyModel.threshold_data`."""
        return self.uncertainty_model.threshold_data(reduction)


class CalibratedCalculator(Calibrated, Calculator):
    """An ASE calculator with a predictor; a subclass sets `results` in `calculate`, after `_begin`."""

    def _begin(self, atoms: Atoms | None, properties: Sequence[str], system_changes: Sequence[str]) -> Atoms:
        """Forgets the last results, in the structure too, and copies it, so that later changes are noticed."""
        # If the calculation fails, the results of the structure before must not pass for those of this one.
        self.results = {}
        if atoms is not None:
            drop_uncertainties(atoms)  # what a file left in its arrays would be written beside the new forces by ASE
        Calculator.calculate(self, atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        # ASE's copy shares the values in info: an array changed in place would pass for unchanged.
        keys = self.predictor.backend.info_keys
        self.atoms.info |= {key: deepcopy(self.atoms.info[key]) for key in keys if key in self.atoms.info}
        return self.atoms

    def check_state(self, atoms: Atoms, tol: float = 1e-15) -> list[str]:
        """What changed since the last calculation, among the inputs that the potential reads.

        `atoms.info` counts for the potential's own entries only (charge, spin): notes in it cost no calculation.
        """
        changes = super().check_state(atoms, tol=tol)
        if not changes and self.atoms is not None:
            keys = self.predictor.backend.info_keys
            if any(not _same(self.atoms.info.get(key), atoms.info.get(key)) for key in keys):
                changes.append("info")
        return changes

    def export_properties(self) -> Properties:
        """Results for `atoms.get_properties`: those that ASE has a name for."""
        return known_to_ase(self.results)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
