"""Frames read and written. A frame is an `ase.Atoms`; several are a list or a file.

ASE drops results keys it does not know from extxyz and `.traj` without a word. `write_frames` therefore carries
ours in `atoms.info` and `atoms.arrays`, where extxyz keeps them, and `read_frames` brings them back into
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

    Every frame goes to the disk whole before this returns, so a run that dies loses none.

    Args:
        path: File to write.
        frames: Structures; results are taken from their calculators. Entries of theirs that the format cannot hold are
            left out, with a warning.
        append: Whether to add to an existing file.

    Raises:
        OSError: The file cannot be written, as on a full disk; what was in it before stands, without half a frame, and
            there is no file where there was none.
        ValueError: What is in the file already ends in the middle of a line; or a structure has a result and a label of
            one name.
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
                with suppress(OSError):  # of a device
                    file.truncate(before)
            if is_new:
                os.unlink(path)
            # Of what was being written the system names nothing.
            raise OSError(error.errno, error.strerror, os.fspath(path)) from error
