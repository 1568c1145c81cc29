"""All bytes are written, however few an unbuffered file takes at once."""

from io import FileIO

import pytest

from ase_uq.io.files import check_appendable, write_all


def test_a_file_that_takes_little_at_once_gets_all_of_it(tmp_path):
    class Slow(FileIO):
        def write(self, data):
            return super().write(data[:3])

    with Slow(tmp_path / "a", "wb") as file:
        write_all(file, b"0123456789")
    assert (tmp_path / "a").read_bytes() == b"0123456789"


def test_a_file_that_can_be_added_to_is_left_as_it_is(tmp_path):
    check_appendable(tmp_path / "new")
    assert not list(tmp_path.iterdir())
    (tmp_path / "old").write_text("a line\n")
    check_appendable(tmp_path / "old")
    assert (tmp_path / "old").read_text() == "a line\n"


def test_a_file_that_cannot_be_added_to_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no/a cannot be written \(No such file or directory\)\. Give"):
        check_appendable(tmp_path / "no" / "a")
    (tmp_path / "torn").write_text("half a li")
    with pytest.raises(ValueError, match="torn ends in the middle of a line"):
        check_appendable(tmp_path / "torn")
