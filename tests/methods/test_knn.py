"""The distance to the nearest training atoms against scikit-learn."""

import numpy as np
import pytest
import torch
from ase import Atoms
from ase.build import molecule
from sklearn.neighbors import NearestNeighbors

from ase_uq.backends import load_backend
from ase_uq.backends.base import Backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Serial
from ase_uq.forward_pass import ForwardPass
from ase_uq.methods import knn
from ase_uq.methods.knn import KNN, mean_distance
from ase_uq.testing.methods import ELEMENTS, fit_head, forward_pass_of, labelled_frames

from .builders import batches_of, evaluation_of


@pytest.fixture(scope="module")
def backend() -> Backend:
    return load_backend(ToyCalculator((*ELEMENTS, "N")))


@pytest.fixture(scope="module")
def frames() -> list[Atoms]:
    return labelled_frames(30, seed=11)


def sklearn_score(train: ForwardPass, new: ForwardPass, neighbours: int) -> np.ndarray:
    """(n_atoms,) squared mean distance, before the mean over the training atoms is divided out."""
    x, z = train.features.numpy(), train.numbers.numpy()
    within = np.concatenate([x[z == e] - x[z == e].mean(0) for e in np.unique(z)])
    spread = np.sqrt((within**2).mean(0))
    units = np.maximum(spread, 1e-6 * spread.max())
    found = np.zeros(len(new.numbers))
    for e in np.unique(new.numbers):
        own = z == e if e in z else np.full(len(z), True)
        oracle = NearestNeighbors(n_neighbors=min(neighbours, own.sum()), algorithm="brute").fit(x[own] / units)
        asked = new.numbers.numpy() == e
        found[asked] = oracle.kneighbors(new.features.numpy()[asked] / units)[0].mean(1) ** 2
    return found


class TestDistance:
    @pytest.mark.parametrize("neighbours", [2, 10, 10_000])
    def test_is_that_of_scikit_learn(self, backend: Backend, frames: list[Atoms], neighbours: int):
        head = fit_head(KNN(neighbours=neighbours, rows=10_000), backend, frames, batch_atoms=20)
        train = forward_pass_of(backend, frames)
        # Ammonia: nitrogen was not fitted and is measured from all atoms.
        new = forward_pass_of(backend, [*labelled_frames(5, seed=12), molecule("NH3")])
        scale = head.settings["scale"]
        expected = sklearn_score(train, new, neighbours)
        np.testing.assert_allclose(head(new).distance * scale, expected, rtol=1e-7)
        assert sklearn_score(train, train, neighbours).mean() == pytest.approx(scale, rel=1e-7)

    def test_an_atom_at_a_training_atom_has_no_distance(self, backend: Backend, frames: list[Atoms]):
        """Not the root of what rounding leaves of the difference of two large squares."""
        x = torch.randn(50, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64) + 1e4
        assert float(mean_distance(x, x, 1).max()) == 0.0

    def test_chunks_do_not_matter(self, monkeypatch: pytest.MonkeyPatch):
        x = torch.randn(90, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        whole = mean_distance(x[:50], x[50:], 3)
        monkeypatch.setattr(knn, "_CHUNK", 7 * 40)
        torch.testing.assert_close(mean_distance(x[:50], x[50:], 3), whole, rtol=1e-12, atol=0)

    def test_units_of_features_do_not_matter(self):
        x = torch.randn(200, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        scales = torch.tensor([1e-2, 1.0, 1e2], dtype=torch.float64)
        one, other = (KNN().fit(batches_of(rows), Serial()).distance(evaluation_of(rows)) for rows in (x, x * scales))
        torch.testing.assert_close(other, one, rtol=1e-9, atol=0)


class TestSample:
    def test_bounds_the_atoms_of_every_element(self, backend: Backend, frames: list[Atoms]):
        numbers = np.concatenate([atoms.numbers for atoms in frames])
        counts = [int((numbers == z).sum()) for z in (1, 6, 8)]
        head = fit_head(KNN(rows=40), backend, frames)
        assert head.settings["atoms"] == [min(count, 40) for count in counts]
        assert len(head.state_dict()["rows"]) == sum(min(count, 40) for count in counts)

    def test_a_part_of_the_atoms_gives_nearly_the_distance_of_all(self):
        x = torch.randn(4000, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        at = evaluation_of(3 * torch.randn(300, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
        all_of_them, part = (KNN(rows=rows).fit(batches_of(x), Serial()).distance(at) for rows in (4000, 1000))
        assert float(torch.corrcoef(torch.stack([all_of_them, part]).log())[0, 1]) > 0.98


@pytest.mark.parametrize("neighbours", [-1, 0, 1])
def test_too_few_neighbours_are_refused(neighbours: int):
    with pytest.raises(ValueError, match=f"neighbours is 2 or more, not {neighbours}: .* itself"):
        KNN(neighbours=neighbours)


def test_fewer_rows_than_neighbours_are_refused():
    with pytest.raises(ValueError, match="rows is at least the number of neighbours, 10, not 9"):
        KNN(rows=9)
