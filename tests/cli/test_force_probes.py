"""`--force-probes` reaches the calculator of every verb that asks one for its forces."""

import warnings

import pytest
from ase.io import read

from ase_uq import UncertainCalculator, UncertaintyModel, fit, read_frames
from ase_uq.errors import UQWarning
from ase_uq.methods.bll.method import BLL

pytestmark = pytest.mark.filterwarnings("ignore:bll takes further backward passes:ase_uq.errors.UQWarning")


@pytest.fixture(scope="module")
def exact(files, tmp_path_factory):
    path = tmp_path_factory.mktemp("exact") / "exact.uq.safetensors"
    train, calibration = (read(source, ":10") for source in (files.train, files.calibration))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        fit("toy:", train, calibration, methods=[BLL(conservative="exact")], progress=False).save(path)
    return path


def expected(exact, atoms, force_probes):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        calculator = UncertainCalculator("toy:", UncertaintyModel.load(exact), force_probes=force_probes)
    return calculator.get_property("forces_uncertainty", atoms)


@pytest.mark.parametrize("verb", ["score", "md", "relax"])
def test_uncertainties_are_those_of_so_many_probes(run, files, exact, verb):
    words = {
        "score": [files.start, "--out", "out.xyz"],
        "md": [files.start, "--temperature", 10, "--steps", 1, "--halt", 1e6, "--trajectory", "out.xyz"],
        "relax": [files.start, "--out", "out.xyz", "--steps", 1],
    }
    result = run(verb, *words[verb], "--model", "toy:", "--uq", exact, "--force-probes", 4)
    assert result.exit_code == (1 if verb == "relax" else 0), result.stderr  # out of steps
    atoms = read_frames("out.xyz")[-1]
    found = atoms.calc.results["forces_uncertainty"]
    assert found == pytest.approx(expected(exact, atoms, 4), rel=1e-4, abs=1e-6)
    assert found != pytest.approx(expected(exact, atoms, 0), rel=1e-2)


@pytest.mark.parametrize("verb", ["md", "relax"])
def test_without_an_exact_posterior_they_are_refused(run, files, verb):
    words = {"md": ["--temperature", 10, "--steps", 1, "--halt", 1], "relax": ["--out", "out.xyz"]}
    result = run(verb, files.start, "--model", "toy:", "--uq", files.uq, "--force-probes", 4, *words[verb])
    assert result.exit_code == 1
    assert "force_probes=4, but no method of this model (bll) has an exact posterior" in result.stderr
