"""The ASE calculator: wraps the user's own, with uncertainties in its results."""

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
from ase_uq.stream.limits import default_batch_atoms
from ase_uq.uncertainty_model.model import UncertaintyModel


class UncertainCalculator(CalibratedCalculator):
    """A potential whose results carry calibrated standard deviations, from the same forward pass.

    A drop-in replacement for the calculator it wraps: energy, forces and stress are the same, bit for bit. `results`
    holds the standard results, the uncertainties, and the wrapped calculator's per-atom extras (orb's `confidence`).
    Its other keys are not passed on: a committee's `..._comm` and `..._var`, `node_energy`. Uncertainties that a file
    left in info and arrays of the structure are removed when it is calculated.

        calc = UncertainCalculator(MACECalculator("my.model"), "my.uq.safetensors")
        atoms.calc = calc
        atoms.get_forces(); calc.results["forces_uncertainty"]

    Recently calculated structures cost no second forward pass when they come again: the images of a band or a dimer
    that share one calculator, the fixed ends of a path, a move that is taken back. The results of the last 100
    structures, or 100 000 atoms, are remembered, which takes 15 µs per step with 500 atoms. `reset` forgets them: call
    it after the potential itself was changed.

    With `every=N` only the 1st, the N+1th, ... calculation includes uncertainties; the others run the bare potential
    and their `results` have none. This saves the cost of the methods, next to nothing for `bll` and much for `ntk`. An
    uncertainty requested at a skipped step, by `get_property("forces_uncertainty", atoms)`, costs another forward pass;
    with `allow_calculation=False` it is None instead. Calculations of all structures are counted together: if images
    share a calculator, the same images may have the uncertainties each time.

    Args:
        calculator: The user's MACE, orb or SevenNet calculator (also inside a `SumCalculator`), the path of a `.model`
            file, or a SPEC such as `"mace:my.model"` or `"orb:orb_v3_direct_20_omat"`.
        uncertainty_model: Uncertainty model that `fit` made for this potential, or the path of its file.
        every: Number of calculations from one with uncertainties to the next. Forces do not depend on it.
        interval: Confidence in (0, 1) for `forces_interval` in the results, (n_atoms,) eV/Å: in frames like those of
            the calibration, the norm of an atom's force error does not exceed it with that probability. None leaves it
            out.
        ensemble: Number of members of `energy_ensemble` in the results, (n_members,) eV: samples of the energy with the
            energy as their mean and `energy_uncertainty` as their standard deviation, from the same draws for all
            structures, so that error bars of differences know of correlations. 0 leaves it out.
        ensemble_forces: Number of members, the first ones of `ensemble`, whose forces are in `forces_ensemble` of the
            results, (n_atoms, 3, n) eV/Å. Each costs a backward pass where forces are slopes of the energy, and nothing
            for a direct head. Where stresses are slopes of the energy and calibrated, crystals have `stress_ensemble`
            from the same passes, (6, n) eV/Å³. 0 leaves both out.
        force_probes: Number of backward passes from which variances of an exact posterior of forces (`bll` fitted with
            `conservative="exact"`) are estimated; 0 takes all that there are, a pass for each weight of the last layer.

    Attributes:
        implemented_properties: The standard results and the uncertainties that `results` holds after a calculation
            with uncertainties, without the extras; a list of this instance.
        every: Number of calculations from one with uncertainties to the next.
        n_calculated: Number of calculations so far; `every` counts them. A run that goes on sets it to its step.
        uncertainty_model: The uncertainty model in use.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a complete, unaltered uncertainty model.
        ValueError: `every` is not a whole number of 1 or more, the calibration data cannot support the interval, or
            `ensemble` or `ensemble_forces` is no number of members, or there is nothing that `force_probes` could
            estimate.
        InputError: No method has a posterior from which an ensemble could be drawn.
    """

    def __init__(
        self,
        calculator: BaseCalculator | Backend | str | os.PathLike[str],
        uncertainty_model: UncertaintyModel | str | os.PathLike[str],
        *,
        every: int = 1,
        interval: float | None = None,
        ensemble: int = 0,
        ensemble_forces: int = 0,
        force_probes: int = 0,
    ) -> None:
        super().__init__()
        if not isinstance(every, Integral) or every < 1:
            raise ValueError(
                f"every={every!r} is not a whole number of 1 or more. Give every=1 for uncertainties at each "
                "calculation, every=5 for the 1st, the 6th, the 11th and so on."
            )
        if not isinstance(uncertainty_model, UncertaintyModel):
            uncertainty_model = UncertaintyModel.load(uncertainty_model)
        backend, asked = load_backend(calculator), (interval, ensemble, ensemble_forces, force_probes)
        self.predictor = Predictor(backend, uncertainty_model, *asked)
        self.implemented_properties = list(self.predictor.results)
        self.every = int(every)
        self._uncertain = frozenset(self.predictor.results).difference(self.predictor.backend.results)
        self.n_calculated = 0
        self._memory = Memory()
        if self.predictor.gradients and self.every == 1:
            costly = [name for name, fitted in uncertainty_model.methods.items() if fitted.head.gradients]
            without = "fit an uncertainty model without it" if costly else "leave ensemble_forces out"
            warnings.warn(
                f"{' and '.join(costly) or 'ensemble_forces'} takes further backward passes at every step, many times "
                f"the cost of the rest. For dynamics {without}, or give every=N for uncertainties at each Nth step.",
                UQWarning,
                stacklevel=2,
            )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = all_changes,
    ) -> None:
        """One forward pass, or none for a remembered structure; every result is set, whichever was requested.

        At a step that `every` skips, uncertainties are set only if one of them is among `properties`.
        """
        atoms = self._begin(atoms, properties, system_changes)
        inputs = inputs_of(atoms, self.predictor.backend.info_keys)
        requested = self._uncertain.intersection(properties)
        remembered = self._memory.recall(inputs)
        if remembered and requested <= remembered.keys():
            self.results = remembered
            return
        wanted = bool(requested) or self.n_calculated % self.every == 0
        predicted = self.predictor.predict([atoms], uncertainties=wanted)[0].results
        # Calculating a structure again for an uncertainty does not count towards `every`, and the results that were
        # returned before are kept: a GPU need not give the same bits twice.
        if not remembered:
            self.n_calculated += 1
        self.results = predicted | remembered
        self._memory.keep(inputs, len(atoms), self.results)

    def results_of(self, frames: Sequence[Atoms]) -> list[dict[str, Any]]:
        """Results of several structures, evaluated together; this calculator forgets and remembers nothing by it."""
        return [prediction.results for prediction in self.predictor.predict(frames)]

    def together(self, n_atoms: int) -> int:
        """Number of structures of so many atoms that are best evaluated together, at least 1."""
        return max(1, default_batch_atoms(self.predictor.backend.device.type) // n_atoms)

    def reset(self) -> None:
        """Forgets all results, also those of earlier structures; the next calculation includes uncertainties."""
        super().reset()
        self._memory = Memory()
        self.n_calculated = 0

    def calculation_required(self, atoms: Atoms, properties: Sequence[str]) -> bool:
        """Whether these properties cost a forward pass; False for a structure that is remembered."""
        if not super().calculation_required(atoms, list(properties)):
            return False
        return not set(properties) <= self._memory.recall(inputs_of(atoms, self.predictor.backend.info_keys)).keys()

    def __getstate__(self) -> dict[str, Any]:
        # Copies, in this process or another, start without the remembered results: they may be many.
        return {**vars(self), "_memory": Memory()}
