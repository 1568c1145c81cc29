import csv

import matplotlib as mpl
import numpy as np
import pytest
import typer
from ase.io import read
from typer.testing import CliRunner

mpl.use("Agg")

from ase_uq import (
    Quantile,
    UncertainCalculator,
    UncertaintyModel,
    UQWarning,
    read_frames,
    report,
    score,
    write_frames,
)
from ase_uq.cli.console import ErrorsAsLines
from ase_uq.cli.verbs.report import report as verb

app = typer.Typer(cls=ErrorsAsLines)
app.command("report")(verb)


@app.callback()
def _() -> None: ...


@pytest.fixture(scope="module")
def scored(files, tmp_path_factory):
    """Labelled frames with the uncertainties of the fitted model, as `ase-uq score` writes them."""
    from ase_uq.io.results import annotated

    frames = read(files.test, ":")
    predictions = UncertainCalculator("toy:", files.uq).predictor.predict(frames)
    path = tmp_path_factory.mktemp("scored") / "scored.xyz"
    write_frames(path, [annotated(a, p.results) for a, p in zip(frames, predictions, strict=True)])
    return path


@pytest.fixture
def tell(scored, files, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def tell(*words, frames=scored, uq=("--uq", files.uq)):
        result = CliRunner().invoke(app, ["report", *map(str, (frames, *uq, *words))], catch_exceptions=False)
        assert "Traceback" not in result.stderr
        return result

    return tell


def test_a_page_and_its_pictures(tell, tmp_path, files):
    result = tell("--flag", "q0.9", "--halt", 9)
    assert result.exit_code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "report_figures"}
    pictures = {path.name for path in (tmp_path / "report_figures").iterdir()}
    assert {"uncertainty.png", "reliability.png", "errors.png"} < pictures
    assert result.stdout.startswith("25 frames, 225 atoms")
    assert f"Page written to report.html, {len(pictures)} pictures to report_figures" in result.stdout
    text = (tmp_path / "report.html").read_text("utf-8")
    assert f"{UncertaintyModel.load(files.uq).threshold(Quantile(0.9)).describe()}" in text
    assert "Where the frames lie" not in text


@pytest.mark.usefixtures("blank_pictures")
def test_the_latent_map_and_other_places(tell, tmp_path, files):
    result = tell(
        *("--model", "toy:", "--train", files.train, "--calibration", files.calibration),
        *("--out", "page.html", "--plots", "a/b", "--reduce", "mean"),
    )
    assert result.exit_code == 0
    assert (tmp_path / "a" / "b" / "latent_map.png").read_bytes().startswith(b"\x89PNG")
    text = (tmp_path / "page.html").read_text("utf-8")
    assert "Principal components of 25 scored frames among 60 training and 120 calibration frames." in text
    assert "The reading of a frame is the mean uncertainty of its atoms" in text


@pytest.mark.usefixtures("blank_pictures")
def test_labels_of_other_names(tell, tmp_path, scored):
    frames = read_frames(scored)
    for atoms in frames:
        atoms.set_array("dft", atoms.arrays["REF_forces"])
        del atoms.arrays["REF_forces"], atoms.info["REF_energy"]
    write_frames("in.xyz", frames)
    for words, shown in (((), False), (("--forces-key", "dft"), True)):
        assert tell(*words, frames="in.xyz").exit_code == 0
        assert ("Are forces and uncertainties right?" in (tmp_path / "report.html").read_text("utf-8")) == shown


@pytest.mark.usefixtures("blank_pictures")
def test_a_damaged_frame_is_named_and_left_out(tell, tmp_path, scored):
    lines = scored.read_text().splitlines(keepends=True)
    lines[11 * 3 + 5] = "C not a number\n"  # 9 atoms and two lines of heading
    (tmp_path / "in.xyz").write_text("".join(lines))
    result = tell(frames="in.xyz")
    assert result.exit_code == 0
    assert "warning: frame 3 of in.xyz is left out" in result.stderr
    assert result.stdout.startswith("24 frames")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "as in the frames of this report, from 0; 1 of the first 25 frames is not here" in text


@pytest.mark.usefixtures("blank_pictures")
def test_predict_and_report_name_the_same_frames(tell, tmp_path, files):
    frames = read(files.test, ":")
    frames[3].positions[0] = np.nan
    calculator = UncertainCalculator("toy:", files.uq)
    with pytest.warns(UQWarning, match="frame 3 was left out"):
        score(frames, calculator, out="scored.xyz", csv="scored.csv", progress=False)
    with open("scored.csv") as file:
        readings = {int(row["frame"]): float(row["force_uncertainty_max"] or 0) for row in csv.DictReader(file)}
    worst = max(readings, key=lambda number: readings[number])
    assert worst > 3
    assert tell(frames="scored.xyz").exit_code == 0
    assert (tmp_path / "report_figures" / f"frame_{worst}.png").exists()
    text = (tmp_path / "report.html").read_text("utf-8")
    assert f"<small>frame {worst}</small>" in text
    assert "as in the trajectory that was scored, from 0; 1 of the first 25 frames is not here" in text


@pytest.mark.usefixtures("blank_pictures")
def test_a_second_report_replaces_the_pictures_of_the_first_and_touches_no_other_file(tell, tmp_path, scored):
    folder = tmp_path / "report_figures"
    assert tell().exit_code == 0
    (folder / "notes.txt").touch()
    write_frames("in.xyz", read_frames(scored)[:1])
    assert tell(frames="in.xyz").exit_code == 0
    names = {path.name for path in folder.iterdir()}
    assert {name for name in names if name.startswith("frame")} == {"frame_0.png"}
    assert "notes.txt" in names
    (folder / "frame_0.png").write_bytes(b"mine")
    again = tell(frames="in.xyz")
    assert again.exit_code == 1
    assert "error: report_figures/frame_0.png is not a picture that `ase-uq` wrote" in again.stderr
    assert (folder / "frame_0.png").read_bytes() == b"mine"


def test_frames_without_uncertainties(tell, files, tmp_path):
    result = tell(frames=files.test)
    assert result.exit_code == 1
    assert "error: none of the 25 frames carries forces_uncertainty" in result.stderr
    assert "ase-uq score" in result.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("words", "code", "part"),
    [
        (["--out", "no/report.html"], 1, "error: cannot write no/report.html"),
        (["--out", "report.txt"], 2, "give a name that ends in .html"),
        (["--plots", "file/a/b"], 1, "error: cannot write file/a: Not a directory"),
        (["--plots", "file"], 1, "error: file is a file, where a folder for pictures was expected"),
        (["--flag", "0.5", "--halt", "0.4"], 2, "flag is 0.5 eV/Å and halt is 0.4 eV/Å, so no frame lies between"),
        (["--flag", "q0.5", "--halt", "0.0001"], 1, "no frame lies between"),
        (["--halt", "alarms=0.05@100ps"], 1, "runs"),
        (["--train", "train.xyz"], 2, "needs the potential: give --model too"),
        (["--model", "toy:", "--train", "train.xyz"], 1, "error: training frames: there is no file train.xyz."),
    ],
)
def test_bad_options(tell, tmp_path, words, code, part):
    (tmp_path / "file").touch()
    result = tell(*words)
    assert result.exit_code == code
    assert part in " ".join(result.stderr.replace("│", " ").split())
    assert not (tmp_path / "report.html").exists()


def test_bad_files(tell, tmp_path):
    (tmp_path / "empty.xyz").touch()
    (tmp_path / "half.uq").write_bytes(b"half")
    for settings, part in (
        ({"frames": "no.xyz"}, "there is no file no.xyz"),
        ({"frames": "empty.xyz"}, "empty.xyz is empty"),
        ({"uq": ("--uq", "no.uq")}, "there is no file no.uq"),
        ({"uq": ("--uq", "half.uq")}, "half.uq cannot be read as safetensors"),
    ):
        result = tell(**settings)
        assert result.exit_code == 1
        assert part in result.stderr
    missing = tell(uq=())
    assert missing.exit_code == 2
    assert "give the uncertainty model that the frames were scored with" in " ".join(
        missing.stderr.replace("│", " ").split()
    )


@pytest.mark.usefixtures("blank_pictures")
def test_another_potential_is_refused(tell):
    result = tell("--model", "embedded:mace")
    assert result.exit_code == 1
    assert "this potential is for H, C, O: another potential" in result.stderr


def test_without_matplotlib_it_is_told_before_the_work(tell, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("axes", "plots", "pictures", "along", "quality", "sections", "page"):
        monkeypatch.delitem(sys.modules, f"ase_uq.report.{name}", raising=False)
        monkeypatch.delattr(report, name, raising=False)
    result = tell()
    assert result.exit_code == 1
    assert 'pip install "ase-uq[report]"' in result.stderr


def test_help_shows_an_example():
    result = CliRunner().invoke(app, ["report", "--help"])
    assert result.exit_code == 0
    assert "ase-uq report scored.xyz" in result.stdout


@pytest.mark.usefixtures("blank_pictures")
def test_the_tolerance_says_what_is_wrong(tell, tmp_path):
    assert tell("--flag", "q0.9", "--tolerance", 0.0123).exit_code == 0
    assert "wrong by more than 0.0123" in (tmp_path / "report.html").read_text("utf-8")
    refused = tell("--tolerance", 0)
    assert (refused.exit_code, refused.stderr) == (
        1,
        "error: the tolerance is 0.0 eV/Å; a positive force error was expected.\n",
    )
