"""One fitted method with the calibrators that turn its raw scores into standard deviations."""

from dataclasses import dataclass

from torch import Tensor

from ase_uq.calibration import Calibrator
from ase_uq.methods.base import Head, Raw
from ase_uq.representation import Brief


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

    def standard_deviations(self, raw: Raw, n_atoms_of_frame: Tensor) -> dict[str, Tensor]:
        """Calibrated standard deviations by results key, from the raw scores of the head."""
        forces = self.calibrators["forces"].variance(raw.forces).sqrt()
        deviations = {"forces_uncertainty": forces.expand(-1, 3)}
        if "energy" in self.calibrators:
            # Calibrated per atom of a structure, so that sizes can be mixed.
            deviations["energy_uncertainty"] = n_atoms_of_frame * self.calibrators["energy"].variance(raw.energy).sqrt()
        if "energies" in self.calibrators:
            deviations["energies_uncertainty"] = self.calibrators["energies"].variance(raw.energies[:, None]).sqrt()
        if "stress" in self.calibrators:
            stress = self.calibrators["stress"].variance(raw.stress).sqrt()
            deviations["stress_uncertainty"] = stress[:, None].expand(-1, 6)
        return deviations
