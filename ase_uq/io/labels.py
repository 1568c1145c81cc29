"""Reference values that frames carry: finding and checking them, and removing those that no longer hold."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.stress import full_3x3_to_voigt_6_stress

from ase_uq.errors import LabelError, UQWarning

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


def labels_of(atoms: Atoms, keys: tuple[str, str, str] | None = None, which: str = "a frame") -> Labels:
    """Reference values of a frame.

    Args:
        atoms: Frame with `REF_energy` in info, `REF_forces` in arrays and `REF_stress` in info, or with the
            results of a reference calculator attached. Where only some of the labels were renamed, the results
            complete them.
        keys: Names of energy, forces and stress to use instead.
        which: Name of the frame in error texts, such as "training frame 4".

    Returns:
        The labels; all None if the frame has neither an energy nor forces.

    Raises:
        LabelError: The results of its calculator belong to another structure, the energy is not a number, forces or
            stress are not numbers, or the stress has neither 6 nor 9 of them.
    """
    results = atoms.calc.results if isinstance(atoms.calc, Calculator) else {}
    found = _found(atoms, results, keys or LABEL_KEYS[0])
    changed = atoms.calc.check_state(atoms) if isinstance(atoms.calc, Calculator) and results else []
    if not keys:
        # Results of another structure do not matter where the frame has labels of its own.
        plain = _found(atoms, {} if found and changed else results, LABEL_KEYS[1])
        # Beside forces that are not the reference, an energy is that of a potential, too.
        if not found or all(kind not in found or np.array_equal(found[kind], plain[kind]) for kind in plain):
            found = plain | found
    own = {kind for names in ((keys,) if keys else LABEL_KEYS) for kind in _found(atoms, {}, names)}
    if changed and found.keys() - own:
        raise LabelError(
            f"{which} has a calculator with the results of another structure ({', '.join(changed)} differ): several "
            "frames share it, or the atoms were changed after the calculation. Give each frame its own results, as in "
            "atoms.calc = SinglePointCalculator(atoms, energy=..., forces=...), or write the frames to a file one by "
            "one."
        )
    if found.keys() <= {"stress"}:
        return Labels(None, None, None)
    labels = {kind: _AS_LABEL[kind](value, which) for kind, value in found.items()}
    return Labels(labels.get("energy"), labels.get("forces"), labels.get("stress"))


def _found(atoms: Atoms, results: Mapping[str, Any], names: tuple[str, str, str]) -> dict[str, Any]:
    """Which of energy, forces and stress a frame has under these names."""
    stores = {"energy": atoms.info, "forces": atoms.arrays, "stress": atoms.info}
    if "timestep" in atoms.info and results.get("energy") == 0:
        results = {key: value for key, value in results.items() if key != "energy"}  # ASE's, of a dump of LAMMPS
    values = {
        kind: store.get(name, results.get(name)) for (kind, store), name in zip(stores.items(), names, strict=True)
    }
    return {kind: value for kind, value in values.items() if value is not None}


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


def other_head(atoms: Atoms, heads: Sequence[str], head: str) -> str:
    """The head of a potential that `info["head"]` says the labels of a frame belong to; empty if it is the one in use.

    Args:
        atoms: The frame.
        heads: Names of the heads that the potential has.
        head: The one that predicts.
    """
    name = str(atoms.info.get("head", head))
    return name if name in heads and name != head else ""


def refuse_other_heads(what: str, frames: Mapping[int, Atoms], heads: Sequence[str], head: str) -> None:
    """Refuses frames that are labelled for another head of the potential: what two heads differ by is no error.

    Args:
        what: Name of the frames in error texts, such as "training".
        frames: Labelled frames by their numbers.
        heads: Names of the heads that the potential has.
        head: The one that predicts.

    Raises:
        LabelError: A frame names another head of the potential in its info.
    """
    others = {number: name for number, atoms in frames.items() if (name := other_head(atoms, heads, head))}
    if others:
        number, name = next(iter(others.items()))
        raise LabelError(
            f"{what} frame {number} is labelled for head {name!r} of this potential (atoms.info['head']), which "
            f"predicts with head {head!r} here; so are {len(others)} of {len(frames)} frames. Leave them out, or load "
            f"the potential with their head: ?head={name} at the end of a SPEC, head={name!r} for MACECalculator."
        )
    unknown = {str(atoms.info["head"]) for atoms in frames.values() if "head" in atoms.info} - set(heads)
    if unknown and len(heads) > 1:
        warnings.warn(
            f"{what} frames name the head {' and '.join(sorted(unknown))}, and this potential has {', '.join(heads)}: "
            f"their labels are taken for those of {head}.",
            UQWarning,
            stacklevel=3,
        )


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


def _numbers(kind: str, value: Any, which: str) -> np.ndarray:
    try:
        return np.asarray(value, float)
    except (TypeError, ValueError):
        raise LabelError(f"{which} has {kind} of {str(value)[:40]!r}; numbers were expected.") from None


def _energy(value: Any, which: str) -> float:
    with suppress(TypeError, ValueError):
        number = np.asarray(value, float)
        if number.size == 1:
            return float(number.reshape(()))
    raise LabelError(f"{which} has a reference energy of {str(value)[:40]!r}; one number in eV was expected.")


def _forces(value: Any, which: str) -> np.ndarray:
    return _numbers("reference forces", value, which)


def _voigt(value: Any, which: str) -> np.ndarray:
    stress = _numbers("a reference stress", value, which)
    if stress.size not in (6, 9):
        raise LabelError(
            f"{which} has a reference stress of shape {stress.shape}; 6 (Voigt) or 9 numbers were expected."
        )
    return stress.reshape(6) if stress.size == 6 else full_3x3_to_voigt_6_stress(stress.reshape(3, 3))


_AS_LABEL: dict[str, Callable[[Any, str], Any]] = {"energy": _energy, "forces": _forces, "stress": _voigt}
