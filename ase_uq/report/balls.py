"""Balls and sticks of a structure, and the side to view them from, for the picture and the view that can be turned."""

from dataclasses import dataclass

import numpy as np
from ase import Atoms
from ase.data import covalent_radii
from ase.geometry import get_distances
from ase.neighborlist import natural_cutoffs, neighbor_list

_TOUCHING = 1.15  # atoms are bonded within this multiple of the sum of their covalent radii


@dataclass(frozen=True)
class Balls:
    """A structure turned to the viewer: upright if it is periodic, otherwise with its flattest side in front.

    Args:
        positions: (n_atoms, 3) Å; x to the right, y up, z towards the viewer.
        radii: (n_atoms,) Å, half the covalent radii.
        bonds: (n_bonds, 2) indices of atoms that touch, not through a periodic boundary.
        cell: (n_lines, 2, 3) Å, start and end of each edge of the cell; only edges along periodic directions.
    """

    positions: np.ndarray
    radii: np.ndarray
    bonds: np.ndarray
    cell: np.ndarray


def balls(atoms: Atoms) -> Balls:
    """Balls and sticks of a structure whose positions and cell are finite; see `whole`."""
    atoms = whole(atoms)
    middle = atoms.positions.mean(0) if len(atoms) else np.zeros(3)
    axes = _tilted() if atoms.pbc.any() else _flattest(atoms.positions - middle)
    i, j, shift = neighbor_list("ijS", atoms, [_TOUCHING * radius for radius in natural_cutoffs(atoms)])
    inside = (i < j) & ~shift.any(1)
    return Balls(
        positions=(atoms.positions - middle) @ axes.T,
        radii=0.5 * covalent_radii[atoms.numbers],
        bonds=np.stack([i[inside], j[inside]], 1),
        cell=(_edges(atoms) - middle) @ axes.T,
    )


def whole(atoms: Atoms) -> Atoms:
    """The structure, moved so that the boundary of its cell runs through the vacuum if there is some.

    A slab or molecule whose atoms were wrapped one by one stands in two pieces at opposite sides of its cell. Along
    directions without a gap that is wider than any bond, atoms stay where they are.
    """
    along = np.flatnonzero(atoms.pbc & atoms.cell.array.any(1))
    cell = atoms.cell.complete()
    if not len(along) or not len(atoms) or abs(cell.volume) < 1e-9:
        return atoms
    heights = 1 / np.linalg.norm(cell.reciprocal().array, axis=1)
    longest_bond = 2 * _TOUCHING * max(natural_cutoffs(atoms))
    scaled = cell.scaled_positions(atoms.positions)
    for axis in along:
        fractions = scaled[:, axis] % 1.0
        ordered = np.sort(fractions)
        gaps = np.diff(ordered, append=ordered[0] + 1)
        widest = gaps.argmax()
        if gaps[widest] * heights[axis] <= longest_bond:
            continue
        middle = ordered[widest] + gaps[widest] / 2
        above = (fractions - middle) % 1.0
        # As it stands if that is inside of the cell already, else with the vacuum shared between both ends.
        scaled[:, axis] = fractions if widest == len(gaps) - 1 else above
    moved = atoms.copy()
    moved.positions = cell.cartesian_positions(scaled)
    return moved


def finite_part(atoms: Atoms) -> tuple[Atoms, np.ndarray]:
    """The part of a structure that can be drawn: atoms with finite positions, and the cell if it is finite.

    Returns:
        The part, and the indices of its atoms in the structure.
    """
    finite = np.isfinite(atoms.positions).all(1)
    if finite.all() and np.isfinite(atoms.cell.array).all():
        return atoms, np.arange(len(atoms))
    part = atoms[finite]
    if not np.isfinite(atoms.cell.array).all():
        part = Atoms(part.numbers, part.positions)
    return part, np.flatnonzero(finite)


def surroundings(atoms: Atoms, centre: int, most: int) -> tuple[Atoms, np.ndarray]:
    """The structure itself or, if it is too large to look at, the atoms nearest to one of them.

    Args:
        atoms: Structure.
        centre: Index of the atom in the middle.
        most: Largest number of atoms.

    Returns:
        The structure, and the indices of its atoms. A structure that was too large is cut out across periodic
        boundaries and has no cell.
    """
    if len(atoms) <= most:
        return atoms, np.arange(len(atoms))
    vectors, distances = get_distances(
        atoms.positions[centre : centre + 1], atoms.positions, cell=atoms.cell, pbc=atoms.pbc
    )
    nearest = np.sort(np.argsort(distances[0], kind="stable")[:most])
    return Atoms(atoms.numbers[nearest], atoms.positions[centre] + vectors[0][nearest]), nearest


def _flattest(positions: np.ndarray) -> np.ndarray:
    """(3, 3) principal axes as rows: the longest to the right, the shortest towards the viewer."""
    axes = np.linalg.svd(positions, full_matrices=True)[2]
    axes *= np.where(np.take_along_axis(axes, np.abs(axes).argmax(1)[:, None], 1) < 0, -1, 1)
    axes[2] *= np.sign(np.linalg.det(axes))  # right-handed, or it would be a mirror image
    return axes


def _tilted() -> np.ndarray:
    """(3, 3) axes as rows: z upwards, seen a little from the right and from above, so that the edges of a cell show."""
    right, above = np.radians(20), np.radians(12)
    x = np.array([np.cos(right), np.sin(right), 0])
    towards = np.array([np.sin(right) * np.cos(above), -np.cos(right) * np.cos(above), np.sin(above)])
    return np.array([x, np.cross(towards, x), towards])


def _edges(atoms: Atoms) -> np.ndarray:
    """(n_lines, 2, 3) start and end of the edges of the cell along periodic directions, Å."""
    vectors = [vector for vector, periodic in zip(atoms.cell.array, atoms.pbc, strict=True) if periodic]
    lines = []
    for number, along in enumerate(vectors):
        others = vectors[:number] + vectors[number + 1 :]
        starts = [np.zeros(3)]
        for other in others:
            starts += [start + other for start in starts]
        lines += [(start, start + along) for start in starts]
    return np.array(lines).reshape(-1, 2, 3)
