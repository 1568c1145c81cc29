"""Progress bars are shown in terminals and notebooks, and never written to files."""

import io
import re
from pathlib import Path

import pytest

import ase_uq
from ase_uq.display.progress import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("file", "show", "shown"), [(Terminal, True, True), (Terminal, False, False)])
def test_a_bar_is_shown_where_it_is_asked_for(file, show, shown):
    stream = file()
    assert list(progress_bar(range(3), show=show, desc="work", file=stream)) == [0, 1, 2]
    assert ("work: 100%" in stream.getvalue()) == shown


def test_a_file_gets_no_bar():
    stream = io.StringIO()
    with progress_bar(total=3, desc="work", file=stream) as bar:
        bar.set_postfix_str("well", refresh=False)
        bar.update(3)
    assert stream.getvalue() == ""


def test_there_is_no_other_way_to_a_bar():
    folder = Path(ase_uq.__file__).parent
    users = [path.name for path in folder.rglob("*.py") if re.search(r"\btqdm\(", path.read_text(encoding="utf-8"))]
    assert users == ["progress.py"]
