"""Shards on the command line, and the script of the page about clusters under a stand-in for its scheduler."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from ase.io import read, write

from ase_uq import embedded

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cluster.md"


@pytest.fixture
def score(run, files):
    def score(shard, out, *words):
        words = ("--model", "toy:", "--uq", files.uq, "--batch-atoms", 30, "--out", out, *words)
        return run("score", files.test, *words, *([] if shard is None else ["--shard", shard]))

    return score


@pytest.mark.parametrize("ending", ["xyz", "h5"])
def test_shards_and_the_file_that_is_made_of_them(run, score, ending):
    assert score(None, f"whole.{ending}", "--csv", "whole.csv").exit_code == 0
    for number in (1, 2, 3):
        assert score(f"{number}/3", f"part_{number}.{ending}").exit_code == 0
    one, two, three = (f"part_{number}.{ending}" for number in (1, 2, 3))
    result = run("merge", three, one, two, "--out", f"scored.{ending}", "--csv", "scored.csv")
    assert result.exit_code == 0
    assert result.stdout.startswith("25 frames, 225 atoms in ")
    for kind in (ending, "csv"):
        assert Path(f"scored.{kind}").read_bytes() == Path(f"whole.{kind}").read_bytes()
    again = run("merge", three, one, two, "--out", f"scored.{ending}")
    assert (again.exit_code, again.stderr) == (
        1,
        f"error: scored.{ending} exists. Give another name, or --overwrite to replace it.\n",
    )
    part = run("merge", three, one, "--out", f"other.{ending}")
    assert (part.exit_code, part.stderr) == (1, "error: shard 2 of 3 is missing. Give all of them.\n")


def test_more_shards_than_batches(score):
    result = score("60/60", "part.xyz")
    assert result.exit_code == 0
    assert result.stdout.startswith("no frames in ")


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("5/3", "there is no shard 5/3: give I/N with I from 1 to N"),
        ("half", "'half' is no shard: give I/N, such as 1/8."),
    ],
)
def test_no_such_shard(score, shard, message):
    result = score(shard, "part.xyz")
    assert result.exit_code == 1
    assert message in result.stderr
    assert not list(Path().iterdir())


def test_the_script_of_the_page_under_a_stand_in_scheduler(tmp_path: Path, preloaded_bin: Path):
    """What the scheduler does with it: the script once a task, with its number."""
    script, merge = (
        next(block for block in re.findall(r"^```sh\n(.*?)^```$", PAGE.read_text(), re.M | re.S) if words in block)
        for words in ("--shard $SLURM_ARRAY_TASK_ID", "ase-uq merge")
    )
    first, last = map(int, re.findall(r"#SBATCH --array=(\d+)-(\d+)", script)[0])
    write(tmp_path / "finished.xyz", read(embedded.path("test_900K.xyz"), ":3"))
    shutil.copy(embedded.path("mace.uq.safetensors"), tmp_path / "my.uq.safetensors")
    words = ["-euo", "pipefail", "-c"]
    path = os.pathsep.join([str(preloaded_bin), str(Path(sys.executable).parent), os.environ["PATH"]])
    for task in (last, first):
        variables = {"SLURM_ARRAY_TASK_ID": str(task)}
        command = ["bash", *words, script.replace("mace:my.model", "embedded:mace")]
        subprocess.run(command, cwd=tmp_path, env={**os.environ, **variables, "PATH": path}, check=True)
    assert len(read(tmp_path / "part_1.xyz", ":")) == 3
    done = subprocess.run(
        ["bash", *words, merge], cwd=tmp_path, env={**os.environ, "PATH": path}, capture_output=True, text=True
    )
    assert done.returncode == 1
    assert "shard 2, 3, 4, 5, 6, 7 of 8 are missing" in done.stderr
