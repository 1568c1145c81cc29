"""Reference values that frames carry: finding and checking them, and removing those that no longer hold."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.stress import full_3x3_to_voigt_6_stress

from ase_uq.errors import LabelError

# Names of the reference (energy, forces, stress), in the order of the search; the last are those of `atoms.calc`.
LABEL_KEYS = (("REF_energy", "REF_forces", "REF_stress"), ("energy", "forces", "stress"))
_STRUCTURE = {"numbers", "positions", "masses", "tags", "initial_charges", "initial_magmoms"}
_ROUNDING = 1e-5  # errors below this share of the forces are rounding errors


@dataclass(frozen=True)
class Labels:
    """Reference values of one frame, in ASE's units.

    Args:
        energy: eV, or None.
        forces: (n_atoms, 3) eV/Å, or None.
        stress: (6,) eV/Å³, Voigt, or None.
    """

    energy: float | None
    forces: np.ndarray | None
    stress: np.ndarray | None


def labels_of(atoms: Atoms, keys: tuple[str, str, str] | None = None) -> Labels:
    """Reference values of a frame.

    Args:
        atoms: Frame with `REF_energy` in info, `REF_forces` in arrays and `REF_stress` in info, or with the
            results of a reference calculator attached.
        keys: Names of energy, forces and stress to use instead.

    Returns:
        The labels; all None if the frame has neither an energy nor forces.

    Raises:
        LabelError: The stress has neither 6 nor 9 numbers.
    """
    for energy_key, forces_key, stress_key in (keys,) if keys else LABEL_KEYS:
        results = atoms.calc.results if isinstance(atoms.calc, Calculator) else {}
        energy = atoms.info.get(energy_key, results.get(energy_key))
        forces = atoms.arrays.get(forces_key, results.get(forces_key))
        stress = atoms.info.get(stress_key, results.get(stress_key))
        if energy is not None or forces is not None:
            return Labels(
                None if energy is None else float(energy),
                None if forces is None else np.asarray(forces, float),
                None if stress is None else _voigt(stress),
            )
    return Labels(None, None, None)


def check_labels(which: str, atoms: Atoms, labels: Labels) -> None:
    """Refuses labels whose shape does not fit their frame, or that are not finite.

    Args:
        which: Name of the frame in error texts, such as "training frame 4".
        atoms: The frame.
        labels: Its labels.

    Raises:
        LabelError: The forces have another shape, or a label is not finite.
    """
    if labels.forces is not None and labels.forces.shape != (len(atoms), 3):
        raise LabelError(
            f"{which} has forces of shape {labels.forces.shape}, but its {len(atoms)} atoms need ({len(atoms)}, 3)."
        )
    for kind, value in (("energy", labels.energy), ("forces", labels.forces), ("stress", labels.stress)):
        if value is not None and not np.isfinite(value).all():
            raise LabelError(f"{which} has non-finite values in its reference {kind}. Remove the frame.")


def refuse_own_forces(labels: str, error: float, size: float, *, purpose: str) -> None:
    """Refuses labels that are the potential's own forces, as in frames that were scored but not labelled.

    Args:
        labels: Name of the labels in error texts, such as "the calibration labels".
        error: Norm or RMS of reference - prediction over some frames, eV/Å.
        size: Norm or RMS of the forces of these frames, eV/Å.
        purpose: What the errors are needed for, such as "to calibrate on".

    Raises:
        LabelError: Reference and prediction agree up to rounding errors.
    """
    if error < _ROUNDING * size:
        raise LabelError(
            f"{labels} are the potential's own forces (they agree to {error / size:.0e}): there are no errors "
            f"{purpose}. Give the reference that the potential was trained on, such as DFT."
        )


def drop_labels(atoms: Atoms) -> None:
    """Removes `REF_*` values: those of the first structure of a run would be wrong labels for a later one."""
    for key in LABEL_KEYS[0]:
        atoms.info.pop(key, None)
        atoms.arrays.pop(key, None)


def keep_structure(atoms: Atoms, *further: str) -> None:
    """Removes all arrays except those of the structure and the `further` ones: any may be a label of unknown name."""
    for name in atoms.arrays.keys() - _STRUCTURE.union(further):
        del atoms.arrays[name]


def _voigt(stress: Any) -> np.ndarray:
    stress = np.asarray(stress, float)
    if stress.size not in (6, 9):
        raise LabelError(f"a reference stress has shape {stress.shape}; 6 (Voigt) or 9 numbers were expected.")
    return stress if stress.shape == (6,) else full_3x3_to_voigt_6_stress(stress.reshape(3, 3))
