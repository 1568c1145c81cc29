"""Laws of geometry: neighbours, and the effects of moving, reordering, rotating and inverting a structure."""

import numpy as np
import pytest
from ase import Atoms
from ase.neighborlist import neighbor_list

from ase_uq.backends.base import Backend
from ase_uq.forward_pass import ForwardPass
from ase_uq.testing.backends.comparing import array, assert_close, assert_same, forward, of_frame
from ase_uq.testing.backends.under_test import BackendUnderTest

# Results of one structure with one row per atom; the others have one row per structure.
PER_ATOM = ("numbers", "forces", "energies", "features", "phi", "force_phi", "vectors", "confidence")


class GeometryLaws(BackendUnderTest):
    """Laws of structures and their copies in another place, order or orientation."""

    def test_edges_are_neighbours(self, evaluated: ForwardPass, frames: list[Atoms]):
        e = evaluated
        source, target, distance = (array(x) for x in (e.edges.source, e.edges.target, e.edges.distance))
        vector, positions = array(e.edges.vector), array(e.positions)
        assert distance.max() < e.edges.cutoff + 1e-3
        frame = array(e.frame_of_atom)
        assert ((source >= 0) & (source < len(frame)) & (target >= 0) & (target < len(frame))).all()
        assert (frame[source] == frame[target]).all()
        edges = sorted(zip(target, source, np.round(distance, 2), strict=True))
        if self.symmetric_edges:
            assert edges == sorted(zip(source, target, np.round(distance, 2), strict=True))
        start = 0
        for index, atoms in enumerate(frames):
            mine = frame[source] == index
            if mine.any():
                # The difference between the end of a vector and its neighbour is a lattice vector.
                gap = positions[target[mine]] + vector[mine] - positions[source[mine]]
                lattice = atoms.cell.array * atoms.pbc[:, None]
                steps = np.rint(gap @ np.linalg.pinv(lattice)) if atoms.pbc.any() else np.zeros_like(gap)
                np.testing.assert_allclose(gap - steps @ lattice, 0, atol=1e-3, err_msg=str(atoms))
                i, j, d = neighbor_list("ijD", atoms, float(distance[mine].max()) + 0.01)
                for a, b, r in zip(target[mine] - start, source[mine] - start, vector[mine], strict=True):
                    assert np.abs(d[(i == a) & (j == b)] - r).max(1).min() < 1e-3, (atoms, a, b, r)
            start += len(atoms)

    def test_moving_a_structure_changes_nothing(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        moved = [atoms.copy() for atoms in frames]
        for atoms in moved:
            atoms.positions += (1.3, -0.7, 0.4)
        after = forward(backend, moved)
        for index, atoms in enumerate(frames):
            assert_same(of_frame(after, index, atoms), of_frame(evaluated, index, atoms), backend)

    def test_order_of_atoms_does_not_matter(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        orders = [np.random.default_rng(1).permutation(len(atoms)) for atoms in frames]
        after = forward(backend, [atoms[order] for atoms, order in zip(frames, orders, strict=True)])
        for index, order in enumerate(orders):
            expected = of_frame(evaluated, index, frames[index])
            for key in PER_ATOM:
                expected[key] = None if expected[key] is None else expected[key][order]
            assert_same(of_frame(after, index, frames[index]), expected, backend)

    def test_turning_a_structure_turns_its_forces(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        if not self.is_equivariant:
            pytest.skip("the potential is not equivariant")
        rotation = np.linalg.qr(np.random.default_rng(2).normal(size=(3, 3)))[0]
        rotation *= np.sign(np.linalg.det(rotation))
        turned = [atoms.copy() for atoms in frames]
        for atoms in turned:
            atoms.set_cell(atoms.cell.array @ rotation.T)
            atoms.positions = atoms.positions @ rotation.T
        after = forward(backend, turned)
        for index, atoms in enumerate(frames):
            expected = of_frame(evaluated, index, atoms) | {"stress": None}
            if expected["forces"] is not None:
                expected["forces"] = expected["forces"] @ rotation.T
            if expected["vectors"] is not None:
                expected["vectors"] = rotation @ expected["vectors"]
            assert_same(of_frame(after, index, atoms) | {"stress": None}, expected, backend)

    def test_vectors_are_polar(self, backend: Backend, evaluated: ForwardPass, frames: list[Atoms]):
        """Inverting a structure reverses its vectors, even if the potential is not equivariant."""
        vectors = evaluated.vectors
        if vectors is None:
            pytest.skip("the features have no vectors")
        inverted = [atoms.copy() for atoms in frames]
        for atoms in inverted:
            atoms.set_cell(-atoms.cell.array)
            atoms.positions = -atoms.positions
        assert float(vectors.abs().max()) > 0
        reversed_vectors = forward(backend, inverted).vectors
        assert reversed_vectors is not None
        assert_close(reversed_vectors, -vectors, backend, "vectors of inverted structures")
