"""Writes results to disk so that the work can be resumed where it stopped, whatever kills the process.

While the work goes on, `OUT.part` has the frames, `OUT.part.csv` one row per frame, `OUT.part.sums` a check sum of the
rows up to each of them, and `OUT.part.json` what they were made from. The rows of a batch are written before its
frames, so the frames decide: resuming cuts off a torn last frame, every row after the last whole frame, and everything
from the first row that was altered. `OUT` appears, complete, when everything is there; until then, frames that are to
be HDF5 are records, since a kill can leave a file of HDF5 unreadable.
"""

import errno
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ase_uq.errors import ArtefactError
from ase_uq.io.files import check_replaceable, lock, write_all, write_whole
from ase_uq.scoring.frame_file import frame_file
from ase_uq.scoring.frame_score import HEADER, FrameScore, lines_of, rows_in

SUM_OF_FRAMES, SUM_OF_ROWS = "sum_of_frames", "sum_of_rows"  # in what stands beside a shard
_SUM_BYTES = 9  # eight hexadecimal digits and the end of the line
# A killed process loses nothing that was written. A power cut may lose what was written in this many seconds.
_SECONDS_AT_RISK = 5.0


class Journal:
    """Writes frames and rows; a context manager that leaves them to the next run unless they are finished.

    Args:
        out: File to create; its name says in which format, as `frame_file` knows them.
        csv_file: CSV file to create; None for none.
        origin: Everything that determines the results, as JSON values; a run resumes only work of the same origin.
        overwrite: Whether to replace existing files, and to discard unfinished work of another origin.
        is_shard: Whether the rows and the origin stay beside `out` when it is finished, for `merge`; see `Beside`.

    Attributes:
        file: The kind of file that `out` is.
        next_frame: Number of the first frame of the source that is not written yet.
        n_resumed: Number of frames that were there when the journal was opened.
        is_complete: Whether all frames were there already, and only the renaming of files was left to do.

    Raises:
        ValueError: The name of `out` is that of another format.
        MissingDependency: The package that writes this format is not installed.
        FileExistsError: `out` or `csv_file` exists.
        ArtefactError: The files cannot be written, are of another origin, another process is writing them, or the rows
            of a finished work were altered before they got their name.
    """

    def __init__(
        self,
        out: Path,
        csv_file: Path | None,
        origin: Mapping[str, Any],
        *,
        overwrite: bool = False,
        is_shard: bool = False,
    ) -> None:
        self.file = frame_file(out)
        self._beside = Beside.of(out) if is_shard else None
        self.part = out.with_name(out.name + ".part")
        self._rows_part = self.part.with_name(self.part.name + ".csv")
        self._sums_part = self.part.with_name(self.part.name + ".sums")
        self._origin_file = self.part.with_name(self.part.name + ".json")
        self._out, self._csv = out, csv_file
        self.next_frame = self.n_resumed = 0
        self.is_complete = self._origin_file.exists() and out.exists() and not self.part.exists()
        known = self._known(origin, overwrite)
        if known and self.file.is_finished(self.part):  # and had not got its name
            self._check_replaceable(overwrite)
            os.replace(self.part, out)
            self.is_complete = True
        self.is_complete = self.is_complete and known
        if self.is_complete and self._rows_altered(overwrite):
            known = self.is_complete = False
        if self.is_complete:
            return
        self._check_replaceable(overwrite)
        self._open = ExitStack()
        try:
            self._frames = self._open.enter_context(_appended(self.part))
            lock(self._frames, self.part)
            self._rows = self._open.enter_context(_appended(self._rows_part))
            self._sums = self._open.enter_context(_appended(self._sums_part))
            if known:
                self._take_up()
            else:
                self._begin(origin)
            self._synced = time.monotonic()
        except OSError as error:
            self._open.close()
            raise self.refused_write(error) from error
        except BaseException:
            self._open.close()
            raise

    def _check_replaceable(self, overwrite: bool) -> None:
        for path in (self._out, self._csv):
            if path is not None:
                check_replaceable(path, overwrite)

    def _known(self, origin: Mapping[str, Any], overwrite: bool) -> bool:
        """Whether there is work of this origin to resume.

        Raises:
            ArtefactError: There is unfinished work, but of another or unknown origin.
        """
        try:
            stored = json.loads(self._origin_file.read_text(encoding="utf-8"))
            assert isinstance(stored, dict)
        except (OSError, ValueError, AssertionError):
            if self.part.exists() and self.part.stat().st_size and not overwrite:
                raise ArtefactError(
                    f"{self.part} exists, and nothing says what it was made from. Move it away, or give --overwrite "
                    "(overwrite=True) to start anew."
                ) from None
            return False
        changed = [key for key in {**stored, **origin} if stored.get(key) != origin.get(key)]
        if not changed or overwrite or self.is_complete:
            return not changed
        key = changed[0]
        raise ArtefactError(
            f"{self.part} was begun with another {key.replace('_', ' ')} ({_shown(stored.get(key))}, now "
            f"{_shown(origin.get(key))}). Give another output, the same {key.replace('_', ' ')}, or --overwrite "
            "(overwrite=True) to start anew."
        )

    def _begin(self, origin: Mapping[str, Any]) -> None:
        self._frames.truncate(0)
        self._rows.truncate(0)
        self._sums.truncate(0)
        write_all(self._rows, HEADER)
        self._sum = crc32(HEADER)
        write_whole(self._origin_file, json.dumps(dict(origin)).encode())

    def _take_up(self) -> None:
        """Cuts both files after the last frame that is whole in both."""
        n_frames, last, end = self._whole_frames()
        rows = _rows_up_to(self._rows_part, self._sums_part, last)
        if rows.last < last:  # the rows were tampered with, or a power cut took them
            n_frames, last, end = self._whole_frames(upto=rows.last)
            rows = _rows_up_to(self._rows_part, self._sums_part, last)
        self._frames.truncate(end)
        self._rows.truncate(rows.end)
        self._sums.truncate(rows.n_rows * _SUM_BYTES)
        self._sum = rows.sum
        if not rows.end:
            write_all(self._rows, HEADER)
        self.next_frame, self.n_resumed = last + 1, n_frames

    def _whole_frames(self, upto: int | None = None) -> tuple[int, int, int]:
        """Reads the frames up to the last one that is complete.

        Args:
            upto: Largest frame number to accept; None for no limit.

        Returns:
            Number of complete frames, frame number of the last one, -1 for none, and position in the file where it
            ends.
        """
        count, last, end = 0, -1, 0
        for number, data in self.file.growing(self.part):
            if upto is not None and number > upto:
                break
            count, last, end = count + 1, number, end + len(data)
        return count, last, end

    def _rows_altered(self, overwrite: bool) -> bool:
        """Whether the rows of a finished work are others than were written, and are to be made anew.

        Raises:
            ArtefactError: They are others, and may not be replaced.
        """
        if not self._rows_part.exists():
            return False
        rows = _rows_up_to(self._rows_part, self._sums_part)
        altered = rows.end != self._rows_part.stat().st_size
        if altered and not overwrite:
            raise ArtefactError(
                f"{self._rows_part} was altered after row {rows.n_rows}. Give --overwrite (overwrite=True) to start "
                f"anew, or remove {self._origin_file} to keep {self._out} without its table."
            )
        return altered

    def rows(self) -> Iterator[FrameScore]:
        """The rows written so far, one by one."""
        path = self._rows_part if self._rows_part.exists() else self._beside.rows if self._beside else self._csv
        if path is None:
            return
        yield from rows_in(path)

    def append(self, rows: Sequence[FrameScore], frames: Sequence[bytes]) -> None:
        """Writes the rows of a batch, then its frames, as `file` encodes them.

        Raises:
            ArtefactError: They cannot be written; what was written before them is kept.
        """
        encoded = [line.encode() for line in lines_of(rows)]
        sums: list[bytes] = []
        for line in encoded:
            self._sum = crc32(line, self._sum)
            sums.append(b"%08x\n" % self._sum)
        try:
            write_all(self._sums, b"".join(sums))
            write_all(self._rows, b"".join(encoded))
            write_all(self._frames, b"".join(frames))
            if time.monotonic() - self._synced > _SECONDS_AT_RISK:
                self._sync()
        except OSError as error:
            raise self.refused_write(error) from error

    def finish(self) -> None:
        """Gives the files their final names. If the process dies in between, the next run does the rest.

        Raises:
            ArtefactError: A file cannot be written or renamed.
        """
        try:
            if not self.is_complete:
                self._sync()
                self.file.finish(self.part)
                self._open.close()
                os.replace(self.part, self._out)
            if self._csv is not None and self._rows_part.exists():
                (_move if self._beside is None else _copy)(self._rows_part, self._csv)
            if self._beside is None:
                for path in Beside.of(self._out):  # of a shard that was there before
                    path.unlink(missing_ok=True)
            else:
                self._leave_beside(self._beside)
            self._origin_file.unlink()
            self._rows_part.unlink(missing_ok=True)
            self._sums_part.unlink(missing_ok=True)
        except OSError as error:
            raise self.refused_write(error) from error

    def _leave_beside(self, beside: "Beside") -> None:
        """Leaves the rows and the origin of a shard, with check sums, to who merges it."""
        if self._rows_part.exists():
            os.replace(self._rows_part, beside.rows)
        sums = {SUM_OF_FRAMES: sum_of(self._out), SUM_OF_ROWS: sum_of(beside.rows)}
        origin = json.loads(self._origin_file.read_text(encoding="utf-8")) | sums
        write_whole(beside.origin, json.dumps(origin).encode())

    def discard(self) -> None:
        """Removes the files written so far."""
        self._open.close()
        for path in (self.part, self._rows_part, self._sums_part, self._origin_file):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Leaves what was written to the next run; if there are no frames, the files are removed."""
        if not self.is_complete:
            self._open.close()
            if self.part.exists() and not self.part.stat().st_size:
                self.discard()

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _sync(self) -> None:
        for file in (self._sums, self._rows, self._frames):
            os.fsync(file.fileno())
        self._synced = time.monotonic()

    def refused_write(self, error: OSError) -> ArtefactError:
        """The error that says why the output cannot be written, and what is kept of it."""
        kept = (
            f" What was scored before is kept in {self.part}, and the same run goes on from there."
            if self.part.exists() and self.part.stat().st_size
            else ""
        )
        return ArtefactError(f"cannot write {self._out}: {error.strerror or error}.{kept}")


def sum_of(path: Path) -> int:
    """Check sum of a file."""
    total = 0
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            total = crc32(block, total)
    return total


class Beside(NamedTuple):
    """What stands beside a finished shard.

    Args:
        rows: `OUT.shard.csv`, a row for each frame of the shard, those left out among them.
        origin: `OUT.shard.json`, what the shard was made from, which one it is, and check sums.
    """

    rows: Path
    origin: Path

    @classmethod
    def of(cls, out: Path) -> "Beside":
        return cls(*(out.with_name(f"{out.name}.shard.{kind}") for kind in ("csv", "json")))


def _appended(path: Path) -> FileIO:
    return FileIO(path, "ab")


def _move(path: Path, target: Path) -> None:
    """Moves a file, also to another file system; the target appears whole there, too."""
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        _copy(path, target)


def _copy(path: Path, target: Path) -> None:
    """Copies a file; the target appears whole."""
    near = target.with_name(target.name + ".part")
    with open(path, "rb") as source, open(near, "wb") as file:
        shutil.copyfileobj(source, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(near, target)


class _Rows(NamedTuple):
    """Rows that are as they were written: the last one's frame, -1 for none, their number, end and check sum."""

    last: int
    n_rows: int
    end: int
    sum: int


def _rows_up_to(path: Path, sums: Path, last: int | None = None) -> _Rows:
    """The rows up to frame `last`, None for all, and before the first one that is torn or altered."""
    rows = _Rows(-1, 0, 0, crc32(HEADER))
    if not sums.exists():  # a power cut took it
        return rows
    with open(path, "rb") as file, open(sums, "rb") as known:
        if file.readline() != HEADER:
            return rows
        rows = rows._replace(end=len(HEADER))
        for line in file:
            number, total = line.split(b",", 1)[0], crc32(line, rows.sum)
            if known.read(_SUM_BYTES) != b"%08x\n" % total or (last is not None and int(number) > last):
                break
            rows = _Rows(int(number), rows.n_rows + 1, rows.end + len(line), total)
    return rows


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
