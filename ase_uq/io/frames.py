"""Reading and writing frames. A frame is an `ase.Atoms`; several frames are a list or a file.

ASE silently drops result keys it does not know when it writes extxyz and `.traj`. `write_frames` therefore puts
ours in `atoms.info` and `atoms.arrays`, where extxyz keeps them, and `read_frames` moves them back to
`atoms.calc.results`. ASE's global lists are not touched.
"""

import os
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path

from ase import Atoms
from ase.io import iread

from ase_uq.errors import LabelError
from ase_uq.io.extxyz import frame_text, unwritable, warn_of_unwritable, without_unwritable
from ase_uq.io.files import check_whole, write_all
from ase_uq.io.results import with_results

Frames = str | os.PathLike[str] | Sequence[Atoms]


def read_frames(frames: Frames, *, name: str = "frames") -> list[Atoms]:
    """The structures of a file that ASE can read, with uncertainties back in `atoms.calc.results`.

    Args:
        frames: A path, or a list of structures, which are returned unchanged.
        name: Name of the frames in error texts.

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
            read.append(with_results(atoms))  # noqa: PERF401  (what was read before an error is counted)
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
        ValueError: The existing file ends in the middle of a line.
    """
    if append:
        check_whole(path)
    frames = list(frames)
    warn_of_unwritable({name for atoms in frames for name in unwritable(atoms)})
    text = "".join(frame_text(without_unwritable(atoms)) for atoms in frames)
    is_new = not os.path.lexists(path)
    with open(path, "ab" if append else "wb", buffering=0) as file:
        before = file.tell() if file.seekable() else None
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
