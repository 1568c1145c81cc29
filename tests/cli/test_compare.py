"""`ase-uq compare`: the matrix in the terminal, the page, and what is refused."""

import json

import matplotlib as mpl
import pytest

mpl.use("Agg")

SMALL = """
from ase_uq.backends.toy import ToyCalculator
def small():
    return ToyCalculator(("H", "C", "O"))
def silicon():
    return ToyCalculator(("Si",))
def water():
    return ToyCalculator(("H", "O"))
"""

pytestmark = pytest.mark.usefixtures("blank_pictures")


@pytest.fixture
def small(tmp_path) -> None:
    (tmp_path / "own.py").write_text(SMALL)


def test_a_matrix_and_a_page(run, files, tmp_path, small):
    result = run("compare", "toy:", "own.py:small", files.train)
    assert result.exit_code == 0
    assert result.stdout.startswith("60 frames, 540 atoms; features: toy: 136, small 55")
    assert "from small" in result.stdout
    assert "Page written to comparison.html, 9 pictures to comparison_figures" in result.stdout
    assert {path.name for path in tmp_path.iterdir()} >= {"comparison.html", "comparison_figures"}
    text = (tmp_path / "comparison.html").read_text("utf-8")
    assert "own.py:small" in text
    assert str(files.train) in text


def test_numbers_for_programs(run, files, tmp_path, small):
    result = run(
        "compare", "toy:", "own.py:small", files.train, "--json", "--out", "c.html", "--plots", "a", "--block", 3
    )
    assert result.exit_code == 0
    found = json.loads(result.stdout)
    assert {pair["from"] for pair in found["pairs"]} == {"toy:", "small"}
    assert max(pair["gfre"] for pair in found["pairs"]) < 1e-3  # the elements that frames have are in both
    assert "Page written to c.html" in result.stderr
    assert (tmp_path / "a" / "reconstruction.png").exists()


def test_potentials_of_the_same_name_have_longer_ones(run, files, tmp_path, small):
    (tmp_path / "more.py").write_text(SMALL)
    result = run("compare", "more.py:small", "own.py:small", files.train)
    assert result.exit_code == 0
    assert "features: more.py:small 55, own.py:small 55" in result.stdout


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("toy:", "{train}"), 2, "give at least two potentials and then the frames"),
        (("toy:", "toy:", "{train}"), 2, "toy: is given twice"),
        (("toy:", "toy:direct", "{train}", "--out", "c.pdf"), 2, "give a name that ends in .html"),
        (("toy:", "toy:direct", "nothing.xyz"), 1, "there is no file nothing.xyz"),
        (
            ("own.py:water", "own.py:silicon", "{train}"),
            1,
            "no element in common, so no frame is for all of them. water",
        ),
        (("toy:", "own.py:water", "{train}"), 1, "water: frame 0 cannot be used"),
        (("toy:", "own.py:small", "{start}"), 1, "there are 1 frames; with blocks of 1, at least 4 are needed"),
        (("toy:", "own.py:small", "{test}"), 1, "toy: has 136 features, but a half of the frames has only"),
        (("toy:", "own.py:small", "{train}", "--out", "no/c.html"), 1, "cannot write no/c.html"),
    ],
)
def test_what_is_refused(run, files, tmp_path, small, words, code, message):
    before = set(tmp_path.iterdir())
    paths = {name: str(getattr(files, name)) for name in ("train", "test", "start")}
    result = run("compare", *(word.format(**paths) for word in words))
    assert result.exit_code == code
    assert message in " ".join(result.stderr.replace("│", " ").split())
    assert {path for path in tmp_path.iterdir() if path.name != "__pycache__"} == before
