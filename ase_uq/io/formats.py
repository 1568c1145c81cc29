"""Text formats of trajectories, cut into the text of one frame each."""

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TextIO

from ase.units import Bohr


@dataclass(frozen=True)
class Piece:
    """The text of one frame, or the reason why it cannot be used.

    Args:
        text: Text of the frame.
        n_atoms: Number of its atoms.
        problem: What is wrong with it, in words; empty if nothing is.
    """

    text: str
    n_atoms: int = 0
    problem: str = ""


def xyz_pieces(file: TextIO) -> Iterator[Piece]:
    """Frames of plain and extended XYZ: number of atoms, comment, one line per atom, and up to three cell vectors."""
    line = file.readline()
    while line:
        if not line.strip():
            line = file.readline()
            continue
        if not _is_count(line):
            begin = line.strip()[:60]
            _, line = _skipped(file, line)
            yield Piece("", problem=f"a number of atoms was expected, found {begin!r}")
            continue
        count, lines = int(line), [line, file.readline()]
        line = file.readline()
        # The line of an atom has at least four columns, so a number alone begins the next frame.
        while len(lines) < count + 2 and line and not _is_count(line):
            lines.append(line)
            line = file.readline()
        if len(lines) < count + 2:
            yield Piece("", problem=f"it is truncated: {len(lines) - 2} of its {count} atoms are there")
            continue
        header = ipi_header(lines[1])
        while line.lstrip().startswith("VEC"):
            lines.append(line)
            line = file.readline()
        if count and line.strip() and len(line.split()) == len(lines[-1].split()):  # one atom too many
            excess, line = _skipped(file, line)
            yield Piece("", problem=f"it has {count + excess} lines of atoms, but its first line says {count}")
        elif header is not None and header.problem:
            yield Piece("", problem=header.problem)
        else:
            yield Piece("".join(lines), count)


@dataclass(frozen=True)
class IPIHeader:
    """What the comment of a frame that i-PI wrote says.

    Args:
        scale: Å, in the unit of the positions.
        cell: Lengths, Å, and angles, degrees, of the cell; None without a cell.
        problem: Why the frame cannot be used, in words; empty if it can.
    """

    scale: float = 1.0
    cell: tuple[float, ...] | None = None
    problem: str = ""


# Lengths of i-PI, Å; it takes what has no unit for atomic units.
_LENGTHS = {"atomic_unit": Bohr, "": Bohr, "angstrom": 1.0, "ase": 1.0, "nanometer": 10.0, "picometer": 0.01}
_IPI_CELL = re.compile(r"\bCELL[(\[{](\w+)[)\]}]:?((?:\s+[-+\d.eE]+)*)")
_IPI_UNIT = re.compile(r"\b(\w+)\{(\w*)\}")
_IPI_POSITIONS = ("positions", "x_centroid")


def ipi_header(comment: str) -> IPIHeader | None:
    """The comment of a frame of i-PI, `# CELL(abcABC): ... positions{unit} cell{unit}`; None if it is not."""
    cell = _IPI_CELL.search(comment)
    if cell is None and not comment.lstrip().startswith("#"):
        return None
    units = {name: unit for name, unit in _IPI_UNIT.findall(comment) if name not in ("CELL", "Lattice")}
    columns = [name for name in units if name != "cell"]
    if cell is None and not set(columns) & set(_IPI_POSITIONS):
        return None
    if any(name not in _IPI_POSITIONS for name in columns):
        return IPIHeader(problem=f"i-PI wrote {' and '.join(columns)} into it, and positions were expected")
    if odd := [unit for unit in units.values() if unit not in _LENGTHS]:
        return IPIHeader(problem=f"the unit {odd[0]!r} of i-PI is none of {', '.join(filter(None, _LENGTHS))}")
    scale = _LENGTHS[units[columns[0]] if columns else ""]
    if cell is None:
        return IPIHeader(scale)
    try:
        a, b, c, *angles = map(float, cell[2].split())
    except ValueError:
        a, b, c, angles = 0.0, 0.0, 0.0, []
    if cell[1] != "abcABC" or len(angles) < 3 or min(a, b, c) <= 0 or not all(0 < angle < 180 for angle in angles[:3]):
        return IPIHeader(
            problem=f"the cell {cell[0].strip()[:60]!r} of i-PI cannot be read: CELL(abcABC) with three lengths and "
            "three angles was expected"
        )
    length = _LENGTHS[units.get("cell", "")]
    return IPIHeader(scale, (a * length, b * length, c * length, *angles[:3]))


def _skipped(file: TextIO, line: str) -> tuple[int, str]:
    """Number of non-blank lines from this one up to the next number of atoms, and the line of that number."""
    count = 0
    while line and not _is_count(line):
        count += bool(line.strip())
        line = file.readline()
    return count, line


def _is_count(line: str) -> bool:
    return len(line) < 20 and line.strip().isdecimal()


_OTHER_UNITS = (
    "its units are '{}', and 'metal' was expected: convert it, or read it with ase.io.read(..., units=...) and give "
    "the list of frames"
)


def lammps_pieces(file: TextIO) -> Iterator[Piece]:
    """Frames of LAMMPS text dumps: sections under `ITEM:` lines, the first one `UNITS`, `TIME` or `TIMESTEP`."""
    lines: list[str] = []
    has_step, problem = False, ""
    for line in file:
        # A dump states its units once, if at all, and ASE's reader takes all for metal.
        if lines and lines[-1].startswith("ITEM: UNITS"):
            problem = "" if line.strip() == "metal" else _OTHER_UNITS.format(line.strip())
        if line.startswith(("ITEM: UNITS", "ITEM: TIME")) and has_step:  # also matches TIMESTEP
            yield Piece("", problem=problem) if problem else _dumped(lines)
            lines, has_step = [], False
        has_step = has_step or line.startswith("ITEM: TIMESTEP")
        lines.append(line)
    if any(line.strip() for line in lines):
        yield Piece("", problem=problem) if problem else _dumped(lines)


def _dumped(lines: Sequence[str]) -> Piece:
    expected = n_atoms = None
    for index, line in enumerate(lines):
        if line.startswith("ITEM: NUMBER OF ATOMS") and index + 1 < len(lines):
            expected = lines[index + 1].strip()
        elif line.startswith("ITEM: ATOMS"):
            if "element" not in line.split():
                return Piece(
                    "",
                    problem="it has no column `element`, and ASE would take the types for atomic numbers: dump with "
                    "`element` and `dump_modify element`, or read it with ase.io.read(..., specorder=...) and give the "
                    "list of frames",
                )
            n_atoms = len(lines) - index - 1
            break
    # ASE would read a truncated frame as one with fewer atoms.
    if expected is None or n_atoms is None:
        return Piece("", problem="it is truncated: its number of atoms or its atoms are missing")
    if expected != str(n_atoms):
        return Piece("", problem=f"it is truncated: {n_atoms} of its {expected} atoms are there")
    return Piece("".join(lines), n_atoms)


def xdatcar_pieces(file: TextIO) -> Iterator[Piece]:
    """Frames of VASP's XDATCAR: a header of seven lines, repeated where the cell changes, and one block per frame."""
    header: list[str] = []
    between: list[str] = []  # lines since the last block: blank lines, a header, or surplus lines
    line = file.readline()
    while line:
        if "configuration=" not in line:
            between = [*between[-6:], line]
            line = file.readline()
            continue
        # The title may be blank; the line below it is the scale, a single number.
        if len(between) == 7 and len(between[1].split()) == 1:
            header = between
        between, lines = [], [line]
        line = file.readline()
        while len(line.split()) == 3 and "configuration=" not in line and len(lines) <= _n_atoms(header):
            lines.append(line)
            line = file.readline()
        n_atoms, expected = len(lines) - 1, _n_atoms(header)
        problem = "" if n_atoms == expected else f"it is truncated: {n_atoms} of its {expected} atoms are there"
        yield Piece("".join([*header, *lines]), n_atoms, problem)


def _n_atoms(header: Sequence[str]) -> int:
    return sum(int(count) for count in header[6].split()) if len(header) == 7 else 0


CUTTERS: dict[str, Callable[[TextIO], Iterator[Piece]]] = {
    "extxyz": xyz_pieces,
    "xyz": xyz_pieces,
    "lammps-dump-text": lammps_pieces,
    "vasp-xdatcar": xdatcar_pieces,
}
