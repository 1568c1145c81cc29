"""The data kept of a scored frame besides its text: its number in the source, and a row of the CSV file."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from pathlib import Path

NUMBER_KEY = "source_frame"  # in the info of every written frame: its number in the source


@dataclass(frozen=True)
class FrameScore:
    """The numbers of one frame: a row of the CSV file.

    Args:
        frame: Number of the frame in the source, from 0.
        n_atoms: Number of atoms; 0 if the frame could not be read.
        energy: Energy, eV.
        energy_uncertainty: Its standard deviation, eV; NaN if the uncertainty model gives none.
        force_uncertainty_max: Largest ε_i, eV/Å.
        force_uncertainty_mean: Mean ε_i, eV/Å.
        worst_atom: Index of the atom with the largest ε_i.
        worst_element: Chemical symbol of that atom.
        gamma_max: Largest distance of an atom from the fitted atoms; above 1 it is beyond the calibration data.
        problem: Why the frame was left out; empty if it was scored.
    """

    frame: int
    n_atoms: int = 0
    energy: float = float("nan")
    energy_uncertainty: float = float("nan")
    force_uncertainty_max: float = float("nan")
    force_uncertainty_mean: float = float("nan")
    worst_atom: int = -1
    worst_element: str = ""
    gamma_max: float = float("nan")
    problem: str = ""

    @classmethod
    def from_row(cls, row: Sequence[str]) -> "FrameScore":
        """The numbers of a frame from its row of the CSV file."""
        return cls(*(field.type(cell) for field, cell in zip(fields(cls), row, strict=True)))  # pyright: ignore


HEADER = (",".join(field.name for field in fields(FrameScore)) + "\n").encode()


class _Lines(list[str]):
    """A list of lines that serves `csv.writer` as a file."""

    write = list.append


def lines_of(rows: Sequence[FrameScore]) -> list[str]:
    """The lines of the table; a row is one line, whatever a parser's message was."""
    lines = _Lines()
    rows = [replace(row, problem=" ".join(row.problem.split())) if row.problem else row for row in rows]
    csv.writer(lines, lineterminator="\n").writerows(astuple(row) for row in rows)
    return lines


def rows_in(path: Path) -> Iterator[FrameScore]:
    """The rows of a table, one by one."""
    with open(path, newline="", encoding="utf-8") as file:
        reader = csv.reader(file)
        next(reader, None)
        for row in reader:
            yield FrameScore.from_row(row)
