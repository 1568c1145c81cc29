"""A potential with uncertainties as a TorchSim model."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
import torch_sim as ts
from ase import Atoms
from ase.calculators.calculator import BaseCalculator
from ase.stress import voigt_6_to_full_3x3_stress
from torch import Tensor
from torch_sim.models.interface import ModelInterface

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.engines.ase.base import Calibrated
from ase_uq.engines.torchsim.constraints import initial_state
from ase_uq.errors import InputError
from ase_uq.prediction import Prediction
from ase_uq.predictor import Predictor
from ase_uq.properties import find_property
from ase_uq.uncertainty_model.model import UncertaintyModel


class UncertainModel(Calibrated, ModelInterface):
    """A potential whose outputs carry calibrated standard deviations, from the same forward pass, as a TorchSim model.

    It returns the results of `UncertainCalculator` for each system, in TorchSim's form: `energy` (n_systems,), `forces`
    (n_atoms, 3) and, if the potential has one, `stress` (n_systems, 3, 3). The other keys are those of the calculator:
    `energies`, `forces_uncertainty`, `gamma`, ... with n_atoms rows, `energy_uncertainty` and `stress_uncertainty`
    (Voigt) with n_systems rows. Units are eV, eV/Å and eV/Å³. Everything is detached, on the model's device and in its
    dtype, to which uncertainties are rounded. TorchSim's integrators and optimisers keep the uncertainties in the
    state, `state.forces_uncertainty`, and `ts.static` returns them.

    The potential's own package builds the neighbour lists, so the structures go through the CPU at every step.

    Args:
        calculator: The user's MACE, orb or SevenNet calculator, a backend, or a SPEC such as `"mace:my.model"`.
        uncertainty_model: Uncertainty model that `fit` made for this potential, or the path of its file.
        interval: Confidence in (0, 1) of `forces_interval`; None leaves it out. See `UncertainCalculator`.

    Raises:
        PotentialMismatch: The uncertainty model was fitted on another potential.
        ArtefactError: The file is not a complete, unaltered uncertainty model.
        ValueError: The calibration data cannot support the interval.
    """

    def __init__(
        self,
        calculator: BaseCalculator | Backend | str,
        uncertainty_model: UncertaintyModel | str | os.PathLike[str],
        *,
        interval: float | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(uncertainty_model, UncertaintyModel):
            uncertainty_model = UncertaintyModel.load(uncertainty_model)
        backend = load_backend(calculator)
        self.predictor = Predictor(backend, uncertainty_model, interval)
        # "cuda" becomes "cuda:0", as the tensors of a state have it.
        self._device = torch.empty(0, device=backend.device).device
        self._dtype = backend.dtype
        self._compute_forces = True
        self._compute_stress = "stress" in backend.results

    def forward(self, state: ts.SimState, **kwargs: Any) -> dict[str, Tensor]:
        """One forward pass over all systems of a state, which is not changed.

        Charge and spin, if the potential reads them, are taken from the state's system extras of these names.

        Args:
            state: Systems in the model's dtype, on its device.
            kwargs: Unused, but part of TorchSim's interface.

        Returns:
            Outputs by key, as the class describes them.

        Raises:
            TypeError: The state has another dtype.
            ValueError: The state is on another device.
            InputError: A system has an element that the potential does not know, has positions that are not finite,
                or lacks a charge or spin.
        """
        return self._outputs(state, dict(enumerate(self.predictor.predict(self._frames(state)))))

    def _initial_state(self, system: Any) -> ts.SimState:
        """The state of systems, in which ASE's `FixAtoms` holds; warns of other constraints."""
        return initial_state(system, self.device, self.dtype)

    def _frames(self, state: ts.SimState, systems: Sequence[int] | None = None) -> list[Atoms]:
        """Systems of a state, all by default, with the inputs that the potential reads."""
        self._check(state)
        keys = [key for key in self.predictor.backend.info_keys if state.has_extras(key)]
        info = {key: getattr(state, key).detach().cpu().numpy() for key in keys}
        numbers, positions = (value.detach().cpu().numpy() for value in (state.atomic_numbers, state.positions))
        cells, pbc = state.row_vector_cell.detach().cpu().numpy(), state.pbc.cpu().numpy()
        ends = np.cumsum(state.n_atoms_per_system.cpu().numpy())
        starts = np.concatenate([[0], ends[:-1]])
        return [
            Atoms(
                numbers[starts[system] : ends[system]],
                positions[starts[system] : ends[system]],
                cell=cells[system],
                pbc=pbc,
                info={key: values[system].item() for key, values in info.items()},
            )
            for system in (range(len(ends)) if systems is None else systems)
        ]

    def _check(self, state: ts.SimState) -> None:
        if state.dtype != self.dtype:
            raise TypeError(
                f"the state is in {state.dtype} and the potential in {self.dtype}. Make the state with "
                "ts.initialize_state(frames, model.device, model.dtype), or load the potential with another dtype."
            )
        if state.device != self.device:
            raise ValueError(
                f"the state is on {state.device} and the potential on {self.device}. Make the state with "
                "ts.initialize_state(frames, model.device, model.dtype)."
            )
        missing = [key for key in self.predictor.backend.required_info_keys if not state.has_extras(key)]
        if missing:
            wanted = {key: key for key in missing}
            raise InputError(
                f"the state has no {' and '.join(missing)}, which this potential reads. Make the state with "
                f"ts.io.atoms_to_state(frames, model.device, model.dtype, system_extras_map={wanted})."
            )

    def _outputs(self, state: ts.SimState, predictions: Mapping[int, Prediction]) -> dict[str, Tensor]:
        """Predictions, given by the number of their system, as tensors; rows of systems without a result are 0."""
        outputs = {}
        atoms_of = np.split(np.arange(state.n_atoms), np.cumsum(state.n_atoms_per_system.cpu().numpy())[:-1])
        # A structure may lack a result that others have, such as the stress of a correction.
        examples = {key: value for each in predictions.values() for key, value in each.results.items()}
        for key, example in examples.items():
            if key == "free_energy":  # the energy again, under the name that ASE's optimisers ask for
                continue
            entry = find_property(key)
            per_atom = entry is None or entry.per_atom  # extras are per atom
            shape = np.shape(example)[1:] if per_atom else (3, 3) if key == "stress" else np.shape(example)
            values = np.zeros((state.n_atoms if per_atom else len(atoms_of), *shape))
            for system, prediction in predictions.items():
                if key not in prediction.results:
                    continue
                value = prediction[key]
                values[atoms_of[system] if per_atom else system] = (
                    voigt_6_to_full_3x3_stress(value) if key == "stress" else value
                )
            outputs[key] = torch.from_numpy(values).to(self.device, self.dtype)
        if self.compute_stress and "stress" not in outputs:
            outputs["stress"] = torch.zeros(len(atoms_of), 3, 3, device=self.device, dtype=self.dtype)
        return outputs
