"""Reading and writing frames. A frame is an `ase.Atoms`; several frames are a list or a file.

ASE silently drops result keys it does not know when it writes extxyz and `.traj`. `write_frames` therefore puts
ours in `atoms.info` and `atoms.arrays`, where extxyz keeps them, and `read_frames` moves them back to
`atoms.calc.results`. ASE's global lists are not touched. Since copies of a structure keep what is in info and arrays, a
note says which structure the uncertainties are of.
"""

import os
import warnings
from collections.abc import Iterable, Sequence
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io import read
from ase.io.formats import string2index

from ase_uq.errors import InputError, LabelError, UQWarning
from ase_uq.io.extxyz import check_xyz_name, frame_text, unwritable, warn_of_unwritable, without_unwritable
from ase_uq.io.files import appending, check_whole, file_of, write_all
from ase_uq.io.results import uncertainties_belong, with_results
from ase_uq.io.source import Frames, Source, Unreadable


def read_frames(frames: Frames | Sequence[str | os.PathLike[str]], *, name: str = "frames") -> list[Atoms]:
    """The structures of a file that ASE can read, with uncertainties back in `atoms.calc.results`.

    Uncertainties in a file that are of another structure, as those of a copy whose atoms were moved, are left out, with
    a warning.

    Args:
        frames: A path, with `@` and an index or a query of a database as ASE takes them (`run.xyz@:100`); several of
            them; or a list of structures, which are returned unchanged.
        name: Name of the frames in error texts.

    Raises:
        LabelError: The file is missing, has no structures, or cannot be read to its end.
    """
    if not isinstance(frames, str | os.PathLike):
        checked: list[Any] = list(frames)
        if not checked:
            raise LabelError(f"{name}: the list has no structures.")
        if all(isinstance(one, str | os.PathLike) for one in checked):
            return [atoms for path in checked for atoms in read_frames(path, name=name)]
        return checked
    path = Path(frames)
    return _all_of(path, name) if file_of(path) == path else _chosen(os.fspath(frames), name)


def _all_of(path: Path, name: str) -> list[Atoms]:
    found: list[Atoms] = []
    moved: list[int] = []
    try:
        source = Source(path)
    except InputError as error:
        raise LabelError(f"{name}: {error}") from error
    for number, atoms in source.read():
        if isinstance(atoms, Unreadable):
            raise LabelError(f"{name}: {path} cannot be read after structure {number}: {atoms.reason.rstrip('.')}.")
        if not uncertainties_belong(atoms):
            moved.append(number)
        found.append(with_results(atoms))
    if not found:
        raise LabelError(f"{name}: the file {path} has no structures.")
    if moved:
        warnings.warn(
            f"{len(moved)} of {len(found)} {name} (the first is frame {moved[0]}) have uncertainties of another "
            "structure, as copies have whose atoms were moved: they are left out.",
            UQWarning,
            stacklevel=3,
        )
    return found


def _chosen(text: str, name: str) -> list[Atoms]:
    """The structures that `FILE@INDEX` or `FILE.db@QUERY` names."""
    file, _, chosen = text.rpartition("@")
    try:
        index = string2index(chosen)
    except ValueError:
        index = chosen
    if not isinstance(index, str):
        try:
            frames = read_frames(file, name=name)[index]
        except IndexError:
            frames = []
    elif file.endswith(".db") and Path(file).is_file():
        frames = read(file, chosen)
    else:
        raise LabelError(f"{name}: {chosen!r} in {text} is no index: write {file}@:100 or {file}@-1.")
    found = [frames] if isinstance(frames, Atoms) else list(frames)
    if not found:
        raise LabelError(f"{name}: {text} has no structures.")
    return [with_results(atoms) for atoms in found]


def write_frames(path: str | os.PathLike[str], frames: Iterable[Atoms], *, append: bool = False) -> None:
    """Writes structures with all their results, uncertainties included, as extended XYZ.

    All frames are completely on disk when this returns, so a run that dies later loses none.

    Args:
        path: File to write.
        frames: Structures; results are taken from their calculators. Entries that the format cannot hold, or that have
            the name of a result, are left out, with a warning.
        append: Whether to add to an existing file.

    Raises:
        OSError: The file cannot be written, for example on a full disk. A file to which frames were added is left as
            it was, without half a frame; a new file is removed.
        ValueError: The name is that of another format, or the existing file ends in the middle of a line.
    """
    check_xyz_name(path)
    frames = list(frames)
    warn_of_unwritable({name for atoms in frames for name in unwritable(atoms)})
    text = "".join(frame_text(without_unwritable(atoms)) for atoms in frames)
    is_new = not os.path.lexists(path)
    with appending(path) if append else FileIO(path, "wb") as file:
        if append:
            check_whole(file, path)
        before = file.seek(0, os.SEEK_END) if file.seekable() else None
        try:
            write_all(file, text.encode())
            os.fsync(file.fileno())
        except OSError as error:
            if before is not None:
                with suppress(OSError):  # a device cannot be truncated
                    file.truncate(before)
            if is_new:
                os.unlink(path)
            # The system's error does not name the file.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
