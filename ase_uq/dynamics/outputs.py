"""Files that a run adds to, when it goes on: what stands in them from after its saved step is dropped."""

import os
from collections.abc import Iterator
from io import BytesIO, FileIO
from pathlib import Path
from typing import Any

from ase.io.extxyz import key_val_str_to_dict

from ase_uq.io.files import appending, write_whole


def drop_rows(path: Path, step: int, start: int) -> None:
    """Drops the rows of a log after a step, and one that was torn.

    Args:
        path: The log.
        step: Last step whose row stays; -1 for none.
        start: Number of bytes at its beginning that are of another run.
    """
    end = start
    with open(path, "rb") as file:
        file.seek(start)
        for line in file:
            number = line.split(b",", 1)[0]  # of the first line: its name
            if not line.endswith(b"\n") or (number.isdigit() and int(number) > step):
                break
            end += len(line)
    os.truncate(path, end)


def drop_frames(path: Path, run: str, step: int) -> None:
    """Drops the frames of a run that its alarms after a step left, those from before the alarms, and a torn one.

    Args:
        path: Extended XYZ file of flagged frames, to which other runs may be adding theirs.
        run: Name of the run, in `info["run"]` of its frames.
        step: Last step whose frame stays; -1 for none.
    """
    with appending(path) as file:
        kept: list[bytes] = []
        waiting: list[int] = []  # places of frames from before an alarm, which stands after them
        dropped = False
        for text, entries in _frames_in(file):
            if entries is None:
                dropped = True
                continue
            kept.append(text)
            if str(entries.get("run")) != run:
                continue
            waiting.append(len(kept) - 1)
            if entries.get("flag_level") == "before":
                continue
            if int(entries.get("flag_step", -1)) > step:
                dropped = True
                for place in waiting:
                    kept[place] = b""
            waiting = []
        for place in waiting:
            dropped = True
            kept[place] = b""
        if dropped:
            write_whole(path, b"".join(kept))


def _frames_in(file: FileIO) -> Iterator[tuple[bytes, dict[str, Any] | None]]:
    """The frames of an extended XYZ file as they stand there, and their entries of info; None for a torn frame."""
    file.seek(0)
    text = BytesIO(file.readall())
    while head := text.readline():
        if not head.strip().isdigit():  # a blank line, or something else than frames
            yield head + (text.read() if head.strip() else b""), {}
            continue
        lines = [head, *(text.readline() for _ in range(int(head) + 1))]
        if not lines[-1].endswith(b"\n"):
            yield b"".join(lines), None
            return
        yield b"".join(lines), key_val_str_to_dict(lines[1].decode())
