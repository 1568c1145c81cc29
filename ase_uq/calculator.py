"""The ASE calculator: the user's own, with uncertainties in its results."""

import os
import warnings
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator, Calculator, all_changes

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.errors import UQWarning
from ase_uq.predictor import Predictor
from ase_uq.readings import Reduction
from ase_uq.thresholds import Quantile
from ase_uq.uncertainty_model import UncertaintyModel


class UncertainCalculator(Calculator):
    """A potential whose results carry calibrated standard deviations, from the same forward pass.

    A drop-in for the calculator it wraps: energy, forces and stress are that one's, bit for bit. `results` holds the
    standard results, the uncertainties, and the wrapped calculator's extras of each atom (orb's `confidence`). Its
    other keys are not passed on: a committee's `..._comm` and `..._var`, `node_energy`.

        calc = UncertainCalculator(MACECalculator("my.model"), "my.uq.safetensors")
        atoms.calc = calc
        atoms.get_forces(); calc.results["forces_uncertainty"]

    Args:
        calculator: The user's MACE or orb calculator (also inside a `SumCalculator`), or a SPEC string such as
            `"mace:my.model"` or `"orb:orb_v3_direct_20_omat"`.
        uncertainty_model: What `fit` made for this potential: a model or the path of its file.

    Attributes:
        implemented_properties: The standard results and the uncertainties that `results` holds after a calculation,
            without the extras; a list of this instance.
        uncertainty_model: The model in use.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a whole, unaltered uncertainty model.
    """

    def __init__(
        self,
        calculator: BaseCalculator | Backend | str,
        uncertainty_model: UncertaintyModel | str | os.PathLike[str],
    ) -> None:
        super().__init__()
        if not isinstance(uncertainty_model, UncertaintyModel):
            uncertainty_model = UncertaintyModel.load(uncertainty_model)
        self.predictor = Predictor(load_backend(calculator), uncertainty_model)
        self.implemented_properties = list(self.predictor.results)
        if uncertainty_model.gradients:
            dear = [name for name, fitted in uncertainty_model.methods.items() if fitted.head.gradients]
            warnings.warn(
                f"{' and '.join(dear)} takes further backward passes at every step, many times the cost of the rest. "
                "For dynamics fit an uncertainty model without it.",
                UQWarning,
                stacklevel=2,
            )

    @property
    def uncertainty_model(self) -> UncertaintyModel:
        return self.predictor.uncertainty_model

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """One forward pass; every result is set, whichever was asked for."""
        # What fails below must not leave the results of the structure before, which would pass for this one's.
        self.results = {}
        super().calculate(atoms, list(properties), list(system_changes))
        assert self.atoms is not None
        # ASE's copy shares what stands in info: an array changed in place would pass for unchanged.
        keys = self.predictor.backend.info_keys
        self.atoms.info |= {key: deepcopy(self.atoms.info[key]) for key in keys if key in self.atoms.info}
        self.results = self.predictor.predict([self.atoms])[0].results

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

    def threshold(self, meaning: float | Quantile, reduction: Reduction | None = None) -> float:
        """A threshold in eV/Å from its meaning; see `UncertaintyModel.threshold`."""
        return self.uncertainty_model.threshold(meaning, reduction)


def _same(a: Any, b: Any) -> bool:
    if a is None or b is None:
        return a is b
    return bool(np.array_equal(np.asarray(a), np.asarray(b)))
