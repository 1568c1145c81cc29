"""The house rules that a reader cannot see in one file: who imports whom, and what an import leaves behind."""

import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import ase_uq

REPOSITORY = Path(__file__).resolve().parents[1]

# What `from ase_uq import *` gives. A name that comes or goes here comes or goes in CHANGELOG.md.
PUBLIC_NAMES = {
    "AllOf",
    "AnyOf",
    "Bonds",
    "Call",
    "Cusum",
    "Distributed",
    "EnergySpike",
    "ErrorBound",
    "FalseAlarms",
    "Finite",
    "Flag",
    "Halt",
    "Log",
    "MaxTemperature",
    "MissRate",
    "Patience",
    "PerElement",
    "Prediction",
    "Predictor",
    "Quantile",
    "Reduction",
    "ReferenceRuns",
    "Refractory",
    "Relaxation",
    "Selection",
    "Threshold",
    "UQError",
    "UQWarning",
    "UncertainCalculator",
    "UncertaintyBias",
    "UncertaintyHalt",
    "UncertaintyModel",
    "UncertaintyMonitor",
    "WatchPolicy",
    "WatchedCalculator",
    "available_backends",
    "available_methods",
    "embedded",
    "evaluate",
    "fit",
    "load_backend",
    "metrics",
    "read_frames",
    "reference_runs",
    "relax",
    "score",
    "select",
    "perturb_frames",
    "write_frames",
}

# Imports our dependencies first: what they do to the process is theirs, what changes after is ours.
IMPORT_AND_COMPARE = """
import json, logging, os, sys, warnings
import ase.calculators.calculator as ase_calculator
import ase.io, numpy, safetensors.torch, scipy.linalg, torch

def state():
    root = logging.getLogger()
    return {
        "environment": dict(os.environ),
        "default dtype": str(torch.get_default_dtype()),
        "gradients": torch.is_grad_enabled(),
        "ASE's all_properties": list(ase_calculator.all_properties),
        "ASE's implemented_properties": list(ase_calculator.BaseCalculator.implemented_properties),
        "root logger": [root.level, [str(handler) for handler in root.handlers]],
        "warning filters": [str(entry) for entry in warnings.filters],
        "numpy's random state": str(numpy.random.get_state()),
        "torch's random state": torch.random.get_rng_state().tolist(),
    }

before = state()
import ase_uq
after = state()
print(json.dumps({
    "changed": [name for name in before if before[name] != after[name]],
    "potentials": sorted({"mace", "e3nn", "orb_models", "torch_sim", "tblite"} & set(sys.modules)),
}))
"""


def test_imports_follow_the_contracts():
    lint = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("family", ["backends", "methods"])
def test_every_plugin_is_under_the_independence_contract(family: str):
    configuration = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    contracts = configuration["tool"]["importlinter"]["contracts"]
    (independent,) = [contract["modules"] for contract in contracts if contract["type"] == "independence"]
    assert set(_plugins(family)) <= {module.rsplit(".", 1)[1] for module in independent if f".{family}." in module}


def _plugins(family: str) -> list[str]:
    """Files and folders of a family that hold a plugin: those with the three functions, or with a method."""
    found = []
    for path in (REPOSITORY / "ase_uq" / family).iterdir():
        source = path / "__init__.py" if path.is_dir() else path
        if path.name.startswith("_") or path.stem == "base" or source.suffix != ".py" or not source.is_file():
            continue
        marks = (
            ("def accepts(", "import MACEBackend, accepts") if family == "backends" else ("(Method)", "method import")
        )
        if any(mark in source.read_text() for mark in marks):
            found.append(path.stem)
    assert len(found) > 3
    return found


def test_import_leaves_the_process_and_the_disk_alone(tmp_path: Path):
    home, folder = tmp_path / "home", tmp_path / "folder"
    home.mkdir()
    folder.mkdir()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_COMPARE],
        cwd=folder,
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert json.loads(run.stdout) == {"changed": [], "potentials": []}
    assert run.stderr == ""
    assert set(tmp_path.rglob("*")) == {home, folder}


def test_public_names():
    assert set(ase_uq.__all__) == PUBLIC_NAMES
    assert all(hasattr(ase_uq, name) for name in ase_uq.__all__)
