import csv
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from ase.io import read, write

from ase_uq import UncertainCalculator, embedded, evaluate, report

pytestmark = pytest.mark.usefixtures("few_resamples")


@pytest.fixture
def judge(run, files):
    def judge(*words, frames=files.test):
        return run("evaluate", frames, "--model", "toy:", "--uq", files.uq, *words)

    return judge


def rows(path: str) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_the_table_and_the_csv_are_the_librarys(judge, files, tmp_path):
    result = judge("--tolerance", 0.2, "--block", 5, "--csv", "scores.csv", "--seed", 3)
    assert result.exit_code == 0
    expected = evaluate(
        UncertainCalculator("toy:", files.uq), files.test, tolerance=0.2, block=5, seed=3, progress=False
    )
    written = f"{len(expected.scores)} numbers written to scores.csv\n"
    assert result.stdout == f"{written}{expected.table()}\n\n{expected.describe()}\n"
    expected.to_csv("expected.csv")
    assert (tmp_path / "scores.csv").read_text() == (tmp_path / "expected.csv").read_text()


def test_scored_frames_need_no_potential(run, judge, files):
    assert run("score", files.test, "--model", "toy:", "--uq", files.uq, "--out", "scored.xyz").exit_code == 0
    result = run("evaluate", "scored.xyz", "--uq", files.uq, "--json")
    assert result.exit_code == 0
    found, expected = (json.loads(one.stdout) for one in (result, judge("--json")))
    assert found["n_frames"] == expected["n_frames"]
    assert len(found["scores"]) == len(expected["scores"])
    result = run("evaluate", "scored.xyz")
    assert result.exit_code == 2
    assert "give the potential, or only --uq for frames that" in " ".join(result.stderr.replace("│", " ").split())


def test_numbers_for_programs(judge, files):
    result = judge("--json", "--csv", "scores.csv")
    found = json.loads(result.stdout)
    assert found["n_frames"] == 25
    assert len(found["scores"]) == len(rows("scores.csv"))
    assert found["verdict"][-1].startswith("Next: ")
    assert "numbers written to scores.csv" in result.stderr


def test_nothing_is_written_unless_asked_for(judge, tmp_path):
    assert judge().exit_code == 0
    assert not list(tmp_path.iterdir())


def test_figures(judge, tmp_path):
    pytest.importorskip("matplotlib").use("Agg")
    result = judge("--plots", "new/figures")
    assert result.exit_code == 0
    written = {path.name for path in (tmp_path / "new" / "figures").iterdir()}
    assert written == {
        "forces_reliability.png",
        "forces_errors.png",
        "energy_per_atom_reliability.png",
        "energy_per_atom_errors.png",
        "far_field.png",
    }
    for name in written:
        assert (tmp_path / "new" / "figures" / name).read_bytes().startswith(b"\x89PNG")
        assert str(Path("new/figures") / name) in result.stdout


def test_on_an_embedded_potential(run, tmp_path):
    write("test.xyz", read(embedded.path("test_300K.xyz"), ":60"))
    result = run("evaluate", "test.xyz", "--model", "embedded:mace", "--block", 5, "--csv", "scores.csv")
    assert result.exit_code == 0
    assert "60 frames" in result.stdout
    found = {(row["quantity"], row["element"], row["metric"]): row for row in rows("scores.csv")}
    assert {element for _, element, _ in found} == {"all", "H", "C", "O"}
    # Frames like those it was calibrated on.
    assert float(found["forces", "all", "mean_squared_z"]["value"]) == pytest.approx(1, abs=0.5)
    score, ceiling = (found["forces", "all", metric]["value"] for metric in ("spearman", "attainable_spearman"))
    assert 0.3 < float(score) < float(ceiling) + 0.1
    assert found["forces", "all", "rmse"]["n"] == "540"
    assert {path.name for path in tmp_path.iterdir()} == {"test.xyz", "scores.csv"}


def test_frames_without_labels(judge, files):
    frames = read(files.test, ":")
    for atoms in frames[:4]:
        atoms.info.clear()
        del atoms.arrays["REF_forces"]
    write("in.xyz", frames)
    result = judge(frames="in.xyz")
    assert result.exit_code == 0
    assert result.stderr.count("warning: of 25 test frames 4 have no labels and were left out") == 1
    assert "21 frames" in result.stdout
    write("in.xyz", frames[:4])
    refused = judge(frames="in.xyz")
    assert refused.exit_code == 1
    assert "error: none of the 4 test frames has reference energies or forces" in refused.stderr


def test_other_names_of_labels(judge, files):
    frames = read(files.test, ":")
    for atoms in frames:
        atoms.info["E"] = atoms.info.pop("REF_energy")
        atoms.set_array("F", atoms.arrays.pop("REF_forces"))
    write("in.xyz", frames)
    result = judge("--energy-key", "E", "--forces-key", "F", "--csv", "a.csv", frames="in.xyz")
    assert result.exit_code == 0
    assert judge("--csv", "b.csv").exit_code == 0
    values = [[float(row["value"]) for row in rows(name)] for name in ("a.csv", "b.csv")]
    np.testing.assert_allclose(*values, rtol=1e-5)


def test_what_score_wrote_is_not_labelled(judge, run, files):
    frames = read(files.test, ":5")
    for atoms in frames:
        atoms.info.clear()
        del atoms.arrays["REF_forces"]
    write("in.xyz", frames)
    assert run("score", "in.xyz", "--model", "toy:", "--uq", files.uq, "--out", "out.xyz").exit_code == 0
    result = judge(frames="out.xyz")
    assert result.exit_code == 1
    assert "error: the labels are the potential's own forces" in result.stderr


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--csv", "no/scores.csv"], 1, "error: cannot write no/scores.csv"),
        (["--csv", "."], 1, "error: cannot write .: it is a folder"),
        (["--plots", "file"], 1, "error: file is a file. Give --plots a folder"),
        (["--tolerance", "-1"], 1, "error: the tolerance is -1.0 eV/Å"),
        (["--block", "0"], 2, "--block"),
    ],
)
def test_bad_options(judge, tmp_path, words, code, part):
    (tmp_path / "file").touch()
    result = judge(*words)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.split())
    assert {path.name for path in tmp_path.iterdir()} == {"file"}


def test_bad_frames(judge, tmp_path):
    result = judge(frames="no.xyz")
    assert result.exit_code == 1
    assert "error: test frames: there is no file no.xyz." in result.stderr


def test_uq_is_needed_unless_embedded(run, files):
    result = run("evaluate", files.test, "--model", "toy:")
    assert result.exit_code == 2
    assert "--uq" in result.stderr


def test_without_matplotlib_it_is_told_before_the_work(judge, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("axes", "plots"):
        monkeypatch.delitem(sys.modules, f"ase_uq.report.{name}", raising=False)
    monkeypatch.delattr(report, "plots", raising=False)
    result = judge("--plots", "figures")
    assert result.exit_code == 1
    assert 'pip install "ase-uq[report]"' in result.stderr
    assert not list(tmp_path.iterdir())
