"""Every example runs as it stands, in an empty folder; those that fit on a part of the data."""

import json
import os
import re
import runpy
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from ase.io import read, write

from ase_uq import UncertainCalculator, embedded, score
from ase_uq.scoring.shards import Shard
from ase_uq.thresholds.reduction import atom_norms

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
# Run before an example: its embedded frames are taken from another folder, if they are there.
FEWER = """
from pathlib import Path
from ase_uq import embedded

path = embedded.path
embedded.path = lambda name: Path({folder!r}, name) if Path({folder!r}, name).exists() else path(name)
"""


@pytest.fixture(scope="module", autouse=True)
def commands(preloaded_bin: Path) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", os.pathsep.join([str(preloaded_bin), os.environ["PATH"]]))
        yield


def run(name: str, folder: Path, *arguments: str) -> str:
    command = ["python", EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {file.name for file in EXAMPLES.glob("*.py")} == {
        "01_real_data.py",
        "02_md_that_halts.py",
        "03_your_own_frames.py",
        "04_relax_and_neb.py",
        "05_torchsim.py",
        "06_active_learning.py",
        "07_dask.py",
    }


@pytest.mark.usefixtures("shared_data")
def test_real_data(tmp_path: Path):
    text = run("01_real_data.py", tmp_path, "--every", "16")
    forces, energies = text.split("forces, eV/Å\n")[1].split("energies per atom, eV\n")
    for table in (forces, energies):
        assert [line.split("  ")[0] for line in table.splitlines()] == ["300 K", "600 K"]
    for line in forces.splitlines():
        (before, after) = map(float, re.findall(r"([\d.]+) → +([\d.]+)$", line)[0])
        # Calibration takes the mean z² of the forces nearer to 1.
        assert abs(after - 1) < abs(before - 1)
    assert not list(tmp_path.iterdir())


def test_md_that_halts(tmp_path: Path):
    text = run("02_md_that_halts.py", tmp_path)
    assert "halted at step" in text
    assert "then 50 quiet steps" in text
    assert (tmp_path / "flagged.xyz").exists()


def test_your_own_frames(tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch):
    fewer = tmp_path_factory.mktemp("fewer")
    for name in ("train_300K.xyz", "calibration_300K.xyz"):
        write(fewer / name, read(embedded.path(name), ":60"))
    (fewer / "sitecustomize.py").write_text(FEWER.format(folder=str(fewer)))
    monkeypatch.setenv("PYTHONPATH", str(fewer))
    text = run("03_your_own_frames.py", tmp_path)
    assert "test_300K.xyz: force MAE" in text
    assert "atom 0 O" in text
    assert (tmp_path / "my.uq.safetensors").exists()


def test_relax_and_neb(tmp_path: Path):
    text = run("04_relax_and_neb.py", tmp_path)
    assert "by FalseAlarms(per_run=0.05, ps=0.25): at most 0.05 of runs" in text
    assert "stopped after 0 steps, since force uncertainty" in text
    assert "the minimum is located as well as was asked for" in text
    assert "proton transfer: converged" in text
    assert re.search(r"turning O-H: halted at step \d+: image \d: force uncertainty", text)
    assert (tmp_path / "path.xyz").exists()


def test_torchsim(tmp_path: Path):
    text = run("05_torchsim.py", tmp_path)
    assert "halted at" in text
    assert "relaxed at step" in text
    assert (tmp_path / "flagged.xyz").exists()


def test_active_learning(tmp_path: Path):
    text = run("06_active_learning.py", tmp_path, "--quick")
    assert "chosen by lcmd" in text
    folder = tmp_path / "loop"
    before, after = json.loads((folder / "lcmd.json").read_text())
    assert (before["labels"], after["labels"]) == (0, 8)
    # The potential was changed by the training, and is not wrecked.
    assert before["tests"]["300"]["rmse"] != after["tests"]["300"]["rmse"] < 150
    labelled = read(folder / "labelled_lcmd_0.xyz", ":")
    assert len(labelled) == 8
    assert all(np.isfinite(atoms.arrays["REF_forces"]).all() for atoms in labelled)
    # The potential and the uncertainty model of the last round belong together, from the files alone.
    atoms = read(embedded.path("malonaldehyde.xyz"))
    atoms.calc = UncertainCalculator(f"mace:{folder / 'lcmd_1.model'}", folder / "lcmd_1.uq.safetensors")
    atoms.get_forces()
    assert 0 < atom_norms(atoms.calc.results["forces_uncertainty"]).max() < 0.4
    assert (folder / "active_learning.png").exists()


def test_dask(tmp_path: Path):
    pytest.importorskip("distributed", reason="Dask is not installed; pip install distributed brings it")
    text = run("07_dask.py", tmp_path, "--quick")
    assert sorted(text.splitlines()[:2]) == ["scored part_1.xyz", "scored part_2.xyz"]
    assert "70 frames, 630 atoms" in text
    folder = tmp_path / "scored"
    uq, options = embedded.path("mace.uq.safetensors"), {"csv": tmp_path / "alone.csv", "progress": False}
    score(folder / "finished.xyz", "embedded:mace", uq, out=tmp_path / "alone.xyz", **options)
    for kind in ("xyz", "csv"):
        assert (folder / f"scored.{kind}").read_bytes() == (tmp_path / f"alone.{kind}").read_bytes()
    # Shards that are there are not scored again.
    before = (folder / "part_1.xyz").stat().st_mtime_ns
    again = runpy.run_path(str(EXAMPLES / "07_dask.py"))["scored"]
    assert again(folder / "finished.xyz", Shard(1, 2), folder) == folder / "part_1.xyz"
    assert (folder / "part_1.xyz").stat().st_mtime_ns == before
