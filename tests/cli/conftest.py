"""Labelled frames for the `toy:` potential, files of them, and an uncertainty model fitted on them."""

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from ase import Atoms
from ase.build import molecule
from ase.io import write
from typer.testing import CliRunner, Result

from ase_uq.backends.toy import ToyCalculator
from ase_uq.cli import app
from ase_uq.errors import UQWarning
from ase_uq.fitting.fit import fit


@dataclass(frozen=True)
class Files:
    """Files that the verbs work on; do not write into their folder."""

    train: Path
    calibration: Path
    test: Path
    start: Path
    uq: Path


def labelled(n_frames: int, seed: int, shake: float = 0.08) -> list[Atoms]:
    """Shaken ethanol; the reference is the toy potential and an error that grows with the shaking."""
    rng = np.random.default_rng(seed)
    calculator = ToyCalculator()
    frames = []
    for _ in range(n_frames):
        atoms = molecule("CH3CH2OH")
        moves = shake * rng.lognormal(sigma=0.5) * rng.normal(size=(len(atoms), 3))
        atoms.positions += moves
        calculator.calculate(atoms)
        error = np.linalg.norm(moves, axis=1, keepdims=True) * rng.normal(size=(len(atoms), 3))
        atoms.info["REF_energy"] = calculator.results["energy"] + np.linalg.norm(moves) * rng.normal()
        atoms.set_array("REF_forces", calculator.results["forces"] + error)
        frames.append(atoms)
    return frames


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Files:
    folder = tmp_path_factory.mktemp("cli")
    files = Files(*(folder / name for name in ("train.xyz", "cal.xyz", "test.xyz", "start.xyz", "toy.uq.safetensors")))
    train, calibration = labelled(60, seed=1), labelled(120, seed=2)
    for path, frames in (
        (files.train, train),
        (files.calibration, calibration),
        (files.test, labelled(25, seed=3)),
        (files.start, labelled(1, seed=4, shake=0.01)),
    ):
        write(path, frames)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)  # invented errors need not follow any method's form
        fit("toy:", train, calibration, methods=["bll"], progress=False).save(files.uq)
    return files


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """Runs `ase-uq` with the given words in an empty folder; errors that are nobody's fault but ours are raised."""
    monkeypatch.chdir(tmp_path)

    def run(*words: object) -> Result:
        result = CliRunner().invoke(app, [str(word) for word in words], catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return run
