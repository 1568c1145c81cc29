"""Writing H5MD from records: two passes over them, one for what all frames have, one for the frames."""

import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from io import FileIO
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from ase_uq.io.contents import CONSTRAINTS, EDGES, ENTRY, PBC, PER_ATOM, POSITION, SPECIES, as_text, key_at
from ase_uq.io.files import write_all
from ase_uq.io.h5md import BLOCK_BYTES, BLOCK_FRAMES, LAYOUT, N_ATOMS, OWN, place_of
from ase_uq.io.hdf5 import h5py
from ase_uq.io.records import Layout, Record
from ase_uq.properties import find_property

_ORIGIN = "ASE_ENTRY_ORIGIN"  # znh5md's name of it
_CHUNK = 64  # frames, and atoms, of a chunk


def write_h5md(path: Path, records: Callable[[], Iterable[Record]], number: str) -> None:
    """Writes the frames of records as H5MD. The same records give the same bytes.

    Args:
        path: File to write.
        records: Gives all records from the first one on, whenever it is called.
        number: Entry of info that is the number of a frame, which every frame has: H5MD's `step`.

    Raises:
        OSError: The file cannot be written.
    """
    survey = _Survey()
    for record in records():
        survey.add(record.layout)
    with _Disk(path, "w+") as disk:
        with h5py().File(disk, "w") as file:
            writer = _Writer(file, survey, ENTRY + number)
            for block in _blocks(records()):
                writer.write(block)
                if disk.error is not None:
                    break
        if disk.error is not None:
            raise disk.error
        os.fsync(disk.fileno())


class _Disk(FileIO):
    """A file that HDF5 can always write to: where a write fails, it can neither close the file nor end the process.

    Attributes:
        error: Why the first write failed that did, after which nothing more is written; None if all is well.
    """

    error: OSError | None = None
    _place = _end = 0  # where HDF5 takes this file to be, and to end, once nothing more is written

    def write(self, data: Any) -> int:
        if self.error is None:
            self._place = self.tell()
            self._attempt(lambda: write_all(super(_Disk, self), data))
        self._end = max(self._end, self._place + len(data))
        return len(data)

    def truncate(self, size: int | None = None) -> int:
        self._attempt(lambda: super(_Disk, self).truncate(size))
        self._end = self.tell() if size is None else size
        return self._end

    def seek(self, place: int, whence: int = os.SEEK_SET) -> int:
        if self.error is None:
            return super().seek(place, whence)
        self._place = place if whence == os.SEEK_SET else self._end + place
        return self._place

    def tell(self) -> int:
        return super().tell() if self.error is None else self._place

    def readinto(self, buffer: Any) -> int:
        if self.error is None:
            return super().readinto(buffer)
        memoryview(buffer).cast("B")[:] = bytes(len(buffer))
        return len(buffer)

    def _attempt(self, work: Callable[[], Any]) -> None:
        if self.error is None:
            try:
                work()
            except OSError as error:
                self.error = error


@dataclass
class _Seen:
    """What one name stands for in all frames.

    Args:
        kinds: Kinds of its numbers and their shapes, for one atom where each atom has them; `text` for a text.
        dtypes: Types of its numbers.
        count: How many frames have it.
    """

    kinds: set[tuple[str, tuple[int, ...]]] = field(default_factory=set)
    dtypes: set[np.dtype] = field(default_factory=set)
    count: int = 0


class _Survey:
    """What all frames have, before the first is written."""

    def __init__(self) -> None:
        self.n_atoms: list[int] = []
        self._counts: Counter[int] = Counter()
        self._layouts: dict[int, Layout] = {}

    def add(self, layout: Layout) -> None:
        """Counts a frame."""
        self.n_atoms.append(layout.n_atoms)
        self._counts[id(layout)] += 1
        self._layouts[id(layout)] = layout  # kept, so that no other has its id

    def seen(self) -> dict[str, _Seen]:
        """By name, in alphabetical order."""
        seen: dict[str, _Seen] = {}
        for key, layout in self._layouts.items():
            for path in layout.texts:
                one = seen.setdefault(path, _Seen())
                one.kinds.add(("text", ()))
                one.count += self._counts[key]
            for path in layout.numbers.names or ():
                dtype, shape = layout.numbers[path].base, layout.numbers[path].shape
                one = seen.setdefault(path, _Seen())
                one.kinds.add((dtype.kind, shape[1:] if path.startswith(PER_ATOM) else shape))
                one.dtypes.add(dtype)
                one.count += self._counts[key]
        return dict(sorted(seen.items()))


class _Block:
    """Some frames one after the other.

    Args:
        records: Their records.

    Attributes:
        n_atoms: Number of atoms of each frame.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self._runs: list[tuple[slice, Layout, np.ndarray]] = []
        self._texts: list[dict[str, str]] = []
        layouts = [record.layout for record in records]
        self.n_atoms = [layout.n_atoms for layout in layouts]
        first = 0
        for _, group in groupby(zip(layouts, records, strict=True), key=lambda each: id(each[0])):
            (layout, *_), run = zip(*group, strict=True)
            numbers = np.frombuffer(b"".join([record.numbers for record in run]), layout.numbers)
            self._runs.append((slice(first, first + len(run)), layout, numbers))
            self._texts += [dict(zip(layout.texts, record.texts, strict=True)) for record in run]
            first += len(run)

    def texts(self, path: str) -> list[str]:
        """A value of each frame in JSON; empty where a frame has none."""
        texts = [texts.get(path, "") for texts in self._texts]
        for where, layout, numbers in self._runs:
            if path in (layout.numbers.names or ()):
                texts[where] = map(as_text, numbers[path])
        return texts

    def present(self, path: str) -> np.ndarray:
        """Whether each frame has it."""
        present = np.zeros(len(self.n_atoms), bool)
        for where, layout, _ in self._runs:
            present[where] = path in (layout.numbers.names or ())
        return present

    def fill(self, path: str, values: np.ndarray, per_atom: bool) -> np.ndarray:
        """`values` with those of each frame, as far as frames have them."""
        for where, layout, numbers in self._runs:
            if path in (layout.numbers.names or ()):
                values[(where, slice(layout.n_atoms)) if per_atom else where] = numbers[path]
        return values


def _blocks(records: Iterable[Record]) -> Iterator[_Block]:
    block: list[Record] = []
    largest = 0
    for record in records:
        largest = max(largest, len(record.data))
        if block and (len(block) == BLOCK_FRAMES or (len(block) + 1) * largest > BLOCK_BYTES):
            yield _Block(block)
            block, largest = [], len(record.data)
        block.append(record)
    if block:
        yield _Block(block)


class _Writer:
    """Writes blocks of frames to the datasets that it makes.

    Args:
        file: An open file.
        survey: What the frames have.
        number: Name of the numbers of the frames.
    """

    def __init__(self, file: Any, survey: _Survey, number: str) -> None:
        self._file, self._next = file, 0
        self._n_frames, self._n_atoms = len(survey.n_atoms), max(survey.n_atoms, default=0)
        self._is_ragged = len(set(survey.n_atoms)) > 1
        about = file.create_group("h5md")
        about.attrs["version"] = np.array([1, 1])
        for who, name in (("author", "N/A"), ("creator", "ase_uq")):
            about.create_group(who).attrs["name"] = name
        about["creator"].attrs["version"] = version("ase-uq")
        file.create_group(OWN).attrs["layout"] = LAYOUT
        file[N_ATOMS] = np.array(survey.n_atoms, np.int64)
        box = file.create_group("particles/atoms/box")
        box.attrs["dimension"] = 3
        box.attrs["boundary"] = ["none"] * 3  # of the first frame, once it is written
        self._present: dict[str, Any] = {}
        self._values = {path: self._element(path, seen) for path, seen in survey.seen().items()}
        for path in self._values:
            if path != CONSTRAINTS:  # every element of H5MD has its steps; here all have the same
                file[f"{place_of(path)}/step"] = file[f"{place_of(number)}/value"]

    def write(self, block: _Block) -> None:
        """Writes the frames of a block after those of the ones before."""
        first, last = self._next, self._next + len(block.n_atoms)
        most = max(block.n_atoms)
        for path, values in self._values.items():
            if values.dtype.kind == "O":
                values[first:last] = block.texts(path)
            elif not path.startswith(PER_ATOM):
                values[first:last] = block.fill(path, _empty(last - first, values.shape[1:], values.dtype), False)
            else:
                empty = _empty(last - first, (most, *values.shape[2:]), values.dtype)
                values[first:last, :most] = block.fill(path, empty, True)
        for path, present in self._present.items():
            present[first:last] = block.present(path)
        if not first:
            periodic = block.fill(PBC, np.empty((last, 3), bool), False)[0]
            box = self._file["particles/atoms/box"]
            box.attrs["boundary"] = ["periodic" if along else "none" for along in periodic]
        self._next = last

    def _element(self, path: str, seen: _Seen) -> Any:
        group = self._file.create_group(place_of(path))
        if origin := _origin_of(path):
            group.attrs[_ORIGIN] = origin
        dtype, shape = self._fitting(path, seen)
        options: dict[str, Any] = {"fill_time": "never"} if dtype.kind != "O" else {}
        if path.startswith(PER_ATOM) and dtype.kind != "O":
            shape = (self._n_frames, self._n_atoms, *shape)
            if self._is_ragged:  # rows that no frame of a chunk has take no room
                options = {
                    "chunks": (min(self._n_frames, _CHUNK), min(self._n_atoms, _CHUNK), *shape[2:]),
                    "fillvalue": np.nan,
                    "shuffle": True,
                    "compression": "gzip",
                    "compression_opts": 1,
                }
        else:
            shape = (self._n_frames, *shape)
        if dtype.kind == "f" and seen.count < self._n_frames:
            self._present[path] = group.create_dataset("present", self._n_frames, bool)
        values = group.create_dataset("value", shape, dtype, **options)
        if unit := _unit_of(path):
            values.attrs["unit"] = unit
        return values

    def _fitting(self, path: str, seen: _Seen) -> tuple[np.dtype, tuple[int, ...]]:
        """The type and shape in which the values of all frames fit; of one atom, where each atom has one."""
        if path == SPECIES and self._is_ragged:
            return np.dtype(np.float32), ()
        (kind, shape), *others = seen.kinds
        is_padded = seen.count < self._n_frames or (path.startswith(PER_ATOM) and self._is_ragged)
        if others or kind == "text" or (kind != "f" and is_padded):
            return h5py().string_dtype(), ()
        return np.result_type(*seen.dtypes), shape


def _origin_of(path: str) -> str:
    """Where ASE has an entry; empty for what every structure has."""
    if path in (SPECIES, POSITION, EDGES, PBC, CONSTRAINTS):
        return ""
    if find_property(key_at(path)) is not None:
        return "calc"
    return "arrays" if path.startswith(PER_ATOM) else "info"


def _unit_of(path: str) -> str:
    """The unit in words that H5MD knows; empty for none, and for what is not ours."""
    if path in (POSITION, EDGES):
        return "Angstrom"
    entry = find_property(key_at(path)) if path.startswith((PER_ATOM, ENTRY)) else None
    unit = "" if entry is None or entry.unit == "1" else entry.unit
    return unit.replace("/Å³", " Angstrom-3").replace("/Å", " Angstrom-1")


def _empty(n_frames: int, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Values that no frame has: NaN, or zero where that cannot be."""
    return np.full((n_frames, *shape), np.nan if dtype.kind == "f" else 0, dtype)
