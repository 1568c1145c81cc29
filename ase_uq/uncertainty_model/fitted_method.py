"""One fitted method with the calibrators that turn its raw scores into standard deviations."""

from dataclasses import dataclass

from torch import Tensor

from ase_uq.calibration import Calibrator, FarFieldCalibrator
from ase_uq.display.representation import Brief
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods.base import Head, Raw
from ase_uq.uncertainty_model.far_field import Limits


@dataclass(frozen=True, repr=False)
class FittedMethod(Brief):
    """A head with the calibrators of its quantities.

    Args:
        head: Computes raw scores from a forward pass.
        calibrators: Calibrator by quantity: `forces` and, where labels allowed, `energy`, `energies`, `stress`.
        likelihoods: Cross-validated negative log-likelihoods by quantity, of the forms tried and of a constant.
    """

    head: Head
    calibrators: dict[str, Calibrator]
    likelihoods: dict[str, dict[str, float]]

    def force_variance(self, raw: Raw, limit: Tensor | None, numbers: Tensor) -> Tensor:
        """(n_atoms, n_components) calibrated variances, (eV/Å)².

        Args:
            raw: Raw scores of the head.
            limit: (n_atoms,) σ∞² of `FarField`, or None for a model that was fitted without one.
            numbers: (n_atoms,) atomic numbers.
        """
        of_atoms = None if limit is None else limit[:, None]
        return self.calibrators["forces"].variance(raw.forces, of_atoms, numbers[:, None])

    def standard_deviations(self, raw: Raw, limits: Limits | None, forward_pass: ForwardPass) -> dict[str, Tensor]:
        """Calibrated standard deviations of a batch by results key.

        Args:
            raw: Raw scores of the head.
            limits: σ∞² of all quantities, or None for a model that was fitted without a far field.
            forward_pass: The batch.
        """
        forces = self.force_variance(raw, limits and limits.forces, forward_pass.numbers).sqrt()
        deviations = {"forces_uncertainty": forces.expand(-1, 3)}
        if "energy" in self.calibrators:
            # Calibrated per atom of a structure, so that sizes can be mixed.
            per_atom = self.calibrators["energy"].variance(raw.energy, limits and limits.energy).sqrt()
            deviations["energy_uncertainty"] = forward_pass.n_atoms_of_frame * per_atom
        if "energies" in self.calibrators:
            calibrator = self.calibrators["energies"]
            # The law with a far end reads the distance of an atom; every other form the score of its energy.
            scores = raw.distance if isinstance(calibrator, FarFieldCalibrator) else raw.energies
            of_atoms = calibrator.variance(scores[:, None], limits and limits.energies)
            deviations["energies_uncertainty"] = of_atoms.sqrt()
        if "stress" in self.calibrators:
            stress = self.calibrators["stress"].variance(raw.stress, limits and limits.stress).sqrt()
            deviations["stress_uncertainty"] = stress[:, None].expand(-1, 6)
        return deviations
