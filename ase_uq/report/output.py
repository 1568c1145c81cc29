"""Where a page and its pictures go: they appear when all of them are there, and nobody else's file is touched."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ase_uq.errors import ArtefactError
from ase_uq.io.files import check_writable

# What pictures say of themselves: those of an earlier report are known by it.
PICTURE_METADATA = {"Software": "ase-uq report"}
_MARK = b"tEXtSoftware\0ase-uq report"
_NAMES = re.compile(r"(uncertainty|reliability|errors|latent_map|frame_\d+)\.png")


def check_outputs(page: Path, folder: Path) -> None:
    """Fails now, not after the work, where a page or its pictures could not be written; makes nothing.

    Raises:
        ArtefactError: A folder is missing or not writable, or `page` is a folder itself.
        FileExistsError: The folder of the pictures is a file, or holds a file of somebody else's that a picture would
            overwrite.
    """
    check_writable(page)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, where a folder for pictures was expected. Choose another.")
    missing = _missing(folder)
    check_writable(missing[-1] if missing else folder / "uncertainty.png")
    for path, is_ours in _pictures_in(folder):
        if not is_ours:
            raise FileExistsError(
                f"{path} is no picture that `ase-uq report` wrote, and one might overwrite it. Move it, or choose "
                "another folder for the pictures."
            )


def publish(page: Path, text: str, folder: Path, pictures: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Writes a page and its pictures, and removes those of an earlier report that are not among them.

    All are written beside their places first, so that what was there stands until the new ones are whole.

    Args:
        page: HTML file; replaced if it exists.
        text: What it is to hold.
        folder: Of the pictures; made if it is missing. Files in it that are no pictures of reports are left alone.
        pictures: PNG files by their names.

    Returns:
        Where the pictures are.

    Raises:
        ArtefactError: One of them cannot be written, as on a full disk.
    """
    made = _missing(folder)
    targets = {name: folder / name for name in pictures}
    try:
        with ExitStack() as stack:
            with _named(folder):
                folder.mkdir(parents=True, exist_ok=True)
            near = stack.enter_context(_staging(page, page.parent))
            fresh = stack.enter_context(_staging(folder, folder))
            with _named(page):
                (near / page.name).write_text(text, encoding="utf-8")
            for name, target in targets.items():
                with _named(target):
                    (fresh / name).write_bytes(pictures[name])
            for name, target in targets.items():
                with _named(target):
                    os.replace(fresh / name, target)
            with _named(page):
                os.replace(near / page.name, page)
    except BaseException:
        for empty in made:
            with suppress(OSError):
                empty.rmdir()
        raise
    for path, is_ours in _pictures_in(folder):
        if is_ours and path.name not in targets:
            with _named(path):
                path.unlink()
    return tuple(targets.values())


def _missing(folder: Path) -> list[Path]:
    """The folder and those above it that do not exist, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _pictures_in(folder: Path) -> list[tuple[Path, bool]]:
    """What has the name of a picture of a report, and whether it is one."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path, _is_ours(path)) for path in paths if _NAMES.fullmatch(path.name)]


def _is_ours(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return _MARK in file.read(1000)
    except OSError:  # a folder, or nothing that we may read
        return False


@contextmanager
def _staging(target: Path, folder: Path) -> Iterator[Path]:
    """A new folder in a folder, so on its file system; gone afterwards, with what was not moved out of it."""
    with _named(target):
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".ase_uq_")
    with temporary as path:
        yield Path(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """What the system refuses, with the name of what was to be written."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(
            f"cannot write {path}: {error.strerror or error}. Choose a folder that is writable and has room."
        ) from error
