"""Writes results to disk so that the work can be resumed where it stopped, whatever kills the process.

While the work goes on, `OUT.part` has the frames, `OUT.part.csv` one row per frame, and `OUT.part.json` what they were
made from. The rows of a batch are written before its frames, so the frames decide: resuming cuts off a torn last frame
and every row after the last whole frame. `OUT` appears, complete, when everything is there.
"""

import csv
import errno
import json
import os
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import astuple, fields, replace
from io import FileIO
from pathlib import Path
from typing import Any

from ase.io.extxyz import key_val_str_to_dict

from ase_uq.errors import ArtefactError
from ase_uq.io.files import check_writable, write_all
from ase_uq.scoring.frame_score import NUMBER_KEY, FrameScore

_NUMBER = re.compile(rb"\b" + NUMBER_KEY.encode() + rb"=(\d+)\b")
# A killed process loses nothing that was written. A power cut may lose what was written in this many seconds.
_SECONDS_AT_RISK = 5.0


class Journal:
    """Writes frames and rows; a context manager that leaves them to the next run unless they are finished.

    Args:
        out: Extended XYZ file to create.
        csv_file: CSV file to create; None for none.
        origin: Everything that determines the results, as JSON values; a run resumes only work of the same origin.
        overwrite: Whether to replace existing files, and to discard unfinished work of another origin.

    Attributes:
        next_frame: Number of the first frame of the source that is not written yet.
        n_resumed: Number of frames that were there when the journal was opened.
        is_complete: Whether all frames were there already, and only the renaming of files was left to do.

    Raises:
        FileExistsError: `out` or `csv_file` exists.
        ArtefactError: The files cannot be written, are of another origin, or another process is writing them.
    """

    def __init__(self, out: Path, csv_file: Path | None, origin: Mapping[str, Any], *, overwrite: bool = False) -> None:
        self.part = out.with_name(out.name + ".part")
        self._rows_part = self.part.with_name(self.part.name + ".csv")
        self._origin_file = self.part.with_name(self.part.name + ".json")
        self._out, self._csv = out, csv_file
        self.next_frame = self.n_resumed = 0
        self.is_complete = self._origin_file.exists() and out.exists() and not self.part.exists()
        known = self._known(origin, overwrite)
        self.is_complete = self.is_complete and known
        if self.is_complete:
            return
        for path in (out, csv_file):
            if path is not None and path.exists() and not overwrite:
                raise FileExistsError(
                    f"{path} exists. Give another name, or overwrite it (overwrite=True, --overwrite)."
                )
            if path is not None:
                check_writable(path)
        self._open = ExitStack()
        try:
            self._frames = self._open.enter_context(_appended(self.part))
            _lock(self._frames, self.part)
            self._rows = self._open.enter_context(_appended(self._rows_part))
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
        header = ",".join(field.name for field in fields(FrameScore))
        write_all(self._rows, header.encode() + b"\n")
        temporary = self._origin_file.with_name(self._origin_file.name + ".new")
        temporary.write_text(json.dumps(dict(origin)), encoding="utf-8")
        os.replace(temporary, self._origin_file)

    def _take_up(self) -> None:
        """Cuts both files after the last frame that is whole in both."""
        n_frames, last, end = _whole_frames(self.part)
        last_row, rows_end = _rows_up_to(self._rows_part, last)
        if last_row < last:  # the rows were tampered with, or a power cut took them
            n_frames, last, end = _whole_frames(self.part, upto=last_row)
            last, rows_end = _rows_up_to(self._rows_part, last)
        self._frames.truncate(end)
        self._rows.truncate(rows_end)
        if not rows_end:
            write_all(self._rows, ",".join(field.name for field in fields(FrameScore)).encode() + b"\n")
        self.next_frame, self.n_resumed = last + 1, n_frames

    def rows(self) -> Iterator[FrameScore]:
        """The rows written so far, one by one."""
        path = self._rows_part if self._rows_part.exists() else self._csv
        if path is None:
            return
        with open(path, newline="", encoding="utf-8") as file:
            reader = csv.reader(file)
            next(reader, None)
            for row in reader:
                yield FrameScore.from_row(row)

    def append(self, rows: Sequence[FrameScore], frames: Sequence[str]) -> None:
        """Writes the rows of a batch, then the text of its frames.

        Raises:
            ArtefactError: They cannot be written; what was written before them is kept.
        """
        lines = _Lines()
        # A row must be one line, whatever a parser's message was.
        rows = [replace(row, problem=" ".join(row.problem.split())) if row.problem else row for row in rows]
        csv.writer(lines, lineterminator="\n").writerows(astuple(row) for row in rows)
        try:
            write_all(self._rows, "".join(lines).encode())
            write_all(self._frames, "".join(frames).encode())
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
                self._open.close()
                os.replace(self.part, self._out)
            if self._csv is not None and self._rows_part.exists():
                _move(self._rows_part, self._csv)
            self._origin_file.unlink()
            self._rows_part.unlink(missing_ok=True)
        except OSError as error:
            raise self.refused_write(error) from error

    def discard(self) -> None:
        """Removes the files written so far."""
        self._open.close()
        for path in (self.part, self._rows_part, self._origin_file):
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
        for file in (self._rows, self._frames):
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


class _Lines(list[str]):
    """A list of lines that serves `csv.writer` as a file."""

    write = list.append


def _appended(path: Path) -> FileIO:
    return FileIO(path, "ab")


def _move(path: Path, target: Path) -> None:
    """Moves a file, also to another file system; the target appears whole there, too."""
    try:
        os.replace(path, target)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        near = target.with_name(target.name + ".part")
        with open(path, "rb") as source, open(near, "wb") as file:
            shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(near, target)


def _lock(file: FileIO, path: Path) -> None:
    """Locks a file, because two runs writing to it would write every frame twice."""
    with suppress(ImportError):  # not on Windows
        import fcntl

        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ArtefactError(f"another process is writing {path}. Wait for it, or give another output.") from None
        except OSError:  # a file system without locks
            pass


def _whole_frames(path: Path, upto: int | None = None) -> tuple[int, int, int]:
    """Reads our extended XYZ up to the last frame that is complete.

    Args:
        path: File to read.
        upto: Largest frame number to accept; None for no limit.

    Returns:
        Number of complete frames, frame number of the last one, -1 for none, and position in the file where it ends.
    """
    count, last, end = 0, -1, 0
    with open(path, "rb") as file:
        while head := file.readline():
            comment = file.readline()
            number = _number_in(comment)
            if not head.strip().isdigit() or number is None or (upto is not None and number > upto):
                break
            lines = [comment, *(file.readline() for _ in range(int(head)))]
            # A power cut leaves zeros in a block that was allocated but not written.
            if not lines[-1].endswith(b"\n") or any(b"\0" in line for line in lines):
                break
            count, last, end = count + 1, number, file.tell()
    return count, last, end


def _number_in(comment: bytes) -> int | None:
    numbers = _NUMBER.findall(comment)
    if len(numbers) > 1:  # the text of another entry has such a number, too
        try:
            numbers = [key_val_str_to_dict(comment.decode())[NUMBER_KEY]]
        except (ValueError, KeyError):
            return None
    return int(numbers[0]) if numbers else None


def _rows_up_to(path: Path, last: int) -> tuple[int, int]:
    """Frame number of the last complete row up to frame `last`, -1 for none, and position in the file where it ends."""
    last_row, end = -1, 0
    with open(path, "rb") as file:
        end = len(header) if (header := file.readline()).endswith(b"\n") else 0
        for line in file if end else ():
            number = line.split(b",", 1)[0]
            if not line.endswith(b"\n") or b"\0" in line or not number.isdigit() or int(number) > last:
                break
            last_row, end = int(number), end + len(line)
    return last_row, end


def _shown(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 40 else text[:12] + "…"
