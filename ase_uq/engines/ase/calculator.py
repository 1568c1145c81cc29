"""The ASE calculator: the user's own, with uncertainties in its results."""

import os
import warnings
from collections.abc import Sequence
from numbers import Integral
from typing import Any

from ase import Atoms
from ase.calculators.calculator import BaseCalculator, all_changes

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.engines.ase.base import CalibratedCalculator
from ase_uq.engines.ase.memory import Memory, inputs_of
from ase_uq.errors import UQWarning
from ase_uq.predictor import Predictor
from ase_uq.uncertainty_model.model import UncertaintyModel


class UncertainCalculator(CalibratedCalculator):
    """A potential whose results carry calibrated standard deviations, from the same forward pass.

    A drop-in for the calculator it wraps: energy, forces and stress are that one's, bit for bit. `results` holds the
    standard results, the uncertainties, and the wrapped calculator's extras of each atom (orb's `confidence`). Its
    other keys are not passed on: a committee's `..._comm` and `..._var`, `node_energy`.

        calc = UncertainCalculator(MACECalculator("my.model"), "my.uq.safetensors")
        atoms.calc = calc
        atoms.get_forces(); calc.results["forces_uncertainty"]

    Structures that were calculated lately cost no second forward pass when they come again: the images of a band or a
    dimer that share one calculator, the fixed ends of a path, a move that is taken back. The results of the last 100
    structures, or 100 000 atoms, are remembered for it; with 500 atoms that takes 15 µs a step. `reset` forgets them:
    call it after the potential itself was changed.

    With `every=N` only the 1st, the N+1th, ... calculation takes uncertainties; the others run the bare potential and
    their `results` have none. What is saved is the cost of the methods, next to nothing for `bll` and much for `ntk`.
    An uncertainty that is asked for at a skipped step, by `get_property("forces_uncertainty", atoms)`, is calculated
    after all, at the price of another forward pass; with `allow_calculation=False` it is None instead. Calculations
    of all structures are counted together: of images that share a calculator it may be the same ones each time.

    Args:
        calculator: The user's MACE or orb calculator (also inside a `SumCalculator`), or a SPEC string such as
            `"mace:my.model"` or `"orb:orb_v3_direct_20_omat"`.
        uncertainty_model: What `fit` made for this potential: a model or the path of its file.
        every: Uncertainties are calculated once in so many calculations. Forces are the same whatever it is.
        interval: Confidence in (0, 1) for `forces_interval` in the results: (n_atoms,) eV/Å, which the norm of the
            force error of an atom of a frame like those of the calibration does not exceed with that probability.
            None leaves it out.

    Attributes:
        implemented_properties: The standard results and the uncertainties that `results` holds after a calculation
            with uncertainties, without the extras; a list of this instance.
        every: As given.
        uncertainty_model: The model in use.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a whole, unaltered uncertainty model.
        ValueError: `every` is not a whole number of 1 or more, or the calibration data cannot support the interval.
    """

    def __init__(
        self,
        calculator: BaseCalculator | Backend | str,
        uncertainty_model: UncertaintyModel | str | os.PathLike[str],
        *,
        every: int = 1,
        interval: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(every, Integral) or every < 1:
            raise ValueError(
                f"every={every!r} is not a whole number of 1 or more. Give every=1 for uncertainties at each "
                "calculation, every=5 for the 1st, the 6th, the 11th and so on."
            )
        if not isinstance(uncertainty_model, UncertaintyModel):
            uncertainty_model = UncertaintyModel.load(uncertainty_model)
        self.predictor = Predictor(load_backend(calculator), uncertainty_model, interval)
        self.implemented_properties = list(self.predictor.results)
        self.every = int(every)
        self._uncertain = frozenset(self.predictor.results).difference(self.predictor.backend.results)
        self._n_calculated = 0
        self._memory = Memory()
        if uncertainty_model.gradients and self.every == 1:
            dear = [name for name, fitted in uncertainty_model.methods.items() if fitted.head.gradients]
            warnings.warn(
                f"{' and '.join(dear)} takes further backward passes at every step, many times the cost of the rest. "
                "For dynamics fit an uncertainty model without it, or give every=N for uncertainties at each Nth step.",
                UQWarning,
                stacklevel=2,
            )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """One forward pass, or none for a structure that is remembered; every result is set, whichever was asked for.

        At a step that `every` skips, uncertainties are set only where one of them is among `properties`.
        """
        atoms = self._begin(atoms, properties, system_changes)
        inputs = inputs_of(atoms, self.predictor.backend.info_keys)
        asked = self._uncertain.intersection(properties)
        known = self._memory.recall(inputs)
        if known and asked <= known.keys():
            self.results = known
            return
        wanted = bool(asked) or self._n_calculated % self.every == 0
        predicted = self.predictor.predict([atoms], uncertainties=wanted)[0].results
        # A structure that is calculated again for an uncertainty takes no other's turn, and what was handed out for
        # it stands: a GPU need not give the same bits twice.
        if not known:
            self._n_calculated += 1
        self.results = predicted | known
        self._memory.keep(inputs, len(atoms), self.results)

    def reset(self) -> None:
        """Forgets all results, also of structures before the last; the next calculation takes uncertainties."""
        super().reset()
        self._memory = Memory()
        self._n_calculated = 0

    def calculation_required(self, atoms: Atoms, properties: Sequence[str]) -> bool:
        """Whether these properties cost a forward pass: not those of a structure that is remembered."""
        if not super().calculation_required(atoms, list(properties)):
            return False
        return not set(properties) <= self._memory.recall(inputs_of(atoms, self.predictor.backend.info_keys)).keys()

    def __getstate__(self) -> dict[str, Any]:
        # Copies, in this process or another, start without the remembered results: they may be many.
        return {**vars(self), "_memory": Memory()}
