"""The waist of the package: the one way from structures to results. Torch on one side, numpy on the other."""

import os
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from numbers import Integral

import numpy as np
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.data import chemical_symbols
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.errors import InputError, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.prediction import Prediction
from ase_uq.properties import find_property
from ase_uq.stream.passes import LeftOut, in_parts
from ase_uq.uncertainty_model.ensemble import Ensemble
from ase_uq.uncertainty_model.model import UncertaintyModel


class Predictor:
    """Means and uncertainties of structures from one forward pass.

    Args:
        backend: The potential: a backend, an ASE calculator of MACE or orb, a SPEC, or the path of a `.model` file.
        uncertainty_model: The uncertainty model that was fitted for this potential, or the path of its file.
        interval: Confidence in (0, 1) of `forces_interval`, a bound of the norm of each atom's force error; None
            leaves it out. It costs one product per atom. See `UncertaintyModel.intervals`.
        ensemble: Number of members of `energy_ensemble`, samples of the energy that are correlated between structures;
            0 leaves it out. Their energies cost nothing. See `uncertainty_model.ensemble`.
        ensemble_forces: Number of its members, the first ones, whose draws give `forces_ensemble`, and for a cell
            `stress_ensemble`; 0 leaves both out. A member costs a backward pass where forces are slopes of the energy,
            and nothing for a direct head, whose stresses have no members.
        force_probes: Number of backward passes from which variances of an exact posterior of forces (`bll` fitted with
            `conservative="exact"`) are estimated without bias, with a relative error of about √(2/n); 0 takes as many
            as there are weights, and has none.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ValueError: The calibration data cannot support the interval, there is nothing that `force_probes` could
            estimate, `force_probes` is no whole number, or `ensemble` or `ensemble_forces` no number of members.
        InputError: No method has a posterior from which an ensemble could be drawn.
    """

    def __init__(
        self,
        backend: Backend | BaseCalculator | str | os.PathLike[str],
        uncertainty_model: UncertaintyModel | str | os.PathLike[str],
        interval: float | None = None,
        ensemble: int = 0,
        ensemble_forces: int = 0,
        force_probes: int = 0,
    ) -> None:
        if not isinstance(uncertainty_model, UncertaintyModel):
            uncertainty_model = UncertaintyModel.load(uncertainty_model)
        backend = load_backend(backend)
        warning = backend.check_identity(uncertainty_model.identity)
        if warning:
            warnings.warn(warning, UQWarning, stacklevel=3)
        self.backend = backend
        self.uncertainty_model = uncertainty_model.to(backend.device)
        _estimate(self.uncertainty_model, force_probes)
        self.force_probes = int(force_probes)
        self._intervals = None if interval is None else self.uncertainty_model.intervals(interval)
        asked = ensemble != 0 or ensemble_forces != 0
        self._ensemble = Ensemble(self.uncertainty_model, ensemble, ensemble_forces) if asked else None
        self._named: set[int] = set()

    @property
    def results(self) -> tuple[str, ...]:
        """Results keys that every prediction with uncertainties has, but for those of a stress that is of no cell."""
        interval = () if self._intervals is None else ("forces_interval",)
        ensemble = () if self._ensemble is None else self._ensemble.results
        return (*self.backend.results, *self.uncertainty_model.results, *interval, *ensemble)

    @property
    def n_members(self) -> dict[str, int]:
        """Number of members of each results key that has some."""
        return {} if self._ensemble is None else self._ensemble.n_members

    @property
    def gradients(self) -> bool:
        """Whether uncertainties need `ForwardPass.gradients`, which cost further passes through the potential."""
        return self.uncertainty_model.gradients or (self._ensemble is not None and self._ensemble.gradients)

    def predict(self, frames: Sequence[Atoms], *, first: int = 0, uncertainties: bool = True) -> list[Prediction]:
        """Predictions of structures, evaluated together as one batch, or in parts if that is too large.

        A structure whose results are not finite does not change those of the others, and a warning names it.

        Args:
            frames: Structures; not changed.
            first: Number of the first structure, for messages.
            uncertainties: Whether to compute uncertainties. Without them no method is applied, and predictions hold
                only the results of the potential, at the cost of the potential alone.

        Raises:
            InputError: A structure cannot be evaluated.
        """
        if len(frames) <= 1:  # a step of molecular dynamics: nothing to be kept apart
            gradients = uncertainties and self.gradients
            forward_pass = self.backend.forward(self.backend.collate(frames, first=first), gradients=gradients)
            return self.predictions(forward_pass, uncertainties=uncertainties)
        predictions = []
        for number, outcome in enumerate(self.outcomes(frames, first=first, uncertainties=uncertainties), first):
            if isinstance(outcome, LeftOut):
                raise InputError(f"structure {number} cannot be evaluated: {outcome.reason}")
            if not np.isfinite(outcome["forces"]).all() or not np.isfinite(outcome["energy"]):
                warnings.warn(
                    f"structure {number}: the potential's energy or forces are not finite. The other structures are "
                    "not affected.",
                    UQWarning,
                    stacklevel=2,
                )
            predictions.append(outcome)
        return predictions

    def outcomes(
        self, frames: Sequence[Atoms], *, first: int = 0, uncertainties: bool = True
    ) -> list[Prediction | LeftOut]:
        """As `predict`, but a structure that cannot be evaluated has its reason in place of a prediction."""
        outcomes: list[Prediction | LeftOut] = []
        use = partial(self.predictions, uncertainties=uncertainties)
        gradients = uncertainties and self.gradients
        for event in in_parts(self.backend, frames, use, first=first, gradients=gradients):
            outcomes += [event] if isinstance(event, LeftOut) else event.value
        return outcomes

    def predictions(self, forward_pass: ForwardPass, *, uncertainties: bool = True) -> list[Prediction]:
        """Predictions of the structures of a forward pass.

        Args:
            forward_pass: A pass of this potential with forces, and with `gradients` where this has them; of one
                structure then.
            uncertainties: As in `predict`.
        """
        predictions = _split(forward_pass, self._uncertainties(forward_pass) if uncertainties else {})
        if uncertainties:
            self._name_unseen(forward_pass)
        return predictions

    def _uncertainties(self, forward_pass: ForwardPass) -> dict[str, Tensor]:
        results = self.uncertainty_model.apply(forward_pass)
        if self._intervals is not None:
            results["forces_interval"] = self._intervals(results["forces_uncertainty"], forward_pass.numbers)
        if self._ensemble is not None:
            results |= self._ensemble(forward_pass, results)
        return results

    def _name_unseen(self, forward_pass: ForwardPass) -> None:
        present = set(np.unique(forward_pass.numbers.cpu().numpy()).tolist())
        unseen = present - self.uncertainty_model.edges.elements - self._named
        if unseen:
            self._named |= unseen
            names = ", ".join(chemical_symbols[z] for z in sorted(unseen))
            warnings.warn(
                f"the uncertainty model was fitted without {names}: gamma is inf for these atoms and their "
                "uncertainties are guesses. Fit again with frames that contain them.",
                UQWarning,
                stacklevel=3,
            )


def _estimate(model: UncertaintyModel, force_probes: int) -> None:
    if not isinstance(force_probes, Integral) or isinstance(force_probes, bool) or force_probes < 0:
        raise ValueError(
            f"force_probes={force_probes!r} is not a whole number of 0 or more. Give force_probes=16, or leave it out "
            "for exact variances."
        )
    heads = [fitted.head for fitted in model.methods.values() if fitted.head.estimates]
    if force_probes and not heads:
        raise ValueError(
            f"force_probes={force_probes}, but no method of this model ({', '.join(model.methods)}) has an exact "
            "posterior of forces to estimate. Fit bll with conservative='exact', or leave the probes out."
        )
    for head in heads:
        head.estimate(int(force_probes))


def as_predictor(
    calculator: BaseCalculator | Predictor | Backend | str | os.PathLike[str],
    uncertainty_model: UncertaintyModel | str | os.PathLike[str] | None,
) -> Predictor:
    """The predictor of an `UncertainCalculator`, or of a bare potential and its uncertainty model.

    Args:
        calculator: A calculator, a SPEC, the path of a `.model` file, or a predictor, which is returned as it is.
        uncertainty_model: For a bare potential, an uncertainty model or the path of its file; None for an
            `UncertainCalculator`.

    Raises:
        TypeError: A bare potential without an uncertainty model, or an uncertainty model for a calculator that has one.
    """
    # An UncertainCalculator is recognised by its predictor: its module is in a higher layer and cannot be imported.
    predictor = calculator if isinstance(calculator, Predictor) else getattr(calculator, "predictor", None)
    if isinstance(predictor, Predictor):
        if uncertainty_model is not None:
            raise TypeError(
                f"{type(calculator).__name__} already has an uncertainty model, and another was given. Leave "
                "uncertainty_model out, or give the bare potential."
            )
        return predictor
    assert not isinstance(calculator, Predictor)
    if uncertainty_model is None:
        named = calculator if isinstance(calculator, str | os.PathLike) else type(calculator).__name__
        raise TypeError(
            f"{named} is a bare potential: give "
            "the uncertainty_model that `fit` made for it, or an UncertainCalculator."
        )
    return Predictor(calculator, uncertainty_model)


def _split(forward_pass: ForwardPass, uncertainties: Mapping[str, Tensor]) -> list[Prediction]:
    means = {
        "energy": forward_pass.energy,
        "free_energy": forward_pass.energy,
        "energies": forward_pass.energies,
        "forces": forward_pass.forces,
        "stress": forward_pass.stress,
    }
    values = {key: value for key, value in (means | dict(uncertainties)).items() if value is not None}
    arrays = {key: value.cpu().numpy() for key, value in (values | forward_pass.extras).items()}
    ends = np.cumsum(forward_pass.n_atoms_of_frame.cpu().numpy())
    has_cell = np.ones(len(ends), bool) if forward_pass.volumes is None else (forward_pass.volumes > 0).cpu().numpy()
    starts = ends - forward_pass.n_atoms_of_frame.cpu().numpy()
    predictions = []
    for frame, (start, end) in enumerate(zip(starts, ends, strict=True)):
        results = {}
        # With an energy but no stress at all, it is one that the potential does not give for this structure.
        finite = bool(np.isfinite(arrays["energy"][frame]))
        no_stress = finite and "stress" in arrays and np.isnan(arrays["stress"][frame]).all()
        without = {"stress"} if no_stress else set()
        if no_stress or not has_cell[frame]:  # what a stress of another cell is worth is not known
            without |= {"stress_uncertainty", "stress_ensemble"}
        for key, array in arrays.items():
            entry = find_property(key)
            if entry is not None and entry.name in without:
                continue
            per_atom = entry is None or entry.per_atom  # extras are per atom
            part = array[start:end] if per_atom else array[frame]
            results[key] = float(part) if part.ndim == 0 else np.array(part)
        predictions.append(Prediction(results))
    return predictions
