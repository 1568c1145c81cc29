"""Output files: checks before the work begins, and helpers for writing them."""

import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from io import FileIO
from pathlib import Path
from typing import Any

from ase_uq.errors import ArtefactError


def check_writable(path: str | os.PathLike[str]) -> None:
    """Fails now, not after the work, if `path` could not be written.

    Raises:
        ArtefactError: The folder is missing or nothing can be created in it, or `path` is a folder itself.
    """
    path = Path(path)
    try:
        if path.is_dir():
            raise IsADirectoryError
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=".ase_uq_"):
            pass
    except OSError as error:
        raise refused_write(path, error) from error


def check_replaceable(path: str | os.PathLike[str], overwrite: bool) -> None:
    """Fails now, not after the work, if `path` could not be written, or is there and may not be replaced.

    Raises:
        FileExistsError: It exists.
        ArtefactError: It cannot be written.
    """
    if Path(path).exists() and not overwrite:
        raise FileExistsError(f"{path} exists. Give another name, or overwrite it (overwrite=True, --overwrite).")
    check_writable(path)


def check_appendable(path: str | os.PathLike[str]) -> None:
    """Fails now, not hours later at the first event, if nothing could be added to `path`.

    Raises:
        ValueError: The file cannot be written, or ends in the middle of a line.
    """
    path = Path(path)
    if path.is_file():
        with FileIO(path) as file:
            check_whole(file, path)
    existed = path.exists()
    try:
        with open(path, "a"):
            pass
    except OSError as error:
        raise ValueError(
            f"{path} cannot be written ({error.strerror}). Give a file in a folder that exists and is writable."
        ) from error
    if not existed:
        path.unlink()  # an empty file would suggest that the run had something to record


def check_whole(file: FileIO, path: str | os.PathLike[str]) -> None:
    """Refuses to add to a file that ends in the middle of a line, which would make all of it unreadable.

    Raises:
        ValueError: The file was cut off, for example because a run was killed while it wrote.
    """
    if not file.seekable() or not file.seek(0, os.SEEK_END):
        return
    file.seek(-1, os.SEEK_END)
    if file.read(1) != b"\n":
        raise ValueError(
            f"{path} ends in the middle of a line: it was cut off. Remove its last, broken frame, or give another file."
        )


def paths_of(frames: Any) -> list[str | os.PathLike[str]]:
    """The paths that were given as frames, one or several; none if structures were given."""
    if isinstance(frames, str | os.PathLike):
        return [frames]
    return list(frames) if all(isinstance(one, str | os.PathLike) for one in frames) else []


def file_of(path: str | os.PathLike[str]) -> Path:
    """The file of a path that may end in `@` and an index or a query of a database, as ASE takes them."""
    path = Path(path)
    name = path.name.rpartition("@")[0]
    return path if not name or path.exists() else path.with_name(name)


def check_distinct(sources: Sequence[str | os.PathLike[str]], *outputs: str | os.PathLike[str] | None) -> None:
    """Refuses outputs that would overwrite each other or an input.

    Args:
        sources: Files that are read, or parts of them.
        outputs: Files that are written; None for an output that is not.

    Raises:
        ValueError: An output is the same file as an input or another output.
    """
    read = [file_of(source) for source in sources]
    written = [Path(path) for path in outputs if path is not None]
    for index, path in enumerate(written):
        for place, earlier in enumerate([*read, *written[:index]]):
            if earlier.resolve() == path.resolve() or (earlier.exists() and path.exists() and earlier.samefile(path)):
                role = "the input" if place < len(read) else "given for two outputs"
                raise ValueError(f"{path} is {role}: it would be overwritten. Give another name for the output.")


def write_all(file: FileIO, data: bytes) -> None:
    """Writes all bytes; an unbuffered file may take only some of them at once."""
    rest = memoryview(data)
    while rest:
        rest = rest[file.write(rest) :]


def write_whole(path: Path, data: bytes) -> None:
    """Writes a file that is whole at any time, also after a power cut: the old one, or the new one."""
    new = path.with_name(path.name + ".new")
    with open(new, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def lock(file: FileIO, path: Path) -> None:
    """Locks a file, because two runs writing to it would write every frame twice.

    Raises:
        ArtefactError: Another process has locked it.
    """
    with suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtefactError(f"another process is writing {path}. Wait for it, or give another output.") from None
        except OSError:  # a file system without locks
            pass


@contextmanager
def appending(path: str | os.PathLike[str]) -> Iterator[FileIO]:
    """A file to append to, created if it is missing; no other process appends to it or replaces it meanwhile.

    Read it through what this gives: the lock is lost as soon as the file is closed once in this process.
    """
    while True:
        with FileIO(path, "ab+") as file:
            with suppress(ImportError, OSError):  # Windows, or a file system without locks
                import fcntl

                # Not flock: a run holds that for its trajectory, and would wait for itself.
                fcntl.lockf(file, fcntl.LOCK_EX)
            if is_at(path, file):  # else it was replaced while this process waited
                yield file
                return


def is_at(path: str | os.PathLike[str], file: FileIO) -> bool:
    """Whether an open file is still the one at a path, and was neither replaced nor removed."""
    try:
        return os.path.samestat(os.stat(path), os.fstat(file.fileno()))
    except FileNotFoundError:
        return False


def as_readable_as_a_new_file(path: str) -> None:
    """Gives a private temporary file the permissions of any new file."""
    # mkstemp makes private files, but the user's file should obey the umask like any other file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(path, 0o666 & ~mask)


def refused_write(path: Path, error: Exception) -> ArtefactError:
    """The error that says why a file cannot be written."""
    if isinstance(error, IsADirectoryError):
        return ArtefactError(f"cannot write {path}: it is a folder. Give the name of a file.")
    # The whole message of an OSError would name the temporary file, which the user does not know.
    reason = getattr(error, "strerror", None) or error
    return ArtefactError(f"cannot write {path}: {reason}. Choose a folder that exists, is writable and has room.")
