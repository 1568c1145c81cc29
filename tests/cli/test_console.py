import logging
import os
import subprocess
import sys
import warnings

import pytest
import typer
from typer.testing import CliRunner

from ase_uq.cli import app, main
from ase_uq.cli.console import ErrorsAsLines, only_our_messages, silence
from ase_uq.errors import UQWarning

VERBS = ("fit", "info", "score", "md", "demo")


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "ase_uq.cli", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert done.stderr == ""
    assert all(f" {verb} " in done.stdout for verb in VERBS)


@pytest.mark.parametrize("verb", VERBS)
def test_help_of_a_verb_has_an_example(verb: str):
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert f"ase-uq {verb} " in result.stdout.replace("Usage: ", "", 1)


def test_version():
    result = CliRunner().invoke(app, ["--version"])
    assert (result.exit_code, result.stdout) == (0, "ase-uq 0.1.0\n")


def test_no_verb_shows_the_help():
    result = CliRunner().invoke(app, [])
    assert result.exit_code == 2
    assert "Calibrated uncertainties" in result.output


def test_main_exits_with_the_code(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit_:
        main(["info", "nothing.safetensors"])
    assert exit_.value.code == 1
    assert capsys.readouterr().err == "error: there is no file nothing.safetensors.\n"


def failing_app(error: Exception) -> typer.Typer:
    failing = typer.Typer(cls=ErrorsAsLines)

    @failing.command()
    def fail() -> None:
        raise error

    @failing.callback()
    def _() -> None: ...

    return failing


@pytest.mark.parametrize("error", [ValueError("no good"), FileNotFoundError("no good"), PermissionError("no good")])
def test_expected_errors_are_one_line(error: Exception):
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert (result.exit_code, result.stdout, result.stderr) == (1, "", "error: no good\n")


def test_out_of_memory_says_what_helps():
    kind = type("OutOfMemoryError", (RuntimeError,), {})
    result = CliRunner().invoke(failing_app(kind("CUDA out of memory.\nA long story.")), ["fail"])
    assert result.exit_code == 1
    assert result.stderr == (
        "error: the device is out of memory. Give a smaller --batch-atoms. (CUDA out of memory.)\n"
    )


@pytest.mark.parametrize("error", [KeyError("bug"), RuntimeError("bug")])
def test_unexpected_errors_keep_their_traceback(error: Exception):
    result = CliRunner().invoke(failing_app(error), ["fail"])
    assert result.exception is error


def test_only_our_messages_are_shown(capsys: pytest.CaptureFixture[str]):
    filters = list(warnings.filters)
    with only_our_messages():
        warnings.warn("of torch", FutureWarning, stacklevel=1)
        logging.getLogger("theirs").warning("of mace")
        warnings.warn("of ours", UQWarning, stacklevel=1)
    assert capsys.readouterr().err == "warning: of ours\n"
    assert list(warnings.filters) == filters


def test_silence_swallows_every_stream(capfd: pytest.CaptureFixture[str]):
    with silence():
        print("python")
        os.write(1, b"C++\n")
        os.write(2, b"C++\n")
        logging.getLogger("noisy").warning("log")
    print("heard")
    assert capfd.readouterr() == ("heard\n", "")
    assert logging.root.manager.disable == 0


def test_silence_ends_with_an_error(capfd: pytest.CaptureFixture[str]):
    with pytest.raises(ValueError, match="inside"), silence():
        raise ValueError("inside")
    print("heard")
    assert capfd.readouterr().out == "heard\n"
