"""Inputs that are made for a whole batch at once are those that mace makes, bit for bit."""

import dataclasses

import numpy as np
import pytest
import torch
from ase import Atoms

from ase_uq.backends import load_backend
from ase_uq.backends.mace.backend import MACECalculator
from ase_uq.backends.mace.graphs import Graphs
from ase_uq.testing.backends import standard_frames

from .builders import charged_frames, make_mace, make_mh1_like, make_omol_like


def frames_of_all_kinds() -> list[Atoms]:
    slab, wire, without_cell, labelled = (standard_frames()[1].copy() for _ in range(4))
    slab.pbc, wire.pbc = (True, True, False), (False, False, True)
    slab.cell[2] = 0
    without_cell.cell[:] = 0
    without_cell.pbc = False
    labelled.info["REF_energy"], labelled.arrays["REF_forces"] = -3.0, np.ones((len(labelled), 3))
    return [*standard_frames(), slab, wire, without_cell, labelled, Atoms("H")]


def assert_equal(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert (found[key].dtype, found[key].shape) == (value.dtype, value.shape), key
        assert torch.equal(found[key], value), key


def graphs_of(calculator: MACECalculator) -> Graphs:
    collator = load_backend(calculator).collator
    assert collator is not None
    assert isinstance(collator.build, Graphs)
    return collator.build


def never(*_: object) -> None:
    raise AssertionError("left to mace")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("head", ["", "omol"])
def test_a_structure_is_as_the_calculator_makes_it(head: str, dtype: str, monkeypatch: pytest.MonkeyPatch):
    model = make_mh1_like() if head else make_mace()
    calculator = MACECalculator(models=model, device="cpu", default_dtype=dtype, **({"head": head} if head else {}))
    graphs = graphs_of(calculator)
    graphs(standard_frames())
    monkeypatch.setattr(Graphs, "_left_to_mace", never)  # what is the same for all structures has been made
    for atoms in frames_of_all_kinds():
        assert_equal(graphs([atoms]), calculator._atoms_to_batch(atoms).to_dict())


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_a_batch_is_as_mace_joins_it(dtype: str):
    graphs = graphs_of(MACECalculator(models=make_mace(), device="cpu", default_dtype=dtype))
    frames = frames_of_all_kinds()
    before = [atoms.copy() for atoms in frames]
    assert_equal(graphs(frames), graphs._left_to_mace(frames))
    assert frames == before, "mace stretches cells that are not periodic: not those of the user"


def test_elements_may_be_in_any_order():
    graphs = graphs_of(MACECalculator(models=make_mace(), device="cpu", default_dtype="float64"))
    turned = dataclasses.replace(graphs, numbers=graphs.numbers[::-1])
    assert_equal(turned(standard_frames()), turned._left_to_mace(standard_frames()))
    assert torch.equal(turned(standard_frames())["node_attrs"], graphs(standard_frames())["node_attrs"].flip(1))


def test_entries_that_the_potential_reads_arrive():
    calculator = MACECalculator(models=make_omol_like(), device="cpu", default_dtype="float64")
    frames = charged_frames()
    made = graphs_of(calculator)(frames)
    assert made["total_charge"].flatten().tolist() == [atoms.info["charge"] for atoms in frames]
    for atoms in frames:
        assert_equal(graphs_of(calculator)([atoms]), calculator._atoms_to_batch(atoms).to_dict())
