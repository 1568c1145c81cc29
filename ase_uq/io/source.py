"""Frames, read one by one from anything that ASE reads, in memory that does not grow with the file.

ASE indexes or reads whole files of many formats before it gives the first frame, and stops at the first damaged one.
Here the text formats of trajectories are cut into the text of one frame each, which ASE's own reader then parses:
frames before the first one wanted are skipped unparsed, and a damaged frame is left out while those after it are read.
"""

import hashlib
import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO, cast

import ase.db
import numpy as np
from ase import Atoms
from ase.calculators.calculator import Calculator
from ase.io import iread
from ase.io.formats import filetype, get_ioformat, open_with_compression
from ase.io.trajectory import TrajectoryReader

from ase_uq.errors import InputError, UQWarning
from ase_uq.io.contents import atoms_of
from ase_uq.io.formats import CUTTERS, ipi_header
from ase_uq.io.h5md import count_h5md, is_h5md, read_h5md

Frames = str | os.PathLike[str] | Sequence[Atoms]
_H5MD = "h5md"  # no name of ASE's: what others wrote as H5MD is left to it
_NAMED = 10  # number of left-out frames with a warning each


@dataclass(frozen=True)
class Unreadable:
    """A frame that cannot be read.

    Args:
        reason: What is wrong with it, in words.
        last: Whether no frame can be read after it.
    """

    reason: str
    last: bool = False

    def at(self, where: str) -> "Unreadable":
        """The same with the name of its place in a file, after which frames of other files may follow."""
        return Unreadable(f"{self.reason} ({where})")


@dataclass(frozen=True)
class Unparsed:
    """The whole text of one frame, not parsed yet.

    Args:
        format: ASE's name of its format.
        text: Contents of a file with this frame alone.
        n_atoms: Number of atoms that the text states.
        where: Which frame of which file it is, for the reason why it cannot be read; may be empty.
    """

    format: str
    text: str
    n_atoms: int
    where: str = ""

    def parse(self) -> Atoms | Unreadable:
        """The structure, or what is wrong with it."""
        found = _attempt(self._parsed)
        return found if isinstance(found, Atoms) or not self.where else found.at(self.where)

    def _parsed(self) -> Atoms:
        # The reader that ase.io.read calls, without its preparations, which take as long as parsing a small frame.
        reader: Any = get_ioformat(self.format).read
        count, comment, *_ = self.text.split("\n", 2) if self.format in ("extxyz", "xyz") else ("", "")
        header = ipi_header(comment)
        text = self.text if header is None else self.text.replace(f"{count}\n{comment}", count + "\n", 1)
        (atoms,) = reader(io.StringIO(text), slice(None))
        if header is not None:
            atoms.positions *= header.scale
            if header.cell is not None:
                atoms.cell, atoms.pbc = header.cell, True
        if self.format == "lammps-dump-text" and isinstance(atoms.calc, Calculator):
            del atoms.calc.results["energy"]  # 0, which ASE's reader makes up beside forces
        return atoms


Item = Atoms | Unparsed | Unreadable


class Source:
    """Frames of a file or a list, numbered from 0.

    Args:
        frames: A path in any format that ASE reads, or a list of structures.

    Attributes:
        name: The path, or `the list`.

    Raises:
        InputError: There is no such file, it is empty, or ASE does not know its format.
        MissingDependency: It is in HDF5, and h5py is not installed.
    """

    def __init__(self, frames: Frames) -> None:
        self._frames: Sequence[Atoms] | Path
        if isinstance(frames, Sequence) and not isinstance(frames, str):
            self._frames, self.name, self._format = frames, "the list", ""
            return
        self._frames = path = Path(frames)  # pyright: ignore[reportArgumentType] (a str or a PathLike)
        self.name = str(path)
        if not path.is_file():
            raise InputError(f"there is no file {path}.")
        if path.stat().st_size == 0:
            raise InputError(f"the file {path} is empty.")
        if is_h5md(path):
            self._format = _H5MD
            return
        try:
            self._format = _format_of(str(path))
            get_ioformat(self._format)
        except Exception as error:  # UnknownFileTypeError
            raise InputError(
                f"{path} is in no format that ASE knows ({error}). Convert it to extended XYZ, or give it the name "
                "that its format has in ASE."
            ) from error

    def place_of(self, number: int) -> str:
        """Which frame of which file a frame is that was read; empty where its number says that."""
        return ""

    def digest(self, info_keys: Sequence[str] = ()) -> str:
        """sha256 of the file, or of the structures' atoms, positions and cells.

        Args:
            info_keys: Entries of the structures' info to include.
        """
        if isinstance(self._frames, Path):
            with open(self._frames, "rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        digest = hashlib.sha256()
        for atoms in self._frames:
            for values in (atoms.numbers, atoms.positions, atoms.cell.array, atoms.pbc):
                digest.update(np.ascontiguousarray(values).tobytes() + b"|")
            digest.update(repr([(key, atoms.info[key]) for key in info_keys if key in atoms.info]).encode())
        return digest.hexdigest()

    def total(self) -> int | None:
        """Number of frames, including damaged ones, if they can be counted without parsing them; else None."""
        if not isinstance(self._frames, Path):
            return len(self._frames)
        try:
            if self._format in CUTTERS:
                with self._opened() as file:
                    return sum(1 for _ in CUTTERS[self._format](file))
            if self._format == _H5MD:
                return count_h5md(self.name)
            if self._format == "traj":
                with TrajectoryReader(self.name) as trajectory:
                    return len(trajectory)
            if self._format == "db":
                return ase.db.connect(self.name, serial=True).count()
        except Exception:  # reading will say what is wrong with the file
            return None
        return None

    def read(self, start: int = 0) -> Iterator[tuple[int, Atoms | Unreadable]]:
        """Yields the number of each frame, and the frame or what is wrong with it.

        Args:
            start: Number of the first frame wanted; those before it are not parsed if the format allows that.
        """
        for number, item in self.unparsed(start):
            yield number, item.parse() if isinstance(item, Unparsed) else item

    def unparsed(self, start: int = 0) -> Iterator[tuple[int, Item]]:
        """The same as `read`, but frames that can be parsed elsewhere are left unparsed."""
        if not isinstance(self._frames, Path):
            for number in range(start, len(self._frames)):
                yield number, self._frames[number]
            return
        reader = self._reader(start)
        number = start
        while True:
            try:
                item = next(reader, None)
            except Exception as error:  # ASE's readers raise anything from KeyError to UnicodeDecodeError
                item = Unreadable(f"the file cannot be read from here on ({_named(error)})", last=True)
            if item is None:
                return
            yield number, item
            if isinstance(item, Unreadable) and item.last:
                return
            number += 1

    def _reader(self, start: int) -> Iterator[Item]:
        if self._format in CUTTERS:
            return self._from_pieces(start)
        if self._format == _H5MD:
            return (_attempt(atoms_of, contents) for contents in read_h5md(self.name, start))
        if self._format == "traj":
            return self._from_trajectory(start)
        if self._format == "db":
            return self._from_database(start)
        return islice(iread(self.name, ":"), start, None)

    def _opened(self) -> TextIO:
        # A stray byte must not spoil the frames around it: it becomes a character that no number contains.
        return io.TextIOWrapper(cast(Any, open_with_compression(self.name, "rb")), "utf-8", "replace")

    def _from_pieces(self, start: int) -> Iterator[Unparsed | Unreadable]:
        with self._opened() as file:
            for piece in islice(CUTTERS[self._format](file), start, None):
                if piece.problem:
                    yield Unreadable(piece.problem)
                else:
                    yield Unparsed(self._format, piece.text, piece.n_atoms)

    def _from_trajectory(self, start: int) -> Iterator[Atoms | Unreadable]:
        with TrajectoryReader(self.name) as trajectory:
            for number in range(start, len(trajectory)):
                yield _attempt(trajectory.__getitem__, number)

    def _from_database(self, start: int) -> Iterator[Atoms | Unreadable]:
        database: Any = ase.db.connect(self.name, serial=True)
        total, number = database.count(), start
        while number < total:
            try:
                for row in database.select(offset=number, limit=total - number):
                    yield _attempt(row.toatoms)
                    number += 1
                return
            except Exception as error:  # the row itself cannot be decoded
                yield Unreadable(_named(error))
                number += 1


def _format_of(name: str) -> str:
    try:
        return filetype(name)
    except Exception:  # looking into a damaged archive may raise anything
        return filetype(name, read=False)


def warn_of_left_out(number: int, reason: str, before: int) -> None:
    """Warns that a frame is left out, and why; after the tenth, only that there are more.

    Args:
        number: Number of the frame.
        reason: What is wrong with it.
        before: Number of frames left out before it.
    """
    if before < _NAMED:
        warnings.warn(f"frame {number} was left out: {reason}", UQWarning, stacklevel=5)
    elif before == _NAMED:
        warnings.warn("further frames that are left out are not named.", UQWarning, stacklevel=5)


def _attempt(build: Callable[..., Any], *arguments: Any) -> Atoms | Unreadable:
    try:
        return build(*arguments)
    except Exception as error:  # parsers raise anything
        return Unreadable(_named(error))


def _named(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"
