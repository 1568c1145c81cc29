from pathlib import Path

import pytest

import ase_uq.demo
from ase_uq.errors import MissingDependency


@pytest.fixture
def asked(monkeypatch):
    """What the library was asked for; it answers with one line."""
    calls = []

    def run_demo(folder, potential, *, seed, tell):
        calls.append((folder, potential, seed))
        tell("hello")

    monkeypatch.setattr(ase_uq.demo, "run_demo", run_demo)
    return calls


def test_options_reach_the_library(run, asked):
    result = run("demo")
    assert (result.exit_code, result.stdout, result.stderr) == (0, "hello\n", "")
    run("demo", "--out", "there", "--potential", "orb-direct", "--seed", 3)
    assert asked == [(Path("ase_uq_demo"), "mace", 0), (Path("there"), "orb-direct", 3)]


def test_an_unknown_potential_is_wrong_usage(run, asked):
    result = run("demo", "--potential", "orb")
    assert result.exit_code == 2
    assert "orb-direct" in result.stderr
    assert not asked


def test_what_is_missing_is_one_line(run, monkeypatch):
    def run_demo(*_, **__):
        raise MissingDependency("the demo needs tblite")

    monkeypatch.setattr(ase_uq.demo, "run_demo", run_demo)
    result = run("demo")
    assert (result.exit_code, result.stderr) == (1, "error: the demo needs tblite\n")
