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
# Check sum of all that follows it, number of the frame, and bytes of layout, numbers and texts.
_HEAD = struct.Struct("<4sIQIQI")
_SUMMED = len(_MAGIC) + 4


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
        return _layout(self.data[_HEAD.size : self.ends[0]])

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
    arrays, texts, names = [], [], []
    shapes = []
    for path in _in_order(tuple(contents)):
        value = contents[path]
        if isinstance(value, str):
            names.append(path)
            texts.append(value)
        else:
            shapes.append((path, value.dtype.str, value.shape))
            arrays.append(value.tobytes())
    layout, numbers, text = _encoded(tuple(shapes), tuple(names)), b"".join(arrays), "\n".join(texts).encode()
    head = _HEAD.pack(_MAGIC, 0, number, len(layout), len(numbers), len(text))[_SUMMED:]
    rest = b"".join((head, layout, numbers, text))
    return _MAGIC + struct.pack("<I", crc32(rest)) + rest


def records_in(path: Path) -> Iterator[Record]:
    """The records of a file, up to the first that is not whole."""
    with open(path, "rb") as file:
        left = path.stat().st_size
        while len(head := file.read(_HEAD.size)) == _HEAD.size:
            magic, sum_of_rest, number, *lengths = _HEAD.unpack(head)
            left -= len(head) + sum(lengths)
            if magic != _MAGIC or left < 0:
                return
            data = head + file.read(sum(lengths))
            if crc32(memoryview(data)[_SUMMED:]) != sum_of_rest:
                return
            end = _HEAD.size + lengths[0]
            yield Record(number, data, (end, end + lengths[1]))


@lru_cache(maxsize=1024)
def _in_order(paths: tuple[str, ...]) -> list[str]:
    return sorted(paths)


@lru_cache(maxsize=1024)
def _encoded(arrays: tuple[tuple[str, str, tuple[int, ...]], ...], texts: tuple[str, ...]) -> bytes:
    return json.dumps([arrays, texts]).encode()


@lru_cache(maxsize=1024)
def _layout(encoded: bytes) -> Layout:
    arrays, texts = json.loads(encoded)
    numbers = np.dtype([(path, kind, tuple(shape)) for path, kind, shape in arrays])
    return Layout(numbers, tuple(texts), numbers[SPECIES].shape[0])
