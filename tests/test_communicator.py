"""Sums over ranks: one process, simulated ranks, and two real ones."""

import itertools
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Communicator, Distributed, Serial, gather, shard
from ase_uq.errors import InputError
from ase_uq.methods.bll import BLL
from ase_uq.testing.methods import ELEMENTS, RAW_FIELDS, fit_head, forward_pass_of, labelled_frames, on_ranks

RANKS = """
import os
import sys
import torch
import torch.distributed as dist
from ase_uq.backends import load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.communicator import Distributed
from ase_uq.methods.bll import BLL
from ase_uq.testing.methods import ELEMENTS, fit_head, labelled_frames

torch.set_num_threads(1)
folder, *sizes = sys.argv[1:]
child = os.fork()  # once everything is imported
rank = int(not child)
store = f"file://{folder}/store"
dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
ranks = Distributed()
assert (ranks.rank, ranks.size) == (rank, 2)
mine = {"b": torch.full((2, 3), rank + 1.0, dtype=torch.float64), "a": torch.tensor([0.1 * rank])}
summed = ranks.sum({"b": mine["b"]}) | ranks.sum({"a": mine["a"]})
assert torch.equal(summed["b"], torch.full((2, 3), 3.0, dtype=torch.float64)), summed
assert torch.equal(mine["b"], torch.full((2, 3), rank + 1.0, dtype=torch.float64)), "the statistics were changed"
assert summed["a"].shape == (1,)
backend = load_backend(ToyCalculator(ELEMENTS, direct=True))
for size in map(int, sizes):
    head = fit_head(BLL(ridge=1e-4), backend, labelled_frames(30, seed=1), batch_atoms=size, communicator=ranks)
    torch.save([head.settings, head.state_dict()], f"{folder}/head_{size}_{rank}.pt")
dist.destroy_process_group()
if child:
    _, status = os.waitpid(child, 0)
    sys.exit(os.waitstatus_to_exitcode(status))
"""


class OneOf:
    """Rank and size alone, for `shard`."""

    def __init__(self, rank: int, size: int) -> None:
        self.rank, self.size = rank, size

    def sum(self, statistics):
        raise NotImplementedError


def test_one_process_sums_to_what_it_has():
    statistics = {"a": torch.ones(2)}
    assert Serial().sum(statistics) == statistics
    assert (Serial.rank, Serial.size) == (0, 1)


@pytest.mark.parametrize("size", [1, 2, 7])
def test_shards_are_every_item_once(size: int):
    items = list(range(5))
    parts = [list(shard(items, OneOf(rank, size))) for rank in range(size)]
    assert sorted(item for part in parts for item in part) == items
    assert max(map(len, parts)) - min(map(len, parts)) <= 1


def test_ranks_without_a_process_group_are_refused():
    with pytest.raises(RuntimeError, match="not initialised: call init_process_group first"):
        Distributed()


# Batches of 40 atoms give the ranks unequal shards; all frames in one batch leave the second rank without any.
def test_two_processes_fit_the_head_of_one(preloaded_bin: Path, tmp_path: Path):
    sizes = ("40", "100000")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    command = [preloaded_bin / "python", "-c", RANKS, tmp_path, *sizes]
    ranks = subprocess.run(command, stderr=subprocess.PIPE, text=True, env=environment, timeout=120)
    assert ranks.returncode == 0, ranks.stderr
    backend = load_backend(ToyCalculator(ELEMENTS, direct=True))
    serial = fit_head(BLL(ridge=1e-4), backend, labelled_frames(30, seed=1))
    batch = forward_pass_of(backend, labelled_frames(5, seed=2))
    expected = serial(batch)
    for size, rank in itertools.product(sizes, range(2)):
        settings, buffers = torch.load(tmp_path / f"head_{size}_{rank}.pt", weights_only=True)
        assert settings["atoms"]["rows"] == serial.settings["atoms"]["rows"]
        assert settings["force"]["rows"] == serial.settings["force"]["rows"]
        found = BLL.load(settings, buffers)(batch)
        for name in RAW_FIELDS:
            largest = float(getattr(expected, name).max())
            torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=0, atol=1e-10 * largest)


def test_rows_of_all_ranks_stand_one_rank_after_the_other():
    def run(ranks: Communicator) -> torch.Tensor | None:
        own = torch.full((ranks.rank, 2), float(ranks.rank), dtype=torch.float64)
        return gather(own if ranks.rank else None, ranks)

    for rows in on_ranks(3, run):
        assert rows is not None
        assert rows.tolist() == [[1.0, 1.0], [2.0, 2.0], [2.0, 2.0]]


def test_no_rank_has_rows():
    assert on_ranks(2, lambda ranks: gather(None, ranks)) == [None, None]


@pytest.fixture
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_statistics_keep_their_shapes_and_devices(group: None):
    statistics = {"b": torch.arange(6.0).reshape(2, 3), "a": torch.ones(())}
    summed = Distributed().sum(statistics)
    assert summed.keys() == statistics.keys()
    for name, value in statistics.items():
        assert torch.equal(summed[name], value)


def test_a_rank_that_answers_no_more_is_told(group: None, monkeypatch: pytest.MonkeyPatch):
    def fail(_: torch.Tensor) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(dist, "all_reduce", fail)
    with pytest.raises(InputError, match=r"another rank has ended, or answers no more.* it was killed: by a limit of"):
        Distributed().sum({"a": torch.ones(2)})
