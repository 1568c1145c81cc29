import json

from ase_uq import UncertaintyModel


def test_info_is_the_summary(run, files):
    result = run("info", files.uq)
    assert (result.exit_code, result.stderr) == (0, "")
    model = UncertaintyModel.load(files.uq)
    assert result.stdout == model.summary() + "\n"
    assert run("info", files.uq, "--details").stdout == model.summary(details=True) + "\n"
    assert json.loads(run("info", files.uq, "--json").stdout) == model.numbers()


def test_what_is_no_uncertainty_model(run, files):
    missing, other = run("info", "no.safetensors"), run("info", files.train)
    assert (missing.exit_code, missing.stderr) == (1, "error: there is no file no.safetensors.\n")
    assert other.exit_code == 1
    assert "An ase_uq uncertainty model was expected" in other.stderr
