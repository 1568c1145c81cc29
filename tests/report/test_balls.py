import numpy as np
from ase import Atoms
from ase.build import bulk, fcc111, molecule
from hypothesis import given, settings
from hypothesis import strategies as st

from ase_uq.report.balls import balls, surroundings, whole


def distances(positions):
    return np.linalg.norm(positions[:, None] - positions, axis=-1)


def test_a_structure_is_turned_and_not_mirrored():
    for atoms in (molecule("CH3CH2OH"), bulk("Si", cubic=True)):
        atoms.rattle(0.1, seed=1)
        seen = balls(atoms).positions
        np.testing.assert_allclose(distances(seen), distances(atoms.positions), atol=1e-9)
        frame = atoms.positions[1:4] - atoms.positions[0]
        assert np.linalg.det(seen[1:4] - seen[0]) * np.linalg.det(frame) > 0


def test_a_molecule_shows_its_flattest_side():
    spread = balls(molecule("C6H6")).positions.std(0)
    assert spread[0] >= spread[1] > 1
    assert spread[2] < 1e-6


def test_bonds_join_atoms_that_touch():
    atoms = molecule("CH4")
    assert {tuple(pair) for pair in balls(atoms).bonds.tolist()} == {(0, 1), (0, 2), (0, 3), (0, 4)}
    assert len(balls(Atoms("He2", [[0, 0, 0], [0, 0, 5]])).bonds) == 0


def test_no_bond_crosses_the_cell():
    atoms = bulk("Si", cubic=True)
    seen = balls(atoms)
    pairs = {tuple(pair) for pair in np.argwhere(np.triu(distances(atoms.positions), 1) > 0).tolist()}
    assert {tuple(pair) for pair in seen.bonds.tolist()} == {p for p in pairs if atoms.get_distance(*p) < 2.5}
    assert len(seen.bonds) < 16  # those of the crystal


def built(kind: str) -> Atoms:
    if kind == "slab":
        atoms = fcc111("Cu", (3, 3, 4), vacuum=6.0, periodic=True)
        atoms.rattle(0.1, seed=1)
        return atoms
    if kind == "slanted":
        atoms = fcc111("Cu", (3, 3, 4), vacuum=6.0, orthogonal=False, periodic=True)
        atoms.cell[2] += 0.4 * atoms.cell[0]
        return atoms
    atoms = molecule("CH3CH2OH")
    atoms.set_cell([9.0, 10.0, 11.0])
    atoms.pbc = True
    return atoms


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(["slab", "slanted", "molecule"]),
    shift=st.tuples(*[st.floats(-1.5, 1.5)] * 3),
)
def test_what_stands_in_a_vacuum_stands_whole_wherever_its_atoms_were_wrapped(kind, shift):
    original = built(kind)
    atoms = original.copy()
    shift = np.array(shift) if kind == "molecule" else np.array([0, 0, shift[2]])
    atoms.positions += shift @ atoms.cell.array
    if kind == "molecule":
        atoms.wrap()
    else:
        scaled = atoms.get_scaled_positions(wrap=False)
        scaled[:, 2] %= 1.0
        atoms.set_scaled_positions(scaled)
    seen = whole(atoms)
    np.testing.assert_allclose(distances(seen.positions), distances(original.positions), atol=1e-8)
    scaled = seen.get_scaled_positions(wrap=False)[:, slice(None) if kind == "molecule" else 2]
    assert (scaled >= -1e-9).all()
    assert (scaled < 1 + 1e-9).all()
    moved = (seen.positions - atoms.positions) @ np.linalg.inv(atoms.cell.array)
    moved -= moved[0]  # as a whole, and by vectors of the cell
    np.testing.assert_allclose(moved, moved.round(), atol=1e-8)
    assert len(balls(atoms).bonds) == len(balls(original).bonds)


def test_a_structure_that_is_whole_or_fills_its_cell_stays_where_it_is():
    for atoms in (built("slab"), bulk("Si", cubic=True), molecule("H2O")):
        np.testing.assert_allclose(whole(atoms).positions, atoms.positions, atol=1e-9)
    flat = Atoms("H2", [[0, 0, 0], [0, 0, 0.7]], cell=[[1, 0, 0], [1, 0, 0], [0, 0, 9]], pbc=(True, False, False))
    assert whole(flat) is flat


def test_the_cell_has_the_edges_of_its_periodic_directions():
    atoms = bulk("Si", cubic=True)
    for pbc, n_edges in (((True, True, True), 12), ((True, True, False), 4), ((True, False, False), 1)):
        atoms.pbc = pbc
        lines = balls(atoms).cell
        assert len(lines) == n_edges
        np.testing.assert_allclose(np.linalg.norm(lines[:, 1] - lines[:, 0], axis=1), 5.43)
        assert len({tuple(np.sort(line.round(6), axis=0).ravel()) for line in lines}) == n_edges
    assert balls(molecule("H2O")).cell.shape == (0, 2, 3)


def test_one_atom_is_a_structure():
    assert balls(Atoms("He")).positions.tolist() == [[0, 0, 0]]


def test_of_a_large_structure_the_surroundings_of_an_atom_are_cut_out_whole():
    atoms = bulk("Si", cubic=True) * (4, 4, 4)
    part, indices = surroundings(atoms, 0, 5)  # at a corner of the cell: its neighbours are beyond
    assert 0 in indices
    assert len(part) == 5
    assert not part.pbc.any()
    bonds = np.sort(distances(part.positions)[list(indices).index(0)])[1:]
    np.testing.assert_allclose(bonds, 5.43 * np.sqrt(3) / 4)
    whole, everything = surroundings(atoms, 0, 1000)
    assert whole is atoms
    np.testing.assert_array_equal(everything, np.arange(512))
