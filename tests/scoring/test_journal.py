"""Whatever is torn off, and wherever: the work is taken up at a whole frame, none lost and none doubled."""

import errno
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ase_uq.errors import ArtefactError
from ase_uq.scoring import journal as module
from ase_uq.scoring.frame_file import XYZFile
from ase_uq.scoring.frame_score import FrameScore
from ase_uq.scoring.journal import Journal

ORIGIN = {"trajectory": "abc", "potential": "def"}
LEFT_OUT = (2, 5)
N_FRAMES = 8


def row(number: int) -> FrameScore:
    if number in LEFT_OUT:
        return FrameScore(number, problem='it is "broken", truly')
    return FrameScore(number, number + 1, -1.5 * number, 0.1, 0.2 + number / 7, 0.05, 0, "H", math.inf)


def text(number: int) -> str:
    """A frame with as many atoms as its number says, and one."""
    atoms = "".join(f"H 0.0 0.0 {index}.5\n" for index in range(number + 1))
    return f"{number + 1}\nProperties=species:S:1:pos:R:3 source_frame={number} x=1\n{atoms}"


def run(journal: Journal, upto: int = N_FRAMES, batch: int = 3) -> None:
    """What a run appends from where the journal stands."""
    for first in range(journal.next_frame, upto, batch):
        numbers = range(first, min(first + batch, upto))
        journal.append([row(n) for n in numbers], [text(n).encode() for n in numbers if n not in LEFT_OUT])


WHOLE = "".join(text(n) for n in range(N_FRAMES) if n not in LEFT_OUT)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "out.xyz"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    return tmp_path / "out.csv"


def test_the_files_appear_when_all_is_there(out: Path, table: Path):
    with Journal(out, table, ORIGIN) as journal:
        run(journal)
        assert not out.exists()
        assert [r for r in journal.rows() if not r.problem] == [row(n) for n in range(N_FRAMES) if n not in LEFT_OUT]
        journal.finish()
    assert out.read_text() == WHOLE
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.csv", "out.xyz"]
    header, *lines = table.read_text().splitlines()
    assert header.startswith("frame,n_atoms,energy,energy_uncertainty,force_uncertainty_max,")
    assert [int(line.split(",")[0]) for line in lines] == list(range(N_FRAMES))


def test_without_a_csv_file_none_is_left(out: Path):
    with Journal(out, None, ORIGIN) as journal:
        run(journal)
        journal.finish()
    assert [path.name for path in out.parent.iterdir()] == ["out.xyz"]


def test_numbers_survive_the_file_to_the_last_digit(out: Path):
    rows = [row(1), row(2), FrameScore(3, 7, 0.1 + 0.2, 1e-300, math.pi, -0.0, 6, "Og", 1 / 3)]
    with Journal(out, None, ORIGIN) as journal:
        journal.append(rows, [text(1).encode()])
        assert repr(list(journal.rows())) == repr(rows)


def part(out: Path) -> Path:
    return out.with_name("out.xyz.part")


def finished(out: Path, table: Path) -> None:
    """Takes up what is there, and checks that it ends as if nothing had happened."""
    with Journal(out, table, ORIGIN) as journal:
        whole = part(out).read_text()
        assert WHOLE.startswith(whole)
        assert journal.n_resumed == whole.count("source_frame=")
        assert [r.frame for r in journal.rows()] == list(range(journal.next_frame))
        run(journal)
        journal.finish()
    assert out.read_text() == WHOLE
    assert [int(line.split(",")[0]) for line in table.read_text().splitlines()[1:]] == list(range(N_FRAMES))


def test_a_kill_at_any_byte_of_the_frames_loses_and_doubles_nothing(tmp_path: Path):
    for cut in range(1, len(WHOLE)):
        folder = tmp_path / str(cut)
        folder.mkdir()
        out, table = folder / "out.xyz", folder / "out.csv"
        with Journal(out, table, ORIGIN) as journal:
            run(journal)
        with open(part(out), "r+b") as file:
            file.truncate(cut)
        finished(out, table)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(frames=st.integers(0, 2000), rows=st.integers(0, 2000), zeros=st.integers(0, 30))
def test_any_two_torn_files_are_brought_into_step(
    tmp_path_factory: pytest.TempPathFactory, frames: int, rows: int, zeros: int
):
    """After a power cut either file may be the shorter, and end in zeros."""
    folder = tmp_path_factory.mktemp("torn")
    out, table = folder / "out.xyz", folder / "out.csv"
    with Journal(out, table, ORIGIN) as journal:
        run(journal)
    for path, cut in ((part(out), frames), (folder / "out.xyz.part.csv", rows)):
        data = path.read_bytes()[:cut]
        path.write_bytes(data + b"\0" * zeros if cut < path.stat().st_size else data)
    finished(out, table)


@pytest.mark.parametrize("step", range(3))
def test_a_kill_while_the_files_get_their_names(out: Path, table: Path, monkeypatch: pytest.MonkeyPatch, step: int):
    calls = []

    def replace(*arguments: object) -> None:
        calls.append(arguments)
        if len(calls) > step:
            raise KeyboardInterrupt
        original(*arguments)

    with Journal(out, table, ORIGIN) as journal:
        run(journal)
        original = module.os.replace
        monkeypatch.setattr(module.os, "replace", replace)
        if step == 2:
            monkeypatch.setattr(Path, "unlink", lambda *_, **__: replace())
        with pytest.raises(KeyboardInterrupt):
            journal.finish()
        monkeypatch.undo()
    with Journal(out, table, ORIGIN) as journal:
        assert journal.is_complete == (step > 0)
        assert [r.frame for r in journal.rows()] == list(range(N_FRAMES))
        if not journal.is_complete:
            run(journal)
        journal.finish()
    assert out.read_text() == WHOLE
    assert len(table.read_text().splitlines()) == N_FRAMES + 1
    assert sorted(path.name for path in out.parent.iterdir()) == ["out.csv", "out.xyz"]


def test_a_full_disk_keeps_what_was_written(out: Path, table: Path, monkeypatch: pytest.MonkeyPatch):
    with Journal(out, table, ORIGIN) as journal:
        run(journal, upto=3)

        def full(file, data: bytes) -> None:
            file.write(data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(module, "write_all", full)
        with pytest.raises(
            ArtefactError, match=r"cannot write .*out\.xyz: No space left on device\. What was scored"
        ) as e:
            journal.append([row(3)], [text(3).encode()])
        assert f"is kept in {part(out)}, and the same run goes on from there" in str(e.value)
        monkeypatch.undo()
    finished(out, table)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="only Linux has a device that is always full")
def test_a_full_device(tmp_path: Path):
    out = tmp_path / "out.xyz"
    (tmp_path / "out.xyz.part").symlink_to("/dev/full")
    with (
        pytest.raises(ArtefactError, match=r"No space left on device|Invalid argument"),
        Journal(out, None, ORIGIN) as j,
    ):
        run(j)


def test_a_frame_whose_number_cannot_be_told_is_not_whole(out: Path):
    """Another entry speaks of a number as well, and the line is none that can be read."""
    torn = text(1).replace(" x=1", ' note="source_frame=7" \xff').encode("latin-1")
    out.write_bytes(text(0).encode() + torn)
    assert list(XYZFile().growing(out)) == [(0, text(0).encode())]


def test_what_wrote_nothing_leaves_nothing(out: Path):
    with pytest.raises(ZeroDivisionError), Journal(out, None, ORIGIN):
        raise ZeroDivisionError
    assert not list(out.parent.iterdir())


@pytest.mark.parametrize(("key", "shown"), [("trajectory", "abc, now xyz"), ("potential", "def, now xyz")])
def test_another_origin_is_refused_and_named(out: Path, key: str, shown: str):
    with Journal(out, None, ORIGIN) as journal:
        run(journal, upto=3)
    before = part(out).read_bytes()
    with pytest.raises(ArtefactError, match=rf"out\.xyz\.part was begun with another {key} \({shown}\)\. Give another"):
        Journal(out, None, {**ORIGIN, key: "xyz"})
    assert part(out).read_bytes() == before
    with Journal(out, None, {**ORIGIN, key: "xyz"}, overwrite=True) as journal:
        assert (journal.next_frame, journal.n_resumed) == (0, 0)
        run(journal)
        journal.finish()
    assert out.read_text() == WHOLE


def test_somebody_elses_part_is_not_touched(out: Path):
    part(out).write_text("precious")
    with pytest.raises(ArtefactError, match="nothing says what it was made from"):
        Journal(out, None, ORIGIN)
    assert part(out).read_text() == "precious"


def test_existing_files_are_kept_unless_told(out: Path, table: Path):
    for path in (out, table):
        path.write_text("precious")
        with pytest.raises(FileExistsError, match=rf"{path.name} exists\. Give another name, or overwrite it"):
            Journal(out, table, ORIGIN)
        assert path.read_text() == "precious"
        path.unlink()
    out.write_text("old")
    with Journal(out, table, ORIGIN, overwrite=True) as journal:
        run(journal, upto=3)
        assert out.read_text() == "old"
    with Journal(out, table, ORIGIN, overwrite=True) as journal:
        assert journal.next_frame == 2  # frame 2 was left out and is tried again
        run(journal)
        journal.finish()
    assert out.read_text() == WHOLE


def test_two_runs_do_not_write_into_one_file(out: Path):
    pytest.importorskip("fcntl")
    code = (
        "import sys; from pathlib import Path; from ase_uq.scoring.journal import Journal\n"
        f"Journal(Path({str(out)!r}), None, {ORIGIN!r})"
    )
    with Journal(out, None, ORIGIN) as journal:
        other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        assert "another process is writing" in other.stderr
        run(journal)
        journal.finish()
    assert out.read_text() == WHOLE


def test_a_problem_of_several_lines_is_a_row_all_the_same(out: Path, table: Path):
    with Journal(out, table, ORIGIN) as journal:
        journal.append(
            [row(0), FrameScore(1, problem="first\nsecond\r\n  third"), row(3)], [text(0).encode(), text(3).encode()]
        )
    with Journal(out, table, ORIGIN) as journal:
        assert journal.next_frame == 4
        assert [one.problem for one in journal.rows()] == ["", "first second third", ""]


def test_rows_may_end_on_another_file_system(out: Path, table: Path, monkeypatch: pytest.MonkeyPatch):
    real = os.replace

    def replace(source: Path, target: Path) -> None:
        if target == table and source.name != table.name + ".part":
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        real(source, target)

    monkeypatch.setattr(os, "replace", replace)
    with Journal(out, table, ORIGIN) as journal:
        run(journal)
        journal.finish()
    assert [line.split(",")[0] for line in table.read_text().splitlines()] == ["frame", *"01234567"]
    assert out.read_text() == WHOLE
    assert sorted(path.name for path in out.parent.iterdir()) == sorted([out.name, table.name])


def altered(kind: str, data: bytes) -> bytes:
    lines = data.splitlines(keepends=True)
    match kind:
        case "byte-order mark":
            return b"\xef\xbb\xbf" + data
        case "line cut":
            return b"".join(lines[:3] + lines[4:])
        case "line doubled":
            return b"".join([*lines[:3], *lines[2:]])
        case "lines swapped":
            return b"".join([*lines[:3], lines[4], lines[3], *lines[5:]])
        case "half a line":
            return b"".join([*lines[:3], lines[3][:10], *lines[4:]])
        case "header":
            return data.replace(b"frame", b"Frame", 1)
        case "line ends":
            return data.replace(b"\n", b"\r\n")
    return data.replace(b"-4.5", b"-4.6")


KINDS = ["byte-order mark", "line cut", "line doubled", "lines swapped", "half a line", "header", "line ends", "digit"]


@pytest.mark.parametrize("kind", KINDS)
def test_altered_rows_are_made_anew(out: Path, table: Path, kind: str):
    with Journal(out, table, ORIGIN) as journal:
        run(journal)
    rows = out.with_name("out.xyz.part.csv")
    before = rows.read_bytes()
    rows.write_bytes(altered(kind, before))
    assert rows.read_bytes() != before
    finished(out, table)
    assert table.read_bytes() == before


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.integers(0, 2000), byte=st.integers(0, 255))
def test_a_byte_of_the_rows_that_was_altered_never_reaches_the_table(
    tmp_path_factory: pytest.TempPathFactory, at: int, byte: int
):
    folder = tmp_path_factory.mktemp("altered")
    out, table = folder / "out.xyz", folder / "out.csv"
    with Journal(out, table, ORIGIN) as journal:
        run(journal)
    rows = folder / "out.xyz.part.csv"
    before = rows.read_bytes()
    at %= len(before)
    rows.write_bytes(before[:at] + bytes([byte]) + before[at + 1 :])
    finished(out, table)
    assert table.read_bytes() == before


@pytest.mark.parametrize("kind", KINDS)
def test_altered_rows_of_a_finished_work_are_refused(
    out: Path, table: Path, monkeypatch: pytest.MonkeyPatch, kind: str
):
    with Journal(out, table, ORIGIN) as journal:
        run(journal)

        def die(*_: object) -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(module, "_move", die)
        with pytest.raises(KeyboardInterrupt):
            journal.finish()
        monkeypatch.undo()
    rows = out.with_name("out.xyz.part.csv")
    rows.write_bytes(altered(kind, rows.read_bytes()))
    with pytest.raises(ArtefactError, match=r"out\.xyz\.part\.csv was altered after row \d\. Give --overwrite"):
        Journal(out, table, ORIGIN)
    with Journal(out, table, ORIGIN, overwrite=True) as journal:
        run(journal)
        journal.finish()
    assert out.read_text() == WHOLE
