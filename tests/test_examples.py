"""Every example runs as it stands, in an empty folder; the one on real data on a part of it."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name: str, folder: Path, *arguments: str) -> str:
    # Nine atoms: more threads would wait for each other.
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, EXAMPLES / name, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_example_is_run_here():
    assert {file.name for file in EXAMPLES.glob("*.py")} == {
        "01_real_data.py",
        "02_md_that_halts.py",
        "03_your_own_frames.py",
        "04_relax_and_neb.py",
        "05_torchsim.py",
    }


@pytest.mark.usefixtures("shared_data")
def test_real_data(tmp_path: Path):
    text = run("01_real_data.py", tmp_path, "--every", "8")
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
    assert "then 100 quiet steps" in text
    assert (tmp_path / "flagged.xyz").exists()


def test_your_own_frames(tmp_path: Path):
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
