"""The bounded sample: the same atoms whatever the batches, their order and the ranks; and what distances share."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Communicator, Serial
from ase_uq.methods._distance import MeanOverAtoms, elements_of_all, rows_of, units_of
from ase_uq.numerics.sample import RowSample, _priority, labels_of_atoms
from ase_uq.stream.labelled import LabelledStream
from ase_uq.testing.methods import ELEMENTS, labelled_frames, on_ranks


def atoms_of(count: int) -> tuple[Tensor, Tensor]:
    """Labels of atoms in frames of seven, and rows that say which atom they are."""
    numbers = torch.arange(count)
    return torch.stack([numbers // 7, numbers % 7], 1), numbers[:, None].double() + torch.tensor([[0.0, 0.5]])


def sampled(labels: Tensor, rows: Tensor, limit: int, order: np.ndarray, size: int) -> Tensor:
    sample = RowSample(limit)
    for chosen in torch.from_numpy(order).split(size):
        sample.add(labels[chosen], rows[chosen])
    found = sample.finish(Serial())
    assert found is not None
    return found


class TestRowSample:
    def test_few_atoms_are_all_kept_in_the_order_of_the_frames(self):
        labels, rows = atoms_of(30)
        order = np.random.default_rng(0).permutation(30)
        assert torch.equal(sampled(labels, rows, 30, order, 4), rows)

    @given(seed=st.integers(0, 100), size=st.integers(1, 70), limit=st.integers(1, 60))
    @settings(max_examples=40, deadline=None)
    def test_batches_and_their_order_do_not_matter(self, seed: int, size: int, limit: int):
        labels, rows = atoms_of(60)
        order = np.random.default_rng(seed).permutation(60)
        found = sampled(labels, rows, limit, order, size)
        assert len(found) == limit
        assert torch.equal(found, sampled(labels, rows, limit, np.arange(60), 60))

    @pytest.mark.parametrize("size", [2, 5])
    def test_ranks_do_not_matter(self, size: int):
        labels, rows = atoms_of(60)
        expected = sampled(labels, rows, 13, np.arange(60), 60)

        def run(ranks: Communicator) -> Tensor | None:
            sample = RowSample(13)
            if ranks.rank:  # the first has no atom
                own = slice(ranks.rank - 1, None, ranks.size - 1)
                sample.add(labels[own], rows[own])
            return sample.finish(ranks)

        for found in on_ranks(size, run):
            assert found is not None
            assert torch.equal(found, expected)

    def test_no_atoms_are_none(self):
        assert RowSample(3).finish(Serial()) is None
        assert on_ranks(2, lambda ranks: RowSample(3).finish(ranks)) == [None, None]

    def test_memory_stays_bounded(self):
        labels, rows = atoms_of(10_000)
        sample = RowSample(10)
        for chosen in torch.arange(10_000).split(8):
            sample.add(labels[chosen], rows[chosen])
            assert sum(len(piece) for piece in sample._pieces) < 20

    def test_rows_are_kept_in_double_precision(self):
        labels, rows = atoms_of(5)
        assert sampled(labels, rows.float(), 5, np.arange(5), 5).dtype == torch.float64

    def test_every_atom_is_as_likely_as_any_other(self):
        """Priorities are uniform, and those of neighbours in a frame or along a trajectory have nothing in common."""
        frames, places = torch.meshgrid(torch.arange(300), torch.arange(200), indexing="ij")
        labels = torch.stack([frames.flatten(), places.flatten()], 1)
        shares = _priority(labels).reshape(300, 200)
        assert float(shares.min()) >= 0
        assert float(shares.max()) < 1
        counts = torch.histc(shares, 20, 0, 1)
        expected = 60_000 / 20
        assert float(((counts - expected) ** 2 / expected).sum()) < 43.8  # χ² of 19 degrees, 0.1 %
        flat = shares.flatten()
        assert len(flat.unique()) == len(flat)
        for along in (shares, shares.T):
            pairs = torch.stack([along[:-1].flatten(), along[1:].flatten()])
            assert abs(float(torch.corrcoef(pairs)[0, 1])) < 0.02

    def test_labels_are_those_of_the_data_set(self):
        frames = labelled_frames(7, seed=3)
        stream = LabelledStream(load_backend(ToyCalculator(ELEMENTS)), frames, Serial(), batch_atoms=12, forces=False)
        found = torch.cat([labels_of_atoms(forward_pass, targets) for forward_pass, targets in stream])
        expected = [(k, place) for k, atoms in enumerate(frames) for place in range(len(atoms))]
        assert found.tolist() == [list(pair) for pair in expected]


class TestElements:
    def test_ranks_agree_on_the_elements_that_any_has(self):
        own = [{8, 1}, set(), {6}]
        assert on_ranks(3, lambda ranks: elements_of_all(own[ranks.rank], ranks)) == [[1, 6, 8]] * 3

    def test_unknown_elements_have_the_last_row(self):
        elements = torch.tensor([6, 8])
        assert rows_of(torch.tensor([8, 1, 6, 7, 79, 8]), elements).tolist() == [1, 2, 0, 2, 2, 1]


class TestMeanOverAtoms:
    def test_is_the_mean_over_batches_and_ranks(self):
        values = torch.arange(10, dtype=torch.float64)

        def run(ranks: Communicator) -> float:
            mean = MeanOverAtoms()
            for piece in values[ranks.rank :: 3].split(2) if ranks.rank < 3 else ():
                mean.add(piece)
            return mean.finish(ranks)

        assert on_ranks(4, run) == [4.5] * 4


def test_features_that_never_vary_have_a_small_unit():
    assert units_of(torch.tensor([4.0, 0.0, -1e-20], dtype=torch.float64)).tolist() == [2.0, 2e-6, 2e-6]
