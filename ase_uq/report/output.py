"""Writes a page and its pictures: they appear only when all are complete, and no other files are touched."""

import os
import re
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from ase_uq.errors import ArtefactError
from ase_uq.io.files import check_writable

# Metadata of our pictures, of all pages, by which those of an earlier one are recognised.
PICTURE_METADATA = {"Software": "ase-uq report"}
_MARK = b"tEXtSoftware\0ase-uq report"
_NAMES = re.compile(
    r"(uncertainty|gamma|parity_\w+|reliability|errors|latent_map|frame_\d+|reconstruction|elements|latent_maps|"
    r"unseen_\d+_\d+)\.png"
)


def check_outputs(page: Path, folder: Path) -> None:
    """Fails now, not after the work, if a page or its pictures could not be written; creates nothing.

    Raises:
        ArtefactError: A folder is missing or not writable, or `page` is a folder itself.
        FileExistsError: The folder of the pictures is a file, or contains a file that is not ours and that a picture
            would overwrite.
    """
    check_writable(page)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file, where a folder for pictures was expected. Choose another.")
    missing = _missing(folder)
    check_writable(missing[-1] if missing else folder / "uncertainty.png")
    for path, is_ours in _pictures_in(folder):
        if not is_ours:
            raise FileExistsError(
                f"{path} is not a picture that `ase-uq` wrote, and a new picture could overwrite it. Move it, "
                "or choose another folder for the pictures."
            )


def publish(page: Path, text: str, folder: Path, pictures: Mapping[str, bytes]) -> tuple[Path, ...]:
    """Writes a page and its pictures, and removes pictures of an earlier report that are not replaced.

    All files are written in temporary folders first, so that the old files remain until the new ones are complete.

    Args:
        page: HTML file; replaced if it exists.
        text: Content of the page.
        folder: Folder of the pictures; created if it is missing. Files in it that are not pictures of a report are left
            alone.
        pictures: Contents of the PNG files by file name.

    Returns:
        Paths of the pictures.

    Raises:
        ArtefactError: A file cannot be written, for example because the disk is full.
    """
    created = _missing(folder)
    targets = {name: folder / name for name in pictures}
    try:
        with ExitStack() as stack:
            with _named(folder):
                folder.mkdir(parents=True, exist_ok=True)
            near_page = stack.enter_context(_staging(page, page.parent))
            in_folder = stack.enter_context(_staging(folder, folder))
            with _named(page):
                (near_page / page.name).write_text(text, encoding="utf-8")
            for name, target in targets.items():
                with _named(target):
                    (in_folder / name).write_bytes(pictures[name])
            for name, target in targets.items():
                with _named(target):
                    os.replace(in_folder / name, target)
            with _named(page):
                os.replace(near_page / page.name, page)
    except BaseException:
        for empty in created:
            with suppress(OSError):
                empty.rmdir()
        raise
    for path, is_ours in _pictures_in(folder):
        if is_ours and path.name not in targets:
            with _named(path):
                path.unlink()
    return tuple(targets.values())


def _missing(folder: Path) -> list[Path]:
    """Those of the folder and its parents that do not exist, the innermost first."""
    missing = []
    while not folder.exists():
        missing.append(folder)
        folder = folder.parent
    return missing


def _pictures_in(folder: Path) -> list[tuple[Path, bool]]:
    """Every path that is named like a picture of a report, and whether a report wrote it."""
    paths = sorted(folder.iterdir()) if folder.is_dir() else []
    return [(path, _is_ours(path)) for path in paths if _NAMES.fullmatch(path.name)]


def _is_ours(path: Path) -> bool:
    try:
        with open(path, "rb") as file:
            return _MARK in file.read(1000)
    except OSError:  # a folder, or a file that we may not read
        return False


@contextmanager
def _staging(target: Path, folder: Path) -> Iterator[Path]:
    """A temporary folder inside `folder`, hence on its file system; removed with everything still in it."""
    with _named(target):
        temporary = tempfile.TemporaryDirectory(dir=folder, prefix=".ase_uq_")
    with temporary as path:
        yield Path(path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Turns errors of the operating system into an `ArtefactError` that names the file."""
    try:
        yield
    except OSError as error:
        raise ArtefactError(
            f"cannot write {path}: {error.strerror or error}. Choose a folder that is writable and has room."
        ) from error
