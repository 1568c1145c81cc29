"""What potentials' packages change in the whole process is put back, whatever happens in between."""

import importlib.util
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from ase.calculators.calculator import BaseCalculator

from ase_uq.backends._process import preserved_process
from ase_uq.testing.backends import process_state


def _disturb() -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_float32_matmul_precision("medium")
    torch.rand(3)
    os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = "1"
    BaseCalculator.implemented_properties.append("node_energy")


def _fail_while_disturbed() -> None:
    with preserved_process():
        _disturb()
        raise ZeroDivisionError


@pytest.mark.parametrize("switch", [None, "0"])
def test_all_is_put_back(switch: str | None, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    if switch is not None:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", switch)
    before = process_state()
    with preserved_process():
        _disturb()
        assert process_state() != before
    assert process_state() == before
    with pytest.raises(ZeroDivisionError):
        _fail_while_disturbed()
    assert process_state() == before


# Runs script after script, each in a process of its own, which is forked before any potential's package is imported.
# What those import takes ten times as long as they do, and is imported once; not all of it is in every installation.
SERVER = """
import gc, importlib, json, os, sys, traceback
for name in ("torch._dynamo", "torch._inductor", "scipy.signal", "matplotlib.pyplot", "pandas", "networkx",
             "torchmetrics", "torch_geometric", "sklearn", "h5py", "ase.calculators.mixing"):
    try:
        importlib.import_module(name)
    except ImportError:
        pass
gc.freeze()  # a collection in a child would copy every page
for line in sys.stdin:
    reader, writer = os.pipe()
    if not os.fork():
        os.dup2(2, 1)  # what packages print is no answer
        told = "done"
        try:
            exec(json.loads(line), {"__name__": "__main__"})
        except BaseException:
            told = traceback.format_exc()
        os.write(writer, told.encode())
        os._exit(0)
    os.close(writer)
    with open(reader) as answer:
        print(json.dumps(answer.read() or "the process died"), flush=True)
    os.wait()
"""


@pytest.fixture(scope="module")
def fresh() -> Iterator[Callable[[str], str]]:
    """Runs a script in a process without any potential's package and gives "done", or what went wrong."""
    environment = {name: value for name, value in os.environ.items() if name != "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"}
    command = [sys.executable, "-W", "ignore", "-c", SERVER]
    server = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    with server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def run(script: str) -> str:
            print(json.dumps(script), file=stdin, flush=True)
            return json.loads(stdout.readline())

        yield run
        stdin.close()


# To compile what e3nn generates takes longer than the rest of a script.
OWN_CALCULATOR = """
import e3nn
e3nn.set_optimization_defaults(jit_script_fx=False, optimize_einsums=False)
from ase_uq import load_backend
backend = load_backend("embedded:mace", device="cpu")
import torch
torch.save(backend.calculator.models[0], {path!r})
from mace.calculators import MACECalculator
MACECalculator({path!r}, device="cpu", default_dtype="float32")
"""


def test_a_calculator_of_the_users_own_can_be_made_before_and_after_a_spec(fresh: Callable[[str], str], tmp_path: Path):
    script = """
import sys
assert not {"mace", "e3nn", "ase_uq"} & {*sys.modules}
import mace.calculators
"""
    assert fresh(script + OWN_CALCULATOR.format(path=str(tmp_path / "x.model"))) == "done"


@pytest.mark.skipif(importlib.util.find_spec("sevenn") is None, reason="sevenn is not installed")
def test_safe_loading_of_torch_is_left_on(fresh: Callable[[str], str], tmp_path: Path):
    """sevenn needs it relaxed to import e3nn; mace, which relaxes it for good, works afterwards."""
    script = """
import os, sys
assert not {"mace", "e3nn", "sevenn", "ase_uq"} & {*sys.modules}
import ase_uq.backends.sevennet, torch
assert slice not in torch.serialization.get_safe_globals()
assert "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD" not in os.environ
"""
    then = 'load_backend("sevennet:7net-0", device="cpu")'
    assert fresh(script + OWN_CALCULATOR.format(path=str(tmp_path / "x.model")) + then) == "done"


def test_safe_loading_stays_as_it_is_left_where_asked(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    with preserved_process(loading=False):
        _disturb()
    assert os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] == "1"


def test_warnings_are_silenced_by_how_they_begin():
    with preserved_process():
        warnings.warn("anything", stacklevel=1)
    with preserved_process("for authors|for experts"):
        warnings.warn("for experts only", stacklevel=1)
        with pytest.warns(UserWarning, match="for users"):
            warnings.warn("for users", stacklevel=1)
