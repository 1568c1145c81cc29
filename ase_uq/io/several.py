"""Frames of several files, or of a part of a file, one by one."""

import hashlib
import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path

from ase.io.formats import string2index

from ase_uq.errors import InputError, LabelError
from ase_uq.io.files import file_of, paths_of
from ase_uq.io.frames import read_frames
from ase_uq.io.source import Frames, Item, Source, Unparsed, Unreadable


def source_of(frames: Frames | Sequence[str | os.PathLike[str]]) -> Source:
    """The source of all that `read_frames` takes: a path, a part such as `run.xyz@:100`, several, or structures.

    Raises:
        InputError: A file is missing, empty, or in no format that ASE knows; or a part is no index or has no frames.
    """
    paths = [os.fspath(path) for path in paths_of(frames)]
    if not paths:
        return Source(frames)  # pyright: ignore[reportArgumentType] (a list of structures)
    sources = [_of_path(path) for path in paths]
    return sources[0] if len(sources) == 1 else _Several(paths, sources)


def _of_path(path: str) -> Source:
    file = file_of(path)
    if file == Path(path):
        return Source(path)
    try:
        index = string2index(path.rpartition("@")[2])
    except ValueError:  # the reader says what is wrong with it
        index = None
    if isinstance(index, slice) and min(index.start or 0, index.stop or 0) >= 0 and (index.step or 1) > 0:
        return _Part(file, index)
    try:
        # What is counted from the end, or selected from a database, cannot be read one by one.
        source = Source(read_frames(path))
    except LabelError as error:
        raise InputError(str(error)) from error
    source.name = path
    return source


class _Part(Source):
    """Frames of a file from a first to a last one.

    Args:
        file: The file.
        index: Which frames, counted from the beginning.
    """

    def __init__(self, file: Path, index: slice) -> None:
        super().__init__(file)
        self._index = index

    def digest(self, info_keys: Sequence[str] = ()) -> str:
        return _digest([super().digest(info_keys), str(self._index)])

    def total(self) -> int | None:
        whole = super().total()
        return None if whole is None else len(range(*self._index.indices(whole)))

    def unparsed(self, start: int = 0) -> Iterator[tuple[int, Item]]:
        first = self._index.start or 0
        stop = None if self._index.stop is None else max(self._index.stop - first, 0)
        items = islice(super().unparsed(first), 0, stop, self._index.step)
        yield from ((number, item) for number, (_, item) in enumerate(items) if number >= start)


class _Several(Source):
    """The frames of several sources, one source after the other, numbered throughout.

    Args:
        paths: What the user calls them.
        sources: The sources, at least two.
    """

    def __init__(self, paths: Sequence[str], sources: Sequence[Source]) -> None:
        self._paths, self._sources = paths, sources
        self._starts: list[int] = []  # number of the first frame of each source, as far as they were read
        self.name = " and ".join(paths) if len(paths) < 4 else f"{paths[0]} and {len(paths) - 1} more"

    def place_of(self, number: int) -> str:
        which = bisect_right(self._starts, number) - 1
        return f"frame {number - self._starts[which]} of {self._paths[which]}"

    def digest(self, info_keys: Sequence[str] = ()) -> str:
        return _digest([source.digest(info_keys) for source in self._sources])

    def total(self) -> int | None:
        totals = [source.total() for source in self._sources]
        return None if None in totals else sum(total for total in totals if total is not None)

    def unparsed(self, start: int = 0) -> Iterator[tuple[int, Item]]:
        number = 0
        self._starts = []
        for source in self._sources:
            self._starts.append(number)
            for _, item in source.unparsed():
                if number >= start:
                    yield number, _placed(item, self.place_of(number))
                number += 1


def _placed(item: Item, where: str) -> Item:
    """The frame, with the name of its place where one is needed to say what cannot be read."""
    if isinstance(item, Unparsed):
        return replace(item, where=where)
    return item.at(where) if isinstance(item, Unreadable) else item


def _digest(parts: Sequence[str]) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()
