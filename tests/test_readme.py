"""Every `python` and `bash` block of README.md runs as it stands, one process each, from top to bottom in one folder.

Blocks of another kind (`sh`: the installation) are not run here; the test command is itself one of them. The files
that the README calls the reader's own (`my.model`, `train.xyz`, ...) are made from the embedded potentials.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from ase_uq import embedded

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

READERS_FILES = {
    "train.xyz": "train_300K.xyz",
    "calibration.xyz": "calibration_300K.xyz",
    "start.xyz": "malonaldehyde.xyz",
    "my.uq.safetensors": "mace.uq.safetensors",
}
MAKE_MODEL = """
import torch
from ase_uq.backends import load_backend
torch.save(load_backend("embedded:mace", device="cpu").calculator.models[0], "my.model")
"""
# A run of the README may end by halting, and is as long as the reader likes.
SHORTER = {"dyn.run(100_000)": "dyn.run(50)", "--steps 100000": "--steps 50"}
# Pretrained weights would have to be fetched: orb's loader gives the embedded potential instead.
OFFLINE_ORB = """
from orb_models.forcefield import pretrained as _pretrained
from ase_uq.backends import load_backend as _load
_orb = _load("embedded:orb-conservative", device="cpu").calculator
_pretrained.orb_v3_conservative_inf_omat = lambda device: (_orb.model, _orb.adapter)
"""


def blocks() -> list[tuple[str, str]]:
    return BLOCK.findall(README.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("readme")
    for name, source in READERS_FILES.items():
        shutil.copy(embedded.path(source), folder / name)
    run(["python", "-c", MAKE_MODEL], folder)
    return folder


def run(command: list[str], folder: Path) -> None:
    # As in an activated environment.
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode and "UncertaintyHalt" not in done.stderr:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.mark.parametrize("number", range(len(blocks())))
def test_block_runs(number: int, folder: Path):
    language, text = blocks()[number]
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    if "pretrained.orb" in text:
        text = OFFLINE_ORB + text
    run(["python", "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text], folder)


def test_readme_has_blocks_to_run():
    assert {language for language, _ in blocks()} == {"python", "bash"}
