"""What potentials' packages change in the whole process is put back, whatever happens in between."""

import os
import subprocess
import sys
import warnings
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


@pytest.mark.parametrize("first", ["import mace.calculators", "import ase_uq"])
def test_a_calculator_of_the_users_own_can_be_made_after_a_spec(first: str, tmp_path: Path):
    script = f"""
import torch
{first}
from ase_uq import load_backend
backend = load_backend("embedded:mace")
torch.save(backend.calculator.models[0], {str(tmp_path / "x.model")!r})
from mace.calculators import MACECalculator
MACECalculator({str(tmp_path / "x.model")!r}, device="cpu", default_dtype="float32")
"""
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


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
