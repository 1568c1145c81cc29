"""A file of records that was cut or altered anywhere has all frames before that place, and no other."""

from pathlib import Path

import numpy as np
import pytest
from ase import Atoms

from ase_uq.io.contents import contents_of
from ase_uq.io.records import record_of, records_in


def record(number: int) -> bytes:
    atoms = Atoms(f"H{number + 1}", info={"x": number / 3, "text": "ü" * number})
    return record_of(number, contents_of(atoms, atoms.info, atoms.arrays)[0])


RECORDS = [record(number) for number in range(3)]
WHOLE = b"".join(RECORDS)
ENDS = np.cumsum([len(one) for one in RECORDS])


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "records"


def test_records_come_back(path: Path):
    path.write_bytes(WHOLE)
    found = list(records_in(path))
    assert [one.number for one in found] == [0, 1, 2]
    assert [one.data for one in found] == RECORDS
    assert [one.layout.n_atoms for one in found] == [1, 2, 3]
    for number, one in enumerate(found):
        numbers = np.frombuffer(one.numbers, one.layout.numbers)
        assert numbers["observables/x"] == number / 3
        np.testing.assert_array_equal(numbers["particles/species"][0], np.ones(number + 1))
        (text,) = one.texts
        assert one.layout.texts == ("observables/text",)
        assert text == '"' + "\\u00fc" * number + '"'


def test_cut_anywhere(path: Path):
    for cut in range(len(WHOLE)):
        path.write_bytes(WHOLE[:cut])
        assert [one.number for one in records_in(path)] == list(range(np.count_nonzero(cut >= ENDS)))
        path.write_bytes(WHOLE[:cut] + bytes(40))  # what a power cut leaves
        assert [one.data for one in records_in(path)] == RECORDS[: np.count_nonzero(cut >= ENDS)]


@pytest.mark.parametrize("bit", [0, 3, 7])
def test_altered_anywhere(path: Path, bit: int):
    for place in range(len(WHOLE)):
        altered = bytearray(WHOLE)
        altered[place] ^= 1 << bit
        path.write_bytes(altered)
        assert [one.data for one in records_in(path)] == RECORDS[: np.count_nonzero(place >= ENDS)]


def test_records_alike_share_their_layout(path: Path):
    path.write_bytes(RECORDS[1] * 2)
    first, second = records_in(path)
    assert first.layout is second.layout
