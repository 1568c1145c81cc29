"""Frames as binary records, each with its length and a check sum: a file that can be cut anywhere and gone on with.

A record is a head, the types and shapes of the numbers with the names of the texts, the numbers, and the texts.
"""

import json
import struct
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from zlib import crc32

import numpy as np

from ase_uq.io.contents import SPECIES, Contents

_MAGIC = b"aUQ1"
_SUM = struct.Struct("<I")  # of all that follows it
_LENGTHS = struct.Struct("<QIQI")  # number of the frame, and bytes of layout, numbers and texts
_HEAD = len(_MAGIC) + _SUM.size + _LENGTHS.size


class Layout(NamedTuple):
    """What a record has.

    Args:
        numbers: Names, types and shapes of its numbers, as one structured type.
        texts: Names of its texts.
        n_atoms: Number of atoms.
    """

    numbers: np.dtype
    texts: tuple[str, ...]
    n_atoms: int


class Record(NamedTuple):
    """One frame of a file of records.

    Args:
        number: Number of the frame in the source.
        data: All its bytes.
        ends: Where its layout and its numbers end.
    """

    number: int
    data: bytes
    ends: tuple[int, int]

    @property
    def layout(self) -> Layout:
        """What it has; the same object for records alike."""
        return _layout(self.data[_HEAD : self.ends[0]])

    @property
    def numbers(self) -> bytes:
        """Its numbers, one `layout.numbers`."""
        return self.data[slice(*self.ends)]

    @property
    def texts(self) -> list[str]:
        """Its texts, in JSON, in the order of `layout.texts`."""
        text = self.data[self.ends[1] :].decode()
        return text.split("\n") if text else []


def record_of(number: int, contents: Contents) -> bytes:
    """The record of a frame."""
    paths = _in_order(tuple(contents))
    values = [contents[path] for path in paths]
    layout = _encoded(paths, tuple([None if isinstance(one, str) else (one.dtype, one.shape) for one in values]))
    numbers = b"".join([one.tobytes() for one in values if not isinstance(one, str)])
    text = "\n".join([one for one in values if isinstance(one, str)]).encode()
    rest = _LENGTHS.pack(number, len(layout), len(numbers), len(text)) + layout + numbers + text
    return _MAGIC + _SUM.pack(crc32(rest)) + rest


def records_in(path: Path) -> Iterator[Record]:
    """The records of a file, up to the first that is not whole."""
    summed = len(_MAGIC) + _SUM.size
    with open(path, "rb") as file:
        left = path.stat().st_size
        while len(head := file.read(_HEAD)) == _HEAD:
            number, *lengths = _LENGTHS.unpack_from(head, summed)
            left -= _HEAD + sum(lengths)
            if not head.startswith(_MAGIC) or left < 0:
                return
            data = head + file.read(sum(lengths))
            if _SUM.unpack_from(data, len(_MAGIC)) != (crc32(memoryview(data)[summed:]),):
                return
            end = _HEAD + lengths[0]
            yield Record(number, data, (end, end + lengths[1]))


@lru_cache(maxsize=1024)
def _in_order(paths: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(sorted(paths))


@lru_cache(maxsize=1024)
def _encoded(paths: tuple[str, ...], kinds: tuple[tuple[np.dtype, tuple[int, ...]] | None, ...]) -> bytes:
    """The layout of a record: names, types and shapes of numbers, and names of texts, whose kind is None."""
    each = list(zip(paths, kinds, strict=True))
    numbers = [(path, kind[0].str, kind[1]) for path, kind in each if kind is not None]
    return json.dumps([numbers, [path for path, kind in each if kind is None]]).encode()


@lru_cache(maxsize=1024)
def _layout(encoded: bytes) -> Layout:
    arrays, texts = json.loads(encoded)
    numbers = np.dtype([(path, kind, tuple(shape)) for path, kind, shape in arrays])
    return Layout(numbers, tuple(texts), numbers[SPECIES].shape[0])
