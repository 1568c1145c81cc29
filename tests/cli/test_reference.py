import numpy as np
from ase.io import read

from ase_uq import UncertaintyModel
from ase_uq.backends import load_backend
from ase_uq.engines.ase.calculator import UncertainCalculator
from ase_uq.sampling.reference_runs import reference_runs
from ase_uq.thresholds.criteria import FalseAlarms

SHORT = ["--temperature", 300, "--runs", 10, "--ps", 0.01, "--timestep", 1, "--equilibration", 0.005]


def test_the_model_it_writes_carries_the_runs_of_the_library(run, files, tmp_path):
    out = tmp_path / "with.uq.safetensors"
    result = run("reference", files.start, "--model", "toy:", "--uq", files.uq, *SHORT, "--out", out, "--seed", 2)
    assert result.exit_code == 0
    found = UncertaintyModel.load(out)
    atoms = read(files.start)
    atoms.calc = UncertainCalculator(load_backend("toy:"), files.uq)
    expected = reference_runs(
        atoms, temperature=300, n_runs=10, ps=0.01, timestep=1, equilibration=0.005, seed=2, progress=False
    )
    assert found.reference is not None
    np.testing.assert_allclose(np.array(found.reference.readings), np.array(expected.readings), rtol=1e-6)
    assert found.threshold(FalseAlarms(per_run=0.1, ps=0.01)) > 0
    assert "10 runs of 10 readings, C2H6O, Langevin 300 K; written to" in result.stdout
    assert "eV/Å by FalseAlarms(per_run=0.1, ps=0.01): at most 0.1 of runs" in result.stdout
    assert "FalseAlarms(per_run=0.05, ps=0.01) needs at least 30 independent excursions" in result.stdout
    told = "10 runs of 15 steps, 10 at a time: about 1 s; fewer --runs or a shorter --ps take less\n"
    assert result.stderr == told


def test_the_same_file_may_be_written(run, files, tmp_path):
    own = tmp_path / "own.uq.safetensors"
    own.write_bytes(files.uq.read_bytes())
    result = run("reference", files.start, "--model", "toy:", "--uq", own, *SHORT, "--out", own)
    assert result.exit_code == 0
    assert UncertaintyModel.load(own).reference is not None


def test_a_length_that_is_none_is_a_line(run, files):
    words = ["reference", files.start, "--model", "toy:", "--uq", files.uq, "--out", "a.st"]
    result = run(*words, "--temperature", 300, "--ps", 0)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr == "error: ps of reference runs must be a positive number, not 0.0.\n"


def test_a_folder_that_is_not_there_is_told_before_the_runs(run, files):
    words = ["reference", files.start, "--model", "toy:", "--uq", files.uq, "--temperature", 300]
    result = run(*words, "--out", "no/a.uq.safetensors")
    assert result.exit_code == 1
    assert result.stderr.startswith("error: cannot write no/a.uq.safetensors:")


def test_runs_are_added_and_read_as_asked(run, files, tmp_path):
    words = ["reference", files.start, "--model", "toy:", *SHORT, "--reduce", "top3"]
    assert run(*words, "--uq", files.uq, "--out", "a.st").exit_code == 0
    result = run(*words, "--uq", "a.st", "--out", "a.st", "--add")
    assert result.exit_code == 0
    found = UncertaintyModel.load(tmp_path / "a.st").reference
    assert found is not None
    assert len(found.readings) == len({run.tobytes() for run in found.readings}) == 20
    assert found.reduction.kind == "top3"
    other = run(*words[:-2], "--uq", "a.st", "--out", "a.st", "--add")
    assert other.exit_code == 1
    assert "error: these runs cannot be added to those made before: the reduction was" in other.stderr
