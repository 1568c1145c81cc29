"""Reading, writing and labels of frames. A frame is an `ase.Atoms`; several are a list or a file.

ASE drops results keys it does not know from extxyz and `.traj` without a word. `write_frames` therefore carries
ours in `atoms.info` and `atoms.arrays`, where extxyz keeps them, and `read_frames` brings them back into
`atoms.calc.results`. ASE's global lists are not touched.
"""

import io
import os
import re
import warnings
from collections.abc import Collection, Iterable, Mapping, Sequence
from contextlib import suppress
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.calculators.singlepoint import SinglePointCalculator
from ase.io import iread, write
from ase.stress import full_3x3_to_voigt_6_stress

from ase_uq.errors import LabelError, UQWarning
from ase_uq.properties import STANDARD, UNCERTAINTIES, find_property

Frames = str | os.PathLike[str] | Sequence[Atoms]

# (energy, forces, stress) of the reference, in the order they are looked for; the last are those of `atoms.calc`.
LABEL_KEYS = (("REF_energy", "REF_forces", "REF_stress"), ("energy", "forces", "stress"))


# What extended XYZ uses itself, and names of columns that it can tell from their types and widths.
_RESERVED = ("Lattice", "Properties", "pbc", "pos", "species", "symbols")
_COLUMN = re.compile(r"[^\s:\"'=\\]+")


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


class _StoredResults(SinglePointCalculator):
    """A `SinglePointCalculator` that also holds keys ASE does not know."""

    name = "stored"

    def __init__(self, atoms: Atoms, results: Mapping[str, Any]) -> None:
        super().__init__(atoms, **{key: value for key, value in results.items() if key in STANDARD})
        self.results.update(results)


def read_frames(frames: Frames, *, name: str = "frames") -> list[Atoms]:
    """The structures of a file that ASE can read, with uncertainties back in `atoms.calc.results`.

    Args:
        frames: A path, or a list of structures, which is returned as it is.
        name: What to call them in an error.

    Raises:
        LabelError: The file is missing, has no structures, or cannot be read to its end.
    """
    if not isinstance(frames, str | os.PathLike):
        checked = list(frames)
        if not checked:
            raise LabelError(f"{name}: the list has no structures.")
        return checked
    path = Path(frames)
    if not path.is_file():
        raise LabelError(f"{name}: there is no file {path}.")
    read: list[Atoms] = []
    try:
        for atoms in iread(path, ":"):
            read.append(_with_results(atoms))  # noqa: PERF401  (what was read before an error is counted)
    except Exception as error:  # ASE's readers raise anything from KeyError to UnknownFileTypeError
        if path.stat().st_size == 0:
            raise LabelError(f"{name}: the file {path} is empty.") from error
        raise LabelError(
            f"{name}: {path} cannot be read after structure {len(read)} ({type(error).__name__}: {error}). "
            "It is truncated or not in a format that ASE knows."
        ) from error
    if not read:
        raise LabelError(f"{name}: the file {path} has no structures.")
    return read


def annotated(atoms: Atoms, results: Mapping[str, Any] | None = None, **info: Any) -> Atoms:
    """A copy that carries results where files keep them.

    Args:
        atoms: Structure; its constraints, velocities and info are copied.
        results: Results to carry; None takes those of `atoms.calc` if they belong to these positions.
        info: Further entries of `atoms.info`, for example the reason a frame was flagged.

    Returns:
        A structure whose standard results stand in a calculator of stored values and whose uncertainties
        stand in `info` and `arrays` as well.
    """
    stale = results is None and _is_stale(atoms)
    if results is None:
        results = _current_results(atoms)
    copy = atoms.copy()
    # Copies: some calculators write the next results into the same arrays.
    known = {key: deepcopy(value) for key, value in results.items() if find_property(key) is not None}
    if stale or any(key not in STANDARD for key in known):
        # What a file or an earlier calculation left in info and arrays would pass for this calculation's.
        drop_uncertainties(copy)
    if known:
        copy.calc = _StoredResults(copy, known)
    for key, value in known.items():
        entry = find_property(key)
        assert entry is not None
        if key in STANDARD:
            continue
        if entry.per_atom:
            copy.set_array(key, np.asarray(value, float))
        else:
            copy.info[key] = np.asarray(value, float) if entry.shape else float(value)
    copy.info.update(info)
    return copy


def write_frames(path: str | os.PathLike[str], frames: Iterable[Atoms], *, append: bool = False) -> None:
    """Writes structures with all their results, uncertainties included, as extended XYZ.

    Every frame goes to the disk whole before this returns, so a run that dies loses none.

    Args:
        path: File to write.
        frames: Structures; results are taken from their calculators. Entries of theirs that the format cannot hold are
            left out, with a warning.
        append: Whether to add to an existing file.

    Raises:
        OSError: The file cannot be written, as on a full disk; what was in it before stands, without half a frame, and
            there is no file where there was none.
        ValueError: What is in the file already ends in the middle of a line.
    """
    if append:
        check_whole(path)
    buffer = io.StringIO()
    frames = list(frames)
    warn_of_unwritable({name for atoms in frames for name in unwritable(atoms)})
    write(buffer, [_writable(atoms) for atoms in frames], format="extxyz")
    is_new = not os.path.lexists(path)
    with open(path, "ab" if append else "wb", buffering=0) as file:
        before = file.tell() if file.seekable() else None
        try:
            _write_whole(file, buffer.getvalue().encode())
        except OSError as error:
            if before is not None:
                with suppress(OSError):  # of a device
                    file.truncate(before)
            if is_new:
                os.unlink(path)
            # Of what was being written the system names nothing.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error


def unwritable(atoms: Atoms) -> list[str]:
    """What extended XYZ cannot hold, by name: it could not be written, or the file not be read again."""
    info = [repr(key) for key, value in atoms.info.items() if not _fits_info(key, value)]
    return [f"info[{key}]" for key in info] + [
        f"arrays[{key!r}]" for key, values in atoms.arrays.items() if not _fits_array(key, values)
    ]


def warn_of_unwritable(names: Collection[str]) -> None:
    """Says what is left out of a file."""
    if names:
        warnings.warn(
            f"{', '.join(sorted(names))} cannot be kept in extended XYZ and {'is' if len(names) == 1 else 'are'} left "
            "out.",
            UQWarning,
            stacklevel=3,
        )


def without_unwritable(atoms: Atoms) -> Atoms:
    """The same structure, or a copy without what extended XYZ cannot hold."""
    if not unwritable(atoms):
        return atoms
    copy = atoms.copy()
    copy.info = {key: value for key, value in atoms.info.items() if _fits_info(key, value)}
    for key in [key for key, values in copy.arrays.items() if not _fits_array(key, values)]:
        del copy.arrays[key]
    copy.calc = atoms.calc
    return copy


def _fits_info(key: Any, value: Any) -> bool:
    if not isinstance(key, str) or not _is_line(key) or key in _RESERVED:
        return False
    if key == "stress" and np.size(value) not in (6, 9):
        return False  # ASE takes it for the frame's
    if isinstance(value, str):
        return _is_line(value) and not value.endswith("\\")
    if isinstance(value, np.ndarray):
        return bool(value.size) and value.dtype.kind in "biufU"
    return value is None or isinstance(value, bool | int | float | np.number | np.bool_ | list | tuple | dict)


def _fits_array(key: Any, values: np.ndarray) -> bool:
    if key in ("numbers", "positions"):
        return True
    if not isinstance(key, str) or not _COLUMN.fullmatch(key) or key in _RESERVED:
        return False
    if values.ndim not in (1, 2) or not values.size:
        return False
    if values.dtype.kind in "OU":
        return all(isinstance(text, str) and text.split() == [text] for text in values.flat)
    return values.dtype.kind in "bif"


def _is_line(text: str) -> bool:
    return text.splitlines() == [text]  # one, and no break at its end


def check_whole(path: str | os.PathLike[str]) -> None:
    """Refuses a file to add to that ends in the middle of a line: all of it would become unreadable.

    Raises:
        ValueError: It was cut off, as a run that is killed while it writes may leave it.
    """
    path = Path(path)
    if not path.is_file() or path.stat().st_size == 0:
        return
    with open(path, "rb") as file:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            raise ValueError(
                f"{path} ends in the middle of a line: it was cut off. Remove its last, broken frame, or give another "
                "file."
            )


def _write_whole(file: io.FileIO, data: bytes) -> None:
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]
    os.fsync(file.fileno())


def labels_of(atoms: Atoms, keys: tuple[str, str, str] | None = None) -> Labels:
    """Reference values of a frame.

    Args:
        atoms: Frame with `REF_energy` in info, `REF_forces` in arrays and `REF_stress` in info, or with the
            results of a reference calculator attached.
        keys: Names of energy, forces and stress to use instead.
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
    """Refuses labels of another shape than their frame, or that are not finite; `which` is what messages call it.

    Raises:
        LabelError: The forces have another shape, or a label is not finite.
    """
    if labels.forces is not None and labels.forces.shape != (len(atoms), 3):
        raise LabelError(
            f"{which} has forces of shape {labels.forces.shape}, its {len(atoms)} atoms want ({len(atoms)}, 3)."
        )
    for kind, value in (("energy", labels.energy), ("forces", labels.forces), ("stress", labels.stress)):
        if value is not None and not np.isfinite(value).all():
            raise LabelError(f"{which} has a reference {kind} that is not finite. Remove the frame.")


def _voigt(stress: Any) -> np.ndarray:
    stress = np.asarray(stress, float)
    if stress.size not in (6, 9):
        raise LabelError(f"a reference stress has shape {stress.shape}; 6 (Voigt) or 9 numbers were expected.")
    return stress if stress.shape == (6,) else full_3x3_to_voigt_6_stress(stress.reshape(3, 3))


def _is_stale(atoms: Atoms) -> bool:
    # Results of a shared calculator, or of positions before the last step, are not this structure's.
    return isinstance(atoms.calc, Calculator) and bool(atoms.calc.check_state(atoms))


def _current_results(atoms: Atoms) -> Mapping[str, Any]:
    return atoms.calc.results if isinstance(atoms.calc, Calculator) and not _is_stale(atoms) else {}


def drop_uncertainties(atoms: Atoms) -> None:
    """Removes what an earlier calculation left in info and arrays; labels stay."""
    for store in (atoms.info, atoms.arrays):
        for key in [key for key in store if key not in STANDARD and find_property(key) is not None]:
            del store[key]


def _writable(atoms: Atoms) -> Atoms:
    copy = annotated(without_unwritable(atoms))
    if isinstance(copy.calc, _StoredResults):
        copy.calc.results = {key: value for key, value in copy.calc.results.items() if key in STANDARD}
    return copy


def _with_results(atoms: Atoms) -> Atoms:
    """Puts uncertainties found in info and arrays into the stored results."""
    found = dict(atoms.calc.results) if isinstance(atoms.calc, Calculator) else {}
    for store, per_atom in ((atoms.info, False), (atoms.arrays, True)):
        for key, value in store.items():
            entry = find_property(key)
            # Somebody's own info entry named like `gamma_only` is not an array over atoms.
            if key.startswith(UNCERTAINTIES) and entry is not None and entry.per_atom == per_atom:
                found[key] = value
    if any(key not in STANDARD for key in found):
        atoms.calc = _StoredResults(atoms, {k: v for k, v in found.items() if find_property(k) is not None})
    return atoms
