import json
import warnings

import numpy as np
import pytest
from ase.io import read, write

from ase_uq import UncertainCalculator, UQWarning, fit, propagation, read_frames


@pytest.fixture
def score(run, files):
    def score(*words, frames=files.test, out="scored.xyz"):
        return run("score", frames, "--model", "toy:", "--uq", files.uq, "--out", out, *words)

    return score


@pytest.fixture
def scored(score):
    assert score("--ensemble", 8).exit_code == 0
    return "scored.xyz"


@pytest.fixture
def quiet(tmp_path):
    """Frames whose members hardly differ: all of them count."""
    frames = read_frames("scored.xyz")
    for number, atoms in enumerate(frames):
        atoms.info["note"] = 0.5 * number
        energy, members = atoms.calc.results["energy"], atoms.calc.results["energy_ensemble"]
        atoms.calc.results["energy_ensemble"] = atoms.info["energy_ensemble"] = energy + 1e-3 * (members - energy)
    from ase_uq import write_frames

    write_frames(tmp_path / "quiet.xyz", frames)
    return "quiet.xyz"


def test_score_writes_members_that_a_calculator_gives(scored, files):
    calculator = UncertainCalculator("toy:", files.uq, ensemble=8)
    for atoms, original in zip(read_frames(scored), read(files.test, ":"), strict=True):
        calculator.calculate(original)
        expected = calculator.results["energy_ensemble"]
        np.testing.assert_allclose(atoms.calc.results["energy_ensemble"], expected, rtol=0, atol=1e-7)


def test_the_average_is_the_librarys(run, scored, quiet):
    frames = read_frames(quiet)
    for words, values in (
        (("--distance", 0, 1), [atoms.get_distance(0, 1) for atoms in frames]),
        (("--value", "note"), [atoms.info["note"] for atoms in frames]),
        (("--value", "energy"), "energy"),
    ):
        for by in ("cumulant", "reweighted"):
            result = run("average", quiet, "--temperature", 300, *words, "--by", by, "--json")
            assert result.exit_code == 0, result.stderr
            found = json.loads(result.stdout)
            expected = propagation.average(frames, values, 300, by=by)
            assert found["value"] == pytest.approx(float(expected.value))
            assert found["std"] == pytest.approx(float(expected.std))
            assert found["effective_frames"] == pytest.approx(expected.effective_frames)
            assert found["n_frames"] == len(frames)
    result = run("average", quiet, "--temperature", 300, "--distance", 0, 1)
    assert result.stdout.startswith("distance of atoms 0 and 1: ")
    assert " Å at 300 K; " in result.stdout
    assert " of 25 frames count" in result.stdout
    result = run("average", quiet, "--temperature", 300, "--value", "energy")
    assert result.stdout.startswith("energy: ")
    assert " eV at 300 K; " in result.stdout


def test_members_that_differ_too_much_are_refused(run, scored):
    result = run("average", scored, "--temperature", 300, "--distance", 0, 1)
    assert result.exit_code == 1
    assert "25 frames would count, and at least 10 must" in result.stderr


def test_another_uncertainty_model_is_refused(run, score, scored, files, tmp_path):
    frames = read(scored, ":")
    frames[3].info["ensemble_of"] = "another"
    write(tmp_path / "mixed.xyz", frames)
    result = run("average", "mixed.xyz", "--temperature", 300, "--distance", 0, 1)
    assert result.exit_code == 1
    assert "frame 3 has members of another uncertainty model (another) than frame 0 (" in result.stderr


def test_the_note_stays_in_files_that_are_written_again(scored, tmp_path):
    from ase_uq import write_frames

    frames = read_frames(scored)
    noted = frames[0].info["ensemble_of"]
    write_frames(tmp_path / "again.xyz", frames)
    assert {atoms.info["ensemble_of"] for atoms in read_frames("again.xyz")} == {noted}
    mixed = read_frames("again.xyz")
    mixed[0].info.pop("ensemble_of")  # of a calculator, say: nobody knows whether it is another
    propagation.difference((1, mixed[0]), (-1, mixed[1]))


def test_the_note_goes_with_the_members(score, scored):
    assert score(frames=scored, out="plain.xyz").exit_code == 0
    assert "ensemble_of" not in read("plain.xyz").info


def test_an_interrupted_run_with_another_number_of_members_does_not_go_on(score, monkeypatch):
    from ase_uq.scoring.journal import Journal

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "finish", killed)
        assert score("--ensemble", 8).exit_code != 0
    result = score("--ensemble", 16)
    assert result.exit_code == 1
    assert "number of members" in result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "either --distance I J or --value KEY"),
        (("--distance", 0, 1, "--value", "a"), "either --distance I J or --value KEY"),
        (("--value", "phase"), "frame 0 has no number 'phase' in its info (None). Numbers there: "),
        (("--distance", 0, 40), "atoms 0 and 40 of frame 0, which has 9, have no distance"),
        (("--distance", 2, 2), "have no distance: give the numbers of two different atoms"),
    ],
)
def test_bad_words(run, scored, words, message):
    result = run("average", scored, "--temperature", 300, *words)
    assert result.exit_code in (1, 2)
    assert message in " ".join(result.stderr.replace("│", " ").split())


def test_a_model_without_a_posterior_is_refused_before_anything_is_scored(run, files, tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UQWarning)
        frames = [read(path, ":20") for path in (files.train, files.calibration)]
        fit("toy:", *frames, methods=["kernel"], progress=False).save(tmp_path / "kernel.uq.safetensors")
    words = ["--model", "toy:", "--uq", "kernel.uq.safetensors", "--out", "scored.xyz", "--ensemble", 8]
    result = run("score", files.test, *words)
    assert result.exit_code == 1
    assert "none of kernel has one with calibrated energies. Fit 'bll'" in " ".join(result.stderr.split())
    assert not (tmp_path / "scored.xyz").exists()


@pytest.mark.parametrize("wrong", [2, -1])
def test_other_numbers_of_members_are_refused(score, wrong):
    result = score("--ensemble", wrong)
    assert result.exit_code == 1
    assert f"ensemble={wrong} is not a whole number of 4 or more" in result.stderr


def test_no_members_are_refused(run, score):
    assert score().exit_code == 0
    result = run("average", "scored.xyz", "--temperature", 300, "--distance", 0, 1)
    assert result.exit_code == 1
    assert "frame 0 has no energy_ensemble of its own" in result.stderr
    for kelvin in ("0", "inf"):
        result = run("average", "scored.xyz", "--temperature", kelvin, "--distance", 0, 1)
        assert "lies above 0 K, not at" in result.stderr
