"""The kinds of files that scored frames are written to: extended XYZ, and H5MD, which is smaller and written faster.

Either can be cut off anywhere and gone on with: text as it is, H5MD as records, which become the file when all frames
are there.
"""

import os
import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ase import Atoms
from ase.io.extxyz import key_val_str_to_dict

from ase_uq.io.contents import ENTRY, contents_of
from ase_uq.io.extxyz import check_xyz_name, extxyz_text, unwritable, without_unwritable
from ase_uq.io.h5md import read_h5md
from ase_uq.io.h5md_writer import write_h5md
from ase_uq.io.hdf5 import SUFFIXES, h5py, is_h5md_name, is_hdf5
from ase_uq.io.records import record_of, records_in
from ase_uq.io.results import stored
from ase_uq.scoring.frame_score import NUMBER_KEY

_MERGED_AT_ONCE = 1 << 20  # bytes of each of many shards
_NUMBER = re.compile(rb"\b" + NUMBER_KEY.encode() + rb"=(\d+)\b")


class FrameFile(ABC):
    """How frames become bytes of a file that grows, and that file the one which people read.

    Attributes:
        name: Name of the format, in messages.
        finishes_as_it_grew: Whether a finished file has the bytes of its frames, one after the other, and no others.
    """

    name: str
    finishes_as_it_grew: bool

    @abstractmethod
    def encode(
        self, number: int, atoms: Atoms, results: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> tuple[bytes, list[str]]:
        """The bytes of a frame, and the names of its entries that the format cannot hold, which are left out.

        Args:
            number: Number of the frame in the source.
            atoms: The frame.
            results: Its results.
            notes: Further entries of info.
        """

    @abstractmethod
    def growing(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each frame of a file that grows, up to the first that is not whole."""

    @abstractmethod
    def finish(self, path: Path) -> None:
        """Makes the file that has grown, which is on disk, the finished one under the same name, whole or not at all.

        Raises:
            OSError: It cannot be written.
        """

    @abstractmethod
    def is_finished(self, path: Path) -> bool:
        """Whether `finish` has been here and no frame can be added any more."""

    @abstractmethod
    def finished(self, path: Path) -> Iterator[tuple[int, bytes]]:
        """Number and bytes of each frame of a finished file, which added to one that grows give the same file."""


class XYZFile(FrameFile):
    """Extended XYZ."""

    name = "extended XYZ"
    finishes_as_it_grew = True

    def encode(
        self, number: int, atoms: Atoms, results: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> tuple[bytes, list[str]]:
        odd = unwritable(atoms)
        kept = without_unwritable(atoms) if odd else atoms
        return extxyz_text(kept, results, **{NUMBER_KEY: number}, **notes).encode(), odd

    def growing(self, path: Path) -> Iterator[tuple[int, bytes]]:
        with open(path, "rb") as file:
            while head := file.readline():
                comment = file.readline()
                number = _number_in(comment)
                if not head.strip().isdigit() or number is None:
                    return
                lines = [head, comment, *(file.readline() for _ in range(int(head)))]
                # A power cut leaves zeros in a block that was allocated but not written.
                if not lines[-1].endswith(b"\n") or any(b"\0" in line for line in lines):
                    return
                yield number, b"".join(lines)

    def finish(self, path: Path) -> None:
        """It is finished as it is."""

    def is_finished(self, path: Path) -> bool:
        return False

    def finished(self, path: Path) -> Iterator[tuple[int, bytes]]:
        return self.growing(path)


class H5MDFile(FrameFile):
    """H5MD: every number to the last bit."""

    name = "HDF5"
    finishes_as_it_grew = False

    def encode(
        self, number: int, atoms: Atoms, results: Mapping[str, Any], notes: Mapping[str, Any]
    ) -> tuple[bytes, list[str]]:
        contents, odd = contents_of(atoms, *stored(atoms, results, **{NUMBER_KEY: number}, **notes))
        return record_of(number, contents), odd

    def growing(self, path: Path) -> Iterator[tuple[int, bytes]]:
        return ((record.number, record.data) for record in records_in(path))

    def finish(self, path: Path) -> None:
        new = path.with_name(path.name + ".h5")
        try:
            write_h5md(new, lambda: records_in(path), NUMBER_KEY)
            os.replace(new, path)
        except BaseException:
            new.unlink(missing_ok=True)
            raise

    def is_finished(self, path: Path) -> bool:
        return path.exists() and is_hdf5(path)

    def finished(self, path: Path) -> Iterator[tuple[int, bytes]]:
        for contents in read_h5md(path, at_once=_MERGED_AT_ONCE):
            number = int(contents[ENTRY + NUMBER_KEY])
            yield number, record_of(number, contents)


def frame_file(path: str | os.PathLike[str]) -> FrameFile:
    """The kind of file that a name stands for.

    Raises:
        ValueError: The name is that of a format in which frames cannot be written.
        MissingDependency: The package that writes the format is not installed.
    """
    if is_h5md_name(path):
        h5py()
        return H5MDFile()
    check_xyz_name(path, f".xyz or .extxyz, or in {' or '.join(SUFFIXES)} for HDF5 (H5MD)")
    return XYZFile()


def _number_in(comment: bytes) -> int | None:
    numbers = _NUMBER.findall(comment)
    if len(numbers) > 1:  # the text of another entry has such a number, too
        try:
            numbers = [key_val_str_to_dict(comment.decode())[NUMBER_KEY]]
        except (ValueError, KeyError):
            return None
    return int(numbers[0]) if numbers else None
