import sys

import numpy as np
import pytest
from ase.io import read, write

from ase_uq import Predictor, UncertainCalculator, UncertaintyModel, read_frames


@pytest.fixture
def score(run, files):
    def score(*words, frames=files.test, out="out.xyz"):
        return run("score", frames, "--model", "toy:", "--uq", files.uq, "--out", out, *words)

    return score


def test_frames_come_back_with_the_calculators_results(score, files, tmp_path):
    result = score("--batch-atoms", 20)
    assert result.exit_code == 0
    scored, frames = read_frames("out.xyz"), read(files.test, ":")
    assert len(scored) == len(frames)
    calculator = UncertainCalculator("toy:", files.uq)
    for atoms, original in zip(scored, frames, strict=True):
        calculator.calculate(original)
        for key in ("energy", "forces", "energy_uncertainty", "forces_uncertainty", "gamma"):
            np.testing.assert_allclose(atoms.calc.results[key], calculator.results[key], rtol=1e-7, atol=1e-8)
        np.testing.assert_allclose(atoms.arrays["REF_forces"], original.arrays["REF_forces"], atol=1e-8)
    assert [path.name for path in tmp_path.iterdir()] == ["out.xyz"]


def test_the_summary_names_the_worst_atom(score):
    result = score()
    norms = [np.linalg.norm(atoms.arrays["forces_uncertainty"], axis=1) for atoms in read("out.xyz", ":")]
    worst = int(np.argmax([values.max() for values in norms]))
    assert result.stdout.startswith("25 frames, 225 atoms in ")
    assert f"{norms[worst].max():.3g} eV/Å in frame {worst}, atom {norms[worst].argmax()} (" in result.stdout
    assert len(result.stdout.splitlines()) == 1


def test_any_format_of_ase_is_read(score, files):
    write("in.traj", read(files.test, ":3"))
    assert score(frames="in.traj").exit_code == 0
    assert len(read("out.xyz", ":")) == 3


def test_hdf5_by_the_ending_of_the_name(score, files, run):
    assert score("--batch-atoms", 20).exit_code == 0
    result = score("--batch-atoms", 20, out="out.h5")
    assert result.exit_code == 0
    assert "written to out.h5" in result.stdout
    for ours, text in zip(read_frames("out.h5"), read_frames("out.xyz"), strict=True):
        assert ours.info["energy_uncertainty"] == text.info["energy_uncertainty"]
        np.testing.assert_allclose(ours.get_forces(), text.get_forces(), rtol=0, atol=1e-8)
    chosen = run("select", "out.h5", "--n", 2, "--uq", files.uq, "--out", "chosen.xyz")
    assert chosen.exit_code == 0
    assert len(read("chosen.xyz", ":")) == 2


def test_hdf5_needs_h5py(score, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    result = score(out="out.h5")
    assert result.exit_code == 1
    assert (
        'error: files in HDF5 (.h5) need h5py, which is not installed. Run: pip install "ase-uq[hdf5]"' in result.stderr
    )
    assert not list(tmp_path.iterdir())


def test_an_existing_file_is_kept_unless_told(score, tmp_path):
    (tmp_path / "out.xyz").write_text("precious")
    refused = score()
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: out.xyz exists. Give another name, or --overwrite to replace it.\n",
    )
    assert (tmp_path / "out.xyz").read_text() == "precious"
    assert score("--overwrite").exit_code == 0
    assert len(read("out.xyz", ":")) == 25


def test_a_damaged_frame_is_named_and_the_rest_is_kept(score, files, tmp_path):
    text = files.test.read_text()
    (tmp_path / "in.xyz").write_text(text[: len(text) // 2])
    result = score("--batch-atoms", 9, "--csv", "numbers.csv", frames="in.xyz")
    assert result.exit_code == 0
    assert "warning: frame 12 was left out: it is truncated: " in result.stderr
    assert "; 1 frame was left out" in result.stdout
    assert [atoms.info["source_frame"] for atoms in read("out.xyz", ":")] == list(range(12))
    assert len((tmp_path / "numbers.csv").read_text().splitlines()) == 14
    assert {path.name for path in tmp_path.iterdir()} == {"in.xyz", "out.xyz", "numbers.csv"}


def test_what_was_interrupted_goes_on_with_the_same_command(score, tmp_path, monkeypatch):
    real, calls = Predictor.predictions, []

    def interrupted(self, frames, **options):
        calls.append(frames)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return real(self, frames, **options)

    monkeypatch.setattr(Predictor, "predictions", interrupted)
    result = score("--batch-atoms", 27)
    assert result.exit_code != 0
    assert (
        "stopped early: the frames scored so far are in out.xyz.part; the same command goes on from there."
        in result.stderr
    )
    assert not (tmp_path / "out.xyz").exists()
    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    result = score("--batch-atoms", 27)
    assert result.exit_code == 0
    assert "frames were scored by an interrupted run" in result.stdout
    assert [atoms.info["source_frame"] for atoms in read("out.xyz", ":")] == list(range(25))
    assert [path.name for path in tmp_path.iterdir()] == ["out.xyz"]


def test_the_csv_file_is_kept_unless_told(score, tmp_path):
    (tmp_path / "numbers.csv").write_text("precious")
    refused = score("--csv", "numbers.csv")
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: numbers.csv exists. Give another name, or --overwrite to replace it.\n",
    )
    assert score("--csv", "numbers.csv", "--overwrite").exit_code == 0
    assert len((tmp_path / "numbers.csv").read_text().splitlines()) == 26


def test_frames_that_cannot_be_evaluated(score, files, tmp_path):
    frames = read(files.test, ":2")
    frames[0].numbers[0] = frames[1].numbers[0] = 79
    write("in.xyz", frames)
    result = score(frames="in.xyz")
    assert result.exit_code == 1
    assert "error: none of the 2 frames of in.xyz could be scored. Frame 0: structure 0 (" in result.stderr
    assert "which the potential does not know" in result.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"in.xyz"}


def test_a_structure_is_named_by_its_number_in_the_file(score, files):
    frames = read(files.test, ":7")
    frames[5].numbers[0] = 79
    write("in.xyz", frames)
    assert "structure 5 (" in score("--batch-atoms", 18, frames="in.xyz").stderr


def test_an_element_that_was_not_fitted_is_one_warning(score, files):
    frames = read(files.test, ":3")
    for atoms in frames:
        atoms.symbols[0] = "Si"
    write("in.xyz", frames)
    result = score("--batch-atoms", 9, frames="in.xyz")
    assert result.exit_code == 0
    assert result.stderr.count("warning: the uncertainty model was fitted without Si") == 1
    assert np.isinf(read("out.xyz", "0").arrays["gamma"][0])


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        ({"frames": "no.xyz"}, 1, "error: there is no file no.xyz."),
        ({"frames": "empty.xyz"}, 1, "empty.xyz"),
        ({"out": "no/out.xyz"}, 1, "error: cannot write no/out.xyz"),
        ({"out": "out.traj"}, 2, "ends in .xyz or .extxyz for extended XYZ, or in .h5 or .h5md for HDF5"),
    ],
)
def test_bad_files(score, tmp_path, words, code, part):
    (tmp_path / "empty.xyz").touch()
    result = score(**words)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.replace("│", "").split())
    assert {path.name for path in tmp_path.iterdir()} == {"empty.xyz"}


def test_uq_is_needed_unless_embedded(run, files):
    result = run("score", files.test, "--model", "toy:", "--out", "out.xyz")
    assert result.exit_code == 2
    assert "--uq" in result.stderr


def test_another_potential_is_refused(run, files):
    result = run("score", files.test, "--model", "toy:direct", "--uq", files.uq, "--out", "out.xyz")
    assert result.exit_code == 1
    assert "the uncertainty model was fitted on another potential: direct was False, here it is True" in result.stderr


def test_a_function_that_returns_a_calculator(run, files, tmp_path):
    (tmp_path / "mine.py").write_text(
        "from ase_uq.backends.toy import ToyCalculator\n\ndef toy(device, dtype='float64'):\n"
        "    return ToyCalculator(device=device, dtype=dtype)\n"
    )
    words = ["score", files.test, "--model", "mine.py:toy", "--uq", files.uq, "--device", "cpu"]
    assert run(*words, "--out", "out.xyz").exit_code == 0
    assert run(*words, "--dtype", "float32", "--out", "single.xyz").exit_code == 0
    double, single = (read(name, "0").arrays["forces_uncertainty"] for name in ("out.xyz", "single.xyz"))
    np.testing.assert_allclose(single, double, rtol=1e-3)


def test_the_model_of_the_file_is_used(score, files):
    assert score().exit_code == 0
    std = read("out.xyz", "0").info["energy_uncertainty"]
    assert std > 0
    assert "energy" in UncertaintyModel.load(files.uq).methods["bll"].calibrators


def test_several_files_and_parts_follow_one_another(run, files):
    words = ("--model", "toy:", "--uq", files.uq, "--out", "out.xyz")
    result = run("score", f"{files.test}@:3", files.test, f"{files.test}@-1", *words)
    assert result.exit_code == 0
    frames = read(files.test, ":")
    expected = [*frames[:3], *frames, frames[-1]]
    scored = read_frames("out.xyz")
    assert [atoms.info["source_frame"] for atoms in scored] == list(range(29))
    for atoms, original in zip(scored, expected, strict=True):
        np.testing.assert_allclose(atoms.positions, original.positions, atol=1e-8)


def test_every_input_must_be_there_and_none_is_overwritten(run, files, tmp_path):
    words = ("--model", "toy:", "--uq", files.uq)
    missing = run("score", files.test, "none.xyz@:3", *words, "--out", "out.xyz")
    assert (missing.exit_code, missing.stderr) == (1, "error: there is no file none.xyz.\n")
    write("b.xyz", read(files.test, ":2"))
    same = run("score", files.test, "b.xyz@:1", *words, "--out", "b.xyz", "--overwrite")
    assert same.exit_code == 1
    assert same.stderr.startswith("error: b.xyz is the input: it would be overwritten.")


def test_a_frame_that_cannot_be_evaluated_is_named_with_its_file(run, files):
    frames = read(files.test, ":4")
    frames[1].positions[1] = frames[1].positions[0]
    write("b.xyz", frames)
    result = run("score", f"{files.test}@:3", "b.xyz", "--model", "toy:", "--uq", files.uq, "--out", "out.xyz")
    assert result.exit_code == 0
    (told,) = [line for line in result.stderr.splitlines() if "was left out" in line]
    assert "frame 4 was left out: the potential gives numbers that are not finite" in told
    assert told.endswith("(frame 1 of b.xyz)")
