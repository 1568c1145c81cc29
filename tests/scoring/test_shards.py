"""Shards of a trajectory: each a part of its own, all together the file of a run without shards."""

import json
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ase.io import read, write

from ase_uq import Predictor, UncertaintyModel, fit, load_backend
from ase_uq.backends.toy import ToyCalculator
from ase_uq.errors import ArtefactError, InputError
from ase_uq.scoring.journal import Journal
from ase_uq.scoring.score import score
from ase_uq.scoring.shards import Shard, merge_shards
from ase_uq.testing.methods import ELEMENTS, labelled_frames

BATCH = 30
# Few frames, and one that is left out.
pytestmark = pytest.mark.filterwarnings("ignore::ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def model() -> UncertaintyModel:
    frames = labelled_frames(20, seed=1), labelled_frames(20, seed=2)
    return fit(ToyCalculator(ELEMENTS), *frames, methods=["bll"], progress=False)


@pytest.fixture(scope="module")
def predictor(model: UncertaintyModel) -> Predictor:
    return Predictor(load_backend(ToyCalculator(ELEMENTS)), model)


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Forty frames of several sizes; one has positions that are not finite."""
    frames = labelled_frames(40, seed=5)
    frames[17].positions[0] = np.nan
    path = tmp_path_factory.mktemp("source") / "run.xyz"
    write(path, frames)
    return path


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def scored(source: Path, predictor: Predictor, out: str, **options: Any) -> Path:
    score(source, predictor, out=out, batch_atoms=BATCH, progress=False, **options)
    return Path(out)


@pytest.fixture
def shards(source: Path, predictor: Predictor) -> Callable[[int], list[Path]]:
    def make(count: int) -> list[Path]:
        return [scored(source, predictor, f"part_{i}.xyz", shard=f"{i}/{count}") for i in range(1, count + 1)]

    return make


@pytest.mark.parametrize("count", [1, 2, 7, 60])
def test_merged_they_are_the_run_without_shards_byte_for_byte(source, predictor, shards, count):
    """More shards than batches too: some are without a frame."""
    scored(source, predictor, "whole.xyz", csv="whole.csv")
    parts = shards(count)
    merged = merge_shards(parts[::-1], out="merged.xyz", csv="merged.csv", progress=False)
    assert Path("merged.xyz").read_bytes() == Path("whole.xyz").read_bytes()
    assert Path("merged.csv").read_bytes() == Path("whole.csv").read_bytes()
    assert (merged.n_frames, merged.n_left_out) == (39, 1)
    assert sorted(path.name for path in Path().glob("merged*")) == ["merged.csv", "merged.xyz"]
    sizes = [len(read(path, ":")) if path.stat().st_size else 0 for path in parts]
    assert sum(sizes) == 39
    assert (0 in sizes) == (count == 60)


def test_a_table_of_each_is_written_where_asked(source, predictor):
    scored(source, predictor, "part.xyz", shard=Shard(1, 2), csv="part.csv")
    assert Path("part.csv").read_bytes() == Path("part.xyz.shard.csv").read_bytes()


@pytest.mark.parametrize("after", range(1, 4))
def test_a_shard_that_was_interrupted_goes_on_as_the_same_one(source, predictor, shards, monkeypatch, after):
    """Its batches are those of a run without shards, wherever it begins again."""
    scored(source, predictor, "whole.xyz")
    parts = shards(3)
    append, count = Journal.append, []

    def interrupted(*args: Any) -> None:
        count.append(1)
        if len(count) == after:
            raise KeyboardInterrupt
        append(*args)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", interrupted)
        with pytest.raises(KeyboardInterrupt):
            scored(source, predictor, "part_2.xyz", shard="2/3", overwrite=True)
    if after > 1:
        with pytest.raises(ArtefactError, match=r"was begun with another shard \(2/3, now 3/3\)"):
            scored(source, predictor, "part_2.xyz", shard="3/3")
    scored(source, predictor, "part_2.xyz", shard="2/3", overwrite=True)
    merge_shards(parts, out="merged.xyz", progress=False)
    assert Path("merged.xyz").read_bytes() == Path("whole.xyz").read_bytes()


@pytest.mark.parametrize("killed_at", [".shard.csv", ".shard.json"])
def test_a_kill_while_it_is_finished_changes_nothing(source, predictor, monkeypatch, killed_at):
    """Between the renaming of the frames and of what stands beside them."""
    replace = os.replace

    def killed(path: Path, target: Path) -> None:
        if str(target).endswith(killed_at):
            raise KeyboardInterrupt
        replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr("ase_uq.scoring.journal.os.replace", killed)
        with pytest.raises(KeyboardInterrupt):
            scored(source, predictor, "part.xyz", shard="1/1", csv="part.csv")
    assert not Path("part.xyz.shard.json").exists()
    assert scored(source, predictor, "part.xyz", shard="1/1", csv="part.csv").exists()
    merged = merge_shards(["part.xyz"], out="merged.xyz", progress=False)
    assert merged.n_frames == 39
    assert len(Path("part.csv").read_text().splitlines()) == 41


def test_a_run_without_shards_leaves_nothing_of_a_shard_beside_it(source, predictor, shards):
    shards(1)
    scored(source, predictor, "part_1.xyz", overwrite=True)
    with pytest.raises(InputError, match=r"part_1.xyz is no complete shard: part_1.xyz.shard.json is not beside it"):
        merge_shards(["part_1.xyz"], out="merged.xyz")


class TestRefusals:
    def test_shards_that_are_missing_or_twice_or_of_other_numbers(self, source, predictor, shards):
        one, two, three = shards(3)
        with pytest.raises(InputError, match=r"shard 2, 3 of 3 are missing. Give all of them."):
            merge_shards([one], out="merged.xyz")
        shutil.copy(one, "again.xyz")
        for kind in ("csv", "json"):
            shutil.copy(f"{one}.shard.{kind}", f"again.xyz.shard.{kind}")
        with pytest.raises(InputError, match=r"part_1.xyz and again.xyz are both shard 1/3"):
            merge_shards([one, two, three, "again.xyz"], out="merged.xyz")
        scored(source, predictor, "other.xyz", shard="2/2")
        with pytest.raises(InputError, match=r"part_1.xyz is shard 1/3, and other.xyz is shard 2/2"):
            merge_shards([one, "other.xyz"], out="merged.xyz")
        with pytest.raises(InputError, match="no shard was given"):
            merge_shards([], out="merged.xyz")
        assert not list(Path().glob("merged*"))

    def test_one_of_another_model_or_batch(self, source, predictor, shards):
        one, two = shards(2)
        frames = labelled_frames(20, seed=1), labelled_frames(20, seed=3)
        other = fit(ToyCalculator(ELEMENTS), *frames, methods=["bll"], progress=False)
        scored(source, Predictor(predictor.backend, other), str(two), shard="2/2", overwrite=True)
        with pytest.raises(
            ArtefactError, match=r"part_2.xyz was scored with another value of uncertainty model than part_1.xyz"
        ):
            merge_shards([one, two], out="merged.xyz")
        score(source, predictor, out=two, shard="2/2", batch_atoms=60, overwrite=True, progress=False)
        with pytest.raises(ArtefactError, match="scored with another value of batch atoms"):
            merge_shards([one, two], out="merged.xyz")

    @pytest.mark.parametrize(
        "damage", ["cut", "altered", "number", "more", "row", "last row", "no rows", "no table", "json"]
    )
    def test_damaged_ones(self, shards, damage):
        one, two = shards(2)
        text = two.read_text()
        table = Path(f"{two}.shard.csv")
        rows = table.read_text().splitlines(keepends=True)
        if damage == "cut":
            two.write_text(text[: len(text) // 2])
        elif damage == "altered":
            two.write_text(text.replace("source_frame=", "source_farme=", 1))
        elif damage == "number":
            two.write_text(re.sub(r"(\d)\n", lambda found: f"{9 - int(found[1])}\n", text[::-1], count=1)[::-1])
        elif damage == "more":
            two.write_text(text + one.read_text())
        elif damage == "row":
            table.write_text("".join([*rows[:2], "x" + rows[2], *rows[3:]]))
        elif damage == "last row":
            table.write_text("".join(rows[:-1]))
        elif damage == "no rows":
            table.write_text("")
        elif damage == "no table":
            table.unlink()
        else:
            Path(f"{two}.shard.json").write_text("{")
        with pytest.raises(InputError, match=r"part_2.xyz.*(as it was written|missing|altered).* with --overwrite"):
            merge_shards([one, two], out="merged.xyz", progress=False)
        assert not list(Path().glob("merged*"))

    def test_frames_that_stand_twice_or_nowhere(self, shards):
        """Shards of one run that say they are others."""
        one, two, three = shards(3)
        told = Path(f"{three}.shard.json")
        told.write_text(told.read_text().replace("3/3", "2/3"))
        for kind in ("", ".shard.csv"):
            shutil.copy(f"{one}{kind}", f"{three}{kind}")
        sums = json.loads(Path(f"{one}.shard.json").read_text())
        told.write_text(json.dumps(sums | {"shard": "3/3"}))
        with pytest.raises(InputError, match="frame 0 stands twice"):
            merge_shards([one, two, three], out="merged.xyz", progress=False)
        for path in (one, two):
            other = Path(f"{path}.shard.json")
            other.write_text(other.read_text().replace("/3", "/2"))
        with pytest.raises(InputError, match=r"frame \d+ is in none of them"):
            merge_shards([one, two], out="merged.xyz", progress=False)

    def test_one_that_is_still_in_work(self, shards):
        one, two = shards(2)
        Path(f"{two}.part.json").write_text("{}")
        with pytest.raises(InputError, match=r"part_2.xyz is not complete. The command that began it goes on"):
            merge_shards([one, two], out="merged.xyz")

    def test_nothing_could_be_scored(self, predictor):
        frames = labelled_frames(2, seed=1)
        for atoms in frames:
            atoms.positions[0] = np.nan
        write("bad.xyz", frames)
        scored(Path("bad.xyz"), predictor, "part.xyz", shard="1/1")
        assert json.loads(Path("part.xyz.shard.json").read_text())["shard"] == "1/1"
        with pytest.raises(InputError, match="none of the 2 frames of these shards could be scored"):
            merge_shards(["part.xyz"], out="merged.xyz", progress=False)

    def test_outputs(self, shards):
        (one,) = shards(1)
        with pytest.raises(ValueError, match=r"part_1.xyz is the input"):
            merge_shards([one], out=one)
        with pytest.raises(ValueError, match=r"part_1.xyz.shard.csv is the input"):
            merge_shards([one], out="merged.xyz", csv=f"{one}.shard.csv", overwrite=True)
        Path("merged.xyz").touch()
        with pytest.raises(FileExistsError, match=r"merged.xyz exists"):
            merge_shards([one], out="merged.xyz")
        with pytest.raises(ArtefactError, match="cannot write nowhere"):
            merge_shards([one], out="nowhere/merged.xyz")
        with pytest.raises(InputError, match=r"there is no file two.xyz"):
            merge_shards(["two.xyz"], out="other.xyz")

    @pytest.mark.parametrize("text", ["0/3", "4/3", "3", "a/b", "", "1/-2", "¹/3", "slurm"])
    def test_there_is_no_such_part(self, text):
        with pytest.raises(ValueError, match="shard"):
            Shard.parse(text)
