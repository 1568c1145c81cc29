"""The shards of `examples/07_dask.py` on the workers of a cluster: whoever dies in the midst of one loses nothing."""

import os
import runpy
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from ase.io import write

from ase_uq import fit
from ase_uq.backends.toy import ToyCalculator
from ase_uq.scoring.journal import Journal
from ase_uq.scoring.score import score
from ase_uq.scoring.shards import Shard, merge_shards
from ase_uq.testing.methods import labelled_frames

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "07_dask.py"
pytestmark = pytest.mark.filterwarnings("ignore:bll tells nothing about the:ase_uq.errors.UQWarning")


@pytest.fixture
def example(tmp_path: Path) -> dict[str, Any]:
    """What the example defines, with a toy for its potential and with small batches."""
    pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed brings it")
    names = runpy.run_path(str(EXAMPLE))
    train, held_out = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
    fit(ToyCalculator(), train, held_out, methods=["bll"], progress=False).save(tmp_path / "toy.uq.safetensors")
    names["scored"].__globals__.update(MODEL="toy:", UQ=tmp_path / "toy.uq.safetensors")
    write(tmp_path / "finished.xyz", labelled_frames(300, seed=3))
    score(
        tmp_path / "finished.xyz", "toy:", tmp_path / "toy.uq.safetensors", out=tmp_path / "alone.xyz", progress=False
    )
    return names


def dying(scored: Callable[..., Path], frames: Path, shard: Shard, folder: Path) -> Path:
    """The example's task; the first worker that has it dies when two batches of the shard are on the disk."""
    died, append, written = folder / "died", Journal.append, []

    def append_or_die(*arguments: Any) -> None:
        append(*arguments)
        written.append(1)
        if len(written) == 2:
            died.write_text(str(os.getpid()))
            os.kill(os.getpid(), signal.SIGKILL)

    if not died.exists():
        Journal.append = append_or_die
    else:
        begun = (folder / "part_1.xyz.part").read_text().count("source_frame=")
        (folder / "found").write_text(f"{os.getpid()} {begun}")
    return scored(frames, shard, folder)


def test_a_shard_whose_worker_died_is_finished_by_another(example: dict[str, Any], tmp_path: Path):
    import cloudpickle
    from distributed import Client

    frames, scored = tmp_path / "finished.xyz", example["scored"]
    cloudpickle.register_pickle_by_value(sys.modules[__name__])  # workers do not know of the tests
    with example["cluster_of"](2) as cluster, Client(cluster) as client:
        first = client.submit(dying, scored, frames, Shard(1, 2), tmp_path)
        second = client.submit(scored, frames, Shard(2, 2), tmp_path)
        parts = [task.result(timeout=60) for task in (first, second)]
    by_whom, n_begun = map(int, (tmp_path / "found").read_text().split())
    assert by_whom != int((tmp_path / "died").read_text())
    assert 0 < n_begun < 150
    merge_shards(parts, out=tmp_path / "merged.xyz", progress=False)
    assert (tmp_path / "merged.xyz").read_bytes() == (tmp_path / "alone.xyz").read_bytes()


@pytest.mark.parametrize("killed_at", [".shard.csv", ".shard.json"])
def test_a_worker_that_dies_while_it_finishes_leaves_the_rest_to_the_next(
    example: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killed_at: str
):
    """The frames have their name by then, so a file of that name is no sign of a complete shard."""
    replace, scored = os.replace, example["scored"]

    def killed(path: Path, target: Path) -> None:
        if str(target).endswith(killed_at):
            raise KeyboardInterrupt
        replace(path, target)

    monkeypatch.setattr("ase_uq.scoring.journal.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        scored(tmp_path / "finished.xyz", Shard(1, 1), tmp_path)
    monkeypatch.undo()
    assert (tmp_path / "part_1.xyz").exists()
    for _ in range(2):  # the second time it is complete
        out = scored(tmp_path / "finished.xyz", Shard(1, 1), tmp_path)
    merge_shards([out], out=tmp_path / "merged.xyz", progress=False)
    assert (tmp_path / "merged.xyz").read_bytes() == (tmp_path / "alone.xyz").read_bytes()
