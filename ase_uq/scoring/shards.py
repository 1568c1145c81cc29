"""Parts of a trajectory that are scored apart, on as many machines as there are, and made one file again."""

import heapq
import json
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from io import FileIO
from pathlib import Path
from typing import Any, NamedTuple
from zlib import crc32

from ase_uq.communicator import Serial
from ase_uq.display.progress import progress_bar
from ase_uq.errors import ArtefactError, InputError
from ase_uq.io.files import check_distinct, check_replaceable, refused_write, write_all
from ase_uq.scoring.frame_file import FrameFile, frame_file
from ase_uq.scoring.frame_score import HEADER, FrameScore, lines_of, rows_in
from ase_uq.scoring.journal import SUM_OF_FRAMES, SUM_OF_ROWS, Beside, sum_of
from ase_uq.scoring.scored import ScoredTrajectory

SHARD = "shard"  # in what a shard was made from: which one it is


@dataclass
class Shard(Serial):
    """One of several equal parts of a trajectory: every N-th chunk of frames as they would be evaluated together.

    So each batch is one of the run without shards, and gives the same numbers to the last digit.

    Args:
        number: Which part, from 1.
        count: How many there are.

    Raises:
        ValueError: There is no such part.
    """

    number: int
    count: int

    def __post_init__(self) -> None:
        if not 1 <= self.number <= self.count:
            raise ValueError(f"there is no shard {self}: give I/N with I from 1 to N, such as 1/8.")
        self.rank, self.size = self.number - 1, self.count

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @classmethod
    def parse(cls, text: str) -> "Shard":
        """From `I/N`.

        Raises:
            ValueError: It is something else.
        """
        number, slash, count = text.partition("/")
        if not (slash and number.strip().isdecimal() and count.strip().isdecimal()):
            raise ValueError(f"'{text}' is no shard: give I/N, such as 1/8.")
        return cls(int(number), int(count))


class _Part(NamedTuple):
    """A shard as it lies on the disk.

    Args:
        path: Its frames.
        beside: Its rows and what it was made from.
        origin: What it was made from, but for which shard it is.
        shard: Which one it is.
        sums: Check sums of its frames and of its rows.
    """

    path: Path
    beside: Beside
    origin: dict[str, Any]
    shard: Shard
    sums: tuple[int, int]


def merge_shards(
    shards: Sequence[str | os.PathLike[str]],
    *,
    out: str | os.PathLike[str],
    csv: str | os.PathLike[str] | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> ScoredTrajectory:
    """Makes one file of all shards of a trajectory: the one that a run without shards would have written.

    Memory does not grow with the trajectory. The shards stay.

    Args:
        shards: What `score(..., shard=...)` wrote, in any order, each with its `.shard.json` and `.shard.csv` beside
            it.
        out: File to write, with the ending of the shards.
        csv: CSV file with the numbers of each frame, including those left out; None for none. See `FrameScore`.
        overwrite: Whether existing files are replaced.
        progress: Whether to show a progress bar.

    Raises:
        InputError: A shard is missing, not complete, given twice, of another format than `out`, or not as it was
            written; or there are no frames.
        ArtefactError: A shard was scored with another trajectory, potential, uncertainty model or options; or the
            output cannot be written.
        FileExistsError: `out` or `csv` exists.
        ValueError: An output is a shard, or has the name of another format.
    """
    start = time.perf_counter()
    outputs = [Path(out), *([] if csv is None else [Path(csv)])]
    file = frame_file(outputs[0])
    every = [Path(path) for path in shards]
    check_distinct([*every, *(path for shard in every for path in Beside.of(shard))], *outputs)
    parts = _checked([_part(path, file) for path in every])
    for path in outputs:
        check_replaceable(path, overwrite)
    new = [path.with_name(path.name + ".merging") for path in outputs]
    try:
        scored = _written(parts, new, file, progress)
        for path, target in zip(new, outputs, strict=True):
            os.replace(path, target)
    except OSError as error:
        raise refused_write(outputs[0], error) from error
    finally:
        for path in new:
            path.unlink(missing_ok=True)
    scored.out, scored.seconds = outputs[0], time.perf_counter() - start
    return scored


def _written(parts: Sequence[_Part], outputs: Sequence[Path], file: FrameFile, progress: bool) -> ScoredTrajectory:
    """Writes all frames to the first of the files, and their rows to the second one if there is one."""
    scored = ScoredTrajectory(outputs[0])
    with ExitStack() as opened, progress_bar(desc="merge", unit="frame", show=progress) as bar:
        frames, *tables = (opened.enter_context(FileIO(path, "w")) for path in outputs)
        for table in tables:
            write_all(table, HEADER)
        for number, (row, data) in enumerate(_in_order(parts, file)):
            if row.frame != number:
                wrong = "stands twice" if row.frame < number else "is in none of them"
                raise InputError(f"frame {min(row.frame, number)} {wrong}: score the shards again with --overwrite.")
            scored.add(row)
            write_all(frames, data)
            for table in tables:
                write_all(table, "".join(lines_of([row])).encode())
            bar.update()
        for written in (frames, *tables):
            os.fsync(written.fileno())
    if not scored.n_frames:
        raise InputError(f"none of the {scored.n_left_out} frames of these shards could be scored.")
    file.finish(outputs[0])
    return scored


def _part(path: Path, file: FrameFile) -> _Part:
    beside = Beside.of(path)
    if path.with_name(f"{path.name}.part.json").exists():
        raise InputError(f"{path} is not complete. The command that began it goes on when it is given again.")
    if not path.is_file():
        raise InputError(f"there is no file {path}.")
    if (kind := frame_file(path)).name != file.name:
        raise InputError(
            f"{path} is in {kind.name}, and {file.name} is to be written. All shards must be in one format; give the "
            "output their ending."
        )
    try:
        origin = json.loads(beside.origin.read_text(encoding="utf-8"))
        shard = Shard.parse(origin.pop(SHARD))
        sums = int(origin.pop(SUM_OF_FRAMES)), int(origin.pop(SUM_OF_ROWS))
    except FileNotFoundError:
        raise InputError(
            f"{path} is no complete shard: {beside.origin.name} is not beside it. Score it with --shard I/N (shard=), "
            "and keep the files that are written beside it."
        ) from None
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{beside.origin} is not as it was written: {_again(path)}") from error
    if not beside.rows.is_file():
        raise InputError(f"{beside.rows} is missing: {_again(path)}")
    return _Part(path, beside, origin, shard, sums)


def _checked(parts: Sequence[_Part]) -> Sequence[_Part]:
    """The shards, if they are all of one run."""
    if not parts:
        raise InputError("no shard was given.")
    first = parts[0]
    numbers: dict[int, _Part] = {}
    for part in parts:
        for key in {**first.origin, **part.origin}:
            if first.origin.get(key) != part.origin.get(key):
                raise ArtefactError(
                    f"{part.path} was scored with another value of {key.replace('_', ' ')} than {first.path}. Score "
                    "all shards with the same."
                )
        if part.shard.count != first.shard.count:
            raise InputError(
                f"{first.path} is shard {first.shard}, and {part.path} is shard {part.shard}. Give those of one run."
            )
        if (other := numbers.setdefault(part.shard.number, part)) is not part:
            raise InputError(f"{other.path} and {part.path} are both shard {part.shard}. Give each once.")
    if missing := [str(number) for number in range(1, first.shard.count + 1) if number not in numbers]:
        verb = "are" if len(missing) > 1 else "is"
        raise InputError(f"shard {', '.join(missing)} of {first.shard.count} {verb} missing. Give all of them.")
    return parts


def _in_order(parts: Sequence[_Part], file: FrameFile) -> Iterator[tuple[FrameScore, bytes]]:
    """Row and bytes of every frame, by number; one that was left out has none."""
    return heapq.merge(*(_frames_of(part, file) for part in parts), key=lambda each: each[0].frame)


def _frames_of(part: _Part, file: FrameFile) -> Iterator[tuple[FrameScore, bytes]]:
    by_frames = file.finishes_as_it_grew
    sums = [0 if by_frames else sum_of(part.path), crc32(HEADER)]
    if not by_frames and sums[0] != part.sums[0]:  # an altered one may end in an error anywhere
        raise InputError(f"{part.path} is not as it was written: {_again(part.path)}")
    frames = file.finished(part.path)
    for row in _rows_of(part):
        number, data = (row.frame, b"") if row.problem else next(frames, (-1, b""))
        if number != row.frame:
            raise InputError(f"{part.path} is cut off or altered at frame {row.frame}: {_again(part.path)}")
        sums = [crc32(data, sums[0]) if by_frames else sums[0], crc32("".join(lines_of([row])).encode(), sums[1])]
        yield row, data
    if tuple(sums) != part.sums or next(frames, None) is not None:
        raise InputError(f"{part.path} or {part.beside.rows.name} is not as it was written: {_again(part.path)}")


def _rows_of(part: _Part) -> Iterator[FrameScore]:
    try:
        yield from rows_in(part.beside.rows)
    except (ValueError, TypeError) as error:
        raise InputError(f"{part.beside.rows} is not as it was written: {_again(part.path)}") from error


def _again(path: Path) -> str:
    return f"score {path} again with --overwrite."
