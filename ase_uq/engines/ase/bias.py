"""Uncertainty-driven dynamics: a bias that pulls a run to where the potential is uncertain. Not physical.

    E = E_potential + E_bias,    E_bias = A·[exp(-σ_E² / (N·B²)) - 1],    F_bias = -∂E_bias/∂R

With σ_E the calibrated standard deviation of the total energy and N the number of atoms, E_bias falls from 0 where the
potential is certain to -A where it is not. The derivative of σ_E² is taken through the method and its calibration down
to the output of one forward pass of the potential, and from there to the positions by one further backward pass. Where
nothing is known σ_E depends on the predicted forces, whose derivative would take more passes: the bias takes their mean
over the calibration frames, so that its σ_E is that of the results on frames like those. Beyond the far end σ_E is
constant, and the bias does not pull. Of several methods it follows the one that measures a distance, the anchor of
`combined`: `energy_uncertainty_bll`, not the corrected `energy_uncertainty`, since corrections end near the data, and
those of a method like `confidence` have no derivative here.

Source: Kulichenko et al., Nature Computational Science 3, 230 (2023). Their σ_E² is a sum over the N_M members of an
ensemble, and their exponent is σ_E²/(N_M·N·B²); here σ_E² is already a variance.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from ase import Atoms
from ase.calculators.calculator import all_changes
from torch import Tensor

from ase_uq.calibration import FarFieldCalibrator
from ase_uq.engines.ase.base import CalibratedCalculator
from ase_uq.engines.ase.calculator import UncertainCalculator
from ase_uq.errors import InputError, UQWarning
from ase_uq.forward_pass import ForwardPass
from ase_uq.properties import STANDARD
from ase_uq.uncertainty_model.fitted_method import FittedMethod


class UncertaintyBias(CalibratedCalculator):
    """A potential plus a bias towards its own uncertainty. Runs with it are NOT physical dynamics.

    Use it to find frames worth labelling: temperatures, barriers, rates and averages of such a run mean nothing. Like
    any other run, halt it at uncertainties larger than those of frames that you want to label.

        calc = UncertainCalculator(MACECalculator("my.model"), "my.uq.safetensors")
        atoms.calc = UncertaintyBias(calc, height=0.3, width=0.001)

    `results` has `energy`, `free_energy` and `forces` of the biased surface, `unbiased_energy` and `unbiased_forces` of
    the potential (to rounding), `bias_energy` and `bias_forces`, and all uncertainties. There is no stress and no
    energy of single atoms: the stress of the bias is not calculated, so cells cannot be relaxed or coupled to a
    barostat. A step costs up to twice as much as without the bias: the graph of the forward pass is kept, and there is
    one more backward pass through it. Uncertainties are calculated at each step, whatever `every` the calculator has.

    Args:
        calculator: The potential with its uncertainty model, which must have been calibrated on energies.
        height: A, eV: the most by which the bias lowers the energy; 0 gives the plain potential.
        width: B, eV/√atom: the bias has reached 63 % of its height where σ_E = B·√N. If B is the usual
            `energy_uncertainty` (of several methods `energy_uncertainty_bll`), divided by √N, of frames that the
            potential knows, the bias acts from there on; with a much larger B it never acts.

    Attributes:
        implemented_properties: Keys that `results` holds after a calculation; a list of this instance.

    Raises:
        TypeError: The calculator is not an `UncertainCalculator`.
        ValueError: `height` is negative or `width` not positive, or the model has no uncertainty of energies.
        InputError: During a calculation: the potential is compiled, or this method's uncertainty of energies does not
            follow from quantities that can be differentiated.
    """

    def __init__(self, calculator: UncertainCalculator, *, height: float, width: float) -> None:
        super().__init__()
        if not isinstance(calculator, UncertainCalculator):
            raise TypeError(
                f"the bias follows the uncertainty of an UncertainCalculator, not of {type(calculator).__name__}. "
                "Give UncertaintyBias(UncertainCalculator(calculator, uncertainty_model), ...)."
            )
        if not 0 <= height < np.inf:
            raise ValueError(f"height is an energy in eV, 0 or above, not {height!r}.")
        if not 0 < width < np.inf:
            raise ValueError(f"width is a positive number in eV per square root of the number of atoms, not {width!r}.")
        model = calculator.uncertainty_model
        self._name = model.primary if model.combination is None else model.combination.inputs.anchor
        self._fitted = model.methods[self._name]
        if "energy" not in self._fitted.calibrators:
            raise ValueError(
                "the uncertainty model has no uncertainty of energies: its calibration frames had no energy labels. "
                "Fit it with frames that have them."
            )
        self.calculator, self.height, self.width = calculator, float(height), float(width)
        self.predictor = calculator.predictor
        uncertainties = [key for key in self.predictor.results if key not in STANDARD]
        biased = ["energy", "free_energy", "forces"]
        parts = ["unbiased_energy", "unbiased_forces", "bias_energy", "bias_forces"]
        self.implemented_properties = [*biased, *parts, *uncertainties]
        warnings.warn(
            "UncertaintyBias is not physical dynamics: its forces lead to where the potential is uncertain. Use it to "
            "find frames to label, not to measure anything.",
            UQWarning,
            stacklevel=2,
        )

    def calculate(
        self,
        atoms: Atoms | None = None,
        properties: Sequence[str] = ("energy",),
        system_changes: Sequence[str] = tuple(all_changes),
    ) -> None:
        """One forward pass and one more backward pass than the potential takes; every result is set."""
        atoms = self._begin(atoms, properties, system_changes)
        if self.height:
            backend = self.predictor.backend
            forward_pass = backend.forward(backend.collate([atoms]), gradients=True)
            unbiased = self.predictor.predictions(forward_pass)[0].results
            bias_energy, bias_forces = self._bias(forward_pass)
        else:  # keeping a graph changes the last bit of the forces, and costs time
            unbiased = self.predictor.predict([atoms])[0].results
            bias_energy, bias_forces = 0.0, np.zeros((len(atoms), 3))
        energy = unbiased["energy"] + bias_energy
        self.results = {
            **{key: value for key, value in unbiased.items() if key not in STANDARD},
            "energy": energy,
            "free_energy": energy,
            "forces": unbiased["forces"] + bias_forces,
            "unbiased_energy": unbiased["energy"],
            "unbiased_forces": unbiased["forces"],
            "bias_energy": bias_energy,
            "bias_forces": bias_forces,
        }

    def _bias(self, forward_pass: ForwardPass) -> tuple[float, np.ndarray]:
        """Energy, eV, and (n_atoms, 3) forces, eV/Å, of the bias."""
        variance, pull = _variance_and_pull(forward_pass, self._fitted, self._name)
        scale = len(pull) * self.width**2
        # ∂E_bias/∂σ² · (-∂σ²/∂R)
        forces = -self.height / scale * float(np.exp(-variance / scale)) * pull
        return self.height * float(np.expm1(-variance / scale)), forces


@dataclass(frozen=True)
class _Leaves:
    """Tensors at which the derivative of an uncertainty stops and the potential begins.

    Args:
        forward_pass: A forward pass that consists of the leaves.
        routed: Leaves whose derivatives by the positions are known, by name.
        others: Leaves whose derivatives are not known, by their name in messages.
    """

    forward_pass: ForwardPass
    routed: dict[str, Tensor]
    others: dict[str, Tensor]

    @classmethod
    def of(cls, e: ForwardPass) -> "_Leaves":
        routed = {
            "features": _leaf(e.features),
            "energy_features": _leaf(e.energy_layer.features),
            "vector": _leaf(e.edges.vector),
            "positions": _leaf(e.positions),
        }
        others = {"its energy": _leaf(e.energy)}
        changes: dict[str, Any] = {}
        if e.force_layer is not None:
            others["the last layer of its forces"] = leaf = _leaf(e.force_layer.features)
            changes["force_layer"] = replace(e.force_layer, features=leaf)
        if e.vectors is not None:
            others["its vectors"] = changes["vectors"] = _leaf(e.vectors)
        if e.members is not None:
            others["the members of its committee"] = leaf = _leaf(e.members.energy)
            changes["members"] = replace(e.members, energy=leaf)
        if e.confidence is not None:
            others["its confidence head"] = leaf = _leaf(e.confidence.probabilities)
            changes["confidence"] = replace(e.confidence, probabilities=leaf)
        forward_pass = replace(
            e,
            features=routed["features"],
            energy_layer=replace(e.energy_layer, features=routed["energy_features"]),
            edges=replace(e.edges, vector=routed["vector"]),
            positions=routed["positions"],
            energy=others["its energy"],
            **changes,
        )
        return cls(forward_pass, routed, others)


def _leaf(values: Tensor) -> Tensor:
    return values.detach().clone().requires_grad_(True)


def _variance_and_pull(e: ForwardPass, fitted: FittedMethod, name: str) -> tuple[float, np.ndarray]:
    """σ_E² in eV² of the one frame of a forward pass, and (n_atoms, 3) -∂σ_E²/∂R in eV²/Å.

    Raises:
        InputError: It depends on something other than features, distances and positions, or on nothing at all.
    """
    leaves = _Leaves.of(e)
    with torch.enable_grad():
        raw = fitted.head(leaves.forward_pass)
        calibrator = fitted.calibrators["energy"]
        limit = raw.energy.new_tensor([calibrator.limit]).exp() if isinstance(calibrator, FarFieldCalibrator) else None
        # The calibrated variance is that of the energy per atom.
        variance = (e.n_atoms_of_frame.double() ** 2 * calibrator.variance(raw.energy, limit)).sum()
    everything = {**leaves.routed, **leaves.others}
    gradients = [None] * len(everything)
    if variance.requires_grad:
        gradients = torch.autograd.grad(variance, list(everything.values()), allow_unused=True)
    slopes = {key: slope for key, slope in zip(everything, gradients, strict=True) if slope is not None}
    strange = [key for key in leaves.others if key in slopes]
    if strange or not slopes:
        on = f"comes from {' and '.join(strange)}" if strange else "is not a function of the potential's features"
        raise InputError(
            f"the uncertainty of energies by {name} {on}, which has no derivative by the positions here. Fit the "
            "uncertainty model with methods=['bll']."
        )
    assert e.gradients is not None
    none = torch.zeros_like(e.features)
    pull = e.gradients.of_features(slopes.get("features", none), slopes.get("energy_features")).double()
    if "vector" in slopes:  # vector = R_source - R_target plus a lattice vector
        slope = slopes["vector"].double()
        pull = pull.index_add(0, e.edges.source, -slope).index_add(0, e.edges.target, slope)
    if "positions" in slopes:
        pull = pull - slopes["positions"].double()
    return float(variance.detach()), pull.cpu().numpy()
